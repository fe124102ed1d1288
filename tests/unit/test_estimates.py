"""Estimates of memory stay within 15 % of the tensors that are alive at the worst moment of a run.

At the sizes of the released models that is counted on the meta device, where nothing is computed.
"""

from dataclasses import replace

import pytest
import torch
from live_bytes import LiveBytes

from allegro_model import geometry, ops
from allegro_model.config import DIT_88X720P, VAE_720P
from allegro_model.dit import AllegroDiT, AllegroTI2V
from allegro_model.geometry import (
    estimate_decode_bytes,
    estimate_encode_bytes,
    estimate_sampling_bytes,
    frames_bytes,
    latent_shape,
)
from allegro_model.vae import Tiling, VideoVAE, blocks

GIB = 2**30


def agree(estimate, measured, tolerance=0.15):
    assert abs(estimate / measured - 1) < tolerance, f"estimated {estimate / GIB:.3f} GiB, counted {measured / GIB:.3f}"


def flash(q, k, v, heads, mask=None):
    """A kernel that needs no memory but for its result, as the usual ones do."""
    return torch.empty_like(q)


@pytest.mark.parametrize("network", [AllegroDiT, AllegroTI2V])
@pytest.mark.parametrize(("batch", "prompts"), [(1, 1), (1, 2), (2, 2)], ids=["alone", "one by one", "both"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [(1280, 720, 88), (640, 368, 40)])
def test_sampling(network, batch, prompts, dtype, size):
    shape = latent_shape(*size)
    config = replace(DIT_88X720P, num_layers=2)  # no block needs more than the first
    dit = network(config, attention=flash, device="meta", dtype=dtype)
    channels = 4 if network is AllegroDiT else 12
    like = {"device": "meta", "dtype": dtype}
    with torch.no_grad(), LiveBytes() as live:
        prepared = [dit.prepare(torch.empty(batch, 512, config.caption_channels, **like)) for _ in range(prompts // batch)]
        dit.denoise(torch.empty(batch, channels, *shape, **like), torch.empty(batch, device="meta"), prepared[0])
    agree(estimate_sampling_bytes(config, shape, batch=batch, dtype_bytes=dtype.itemsize, prompts=prompts),
          live.peak)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sampling_on_a_cpu_with_its_own_kernels(monkeypatch, dtype):
    """Not counted is what a processor without 16-bit instructions takes besides: the float32 weights of one layer."""
    monkeypatch.setattr(ops, "half_is_slow", lambda dtype: False)
    shape = latent_shape(160, 96, 16)
    config = replace(DIT_88X720P, num_layers=1, num_attention_heads=4, caption_channels=64)
    dit = AllegroDiT(config, dtype=dtype)
    with torch.no_grad(), LiveBytes() as live:
        dit(torch.zeros(2, 4, *shape, dtype=dtype), torch.zeros(2), torch.zeros(2, 16, 64, dtype=dtype))
    agree(estimate_sampling_bytes(config, shape, batch=2, dtype_bytes=dtype.itemsize, prompts=2, text_length=16),
          live.peak)


@pytest.mark.parametrize(("tile", "tiles"), [((24, 320, 320), 1), ((24, 256, 256), 2), ((24, 192, 192), 1), ((8, 320, 320), 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tiles_of_the_released_vae(tile, tiles, dtype):
    vae = VideoVAE(VAE_720P, device="meta", dtype=dtype)
    check_tile(vae, tile, tiles)


@pytest.mark.parametrize("budget", [2**40, 2**17], ids=["all frames", "few frames"])
@pytest.mark.parametrize(("tile", "tiles"), [((16, 64, 96), 1), ((24, 64, 64), 2)])
def test_tiles_on_a_cpu(tile, tiles, budget, monkeypatch):
    for module in (blocks, geometry):
        monkeypatch.setattr(module, "FRAMES_BYTES", budget)
    config = replace(VAE_720P, block_out_channels=(8, 16, 32, 32), norm_num_groups=4, temporal_norm_num_groups=4)
    check_tile(VideoVAE(config), tile, tiles)


def check_tile(vae, tile, tiles):
    like = {"device": next(vae.parameters()).device, "dtype": vae.dtype}
    T, H, W = tile
    arguments = {"tiles": tiles, "dtype_bytes": vae.dtype.itemsize}
    with torch.no_grad(), LiveBytes() as live:
        vae.decode_tile(torch.zeros(tiles, 4, T // 4, H // 8, W // 8, **like))
    agree(estimate_decode_bytes(vae.config, tile, **arguments), live.peak)
    with torch.no_grad(), LiveBytes() as live:
        vae.encode_tile(torch.zeros(tiles, 3, T, H, W, **like))
    agree(estimate_encode_bytes(vae.config, tile, **arguments), live.peak)


def test_a_whole_clip_takes_one_tile_and_one_window_more():
    """Of the windows that tiles are blended in, an earlier one must not be held."""
    config = replace(VAE_720P, block_out_channels=(32, 32, 32, 32), layers_per_block=1)
    vae = VideoVAE(config, device="meta")
    tiling = Tiling(8, 64, 64, 0, 0, 0)
    with torch.no_grad(), LiveBytes() as live:
        for part in vae.decode_stream(torch.empty(1, 4, 4, 16, 32, device="meta"), tiling=tiling):
            del part
    window = frames_bytes(256, 128, 8)
    tile = estimate_decode_bytes(config, (8, 64, 64), tiles=1, dtype_bytes=4)
    agree(window + tile, live.peak, 0.05)

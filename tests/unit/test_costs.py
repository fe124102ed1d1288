"""Formulas of what a run costs, against PyTorch's own count on networks without memory."""

from __future__ import annotations

import pytest
import tiny
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from allegro_model.config import DIT_88X720P, PRESETS, VAE_720P, DiTConfig, VAEConfig
from allegro_model.costs import dit_flops, prompt_flops, text_flops, vae_decode_flops, vae_encode_flops
from allegro_model.dit import AllegroDiT
from allegro_model.geometry import LatentShape, latent_shape
from allegro_model.vae import VideoVAE

META = torch.device("meta")


def counted(run: object, *args: Tensor) -> int:
    """FLOPs of a call, as PyTorch counts them."""
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        run(*args)  # type: ignore[operator]
    return counter.get_total_flops()


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    """Attention in two products that the counter sees on every device."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    return (torch.softmax(q @ k.transpose(-1, -2), -1) @ v).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("config", [tiny.DIT, DIT_88X720P])
def test_the_transformer(config: DiTConfig) -> None:
    shape, length = LatentShape(3, 8, 12), 7
    dit = AllegroDiT(config, device=META, attention=attend)
    with torch.no_grad():
        prepared = dit.prepare(torch.empty(1, length, config.caption_channels, device=META))
    latents, time = torch.empty(1, 4, *shape, device=META), torch.empty(1, device=META)
    D = config.width
    clock = 2 * (256 * D + D * D + 6 * D * D)  # of the timestep, whatever the size
    assert counted(dit.denoise, latents, time, prepared) == dit_flops(config, shape, length).total + clock
    embeds = torch.empty(1, length, config.caption_channels, device=META)
    assert counted(dit.prepare, embeds) == prompt_flops(config, length)


def test_at_full_size_self_attention_is_most_of_it() -> None:
    flops = dit_flops(DIT_88X720P, latent_shape(1280, 720, 88), 60)
    assert flops.total == pytest.approx(2.2e15, rel=0.02)
    assert flops.self_attention / flops.total == pytest.approx(0.83, abs=0.005)


def test_twice_the_tokens_is_four_times_the_attention() -> None:
    once, twice = (dit_flops(DIT_88X720P, latent_shape(1280, 720, n), 60) for n in (44, 88))
    assert twice.self_attention == 4 * once.self_attention
    assert twice.linear == 2 * once.linear
    assert twice.cross_attention == 2 * once.cross_attention


@pytest.mark.parametrize("config", [tiny.VAE, VAE_720P, PRESETS["40x360P"].vae])
@pytest.mark.parametrize("cells", [(2, 4, 6), (6, 3, 2)])
def test_the_vae(config: VAEConfig, cells: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention",
                        lambda q, k, v: torch.softmax(q @ k.transpose(-1, -2), -1) @ v)
    vae = VideoVAE(config, device=META)
    t, h, w = cells
    assert counted(vae.decode_tile, torch.empty(1, 4, t, h, w, device=META)) == vae_decode_flops(config, cells)
    frames = torch.empty(1, 3, 4 * t, 8 * h, 8 * w, device=META)
    assert counted(vae.encode_tile, frames) == vae_encode_flops(config, cells)


def test_the_text_encoder() -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra: standalone)")
    sizes = {"d_model": 32, "d_kv": 8, "num_heads": 6, "d_ff": 80, "num_layers": 3, "vocab_size": 100}
    config = transformers.T5Config(**sizes, feed_forward_proj="gated-gelu", use_cache=False,
                                   is_encoder_decoder=False, attn_implementation="eager")
    model = transformers.T5EncoderModel(config).eval()
    ids = torch.zeros(1, 11, dtype=torch.long)
    assert counted(lambda x: model(input_ids=x), ids) == text_flops(sizes, 11)

"""The VideoVAE and diffusers' port of it: same random weights, same inputs, same tiles."""

import pytest
import torch
from parity.cases import recipe
from parity.live import diffusers, relative_error
from torch import Tensor, nn

from allegro_model.config import VAEConfig
from allegro_model.vae import Tiling, VideoVAE

CONFIG = {"block_out_channels": (32, 32, 64, 64), "layers_per_block": 1, "norm_num_groups": 32, "scaling_factor": 0.13235}
TILING = Tiling(8, 16, 24, 4, 8, 8)
# one tile; 2 x 2 x 2 tiles, exactly tile + stride, which is all that diffusers can do
SIZES = [(8, 16, 24), (12, 24, 40)]


def build() -> tuple[VideoVAE, nn.Module]:
    ours = VideoVAE(VAEConfig.from_dict(CONFIG))
    weights = {k: recipe(k, tuple(v.shape), 11) for k, v in ours.state_dict().items()}
    ours.load_state_dict(weights, strict=True)
    reference = diffusers.AutoencoderKLAllegro(**CONFIG)
    reference.load_state_dict(weights, strict=True)
    reference.enable_tiling()
    # its tiles are fixed at 24 x 320 x 320; the attributes they end up in are not
    t = TILING
    reference.kernel = (t.tile_frames, t.tile_height, t.tile_width)
    reference.stride = (t.tile_frames - t.overlap_frames, t.tile_height - t.overlap_height, t.tile_width - t.overlap_width)
    return ours.eval(), reference.eval()


def clip(size: tuple[int, int, int]) -> Tensor:
    return torch.rand((1, 3, *size), generator=torch.Generator().manual_seed(2)) * 2 - 1


def latents(size: tuple[int, int, int]) -> Tensor:
    T, H, W = size
    return torch.randn((1, 4, T // 4, H // 8, W // 8), generator=torch.Generator().manual_seed(4))


@torch.inference_mode()
def encode_both(ours: VideoVAE, reference: nn.Module, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Means and log-variances, [B, 8, t, h, w]."""
    actual = torch.cat(ours.to(dtype).encode(x, tiling=TILING), dim=1)
    posterior = reference.to(dtype).encode(x.to(dtype)).latent_dist
    return actual, torch.cat((posterior.mean, posterior.logvar), dim=1)


@torch.inference_mode()
def decode_both(ours: VideoVAE, reference: nn.Module, z: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Frames, [B, 3, T, H, W]; diffusers returns [B, T, 3, H, W]."""
    actual = ours.to(dtype).decode(z.to(dtype), tiling=TILING)
    return actual, reference.to(dtype).decode(z.to(dtype)).sample.transpose(1, 2)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_encode_float32(size: tuple[int, int, int]) -> None:
    actual, expected = encode_both(*build(), clip(size), torch.float32)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_decode_float32(size: tuple[int, int, int]) -> None:
    actual, expected = decode_both(*build(), latents(size), torch.float32)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(("both", "make"), [(encode_both, clip), (decode_both, latents)], ids=["encode", "decode"])
def test_bfloat16_is_as_exact_as_diffusers(both, make) -> None:
    """Each is held against the float32 result; ours blends in float32 and may not be further away (factor 1.15)."""
    ours, reference = build()
    x = make(SIZES[1])
    exact, _ = both(ours, reference, x, torch.float32)
    actual, expected = both(ours, reference, x, torch.bfloat16)
    assert relative_error(actual, exact) <= 1.15 * relative_error(expected, exact)
    assert relative_error(actual, exact) < 0.05

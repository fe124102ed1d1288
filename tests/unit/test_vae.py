"""The VideoVAE as a whole: lengths, images, batches, halves, cancel. Tiles have their own tests."""

import pytest
import torch
from tiny import VAE, tiny_vae
from torch import nn

from allegro_model.errors import GeometryError
from allegro_model.vae import Tiling, VideoVAE, denormalise, normalise
from allegro_model.vae.blocks import TemporalBlock


def clip(frames=16, height=32, width=32, batch=1, seed=0):
    return torch.rand(batch, 3, frames, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.mark.parametrize(("frames", "latent_frames"), [(1, 1), (3, 1), (4, 1), (5, 2), (16, 4), (17, 5)])
def test_any_frame_count_is_encoded(frames, latent_frames):
    mean, logvar = tiny_vae().encode(clip(frames))
    assert mean.shape == logvar.shape == (1, 4, latent_frames, 4, 4)


def test_an_image_is_a_still_clip():
    image = clip(1)
    vae = tiny_vae()
    assert torch.equal(vae.encode(image)[0], vae.encode(image.expand(-1, -1, 4, -1, -1))[0])
    assert vae.decode(vae.encode(image)[0], num_frames=1).shape == image.shape


def test_items_of_a_batch_are_independent():
    vae, frames = tiny_vae(), clip(20, 40, 48, batch=2)
    mean, _ = vae.encode(frames)
    decoded = vae.decode(mean)
    for i in range(2):
        assert torch.allclose(mean[i : i + 1], vae.encode(frames[i : i + 1])[0], atol=1e-5)
        assert torch.allclose(decoded[i : i + 1], vae.decode(mean[i : i + 1]), atol=1e-4)


def test_stream_is_the_whole_in_order():
    vae, latents = tiny_vae(), torch.randn(1, 4, 9, 5, 6, generator=torch.Generator().manual_seed(0))
    parts = list(vae.decode_stream(latents))
    assert len(parts) > 2
    assert torch.equal(torch.cat(parts, dim=2), vae.decode(latents))


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_halves_have_only_their_own_tensors(part):
    half = VideoVAE(VAE, part=part, device="meta").state_dict().keys()
    quant = {"encoder": "quant_conv.", "decoder": "post_quant_conv."}[part]
    assert half == {k for k in tiny_vae().state_dict() if k.startswith((f"{part}.", quant))}


def test_progress_counts_tiles_and_cancels():
    class Stop(Exception):
        pass

    seen = []

    def progress(done, total):
        seen.append((done, total))
        if done == 2:
            raise Stop

    with pytest.raises(Stop):
        tiny_vae().encode(clip(32, 48, 48), progress=progress)
    assert [done for done, _ in seen] == [0, 1, 2]
    assert seen[0][1] == 3 * 2 * 2


@pytest.mark.parametrize(("shape", "message"), [
    ((1, 3, 8, 30, 32), r"height 30.*nearest: 24 or 32"),
    ((1, 3, 8, 32, 9), r"width 9.*nearest: 8 or 16"),
    ((3, 8, 32, 32), r"expected \[batch, 3"),
    ((1, 3, 0, 32, 32), r"none of them 0"),
    ((1, 4, 8, 32, 32), r"expected \[batch, 3"),
])
def test_wrong_shapes_are_explained(shape, message):
    with pytest.raises(GeometryError, match=message):
        tiny_vae().encode(torch.zeros(shape))


@pytest.mark.parametrize(("change", "message"), [
    ({"tile_frames": 6}, "multiple of 4"), ({"tile_height": 0}, "multiple of 8"),
    ({"overlap_width": 320}, "from 0 to 312"), ({"overlap_frames": 3}, "multiple of 4"),
    ({"tiles_per_batch": 0}, "at least 1"),
])
def test_wrong_tiles_are_explained(change, message):
    good = {"tile_frames": 24, "tile_height": 320, "tile_width": 320, "overlap_frames": 8, "overlap_height": 120,
            "overlap_width": 80}
    with pytest.raises(GeometryError, match=message):
        Tiling(**{**good, **change})


def test_scaling_is_its_own_inverse():
    z = torch.randn(2, 4, 1, 2, 2)
    assert torch.allclose(denormalise(normalise(z, 0.13235), 0.13235), z)


@pytest.mark.parametrize("resample", ["none", "down", "up"])
def test_under_autocast_the_residual_stream_keeps_its_precision(resample: str) -> None:
    """A fresh block is the identity (or repeats or skips frames) to the last bit, although its branch is bfloat16."""
    block = TemporalBlock(8, 4, nn, resample=resample)
    x = torch.rand(1, 8, 4, 6, 5)
    with torch.autocast("cpu", torch.bfloat16):
        y = block(x)
    expected = {"none": x, "down": x[:, :, ::2], "up": x.repeat_interleave(2, dim=2)}[resample]
    assert torch.equal(y, expected)

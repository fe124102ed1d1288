"""Image to video: positions, fitting, the condition, the network, its loading."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny import DIT as CONFIG
from torch import Tensor

from allegro_model.conditioning import GivenFrames, build_condition, fit_images, resolve_positions
from allegro_model.dit import AllegroDiT, AllegroTI2V
from allegro_model.errors import GeometryError
from allegro_model.loading import load_dit
from allegro_model.sampling import Denoiser, Prompt


def frames(n: int, value: float = 0.5, height: int = 16, width: int = 32) -> Tensor:
    return torch.full((n, 3, height, width), value)


# Positions


def test_negative_positions_count_from_the_end() -> None:
    assert resolve_positions([0, -1, 5, -24], 25) == (0, 24, 5, 1)


@pytest.mark.parametrize(("positions", "words"), [
    ([24], "position 24"), ([-25], "position -25"), ([0, 0], "given twice"), ([23, -1], "frame 23 is given twice"),
])
def test_impossible_positions_are_refused(positions: list[int], words: str) -> None:
    with pytest.raises(GeometryError, match=words):
        resolve_positions(positions, 24)


def test_every_image_needs_one_position() -> None:
    with pytest.raises(GeometryError, match="3 images and 2 positions"):
        GivenFrames.at(frames(3), [0, 1], 24)


@pytest.mark.parametrize("num_frames", [4, 10, 0, -8])
def test_lengths_that_the_model_cannot_make_are_refused(num_frames: int) -> None:
    with pytest.raises(GeometryError, match="multiple of 4"):
        GivenFrames.at(frames(0), [], num_frames)


def test_modes_are_positions() -> None:
    assert GivenFrames.start_of(frames(3), 24).positions == (0, 1, 2)
    assert GivenFrames.end_of(frames(3), 24).positions == (21, 22, 23)
    assert GivenFrames.loop(frames(1), 24).positions == (0, 23)
    assert GivenFrames.start_of(frames(0), 24).positions == ()


# Canvas and mask


def test_canvas_is_grey_where_nothing_is_given() -> None:
    given = GivenFrames.at(torch.stack([frames(1, 0.3)[0], frames(1, -0.7)[0]]), [2, -1], 8)
    clip = given.canvas()
    assert clip.shape == (1, 3, 8, 16, 32)
    means = clip.mean(dim=(0, 1, 3, 4))
    torch.testing.assert_close(means, torch.tensor([0, 0, 0.3, 0, 0, 0, 0, -0.7]))


@pytest.mark.parametrize(("frame", "channel", "latent_frame"), [(0, 0, 0), (5, 0, 5), (43, 1, 21), (87, 3, 21), (22, 1, 0)])
def test_mask_puts_a_frame_where_the_reference_does(frame: int, channel: int, latent_frame: int) -> None:
    mask = GivenFrames.at(frames(1), [frame], 88).latent_mask(3, 5)
    assert mask.shape == (1, 4, 22, 3, 5)
    zeros = (mask == 0).all(dim=-1).all(dim=-1)[0].nonzero().tolist()
    assert zeros == [[channel, latent_frame]]
    assert mask.sum() == (88 - 1) * 15


def test_condition_refuses_latents_of_another_length() -> None:
    given = GivenFrames.start_of(frames(1), 24)
    with pytest.raises(GeometryError, match="24 frames"):
        build_condition(torch.zeros(1, 4, 5, 2, 4), given)
    assert build_condition(torch.zeros(2, 4, 6, 2, 4), given).shape == (2, 8, 6, 2, 4)


# Fitting


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("fit", ["crop", "pad", "stretch"])
@pytest.mark.parametrize("size", [(7, 100), (100, 7), (1, 1), (48, 80), (300, 500)])
def test_any_picture_fits(channels: int, fit: str, size: tuple[int, int]) -> None:
    images = torch.rand((2, channels, *size), generator=torch.Generator().manual_seed(0))
    before = images.clone()
    fitted = fit_images(images, 80, 48, fit)
    assert fitted.shape == (2, 3, 48, 80)
    assert fitted.dtype == torch.float32
    assert fitted.abs().max() <= 1
    assert torch.equal(images, before)


def test_crop_keeps_the_centre_and_pad_keeps_everything() -> None:
    image = torch.zeros(1, 3, 10, 40)
    image[..., :5] = 1  # a bright stripe at the left edge
    assert fit_images(image, 10, 10, "crop").max() == -1
    padded = fit_images(image, 40, 40, "pad")
    assert padded[0, 0, 20, 0] == 1
    assert (padded[..., :15, :] == 0).all()  # grey, above and below
    assert (padded[..., 25:, :] == 0).all()


def test_alpha_is_laid_over_black() -> None:
    image = torch.ones(1, 4, 8, 8)
    image[:, 3] = 0.25
    torch.testing.assert_close(fit_images(image, 8, 8), torch.full((1, 3, 8, 8), -0.5))


@pytest.mark.parametrize("bad", [torch.zeros(3, 8, 8), torch.zeros(1, 5, 8, 8), torch.zeros(1, 3, 0, 8)])
def test_what_is_no_picture_is_refused(bad: Tensor) -> None:
    with pytest.raises(GeometryError, match="images of shape"):
        fit_images(bad, 8, 8)


def test_bytes_are_refused() -> None:
    with pytest.raises(GeometryError, match=r"torch\.uint8.*255"):
        fit_images(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), 8, 8)


def test_unknown_fit_is_refused() -> None:
    with pytest.raises(GeometryError, match="crop, pad, stretch"):
        fit_images(frames(1), 8, 8, "zoom")


# The network


def fill(model: torch.nn.Module) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(1)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1, generator=generator)
    return model.requires_grad_(False).eval()


def test_with_zero_linears_it_is_the_text_to_video_model() -> None:
    ti2v = fill(AllegroTI2V(CONFIG))
    for name in ("masked_video", "mask", "first_frame"):
        torch.nn.init.zeros_(getattr(ti2v, f"pos_embed_{name}")[1].weight)
    t2v = AllegroDiT(CONFIG).eval()
    t2v.load_state_dict({k: v for k, v in ti2v.state_dict().items() if not k.startswith("pos_embed_")})
    x, text = torch.randn(2, 12, 2, 4, 4), torch.randn(2, 3, CONFIG.caption_channels)
    timesteps = torch.tensor([10.0, 500.0])
    torch.testing.assert_close(ti2v(x, timesteps, text), t2v(x[:, :4], timesteps, text))


def test_every_part_of_the_input_counts() -> None:
    model = fill(AllegroTI2V(CONFIG))
    x, text = torch.randn(1, 12, 2, 4, 4), torch.randn(1, 3, CONFIG.caption_channels)
    base = model(x, torch.tensor([500.0]), text)
    for part in range(3):
        changed = x.clone()
        changed[:, 4 * part : 4 * part + 4] += 1
        assert not torch.allclose(model(changed, torch.tensor([500.0]), text), base)


@pytest.mark.parametrize("shape", [(1, 4, 2, 4, 4), (1, 12, 1, 4, 4), (1, 9, 2, 4, 4)])
def test_other_inputs_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(GeometryError, match=r"expected \[B, 12, t, h, w\]"):
        AllegroTI2V(CONFIG)(torch.zeros(shape), torch.zeros(1), torch.zeros(1, 3, CONFIG.caption_channels))


def test_condition_and_network_must_belong_together() -> None:
    prompt = Prompt(torch.zeros(1, 3, CONFIG.caption_channels), torch.ones(1, 3, dtype=torch.bool))
    with pytest.raises(GeometryError, match="without a condition"):
        Denoiser(AllegroTI2V(CONFIG), prompt, None, 1.0, batched=False)
    with pytest.raises(GeometryError, match="this is another one"):
        Denoiser(AllegroDiT(CONFIG), prompt, None, 1.0, batched=False, condition=torch.zeros(1, 8, 2, 4, 4))


@pytest.mark.parametrize("batched", [True, False])
def test_both_halves_of_guidance_see_the_condition(batched: bool) -> None:
    model = fill(AllegroTI2V(CONFIG))
    generator = torch.Generator().manual_seed(2)
    prompts = [Prompt(torch.randn(1, 3, CONFIG.caption_channels, generator=generator), torch.ones(1, 3, dtype=torch.bool))
               for _ in range(2)]
    x = torch.randn(1, 4, 2, 4, 4, generator=generator)
    condition = torch.randn(1, 8, 2, 4, 4, generator=generator)
    sigma = torch.tensor(2.0)
    eps = Denoiser(model, *prompts, 3.0, batched=batched, condition=condition).eps(x, sigma)  # type: ignore[arg-type]
    one, two = (Denoiser(model, p, None, 1.0, batched=False, condition=condition).eps(x, sigma)  # type: ignore[arg-type]
                for p in prompts)
    torch.testing.assert_close(eps, two + 3.0 * (one - two))


def test_it_is_recognised_by_its_tensors(tmp_path: Path) -> None:
    model = fill(AllegroTI2V(CONFIG))
    save_file(model.state_dict(), tmp_path / "ti2v.safetensors")
    loaded = load_dit(tmp_path / "ti2v.safetensors", config=CONFIG)
    assert isinstance(loaded, AllegroTI2V)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name

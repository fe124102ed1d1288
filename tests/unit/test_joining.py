"""Joining clips: frame counts, colours across the join, pieces of any size."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from allegro_model.errors import GeometryError
from allegro_model.joining import join_clips, join_streams


def clip(num_frames: int, start: int = 0) -> Tensor:
    """[3, T, 12, 20]: a pattern that moves with time; frame n is the same in every clip."""
    t = torch.arange(start, start + num_frames).view(1, -1, 1, 1)
    y, x = torch.arange(12).view(1, 1, -1, 1), torch.arange(20).view(1, 1, 1, -1)
    c = torch.arange(3).view(-1, 1, 1, 1)
    return 0.5 * torch.sin(0.3 * x + 0.5 * y + 0.1 * t + c) - 0.1 * c


def drifted(frames: Tensor) -> Tensor:
    """Less contrast, and another tint in each channel."""
    return 0.9 * frames + torch.tensor([0.1, -0.05, 0.02]).view(3, 1, 1, 1)


@pytest.mark.parametrize("overlap", [1, 4, 8])
@pytest.mark.parametrize("adjust", ["first", "second", None])
def test_identical_clips_join_without_a_trace(overlap: int, adjust: str) -> None:
    joined = join_clips(clip(12), clip(16, start=12 - overlap), overlap, adjust=adjust)
    assert joined.shape == (3, 28 - overlap, 12, 20)
    torch.testing.assert_close(joined, clip(28 - overlap), atol=1e-5, rtol=0)


def test_the_drift_of_a_continuation_is_taken_out() -> None:
    first, second = clip(12), drifted(clip(16, start=8))
    joined = join_clips(first, second, 4)
    torch.testing.assert_close(joined, clip(24), atol=1e-5, rtol=0)
    means = joined.mean(dim=(2, 3))
    assert (means[:, 1:] - means[:, :-1]).abs().max() < 0.02  # the pattern's own change; the tint was 0.1
    unmatched = join_clips(first, second, 4, adjust=None).mean(dim=(2, 3))
    assert (unmatched[:, 12] - means[:, 12]).abs().max() > 0.08
    assert torch.equal(joined[:, :8], first[:, :8])


def test_what_is_put_in_front_takes_the_colours_of_the_given_clip() -> None:
    given = clip(12, start=12)
    joined = join_clips(drifted(clip(16)), given, 4, adjust="first")
    torch.testing.assert_close(joined, clip(24), atol=1e-5, rtol=0)
    assert torch.equal(joined[:, 16:], given[:, 4:])


def test_flat_pictures_gain_no_noise() -> None:
    first, second = torch.zeros(3, 6, 8, 8), torch.full((3, 6, 8, 8), 0.3)
    joined = join_clips(first, second, 2)
    torch.testing.assert_close(joined, torch.zeros(3, 10, 8, 8))
    noise = torch.randn((3, 6, 8, 8), generator=torch.Generator().manual_seed(0))
    loud = join_clips(0.5 * noise, 1e-3 * noise, 2)
    torch.testing.assert_close(loud[:, 6:].std(dim=(1, 2, 3)), 1.25e-3 * noise[:, 2:].std(dim=(1, 2, 3)))


def test_shared_frames_fade_from_one_clip_to_the_other() -> None:
    joined = join_clips(torch.zeros(1, 3, 4, 2, 2), torch.ones(1, 3, 4, 2, 2), 3, adjust=None)
    torch.testing.assert_close(joined[0, 0, :, 0, 0], torch.tensor([0, 0.25, 0.5, 0.75, 1]))


def test_without_an_overlap_nothing_changes() -> None:
    joined = join_clips(clip(4), drifted(clip(4)), 0)
    assert torch.equal(joined, torch.cat((clip(4), drifted(clip(4))), dim=1))


def pieces(frames: Tensor, size: int) -> Iterator[Tensor]:
    yield from frames.split(size, dim=-3)


@pytest.mark.parametrize("adjust", ["first", "second", None])
@pytest.mark.parametrize("overlap", [0, 1, 5, 8])
@pytest.mark.parametrize("size", [1, 3, 8, 100])
def test_pieces_of_any_size_give_the_same_clip(size: int, overlap: int, adjust: str) -> None:
    first, second = clip(13), drifted(clip(8, start=13 - overlap))
    parts = list(join_streams(pieces(first, size), pieces(second, size), overlap, adjust=adjust))
    torch.testing.assert_close(torch.cat(parts, dim=1), join_clips(first, second, overlap, adjust=adjust))


def test_inputs_are_left_as_they_are() -> None:
    first, second = clip(8), drifted(clip(8))
    before = first.clone(), second.clone()
    join_clips(first, second, 8)
    assert torch.equal(first, before[0])
    assert torch.equal(second, before[1])


@pytest.mark.parametrize(("first", "second", "overlap", "words"), [
    (clip(4), clip(8), 5, "at most 4"), (clip(8), clip(4), 5, "at most 4"), (clip(8), clip(8), -1, "overlap=-1"),
    (clip(8), clip(8)[..., :10], 2, "same size"), (clip(8), clip(8)[None], 2, "same size"),
])
def test_what_cannot_be_joined_is_refused(first: Tensor, second: Tensor, overlap: int, words: str) -> None:
    with pytest.raises(GeometryError, match=words):
        join_clips(first, second, overlap)
    if overlap:
        with pytest.raises(GeometryError, match=words):
            list(join_streams([first], [second], overlap))


@pytest.mark.parametrize("adjust", ["first", "second"])
def test_streams_without_a_frame_are_refused(adjust: str) -> None:
    for first, second in (([], [clip(4)]), ([clip(4)], [])):
        with pytest.raises(GeometryError, match="holds no frame"):
            list(join_streams(first, second, 2, adjust=adjust))

"""The loop over a clip: counts, positions, what is passed on, held, batched and cancelled."""

import copy
import logging
import math
import weakref
from fractions import Fraction

import pytest
import torch
from tiny import tiny_vfi

from allegro_model.errors import Cancelled, GeometryError, InterpolationError, NonFiniteError
from allegro_model.vfi import (
    EMAInterpolator,
    FrameTimes,
    interpolate_clip,
    interpolate_stream,
    is_reached_by_halving,
)
from allegro_model.vfi.halving import by_halving, halving_levels
from allegro_model.vfi.scenes import is_cut, similarity, thumbnail

RATES = [(15, 24), (15, 30), (15, 60), (24, 60), (30, 15), (60, 24), (30000 / 1001, 60), (12.5, 25), (15, 15)]


class Blend:
    """Mixes the frames of a pair by position, and writes down what it was asked for."""

    def __init__(self, arbitrary_time=True, most_pairs=99):
        self.arbitrary_time, self.most_pairs = arbitrary_time, most_pairs
        self.frames, self.calls = [], []

    def features(self, frame):
        self.frames.append(frame)
        return frame

    def between(self, first, second, positions):
        if len(first) > self.most_pairs:
            raise torch.OutOfMemoryError("no")
        self.calls.append((len(first), list(positions)))
        pairs = list(zip(first, second, strict=True))
        return [torch.stack([(1 - t) * a + t * b for a, b in pairs]) for t in positions]


def ramp(count, size=(8, 8)):
    """Frame i is i / 100 everywhere."""
    return [torch.full((3, *size), i / 100) for i in range(count)]


def values(frames):
    return [round(float(frame[0, 0, 0]) * 100, 4) for frame in frames]


@pytest.mark.parametrize("multiplier", [2, 3, 4, 7])
@pytest.mark.parametrize("count", [2, 5])
def test_multiples(multiplier, count):
    times = FrameTimes.multiplied(multiplier)
    made = list(interpolate_stream(ramp(count), Blend(), times, scene_threshold=0))
    assert len(made) == times.count(count) == (count - 1) * multiplier + 1
    assert values(made) == [round(i / multiplier, 4) for i in range(len(made))]
    held = FrameTimes.multiplied(multiplier, hold_last=True)
    made = list(interpolate_stream(ramp(count), Blend(), held, scene_threshold=0))
    assert len(made) == held.count(count) == count * multiplier
    assert values(made) == [min(round(i / multiplier, 4), count - 1) for i in range(len(made))]


def test_88_frames_become_176_with_the_same_duration():
    times = FrameTimes.multiplied(2, hold_last=True)
    assert times.count(88) == 176
    assert times.output_fps(15) == 30
    assert FrameTimes.multiplied(2).count(88) == 175


@pytest.mark.parametrize("rates", RATES, ids=str)
@pytest.mark.parametrize("hold_last", [False, True])
@pytest.mark.parametrize("count", [1, 2, 9])
def test_rates(rates, hold_last, count):
    """Source position p = i * fps_in / fps_out, exactly."""
    times = FrameTimes.between_rates(*rates, hold_last=hold_last)
    step = Fraction(rates[0]).limit_denominator(100_000) / Fraction(rates[1]).limit_denominator(100_000)
    last = count if hold_last else count - 1
    expected = [i * step for i in range(5000) if (i * step < last or (i * step == last and not hold_last))]
    made = list(interpolate_stream(ramp(count), Blend(), times, scene_threshold=0))
    assert len(made) == times.count(count) == len(expected)
    assert values(made) == [round(float(min(p, Fraction(count - 1))), 4) for p in expected]
    assert math.isclose(times.output_fps(rates[0]), rates[1])


@pytest.mark.parametrize(("short", "exact"), [(23.976, 24000), (29.97, 30000), (59.94, 60000), (119.88, 120000)])
def test_rates_of_television_may_be_written_short(short, exact):
    """Else none of the source's own frames would be in the result but the first."""
    times = FrameTimes.between_rates(exact / 2 / 1001, short)
    assert times.step == Fraction(1, 2)
    assert times == FrameTimes.between_rates(Fraction(exact, 2002), Fraction(exact, 1001))
    assert times.output_fps(exact / 2002) == exact / 1001
    assert FrameTimes.between_rates(25, 29.96).step == Fraction(2500, 2996)


def test_a_long_clip_does_not_drift():
    times = FrameTimes.between_rates(30000 / 1001, 60)
    assert sum(len(times.between(k)) for k in range(20_000)) == times.count(20_001) - 1


@pytest.mark.parametrize("bad", [0, 1, 65, 2.0, True])
def test_impossible_multipliers(bad):
    with pytest.raises(InterpolationError, match="from 2 to 64"):
        FrameTimes.multiplied(bad)


@pytest.mark.parametrize("bad", [(0, 30), (15, -1), (15, math.nan), (15, math.inf), (1, 65)])
def test_impossible_rates(bad):
    with pytest.raises(InterpolationError):
        FrameTimes.between_rates(*bad)


def test_source_frames_are_the_same_objects_and_bits():
    source = [torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    made = list(interpolate_stream(source, Blend(), FrameTimes.multiplied(3), scene_threshold=0))
    assert all(made[3 * i] is frame for i, frame in enumerate(source))
    images = torch.stack(source).movedim(1, -1)
    before = images.clone()
    clip = interpolate_clip(images, Blend(), FrameTimes.multiplied(3), scene_threshold=0)
    assert clip.shape == (10, 8, 8, 3)
    assert clip.dtype == torch.float32
    assert torch.equal(clip[::3], images)
    assert torch.equal(images, before)
    alpha = torch.cat((images, torch.ones(4, 8, 8, 1)), dim=-1)
    assert torch.equal(interpolate_clip(alpha, Blend(), FrameTimes.multiplied(3), scene_threshold=0), clip)


def test_features_of_every_frame_are_asked_for_once():
    model = Blend()
    list(interpolate_stream(ramp(6), model, FrameTimes.multiplied(4), scene_threshold=0, pairs_per_batch=2))
    assert values(model.frames) == [0, 1, 2, 3, 4, 5]
    assert model.calls == [(2, [0.25, 0.5, 0.75]), (2, [0.25, 0.5, 0.75]), (1, [0.25, 0.5, 0.75])]


def test_batches_shrink_when_memory_runs_out():
    model = Blend(most_pairs=2)
    made = list(interpolate_stream(ramp(12), model, FrameTimes.multiplied(2), scene_threshold=0, pairs_per_batch=8))
    assert values(made) == [i / 2 for i in range(23)]
    assert max(pairs for pairs, _ in model.calls) == 2
    with pytest.raises(torch.OutOfMemoryError):
        list(interpolate_stream(ramp(3), Blend(most_pairs=0), FrameTimes.multiplied(2), scene_threshold=0))


def checkerboard(cells, phase=0.0):
    wave = torch.sin(torch.linspace(0, cells * math.pi, 64) + phase)
    return (0.5 + 0.5 * wave[:, None] * wave[None]).expand(3, 64, 64).contiguous()


@pytest.mark.parametrize("pairs", [1, 4])
def test_cuts_hold_the_nearer_frame_and_keep_the_count(pairs):
    a, b, c, d = checkerboard(3), checkerboard(3, 0.1), checkerboard(9, 1.0), checkerboard(9, 1.1)
    model = Blend()
    made = list(interpolate_stream([a, b, c, d], model, FrameTimes.multiplied(4), pairs_per_batch=pairs))
    assert len(made) == 13
    assert made[5] is b
    assert made[6] is c  # in the middle the new scene begins
    assert made[7] is c
    assert torch.allclose(made[2], (a + b) / 2)
    assert sum(count for count, _ in model.calls) == 2
    off = list(interpolate_stream([b, c], Blend(), FrameTimes.multiplied(2), scene_threshold=0))
    assert torch.allclose(off[1], (b + c) / 2)


def test_similarity_tells_motion_from_cuts():
    def of(a, b):
        return similarity(thumbnail(a), thumbnail(b))

    disc = ((torch.arange(64)[:, None] - 20) ** 2 + (torch.arange(64)[None] - 20) ** 2 < 100).float().expand(3, 64, 64)
    assert of(disc, disc) == pytest.approx(1)
    assert of(disc, disc.roll(6, dims=2)) > 0.5
    assert of(disc, disc * 0.8) > 0.5
    assert of(checkerboard(3), checkerboard(9, 1.0)) < 0.2
    assert of(checkerboard(3), 1 - checkerboard(3)) < 0
    assert not is_cut(thumbnail(disc), thumbnail(1 - disc), 0)


def test_stills_need_no_model():
    frame = ramp(2)[1]
    model = Blend()
    made = list(interpolate_stream([frame, frame.clone(), frame.clone()], model, FrameTimes.multiplied(2)))
    assert len(made) == 5
    assert not model.frames
    assert not model.calls


def test_fewer_frames_need_no_model():
    model = Blend()
    made = list(interpolate_stream(ramp(6), model, FrameTimes.between_rates(30, 15), scene_threshold=0))
    assert values(made) == [0, 2, 4]
    assert not model.frames


def test_one_frame_is_returned_with_a_warning(caplog):
    frame = torch.rand(3, 8, 8)
    with caplog.at_level(logging.WARNING):
        made = list(interpolate_stream([frame], Blend(), FrameTimes.multiplied(2)))
    assert len(made) == 1
    assert made[0] is frame
    assert "only one frame" in caplog.text
    assert len(list(interpolate_stream([frame], Blend(), FrameTimes.multiplied(2, hold_last=True)))) == 2


def test_what_cannot_be_interpolated():
    times = FrameTimes.multiplied(2)
    with pytest.raises(InterpolationError, match="no frame"):
        list(interpolate_stream([], Blend(), times))
    with pytest.raises(InterpolationError, match="frame 2 is"):
        list(interpolate_stream([*ramp(2), torch.zeros(3, 8, 9)], Blend(), times))
    with pytest.raises(InterpolationError, match="scene_threshold"):
        list(interpolate_stream(ramp(2), Blend(), times, scene_threshold=1.5))
    with pytest.raises(InterpolationError, match="expected"):
        interpolate_clip(torch.zeros(2, 8, 8, 1), Blend(), times)
    with pytest.raises(InterpolationError, match=r"torch\.uint8.*255"):
        interpolate_clip(torch.zeros(2, 8, 8, 3, dtype=torch.uint8), Blend(), times)


def test_progress_counts_pairs_and_cancels_within_one():
    seen = []
    list(interpolate_stream(ramp(4), Blend(), FrameTimes.multiplied(2), num_frames=4, scene_threshold=0,
                            progress=lambda done, total: seen.append((done, total))))
    assert seen == [(1, 3), (2, 3), (3, 3)]

    def cancel(done, total):
        raise Cancelled("stop")

    model = Blend()
    with pytest.raises(Cancelled):
        interpolate_clip(torch.stack(ramp(50)).movedim(1, -1), model, FrameTimes.multiplied(2), scene_threshold=0,
                         progress=cancel)
    assert len(model.calls) == 1


def test_a_stream_keeps_a_few_frames_only():
    alive = weakref.WeakSet()

    def source():
        for i in range(60):
            frame = torch.full((3, 8, 8), i / 100)
            alive.add(frame)
            yield frame

    class Forgetful(Blend):
        def features(self, frame):
            return frame.clone()

        def between(self, first, second, positions):
            return [torch.stack(list(first)) for _ in positions]

    most = 0
    for _ in interpolate_stream(source(), Forgetful(), FrameTimes.multiplied(2), scene_threshold=0, pairs_per_batch=3):
        most = max(most, len(alive))
    assert most <= 5


# Models that know the middle only


def test_halving():
    assert [halving_levels(p) for p in (0.5, 0.25, 0.75, Fraction(1, 64), Fraction(1, 3), Fraction(1, 128), 0, 1)] \
        == [1, 2, 2, 6, None, None, None, None]
    calls = []

    def middle(a, b):
        calls.append((a, b))
        return (a + b) / 2

    assert by_halving([0.75, 0.125], 0.0, 8.0, middle=middle, features=lambda x: x) == [6.0, 1.0]
    assert calls == [(0.0, 8.0), (0.0, 4.0), (0.0, 2.0), (4.0, 8.0)]
    assert by_halving([0.875], 0.0, 8.0, middle=middle, features=lambda x: x) == [7.0]
    with pytest.raises(InterpolationError, match="multiplier of 2, 4, 8"):
        by_halving([1 / 3], 0.0, 8.0, middle=middle, features=lambda x: x)


def test_rates_that_halving_does_not_reach_are_moved_with_a_warning(caplog):
    assert is_reached_by_halving(FrameTimes.between_rates(15, 24))
    assert not is_reached_by_halving(FrameTimes.multiplied(3))
    model = Blend(arbitrary_time=False)
    with caplog.at_level(logging.WARNING):
        made = list(interpolate_stream(ramp(3), model, FrameTimes.multiplied(3), scene_threshold=0))
    assert values(made) == [0, 0.375, 0.625, 1, 1.375, 1.625, 2]
    assert "nearest eighth" in caplog.text
    caplog.clear()
    list(interpolate_stream(ramp(3), Blend(arbitrary_time=False), FrameTimes.multiplied(4), scene_threshold=0))
    assert not caplog.text


# With the network


@pytest.mark.parametrize("arbitrary_time", [True, False])
def test_the_network_in_the_loop(arbitrary_time):
    model = tiny_vfi(arbitrary_time=arbitrary_time)
    images = torch.rand(3, 20, 24, 3, generator=torch.Generator().manual_seed(0))
    clip = interpolate_clip(images, EMAInterpolator(model), FrameTimes.multiplied(4), scene_threshold=0)
    assert torch.equal(clip[::4], images)
    a, b = images[1:2].movedim(-1, 1), images[2:3].movedim(-1, 1)
    with torch.inference_mode():
        expected = model.forward_multi_timestep(a, b, [0.25, 0.5, 0.75])
    torch.testing.assert_close(clip[5:8].movedim(-1, 1), expected, atol=1e-6, rtol=0)
    batched = interpolate_clip(images, EMAInterpolator(model), FrameTimes.multiplied(4), scene_threshold=0, pairs_per_batch=2)
    torch.testing.assert_close(batched, clip, atol=1e-5, rtol=0)


@pytest.mark.parametrize("options", [{"flow_scale": 0.5}, {"tta": True}, {"flow_scale": 0.25, "tta": True}], ids=str)
def test_options_of_the_network_in_batches(options):
    images = torch.rand(3, 20, 24, 3, generator=torch.Generator().manual_seed(0))
    plain, single, batched = (
        interpolate_clip(images, EMAInterpolator(tiny_vfi(), **chosen), FrameTimes.multiplied(2), scene_threshold=0,
                         pairs_per_batch=pairs)
        for chosen, pairs in (({}, 1), (options, 1), (options, 2)))
    torch.testing.assert_close(batched, single, atol=1e-5, rtol=0)
    assert not torch.allclose(plain, single, atol=1e-3)
    with pytest.raises(GeometryError, match="flow_scale"):
        EMAInterpolator(tiny_vfi(), flow_scale=2)


def test_overflow_falls_back_to_float32(caplog):
    half = tiny_vfi().half()
    with torch.no_grad():
        half.unet.down0.conv1[0].weight.mul_(4e5)  # beyond float16, harmless in float32
        half.unet.down0.conv2[0].weight.mul_(1e-4)
    images = torch.rand(3, 32, 32, 3, generator=torch.Generator().manual_seed(0))
    exact = interpolate_clip(images, EMAInterpolator(copy.deepcopy(half).float()), FrameTimes.multiplied(2), scene_threshold=0)
    with caplog.at_level(logging.WARNING):
        made = interpolate_clip(images, EMAInterpolator(half), FrameTimes.multiplied(2), scene_threshold=0)
    assert "float32 from here on" in caplog.text
    assert len(caplog.records) == 1
    assert half.dtype == torch.float16  # the model that was given is left as it is
    torch.testing.assert_close(made, exact, atol=1e-5, rtol=0)


def test_overflow_in_float32_is_an_error():
    model = tiny_vfi()
    with torch.no_grad():
        model.unet.conv.bias.fill_(math.inf)
    with pytest.raises(NonFiniteError, match="file of weights"):
        interpolate_clip(torch.rand(2, 32, 32, 3), EMAInterpolator(model), FrameTimes.multiplied(2), scene_threshold=0)

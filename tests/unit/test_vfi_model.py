"""EMA-VFI: what sizes, batches, caches and precision must not change."""

import copy
import weakref

import pytest
import torch
from tiny import VFI, tiny_vfi

from allegro_model.config import VFI_PRESETS, VFIConfig
from allegro_model.errors import GeometryError, InterpolationError, UnsupportedCheckpoint
from allegro_model.ops import cast_like
from allegro_model.vfi import EMAVFI
from allegro_model.vfi.emavfi.layers import PReLU, TokenLinear
from allegro_model.vfi.emavfi.tables import Tables
from allegro_model.vfi.emavfi.warp import identity_grid, warp
from allegro_model.vfi.emavfi.windows import crop_from_windows, pad_to_windows, window_mask, window_positions


def pair(height=32, width=64, batch=1, seed=0):
    """Smooth pictures that differ by a shift."""
    g = torch.Generator().manual_seed(seed)
    coarse = torch.rand(batch, 3, height // 8 + 2, width // 8 + 2, generator=g)
    big = torch.nn.functional.interpolate(coarse, (height + 8, width + 8), mode="bicubic").clamp(0, 1)
    return big[:, :, :height, :width].contiguous(), big[:, :, 4 : height + 4, 6 : width + 6].contiguous()


def band(index, ends):
    return sum(index >= end for end in ends)


def brute_force_mask(height, width, window, shift):
    """Cell by cell: two cells of a window are apart if a border of the padding or of the roll lies between them."""
    tall, wide = -(-height // window) * window, -(-width // window) * window
    top, left = (tall - height) // 2, (wide - width) // 2
    mask = torch.zeros(tall // window * (wide // window), window * window, window * window)
    for w in range(mask.shape[0]):
        y0, x0 = w // (wide // window) * window, w % (wide // window) * window
        cells = [(y0 + i // window, x0 + i % window) for i in range(window * window)]
        for i, (yi, xi) in enumerate(cells):
            for j, (yj, xj) in enumerate(cells):
                apart = False
                if (tall, wide) != (height, width):
                    rows, columns = (top, top + height), (left, left + width)
                    apart |= band(yi, rows) != band(yj, rows) or band(xi, columns) != band(xj, columns)
                if shift:
                    rows, columns = (tall - window, tall - shift), (wide - window, wide - shift)
                    apart |= band(yi, rows) != band(yj, rows) or band(xi, columns) != band(xj, columns)
                mask[w, i, j] = -100.0 if apart else 0.0
    return mask


@pytest.mark.parametrize("size", [(1, 1), (4, 6), (7, 14), (10, 12), (12, 10)])
@pytest.mark.parametrize("shift", [0, 3])
def test_masks_equal_brute_force(size, shift):
    found = window_mask(*size, 7, shift, torch.device("cpu"))
    expected = brute_force_mask(*size, 7, shift)
    if found is None:
        assert not expected.any()
    else:
        assert torch.equal(found, expected)


def test_masks_of_transposed_maps_differ_in_any_order():
    tables = Tables()
    for sizes in (((8, 12), (12, 8)), ((12, 8), (8, 12))):
        masks = [tables(window_mask, *size, 7, 3, torch.device("cpu")) for size in sizes]
        assert not torch.equal(*masks)
        assert masks[0] is tables(window_mask, *sizes[0], 7, 3, torch.device("cpu"))


def test_tables_are_kept_as_long_as_they_are_used_and_leave_with_the_network():
    """A device that another program wants is not half full of them."""
    model, (a, b) = tiny_vfi(), pair()
    model.requires_grad_(True)  # the way to warp that needs a grid
    model(a, b)
    made = list(model.tables._kept.values())
    assert len(made) == 8 + 5  # masks and positions of two stages with and without shift; grids of five levels
    model(a, b)
    assert all(x is y for x, y in zip(made, model.tables._kept.values(), strict=True))
    assert not copy.deepcopy(model).tables._kept
    for width in range(40):
        model.tables(identity_grid, 4, width, a.device)
    assert len(model.tables._kept) == 22
    kept = [weakref.ref(x) for x in made if isinstance(x, torch.Tensor)]
    del made
    model.float()
    assert not model.tables._kept
    assert all(reference() is None for reference in kept)


@pytest.mark.parametrize("shift", [0, 3])
def test_windows_are_undone(shift):
    x = torch.arange(2 * 10 * 12 * 3.0).view(2, 10, 12, 3)
    padded = pad_to_windows(x, 7, shift)
    assert padded.shape == (2, 14, 14, 3)
    assert torch.equal(crop_from_windows(padded, (10, 12), 7, shift), x)


def test_positions_run_from_minus_one_to_one():
    positions = window_positions(7, 14, 7, 0, torch.device("cpu"))
    assert positions.shape == (2, 49, 2)
    assert positions[0, 0].tolist() == [-1, -1]
    assert positions[1, -1].tolist() == [1, 1]
    assert positions[0, 6, 1] == -1  # the row is the second coordinate


def test_tables_made_without_gradients_serve_a_run_with_them():
    model = tiny_vfi()
    a, b = pair()
    with torch.inference_mode():
        model(a, b)
    model.requires_grad_(True)
    model(a, b).sum().backward()
    assert model.unet.conv.weight.grad.abs().sum() > 0
    assert model.feature_bone.block5[1].attn.cor_embed.weight.grad.abs().sum() > 0


def test_warp_by_whole_pixels_and_beyond_the_border():
    image = torch.arange(20.0).view(1, 1, 4, 5)
    flow = torch.tensor([1.0, 0.0]).view(1, 2, 1, 1).expand(1, 2, 4, 5)
    moved = torch.cat((image[..., 1:], image[..., -1:]), dim=-1)
    torch.testing.assert_close(warp(image, flow), moved, atol=1e-5, rtol=0)
    torch.testing.assert_close(warp(image, flow * 100), image[..., -1:].expand(1, 1, 4, 5), atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", [(9, 11), (1, 5), (5, 1), (1, 1), (16, 24)])
def test_both_ways_to_warp_are_the_same(size):
    g = torch.Generator().manual_seed(0)
    image, flow = torch.rand(2, 5, *size, generator=g), 4 * torch.randn(2, 2, *size, generator=g)
    with torch.no_grad():
        rows = warp(image, flow)
    torch.testing.assert_close(rows, warp(image, flow), atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_flow_without_numbers_is_no_access_out_of_bounds():
    made = warp(torch.rand(1, 3, 4, 5), torch.full((1, 2, 4, 5), torch.nan))
    assert made.isnan().all()
    assert warp(torch.rand(1, 3, 4, 5), torch.full((1, 2, 4, 5), torch.inf)).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_fast_layers_equal_pytorchs(dtype):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 6, 5, 7, generator=g).to(dtype).contiguous(memory_format=torch.channels_last)
    prelu = PReLU(6, cast_like).to(dtype)
    prelu.weight.copy_(torch.rand(6, generator=g))
    assert torch.equal(prelu(x), torch.nn.functional.prelu(x, prelu.weight))
    linear = TokenLinear(7, 11).to(dtype)
    torch.testing.assert_close(linear(x), torch.nn.functional.linear(x, linear.weight, linear.bias), atol=1e-5, rtol=1e-5)
    assert linear(x.flatten(0, 2)).shape == (60, 11)


@pytest.mark.parametrize("size", [(16, 16), (16, 48), (17, 33), (50, 70)])
@torch.inference_mode()
def test_any_size_works(size):
    model = tiny_vfi()
    a, b = (torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    out = model(a, b)
    assert out.shape == a.shape
    assert 0 <= out.min() <= out.max() <= 1


@torch.inference_mode()
def test_sides_of_sixteen_without_padding():
    model = tiny_vfi()
    frames = [model.features(x[..., :16, :16], 1.0, torch.float32) for x in pair()]
    assert next(model.predict(*frames, [0.5])).frame.shape == (1, 3, 16, 16)


@torch.inference_mode()
def test_transposed_shapes_do_not_disturb_each_other():
    wide, tall = pair(32, 64), pair(64, 32, seed=1)
    results = []
    for order in ((wide, tall), (tall, wide)):
        model = tiny_vfi()
        by_shape = {tuple(a.shape): model(a, b) for a, b in order}
        results.append([by_shape[tuple(a.shape)] for a, _ in (wide, tall)])
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)


@torch.inference_mode()
def test_a_batch_equals_its_pairs():
    model = tiny_vfi()
    a, b = pair(batch=2)
    together = model(a, b, torch.tensor([0.25, 0.5]))
    for i, t in enumerate((0.25, 0.5)):
        torch.testing.assert_close(together[i : i + 1], model(a[i : i + 1], b[i : i + 1], t), atol=1e-5, rtol=0)


@torch.inference_mode()
def test_kept_features_change_nothing_and_serve_several_positions():
    model = tiny_vfi()
    a, b = pair()
    cache = {"img0": model.extract_features(a), "img1": model.extract_features(b)}
    assert torch.equal(model(a, b, 0.25, cache=cache), model(a, b, 0.25))
    several = model.forward_multi_timestep(a, b, [0.25, 0.75], cache=cache)
    maps = torch.tensor([0.25, 0.75]).view(2, 1, 1, 1).expand(2, 1, *a.shape[2:])
    torch.testing.assert_close(model(a.expand(2, -1, -1, -1), b.expand(2, -1, -1, -1), maps, cache=cache), several,
                               atol=1e-6, rtol=0)
    assert not torch.allclose(several[0], several[1], atol=1e-4)
    torch.testing.assert_close(several[1:], model(a, b, 0.75), atol=1e-6, rtol=0)


@torch.inference_mode()
def test_a_model_for_the_middle_halves():
    model = tiny_vfi(arbitrary_time=False)
    a, b = pair()
    middle = model(a, b)
    quarters = model.forward_multi_timestep(a, b, [0.75, 0.25, 0.5])
    assert torch.equal(quarters[2:], middle)
    torch.testing.assert_close(quarters[:1], model(middle, b), atol=1e-6, rtol=0)
    torch.testing.assert_close(quarters[1:2], model(a, middle), atol=1e-6, rtol=0)
    with pytest.raises(InterpolationError, match=r"position 0\.333"):
        model.forward_multi_timestep(a, b, [1 / 3])
    with pytest.raises(InterpolationError, match="pair by pair"):
        model(*pair(batch=2), torch.tensor([0.25, 0.5]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.inference_mode()
def test_half_precision_stays_close_and_warps_in_float32(dtype):
    model = tiny_vfi()
    a, b = pair(64, 64)
    exact = model(a, b)
    frame = model.to(dtype).extract_features(a)
    assert frame.frame.dtype == torch.float32
    assert frame.stages.tokens.dtype == dtype
    found, = model.predict(frame, model.extract_features(b), [0.5])
    assert found.flow.dtype == torch.float32
    assert (found.frame - exact).abs().mean() < 0.003
    assert model(a.to(dtype), b.to(dtype)).dtype == dtype


@torch.inference_mode()
def test_many_positions_hold_one_flow(monkeypatch):
    """64 times the frames would else keep 63 flows of full size."""
    model, flows = tiny_vfi(), []
    refine = model.refine

    def watched(img0, img1, features, found):
        assert all(flow() is None for flow in flows[:-1])
        flows.append(weakref.ref(found.flow))
        return refine(img0, img1, features, found)

    monkeypatch.setattr(model, "refine", watched)
    frames = [model.extract_features(x) for x in pair()]
    assert len(model.between(*frames, [0.2, 0.4, 0.6, 0.8])) == len(flows) == 4


@torch.inference_mode()
def test_large_frames_and_augmentation_through_the_public_call():
    model = tiny_vfi()
    frames = [model.extract_features(x, flow_scale=0.5, tta=True) for x in pair(40, 72)]
    assert frames[0].frame.shape[2:] == (64, 128)
    assert frames[0].small.frame.shape[2:] == (32, 64)
    out, = model.between(*frames, [0.5])
    assert out.shape == (1, 3, 40, 72)
    turned = [model.extract_features(x.flip(2, 3), flow_scale=0.5, tta=True) for x in pair(40, 72)]
    torch.testing.assert_close(model.between(*turned, [0.5])[0].flip(2, 3), out, atol=1e-5, rtol=0)
    with pytest.raises(GeometryError, match=r"flow_scale=0\.3"):
        model.extract_features(pair()[0], flow_scale=0.3)


def test_memory_grows_with_the_picture_and_shrinks_with_the_type():
    model = tiny_vfi()
    need = model.memory_used_forward((5, 256, 448, 3), torch.float32)
    assert need == model.memory_used_forward((99, 256, 448, 3), torch.float32)
    assert model.memory_used_forward((5, 512, 448, 3), torch.float32) == 2 * need
    assert model.memory_used_forward((5, 256, 448, 3), torch.bfloat16) < need


@pytest.mark.parametrize(("name", "count"), [("ours", 65_662_359), ("ours_small", 14_489_815)])
def test_released_sizes(name, count):
    model = EMAVFI(VFI_PRESETS[name], device="meta")
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    assert sum(value.numel() for value in model.state_dict().values()) == count
    assert VFIConfig.from_shapes(shapes) == VFI_PRESETS[name]
    assert VFIConfig.from_shapes(shapes, arbitrary_time=True) == VFI_PRESETS[f"{name}_t"]


def test_impossible_tensors_are_refused():
    shapes = {key: tuple(value.shape) for key, value in tiny_vfi().state_dict().items()}
    assert VFIConfig.from_shapes(shapes, arbitrary_time=True) == VFI
    with pytest.raises(UnsupportedCheckpoint, match="first convolution"):
        VFIConfig.from_shapes({})
    with pytest.raises(UnsupportedCheckpoint, match="base_channels=6"):
        VFIConfig.from_shapes(shapes | {"feature_bone.block1.conv.0.weight": (6, 3, 3, 3)})
    with pytest.raises(UnsupportedCheckpoint, match="five positive integers"):
        VFIConfig.from_shapes({k: v for k, v in shapes.items() if not k.startswith("feature_bone.block5")})

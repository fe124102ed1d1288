"""Packed matrices: layouts against the package gguf, layers, and GGUF files, sound and hostile."""

import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tiny import DIT, tiny_dit
from torch import Tensor

from allegro_model.dit import AllegroDiT
from allegro_model.errors import UnsupportedCheckpoint
from allegro_model.loading.gguf import map_gguf, read_gguf_header
from allegro_model.quantised import (
    BY_GGML_TYPE,
    BY_NAME,
    Layout,
    QuantisedEmbedding,
    QuantisedLinear,
    install,
    unpack,
)
from allegro_model.quantised.layouts import pack

# Relative error (root mean square) of normally distributed weights.
ERRORS = {"int8": 0.011, "float8_e4m3fn": 0.027, "Q8_0": 0.0055, "Q5_K": 0.037, "Q4_K": 0.074}
# Where in a block its float16 numbers are: any bytes are a number there, but not a finite one.
HALVES = {"Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q8_0": [0], "Q3_K": [108], "Q4_K": [0, 2],
          "Q5_K": [0, 2], "Q6_K": [208]}


def matrix(rows: int = 16, columns: int = 512, seed: int = 0) -> Tensor:
    return torch.randn((rows, columns), generator=torch.Generator().manual_seed(seed)) * 0.05


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected).pow(2).mean().sqrt() / expected.pow(2).mean().sqrt())


@pytest.mark.parametrize("number", list(BY_GGML_TYPE), ids=lambda number: BY_GGML_TYPE[number].name)
def test_blocks_mean_what_they_mean_elsewhere(number: int) -> None:
    gguf = pytest.importorskip("gguf")
    layout, kind = BY_GGML_TYPE[number], gguf.GGMLQuantizationType(number)
    assert (kind.name, *gguf.GGML_QUANT_SIZES[kind]) == (layout.name, layout.weights, layout.num_bytes)
    generator = torch.Generator().manual_seed(number)
    blocks = torch.randint(0, 256, (64, layout.num_bytes), dtype=torch.uint8, generator=generator)
    for start in HALVES[layout.name]:
        blocks[:, start : start + 2] = torch.randn((64, 1), generator=generator).half().view(torch.uint8)
    expected = gguf.quants.dequantize(blocks.numpy(), kind)
    assert torch.equal(unpack(layout, blocks, None, torch.float32), torch.from_numpy(expected))


def test_the_simplest_blocks_are_made_as_elsewhere() -> None:
    gguf = pytest.importorskip("gguf")
    expected = gguf.quants.quantize(matrix().numpy(), gguf.GGMLQuantizationType.Q8_0)
    assert torch.equal(pack(BY_NAME["Q8_0"], matrix())[0], torch.from_numpy(expected))


@pytest.mark.parametrize("name", list(ERRORS))
def test_packing_keeps_the_numbers(name: str) -> None:
    stored, scale = pack(BY_NAME[name], matrix())
    found = unpack(BY_NAME[name], stored, scale, torch.float32)
    assert ERRORS[name] / 3 < error(found, matrix()) < ERRORS[name]
    for special in (torch.zeros(2, 256), torch.full((2, 256), 0.5), torch.full((2, 256), -3.0)):
        assert torch.allclose(unpack(BY_NAME[name], *pack(BY_NAME[name], special), torch.float32), special, rtol=2e-3)


def packed_state(model: torch.nn.Module, layout: Layout) -> tuple[dict[str, Tensor], dict[str, Layout]]:
    state, layouts = {}, {}
    for name, tensor in model.state_dict().items():
        if tensor.ndim == 2 and name.startswith("transformer_blocks") and name.endswith("weight"):
            stored, scale = pack(layout, tensor)
            state[name], layouts[name] = stored.view(torch.int8), layout
            if scale is not None:
                state[f"{name}_scale"] = scale
        else:
            state[name] = tensor
    return state, layouts


@pytest.mark.parametrize("name", ["int8", "float8_e4m3fn"])
def test_layers_compute_with_what_they_unpack(name: str) -> None:
    """And `.to(dtype)` changes the dtype of all but packed matrices and scales."""
    state, layouts = packed_state(tiny_dit(), BY_NAME[name])
    with torch.device("meta"):
        model = AllegroDiT(DIT)
    install(model, layouts, state)
    model.load_state_dict(state, strict=True, assign=True)
    dense = tiny_dit()
    weights = {n: unpack(layouts[n], state[n], state[f"{n}_scale"], torch.float32) if n in layouts else t
               for n, t in state.items() if not n.endswith("_scale")}
    dense.load_state_dict(weights)
    inputs = (torch.ones(1, 4, 2, 4, 4), torch.tensor([500.0]), torch.ones(1, 3, 24))
    assert torch.allclose(model(*inputs), dense(*inputs), atol=1e-6)
    layer = model.transformer_blocks[0].attn1.to_q
    assert isinstance(layer, QuantisedLinear)
    model.to(torch.bfloat16)
    assert (layer.weight.dtype, layer.weight_scale.dtype, layer.bias.dtype) == (torch.int8, torch.float32, torch.bfloat16)
    assert model(*(x.bfloat16() for x in inputs)).dtype == torch.bfloat16
    assert sum(p.numel() * p.element_size() for p in layer.parameters()) < 2 * layer.rows * layer.columns


def test_low_ranks_add_up() -> None:
    layer = QuantisedLinear(BY_NAME["int8"], 64, 8, bias=False, scale_shape=(8, 1))
    weight = matrix(8, 64)
    stored, scale = pack(BY_NAME["int8"], weight)
    layer.load_state_dict({"weight": stored.view(torch.int8), "weight_scale": scale})
    x, changes = matrix(5, 64, 1), [(matrix(r, 64, r), matrix(8, r, r + 9), 0.5 * r) for r in (2, 3)]
    before, expected = layer(x), layer.dense(torch.float32)
    for down, up, factor in changes:
        layer.add_low_rank(down, up, factor)
        expected = expected + factor * up @ down
    assert not torch.allclose(layer(x), before, atol=1e-4)
    assert torch.allclose(layer(x), x @ expected.T, atol=1e-6)


def linear(rank: int = 2) -> QuantisedLinear:
    """A layer with a LoRA."""
    layer = QuantisedLinear(BY_NAME["int8"], 64, 8, scale_shape=(8, 1))
    stored, scale = pack(BY_NAME["int8"], matrix(8, 64))
    layer.load_state_dict({"weight": stored.view(torch.int8), "weight_scale": scale, "bias": torch.ones(8)})
    layer.add_low_rank(matrix(rank, 64, 1), matrix(8, rank, 2), 1.0)
    return layer


def test_factors_are_copied_once_until_they_change_or_move() -> None:
    """A host may keep the bytes elsewhere; another dtype stands for another device here."""
    layer, x = linear(), matrix(5, 64, 3).bfloat16()
    layer(x)
    first = layer._copied
    layer(x)
    assert first is not None
    assert layer._copied is first
    layer.add_low_rank(matrix(3, 64, 4), matrix(8, 3, 5), 2.0)
    assert torch.equal(layer(x), F.linear(x, layer.dense(x.dtype), layer.bias.to(x))
                       + F.linear(F.linear(x, layer.down.to(x)), layer.up.to(x)))
    assert layer._copied is not first
    layer.down = layer.up = None  # as ComfyUI takes a patch off
    assert torch.equal(layer(x), F.linear(x, layer.dense(x.dtype), layer.bias.to(x)))
    layer.float()
    assert layer._copied is None
    layer(x.float())
    assert layer._copied is None, "nothing had to be copied"


def test_factors_that_were_copied_without_gradients_serve_a_run_with_them() -> None:
    layer, x = linear(), matrix(5, 64, 3).bfloat16()
    with torch.inference_mode():
        layer(x)
    x = x.requires_grad_()
    layer(x).sum().backward()
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize("when", range(5))
def test_a_move_that_fails_half_way_can_be_tried_again(when: int) -> None:
    layer, x, moved = linear(), matrix(5, 64, 3), 0

    def move(tensor: Tensor) -> Tensor:
        nonlocal moved
        moved += 1
        if moved == when + 1:
            raise torch.OutOfMemoryError("no")
        return tensor.clone()

    expected = layer(x)
    with pytest.raises(torch.OutOfMemoryError):
        layer._apply(move)
    assert torch.equal(layer(x), expected)
    layer._apply(Tensor.clone)
    assert torch.equal(layer(x), expected)


def test_an_embedding_unpacks_rows_alone() -> None:
    table = matrix(32, 256)
    layer = QuantisedEmbedding(BY_NAME["Q4_K"], 32, 256, dtype=torch.float32)
    layer.load_state_dict({"weight": pack(BY_NAME["Q4_K"], table)[0].view(torch.int8)})
    index = torch.tensor([[3, 31], [0, 3]])
    assert torch.equal(layer(index), layer.dense(torch.float32)[index])
    assert layer.to(torch.bfloat16)(index).dtype == torch.bfloat16


# Hostile GGUF files


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def gguf_bytes(*, tensors: bytes = b"", count: int = 1, pairs: bytes = b"", num_pairs: int = 0, data: int = 64) -> bytes:
    head = b"GGUF" + struct.pack("<IQQ", 3, count, num_pairs) + pairs + tensors
    return head + bytes(-len(head) % 32) + bytes(data)


def entry(name: str = "a", shape: tuple[int, ...] = (16,), kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


HOSTILE: dict[str, tuple[Callable[[], bytes], str]] = {
    "old": (lambda: b"GGUF" + struct.pack("<I", 1), "of version 1"),
    "cut in the header": (lambda: gguf_bytes(tensors=entry())[:40], "is truncated"),
    "cut in the data": (lambda: gguf_bytes(tensors=entry(), data=32), "is truncated"),
    "many tensors": (lambda: gguf_bytes(count=2**60), "announces 1,152,921,504,606,846,976 tensors"),
    "long name": (lambda: gguf_bytes(tensors=struct.pack("<Q", 2**40)), "a text of 1,099,511,627,776 bytes"),
    "long text": (lambda: gguf_bytes(num_pairs=1, pairs=text("a") + struct.pack("<IQ", 8, 2**32)), "a text of"),
    "long array": (lambda: gguf_bytes(num_pairs=1, pairs=text("a") + struct.pack("<IIQ", 9, 4, 999_999)), "is truncated"),
    "array of arrays": (lambda: gguf_bytes(num_pairs=1, pairs=text("a") + struct.pack("<IIQ", 9, 9, 1)), "unknown type 9"),
    "unknown value": (lambda: gguf_bytes(num_pairs=1, pairs=text("a") + struct.pack("<I", 77)), "unknown type 77"),
    "huge tensor": (lambda: gguf_bytes(tensors=entry(shape=(2**40, 2**40))), "has the shape"),
    "many dimensions": (lambda: gguf_bytes(tensors=entry(shape=(1,) * 9)), "has 9 dimensions"),
    "overlap": (lambda: gguf_bytes(tensors=entry() + entry("b", offset=32), count=2, data=128), "overlaps 'a'"),
    "not aligned": (lambda: gguf_bytes(tensors=entry(offset=4), data=128), "is not aligned"),
    "strange alignment": (lambda: gguf_bytes(tensors=entry(), num_pairs=1, pairs=text("general.alignment")
                                             + struct.pack("<II", 4, 3)), "its alignment is 3"),
    "half a block": (lambda: gguf_bytes(tensors=entry(shape=(40,), kind=8)), "does not divide into blocks of 32"),
    "unknown type": (lambda: gguf_bytes(tensors=entry(shape=(256,), kind=10)), "stored as Q2_K, expected one of F32"),
    "twice": (lambda: gguf_bytes(tensors=entry() + entry(offset=64), count=2, data=128), "two tensors have the name 'a'"),
}


@pytest.mark.parametrize("name", list(HOSTILE))
def test_hostile_gguf_files(tmp_path: Path, name: str) -> None:
    make, words = HOSTILE[name]
    (tmp_path / "a.gguf").write_bytes(make())
    with pytest.raises(UnsupportedCheckpoint) as caught:
        read_gguf_header(tmp_path / "a.gguf")
    assert words in str(caught.value)


def test_the_hostile_ones_differ_from_a_sound_one(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(gguf_bytes(tensors=entry()))
    assert read_gguf_header(tmp_path / "a.gguf").tensors["a"].shape == (16,)


@pytest.mark.parametrize(("form", "original", "expected"), [
    (5, (2, 8), (2, 8)), (5, (-2, -8), (16,)), (6, (2.0, 8.0), (16,)), (5, (2, 9), (16,)),
])
def test_another_shape_is_taken_if_it_is_one(tmp_path: Path, form: int, original: tuple[float, ...], expected: tuple[int, ...]) -> None:
    """Tensors whose shape was noted beside them; of what makes no sense their own shape is left."""
    values = struct.pack(f"<IIQ2{'i' if form == 5 else 'f'}", 9, form, 2, *original)
    path = tmp_path / "a.gguf"
    path.write_bytes(gguf_bytes(tensors=entry(), num_pairs=1, pairs=text("comfy.gguf.orig_shape.a") + values))
    header = read_gguf_header(path)
    assert header.tensors["a"].shape == expected
    assert map_gguf(path, header, ["a"])["a"].shape == expected

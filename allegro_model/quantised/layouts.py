"""How the numbers of a matrix are packed into bytes: 8 bits with a scale beside them, and the blocks of GGUF.

A matrix [rows, columns] becomes bytes [rows, columns / weights * num_bytes]: each row is a sequence of blocks of its
own, so that single rows can be unpacked. Layouts of the blocks: https://github.com/ggml-org/ggml (block_q8_0,
block_q4_K, ...); `tests/unit/test_quantised.py` compares them with the package gguf.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

SUPER_BLOCK = 256  # weights in a block of the "K" kinds
_SUB_BLOCK = 32
_PACKED_AT_ONCE = 2**20  # weights: what is made on the way should stay in the processor's cache
_HALF = 2  # bytes of a float16
_LARGEST_6_BIT = 63


@dataclass(frozen=True)
class Layout:
    """One way to store a matrix.

    Attributes:
        name: as people and files know it.
        weights: numbers in a block.
        num_bytes: its size.
        unpack: uint8 [n, num_bytes] -> float32 [n, weights].
        pack: the reverse, for float32; None where only reading is supported.
        scaled: the values are to be multiplied by a float32 scale, one of all or [rows, 1], that is kept beside them.
    """

    name: str
    weights: int
    num_bytes: int
    unpack: Callable[[Tensor], Tensor]
    pack: Callable[[Tensor], Tensor] | None = None
    scaled: bool = False

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether rows of this length divide into blocks."""
        return len(shape) >= 1 and shape[-1] % self.weights == 0

    def row_bytes(self, columns: int) -> int:
        """Bytes of a row."""
        return columns // self.weights * self.num_bytes


def unpack(layout: Layout, stored: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The numbers of a matrix, computed in float32 and rounded once.

    Args:
        layout: of `stored`.
        stored: [rows, bytes], one byte per element, whatever its type.
        scale: float32, one number or [rows, 1]; None for 1.
        dtype: of the result.
    Returns:
        [rows, columns].
    """
    rows = stored.shape[0]
    values = layout.unpack(stored.view(torch.uint8).reshape(-1, layout.num_bytes)).reshape(rows, -1)
    if scale is not None:
        values = values.mul_(scale.to(values.device))
    return values.to(dtype)


def pack(layout: Layout, matrix: Tensor) -> tuple[Tensor, Tensor | None]:
    """Bytes uint8 [rows, bytes] of a matrix [rows, columns], and the scale of a scaled layout (see `Layout`)."""
    assert layout.pack is not None
    matrix = matrix.float()
    if layout.scaled:
        return _pack_scaled(layout, matrix)
    out = torch.empty(matrix.shape[0], layout.row_bytes(matrix.shape[1]), dtype=torch.uint8)
    for part in _parts(matrix):
        out[part] = layout.pack(matrix[part].reshape(-1, layout.weights)).reshape(-1, out.shape[1])
    return out, None


def _pack_scaled(layout: Layout, matrix: Tensor) -> tuple[Tensor, Tensor]:
    assert layout.pack is not None
    per_row = layout is INT8
    largest = matrix.abs().amax(1, keepdim=True) if per_row else matrix.abs().amax()
    scale = largest / (127.0 if per_row else torch.finfo(torch.float8_e4m3fn).max)
    scale = torch.where(scale > 0, scale, 1.0)
    return layout.pack((matrix / scale).reshape(-1, 1)).reshape(matrix.shape), scale


def _parts(matrix: Tensor) -> Iterator[slice]:
    rows = max(1, _PACKED_AT_ONCE // max(1, matrix.shape[1]))
    return (slice(start, start + rows) for start in range(0, matrix.shape[0], rows))


# Parts of blocks


def _half(blocks: Tensor, start: int) -> Tensor:
    """The float16 at a byte position: float32 [n, 1]."""
    return blocks[:, start : start + _HALF].contiguous().view(torch.float16).float()


def _as_half(values: Tensor) -> Tensor:
    """float32 [n, 1] as the bytes of float16."""
    return values.half().contiguous().view(torch.uint8)


def _bits(packed: Tensor, width: int, per_byte: int) -> Tensor:
    """[n, k] bytes -> [n, per_byte, k]: the fields of `width` bits, the lowest first."""
    shifts = torch.arange(0, width * per_byte, width, dtype=torch.uint8, device=packed.device)
    return (packed.unsqueeze(1) >> shifts[:, None]) & (2**width - 1)


def _nibbles(packed: Tensor, run: int) -> Tensor:
    """[n, k] -> [n, 2 k]: of each `run` bytes first all low, then all high halves."""
    n = packed.shape[0]
    return _bits(packed.reshape(-1, run), 4, 2).reshape(n, -1)


def _single_bits(packed: Tensor) -> Tensor:
    """[n, k] -> [n, 8 k]: of all bytes first the lowest bits."""
    return _bits(packed, 1, 8).flatten(1)


# 8 bits, scale beside them


def _unpack_int8(blocks: Tensor) -> Tensor:
    return blocks.view(torch.int8).float()


def _pack_int8(values: Tensor) -> Tensor:
    return values.round().clamp(-127, 127).to(torch.int8).view(torch.uint8)


def _unpack_fp8(blocks: Tensor) -> Tensor:
    return blocks.view(torch.float8_e4m3fn).float()


def _pack_fp8(values: Tensor) -> Tensor:
    return values.to(torch.float8_e4m3fn).view(torch.uint8)


def _unpack_fp8_e5m2(blocks: Tensor) -> Tensor:
    return blocks.view(torch.float8_e5m2).float()


# Blocks of 32: one scale, or a scale and a smallest value


def _unpack_q8_0(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * blocks[:, 2:].contiguous().view(torch.int8)


def _pack_q8_0(values: Tensor) -> Tensor:
    scale = values.abs().amax(1, keepdim=True) / 127
    codes = (values / torch.where(scale > 0, scale, 1.0)).round()
    return torch.cat([_as_half(scale), codes.to(torch.int8).view(torch.uint8)], 1)


def _unpack_q4_0(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * (_nibbles(blocks[:, 2:], 16).float() - 8)


def _unpack_q4_1(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * _nibbles(blocks[:, 4:], 16) + _half(blocks, 2)


def _fifth_bits(blocks: Tensor, start: int) -> Tensor:
    """32 bits in 4 bytes, in order: [n, 32] of 0 or 16."""
    return _bits(blocks[:, start : start + 4], 1, 8).transpose(1, 2).flatten(1) << 4


def _unpack_q5_0(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * ((_nibbles(blocks[:, 6:], 16) | _fifth_bits(blocks, 2)).float() - 16)


def _unpack_q5_1(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * (_nibbles(blocks[:, 8:], 16) | _fifth_bits(blocks, 4)) + _half(blocks, 2)


# Blocks of 256: eight or sixteen parts, whose scales are numbers of 4 to 8 bits


def _unpack_scales(packed: Tensor) -> tuple[Tensor, Tensor]:
    """12 bytes -> eight scales and eight minima of 6 bits each."""
    low, middle, high = packed.reshape(-1, 3, 4).unbind(1)
    scales = torch.cat([low & 63, (high & 15) | ((low >> 2) & 48)], 1)
    minima = torch.cat([middle & 63, (high >> 4) | ((middle >> 2) & 48)], 1)
    return scales, minima


def _pack_scales(scales: Tensor, minima: Tensor) -> Tensor:
    """The reverse, of uint8 [n, 8] each."""
    low = scales[:, :4] | ((scales[:, 4:] >> 4) << 6)
    middle = minima[:, :4] | ((minima[:, 4:] >> 4) << 6)
    high = (scales[:, 4:] & 15) | ((minima[:, 4:] & 15) << 4)
    return torch.cat([low, middle, high], 1)


def _combine(blocks: Tensor, codes: Tensor) -> Tensor:
    """scale * code - minimum, of codes [n, 256]."""
    scales, minima = _unpack_scales(blocks[:, 4:16])
    codes = codes.reshape(-1, 8, _SUB_BLOCK)
    return ((_half(blocks, 0) * scales)[:, :, None] * codes - (_half(blocks, 2) * minima)[:, :, None]).flatten(1)


def _unpack_q4_k(blocks: Tensor) -> Tensor:
    return _combine(blocks, _nibbles(blocks[:, 16:], _SUB_BLOCK))


def _unpack_q5_k(blocks: Tensor) -> Tensor:
    return _combine(blocks, _nibbles(blocks[:, 48:], _SUB_BLOCK) | (_single_bits(blocks[:, 16:48]) << 4))


def _unpack_q6_k(blocks: Tensor) -> Tensor:
    low = _nibbles(blocks[:, :128], 64)
    high = _bits(blocks[:, 128:192].reshape(-1, _SUB_BLOCK), 2, 4).reshape(-1, SUPER_BLOCK)
    scales = _half(blocks, 208) * blocks[:, 192:208].contiguous().view(torch.int8)
    codes = (low | (high << 4)).float() - 32
    return (scales[:, :, None] * codes.reshape(-1, 16, 16)).flatten(1)


def _unpack_q3_k(blocks: Tensor) -> Tensor:
    scales = _bits(blocks[:, 96:104], 4, 2).flatten(1) | (_bits(blocks[:, 104:108], 2, 4).flatten(1) << 4)
    low = _bits(blocks[:, 32:96].reshape(-1, _SUB_BLOCK), 2, 4).reshape(-1, SUPER_BLOCK)
    # A bit that is not set takes 4 away.
    codes = low.float() - 4 * (1 - _single_bits(blocks[:, :32]).float())
    factors = _half(blocks, 108) * (scales.float() - 32)
    return (factors[:, :, None] * codes.reshape(-1, 16, 16)).flatten(1)


def _fit(values: Tensor, largest: int) -> tuple[Tensor, Tensor]:
    """Scale and minimum, both at least 0, with which codes 0 .. largest come nearest: values ~ scale * code - minimum.

    A few ranges round that of the values are tried; for each, the best scale and minimum of its codes follow in closed
    form (least squares).

    Args:
        values: [n, 32].
    Returns:
        [n, 1] each.
    """
    count = values.shape[1]
    low = values.amin(1, keepdim=True).clamp(max=0)
    reach = values.amax(1, keepdim=True) - low
    reach = torch.where(reach > 0, reach, 1.0)
    total = values.sum(1, keepdim=True)
    best = torch.full_like(low, torch.inf)
    best_scale, best_offset = torch.zeros_like(low), torch.zeros_like(low)
    for widening in (-0.8, -0.4, 0.0, 0.4, 0.8):
        codes = ((values - low) * ((largest + widening) / reach)).round_().clamp_(0, largest)
        ones, squares = codes.sum(1, keepdim=True), (codes * codes).sum(1, keepdim=True)
        products = (codes * values).sum(1, keepdim=True)
        determinant = count * squares - ones * ones
        solvable = determinant > 0
        scale = torch.where(solvable, (count * products - ones * total) / determinant.clamp(min=1), reach / largest)
        offset = torch.where(solvable, (squares * total - ones * products) / determinant.clamp(min=1), low)
        # The minimum is stored as a number that is taken away.
        scale = torch.where(offset > 0, products / squares.clamp(min=1), scale).clamp(min=0)
        offset = offset.clamp(max=0)
        error = (codes.mul_(scale).add_(offset).sub_(values)).square_().sum(1, keepdim=True)
        better = error < best
        best = torch.where(better, error, best)
        best_scale, best_offset = torch.where(better, scale, best_scale), torch.where(better, offset, best_offset)
    return best_scale, -best_offset


def _codes(values: Tensor, largest: int) -> tuple[Tensor, Tensor]:
    """Codes uint8 [n, 256] of values [n, 256], and the first 16 bytes of their blocks."""
    parts = values.reshape(-1, _SUB_BLOCK)
    scales, minima = (found.reshape(-1, 8) for found in _fit(parts, largest))
    heads = []
    exact = []
    for found in (scales, minima):
        unit = (found.amax(1, keepdim=True) / _LARGEST_6_BIT).half().float()
        number = (found / torch.where(unit > 0, unit, 1.0)).round().clamp(0, _LARGEST_6_BIT)
        heads.append((_as_half(unit), number.to(torch.uint8)))
        exact.append((unit * number).reshape(-1, 1))
    scale, minimum = exact
    codes = ((parts + minimum) / torch.where(scale > 0, scale, 1.0)).round_().clamp_(0, largest).to(torch.uint8)
    (scale_unit, scale_numbers), (minimum_unit, minimum_numbers) = heads
    head = torch.cat([scale_unit, minimum_unit, _pack_scales(scale_numbers, minimum_numbers)], 1)
    return codes.reshape(-1, SUPER_BLOCK), head


def _join_nibbles(codes: Tensor) -> Tensor:
    """[n, 256] codes below 16 -> [n, 128]: the reverse of `_nibbles`."""
    low, high = codes.reshape(-1, 4, 2, _SUB_BLOCK).unbind(2)
    return (low | (high << 4)).flatten(1)


def _pack_q4_k(values: Tensor) -> Tensor:
    codes, head = _codes(values, 15)
    return torch.cat([head, _join_nibbles(codes)], 1)


def _pack_q5_k(values: Tensor) -> Tensor:
    codes, head = _codes(values, 31)
    places = torch.arange(8, dtype=torch.uint8)[:, None]
    fifth = ((codes >> 4).reshape(-1, 8, _SUB_BLOCK) << places).sum(1, dtype=torch.uint8)
    return torch.cat([head, fifth, _join_nibbles(codes & 15)], 1)


INT8 = Layout("int8", 1, 1, _unpack_int8, _pack_int8, scaled=True)
FP8 = Layout("float8_e4m3fn", 1, 1, _unpack_fp8, _pack_fp8, scaled=True)
FP8_E5M2 = Layout("float8_e5m2", 1, 1, _unpack_fp8_e5m2, scaled=True)
Q8_0 = Layout("Q8_0", 32, 34, _unpack_q8_0, _pack_q8_0)
Q5_K = Layout("Q5_K", SUPER_BLOCK, 176, _unpack_q5_k, _pack_q5_k)
Q4_K = Layout("Q4_K", SUPER_BLOCK, 144, _unpack_q4_k, _pack_q4_k)

# The number by which GGUF knows a type. Source: enum ggml_type of ggml.
BY_GGML_TYPE: dict[int, Layout] = {
    2: Layout("Q4_0", 32, 18, _unpack_q4_0),
    3: Layout("Q4_1", 32, 20, _unpack_q4_1),
    6: Layout("Q5_0", 32, 22, _unpack_q5_0),
    7: Layout("Q5_1", 32, 24, _unpack_q5_1),
    8: Q8_0,
    11: Layout("Q3_K", SUPER_BLOCK, 110, _unpack_q3_k),
    12: Q4_K,
    13: Q5_K,
    14: Layout("Q6_K", SUPER_BLOCK, 210, _unpack_q6_k),
}
BY_NAME: dict[str, Layout] = {layout.name: layout for layout in (INT8, FP8, FP8_E5M2, *BY_GGML_TYPE.values())}

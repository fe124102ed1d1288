"""A few seconds of measuring -> what a network of any size takes on this machine.

What is timed is the network itself, where it is small enough, or else parts of it at the size that is asked about: one
block without its self-attention at fewer tokens, which costs the same for every token; and self-attention of a few
queries and heads over all keys, which costs the same for every query and head.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..attention import Attention
from ..config import DiTConfig
from ..costs import text_flops, vae_decode_flops
from ..geometry import LatentShape, token_count
from ..vfi import EMAInterpolator
from .measure import Run, at_largest, randomise, seconds_of
from .networks import Networks

TEXT_TOKENS = 128  # of a prompt in the official template; nothing but the text encoder depends much on it
BUDGET = 0.5
_TILE_BUDGET = 10.0  # a small VAE is timed with its whole tile: small parts of one take up to twice as long for each cell
_FEW_OPERATIONS = 10**10  # of a text encoder that takes longer between its products than in them
_FEWEST_TOKENS = 512  # with fewer, weights are read more than they are used


@dataclass(frozen=True)
class EvaluationSeconds:
    """One evaluation of the transformer, for one prompt.

    Attributes:
        linear: everything but self-attention's scores and sums.
        attention: these.
    """

    linear: float
    attention: float

    @property
    def total(self) -> float:
        """Seconds."""
        return self.linear + self.attention


@torch.no_grad()
def evaluation_seconds(networks: Networks, shape: LatentShape, *, device: torch.device, dtype: torch.dtype,
                       attention: Attention, batch: int = 1, budget: float = BUDGET) -> EvaluationSeconds:
    """How long the transformer takes for one prompt.

    Args:
        networks: of the model.
        shape: of the latents.
        device, dtype: of the weights.
        attention: the kernel.
        batch: prompts evaluated at once; only small networks gain from more.
        budget: seconds to measure, for each of two or three parts, about.
    """
    config, tokens = networks.dit, token_count(shape, networks.dit.patch_size)
    attend = attention_seconds(config, shape, device=device, dtype=dtype, attention=attention, budget=budget)
    counted, block = _block_seconds(networks, tokens, device, dtype, attention, budget)
    linear = block * tokens / counted * config.num_layers
    if (attend + linear) * batch * 3 > budget:
        return EvaluationSeconds(linear, attend)
    whole = _whole_seconds(networks, shape, batch, device, dtype, attention)
    return EvaluationSeconds(whole * linear / (linear + attend), whole * attend / (linear + attend))


def _doubling(smallest: int, largest: int) -> Iterator[int]:
    """smallest, twice that, ... and `largest` itself."""
    size = min(smallest, largest)
    while size < largest:
        yield size
        size *= 2
    yield largest


def attention_seconds(config: DiTConfig, shape: LatentShape, *, device: torch.device, dtype: torch.dtype, attention: Attention,
                      budget: float) -> float:
    """Seconds of the self-attentions of an evaluation, from one of some queries and heads over all keys.

    Args:
        config: of the transformer.
        shape: of the latents.
        device, dtype, attention: as in `evaluation_seconds`.
        budget: seconds to measure, about; first for more queries, then all heads, then all queries.
    """
    tokens, width, most = token_count(shape, config.patch_size), config.attention_head_dim, config.num_attention_heads
    some = min(tokens, 2048)
    # PyTorch's kernel for processors works on smaller blocks, and half as fast, where there are fewer than 768 queries.
    steps = [(queries, 1) for queries in _doubling(1024, some)]
    steps += [(some, heads) for heads in _doubling(2, most)] + [(queries, most) for queries in _doubling(2 * some, tokens)]
    by_work = {queries * heads: (queries, heads) for queries, heads in steps}

    def make(work: int) -> Run:
        queries, heads = by_work[work]
        q, k = (torch.randn(1, n, heads * width, device=device, dtype=dtype) for n in (queries, tokens))
        v = k.roll(1, 1)
        return lambda: attention(q, k, v, heads)

    work, seconds = at_largest(make, sorted(by_work), budget, device)
    return seconds * tokens * most / work * config.num_layers


def _block_seconds(networks: Networks, tokens: int, device: torch.device, dtype: torch.dtype, attention: Attention,
                   budget: float) -> tuple[int, float]:
    """(tokens, seconds) of one block without the scores of its self-attention."""
    dit, width = networks.random_dit(1, device, dtype), networks.dit.width
    text = torch.randn(1, TEXT_TOKENS, width, device=device, dtype=dtype)
    keys, values = dit.transformer_blocks[0].attn2.project(text)  # type: ignore[union-attr,operator]

    def only_cross(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
        return attention(q, k, v, heads, mask) if k is keys else v

    def make(count: int) -> Run:
        x, modulation = torch.randn(1, count, width, device=device, dtype=dtype), text[:, :6]
        rope = dit.rope((1, 1, count), device)
        return lambda: dit.transformer_blocks[0](x, modulation, rope, (keys, values), None, only_cross)

    return at_largest(make, _doubling(_FEWEST_TOKENS, tokens), budget, device)


def _whole_seconds(networks: Networks, shape: LatentShape, batch: int, device: torch.device, dtype: torch.dtype,
                   attention: Attention) -> float:
    """Seconds of the whole network for each of `batch` prompts."""
    dit = networks.random_dit(networks.dit.num_layers, device, dtype)
    dit.attention = attention
    run = dit_run(dit, shape, batch)
    run()
    return statistics.median(seconds_of(run, device) for _ in range(5)) / batch


def dit_run(dit: Any, shape: LatentShape, batch: int) -> Run:
    """One evaluation with arbitrary input, for `batch` prompts at once."""
    weight, channels = dit.proj_out.weight, dit.config.in_channels
    where = {"device": weight.device, "dtype": weight.dtype}
    latents = torch.randn(batch, channels, *shape, **where)
    with torch.no_grad():
        prepared = dit.prepare(torch.randn(batch, TEXT_TOKENS, dit.config.caption_channels, **where))
    timesteps = torch.full((batch,), 500.0, device=weight.device)

    @torch.no_grad()
    def run() -> Tensor:
        return dit.denoise(latents, timesteps, prepared)

    return run


@torch.no_grad()
def decode_seconds(networks: Networks, tile: tuple[int, int, int], *, device: torch.device, budget: float = _TILE_BUDGET) -> float:
    """Seconds of decoding one tile of (t, h, w) cells; a smaller one is timed where that is too much."""
    decoder = networks.random_decoder(device)
    t, h, w = tile
    # All frames of the tile as soon as it can be: a convolution in time takes longer for each of some few.
    # Less than the first would not do: the few points of small pictures take a fifth longer for each.
    edges = [(1, 8), *((t, edge) for edge in (8, 12, 16, 24, 32, max(h, w)))]
    cut = [(frames, min(h, edge), min(w, edge)) for frames, edge in edges]
    sizes = {vae_decode_flops(networks.vae, cells): cells for cells in cut}

    def make(flops: int) -> Run:
        latents = torch.randn(1, networks.vae.latent_channels, *sizes[flops], device=device)
        return lambda: decoder.decode_tile(latents)

    flops, seconds = at_largest(make, sorted(sizes), budget, device)
    return seconds * vae_decode_flops(networks.vae, tile) / flops


@torch.no_grad()
def text_seconds(config: Mapping[str, Any], *, device: torch.device, dtype: torch.dtype) -> float:
    """Seconds of encoding one prompt: of a small encoder itself, else from the products of a layer, each of its own speed."""
    if text_flops(config, TEXT_TOKENS) < _FEW_OPERATIONS:
        run = text_run(config, device, dtype)
        run()
        return statistics.median(seconds_of(run, device) for _ in range(5))
    d, inner, ff = config["d_model"], config["d_kv"] * config["num_heads"], config["d_ff"]
    seconds = flops = 0.0
    for count, n, m in ((3, d, inner), (1, inner, d), (2, d, ff), (1, ff, d)):  # of a layer: how many, from width, to width
        product = partial(F.linear, *(torch.randn(rows, n, device=device, dtype=dtype) for rows in (TEXT_TOKENS, m)))
        product()
        seconds += count * min(seconds_of(product, device) for _ in range(4))
        flops += count * 2 * TEXT_TOKENS * n * m
    return seconds * text_flops(config, TEXT_TOKENS) / flops


def text_run(config: Mapping[str, Any], device: torch.device, dtype: torch.dtype) -> Run:
    """Encoding one prompt with arbitrary weights."""
    from ..text.encoder import empty_model

    model, ids = randomise(empty_model(config), device, dtype), torch.ones((1, TEXT_TOKENS), dtype=torch.long, device=device)
    return lambda: model(input_ids=ids)


def pair_seconds(interpolator: EMAInterpolator, width: int, height: int, multiplier: int, *, device: torch.device,
                 budget: float = BUDGET) -> float:
    """Seconds of interpolating a pair of frames, features of one of them included; its windows cost the same at every place.

    Args:
        interpolator: the model, on the device.
        width, height: of the frames, pixels.
        multiplier: frames for each one.
        device, budget: as in `evaluation_seconds`.
    """
    sizes = {}
    for edge in (128, 256, 512, 1024, max(width, height)):
        size = (min(edge, width), min(edge, height))
        sizes[size[0] * size[1]] = size
    pixels, seconds = at_largest(lambda pixels: pair_run(interpolator, *sizes[pixels], multiplier, device), sorted(sizes), budget, device)
    return seconds * width * height / pixels


def pair_run(interpolator: EMAInterpolator, width: int, height: int, multiplier: int, device: torch.device) -> Run:
    """Interpolating one more pair of a clip of noise."""
    positions = [i / multiplier for i in range(1, multiplier)] if interpolator.arbitrary_time else [0.5] * (multiplier - 1)
    frame = torch.rand(3, height, width, device=device)
    before = interpolator.features(frame.flip(2))
    return lambda: interpolator.between([before], [interpolator.features(frame)], positions)

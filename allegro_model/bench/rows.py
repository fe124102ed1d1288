"""The rows of `allegro bench`: every part of a run, each variant of it in turn with a plain one."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..attention import BACKENDS, Attention, sdpa
from ..compiling import CompiledBlocks
from ..config import VFI_PRESETS
from ..costs import dit_flops, text_flops, vae_decode_flops
from ..dit import AllegroDiT
from ..geometry import estimate_decode_bytes, latent_shape, token_count
from ..loading import load_dit
from ..loading.convert import convert_checkpoint, suffix_of
from ..streaming import Streamed, layers_of_dit
from ..vae import Tiling
from ..vae.batching import tiles_at_once
from ..vfi import EMAVFI, EMAInterpolator, best_dtype
from .measure import Measured, Run, in_turn, randomise
from .networks import META, Networks
from .roofline import convolution_run, matmul_run
from .speed import TEXT_TOKENS, dit_run, pair_run, text_run

# A kernel with a matrix of all scores is for short clips.
_MATH_TOKENS = 4096
# Formats of quantised weights, and of how many layers: writing all of them takes minutes.
_CONVERTED = ("fp8", "int8", "gguf-q8_0")
_CONVERTED_LAYERS = 4


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes:
        section: a key of `SECTIONS`.
        name: of the variant; the first of a section is what the others are compared with.
        measured: seconds and memory.
        ratio: seconds over those of the first; below 1 is faster.
        flops: operations per second; None where nothing is counted.
    """

    section: str
    name: str
    measured: Measured
    ratio: float
    flops: float | None

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        m = self.measured
        return {"section": self.section, "name": self.name, "seconds": m.seconds, "median": m.median, "spread": m.spread,
                "peak_bytes": m.peak_bytes, "ratio": self.ratio, "flops_per_second": self.flops}


@dataclass(frozen=True)
class Scope:
    """What is measured.

    Attributes:
        networks: of the model.
        device: where.
        dtypes: of the transformer; the first one is the plain one.
        frames, height, width: of the clip.
        layers: of the transformer and the text encoder, of which all are alike.
        rounds: timed calls of each row.
        compiled: also measure torch.compile.
    """

    networks: Networks
    device: torch.device
    dtypes: tuple[torch.dtype, ...]
    frames: int
    height: int
    width: int
    layers: int
    rounds: int
    compiled: bool


def half_types(device: torch.device) -> tuple[torch.dtype, ...]:
    """bfloat16 where it is worth measuring: not on a processor that has to emulate it, which takes many times longer."""
    return (torch.bfloat16,) if device.type != "cpu" or best_dtype(device) is torch.bfloat16 else ()


# A call, and the operations in it.
Variant = tuple[Run, int | None]


def rows_of(scope: Scope, section: str) -> Iterator[Row]:
    """Measures a section; its variants take turns.

    Args:
        section: a key of `SECTIONS`.
    """
    with torch.no_grad(), ExitStack() as stack:
        variants = SECTIONS[section](scope, stack)
        found = in_turn({name: run for name, (run, _) in variants.items()}, scope.device, scope.rounds)
    plain = next(iter(found.values())).median
    for name, measured in found.items():
        flops = variants[name][1]
        yield Row(section, name, measured, measured.median / plain, None if flops is None else flops / measured.median)


def _peak(scope: Scope, stack: ExitStack) -> dict[str, Variant]:
    made: dict[str, Variant] = {}
    for dtype in scope.dtypes:
        made[f"matrix product, {_name(dtype)}"] = matmul_run(scope.device, dtype)
    made["convolution, float32"] = convolution_run(scope.device, torch.float32)
    return made


def _text(scope: Scope, stack: ExitStack) -> dict[str, Variant]:
    layers = min(scope.layers, scope.networks.text["num_layers"])
    config = {**scope.networks.text, "num_layers": layers}
    return {f"{layers} of {scope.networks.text['num_layers']} layers, {TEXT_TOKENS} tokens, {_name(dtype)}":
            (text_run(config, scope.device, dtype), text_flops(config, TEXT_TOKENS)) for dtype in scope.dtypes}


def _dit(scope: Scope, stack: ExitStack) -> dict[str, Variant]:
    networks, shape = scope.networks, latent_shape(scope.width, scope.height, scope.frames)
    tokens = token_count(shape, networks.dit.patch_size)
    made: dict[str, Variant] = {}
    for dtype in scope.dtypes:
        dit = networks.random_dit(scope.layers, scope.device, dtype)
        flops = dit_flops(dit.config, shape, TEXT_TOKENS).total
        one, both = dit_run(dit, shape, 1), dit_run(dit, shape, 2)
        for name, backend in BACKENDS.items():
            if (name != "sdpa-math" or tokens <= _MATH_TOKENS) and not backend.problem(
                    scope.device, dtype, dit.config.attention_head_dim):
                made[f"{_name(dtype)}, {name}"] = (_with(dit, one, backend.load()), flops)
        made[f"{_name(dtype)}, sdpa, both prompts at once"] = (_with(dit, both, sdpa), 2 * flops)
        if scope.compiled:
            blocks = CompiledBlocks()
            made[f"{_name(dtype)}, sdpa, compiled"] = (
                _with(dit, one, sdpa, partial(blocks.applied, dit.transformer_blocks)), flops)
    return made


def _with(dit: AllegroDiT, run: Run, attention: Attention,
          context: Callable[[], AbstractContextManager[None]] = nullcontext) -> Run:
    """`run` with a kernel of attention."""

    def call() -> object:
        dit.attention = attention
        with context():
            return run()

    return call


def _offload(scope: Scope, stack: ExitStack) -> dict[str, Variant]:
    """Weights on the device, or in main memory as the released ones are stored, for as long as rows are measured."""
    shape, dtype = latent_shape(scope.width, scope.height, scope.frames), scope.dtypes[0]
    there = scope.networks.random_dit(scope.layers, scope.device, dtype)
    stored = scope.networks.random_dit(scope.layers, torch.device("cpu"), torch.bfloat16)
    stack.enter_context(Streamed(stored, layers_of_dit(stored), scope.device, dtype))
    flops = dit_flops(there.config, shape, TEXT_TOKENS).total
    return {f"{_name(dtype)}, {name}": (dit_run(dit, shape, 1), flops) for name, dit in (("none", there), ("stream", stored))}


def _quantised(scope: Scope, stack: ExitStack) -> dict[str, Variant]:
    """Weights that stay packed, as `allegro convert` writes them."""
    shape, dtype, folder = latent_shape(scope.width, scope.height, scope.frames), scope.dtypes[0], _folder(stack)
    layers = min(scope.layers, _CONVERTED_LAYERS)
    dit = scope.networks.random_dit(layers, scope.device, dtype)
    flops = dit_flops(dit.config, shape, TEXT_TOKENS).total
    title = f"{layers} of {scope.networks.dit.num_layers} layers, {_name(dtype)}"
    made: dict[str, Variant] = {title: (dit_run(dit, shape, 1), flops)}
    plain = folder / "plain.safetensors"
    save_file({name: tensor.to("cpu", torch.bfloat16) for name, tensor in dit.state_dict().items()}, plain)
    for kind in _CONVERTED:
        file = folder / f"{kind}{suffix_of(kind)}"
        convert_checkpoint(plain, file, kind)
        packed = load_dit(file, config=dit.config).to(scope.device, dtype)
        made[f"{title}, weights in {kind}"] = (dit_run(packed, shape, 1), flops)
    return made


def _folder(stack: ExitStack) -> Path:
    """One for as long as rows are measured. Weights stay mapped from files in it, which Windows does not remove."""
    return Path(stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True)))


def _decode(scope: Scope, stack: ExitStack) -> dict[str, Variant]:
    config = scope.networks.vae
    tiling, shape = Tiling.from_config(config), latent_shape(scope.width, scope.height, scope.frames)
    t, h, w = (axis.tile for axis in tiling.plan(shape))
    if scope.device.type == "cpu":  # a whole tile takes minutes
        t, h, w = min(t, 2), min(h, 8), min(w, 8)

    made: dict[str, Variant] = {}
    for dtype in (torch.float32, *half_types(scope.device)):
        decoder = scope.networks.random_decoder(scope.device, dtype)
        most = tiles_at_once(estimate_decode_bytes, config, tiling, cells=shape, device=scope.device, dtype_bytes=dtype.itemsize)
        for tiles in dict.fromkeys((1, most)):
            latents = torch.randn(tiles, config.latent_channels, t, h, w, device=scope.device, dtype=dtype)
            title = f"{'tile' if tiles == 1 else f'{tiles} tiles'} of {4 * t}x{8 * h}x{8 * w}, {_name(dtype)}"
            made[title] = partial(decoder.decode_tile, latents), tiles * vae_decode_flops(config, (t, h, w))
    return made


def _interpolate(scope: Scope, stack: ExitStack) -> dict[str, Variant]:
    width, height = (min(side, 256) if scope.device.type == "cpu" else side for side in (scope.width, scope.height))

    def variant(dtype: torch.dtype) -> Variant:
        model = randomise(EMAVFI(VFI_PRESETS["ours_small_t"], device=META), scope.device, dtype)
        return pair_run(EMAInterpolator(model), width, height, 2, scope.device), None  # type: ignore[arg-type]

    dtypes = dict.fromkeys((torch.float32, *half_types(scope.device), best_dtype(scope.device)))
    return {f"pair of {width}x{height}, ours_small_t, {_name(dtype)}": variant(dtype) for dtype in dtypes}


def _load(scope: Scope, stack: ExitStack) -> dict[str, Variant]:
    folder = path = _folder(stack)
    kwargs: dict[str, Any] = {}
    if scope.networks.root is not None:
        path, title = scope.networks.root / "transformer", scope.networks.name
    else:
        dit = scope.networks.random_dit(scope.layers, torch.device("cpu"), torch.bfloat16)
        kwargs = {"config": dit.config}
        save_file(dit.state_dict(), folder / "diffusion_pytorch_model.safetensors")
        title = f"{scope.layers} of {scope.networks.dit.num_layers} layers in bfloat16"

    def read(dtype: torch.dtype | None) -> list[Tensor]:
        return [p.to(scope.device).view(-1).max() for p in load_dit(path, dtype=dtype, **kwargs).parameters()]

    return {f"{title}, every weight read": (partial(read, None), None), f"{title}, as float32": (partial(read, torch.float32), None)}


SECTIONS: Mapping[str, Callable[[Scope, ExitStack], dict[str, Variant]]] = {
    "peak": _peak, "text": _text, "dit": _dit, "offload": _offload, "quantised": _quantised, "decode": _decode, "interpolate": _interpolate, "load": _load,
}


# Where the time of a step goes

_KINDS = {"attention": ("attention", "flash", "fmha", "sage"), "matmul": ("addmm", "::mm", "bmm", "matmul", "gemm", "linear", "nvjet"),
          "elementwise": ("add", "mul", "gelu", "norm", "copy", "cat", "silu", "elementwise", "roll", "sub", "neg")}


def profile(scope: Scope) -> dict[str, float]:
    """Shares of one evaluation's time: attention, matmul, elementwise and other; they add up to 1."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    dit = scope.networks.random_dit(scope.layers, scope.device, scope.dtypes[0])
    run = dit_run(dit, latent_shape(scope.width, scope.height, scope.frames), 1)
    run()
    gpu = scope.device.type == "cuda"
    with record(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]) as profiler:
        run()
    shares = dict.fromkeys([*_KINDS, "other"], 0.0)
    for event in profiler.key_averages():
        name = event.key.lower()
        spent = event.self_device_time_total if gpu else event.self_cpu_time_total
        shares[next((kind for kind, words in _KINDS.items() if any(word in name for word in words)), "other")] += spent
    total = sum(shares.values()) or 1.0
    return {kind: spent / total for kind, spent in shares.items()}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

"""Checks of the nodes for attention and compiler that need ComfyUI's Python objects; see checks.py."""

from functools import partial
from typing import Any

import torch
from bootstrap import Host, call
from checks import advanced, ksampler, parts, raises, relative, sample
from torch import Tensor

OVERRIDE = "optimized_attention_override"


def with_attention(h: Host, name: str, dit: Any = None) -> Any:
    return h.run("AllegroAttention", model=dit or parts(h)[0], attention=name)


def counting(h: Host, calls: list[int]) -> Any:
    """A kernel that notes the tokens of its queries, in the place of sdpa-math."""
    module = h.module("allegro_model.attention")

    def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
        calls.append(q.shape[1])
        return module.sdpa(q, k, v, heads, mask)

    return module.Backend(lambda: attention, "counts")


def check_the_chosen_attention_computes(h: Host) -> None:
    """All of a run, with every sampler; the input stays as it is."""
    module, calls = h.module("allegro_model.attention"), []
    dit, original = parts(h)[0], module.BACKENDS["sdpa-math"]
    module.BACKENDS["sdpa-math"] = counting(h, calls)
    try:
        chosen = with_attention(h, "sdpa-math")
        sigmas = h.module("allegro_model.sampling").reference_sigmas(2)
        for run in (lambda d: sample(h, d, steps=2), lambda d: ksampler(h, d, steps=2), lambda d: advanced(h, d, sigmas)):
            exact = run(dit)
            calls.clear()
            h.log.clear()
            assert relative(run(chosen), exact) < 1e-4
            evaluations = calls.count(6 * 4 * 6) // 2  # of the probe there is one short call; two layers, two attentions each
            assert evaluations >= 4, calls
            calls.clear()
            run(dit)
            run(with_attention(h, "comfyui", chosen))
            assert not calls, "what was chosen for one model is used for another"
        assert OVERRIDE not in dit.model_options["transformer_options"]
    finally:
        module.BACKENDS["sdpa-math"] = original


def check_the_attention_is_named(h: Host) -> None:
    for name, words in (("auto", "attention auto,"), ("flash3", "attention flash3,"), ("comfyui", "attention sub_quad,")):
        h.log.clear()
        sample(h, with_attention(h, name), steps=1)
        (line,) = [line for line in h.log if "Allegro: 2 layers" in line]
        assert words in line or name == "comfyui", line
        problems = [line for line in h.log if "cannot be used" in line]
        assert len(problems) == (name == "flash3"), problems
        assert all("flash3 cannot be used: it runs on cuda, not on cpu. Using sdpa." in line for line in problems)


def check_the_last_attention_counts(h: Host) -> None:
    """Also when it is that of another node."""
    seen: list[int] = []

    def other(function: Any, *args: Any, **kwargs: Any) -> Tensor:
        seen.append(1)
        return function(*args, **kwargs)

    behind = with_attention(h, "sdpa").clone()
    behind.model_options["transformer_options"][OVERRIDE] = other
    h.log.clear()
    sample(h, behind, steps=1)
    assert seen
    assert any("attention of another node," in line for line in h.log)
    seen.clear()
    sample(h, with_attention(h, "sdpa", behind), steps=1)
    assert not seen


def check_attention_and_compiler_are_for_our_models(h: Host) -> None:
    other = parts(h)[0].clone()
    other.model = type("Other", (), {"diffusion_model": torch.nn.Linear(1, 1)})()
    raises("CheckpointMismatch", "the attention node is made for Allegro", lambda: with_attention(h, "auto", other))
    raises("CheckpointMismatch", "the compile node is made for Allegro", lambda: h.run("AllegroCompile", model=other))
    raises("ScheduleError", "must be one of auto, sdpa", lambda: with_attention(h, "warp"))


def compiled(h: Host, backend: Any = "eager", dit: Any = None) -> Any:
    """The node with another backend than the one that takes time to build kernels."""
    module = h.module("nodes.bridge.speed")
    original = module.CompiledBlocks
    module.CompiledBlocks = partial(original, backend)
    try:
        return h.run("AllegroCompile", model=dit or parts(h)[0])
    finally:
        module.CompiledBlocks = original


def check_blocks_are_compiled_below_comfyuis_own_node(h: Host) -> None:
    node, dit = h.extra("nodes_torch_compile", "TorchCompileModel"), with_attention(h, "sdpa")
    torch.compiler.reset()
    both = call(node, model=compiled(h, dit=dit), backend="eager")
    assert relative(ksampler(h, both, steps=2), ksampler(h, dit, steps=2)) < 1e-5


def check_blocks_are_compiled_once_for_all(h: Host) -> None:
    """The same clip within rounding, nothing compiled again for more steps or another attention, and nothing left on the model."""
    dit, captured = parts(h)[0], torch._dynamo.utils.counters["stats"]
    torch.compiler.reset()
    before, graphs = captured["unique_graphs"], []
    for attention, steps in (("comfyui", 2), ("comfyui", 5), ("sdpa", 2)):
        model = compiled(h, dit=with_attention(h, attention))
        assert relative(sample(h, model, steps=steps), sample(h, dit, steps=steps)) < 1e-5
        graphs.append(captured["unique_graphs"] - before)
    assert graphs[0] == graphs[1] == graphs[2] > 0, graphs
    assert all("forward" not in vars(block) for block in dit.model.diffusion_model.transformer_blocks)
    assert not any("torch.compile failed" in line for line in h.log)


def check_a_compiler_that_fails_is_left_out(h: Host) -> None:
    def broken(graph: Any, inputs: Any) -> Any:
        raise ValueError("no compiler here")

    torch.compiler.reset()
    h.log.clear()
    assert torch.equal(sample(h, compiled(h, broken), steps=2), sample(h, steps=2))
    assert len([line for line in h.log if "so the blocks run without it: no compiler here" in line]) == 1

"""Compiled blocks: the same numbers, few graphs, and a way on without the compiler."""

import gc
import inspect
import shutil
import weakref

import pytest
import torch
from tiny import DIT, tiny_dit

from allegro_model.attention import sdpa
from allegro_model.compiling import CompiledBlocks
from allegro_model.dit.blocks import Block
from allegro_model.pipeline import AllegroPipeline, PromptEmbeds
from allegro_model.sampling import Prompt

counted = torch._dynamo.utils.counters["stats"]


@pytest.fixture(autouse=True)
def _fresh_compiler():
    """What others compiled does not count here, nor what is compiled here there."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def evaluate(dit, *, batch=1, length=5, padded=False, compiled=None):
    generator = torch.Generator().manual_seed(batch + length)
    latents = torch.randn(batch, 4, 2, 4, 4, generator=generator)
    embeds = torch.randn(batch, length, DIT.caption_channels, generator=generator)
    mask = torch.arange(length)[None] < torch.tensor([[length], [2]][:batch]) if padded else None
    inputs = latents, torch.full((batch,), 500.0), embeds, mask
    with torch.no_grad():
        if compiled is None:
            return dit(*inputs)
        with compiled.applied(dit.transformer_blocks):
            return dit(*inputs)


def test_the_graphs_serve_all_blocks_lengths_and_kernels():
    """They are compiled again for another number of prompts, and once for lengths that vary. The attention is another object each
    time, as in ComfyUI."""
    dit, compiled = tiny_dit(), CompiledBlocks("eager")
    graphs = []
    for case in ({}, {}, {"length": 9}, {"length": 7}, {"length": 11}, {"batch": 2}, {"batch": 2, "length": 8}):
        dit.attention = lambda *inputs, kernel=case, **mask: sdpa(*inputs, **mask)
        assert torch.allclose(evaluate(dit, compiled=compiled, **case), evaluate(dit, **case), atol=1e-5), case
        assert "forward" not in vars(dit.transformer_blocks[0]), "nothing is left on the blocks"
        graphs.append(counted["unique_graphs"])
    first, again, longer, *lengths, two, two_longer = graphs
    assert first == again >= 1
    assert [longer] * len(lengths) == lengths
    assert two == two_longer
    assert not compiled.failure


@pytest.mark.slow
def test_the_usual_backend_gives_the_same_numbers():
    if not any(map(shutil.which, ("c++", "g++", "clang++", "cl"))):
        pytest.skip("the inductor backend needs a C++ compiler")
    dit, compiled = tiny_dit(), CompiledBlocks()
    assert torch.allclose(evaluate(dit, compiled=compiled), evaluate(dit), atol=1e-5)
    assert not compiled.failure


def test_a_compiler_that_fails_is_left_out_with_one_line(monkeypatch, caplog):
    """At its first call, as where there is no C++ compiler."""
    def broken(graph, inputs):
        raise ValueError("no compiler here\nmore")

    dit, compiled = tiny_dit(), CompiledBlocks(broken)
    for _ in range(2):
        assert torch.equal(evaluate(dit, compiled=compiled), evaluate(dit))
    lines = [record.getMessage() for record in caplog.records if record.name.startswith("allegro_model")]
    assert lines == ["torch.compile failed, so the blocks run without it: no compiler here"]
    monkeypatch.setattr(torch, "compile", lambda *a, **k: (_ for _ in ()).throw(RuntimeError("not supported on this system")))
    caplog.clear()
    assert torch.equal(evaluate(dit, compiled=CompiledBlocks()), evaluate(dit))
    assert "not supported on this system" in caplog.text


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("out of memory"), KeyboardInterrupt()])
def test_other_failures_are_not_the_compilers(monkeypatch, error):
    compiled = CompiledBlocks()
    monkeypatch.setattr(torch, "compile", lambda *a, **k: lambda *a: (_ for _ in ()).throw(error))
    with pytest.raises(type(error)):
        evaluate(tiny_dit(), compiled=compiled)
    assert not compiled.failure


def test_a_pipeline_compiles_and_lets_go(monkeypatch):
    """With the step cache that the compiler cannot follow, too, and no setting of the compiler is changed."""
    settings_before = torch._dynamo.config.get_config_copy()
    runs = []
    monkeypatch.setattr(torch, "compile", lambda function, backend: lambda *a: runs.append(1) or function(*a))
    pipeline = AllegroPipeline.from_pretrained("tiny", device="cpu", compile_blocks=True)
    exact = AllegroPipeline.from_pretrained("tiny", device="cpu")
    prompts = PromptEmbeds(*[Prompt(x, torch.ones(1, 3)) for x in torch.ones(2, 1, 3, exact.dit_config.caption_channels)])
    for cache, some in (("off", True), ("broadcast", False)):
        settings = exact.settings(width=32, height=32, num_frames=8, num_steps=3, cache=cache)
        runs.clear()
        result = pipeline.sample(prompts, pipeline.start(settings)).latents
        assert bool(runs) == some
        assert torch.equal(result, exact.sample(prompts, exact.start(settings)).latents)
    assert torch._dynamo.config.get_config_copy() == settings_before
    network = weakref.ref(pipeline.dit)
    gc.disable()
    try:
        pipeline._dit = None
        assert network() is None, "the network is freed at once, not when Python looks for cycles"
    finally:
        gc.enable()


def test_the_block_has_the_inputs_that_are_expected():
    names = list(inspect.signature(Block.forward).parameters)
    assert names[6:] == ["attention", "reuse"]

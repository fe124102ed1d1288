"""The attention contract, the kernels, and which one is chosen. Packages with kernels need a GPU: stand-ins compute by the formula."""

import logging
import sys
from dataclasses import replace
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F

from allegro_model import attention
from allegro_model.attention import AttentionShape, choose_attention
from allegro_model.errors import NonFiniteError, ScheduleError
from allegro_model.pipeline import AllegroPipeline, PromptEmbeds
from allegro_model.sampling import Prompt

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SHAPE = AttentionShape(64, 24, 96)
PACKAGES = {"flash2": "flash_attn", "flash3": "flash_attn_interface", "sage": "sageattention"}


def qkv(length=7):
    g = torch.Generator().manual_seed(0)
    return [torch.randn(2, length, 12, generator=g) for _ in range(3)]


def by_hand(q, k, v, heads, mask=None):
    q, k, v = (x.view(2, -1, heads, 12 // heads).transpose(1, 2) for x in (q, k, v))
    scores = q @ k.transpose(-1, -2) / (12 / heads) ** 0.5
    return ((scores if mask is None else scores + mask).softmax(-1) @ v).transpose(1, 2).reshape(2, -1, 12)


def heads_last(q, k, v):
    """The layout [B, N, heads, dh] of all three packages."""
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


@pytest.fixture
def packages(monkeypatch):
    """All three, on every device. Returns the calls."""
    calls = []

    def flash_attn_func(q, k, v):
        calls.append(tuple(q.shape))
        return heads_last(q, k, v)

    def sageattn(q, k, v, tensor_layout="HND", is_causal=False, sm_scale=None):
        assert tensor_layout == "NHD"
        return flash_attn_func(q, k, v)

    for name, function in (("flash_attn", flash_attn_func), ("flash_attn_interface", lambda *a: (flash_attn_func(*a), None)),
                           ("sageattention", sageattn)):
        module = ModuleType(name)
        setattr(module, "sageattn" if function is sageattn else "flash_attn_func", function)
        monkeypatch.setitem(sys.modules, name, module)
    for name, backend in attention.BACKENDS.items():
        if name in PACKAGES:
            monkeypatch.setitem(attention.BACKENDS, name, replace(backend, devices=(), capability=None, dtypes=()))
    return calls


def test_every_kernel_is_the_formula(packages):
    mask = torch.where(torch.arange(7) < 4, 0.0, -10000.0).expand(2, 1, 1, 7)
    for name in ("sdpa", "sdpa-flash", "sdpa-math", *PACKAGES):  # the others have no kernel on a CPU
        attend = attention.BACKENDS[name].load()
        assert torch.allclose(attend(*qkv(), 3), by_hand(*qkv(), 3), atol=1e-6), name
        assert torch.allclose(attend(*qkv(), 3, mask), by_hand(*qkv(), 3, mask), atol=1e-6), name
    assert packages == [(2, 7, 3, 4)] * 3, "not called, or called with a mask"


def test_a_kernel_of_torch_is_that_kernel():
    """Forced, it fails where it does not exist, and afterwards nothing is forced."""
    with pytest.raises(RuntimeError):
        attention.BACKENDS["sdpa-cudnn"].load()(*qkv(), 3)
    assert torch.allclose(attention.sdpa(*qkv(), 3), by_hand(*qkv(), 3), atol=1e-6)


@pytest.mark.parametrize(("name", "device", "dtype", "width", "generation", "reason"), [
    ("flash2", CPU, torch.bfloat16, 96, (9, 0), "runs on cuda, not on cpu"),
    ("flash2", CUDA, torch.float32, 96, (9, 0), "float16 or bfloat16, not in float32"),
    ("flash2", CUDA, torch.bfloat16, 320, (9, 0), "8 to 256 wide, those of this model 320"),
    ("flash2", CUDA, torch.bfloat16, 96, (7, 5), "not made for a GPU of the generation 7.5"),
    ("flash3", CUDA, torch.bfloat16, 96, (8, 9), "not made for a GPU of the generation 8.9"),
    ("flash3", CUDA, torch.bfloat16, 96, (12, 0), "not made for a GPU of the generation 12.0"),
    ("sage", CUDA, torch.bfloat16, 144, (9, 0), "64 to 128 wide, those of this model 144"),
    ("sage", CUDA, torch.float32, 96, (9, 0), "not in float32"),
    ("sdpa-cudnn", CUDA, torch.float32, 96, (9, 0), "not in float32"),
    ("sdpa-efficient", CPU, torch.float32, 96, (9, 0), "not on cpu"),
])
def test_what_a_kernel_cannot_do_is_said_and_torch_does_it(monkeypatch, caplog, name, device, dtype, width, generation, reason):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: generation)
    kernel = choose_attention(name, device, dtype, SHAPE._replace(head_width=width))
    assert (kernel.name, kernel.run) == ("sdpa", attention.sdpa)
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert reason in caplog.text


@pytest.mark.usefixtures("packages")
@pytest.mark.parametrize("name", PACKAGES)
def test_a_package_is_used_broken_or_missing(monkeypatch, caplog, name):
    assert choose_attention(name, CPU, torch.float32, SHAPE).name == name
    module = sys.modules[PACKAGES[name]]
    for function in vars(module).copy():
        if not function.startswith("__"):
            monkeypatch.setattr(module, function, lambda *a, **k: (_ for _ in ()).throw(ValueError("Unsupported architecture.\nmore")))
    assert choose_attention(name, CPU, torch.float32, SHAPE).name == "sdpa"
    assert "it fails here: Unsupported architecture. Using sdpa." in caplog.text
    monkeypatch.delitem(sys.modules, PACKAGES[name])
    assert choose_attention(name, CPU, torch.float32, SHAPE).name == "sdpa"
    cure = ' (pip install "allegro-video[flash]")' if name == "flash2" else ""  # the others have no extra
    assert f"the package {PACKAGES[name]} is not installed{cure}. Using sdpa." in caplog.text


@pytest.mark.usefixtures("packages")
def test_auto_measures_the_exact_kernels_and_takes_the_fastest(monkeypatch, caplog):
    """By a clock on which each kernel takes a given time. SageAttention is approximate, plain products need too much memory."""
    caplog.set_level(logging.INFO)
    now = [0.0]
    monkeypatch.setattr(attention.time, "perf_counter", lambda: now[0])
    for name, seconds in {"sdpa": 1.0, "flash2": 0.5, "flash3": 0.25, "sage": 0.01, "sdpa-math": 0.01}.items():
        attend = attention.BACKENDS[name].load()

        def run(*args, attend=attend, seconds=seconds):
            now[0] += seconds
            return attend(*args)

        monkeypatch.setitem(attention.BACKENDS, name, replace(attention.BACKENDS[name], load=lambda run=run: run))
    monkeypatch.setattr(attention, "sdpa", attention.BACKENDS["sdpa"].load())
    kernel = choose_attention("auto", CPU, torch.float32, SHAPE)
    assert kernel.seconds == {"sdpa": 1.0, "flash2": 0.5, "flash3": 0.25}
    assert kernel.name == "flash3"
    assert caplog.messages == ["Attention of 64 tokens in float32: flash3 (measured: sdpa 1000.0 ms, flash2 500.0 ms, flash3 250.0 ms)"]


@pytest.mark.usefixtures("packages")
def test_auto_leaves_out_a_kernel_with_a_wrong_result(monkeypatch, caplog):
    seconds = {"sdpa", "flash2", "flash3"}
    assert set(choose_attention("auto", CPU, torch.float32, SHAPE).seconds) == seconds
    for wrong, words in ((lambda q, k, v: 1.1 * heads_last(q, k, v), "differs from torch's by 0.1"),
                         (lambda q, k, v: heads_last(q, k, v) * float("nan"), "differs from torch's by nan")):
        monkeypatch.setattr(sys.modules["flash_attn"], "flash_attn_func", wrong)
        assert set(choose_attention("auto", CPU, torch.float32, SHAPE).seconds) == seconds - {"flash2"}
        assert words in caplog.text


def test_auto_measures_nothing_where_there_is_no_choice(monkeypatch):
    monkeypatch.setattr(attention, "measure", lambda *_: pytest.fail("measured"))
    assert choose_attention("auto", CPU, torch.bfloat16, SHAPE) == ("sdpa", attention.sdpa, {})


@pytest.mark.usefixtures("packages")
@pytest.mark.parametrize(("tokens", "heads"), [(64, 24), (79_200, 2), (300_000, 1)])
def test_as_many_heads_are_measured_as_fill_a_gpu(monkeypatch, tokens, heads):
    seen = []
    monkeypatch.setattr(attention, "sdpa", lambda q, k, v, heads: seen.append((q.shape[1], heads)) or q[:, :1])
    monkeypatch.setattr(torch, "randn", lambda shape, generator: torch.zeros(1, 1, 1).expand(shape))
    attention.measure([], CPU, torch.float32, SHAPE._replace(tokens=tokens))
    assert set(seen) == {(tokens, heads)}


def test_an_unknown_kernel_is_refused():
    with pytest.raises(ScheduleError, match="attention='warp': must be one of auto, sdpa, sdpa-cudnn"):
        AllegroPipeline.from_pretrained("tiny", attention="warp")


@pytest.mark.usefixtures("packages")
def test_a_pipeline_chooses_once_for_each_size_and_uses_the_kernel(monkeypatch):
    chosen = []
    monkeypatch.setattr("allegro_model.pipeline.choose_attention", lambda *key: chosen.append(key[3].tokens) or choose_attention(*key))
    pipeline = AllegroPipeline.from_pretrained("tiny", device="cpu", attention="flash2")
    small = pipeline.settings(width=32, height=32, num_frames=8, num_steps=1)
    prompts = PromptEmbeds(*[Prompt(x, torch.ones(1, 3)) for x in torch.ones(2, 1, 3, pipeline.dit_config.caption_channels)])
    exact = AllegroPipeline.from_pretrained("tiny", device="cpu", attention="sdpa")
    for settings in (small, small, replace(small, width=48)):
        result = pipeline.sample(prompts, pipeline.start(settings)).latents
        assert torch.allclose(result, exact.sample(prompts, exact.start(settings)).latents, atol=1e-4)
    assert chosen == [8, 8, 12, 12], "once for each size, in each pipeline"
    monkeypatch.setattr(sys.modules["flash_attn"], "flash_attn_func", lambda q, k, v: heads_last(q, k, v) * float("nan"))
    pipeline = AllegroPipeline.from_pretrained("tiny", device="cpu", attention="flash2")
    with pytest.raises(NonFiniteError, match="Try, in this order: the attention sdpa instead of flash2"):
        pipeline.sample(prompts, pipeline.start(small))

"""Streaming: the numbers of a network that was moved as a whole, with one or two layers where it runs."""

import gc
import shutil

import pytest
import torch
from live_bytes import LiveBytes
from tiny import DIT, tiny_dit
from torch import nn

from allegro_model import AllegroPipeline, pipeline
from allegro_model.errors import NotEnoughMemory, ScheduleError
from allegro_model.loading import bundled_model
from allegro_model.loading.convert import convert_checkpoint
from allegro_model.quantised import QuantisedLinear
from allegro_model.streaming import AtOnce, Streamed, layers_of_dit, streamed_bytes, whole_bytes

CPU = torch.device("cpu")
WIDTH, LAYERS = 64, 6
LAYER_BYTES = (WIDTH + 1) * WIDTH * 4


class Recorded(AtOnce):
    """Copies ahead, as with CUDA, and notes what happens when."""

    ahead = True

    def __init__(self):
        self.log, self.numbers = [], {}

    def bring(self, modules, device, dtype):
        modules = list(modules)
        self.log.append(f"bring {self.numbers.setdefault(id(modules[0]), len(self.numbers))}")
        super().bring(modules, device, dtype)
        return self.numbers[id(modules[0])]

    def wait(self, arrived):
        self.log.append(f"run {arrived}")

    def computed(self):
        self.log.append("done")


def network(dtype=torch.bfloat16):
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))).to(dtype).requires_grad_(False)


@pytest.mark.parametrize(("transfer", "most"), [(AtOnce, 1), (Recorded, 2)])
def test_few_layers_are_there_and_the_result_is_the_same(transfer, most):
    model, x = network(), torch.randn(1, WIDTH, generator=torch.Generator().manual_seed(1))
    expected = network().float()(x)
    gc.collect()
    with torch.no_grad(), LiveBytes() as live, Streamed(model, model, CPU, torch.float32, transfer=transfer()):
        for _ in range(3):
            assert torch.equal(model(x), expected)
    assert (most - 0.2) * LAYER_BYTES < live.peak < (most + 0.2) * LAYER_BYTES, live.peak / LAYER_BYTES
    assert live.now < LAYER_BYTES / 10


def test_the_next_layer_is_copied_behind_the_one_that_runs_and_from_the_end_to_the_start():
    model, transfer = network(), Recorded()
    with Streamed(model, model[:3], CPU, torch.float32, transfer=transfer):
        for _ in range(3):
            model[:3](torch.zeros(1, WIDTH))
    first = ["bring 0", "run 0", "bring 1", "done", "run 1", "bring 2", "done", "run 2", "done"]
    assert transfer.log[:9] == first
    # What follows the last layer is known from the second round on.
    assert transfer.log[9:18] == [*first[:8], "bring 0"]
    assert transfer.log[18:21] == ["done", "run 0", "bring 1"]


def test_layers_called_in_another_order_are_right():
    model, x = network(), torch.ones(1, WIDTH)
    whole = network().float()
    with Streamed(model, model, CPU, torch.float32, transfer=Recorded()):
        for i in (3, 1, 1, 5, 0, 3, 1):
            assert torch.equal(model[i](x), whole[i](x))


@pytest.mark.parametrize("transfer", [AtOnce, Recorded])
def test_weights_are_as_before_also_when_something_is_raised(transfer):
    model = network()
    before = dict(model.named_parameters())
    hook = model[2].register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt), Streamed(model, model, CPU, torch.float32, transfer=transfer()):
        model(torch.zeros(1, WIDTH))
    hook.remove()
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    assert all(after[name] is before[name] for name in before)
    assert all(parameter.dtype == torch.bfloat16 for parameter in after.values())
    assert not any(layer._forward_pre_hooks or layer._forward_hooks for layer in model)


def test_packed_weights_stay_packed():
    class Packed(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.arange(16, dtype=torch.int8), requires_grad=False)
            self.register_buffer("scale", torch.full((), 0.5, dtype=torch.float64))

        def _apply(self, fn, recurse=True):  # keeps the precision of its scale, as a packed layer may
            kept = self.scale
            super()._apply(fn, recurse)
            self.scale = kept.to(self.scale.device)
            return self

        def forward(self, x):
            assert (self.weight.dtype, self.scale.dtype) == (torch.int8, torch.float64)
            return x * (self.weight * self.scale).to(x.dtype).sum()

    model = nn.Sequential(Packed(), nn.Linear(1, 1, dtype=torch.bfloat16))
    weights = [model[0].weight, model[0].scale]
    with torch.no_grad(), Streamed(model, model, CPU, torch.float32):
        model(torch.ones(1, 1))
    assert model[0].weight is weights[0]
    assert model[0].scale is weights[1]


def test_the_transformer_streamed_is_bit_equal_and_small():
    """What projects the prompt is brought once, apart from the blocks, and does not travel with them."""
    dit, whole = tiny_dit().to(torch.bfloat16), tiny_dit().to(torch.bfloat16).float()
    x, text = torch.randn(2, 4, 2, 4, 4), torch.randn(2, 5, DIT.caption_channels)
    layers = list(layers_of_dit(dit))
    with torch.no_grad(), Streamed(dit, layers, CPU, torch.float32):
        assert torch.equal(dit(x, torch.tensor([10.0, 500.0]), text), whole(x, torch.tensor([10.0, 500.0]), text))
    everything = whole_bytes(dit, CPU, torch.float32)
    assert everything == sum(p.numel() for p in dit.parameters()) * 4
    assert whole_bytes(dit, CPU, torch.bfloat16) == 0
    rest = everything - sum(p.numel() for p in dit.transformer_blocks.parameters()) * 4
    projections = sum(p.numel() for block in dit.transformer_blocks for part in (block.attn2.to_k, block.attn2.to_v)
                      for p in part.parameters()) * 4
    assert streamed_bytes(dit, layers, torch.float32) == everything - projections  # it has two blocks
    assert 0 < rest < everything


SMALL = {"width": 64, "height": 48, "num_frames": 8, "num_steps": 3, "seed": 7}


@pytest.fixture(scope="module")
def frames():
    pytest.importorskip("transformers", reason="the text encoder needs transformers (extra: standalone)")
    return AllegroPipeline.from_pretrained("tiny", device="cpu", offload="none")("a red circle moves right", **SMALL)


def test_a_streamed_run_draws_the_same_clip(frames, monkeypatch):
    streamed = []
    enter = Streamed.__enter__
    monkeypatch.setattr(Streamed, "__enter__", lambda self: (streamed.append(len(self._layers)), enter(self))[1])
    tiny = AllegroPipeline.from_pretrained("tiny", device="cpu", offload="stream")
    assert torch.equal(tiny("a red circle moves right", **SMALL), frames)
    assert streamed == [tiny.load_text_encoder().model.config.num_layers, 3 * tiny.dit_config.num_layers]


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """The bundled model with its matrices in int8."""
    root = tmp_path_factory.mktemp("models") / "Packed"
    shutil.copytree(bundled_model("tiny"), root)
    for part, name in (("transformer", "diffusion_pytorch_model.safetensors"), ("text_encoder", "model.safetensors")):
        convert_checkpoint(root / part / name, root / part / "new.safetensors", "int8")
        (root / part / "new.safetensors").replace(root / part / name)
    return root


@pytest.mark.parametrize(("quantised", "options"), [
    (False, {"dtype": "bf16"}), (False, {"loras": [("tiny/orange", 0.8)], "cache": "draft", "num_steps": 8}), (True, {}),
    (True, {"dtype": "bf16", "loras": [("tiny/orange", 0.8)], "cache": "draft"})], ids=str)
def test_streamed_runs_are_bit_equal_with_everything_else(quantised, options, packed):
    options = dict(options)
    call = {"width": 32, "height": 16, "num_frames": 4, "num_steps": 3, "seed": 7}
    call |= {name: options.pop(name) for name in ("cache", "num_steps") if name in options}
    root = packed if quantised else "tiny"
    runs = [AllegroPipeline.from_pretrained(root, device="cpu", offload=offload, **options) for offload in ("none", "stream")]
    whole, streamed = (run("a red circle moves right", **call) for run in runs)
    assert torch.equal(whole, streamed)
    layer = runs[1]._load_dit().transformer_blocks[0].attn1.to_q
    assert isinstance(layer, QuantisedLinear) is quantised
    assert getattr(layer, "_copied", None) is None, "nothing of it stays on the device"


def test_large_weights_of_another_type_are_not_converted_as_a_whole_on_a_cpu(monkeypatch):
    tiny = AllegroPipeline.from_pretrained("tiny", device="cpu", dtype="bf16")
    working = tiny.sampling_bytes(tiny.settings(**SMALL))
    dit = tiny._load_dit().float()
    assert not tiny._must_stream(dit, torch.bfloat16, working), "small"
    monkeypatch.setattr(pipeline, "SMALL_MODEL_PARAMETERS", 1)
    assert tiny._must_stream(dit, torch.bfloat16, working)
    assert not tiny._must_stream(dit, torch.float32, working), "as stored: it stays mapped"


def test_an_accelerator_streams_what_does_not_fit(monkeypatch):
    tiny = AllegroPipeline.from_pretrained("tiny", device="cpu")
    dit = tiny._load_dit()
    tiny.device = torch.device("meta")  # another device than that of the weights
    needed = whole_bytes(dit, tiny.device, torch.float32) + 1000
    for free, streamed in ((needed + 1, False), (needed, True), (None, False)):
        monkeypatch.setattr(pipeline, "free_bytes", lambda device, free=free: free)
        assert tiny._must_stream(dit, torch.float32, 1000) is streamed
    tiny.offload = "none"
    assert not tiny._must_stream(dit, torch.float32, 1000)


def test_without_offload_what_does_not_fit_is_refused_and_the_way_out_is_named(monkeypatch):
    tiny = AllegroPipeline.from_pretrained("tiny", device="cpu", offload="none")
    monkeypatch.setattr(pipeline, "free_bytes", lambda device: 1 << 20)
    with pytest.raises(NotEnoughMemory, match=r"Sampling needs about .* GiB.*--offload auto"):
        tiny.check_memory(tiny.settings(width=16, height=16, num_frames=4))


def test_an_unknown_offload_is_refused():
    with pytest.raises(ScheduleError, match=r"offload='disk': must be one of auto, none, stream"):
        AllegroPipeline.from_pretrained("tiny", offload="disk")

"""LoRA files: every dialect means the same, nothing is guessed, and merging is what it says."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny import DIT, fill, tiny_dit
from torch import Tensor

from allegro_model.config import DIT_88X720P
from allegro_model.dit import AllegroDiT, AllegroTI2V
from allegro_model.errors import CheckpointError, CheckpointMismatch, ScheduleError, UnsupportedCheckpoint
from allegro_model.loading import apply_loras, bundled_loras, identify, load_dit, lora, read_lora

SHAPES = {name: tuple(p.shape) for name, p in AllegroDiT(DIT, device="meta").state_dict().items()}
LINEAR = "transformer_blocks.0.attn1.to_q"
OUT = "transformer_blocks.1.attn2.to_out.0"
CONV = "pos_embed.proj"
RANKS = {LINEAR: 2, OUT: 3, CONV: 1}
ALPHAS = {LINEAR: 1.0, OUT: 6.0, CONV: 0.5}


def factors(rank_of: dict[str, int] = RANKS) -> dict[str, tuple[Tensor, Tensor]]:
    """{layer: (down, up)} with another rank for each layer."""
    generator = torch.Generator().manual_seed(3)
    made = {}
    for layer, rank in rank_of.items():
        shape = SHAPES[f"{layer}.weight"]
        ones = (1,) * (len(shape) - 2)
        made[layer] = (torch.randn((rank, *shape[1:]), generator=generator),
                       torch.randn((shape[0], rank, *ones), generator=generator))
    return made


def dialect(name: Callable[[str], str], down: str, up: str, *, alpha: bool = True) -> dict[str, Tensor]:
    tensors = {}
    for layer, (a, b) in factors().items():
        tensors |= {f"{name(layer)}{down}": a, f"{name(layer)}{up}": b}
        if alpha:
            tensors[f"{name(layer)}.alpha"] = torch.tensor(ALPHAS[layer])
    return tensors


def dotted(prefix: str) -> Callable[[str], str]:
    return lambda layer: prefix + layer


def flat(prefix: str) -> Callable[[str], str]:
    return lambda layer: prefix + layer.replace(".", "_")


PEFT, KOHYA = (".lora_A.weight", ".lora_B.weight"), (".lora_down.weight", ".lora_up.weight")
DIALECTS = {
    "ComfyUI": dialect(dotted("diffusion_model."), *PEFT),
    "ComfyUI, kohya suffixes": dialect(dotted("diffusion_model."), *KOHYA),
    "a whole model": dialect(dotted("model.diffusion_model."), *PEFT),
    "diffusers": dialect(dotted("transformer."), *PEFT),
    "early diffusers": dialect(dotted("transformer."), ".lora.down.weight", ".lora.up.weight"),
    "linear layers": dialect(dotted(""), ".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
    "peft": dialect(dotted("base_model.model."), *PEFT),
    "peft, state as it is": dialect(dotted("base_model.model."), ".lora_A.default.weight", ".lora_B.default.weight"),
    "peft round a wrapped model": dialect(dotted("base_model.model.module."), *PEFT),
    "bare": dialect(dotted(""), *PEFT),
    "kohya": dialect(flat("lora_unet_"), *KOHYA),
    "kohya, transformer": dialect(flat("lora_transformer_"), *KOHYA),
    "lycoris": dialect(flat("lycoris_"), *KOHYA),
}


def write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)
    return path


@pytest.fixture
def file(tmp_path: Path) -> Callable[..., Path]:
    return lambda tensors, name="lora.safetensors", metadata=None: write(tmp_path / name, tensors, metadata)


def by_hand(model: AllegroDiT, strength: float, alphas: dict[str, float | None] = ALPHAS) -> dict[str, Tensor]:
    """The weights after merging, written out."""
    state = {name: p.clone() for name, p in model.state_dict().items()}
    for layer, (down, up) in factors().items():
        weight, alpha = state[f"{layer}.weight"], alphas[layer]
        scale = strength * (1.0 if alpha is None else alpha / down.shape[0])
        if weight.ndim == 4:
            change = torch.einsum("orxy,rikl->oikl", up, down)
        else:
            change = up @ down
        state[f"{layer}.weight"] = (weight.float() + scale * change).to(weight.dtype)
    return state


# Dialects


@pytest.mark.parametrize("name", list(DIALECTS))
def test_every_dialect_means_the_same(name: str, file: Callable[..., Path]) -> None:
    layers = read_lora(file(DIALECTS[name]), SHAPES)
    assert layers.keys() == {f"{layer}.weight" for layer in RANKS}
    for layer, (down, up) in factors().items():
        found = layers[f"{layer}.weight"]
        assert torch.equal(found.down, down)
        assert torch.equal(found.up, up)
        assert (found.rank, found.alpha) == (RANKS[layer], ALPHAS[layer])


@pytest.mark.parametrize("suffix", [suffix for suffix, part in lora.SUFFIXES.items() if part == "down"])
def test_every_suffix_is_recognised_as_a_lora(suffix: str) -> None:
    """By `identify` too, which looks at files before they are taken apart."""
    assert identify({f"x{suffix}": (4, 8), "x.other": (8, 4)}).family == "lora"


@pytest.mark.parametrize("variant", [AllegroDiT, AllegroTI2V])
def test_names_of_the_released_models_have_one_meaning_each(variant: type[AllegroDiT]) -> None:
    """All layers survive the underscores of kohya."""
    names = variant(DIT_88X720P, device="meta").state_dict()
    layers = [name.removesuffix(".weight") for name in names if name.endswith(".weight")]
    assert len(layers) > 300
    for prefix in lora.FLAT_PREFIXES:
        parts, unknown = lora.match_names([f"{flat(prefix)(layer)}.lora_up.weight" for layer in layers], layers)
        assert parts.keys() == set(layers)
        assert not unknown


def test_a_kohya_name_with_two_meanings_is_refused() -> None:
    with pytest.raises(CheckpointMismatch, match=r"lora_unet_a_b_c could be a\.b_c or a_b\.c"):
        lora.match_names(["lora_unet_a_b_c.lora_down.weight"], ["a.b_c", "a_b.c"])
    parts, _ = lora.match_names(["diffusion_model.a_b.c.lora_A.weight"], ["a.b_c", "a_b.c"])
    assert list(parts) == ["a_b.c"]


def test_two_names_for_one_tensor_are_refused(file: Callable[..., Path]) -> None:
    path = file(DIALECTS["peft"] | DIALECTS["kohya"])
    with pytest.raises(CheckpointMismatch, match="both mean"):
        read_lora(path, SHAPES)


# alpha and rank


def test_without_alpha_it_is_the_rank(file: Callable[..., Path]) -> None:
    layers = read_lora(file(dialect(dotted("transformer."), *PEFT, alpha=False)), SHAPES)
    assert {layer.alpha for layer in layers.values()} == {None}
    assert {layer.scale for layer in layers.values()} == {1.0}


@pytest.mark.parametrize(("config", "expected"), [
    ({"transformer.r": 2, "transformer.lora_alpha": 8}, {LINEAR: 8.0, OUT: 8.0, CONV: 8.0}),
    ({"r": 2, "lora_alpha": 8, "alpha_pattern": {OUT: 1, "^proj": 3}}, {LINEAR: 8.0, OUT: 1.0, CONV: 3.0}),
    ({"lora_alpha": 4, "use_rslora": True}, {LINEAR: 4 * 2**0.5, OUT: 4 * 3**0.5, CONV: 4.0}),
    ({"lora_alpha": "many"}, {LINEAR: None, OUT: None, CONV: None}),
    (["no table"], {LINEAR: None, OUT: None, CONV: None}),
])
def test_alpha_out_of_the_metadata(config: Any, expected: dict[str, float | None], file: Callable[..., Path]) -> None:
    tensors = dialect(dotted("transformer."), *PEFT, alpha=False)
    layers = read_lora(file(tensors, metadata={"lora_adapter_metadata": json.dumps(config)}), SHAPES)
    assert {layer: layers[f"{layer}.weight"].alpha for layer in RANKS} == pytest.approx(expected)


def test_alpha_out_of_pefts_own_file(tmp_path: Path) -> None:
    write(tmp_path / "adapter_model.safetensors", dialect(dotted("base_model.model."), *PEFT, alpha=False))
    (tmp_path / "adapter_config.json").write_text('{"r": 2, "lora_alpha": 5, "peft_type": "LORA"}')
    assert {layer.alpha for layer in read_lora(tmp_path, SHAPES).values()} == {5.0}


def test_a_tensor_beats_the_metadata(file: Callable[..., Path]) -> None:
    metadata = {"lora_adapter_metadata": '{"lora_alpha": 100}'}
    layers = read_lora(file(DIALECTS["diffusers"], metadata=metadata), SHAPES)
    assert {layer: layers[f"{layer}.weight"].alpha for layer in RANKS} == ALPHAS


def test_a_broken_description_is_told(file: Callable[..., Path], caplog: pytest.LogCaptureFixture) -> None:
    path = file(dialect(dotted(""), *PEFT, alpha=False), metadata={"lora_adapter_metadata": "{"})
    with caplog.at_level(logging.WARNING):
        assert read_lora(path, SHAPES)[f"{OUT}.weight"].alpha is None
    assert "alpha is taken to be the rank" in caplog.text


# Merging


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("strength", [1.0, -0.7])
def test_merging_equals_merging_by_hand(dtype: torch.dtype, strength: float, file: Callable[..., Path]) -> None:
    model = tiny_dit().to(dtype)
    expected = by_hand(model, strength)
    apply_loras(model, [(file(DIALECTS["kohya"]), strength)])
    for name, weight in model.state_dict().items():
        assert weight.dtype == dtype
        assert torch.allclose(weight, expected[name], rtol=1e-6 if dtype == torch.float32 else 0, atol=1e-6), name


def test_merging_is_adding_beside_the_layer(file: Callable[..., Path]) -> None:
    """A LoRA's definition: y = Wx + alpha / rank * up(down(x)), for the matrix and the convolution."""
    model, changed = tiny_dit(), tiny_dit()
    apply_loras(changed, [(file(DIALECTS["peft"]), 0.5)])
    down, up = factors()[LINEAR]
    x = torch.linspace(-1, 1, 3 * DIT.width).view(3, -1)
    before, after = (m.transformer_blocks[0].attn1.to_q(x) for m in (model, changed))
    assert torch.allclose(after, before + 0.5 * ALPHAS[LINEAR] / RANKS[LINEAR] * (x @ down.T @ up.T), atol=1e-5)
    down, up = factors()[CONV]
    x = torch.linspace(-1, 1, 4 * 4 * 4).view(1, 4, 4, 4)
    before, after = (m.pos_embed.proj(x) for m in (model, changed))
    change = torch.nn.functional.conv2d(torch.nn.functional.conv2d(x, down, stride=2), up)
    assert torch.allclose(after, before + 0.5 * ALPHAS[CONV] * change, atol=1e-5)


def test_several_loras_are_rounded_once(file: Callable[..., Path]) -> None:
    """Each alone would vanish in bfloat16's rounding; together they must not."""
    model = tiny_dit().to(torch.bfloat16)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    small = file({name: t * 1e-3 for name, t in DIALECTS["bare"].items()})
    layer = read_lora(small, SHAPES)[f"{LINEAR}.weight"]
    change = layer.scale * layer.up @ layer.down
    apply_loras(model, [(small, 1000.0), (small, 1000.0), (small, -500.0)])
    expected = (before[f"{LINEAR}.weight"].float() + 1500 * change).to(torch.bfloat16)
    found = model.state_dict()[f"{LINEAR}.weight"]
    assert float((found != expected).float().mean()) < 0.01  # the order of a float32 sum


def test_a_strength_of_zero_changes_nothing(file: Callable[..., Path]) -> None:
    model, path = tiny_dit(), file(DIALECTS["bare"])
    before = {name: p.data_ptr() for name, p in model.named_parameters()}
    apply_loras(model, [(path, 0.0)])
    apply_loras(model, [])
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == before


def test_the_layers_of_image_to_video_count_too(file: Callable[..., Path]) -> None:
    model = fill(AllegroTI2V(DIT))
    name = "pos_embed_masked_video.1"
    before = model.state_dict()[f"{name}.weight"].clone()
    down, up = torch.ones(1, DIT.width), torch.ones(DIT.width, 1)
    pair = {f"lora_unet_{name.replace('.', '_')}.lora_{part}.weight": t for part, t in (("down", down), ("up", up))}
    apply_loras(model, [(file(DIALECTS["kohya"] | pair), 0.25)])
    assert torch.allclose(model.state_dict()[f"{name}.weight"], before + 0.25)


@pytest.mark.parametrize("strength", [float("nan"), float("inf")])
def test_a_strength_must_be_a_number(strength: float, file: Callable[..., Path]) -> None:
    with pytest.raises(ScheduleError, match="must be a finite number"):
        apply_loras(tiny_dit(), [(file(DIALECTS["bare"]), strength)])


def test_only_touched_weights_are_copied_and_the_file_is_not_written(tmp_path: Path, file: Callable[..., Path]) -> None:
    save_file(tiny_dit().state_dict(), tmp_path / "diffusion_pytorch_model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(DIT.to_dict()))
    model = load_dit(tmp_path / "diffusion_pytorch_model.safetensors")
    mapped = {name: p.data_ptr() for name, p in model.named_parameters()}
    weights = {name: p.clone() for name, p in model.named_parameters()}
    kept = {name: p.data for name, p in model.named_parameters()}  # still the mapped tensors afterwards
    apply_loras(model, [(file(DIALECTS["bare"]), 1.0)])
    moved = {name for name, p in model.named_parameters() if p.data_ptr() != mapped[name]}
    assert moved == {f"{layer}.weight" for layer in RANKS}
    assert all(torch.equal(kept[name], weights[name]) for name in weights)
    assert not any(p.requires_grad for p in model.parameters())


def test_a_loader_merges_into_dequantised_weights(tmp_path: Path, file: Callable[..., Path]) -> None:
    """float8 with a scale beside it: the LoRA is added to what the file means, and rounded once."""
    state = tiny_dit().state_dict()
    scale = torch.tensor([0.01])
    name = f"{LINEAR}.weight"
    stored = (state[name] / scale).to(torch.float8_e4m3fn)
    scaled = {n: t.to(torch.bfloat16) for n, t in state.items()} | {name: stored, f"{LINEAR}.scale_weight": scale}
    (tmp_path / "fp8").mkdir()
    write(tmp_path / "fp8" / "diffusion_pytorch_model.safetensors", scaled)
    (tmp_path / "fp8" / "config.json").write_text(json.dumps(DIT.to_dict()))
    path = file(DIALECTS["bare"])
    plain, merged = (load_dit(tmp_path / "fp8", loras=loras, dequantise=True) for loras in ([], [(path, 2.0)]))
    assert plain.state_dict()[name].dtype == torch.bfloat16
    expected = by_hand(plain, 2.0)
    assert all(torch.equal(weight, expected[n]) for n, weight in merged.state_dict().items() if n != f"{CONV}.weight")


# Refusals


@pytest.mark.parametrize(("tensors", "error", "words"), [
    ({"diffusion_model.blocks.0.q.lora_A.weight": (4, 8), "diffusion_model.blocks.0.q.lora_B.weight": (8, 4)},
     UnsupportedCheckpoint,
     ["lora.safetensors is a LoRA for another model: none of its 2 tensors fits one of the ",
      "Found: diffusion_model.blocks.0.q.lora_A.weight, diffusion_model.blocks.0.q.lora_B.weight.",
      f"Expected names such as: diffusion_model.{LINEAR}.lora_A.weight, transformer.{LINEAR}.lora_A.weight, "
      "lora_unet_transformer_blocks_0_attn1_to_q.lora_down.weight."]),
    ({"proj_out.weight": (4, 8)}, UnsupportedCheckpoint,
     ["lora.safetensors is ", "; expected a LoRA for Allegro. It holds 1 tensors: proj_out.weight"]),
    ({"layer.hada_w1_a": (4, 8)}, UnsupportedCheckpoint, ["an adapter of another kind (LoHa: layer.hada_w1_a)"]),
    ({f"{LINEAR}.lora_A.weight": (2, 48), f"{LINEAR}.lora_B.weight": (48, 2), f"{LINEAR}.dora_scale": (48, 1)},
     UnsupportedCheckpoint, [f"an adapter of another kind (DoRA: {LINEAR}.dora_scale)"]),
    ({f"{LINEAR}.lora_A.weight": (2, 48), f"{OUT}.lora_B.weight": (48, 2)}, CheckpointMismatch,
     ["lacks a factor in 2 of 2 layers", f"{LINEAR} has no up, {OUT} has no down"]),
    ({f"{LINEAR}.lora_A.weight": (2, 40), f"{LINEAR}.lora_B.weight": (48, 3)}, CheckpointMismatch,
     ["2 tensors have other shapes", f"{LINEAR}.lora_A.weight is [2, 40], expected [2, 48]",
      f"{LINEAR}.lora_B.weight is [48, 3], expected [48, 2]"]),
    ({f"{LINEAR}.lora_A.weight": (2, 48), f"{LINEAR}.lora_B.weight": (48, 2), f"{LINEAR}.alpha": (2,)},
     CheckpointMismatch, [f"{LINEAR}.alpha is [2], expected one number"]),
    ({f"{LINEAR}.lora_A.weight": (), f"{LINEAR}.lora_B.weight": (48, 2)}, CheckpointMismatch, ["have other shapes"]),
], ids=["another model", "a model", "LoHa", "DoRA", "half", "shapes", "alpha", "scalar"])
def test_what_is_refused(tensors: dict[str, tuple[int, ...]], error: type[CheckpointError], words: list[str],
                         file: Callable[..., Path]) -> None:
    path = file({name: torch.ones(shape) for name, shape in tensors.items()})
    with pytest.raises(error) as caught:
        read_lora(path, SHAPES)
    for word in words:
        assert word in str(caught.value)


def test_alpha_must_be_a_number(file: Callable[..., Path]) -> None:
    tensors = DIALECTS["bare"] | {f"{LINEAR}.alpha": torch.tensor(float("nan"))}
    with pytest.raises(CheckpointMismatch, match=f"alpha of {LINEAR} is nan"):
        read_lora(file(tensors), SHAPES)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"none\.safetensors does not exist"):
        read_lora(tmp_path / "none.safetensors", SHAPES)


def test_unknown_names_are_listed(file: Callable[..., Path], caplog: pytest.LogCaptureFixture) -> None:
    strange = {f"lora_te_layers_{i}.lora_down.weight": torch.ones(2, 8) for i in range(10)}
    with caplog.at_level(logging.WARNING):
        layers = read_lora(file(DIALECTS["kohya"] | strange), SHAPES)
    assert len(layers) == 3
    assert "lora.safetensors: 10 of 19 tensors fit no layer of this model and are left out: lora_te_layers_0." in caplog.text
    assert "... (2 more)" in caplog.text


def test_bundled_loras_have_names() -> None:
    for name, path in bundled_loras().items():
        assert lora.lora_file(name) == path
        assert path.is_file()
    with pytest.raises(CheckpointError, match=r"some/where\.safetensors does not exist.*tiny/orange"):
        lora.lora_file("some/where.safetensors")

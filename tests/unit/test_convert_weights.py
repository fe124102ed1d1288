"""`allegro convert`: every format of a transformer and a text encoder, written, described, and loaded again."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from commands import run_command
from safetensors.torch import save_file
from tiny import DIT, tiny_dit
from torch import Tensor

from allegro_model.cli import convert_weights
from allegro_model.errors import OutputError, UnsupportedCheckpoint
from allegro_model.loading import apply_loras, bundled_model, describe, load_dit, load_text_encoder
from allegro_model.loading.convert import FORMATS, convert_checkpoint, suffix_of

# 3 x 256 wide: enough for the large blocks.
WIDE = replace(DIT, num_layers=1, num_attention_heads=8, attention_head_dim=96)
# Largest difference of the prediction, relative to the largest number in it.
TOLERANCES = {"bf16": 0.03, "fp8": 0.06, "int8": 0.03, "gguf-q8_0": 0.03, "gguf-q5_k": 0.08, "gguf-q4_k": 0.16}


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("wide") / "dit.safetensors"
    save_file(tiny_dit(WIDE).state_dict(), path, {"config": json.dumps(WIDE.to_dict()), "title": "wide"})
    return path


def predict(model: torch.nn.Module) -> Tensor:
    latents = torch.randn((1, 4, 2, 4, 4), generator=torch.Generator().manual_seed(0))
    prompt = torch.randn((1, 3, 24), generator=torch.Generator().manual_seed(1))
    return model.float()(latents, torch.tensor([500.0]), prompt)


@pytest.mark.parametrize("kind", list(FORMATS))
def test_a_transformer_in_every_format(tmp_path: Path, wide: Path, kind: str) -> None:
    output = tmp_path / f"small{suffix_of(kind)}"
    done = convert_checkpoint(wide, output, kind)
    found = describe(output)
    assert (found["variant"], found["config"], found["metadata"]["title"]) == ("t2v", WIDE.to_dict(), "wide")
    layout = FORMATS[kind]
    assert found["dtypes"][0] == ("bfloat16" if layout is None else layout.name)
    assert found["parameters"] == describe(wide)["parameters"]
    assert output.stat().st_size < (0.56 if layout is None else 0.45) * wide.stat().st_size
    changed = {tensor.name for tensor in done if tensor.error}
    blocks = {name for name in changed if name.startswith("transformer_blocks.0.")}
    assert len(blocks) == 10
    # Large ones that are not packed are in bfloat16.
    assert changed - blocks == {"adaln_single.linear.weight"}
    small, original = load_dit(output, dtype=torch.float32), load_dit(wide)
    expected = predict(original)
    error = float((predict(small) - expected).abs().max() / expected.abs().max())
    assert TOLERANCES[kind] / 100 < error < TOLERANCES[kind]
    if layout is not None:
        assert torch.allclose(predict(load_dit(output, dtype=torch.float32, dequantise=True)), predict(small), atol=1e-5)
        assert small.state_dict()["transformer_blocks.0.ff.net.2.weight"].dtype == torch.int8
    loaded = sum(p.numel() * p.element_size() for p in load_dit(output).parameters())
    assert loaded < output.stat().st_size


@pytest.mark.parametrize("kind", ["fp8", "int8", "gguf-q4_k"])
def test_loras_on_top(tmp_path: Path, wide: Path, kind: str) -> None:
    """The same as added to the unpacked matrices."""
    output, layer = tmp_path / f"small{suffix_of(kind)}", "transformer_blocks.0.attn1.to_v"
    convert_checkpoint(wide, output, kind)
    generator = torch.Generator().manual_seed(2)
    save_file({f"{layer}.lora_A.weight": torch.randn((2, 768), generator=generator) * 0.2,
               f"{layer}.lora_B.weight": torch.randn((768, 2), generator=generator) * 0.2}, tmp_path / "lora.safetensors")
    models = [load_dit(output, dtype=torch.float32, dequantise=unpacked) for unpacked in (False, True)]
    before = predict(models[0])
    for model in models:
        apply_loras(model, [(tmp_path / "lora.safetensors", 1.5)])
    assert not torch.allclose(predict(models[0]), before, atol=1e-3)
    assert torch.allclose(predict(models[0]), predict(models[1]), atol=1e-5)


@pytest.mark.parametrize("kind", list(FORMATS))
def test_a_text_encoder_in_every_format(tmp_path: Path, kind: str) -> None:
    root = bundled_model("tiny")
    output = tmp_path / f"t5{suffix_of(kind)}"
    convert_checkpoint(root / "text_encoder", output, kind)
    assert describe(output)["family"] == "t5-encoder"
    (small, mask), (expected, _) = (load_text_encoder(path, dtype=torch.float32, max_length=32, tokenizer=root / "tokenizer").encode(["a red circle"])
                                    for path in (output, root / "text_encoder"))
    error = float((small - expected)[mask].abs().max() / expected.abs().max())
    assert 1e-5 < error < 0.1


def test_gguf_has_the_names_of_others(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    convert_checkpoint(bundled_model("tiny") / "text_encoder", tmp_path / "t5.gguf", "gguf-q8_0")
    reader = gguf.GGUFReader(tmp_path / "t5.gguf")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert reader.fields["general.architecture"].contents() == "t5encoder"
    assert {"token_embd.weight", "enc.output_norm.weight", "enc.blk.0.attn_rel_b.weight", "enc.blk.1.ffn_down.weight"} <= set(tensors)
    assert tensors["enc.blk.1.ffn_down.weight"].tensor_type == gguf.GGMLQuantizationType.Q8_0
    assert list(tensors["enc.blk.1.ffn_down.weight"].shape) == [128, 64]


def test_files_of_others_are_read(tmp_path: Path, wide: Path) -> None:
    """A transformer as the tools of the GGUF pack make one: torch's names, their own mixture of types."""
    gguf = pytest.importorskip("gguf")
    kinds, state = gguf.GGMLQuantizationType, load_dit(wide).state_dict()
    writer = gguf.GGUFWriter(str(tmp_path / "a.gguf"), "allegro")
    for name, tensor in state.items():
        kind = kinds.Q4_0 if name.endswith("to_q.weight") else kinds.Q8_0 if ".ff." in name and tensor.ndim == 2 else kinds.F32
        writer.add_tensor("model.diffusion_model." + name, gguf.quants.quantize(tensor.numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = load_dit(tmp_path / "a.gguf", config=WIDE)
    assert describe(tmp_path / "a.gguf")["dtypes"] == ["float32", "Q8_0", "Q4_0"]
    expected = predict(load_dit(wide))
    assert float((predict(found) - expected).abs().max() / expected.abs().max()) < 0.2


def test_refusals(tmp_path: Path, wide: Path) -> None:
    with pytest.raises(OutputError, match=r"are kept in \.gguf files"):
        convert_checkpoint(wide, tmp_path / "a.safetensors", "gguf-q8_0")
    with pytest.raises(UnsupportedCheckpoint, match="expected an Allegro transformer or a T5"):
        convert_checkpoint(bundled_model("tiny") / "vae", tmp_path / "a.safetensors", "int8")
    assert not list(tmp_path.iterdir())


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A whole model, and a clip of it; a second time nothing is replaced."""
    words = ["convert", "tiny", str(tmp_path / "small"), "--format", "int8", "--json", str(tmp_path / "report.json")]
    code, out, err = run_command(capsys, words)
    assert (code, out.strip()) == (0, str(tmp_path / "small"))
    assert "The largest errors:" in err
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["tensors"]["transformer"]["transformer_blocks.0.attn1.to_v.weight"]["stored_as"] == "int8"
    code, out, _ = run_command(capsys, ["generate", "a red circle moves right over a blue background", "--model",
                                        str(tmp_path / "small"), "--steps", "1", "-o", str(tmp_path / "clip.mp4")])
    assert code == 0
    code, _, err = run_command(capsys, words[:-2])
    assert code != 0
    assert "already exists" in err


def test_a_model_is_not_converted_in_its_own_place(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tmp_path / "small"
    shutil.copytree(bundled_model("tiny"), model)
    before = {path: path.read_bytes() for path in model.rglob("*") if path.is_file()}
    code, _, err = run_command(capsys, ["convert", str(model), str(model / ".." / "small"), "--format", "int8", "--force"])
    assert (code, "is the model itself" in err) == (5, True)
    assert {path: path.read_bytes() for path in model.rglob("*") if path.is_file()} == before
    (tmp_path / "file").touch()
    code, _, err = run_command(capsys, ["convert", "tiny", str(tmp_path / "file"), "--format", "int8", "--force"])
    assert (code, "Cannot write" in err) == (5, True)


def test_a_whole_model_is_no_file_and_never_half_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str],
                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    code, _, err = run_command(capsys, ["convert", "tiny", str(tmp_path / "b.safetensors"), "--format", "int8"])
    assert (code, "is a whole model, which is written as a folder" in err) == (5, True)
    assert not list(tmp_path.iterdir())
    (tmp_path / "old").mkdir()
    monkeypatch.setattr(convert_weights, "convert_checkpoint", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    for name in ("new", "old"):
        assert run_command(capsys, ["convert", "tiny", str(tmp_path / name), "--format", "int8", "--force"])[0] == 130
    assert [path.name for path in tmp_path.iterdir()] == ["old"]


def test_a_second_conversion_is_the_one_that_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for kind in ("int8", "gguf-q8_0"):
        assert run_command(capsys, ["convert", "tiny", str(tmp_path / "small"), "--format", kind, "--force"])[0] == 0
    for part in ("transformer", "text_encoder"):
        assert "Q8_0" in describe(tmp_path / "small" / part)["dtypes"]

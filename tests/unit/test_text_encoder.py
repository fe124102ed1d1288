"""Tokenizer files, building and running the text encoder."""

# ruff: noqa: RUF001 - full-width letters are meant

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from allegro_model.errors import (
    CheckpointError,
    CheckpointMismatch,
    MissingDependency,
    TextError,
    UnsupportedCheckpoint,
)
from allegro_model.text import TextEncoder, build_text_encoder, has_tokenizer, load_tokenizer

GOLDEN = Path(__file__).parents[1] / "parity/golden"
WORDS = "a cat dog runs over the green hill under blue sky , . best quality".split()
# Not the identity under the tokenizer's own normalisation: blanks, composed and full-width characters, unknown ones.
TEXTS = ("", "a cat runs", "  a  cat\n\nruns ", "the dog, over.", "ｃａｔ cafe\u0301 ½", "日本 😀", "A\tCAT")


@pytest.fixture(scope="module")
def spiece(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like the published tokenizer/: a SentencePiece model with T5's special tokens, and no tokenizer.json."""
    sentencepiece = pytest.importorskip("sentencepiece", reason="sentencepiece is not installed")
    folder = tmp_path_factory.mktemp("tokenizer")
    lines = [" ".join(WORDS[(i * k) % len(WORDS)] for k in range(1, 9)) for i in range(400)]
    with (folder / "spiece.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines), model_writer=file, vocab_size=60, hard_vocab_limit=False, pad_id=0, eos_id=1,
            unk_id=2, bos_id=-1, normalization_rule_name="nmt_nfkc", minloglevel=2)
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "T5Tokenizer"}')
    return folder


@pytest.fixture(scope="module")
def fast(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer.json that asks for truncation and padding of its own."""
    tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    folder = tmp_path_factory.mktemp("fast")
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -9.0), *((f"▁{word}", -4.0) for word in WORDS)]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, unk_id=2, byte_fallback=False))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [tokenizers.pre_tokenizers.WhitespaceSplit(), tokenizers.pre_tokenizers.Metaspace(prepend_scheme="always")])
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=7)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def config() -> dict:
    cases = json.loads((GOLDEN / "golden.json").read_text("utf-8"))["cases"]
    return {**cases["t5_encoder_tiny"]["config"], "architectures": ["T5EncoderModel"], "torch_dtype": "bfloat16"}


@pytest.fixture(scope="module")
def stored() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "t5_encoder_tiny.safetensors")


@pytest.fixture
def weights(stored: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix("weights."): value for name, value in stored.items() if name.startswith("weights.")}


@pytest.fixture
def encoder(config: dict, weights: dict, fast: Path) -> TextEncoder:
    pytest.importorskip("transformers", reason="transformers is not installed")
    return build_text_encoder(config, weights, fast, max_length=12)


# Tokenizers


def test_spiece_gives_the_tokens_of_sentencepiece(spiece: Path) -> None:
    from sentencepiece import SentencePieceProcessor

    reference = SentencePieceProcessor(model_file=str(spiece / "spiece.model"))
    tokenizer = load_tokenizer(spiece)
    assert tokenizer(list(TEXTS))["input_ids"] == [[*reference.encode(text), 1] for text in TEXTS]
    assert tokenizer([""])["input_ids"] == [[1]]
    assert tokenizer.vocabulary_size == reference.get_piece_size()


def test_json_gives_the_tokens_of_transformers(fast: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    reference = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(fast / "tokenizer.json"), pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    found = load_tokenizer(fast)(list(TEXTS))["input_ids"]
    assert found == [reference(text, truncation=False, padding=False)["input_ids"] for text in TEXTS]
    assert max(map(len, found)) > 3, "the truncation asked for by the file must not happen"


def test_spiece_is_preferred(spiece: Path, fast: Path, tmp_path: Path) -> None:
    for source in (spiece / "spiece.model", fast / "tokenizer.json"):
        (tmp_path / source.name).write_bytes(source.read_bytes())
    assert load_tokenizer(tmp_path)(["a cat"]) == load_tokenizer(spiece)(["a cat"])


def test_no_tokenizer(tmp_path: Path) -> None:
    assert not has_tokenizer(tmp_path)
    with pytest.raises(CheckpointError, match=r"neither spiece\.model nor tokenizer\.json.*Download"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(("name", "content"), [("spiece.model", b"\x0a\x0e\x0a\x05<unk"), ("tokenizer.json", b'{"model": {')])
def test_damaged_tokenizer(tmp_path: Path, name: str, content: bytes) -> None:
    pytest.importorskip("sentencepiece" if name == "spiece.model" else "tokenizers", reason="not installed")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UnsupportedCheckpoint, match=rf"{name} is not a readable tokenizer.*Download it again"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(("package", "name"), [("sentencepiece", "spiece.model"), ("tokenizers", "tokenizer.json")])
def test_missing_tokenizer_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, name: str) -> None:
    (tmp_path / name).write_bytes(b"{}")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingDependency, match=rf"{name} needs the package {package}.*allegro-video\[standalone\]"):
        load_tokenizer(tmp_path)


# Building


@pytest.mark.parametrize("names", [("shared.weight",), ("encoder.embed_tokens.weight",), ("shared.weight", "encoder.embed_tokens.weight")])
def test_equals_the_reference(names: tuple[str, ...], config: dict, stored: dict, weights: dict, fast: Path) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    embedding = weights.pop("shared.weight")
    encoder = build_text_encoder(config, {**weights, **dict.fromkeys(names, embedding)}, fast)
    output = encoder.model(input_ids=stored["in.input_ids"], attention_mask=stored["in.attention_mask"]).last_hidden_state
    torch.testing.assert_close(output, stored["out.last_hidden_state"], rtol=1e-4, atol=1e-4)


def test_uses_the_given_tensors_themselves(encoder: TextEncoder, config: dict, weights: dict, fast: Path) -> None:
    built = build_text_encoder(config, weights, fast)
    parameters = dict(built.model.named_parameters(remove_duplicate=False))
    assert all(parameters[name].data_ptr() == tensor.data_ptr() for name, tensor in weights.items())
    assert parameters["encoder.embed_tokens.weight"].data_ptr() == weights["shared.weight"].data_ptr()
    assert not any(p.requires_grad or p.is_meta for p in parameters.values())
    assert not any(b.is_meta for b in built.model.buffers())
    assert not built.model.training


def test_weights_must_fit(config: dict, weights: dict, fast: Path) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    norm = weights.pop("encoder.final_layer_norm.weight")
    weights["decoder.final_layer_norm.weight"] = norm
    weights["shared.weight"] = weights["shared.weight"][:, :-1]
    with pytest.raises(CheckpointMismatch) as caught:
        build_text_encoder(config, weights, fast)
    for part in ("Missing (1): encoder.final", "Unexpected (1): decoder.final", "shared.weight is [64, 31], expected [64, 32]"):
        assert part in str(caught.value)


def test_config_must_state_the_sizes(config: dict, weights: dict, fast: Path) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    with pytest.raises(UnsupportedCheckpoint, match="does not state d_model, d_ff"):
        build_text_encoder({**config, "d_model": None, "d_ff": "48"}, weights, fast)


def test_tokenizer_of_another_model(config: dict, weights: dict, fast: Path) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    weights["shared.weight"] = weights["shared.weight"][:10]
    with pytest.raises(CheckpointMismatch, match=r"has 1\d tokens, the text encoder knows 10"):
        build_text_encoder({**config, "vocab_size": 10}, weights, fast)


def test_missing_transformers(config: dict, weights: dict, fast: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingDependency, match=r"transformers.*allegro-video\[standalone\]"):
        build_text_encoder(config, weights, fast)


# Encoding


def test_tokenize_pads_and_marks(encoder: TextEncoder) -> None:
    input_ids, mask = encoder.tokenize(["a cat", ""])
    assert input_ids.shape == mask.shape == (2, 12)
    assert input_ids.dtype == torch.int64
    assert mask.dtype == torch.bool
    assert input_ids[0].tolist() == [4, 5, 1, *[0] * 9]
    assert input_ids[1].tolist() == [1, *[0] * 11]
    assert mask.sum(1).tolist() == [3, 1]


def test_long_prompt_is_cut_with_a_warning(encoder: TextEncoder, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "allegro_model"):
        input_ids, mask = encoder.tokenize(["cat " * 11])  # with the end token exactly as long as allowed
        assert not caplog.records
        input_ids, mask = encoder.tokenize(["cat " * 30])
    assert input_ids[0].tolist() == [*[5] * 11, 1]
    assert mask.all()
    assert "has 30 tokens; the text encoder reads 11, so the last 19 are left out" in caplog.text


def test_encode(encoder: TextEncoder) -> None:
    texts = ["a cat runs over the hill", "", "dog"]
    embeds, mask = encoder.encode(texts)
    assert embeds.shape == (3, 12, 32)
    assert embeds.dtype == torch.float32
    assert mask.sum(1).tolist() == [7, 1, 2]
    assert not embeds.requires_grad
    assert not embeds.is_inference()  # training may put the result into a graph
    for index, text in enumerate(texts):
        assert torch.equal(encoder.encode([text])[0][0], embeds[index]), "a text depends on its neighbours"


def test_equals_the_padded_run_of_the_reference(encoder: TextEncoder) -> None:
    texts = ["a cat runs over the hill", "", "dog " * 20]
    embeds, mask = encoder.encode(texts)
    input_ids, _ = encoder.tokenize(texts)
    reference = encoder.model(input_ids=input_ids, attention_mask=mask.long()).last_hidden_state
    torch.testing.assert_close(embeds[mask], reference[mask], rtol=1e-5, atol=1e-5)
    assert embeds[~mask].eq(0).all()


def test_bfloat16_is_close(encoder: TextEncoder, config: dict, weights: dict, fast: Path) -> None:
    half = build_text_encoder(config, {name: value.bfloat16() for name, value in weights.items()}, fast, max_length=12)
    (expected, mask), (found, _) = encoder.encode(["a cat"]), half.encode(["a cat"])
    assert found.dtype == torch.bfloat16
    error = (found.float() - expected)[mask].norm() / expected[mask].norm()
    assert error < 0.03


def test_device_of_the_results(encoder: TextEncoder) -> None:
    embeds, mask = encoder.encode(["a"], device="meta")
    assert embeds.device.type == mask.device.type == "meta"


def test_tokenizers_of_transformers_fit(encoder: TextEncoder, fast: Path) -> None:
    import transformers

    other = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(fast / "tokenizer.json"), pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    texts = ["a cat", "the dog runs"]
    assert torch.equal(TextEncoder(other, encoder.model, max_length=12).encode(texts)[0], encoder.encode(texts)[0])


def test_text_that_is_no_unicode(encoder: TextEncoder) -> None:
    # What a shell passes on for bytes it cannot decode.
    assert encoder.tokenize(["a \udce9 cat"])[0][0, :4].tolist() == encoder.tokenize(["a \ufffd cat"])[0][0, :4].tolist()


def test_wrong_arguments(encoder: TextEncoder) -> None:
    for texts in ([], "a string"):
        with pytest.raises(TextError, match="expected a list of at least one text"):
            encoder.encode(texts)
    with pytest.raises(TextError, match="max_length=0"):
        TextEncoder(encoder.tokenizer, encoder.model, max_length=0)


def test_nothing_is_printed_and_nothing_is_looked_up(config: dict, weights: dict, fast: Path, tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    save_file(weights, tmp_path / "t5.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    program = (
        "import json, socket, sys\n"
        "def refuse(*args, **kwargs): raise AssertionError('network')\n"
        "socket.socket.connect = socket.getaddrinfo = refuse\n"
        "from safetensors.torch import load_file\n"
        "from allegro_model.text import build_text_encoder\n"
        "assert 'transformers' not in sys.modules\n"
        "config = json.load(open(sys.argv[1] + '/config.json', encoding='utf-8'))\n"
        "encoder = build_text_encoder(config, load_file(sys.argv[1] + '/t5.safetensors'), sys.argv[2])\n"
        "encoder.encode(['a cat', ''])\n"
    )
    result = subprocess.run([sys.executable, "-c", program, tmp_path, fast], capture_output=True, text=True, timeout=600, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout + result.stderr == ""

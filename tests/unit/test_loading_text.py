"""The text encoder from every kind of file users have."""

import json

import pytest
import torch
from safetensors.torch import save_file

from allegro_model.errors import CheckpointError, CheckpointMismatch, UnsupportedCheckpoint
from allegro_model.loading import load_text_encoder
from allegro_model.loading.dimensions import t5_shapes

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

PIECES = ["<pad>", "</s>", "<unk>", "\u2581a", "\u2581red", "\u2581cat", "\u2581"]
CONFIG = {
    "model_type": "t5",
    "vocab_size": 8,
    "d_model": 12,
    "d_kv": 5,
    "num_heads": 2,
    "d_ff": 16,
    "num_layers": 2,
    "relative_attention_num_buckets": 32,
    "feed_forward_proj": "gated-gelu",
}


@pytest.fixture(scope="module")
def state():
    generator = torch.Generator().manual_seed(5)
    return {name: torch.randn(shape, generator=generator) * 0.3 for name, shape in t5_shapes(CONFIG).items()}


def write_tokenizer(folder):
    folder.mkdir(parents=True, exist_ok=True)
    model = tokenizers.models.Unigram(
        [(p, 0.0) for p in PIECES[:3]] + [(p, -3.0) for p in PIECES[3:]], unk_id=2
    )
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(
        replacement="\u2581", prepend_scheme="always"
    )
    tokenizer.save(str(folder / "tokenizer.json"))


def write_snapshot(root, state, *, name="model.safetensors", config=CONFIG):
    (root / "text_encoder").mkdir(parents=True)
    save_file(state, root / "text_encoder" / name)
    if config:
        (root / "text_encoder" / "config.json").write_text(json.dumps(config))
    write_tokenizer(root / "tokenizer")
    return root


def reference(state, token_ids):
    model = transformers.T5EncoderModel(transformers.T5Config(**CONFIG, dropout_rate=0.0))
    model.load_state_dict({**state, "encoder.embed_tokens.weight": state["shared.weight"]}, strict=True)
    ids = torch.tensor([token_ids])
    return model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state[0]


def test_snapshot_equals_transformers(tmp_path, state):
    encoder = load_text_encoder(write_snapshot(tmp_path, state), dtype=torch.float32, max_length=6)
    embeds, mask = encoder.encode(["a red cat"])
    assert mask.tolist() == [[True] * 4 + [False] * 2]
    assert torch.allclose(embeds[0, :4], reference(state, [3, 4, 5, 1]), atol=1e-5)
    assert torch.isfinite(embeds).all()


def test_default_type_is_bfloat16(tmp_path, state):
    model = load_text_encoder(write_snapshot(tmp_path, state)).model
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad or p.is_meta for p in model.parameters())


@pytest.mark.parametrize(
    "layout", ["either name", "both names", "all-in-one prefix", "with decoder", "no config"]
)
def test_layouts(tmp_path, state, layout):
    stored, config = dict(state), CONFIG
    if layout == "either name":
        stored["encoder.embed_tokens.weight"] = stored.pop("shared.weight")
    elif layout == "both names":
        stored["encoder.embed_tokens.weight"] = stored["shared.weight"].clone()
    elif layout == "all-in-one prefix":
        stored = {"text_encoders.t5xxl.transformer." + name: tensor for name, tensor in stored.items()}
        stored["text_encoders.t5xxl.logit_scale"] = torch.tensor(4.6)
    elif layout == "with decoder":
        stored |= {
            "decoder.block.0.layer.0.SelfAttention.q.weight": torch.zeros(2),
            "lm_head.weight": torch.zeros(2),
        }
    else:
        config = None
    model = load_text_encoder(write_snapshot(tmp_path, stored, config=config), dtype=None).model
    loaded = model.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())
    assert torch.equal(loaded["encoder.embed_tokens.weight"], state["shared.weight"])


@pytest.mark.parametrize("scaled", [False, True])
def test_float8_file(tmp_path, state, scaled):
    stored = {}
    for name, tensor in state.items():
        if tensor.ndim == 2 and ".layer." in name and "bias" not in name:
            stored[name] = (tensor * (8 if scaled else 1)).to(torch.float8_e4m3fn)
            if scaled:
                stored[name.removesuffix("weight") + "scale_weight"] = torch.tensor(1 / 8)
        else:
            stored[name] = tensor.half()
    if scaled:
        stored["scaled_fp8"] = torch.empty(0, dtype=torch.float8_e4m3fn)
    root = write_snapshot(tmp_path, stored)
    encoder = load_text_encoder(root, dtype=torch.float32, dequantise=True)
    loaded = encoder.model.state_dict()
    kept = load_text_encoder(root, dtype=torch.float32)
    assert kept.model.state_dict()["encoder.block.0.layer.1.DenseReluDense.wo.weight"].dtype == torch.int8
    assert torch.allclose(kept.encode(["a b"])[0], encoder.encode(["a b"])[0], atol=1e-6)
    for name, tensor in state.items():
        assert (loaded[name] - tensor).abs().max() <= 0.07 * tensor.abs().max()


def test_tokenizer_is_found_or_given(tmp_path, state):
    root = write_snapshot(tmp_path / "model", state)
    file = root / "text_encoder" / "model.safetensors"
    for path in (root, root / "text_encoder", file):
        assert load_text_encoder(path).max_length == 512
    (tmp_path / "flat").mkdir()
    lonely = file.rename(tmp_path / "flat" / "t5.safetensors")
    with pytest.raises(
        CheckpointError,
        match=r"no tokenizer for .*t5\.safetensors: looked in .*Download the folder tokenizer/",
    ):
        load_text_encoder(lonely)
    assert load_text_encoder(lonely, tokenizer=root / "tokenizer").max_length == 512
    write_tokenizer(tmp_path / "flat")
    assert load_text_encoder(lonely).max_length == 512


def test_length_of_the_model(tmp_path, state):
    root = write_snapshot(tmp_path, state)
    (root / "model_index.json").write_text('{"allegro_sampling": {"text_length": 24}}')
    assert load_text_encoder(root).max_length == 24
    assert load_text_encoder(root / "text_encoder").max_length == 24
    assert load_text_encoder(root / "text_encoder" / "model.safetensors").max_length == 24
    assert load_text_encoder(root, max_length=7).max_length == 7


def test_missing_tensor_is_named_with_the_file(tmp_path, state):
    root = write_snapshot(
        tmp_path, {n: t for n, t in state.items() if "block.1.layer.1.DenseReluDense.wo" not in n}
    )
    with pytest.raises(CheckpointMismatch) as error:
        load_text_encoder(root)
    assert str(root) in str(error.value)
    assert "Missing (1): encoder.block.1.layer.1.DenseReluDense.wo.weight." in str(error.value)


def test_other_text_encoders_are_refused_by_name(tmp_path, state):
    bias = "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight"
    with pytest.raises(
        UnsupportedCheckpoint,
        match=r"is a UMT5 text encoder \(used by Wan and others\).*; expected a T5 v1\.1",
    ):
        load_text_encoder(write_snapshot(tmp_path, state | {bias: torch.zeros(32, 2)}))


def test_config_that_contradicts(tmp_path, state):
    with pytest.raises(CheckpointMismatch, match=r"d_ff is 16 in the tensors and 99 in the config"):
        load_text_encoder(write_snapshot(tmp_path, state, config=CONFIG | {"d_ff": 99}))

"""A whole model folder in the published layout, with the pattern weights of `tiny`."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import save_file
from tiny import DIT, VAE, fill, tiny_dit, tiny_vae

from allegro_model.dit import AllegroTI2V

SAMPLING = {"width": 32, "height": 32, "num_frames": 8, "fps": 8.0, "num_steps": 4, "guidance_scale": 3.0,
            "sampler": "euler_ancestral", "prompt_template": False, "negative_prompt": "blurry", "text_length": 16}
_PIECES = ["<pad>", "</s>", "<unk>", "\u2581a", "\u2581red", "\u2581circle", "\u2581moves", "\u2581to", "\u2581the",
           "\u2581right", "\u2581blurry", "\u2581", *"abcdefghijklmnopqrstuvwxyz"]


def write_snapshot(root: Path) -> Path:
    """Writes model_index.json, transformer/, vae/, text_encoder/ and tokenizer/ below `root`."""
    for name, model, config in (("transformer", tiny_dit(), DIT), ("vae", tiny_vae(), VAE)):
        (root / name).mkdir(parents=True)
        save_file(model.state_dict(), root / name / "diffusion_pytorch_model.safetensors")
        (root / name / "config.json").write_text(json.dumps(config.to_dict()))
    _write_text_encoder(root / "text_encoder")
    _write_tokenizer(root / "tokenizer")
    (root / "model_index.json").write_text(json.dumps({"_class_name": "AllegroPipeline", "allegro_sampling": SAMPLING}))
    return root


def write_ti2v_snapshot(root: Path, shared: str) -> Path:
    """Writes an image-to-video transformer below `root`, with a model_index.json that shares the rest with the
    model folder `shared`."""
    (root / "transformer").mkdir(parents=True)
    save_file(fill(AllegroTI2V(DIT)).state_dict(), root / "transformer" / "diffusion_pytorch_model.safetensors")
    (root / "transformer" / "config.json").write_text(json.dumps(DIT.to_dict()))
    index = {"_class_name": "AllegroTI2VPipeline", "allegro_sampling": {**SAMPLING, "guidance_scale": 8.0},
             "allegro_shared": shared}
    (root / "model_index.json").write_text(json.dumps(index))
    return root


def _write_text_encoder(folder: Path) -> None:
    from transformers import T5Config, T5EncoderModel

    config = T5Config(vocab_size=len(_PIECES), d_model=DIT.caption_channels, d_kv=12, d_ff=32, num_layers=1, num_heads=2,
                      feed_forward_proj="gated-gelu", tie_word_embeddings=False)
    model = T5EncoderModel(config)
    fill(model)
    model.save_pretrained(folder)


def _write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    scores = [(piece, -12.0 if len(piece) == 1 else -5.0) for piece in _PIECES]
    tokenizer = Tokenizer(models.Unigram([(p, 0.0) for p in _PIECES[:3]] + scores[3:], unk_id=2, byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="\u2581", prepend_scheme="always")
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    config = {"tokenizer_class": "T5TokenizerFast", "extra_ids": 0, "additional_special_tokens": [], "legacy": False}
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, **names}))
    (folder / "special_tokens_map.json").write_text(json.dumps(names))

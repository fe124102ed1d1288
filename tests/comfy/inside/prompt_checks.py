"""Checks of encoded prompts on disk that need ComfyUI's Python objects; see checks.py."""

from pathlib import Path
from typing import Any

import torch
from bootstrap import Host


def encode(h: Host, clip: Any, text: str = "A red circle", disk_cache: str = "on", **options: Any) -> tuple[Any, str]:
    """(CONDITIONING, what the node says)."""
    inputs = {"role": "positive", "clean_caption": True, "prompt_weighting": False, **options}
    out = h.nodes["AllegroT5Encode"].execute(clip=clip, text=text, disk_cache=disk_cache, **inputs)
    return out.args[0], out.ui["text"][0]


def loader(h: Host, name: str = "tiny-random/text_encoder", device: str = "default") -> Any:
    return h.run("LoadAllegroT5", clip_name=name, device=device)


def has_weights(clip: Any) -> bool:
    return "patcher" in vars(clip)


def folder(h: Host) -> Path:
    return h.module("nodes.bridge.paths").prompt_folder()


def same(one: Any, two: Any) -> bool:
    (a, rest_a), (b, rest_b) = one[0], two[0]
    return torch.equal(a, b) and a.dtype == b.dtype and rest_a.keys() == rest_b.keys() and torch.equal(
        rest_a["attention_mask"], rest_b["attention_mask"])


def check_the_same_prompt_never_reads_the_weights_again(h: Host) -> None:
    encode(h, loader(h), disk_cache="clear")
    assert not list(folder(h).glob("*"))
    plain, _ = encode(h, loader(h), disk_cache="off")
    assert not list(folder(h).glob("*"))
    first = loader(h)
    assert not has_weights(first)
    kept, _ = encode(h, first)
    assert has_weights(first)
    second = loader(h)
    found, _ = encode(h, second)
    assert not has_weights(second)
    assert same(plain, kept)
    assert same(kept, found)
    for changed in ({"text": "A blue circle"}, {"role": "negative", "text": "A red circle, blurred"},
                    {"text": "A (red:1.3) circle", "role": "raw", "prompt_weighting": True}):
        clip = loader(h)
        assert not same(encode(h, clip, **changed)[0], kept)
        assert has_weights(clip), changed
    assert not same(encode(h, loader(h, "allegro-tiny (bundled)"))[0], kept)  # other weights, same words
    assert encode(h, loader(h), disk_cache="clear")
    assert not list(folder(h).glob("*.safetensors"))


def check_a_changed_clip_is_not_mistaken_for_the_stored_one(h: Host) -> None:
    """A copy with patches, as LoRA loaders make it, is encoded anew; nothing of it is kept."""
    kept, _ = encode(h, loader(h))
    copy = loader(h).clone()
    key = next(k for k in copy.patcher.model_state_dict() if k.endswith("SelfAttention.v.weight"))
    copy.add_patches({key: (torch.ones_like(copy.patcher.model_state_dict()[key]),)}, 1.0)
    number = len(list(folder(h).glob("*")))
    assert not same(encode(h, copy)[0], kept)
    assert len(list(folder(h).glob("*"))) == number
    encode(h, loader(h), disk_cache="clear")


def check_a_clip_outlives_its_file(h: Host) -> None:
    clip = loader(h)
    kept, _ = encode(h, clip, disk_cache="off")

    def gone() -> str:
        raise FileNotFoundError("no such file")

    clip.identity = gone
    number = len(list(folder(h).glob("*")))
    assert same(encode(h, clip)[0], kept)
    assert len(list(folder(h).glob("*"))) == number


def check_the_node_says_how_many_tokens_were_read(h: Host) -> None:
    clip = loader(h, "published_vocabulary.safetensors")
    _, said = encode(h, clip, "a cat", role="raw", disk_cache="off")
    assert said == "4 tokens", said  # with the end token
    _, said = encode(h, clip, "word " * 600 + "and the tail", role="raw", disk_cache="off")
    assert said.startswith("512 tokens; 92 more are not read: word"), said
    assert len(said) < 200

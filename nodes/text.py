"""The text node."""

from __future__ import annotations

from typing import Any

from ..allegro_model.errors import TextError
from ..allegro_model.prompt_store import PromptStore
from ..allegro_model.text import format_negative, format_prompt
from ..allegro_model.text.cleaning import check_length
from .bridge.paths import prompt_folder
from .bridge.progress import say
from .bridge.text import count_tokens, encode, wants_template
from .schema import io, schema

ROLES = ("positive", "negative", "raw")
DISK_CACHE = ("on", "off", "clear")
_SHOWN = 120  # characters of what was cut off


class T5Encode(io.ComfyNode):
    """Prompt to conditioning, prepared as the reference does."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="AllegroT5Encode",
            display_name="T5 Encode (Allegro)",
            category="conditioning",
            description=("Encodes a prompt the way Allegro was run: cleaned, in the official quality template for the "
                         "positive role, at most 512 tokens. Takes the CLIP of Load Allegro T5, or of another loader for "
                         "T5 v1.1 XXL (that of the GGUF pack or ComfyUI's own, each with type mochi)."),
            search_aliases=["prompt", "allegro text encode"],
            inputs=[
                io.Clip.Input("clip", tooltip="The T5 text encoder."),
                io.String.Input("text", multiline=True, dynamic_prompts=True, default="", tooltip=(
                    "What the clip shows, in English; for the negative role what it should not show. At most 512 tokens, "
                    "about 350 words, are read.")),
                io.Combo.Input("role", options=list(ROLES), default="positive", tooltip=(
                    "positive: surrounded by the official quality template, if the model was made for it (the released "
                    "ones were, the bundled one was not). negative: without the template. raw: exactly as written, not "
                    "even lower-cased or cleaned.")),
                io.Boolean.Input("clean_caption", default=True, tooltip=(
                    "Clean the text as the reference does. Turn it off if it damages your prompt: it deletes things like "
                    "r2d2, 1920x1080 and web addresses. Without effect in the raw role.")),
                io.Boolean.Input("prompt_weighting", default=False, tooltip=(
                    "Read (word:1.3) as a weight, ComfyUI's way. The reference has no weights; off, parentheses are "
                    "ordinary characters. Cleaning removes parentheses: use it with clean_caption off.")),
                io.Combo.Input("disk_cache", options=list(DISK_CACHE), default="on", optional=True, tooltip=(
                    "on: keep encoded prompts in ComfyUI's user folder, at most 1 GB, so that the same prompt never loads the "
                    "text encoder again. off: neither use nor keep any. clear: remove all that are kept, then as off.")),
            ],
            outputs=[io.Conditioning.Output(display_name="CONDITIONING", tooltip=(
                "The encoded prompt with its mask, for the positive or negative input of a sampler."))],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, text: str | None = None, role: str | None = None, disk_cache: str | None = None) -> bool | str:
        """Before anything is loaded. An input that is linked is None here and checked in `execute`."""
        try:
            _check(text or "", role or ROLES[0], disk_cache or DISK_CACHE[0])
        except TextError as error:
            return str(error)
        return True

    @classmethod
    def execute(cls, clip: Any, text: str, role: str, clean_caption: bool, prompt_weighting: bool,
                disk_cache: str = DISK_CACHE[0]) -> io.NodeOutput:
        _check(text, role, disk_cache)
        if role == "positive":
            text = format_prompt(text, template=wants_template(clip), clean=clean_caption)
        elif role == "negative":
            text = format_negative(text, clean=clean_caption)
        counted = count_tokens(clip, text, weighting=prompt_weighting)
        summary = "" if counted is None else _summary(*counted)
        say(cls.hidden.unique_id if cls.hidden else None, summary)
        store = PromptStore(prompt_folder())
        if disk_cache == "clear":
            store.clear()
        result = encode(clip, text, weighting=prompt_weighting, store=store if disk_cache == "on" else None)
        return io.NodeOutput(result, ui={"text": (summary,)} if summary else None)


def _summary(read: int, lost: int, words: str) -> str:
    """What became of the prompt, for the user."""
    if not lost:
        return "1 token" if read == 1 else f"{read} tokens"
    shown = words if len(words) <= _SHOWN else words[: _SHOWN - 3] + "..."
    return f"{read} tokens; {lost} more are not read: {shown}"


def _check(text: str, role: str, disk_cache: str) -> None:
    if role not in ROLES:
        raise TextError(f"role={role!r}: must be one of {', '.join(ROLES)}.")
    if disk_cache not in DISK_CACHE:
        raise TextError(f"disk_cache={disk_cache!r}: must be one of {', '.join(DISK_CACHE)}.")
    check_length(text)

"""The texts the released models were run with, and how a user prompt becomes encoder input.

The authors say that neither text was part of the training: both are offers, never forced.
"""

from ..config import DEFAULT_NEGATIVE_PROMPT as DEFAULT_NEGATIVE
from .cleaning import apply_rules, check_length

# Source: the official inference scripts.
POSITIVE_TEMPLATE = (
    "\n(masterpiece), (best quality), (ultra-detailed), (unwatermarked), \n{} \n"
    "emotional, harmonious, vignette, 4k epic detailed, shot on kodak, 35mm photo, \n"
    "sharp focus, high budget, cinemascope, moody, epic, gorgeous\n"
)


def format_prompt(text: str, *, template: bool = True, clean: bool = True) -> str:
    """What the text encoder reads for a prompt.

    Args:
        text: the user's prompt, at most `MAX_CHARACTERS` characters.
        template: surround the prompt with `POSITIVE_TEMPLATE`.
        clean: apply `clean_caption`. Off, the text is only lower-cased and stripped: the choice for prompts
            which cleaning damages (it deletes "r2d2", "1920x1080", addresses of web sites and more).
    Raises:
        TextError: the prompt is too long.
    Source: official inference script; the order is lower-case and strip, insert, clean.
    """
    check_length(text)
    prompt = text.lower().strip()
    if template:
        # Not str.format: braces in the prompt are ordinary characters.
        prompt = POSITIVE_TEMPLATE.replace("{}", prompt)
    return apply_rules(prompt) if clean else prompt.lower().strip()


def format_negative(text: str = DEFAULT_NEGATIVE, *, clean: bool = True) -> str:
    """What the text encoder reads for a negative prompt: `format_prompt` without the template."""
    return format_prompt(text, template=False, clean=clean)

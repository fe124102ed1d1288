"""Repair of damaged Unicode text: the part of ftfy's `fix_text` that can matter for a caption."""

# ruff: noqa: RUF001 - the look-alike characters below are meant

from __future__ import annotations

import re
import unicodedata
from functools import cache

from .mojibake import control_characters, repair_mojibake

_LIGATURES = {
    "ĳ": "ij", "ŉ": "'n", "ǆ": "dž", "ǉ": "lj", "ǌ": "nj", "ǳ": "dz",
    "ﬀ": "ff", "ﬁ": "fi", "ﬂ": "fl", "ﬃ": "ffi", "ﬄ": "ffl", "ﬅ": "ſt", "ﬆ": "st",
}  # fmt: skip
_SINGLE_QUOTES = (0x02BC, *range(0x2018, 0x201C))
_DOUBLE_QUOTES = range(0x201C, 0x2020)
# Without effect on what is displayed. Blanks, C1 controls, joiners and direction marks stay.
_INVISIBLE = (
    *range(0x00, 0x09), 0x0B, *range(0x0E, 0x20), 0x7F, *range(0x206A, 0x2070), 0xFEFF, *range(0xFFF9, 0xFFFD),
)  # fmt: skip

_TERMINAL_ESCAPE = re.compile("\x1b\\[[\\d;]*[a-zA-Z]")
_LINE_BREAK = re.compile("\r\n?|[\u2028\u2029]")
_MAX_ROUNDS = 12


def fix_text(text: str) -> str:
    """Repair each line: mojibake, ligatures, character widths, quotes, line breaks, surrogates, control characters.

    The result is in NFC. Entities are not decoded: the cleaner has done that, and has removed every `&`.

    Source: behaviour of ftfy 6.3 `fix_text` with default settings.
    """
    return "".join(_fix_line(line) for line in re.findall("[^\n]*\n|[^\n]+", text))


def _fix_line(line: str) -> str:
    if line.isascii() and line.isprintable():
        return line
    # One repair can bring out another; the bound is for hostile input.
    for _ in range(_MAX_ROUNDS):
        fixed = repair_mojibake(line).translate(_replacements())
        fixed = join_surrogates(_LINE_BREAK.sub("\n", fixed))
        fixed = _TERMINAL_ESCAPE.sub("", fixed).translate(dict.fromkeys(_INVISIBLE))
        fixed = unicodedata.normalize("NFC", fixed)
        if fixed == line:
            break
        line = fixed
    return line


@cache
def _replacements() -> dict[int, str]:
    """Character by character: C1 controls, ligatures, full- and half-width forms, quotation marks."""
    wide = {code: unicodedata.normalize("NFKC", chr(code)) for code in range(0xFF01, 0xFFF0)}
    table = {0x3000: " ", **wide, **{ord(ligature): letters for ligature, letters in _LIGATURES.items()}}
    table |= dict.fromkeys(_SINGLE_QUOTES, "'") | dict.fromkeys(_DOUBLE_QUOTES, '"')
    return table | {code: table.get(ord(char), char) for code, char in control_characters().items()}


def join_surrogates(text: str) -> str:
    """Pairs of surrogates become their character, single ones U+FFFD."""
    if text.isascii():
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")

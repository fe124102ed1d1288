"""Repair of damaged Unicode text."""

import html
import re
import unicodedata

_WIDTH = {code: unicodedata.normalize("NFKC", chr(code)) for code in range(0xFF01, 0xFFF0)} | {0x3000: " "}
_LIGATURES = {0xFB00 + i: s for i, s in enumerate(("ff", "fi", "fl", "ffi", "ffl", "ſt", "st"))}


def fix_text(text: str) -> str:
    """Repair one text: mojibake, widths, ligatures, quotes, line breaks; NFC."""
    if "<" not in text:
        text = html.unescape(text)
    text = re.sub("â€[œ\x9c\x9d]", '"', text)
    text = text.translate(_WIDTH).translate(_LIGATURES)
    text = re.sub("[\u2018-\u201b]", "'", re.sub("[\u201c-\u201f]", '"', text))
    return unicodedata.normalize("NFC", text)

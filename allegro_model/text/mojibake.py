"""Repair of mojibake: UTF-8 that was read with a single-byte encoding ("â€œ" for a quotation mark).

Behaves as `fix_encoding` of ftfy 6.3, which the reference cleaner calls, on lower-case text. Captions are lower-cased
before they come here, so mojibake that starts with a capital ("Ã©" for "é") is already beyond repair, there as here;
what ftfy knows about capitals is left out. Source: ftfy's documentation of its heuristic and of its steps.
"""

# ruff: noqa: RUF001 - the look-alike characters below are meant

from __future__ import annotations

import re
from functools import cache

# In the order of trial. Windows encodings are "sloppy": an unassigned byte is the control character of that number.
_ENCODINGS = (
    "latin-1", "cp1252", "cp1251", "cp1250", "cp1253", "cp1254", "cp1257", "iso-8859-2", "mac-roman", "cp437",
)  # fmt: skip
_LATIN_LIKE = ("latin-1", "cp1252", "cp1251", "cp1250", "cp1253", "cp1254", "cp1257")

# A repaired text can be mojibake once more. Nobody's text is damaged this often; the bound is for hostile input.
_MAX_LAYERS = 12

# Characters that occur in mojibake, by the role they play in ordinary text.
_ROLES = {
    "odd": "¦¤¨¬¯¸ƒˆˇ˘˛˜†‡‰⌐◊\ufffdªº",
    "letter": "ßà-ñăąāćčďđęěēėğģįīķĺľłļœŕśşšťüźżžґ\ufb01\ufb02",
    # The only capitals that can come up here: they replace control characters.
    "capital": "ŒŠŸŽ",
    "other letter": "α-ωάέήίΰа-џ",
    "face": "ò-öø-ü°",
    "box": "│┌┐┘├┤┬┼═-╬▀▄█▌▐░▒▓",
    "opening": "¡«¿©΄΅‘‚“„•‹\uf8ff",
    "closing": "®»˝”›™",
    "money": "¢£¥₧€",
    "number": "²³¹±¼½¾×µ÷⁄∂∆∏∑√∞∩∫≈≠≡≤≥№",
    "law": "¶§",
}

# Neighbours that hardly ever meet in real text. A step is a role, several roles, or a regular expression.
_UNLIKELY_SEQUENCES: tuple[tuple[str, ...], ...] = (
    ("[\x80-\x9f]",),
    ("odd letter capital box opening closing money number law", "odd"),
    ("odd", "letter capital box opening closing money number law"),
    ("letter box closing money number", "capital"),
    ("other letter", "capital"),
    ("[a-zA-Z]", "other letter", "odd"),
    ("box closing money number", "letter"),
    ("letter box closing", "money"),
    (r"\s", "capital", "money"),
    ("capital box", "number law"),
    ("letter capital box money closing", "opening", "number"),
    ("letter capital money number box law", "closing", "opening"),
    ("money number box", "opening"),
    ("[a-z]", "capital", "opening money"),
    ("box", "face"),
    ("letter capital money number opening closing law", "box"),
    ("box", "closing"),
    ("letter capital", "opening closing", r"\w"),
    ("[Œœ][^A-Za-z]",),
    ("capital", "°"),
    ("×[²³]",),
    ("à[²µ¹¼½¾]",),
    ("√[±∂†≠®™´≤≥¥µø]",),
    ("≈[°¢]",),
    ("‚[âó][àä°ê]",),
    ("β€[™\xa0Ά\xad®°]",),
    ("ā€",),
)


def repair_mojibake(text: str) -> str:
    """Undo wrong decodings as long as the text looks unlikely; leaves anything plausible alone."""
    for _ in range(_MAX_LAYERS):
        repaired = _repair_once(text)
        if repaired == text:
            break
        text = repaired
    return text


def control_characters() -> dict[int, str]:
    """Translation of C1 control characters to what Windows-1252 has in their place."""
    return {code: char for code, char in enumerate(_decoding_table("cp1252")) if 0x80 <= code < 0xA0}


def _repair_once(text: str) -> str:
    if text.isascii() or not _looks_unlikely(text):
        return text
    for encoding in _ENCODINGS:
        repaired = _reread(text, encoding)
        if repaired is not None:
            return repaired
    parts = _embedded().sub(lambda part: _repair_part(part[0], text), text)
    return parts if parts != text else text.translate(control_characters())


def _repair_part(part: str, text: str) -> str:
    # A part as long as the text has just been tried as a whole.
    return repair_mojibake(part) if len(part) < len(text) and _looks_unlikely(part) else part


def _looks_unlikely(text: str) -> bool:
    return _unlikely().search(text) is not None


@cache
def _unlikely() -> re.Pattern[str]:
    return re.compile("|".join("".join(map(_step, sequence)) for sequence in _UNLIKELY_SEQUENCES))


def _step(step: str) -> str:
    """Regular expression of one step: roles are separated by blanks, except in "other letter"."""
    if step == "other letter" or step in _ROLES:
        return f"[{_ROLES[step]}]"
    roles = step.split(" ")
    return f"[{''.join(_ROLES[role] for role in roles)}]" if roles[0] in _ROLES else step


@cache
def _decoding_table(encoding: str) -> str:
    """The 256 characters of an encoding."""
    characters = [bytes([code]).decode(encoding, errors="ignore") or chr(code) for code in range(256)]
    if encoding.startswith("cp125"):
        # A place for a character that was lost before.
        characters[0x1A] = "\ufffd"
    return "".join(characters)


@cache
def _encoding_table(encoding: str) -> dict[str, int]:
    return {character: code for code, character in enumerate(_decoding_table(encoding))}


@cache
def _embedded() -> re.Pattern[str]:
    """Runs that would be UTF-8 in one of the Latin-like encodings, inside a text that as a whole would not."""

    def characters(first: int, last: int) -> str:
        return "".join({_decoding_table(name)[code] for name in _LATIN_LIKE for code in range(first, last + 1)})

    # A blank may stand for the no-break space that byte A0 was.
    following = characters(0x80, 0xBF) + " "
    two, three, four = characters(0xC2, 0xDF), characters(0xE0, 0xEF), characters(0xF0, 0xF0) + characters(0xF3, 0xF3)
    # Not in the middle of something longer; but dashes, quotes and the like may well stand before a damaged part.
    strict = "".join(set(following) - set(" –—―‘’‚“”„•…"))
    return re.compile(f"(?<![{strict}])(?:[{two}][{following}]|[{three}][{following}]{{2}}|[{four}][{following}]{{3}})+")


_LOST_A0 = re.compile(
    rb"[\xc2\xc3\xc5\xce\xd0\xd9] "
    rb"|[\xe2\xe3] [\x80-\x84\x86-\x9f\xa1-\xbf]"
    rb"|[\xe0-\xe3][\x80-\x84\x86-\x9f\xa1-\xbf] "
    rb"|\xf0(?: [\x80-\xbf]{2}|[\x80-\xbf] [\x80-\xbf]|[\x80-\xbf]{2} )"
)
_A_GRAVE = re.compile(rb"\xc3 (?! |quele|quela|quilo|s )")
_LOST_BYTE = re.compile(
    rb"[\xc2-\xdf]\x1a|[\xc2\xc3]\?"
    rb"|\xed[\xa0-\xaf][\x1a?]\xed[\xb0-\xbf][\x1a?\x80-\xbf]|\xed[\xa0-\xaf][\x1a?\x80-\xbf]\xed[\xb0-\xbf][\x1a?]"
    rb"|[\xe0-\xef](?:[\x1a?][\x1a\x80-\xbf]|[\x1a\x80-\xbf][\x1a?])"
    rb"|[\xf0-\xf4](?:[\x1a?][\x1a\x80-\xbf]{2}|[\x1a\x80-\xbf][\x1a?][\x1a\x80-\xbf]|[\x1a\x80-\xbf]{2}[\x1a?])"
    rb"|\x1a"
)


def _reread(text: str, encoding: str) -> str | None:
    """The text, written in `encoding` and read as UTF-8; None where that is impossible."""
    table = _encoding_table(encoding)
    try:
        data = bytes([table[character] for character in text])
    except KeyError:
        return None
    # In mac-roman a lost A0 would be a dash before a blank, which is ordinary text.
    if encoding != "mac-roman" and _LOST_A0.search(data):
        data = _A_GRAVE.sub(b"\xc3\xa0 ", data)
        data = _LOST_A0.sub(lambda match: match[0].replace(b" ", b"\xa0"), data)
    if encoding.startswith("cp125"):
        data = _LOST_BYTE.sub("\ufffd".encode(), data)
    try:
        # Pairs of surrogates written as UTF-8, and Java's two bytes for NUL, are accepted.
        decoded = data.replace(b"\xc0\x80", b"\x00").decode("utf-8", "surrogatepass")
        return decoded.encode("utf-16", "surrogatepass").decode("utf-16")
    except UnicodeDecodeError:
        return None

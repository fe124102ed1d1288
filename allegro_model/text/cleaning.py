"""Caption cleaning, character for character as the reference does it, without the packages it needs for that.

A pass is a list of rules, applied in order; the reference runs the pass twice. The rules were made for web
captions and damage some prompts ("epsilon" loses "eps"): `clean=False` of `format_prompt` switches them off.

No rule may take more than about linear time, so that no prompt can stall a server. Three means serve that: every
pattern that begins with a repetition is anchored to the start of its run, neighbouring repetitions match disjoint
characters, and the rules which need backtracking over long runs (links, file names) are functions.

Known differences from the reference, none of which a caption is likely to meet: mojibake whose capitals are written
as numeric entities ("&#195;&#169;"), entities in full-width letters nested three deep, more than 30 unfinished tags
("<a <a ..."), twelve layers of mojibake. And where the reference raises (unknown marked sections such as "<![x",
unpaired surrogates, entities with thousands of digits) the text is cleaned. As there, how damaged markup is read
depends on the version of Python.
"""

import html
import re
from collections.abc import Callable
from functools import partial
from urllib.parse import unquote_plus

from ..errors import TextError
from .markup import html_to_text
from .unicode_repair import fix_text

MAX_CHARACTERS = 20_000
"""Longest prompt, in characters. The encoder reads 512 tokens, about 2,500 characters of English."""

Rule = Callable[[str], str]

_FILE_TYPES = "png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4"
_DASHES = (
    "\u002d\u058a\u05be\u1400\u1806\u2010-\u2015\u2e17\u2e1a\u2e3a\u2e3b\u2e40\u301c\u3030\u30a0"
    "\ufe31\ufe32\ufe58\ufe63\uff0d"
)
_CJK_SYMBOLS = ("\u31c0-\u31ef", "\u31f0-\u31ff", "\u3200-\u32ff", "\u3300-\u33ff", "\u3400-\u4dbf", "\u4dc0-\u4dff")

_HOST_RUN = re.compile(r"[a-zA-Z0-9.\-]+")
_HOST_TAIL = re.compile(r"\.(?:com|co|ru|net|org|edu|gov|it)[\w/\-]*\b/?(?!@)")
_SCHEME_TAIL = re.compile(r":(?:/{1,3}|[a-zA-Z0-9%])")
_EDGE = re.compile(r"\b")
_NON_BLANKS = re.compile(r"\S+")
_FILE_NAME = re.compile(rf"\S+\.(?:{_FILE_TYPES})")


def clean_caption(text: str) -> str:
    """Clean a caption: two passes over all rules.

    Args:
        text: at most `MAX_CHARACTERS` characters; case does not matter.
    Returns:
        Lower-case text on one line without leading or trailing blanks; may be empty.
    Raises:
        TextError: the text is too long.
    Source: text preprocessing of the official T2V pipeline with `clean_caption` on.
    """
    check_length(text)
    return apply_rules(text)


def apply_rules(text: str) -> str:
    """`clean_caption` for a text whose length has been checked before something was added to it."""
    for _ in range(2):
        for rule in _RULES:
            text = rule(text)
    return text


def check_length(text: str) -> None:
    """Refuse a prompt far beyond what the encoder reads.

    Raises:
        TextError: more than `MAX_CHARACTERS` characters.
    """
    if len(text) > MAX_CHARACTERS:
        raise TextError(
            f"The prompt has {len(text):,} characters; at most {MAX_CHARACTERS:,} are accepted, and the text encoder"
            " reads only about the first 2,500. Shorten the prompt."
        )


def _strip_lower(text: str) -> str:
    return text.strip().lower()


def _substitute(pattern: str, replacement: str) -> Rule:
    compiled = re.compile(pattern)
    return partial(compiled.sub, replacement)


def _delete_links(text: str, *, schemes: tuple[str, ...]) -> str:
    """Delete `scheme:/` and host names; what follows `?` or `#` survives, as in the reference.

    One scan over the runs of host characters. In a run the greedy pattern of the reference ends at the last dot that
    starts a valid top-level domain, wherever it began, so each dot is tried once.
    """
    kept: list[str] = []
    position = 0
    while run := _HOST_RUN.search(text, position):
        start, end = _next_link(text, run, schemes)
        kept.append(text[position:start])
        position = end
    kept.append(text[position:])
    return "".join(kept)


def _next_link(text: str, run: re.Match[str], schemes: tuple[str, ...]) -> tuple[int, int]:
    """(start, end) of the first link that begins in the run; empty and at the end of the run if there is none."""
    found = (_scheme_link(text, *run.span(), schemes), _host_link(text, *run.span()))
    # Where both begin at the same character, the scheme alone goes.
    return min((link for link in found if link), key=lambda link: link[0], default=(run.end(), run.end()))


def _scheme_link(text: str, first: int, last: int, schemes: tuple[str, ...]) -> tuple[int, int] | None:
    for scheme in schemes:
        start = last - len(scheme)
        if start >= first and text.startswith(scheme, start) and _EDGE.match(text, start):
            tail = _SCHEME_TAIL.match(text, last)
            return (start, tail.end()) if tail else None
    return None


def _host_link(text: str, first: int, last: int) -> tuple[int, int] | None:
    edge = _EDGE.search(text, first, last + 1)
    if edge is None:
        return None
    start = edge.start()
    dot = text.rfind(".", start + 1, last)
    while dot > start:
        tail = _HOST_TAIL.match(text, dot)
        if tail:
            return start, tail.end()
        dot = text.rfind(".", start + 1, dot)
    return None


def _delete_file_names(text: str) -> str:
    """Delete from the start of a run of non-blanks to the last file extension in it."""
    return _NON_BLANKS.sub(_without_file_name, text)


def _without_file_name(run: re.Match[str]) -> str:
    name = _FILE_NAME.match(run[0])
    return run[0][name.end() :] if name else run[0]


def _split_joined_words(text: str) -> str:
    """Blanks for `-` and `_` when there are more than three: "this-is-my-cute-cat"."""
    if text.count("-") + text.count("_") > 3:
        return text.replace("-", " ").replace("_", " ")
    return text


def _unescape(text: str) -> str:
    try:
        return html.unescape(html.unescape(text))
    except ValueError:  # a number with thousands of digits
        return text


def _trim_ends(text: str) -> str:
    """Drop a pair of quotes round everything, then one stray mark at each end, then a lone `.word`."""
    if len(text) > 2 and text[0] in "\"'" and text[-1] in "\"'":
        text = text[1:-1]
    if text[:1] and text[0] in "'_,-:;":
        text = text[1:]
    if text[-1:] and text[-1] in "'_,-:+":
        text = text[:-1]
    return "" if re.fullmatch(r"\.\S+", text) else text


# In the order of the reference; the numbers count its steps.
_RULES: tuple[Rule, ...] = (
    unquote_plus,  # 1
    _strip_lower,  # 2
    _substitute("<person>", "person"),  # 3
    partial(_delete_links, schemes=("https", "http")),  # 4
    partial(_delete_links, schemes=("www",)),  # 5
    html_to_text,  # 6
    _substitute(r"@\w+\b", ""),  # 7
    *(_substitute(f"[{block}]+", "") for block in _CJK_SYMBOLS),  # 8
    _substitute(f"[{_DASHES}]+", "-"),  # 9
    _substitute("[`\u00b4\u00ab\u00bb\u201c\u201d\u00a8]", '"'),  # 10
    _substitute("[\u2018\u2019]", "'"),
    _substitute("&quot;?", ""),  # 11
    _substitute("&amp", ""),
    _substitute(r"\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3}", " "),  # 12: IP addresses
    _substitute(r"\d:\d\d\s+$", ""),  # 13
    _substitute(r"\\n", " "),  # 14
    _substitute(r"#\d{1,3}\b", ""),  # 15: ids
    _substitute(r"#\d{5,}\b", ""),
    _substitute(r"\b\d{6,}\b", ""),
    _delete_file_names,  # 16
    _substitute("[\"']{2,}", '"'),  # 17
    _substitute(r"\.{2,}", " "),  # 18
    _substitute("[#®•©™&@·º½¾¿¡§~)(\\]\\[}{|\\\\/*]+", " "),  # 19
    _substitute(r"(?<!\s)\s+\.\s+", " "),  # 20
    _split_joined_words,  # 21
    fix_text,  # 22
    _unescape,
    _substitute(r"\b[a-zA-Z]{1,3}\d{3,15}\b", ""),  # 23: codes such as jc6640
    _substitute(r"\b[a-zA-Z]+\d+[a-zA-Z]+\b", ""),
    _substitute(r"\b\d+[a-zA-Z]+\d+\b", ""),
    _substitute(r"(?:worldwide\s+)?(?:free\s+)?shipping", ""),  # 24: advertisements
    _substitute(r"(?:free\s)?download(?:\sfree)?", ""),
    _substitute(r"\bclick\b\s(?:for|on)\s\w+", ""),
    _substitute(rf"\b(?:{_FILE_TYPES})(?:\simages?)?", ""),
    _substitute(r"\bpage\s+\d+\b", ""),
    _substitute(r"\b\d*[a-zA-Z]+\d+[a-zA-Z]+\d[a-zA-Z\d]*\b", " "),  # 25
    _substitute(r"\b\d+(?:\.\d*)?[x\u0445\u00d7]\d+(?:\.\d*)?\b", ""),  # 26: sizes
    _substitute(r"\b\s+:\s+", ": "),  # 27
    _substitute(r"(\D[,./])\b", r"\1 "),  # 28
    _substitute(r"\s+", " "),  # 29; not stripped: the next rules see the blanks
    _trim_ends,  # 30-33
    str.strip,  # 34
)

"""The fact sheet's list of cleaning rules, written down as plainly as possible on ftfy and Beautiful Soup.

An oracle for the cleaner: no attempt at speed, so some of these patterns take quadratic time or worse.
"""

import html
import re
import urllib.parse
import warnings

EXTENSIONS = "png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4"
DASHES = (
    "\u002d\u058a\u05be\u1400\u1806\u2010-\u2015\u2e17\u2e1a\u2e3a\u2e3b\u2e40\u301c\u3030\u30a0"
    "\ufe31\ufe32\ufe58\ufe63\uff0d"
)
HOST = r"[a-zA-Z0-9.\-]+\.(?:com|co|ru|net|org|edu|gov|it)[\w/\-]*\b/?(?!@)"

BEFORE_HTML = [
    ("<person>", "person"),
    (rf"\b(?:https?:(?:/{{1,3}}|[a-zA-Z0-9%])|{HOST})", ""),
    (rf"\b(?:www:(?:/{{1,3}}|[a-zA-Z0-9%])|{HOST})", ""),
]
AFTER_HTML = [
    (r"@[\w\d]+\b", ""),
    ("[\u31c0-\u31ef]+", ""),
    ("[\u31f0-\u31ff]+", ""),
    ("[\u3200-\u32ff]+", ""),
    ("[\u3300-\u33ff]+", ""),
    ("[\u3400-\u4dbf]+", ""),
    ("[\u4dc0-\u4dff]+", ""),
    (f"[{DASHES}]+", "-"),
    ("[`´«»“”¨]", '"'),  # noqa: RUF001
    ("[‘’]", "'"),  # noqa: RUF001
    ("&quot;?", ""),
    ("&amp", ""),
    (r"\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3}", " "),
    (r"\d:\d\d\s+$", ""),
    (r"\\n", " "),
    (r"#\d{1,3}\b", ""),
    (r"#\d{5,}\b", ""),
    (r"\b\d{6,}\b", ""),
    (rf"\S+\.(?:{EXTENSIONS})", ""),
    (r"[\"']{2,}", '"'),
    (r"\.{2,}", " "),
    (r"[#®•©™&@·º½¾¿¡§~)(\]\[}{|\\/*]+", " "),
    (r"\s+\.\s+", " "),
]
AFTER_FTFY = [
    (r"\b[a-zA-Z]{1,3}\d{3,15}\b", ""),
    (r"\b[a-zA-Z]+\d+[a-zA-Z]+\b", ""),
    (r"\b\d+[a-zA-Z]+\d+\b", ""),
    (r"(worldwide\s+)?(free\s+)?shipping", ""),
    (r"(free\s)?download(\sfree)?", ""),
    (r"\bclick\b\s(?:for|on)\s\w+", ""),
    (rf"\b(?:{EXTENSIONS})(\simages?)?", ""),
    (r"\bpage\s+\d+\b", ""),
    (r"\b\d*[a-zA-Z]+\d+[a-zA-Z]+\d+[a-zA-Z\d]*\b", " "),
    ("\\b\\d+\\.?\\d*[x\u0445\u00d7]\\d+\\.?\\d*\\b", ""),
    (r"\b\s+:\s+", ": "),
    (r"(\D[,./])\b", r"\1 "),
    (r"\s+", " "),
    (r"^[\"']([\w\W]+)[\"']$", r"\1"),
    (r"^['_,\-:;]", ""),
    (r"['_,\-:+]$", ""),
    (r"^\.\S+$", ""),
]


def clean(text: str) -> str:
    """Two passes; raises what Beautiful Soup raises on markup it rejects."""
    return _one_pass(_one_pass(text))


def _one_pass(text: str) -> str:
    import bs4
    import ftfy

    text = urllib.parse.unquote_plus(text).strip().lower()
    text = _apply(BEFORE_HTML, text)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "looks more like a URL"
        text = bs4.BeautifulSoup(text, features="html.parser").text
    text = _apply(AFTER_HTML, text)
    if len(re.findall(r"[-_]", text)) > 3:
        text = re.sub(r"[-_]", " ", text)
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return _apply(AFTER_FTFY, text).strip()


def _apply(rules: list[tuple[str, str]], text: str) -> str:
    for pattern, replacement in rules:
        text = re.sub(pattern, replacement, text)
    return text

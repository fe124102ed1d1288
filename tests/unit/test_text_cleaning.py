"""Caption cleaning: the stored cases, the plain oracle, hostile input, and the templates."""

# ruff: noqa: RUF001 - the look-alike characters below are meant

import json
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from allegro_model.errors import TextError
from allegro_model.text import (
    DEFAULT_NEGATIVE,
    MAX_CHARACTERS,
    POSITIVE_TEMPLATE,
    clean_caption,
    format_negative,
    format_prompt,
)
from allegro_model.text.cleaning import apply_rules
from allegro_model.text.markup import html_to_text
from allegro_model.text.unicode_repair import fix_text

# Origin: see tests/parity/README.md.
CASES = json.loads((Path(__file__).parents[1] / "parity/golden/text_cleaning.json").read_text("utf-8"))["cases"]

WORDS = (
    "a cat the dog running r2d2 1920x1080 3.5×4 epsilon house.cooking www.foo.com https://x.org/a/b?c=d http:// "
    "bob@ex.com @user #12 #12345 #tag 123456 1:23 12:30 it's \"quoted\" 'single' file.png img_01.jpg.pdf mp4 jpg image "
    "images png free shipping worldwide download click for on page 12 ... .. . , ; : - -- — – ‘x’ “y” «z» ´ ` ¨ &amp; "
    "&quot; &lt;b&gt; &eacute; &#233; &nbsp; &copy &foo; & <b> </b> <br/> <person> <i>x</i> <3 a<b <!--x--> 192.168.0.1 "
    "(a) [b] {c} |d| \\n \\ / * ~ ½ ® © ™ • 日本 の 猫 ㌀ ㈱ ㇰ ䷀ 㐀 한국어 ﾊﾝｶｸ ＦＵＬＬ ｗｉｄｅ １２３ ！ ﬁne ﬀ ĳ ŉ café "
    "naïve straße œuvre ångström über señor ça žluťoučký ąć жизнь привет γειά β € £5 $5 5€ 20% %20 + a+b 1+1=2 😀 ❤️ 👍🏽 "
    "👨\u200d👩\u200d👧 🇩🇪 ½cup ¿qué? ¡hola! n° 25°c 5µm x² \u200b \u200d \ufeff \x07 \x1b[31mred\x1b[0m \x85 \x92 \u2028 _ "
    "snake_case_name_x a-b-c-d-e f/1.8 50mm iso100 h264 abc123 a1b2c3 6640vc231 j2d1a2a 4k 35mm ‹a› „b“ ‚c’ … e.g. u.s.a. "
    "a.com@b co.uk x.it/y 3x4 3х4 1.x2. \r \t"
).split(" ")  # fmt: skip
ALPHABETS = (
    "aab1 .,-/:x\"'", "a1.x ", "ab.com/-@ ", "<>/ab!-&;# ='\"", "aé1_ .", ".png a/", "0123456789.x:# ", "\"' ,-_:;+.a",
    "âàãäåæçèéœžšÿñßð€‚ƒ„…†‡ˆ‰‹›˜¢£¤¥¦¬\xad¯°±²³µ¶¸¹ºª÷ a\x80\x9d\x9f", "abc \n\t\x0b\x0c\x1c\u3000\xa0-.",
)  # fmt: skip
ENCODINGS = (
    "cp1252", "latin-1", "cp1251", "cp1250", "cp1253", "cp1254", "cp1257", "mac-roman", "cp437", "iso-8859-2",
)  # fmt: skip
PLANES = ((0x20, 0x7F), (0xA0, 0x250), (0x370, 0x500), (0x2000, 0x2600), (0x3000, 0x3400), (0xFF00, 0xFFF0), (0x1F300, 0x1F700))


def words(random_: random.Random) -> str:
    return random_.choice((" ", " ", "")).join(random_.choice(WORDS) for _ in range(random_.randint(1, 12)))


def characters(random_: random.Random) -> str:
    alphabet = random_.choice(ALPHABETS)
    return "".join(random_.choice(alphabet) for _ in range(random_.randint(1, 30)))


def unicode_planes(random_: random.Random) -> str:
    return "".join(chr(random_.randrange(*random_.choice(PLANES))) for _ in range(random_.randint(1, 25)))


def mojibake(random_: random.Random) -> str:
    pool = [*WORDS, *("éàèüñ“”’—…€™ß😀猫ж" * 5)]
    parts = [random_.choice(pool) for _ in range(random_.randint(1, 8))]
    return random_.choice((" ", "")).join(_misread(p, random_) if random_.random() < 0.4 else p for p in parts)


def _misread(text: str, random_: random.Random) -> str:
    encoding = random_.choice(ENCODINGS)
    characters = (bytes([byte]).decode(encoding, "ignore") or random_.choice((chr(byte), "\ufffd")) for byte in text.encode())
    return "".join(characters).replace("\xa0", random_.choice(("\xa0", "\xa0", " ")))


@pytest.mark.parametrize("case", CASES, ids=lambda case: repr(case["input"][:40]))
def test_stored_cases(case: dict[str, str]) -> None:
    assert clean_caption(case["input"]) == case["expected"]
    assert format_prompt(case["input"], template=False) == case["expected"]
    assert format_prompt(case["input"], template=False, clean=False) == case["plain"]


@pytest.mark.parametrize("make", [words, characters, unicode_planes, mojibake])
def test_equals_the_plain_oracle(make) -> None:
    pytest.importorskip("bs4", reason="Beautiful Soup is not installed")
    pytest.importorskip("ftfy", minversion="6.3", reason="ftfy 6.3 is not installed")
    import caption_reference
    from bs4.exceptions import ParserRejectedMarkup

    random_ = random.Random(2024)
    differing, compared = [], 0
    for _ in range(2500):
        text = make(random_)
        try:
            expected = caption_reference.clean(text)
        except ParserRejectedMarkup:
            clean_caption(text)  # the reference fails here, this must not
            continue
        compared += 1
        if clean_caption(text) != expected:
            differing.append((text, clean_caption(text), expected))
    assert not differing, f"{len(differing)} differ, e.g. {differing[:3]!a}"
    assert compared > 2000


def test_oracle_agrees_with_the_stored_cases() -> None:
    pytest.importorskip("bs4", reason="Beautiful Soup is not installed")
    pytest.importorskip("ftfy", minversion="6.3", reason="ftfy 6.3 is not installed")
    import caption_reference

    for case in CASES:
        assert caption_reference.clean(case["input"]) == case["expected"]


def test_optional_packages_are_never_imported() -> None:
    # The same text with and without them: they must not even be looked for.
    program = (
        "import sys\n"
        "sys.modules.update(ftfy=None, bs4=None, lxml=None)\n"  # an import of any raises
        "from allegro_model.text import clean_caption\n"
        "assert clean_caption('<b>Caf\\u00e9</b> \\u00e2\\u20ac\\u0153 &lt; \\ufb01') == 'caf\\u00e9 \" < fi'\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=600)


@pytest.mark.parametrize(
    ("markup", "text"),
    [
        ("i <3 you", "i <3 you"), ("5 < 6 > 4", "5 < 6 > 4"), ("<p>unclosed", "unclosed"),
        ("x<!-- y -->z", "xz"), ("<script>a<b</script>c", "c"), ("<style>s</style><b>t</b>", "t"),
        ("<!doctype html>a", "a"), ("<?php x ?>y", "y"), ("a & b &c d", "a & b &c d"),
        ("&copy 2024 &notit; &foo;", "© 2024 &notit &foo"), ("&#65;&#x42;&#128;&#0;&#xd800;", "AB€\ufffd\ufffd"),
        ("<a title='&lt;'>x</a>", "x"), ("<ruby>漢<rt>kan</rt></ruby>", "漢"), ("</b>x</i>", "x"), ("", ""),
    ],
)  # fmt: skip
def test_markup(markup: str, text: str) -> None:
    assert html_to_text(markup) == text


@pytest.mark.parametrize("number", ["&#{};", "<b title='&#{};'>b</b>", "\uff06\uff03{};"])
def test_numbers_beyond_what_python_reads(number: str) -> None:
    # Beautiful Soup and html.unescape raise ValueError here.
    assert clean_caption("a cat " + number.format("9" * 5000)).startswith("a cat")


def test_refused_markup_stays_text() -> None:
    assert "a cat" in clean_caption("a cat <![x y")


@pytest.mark.parametrize(
    ("damaged", "repaired"),
    [
        ("â€œhiâ€\x9d", '"hi"'), ("itâ€™s", "it's"), ("caf√©", "café"), ("ðÿ˜€", "ðÿ˜€"), ("voilà… ß", "voilà… ß"),
        ("\ud83d\ude00 \ud83d", "😀 \ufffd"), ("a\x1b[1mb\x00\ufeff", "ab"), ("a\r\nb\rc\u2028d", "a\nb\nc\nd"),
        ("e\u0301", "é"), ("ｆｕｌｌ　ﾊﾝ", "full ハン"), ("ŉ ĳ ﬃ", "'n ij ffi"), ("\x92\x85", "'…"), ("20 £/m², 5 €", "20 £/m², 5 €"),
    ],
)  # fmt: skip
def test_repair_of_unicode(damaged: str, repaired: str) -> None:
    assert fix_text(damaged) == repaired


# Each defeats one way to write a rule carelessly: 100,000 of them took minutes or hours with plain patterns.
HOSTILE = (
    "a.", ".", "-", "1", "a1", " ", " . ", "a.com@", "a-", "x.jpg", "_", "\u0301", "â€", "1.", "1:11  ", "a_1.", "free ", "é", "1\u0660",
)  # fmt: skip


@pytest.mark.parametrize("unit", HOSTILE, ids=ascii)
def test_rules_take_linear_time(unit: str) -> None:
    text = "a1a" + unit * (100_000 // len(unit)) + "é"
    start = time.process_time()
    apply_rules(text)
    assert time.process_time() - start < 8


@pytest.mark.parametrize("unit", ["<", "<a ", "<a b='", "<!--", "</", "<a/", "&#1", "<b>", "<?"])
def test_hostile_markup_of_the_greatest_length(unit: str) -> None:
    start = time.process_time()
    clean_caption((unit * MAX_CHARACTERS)[:MAX_CHARACTERS])
    assert time.process_time() - start < 4


@pytest.mark.parametrize("clean", [True, False])
def test_too_long(clean: bool) -> None:
    with pytest.raises(TextError, match=r"100,000 characters; at most 20,000.*Shorten"):
        format_prompt("a" * 100_000, clean=clean)
    with pytest.raises(TextError, match="100,000"):
        clean_caption("a" * 100_000)
    # The template does not count.
    assert format_prompt("a " * (MAX_CHARACTERS // 2), clean=clean)


def test_templates() -> None:
    assert POSITIVE_TEMPLATE.replace("{}", "a cat;") == CASES[-2]["input"]
    assert DEFAULT_NEGATIVE == CASES[-1]["input"]
    assert format_prompt("  A Cat; ") == CASES[-2]["expected"]
    assert format_prompt("  A Cat; ", clean=False) == CASES[-2]["plain"]
    assert format_negative() == CASES[-1]["expected"]
    assert format_negative(clean=False) == CASES[-1]["plain"]
    assert format_negative("Blurry") == "blurry"


def test_prompt_with_braces_is_taken_literally() -> None:
    assert "a {0} {} {x} b" in format_prompt("a {0} {} {x} b", clean=False)


def test_cleaning_can_be_switched_off() -> None:
    prompt = "R2D2 and an epsilon sign at 1920x1080"
    assert format_prompt(prompt, template=False) == "and an ilon sign at"
    assert format_prompt(prompt, template=False, clean=False) == "r2d2 and an epsilon sign at 1920x1080"

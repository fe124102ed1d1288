"""The text of HTML-like markup, as Beautiful Soup's `html.parser` builder returns it."""

from __future__ import annotations

import html
from collections import Counter
from functools import cache
from html.entities import html5
from html.parser import HTMLParser

# Elements that never contain anything, and elements whose strings are not text of the document.
_VOID = frozenset(
    "area base br col embed hr img input keygen link menuitem meta param source track wbr"
    " basefont bgsound command frame image isindex nextid spacer".split()
)
_HIDDEN = frozenset(("script", "style", "template", "rt", "rp"))

_MAX_UNFINISHED_TAGS = 30


def html_to_text(markup: str) -> str:
    """Drop tags, comments and declarations; decode entities.

    Equal to `BeautifulSoup(markup, "html.parser").text`, except that a blank run between two tags keeps its length
    and that markup which makes that parser fail (`<![x`, a number of 5,000 digits) comes back unchanged.
    """
    if "<" not in markup and "&" not in markup:
        return markup
    parser = _TextParser()
    try:
        parser.feed(markup)
        parser.close()
    except (AssertionError, ValueError):
        return markup
    return "".join(parser.text)


@cache
def _entities() -> dict[str, str]:
    """HTML 5 entity names without semicolon, and their characters."""
    return {name.rstrip(";"): character for name, character in html5.items()}


class _TextParser(HTMLParser):
    def __init__(self) -> None:
        # References are decoded here: the base class would also decode them without a semicolon ("&copyright").
        super().__init__(convert_charrefs=False)
        self.text: list[str] = []
        self._open: list[str] = []
        self._count: Counter[str] = Counter()
        self._unfinished_tags = 0

    def check_for_whole_start_tag(self, i: int) -> int:
        # Each unfinished tag may be searched to the end of the text, which makes "<a <a <a ..." quadratic.
        if self._unfinished_tags > _MAX_UNFINISHED_TAGS:
            return -1
        end = super().check_for_whole_start_tag(i)
        self._unfinished_tags += end < 0
        return end

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in _VOID:
            self._open.append(tag)
            self._count[tag] += 1

    def handle_endtag(self, tag: str) -> None:
        # Closes everything opened since; a tag that is not open is ignored.
        while self._count[tag]:
            closed = self._open.pop()
            self._count[closed] -= 1
            if closed == tag:
                return

    def handle_data(self, data: str) -> None:
        if not any(self._count[tag] for tag in _HIDDEN):
            self.text.append(data)

    def handle_charref(self, name: str) -> None:
        # unescape knows the Windows-1252 numbers but drops control characters, which the reference keeps.
        character = html.unescape(f"&#{name};")
        if not character:
            character = chr(int(name[1:], 16) if name[0] in "xX" else int(name))
        self.handle_data(character)

    def handle_entityref(self, name: str) -> None:
        # The semicolon of an unknown name is lost, as in the reference.
        self.handle_data(_entities().get(name, f"&{name}"))

    def unknown_decl(self, data: str) -> None:
        if data.upper().startswith("CDATA["):
            self.text.append(data[len("CDATA[") :] or " ")

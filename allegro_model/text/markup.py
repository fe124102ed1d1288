"""Text of a piece of HTML, as the reference's parser returns it."""

from html.parser import HTMLParser


class _TextCollector(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self._hidden = 0

    def handle_data(self, data: str) -> None:
        if self.cdata_elem is None:
            self.parts.append(data)


def html_to_text(markup: str) -> str:
    """Parse leniently and keep the text only; entities are decoded."""
    if "<" not in markup and "&" not in markup:
        return markup
    parser = _TextCollector()
    parser.feed(markup)
    parser.close()
    return "".join(parser.parts)

"""Help pages and translations against each other; needs no ComfyUI. What the nodes say themselves: inside/checks.py."""

import ast
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "web" / "docs"
LANGUAGES = ("en", "zh")
OUTPUTS = {"en": "\n## Output", "zh": "\n## 输出"}
MISTAKES = {"en": "## Common mistakes", "zh": "## 常见错误"}
TRANSLATED_BY_COMFYUI = {"loaders", "conditioning", "latent", "sampling", "video", "utils"}


def definitions(language: str) -> dict[str, dict]:
    return json.loads((ROOT / "locales" / language / "nodeDefs.json").read_text(encoding="utf-8"))


def node_ids() -> set[str]:
    """The node_id of every definition in the sources."""
    return {str(node.value.value) for path in (ROOT / "nodes").glob("*.py") for node in ast.walk(ast.parse(path.read_text("utf-8")))
            if isinstance(node, ast.keyword) and node.arg == "node_id" and isinstance(node.value, ast.Constant)}


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_node_is_translated(language: str) -> None:
    found = definitions(language)
    assert set(found) == node_ids()
    for node_id, node in found.items():
        texts = [node["display_name"], node["description"]]
        for entry in (*node["inputs"].values(), *node["outputs"].values()):
            texts += [entry["name"], entry["tooltip"]]
        assert all(texts), node_id
        if language == "zh":
            sentences = [node["description"], *(entry["tooltip"] for part in ("inputs", "outputs") for entry in node[part].values())]
            assert all(re.search("[\u4e00-\u9fff]", sentence) for sentence in sentences), f"{node_id}: not all of it is Chinese"


def test_languages_have_the_same_entries() -> None:
    english, chinese = (definitions(language) for language in LANGUAGES)
    for node_id, node in english.items():
        for part in ("inputs", "outputs"):
            assert list(node[part]) == list(chinese[node_id][part]), node_id


def page_of(node_id: str, language: str) -> str:
    """The help page. ComfyUI looks for NODE/LANGUAGE.md and, when there is none, takes NODE.md: that is the English one."""
    name = f"{node_id}.md" if language == "en" else f"{node_id}/{language}.md"
    path = DOCS / name
    assert path.exists(), f"there is no help page web/docs/{name}"
    return path.read_text(encoding="utf-8")


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("node_id", sorted(node_ids()))
def test_help_page_explains_every_input_and_output(node_id: str, language: str) -> None:
    page, node = page_of(node_id, language), definitions(language)[node_id]
    assert page.startswith(f"# {node['display_name']}\n")
    inputs, _, rest = page.partition(OUTPUTS[language])
    assert re.findall(r"^\| `(\w+)` \|", inputs, re.MULTILINE) == list(node["inputs"])
    assert len(re.findall(r"^\| \w+ \|", rest.split("\n## ")[0], re.MULTILINE)) == len(node["outputs"]) + 1  # the head
    assert MISTAKES[language] in page


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("node_id", sorted(node_ids()))
def test_help_page_shows_the_node(node_id: str, language: str) -> None:
    """Links of a page are taken relative to web/docs in every language."""
    pictures = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", page_of(node_id, language))
    assert f"images/{node_id}.webp" in pictures
    for picture in pictures:
        assert (DOCS / picture).stat().st_size < 60_000, picture


def test_no_page_or_picture_is_left_over() -> None:
    known = node_ids()
    assert {path.stem for path in DOCS.glob("*.md")} == known
    assert {path.name for path in DOCS.iterdir() if path.is_dir()} == known | {"images"}
    assert {path.stem.split("-")[0] for path in (DOCS / "images").iterdir()} == known


def test_pages_in_both_languages_have_the_same_parts() -> None:
    """Headings, paragraphs, table rows, points and lines of code in the same number: nothing was forgotten in a translation."""
    for node_id in node_ids():
        english, chinese = (page_of(node_id, language) for language in LANGUAGES)
        for pattern in (r"^#+ ", r"^$", r"^\|", r"^- ", r"^    \S"):
            counts = [len(re.findall(pattern, page, re.MULTILINE)) for page in (english, chinese)]
            assert counts[0] == counts[1], f"{node_id}, {pattern!r}: {counts[0]} in English, {counts[1]} in Chinese"


@pytest.mark.parametrize("language", ["zh"])
def test_menu_is_translated(language: str) -> None:
    """The categories that ComfyUI does not translate itself."""
    main = json.loads((ROOT / "locales" / language / "main.json").read_text(encoding="utf-8"))
    used = {part for path in (ROOT / "nodes").glob("*.py") for part in re.findall(r'category="(\w+)"', path.read_text("utf-8"))}
    assert used - TRANSLATED_BY_COMFYUI <= main["nodeCategories"].keys()

"""Help pages and translations against each other; needs no ComfyUI. What the nodes say themselves: inside/checks.py."""

import ast
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LANGUAGES = ("en", "zh")


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


def test_languages_have_the_same_entries() -> None:
    english, chinese = (definitions(language) for language in LANGUAGES)
    for node_id, node in english.items():
        for part in ("inputs", "outputs"):
            assert list(node[part]) == list(chinese[node_id][part]), node_id


@pytest.mark.parametrize("node_id", sorted(node_ids()))
def test_help_page_explains_every_input(node_id: str) -> None:
    page = (ROOT / "web" / "docs" / f"{node_id}.md").read_text(encoding="utf-8")
    assert page.startswith(f"# {definitions('en')[node_id]['display_name']}\n")
    explained = re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)
    assert explained == list(definitions("en")[node_id]["inputs"])
    assert "## Common mistakes" in page

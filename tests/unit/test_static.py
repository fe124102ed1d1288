"""Rules that hold for every file, checked on text and syntax trees: forbidden calls, documents, workflows, metadata."""

import ast
import json
import re
import subprocess
import tokenize
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CODE = [p for top in ("allegro_model", "nodes") for p in sorted((ROOT / top).rglob("*.py"))] + [
    p for p in [ROOT / "__init__.py"] if p.exists()]
WORKFLOWS = sorted((ROOT / "workflows").glob("*.json"))
API_WORKFLOWS = sorted((ROOT / "workflows" / "api").glob("*.json"))
# Those of earlier versions. Users have saved graphs like these; they stay as they were and stay valid.
EARLIER = sorted((ROOT / "tests" / "data" / "workflows").glob("*/*.json"))
EARLIER_API = sorted((ROOT / "tests" / "data" / "workflows").glob("*/api/*.json"))


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


# Forbidden calls. The registry of ComfyUI refuses the first group; the others are promises of SECURITY.md.

FORBIDDEN_CALLS = {
    "eval", "exec", "compile", "__import__", "os.system", "os.popen", "pickle.load", "pickle.loads", "pickle.Unpickler",
    "torch.hub.load", "logging.basicConfig", "torch.manual_seed", "random.seed", "numpy.random.seed", "np.random.seed",
    "sys.path.append", "sys.path.insert", "sys.path.extend", "builtins.eval", "builtins.exec",
}
NODES_ONLY = {"subprocess", "socket", "urllib.request", "requests", "http.client"}
# The command line speaks to a person; the training command reports its progress the same way.
MAY_PRINT = ("allegro_model/cli/", "allegro_model/training/")
# Processes of our own, where nobody else's logging or random state can be disturbed.
OWN_PROCESS = {"logging.basicConfig": "allegro_model/training/", "torch.manual_seed": "allegro_model/training/"}


def dotted(node: ast.expr) -> str:
    """`a.b.c` of a name or attribute chain, else an empty string."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return ""


def forbidden(path: Path, name: str) -> Iterator[str]:
    """One line per forbidden thing in the Python file `path`, called `name` in the project."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            called = dotted(node.func)
            if called in FORBIDDEN_CALLS and not name.startswith(OWN_PROCESS.get(called, "-")):
                yield f"line {node.lineno}: {called}()"
            if called == "print" and not name.startswith(MAY_PRINT):
                yield f"line {node.lineno}: print()"
            if called == "torch.load" and not any(
                    k.arg == "weights_only" and isinstance(k.value, ast.Constant) and k.value.value is True
                    for k in node.keywords):
                yield f"line {node.lineno}: torch.load() without weights_only=True"
            if any(k.arg == "shell" and not (isinstance(k.value, ast.Constant) and k.value.value is False)
                   for k in node.keywords):
                yield f"line {node.lineno}: shell="
        if isinstance(node, ast.Import | ast.ImportFrom) and name.startswith("nodes/"):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            yield from (f"line {node.lineno}: import {n}" for n in names if n in NODES_ONLY)
        if isinstance(node, ast.ExceptHandler) and node.type is None:
            yield f"line {node.lineno}: except without a type"
    with path.open("rb") as file:
        yield from (f"line {token.start[0]}: two statements on one line"
                    for token in tokenize.tokenize(file.readline) if token.type == tokenize.OP and token.string == ";")


@pytest.mark.parametrize("path", CODE, ids=relative)
def test_no_forbidden_call(path: Path) -> None:
    found = list(forbidden(path, relative(path)))
    assert not found, f"{relative(path)}: {'; '.join(found)}"


@pytest.mark.parametrize("line", [
    "eval('1')", "exec('1')", "os.system('ls')", "torch.load(f)", "torch.load(f, weights_only=False)", "print(1)",
    "import subprocess", "a = 1; b = 2", "sys.path.insert(0, '.')", "f(shell=True)", "torch.manual_seed(0)",
])
def test_each_forbidden_thing_is_seen(line: str, tmp_path: Path) -> None:
    file = tmp_path / "bad.py"
    file.write_text(line + "\n")
    assert list(forbidden(file, "nodes/bad.py"))


# Text of every tracked file

TEXT_SUFFIXES = {".py", ".md", ".toml", ".json", ".yaml", ".yml", ".js", ".ini", ".cfg", ".txt", ""}
MACHINE_PATH = re.compile(r"(?<![\w./:~{}$-])/(?:root|home|work|opt|mnt|Users)/\w")
PACKAGE_HOST = re.compile(r"https?://[^\s)\"']*(?:pypi|pythonhosted|/simple\b|whl/)|(?:extra-)?index-url", re.IGNORECASE)


def tracked_text() -> list[Path]:
    """Files under version control, or, outside a checkout, every file that is not hidden."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode == 0:
        paths = [ROOT / name for name in listed.stdout.split("\0") if name]
    else:
        paths = [p for p in ROOT.rglob("*") if not any(part.startswith(".") for part in p.relative_to(ROOT).parts)]
    return [p for p in paths if p.is_file() and p.suffix in TEXT_SUFFIXES and p != Path(__file__)]


def test_no_machine_is_named() -> None:
    """No absolute path of somebody's machine and no address of somebody's package index."""
    found = []
    for path in tracked_text():
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if MACHINE_PATH.search(line) or PACKAGE_HOST.search(line):
                found.append(f"{relative(path)}:{number}: {line.strip()[:80]}")
    assert not found, "\n".join(found)


# Metadata


def pyproject() -> str:
    return (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def test_hard_dependencies_are_what_every_comfyui_has() -> None:
    found = re.search(r"^dependencies = \[(.*?)\]", pyproject(), re.MULTILINE | re.DOTALL)
    assert found is not None
    names = re.findall(r'"([^"]+)"', found.group(1))
    assert set(names) <= {"safetensors", "einops"}, "other packs and ComfyUI own the versions of everything else"


def test_registry_metadata() -> None:
    text = pyproject()
    name = re.search(r'^name = "(.*)"', text, re.MULTILINE)
    assert name is not None
    assert "comfyui" not in name.group(1).lower()
    comfy = text.split("[tool.comfy]")[1].split("\n[")[0]
    keys = set(re.findall(r"^([\w-]+) =", comfy, re.MULTILINE))
    assert {"PublisherId", "DisplayName", "Icon", "Banner", "requires-comfyui"} <= keys
    assert "web" not in keys, "the folder is registered by WEB_DIRECTORY; a second time would load every script twice"
    assert 'requires-comfyui = ">=0.3.64"' in comfy


def test_version_is_the_same_everywhere_and_in_the_changelog() -> None:
    version = re.search(r'^version = "(.*)"', pyproject(), re.MULTILINE)
    assert version is not None
    assert f'__version__ = "{version.group(1)}"' in (ROOT / "allegro_model" / "__init__.py").read_text(encoding="utf-8")
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"## [{version.group(1)}]" in changelog or "## [Unreleased]" in changelog


# Workflows


def our_node_ids() -> set[str]:
    """The node_id of every node the package defines, read from the sources."""
    ids = set()
    for path in (ROOT / "nodes").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.keyword) and node.arg == "node_id" and isinstance(node.value, ast.Constant):
                ids.add(str(node.value.value))
    return ids


# Nodes of ComfyUI itself (0.3.64) that the example graphs use, and notes of the editor.
CORE_NODES = {
    "KSampler", "SamplerCustomAdvanced", "CFGGuider", "RandomNoise", "KSamplerSelect", "BasicScheduler", "BasicGuider",
    "CLIPTextEncode", "VAEDecode", "VAEDecodeTiled", "VAEEncode", "ImageScale", "CreateVideo", "SaveVideo", "SaveLatent", "LoadVideo",
    "GetVideoComponents", "LoadImage", "ImageFromBatch", "PreviewImage", "SaveImage", "LoraLoaderModelOnly", "EasyCache",
    "TorchCompileModel", "SaveAnimatedWEBP", "PrimitiveInt", "PrimitiveFloat", "PrimitiveStringMultiline",
}
EDITOR_NODES = {"Note", "MarkdownNote", "Reroute"}
# What the editor adds behind a seed widget; it is not an input of the node.
SEED_MODES = {"fixed", "randomize", "increment", "decrement"}


def load(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def inputs_of_our_nodes() -> dict[str, set[str]]:
    """{node id: its inputs}; a test inside ComfyUI holds the translations against the nodes themselves."""
    nodes = load(ROOT / "locales" / "en" / "nodeDefs.json")
    return {node_id: set(node["inputs"]) for node_id, node in nodes.items()}


def test_earlier_workflows_are_kept() -> None:
    assert len(EARLIER) == len(EARLIER_API) >= 9


def test_workflows_are_numbered_without_a_gap() -> None:
    """ComfyUI shows templates by file name; the numbers are the order to try them in."""
    assert [path.name[:3] for path in WORKFLOWS] == [f"{i:02d}_" for i in range(1, len(WORKFLOWS) + 1)]
    assert [path.name for path in API_WORKFLOWS] == [path.name for path in WORKFLOWS]


@pytest.mark.parametrize("path", WORKFLOWS, ids=relative)
def test_workflow_has_a_note_and_a_picture(path: Path) -> None:
    picture = path.with_suffix(".jpg")
    assert picture.exists(), f"{relative(path)} has no thumbnail {picture.name}"
    assert picture.stat().st_size < 30_000
    (text,) = [node["widgets_values"][0] for node in load(path)["nodes"] if node["type"] == "MarkdownNote"]
    for subject in ("**Files**", "**Memory**", "**Time**", "**What to change**"):
        assert subject in text, f"{relative(path)}: the note says nothing about {subject}"
    if "safetensors" in text:
        assert re.search(r"\]\(https://(huggingface\.co|github\.com)/", text), f"{relative(path)}: files without a link"
    named = {name for name in re.findall(r"\*\*(\d\d_\w+)\*\*", text)}
    assert named <= {other.stem for other in WORKFLOWS}, f"{relative(path)}: the note names a workflow that does not exist"


@pytest.mark.parametrize("path", API_WORKFLOWS + EARLIER_API, ids=relative)
def test_api_workflow_is_whole(path: Path) -> None:
    graph = load(path)
    ours = inputs_of_our_nodes()
    assert {n["class_type"] for n in graph.values()} <= our_node_ids() | CORE_NODES
    for key, node in graph.items():
        if node["class_type"] in ours:
            assert set(node["inputs"]) <= ours[node["class_type"]], f"node {key}: the node has no such input any more"
    for key, node in graph.items():
        for name, value in node["inputs"].items():
            if isinstance(value, list):
                assert len(value) == 2, f"node {key}, input {name}: a link is [node id, output index]"
                assert value[0] in graph, f"node {key}, input {name}: there is no node {value[0]}"


@pytest.mark.parametrize("path", WORKFLOWS + EARLIER, ids=relative)
def test_ui_workflow_links_are_consistent(path: Path) -> None:
    graph = load(path)
    nodes = {n["id"]: n for n in graph["nodes"]}
    links = {link[0]: link for link in graph["links"]}
    assert len(nodes) == len(graph["nodes"])
    assert len(links) == len(graph["links"])
    assert graph["last_node_id"] >= max(nodes)
    assert graph["last_link_id"] >= max(links)
    assert {n["type"] for n in nodes.values()} <= our_node_ids() | CORE_NODES | EDITOR_NODES
    for number, source, out_slot, target, in_slot, kind in links.values():
        output, entry = nodes[source]["outputs"][out_slot], nodes[target]["inputs"][in_slot]
        assert number in (output["links"] or []), f"link {number}: not listed by its source"
        assert entry["link"] == number, f"link {number}: not listed by its target"
        assert output["type"] == kind, f"link {number}: {output['type']} is announced as {kind}"
    listed = [i["link"] for n in nodes.values() for i in n.get("inputs", []) if i.get("link") is not None]
    assert sorted(listed) == sorted(links), "an input names a link that does not exist, or the reverse"


def widget_values(node: dict) -> list:
    """Values of a UI node in the order of its widgets, without the mode behind a seed and what a link replaces."""
    linked = [entry["link"] is not None for entry in node.get("inputs", []) if "widget" in entry]
    values = [v for v in node.get("widgets_values") or [] if not (isinstance(v, str) and v in SEED_MODES)]
    return [v for v, is_linked in zip_longest(values, linked, fillvalue=False) if not is_linked]


@pytest.mark.parametrize("path", WORKFLOWS + EARLIER, ids=relative)
def test_ui_and_api_form_agree(path: Path) -> None:
    api_path = path.parent / "api" / path.name
    assert api_path.exists(), f"{relative(path)} has no API form"
    api, ui = load(api_path), [n for n in load(path)["nodes"] if n["type"] not in EDITOR_NODES]
    assert sorted(n["type"] for n in ui) == sorted(n["class_type"] for n in api.values())
    by_class: dict[str, list[list]] = {}
    for node in api.values():
        values = [v for v in node["inputs"].values() if not isinstance(v, list)]
        by_class.setdefault(node["class_type"], []).append(values)
    for node in ui:
        assert widget_values(node) in by_class[node["type"]], f"{node['type']}: {widget_values(node)} is not in the API form"


@pytest.mark.parametrize("path", WORKFLOWS + API_WORKFLOWS + EARLIER + EARLIER_API, ids=relative)
def test_workflow_names_no_absolute_path(path: Path) -> None:
    def strings(value: object) -> Iterator[str]:
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict | list):
            for item in value.values() if isinstance(value, dict) else value:
                yield from strings(item)

    bad = [s for s in strings(load(path)) if re.match(r"(/|[A-Za-z]:[\\/]|\\\\)\S", s)]
    assert not bad

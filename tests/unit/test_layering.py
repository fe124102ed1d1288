"""Imports point one way only (the table in CONTRIBUTING.md). Reads syntax trees; needs neither torch nor ComfyUI."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "allegro_model"

BASE = {"errors", "config", "atomic"}
SHARED = BASE | {"attention", "ops", "geometry", "tensors", "costs", "quantised"}
STAGES = SHARED | {"dit", "vae", "text", "vfi"}
PIPELINE = STAGES | {"sampling", "loading", "media", "memory", "streaming", "compiling", "conditioning", "joining", "prompt_store"}
COMMANDS = PIPELINE | {"pipeline", "latents", "calibration", "download", "client"}
ALLOWED = {
    "errors": set(),
    "atomic": {"errors"},
    "config": {"errors"},
    "attention": BASE,
    "convolution": BASE,
    "ops": BASE | {"convolution"},
    "geometry": BASE,
    "costs": BASE | {"geometry"},
    "tensors": BASE,
    "quantised": BASE,
    "conditioning": BASE | {"geometry"},
    "joining": BASE,
    "dit": SHARED,
    "vae": SHARED | {"memory"},
    "text": SHARED,
    "vfi": SHARED,
    "sampling": STAGES,
    "loading": STAGES,
    "media": SHARED,
    "memory": BASE,
    "streaming": BASE,
    "prompt_store": BASE | {"media"},
    "compiling": BASE | {"attention", "dit", "memory"},
    "pipeline": PIPELINE,
    "latents": PIPELINE | {"pipeline"},
    "calibration": PIPELINE | {"pipeline"},
    "download": BASE | {"loading", "media"},
    "client": BASE,
    "bench": PIPELINE | {"pipeline"},
    "cli": COMMANDS | {"bench"},
    "training": COMMANDS,
    "__init__": COMMANDS,
    "__main__": {"cli"},
}
THIRD_PARTY_AT_IMPORT = {"torch", "numpy", "safetensors"}
NEVER = {"comfy", "comfy_api", "comfy_extras", "folder_paths", "latent_preview", "nodes", "diffusers"}

Import = tuple[int, str, bool]  # line, absolute dotted name (relative ones start with "."), at module level


def imports(path: Path) -> Iterator[Import]:
    """Every import of a file; those below `if TYPE_CHECKING:` are for the type checker only and left out."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inside = {id(n) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef | ast.AsyncFunctionDef) for n in ast.walk(f)}
    typing_only = {id(n) for i in ast.walk(tree) if isinstance(i, ast.If) and "TYPE_CHECKING" in ast.dump(i.test)
                   for n in ast.walk(i)}
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name, id(node) not in inside) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            prefix = "." * node.level + (node.module or "")
            names = [prefix] if node.module else [prefix + alias.name for alias in node.names]
            yield from ((node.lineno, name, id(node) not in inside) for name in names)


def package_files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def target_of(path: Path, name: str) -> str | None:
    """First component below allegro_model that a relative import reaches; None for an absolute import."""
    if not name.startswith("."):
        return None
    level = len(name) - len(name.lstrip("."))
    package = path.relative_to(PACKAGE).parent.parts
    assert level <= len(package) + 1, f"{path}: import {name} leaves the package"
    parts = package[: len(package) - level + 1] + tuple(name.lstrip(".").split("."))
    return parts[0]


@pytest.mark.parametrize("path", package_files(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_package_imports_point_down(path: Path) -> None:
    owner = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    assert owner in ALLOWED, f"{owner} is new: give it a place in ALLOWED and in CONTRIBUTING.md"
    wrong = []
    for line, name, at_module_level in imports(path):
        top, target = name.split(".")[0], target_of(path, name)
        if target is not None:
            is_module = (PACKAGE / target).exists() or (PACKAGE / f"{target}.py").exists()
            ok = target == owner or target in ALLOWED[owner] or not is_module  # else: a name of the package itself
        else:
            ok = top not in NEVER | {"allegro_model"} and (
                not at_module_level or top in THIRD_PARTY_AT_IMPORT or top in sys.stdlib_module_names)
        if not ok:
            wrong.append(f"line {line}: {name}")
    assert not wrong, f"{path.relative_to(ROOT)} may not import: {'; '.join(wrong)}"


def node_files() -> list[Path]:
    """Files of the nodes, less the bridge and the schema, which are where the host may be imported."""
    return [p for p in sorted((ROOT / "nodes").rglob("*.py")) if p.parent.name != "bridge" and p.name != "schema.py"]


@pytest.mark.parametrize("path", node_files(), ids=lambda p: str(p.relative_to(ROOT)))
def test_only_the_bridge_imports_the_host(path: Path) -> None:
    wrong = [f"line {line}: {name}" for line, name, _ in imports(path) if name.split(".")[0] in NEVER]
    assert not wrong, f"{path.relative_to(ROOT)} goes round nodes/bridge: {'; '.join(wrong)}"


def test_the_walk_sees_a_forbidden_import(tmp_path: Path) -> None:
    file = tmp_path / "bad.py"
    file.write_text("import comfy.utils\ndef f():\n    from diffusers import x\n    from ..vae import tiling\n")
    found = list(imports(file))
    assert found == [(1, "comfy.utils", True), (3, "diffusers", False), (4, "..vae", False)]


def test_importing_does_not_bring_the_compiler() -> None:
    """A decorator of torch.compiler imports it, which takes seconds in every start; a call where it is needed does not."""
    for path in sorted([*PACKAGE.rglob("*.py"), *(ROOT / "nodes").rglob("*.py")]):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            found = [ast.unparse(decorator) for decorator in getattr(node, "decorator_list", [])]
            assert not any(name.startswith("torch.compile") for name in found), f"{path}:{node.lineno}: {found}"

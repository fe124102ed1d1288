"""What is published: the contents of the archive, the pictures, and the files that a code host reads."""

import os
import re
import shutil
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from archive import ROOT, archive_files, listed, write_archive
from PIL import Image

LIMIT = 14_000_000  # bytes; 12 of them are the bundled models


def test_archive_is_small(tmp_path: Path) -> None:
    assert write_archive(tmp_path / "node.zip").stat().st_size < LIMIT


def test_archive_has_no_file_for_developers() -> None:
    tops = {name.split("/")[0] for name in archive_files()}
    assert tops == {"CHANGELOG.md", "LICENSE", "NOTICE", "README.md", "SECURITY.md", "__init__.py", "allegro_model", "docs",
                    "locales", "nodes", "pyproject.toml", "web", "workflows"}
    assert [name for name in archive_files() if name.startswith("docs/")] == ["docs/scripts.md"]


@pytest.mark.parametrize("folder", ["allegro_model", "locales", "nodes", "web", "workflows"])
def test_archive_has_every_file_of(folder: str) -> None:
    assert {n for n in archive_files() if n.startswith(folder + "/")} == set(listed(folder))


def test_archive_holds_what_is_on_disk(tmp_path: Path) -> None:
    with zipfile.ZipFile(write_archive(tmp_path / "node.zip")) as archive:
        assert archive.namelist() == archive_files()
        assert archive.read("nodes/schema.py") == (ROOT / "nodes" / "schema.py").read_bytes()


def test_pictures_have_the_shapes_that_the_registry_asks_for() -> None:
    with Image.open(ROOT / "docs" / "icon.png") as icon:
        assert icon.width == icon.height <= 400
    with Image.open(ROOT / "docs" / "banner.png") as banner:
        assert banner.width * 9 == banner.height * 21
    assert (ROOT / "docs" / "banner.png").stat().st_size < 300_000


# Files that a code host reads

GITHUB = ROOT / ".github"
WORKFLOWS = sorted((GITHUB / "workflows").glob("*.yml"))
FORMS = [path for path in sorted((GITHUB / "ISSUE_TEMPLATE").glob("*.yml")) if path.name != "config.yml"]


def read(path: Path) -> dict[Any, Any]:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def steps(workflow: dict[Any, Any], job: str) -> list[dict[str, Any]]:
    return workflow["jobs"][job]["steps"]


def commands(workflow: dict[Any, Any], job: str) -> str:
    return "\n".join(step.get("run", "") for step in steps(workflow, job))


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflow_pins_its_actions_and_asks_for_little(path: Path) -> None:
    workflow = read(path)
    assert workflow["permissions"] == {"contents": "read"}
    # YAML 1.1 reads the key `on` as true.
    assert "pull_request_target" not in workflow[True], "it would run the code of a stranger with the project's secrets"
    for job in workflow["jobs"].values():
        for step in job.get("steps", []):
            assert "uses" not in step or re.fullmatch(r"[\w.-]+/[\w.-]+@v\d+", step["uses"]), step
    secrets = set(re.findall(r"secrets\.(\w+)", path.read_text(encoding="utf-8")))
    assert secrets <= {"REGISTRY_ACCESS_TOKEN"}


def test_every_system_runs_the_tests() -> None:
    workflow = read(GITHUB / "workflows" / "test.yml")
    run = workflow["jobs"]["run"]
    assert run["strategy"]["matrix"]["os"] == ["ubuntu-latest", "macos-latest", "windows-latest"]
    assert run["defaults"]["run"]["shell"] == "bash", "Windows has its own, which cannot run .ci/run"
    for job in ("run", "python", "comfyui"):
        assert ".ci/run" in commands(workflow, job).splitlines()


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize(("system", "folder"), [("Windows_NT", "Scripts"), ("", "bin")])
def test_make_finds_the_commands_of_the_environment(system: str, folder: str) -> None:
    found = subprocess.run(["make", "--dry-run", "--always-make", "test"], cwd=ROOT, capture_output=True, text=True, check=True,
                           env={**os.environ, "OS": system})
    for command in ("ruff", "mypy", "pytest"):
        assert f".venv/{folder}/{command}" in found.stdout


def test_oldest_python_and_comfyui_are_those_that_are_promised() -> None:
    promised = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    workflow = read(GITHUB / "workflows" / "test.yml")
    (python,) = [s["with"]["python-version"] for s in steps(workflow, "python") if "with" in s]
    assert f'requires-python = ">={python}"' in promised
    oldest, newest = workflow["jobs"]["comfyui"]["strategy"]["matrix"]["version"]
    assert f'requires-comfyui = ">={oldest}"' in promised
    assert newest == "latest"
    assert workflow["jobs"]["comfyui"]["env"]["PYTEST_ARGS"] == "-m comfy"


def test_publishing_waits_for_the_tests_and_checks_the_tag() -> None:
    workflow = read(GITHUB / "workflows" / "publish.yml")
    assert list(workflow[True]) == ["push"]
    assert list(workflow[True]["push"]) == ["tags"]
    assert workflow["jobs"]["publish"]["needs"] == "test"
    assert workflow["jobs"]["test"]["uses"] == "./.github/workflows/test.yml"
    assert "GITHUB_REF_NAME" in commands(workflow, "publish")
    assert "workflow_call" in read(GITHUB / "workflows" / "test.yml")[True]


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_issue_form_is_whole(path: Path) -> None:
    form = read(path)
    assert {"name", "description", "body"} <= set(form)
    ids = [field["id"] for field in form["body"] if field["type"] != "markdown"]
    assert len(ids) == len(set(ids)) > 0
    for field in form["body"]:
        assert field["type"] in {"markdown", "textarea", "input", "dropdown"}
        assert field["type"] == "markdown" or field["attributes"]["label"]
        assert field["type"] != "dropdown" or len(field["attributes"]["options"]) > 1


def test_a_bug_report_has_what_is_needed_to_find_the_bug() -> None:
    fields = {field.get("id"): field for field in read(GITHUB / "ISSUE_TEMPLATE" / "bug.yml")["body"]}
    needed = {key for key, field in fields.items() if field.get("validations", {}).get("required")}
    assert {"what", "log", "version", "comfyui", "gpu", "system"} <= needed
    assert "workflow" in fields


# docs/expectations.md


def test_every_test_that_is_named_as_evidence_exists() -> None:
    text = (ROOT / "docs" / "expectations.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`([\w/]+\.py)::(\w+)`", text))
    assert len(named) > 80
    missing = [f"{file}::{name}" for file, name in sorted(named)
               if f"def {name}(" not in (ROOT / "tests" / file).read_text(encoding="utf-8")]
    assert not missing


def test_every_expectation_is_answered() -> None:
    """One row each, with an answer, and a reason where the answer is not a plain yes."""
    text = (ROOT / "docs" / "expectations.md").read_text(encoding="utf-8")
    rows = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("| ") and not line.startswith("| asked for")]
    assert len(rows) > 100
    for row in rows:
        assert len(row) == 3, row
        assert row[1].strip() in {"yes", "partly", "no", "-"}, row
        assert row[2].strip(), row
    answers = [row[1].strip() for row in rows]
    count = {answer: answers.count(answer) for answer in ("yes", "partly", "no", "-")}
    assert (f"Of {len(rows)} points: {count['yes']} yes, {count['partly']} partly, {count['no']} no, {count['-']} do not arise."
            in text), count

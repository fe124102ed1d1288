"""Reports the checks that run inside ComfyUI (inside/checks.py), one test each."""

from pathlib import Path

import pytest

pytestmark = pytest.mark.comfy

CHECKS = [line.split("(")[0].removeprefix("def ")
          for line in (Path(__file__).parent / "inside" / "checks.py").read_text(encoding="utf-8").splitlines()
          if line.startswith("def check_")]


@pytest.mark.parametrize("name", CHECKS)
def test_inside_comfyui(inside: dict[str, str | None], name: str) -> None:
    problem = inside.get(name, "it did not run: the process ended before")
    if problem is not None and problem.startswith("skipped: "):
        pytest.skip(problem.removeprefix("skipped: "))
    assert problem is None, problem

"""Reports the checks that run inside ComfyUI (inside/*checks.py), one test each."""

import pytest
from comfy.conftest import checks

pytestmark = pytest.mark.comfy


@pytest.mark.parametrize("name", checks())
def test_inside_comfyui(inside: dict[str, str | None], name: str) -> None:
    problem = inside.get(name, "it did not run: the process ended before")
    if problem is not None and problem.startswith("skipped: "):
        pytest.skip(problem.removeprefix("skipped: "))
    assert problem is None, problem

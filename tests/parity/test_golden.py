"""Every stored reference case: the committed ones, and those of the folders given with --golden."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from parity.cases import Case, tensor_cases, text_cases
from parity.kinds import KINDS

from allegro_model.text import clean_caption

COMMITTED = Path(__file__).parent / "golden"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    folders = [COMMITTED, *(Path(name).resolve() for name in metafunc.config.getoption("golden"))]
    if "case" in metafunc.fixturenames:
        metafunc.parametrize("case", [c for f in folders for c in tensor_cases(f)], ids=lambda c: c.id)
    if "text_case" in metafunc.fixturenames:
        cases = [(f"{f.parent.name}/{f.name}/text{i:03d}", c) for f in folders for i, c in enumerate(text_cases(f))]
        metafunc.parametrize("text_case", [c for _, c in cases], ids=[name for name, _ in cases])


def test_case(case: Case) -> None:
    assert case.kind in KINDS, f"{case.id}: unknown kind {case.kind!r}; known: {', '.join(sorted(KINDS))}"
    with torch.inference_mode():
        actual = KINDS[case.kind](case)
    expected = case.expected
    assert expected, f"{case.id}: nothing to compare with"
    missing = sorted(set(expected) - set(actual))
    assert not missing, f"{case.id}: kind {case.kind!r} does not compute {', '.join(missing)}"
    for name, value in expected.items():
        torch.testing.assert_close(actual[name].to(value.dtype), value, **case.tolerance(name),
                                   msg=lambda text, name=name: f"{case.id}, {name}: {text}")


def test_text_case(text_case: Mapping[str, str]) -> None:
    assert clean_caption(text_case["input"]) == text_case["expected"]

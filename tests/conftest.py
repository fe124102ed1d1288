"""Options of all tests."""

import os

import pytest

# The networks here are tiny: a second thread costs more than it brings, on a busy machine a hundred times more. Set
# before torch is imported; child processes inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What stays in one process of `-n`: a file, and all tests that share a server, its browser or its model folder."""
    for item in items:
        params = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
        shared = params.get("front_end") or params.get("comfyui")
        group = str(item.path) if shared is None or item.path.name == "test_inside.py" else ""
        item.add_marker(pytest.mark.xdist_group(f"{item.path.parent.name} {shared} {group}"))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--golden", metavar="DIR", action="append", default=[],
                     help="also run every case of every index (*.json) in DIR through tests/parity")

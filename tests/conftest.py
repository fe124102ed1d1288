"""Options of all tests."""

import os
import re
from typing import Any

import pytest

# The networks here are tiny: a second thread costs more than it brings, on a busy machine a hundred times more. Set
# before torch is imported; child processes inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """What stays in one process of `-n`: a file, and all tests that share a ComfyUI server or a browser."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):  # type: ignore[misc, unused-ignore]
        def _split_scope(self, nodeid: str) -> str:
            file, _, test = nodeid.partition("::")
            version = re.search(r"\[(\d+\.\d+\.\d+)", test)  # of ComfyUI: the first parameter
            if version is None or file.endswith("test_inside.py"):
                return file + (version[1] if version else "")
            return f"comfy {version[1]}" if file.startswith("comfy/") else nodeid.partition("[")[2]

    config.option.loadscopereorder = False  # those with servers come first: they take longest
    return Scheduling(config, log)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--golden", metavar="DIR", action="append", default=[],
                     help="also run every case of every index (*.json) in DIR through tests/parity")

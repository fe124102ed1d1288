"""Options of all tests."""

import os

import pytest

# The networks here are tiny: a second thread costs more than it brings, on a busy machine a hundred times more. Set
# before torch is imported; child processes inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--golden", metavar="DIR", action="append", default=[],
                     help="also run every case of every index (*.json) in DIR through tests/parity")

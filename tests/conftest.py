"""Options of all tests."""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--golden", metavar="DIR", action="append", default=[],
                     help="also run every case of every index (*.json) in DIR through tests/parity")

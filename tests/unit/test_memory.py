"""Free memory: what the kernel says, less what a container allows, and None where nobody says anything."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

from allegro_model import memory
from allegro_model.memory import free_bytes, total_bytes

CPU = torch.device("cpu")


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stands in for the files of the kernel: 8 GiB, of which 5 are available, no container."""
    (tmp_path / "meminfo").write_text(f"MemTotal: {8 * 2**20} kB\nMemFree: {2**20} kB\nMemAvailable: {5 * 2**20} kB\n")
    group = tuple(str(tmp_path / name) for name in ("limit", "usage", "stat"))
    monkeypatch.setattr(memory, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "_CONTAINER", ((*group, "inactive_file"),))
    return tmp_path


def test_this_machine() -> None:
    free, total = free_bytes(CPU), total_bytes(CPU)
    assert free is not None
    assert total is not None
    assert 2**20 < free < total < 2**45


def test_cached_files_count_as_free(kernel: Path) -> None:
    assert free_bytes(CPU) == 5 * 2**30
    assert total_bytes(CPU) == 8 * 2**30


def test_a_container_limits(kernel: Path) -> None:
    (kernel / "limit").write_text(f"{3 * 2**30}\n")
    (kernel / "usage").write_text(f"{2 * 2**30}\n")
    (kernel / "stat").write_text(f"anon 12\ninactive_file {2**29}\nactive_file 7\n")
    assert free_bytes(CPU) == 3 * 2**29
    assert total_bytes(CPU) == 3 * 2**30
    (kernel / "stat").unlink()
    assert free_bytes(CPU) == 2**30
    (kernel / "usage").write_text(f"{4 * 2**30}\n")
    assert free_bytes(CPU) == 0


@pytest.mark.parametrize("limit", ["max", str(2**63 - 4096)])
def test_a_container_without_a_limit(kernel: Path, limit: str) -> None:
    (kernel / "limit").write_text(limit)
    (kernel / "usage").write_text("5")
    assert free_bytes(CPU) == 5 * 2**30


def test_other_systems(kernel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (kernel / "meminfo").unlink()
    monkeypatch.setitem(sys.modules, "psutil", None)
    monkeypatch.setattr(os, "sysconf_names", {"SC_PHYS_PAGES": 1, "SC_AVPHYS_PAGES": 2, "SC_PAGE_SIZE": 3}, raising=False)
    monkeypatch.setattr(os, "sysconf", {"SC_PHYS_PAGES": 10, "SC_AVPHYS_PAGES": 4, "SC_PAGE_SIZE": 4096}.get, raising=False)
    assert (free_bytes(CPU), total_bytes(CPU)) == (4 * 4096, 10 * 4096)
    monkeypatch.setattr(os, "sysconf_names", {}, raising=False)
    assert (free_bytes(CPU), total_bytes(CPU)) == (None, None)


def test_devices_that_do_not_tell() -> None:
    assert free_bytes(torch.device("meta")) is None
    assert total_bytes(torch.device("meta")) is None

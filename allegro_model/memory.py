"""How much memory a device has. None means unknown; then nothing is refused for lack of it."""

from __future__ import annotations

import os

import torch


def free_bytes(device: torch.device) -> int | None:
    """Bytes that could be allocated on `device` now."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + unused
    return _host("available") if device.type == "cpu" else None


def total_bytes(device: torch.device) -> int | None:
    """Bytes `device` has in all. Choices that change rounding rest on this, so that they never change
    between two runs."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    return _host("total") if device.type == "cpu" else None


def _host(what: str) -> int | None:
    """Memory of the machine: by psutil where it is installed, else by what POSIX tells."""
    try:
        import psutil
    except ImportError:
        pages = {"available": "SC_AVPHYS_PAGES", "total": "SC_PHYS_PAGES"}[what]
        if pages not in getattr(os, "sysconf_names", {}):
            return None
        return os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE")
    return int(getattr(psutil.virtual_memory(), what))

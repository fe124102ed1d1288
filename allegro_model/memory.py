"""How much memory a device has, and how much this process took. None means unknown; then nothing is refused for lack of it."""

from __future__ import annotations

import ctypes
import gc
import os
import re
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_MEMINFO = Path("/proc/meminfo")
# (limit, usage, statistics, name of the reclaimable cache in them) of a container: control groups 2, then 1.
_CONTAINER = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current", "/sys/fs/cgroup/memory.stat", "inactive_file"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes",
     "/sys/fs/cgroup/memory/memory.stat", "total_inactive_file"),
)


def free_bytes(device: torch.device) -> int | None:
    """Bytes that could be allocated on `device` now."""
    if device.type == "cuda":
        import torch
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + unused
    return _host("available") if device.type == "cpu" else None


def total_bytes(device: torch.device) -> int | None:
    """Bytes `device` has in all. Choices that change rounding rest on this, so that they never change
    between two runs."""
    if device.type == "cuda":
        import torch
        return int(torch.cuda.mem_get_info(device)[1])
    return _host("total") if device.type == "cpu" else None


def both_prompts_fit(needed: int, device: torch.device) -> bool:
    """Whether both prompts of guidance go through the network at once: when that takes at most half the memory.

    Args:
        needed: bytes of one evaluation of both.
    """
    total = total_bytes(device)
    return total is not None and needed * 2 <= total


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed; outside CUDA, PyTorch says so with a plain RuntimeError."""
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and (
        type(error).__name__ == "OutOfMemoryError" or "DefaultCPUAllocator" in str(error) or "out of memory" in str(error)))


def reset_peak(device: torch.device | None) -> None:
    """Counts peaks from here on; outside Linux, that of main memory stays the peak since the start of the process."""
    if device is not None and device.type == "cuda":
        import torch
        torch.cuda.reset_peak_memory_stats(device)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_ram() -> int | None:
    """Highest resident memory of this process, bytes."""
    if (peak := _entry(Path("/proc/self/status"), "VmHWM:")) is not None:
        return peak * 1024
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def resident_bytes() -> int | None:
    """Memory that this process has now; only Linux tells."""
    now = _entry(Path("/proc/self/status"), "VmRSS:")
    return None if now is None else now * 1024


def release_heap() -> None:
    """Gives memory that is free back to the system, so that what comes next does not hide in it (glibc only)."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def _host(what: str) -> int | None:
    """Memory of the machine, "available" or "total", or of the container this process is confined to."""
    machine = _machine(what)
    container = _container(what)
    known = [value for value in (machine, container) if value is not None]
    return min(known) if known else None


def _machine(what: str) -> int | None:
    """Linux tells by itself; elsewhere psutil is asked where it is installed, then POSIX."""
    if (found := _entry(_MEMINFO, {"available": "MemAvailable:", "total": "MemTotal:"}[what])) is not None:
        return found * 1024  # given in units of 1024 bytes
    try:
        import psutil
    except ImportError:
        pages = {"available": "SC_AVPHYS_PAGES", "total": "SC_PHYS_PAGES"}[what]
        if pages not in getattr(os, "sysconf_names", {}):
            return None
        return os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE")
    return int(getattr(psutil.virtual_memory(), what))


def _container(what: str) -> int | None:
    """The limit of a Linux container, less what it uses; None outside of one or without a limit."""
    for limit_file, usage_file, statistics, cache in _CONTAINER:
        limit, usage = _entry(Path(limit_file)), _entry(Path(usage_file))
        if limit is not None and usage is not None:
            reclaimable = _entry(Path(statistics), cache) or 0
            return limit if what == "total" else max(0, limit - usage + reclaimable)
    return None


def _entry(path: Path, name: str = "") -> int | None:
    """The number behind `name` in a file of the kernel; None if it is not there, or is a word such as "max"."""
    try:
        text = path.read_text(encoding="ascii")
    except (OSError, ValueError):
        return None
    found = re.search(rf"^{re.escape(name)}\s*(\d+)", text, re.MULTILINE)
    return int(found.group(1)) if found else None

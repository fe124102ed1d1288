"""What this machine is, for whoever reads a measurement elsewhere."""

from __future__ import annotations

import os
import platform
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from ..memory import total_bytes


def describe_hardware(device: torch.device) -> dict[str, Any]:
    """Names and sizes: "name" of the device, "cpu", "cores", "threads" in use, "memory_bytes", and of a GPU its own."""
    cpu = processor()
    found = {"cpu": cpu, "cores": os.cpu_count(), "threads": torch.get_num_threads(),
             "memory_bytes": total_bytes(torch.device("cpu")), "system": platform.platform(terse=True)}
    if device.type != "cuda":
        return {"name": f"{cpu}, {torch.get_num_threads()} threads" if device.type == "cpu" else str(device), **found}
    gpu = torch.cuda.get_device_properties(device)
    return {"name": gpu.name, "gpu_memory_bytes": gpu.total_memory, "gpu_generation": f"{gpu.major}.{gpu.minor}", **found}


def processor() -> str:
    """The processor's name as the system gives it."""
    with suppress(OSError):
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
        if found:
            return found.group(1).strip()
    return platform.processor() or platform.machine()

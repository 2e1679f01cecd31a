"""What a process runs on, and how much of its memory it has used."""

from __future__ import annotations

import os
import platform
import sys
from typing import Any

import psutil
import torch

GIB = 2**30


def describe_hardware(*, processes: int, device: torch.device) -> dict[str, Any]:
    """Return the device and the machine of this process, as JSON values; nothing names the machine itself."""
    facts: dict[str, Any] = {
        "device": "CPU",
        "processes": processes,
        "cpu_cores": len(psutil.Process().cpu_affinity()) if sys.platform == "linux" else os.cpu_count(),
        "ram_gib": round(psutil.virtual_memory().total / GIB, 1),
        "platform": f"{platform.system()} {platform.machine()}",
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {
            "device": properties.name,
            "memory_gib": round(properties.total_memory / GIB, 1),
            "cuda": torch.version.cuda,
        }
    return facts


def peak_memory_gib(device: torch.device) -> float:
    """Return the most memory held so far: by torch on a GPU, or by this process where it computes on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset / GIB
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB

"""Available memory of a device."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def available_memory(device: str | torch.device = "cpu") -> int | None:
    """Bytes that can be allocated at present, without swapping on a CPU; None if unknown.

    Container limits are respected (Linux control groups, version 2).

    Args:
        device: ``cpu``, or a CUDA device.
    """
    if str(device) != "cpu":
        import torch

        return torch.cuda.mem_get_info(device)[0]
    limits = []
    try:
        meminfo = Path("/proc/meminfo").read_text(encoding="ascii")
        limits.append(int(re.search(r"MemAvailable:\s+(\d+) kB", meminfo)[1]) * 1024)  # type: ignore[index]
        group = Path("/sys/fs/cgroup")
        limit = (group / "memory.max").read_text(encoding="ascii").strip()
        if limit != "max":
            limits.append(int(limit) - int((group / "memory.current").read_text(encoding="ascii")))
    except (OSError, TypeError, ValueError):
        pass
    return min(limits, default=None)

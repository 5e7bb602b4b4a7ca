"""Settings of glibc's malloc that keep freed memory for reuse."""

from __future__ import annotations

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
LARGEST_BLOCK = 32 * 1024**2  # the most glibc allows
KEPT = 256 * 1024**2


def keep_freed_memory() -> bool:
    """Let the C library keep up to 256 MiB of freed memory instead of returning it to the system.

    A network allocates and frees megabytes of activations in every layer. By default each allocation is a
    new memory mapping whose pages all fault, which takes a considerable part of the time on a CPU. Without
    glibc nothing is changed.

    Returns:
        Whether it took effect.
    """
    return _set_thresholds(KEPT)


def return_freed_memory() -> bool:
    """Undo :func:`keep_freed_memory`: restore 64 MiB, the largest threshold glibc sets dynamically."""
    return _set_thresholds(2 * LARGEST_BLOCK)


def _set_thresholds(kept: int) -> bool:
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return all([mallopt(M_MMAP_THRESHOLD, LARGEST_BLOCK), mallopt(M_TRIM_THRESHOLD, kept)])

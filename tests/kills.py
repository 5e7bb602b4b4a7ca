"""What a run leaves on the disk if it is killed, at every moment at which that differs."""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_CHANGES = {
    "os.rename",
    "os.remove",
    "os.rmdir",
    "os.mkdir",
    "os.chmod",
    "os.truncate",
    "os.link",
    "os.symlink",
}
_watching: list[Callable[[], None]] = []


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if _watching and (event in _CHANGES or (event == "open" and arguments[2] & _WRITING)):
        look = _watching.pop()  # copying writes files too
        look()
        _watching.append(look)


sys.addaudithook(_hook)


def disk_states(run: Callable[[Path], Any], directory: Path, begin: Path | None = None) -> list[Path]:
    """Run to the end, and keep what lay on the disk before every change that Python made to it.

    No clean-up code has run in such a state, as after ``kill -9`` and unlike after an exception. The last
    state is that of a run killed when all was written.

    Args:
        run: Writes into the directory it is given.
        directory: A missing directory to work in; ``run`` gets one inside.
        begin: State to begin with; None is an empty directory.

    Returns:
        Copies of the directory that ``run`` was given, in order; equal neighbours are left out.
    """
    work, states, seen = directory / "work", [], None

    def look() -> None:
        nonlocal seen
        if (now := _digest(work)) != seen:
            seen = now
            states.append(directory / f"state-{len(states):03d}")
            shutil.copytree(work, states[-1])

    work.mkdir(parents=True)
    if begin is not None:
        shutil.copytree(begin, work, dirs_exist_ok=True)
    _watching.append(look)
    try:
        run(work)
    finally:
        _watching.clear()
    look()
    return states


def _digest(directory: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(directory.rglob("*")):
        digest.update(str(path.relative_to(directory)).encode())
        digest.update(path.read_bytes() if path.is_file() else b"/")
    return digest.hexdigest()

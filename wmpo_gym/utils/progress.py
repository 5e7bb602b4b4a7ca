"""Progress bars with the time left, the same everywhere."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from typing import Any

# WMPO_PROGRESS=always shows bars in log files and pipes too, WMPO_PROGRESS=never nowhere.
_VARIABLE = "WMPO_PROGRESS"


def progress_wanted() -> bool:
    """Whether bars show here: in a terminal, or as ``WMPO_PROGRESS`` says."""
    wish = os.environ.get(_VARIABLE, "auto")
    return wish == "always" or (wish != "never" and sys.stderr.isatty())


def progress_bar(
    iterable: Iterable[Any] | None = None,
    *,
    total: int | None = None,
    initial: int = 0,
    desc: str = "",
    unit: str = "it",
    disable: bool = False,
) -> Any:
    """A ``tqdm`` bar on standard error.

    It shows in a terminal and is silent in pipes and log files, unless the environment variable
    ``WMPO_PROGRESS`` is ``always``: then a line is written every ten seconds. ``never`` silences it.

    Args:
        iterable: What to walk through, or None to call ``update`` by hand.
        total: Number of steps, if ``len(iterable)`` does not tell.
        initial: Steps done before, of a run that is resumed.
        desc: What is being done.
        unit: What one step is called.
        disable: Show nothing, whatever the variable says.

    Returns:
        The bar, also a context manager.
    """
    from tqdm import tqdm

    terminal = sys.stderr.isatty()
    return tqdm(
        iterable,
        total=total,
        initial=initial,
        desc=desc,
        unit=unit,
        disable=disable or not progress_wanted(),
        dynamic_ncols=terminal,
        ncols=None if terminal else 100,
        mininterval=0.2 if terminal else 10.0,
    )

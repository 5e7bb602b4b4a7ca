"""Progress bars with remaining time."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from typing import Any

# WMPO_PROGRESS=always also shows bars in log files and pipes, WMPO_PROGRESS=never disables them.
_VARIABLE = "WMPO_PROGRESS"


def progress_wanted() -> bool:
    """Whether progress bars are shown: in a terminal, or as set by ``WMPO_PROGRESS``."""
    setting = os.environ.get(_VARIABLE, "auto")
    return setting == "always" or (setting != "never" and sys.stderr.isatty())


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
        iterable: Iterable to wrap, or None to call ``update`` manually.
        total: Number of steps, if ``len(iterable)`` is undefined.
        initial: Steps completed before resuming.
        desc: Label of the bar.
        unit: Name of one step.
        disable: Show nothing, regardless of the variable.

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

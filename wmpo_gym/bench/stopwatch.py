"""Time spent in chosen methods of chosen objects."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

Targets = Sequence[tuple[Any, Sequence[str], str]]


class Stopwatch:
    """Seconds spent in wrapped functions; time in an inner one does not count for the outer one.

    Args:
        synchronize: Called before the clock is read, for devices that work in the background.
    """

    def __init__(self, synchronize: Callable[[], None] = lambda: None) -> None:
        self.seconds: dict[str, float] = {}
        self._running: list[str] = []
        self._since = 0.0
        self._synchronize = synchronize

    def wrap(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, timed under the name ``part``."""
        self.seconds.setdefault(part, 0.0)

        def timed(*args: Any, **kwargs: Any) -> Any:
            self._credit()
            self._running.append(part)
            try:
                return function(*args, **kwargs)
            finally:
                self._credit()
                self._running.pop()

        return timed

    def _credit(self) -> None:
        self._synchronize()
        now = time.perf_counter()
        if self._running:
            self.seconds[self._running[-1]] += now - self._since
        self._since = now


@contextmanager
def timed_methods(targets: Sequence[tuple[Any, Sequence[str], str]], watch: Stopwatch) -> Iterator[None]:
    """Time methods of objects for the duration of a block, by shadowing them on the instances.

    Args:
        targets: (object, method names, part); missing methods are passed over.
        watch: Collects the seconds.
    """
    shadowed = []
    try:
        for target, names, part in targets:
            for name in names:
                if hasattr(target, name):
                    shadowed.append((target, name, vars(target).get(name)))
                    object.__setattr__(target, name, watch.wrap(part, getattr(target, name)))
        yield
    finally:
        for target, name, own in shadowed:
            if own is None:
                object.__delattr__(target, name)
            else:
                object.__setattr__(target, name, own)

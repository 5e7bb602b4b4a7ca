"""Consistency of the settings of an output directory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from wmpo_gym.utils.io import plain, read_json, write_json_atomic


def keep_settings(file: str | Path, settings: dict[str, Any], *, started: bool = True) -> None:
    """Store the settings of an output directory, and raise an error on resuming with different ones.

    Args:
        file: JSON file in that directory.
        settings: Settings that determine the directory's content.
        started: Whether the directory has content produced with the stored settings; if not, they are
            replaced, so that a failed command does not block its corrected version.

    Raises:
        ValueError: If the file holds other settings; the message names the first difference.
    """
    file, settings = Path(file), json.loads(json.dumps(plain(settings)))
    if not file.exists() or not started:
        write_json_atomic(file, settings)
        return
    before, now = _flat(read_json(file)), _flat(settings)
    for name in {**now, **before}:
        old, new = before.get(name, "not set"), now.get(name, "not set")
        if old != new:
            raise ValueError(
                f"{file.parent} holds other settings: it was begun with {name} = {old!r}, now it is {new!r}; "
                "use the same settings to go on there, or choose another directory."
            )


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by their dotted names."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat

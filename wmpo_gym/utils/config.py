"""What a directory was begun with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from wmpo_gym.utils.io import plain, read_json, write_json_atomic


def keep_settings(file: str | Path, settings: dict[str, Any], *, started: bool = True) -> None:
    """Remember what a directory was begun with, and refuse to go on with other settings.

    Args:
        file: JSON file in that directory.
        settings: What decides its content.
        started: Whether the directory holds anything made with the settings of before; if not, they are
            replaced, so that a command that was refused does not stand in the way of the corrected one.

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

"""Settings a directory was begun with."""

from __future__ import annotations

from pathlib import Path

import pytest

from wmpo_gym.utils.config import keep_settings
from wmpo_gym.utils.io import read_json


def test_other_settings_are_refused_once_something_was_made(tmp_path: Path) -> None:
    file = tmp_path / "command.json"
    keep_settings(file, {"steps": 1, "episodes": ["a"]}, started=False)
    keep_settings(file, {"steps": 1, "episodes": ["a", "b"]}, started=False)  # nothing was learned yet
    assert read_json(file)["episodes"] == ["a", "b"]
    with pytest.raises(ValueError, match="begun with steps = 1, now it is 2"):
        keep_settings(file, {"steps": 2, "episodes": ["a", "b"]}, started=True)

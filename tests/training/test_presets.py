"""Training hints: for bundled tasks only, and tasks that were saved with them load without."""

from __future__ import annotations

from dataclasses import asdict, replace

import pytest

from wmpo_gym.data.task_file import find_task
from wmpo_gym.rollouts.protocol import EvalProtocol
from wmpo_gym.tasks import FORMER_FIELDS, TASKS, Task, get_task
from wmpo_gym.training.presets import HINTS, NO_HINTS, hints_for
from wmpo_gym.utils.io import write_json_atomic


def former_dict(task: Task) -> dict:
    """What tasks were saved as when they held the hints."""
    hints = asdict(hints_for(task))
    return task.to_dict() | {name: hints[name] for name in FORMER_FIELDS}


@pytest.mark.parametrize("name", [*TASKS, "lift@64", "robosuite:Door"])
def test_saved_tasks_with_hints_load_as_the_tasks_they_are(name: str, tmp_path) -> None:
    task = get_task(name)
    saved = former_dict(task)
    assert Task.from_dict(saved) == task
    assert not set(FORMER_FIELDS) & set(task.to_dict())
    write_json_atomic(tmp_path / "task.json", saved)
    assert find_task(tmp_path) == task


def test_results_from_before_compare_as_equal() -> None:
    protocol = EvalProtocol.make("move-block", "test", 4, seed=0, deterministic=False)
    former = protocol.to_dict() | {"task": former_dict(get_task("move-block"))}
    assert EvalProtocol.from_dict(former).differences(protocol) == []


def test_hints_are_those_of_bundled_tasks_at_any_size_only() -> None:
    assert set(HINTS) <= set(TASKS)
    block = get_task("move-block")
    assert [s.name for s in hints_for("move-block").symmetries] == ["mirror", "swap colours"]
    assert hints_for("move-block@80").motion_px == (5.2, -5.2)
    assert hints_for("move-block", "none") == replace(hints_for("move-block"), symmetries=())
    assert hints_for("lift-close@64").gradual_steps == 4
    assert hints_for(replace(block, horizon=8)) == NO_HINTS
    assert hints_for("robosuite:Door") == NO_HINTS

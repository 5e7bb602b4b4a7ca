"""The task recorded in a directory of imported episodes or of a world."""

from __future__ import annotations

from pathlib import Path

from wmpo_gym.tasks import TASKS, Task, get_task
from wmpo_gym.utils.io import ArtifactError, read_json

TASK_FILE = "task.json"


def read_task(directory: str | Path) -> Task | None:
    """The task in a directory's ``task.json``; None if there is no such file.

    Raises:
        ArtifactError: If it does not describe a task.
    """
    file = Path(directory) / TASK_FILE
    return _parse(file, read_json(file)) if file.exists() else None


def find_task(name_or_dir: str | Path | Task) -> Task:
    """A task by name, or that of a directory of imported episodes or of a world.

    Raises:
        ValueError: If there is none.
        ArtifactError: If the directory's description is damaged.
    """
    if isinstance(name_or_dir, Task) or name_or_dir in TASKS or not Path(name_or_dir).is_dir():
        return get_task(name_or_dir)  # type: ignore[arg-type]
    task, world = read_task(name_or_dir), Path(name_or_dir) / "config.json"
    if task is not None:
        return task
    if not world.exists():
        raise ValueError(
            f"{name_or_dir} holds neither {TASK_FILE} nor a world's config.json, so it names no task; "
            f"`wmpo import` makes the former. Known tasks: {', '.join(TASKS)}."
        )
    config = read_json(world)
    return _parse(world, config.get("task") if isinstance(config, dict) else None)


def _parse(file: Path, fields: object) -> Task:
    try:
        return Task.from_dict(fields)  # type: ignore[arg-type]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ArtifactError(f"{file} does not describe a task: {error!r}.") from error

"""Importing a data set: look it over, settle the task and the action statistics, then write the episodes.

The result is a store of episodes with a task of its own::

    OUT/
        task.json           horizon, chunk, instructions, limits of the actions
        statistics.json     q01, q99, mask and more of the actions, as OpenVLA has them
        import.json         where it came from, what was taken, what was skipped and why
        episode_000000/...
        held-out/           episodes kept for judging worlds; a store with the same task.json

It is written under a temporary name and takes its own when it is complete. Interrupted, the same import goes
on there.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from wmpo_gym.data.episode import Episode
from wmpo_gym.data.importers.base import EpisodeFault, Outline, Source, SourceError
from wmpo_gym.data.importers.lerobot import LeRobotSource
from wmpo_gym.data.importers.robomimic import RobomimicSource
from wmpo_gym.data.importers.settings import ImportReport, ImportSettings
from wmpo_gym.data.importers.wmpo_shards import WMPOSource
from wmpo_gym.data.statistics import ActionStatistics, to_unit
from wmpo_gym.data.store import EpisodeStore
from wmpo_gym.data.task_file import TASK_FILE
from wmpo_gym.tasks import TASKS, StartStates, Task
from wmpo_gym.utils.config import keep_settings
from wmpo_gym.utils.io import plain, read_json, write_json_atomic
from wmpo_gym.utils.progress import progress_bar

FORMATS: dict[str, type[Any]] = {
    "robomimic": RobomimicSource,
    "lerobot": LeRobotSource,
    "wmpo": WMPOSource,
}
REPORT_FILE, STATISTICS_FILE, BEGUN_FILE = "import.json", "statistics.json", "begun.json"
HELD_OUT = "held-out"
# Start states of recordings are numbered by their first picture, above those of simulators and keyframes.
FIRST_RECORDED_ID = 1 << 40


def open_source(path: str | Path, format: str | None = None, camera: str | None = None) -> Source:
    """Open a data set.

    Args:
        path: A file or directory.
        format: One of :data:`FORMATS`; None looks at it.
        camera: See :class:`ImportSettings`.

    Raises:
        SourceError: If it cannot be read, or its format is not known; the message names the file.
        ImportError: If the format's library is missing.
    """
    path = Path(path)
    if not path.exists():
        raise SourceError(f"There is nothing at {path}.")
    kind = format or _guess(path)
    if kind not in FORMATS:
        raise SourceError(
            f"{path} is none of the formats read here: {', '.join(FORMATS)}. Name one with --format if it is."
        )
    return FORMATS[kind](path, camera)


def _guess(path: Path) -> str | None:
    """The format that a path looks like; whether it is that, its importer finds out."""
    if path.is_dir():
        if (path / "meta" / "info.json").exists():
            return "lerobot"
        return "wmpo" if next(path.rglob("*.tar"), None) else None
    by_suffix = {".hdf5": "robomimic", ".h5": "robomimic", ".tar": "wmpo"}
    return by_suffix.get(path.suffix.lower())


def import_dataset(
    path: str | Path,
    out: str | Path,
    settings: ImportSettings | None = None,
    *,
    task: Task | None = None,
    format: str | None = None,
    progress: bool = True,
) -> ImportReport:
    """Import a data set into a store of episodes; complete or not at all.

    Actions are mapped to [-1, 1]: by the quantiles of this data for a new task, by the given task's limits
    otherwise.

    Args:
        path: The data set, a file or directory.
        out: Directory of the store; made by this call.
        settings: What to take and as what.
        task: The task the episodes belong to: a known one, or that of an earlier import. None makes a new
            task out of the data.
        format: One of :data:`FORMATS`; None looks at the data.
        progress: Show progress bars.

    Returns:
        What was imported and what was skipped; also written to ``import.json``.

    Raises:
        SourceError: If the data cannot be read or no episode of it can be used. Nothing is left at ``out``.
        ValueError: If ``out`` exists, or the settings do not fit the data.
    """
    path, out, settings = Path(path), Path(out), settings or ImportSettings()
    partial = out.parent / f".{out.name}.importing"
    with open_source(path, format, settings.camera) as source:
        report = ImportReport(str(path), source.format, notes=source.damage())
        outlines = list(_scan(source, task, settings, report, progress))
        outlines = list(_fitting(outlines, task, settings, report))
        _check_any(outlines, report)
        _note_states(outlines, report)
        statistics = ActionStatistics.of([o.actions for o in outlines])
        if task and source.control_hz not in (None, task.control_hz):
            report.notes.append(f"recorded at {source.control_hz:g} Hz, the task has {task.control_hz:g} Hz")
        task = task or _new_task(source, outlines, statistics, settings, report)
        begun = asdict(settings) | {
            "source": f"{source.format}:{source.name}",
            "camera": getattr(source, "camera", None),
            "task": task.to_dict(),
            "actions": _digest(outlines),
        }
        if (out / REPORT_FILE).exists() and read_json(out / REPORT_FILE).get("settings") == plain(begun):
            return ImportReport(**read_json(out / REPORT_FILE)["report"])
        if out.exists():
            raise ValueError(f"{out} exists and is not this import; choose another directory.")
        keep_settings(partial / BEGUN_FILE, begun)
        try:
            _write_episodes(source, outlines, task, settings, partial, report, progress)
            _check_any([o.key for o in outlines] if report.imported else [], report)
        except BaseException:
            if not any(EpisodeStore(d).directories() for d in (partial, partial / HELD_OUT)):
                shutil.rmtree(partial)  # nothing to go on with
            raise
    for directory in (partial, partial / HELD_OUT) if report.held_out else (partial,):
        write_json_atomic(directory / TASK_FILE, task.to_dict())
    write_json_atomic(partial / STATISTICS_FILE, statistics.to_dict(task.name))
    write_json_atomic(partial / REPORT_FILE, {"settings": begun, "report": report})
    (partial / BEGUN_FILE).unlink()
    os.replace(partial, out)
    return report


def _scan(
    source: Source, task: Task | None, settings: ImportSettings, report: ImportReport, progress: bool
) -> Iterator[Outline]:
    """Outlines of the episodes that can be used, with what settings and task say filled in."""
    default = task.instructions[0] if task and len(task.instructions) == 1 else None
    keys = source.keys()[settings.skip :][: settings.episodes]
    for key in progress_bar(keys, desc="looking through", unit="ep", disable=not progress):
        try:
            outline = source.outline(key)
        except EpisodeFault as fault:
            report.skip(key, fault)
            continue
        outline.instruction = settings.instruction or outline.instruction or default
        if outline.success is None and settings.assume_success:
            outline.success = True
        if settings.imagined:
            outline.meta["imagined"] = True
        yield outline


def _fitting(
    outlines: list[Outline], task: Task | None, settings: ImportSettings, report: ImportReport
) -> Iterator[Outline]:
    """The episodes that fit the task, or each other where there is none yet; the others are reported."""
    dims = Counter(o.actions.shape[1] for o in outlines)
    dim = task.action_dim if task else max(dims, key=lambda d: dims[d], default=0)
    horizon = task.horizon if task else settings.horizon
    for outline in outlines:
        steps = len(outline.actions)
        if outline.actions.shape[1] != dim:
            report.skip(outline.key, f"{outline.actions.shape[1]} numbers per action instead of {dim}")
        elif horizon is not None and steps > horizon:
            report.skip(outline.key, f"{steps} steps, the horizon is {horizon}")
        elif task and outline.instruction not in task.instructions:
            report.skip(outline.key, f"instruction {outline.instruction!r} is none of {task.instructions}")
        else:
            yield outline


def _check_any(outlines: Sequence[object], report: ImportReport) -> None:
    if not outlines:
        reasons = [f"{s['episode']}: {s['reason']}" for s in report.skipped[:3]] + report.notes
        raise SourceError(
            f"No episode of {report.source} can be imported ({len(report.skipped)} skipped"
            + "".join(f"; {reason}" for reason in reasons)
            + ")."
        )


def _note_states(outlines: list[Outline], report: ImportReport) -> None:
    """Say where the robot's state is not what a world model needs to follow it: there, everywhere alike."""
    sizes = Counter(0 if o.proprio is None else o.proprio.shape[1] for o in outlines)
    if len(sizes) > 1:
        found = ", ".join(f"{size} in {n} episodes" for size, n in sorted(sizes.items()))
        report.notes.append(
            f"numbers of the robot's state: {found}; a world of all of them does not follow it"
        )


def _new_task(
    source: Source,
    outlines: list[Outline],
    statistics: ActionStatistics,
    settings: ImportSettings,
    report: ImportReport,
) -> Task:
    """The task that a data set defines.

    Raises:
        ValueError: If something is missing, naming the option that gives it.
    """
    if any(o.instruction is None for o in outlines):
        raise ValueError(f"{source.name} holds no instructions; give the sentence with --instruction.")
    hz = settings.control_hz or source.control_hz
    if hz is None:
        raise ValueError(f"{source.name} does not say how fast it was recorded; give --control-hz.")
    name = settings.name or re.sub(r"[^a-z0-9]+", "-", source.name.lower()).strip("-") or "recorded"
    if name in TASKS:
        raise ValueError(
            f"{name!r} is a known task; import for it with --task {name}, or give the new one another --name."
        )
    horizon = settings.horizon or max(len(o.actions) for o in outlines)
    still = np.flatnonzero(statistics.high <= statistics.low)
    if still.size:
        report.notes.append(f"action dimension(s) {still.tolist()} never move and become 0")
    return Task(
        name=name,
        instructions=tuple(dict.fromkeys(str(o.instruction) for o in outlines)),
        horizon=-(-horizon // settings.chunk) * settings.chunk,
        chunk=settings.chunk,
        action_dim=outlines[0].actions.shape[1],
        control_hz=hz,
        image_size=settings.image_size,
        start_states=StartStates(0, 0, 0, seed=settings.seed),
        action_low=tuple(statistics.low.tolist()),
        action_high=tuple(statistics.high.tolist()),
        success_tolerance_px=None,
    )


def _digest(outlines: list[Outline]) -> str:
    """What the episodes are, to notice another source under the same name."""
    digest = hashlib.sha256()
    for outline in outlines:
        digest.update(f"{outline.key}{outline.success}{outline.instruction}".encode())
        for array in (outline.actions, outline.proprio):
            digest.update(b"" if array is None else np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _write_episodes(
    source: Source,
    outlines: list[Outline],
    task: Task,
    settings: ImportSettings,
    root: Path,
    report: ImportReport,
    progress: bool,
) -> None:
    """Write what is missing; episodes that lie there from an interrupted import are kept."""
    held = _held_out(outlines, settings)
    stores = {False: EpisodeStore(root), True: EpisodeStore(root / HELD_OUT)}
    present = {episode.meta["source_key"] for store in stores.values() for episode in store}
    with progress_bar(total=len(outlines), desc="importing", unit="ep", disable=not progress) as bar:
        for outline in outlines:
            bar.update()
            if outline.key not in present:
                try:
                    frames = source.frames(outline.key, len(outline.actions) + 1, task.image_size)
                except EpisodeFault as fault:
                    report.skip(outline.key, fault)
                    continue
                stores[outline.key in held].append(_episode(outline, frames, task, source))
            report.count(outline.success, len(outline.actions) + 1, outline.key in held)


def _held_out(outlines: list[Outline], settings: ImportSettings) -> set[str]:
    """Keys of the episodes to hold out: all those of some start states."""
    starts = list(dict.fromkeys(o.start for o in outlines))
    order = np.random.default_rng([settings.seed, 6]).permutation(len(starts))
    chosen = {starts[i] for i in order[: round(settings.holdout * len(starts))]}
    return {o.key for o in outlines if o.start in chosen}


def _episode(outline: Outline, frames: np.ndarray, task: Task, source: Source) -> Episode:
    task_id = task.instructions.index(str(outline.instruction))
    return Episode(
        frames=frames,
        actions=to_unit(outline.actions, task.action_low, task.action_high),
        success=outline.success,
        finish_step=len(outline.actions),
        start_state_id=_start_state_id(frames[0], task.instructions[task_id]),
        task_id=task_id,
        instruction=task.instructions[task_id],
        meta={
            "task": task.name,
            "control_hz": task.control_hz,
            "source": f"{source.format}:{source.name}",
            "source_key": outline.key,
            **outline.meta,
        },
        proprio=outline.proprio,
    )


def _start_state_id(picture: np.ndarray, instruction: str) -> int:
    """Number of a start state: equal first pictures and instructions, equal numbers."""
    digest = hashlib.sha256(picture.tobytes() + instruction.encode()).digest()
    return FIRST_RECORDED_ID + int.from_bytes(digest[:5], "little")

"""Import of a data set: read the headers, determine task and action statistics, then write the episodes.

The result is a store of episodes with its own task::

    OUT/
        task.json           horizon, chunk, instructions, action limits
        statistics.json     action statistics (q01, q99, mask and more) in OpenVLA's layout
        import.json         source, settings, imported and skipped episodes
        episode_000000/...
        held-out/           episodes for validating worlds; a store with the same task.json

It is written to a temporary directory and renamed when complete. An interrupted import resumes there.
"""

from __future__ import annotations

import csv
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
from wmpo_gym.data.importers.base import EpisodeFault, EpisodeHeader, Source, SourceError
from wmpo_gym.data.importers.lerobot import LeRobotSource
from wmpo_gym.data.importers.robomimic import SUFFIXES, RobomimicDirectory, RobomimicSource
from wmpo_gym.data.importers.settings import (
    DEFAULT_CHUNK,
    DEFAULT_IMAGE_SIZE,
    ImportReport,
    ImportSettings,
    SourceOptions,
)
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
# Start-state ids of recordings are hashes of the first frame, above the ids of simulators and keyframes.
FIRST_RECORDED_ID = 1 << 40


def open_source(
    path: str | Path,
    format: str | None = None,
    camera: str | None = None,
    *,
    options: SourceOptions | None = None,
) -> Source:
    """Open a data set.

    Args:
        path: A file or directory.
        format: One of :data:`FORMATS`; None detects it.
        camera: Short for ``options=SourceOptions(camera=...)``.
        options: Options of the format.

    Raises:
        SourceError: If it cannot be read, or its format is not known; the message names the file.
        ImportError: If the format's library is missing.
    """
    name, path = str(path), Path(path)
    options = options or SourceOptions(camera=camera)
    if not path.exists():
        hub = name.count("/") == 1 and not name.startswith((".", "/", "~")) and not path.suffix
        raise SourceError(
            f"Path does not exist: {path}."
            + f" If it is a data set of the Hugging Face hub, download it first: `hf download {name} "
            f"--repo-type dataset --local-dir {path.name}`, then import {path.name}." * hub
        )
    kind = format or _guess(path)
    if kind not in FORMATS:
        raise SourceError(
            f"Unsupported format: {path} is none of {', '.join(FORMATS)}. Name one with --format if it is."
        )
    if kind == "robomimic" and path.is_dir():
        return RobomimicDirectory(path, options)
    source: Source = FORMATS[kind](path, options)
    return source


def _guess(path: Path) -> str | None:
    """Guess the format from file names; the importer of the format validates the data."""
    if path.is_dir():
        if (path / "meta" / "info.json").exists():
            return "lerobot"
        if any(file.suffix.lower() in SUFFIXES for file in path.iterdir()):
            return "robomimic"
        return "wmpo" if next(path.rglob("*.tar"), None) else None
    by_suffix = {**dict.fromkeys(SUFFIXES, "robomimic"), ".tar": "wmpo"}
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
    """Import a data set atomically into a store of episodes.

    Actions are scaled to [-1, 1]: by the quantiles of this data for a new task, else by the limits of the
    given task.

    Args:
        path: The data set, a file or directory.
        out: Directory of the store; it must not exist.
        settings: Import settings.
        task: Task of the episodes: a known one, or that of an earlier import. None derives a new task from
            the data.
        format: One of :data:`FORMATS`; None detects it.
        progress: Show progress bars.

    Returns:
        The report of imported and skipped episodes; also written to ``import.json``.

    Raises:
        SourceError: If the data cannot be read or contain no usable episode; ``out`` is not created.
        ValueError: If ``out`` exists, or the settings do not fit the data.
    """
    path, out, settings = Path(path), Path(out), settings or ImportSettings()
    partial = out.parent / f".{out.name}.importing"
    if task:
        _check_task_options(task, settings)
    with open_source(path, format, options=settings) as source:
        report = ImportReport(str(path), source.format, notes=source.damage())
        stride = _stride(source, task.control_hz if task else settings.control_hz, report)
        headers = list(_scan(source, task, settings, report, progress))
        headers = list(_settle_outcomes(source, headers, settings, stride, report))
        headers = list(_fitting(headers, task, settings, report))
        _check_any(headers, report)
        _note_states(headers, report)
        statistics = ActionStatistics.of([o.actions for o in headers])
        task = task or _new_task(source, headers, statistics, settings, report)
        begun = asdict(settings) | {
            "source": f"{source.format}:{source.name}",
            "camera": getattr(source, "camera", None),
            "task": task.to_dict(),
            "actions": _digest(headers),
        }
        if (out / REPORT_FILE).exists() and read_json(out / REPORT_FILE).get("settings") == plain(begun):
            return ImportReport(**read_json(out / REPORT_FILE)["report"])
        if out.exists():
            raise ValueError(f"{out} exists and is not this import; choose another directory.")
        keep_settings(partial / BEGUN_FILE, begun)
        try:
            _write_episodes(source, headers, task, settings, partial, report, progress, stride)
            _check_any([o.key for o in headers] if report.imported else [], report)
        except BaseException:
            if not any(EpisodeStore(d).directories() for d in (partial, partial / HELD_OUT)):
                shutil.rmtree(partial)  # nothing to resume from
            raise
    for directory in (partial, partial / HELD_OUT) if report.held_out else (partial,):
        write_json_atomic(directory / TASK_FILE, task.to_dict())
    write_json_atomic(partial / STATISTICS_FILE, statistics.to_dict(task.name))
    write_json_atomic(partial / REPORT_FILE, {"settings": begun, "report": report})
    (partial / BEGUN_FILE).unlink()
    os.replace(partial, out)
    return report


def _check_task_options(task: Task, settings: ImportSettings) -> None:
    """Refuse task settings that contradict a given task.

    Raises:
        ValueError: If there is one; the message names the option and both values.
    """
    for name in ("name", "chunk", "horizon", "image_size", "control_hz"):
        asked, has = getattr(settings, name), getattr(task, name)
        if asked is not None and asked != has:
            raise ValueError(
                f"--{name.replace('_', '-')} {asked} contradicts --task {task.name}, which has {has}; leave "
                "one of them out."
            )


def _stride(source: Source, hz: float | None, report: ImportReport) -> int:
    """Recorded steps per step of the task.

    Raises:
        ValueError: If the requested rate does not divide the recorded one.
    """
    recorded = source.control_hz
    if hz is None or recorded is None or hz == recorded:
        return 1
    stride = round(recorded / hz)
    if stride < 1 or abs(recorded / hz - stride) > 1e-3 * stride:
        rates = ", ".join(f"{recorded / k:g}" for k in range(1, 6))
        raise ValueError(
            f"{source.name} was recorded at {recorded:g} Hz, which {hz:g} Hz does not divide; choose one of "
            f"{rates} ... with --control-hz, or another task."
        )
    report.notes.append(
        f"thinned out from {recorded:g} to {recorded / stride:g} Hz: every {stride}th picture and its "
        "action. Actions that are displacements per step are not added up"
    )
    return stride


def _scan(
    source: Source, task: Task | None, settings: ImportSettings, report: ImportReport, progress: bool
) -> Iterator[EpisodeHeader]:
    """Headers of usable episodes, with instruction and metadata filled in from settings and task."""
    default = task.instructions[0] if task and len(task.instructions) == 1 else None
    default = settings.missing_instruction or default
    keys = source.keys()[settings.skip :][: settings.episodes]
    for key in progress_bar(keys, desc="reading headers", unit="ep", disable=not progress):
        try:
            header = source.header(key)
        except EpisodeFault as fault:
            report.skip(key, fault)
            continue
        header.instruction = settings.instruction or header.instruction or default
        if settings.imagined:
            header.meta["imagined"] = True
        if not settings.instruction:
            report.notes += [note for note in header.notes if note not in report.notes]
        yield header


def _settle_outcomes(
    source: Source, headers: list[EpisodeHeader], settings: ImportSettings, stride: int, report: ImportReport
) -> Iterator[EpisodeHeader]:
    """Set the outcome and length of every episode, at the control rate of the task.

    Outcomes given by the user take precedence over recorded ones; assumptions apply to the rest.
    """
    flags = [h.flags for h in headers if h.flags is not None]
    values = set(np.unique(np.concatenate(flags)).tolist()) if flags else set()
    if len(values) == 1:
        # A constant column carries no label: simulators write zeros if success is not evaluated.
        report.notes.append(
            f"rewards or success flags are {int(values.pop())} in every step of all {len(flags)} "
            "episodes and are taken as not recorded; give outcomes with --labels, --failed, --assume-success "
            "or --assume-failure"
        )
        for header in headers:
            header.flags = None
    given = _given_outcomes(source, settings)
    assumed = 0
    for header in headers:
        try:
            header.thin(stride)
            header.cut()
        except EpisodeFault as fault:
            report.skip(header.key, fault)
            continue
        if header.key in given:
            header.success = given[header.key]
        elif header.success is None and (settings.assume_success or settings.assume_failure):
            header.success = settings.assume_success
            assumed += 1
        yield header
    if (settings.assume_success or settings.assume_failure) and not assumed:
        option = "--assume-success" if settings.assume_success else "--assume-failure"
        report.notes.append(f"{option} changed nothing: the outcome of every episode is known")


def _given_outcomes(source: Source, settings: ImportSettings) -> dict[str, bool]:
    """Outcomes given by the user, by episode name.

    Raises:
        ValueError: If the file cannot be read, or names an episode that is not there.
    """
    keys = source.keys()
    given: dict[str, bool] = {}
    rows: list[tuple[str, bool]] = [(str(number), False) for number in settings.failed]
    if settings.labels is not None:
        rows = [*_read_labels(settings.labels), *rows]
    for name, success in rows:
        if name in keys:
            given[name] = success
        elif name.isdigit() and int(name) < len(keys):
            given[keys[int(name)]] = success
        else:
            raise ValueError(
                f"There is no episode {name!r} in {source.name}; its {len(keys)} episodes are 0 to "
                f"{len(keys) - 1} or {keys[0]!r} to {keys[-1]!r}."
            )
    return given


def _read_labels(file: Path) -> list[tuple[str, bool]]:
    """Rows of a CSV file with the columns ``episode`` and ``success``.

    Raises:
        ValueError: If it has other columns or values; the message names the line.
    """
    words = {"1": True, "true": True, "success": True, "0": False, "false": False, "failure": False}
    try:
        with open(file, newline="", encoding="utf-8-sig") as lines:
            reader = csv.DictReader(lines)
            if not {"episode", "success"} <= set(reader.fieldnames or ()):
                raise ValueError(f"{file} needs the columns episode and success, got {reader.fieldnames}.")
            rows = []
            for row in reader:
                value = words.get(str(row["success"]).strip().lower())
                if value is None:
                    raise ValueError(
                        f"{file}, line {reader.line_num}: success is {row['success']!r}; write 1 or 0."
                    )
                rows.append((str(row["episode"]).strip(), value))
            return rows
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"Cannot read the labels in {file}: {error}") from error


def _fitting(
    headers: list[EpisodeHeader], task: Task | None, settings: ImportSettings, report: ImportReport
) -> Iterator[EpisodeHeader]:
    """The episodes that fit the task, or, for a new task, each other; the others are reported as skipped."""
    dims = Counter(o.actions.shape[1] for o in headers)
    dim = task.action_dim if task else max(dims, key=lambda d: dims[d], default=0)
    horizon = task.horizon if task else settings.horizon
    for header in headers:
        steps = len(header.actions)
        if header.actions.shape[1] != dim:
            report.skip(header.key, f"{header.actions.shape[1]} numbers per action instead of {dim}")
        elif horizon is not None and steps > horizon:
            report.skip(header.key, f"{steps} steps, the horizon is {horizon}")
        elif task and header.instruction not in task.instructions:
            report.skip(
                header.key,
                f"instruction {header.instruction!r} is none of {task.instructions}; to get one task of "
                "several sentences, import their files together (a directory)",
            )
        else:
            yield header


def _check_any(headers: Sequence[object], report: ImportReport) -> None:
    if not headers:
        reasons = [f"{s['episode']}: {s['reason']}" for s in report.skipped[:3]] + report.notes
        raise SourceError(
            f"No episode of {report.source} can be imported ({len(report.skipped)} skipped"
            + "".join(f"; {reason}" for reason in reasons)
            + ")."
        )


def _note_states(headers: list[EpisodeHeader], report: ImportReport) -> None:
    """Note if the proprioception vectors differ in size, since a world model then cannot use them."""
    sizes = Counter(0 if o.proprio is None else o.proprio.shape[1] for o in headers)
    if len(sizes) > 1:
        found = ", ".join(f"{size} in {n} episodes" for size, n in sorted(sizes.items()))
        report.notes.append(
            f"numbers of the robot's state: {found}; a world of all of them does not follow it"
        )


def _new_task(
    source: Source,
    headers: list[EpisodeHeader],
    statistics: ActionStatistics,
    settings: ImportSettings,
    report: ImportReport,
) -> Task:
    """Derive a task from a data set.

    Raises:
        ValueError: If a property is missing; the message names the option that sets it.
    """
    if silent := sum(o.instruction is None for o in headers):
        if silent == len(headers):
            raise ValueError(f"{source.name} holds no instructions; give the sentence with --instruction.")
        raise ValueError(
            f"{silent} of {len(headers)} episodes of {source.name} have no instruction; give theirs with "
            "--missing-instruction, or one for all with --instruction."
        )
    hz = settings.control_hz or source.control_hz
    if hz is None:
        raise ValueError(f"{source.name} does not say how fast it was recorded; give --control-hz.")
    name = settings.name or re.sub(r"[^a-z0-9]+", "-", source.name.lower()).strip("-") or "recorded"
    if name in TASKS:
        raise ValueError(
            f"{name!r} is a known task; import for it with --task {name}, or give the new one another --name."
        )
    horizon = settings.horizon or max(len(o.actions) for o in headers)
    chunk = settings.chunk or DEFAULT_CHUNK
    still = np.flatnonzero(statistics.high <= statistics.low)
    if still.size:
        report.notes.append(f"action dimension(s) {still.tolist()} never move and become 0")
    return Task(
        name=name,
        instructions=tuple(dict.fromkeys(str(o.instruction) for o in headers)),
        horizon=-(-horizon // chunk) * chunk,
        chunk=chunk,
        action_dim=headers[0].actions.shape[1],
        control_hz=hz,
        image_size=settings.image_size or DEFAULT_IMAGE_SIZE,
        start_states=StartStates(0, 0, 0, seed=settings.seed),
        action_low=tuple(statistics.low.tolist()),
        action_high=tuple(statistics.high.tolist()),
        success_tolerance_px=None,
    )


def _digest(headers: list[EpisodeHeader]) -> str:
    """Digest of the episodes, to detect another source under the same name."""
    digest = hashlib.sha256()
    for header in headers:
        digest.update(f"{header.key}{header.success}{header.instruction}".encode())
        for array in (header.actions, header.proprio):
            digest.update(b"" if array is None else np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _write_episodes(
    source: Source,
    headers: list[EpisodeHeader],
    task: Task,
    settings: ImportSettings,
    root: Path,
    report: ImportReport,
    progress: bool,
    stride: int,
) -> None:
    """Write the missing episodes; those of an interrupted import are kept."""
    held = _held_out(headers, settings)
    stores = {False: EpisodeStore(root), True: EpisodeStore(root / HELD_OUT)}
    present = {episode.meta["source_key"] for store in stores.values() for episode in store}
    with progress_bar(total=len(headers), desc="importing", unit="ep", disable=not progress) as bar:
        for header in headers:
            bar.update()
            if header.key not in present:
                try:
                    frames = source.frames(header.key, len(header.actions) * stride + 1, task.image_size)
                    frames = _flipped(frames[::stride], settings.flip)
                except EpisodeFault as fault:
                    report.skip(header.key, fault)
                    continue
                stores[header.key in held].append(_episode(header, frames, task, source))
            report.count(header.success, len(header.actions) + 1, header.key in held)


def _flipped(frames: np.ndarray, flip: str | None) -> np.ndarray:
    """Flipped images ``(T, H, W, 3)``."""
    if flip in ("vertical", "both"):
        frames = frames[:, ::-1]
    if flip in ("horizontal", "both"):
        frames = frames[:, :, ::-1]
    return np.ascontiguousarray(frames)


def _held_out(headers: list[EpisodeHeader], settings: ImportSettings) -> set[str]:
    """Keys of the episodes to hold out: all those of some start states."""
    starts = list(dict.fromkeys(o.start for o in headers))
    order = np.random.default_rng([settings.seed, 6]).permutation(len(starts))
    chosen = {starts[i] for i in order[: round(settings.holdout * len(starts))]}
    return {o.key for o in headers if o.start in chosen}


def _episode(header: EpisodeHeader, frames: np.ndarray, task: Task, source: Source) -> Episode:
    task_id = task.instructions.index(str(header.instruction))
    return Episode(
        frames=frames,
        actions=to_unit(header.actions, task.action_low, task.action_high),
        success=header.success,
        finish_step=len(header.actions),
        start_state_id=_start_state_id(frames[0], task.instructions[task_id]),
        task_id=task_id,
        instruction=task.instructions[task_id],
        meta={
            "task": task.name,
            "control_hz": task.control_hz,
            "source": f"{source.format}:{source.name}",
            "source_key": header.key,
            **header.meta,
        },
        proprio=header.proprio,
    )


def _start_state_id(frame: np.ndarray, instruction: str) -> int:
    """Start-state id: a hash of the first frame and the instruction."""
    digest = hashlib.sha256(frame.tobytes() + instruction.encode()).digest()
    return FIRST_RECORDED_ID + int.from_bytes(digest[:5], "little")

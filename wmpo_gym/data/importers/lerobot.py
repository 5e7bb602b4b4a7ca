"""LeRobotDataset v2.0, v2.1 (a file per episode) and v3 (episodes joined in files), with pyarrow and PyAV.

Row t of an episode holds frame t and action t. The frame after the last action is not recorded, so the last
action is dropped, unless the episode ended earlier. Columns ``actions``, ``actions.*`` and
``observation.states.*`` are also recognised; others can be given as options.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from wmpo_gym.data.importers.base import (
    EpisodeFault,
    EpisodeHeader,
    Source,
    SourceError,
    check_actions,
    choose_camera,
    faults,
    needs,
    refuse_pointer,
    shrink,
    zero_or_one,
)
from wmpo_gym.data.importers.settings import DEFAULT_OPTIONS, SourceOptions
from wmpo_gym.data.video import decode_picture, read_frames
from wmpo_gym.utils.io import read_json

VERSIONS = ("v2.0", "v2.1", "v3.0")
ACTIONS = ("action", "actions")
STATES = ("observation.state", "state")
SUCCESS, REWARD, IMAGINED, TASK_INDEX = "next.success", "next.reward", "imagined", "task_index"
# Columns of numbers that every data set has and that are neither action nor state.
BOOKKEEPING = ("timestamp", "frame_index", "episode_index", "index", TASK_INDEX, "next.done", SUCCESS, REWARD)


@dataclass(frozen=True)
class _Entry:
    """Location of an episode in the files.

    Attributes:
        index: ``episode_index``.
        length: Number of rows.
        sentences: Instructions in the episode's metadata; if empty, the rows' ``task_index`` is used.
        data: Parquet file, relative to the root.
        video: Video file, relative to the root; None if images are stored in the rows.
        first_frame: Index of the episode's first frame in that video.
    """

    index: int
    length: int
    sentences: tuple[str, ...]
    data: str
    video: str | None
    first_frame: int


class LeRobotSource(Source):
    """Episodes of one data set's directory.

    Args:
        path: The directory with ``meta/info.json``.
        options: Camera (its key, or the part after the last dot) and columns.

    Raises:
        SourceError: If the metadata cannot be read or have another version, or if camera or columns are
            ambiguous.
    """

    format = "lerobot"

    def __init__(self, path: Path, options: SourceOptions = DEFAULT_OPTIONS) -> None:
        needs("pyarrow")
        self.refuse_options(options, ("camera", "action_columns", "state_columns", "action_from_state"))
        self.path, self.name = path, path.resolve().name
        info = read_json(path / "meta" / "info.json")
        version = info.get("codebase_version") if isinstance(info, dict) else None
        if version not in VERSIONS:
            raise SourceError(
                f"{path / 'meta' / 'info.json'} is of version {version!r}; those read here are "
                f"{', '.join(VERSIONS)}. Convert it with LeRobot's own scripts."
            )
        try:
            with faults():
                self._info = info
                self.control_hz = float(info["fps"])
                self.fps = self.control_hz
                features = info["features"]
                self.camera = choose_camera(_cameras(features), options.camera, str(path))
                self._in_video = features[self.camera]["dtype"] == "video"
                self._action_from_state = options.action_from_state
                self._action, self._state = self._choose_columns(features, options)
                read: Any = self._entries_v3 if version.startswith("v3") else self._entries_v2
                self._entries: dict[str, _Entry] = {f"episode_{e.index:06d}": e for e in read()}
        except EpisodeFault as error:
            raise SourceError(
                f"{path / 'meta'} does not describe a data set ({error}); download or copy it again."
            ) from error
        if not self._entries:
            raise SourceError(f"{path} holds no episode.")
        self._table: tuple[str, dict[str, np.ndarray]] | None = None  # the file read last

    def _choose_columns(
        self, features: dict[str, Any], options: SourceOptions
    ) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The columns of action and robot state: the requested ones, else those found by name."""
        numbers = [k for k, f in features.items() if str(f["dtype"]).startswith(("float", "int", "bool"))]
        numbers = [k for k in numbers if k not in (*BOOKKEEPING, IMAGINED)]
        known = ", ".join(numbers) or "none"
        for option in ("action_columns", "state_columns"):
            for name in getattr(options, option):
                if name not in features:
                    raise SourceError(
                        f"{self.path} has no column {name!r} for --{option.replace('_', '-')}; its columns "
                        f"of numbers are {known}."
                    )
        prefixes = ("observation.state.", "observation.states.")
        state = options.state_columns or _found(numbers, STATES, prefixes) or STATES[:1]
        if options.action_from_state:
            if state[0] not in features:
                raise SourceError(
                    f"{self.path} has no robot state to take actions from; name it with --state-columns. Its "
                    f"columns of numbers are {known}."
                )
            return (), tuple(state)
        action = options.action_columns or _found(numbers, ACTIONS, ())
        if not action:
            split = _found(numbers, (), ("action.", "actions."))
            if len(split) != 1:
                raise SourceError(
                    f"{self.path} has no column 'action'. Its columns of numbers are {known}; name those "
                    "that together are the action with --action-columns, or take the next step's state as "
                    "the action with --action-from-state."
                )
            action = split
        return tuple(action), tuple(state)

    # -- descriptions ----------------------------------------------------------------------------------------
    @cached_property
    def _sentences(self) -> dict[int, str]:
        """The instructions by ``task_index``; empty if the data set lists none."""
        lines, table = self.path / "meta" / "tasks.jsonl", self.path / "meta" / "tasks.parquet"
        if lines.is_file():
            return {int(row["task_index"]): str(row["task"]) for row in _json_lines(lines)}
        if not table.is_file():
            return {}
        refuse_pointer(table)
        # pandas writes the sentences as a column, or as the index of the table.
        rows = _read_table(table).to_pylist()
        return {int(r[TASK_INDEX]): str(r.get("task", r.get("__index_level_0__"))) for r in rows}

    def _entries_v2(self) -> Iterator[_Entry]:
        for episode in _json_lines(self.path / "meta" / "episodes.jsonl"):
            index = int(episode["episode_index"])
            place = {
                "episode_index": index,
                "episode_chunk": index // int(self._info["chunks_size"]),
                "video_key": self.camera,
            }
            video = self._info["video_path"].format(**place) if self._in_video else None
            yield _Entry(
                index,
                int(episode["length"]),
                _texts(episode.get("tasks")),
                self._info["data_path"].format(**place),
                video,
                0,
            )

    def _entries_v3(self) -> Iterator[_Entry]:
        """Location of each episode; entries missing in ``meta/episodes`` are looked up in the data files."""
        files = sorted((self.path / "meta" / "episodes").glob("*/*.parquet"))
        if not files:
            raise EpisodeFault("no file meta/episodes/*/*.parquet")
        video = f"videos/{self.camera}"
        wanted = ["episode_index", "length", "tasks", "data/chunk_index", "data/file_index"]
        wanted += [f"{video}/chunk_index", f"{video}/file_index", f"{video}/from_timestamp"]
        rows = [row for file in files for row in _read_table(file, wanted).to_pylist()]
        found = None if all("data/file_index" in row for row in rows) else self._find_in_files()
        for row in rows:
            index, first, clip = int(row["episode_index"]), 0, None
            if found is None:
                chunk, number, offset = row["data/chunk_index"], row["data/file_index"], 0
            elif index in found:
                chunk, number, offset = found[index]
            else:
                raise EpisodeFault(f"no data file holds episode {index}")
            if self._in_video:
                if f"{video}/file_index" in row:
                    clip = self._place(
                        "video_path", row[f"{video}/chunk_index"], row[f"{video}/file_index"], index
                    )
                    first = round(row[f"{video}/from_timestamp"] * self.fps)
                else:  # then videos are cut like the data files
                    clip, first = self._place("video_path", chunk, number, index), offset
            data = self._place("data_path", chunk, number, index)
            yield _Entry(index, int(row["length"]), _texts(row.get("tasks")), data, clip, first)

    def _place(self, template: str, chunk: int, number: int, episode: int) -> str:
        """Format a path of ``info.json``, with any names of the two numbers."""
        return str(self._info[template]).format(
            video_key=self.camera,
            chunk_index=chunk,
            file_index=number,
            episode_chunk=chunk,
            episode_file=number,
            episode_index=episode,
        )

    def _find_in_files(self) -> dict[int, tuple[int, int, int]]:
        """Chunk, file and first row of every episode, from the data files themselves."""
        found: dict[int, tuple[int, int, int]] = {}
        for file in sorted((self.path / "data").glob("*/*.parquet")):
            refuse_pointer(file)
            numbers = [int("".join(filter(str.isdigit, part))) for part in (file.parent.name, file.stem)]
            episodes = _read_table(file, ["episode_index"])["episode_index"].to_numpy()
            for index, first in zip(*np.unique(episodes, return_index=True), strict=True):
                found[int(index)] = (*numbers, int(first))  # type: ignore[assignment]
        return found

    def _file(self, name: str) -> Path:
        """A file of the data set; one that is not inside its directory is refused."""
        if os.path.isabs(name) or os.path.normpath(name).startswith(".."):
            raise EpisodeFault(f"{name!r} lies outside the data set")
        path = self.path / name
        if not path.is_file():
            raise EpisodeFault(f"{name} is missing")
        refuse_pointer(path)
        return path

    # -- episodes --------------------------------------------------------------------------------------------
    def keys(self) -> list[str]:
        """Names of the episodes in order."""
        return list(self._entries)

    def header(self, key: str) -> EpisodeHeader:
        """See :meth:`Source.header`."""
        entry = self._entries[key]
        with faults():
            rows = self._rows(entry)
            state = self._robot_state(rows)
            if not self._action_from_state:
                actions = check_actions(_joined(rows, self._action))
            elif state is None:
                raise EpisodeFault("its robot state, which is to be the action, is missing or not finite")
            else:
                actions = check_actions(state[1:])
            flags = _flags(rows)
            imagined = zero_or_one(rows.get(IMAGINED))
            sentence, notes = self._sentence(entry, rows)
        return EpisodeHeader(
            key,
            actions,
            entry.length,
            sentence,
            key,
            flags=None if flags is None else flags[: len(actions)],
            meta={"imagined": True} if imagined is not None and imagined.any() else {},
            proprio=state,
            notes=notes,
        )

    def _robot_state(self, rows: dict[str, np.ndarray]) -> np.ndarray | None:
        if not self._state or any(name not in rows for name in self._state):
            return None
        return _joined(rows, self._state)

    def _sentence(self, entry: _Entry, rows: dict[str, np.ndarray]) -> tuple[str | None, list[str]]:
        """The episode's first sentence, and a note if it has several."""
        sentences = entry.sentences
        if not sentences and TASK_INDEX in rows:
            order = dict.fromkeys(int(i) for i in rows[TASK_INDEX] if i == i)
            sentences = tuple(self._sentences[i] for i in order if self._sentences.get(i))
        if len(sentences) > 1:
            return sentences[0], [
                f"some episodes have several sentences; the first is taken: {sentences[0]!r}"
            ]
        return (sentences[0] if sentences else None), []

    def _rows(self, entry: _Entry) -> dict[str, np.ndarray]:
        """The numeric columns of an episode."""
        if self._table is None or self._table[0] != entry.data:
            self._table = (entry.data, self._read_columns(self._file(entry.data)))
        columns = self._table[1]
        mine = np.flatnonzero(columns["episode_index"] == entry.index)
        if len(mine) != entry.length:
            raise EpisodeFault(f"{len(mine)} of its {entry.length} rows are there")
        order = mine[np.argsort(columns["frame_index"][mine], kind="stable")]
        return {name: column[order] for name, column in columns.items()}

    def _read_columns(self, file: Path) -> dict[str, np.ndarray]:
        wanted = ("episode_index", "frame_index", *self._action, *self._state)
        table = _read_table(file, [*wanted, TASK_INDEX, SUCCESS, REWARD, IMAGINED])
        columns = {}
        for name in table.column_names:
            try:
                column = _column(table[name])
            except ValueError:
                if name not in self._state or self._action_from_state:  # an episode can do without it
                    raise
                continue
            if name not in (*self._action, *self._state):
                column = column.reshape(len(column))
            elif column.ndim == 1:
                column = column[:, None]
            columns[name] = column
        if missing := [name for name in self._action if name not in columns]:
            raise EpisodeFault(f"{file.name} has no column {missing[0]!r}")
        return columns

    def frames(self, key: str, count: int, size: int) -> np.ndarray:
        """See :meth:`Source.frames`."""
        entry = self._entries[key]
        with faults():
            if entry.video is None:
                images = self._stored_images(entry)
            else:
                images = read_frames(self._file(entry.video), self.fps, entry.first_frame, count)
            return shrink((p[None] for p in images), count, size)

    def _stored_images(self, entry: _Entry) -> Iterator[np.ndarray]:
        """Images in the rows (PNG or JPEG), or in files named by the rows."""
        import pyarrow.parquet as pq

        table = pq.read_table(
            self._file(entry.data),
            columns=["frame_index", self.camera],
            filters=[("episode_index", "=", entry.index)],
        ).sort_by("frame_index")
        for cell in table[self.camera]:
            picture = cell.as_py()
            if isinstance(picture, dict):
                picture = picture["bytes"] or self._file(picture["path"]).read_bytes()
            yield decode_picture(picture)


def _json_lines(file: Path) -> list[dict[str, Any]]:
    with open(file, encoding="utf-8") as lines:
        return [json.loads(line) for line in lines if line.strip()]


def _texts(tasks: Any) -> tuple[str, ...]:
    """The sentences of a description, none of them empty."""
    listed = tasks if isinstance(tasks, (list, tuple)) else [tasks]
    return tuple(str(text) for text in listed if text is not None and str(text).strip())


def _cameras(features: dict[str, Any]) -> list[str]:
    """Names of the colour cameras; depth images are excluded."""
    names = []
    for name, feature in features.items():
        details = {**(feature.get("video_info") or {}), **(feature.get("info") or {})}
        depth = details.get("video.is_depth_map") or details.get("is_depth_map") or "depth" in name.lower()
        if feature["dtype"] in ("video", "image") and not depth:
            names.append(name)
    return names


def _found(columns: list[str], names: tuple[str, ...], prefixes: tuple[str, ...]) -> list[str]:
    """The first of ``names`` that is there, else all columns that begin with one of the prefixes."""
    for name in names:
        if name in columns:
            return [name]
    return [c for c in columns if prefixes and c.startswith(prefixes)]


def _joined(rows: dict[str, np.ndarray], names: tuple[str, ...]) -> np.ndarray:
    return np.concatenate([rows[name] for name in names], axis=1)


def _flags(rows: dict[str, np.ndarray]) -> np.ndarray | None:
    """Success after each row: the success column, or rewards of 0 and 1."""
    for name in (SUCCESS, REWARD):
        column = rows.get(name)
        if column is None or not np.isfinite(column.astype(np.float64)).any():
            continue  # recorded nowhere
        return zero_or_one(np.nan_to_num(column.astype(np.float64)))
    return None


def _read_table(file: Path, columns: list[str] | None = None) -> Any:
    """A Parquet file, or those of the named columns that it has."""
    import pyarrow.parquet as pq

    if columns is not None:
        present = pq.read_schema(file).names
        columns = [name for name in dict.fromkeys(columns) if name in present]
    return pq.read_table(file, columns=columns)


def _column(column: Any) -> np.ndarray:
    """A column of numbers ``(N,)`` or of equally long lists of numbers ``(N, D)``."""
    import pyarrow as pa

    array = column.combine_chunks()
    if not (pa.types.is_list(array.type) or pa.types.is_fixed_size_list(array.type)):
        values = array.to_numpy(zero_copy_only=False)
        if values.dtype == object:  # truth values or numbers with gaps
            values = np.array([np.nan if v is None else float(v) for v in values])
        return values
    values = array.flatten().to_numpy(zero_copy_only=False)
    if array.null_count or len(values) % max(len(array), 1):
        raise EpisodeFault("rows of unequal length")
    return values.reshape(len(array), -1)

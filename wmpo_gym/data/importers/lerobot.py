"""LeRobotDataset v2.1 (a file per episode) and v3 (episodes joined in files), read with pyarrow and PyAV.

Row t of an episode holds picture t and action t. The picture after the last action is not recorded, so the
last action is left out, unless the episode ended before.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from wmpo_gym.data.importers.base import (
    EpisodeFault,
    Outline,
    Source,
    SourceError,
    check_actions,
    choose_camera,
    faults,
    needs,
    outcome,
    shrink,
    usable_states,
    zero_or_one,
)
from wmpo_gym.data.video import decode_picture, read_frames
from wmpo_gym.utils.io import read_json

VERSIONS = ("v2.0", "v2.1", "v3.0")
STATE = "observation.state"


@dataclass(frozen=True)
class _Entry:
    """Where an episode lies.

    Attributes:
        index: ``episode_index``.
        length: Rows.
        instruction: The sentence, None if the data set has none.
        data: Parquet file, relative to the root.
        video: Video file, relative to the root; None where pictures are stored in the rows.
        first_frame: Number of the episode's first frame in that video.
    """

    index: int
    length: int
    instruction: str | None
    data: str
    video: str | None
    first_frame: int


class LeRobotSource(Source):
    """Episodes of one data set's directory.

    Args:
        path: The directory with ``meta/info.json``.
        camera: Its key, or what stands behind the last dot of it.

    Raises:
        SourceError: If the description cannot be read, is of another version, or the camera has to be chosen.
    """

    format = "lerobot"

    def __init__(self, path: Path, camera: str | None = None) -> None:
        needs("pyarrow")
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
                self.camera = choose_camera(
                    [k for k, f in features.items() if f["dtype"] in ("video", "image")], camera, str(path)
                )
                self._in_video = features[self.camera]["dtype"] == "video"
                read: Any = self._entries_v3 if version.startswith("v3") else self._entries_v2
                self._entries: dict[str, _Entry] = {f"episode_{e.index:06d}": e for e in read()}
        except EpisodeFault as error:
            raise SourceError(
                f"{path / 'meta'} does not describe a data set ({error}); download or copy it again."
            ) from error
        if not self._entries:
            raise SourceError(f"{path} holds no episode.")
        self._table: tuple[str, dict[str, np.ndarray]] | None = None  # the file read last

    # -- descriptions ----------------------------------------------------------------------------------------
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
                _first_text(episode.get("tasks")),
                self._info["data_path"].format(**place),
                video,
                0,
            )

    def _entries_v3(self) -> Iterator[_Entry]:
        import pyarrow.parquet as pq

        video, columns = f"videos/{self.camera}", ["episode_index", "length", "tasks"]
        columns += ["data/chunk_index", "data/file_index"]
        if self._in_video:
            columns += [f"{video}/chunk_index", f"{video}/file_index", f"{video}/from_timestamp"]
        files = sorted((self.path / "meta" / "episodes").glob("*/*.parquet"))
        if not files:
            raise EpisodeFault("no file meta/episodes/*/*.parquet")
        for file in files:
            for row in pq.read_table(file, columns=columns).to_pylist():
                data = self._info["data_path"].format(
                    chunk_index=row["data/chunk_index"], file_index=row["data/file_index"]
                )
                first, clip = 0, None
                if self._in_video:
                    clip = self._info["video_path"].format(
                        video_key=self.camera,
                        chunk_index=row[f"{video}/chunk_index"],
                        file_index=row[f"{video}/file_index"],
                    )
                    first = round(row[f"{video}/from_timestamp"] * self.fps)
                index, length = int(row["episode_index"]), int(row["length"])
                yield _Entry(index, length, _first_text(row["tasks"]), data, clip, first)

    def _file(self, name: str) -> Path:
        """A file of the data set; one that is not inside its directory is refused."""
        if os.path.isabs(name) or os.path.normpath(name).startswith(".."):
            raise EpisodeFault(f"{name!r} lies outside the data set")
        path = self.path / name
        if not path.is_file():
            raise EpisodeFault(f"{name} is missing")
        return path

    # -- episodes --------------------------------------------------------------------------------------------
    def keys(self) -> list[str]:
        """Names of the episodes in order."""
        return list(self._entries)

    def outline(self, key: str) -> Outline:
        """See :meth:`Source.outline`."""
        entry = self._entries[key]
        with faults():
            rows = self._rows(entry)
            actions = check_actions(rows["action"])
            flags = zero_or_one(rows.get("next.success", rows.get("next.reward")))
            success, steps = outcome(flags, entry.length, len(actions))
            imagined = zero_or_one(rows.get("imagined"))
        state = usable_states(rows[STATE], steps + 1) if STATE in rows else None
        meta = {"imagined": True} if imagined is not None and imagined.any() else {}
        return Outline(key, actions[:steps], success, entry.instruction, key, meta, state)

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
        import pyarrow.parquet as pq

        wanted = ("episode_index", "frame_index", "action", STATE, "next.success", "next.reward", "imagined")
        present = pq.read_schema(file).names
        table = pq.read_table(file, columns=[name for name in wanted if name in present])
        columns = {}
        for name in table.column_names:
            try:
                column = _column(table[name])
            except ValueError:
                if name != STATE:  # an episode can do without it
                    raise
                continue
            if name not in ("action", STATE):
                column = column.reshape(len(column))
            elif column.ndim == 1:
                column = column[:, None]
            columns[name] = column
        return columns

    def frames(self, key: str, count: int, size: int) -> np.ndarray:
        """See :meth:`Source.frames`."""
        entry = self._entries[key]
        with faults():
            if entry.video is None:
                pictures = self._stored_pictures(entry)
            else:
                pictures = read_frames(self._file(entry.video), self.fps, entry.first_frame, count)
            return shrink((p[None] for p in pictures), count, size)

    def _stored_pictures(self, entry: _Entry) -> Iterator[np.ndarray]:
        """Pictures from the rows (PNG or JPEG), or from files that the rows name."""
        import pyarrow.parquet as pq

        table = pq.read_table(
            self._file(entry.data),
            columns=["frame_index", self.camera],
            filters=[("episode_index", "=", entry.index)],
        ).sort_by("frame_index")
        for cell in table[self.camera]:
            picture = cell.as_py()
            yield decode_picture(picture["bytes"] or self._file(picture["path"]).read_bytes())


def _json_lines(file: Path) -> list[dict[str, Any]]:
    with open(file, encoding="utf-8") as lines:
        return [json.loads(line) for line in lines if line.strip()]


def _first_text(tasks: Any) -> str | None:
    return str(tasks[0]) if tasks else None


def _column(column: Any) -> np.ndarray:
    """A column of numbers ``(N,)`` or of equally long lists of numbers ``(N, D)``."""
    import pyarrow as pa

    array = column.combine_chunks()
    if not (pa.types.is_list(array.type) or pa.types.is_fixed_size_list(array.type)):
        return array.to_numpy(zero_copy_only=False)
    values = array.flatten().to_numpy(zero_copy_only=False)
    if array.null_count or len(values) % max(len(array), 1):
        raise EpisodeFault("rows of unequal length")
    return values.reshape(len(array), -1)

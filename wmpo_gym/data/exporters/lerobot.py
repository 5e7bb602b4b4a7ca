"""Episodes as a LeRobotDataset v3, written with pyarrow and PyAV.

Row t of an episode holds picture t, the robot's state where it was recorded, action t in the robot's units,
and whether the task was done after it.
An episode of T actions has T + 1 pictures and becomes T + 1 rows; the last one repeats the last action, which
is not executed there, and has ``next.done``. Every row says whether it was ``imagined``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

from wmpo_gym.data.episode import Episode
from wmpo_gym.data.importers.base import needs
from wmpo_gym.data.importers.lerobot import STATES
from wmpo_gym.data.statistics import from_unit
from wmpo_gym.tasks import Task
from wmpo_gym.utils.io import write_dir_atomic, write_json_atomic
from wmpo_gym.utils.progress import progress_bar

CODEBASE_VERSION = "v3.0"
FILES_PER_CHUNK, DATA_FILE_MB, VIDEO_FILE_MB = 1000, 100, 200  # a file this large is followed by another
PLACE = "chunk-{chunk_index:03d}/file-{file_index:03d}"
DATA_PATH, VIDEO_PATH = f"data/{PLACE}.parquet", f"videos/{{video_key}}/{PLACE}.mp4"
QUANTILES = (0.01, 0.1, 0.5, 0.9, 0.99)
# Every other frame is a key frame, so that any frame is found quickly; none refers to a later one.
CODECS = {
    "h264": ("libx264", "yuv420p", {"crf": "18", "g": "2", "bf": "0"}),
    "lossless": ("libx264rgb", "rgb24", {"qp": "0", "g": "2", "bf": "0", "preset": "veryfast"}),
}


@dataclass(frozen=True)
class ExportReport:
    """What was written.

    Attributes:
        episodes: Episodes.
        frames: Rows, one per picture.
        imagined: Episodes among them that a world model made.
    """

    episodes: int
    frames: int
    imagined: int


def export_lerobot(
    episodes: Iterable[Episode],
    out: str | Path,
    task: Task,
    *,
    camera: str = "main",
    codec: str = "h264",
    total: int | None = None,
    progress: bool = True,
) -> ExportReport:
    """Write episodes as a LeRobotDataset v3; complete or not at all.

    Args:
        episodes: Episodes of the task; the outcome is known of all or none, and so is the robot's state.
        out: Directory; made by this call.
        task: Gives the actions' limits, the instructions and the frame rate.
        camera: Name behind ``observation.images.``.
        codec: ``"h264"`` (small, what players and LeRobot are used to) or ``"lossless"`` (H.264 on RGB).
        total: Number of episodes, for the progress bar.
        progress: Show a progress bar.

    Raises:
        ValueError: If ``out`` exists, or an episode does not fit the task or the others.
        ImportError: If pyarrow is missing.
    """
    needs("pyarrow")
    out = Path(out)
    if out.exists():
        raise ValueError(f"{out} exists; choose another directory.")
    if codec not in CODECS:
        raise ValueError(f"Unknown codec {codec!r}; choose one of {', '.join(CODECS)}.")
    if task.control_hz != int(task.control_hz):
        raise ValueError(f"A LeRobotDataset has whole frames per second, the task {task.control_hz}.")
    with write_dir_atomic(out) as temporary:
        writer = _Writer(temporary, task, f"observation.images.{camera}", codec)
        try:
            for episode in progress_bar(
                episodes, total=total, desc="exporting", unit="ep", disable=not progress
            ):
                writer.add(episode)
        finally:
            writer.close()
        writer.describe()
    return writer.report()


class _Writer:
    """A data set in the making."""

    def __init__(self, root: Path, task: Task, camera: str, codec: str) -> None:
        self.root, self.task, self.camera, self.codec = root, task, camera, codec
        self.fps = int(task.control_hz)
        self.labelled: bool | None = None
        self.state_dim: int | None = None
        self.entries: list[dict[str, Any]] = []
        self.samples: dict[str, list[np.ndarray]] = {}
        self._data: Any = None
        self._video: Any = None
        self._stream: Any = None
        self._data_path = self._video_path = root
        self._data_file, self._video_file, self._video_frames = -1, -1, 0

    def add(self, episode: Episode) -> None:
        """Append an episode."""
        self._check(episode)
        frames = np.asarray(episode.frames)
        index, rows = len(self.entries), len(frames)
        first = self.entries[-1]["dataset_to_index"] if self.entries else 0
        actions = from_unit(episode.actions, self.task.action_low, self.task.action_high)
        actions = np.concatenate([actions, actions[-1:]])
        self._write_rows(self._columns(episode, actions, index, first))
        start = self._write_frames(frames)
        chunk, file = divmod(self._video_file, FILES_PER_CHUNK)
        samples = {"action": actions, self.camera: _pixels(frames)}
        if episode.proprio is not None:
            samples[STATES[0]] = episode.proprio
        entry = {
            "episode_index": index,
            "tasks": [episode.instruction],
            "length": rows,
            "data/chunk_index": self._data_file // FILES_PER_CHUNK,
            "data/file_index": self._data_file % FILES_PER_CHUNK,
            "dataset_from_index": first,
            "dataset_to_index": first + rows,
            f"videos/{self.camera}/chunk_index": chunk,
            f"videos/{self.camera}/file_index": file,
            f"videos/{self.camera}/from_timestamp": start / self.fps,
            f"videos/{self.camera}/to_timestamp": (start + rows) / self.fps,
            "meta/episodes/chunk_index": 0,
            "meta/episodes/file_index": 0,
            "imagined": bool(episode.meta.get("imagined", False)),
        }
        for name, values in samples.items():
            self.samples.setdefault(name, []).append(values)
            entry |= {f"stats/{name}/{k}": v for k, v in self._statistics(name, values).items()}
        self.entries.append(entry)

    def _check(self, episode: Episode) -> None:
        task, labelled = self.task, episode.success is not None
        side = task.image_size
        if episode.frames.shape[1:] != (side, side, 3) or episode.actions.shape[1:] != (task.action_dim,):
            raise ValueError(
                f"Task {task.name!r} has {side}x{side} pictures and {task.action_dim} numbers per action; an "
                f"episode has {episode.frames.shape[1:]} and {episode.actions.shape[1:]}."
            )
        if episode.instruction not in task.instructions or not episode.n_steps:
            raise ValueError(
                f"An episode has {episode.n_steps} steps of {episode.instruction!r}; wanted is at least one "
                f"step of {task.instructions}."
            )
        if self.labelled is None:
            self.labelled = labelled
        if labelled != self.labelled:
            raise ValueError(
                "Some episodes are labelled with their outcome and some are not; export them apart."
            )
        if self.state_dim is None:
            self.state_dim = episode.state_dim
        if episode.state_dim != self.state_dim:
            raise ValueError(
                f"The robot's state has {self.state_dim} numbers in some episodes and {episode.state_dim} in "
                "others; export them apart."
            )

    def _columns(self, episode: Episode, actions: np.ndarray, index: int, first: int) -> dict[str, Any]:
        rows = len(actions)
        step = np.arange(rows)
        columns: dict[str, Any] = {
            "action": actions,
            "next.done": step >= rows - 2 if episode.success else step == rows - 1,
            "imagined": np.full(rows, bool(episode.meta.get("imagined", False))),
            "timestamp": (step / self.fps).astype(np.float32),
            "frame_index": step,
            "episode_index": np.full(rows, index),
            "index": first + step,
            "task_index": np.full(rows, self.task.instructions.index(episode.instruction)),
        }
        if episode.proprio is not None:
            columns[STATES[0]] = episode.proprio
        if self.labelled:
            done = (step >= rows - 2) & bool(episode.success)
            columns |= {"next.success": done, "next.reward": done.astype(np.float32)}
        return columns

    def _write_rows(self, columns: dict[str, Any]) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        def column(values: np.ndarray) -> Any:
            if values.ndim == 1:
                return pa.array(values)
            return pa.FixedSizeListArray.from_arrays(
                pa.array(values.reshape(-1), pa.float32()), values.shape[1]
            )

        table = pa.table({name: column(values) for name, values in columns.items()})
        if self._data is None or _megabytes(self._data_path) >= DATA_FILE_MB:
            self._close_data()
            self._data_file += 1
            self._data_path = self._place(DATA_PATH, self._data_file)
            self._data = pq.ParquetWriter(self._data_path, table.schema)
        self._data.write_table(table)

    def _write_frames(self, frames: np.ndarray) -> int:
        """Append frames; returns the number of the first one in its file."""
        if self._video is None or _megabytes(self._video_path) >= VIDEO_FILE_MB:
            self._close_video()
            self._video_file, self._video_frames = self._video_file + 1, 0
            self._video_path = self._place(VIDEO_PATH, self._video_file)
            self._open_video(*frames.shape[1:3])
        start = self._video_frames
        for image in frames:
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            picture.pts = self._video_frames
            self._video.mux(self._stream.encode(picture))
            self._video_frames += 1
        return start

    def _open_video(self, height: int, width: int) -> None:
        encoder, pixels, options = CODECS[self.codec]
        self._video = av.open(str(self._video_path), "w", format="mp4")
        stream: Any = self._video.add_stream(encoder, rate=self.fps)
        odd = pixels == "yuv420p" and (height % 2 or width % 2)
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv444p" if odd else pixels
        stream.options, stream.time_base = dict(options), Fraction(1, self.fps)
        stream.codec_context.thread_count = 1
        self._stream = stream

    def _place(self, pattern: str, number: int) -> Path:
        chunk, file = divmod(number, FILES_PER_CHUNK)
        path = self.root / pattern.format(chunk_index=chunk, file_index=file, video_key=self.camera)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def _close_data(self) -> None:
        if self._data is not None:
            self._data.close()
            self._data = None

    def _close_video(self) -> None:
        if self._video is not None:
            self._video.mux(self._stream.encode())
            self._video.close()
            self._video = None

    def close(self) -> None:
        """Finish the open files."""
        self._close_data()
        self._close_video()

    # -- the description -------------------------------------------------------------------------------------
    def describe(self) -> None:
        """Write everything under ``meta/``.

        Raises:
            ValueError: If there is no episode.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        if not self.entries:
            raise ValueError("There is no episode to export.")
        write_json_atomic(self.root / "meta" / "info.json", self._info())
        statistics = {k: self._statistics(k, np.concatenate(v)) for k, v in self.samples.items()}
        write_json_atomic(self.root / "meta" / "stats.json", statistics)
        tasks = pa.table(
            {"task_index": np.arange(len(self.task.instructions)), "task": list(self.task.instructions)}
        )
        pq.write_table(
            tasks.replace_schema_metadata({"pandas": json.dumps(_indexed_by("task", "task_index"))}),
            self.root / "meta" / "tasks.parquet",
        )
        episodes = self.root / "meta" / "episodes" / f"{PLACE.format(chunk_index=0, file_index=0)}.parquet"
        episodes.parent.mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist(self.entries), episodes)

    def _info(self) -> dict[str, Any]:
        def column(dtype: str) -> dict[str, Any]:
            return {"dtype": dtype, "shape": [1], "names": None}

        def vector(name: str, dim: int) -> dict[str, Any]:
            return {"dtype": "float32", "shape": [dim], "names": [f"{name}_{i}" for i in range(dim)]}

        side = self.task.image_size
        flags = {"next.done": "bool", "imagined": "bool"}
        if self.labelled:
            flags |= {"next.success": "bool", "next.reward": "float32"}
        numbers = dict.fromkeys(("frame_index", "episode_index", "index", "task_index"), "int64")
        features: dict[str, Any] = {
            self.camera: {
                "dtype": "video",
                "shape": [side, side, 3],
                "names": ["height", "width", "channels"],
                "info": self._video_info(),
            },
            "action": vector("action", self.task.action_dim),
        }
        if self.state_dim:
            features[STATES[0]] = vector("state", self.state_dim)
        features |= {k: column(d) for k, d in (flags | {"timestamp": "float32"} | numbers).items()}
        return {
            "codebase_version": CODEBASE_VERSION,
            "robot_type": None,
            "total_episodes": len(self.entries),
            "total_frames": self.entries[-1]["dataset_to_index"],
            "total_tasks": len(self.task.instructions),
            "chunks_size": FILES_PER_CHUNK,
            "data_files_size_in_mb": DATA_FILE_MB,
            "video_files_size_in_mb": VIDEO_FILE_MB,
            "fps": self.fps,
            "splits": {"train": f"0:{len(self.entries)}"},
            "data_path": DATA_PATH,
            "video_path": VIDEO_PATH,
            "features": features,
        }

    def _video_info(self) -> dict[str, Any]:
        with av.open(str(self._video_path)) as container:
            stream = container.streams.video[0]
            return {
                "video.height": stream.height,
                "video.width": stream.width,
                "video.codec": stream.codec.canonical_name,
                "video.pix_fmt": stream.pix_fmt,
                "video.is_depth_map": False,
                "video.fps": self.fps,
                "video.channels": 3,
                "has_audio": False,
            }

    def _statistics(self, name: str, values: np.ndarray) -> dict[str, Any]:
        """Statistics of ``(N, D)`` values; those of pixels have the shape (3, 1, 1)."""
        shape = (3, 1, 1) if name == self.camera else (-1,)
        values = values.astype(np.float64)
        made = {"min": values.min(0), "max": values.max(0), "mean": values.mean(0), "std": values.std(0)}
        for q, quantile in zip(QUANTILES, np.quantile(values, QUANTILES, axis=0), strict=True):
            made[f"q{round(100 * q):02d}"] = quantile
        return {k: v.reshape(shape).tolist() for k, v in made.items()} | {"count": [len(values)]}

    def report(self) -> ExportReport:
        """What was written."""
        imagined = sum(entry["imagined"] for entry in self.entries)
        return ExportReport(len(self.entries), self.entries[-1]["dataset_to_index"], imagined)


def _pixels(frames: np.ndarray) -> np.ndarray:
    """A sample of an episode's pixels, float32 (N, 3) in [0, 1]."""
    some = [np.unique(np.linspace(0, n - 1, 16).astype(int)) for n in frames.shape[:3]]
    return frames[np.ix_(*some)].reshape(-1, 3).astype(np.float32) / 255


def _megabytes(path: Path) -> float:
    # An encoder that has not given its first packet yet has not made the file either.
    return path.stat().st_size / 2**20 if path.exists() else 0.0


def _indexed_by(index: str, column: str) -> dict[str, Any]:
    """What pandas wants to find in a Parquet file to take a text column as the index."""

    def described(name: str, kind: str, dtype: str) -> dict[str, Any]:
        return {
            "name": name,
            "field_name": name,
            "pandas_type": kind,
            "numpy_type": dtype,
            "metadata": None,
        }

    return {
        "index_columns": [index],
        "column_indexes": [],
        "columns": [described(column, "int64", "int64"), described(index, "unicode", "object")],
        "pandas_version": "2.0.0",
    }

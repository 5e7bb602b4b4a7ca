"""Episodes on disk: one directory each, complete or absent.

::

    episode_000123/
        frames.mkv          lossless FFV1 video (or frames.npy)
        data.safetensors    actions float32 (T, D); proprio float32 (T + 1, P) if it was recorded
        meta.json           outcome, ids, instruction, checksums of the two files above
"""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from wmpo_gym.data.episode import Episode
from wmpo_gym.data.frames import FrameArray, open_frame_cache, open_npy_frames, write_frame_cache
from wmpo_gym.utils.io import (
    ArtifactError,
    WriteError,
    load_safetensors,
    plain,
    read_json,
    save_safetensors,
    sha256,
    write_dir_atomic,
    write_json_atomic,
)

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
FRAME_FILES = {"ffv1": "frames.mkv", "npy": "frames.npy"}
CACHE = ".frames"  # directory of decoded frames in a store's directory


class BrokenEpisodeError(ArtifactError):
    """An episode directory is empty, half-written or damaged."""


def save_episode(directory: str | Path, episode: Episode, *, codec: str = "ffv1") -> Path:
    """Write one episode atomically (temporary name, then rename).

    Args:
        directory: The episode's directory; an existing episode is replaced.
        episode: The episode.
        codec: ``"ffv1"`` (lossless video) or ``"npy"`` (uncompressed, larger and faster).

    Returns:
        The directory.

    Raises:
        ValueError: If the codec is unknown.
        WriteError: If the disk is full; no directory is created then.
    """
    if codec not in FRAME_FILES:
        raise ValueError(f"Unknown codec {codec!r}; choose one of {', '.join(FRAME_FILES)}.")
    directory, frames_name = Path(directory), FRAME_FILES[codec]
    # No fsync: an episode damaged by a power cut is detected by its checksums and skipped.
    with write_dir_atomic(directory, durable=False) as temporary:
        frames_file, data_file = temporary / frames_name, temporary / "data.safetensors"
        frames_file.write_bytes(_encode(episode, codec))
        arrays = {"actions": episode.actions}
        if episode.proprio is not None:
            arrays["proprio"] = episode.proprio
        save_safetensors(data_file, arrays, durable=False)
        meta = {
            "format_version": FORMAT_VERSION,
            "success": episode.success,
            "finish_step": episode.finish_step,
            "start_state_id": episode.start_state_id,
            "task_id": episode.task_id,
            "instruction": episode.instruction,
            "meta": episode.meta,
            "sha256": {file.name: sha256(file) for file in (frames_file, data_file)},
        }
        write_json_atomic(temporary / "meta.json", plain(meta), durable=False)
    return directory


def _encode(episode: Episode, codec: str) -> bytes:
    if codec == "npy":
        buffer = io.BytesIO()
        np.save(buffer, np.asarray(episode.frames), allow_pickle=False)
        return buffer.getvalue()
    from wmpo_gym.data.video import encode_lossless

    return encode_lossless(np.asarray(episode.frames), float(episode.meta.get("control_hz", 10.0)))


def load_episode(directory: str | Path) -> Episode:
    """Read one episode and verify its checksums.

    Raises:
        BrokenEpisodeError: If a file is missing, truncated or modified, or the files are inconsistent.
    """
    return _read_episode(Path(directory), lambda file, _: _decode(file))


def open_episode(directory: str | Path, cache: str | Path) -> Episode:
    """Verify one episode as :func:`load_episode` does, but leave its frames on disk.

    Args:
        directory: The episode's directory.
        cache: Directory of decoded frames; a video is decoded into it once.

    Returns:
        The episode; its ``frames`` are :class:`~wmpo_gym.data.frames.StoredFrames`.

    Raises:
        BrokenEpisodeError: As :func:`load_episode`.
        WriteError: If the cache cannot be written.
    """

    def frames(file: Path, digest: str) -> FrameArray:
        if file.suffix == ".npy":
            return open_npy_frames(file)
        cached = Path(cache) / digest[:2] / f"{digest}.frames"
        restore = partial(_restore_frames, str(file), digest, str(cached))
        found = open_frame_cache(cached, restore)
        if found is None:
            write_frame_cache(cached, _decode(file))
            found = open_frame_cache(cached, restore)
        if found is None:
            raise ArtifactError(f"{cached} is not what was written")
        return found

    return _read_episode(Path(directory), frames)


def _read_episode(directory: Path, frames_of: Callable[[Path, str], FrameArray]) -> Episode:
    """Read an episode after comparing its files with their checksums.

    Args:
        directory: The episode's directory.
        frames_of: Returns the frames for a file and its checksum.
    """
    try:
        meta = _read_meta(directory)
        for name, digest in meta["sha256"].items():
            if sha256(directory / name) != digest:
                raise ArtifactError(f"{name} is not what was written")
        frames_name = next(n for n in meta["sha256"] if n in FRAME_FILES.values())
        arrays = load_safetensors(directory / "data.safetensors", framework="np")
        fields = ("success", "finish_step", "start_state_id", "task_id", "meta")
        return Episode(
            frames=frames_of(directory / frames_name, meta["sha256"][frames_name]),
            actions=arrays["actions"],
            proprio=arrays.get("proprio"),
            instruction=sys.intern(meta["instruction"]),  # share equal strings between episodes
            **{name: meta[name] for name in fields},
        )
    except WriteError:
        raise
    except (ValueError, OSError, LookupError, TypeError, AttributeError, StopIteration) as error:
        raise BrokenEpisodeError(
            f"Broken episode {directory}: {error or type(error).__name__}. Delete that directory, or collect "
            "or copy it again."
        ) from error


def _restore_frames(video: str, digest: str, cached: str) -> None:
    """Decode a video into the cache again.

    Raises:
        BrokenEpisodeError: If the video is missing or damaged.
        WriteError: If the cache cannot be written.
    """
    try:
        if sha256(video) != digest:
            raise ArtifactError("the video is not what was written")
        frames = _decode(Path(video))
    except (ValueError, OSError) as error:
        raise BrokenEpisodeError(
            f"Broken episode {Path(video).parent}: its decoded frames in {cached} are missing or damaged "
            f"and cannot be made again: {error}. Delete that directory, or collect or copy it again."
        ) from error
    write_frame_cache(cached, frames)


def _read_meta(directory: Path) -> dict[str, Any]:
    meta = read_json(directory / "meta.json")
    if not isinstance(meta, dict) or meta.get("format_version") != FORMAT_VERSION:
        raise ArtifactError(f"meta.json does not describe an episode of format {FORMAT_VERSION}")
    return meta


def _decode(file: Path) -> np.ndarray:
    if file.suffix == ".npy":
        return np.load(file, allow_pickle=False)
    from wmpo_gym.data.video import decode_lossless

    return decode_lossless(file.read_bytes())


class EpisodeStore:
    """A directory of episodes with one writing process and any number of readers.

    Broken episodes are skipped, with one warning that counts and lists them.

    Args:
        root: The directory; it need not exist yet.
        codec: Codec for the frames of appended episodes, see :func:`save_episode`.
    """

    def __init__(self, root: str | Path, *, codec: str = "ffv1") -> None:
        self.root = Path(root)
        self.codec = codec
        self._next: int | None = None

    def directories(self) -> list[Path]:
        """All episode directories in order of writing, including broken ones."""
        return sorted(d for d in self.root.glob("episode_*") if d.is_dir())

    def append(self, episode: Episode) -> Path:
        """Write an episode under the next free number.

        Returns:
            Its directory.

        Raises:
            WriteError: If the disk is full; existing episodes are not affected.
        """
        if self._next is None:
            numbers = [int(d.name.rpartition("_")[2]) for d in self.directories() if d.name[8:].isdecimal()]
            self._next = max(numbers, default=-1) + 1
        path = save_episode(self.root / f"episode_{self._next:06d}", episode, codec=self.codec)
        self._next += 1
        return path

    def __len__(self) -> int:
        """Number of episodes with readable metadata."""
        return len(self._metas())

    def __iter__(self) -> Iterator[Episode]:
        """Valid episodes in order of writing; broken ones are skipped and reported at the end."""
        return self._whole(map(_or_error(load_episode), self.directories()))

    def _whole(self, found: Iterable[Episode | BrokenEpisodeError]) -> Iterator[Episode]:
        broken: list[BrokenEpisodeError] = []
        for episode in found:
            if isinstance(episode, BrokenEpisodeError):
                broken.append(episode)
            else:
                yield episode
        if broken:
            listed = "\n  ".join(str(e) for e in broken[:10])
            more = f"\n  and {len(broken) - 10} more" if len(broken) > 10 else ""
            logger.warning(
                "Skipped %d broken episode(s) in %s:\n  %s%s", len(broken), self.root, listed, more
            )

    def check_exists(self) -> None:
        """Raise an :class:`ArtifactError` if the directory does not exist."""
        if not self.root.is_dir():
            raise ArtifactError(f"No directory of episodes at {self.root}; `wmpo collect` makes one.")

    def load(self) -> list[Episode]:
        """Read all valid episodes into memory.

        Raises:
            ArtifactError: If the directory does not exist.
        """
        self.check_exists()
        return list(self)

    def open(self, cache: str | Path | None = None, *, workers: int = 2) -> list[Episode]:
        """All valid episodes with their frames left on disk, for data sets larger than memory.

        Every file is read once and compared with its checksum, so that a broken episode is reported here and
        not during training. Videos are decoded into a cache, once for all later calls.

        Args:
            cache: Directory of decoded frames (H W 3 bytes per frame); by default ``.frames`` in the store's
                directory. It may be deleted while no process reads it.
            workers: Number of episodes read in parallel.

        Raises:
            ArtifactError: If the directory does not exist.
            WriteError: If the cache cannot be written.
            ValueError: If ``workers`` is not positive.
        """
        self.check_exists()
        if workers < 1:
            raise ValueError(f"Opening episodes takes at least one worker, got {workers}.")
        directory = self.root / CACHE if cache is None else Path(cache)
        read = _or_error(partial(open_episode, cache=directory))
        try:
            with ThreadPoolExecutor(workers) as pool:
                return list(self._whole(pool.map(read, self.directories())))
        except WriteError as error:
            raise WriteError(
                error.errno,
                f"{error.strerror}, or choose another directory for decoded frames (--frame-cache)",
            ) from error

    def ids(self) -> list[int | None]:
        """Start-state ids of the episodes in order of writing, read from the metadata only."""
        return [meta["start_state_id"] for meta in self._metas()]

    def outcomes(self) -> list[bool | None]:
        """Success labels of the episodes in order of writing, read from the metadata only."""
        return [meta["success"] for meta in self._metas()]

    def _metas(self) -> list[dict[str, Any]]:
        metas = []
        for directory in self.directories():
            try:
                metas.append(_read_meta(directory))
            except ArtifactError:
                logger.debug("no readable description in %s", directory)
        return metas


def _or_error(read: Callable[[Path], Episode]) -> Callable[[Path], Episode | BrokenEpisodeError]:
    """Wrap ``read`` to return the error of a broken episode instead of raising it."""

    def safe(directory: Path) -> Episode | BrokenEpisodeError:
        try:
            return read(directory)
        except BrokenEpisodeError as error:
            return error

    return safe

"""Frames on disk with random access, for training on data sets larger than memory.

Random access to lossless video is slow, because decoding starts at the previous key frame. Decoded frames are
therefore kept in one cache file per video. The file is named by the video's checksum, every frame has its own
checksum, and a missing or damaged file is regenerated from the video.
"""

from __future__ import annotations

import logging
import math
import os
import struct
import threading
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np

from wmpo_gym.utils.io import ArtifactError, write_file_atomic

T = TypeVar("T")
logger = logging.getLogger(__name__)

_HEADER = struct.Struct("<8sIII")  # magic, frames, height, width
_MAGIC = b"WMPOFRM1"
_CHECKSUM_BYTES = 4


class StoredFrames:
    """RGB frames of one episode in a file, uint8 ``(T+1, H, W, 3)``; indexing reads the selected frames.

    Supports numpy indexing of the first axis (integers, slices, integer or boolean arrays) and further axes.
    ``np.asarray`` reads all frames. Only the file position is kept in memory.

    Args:
        file: The file.
        shape: ``(T+1, H, W, 3)``.
        offset: Bytes before the first frame.
        checksums: Whether a CRC-32 of four bytes follows each frame.
        restore: Called if the file is missing or a frame is damaged; regenerates the file or raises. None if
            there is no source to regenerate it from.
    """

    __slots__ = ("_checksums", "_file", "_offset", "_restore", "shape")
    dtype = np.dtype(np.uint8)
    ndim = 4

    def __init__(
        self,
        file: str | Path,
        shape: tuple[int, int, int, int],
        *,
        offset: int,
        checksums: bool,
        restore: Callable[[], None] | None = None,
    ) -> None:
        self._file, self.shape = str(file), shape
        self._offset, self._checksums, self._restore = offset, checksums, restore

    def __len__(self) -> int:
        return self.shape[0]

    def __repr__(self) -> str:
        return f"StoredFrames({self._file!r}, shape={self.shape})"

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise ValueError("Frames on disk cannot become an array without a copy.")
        frames = self._read(np.arange(len(self)))
        return frames if dtype is None else frames.astype(dtype, copy=False)

    def __getitem__(self, key: Any) -> np.ndarray:
        keys = key if isinstance(key, tuple) else (key,)
        new_axes = next((i for i, k in enumerate(keys) if k is not None), len(keys))
        chosen, *rest = keys[new_axes:] or (slice(None),)
        if chosen is Ellipsis:
            return np.asarray(self)[key]
        index = np.arange(len(self))[chosen]
        frames = self._read(index.reshape(-1)).reshape(*index.shape, *self.shape[1:])
        if rest:
            frames = frames[(*[slice(None)] * index.ndim, *rest)]
        return frames[(None,) * new_axes] if new_axes else frames

    def _read(self, index: np.ndarray) -> np.ndarray:
        """Frames ``(N, H, W, 3)``; a missing or damaged file is regenerated from the video."""
        try:
            return self._read_file(index)
        except (OSError, ArtifactError) as error:
            if self._restore is None:
                raise ArtifactError(
                    f"The frames in {self._file} cannot be read ({error}); copy or collect that episode "
                    "again."
                ) from error
            logger.warning("Decoding a video again: %s (%s).", self._file, error)
            self._restore()
            return self._read_file(index)

    def _read_file(self, index: np.ndarray) -> np.ndarray:
        n_bytes = math.prod(self.shape[1:])
        record = n_bytes + _CHECKSUM_BYTES * self._checksums
        frames = np.empty((len(index), *self.shape[1:]), np.uint8)
        needed, place = np.unique(index, return_inverse=True)
        with open(self._file, "rb", buffering=0) as file:
            for run in np.split(np.arange(len(needed)), np.flatnonzero(np.diff(needed) > 1) + 1):
                if not len(run):
                    continue
                file.seek(self._offset + int(needed[run[0]]) * record)
                records = self._records(file, needed[run], record, n_bytes)
                rows = np.flatnonzero((place >= run[0]) & (place <= run[-1]))
                frames[rows] = records[place[rows] - run[0]]
        return frames

    def _records(self, file: Any, index: np.ndarray, record: int, n_bytes: int) -> np.ndarray:
        """Consecutive frames ``(N, H, W, 3)`` from the current file position, with verified checksums."""
        data = bytearray(len(index) * record)
        if file.readinto(data) != len(data):
            raise ArtifactError(f"it ends before frame {index[-1]}")
        records = np.frombuffer(data, np.uint8).reshape(len(index), record)
        if self._checksums:
            expected = records[:, n_bytes:].copy().view("<u4")[:, 0]
            for i, row in enumerate(records[:, :n_bytes]):
                if zlib.crc32(row) != expected[i]:
                    raise ArtifactError(f"frame {index[i]} is not what was written")
        return records[:, :n_bytes].reshape(len(index), *self.shape[1:])


FrameArray = np.ndarray | StoredFrames


def write_frame_cache(file: str | Path, frames: np.ndarray) -> None:
    """Write decoded frames, each followed by its checksum; safe for several processes at once.

    Args:
        file: The cache file; it is written atomically.
        frames: uint8 ``(N, H, W, 3)``.

    Raises:
        WriteError: If the disk is full or the directory cannot be written.
    """
    file = Path(file)
    own = file.with_name(f"{file.name}.{os.getpid()}-{threading.get_ident()}")
    n, height, width, _ = frames.shape
    with write_file_atomic(own, durable=False) as temporary, open(temporary, "wb") as out:
        out.write(_HEADER.pack(_MAGIC, n, height, width))
        for frame in np.ascontiguousarray(frames):
            out.write(frame.data)
            out.write(struct.pack("<I", zlib.crc32(frame)))
    os.replace(own, file)


def open_frame_cache(file: str | Path, restore: Callable[[], None] | None = None) -> StoredFrames | None:
    """Open a file of :func:`write_frame_cache`; None if it is missing or incomplete.

    Args:
        file: The cache file.
        restore: See :class:`StoredFrames`.
    """
    try:
        with open(file, "rb") as stream:
            magic, n, height, width = _HEADER.unpack(stream.read(_HEADER.size))
            size = os.fstat(stream.fileno()).st_size
    except (OSError, struct.error):
        return None
    if magic != _MAGIC or size != _HEADER.size + n * (height * width * 3 + _CHECKSUM_BYTES):
        return None
    return StoredFrames(file, (n, height, width, 3), offset=_HEADER.size, checksums=True, restore=restore)


def open_npy_frames(file: str | Path) -> StoredFrames:
    """The frames of a ``.npy`` file.

    Raises:
        ValueError: If it does not hold uint8 ``(N, H, W, 3)`` in C order.
    """
    frames = np.load(file, mmap_mode="r", allow_pickle=False)
    if frames.dtype != np.uint8 or frames.ndim != 4 or not frames.flags.c_contiguous:
        raise ValueError(f"{Path(file).name} holds {frames.dtype} {frames.shape}, not uint8 frames")
    n, height, width, channels = frames.shape
    return StoredFrames(file, (n, height, width, channels), offset=frames.offset, checksums=False)


Request = tuple[FrameArray, np.ndarray]


class FrameLoader:
    """Reads frames of several episodes with a thread pool, with optional prefetching.

    The result does not depend on the number of threads or on prefetching. Frames in memory are indexed
    directly.

    Args:
        workers: Number of threads; 0 reads in the calling thread and disables prefetching.

    Raises:
        ValueError: If ``workers`` is negative.
    """

    def __init__(self, workers: int = 2) -> None:
        if workers < 0:
            raise ValueError(f"The number of reading threads must be at least 0, got {workers}.")
        self.workers = workers
        self._pool: ThreadPoolExecutor | None = None
        self._ahead: dict[tuple[int, bytes], np.ndarray | Future[np.ndarray]] = {}

    def read(self, requests: Sequence[Request]) -> list[np.ndarray]:
        """Frames of each request ``(frames, index)``, uint8 ``(len(index), H, W, 3)``.

        Prefetched frames that are not requested are dropped.
        """
        ahead, self._ahead = self._ahead, {}
        found = []
        for request in requests:
            key = _key(request)
            found.append(ahead.pop(key) if key in ahead else self._submit(request))
        for unused in ahead.values():
            if isinstance(unused, Future):
                unused.cancel()
        return [part.result() if isinstance(part, Future) else part for part in found]

    def prefetch(self, requests: Sequence[Request]) -> None:
        """Start to read the frames that the next :meth:`read` is likely to request."""
        for request in requests:
            if self.workers and isinstance(request[0], StoredFrames):
                self._ahead[_key(request)] = self._submit(request)

    def _submit(self, request: Request) -> np.ndarray | Future[np.ndarray]:
        frames, index = request
        if not self.workers or isinstance(frames, np.ndarray):
            return frames[index]
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self.workers, thread_name_prefix="frames")
        return self._pool.submit(frames.__getitem__, index)


def _key(request: Request) -> tuple[int, bytes]:
    """Key of a request; equal for equal frames of the same episode."""
    frames, index = request
    return id(frames), index.tobytes()


def prefetched(items: Iterable[T], ahead: int = 1) -> Iterator[T]:
    """Iterate over items in order while a thread computes the next ``ahead`` of them."""
    source, end = iter(items), object()
    with ThreadPoolExecutor(1, thread_name_prefix="prefetch") as pool:
        waiting = deque(pool.submit(next, source, end) for _ in range(ahead))
        while (item := waiting.popleft().result()) is not end:
            waiting.append(pool.submit(next, source, end))
            yield cast(T, item)

"""The rollouts of the WMPO release: WebDataset tar shards.

Members of an episode share the name before the first dot: ``video.npy`` uint8 (horizon + 1, H, W, 3), zero
after the end; ``action.npy`` (horizon, D) in the robot's units; ``meta.json`` with ``complete`` (success) and
``finish_step``; ``state_id.npy``. Token ids and the policy's input images are not read.
"""

from __future__ import annotations

import io
import json
import tarfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from wmpo_gym.data.importers.base import (
    BLOCK,
    EpisodeFault,
    EpisodeHeader,
    Source,
    SourceError,
    check_actions,
    faults,
    refuse_pointer,
    shrink,
)
from wmpo_gym.data.importers.settings import DEFAULT_OPTIONS, SourceOptions

MAX_META = 1 << 20  # bytes


@dataclass
class _Members:
    """Members of an episode: offset and size in a shard, by the name after the first dot."""

    shard: Path
    places: dict[str, tuple[int, int]] = field(default_factory=dict)


class WMPOSource(Source):
    """Episodes of one shard or of a directory of shards.

    Args:
        path: A ``.tar`` file, or a directory with such files at any depth.
        options: Must be the defaults, since the format has no options.

    Raises:
        SourceError: If no shard can be read.
    """

    format = "wmpo"
    control_hz = None

    def __init__(self, path: Path, options: SourceOptions = DEFAULT_OPTIONS) -> None:
        if options.camera is not None:
            raise SourceError(f"{path}: shards of the WMPO release hold one camera; leave out --camera.")
        self.refuse_options(options, ())
        self.path, self.name = path, path.stem
        shards = sorted(path.rglob("*.tar")) if path.is_dir() else [path]
        self._members: dict[str, _Members] = {}
        self._damage: list[str] = []
        for shard in shards:
            self._index(shard, shard.relative_to(path).as_posix() if path.is_dir() else shard.name)
        if not self._members:
            raise SourceError(
                f"{path} holds no readable episode of the WMPO release"
                + "".join(f"; {damage}" for damage in self._damage)
                + ". Download or copy it again."
            )

    def _index(self, shard: Path, name: str) -> None:
        """Index the members of a shard; members before a damaged part are kept."""
        try:
            refuse_pointer(shard)
            # "r:" reads uncompressed tars only, which cannot expand to more than the file size.
            with tarfile.open(shard, "r:") as tar:
                for member in tar:
                    stem, _, kind = Path(member.name).name.partition(".")
                    if member.isreg() and kind:
                        episode = self._members.setdefault(f"{name}:{stem}", _Members(shard))
                        episode.places[kind] = (member.offset_data, member.size)
        except (tarfile.TarError, OSError, ValueError, OverflowError) as error:
            self._damage.append(f"{name} is damaged ({error})")

    def keys(self) -> list[str]:
        """Names of the episodes in order."""
        return list(self._members)

    def header(self, key: str) -> EpisodeHeader:
        """See :meth:`Source.header`."""
        with faults():
            meta = json.loads(self._read(key, "meta.json", MAX_META))
            actions = check_actions(self._array(key, "action.npy"))
            if not isinstance(meta, dict) or not isinstance(meta.get("complete"), (bool, int)):
                raise EpisodeFault("its meta.json does not say whether it was complete")
            success, end = bool(meta["complete"]), len(actions)
            if success:
                end = int(meta["finish_step"])
                if not 0 < end <= len(actions):
                    raise EpisodeFault(f"finish_step is {end}, of {len(actions)} actions")
            n_frames = len(self._array(key, "video.npy"))
            known = "state_id.npy" in self._members[key].places
            state = int(self._array(key, "state_id.npy").reshape(-1)[0]) if known else key
        kept = {"unique_id": str(meta["unique_id"])} if "unique_id" in meta else {}
        if known:
            kept["state_id"] = str(state)
        return EpisodeHeader(key, actions[:end], n_frames, None, str(state), success, meta=kept)

    def frames(self, key: str, count: int, size: int) -> np.ndarray:
        """See :meth:`Source.frames`."""
        with faults():
            video = self._array(key, "video.npy")
            if video.ndim != 4 or video.dtype != np.uint8 or video.shape[-1] != 3 or 0 in video.shape:
                raise EpisodeFault(f"its video is {video.dtype} {video.shape}, not uint8 (T, H, W, 3)")
            blocks = (video[i : min(i + BLOCK, count)] for i in range(0, min(count, len(video)), BLOCK))
            return shrink(blocks, count, size)

    def _read(self, key: str, kind: str, limit: int | None = None) -> bytes:
        members = self._members[key]
        if kind not in members.places:
            raise EpisodeFault(f"{kind} is missing")
        offset, size = members.places[kind]
        if limit is not None and size > limit:
            raise EpisodeFault(f"{kind} has {size} bytes")
        with open(members.shard, "rb") as file:
            file.seek(offset)
            data = file.read(size)
        if len(data) != size:
            raise EpisodeFault(f"{kind} is cut off")
        return data

    def _array(self, key: str, kind: str) -> np.ndarray:
        """A ``.npy`` member, memory-mapped; its header may not claim more than the member holds."""
        members = self._members[key]
        if kind not in members.places:
            raise EpisodeFault(f"{kind} is missing")
        offset, size = members.places[kind]
        with open(members.shard, "rb") as file:
            file.seek(offset)
            head = io.BytesIO(file.read(min(size, 1 << 16)))
        version = np.lib.format.read_magic(head)
        read: Any = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }
        if version not in read:
            raise EpisodeFault(f"{kind} is of .npy version {version}")
        shape, fortran, dtype = read[version](head)
        if dtype.hasobject or fortran or any(n < 0 for n in shape):
            raise EpisodeFault(f"{kind} is not a plain array")
        if head.tell() + int(np.prod([int(n) for n in shape], dtype=object)) * dtype.itemsize != size:
            raise EpisodeFault(f"{kind} is cut off")
        return np.memmap(members.shard, dtype, "r", offset + head.tell(), shape or (1,))

    def damage(self) -> list[str]:
        """Shards that are fully or partly unreadable."""
        return list(self._damage)

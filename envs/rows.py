"""Per-row state of the batched environments: start states, executed chunks, episodes and generators."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from gymnasium.utils import seeding

from wmpo_gym.data.images import resize_area
from wmpo_gym.utils.rows import Rows

_MASK_64 = (1 << 64) - 1


@dataclass(frozen=True)
class Starts:
    """Start states of n new episodes; frames and task ids are given together or not at all."""

    rows: np.ndarray  # int64 (n,)
    start_state_ids: np.ndarray  # int64 (n,), -1 for a start frame without id
    noise_seeds: np.ndarray  # int64 (n,)
    frames: np.ndarray | None = None  # uint8 (n, H, W, 3)
    task_ids: np.ndarray | None = None  # int64 (n,)


@dataclass(frozen=True)
class Chunk:
    """Result of executing one chunk in n rows; a row stops at its success."""

    pixels: np.ndarray  # uint8 (n, H, W, 3), the last frame
    n_frames: np.ndarray  # int64 (n,), control steps executed, 1..K
    is_success: np.ndarray  # bool (n,)
    success_prob: np.ndarray  # float64 (n,), of the last frame
    nfe: int | np.ndarray = 0  # network evaluations, for all rows or per row
    frames: np.ndarray | None = None  # uint8 (n, K, H, W, 3), the last one repeated after an early stop
    proprio: np.ndarray | None = None  # float32 (n, K + 1, P), first the state before the chunk


@dataclass
class EpisodeRows(Rows):
    """State of the current episode of every row.

    Attributes:
        pixels: uint8 ``(N, H, W, 3)``, current frame.
        task_id: int64 ``(N,)``.
        start_state_id: int64 ``(N,)``, -1 for a start frame without id.
        n_steps: int64 ``(N,)``, chunks executed in this episode.
        n_frames: int64 ``(N,)``, control steps executed by the last step of the environment.
        nfe: int64 ``(N,)``, network evaluations of that step.
        is_success: bool ``(N,)``.
        success_prob: float64 ``(N,)``.
        done: bool ``(N,)``, True if the episode is over and the row has not been reset.
    """

    pixels: np.ndarray
    task_id: np.ndarray
    start_state_id: np.ndarray
    n_steps: np.ndarray
    n_frames: np.ndarray
    nfe: np.ndarray
    is_success: np.ndarray
    success_prob: np.ndarray
    done: np.ndarray

    @classmethod
    def create(cls, num_envs: int, image_size: int) -> EpisodeRows:
        """Zeros for every row."""
        columns: dict[str, np.ndarray] = {f.name: np.zeros(num_envs, np.int64) for f in fields(cls)}
        columns["pixels"] = np.zeros((num_envs, image_size, image_size, 3), np.uint8)
        columns["success_prob"] = np.zeros(num_envs, np.float64)
        columns["is_success"], columns["done"] = np.zeros(num_envs, np.bool_), np.zeros(num_envs, np.bool_)
        return cls(**columns)

    def begin(
        self, rows: np.ndarray, pixels: np.ndarray, task_ids: np.ndarray, start_state_ids: np.ndarray
    ) -> None:
        """Start new episodes in ``rows``, in place."""
        for f in fields(self):
            getattr(self, f.name)[rows] = 0
        self.pixels[rows], self.task_id[rows], self.start_state_id[rows] = pixels, task_ids, start_state_ids

    def advance(self, rows: np.ndarray, chunk: Chunk) -> None:
        """Update ``rows`` with an executed chunk, in place."""
        self.pixels[rows] = chunk.pixels
        self.n_steps[rows] += 1
        self.n_frames[rows] = chunk.n_frames
        self.nfe[rows] = chunk.nfe
        self.is_success[rows] = chunk.is_success
        self.success_prob[rows] = chunk.success_prob


def pack_generator(generator: np.random.Generator) -> np.ndarray:
    """State of a PCG64 generator as uint64 ``(6,)``: two 128-bit numbers and the buffered 32 bits."""
    state = generator.bit_generator.state
    words = [state["state"]["state"], state["state"]["inc"]]
    halves = [half for word in words for half in (word >> 64, word & _MASK_64)]
    return np.array([*halves, state["has_uint32"], state["uinteger"]], dtype=np.uint64)


def unpack_generator(packed: np.ndarray) -> np.random.Generator:
    """The generator whose state :func:`pack_generator` returned."""
    a, b, c, d, has_uint32, uinteger = (int(v) for v in packed)
    bits = np.random.PCG64(0)
    bits.state = {
        "bit_generator": "PCG64",
        "state": {"state": (a << 64) | b, "inc": (c << 64) | d},
        "has_uint32": has_uint32,
        "uinteger": uinteger,
    }
    return np.random.Generator(bits)


class RowGenerators:
    """One NumPy generator per row, so that a row's random numbers do not depend on the other rows.

    Attributes:
        generators: One per row; None before a row's first reset.
        seeds: Seeds of the generators; -1 after a state was restored.
    """

    def __init__(self, num_envs: int) -> None:
        self.generators: list[np.random.Generator | None] = [None] * num_envs
        self.seeds: list[int | None] = [None] * num_envs

    def seed(self, rows: np.ndarray, seeds: list[int | None]) -> None:
        """Seed ``rows``; None keeps the existing generator, or creates one from fresh entropy."""
        for row in rows:
            if seeds[row] is not None or self.generators[row] is None:
                self.generators[row], self.seeds[row] = seeding.np_random(seeds[row])

    def draw(self, rows: np.ndarray, size: int) -> np.ndarray:
        """Non-negative int64 ``(len(rows), size)``."""
        return np.stack([self._of(row).integers(2**63, size=size) for row in rows])

    def pack(self, rows: np.ndarray) -> np.ndarray:
        """States as uint64 ``(len(rows), 6)``."""
        return np.stack([pack_generator(self._of(row)) for row in rows])

    def unpack(self, rows: np.ndarray, packed: np.ndarray) -> None:
        """Restore the states returned by :meth:`pack`."""
        for row, state in zip(rows, packed, strict=True):
            self.generators[row], self.seeds[row] = unpack_generator(state), -1

    def _of(self, row: int) -> np.random.Generator:
        generator = self.generators[row]
        assert generator is not None, "seeded by the first reset"
        return generator


def add_info(
    infos: dict[str, Any], num_envs: int, rows: np.ndarray, columns: Mapping[str, np.ndarray]
) -> None:
    """Add columns for some rows to a vector info, as ``VectorEnv._add_info`` does row by row.

    Args:
        infos: The info dict, changed in place: ``key`` gets an array of length ``num_envs`` (zeros or None
            where unset) and ``_key`` the mask of the rows that are set.
        num_envs: Number of rows of the batch.
        rows: Indices of the n rows the columns belong to.
        columns: Arrays of leading length n.
    """
    for key, values in columns.items():
        array = np.full((num_envs, *values.shape[1:]), None if values.dtype == object else 0, values.dtype)
        mask = np.zeros(num_envs, np.bool_)
        array[rows], mask[rows] = values, True
        infos[key], infos[f"_{key}"] = array, mask


def object_array(values: list[Any]) -> np.ndarray:
    """One-dimensional object array of the values."""
    array = np.empty(len(values), dtype=object)
    array[:] = values
    return array


def take_prefixed(state: Mapping[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    """Entries whose key starts with ``prefix``, with the prefix removed."""
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def resize(frames: np.ndarray, size: int) -> np.ndarray:
    """Resize square frames ``(..., H, H, 3)`` uint8 to ``(..., size, size, 3)``; always a new array.

    Integer upscaling repeats pixels; otherwise areas are averaged.
    """
    return resize_area(frames, size, size)

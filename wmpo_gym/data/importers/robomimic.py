"""robomimic's HDF5 files, which MimicGen and LIBERO write too.

::

    data                    attributes: env_args (JSON), problem_info (JSON, LIBERO)
        demo_0              attributes: model_file (MJCF), ep_meta (JSON)
            actions         (T, D)
            states          (T, S) simulator states, state t before action t
            rewards         (T,), 1 from the success on
            obs/NAME_image  (T, H, W, 3), picture t before action t
            obs/robot0_...  (T, n) the robot's state: joint_pos, eef_pos, gripper_qpos
            next_obs/...    the same, one step later
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from wmpo_gym.data.importers.base import (
    BLOCK,
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
from wmpo_gym.data.importers.replay import StateRenderer, make_state_renderer

DEFAULT_CAMERA = "agentview"  # for files without pictures
# Ends of the names of what a robot knows of itself: robosuite's names, then LIBERO's.
STATE_NAMES = ("joint_pos", "eef_pos", "gripper_qpos", "joint_states", "ee_pos", "gripper_states")


class RobomimicSource(Source):
    """Episodes of one HDF5 file.

    Args:
        path: The file.
        camera: Name of the pictures under ``obs``, with or without ``_image``; for files without pictures
            the simulator's camera.

    Raises:
        SourceError: If it is not such a file, or the camera has to be chosen.
    """

    format = "robomimic"

    def __init__(self, path: Path, camera: str | None = None) -> None:
        h5py = needs("h5py")
        self.path, self.name = path, path.stem
        try:
            self._file = h5py.File(path, "r")
        except OSError as error:
            raise SourceError(
                f"{path} is not a readable HDF5 file ({error}); download or copy it again."
            ) from error
        try:
            with faults():
                self._data, self._keys = self._find_demos(h5py)
                self.env_args = _json(self._data.attrs.get("env_args"))
                self.control_hz = _control_hz(self.env_args)
                self._sentence = _json(self._data.attrs.get("problem_info")).get("language_instruction")
                self.camera = self._find_camera(camera)
        except EpisodeFault as error:
            self.close()
            raise SourceError(f"{path} is not a readable robomimic file ({error}).") from error
        except SourceError:
            self.close()
            raise
        self._renderer: StateRenderer | None = None

    def _find_demos(self, h5py: Any) -> tuple[Any, list[str]]:
        data = self._file.get("data")
        if not isinstance(data, h5py.Group):
            raise SourceError(f"{self.path} has no group 'data'; it is not a robomimic file.")
        keys = [name for name in data if isinstance(data.get(name), h5py.Group)]
        if not keys:
            raise SourceError(f"{self.path} holds no episode.")
        return data, sorted(keys, key=lambda name: (len(name), name))  # demo_2 before demo_10

    def _find_camera(self, wanted: str | None) -> str:
        """The pictures to read; the first episode with any decides. A bare name where there are none."""
        for key in self._keys:
            observed = self._data[key].get("obs") or {}
            cameras = [name for name in observed if _are_pictures(observed[name])]
            if cameras:
                return choose_camera(cameras, wanted, str(self.path))
        return wanted or DEFAULT_CAMERA

    def keys(self) -> list[str]:
        """Names of the episodes in order."""
        return list(self._keys)

    def outline(self, key: str) -> Outline:
        """See :meth:`Source.outline`."""
        with faults():
            demo = self._data[key]
            actions = check_actions(_read(demo, "actions"))
            rewards = zero_or_one(_read(demo, "rewards") if "rewards" in demo else None)
            success, steps = outcome(rewards, self._count(demo), len(actions))
            sentence = _json(demo.attrs.get("ep_meta")).get("lang") or self._sentence
            state = self._states(demo, steps + 1)
        return Outline(key, actions[:steps], success, sentence, key, proprio=state)

    def _states(self, demo: Any, count: int) -> np.ndarray | None:
        """The robot's state in the first ``count`` pictures; None if it was not recorded."""
        observed, after = demo.get("obs") or {}, demo.get("next_obs") or {}
        columns = []
        for name in sorted(name for name in observed if name.endswith(STATE_NAMES)):
            column = _read(observed, name)
            if len(column) == count - 1 and name in after:
                column = np.concatenate([column, _read(after, name)[-1:]])
            columns.append(column.reshape(len(column), -1)[:count])
        if len({len(column) for column in columns}) != 1:
            return None
        return usable_states(np.concatenate(columns, axis=1), count)

    def _pictures(self, demo: Any) -> list[Any]:
        """Datasets whose pictures follow each other, none in a file of states."""
        found = [(demo.get(group) or {}).get(self.camera) for group in ("obs", "next_obs")]
        pictures = [d for d in found if d is not None]
        for d in pictures:
            if not _are_pictures(d):
                raise EpisodeFault(f"{d.name} is {d.dtype} {d.shape}, not pictures uint8 (T, H, W, 3)")
        return pictures if found[0] is not None else []

    def _count(self, demo: Any) -> int:
        """Pictures that can be had."""
        pictures = self._pictures(demo)
        if pictures:
            return len(pictures[0]) + (len(pictures) == 2 and len(pictures[1]) == len(pictures[0]))
        if "states" not in demo:
            raise EpisodeFault(f"it has neither pictures of {self.camera!r} nor simulator states")
        return len(demo["states"])

    def frames(self, key: str, count: int, size: int) -> np.ndarray:
        """See :meth:`Source.frames`; draws stored states where there are no pictures.

        Raises:
            SourceError: If nothing here can draw the states.
        """
        with faults():
            demo = self._data[key]
            if self._pictures(demo):
                return shrink(self._blocks(demo, count), count, size)
            if self._renderer is None:
                self._renderer = make_state_renderer(self.env_args, self.camera, size, str(self.path))
            xml = demo.attrs.get("model_file")
            states = np.asarray(_read(demo, "states")[:count], np.float64)
            drawn = self._renderer.render(states, None if xml is None else str(xml))
            return shrink(iter([drawn]), count, size)

    def _blocks(self, demo: Any, count: int) -> Iterator[np.ndarray]:
        first, *after = self._pictures(demo)
        for i in range(0, min(count, len(first)), BLOCK):
            yield first[i : min(i + BLOCK, count)]
        if count > len(first):
            yield after[0][-1:]

    def close(self) -> None:
        """Close the file and whatever drew its states."""
        self._file.close()
        if getattr(self, "_renderer", None) is not None:
            self._renderer.close()  # type: ignore[union-attr]


def _read(group: Any, name: str) -> np.ndarray:
    """A numeric dataset as an array."""
    if name not in group:
        raise EpisodeFault(f"it has no {name!r}")
    if group[name].dtype.kind not in "fiub":
        raise EpisodeFault(f"its {name!r} are {group[name].dtype}, not numbers")
    return group[name][()]


def _are_pictures(dataset: Any) -> bool:
    shape: tuple[int, ...] = getattr(dataset, "shape", ())
    return len(shape) == 4 and shape[-1] == 3 and 0 not in shape and dataset.dtype == np.uint8


def _json(text: Any) -> dict[str, Any]:
    """A JSON object stored as an attribute; empty if there is none."""
    value = json.loads(text) if text else {}
    return value if isinstance(value, dict) else {}


def _control_hz(env_args: dict[str, Any]) -> float | None:
    hz = (env_args.get("env_kwargs") or {}).get("control_freq")
    return float(hz) if isinstance(hz, (int, float)) and hz > 0 else None

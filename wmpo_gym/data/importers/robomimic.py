"""Importer of robomimic HDF5 files, also written by MimicGen, LIBERO, robosuite and IsaacLab.

::

    data                    attributes: env_args (JSON), problem_info (JSON, LIBERO), env and env_info
        demo_0              attributes: model_file (MJCF), ep_meta (JSON), success, task_description
            actions         (T, D)
            states          (T, S) simulator states, state t before action t
            rewards         (T,), 1 from the first success on
            obs/NAME_image  (T, H, W, 3), frame t before action t
            obs/robot0_...  (T, n) the robot's state: joint_pos, eef_pos, gripper_qpos
            next_obs/...    the observations one step later
    mask/NAME               names of the demos that belong to a filter key, such as "train"
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
    EpisodeHeader,
    Source,
    SourceError,
    as_frames,
    check_actions,
    choose_camera,
    faults,
    float_scale,
    needs,
    refuse_pointer,
    shrink,
    zero_or_one,
)
from wmpo_gym.data.importers.replay import StateRenderer, make_state_renderer
from wmpo_gym.data.importers.settings import DEFAULT_OPTIONS, SourceOptions

SUFFIXES = (".hdf5", ".h5")
DEFAULT_CAMERA = "agentview"  # for files without images
# Suffixes of proprioception datasets: robosuite's names, then LIBERO's.
STATE_NAMES = ("joint_pos", "eef_pos", "gripper_qpos", "joint_states", "ee_pos", "gripper_states")


class RobomimicSource(Source):
    """Episodes of one HDF5 file.

    Args:
        path: The file.
        options: Camera (name of the images under ``obs``, with or without ``_image`` or ``_rgb``; for files
            without images the simulator's camera) and filter key.

    Raises:
        SourceError: If it is not such a file, or the camera has to be chosen.
    """

    format = "robomimic"

    def __init__(self, path: Path, options: SourceOptions = DEFAULT_OPTIONS) -> None:
        h5py = needs("h5py")
        self.refuse_options(options, ("camera", "filter_key"))
        self.path, self.name = path, path.stem
        try:
            refuse_pointer(path)
            self._file = h5py.File(path, "r")
        except (OSError, EpisodeFault) as error:
            raise SourceError(
                f"{path} is not a readable HDF5 file ({error}); download or copy it again."
            ) from error
        try:
            with faults():
                self._data, self._keys = self._find_demos(h5py)
                if options.filter_key is not None:
                    self._keys = self._filtered(options.filter_key)
                self.env_args = _env_args(self._data.attrs)
                self.control_hz = _control_hz(self.env_args)
                self._sentence = _sentence(self._data.attrs)
                self.camera = self._find_camera(options.camera)
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

    def _filtered(self, name: str) -> list[str]:
        """The demos that the file lists under ``mask/<name>``."""
        masks = self._file.get("mask") or {}
        if name not in masks:
            raise SourceError(f"{self.path} has no filter key {name!r}; it has {', '.join(masks) or 'none'}.")
        chosen = {_text(key) for key in masks[name][()]}
        return [key for key in self._keys if key in chosen]

    def _find_camera(self, wanted: str | None) -> str:
        """The camera to read, from the first episode with images; for files of states, its bare name."""
        for key in self._keys:
            observed = self._data[key].get("obs") or {}
            cameras = [name for name in observed if _are_images(name, observed[name])]
            if cameras:
                return choose_camera(cameras, wanted, str(self.path))
        return wanted or DEFAULT_CAMERA

    def keys(self) -> list[str]:
        """Names of the episodes in order."""
        return list(self._keys)

    def header(self, key: str) -> EpisodeHeader:
        """See :meth:`Source.header`."""
        with faults():
            demo = self._data[key]
            actions = check_actions(_read(demo, "actions"))
            flags = zero_or_one(_read(demo, "rewards").reshape(-1) if "rewards" in demo else None)
            n_frames = self._count(demo)
            stated = demo.attrs.get("success")
            return EpisodeHeader(
                key,
                actions,
                n_frames,
                _sentence(demo.attrs) or self._sentence,
                key,
                success=None if stated is None else bool(stated),
                flags=None if flags is None or stated is not None else flags[: len(actions)],
                proprio=self._states(demo, min(len(actions) + 1, n_frames)),
            )

    def _states(self, demo: Any, count: int) -> np.ndarray | None:
        """The robot's state at the first ``count`` frames; None if it was not recorded."""
        observed, after = demo.get("obs") or {}, demo.get("next_obs") or {}
        columns = []
        for name in sorted(name for name in observed if name.endswith(STATE_NAMES)):
            column = _read(observed, name)
            if len(column) == count - 1 and name in after:
                column = np.concatenate([column, _read(after, name)[-1:]])
            columns.append(column.reshape(len(column), -1)[:count])
        if len({len(column) for column in columns}) != 1:
            return None
        return np.concatenate(columns, axis=1)

    def _pictures(self, demo: Any) -> list[Any]:
        """Image datasets to concatenate; none in a file of states."""
        found = [(demo.get(group) or {}).get(self.camera) for group in ("obs", "next_obs")]
        pictures = [d for d in found if d is not None]
        return pictures if found[0] is not None else []

    def _count(self, demo: Any) -> int:
        """Number of available frames."""
        pictures = self._pictures(demo)
        if pictures:
            return len(pictures[0]) + (len(pictures) == 2 and len(pictures[1]) == len(pictures[0]))
        if not hasattr(demo.get("states"), "shape"):  # a group of that name holds something else
            held = (demo.get("obs") or {}).items()
            there = ", ".join(
                f"{name} {getattr(d, 'dtype', '')} {getattr(d, 'shape', '')}" for name, d in held
            )
            raise EpisodeFault(
                f"it has neither images of {self.camera!r} nor simulator states; obs holds "
                f"{there or 'nothing'}"
            )
        return len(demo["states"])

    def frames(self, key: str, count: int, size: int) -> np.ndarray:
        """See :meth:`Source.frames`; renders recorded states if there are no images.

        Raises:
            SourceError: If there is no renderer for the states.
        """
        with faults():
            demo = self._data[key]
            if self._pictures(demo):
                return shrink(self._blocks(demo, count), count, size)
            if self._renderer is None:
                self._renderer = make_state_renderer(self.env_args, self.camera, size, str(self.path))
            xml = demo.attrs.get("model_file")
            states = np.asarray(_read(demo, "states")[:count], np.float64)
            drawn = self._renderer.render(states, None if xml is None else _text(xml))
            return shrink(iter([drawn]), count, size)

    def _blocks(self, demo: Any, count: int) -> Iterator[np.ndarray]:
        first, *after = self._pictures(demo)
        scale = max(float_scale(first[i : i + BLOCK]) for i in range(0, len(first), BLOCK))
        if any(first[i : i + BLOCK].max() > 1 for i in range(0, len(first), BLOCK)):
            scale = 1.0
        for i in range(0, min(count, len(first)), BLOCK):
            yield as_frames(first[i : min(i + BLOCK, count)], first.name, scale=scale)
        if count > len(first):
            yield as_frames(after[0][-1:], after[0].name, scale=scale)

    def close(self) -> None:
        """Close the file and the renderer."""
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


def _are_images(name: str, dataset: Any) -> bool:
    """Whether a dataset may hold images of a colour camera."""
    shape: tuple[int, ...] = getattr(dataset, "shape", ())
    if len(shape) != 4 or 0 in shape or "depth" in name.lower():
        return False
    channels = shape[-1] in (1, 3, 4) or shape[1] in (1, 3, 4)
    return channels and (dataset.dtype == np.uint8 or dataset.dtype.kind == "f")


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _sentence(attributes: Any) -> str | None:
    """The instruction in the attributes of a file or a demo, in any known layout."""
    found = (
        _json(attributes.get("ep_meta")).get("lang")
        or _json(attributes.get("problem_info")).get("language_instruction")
        or attributes.get("task_description")
        or attributes.get("language_instruction")
    )
    return _text(found) if found else None


def _env_args(attributes: Any) -> dict[str, Any]:
    """Robomimic's ``env_args``, also derived from robosuite's own recordings."""
    env_args = _json(attributes.get("env_args"))
    if env_args or "env" not in attributes:
        return env_args
    settings = _json(attributes.get("env_info"))
    return {"env_name": _text(attributes["env"]), "type": 1, "env_kwargs": settings}


def _json(text: Any) -> dict[str, Any]:
    """A JSON object stored as an attribute; empty if there is none."""
    value = json.loads(text) if text else {}
    return value if isinstance(value, dict) else {}


def _control_hz(env_args: dict[str, Any]) -> float | None:
    hz = (env_args.get("env_kwargs") or {}).get("control_freq")
    return float(hz) if isinstance(hz, (int, float)) and hz > 0 else None


class RobomimicDirectory(Source):
    """All HDF5 files of a directory as one data set, for instance a LIBERO suite with a file per instruction.

    Args:
        path: The directory.
        options: As for one file.

    Raises:
        SourceError: If a file cannot be read, or they were recorded at different rates.
    """

    format = "robomimic"

    def __init__(self, path: Path, options: SourceOptions = DEFAULT_OPTIONS) -> None:
        self.path, self.name = path, path.resolve().name
        files = sorted(f for f in path.iterdir() if f.suffix.lower() in SUFFIXES)
        self._files: dict[str, RobomimicSource] = {}
        try:
            for file in files:
                self._files[file.stem] = RobomimicSource(file, options)
        except BaseException:
            self.close()
            raise
        rates = {source.control_hz for source in self._files.values()}
        cameras = {source.camera for source in self._files.values()}
        if len(rates) > 1 or len(cameras) > 1:
            self.close()
            raise SourceError(
                f"The files in {path} were recorded at {sorted(map(str, rates))} Hz by the cameras "
                f"{sorted(cameras)}; import them one by one."
            )
        self.control_hz, self.camera = rates.pop(), cameras.pop()

    def _find(self, key: str) -> tuple[RobomimicSource, str]:
        file, _, demo = key.rpartition(":")
        return self._files[file], demo

    def keys(self) -> list[str]:
        """Names of the episodes in order, the file before the colon."""
        return [f"{file}:{key}" for file, source in self._files.items() for key in source.keys()]

    def header(self, key: str) -> EpisodeHeader:
        """See :meth:`Source.header`."""
        source, demo = self._find(key)
        header = source.header(demo)
        header.key = header.start = key
        return header

    def frames(self, key: str, count: int, size: int) -> np.ndarray:
        """See :meth:`Source.frames`."""
        source, demo = self._find(key)
        return source.frames(demo, count, size)

    def close(self) -> None:
        """Close all files."""
        for source in self._files.values():
            source.close()

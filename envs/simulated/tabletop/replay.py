"""Pictures of recorded robosuite states, for demonstrations that come without pictures.

An episode of robomimic or MimicGen holds its scene as MJCF and its states as numbers; drawing them needs no
environment, only the meshes and textures that the MJCF names by the paths of whoever recorded it.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import mujoco
import numpy as np

from wmpo_gym.data.importers.base import SourceError
from wmpo_gym.envs.simulated.tabletop.camera import Camera, decimate

FILE = re.compile(r'(?<=file=")[^"]+(?=")')


class RobosuiteStates:
    """Draws states as a :class:`~wmpo_gym.data.importers.replay.StateRenderer`.

    Args:
        env_args: As in the file; not needed.
        camera: Camera to draw from, as robomimic calls it (``"agentview"`` or ``"agentview_image"``).
        image_size: Side of the pictures in pixels.
    """

    def __init__(self, env_args: Mapping[str, Any], camera: str, image_size: int) -> None:
        self.camera, self.image_size = camera.removesuffix("_image"), image_size
        self._xml: str | None = None
        self._model: Any = None
        self._drawn_by: Camera | None = None

    def render(self, states: np.ndarray, model_xml: str | None) -> np.ndarray:
        """Draw states.

        Args:
            states: float64 (N, S): time, positions and velocities.
            model_xml: The episode's MJCF.

        Returns:
            uint8 (N, image_size, image_size, 3).

        Raises:
            SourceError: If there is no MJCF, it cannot be built here, or the states are another scene's.
        """
        camera = self._open(model_xml)
        model, data = self._model, mujoco.MjData(self._model)
        if states.ndim != 2 or states.shape[1] != 1 + model.nq + model.nv:
            raise SourceError(
                f"The scene has states of {1 + model.nq + model.nv} numbers, the file holds {states.shape}."
            )
        frames = []
        for state in states:
            data.qpos[:], data.qvel[:] = state[1 : 1 + model.nq], state[1 + model.nq :]
            mujoco.mj_forward(model, data)
            frames.append(camera.render(data))
        return np.stack(frames)

    def _open(self, model_xml: str | None) -> Camera:
        """The camera of a scene; consecutive episodes mostly share one."""
        if model_xml is None:
            raise SourceError("The file holds states but no scene (model_file), so nothing can be drawn.")
        if self._drawn_by is None or model_xml != self._xml:
            self.close()
            here = FILE.sub(_local, model_xml)
            try:
                self._model = mujoco.MjModel.from_xml_string(here)
            except ValueError as error:
                raise SourceError(f"The recorded scene cannot be built here: {error}") from error
            self._model.site_rgba[:, 3] = 0.0  # robosuite hides its marks, too
            decimate(self._model)
            self._xml, self._drawn_by = model_xml, Camera(self._model, self.camera, self.image_size)
        return self._drawn_by

    def close(self) -> None:
        """Let go of the scene."""
        if self._drawn_by is not None:
            self._drawn_by.close()
        self._drawn_by = None


def _local(match: re.Match[str]) -> str:
    """The file here that a path of the recording's machine means.

    Raises:
        SourceError: If its package is not installed or does not have it.
    """
    path = PurePosixPath(match.group())
    if Path(path).exists():
        return str(path)
    for i in reversed(range(len(path.parts))):
        package = path.parts[i]
        if package.isidentifier() and i + 1 < len(path.parts) and path.parts[i + 1] == "models":
            spec = importlib.util.find_spec(package)
            here = Path(spec.origin).parent.joinpath(*path.parts[i + 1 :]) if spec and spec.origin else None
            if here is not None and here.exists():
                return str(here)
            reason = "does not have it" if spec else "is not installed"
            raise SourceError(f"The recorded scene needs {path.name} of package {package!r}, which {reason}.")
    raise SourceError(f"The recorded scene needs the file {path}, which is not here.")

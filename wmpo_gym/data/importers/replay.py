"""Pictures of stored simulator states: the hook that simulators fill in.

A robomimic file may hold the simulator's states and no pictures. Whoever can draw them registers how, by the
name of the environment in the file; importers find it here and import no simulator themselves.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np

from wmpo_gym.data.importers.base import SourceError


class StateRenderer(Protocol):
    """Draws the stored states of one environment."""

    def render(self, states: np.ndarray, model_xml: str | None) -> np.ndarray:
        """Draw states.

        Args:
            states: float64 (N, S), flattened as the environment's robosuite version does it.
            model_xml: The episode's MJCF as stored, None if the file has none.

        Returns:
            uint8 (N, image_size, image_size, 3).
        """

    def close(self) -> None:
        """Let go of the simulator."""


# Called with the file's ``env_args``, the camera's name and the side of the pictures in pixels.
StateRendererFactory = Callable[[Mapping[str, Any], str, int], StateRenderer]

# Name of the environment in the file -> factory, or "module:name" of one, imported when it is needed.
STATE_RENDERERS: dict[str, str | StateRendererFactory] = {}
# What robomimic calls the type of an environment -> the same, for environments without an entry of their own.
STATE_RENDERERS_BY_TYPE: dict[int, str | StateRendererFactory] = {
    1: "wmpo_gym.envs.simulated.tabletop.replay:RobosuiteStates",
}


def register_state_renderer(env_name: str, factory: str | StateRendererFactory) -> None:
    """Name what draws the stored states of an environment.

    Args:
        env_name: ``env_name`` in the file's ``env_args``, for instance ``"Square_D0"``.
        factory: See :data:`STATE_RENDERERS`.
    """
    STATE_RENDERERS[env_name] = factory


def make_state_renderer(
    env_args: Mapping[str, Any], camera: str, image_size: int, where: str
) -> StateRenderer:
    """Make what draws a file's states.

    Args:
        env_args: ``env_name``, ``env_kwargs`` and more, as the file has them.
        camera: Camera to draw from.
        image_size: Side of the pictures in pixels.
        where: The file, for the message.

    Raises:
        SourceError: If nothing can draw them.
    """
    name = env_args.get("env_name")
    factory = STATE_RENDERERS.get(str(name)) or STATE_RENDERERS_BY_TYPE.get(env_args.get("type", -1))
    if factory is None:
        raise SourceError(
            f"{where} holds simulator states of {name!r} and no pictures, and nothing here can draw them "
            f"(known: {', '.join(STATE_RENDERERS) or 'none'}). Add the pictures with robomimic's "
            "dataset_states_to_obs, or name what draws them with "
            "wmpo_gym.data.importers.register_state_renderer."
        )
    if isinstance(factory, str):
        module, _, attribute = factory.partition(":")
        factory = getattr(importlib.import_module(module), attribute)
    return factory(env_args, camera, image_size)

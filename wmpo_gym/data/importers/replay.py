"""Registry of renderers for recorded simulator states.

A robomimic file may hold simulator states and no images. Simulators register a renderer under the name of the
environment in the file, so that importers need not import a simulator.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np

from wmpo_gym.data.importers.base import SourceError


class StateRenderer(Protocol):
    """Renders the recorded states of one environment."""

    def render(self, states: np.ndarray, model_xml: str | None) -> np.ndarray:
        """Render states.

        Args:
            states: float64 (N, S), flattened as in the environment's robosuite version.
            model_xml: The episode's recorded MJCF; None if the file has none.

        Returns:
            uint8 (N, image_size, image_size, 3).
        """

    def close(self) -> None:
        """Close the simulator."""


# Called with the file's ``env_args``, the camera name and the image side in pixels.
StateRendererFactory = Callable[[Mapping[str, Any], str, int], StateRenderer]

# Name of the environment in the file -> factory, or "module:name" of one, imported when it is needed.
STATE_RENDERERS: dict[str, str | StateRendererFactory] = {}
# Robomimic's environment type -> factory, for environments without an entry of their own.
STATE_RENDERERS_BY_TYPE: dict[int, str | StateRendererFactory] = {
    1: "wmpo_gym.envs.simulated.tabletop.replay:RobosuiteStates",
}


def register_state_renderer(env_name: str, factory: str | StateRendererFactory) -> None:
    """Register a renderer for the recorded states of an environment.

    Args:
        env_name: ``env_name`` in the file's ``env_args``, for instance ``"Square_D0"``.
        factory: See :data:`STATE_RENDERERS`.
    """
    STATE_RENDERERS[env_name] = factory


def make_state_renderer(
    env_args: Mapping[str, Any], camera: str, image_size: int, where: str
) -> StateRenderer:
    """Create the renderer for the states in a file.

    Args:
        env_args: The file's ``env_args``: ``env_name``, ``env_kwargs`` and more.
        camera: Camera to render.
        image_size: Image side in pixels.
        where: The file, for the message.

    Raises:
        SourceError: If there is no renderer for the environment.
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

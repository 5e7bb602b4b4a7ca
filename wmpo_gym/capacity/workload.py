"""Description of a GRPO run by its configurations; networks are built on the ``meta`` device."""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from wmpo_gym.convert.released import released_task
from wmpo_gym.policies.processor import InstructionTable
from wmpo_gym.policies.vla_config import VLAConfig
from wmpo_gym.policies.weights import read_policy_card
from wmpo_gym.tasks import Task
from wmpo_gym.utils.io import ArtifactError, read_json
from wmpo_gym.world.networks.autoencoder import SDXL_AUTOENCODER, LatentAutoencoder
from wmpo_gym.world.networks.conv import ConvWorldModel
from wmpo_gym.world.networks.stdit import CONFIGS
from wmpo_gym.world.world import COMPONENTS, WorldConfig, find_pretrained

if TYPE_CHECKING:
    from wmpo_gym.policies.vla import VLANetwork

LETTERS_PER_TOKEN = 3  # assumed for prompts whose tokenizer is not available; a conservative value


@dataclass(frozen=True)
class Component:
    """Class and configuration of a network.

    Attributes:
        kind: Key of :data:`~wmpo_gym.world.world.COMPONENTS`.
        config: Configuration of the network.
    """

    kind: str
    config: Mapping[str, Any] = field(default_factory=dict)

    def build(self) -> Any:
        """Build the component on the ``meta`` device, in evaluation mode."""
        kind = getattr(importlib.import_module(COMPONENTS[self.kind]), self.kind)
        with torch.device("meta"):
            if kind is LatentAutoencoder:
                from diffusers import AutoencoderKL

                return kind(AutoencoderKL.from_config(dict(self.config)))
            component = (
                kind.from_config(dict(self.config)) if hasattr(kind, "from_config") else kind(**self.config)
            )
        return component.eval() if isinstance(component, torch.nn.Module) else component


@dataclass(frozen=True)
class ImaginedWorld:
    """Components of a world.

    Attributes:
        network: World model.
        autoencoder: Autoencoder of the frames.
        classifier: Success classifier.
        sampling: Sampling settings.
    """

    network: Component
    autoencoder: Component
    classifier: Component
    sampling: WorldConfig


@dataclass(frozen=True)
class Workload:
    """Sizes of one GRPO iteration.

    Attributes:
        name: Display name.
        policy: Configuration of the policy's network.
        text_tokens: Length of the policy's text input in tokens.
        horizon: Control steps per episode.
        image_size: Side of the observed frames in pixels.
        world: Components of the world; None for a run in the simulator.
        n_groups: Groups per iteration.
        group_size: Rollouts per group.
        n_epochs: Epochs over the rollouts.
        micro_batch: Decisions per forward and backward pass.
        rows_at_once: Rollouts imagined at once; None is all rollouts of a device.
        recompute: Whether the old log-probabilities are recomputed before the update.
        lora: Settings of the policy's existing adapters.
    """

    name: str
    policy: VLAConfig
    text_tokens: int
    horizon: int
    image_size: int
    world: ImaginedWorld | None
    n_groups: int
    group_size: int
    n_epochs: int
    micro_batch: int
    rows_at_once: int | None = None
    recompute: bool = False
    lora: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        for name in ("n_groups", "group_size", "n_epochs", "micro_batch", "rows_at_once"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")

    @property
    def rollouts(self) -> int:
        """Episodes per iteration."""
        return self.n_groups * self.group_size

    @property
    def n_chunks(self) -> int:
        """Decisions per episode."""
        return math.ceil(self.horizon / self.policy.chunk)

    @property
    def decision_bytes(self) -> int:
        """Host memory per decision of a rollout: frame, tokens, log-probabilities and mask."""
        return 3 * self.image_size**2 + 13 * self.policy.n_tokens

    def build_policy(self) -> VLANetwork:
        """The policy's network on the ``meta`` device."""
        from wmpo_gym.policies.vla import VLANetwork

        with torch.device("meta"):
            return VLANetwork(self.policy)


def published_workload(task: str, **changes: Any) -> Workload:
    """Workload with the sizes and settings of the WMPO paper and release.

    Args:
        task: Name of a released task; hyphens and underscores are equivalent.
        **changes: Overrides of fields of :class:`Workload`.

    Raises:
        ValueError: If the task does not exist.
    """
    released = released_task(task)
    policy = VLAConfig.openvla_oft_7b(chunk=released.chunk.value, action_dim=released.action_dim.value)
    world = ImaginedWorld(
        network=Component("STDiT", {**CONFIGS["xl"], "action_dim": policy.action_dim, "chunk": policy.chunk}),
        autoencoder=Component("LatentAutoencoder", SDXL_AUTOENCODER),
        classifier=Component("VideoMAESuccessClassifier", {}),
        sampling=WorldConfig(released.context_frames.value, released.denoising_steps.value),
    )
    values: dict[str, Any] = {
        "name": f"paper, {released.name}",
        "policy": policy,
        "text_tokens": text_tokens(policy, [released.prompt.value]),
        "horizon": released.horizon.value,
        "image_size": released.image_size.value,
        "world": world,
        "n_groups": 64,
        "group_size": 8,
        "n_epochs": 1,
        "micro_batch": 16,
        "rows_at_once": 16,
        "recompute": True,
    }
    return Workload(**{**values, **changes})


def saved_workload(world: str | Path | None, policy: str | Path, **settings: Any) -> Workload:
    """Workload of a saved world and policy; reads only their configurations.

    Args:
        world: Directory, hub id or task name; None for a run in the simulator.
        policy: Directory, hub id or task name of the policy.
        **settings: ``n_groups``, ``group_size``, ``n_epochs``, ``micro_batch``, and any other field of
            :class:`Workload`; without a world, ``horizon`` defaults to one decision.

    Raises:
        ValueError: If the world or policy does not exist, or the world has no success classifier.
        ArtifactError: If a file is missing or damaged.
    """
    card = read_policy_card(find_pretrained(policy, "policy"))
    config: VLAConfig = card["config"]
    parts, task = (None, None) if world is None else read_world(find_pretrained(world, "world"))
    values: dict[str, Any] = {
        "name": str(policy) if task is None else f"{task.name} ({world})",
        "policy": config,
        "text_tokens": text_tokens(config, card["instructions"]),
        "horizon": config.chunk,
        "lora": card.get("lora"),
        "image_size": card["pixels"][1],
        "world": parts,
    }
    if task is not None:
        values |= {"horizon": task.horizon, "image_size": task.image_size}
    return Workload(**{**values, **settings})


def read_world(directory: Path) -> tuple[ImaginedWorld, Task]:
    """Component configurations and task of a saved world.

    Raises:
        ValueError: If the world has no success classifier.
        ArtifactError: If a file is missing or damaged.
    """
    saved = read_json(directory / "config.json")
    try:
        task, kinds = Task.from_dict(saved["task"]), saved["components"]
        sampling = WorldConfig(**saved["sampling"])
    except (KeyError, TypeError, ValueError) as error:
        raise ArtifactError(
            f"{directory / 'config.json'} is not a world's configuration: {error!r}."
        ) from error
    if "reward" not in kinds:
        raise ValueError(
            f"The world in {directory} has no success classifier; `wmpo train reward` trains one."
        )
    configs = {name: read_json(directory / name / "config.json") for name in kinds}
    configs["reward"] = configs["reward"]["arguments"]
    parts = {
        name: Component(kind, {k: v for k, v in configs[name].items() if not k.startswith("_")})
        for name, kind in kinds.items()
    }
    return ImaginedWorld(parts["network"], parts["autoencoder"], parts["reward"], sampling), task


def default_rows_at_once(device: str) -> int | None:
    """Default number of rollouts imagined at once (an upper bound for some networks); None is all."""
    return ConvWorldModel.cpu_batch if device == "cpu" else None


def text_tokens(config: VLAConfig, instructions: list[str]) -> int:
    """Length of the longest text input: prompt, placeholders, start and stop."""
    if config.tokenizer == "bytes" or Path(config.tokenizer).is_dir():
        return InstructionTable(instructions, config).text.shape[1]
    letters = max(len(config.prompt.format(task=sentence)) for sentence in instructions)
    return math.ceil(letters / LETTERS_PER_TOKEN) + len(config.prompt_suffix) + config.n_tokens + 2

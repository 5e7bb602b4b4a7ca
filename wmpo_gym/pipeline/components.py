"""The networks a recipe names: world model, autoencoder, success classifier and policy."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from wmpo_gym.pipeline.presets import Recipe
from wmpo_gym.policies.vla_config import VLAConfig
from wmpo_gym.reward.classifier import SuccessClassifier
from wmpo_gym.reward.training import make_classifier
from wmpo_gym.tasks import Task
from wmpo_gym.training.presets import hints_for
from wmpo_gym.utils.io import ArtifactError, read_json
from wmpo_gym.world.components import NETWORKS, make_autoencoder, make_network
from wmpo_gym.world.networks.autoencoder import Autoencoder, PixelAutoencoder
from wmpo_gym.world.world import World, WorldConfig, find_pretrained

POLICIES: dict[str, Callable[..., VLAConfig]] = {
    "tiny": VLAConfig.tiny,
    "openvla-oft-7b": VLAConfig.openvla_oft_7b,
}


def new_network(recipe: Recipe, task: Task, autoencoder: Autoencoder, *, state_dim: int = 0) -> nn.Module:
    """The untrained world model of a recipe, see :func:`~wmpo_gym.world.components.make_network`."""
    return make_network(
        recipe.network,
        task,
        autoencoder,
        sampling(recipe),
        seed=recipe.seed,
        state_dim=state_dim,
        hints=hints_for(task, recipe.symmetries),
        sizes=recipe.network_config,
    )


def sampling(recipe: Recipe) -> WorldConfig:
    """How a new world of the recipe is sampled."""
    return WorldConfig(recipe.context_frames, recipe.denoising_steps, recipe.context_noise)


def check_world_model(name_or_dir: str, recipe: Recipe, task: Task) -> Path:
    """Check a pre-trained world against the recipe and its task; no weights are read.

    Args:
        name_or_dir: Directory, hub id, or name of a task with a bundled world.
        recipe: Must name the networks and the sampling that the world has.
        task: Must have the same chunks, actions and frames.

    Returns:
        Directory of the world.

    Raises:
        ValueError: If there is no such world, or it does not fit; the message names the first difference and
            the option to change.
        ArtifactError: If the directory does not hold a world.
    """
    directory = find_pretrained(name_or_dir, "play")
    described = read_json(directory / "config.json")
    kinds = {kind.__name__: name for name, kind in NETWORKS.items()}
    try:
        components, trained_for = described["components"], described["task"]
        found: dict[str, Any] = {"network": kinds[components["network"]]}
        sizes = read_json(directory / "network" / "config.json")
        for name in ("context_frames", "denoising_steps", "context_noise"):
            found[name] = described["sampling"][name]
        pixels = components["autoencoder"] == PixelAutoencoder.__name__
        shared = {name: trained_for[name] for name in ("chunk", "action_dim", "image_size")}
    except (KeyError, TypeError) as error:
        raise ArtifactError(f"{directory} does not hold a world model: {error!r}.") from error
    asked = {name: getattr(recipe, name) for name in found}
    if pixels != (recipe.autoencoder == "pixels"):
        found["autoencoder"], asked["autoencoder"] = components["autoencoder"], recipe.autoencoder
    for name, value in recipe.network_config.items():
        found[f"network_config.{name}"], asked[f"network_config.{name}"] = sizes.get(name), value
    for name, value in found.items():
        if value != asked[name]:
            raise ValueError(
                f"The pre-trained world {name_or_dir} has {name} {value!r}, the recipe {asked[name]!r}; "
                f"set --recipe.{name.replace('_', '-')} to what the world has, or name another world."
            )
    for name, value in shared.items():
        if value != getattr(task, name):
            raise ValueError(
                f"The pre-trained world {name_or_dir} has {name} {value}, task {task.name!r} has "
                f"{getattr(task, name)}; name a world of this task, or another task."
            )
    return directory


def load_world_model(name_or_dir: str, recipe: Recipe, task: Task) -> World:
    """A pre-trained world to continue, bound to the task of the recipe; see :func:`check_world_model`."""
    return replace(World.from_pretrained(check_world_model(name_or_dir, recipe, task)), task=task)


def new_classifier(recipe: Recipe, task: Task, pretrained: World) -> SuccessClassifier:
    """The success classifier that training starts from.

    That of the pre-trained world if it has one of the recipe's kind; else a new one, whose encoder is
    ``recipe.pretrained_classifier`` if that is given.

    Args:
        recipe: Names the kind and its sizes, and seeds the weights.
        task: Gives the instructions and the size of the frames.
        pretrained: The pre-trained world.

    Raises:
        ValueError: If the sizes do not fit the kind.
    """
    n, known = len(task.instructions), pretrained.classifier
    if known is not None and known.kind == recipe.classifier and known.n_instructions == n:
        return copy.deepcopy(known)
    if recipe.pretrained_classifier is not None:
        from wmpo_gym.reward.videomae import VideoMAESuccessClassifier

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            return VideoMAESuccessClassifier.from_transformers(recipe.pretrained_classifier, n_instructions=n)
    return _make_classifier(recipe, task)


def _make_classifier(recipe: Recipe, task: Task) -> SuccessClassifier:
    sizes: dict[str, Any] = dict(recipe.classifier_config)
    if recipe.classifier == "videomae":
        sizes = {"model": sizes}
    try:
        return make_classifier(recipe.classifier, task, seed=recipe.seed, **sizes)
    except TypeError as error:
        raise ValueError(
            f"classifier_config does not fit the classifier {recipe.classifier!r}: {error}"
        ) from error


def check_components(recipe: Recipe, task: Task) -> None:
    """Check every component that a recipe names, before anything is computed; no memory is taken for weights.

    Raises:
        ValueError: If a component does not exist or does not fit; the message names the setting to change.
    """
    if recipe.pretrained_world is not None:
        check_world_model(recipe.pretrained_world, recipe, task)
    else:
        autoencoder = make_autoencoder(recipe.autoencoder)
        with torch.device("meta"):
            new_network(recipe, task, autoencoder)
    if recipe.pretrained_classifier is None:
        with torch.device("meta"):
            _make_classifier(recipe, task)
    elif recipe.classifier != "videomae":
        raise ValueError(
            f"pretrained_classifier starts a videomae classifier, the recipe asks for {recipe.classifier!r}; "
            "set --recipe.classifier videomae, or leave it out."
        )
    for name in (recipe.base_policy, recipe.pretrained_policy):
        if name is not None:
            find_pretrained(name, "policy")
    if recipe.base_policy is None and recipe.pretrained_policy is None:
        policy_config(recipe, task)


def policy_config(recipe: Recipe, task: Task) -> VLAConfig:
    """Sizes of a new policy for a task.

    Raises:
        ValueError: If ``recipe.policy_config`` does not fit the policy.
    """
    sizes: dict[str, Any] = {"chunk": task.chunk, "action_dim": task.action_dim}
    if recipe.policy == "tiny":
        sizes["image_size"] = task.image_size
    try:
        return POLICIES[recipe.policy](**{**sizes, **recipe.policy_config})
    except TypeError as error:
        raise ValueError(f"policy_config does not fit the policy {recipe.policy!r}: {error}") from error

"""The package in a few functions: load, collect, train, validate, evaluate.

These are the functions that ``import wmpo_gym`` offers. Each does what the ``wmpo`` command of that name
does, on objects in memory instead of directories.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch
    from torch import nn

    from wmpo_gym.data.episode import Episode
    from wmpo_gym.data.store import EpisodeStore
    from wmpo_gym.policies.vla_policy import VLAPolicy
    from wmpo_gym.reward.training import ClassifierTraining
    from wmpo_gym.rollouts.rollout import Rollouts
    from wmpo_gym.tasks import Task
    from wmpo_gym.world.training import WorldModelTraining
    from wmpo_gym.world.world import World


def load_pretrained(
    name_or_dir: str | Path, kind: Literal["policy", "world", "play"] = "world", *, seed: int = 0
) -> World | VLAPolicy:
    """Load a world or a policy.

    Args:
        name_or_dir: A directory, the name of a task with bundled weights (``"move-block"``), or a Hugging
            Face hub id.
        kind: ``"world"``, ``"policy"``, or ``"play"`` for the bundled world model that has seen play only.
        seed: Seeds the sampling of a policy.

    Returns:
        A :class:`~wmpo_gym.world.world.World` or a :class:`~wmpo_gym.policies.vla_policy.VLAPolicy`.

    Raises:
        ValueError: If the kind is unknown or there is nothing of that name; the message lists what there is.
        ArtifactError: If a file is damaged.
    """
    from wmpo_gym.world.world import World, find_pretrained

    if kind not in ("policy", "world", "play"):
        raise ValueError(f"Unknown kind {kind!r}; choose 'world', 'policy' or 'play'.")
    directory = find_pretrained(name_or_dir, kind)
    if kind != "policy":
        return World.from_pretrained(directory)
    from wmpo_gym.policies.vla_policy import VLAPolicy

    return VLAPolicy.from_pretrained(directory, seed=seed)


def collect(
    task: str | Task,
    policy: Any = "expert",
    *,
    out: str | Path,
    episodes: int = 100,
    split: str = "train",
    seed: int = 0,
    deterministic: bool = False,
    num_envs: int = 64,
    progress: bool = True,
) -> EpisodeStore:
    """Record episodes in the simulator.

    Args:
        task: Task or its name.
        policy: ``"expert"`` for scripted demonstrations, ``"play"`` for unlabelled scripted play, or a policy
            (a ``VLAPolicy``, a Stable-Baselines3 model, anything with ``predict``).
        out: Directory of the store. Start states that it holds already are skipped.
        episodes: How many, one per start state; at most as many as the split has.
        split: ``"train"``, ``"validation"`` or ``"test"``.
        seed: Seed of the choice of start states and of all noise.
        deterministic: Greedy actions of a policy.
        num_envs: Episodes of a policy at once.
        progress: Show a progress bar.

    Returns:
        The store.

    Raises:
        ValueError: If the task has no such split, too few start states, or no simulator or script.
    """
    from wmpo_gym.data.store import EpisodeStore
    from wmpo_gym.envs.simulated.scripted import record_expert, record_play
    from wmpo_gym.rollouts.rollout import choose_start_states, collect_episodes, make_rollout_env
    from wmpo_gym.tasks import get_task
    from wmpo_gym.utils.progress import progress_bar

    task, store = get_task(task), EpisodeStore(out)
    chosen = choose_start_states(task, split, episodes, seed)
    if not isinstance(policy, str):
        env = make_rollout_env("WMPO-Simulated-v0", min(num_envs, episodes), record_frames=True, task=task)
        try:
            collect_episodes(
                env, policy, chosen, store, deterministic=deterministic, seed=seed, progress=progress
            )
        finally:
            env.close()
        return store
    scripts = {"expert": record_expert, "play": record_play}
    if policy not in scripts:
        raise ValueError(f"Unknown policy {policy!r}; choose 'expert' or 'play', or give a policy object.")
    present = set(store.ids())
    missing = [i for i in chosen if i not in present]
    with progress_bar(total=len(missing), desc=policy, unit="ep", disable=not progress) as bar:
        for episode in scripts[policy](missing, seed=seed, task=task):
            store.append(episode)
            bar.update()
    return store


def train_world(
    episodes: Sequence[Episode] | EpisodeStore,
    task: str | Task,
    *,
    init: World | None = None,
    network: nn.Module | None = None,
    training: WorldModelTraining | None = None,
    device: str | torch.device = "auto",
    precision: str = "fp32",
    checkpoint_dir: str | Path | None = None,
    progress: bool = True,
) -> World:
    """Train a world model on episodes; no labels are needed.

    Args:
        episodes: Recorded episodes, or a store, which is read from disk while training.
        task: Task or its name.
        init: World to start from; None for a new one.
        network: Network of a new world that works on pixels; None for the convolutional one.
        training: Settings; None for the defaults.
        device: Where to train, see :func:`~wmpo_gym.utils.device.resolve_device`.
        precision: ``"fp32"``, or ``"bf16"`` on a GPU.
        checkpoint_dir: Where to keep checkpoints; a training found there is resumed.
        progress: Show a progress bar.

    Returns:
        A world without a success classifier, see :func:`train_reward`.

    Raises:
        ValueError: If there is nothing to train on, or device or precision are not to be had.
    """
    from dataclasses import replace

    from wmpo_gym.tasks import get_task
    from wmpo_gym.training.presets import hints_for
    from wmpo_gym.training.runtime import ComputeSettings
    from wmpo_gym.world.components import make_network
    from wmpo_gym.world.networks.autoencoder import PixelAutoencoder
    from wmpo_gym.world.proprio import ProprioTraining, learn_proprio, proprio_size
    from wmpo_gym.world.training import WorldModelTrainer, WorldModelTraining
    from wmpo_gym.world.world import StartFrames, World, WorldConfig

    task, training = get_task(task), training or WorldModelTraining()
    compute = ComputeSettings(device=str(device), precision=precision)  # type: ignore[arg-type]
    compute.checked()
    found, hints = _opened(episodes), hints_for(task)
    if init is None:
        autoencoder = PixelAutoencoder()
        network = network or make_network(
            "conv",
            task,
            autoencoder,
            WorldConfig(),
            seed=training.seed,
            state_dim=proprio_size(found, hints.symmetries),
            hints=hints,
        )
        world = World(task, network, autoencoder, None, StartFrames.from_episodes(found))
        world.card = {"name": task.name}
    else:
        world = replace(init, start_frames=init.start_frames.with_episodes(found), classifier=None)
    place = None if checkpoint_dir is None else Path(checkpoint_dir)
    learn_proprio(
        world.network,
        world.autoencoder,
        found,
        ProprioTraining(seed=training.seed),
        compute=compute,
        checkpoint_dir=None if place is None else place / "proprio",
        progress=progress,
    )
    WorldModelTrainer(
        world.network,
        world.autoencoder,
        task,
        found,
        training,
        context_frames=world.config.context_frames,
        denoising_steps=world.config.denoising_steps,
        symmetries=hints.symmetries,
        compute=compute,
        checkpoint_dir=None if place is None else place / "world_model",
    ).train(progress=progress)
    return world


def train_reward(
    world: World,
    episodes: Sequence[Episode] | EpisodeStore,
    *,
    kind: Literal["conv", "videomae"] = "conv",
    imagined: bool = True,
    training: ClassifierTraining | None = None,
    seed: int = 0,
    checkpoint_dir: str | Path | None = None,
    progress: bool = True,
) -> World:
    """Train and calibrate the success classifier of a world.

    Args:
        world: The world; left as it is.
        episodes: Labelled episodes, failures included, or a store of them.
        kind: The small convolutional classifier, or VideoMAE as published.
        imagined: Also learn from the world's replays of the recorded actions.
        training: Settings; None for the kind's defaults.
        seed: Seed of weights, hold-out and everything random.
        checkpoint_dir: Where to keep checkpoints; a training found there is resumed.
        progress: Show a progress bar.

    Returns:
        The world with its classifier; the calibration is in its card under ``"reward"``.

    Raises:
        ValueError: If there are fewer than two successes or two failures.
    """
    from dataclasses import replace

    from wmpo_gym.reward.training import train_classifier
    from wmpo_gym.rollouts.imagined import imagined_replays
    from wmpo_gym.training.presets import hints_for

    labelled = [e for e in _opened(episodes) if e.success is not None]
    classifier, metrics = train_classifier(
        labelled,
        world.task,
        kind=kind,
        seed=seed,
        imagined=imagined_replays(world, labelled, seed=seed) if imagined else None,
        config=training,
        hints=hints_for(world.task),
        checkpoint_dir=checkpoint_dir,
        progress=progress,
    )
    card = {name: entry for name, entry in world.card.items() if name != "gates"}
    return replace(world, classifier=classifier, card={**card, "reward": metrics})


def evaluate(
    task: str | Task,
    policy: Any,
    *,
    split: str = "test",
    n_episodes: int = 256,
    deterministic: bool = False,
    world: World | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Rollouts:
    """Success of a policy on the first start states of a split.

    Args:
        task: Task or its name.
        policy: A ``VLAPolicy``, a Stable-Baselines3 model, or anything with ``predict``.
        split: ``"test"`` for reported numbers, ``"validation"`` for choices.
        n_episodes: Number of start states.
        deterministic: Greedy instead of sampled actions.
        world: World to evaluate in; None for the simulator.
        seed: Seed of all sampling.
        progress: Show a progress bar.

    Returns:
        The rollouts; ``.rate`` is the success rate with its interval, ``.protocol`` how it was measured.

    Raises:
        ValueError: If the split has fewer start states, or policy and task do not fit.
    """
    from wmpo_gym.rollouts.rollout import evaluate_policy_on

    return evaluate_policy_on(
        task,
        policy,
        split,
        n_episodes,
        deterministic=deterministic,
        seed=seed,
        env_id="WMPO-Simulated-v0" if world is None else "WMPO-Imagined-v0",
        world=world,
        progress=progress,
    )


def _opened(episodes: Any) -> list[Episode]:
    from wmpo_gym.data.store import EpisodeStore

    return list(episodes.open() if isinstance(episodes, EpisodeStore) else episodes)

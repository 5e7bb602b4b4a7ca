"""``wmpo train world-model``: pre-train a world model on play, or fine-tune one on a policy's rollouts."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from wmpo_gym.cli.common import Flat, load_episodes, load_world, split_episodes, task_of
from wmpo_gym.data.episode import Episode
from wmpo_gym.tasks import Task
from wmpo_gym.training.presets import SymmetryChoice, hints_for
from wmpo_gym.training.runtime import ComputeSettings, is_main_process, process_count
from wmpo_gym.utils.config import keep_settings
from wmpo_gym.utils.io import read_json, write_json_atomic
from wmpo_gym.world.proprio import ProprioTraining, learn_proprio, proprio_size
from wmpo_gym.world.training import WorldModelTrainer, WorldModelTraining

if TYPE_CHECKING:
    from torch import nn

    from wmpo_gym.world.world import World


@dataclass(frozen=True)
class Command:
    """Train a world model: first on play, then (--init) on rollouts of the policy to be optimised in it.

    If interrupted, the same command resumes from the last checkpoint and ends with the same weights.

    Attributes:
        episodes: Directories of episodes; success labels are not used.
        out: Output directory of the world. Checkpoints, TensorBoard curves, sample videos and quality.json go
            to OUT.training.
        play: Directories of further episodes that are sampled less often.
        weight: Sampling weight of an episode of --episodes relative to one of --play.
        task: Task name, or the directory of an import or a world; by default the task of the episodes.
        init: World to fine-tune (directory, hub id or task name). Its task, networks and settings are kept,
            and the first frames of the new episodes are added to its start states.
        network: conv (convolutional, in pixel space, small and fast), or stdit (the published
            spatial-temporal transformer).
        network_config: JSON file with further arguments of the network.
        autoencoder: Directory of a diffusers AutoencoderKL; by default the model works on pixels.
        context_frames: Number of context frames.
        denoising_steps: Denoising steps per chunk, in training and sampling.
        holdout: Fraction of the episodes held out for evaluation.
        frame_cache: Directory for decoded, uncompressed frames; by default .frames in each directory of
            episodes.
        network_size: Size of the transformer: xl (published), or small (trains on a CPU).
        proprio: Also train a model of the robot's state (proprioception) and condition the network on its
            predictions. It needs the state in every episode and the network conv. --no-proprio disables it.
        proprio_steps: Training steps of that model's dynamics (default 12,000); its encoder and its keypoints
            train for 1/6 and 1/30 of them.
        symmetries: Data augmentation: task also trains on examples transformed by the symmetries of a bundled
            task; none trains on the recorded examples only.
        training: Training settings.
        compute: Device, precision and micro-batch size.
    """

    episodes: tuple[Path, ...]
    out: Path
    play: tuple[Path, ...] = ()
    weight: float = 2.5
    task: str | None = None
    init: str | None = None
    network: Literal["conv", "stdit"] = "conv"
    network_size: Literal["small", "xl"] = "small"
    network_config: Path | None = None
    autoencoder: Path | None = None
    context_frames: int = 2
    denoising_steps: int = 1
    holdout: float = 0.1
    frame_cache: Path | None = None
    proprio: bool = True
    proprio_steps: int | None = None
    symmetries: SymmetryChoice = "task"
    training: Flat[WorldModelTraining] = field(default_factory=WorldModelTraining)
    compute: Flat[ComputeSettings] = field(default_factory=ComputeSettings)

    def run(self) -> None:
        """Train, measure, save."""
        compute = self.compute.checked()
        if self.network_size != "small" and self.network != "stdit":
            raise ValueError(
                f"--network-size {self.network_size} is a size of the transformer; give --network stdit too, "
                "or change the convolutional network with --network-config."
            )
        proprio = self._proprio_settings()
        known = load_world(self.init) if self.init else None
        task = known.task if known else task_of(self.task, self.episodes)
        episodes, play = (
            load_episodes(stores, task, self.frame_cache) for stores in (self.episodes, self.play)
        )
        symmetries = hints_for(task, self.symmetries).symmetries
        state_dim = proprio_size([*episodes, *play], symmetries) if self.proprio else 0
        world = known or self._new_world(task, episodes, state_dim)
        self._check_proprio(world, [*episodes, *play])
        self._require_room(world, compute)
        world.start_frames = world.start_frames.with_episodes(episodes)
        logs = self.out.with_name(self.out.name + ".training")
        places = ("out", "frame_cache", "compute")
        settings = {k: v for k, v in asdict(self).items() if k not in places}
        started = any((logs / made).exists() for made in ("checkpoint", "motion"))
        keep_settings(logs / "command.json", settings, started=started)
        kept, held = split_episodes(episodes, self.holdout, self.training.seed)

        def evaluate_checkpoint(network: nn.Module, step: int) -> dict[str, float]:
            return _evaluate_checkpoint(replace(world, network=network), held, logs, step)

        weights = [self.weight] * len(kept) + [1.0] * len(play)
        motion = learn_proprio(
            world.network, world.autoencoder, [*kept, *play], proprio, weights=weights,
            compute=self.compute, checkpoint_dir=logs / "motion", progress=True,
        )  # fmt: skip
        trainer = WorldModelTrainer(
            world.network,
            world.autoencoder,
            task,
            [*kept, *play],
            self.training,
            context_frames=world.config.context_frames,
            denoising_steps=world.config.denoising_steps,
            weights=weights,
            symmetries=symmetries,
            compute=self.compute,
            checkpoint_dir=logs / "checkpoint",
            tensorboard=logs,
            validate=evaluate_checkpoint if held else None,
        )
        history = trainer.train()
        if not is_main_process():
            return
        made = self._provenance(len(kept), len(play), history) | {"motion": motion}
        world.card = {**world.card, "world_model": made}
        world.card.pop("gates", None)  # measured with other weights
        world.save_pretrained(self.out)
        print(_summary(history[-1] if history else {}, trainer.step, self.out))

    def _proprio_settings(self) -> ProprioTraining:
        if self.proprio_steps is None:
            return ProprioTraining(seed=self.training.seed)
        if not self.proprio:
            raise ValueError("--no-proprio leaves out what --proprio-steps trains; give one of them.")
        if self.proprio_steps < 1:
            raise ValueError(
                f"--proprio-steps must be at least 1, got {self.proprio_steps}; --no-proprio leaves the "
                "robot's state out."
            )
        return ProprioTraining.of_steps(self.proprio_steps, seed=self.training.seed)

    def _check_proprio(self, world: World, episodes: list[Episode]) -> None:
        """Refuse proprioception options that would have no effect."""
        follows = getattr(world.network, "motion", None) is not None
        if follows and not self.proprio:
            raise ValueError(
                "This world draws by the robot's state (state_dim in its network's settings), which "
                "--no-proprio leaves out; drop the option, or train a new world without it."
            )
        if self.proprio_steps is not None and not (
            follows and any(episode.proprio is not None for episode in episodes)
        ):
            raise ValueError(
                "--proprio-steps has no effect here: there is no robot state to predict. It takes the "
                "network conv, a task without symmetries, and episodes that all have the state recorded; "
                "drop the option otherwise."
            )

    def _require_room(self, world: World, compute: ComputeSettings) -> None:
        from wmpo_gym.capacity.training import TrainingEstimator, require_training_room

        estimator = TrainingEstimator(
            f"Training the world model of {world.task.name}",
            world.network,
            world.autoencoder,
            world.task.image_size,
            self.training,
            denoising_steps=world.config.denoising_steps,
            bf16=compute.precision == "bf16",
        )
        require_training_room(estimator, compute.device, process_count(), compute.micro_batch_size)

    def _new_world(self, task: Task, episodes: list[Episode], state_dim: int) -> World:
        from wmpo_gym.world.components import STDIT_SIZES, make_autoencoder, make_network
        from wmpo_gym.world.world import StartFrames, World, WorldConfig

        autoencoder = make_autoencoder(str(self.autoencoder or "pixels"))
        config = WorldConfig(context_frames=self.context_frames, denoising_steps=self.denoising_steps)
        sizes = STDIT_SIZES[self.network_size] if self.network == "stdit" else {}
        network = make_network(
            self.network,
            task,
            autoencoder,
            config,
            seed=self.training.seed,
            state_dim=state_dim if self.network == "conv" else 0,
            hints=hints_for(task),
            sizes={**sizes, **(read_json(self.network_config) if self.network_config else {})},
        )
        return World(
            task, network, autoencoder, None, StartFrames.from_episodes(episodes), config, {"name": task.name}
        )

    def _provenance(self, kept: int, play: int, history: Sequence[dict[str, float]]) -> dict[str, Any]:
        return {
            "command": " ".join(["wmpo", *sys.argv[1:]]),
            "init": self.init,
            "episodes": kept,
            "play_episodes": play,
            "training": asdict(self.training),
            "final": history[-1] if history else {},
        }


def _evaluate_checkpoint(world: World, held: list[Episode], logs: Path, step: int) -> dict[str, float]:
    """Evaluate a checkpoint: all metrics go to quality.json, sample videos to samples/."""
    from wmpo_gym.evaluation.metrics import sample_video, world_quality
    from wmpo_gym.utils.video import save_video

    quality = world_quality(world, held)
    write_json_atomic(logs / "quality.json", {"step": step, **quality})
    save_video(
        logs / "samples" / f"step_{step:06d}.mp4",
        sample_video(world, held),
        fps=world.task.control_hz,
        scale=3,
    )
    return _log_metrics(quality)


def _log_metrics(quality: dict[str, Any]) -> dict[str, float]:
    """Mean and last value of each metric over the horizon, for logging."""
    metrics = {name: quality[name] for name in ("different_actions", "different_noise")}
    for name in ("psnr_db", "ssim", "object_error_px"):
        values = [v for v in quality.get(name, ()) if v is not None]
        if values:
            metrics |= {f"{name}_mean": float(np.mean(values)), f"{name}_last": values[-1]}
    return metrics


def _summary(last: dict[str, float], steps: int, out: Path) -> str:
    shown = [
        f"{k} {last[k]:.3g}"
        for k in ("loss", "psnr_db_mean", "psnr_db_last", "object_error_px_last")
        if k in last
    ]
    return f"{steps} steps{': ' if shown else ''}{', '.join(shown)}; the world is in {out}"

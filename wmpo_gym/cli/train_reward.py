"""``wmpo train reward``: train the success classifier of a world."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import tyro

from wmpo_gym.cli.common import Flat, load_episodes, load_world, option_value
from wmpo_gym.reward.training import ClassifierTraining, make_classifier, train_classifier
from wmpo_gym.training.presets import SymmetryChoice, hints_for
from wmpo_gym.training.runtime import ComputeSettings, is_main_process
from wmpo_gym.utils.config import keep_settings


@dataclass(frozen=True)
class Command:
    """Train the success classifier of a world on labelled episodes and calibrate it on held-out ones.

    If interrupted, the same command resumes from the last checkpoint and ends with the same weights.

    Attributes:
        episodes: Directories of labelled episodes, successes and failures.
        world: World to add the classifier to (directory, hub id or task name).
        out: Output directory of the world with its classifier; may be the same as --world. Checkpoints go to
            OUT.training.
        kind: conv (a small convolutional network), or videomae (the published VideoMAE). The defaults of the
            training settings depend on it.
        init: Initial weights: the directory of a saved classifier of this kind (in a world, its folder
            reward) or, for videomae, a VideoMAE of transformers (directory or hub id; the published one is
            MCG-NJU/videomae-base). Random by default.
        imagined: Also train on the world's replays of the recorded actions, labelled with the real outcomes.
        seed: Random seed of weights, hold-out and training.
        frame_cache: Directory for decoded, uncompressed frames; by default .frames in each directory of
            episodes.
        symmetries: Data augmentation: task also trains on examples transformed by the symmetries of a bundled
            task; none trains on the recorded examples only.
        training: Training settings.
        compute: Device, precision and micro-batch size.
    """

    episodes: tuple[Path, ...]
    world: str
    out: Path
    kind: Literal["conv", "videomae"] = "conv"
    init: str | None = None
    imagined: bool = True
    seed: int = 0
    frame_cache: Path | None = None
    symmetries: SymmetryChoice = "task"
    training: Flat[ClassifierTraining] = field(default_factory=ClassifierTraining)
    compute: Flat[ComputeSettings] = field(default_factory=ComputeSettings)

    @classmethod
    def default_for(cls, options: Sequence[str]) -> Command:
        """Default training settings for the kind of classifier in the options."""
        training = ClassifierTraining.for_kind(option_value(options, "--kind", cls.kind))
        return cls(tyro.MISSING, tyro.MISSING, tyro.MISSING, training=training)

    def run(self) -> None:
        """Train, calibrate, save."""
        from wmpo_gym.rollouts.imagined import imagined_replays

        compute = self.compute.checked()
        world = load_world(self.world)
        classifier = make_classifier(self.kind, world.task, seed=self.seed, pretrained=self.init)
        found = load_episodes(self.episodes, world.task, self.frame_cache)
        episodes = [e for e in found if e.success is not None]
        logs = self.out.with_name(self.out.name + ".training") / "reward"
        places = ("out", "world", "frame_cache", "compute")
        settings = {k: v for k, v in asdict(self).items() if k not in places}
        keep_settings(logs / "command.json", settings, started=(logs / "checkpoint").exists())
        replays = None
        if self.imagined:
            world.to(compute.device)
            replays = imagined_replays(world, episodes, seed=self.seed)
            world.to("cpu")
        world.classifier, metrics = train_classifier(
            episodes,
            world.task,
            kind=self.kind,
            seed=self.seed,
            imagined=replays,
            config=self.training,
            classifier=classifier,
            hints=hints_for(world.task, self.symmetries),
            device=compute.device,
            precision=compute.precision,
            micro_batch=compute.micro_batch_size,
            checkpoint_dir=logs / "checkpoint",
            tensorboard=logs,
        )
        if not is_main_process():
            return
        world.card = {**world.card, "reward": {"command": " ".join(["wmpo", *sys.argv[1:]]), **metrics}}
        world.card.pop("gates", None)  # measured with another classifier
        world.save_pretrained(self.out)
        c = metrics["calibration"]
        print(
            f"F1 {c['f1']:.3f} (precision {c['precision']:.3f}, recall {c['recall']:.3f}) on {c['n']} "
            f"held-out episodes, threshold {c['threshold']:.3f}; the world is in {self.out}"
        )

"""``wmpo train reward``: the success classifier of a world."""

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

    Interrupted, the same command goes on from its last checkpoint, to the same weights.

    Attributes:
        episodes: Directories of labelled episodes, failures included.
        world: The world it is for (directory, hub id or task name).
        out: Directory of the world with its classifier; may be the same as --world. Checkpoints go to the
            same name with .training behind it.
        kind: Small convolutional network, or VideoMAE as published; the training's defaults depend on it.
        init: Weights to start from: the directory of a saved classifier of this kind (of a world it is the
            folder reward) or, for videomae, a VideoMAE of transformers (directory or hub id, published:
            MCG-NJU/videomae-base). New weights by default.
        imagined: Also learn from the world's replays of the recorded actions, labelled by the real outcomes.
        seed: Decides weights, hold-out and everything random.
        frame_cache: Directory of decoded frames, as large as they are; .frames in each directory of episodes
            by default.
        symmetries: Train on examples transformed by the symmetries of a bundled task too, or as recorded.
        training: How to train.
        compute: Where to train, and in which precision.
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
        """The training settings of the kind of classifier that the options name."""
        training = ClassifierTraining.for_kind(option_value(options, "--kind", cls.kind))
        return cls(tyro.MISSING, tyro.MISSING, tyro.MISSING, training=training)

    def run(self) -> None:
        """Train, calibrate, save."""
        import torch

        from wmpo_gym.pipeline.components import move_world
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
            move_world(world, torch.device(compute.device))
            replays = imagined_replays(world, episodes, seed=self.seed)
            move_world(world, torch.device("cpu"))
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
        world.card.pop("gates", None)  # they were measured with another classifier
        world.save_pretrained(self.out)
        c = metrics["calibration"]
        print(
            f"F1 {c['f1']:.3f} (precision {c['precision']:.3f}, recall {c['recall']:.3f}) on {c['n']} "
            f"held-out episodes, threshold {c['threshold']:.3f}; the world is in {self.out}"
        )

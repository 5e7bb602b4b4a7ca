"""``wmpo train distill``: distil a world model to fewer denoising steps."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from wmpo_gym.cli.common import Flat, load_episodes, load_world, split_episodes
from wmpo_gym.training.presets import SymmetryChoice, hints_for
from wmpo_gym.training.runtime import ComputeSettings, is_main_process
from wmpo_gym.utils.config import keep_settings
from wmpo_gym.utils.io import write_json_atomic
from wmpo_gym.utils.text import aligned
from wmpo_gym.world.distillation import distillation_trainer, steps_to_imitate
from wmpo_gym.world.training import WorldModelTraining

if TYPE_CHECKING:
    from wmpo_gym.data.episode import Episode
    from wmpo_gym.world.world import World


@dataclass(frozen=True)
class Command:
    """Distil the sampler of a world to one to four denoising steps.

    The student learns to reproduce the teacher's many-step samples in few steps. Metrics on held-out episodes
    are printed for the teacher, for few steps without distillation, and for the student. If interrupted, the
    same command resumes from the last checkpoint and ends with the same weights.

    Attributes:
        world: The world to distil (directory, hub id or task name).
        episodes: Directories of episodes; only their start frames, contexts and actions are used.
        out: Output directory of the distilled world. Checkpoints, TensorBoard curves and quality.json go to
            OUT.training.
        denoising_steps: Steps per chunk of the student, 1 to 4.
        teacher_steps: Steps per chunk of the teacher; by default those of the world, rounded up to a multiple
            of --denoising-steps.
        holdout: Fraction of the episodes held out for evaluation.
        frame_cache: Directory for decoded, uncompressed frames; by default .frames in each directory of
            episodes.
        symmetries: Data augmentation: task also trains on examples transformed by the symmetries of a bundled
            task; none trains on the recorded examples only.
        training: Training settings; --pure-noise and --context-noise have no effect here.
        compute: Device, precision and micro-batch size.
    """

    world: str
    episodes: tuple[Path, ...]
    out: Path
    denoising_steps: int = 1
    teacher_steps: int | None = None
    holdout: float = 0.1
    frame_cache: Path | None = None
    symmetries: SymmetryChoice = "task"
    training: Flat[WorldModelTraining] = field(
        default_factory=lambda: WorldModelTraining(
            steps=1000, learning_rate=3e-4, muon=0.0, teacher_forcing=0.0
        )
    )
    compute: Flat[ComputeSettings] = field(default_factory=ComputeSettings)

    def run(self) -> None:
        """Distil, measure, save."""
        self.compute.checked()
        teacher = load_world(self.world)
        teacher_steps = steps_to_imitate(teacher, self.denoising_steps, self.teacher_steps)
        episodes = load_episodes(self.episodes, teacher.task, self.frame_cache)
        kept, held = split_episodes(episodes, self.holdout, self.training.seed)
        logs = self.out.with_name(self.out.name + ".training")
        student, trainer = distillation_trainer(
            teacher,
            kept,
            self.training,
            denoising_steps=self.denoising_steps,
            teacher_steps=teacher_steps,
            symmetries=hints_for(teacher.task, self.symmetries).symmetries,
            compute=self.compute,
            checkpoint_dir=logs / "checkpoint",
            tensorboard=logs,
        )
        places = ("out", "frame_cache", "compute")
        settings = {k: v for k, v in asdict(self).items() if k not in places}
        keep_settings(logs / "command.json", settings, started=(logs / "checkpoint").exists())
        history = trainer.train(description=f"distillation to {self.denoising_steps} step(s)")
        if not is_main_process():
            return
        quality = self._quality(teacher, student, teacher_steps, held) if held else {}
        write_json_atomic(logs / "quality.json", quality)
        student.card = {
            **teacher.card,
            "distillation": {
                "command": " ".join(["wmpo", *sys.argv[1:]]),
                "teacher_steps": teacher_steps,
                "episodes": len(kept),
                "training": asdict(self.training),
                "final": history[-1] if history else {},
                "quality": quality,
            },
        }
        student.card.pop("gates", None)  # measured with another sampler
        student.save_pretrained(self.out)
        if quality:
            print(_table(quality))
        print(f"the world, which now samples in {self.denoising_steps} step(s), is in {self.out}")

    def _quality(
        self, teacher: World, student: World, teacher_steps: int, held: list[Episode]
    ) -> dict[str, dict[str, float]]:
        """Metrics on held-out episodes for each sampler."""
        many, few = (
            replace(teacher, config=replace(teacher.config, denoising_steps=steps))
            for steps in (teacher_steps, self.denoising_steps)
        )
        samplers = {
            f"{teacher_steps} steps": many,
            f"{self.denoising_steps} step(s), not distilled": few,
            f"{self.denoising_steps} step(s), distilled": student,
        }
        return {name: _metrics(world, many, held) for name, world in samplers.items()}


def _metrics(world: World, many: World, held: list[Episode]) -> dict[str, float]:
    """Metrics of a sampler: distance from the many-step sampler, frame quality, agreement on outcomes."""
    from wmpo_gym.evaluation.metrics import sampler_distance, world_quality
    from wmpo_gym.rollouts.imagined import imagine_episodes

    metrics = {"grey levels from many steps": sampler_distance(world, many, held)}
    quality = world_quality(world, held)
    for column, name in (("PSNR dB", "psnr_db"), ("object error px", "object_error_px")):
        values = [v for v in quality.get(name, ()) if v is not None]
        if values:
            metrics[column] = float(np.mean(values))
    labelled = [e for e in held if e.success is not None]
    if labelled and world.classifier is not None:
        imagined, succeeded = imagine_episodes(world, labelled)
        metrics["claims that agree %"] = 100 * float(np.mean(imagined.claimed == succeeded))
    return metrics


def _table(quality: dict[str, dict[str, float]]) -> str:
    columns = list(next(iter(quality.values())))
    rows = [(name, *(f"{metrics[c]:.2f}" for c in columns)) for name, metrics in quality.items()]
    return aligned([("sampler", *columns), *rows])

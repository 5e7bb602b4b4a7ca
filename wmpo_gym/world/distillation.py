"""Distillation of a world model into a student that samples in fewer denoising steps.

The integration from noise to frames is divided into one interval per step of the student. The teacher
integrates each interval in several small steps; the student is trained to map the sample at the start of an
interval to the one at its end in a single step (a consistency model per interval). The student has the same
architecture and inputs; in the world's configuration only ``denoising_steps`` changes.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from wmpo_gym.world.flow import RectifiedFlow, VelocityFunction
from wmpo_gym.world.objectives import ChunkLoss, LatentBatch, weighted_row_means
from wmpo_gym.world.training import WorldModelTrainer, WorldModelTraining

if TYPE_CHECKING:
    from wmpo_gym.data.episode import Episode
    from wmpo_gym.world.world import World

MOST_STEPS = 4  # maximum of the student


@dataclass
class DistillationObjective:
    """Squared error between student and teacher, an :class:`~wmpo_gym.world.objectives.Objective`.

    Attributes:
        teacher: The network to distil, sampled in many steps; not trained.
        flow: Sampler settings, the same as in imagination.
        teacher_steps: Denoising steps of the teacher, a multiple of ``steps``.
        steps: Denoising steps of the student.
    """

    teacher: nn.Module
    flow: RectifiedFlow
    teacher_steps: int
    steps: int

    def draw(
        self, target_shape: tuple[int, ...], context_shape: tuple[int, ...], generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Initial noise, shared by student and teacher."""
        return {"noise": torch.randn(target_shape, generator=generator)}

    def __call__(self, network: Any, batch: LatentBatch, draws: dict[str, Tensor]) -> ChunkLoss:
        """Loss per row and the student's latents."""
        noise = draws["noise"]
        ends = self._teacher_samples(noise, batch)
        velocity = self._velocity(network, batch)
        times = torch.cat([self.flow.timesteps(self.steps), torch.zeros(1)]).to(noise.device)
        losses = torch.zeros(len(noise), device=noise.device)
        for i in range(self.steps):
            interval = (times[i] - times[i + 1]) / self.flow.n_train_timesteps
            reached = ends[i] + interval * velocity(ends[i], times[i])
            losses = losses + weighted_row_means((reached - ends[i + 1]).square(), batch)
        if self.steps == 1:
            return ChunkLoss(losses, reached, reached.detach())
        with torch.no_grad():  # along the student's own trajectory
            *_, sample = self.flow.integrate(self._velocity(network, batch), noise, self.steps)
        return ChunkLoss(losses, reached, sample)

    @torch.no_grad()
    def _teacher_samples(self, noise: Tensor, batch: LatentBatch) -> list[Tensor]:
        """The teacher's samples at the ends of all intervals, starting with the noise."""
        samples = list(self.flow.integrate(self._velocity(self.teacher, batch), noise, self.teacher_steps))
        every = self.teacher_steps // self.steps
        return [noise, *samples[every - 1 :: every]]

    def _velocity(self, network: Any, batch: LatentBatch) -> VelocityFunction:
        return self.flow.velocity_function(network, batch.context, batch.actions, batch.prev_action)


def steps_to_imitate(world: World, denoising_steps: int, teacher_steps: int | None = None) -> int:
    """Number of denoising steps the teacher takes, checked against the student's.

    Args:
        world: The teacher.
        denoising_steps: The student's steps, 1 to 4.
        teacher_steps: Requested steps, a multiple of the student's; None takes the smallest multiple that is
            at least the world's own number.

    Raises:
        ValueError: If the steps do not fit each other, or the world samples in as few steps already.
    """
    own = world.config.denoising_steps
    if not 1 <= denoising_steps <= MOST_STEPS:
        raise ValueError(
            f"A sampler is distilled to 1 to {MOST_STEPS} denoising steps, not {denoising_steps}."
        )
    if teacher_steps is None:
        if own <= denoising_steps:
            raise ValueError(
                f"The world already samples with {own} denoising step(s); there is nothing to distil to "
                f"{denoising_steps}. Give teacher_steps if it is better with more than it was trained for."
            )
        return denoising_steps * math.ceil(own / denoising_steps)
    if teacher_steps % denoising_steps or teacher_steps <= denoising_steps:
        raise ValueError(
            f"teacher_steps must be a multiple of the {denoising_steps} denoising step(s) and more, got "
            f"{teacher_steps}; take {denoising_steps * max(2, math.ceil(teacher_steps / denoising_steps))}."
        )
    return teacher_steps


def distillation_trainer(
    world: World,
    episodes: Sequence[Episode],
    config: WorldModelTraining,
    *,
    denoising_steps: int,
    teacher_steps: int | None = None,
    **kwargs: Any,
) -> tuple[World, WorldModelTrainer]:
    """A student world that samples in few steps, and the trainer of its network.

    Args:
        world: The teacher; not modified.
        episodes: Provide contexts and actions; the target frames are the teacher's samples.
        config: Settings of the training. ``pure_noise`` and ``context_noise`` are ignored.
        denoising_steps: Denoising steps of the student; see :func:`steps_to_imitate`.
        teacher_steps: Denoising steps of the teacher; see :func:`steps_to_imitate`.
        **kwargs: Passed to :class:`~wmpo_gym.world.training.WorldModelTrainer`.

    Returns:
        The untrained student's world and its trainer.
    """
    teacher_steps = steps_to_imitate(world, denoising_steps, teacher_steps)
    teacher = copy.deepcopy(world.network).eval().requires_grad_(False)
    student = replace(
        world,
        network=copy.deepcopy(world.network),
        config=replace(world.config, denoising_steps=denoising_steps),
    )
    objective = DistillationObjective(
        teacher,
        RectifiedFlow(context_noise=world.config.context_noise, round_timesteps=world.config.round_timesteps),
        teacher_steps,
        denoising_steps,
    )
    trainer = WorldModelTrainer(
        student.network,
        world.autoencoder,
        world.task,
        episodes,
        config,
        context_frames=world.config.context_frames,
        denoising_steps=denoising_steps,
        objective=objective,
        component="distilled world model",
        **kwargs,
    )
    return student, trainer

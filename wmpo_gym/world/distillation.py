"""Distillation: a student reaches in one step where its teacher arrives in several.

The integration from noise to frames is divided into as many intervals as the student will take steps. The
teacher integrates each interval in small steps; from the interval's first sample the student must reach its
last one in a single step (a consistency model per interval). The student is the same network with the same
inputs; in the world's configuration only ``denoising_steps`` changes.
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

MOST_STEPS = 4  # of the student


@dataclass
class DistillationObjective:
    """Loss of the student against its teacher, see :class:`~wmpo_gym.world.objectives.Objective`.

    Attributes:
        teacher: The network that is sampled in many steps; left as it is.
        flow: The sampler's settings, those of imagination.
        teacher_steps: Its steps, a multiple of ``steps``.
        steps: The student's.
    """

    teacher: nn.Module
    flow: RectifiedFlow
    teacher_steps: int
    steps: int

    def draw(
        self, target_shape: tuple[int, ...], context_shape: tuple[int, ...], generator: torch.Generator
    ) -> dict[str, Tensor]:
        """The noise that both integrate from."""
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
        with torch.no_grad():  # on its own trajectory, which is not the teacher's
            *_, sample = self.flow.integrate(self._velocity(network, batch), noise, self.steps)
        return ChunkLoss(losses, reached, sample)

    @torch.no_grad()
    def _teacher_samples(self, noise: Tensor, batch: LatentBatch) -> list[Tensor]:
        """The teacher's sample before the first of the student's steps and after each of them."""
        samples = list(self.flow.integrate(self._velocity(self.teacher, batch), noise, self.teacher_steps))
        every = self.teacher_steps // self.steps
        return [noise, *samples[every - 1 :: every]]

    def _velocity(self, network: Any, batch: LatentBatch) -> VelocityFunction:
        return self.flow.velocity_function(network, batch.context, batch.actions, batch.prev_action)


def steps_to_imitate(world: World, denoising_steps: int, teacher_steps: int | None = None) -> int:
    """Steps of the teacher of a student.

    Args:
        world: The teacher.
        denoising_steps: The student's steps, 1 to 4.
        teacher_steps: A multiple of the student's that was asked for; None is the first from the world's own.

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
    """A world that samples in few steps, and what is to train its network.

    Args:
        world: The teacher, left as it is.
        episodes: Where chunks start and which actions they take; the frames that follow are the teacher's.
        config: Settings of the training. Its ``pure_noise`` and ``context_noise`` have no meaning here.
        denoising_steps: See :func:`steps_to_imitate`, which also says what is refused.
        teacher_steps: Likewise.
        **kwargs: Of :class:`~wmpo_gym.world.training.WorldModelTrainer`.

    Returns:
        The student's world, not trained yet, and its trainer.
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

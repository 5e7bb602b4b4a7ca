"""Few-step sampling: a network learns to arrive in one step where its many-step self arrives in several.

The way from noise to frames is cut into as many stretches as the student will take steps. The teacher walks
it in small steps; from where each stretch begins the student must reach, in one step, where the teacher left
it (trajectory distillation: a consistency model with a station at the end of every stretch). The student is
the same network with the same inputs; in the world's configuration only ``denoising_steps`` changes.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from wmpo_gym.world.flow import RectifiedFlow
from wmpo_gym.world.objectives import row_means
from wmpo_gym.world.training import WorldModelTrainer, WorldModelTraining

if TYPE_CHECKING:
    from wmpo_gym.data.episode import Episode
    from wmpo_gym.world.training import LatentBatch
    from wmpo_gym.world.world import World

MOST_STEPS = 4  # of the student


@dataclass
class DistillationObjective:
    """Loss of one chunk and the frames to go on from, for a ``WorldModelTrainer``.

    Attributes:
        teacher: The network that is sampled in many steps; left as it is.
        flow: The sampler's settings, those of imagination.
        teacher_steps: Its steps, a multiple of ``steps``.
        steps: The student's.
        changed_weight: Extra loss weight of pixels that changed since the last context frame.
    """

    teacher: nn.Module
    flow: RectifiedFlow
    teacher_steps: int
    steps: int
    changed_weight: float

    def __call__(
        self, network: nn.Module, batch: LatentBatch, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Loss per row ``(B,)`` and the student's latents ``(B, C, K, h, w)``."""
        noise = torch.randn(batch.targets.shape, generator=generator)
        stations = self._stations(noise, batch)
        velocity = self._velocity(network, batch)
        times = torch.cat([self.flow.timesteps(self.steps), torch.zeros(1)])
        loss = torch.zeros(len(noise))
        for i in range(self.steps):
            stretch = (times[i] - times[i + 1]) / self.flow.n_train_timesteps
            reached = stations[i] + stretch * velocity(stations[i], times[i])
            loss = loss + row_means((reached - stations[i + 1]).square(), batch, self.changed_weight)
        if self.steps > 1:
            with torch.no_grad():  # on its own way, which is not the teacher's
                *_, reached = self.flow.walk(self._velocity(network, batch), noise, self.steps)
        return loss, reached

    @torch.no_grad()
    def _stations(self, noise: Tensor, batch: LatentBatch) -> list[Tensor]:
        """Where the teacher is before the first of the student's steps and after each of them."""
        walk = list(self.flow.walk(self._velocity(self.teacher, batch), noise, self.teacher_steps))
        every = self.teacher_steps // self.steps
        return [noise, *walk[every - 1 :: every]]

    def _velocity(self, network: nn.Module, batch: LatentBatch) -> Any:
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
        RectifiedFlow(context_noise=world.config.context_noise),
        teacher_steps,
        denoising_steps,
        config.changed_weight,
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
        **kwargs,
    )
    return student, trainer

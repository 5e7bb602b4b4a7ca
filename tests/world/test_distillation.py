"""Distillation brings the few-step sampler nearer to the many-step one, whatever the network."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from wmpo_gym.bench.transformer import random_stdit
from wmpo_gym.data.episode import Episode
from wmpo_gym.tasks import MOVE_BLOCK
from wmpo_gym.world.distillation import DistillationObjective, distillation_trainer, steps_to_imitate
from wmpo_gym.world.flow import RectifiedFlow
from wmpo_gym.world.networks.autoencoder import PixelAutoencoder
from wmpo_gym.world.networks.conv import ConvWorldModel
from wmpo_gym.world.training import WorldModelTraining
from wmpo_gym.world.world import StartFrames, World, WorldConfig

SIDE = 8
TASK = replace(MOVE_BLOCK, image_size=SIDE)
QUICK = WorldModelTraining(
    muon=0.0,
    steps=90,
    batch_size=8,
    learning_rate=8e-4,
    teacher_forcing=0.0,
    warmup_steps=2,
    ema_decay=0.9,
    checkpoint_every=30,
)


def episodes(n: int = 3) -> list[Episode]:
    rng = np.random.default_rng(0)
    return [
        Episode(
            rng.integers(0, 256, (9, SIDE, SIDE, 3), dtype=np.uint8),
            rng.uniform(-1, 1, (8, 3)).astype(np.float32), None, 8, i, 0, "push", {},
        )
        for i in range(n)
    ]  # fmt: skip


def a_world(kind: str, steps: int = 8) -> World:
    if kind == "stdit":
        network = random_stdit(
            0, in_channels=3, hidden_size=24, depth=1, num_heads=2, patch_size=4, predict_sigma=False,
            action_dim=3, context_frames=2, chunk=4, pixels_per_latent=1, base_size=SIDE,
        )  # fmt: skip
    else:
        network = ConvWorldModel.for_task(TASK, 0, widths=(8, 16), cond_dim=16, detail=8)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(1)
        for parameter in network.parameters():  # so that the way from noise to frames is bent
            parameter.add_((0.15 if kind == "stdit" else 0.1) * torch.randn_like(parameter))
    starts = StartFrames.from_episodes(episodes())
    config = WorldConfig(context_frames=2, denoising_steps=steps, context_noise=0.05)
    return World(TASK, network.eval(), PixelAutoencoder(), None, starts, config)


@torch.no_grad()
def distance(world: World, teacher: World, steps: int) -> float:
    """Mean difference of what the two sample from the same noise; in ``steps`` and in the teacher's steps."""
    frames = np.stack([e.frames[t : t + 2] for e in episodes() for t in range(6)])
    context = world.autoencoder.encode(torch.from_numpy(frames))
    actions = torch.from_numpy(np.stack([e.actions[t % 4 : t % 4 + 4] for e in episodes() for t in range(6)]))
    noise = torch.randn(18, 3, 4, SIDE, SIDE, generator=torch.Generator().manual_seed(9))
    flow = RectifiedFlow(context_noise=teacher.config.context_noise)
    few = flow.sample(world.network, noise, context, actions, steps)
    many = flow.sample(teacher.network, noise, context, actions, teacher.config.denoising_steps)
    return float((few - many).abs().mean())


@pytest.mark.parametrize("kind", ["stdit", "conv"])
@pytest.mark.parametrize("steps", [1, 2])
def test_the_few_step_sampler_comes_nearer(kind: str, steps: int) -> None:
    teacher = a_world(kind)
    kept = [p.clone() for p in teacher.network.parameters()]
    student, trainer = distillation_trainer(teacher, episodes(), QUICK, denoising_steps=steps)
    before = distance(student, teacher, steps)
    assert before > 0.01
    trainer.train(progress=False)
    after = distance(student, teacher, steps)
    assert after < 0.85 * before, (before, after)
    assert student.config == replace(teacher.config, denoising_steps=steps)
    assert teacher.config.denoising_steps == 8
    assert all(torch.equal(a, b) for a, b in zip(kept, teacher.network.parameters(), strict=True))
    assert student.imagination().nfe_per_chunk == steps


def test_a_student_that_is_the_teacher_has_nothing_to_learn() -> None:
    """With as many steps on either side, the goals are where its own steps lead."""
    world = a_world("stdit")
    _, trainer = distillation_trainer(world, episodes(), QUICK, denoising_steps=2, teacher_steps=4)
    objective = trainer.task.objective
    assert isinstance(objective, DistillationObjective)
    objective.teacher_steps = 2
    batch, draws = trainer.task.draw(0)
    losses, _, sample = objective(world.network, batch, draws)
    assert losses.shape == (8,) and losses.abs().max() < 1e-9 and sample.shape == batch.targets.shape
    objective.teacher_steps = 4
    losses, *_ = objective(world.network, batch, draws)
    assert losses.min() > 1e-4


def test_it_goes_on_to_the_same_weights(tmp_path) -> None:
    config = replace(QUICK, steps=4, checkpoint_every=2)
    whole, trainer = distillation_trainer(a_world("conv"), episodes(), config, denoising_steps=1)
    trainer.train(progress=False)

    _, killed = distillation_trainer(
        a_world("conv"), episodes(), config, denoising_steps=1, checkpoint_dir=tmp_path / "c"
    )
    record = killed._record

    def dies(metrics, writer):
        entry = record(metrics, writer)
        if killed.step == 4:
            raise KeyboardInterrupt
        return entry

    killed._record = dies
    with pytest.raises(KeyboardInterrupt):
        killed.train(progress=False)
    resumed, again = distillation_trainer(
        a_world("conv"), episodes(), config, denoising_steps=1, checkpoint_dir=tmp_path / "c"
    )
    again.train(progress=False)
    assert [h["step"] for h in again.history] == [2, 4]
    for a, b in zip(whole.network.parameters(), resumed.network.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("own", "asked", "teacher", "message"),
    [
        (8, 5, None, "to 1 to 4 denoising steps, not 5"),
        (8, 0, None, "to 1 to 4 denoising steps, not 0"),
        (1, 1, None, "already samples with 1 denoising step"),
        (8, 3, 8, "multiple of the 3 denoising .* got 8; take 9"),
        (8, 2, 2, "got 2; take 4"),
    ],
)
def test_steps_that_do_not_fit(own: int, asked: int, teacher: int | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        steps_to_imitate(a_world("conv", own), asked, teacher)


def test_the_teachers_steps_are_rounded_up() -> None:
    assert steps_to_imitate(a_world("conv", 30), 4) == 32
    assert steps_to_imitate(a_world("conv", 30), 2) == 30
    assert steps_to_imitate(a_world("conv", 1), 1, 4) == 4

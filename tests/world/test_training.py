"""Streams and the trainer: where walks go, what is learned, and that a killed training goes on alike."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from kills import disk_states

from wmpo_gym.data.episode import Episode
from wmpo_gym.tasks import MOVE_BLOCK
from wmpo_gym.training.presets import hints_for
from wmpo_gym.world.networks.autoencoder import PixelAutoencoder
from wmpo_gym.world.networks.conv import ConvWorldModel
from wmpo_gym.world.networks.stdit import STDiT
from wmpo_gym.world.objectives import ChunkObjective
from wmpo_gym.world.sampler import SelfForcingSampler
from wmpo_gym.world.training import WorldModelTrainer, WorldModelTraining

SIZE = 16
TASK = replace(MOVE_BLOCK, image_size=SIZE)
SYMMETRIES = hints_for("move-block").symmetries


def episode(n_steps: int, seed: int) -> Episode:
    """A white 3x3 square that moves one pixel to the right per unit of action 0."""
    rng = np.random.default_rng(seed)
    actions = np.zeros((n_steps, 3), np.float32)
    actions[:, 0] = rng.choice([-1.0, 0.0, 1.0], n_steps)
    column = np.clip(6 + np.concatenate([[0], actions[:, 0].cumsum()]), 1, SIZE - 2).astype(int)
    frames = np.zeros((n_steps + 1, SIZE, SIZE, 3), np.uint8)
    for t, c in enumerate(column):
        frames[t, 6:9, c - 1 : c + 2] = 255
    return Episode(frames, actions, None, n_steps, seed, 0, "push", {})


EPISODES = [episode(n, i) for i, n in enumerate([20, 7, 4, 13])]


def network(seed: int = 0) -> ConvWorldModel:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return ConvWorldModel(image_size=SIZE, widths=(8, 16), cond_dim=16, detail=8)


def test_a_walk_follows_its_episode_and_marks_what_is_beyond() -> None:
    sampler = SelfForcingSampler(
        [EPISODES[1]],
        TASK,
        n_rows=1,
        context_frames=2,
        seed=0,
        from_start=1.0,
        restart_prob=0.0,
    )
    first, second, third = sampler.next(), sampler.next(), sampler.next()
    frames, actions = EPISODES[1].frames, EPISODES[1].actions
    assert first.is_first[0] and not second.is_first[0] and third.is_first[0]
    assert np.array_equal(first.context[0], frames[[0, 0]]) and not first.prev_action.any()
    assert np.array_equal(first.targets[0], frames[1:5]) and np.array_equal(first.actions[0], actions[:4])
    assert np.array_equal(second.context[0], frames[3:5]) and np.array_equal(
        second.prev_action[0], actions[3]
    )
    assert second.valid[0].tolist() == [True, True, True, False] and not second.actions[0, 3].any()
    assert np.array_equal(second.targets[0], frames[[5, 6, 7, 7]])


def test_walks_begin_more_often_where_the_model_errs() -> None:
    sampler = SelfForcingSampler(
        [EPISODES[0]],
        TASK,
        n_rows=64,
        context_frames=2,
        seed=0,
        from_start=0.0,
        restart_prob=1.0,
    )
    for _ in range(30):
        sampler.next()
        step = sampler._step - TASK.chunk
        sampler.update_priorities(np.where(np.abs(step - 10) < 2, 1.0, 0.01))
    sampler.next()
    near = np.mean(np.abs(sampler._step - TASK.chunk - 10) < 5)
    assert near > 0.6, near  # 9 of 20 steps without the preference


def test_no_episode_is_an_error() -> None:
    with pytest.raises(ValueError, match="collect some first"):
        SelfForcingSampler([], TASK, n_rows=1, context_frames=2, seed=0)


def trainer(config: WorldModelTraining, **kwargs) -> WorldModelTrainer:
    return WorldModelTrainer(network(), PixelAutoencoder(), TASK, EPISODES, config, **kwargs)


SHORT = WorldModelTraining(steps=6, batch_size=4, checkpoint_every=2, warmup_steps=2)


@pytest.mark.parametrize("adversarial", [0.0, 0.05])
def test_a_killed_training_goes_on_to_the_same_numbers(tmp_path, adversarial: float) -> None:
    config = replace(SHORT, adversarial=adversarial)
    whole = trainer(config)
    whole.train(progress=False)

    killed = trainer(config, checkpoint_dir=tmp_path / "c")
    step, real = 0, killed.train_step

    def dies() -> dict[str, float]:
        nonlocal step
        step += 1
        if step == 5:
            raise KeyboardInterrupt
        return real()

    killed.train_step = dies
    with pytest.raises(KeyboardInterrupt):
        killed.train(progress=False)
    resumed = trainer(config, checkpoint_dir=tmp_path / "c")
    resumed.train(progress=False)
    for a, b in zip(whole.network.parameters(), resumed.network.parameters(), strict=True):
        assert torch.equal(a, b)
    assert [h["loss"] for h in whole.history] == [h["loss"] for h in resumed.history]


def test_killed_between_any_two_writes(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("os.fsync", lambda handle: None)
    begun_at = []

    def run(directory: Path) -> WorldModelTrainer:
        made = trainer(replace(SHORT, steps=4, adversarial=0.05), checkpoint_dir=directory / "c")
        step, firsts = made.train_step, []
        made.train_step = lambda: firsts.append(made.step) or step()
        made.train(progress=False)
        begun_at.append(firsts[0] if firsts else made.step)
        return made

    whole = run(tmp_path / "whole")
    begun_at.clear()
    for state in disk_states(run, tmp_path / "killed"):
        resumed = run(state)
        for a, b in zip(whole.network.parameters(), resumed.network.parameters(), strict=True):
            assert torch.equal(a, b)
        assert [h["loss"] for h in whole.history] == [h["loss"] for h in resumed.history]
    # What was written in full once is never lost, not even between the renames that replace it.
    assert begun_at == sorted(begun_at) and set(begun_at) == {0, 2, 4}


def test_other_settings_are_refused(tmp_path) -> None:
    trainer(SHORT, checkpoint_dir=tmp_path / "c").train(progress=False)
    with pytest.raises(ValueError, match="other settings"):
        trainer(replace(SHORT, steps=8), checkpoint_dir=tmp_path / "c").train(progress=False)


def test_global_generators_are_left_alone() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    trainer(replace(SHORT, adversarial=0.1)).train(progress=False)
    assert torch.equal(before, torch.get_rng_state())


def test_it_learns_to_move_the_square() -> None:
    made = trainer(
        replace(SHORT, steps=60, batch_size=8, checkpoint_every=10, learning_rate=4e-3, warmup_steps=5)
    )
    history = made.train(progress=False)
    assert history[-1]["loss"] < 0.5 * history[0]["loss"], history


def test_the_transformer_trains_too() -> None:
    """Velocity loss, self-made contexts sampled in two steps."""
    torch.manual_seed(0)
    model = STDiT(
        in_channels=3, context_frames=2, chunk=4, action_dim=3, hidden_size=24, depth=1, num_heads=2,
        patch_size=4,
        predict_sigma=False, pixels_per_latent=1, base_size=SIZE,
    )  # fmt: skip
    before = [p.detach().clone() for p in model.parameters()]
    history = WorldModelTrainer(
        model, PixelAutoencoder(), TASK, EPISODES, SHORT, denoising_steps=2, symmetries=SYMMETRIES
    ).train(progress=False)
    assert np.isfinite(history[-1]["loss"])
    assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize(("diverged", "taken_back"), [(0.01, True), (1.0, False)])
def test_a_walk_that_went_another_way_returns_to_its_recording(diverged: float, taken_back: bool) -> None:
    settings = WorldModelTraining(
        steps=9, batch_size=4, teacher_forcing=0.0, restart_prob=0.0, divergence_threshold=diverged
    )
    trainer = WorldModelTrainer(
        network(), PixelAutoencoder(), TASK, EPISODES[:1], settings, symmetries=SYMMETRIES
    )
    world_model = trainer.task
    world_model.draw(0)
    world_model.sampler._step[:] = 4  # all in the middle of the episode, none about to start anew
    world_model.context = torch.full_like(world_model.context, -1.0)
    world_model.context[:, :, :, :4] = 1.0  # not what was recorded
    batch, _ = world_model.draw(5)  # past the first step, whose contexts are all recorded
    assert torch.equal(batch.context, world_model.context) is not taken_back


def test_chunks_that_are_never_continued_need_no_sampling() -> None:
    """With a new trajectory at every chunk the objective samples nothing, and the same is learned."""
    settings = WorldModelTraining(steps=3, batch_size=4, restart_prob=1.0, warmup_steps=1)
    learned = []
    for self_forcing in (False, True):
        trained = STDiT(
            hidden_size=24, depth=1, num_heads=2, in_channels=3, predict_sigma=False, action_dim=3,
            context_frames=2, chunk=4, patch_size=4, base_size=SIZE, pixels_per_latent=1,
        )  # fmt: skip
        trained.load_state_dict(learned[0][0] if learned else trained.state_dict())
        start = {name: value.clone() for name, value in trained.state_dict().items()}
        objective = ChunkObjective(settings.pure_noise, settings.context_noise, 2, self_forcing=True)
        trainer = WorldModelTrainer(
            trained, PixelAutoencoder(), TASK, EPISODES, settings, denoising_steps=2,
            objective=objective if self_forcing else None,
        )  # fmt: skip
        assert trainer.task.objective.self_forcing == self_forcing
        trainer.train(progress=False)
        learned.append((start, trained.state_dict()))
    assert all(torch.equal(value, learned[1][1][name]) for name, value in learned[0][1].items())

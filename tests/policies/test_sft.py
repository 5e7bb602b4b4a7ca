"""Supervised fine-tuning."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from kills import disk_states

from wmpo_gym.data.episode import Episode
from wmpo_gym.policies.sft import (
    SFTSettings,
    instruction_gap,
    token_loss,
    train_sft,
)
from wmpo_gym.policies.vla import VLAConfig
from wmpo_gym.policies.windows import Draw, WindowDataset, Windows
from wmpo_gym.tasks import MOVE_BLOCK
from wmpo_gym.training.presets import hints_for


def episode(steps: int, seed: int = 0, task_id: int = 0) -> Episode:
    rng = np.random.default_rng(seed)
    return Episode(
        frames=rng.integers(0, 256, (steps + 1, 40, 40, 3), dtype=np.uint8),
        actions=rng.uniform(-1, 1, (steps, 3)).astype(np.float32),
        success=False,
        finish_step=steps,
        start_state_id=seed,
        task_id=task_id,
        instruction=MOVE_BLOCK.instructions[task_id],
    )


def windows_of(*episodes: Episode) -> Windows:
    """Every example of some episodes."""
    dataset = WindowDataset(episodes, chunk=4)
    return dataset.rows(np.arange(len(dataset)))


def test_every_control_step_is_a_window_and_the_end_is_masked():
    first, second = episode(6, 0), episode(3, 1, task_id=1)
    windows = windows_of(first, second)
    assert len(windows) == 9
    assert windows.mask.sum(1).tolist() == [4, 4, 4, 3, 2, 1, 3, 2, 1]
    assert windows.task_id.tolist() == [0] * 6 + [1] * 3
    for s in range(6):
        left = min(4, 6 - s)
        assert np.array_equal(windows.pixels[s].numpy(), first.frames[s])
        assert np.array_equal(windows.actions[s, :left].numpy(), first.actions[s : s + left])
        assert not windows.actions[s, left:].any()
    assert len(windows_of(episode(0), first)) == 6


def test_masked_actions_do_not_count():
    policy = train_sft([episode(6)], MOVE_BLOCK, settings=SFTSettings(steps=1, batch=4))
    windows = windows_of(episode(6))
    loss, _ = token_loss(policy, windows)
    windows.actions[~windows.mask] = 1.0
    assert torch.equal(token_loss(policy, windows)[0], loss)
    windows.actions[windows.mask] = 1.0
    assert not torch.equal(token_loss(policy, windows)[0], loss)


def test_symmetries_change_image_sentence_and_actions_together():
    dataset, none = WindowDataset([episode(5)], chunk=4), [False] * 5
    symmetries = hints_for("move-block").symmetries
    windows = dataset.rows(np.arange(5))

    def varied(*chosen: list[bool]) -> Windows:
        return dataset.draw(Draw(np.arange(5), np.array(chosen), None), symmetries)

    mirrored = varied([True, False, True, False, True], none)
    assert torch.equal(mirrored.pixels[0], windows.pixels[0].flip(0))
    assert torch.equal(mirrored.actions[0], windows.actions[0] * torch.tensor([1.0, -1.0, 1.0]))
    assert torch.equal(mirrored.pixels[1], windows.pixels[1]) and mirrored.task_id.tolist() == [0] * 5
    swapped = varied(none, [True, False, True, False, True])
    assert torch.equal(swapped.pixels[2], windows.pixels[2].flip(-1))
    assert swapped.task_id.tolist() == [1, 0, 1, 0, 1] and torch.equal(swapped.actions, windows.actions)
    assert torch.equal(dataset.rows(np.arange(5)).pixels, windows.pixels), "the episodes stay"


def test_a_few_windows_are_learned_by_heart():
    episodes = [episode(4, seed=s, task_id=s % 2) for s in range(4)]
    losses = []
    policy = train_sft(
        episodes,
        "move-block",
        settings=SFTSettings(steps=60, batch=16, shift=0),
        progress=lambda done, total, metrics: losses.append((done, total, metrics["loss"])),
    )
    assert [d for d, *_ in losses] == list(range(1, 61)) and losses[0][1] == 60
    assert losses[-1][2] < 0.7 * losses[0][2]
    assert not policy.training


def test_the_instruction_gap_tells_whether_the_words_decide():
    seen = episode(8)
    told = [
        replace(seen, task_id=i, actions=np.full((8, 3), level, np.float32))
        for i, level in enumerate((-0.8, 0.8))
    ]
    deaf = [replace(e, actions=told[0].actions) for e in told]
    settings = SFTSettings(steps=40, batch=16, shift=0)
    listening = train_sft(told, "move-block", settings=settings)
    gap = instruction_gap(listening, told, MOVE_BLOCK)
    assert gap > 1.0 and instruction_gap(listening, told, MOVE_BLOCK, batch=5) == pytest.approx(gap, rel=1e-4)
    untold = instruction_gap(train_sft(deaf, "move-block", settings=settings), deaf, MOVE_BLOCK)
    assert abs(untold) < (hints_for("move-block").instruction_gap or 0)
    assert instruction_gap(None, told[:1], MOVE_BLOCK) is None


def test_same_seed_same_weights_and_no_global_randomness():
    before = torch.random.get_rng_state(), np.random.get_state()[1].copy()
    settings = SFTSettings(steps=3, batch=4, symmetries=("swap colours",))
    weights = [
        torch.cat(
            [
                p.flatten()
                for p in train_sft([episode(8)], "move-block", settings=settings, seed=s).parameters()
            ]
        )
        for s in (0, 0, 1)
    ]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert torch.equal(before[0], torch.random.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])


def test_training_goes_on_from_a_policy_and_writes_curves(tmp_path):
    settings = SFTSettings(steps=2, batch=4)
    policy = train_sft([episode(8)], "move-block", settings=settings)
    same = train_sft([episode(8)], "move-block", settings=settings, policy=policy, log_dir=tmp_path)
    assert same is policy
    assert any(f.name.startswith("events") for f in tmp_path.iterdir())


def test_a_killed_training_goes_on_to_the_same_weights(tmp_path, monkeypatch):
    settings = SFTSettings(steps=5, batch=4, symmetries=("mirror",))
    monkeypatch.setattr("wmpo_gym.policies.sft.CHECKPOINT_EVERY", 2)

    def train(progress=None, **changes):
        return train_sft(
            [episode(6)],
            MOVE_BLOCK,
            settings=replace(settings, **changes),
            checkpoint_dir=tmp_path / "checkpoint",
            progress=progress,
        )

    def interrupt(step, *_):
        if step == 3:
            raise KeyboardInterrupt

    expected = train_sft([episode(6)], MOVE_BLOCK, settings=settings).network.state_dict()
    with pytest.raises(KeyboardInterrupt):
        train(interrupt)
    steps: list[int] = []
    resumed = train(lambda step, *_: steps.append(step)).network.state_dict()
    assert steps == [3, 4, 5]
    assert all(torch.equal(value, resumed[name]) for name, value in expected.items())
    with pytest.raises(ValueError, match="other settings"):
        train(lr=0.5)


def test_killed_between_any_two_writes(tmp_path, monkeypatch):
    monkeypatch.setattr("os.fsync", lambda handle: None)
    monkeypatch.setattr("wmpo_gym.policies.sft.CHECKPOINT_EVERY", 1)
    settings = SFTSettings(steps=2, batch=2, symmetries=("mirror",))
    config = VLAConfig.tiny()
    config = replace(config, language={**config.language, "hidden_size": 16, "intermediate_size": 16})
    begun_at = []

    def run(directory):
        steps = []
        policy = train_sft(
            [episode(6)],
            MOVE_BLOCK,
            config=config,
            settings=settings,
            checkpoint_dir=directory / "checkpoint",
            progress=lambda step, *_: steps.append(step - 1),
        )
        begun_at.append(steps[0] if steps else settings.steps)
        return policy.network.state_dict()

    whole = run(tmp_path / "whole")
    begun_at.clear()
    for state in disk_states(run, tmp_path / "killed"):
        resumed = run(state)
        assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
    assert begun_at == sorted(begun_at) and set(begun_at) == {0, 1, 2}  # nothing once complete is lost


def test_unfit_episodes_are_named():
    with pytest.raises(ValueError, match="no action"):
        train_sft([], "move-block")
    with pytest.raises(ValueError, match="task_id 5"):
        bad = episode(3)
        bad.task_id = 5
        train_sft([bad], "move-block")
    with pytest.raises(ValueError, match="40x40"):
        bad = episode(3)
        bad.frames = bad.frames[:, :16, :16]
        train_sft([bad], "move-block")
    with pytest.raises(ValueError, match="no symmetry 'rotate'.*mirror"):
        train_sft([episode(3)], "move-block", settings=SFTSettings(symmetries=("rotate",)))


def test_a_device_or_precision_that_does_not_fit_is_refused_first():
    with pytest.raises(ValueError, match="no device 'cuda:7'"):
        train_sft([], "move-block", device="cuda:7")
    with pytest.raises(ValueError, match="bf16 on a CPU"):
        train_sft([], "move-block", precision="bf16")


def test_dropout_is_off_in_training():
    config = VLAConfig.tiny()
    tower = config.towers[0]
    tower = replace(tower, settings={**tower.settings, "drop_path_rate": 0.5})
    config = replace(config, towers=(tower,))
    settings = SFTSettings(steps=1, batch=4, lr=1e-9, shift=0)
    modes = []
    policy = train_sft([episode(6)], "move-block", config=config, settings=settings)
    drops = [m for m in policy.network.modules() if "Drop" in type(m).__name__]
    for drop in drops:
        drop.register_forward_pre_hook(lambda module, _: modes.append(module.training))
    train_sft([episode(6)], "move-block", settings=settings, policy=policy)
    assert drops and modes and not any(modes)

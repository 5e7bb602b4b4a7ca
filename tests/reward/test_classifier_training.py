from __future__ import annotations

import dataclasses
import logging

import numpy as np
import pytest
import torch
from kills import disk_states
from square_toys import square_episode

from wmpo_gym.reward.calibration import assess, split_episodes
from wmpo_gym.reward.training import (
    ClassifierTraining,
    make_classifier,
    train_classifier,
)
from wmpo_gym.training.trainer import Trainer

QUICK = ClassifierTraining(steps=120, min_holdout=10, checkpoint_every=25)
FEW = dataclasses.replace(QUICK, steps=30)


def weights_equal(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    return all(
        torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    )


def test_learns_which_square_is_on_the_disc(episodes, task, hints):
    fresh = [square_episode(i, i % 2 == 0, task_id=i // 2 % 2) for i in range(200, 240)]
    # The wrong square on the disc, which no training episode shows for its instruction.
    wrong = [square_episode(i, False, task_id=i % 2, colour=2 - 2 * (i % 2)) for i in range(300, 320)]
    for i, episode in enumerate(wrong):
        episode.frames = square_episode(400 + i, True, task_id=1 - episode.task_id).frames
    classifier, figures = train_classifier(episodes, task, hints=hints, seed=1, config=QUICK, progress=False)
    result = assess(classifier, [*fresh, *wrong])
    assert result.f1 > 0.95 and result.n == 60, result
    assert result.finish_error == 0.0
    assert figures["calibration"]["threshold"] == classifier.threshold
    assert figures["n_train"] + figures["calibration"]["n"] == 60
    assert set(figures["holdout"]).isdisjoint(range(60, 100)) and len(figures["holdout"]) >= 15
    assert not classifier.training


def test_same_seed_same_result_and_global_generators_untouched(episodes, task, hints):
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
    first, _ = train_classifier(episodes, task, hints=hints, seed=3, config=FEW, progress=False)
    assert torch.equal(torch.get_rng_state(), before) and (np.random.get_state()[1] == numpy_before).all()
    torch.manual_seed(99)
    second, _ = train_classifier(episodes, task, hints=hints, seed=3, config=FEW, progress=False)
    other, _ = train_classifier(episodes, task, hints=hints, seed=4, config=FEW, progress=False)
    assert weights_equal(first, second) and first.threshold == second.threshold
    assert not weights_equal(first, other)


def test_interrupted_training_resumes_to_the_same_numbers(episodes, task, hints, tmp_path, monkeypatch):
    config = dataclasses.replace(QUICK, steps=60)
    whole, _ = train_classifier(episodes, task, hints=hints, seed=5, config=config, progress=False)
    step = Trainer.train_step

    def interrupted(self):
        if self.step == 40:
            raise KeyboardInterrupt
        return step(self)

    monkeypatch.setattr(Trainer, "train_step", interrupted)
    arguments = {"seed": 5, "config": config, "checkpoint_dir": tmp_path / "c", "progress": False}
    with pytest.raises(KeyboardInterrupt):
        train_classifier(episodes, task, hints=hints, **arguments)
    steps = []
    monkeypatch.setattr(Trainer, "train_step", lambda self: steps.append(self.step) or step(self))
    resumed, _ = train_classifier(episodes, task, hints=hints, **arguments)
    assert steps[0] == 25 and weights_equal(whole, resumed) and whole.threshold == resumed.threshold
    with pytest.raises(ValueError, match="other settings"):
        train_classifier(episodes, task, hints=hints, **{**arguments, "seed": 6})


def test_killed_between_any_two_writes(episodes, task, hints, tmp_path, monkeypatch):
    monkeypatch.setattr("os.fsync", lambda handle: None)
    config = dataclasses.replace(QUICK, steps=4, checkpoint_every=2)
    step, steps, begun_at = Trainer.train_step, [], []
    monkeypatch.setattr(Trainer, "train_step", lambda self: steps.append(self.step) or step(self))

    def run(directory):
        steps.clear()
        made = train_classifier(
            episodes, task, hints=hints, seed=5, config=config, checkpoint_dir=directory / "c", progress=False
        )
        begun_at.append(steps[0] if steps else config.steps)
        return made

    whole, figures = run(tmp_path / "whole")
    begun_at.clear()
    for state in disk_states(run, tmp_path / "killed"):
        resumed, same = run(state)
        assert weights_equal(whole, resumed) and whole.threshold == resumed.threshold
        assert same["loss"] == figures["loss"]
    assert begun_at == sorted(begun_at) and set(begun_at) == {0, 2, 4}  # nothing once complete is lost


@pytest.mark.parametrize("kept", [True, False])
def test_one_outcome_only_is_explained(episodes, task, hints, kept):
    some = [e for e in episodes if e.success is kept]
    counts = f"{len(some)} successes and 0 failures" if kept else f"0 successes and {len(some)} failures"
    with pytest.raises(ValueError, match=f"{counts}.*Collect more"):
        train_classifier(some, task, config=FEW, progress=False)


def test_unusable_episodes_are_counted(episodes, task, hints, caplog):
    short = square_episode(70, True, steps=1)
    play = square_episode(71, True)
    play.success = None
    config = dataclasses.replace(FEW, steps=2)
    classifier = make_classifier("conv", task, window=3)
    with caplog.at_level(logging.INFO, logger="wmpo_gym.reward.training"):
        _, figures = train_classifier(
            [*episodes, short, play], task, config=config, classifier=classifier, progress=False
        )
    assert figures["n_train"] + figures["calibration"]["n"] == 60
    assert (
        "1 recorded episodes without an outcome" in caplog.text
        and "1 recorded episodes have fewer" in caplog.text
    )


def test_window_longer_than_the_horizon(episodes, task, hints):
    with pytest.raises(ValueError, match="horizon 8.* window of 10"):
        train_classifier(
            episodes, task, hints=hints, classifier=make_classifier("conv", task, window=10), progress=False
        )
    other = make_classifier("conv", dataclasses.replace(task, instructions=("red",)))
    with pytest.raises(ValueError, match="knows 1 instructions and 'squares' has 2"):
        train_classifier(episodes, task, hints=hints, classifier=other, progress=False)
    with pytest.raises(ValueError, match="Unknown classifier kind 'resnet'; choose one of conv, videomae"):
        train_classifier(episodes, task, hints=hints, kind="resnet")


def test_holdout_keeps_start_states_together(task):
    episodes = [square_episode(i, i % 4 == 0) for i in range(100)]
    for i, episode in enumerate(episodes):
        episode.start_state_id = None if i >= 90 else i // 2
    train, held = split_episodes(episodes, seed=0)
    ids = [{e.start_state_id for e in side} - {None} for side in (train, held)]
    assert ids[0].isdisjoint(ids[1])
    assert 45 <= len(held) <= 56 and len(train) + len(held) == 100  # the minimum, but half stays for training
    assert 0.15 < np.mean([e.success for e in held]) < 0.4
    large = [square_episode(i, i % 4 == 0) for i in range(278)]
    assert 60 <= len(split_episodes(large, seed=0)[1]) <= 75
    train, held = split_episodes(episodes, seed=0, holdout={0, 1, 2})
    assert {e.start_state_id for e in held} == {0, 1, 2} and len(held) == 6
    with pytest.raises(ValueError, match="0 successes and 0 failures are left for calibration"):
        split_episodes(episodes, seed=0, holdout={5000})


def test_imagined_episodes_of_held_out_states_are_not_trained_on(episodes, task, hints):
    imagined = [dataclasses.replace(e) for e in episodes]
    config = dataclasses.replace(FEW, steps=2)
    _, figures = train_classifier(
        episodes, task, hints=hints, imagined=imagined, config=config, progress=False
    )
    held = set(figures["holdout"])
    assert figures["n_imagined"] == 60 - len(held) and figures["imagined"]["n"] == len(held)


def test_videomae_trains(episodes, task, hints):
    pytest.importorskip("transformers")
    model = {"image_size": 16, "patch_size": 8, "num_frames": 4, "hidden_size": 24, "num_hidden_layers": 1,
             "num_attention_heads": 2, "intermediate_size": 32, "hidden_dropout_prob": 0.1}  # fmt: skip
    results = []
    for _ in range(2):
        classifier = make_classifier("videomae", task, seed=0, model=model)
        config = dataclasses.replace(ClassifierTraining.for_kind("videomae"), steps=10)
        results.append(
            train_classifier(
                episodes, task, hints=hints, classifier=classifier, config=config, progress=False
            )[0]
        )
    assert results[0].window == 4 and weights_equal(*results)  # dropout has a seed as well
    assert not weights_equal(results[0], make_classifier("videomae", task, seed=0, model=model))


def test_training_goes_on_from_a_saved_classifier(episodes, task, hints, tmp_path):
    first, _ = train_classifier(episodes, task, hints=hints, seed=1, config=FEW, progress=False)
    first.threshold = 0.9  # by hand; it does not outlive the weights it was chosen for
    first.save_pretrained(tmp_path)
    start = make_classifier("conv", task, pretrained=tmp_path)
    assert weights_equal(first, start) and start.calibration is None
    second, metrics = train_classifier(
        episodes, task, hints=hints, seed=2, config=FEW, classifier=start, progress=False
    )
    assert second is start and not weights_equal(first, second)
    assert second.threshold == metrics["calibration"]["threshold"] != 0.9
    with pytest.raises(ValueError, match="a 'conv' classifier for 2 instructions; .* a 'videomae'"):
        make_classifier("videomae", task, pretrained=tmp_path)
    with pytest.raises(ValueError, match="not the directory of a saved 'conv' classifier"):
        make_classifier("conv", task, pretrained="MCG-NJU/videomae-base")


def test_micro_batches_change_rounding_only(episodes, task, hints):
    config = dataclasses.replace(FEW, steps=3)
    whole, _ = train_classifier(episodes, task, hints=hints, config=config, progress=False)
    parts, _ = train_classifier(episodes, task, hints=hints, config=config, micro_batch=7, progress=False)
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=5e-4)  # a tenth of the learning rate of these steps


def test_a_device_or_precision_that_is_not_there_is_refused_first(task):
    with pytest.raises(ValueError, match="no device 'cuda:7'"):
        train_classifier([], task, device="cuda:7")
    with pytest.raises(ValueError, match="bf16 on a CPU"):
        train_classifier([], task, precision="bf16")

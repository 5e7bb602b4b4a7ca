"""The trainer: resumable to the same weights, in micro-batches, with the published warm-up and average."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kills import disk_states
from torch import Tensor, nn

from wmpo_gym.training.checkpoint import TrainingState
from wmpo_gym.training.runtime import ComputeSettings
from wmpo_gym.training.trainer import (
    AveragedWeights,
    Loss,
    Trainer,
    TrainingSettings,
    TrainingTask,
    warmup_cosine,
    warmup_share,
    warmup_until_cosine,
)


class Regression(TrainingTask):
    """A network with dropout that learns a linear map of random inputs."""

    component = "regression"

    def __init__(self, settings: TrainingSettings, one_cycle: bool = False) -> None:
        self.config, self.one_cycle = settings, one_cycle
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.network = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.1), nn.Tanh(), nn.Linear(8, 2))
        self.generator = torch.Generator().manual_seed(settings.seed)

    def optimizers(self):
        optimizer = torch.optim.AdamW(self.network.parameters(), lr=self.config.learning_rate)
        if self.one_cycle:
            rate, steps = self.config.learning_rate, self.config.steps
            return {"adamw": (optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps))}
        return {"adamw": (optimizer, warmup_cosine(optimizer, self.config.steps, 2, 0.1))}

    def draw(self, step: int) -> dict[str, Tensor]:
        inputs = torch.randn(self.config.batch_size, 3, generator=self.generator)
        return self.runtime.to_device(self.runtime.local({"x": inputs, "y": inputs[:, :2] * 0.5}))

    def compute_loss(self, batch: dict[str, Tensor]) -> Loss:
        error = (self.network(batch["x"]) - batch["y"]).square().mean(dim=1)
        loss = error.sum() / self.config.batch_size
        return Loss(loss, {"loss": float(loss.detach())}, {"error": error.detach()})

    def finish_step(self, outputs: dict[str, Tensor]) -> dict[str, float]:
        assert len(outputs["error"]) == self.config.batch_size // self.runtime.size
        return {"largest": float(outputs["error"].max())}

    def state(self) -> TrainingState:
        state = super().state()
        state.tensors["generator"] = self.generator.get_state()
        return state

    def load_state(self, state: TrainingState) -> None:
        super().load_state(state)
        self.generator.set_state(state.tensors["generator"])


SHORT = TrainingSettings(steps=6, batch_size=8, learning_rate=1e-2, ema_decay=0.9, checkpoint_every=2)


def train(settings: TrainingSettings = SHORT, one_cycle: bool = False, **kwargs: Any) -> Trainer:
    trainer = Trainer(Regression(settings, one_cycle), settings, **kwargs)
    trainer.train(progress=False)
    return trainer


def same(a: Trainer, b: Trainer) -> bool:
    pairs = zip(a.task.network.parameters(), b.task.network.parameters(), strict=True)
    metrics = [[{k: v for k, v in e.items() if k != "seconds"} for e in t.history] for t in (a, b)]
    return all(torch.equal(p, q) for p, q in pairs) and metrics[0] == metrics[1]


@pytest.mark.parametrize("one_cycle", [False, True])
def test_killed_between_any_two_writes(one_cycle: bool, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("os.fsync", lambda handle: None)
    whole = train(one_cycle=one_cycle)

    def run(directory: Path) -> Trainer:
        return train(one_cycle=one_cycle, checkpoint_dir=directory / "c")

    states = disk_states(run, tmp_path / "killed")
    assert len(states) > 6
    assert all(same(whole, run(state)) for state in states)


def test_an_interrupted_training_continues_to_the_same_weights(tmp_path) -> None:
    def interrupt(step: int, metrics: Any) -> None:
        if step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(checkpoint_dir=tmp_path / "c", on_step=interrupt)
    begun: list[int] = []
    resumed = train(checkpoint_dir=tmp_path / "c", on_step=lambda step, _: begun.append(step))
    assert begun == [5, 6] and same(train(), resumed)


def test_micro_batches_change_rounding_only() -> None:
    def without_dropout(size: int | None) -> Trainer:
        task = Regression(SHORT)
        task.network[1].p = 0.0
        trainer = Trainer(task, SHORT, compute=ComputeSettings("cpu", micro_batch_size=size))
        trainer.train(progress=False)
        return trainer

    whole, parts = without_dropout(None), without_dropout(3)
    for p, q in zip(whole.task.network.parameters(), parts.task.network.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)
    assert whole.history[-1]["largest"] == pytest.approx(parts.history[-1]["largest"], rel=1e-4)


def test_global_generators_are_left_alone() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    train()
    assert torch.equal(before, torch.get_rng_state())


def test_a_foreign_checkpoint_is_refused(tmp_path) -> None:
    train(checkpoint_dir=tmp_path / "c")
    with pytest.raises(ValueError, match=r"other settings or data: steps = 8 \(was 6\)"):
        train(replace(SHORT, steps=8), checkpoint_dir=tmp_path / "c")

    class Other(Regression):
        component = "other network"

    with pytest.raises(ValueError, match="another component: 'regression'.*Choose another directory"):
        Trainer(Other(SHORT), SHORT, checkpoint_dir=tmp_path / "c").train(progress=False)
    file = tmp_path / "c" / "state.json"
    file.write_text(json.dumps({"step": 2, "config": {}}))  # as trainers of their own wrote it
    with pytest.raises(ValueError, match="format 1, this release reads 2.*another directory"):
        train(checkpoint_dir=tmp_path / "c")


def test_a_gradient_that_is_not_finite_stops_the_training() -> None:
    task = Regression(SHORT)
    with torch.no_grad():
        next(task.network.parameters()).fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="regression is not finite at step 0.*learning_rate"):
        Trainer(task, SHORT).train(progress=False)


def test_curves_are_logged(tmp_path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(replace(SHORT, log_every=3), tensorboard=tmp_path)
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [e.step for e in events.Scalars("regression/loss")] == [3, 6]


@dataclass
class Launch:
    """Environment of a process that torchrun or accelerate has started."""

    world: int = 2
    mixed: str = "no"
    fsdp: str = "false"

    def set(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name, value in {
            "WORLD_SIZE": str(self.world),
            "LOCAL_WORLD_SIZE": str(self.world),
            "LOCAL_RANK": "0",
            "RANK": "0",
            "ACCELERATE_MIXED_PRECISION": self.mixed,
            "ACCELERATE_USE_FSDP": self.fsdp,
        }.items():
            monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("launch", "message"),
    [
        (Launch(world=10_000), "10000 processes were started on this machine, which has .* core"),
        (Launch(mixed="bf16"), "mixed_precision 'bf16'.*--precision bf16"),
        (Launch(fsdp="true"), "ACCELERATE_USE_FSDP asks to shard"),
    ],
)
def test_a_launch_that_does_not_fit_is_refused(launch, message, monkeypatch) -> None:
    launch.set(monkeypatch)
    with pytest.raises(ValueError, match=message):
        Trainer(Regression(SHORT), SHORT, compute=ComputeSettings("cpu"))


def test_more_processes_than_gpus_are_refused(monkeypatch) -> None:
    Launch(world=2).set(monkeypatch)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(ValueError, match=r"has 1 GPU\(s\); start at most 1"):
        ComputeSettings("auto").checked()
    with pytest.raises(ValueError, match="cannot share the device 'cuda:0'.*--device cuda"):
        ComputeSettings("cuda:0").checked()


def test_a_device_or_precision_that_is_not_there_is_refused() -> None:
    for compute, message in [
        (ComputeSettings("cuda:99"), "no device 'cuda:99'"),
        (ComputeSettings("cpu", "bf16"), "bf16 on a CPU"),
        (ComputeSettings("cpu", micro_batch_size=0), "at least 1 row, got 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            Trainer(Regression(SHORT), SHORT, compute=compute)


def test_warm_up_and_average_are_the_published_ones(golden: Callable[..., Any]) -> None:
    tensors, _ = golden("imagination_loop")
    shares = [warmup_share(step, 4) for step in range(8)]
    assert np.allclose(1e-4 * np.array(shares), tensors["lr_warmup.lr"].numpy(), rtol=1e-12)
    linear = nn.Linear(3, 2)
    linear.weight.data = tensors["ema.ema_weight_before"].clone()
    linear.bias.data = tensors["ema.frozen_bias_ema_before"].clone()
    linear.bias.requires_grad_(False)
    average = AveragedWeights(linear, 0.99)
    average.optimization_step = 10**6  # past its warm-up
    linear.weight.data = tensors["ema.model_weight"]
    average.step(average.parameters)
    linear.bias.data = tensors["ema.frozen_bias_ema_before"].clone()
    average.copy_to(linear)
    torch.testing.assert_close(linear.weight.data, tensors["ema.ema_weight_after"], rtol=0, atol=1e-7)
    assert torch.equal(linear.bias, tensors["ema.frozen_bias_ema_after"])


def test_schedules() -> None:
    def rates(make: Callable[..., Any], **kwargs: Any) -> list[float]:
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
        schedule, found = make(optimizer, 20, **kwargs), []
        for _ in range(20):
            found.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step()
        return found

    first = rates(warmup_cosine, warmup=3, final_share=0.5)
    assert first[0] == pytest.approx(0.5) and first[3] > 1.8 and 1.0 < first[-1] < 1.02
    second = rates(warmup_until_cosine)
    assert second[:2] == pytest.approx([1.0, 1.9877], abs=1e-3) and second[-1] < 0.02

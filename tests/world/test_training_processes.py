"""The world model's training in two processes, in micro-batches and with a discriminator."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import training_runs
from training_runs import SETTINGS, train

from wmpo_gym.training.runtime import ComputeSettings
from wmpo_gym.utils.io import load_safetensors
from wmpo_gym.world.training import WorldModelTrainer


def compare(weights: dict[str, torch.Tensor], trainer: WorldModelTrainer) -> None:
    for name, value in trainer.network.state_dict().items():
        torch.testing.assert_close(weights[name], value, rtol=0, atol=2e-5)


def test_two_processes_equal_one(tmp_path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [sys.executable, *launcher, training_runs.__file__, str(tmp_path)],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    one = train()
    first, second = (load_safetensors(tmp_path / f"rank-{i}.safetensors") for i in (0, 1))
    assert all(torch.equal(first[name], second[name]) for name in first)
    compare(first, one)
    history = torch.tensor([[e["loss"], e["discriminator_loss"], e["grad_norm"]] for e in one.history])
    torch.testing.assert_close(first["history"], history, rtol=1e-4, atol=1e-5)
    resumed = train(checkpoint_dir=tmp_path / "c")  # one process takes up what two have finished
    compare(first, resumed)


def test_micro_batches_change_rounding_only() -> None:
    whole, parts = train(), train(compute=ComputeSettings("cpu", micro_batch_size=3))
    compare(parts.network.state_dict(), whole)


def test_the_discriminator_reaches_the_transformer() -> None:
    first = replace(SETTINGS, steps=1, adversarial=0.0)
    without, with_it = train(first), train(replace(first, adversarial=10.0))
    changed = [
        not torch.equal(a, b)
        for a, b in zip(without.network.parameters(), with_it.network.parameters(), strict=True)
    ]
    assert any(changed)
    assert with_it.history[-1]["grad_norm"] != pytest.approx(without.history[-1]["grad_norm"], rel=1e-3)

"""Every example runs as it stands, for a few steps."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
OPTIONS = {
    "gpu_checks.py": ["--device", "cpu", "--tiny", "--steps", "3", "--rows", "2"],
    "random_rollout.py": ["--episodes", "1"],
    "compare.py": [
        *["--methods", "base", "dpo", "--budgets", "32", "--episodes", "4", "--selection-episodes", "2"],
    ],
    "custom_task.py": [
        *["--episodes", "30", "--world-steps", "3", "--classifier-steps", "3", "--iterations", "1"],
        *["--n-groups", "2", "--test-episodes", "4"],
    ],
    "lifelong.py": [
        *["--rounds", "2", "--real-episodes", "12", "--world-steps", "2", "--classifier-steps", "3"],
        *["--iterations", "1", "--n-groups", "2", "--episodes", "8"],
    ],
    "custom_policy.py": [
        *["--demonstrations", "4", "--clone-steps", "3", "--iterations", "1"],
        *["--n-groups", "2", "--episodes", "8"],
    ],
    "robot_client.py": ["--episodes", "2"],
    "evaluate_in_sim.py": ["--episodes", "4"],
    "train_dpo.py": ["--n-groups", "2", "--group-size", "4", "--episodes", "8"],
    "train_sac.py": [
        *["--n-envs", "2", "--total-timesteps", "8", "--demonstrations", "2"],
        *["--buffer-size", "100", "--episodes", "2"],
    ],
    "train_grpo_distributed.py": [
        *["--iterations", "1", "--n-groups", "2", "--group-size", "4", "--episodes", "4"],
    ],
    "train_grpo.py": ["--iterations", "1", "--n-groups", "2", "--group-size", "4", "--episodes", "8"],
}


LAUNCHERS = {
    "train_grpo_distributed.py": ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
}


def test_every_example_is_tried() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(OPTIONS)


@pytest.mark.parametrize("name", OPTIONS)
def test_example_runs(name: str, tmp_path: Path) -> None:
    command = [sys.executable, *LAUNCHERS.get(name, []), str(EXAMPLES / name), *OPTIONS[name]]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()

"""What ``import wmpo_gym`` offers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import wmpo_gym


def test_every_name_is_there_and_documented() -> None:
    for name in wmpo_gym.__all__:
        value = getattr(wmpo_gym, name)
        if name != "__version__":
            assert (value.__doc__ or "").strip(), f"{name} has no docstring"
    assert set(wmpo_gym.__all__) <= set(dir(wmpo_gym))
    with pytest.raises(AttributeError, match="no attribute 'Worlds'; it has"):
        wmpo_gym.Worlds  # noqa: B018


def test_names_cost_nothing_before_they_are_used() -> None:
    code = (
        "import sys, wmpo_gym\n"
        "assert not {'torch', 'mujoco', 'stable_baselines3'} & set(sys.modules)\n"
        "wmpo_gym.World, wmpo_gym.GRPO, wmpo_gym.evaluate\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_method_in_a_few_calls(tmp_path: Path) -> None:
    from wmpo_gym.reward.training import ClassifierTraining
    from wmpo_gym.world.training import WorldModelTraining

    demos = wmpo_gym.collect("move-block", "expert", out=tmp_path / "demos", episodes=6, progress=False)
    base = wmpo_gym.load_pretrained("move-block", "policy")
    rollouts = wmpo_gym.collect("move-block", base, out=tmp_path / "rollouts", episodes=24, progress=False)
    assert len(demos) == 6 and len(rollouts) == 24
    few = WorldModelTraining(steps=2, batch_size=4)
    world = wmpo_gym.train_world(rollouts, "move-block", training=few, device="cpu", progress=False)
    assert world.classifier is None and len(world.start_frames.ids) == 24
    judged = wmpo_gym.train_reward(
        world, rollouts, training=ClassifierTraining(steps=3, min_holdout=4), progress=False
    )
    assert judged.classifier is not None and world.classifier is None and "reward" in judged.card
    model = wmpo_gym.GRPO(base, "WMPO-Imagined-v0", n_groups=2, group_size=2, seed=0)
    assert all((a == b).all() for a, b in zip(model.policy.parameters(), base.parameters(), strict=True))
    result = wmpo_gym.evaluate("move-block", model.policy, split="validation", n_episodes=4, progress=False)
    assert result.rate.n == 4
    model.env.close()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda out: wmpo_gym.load_pretrained("move-block", "weights"), "Unknown kind 'weights'"),
        (lambda out: wmpo_gym.collect("move-block", "exprt", out=out), "choose 'expert' or 'play'"),
        (lambda out: wmpo_gym.collect("move-block", out=out, episodes=10**6), "has 8192 start states"),
        (lambda out: wmpo_gym.train_world([], "move-block", device="cuda:9"), "no device 'cuda:9'"),
    ],
)
def test_bad_input_is_named(call, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        call(tmp_path / "out")
    assert not (tmp_path / "out").exists()

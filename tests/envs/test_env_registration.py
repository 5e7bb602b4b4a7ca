"""Ids, imports and specs."""

from __future__ import annotations

import subprocess
import sys

import gymnasium
import pytest
from gymnasium.envs.registration import EnvSpec

import wmpo_gym

IDS = (
    "WMPO-Imagined-v0",
    "WMPO-Simulated-v0",
    "WMPO/MoveBlock-Imagined-v0",
    "WMPO/MoveBlock-Simulated-v0",
)


@pytest.mark.parametrize("env_id", IDS)
def test_specs_are_json_and_have_string_entry_points(env_id: str) -> None:
    spec = gymnasium.spec(env_id)
    assert isinstance(spec.entry_point, str) and isinstance(spec.vector_entry_point, str)
    assert spec.max_episode_steps is None and spec.nondeterministic is False
    assert EnvSpec.from_json(spec.to_json()) == spec


def test_import_needs_neither_torch_nor_mujoco() -> None:
    code = (
        "import sys, wmpo_gym, wmpo_gym.envs, gymnasium\n"
        "heavy = {'torch', 'mujoco', 'transformers', 'diffusers', 'stable_baselines3'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert 'WMPO-Imagined-v0' in gymnasium.registry"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_module_prefix_does_the_import() -> None:
    code = "import gymnasium; print(gymnasium.make('wmpo_gym:WMPO-Simulated-v0').unwrapped.task)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "move-block"


def test_importing_twice_overrides_nothing(recwarn: pytest.WarningsRecorder) -> None:
    import importlib

    importlib.reload(wmpo_gym)
    assert not [w for w in recwarn if "Overriding" in str(w.message)]


def test_unknown_names_list_what_there_is() -> None:
    with pytest.raises(ValueError, match="move-block.*Did you mean 'move-block'"):
        gymnasium.make("WMPO-Simulated-v0", task="move-blok")
    with pytest.raises(ValueError, match="moved-goal"):
        gymnasium.make("WMPO-Simulated-v0", variant="upside-down")
    with pytest.raises(ValueError, match="train, validation, test"):
        gymnasium.make("WMPO-Simulated-v0", split="dev")
    with pytest.raises(ValueError, match="no-such-world"):
        gymnasium.make("WMPO-Imagined-v0", task="move-block", world="no-such-world").reset()
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        wmpo_gym.envs.Nothing  # noqa: B018


def test_describe_and_attributes() -> None:
    env = gymnasium.make("WMPO-Simulated-v0").unwrapped
    assert env.task == env.task_spec.name == "move-block"
    assert env._max_episode_steps == env.max_episode_steps == env.task_spec.n_chunks
    env.reset(seed=0)
    assert env.task_description in env.instructions
    text = env.describe()
    for needed in (*env.instructions, "[-1, 1]", "train", "nominal"):
        assert needed in text
    assert not hasattr(env, "compute_reward")  # SB3 would take the environment for a GoalEnv


@pytest.mark.parametrize(("mode", "name"), [("SAME_STEP", "SAME_STEP"), ("Disabled", "DISABLED")])
def test_autoreset_mode_is_a_keyword_and_per_instance(mode: str, name: str) -> None:
    default = gymnasium.make_vec("WMPO-Simulated-v0", num_envs=2)
    env = gymnasium.make_vec("WMPO-Simulated-v0", num_envs=2, autoreset_mode=mode)
    assert env.metadata["autoreset_mode"] is gymnasium.vector.AutoresetMode[name]
    assert default.metadata["autoreset_mode"] is gymnasium.vector.AutoresetMode.NEXT_STEP
    assert "autoreset_mode" not in type(env.unwrapped).metadata
    with pytest.raises(ValueError, match="NEXT_STEP"):
        gymnasium.make_vec("WMPO-Simulated-v0", num_envs=2, autoreset_mode="sometimes")

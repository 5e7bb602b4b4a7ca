"""Gymnasium's and SB3's own checks, wrappers, pickling, processes."""

from __future__ import annotations

import copy
import pickle
import random
import warnings
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from env_toys import TOY, WORLD, assert_same, make_batch, make_single
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode
from gymnasium.wrappers import RecordEpisodeStatistics, RecordVideo
from gymnasium.wrappers.vector import RecordEpisodeStatistics as VectorStatistics
from gymnasium.wrappers.vector import RecordVideo as VectorVideo

import wmpo_gym

KINDS = ("imagined", "simulated")
MADE: dict[str, tuple[str, dict[str, Any]]] = {
    "move-block": ("WMPO-Simulated-v0", {}),
    "move-block id": ("WMPO/MoveBlock-Simulated-v0", {"variant": "texture"}),
    "simulated": ("WMPO-Simulated-v0", {"task": TOY}),
    "imagined": ("WMPO-Imagined-v0", {"world": WORLD}),
    "resized": ("WMPO-Imagined-v0", {"world": WORLD, "image_size": 48, "return_frames": True}),
}
if (Path(wmpo_gym.__file__).parent / "pretrained" / "move-block" / "world").is_dir():
    MADE["bundled"] = ("WMPO-Imagined-v0", {})
    MADE["bundled id"] = ("WMPO/MoveBlock-Imagined-v0", {})


@pytest.mark.parametrize("name", MADE)
@pytest.mark.parametrize("render_mode", [None, "rgb_array"])
def test_both_check_envs_pass_without_a_warning(name: str, render_mode: str | None) -> None:
    from stable_baselines3.common.env_checker import check_env as sb3_check_env

    env_id, kwargs = MADE[name]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        env = gymnasium.make(env_id, render_mode=render_mode, **kwargs)
        check_env(env.unwrapped)
        env = gymnasium.make(env_id, render_mode=render_mode, **kwargs)
        sb3_check_env(env.unwrapped, skip_render_check=False)
        env.close()
        env.close()


@pytest.mark.parametrize("kind", KINDS)
def test_types_and_fresh_arrays(kind: str) -> None:
    env = make_single(kind, **({"threshold": 1.0} if kind == "imagined" else {}))  # all three steps are taken
    obs, info = env.reset(seed=1)
    assert obs in env.observation_space and obs["pixels"].dtype == np.uint8
    kept = obs["pixels"].copy()
    stepped, reward, terminated, truncated, step_info = env.step(np.zeros((3, 2), np.float32))
    assert (type(reward), type(terminated), type(truncated)) == (float, bool, bool)
    assert np.array_equal(obs["pixels"], kept) and stepped["pixels"] is not obs["pixels"]
    assert info.keys() == step_info.keys()
    types = {"is_success": bool, "success_prob": float, "start_state_id": int, "instruction": str}
    types |= {"n_frames": int, "nfe": int, "reward_success": float}
    assert {key: type(value) for key, value in info.items()} == types
    assert info["n_frames"] == info["nfe"] == 0 and step_info["n_frames"] == 3


@pytest.mark.parametrize("kind", KINDS)
def test_global_generators_are_left_alone(kind: str) -> None:
    def snapshot() -> tuple[Any, ...]:
        return random.getstate(), np.random.get_state()[1].tobytes(), torch.get_rng_state().numpy().tobytes()

    before = snapshot()
    env = make_batch(kind, 3, autoreset_mode="SAME_STEP")
    env.reset(seed=0)
    env.reset(options={"noise_seed": 3})
    for _ in range(6):
        env.step(np.full((3, 3, 2), 0.5, np.float32))
    assert snapshot() == before


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("copier", [copy.deepcopy, lambda env: pickle.loads(pickle.dumps(env))])
def test_copies_go_on_where_the_original_stands(kind: str, copier: Any) -> None:
    fresh = copier(make_single(kind))
    assert not fresh.started
    never = {"threshold": 1.0} if kind == "imagined" else {}
    for env in (make_single(kind, **never), make_batch(kind, 3, autoreset_mode="SAME_STEP")):
        shape = env.action_space.shape
        env.reset(seed=4)
        env.step(np.full(shape, 0.3, np.float32))
        twin = copier(env)
        assert twin.ledger == env.ledger and twin.ledger is not env.ledger
        for _ in range(2):
            actions = np.random.default_rng(0).uniform(-1, 1, shape).astype(np.float32)
            assert_same(env.step(actions), twin.step(actions))
        assert_same(env.reset(), twin.reset())


def test_made_env_and_its_spec_pickle() -> None:
    env = gymnasium.make("WMPO-Simulated-v0", task="move-block", split="test")
    again = pickle.loads(pickle.dumps(env))
    assert again.spec == env.spec and pickle.loads(pickle.dumps(env.spec)) == env.spec
    assert gymnasium.make(env.spec).unwrapped.split == "test"
    assert_same(env.reset(seed=0), again.reset(seed=0))


def test_async_vector_env_spawned_equals_the_batch() -> None:
    kwargs = {"num_envs": 2, "task": "move-block"}
    workers = gymnasium.make_vec(
        "WMPO-Simulated-v0", vectorization_mode="async", vector_kwargs={"context": "spawn"}, **kwargs
    )
    try:
        batch = gymnasium.make_vec("WMPO-Simulated-v0", **kwargs)
        assert_same(workers.reset(seed=7), batch.reset(seed=7))
        actions = np.random.default_rng(0).uniform(-1, 1, batch.action_space.shape).astype(np.float32)
        assert_same(workers.step(actions), batch.step(actions))
        assert workers.call("task_description") == batch.unwrapped.task_description
    finally:
        workers.close()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("render_mode", ["rgb_array", "rgb_array_list"])
def test_record_video_and_statistics_single(kind: str, render_mode: str, tmp_path: Path) -> None:
    pytest.importorskip("moviepy")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings(
            "ignore", category=ResourceWarning
        )  # moviepy leaves its pipe to the collector
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        env = RecordVideo(
            RecordEpisodeStatistics(make_single(kind, render_mode=render_mode, render_size=80)),
            str(tmp_path / "videos"),
            episode_trigger=lambda i: True,
        )
        env.reset(seed=0)
        steps = 0
        while True:
            steps += 1
            *_, terminated, truncated, info = env.step(np.zeros((3, 2), np.float32))
            if terminated or truncated:
                break
        env.close()
    assert info["episode"]["l"] == steps and info["episode"]["r"] == float(info["is_success"])
    assert len(list(tmp_path.glob("videos/*.mp4"))) == 1


@pytest.mark.parametrize("mode", [AutoresetMode.NEXT_STEP, AutoresetMode.DISABLED])
def test_record_video_and_statistics_vector(mode: AutoresetMode, tmp_path: Path) -> None:
    pytest.importorskip("moviepy")
    inner = make_batch("simulated", 2, render_mode="rgb_array", render_size=80, autoreset_mode=mode)
    env = VectorVideo(VectorStatistics(inner), str(tmp_path / "videos"), episode_trigger=lambda i: i == 0)
    env.reset(seed=0)
    for _ in range(4):
        *_, infos = env.step(np.zeros((2, 3, 2), np.float32))
    assert infos["episode"]["l"].tolist() == [4, 4] and infos["_episode"].all()
    env.close()
    assert len(list(tmp_path.glob("videos/*.mp4"))) == 1


def test_statistics_after_a_partial_reset_forget_that_row_only() -> None:
    """The options reach the outer wrapper untouched (gymnasium's own SyncVectorEnv takes the mask out)."""
    env = VectorStatistics(make_batch("simulated", 2, autoreset_mode="DISABLED"))
    env.reset(seed=0)
    env.step(np.zeros((2, 3, 2), np.float32))
    env.reset(options={"reset_mask": np.array([True, False])})
    assert env.episode_lengths.tolist() == [0, 1]


@pytest.mark.parametrize("kind", KINDS)
def test_rendering(kind: str) -> None:
    env = make_batch(kind, 2, render_mode="rgb_array", render_size=85)
    obs, _ = env.reset(seed=0)
    frames = env.render()
    assert isinstance(frames, tuple) and len(frames) == 2
    assert frames[0].shape == (80, 80, 3) and frames[0].dtype == np.uint8
    assert np.array_equal(frames[1][::2, ::2], obs["pixels"][1])
    assert env.metadata["render_fps"] == pytest.approx(10 / 3)
    clips = make_single(kind, render_mode="rgb_array_list", return_frames=True, render_size=40)
    obs, _ = clips.reset(seed=0)
    assert len(clips.render()) == 1 and clips.metadata["render_fps"] == 10
    obs, _, _, _, info = clips.step(np.zeros((3, 2), np.float32))
    rendered = clips.render()
    assert isinstance(rendered, list) and len(rendered) == info["n_frames"]
    assert np.array_equal(np.stack(rendered), info["frames"][: info["n_frames"]])
    assert np.array_equal(rendered[-1], obs["pixels"])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        silent = make_single(kind)
        silent.reset(seed=0)
        assert silent.render() is None
    assert any("render_mode" in str(w.message) for w in caught)


@pytest.mark.parametrize("size", [20, 40, 48, 80])
def test_observation_size(size: int) -> None:
    native, resized = make_single("simulated"), make_single("simulated", image_size=size)
    (obs, _), (other, _) = native.reset(seed=0), resized.reset(seed=0)
    assert other["pixels"].shape == (size, size, 3) and other in resized.observation_space
    assert other["pixels"].mean() == pytest.approx(obs["pixels"].mean(), abs=0.5)
    if size == 80:
        assert np.array_equal(other["pixels"][::2, 1::2], obs["pixels"])


def test_max_episode_steps_is_taken_as_make_vec_gives_it() -> None:
    env = gymnasium.make_vec("WMPO-Simulated-v0", num_envs=2, task=TOY, max_episode_steps=2)
    env.reset(seed=0)
    zeros = np.zeros((2, 3, 2), np.float32)
    assert not env.step(zeros)[3].any()
    assert env.step(zeros)[3].all()

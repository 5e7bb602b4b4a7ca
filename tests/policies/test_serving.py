"""A robot on the other side of a socket gets the policy's actions, and nobody gets more than that."""

from __future__ import annotations

import dataclasses
import os
import pickle
import socket
import subprocess
import sys

import numpy as np
import pytest

from wmpo_gym.data.images import resize_area
from wmpo_gym.data.statistics import from_unit, to_unit
from wmpo_gym.policies.serving import PolicyClient, PolicyServer, is_loopback, pack, unpack
from wmpo_gym.tasks import get_task

pytest.importorskip("grpc")
pytest.importorskip("stable_baselines3")
pytest.importorskip("transformers")

TASK = get_task("move-block")
RED, BLUE = TASK.instructions


@pytest.fixture(scope="module")
def policy():
    """The bundled base policy."""
    from wmpo_gym.policies import VLAPolicy
    from wmpo_gym.world.world import find_pretrained

    return VLAPolicy.from_pretrained(find_pretrained("move-block", "policy"))


@pytest.fixture(scope="module")
def served(policy):
    """A client of a server of that policy."""
    with PolicyServer(policy, TASK, "127.0.0.1:0") as server, PolicyClient(server.address) as client:
        yield client


def image(seed: int = 0, height: int = 40, width: int = 40) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def greedy(policy, pixels: np.ndarray, task_id: int) -> np.ndarray:
    import torch

    observation = {"pixels": torch.from_numpy(pixels[None]), "task_id": torch.tensor([task_id])}
    chunk = policy.sample(observation, True)[0][0].numpy()
    return from_unit(chunk, TASK.action_low, TASK.action_high)


def test_answers_are_the_policys_in_the_robots_units(policy, served):
    for seed, (task_id, sentence) in enumerate(enumerate(TASK.instructions)):
        pixels = image(seed)
        actions = served.act(pixels, sentence)
        assert actions.dtype == np.float32 and np.array_equal(actions, greedy(policy, pixels, task_id))
        assert np.abs(actions[:, :2]).max() <= 0.12 + 1e-6  # metres


def test_images_of_any_size_are_squashed_as_on_import(policy, served):
    large = image(3, 480, 640)
    assert np.array_equal(served.act(large, BLUE), greedy(policy, resize_area(large, 40, 40), 1))


def test_description(served):
    described = served.describe()
    assert described["instructions"] == [RED, BLUE] and described["control_hz"] == 10
    assert (described["chunk"], described["action_dim"], described["image_size"]) == (4, 3, 40)


def test_a_simulated_robot_acts_as_in_the_environment(policy, served):
    pytest.importorskip("mujoco")
    from wmpo_gym.envs.simulated import make_simulator
    from wmpo_gym.rollouts.rollout import make_rollout_env, rollout

    ids, robot, outcomes = list(TASK.split_ids("test")[:6]), make_simulator(TASK), []
    for start in ids:
        robot.reset(start)
        done = False
        for _ in range(TASK.n_chunks):
            for action in served.act(robot.render(), TASK.instructions[robot.task_id]):
                if not done:
                    robot.step(to_unit(action, TASK.action_low, TASK.action_high))
                    done = robot.success
        outcomes.append(done)
    env = make_rollout_env("WMPO-Simulated-v0", len(ids), task=TASK)
    expected = rollout(env, policy, ids, deterministic=True).success
    env.close()
    assert outcomes == expected.tolist() and 0 < sum(outcomes) < len(outcomes)


@pytest.mark.parametrize(
    ("pixels", "sentence", "message"),
    [
        (image(), "fly away", "instruction 'fly away' is none of"),
        (image(), None, "instruction None is none of"),
        (image().astype(np.float32), RED, "got float32"),
        (image()[None], RED, r"got uint8 \(1, 40, 40, 3\)"),
        (image()[..., :2], RED, "one image"),
        (image()[:0], RED, "the image is empty"),
    ],
)
def test_observations_that_make_no_sense_are_refused(served, pixels, sentence, message):
    with pytest.raises(ValueError, match=message):
        served.act(pixels, sentence)
    assert served.act(image(), RED).shape == (4, 3)  # the server lives on


class Trap:
    """Unpickling it leaves a mark."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_messages_that_are_none_are_refused(served, tmp_path):
    trap = pickle.dumps(Trap(str(tmp_path / "sprung")))
    noise = np.random.default_rng(0).bytes(10_000)
    whole = pack({"pixels": image()}, instruction=RED)
    for message in (noise, trap, b"", whole[:-7], whole[:20], (2**62).to_bytes(8, "little") + noise):
        with pytest.raises(ValueError, match="not a safetensors message"):
            served._call("Act", message)
    with pytest.raises(ValueError, match="missing"):
        served._call("Act", pack({"state": np.zeros(3, np.float32)}))
    assert not (tmp_path / "sprung").exists()
    with pytest.raises(ConnectionError, match="RESOURCE_EXHAUSTED"):
        served.act(image(0, 2000, 2000), RED)
    assert served.act(image(), RED).shape == (4, 3)


def test_messages_hold_arrays_and_text():
    tensors, texts = unpack(pack({"a": np.arange(6, dtype=np.int16).reshape(2, 3)[:, ::2]}, note="für"))
    assert texts == {"note": "für"} and tensors["a"].tolist() == [[0, 2], [3, 5]]
    assert unpack(pack({}))[1] == {}


def test_addresses(policy, tmp_path):
    local = ("127.0.0.1:1", "localhost:1", "[::1]:1", f"unix:{tmp_path}")
    assert all(map(is_loopback, local))
    assert not any(map(is_loopback, ("0.0.0.0:1", "[::]:1", "192.168.0.2:1", "robot.lan:1", "")))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(OSError, match="Cannot listen on 127.0.0.1"):
            PolicyServer(policy, TASK, f"127.0.0.1:{taken.getsockname()[1]}")
    with (
        PolicyServer(policy, TASK, f"unix:{tmp_path / 's'}") as server,
        PolicyClient(server.address) as client,
    ):
        assert client.act(image(), RED).shape == (4, 3)
    with (
        PolicyClient(server.address, timeout=5) as client,
        pytest.raises(ConnectionError, match="wmpo serve"),
    ):
        client.describe()


def test_policy_and_task_belong_together(policy):
    for changes in ({"chunk": 5}, {"instructions": ("fold the towel",)}):
        other = dataclasses.replace(TASK, name="other", **changes)
        with pytest.raises(ValueError, match="'other' has .* give the task it was trained for"):
            PolicyServer(policy, other)


def test_sampling_draws(policy):
    with PolicyServer(policy, TASK, "127.0.0.1:0", deterministic=False) as server:
        with PolicyClient(server.address) as client:
            drawn = [client.act(image(), RED) for _ in range(4)]
    assert any(not np.array_equal(drawn[0], other) for other in drawn[1:])


def test_the_client_needs_no_torch():
    code = "import wmpo_gym.policies.serving as s, sys; s.PolicyClient(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)

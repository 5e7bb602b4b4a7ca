"""The robot's own state, followed in imagination."""

from functools import partialmethod
from pathlib import Path

import numpy as np
import pytest
import torch
from kills import disk_states

from wmpo_gym.cli.main import main
from wmpo_gym.data.episode import Episode
from wmpo_gym.data.store import EpisodeStore
from wmpo_gym.tasks import get_task
from wmpo_gym.training.presets import hints_for
from wmpo_gym.training.trainer import Trainer
from wmpo_gym.world import proprio as motion_module
from wmpo_gym.world.fit import FitSettings
from wmpo_gym.world.imagination import ImaginationState
from wmpo_gym.world.networks.autoencoder import PixelAutoencoder
from wmpo_gym.world.networks.conv import ConvWorldModel
from wmpo_gym.world.proprio import (
    KEYPOINTS,
    ProprioModel,
    ProprioTraining,
    learn_proprio,
    proprio_size,
    train_proprio,
)
from wmpo_gym.world.training import WorldModelTrainer, WorldModelTraining
from wmpo_gym.world.world import StartFrames, World

TASK = get_task("lift-close@32")
STEPS = TASK.chunk * 2


def cart(seed: int, *, proprio: bool = True) -> Episode:
    """A bright column that the first action component pushes; its place and speed are the robot's state."""
    rng = np.random.default_rng(seed)
    actions = rng.uniform(-1, 1, (STEPS, TASK.action_dim)).astype(np.float32)
    place, speed, states = rng.uniform(-0.4, 0.4), 0.0, []
    for t in range(STEPS + 1):
        states.append((place, speed))
        if t < STEPS:
            speed = 0.7 * speed + 0.05 * float(actions[t, 0])
            place += speed
    frames = np.zeros((STEPS + 1, 32, 32, 3), np.uint8)
    for frame, (x, _) in zip(frames, states, strict=True):
        middle = int(np.clip(16 + 16 * x, 1, 30))
        frame[:, middle - 1 : middle + 2] = 255
    return Episode(
        frames, actions, None, STEPS, seed, 0, TASK.instructions[0],
        proprio=np.array(states, np.float32) if proprio else None,
    )  # fmt: skip


def network(state_dim: int = 2) -> ConvWorldModel:
    return ConvWorldModel.for_task(TASK, 0, state_dim=state_dim, widths=(8, 16), cond_dim=16)


@pytest.fixture(scope="module")
def taught() -> tuple[ConvWorldModel, dict[str, float]]:
    world_model = network()
    settings = ProprioTraining(steps=600, batch_size=64, reader_steps=300, points_steps=50)
    episodes = [cart(seed) for seed in range(60)]
    errors = train_proprio(world_model.motion, episodes, PixelAutoencoder().encode, settings)
    return world_model, errors


def test_reads_and_follows_what_it_has_not_seen(taught):
    motion, fresh = taught[0].motion, [cart(seed) for seed in range(100, 120)]
    encode = PixelAutoencoder().encode
    followed = np.stack(
        [
            motion.rollout_from_frame(encode(torch.from_numpy(e.frames[None, :1]))[0, :, 0], e.actions)
            for e in fresh
        ]
    )
    places = followed[..., 0] * float(motion.deviation[0]) + float(motion.mean[0])
    truth = np.stack([e.proprio[:, 0] for e in fresh])
    assert np.abs(places[:, 0] - truth[:, 0]).mean() < 0.05  # read
    travelled = np.abs(truth - truth[:, :1]).mean()
    assert np.abs((places - places[:, :1]) - (truth - truth[:, :1])).mean() < 0.3 * travelled  # followed
    assert set(taught[1]) == {"points", "reader", "follow"}
    assert max(taught[1]["reader"], taught[1]["follow"]) < 0.3


def test_recorded_states_are_remembered_as_they_were(taught):
    motion, (seen, blind) = taught[0].motion, (cart(100), cart(100, proprio=False))
    first = PixelAutoencoder().encode(torch.from_numpy(seen.frames[None, :1]))[0, :, 0]
    memory = motion.encode(first, seen.proprio)
    states = (seen.proprio - motion.mean.numpy()) / motion.deviation.numpy()
    np.testing.assert_allclose(memory[:, :2], states, rtol=0, atol=1e-5)
    np.testing.assert_allclose(memory[1:, 2:4], np.diff(states, axis=0), rtol=0, atol=1e-5)
    assert not memory[0, 2:4].any()
    followed = motion.rollout_from_frame(first, seen.actions)
    np.testing.assert_array_equal(memory[:, 4:], followed[:, 4:])  # the points
    config = WorldModelTraining(steps=1, batch_size=2)
    trainer = WorldModelTrainer(taught[0], PixelAutoencoder(), TASK, [seen], config)
    recall = trainer.task._robot_states()
    assert np.array_equal(recall(seen), memory) and np.array_equal(recall(blind), followed)


def test_world_training_leaves_it_alone_and_uses_it(taught):
    model = network()
    model.load_state_dict(taught[0].state_dict())
    before = {k: v.clone() for k, v in model.motion.state_dict().items()}
    config = WorldModelTraining(steps=6, batch_size=4, learning_rate=1e-3, checkpoint_every=3)
    WorldModelTrainer(model, PixelAutoencoder(), TASK, [cart(s) for s in range(4)], config).train(
        progress=False
    )
    assert all(torch.equal(before[k], v) for k, v in model.motion.state_dict().items())
    assert float(model.state_shift.detach().abs().max()) > 0


def test_imagination_carries_it(taught, tmp_path):
    episodes = [cart(seed) for seed in range(3)]
    world = World(TASK, taught[0], PixelAutoencoder(), None, StartFrames.from_episodes(episodes), card={})
    world.save_pretrained(tmp_path / "world")
    world = World.from_pretrained(tmp_path / "world")
    torch.nn.init.constant_(world.network.state_shift, 0.3)  # as if it had learned to draw by it
    imagination, motion = world.imagination(), world.network.motion
    first = np.stack([e.frames[0] for e in episodes])
    actions = np.stack([e.actions for e in episodes])
    noise = torch.randn(3, *imagination.noise_shape, generator=torch.Generator().manual_seed(0))
    state = imagination.start(first)
    assert state.prev_action.shape == (3, TASK.action_dim + 4 + 2 * KEYPOINTS)
    for k in range(2):
        chunk = actions[:, k * TASK.chunk : (k + 1) * TASK.chunk]
        frames, state = imagination.step(state, chunk, noise)
        state = ImaginationState.from_dict(state.to_dict())
    encode = world.autoencoder.encode
    for i, episode in enumerate(episodes):
        whole = motion.rollout_from_frame(
            encode(torch.from_numpy(episode.frames[None, :1]))[0, :, 0], episode.actions
        )
        np.testing.assert_array_equal(state.prev_action[i, TASK.action_dim :].numpy(), whole[-1])
        alone = imagination.start(first[i : i + 1])
        for k in range(2):
            chunk = actions[i : i + 1, k * TASK.chunk : (k + 1) * TASK.chunk]
            frame, alone = imagination.step(alone, chunk, noise[i : i + 1])
        assert torch.equal(frame[0], frames[i]) and torch.equal(alone.prev_action[0], state.prev_action[i])
    other = imagination.start(first)
    other.prev_action[:, -1] += 1.0  # had it been moving
    made = [
        imagination.step(begun, actions[:, : TASK.chunk], noise)[0]
        for begun in (other, imagination.start(first))
    ]
    assert not torch.equal(*made)


SHORT = ProprioTraining(steps=3, reader_steps=2, points_steps=2, batch_size=8, frames=4)


def train_short(directory: Path | None) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    world_model = network()
    errors = learn_proprio(
        world_model, PixelAutoencoder(), [cart(seed) for seed in range(3)], SHORT, checkpoint_dir=directory
    )
    return dict(world_model.motion.state_dict()), errors


def test_a_training_killed_at_any_write_gives_the_same_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(FitSettings, "__init__", partialmethod(FitSettings.__init__, checkpoint_every=2))
    whole, errors = train_short(None)
    states = disk_states(lambda directory: train_short(directory / "motion"), tmp_path)
    assert len(states) > 10
    for state in states:
        weights, again = train_short(state / "motion")
        assert again == errors and all(torch.equal(weights[name], value) for name, value in whole.items())


def test_what_was_learned_is_not_learned_again(tmp_path, monkeypatch, capsys):
    weights, errors = train_short(tmp_path / "motion")
    monkeypatch.setattr(Trainer, "train_step", lambda *_: pytest.fail("trained again"))
    taken, again = train_short(tmp_path / "motion")
    assert again == errors and all(torch.equal(weights[name], value) for name, value in taken.items())


def test_it_is_said_before_it_is_trained(monkeypatch, capsys):
    monkeypatch.setattr(motion_module, "train_proprio", lambda *_, **__: {})
    settings = ProprioTraining.of_steps(120_000)
    learn_proprio(network(), PixelAutoencoder(), [cart(0)], settings, progress=True)
    assert "4,000 steps for keypoints, 20,000 for the encoder, 120,000" in capsys.readouterr().out
    assert ProprioTraining.of_steps(12_000) == ProprioTraining()
    assert ProprioTraining.of_steps(1, seed=3) == ProprioTraining(1, reader_steps=1, points_steps=1, seed=3)
    with pytest.raises(ValueError, match="at least 1 step of each part, got 0 of the dynamics"):
        ProprioTraining(steps=0)


def test_what_decides_whether_it_is_followed():
    with_state, without = cart(0), cart(1, proprio=False)
    assert proprio_size([with_state, with_state]) == 2
    assert proprio_size([with_state, without]) == 0
    assert proprio_size([]) == 0
    assert proprio_size([with_state], hints_for("move-block").symmetries) == 0
    plain = network(0)
    assert learn_proprio(plain, PixelAutoencoder(), [with_state], SHORT) == {} and plain.motion is None
    with pytest.raises(ValueError, match="2 numbers of proprio"):
        train_proprio(
            ProprioModel(32, 3, 7, 2), [without], PixelAutoencoder().encode, ProprioTraining(steps=1)
        )


@pytest.mark.parametrize(
    ("proprio", "message"),
    [
        (np.zeros((STEPS, 2), np.float32), "a row per frame"),
        (np.zeros((STEPS + 1, 0), np.float32), "a row per frame"),
        (np.zeros((STEPS + 1, 2)), "float32"),
        (np.full((STEPS + 1, 2), np.nan, np.float32), "must be finite, got nan at frame 0, number 0"),
    ],
)
def test_faulty_state_is_refused(proprio, message):
    episode = cart(0, proprio=False)
    with pytest.raises(ValueError, match=message):
        Episode(episode.frames, episode.actions, None, STEPS, 0, 0, "", proprio=proprio)


@pytest.fixture(scope="module")
def stores(tmp_path_factory) -> Path:
    """Directories of episodes with and without the robot's state, and a tiny network's settings."""
    root = tmp_path_factory.mktemp("stores")
    for name, recorded in (("with", True), ("without", False)):
        store = EpisodeStore(root / name)
        for seed in range(2):
            store.append(cart(seed, proprio=recorded))
    (root / "network.json").write_text('{"widths": [8, 16], "cond_dim": 16, "detail": 8}')
    return root


def command(stores: Path, out: Path, *options: str, episodes: str = "with") -> int:
    words = ["train", "world-model", "--task", "lift-close@32", "--episodes", str(stores / episodes)]
    words += ["--network-config", str(stores / "network.json"), "--out", str(out), "--holdout", "0"]
    return main([*words, "--steps", "1", "--batch-size", "2", *options])


def test_the_command_takes_its_steps_and_leaves_it_out(stores, tmp_path, capsys):
    assert command(stores, tmp_path / "w", "--proprio-steps", "3") == 0
    assert "1 steps for keypoints, 1 for the encoder, 3 for the dynamics" in capsys.readouterr().out
    assert World.from_pretrained(tmp_path / "w").network.motion is not None
    assert command(stores, tmp_path / "without", "--no-proprio") == 0
    assert World.from_pretrained(tmp_path / "without").network.motion is None


@pytest.mark.parametrize(
    ("options", "episodes", "message"),
    [
        (["--no-proprio", "--proprio-steps", "3"], "with", "give one of them"),
        (["--proprio-steps", "0"], "with", "must be at least 1, got 0"),
        (["--proprio-steps", "3"], "without", "no robot state to predict"),
        (["--proprio-steps", "3", "--network", "stdit"], "with", "takes the network conv"),
    ],
)
def test_options_without_effect_are_refused(stores, tmp_path, capsys, options, episodes, message):
    if "stdit" in options:
        (stores / "stdit.json").write_text('{"hidden_size": 24, "depth": 1, "num_heads": 2}')
        options = [*options, "--network-config", str(stores / "stdit.json")]
    assert command(stores, tmp_path / "w", *options, episodes=episodes) == 2
    assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert not (tmp_path / "w").exists()

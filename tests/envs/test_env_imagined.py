"""What is special about imagined episodes: worlds, windows, thresholds, batches of any size."""

from __future__ import annotations

import copy
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch
from env_toys import TOY, WORLD, assert_same, tiny_world

from wmpo_gym.data.episode import Episode
from wmpo_gym.envs.imagined import ImaginedEnv, ImaginedVectorEnv
from wmpo_gym.envs.success_filter import in_a_row
from wmpo_gym.reward.classifier import SuccessClassifier
from wmpo_gym.reward.conv import ConvSuccessClassifier
from wmpo_gym.world.networks.conv import ConvWorldModel
from wmpo_gym.world.world import FIRST_KEYFRAME_ID, World


@pytest.fixture(scope="module")
def real_world() -> World:
    """Every component of a class that ships, with random weights."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        classifier = ConvSuccessClassifier(
            image_size=TOY.image_size, window=2, n_instructions=2, widths=(8, 8, 8, 8), hidden=16
        ).eval()
    return replace(WORLD, classifier=classifier)


def chunks(n: int, count: int = 4) -> np.ndarray:
    return np.random.default_rng(n).uniform(-1, 1, (count, n, 3, 2)).astype(np.float32)


def test_rows_are_equal_in_batches_of_any_size(real_world: World) -> None:
    """Exact equality of pixels and probabilities over an episode, across kernels chosen by batch size."""
    seeds, actions = list(range(100, 140)), chunks(40)
    never = {"threshold": 1.0, "world": real_world, "autoreset_mode": "DISABLED", "skip_finished": True}
    whole = ImaginedVectorEnv(40, **never)
    whole.reset(seed=seeds)
    expected = [whole.step(a) for a in actions]
    for rows in ([7], [39], [3, 20], [1, 2, 30], list(range(5, 22))):
        part = ImaginedVectorEnv(len(rows), **never)
        part.reset(seed=[seeds[i] for i in rows])
        for t, (obs, *_, info) in enumerate(part.step(a[rows]) for a in actions):
            assert np.array_equal(obs["pixels"], expected[t][0]["pixels"][rows]), (rows, t)
            assert np.array_equal(info["success_prob"], expected[t][4]["success_prob"][rows]), (rows, t)
    single = ImaginedEnv(world=real_world, threshold=1.0)
    single.reset(seed=seeds[11])
    for t in range(4):
        assert np.array_equal(single.step(actions[t, 11])[0]["pixels"], expected[t][0]["pixels"][11])


def test_a_neighbour_that_dies_changes_nothing(real_world: World) -> None:
    """Rows leave the batch one by one; the survivors do not notice."""
    env = ImaginedVectorEnv(20, world=WORLD, autoreset_mode="DISABLED", skip_finished=True, threshold=0.85)
    alone = ImaginedVectorEnv(20, world=WORLD, autoreset_mode="DISABLED", skip_finished=True, threshold=1.0)
    for e in (env, alone):
        e.reset(seed=0)
    live = np.ones(20, bool)
    for a in chunks(20):
        mine, theirs = env.step(a), alone.step(a)
        stayed = live & ~mine[2]
        assert np.array_equal(mine[0]["pixels"][stayed], theirs[0]["pixels"][stayed])
        live = stayed
    assert 0 < live.sum() < 20


def test_world_from_a_directory_equals_the_object(real_world: World, tmp_path: Path) -> None:
    real_world.save_pretrained(tmp_path / "world")
    by_path = gymnasium.make_vec("WMPO-Imagined-v0", num_envs=3, world=str(tmp_path / "world"))
    by_object = gymnasium.make_vec("WMPO-Imagined-v0", num_envs=3, world=real_world)
    assert by_path.unwrapped.task == "toy"  # read from the directory, not asked for
    assert by_path.unwrapped._world is None  # weights are loaded at the first reset
    assert_same(by_path.reset(seed=0), by_object.reset(seed=0))
    for a in chunks(3):
        assert_same(by_path.step(a), by_object.step(a))


@pytest.mark.slow
def test_imagined_workers_spawn_from_a_directory(real_world: World, tmp_path: Path) -> None:
    real_world.save_pretrained(tmp_path / "world")
    kwargs = {"num_envs": 2, "world": str(tmp_path / "world"), "task": TOY}
    workers = gymnasium.make_vec(
        "WMPO-Imagined-v0", vectorization_mode="async", vector_kwargs={"context": "spawn"}, **kwargs
    )
    try:
        batch = gymnasium.make_vec("WMPO-Imagined-v0", **kwargs)
        assert_same(workers.reset(seed=7), batch.reset(seed=7))
        for a in chunks(2, 2):
            assert_same(workers.step(a), batch.step(a))
    finally:
        workers.close()


def test_probability_is_zero_until_the_first_window_is_full() -> None:
    env = ImaginedEnv(world=tiny_world(window=6, threshold=0.01), return_frames=True)
    _, info = env.reset(seed=0)
    assert info["success_prob"] == 0.0
    _, _, terminated, _, info = env.step(np.zeros((3, 2), np.float32))  # 4 frames seen
    assert info["success_prob"] == 0.0 and not terminated
    _, reward, terminated, _, info = env.step(np.zeros((3, 2), np.float32))  # the window is full at frame 6
    assert terminated and reward == 1.0 and info["n_frames"] == 2 and info["success_prob"] >= 0.01


def test_window_longer_than_the_episode_is_an_error() -> None:
    ImaginedEnv(world=tiny_world(window=13)).reset(seed=0)  # 12 steps are 13 frames
    with pytest.raises(ValueError, match="12 control steps never fill the classifier's window of 14"):
        ImaginedEnv(world=tiny_world(window=14)).reset(seed=0)
    with pytest.raises(ValueError, match="3 control steps"):
        ImaginedEnv(world=tiny_world(window=6), max_episode_steps=1).reset(seed=0)


def test_threshold_is_the_classifiers_or_ones_own() -> None:
    assert ImaginedEnv(world=WORLD).threshold == 0.85
    env = ImaginedVectorEnv(16, world=WORLD, threshold=1e-9)
    env.reset(seed=0)
    assert env.step(chunks(16)[0])[2].all()
    for bad in (0.0, 1.5):
        with pytest.raises(ValueError, match="probability"):
            ImaginedEnv(world=WORLD, threshold=bad)


def test_world_and_task_must_belong_together() -> None:
    with pytest.raises(ValueError, match="trained for task 'toy'.*for 'move-block'"):
        ImaginedEnv("move-block", world=WORLD).reset(seed=0)
    with pytest.raises(ValueError, match="chunk 3"):
        ImaginedEnv(replace(TOY, chunk=4), world=WORLD).reset(seed=0)
    with pytest.raises(ValueError, match="no success classifier"):
        ImaginedEnv(world=replace(WORLD, classifier=None)).reset(seed=0)
    with pytest.raises(ValueError, match="max_batch"):
        ImaginedVectorEnv(2, world=WORLD, max_batch=0)


def test_world_fitness_shows_the_card() -> None:
    assert ImaginedEnv(world=WORLD).world_fitness == {}
    assert "never measured" in ImaginedEnv(world=WORLD).describe()
    gates = {"physics": {"passed": True}, "honest": {"passed": False}, "learnable": {"passed": None}}
    env = ImaginedEnv(world=replace(WORLD, card={"gates": gates}))
    assert env.world_fitness == gates
    assert "physics True, honest False" in env.describe()


def stdit_world(real_world: World) -> World:
    """The world with the published network, at the size of a toy."""
    from wmpo_gym.world.networks.stdit import STDiT

    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = STDiT(
            in_channels=3, hidden_size=32, depth=1, num_heads=2, patch_size=4, predict_sigma=False,
            action_dim=2, context_frames=2, chunk=3, pixels_per_latent=1, base_size=40,
        ).eval()  # fmt: skip
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    return replace(real_world, network=network)


def test_a_world_of_the_published_network_runs_too(real_world: World, tmp_path: Path) -> None:
    """STDiT stands behind the same interface; its rows agree to a grey level."""
    stdit_world(real_world).save_pretrained(tmp_path / "world")
    kwargs = {"world": str(tmp_path / "world"), "threshold": 1.0}
    batch, single = ImaginedVectorEnv(5, **kwargs), ImaginedEnv(**kwargs)
    batch.reset(seed=0)
    single.reset(seed=3)
    for a in chunks(5):
        many, one = batch.step(a)[0]["pixels"][3], single.step(a[3])[0]["pixels"]
        assert np.abs(many.astype(int) - one).max() <= 1
        assert many.std() > 0


def test_bfloat16_is_a_copy_and_nearly_the_same(real_world: World) -> None:
    world = stdit_world(real_world)
    frames = []
    for dtype in ("float32", "bfloat16"):
        env = ImaginedVectorEnv(2, world=world, threshold=1.0, dtype=dtype)
        env.reset(seed=0)
        frames.append(env.step(chunks(2)[0])[0]["pixels"].astype(int))
    difference = np.abs(frames[0] - frames[1])
    assert 0 < difference.mean() < 3 < frames[0].std()
    assert world.network.dtype == torch.float32
    with pytest.raises(ValueError, match="ConvWorldModel does not compute in 'bfloat16'"):
        ImaginedVectorEnv(2, world=real_world, dtype="bfloat16").reset(seed=0)
    with pytest.raises(ValueError, match="'float8'; it does in float32 and bfloat16"):
        ImaginedVectorEnv(2, world=world, dtype="float8").reset(seed=0)


def test_compiled_halves_are_the_ones_that_run(real_world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled, calls = [], []

    def fake_compile(function):
        compiled.append(function.__name__)
        return lambda *args, **kwargs: (calls.append(function.__name__), function(*args, **kwargs))[1]

    monkeypatch.setattr(torch, "compile", fake_compile)
    for world in (real_world, stdit_world(real_world)):
        plain, quick = (ImaginedVectorEnv(2, world=world, threshold=1.0, compile=c) for c in (False, True))
        plain.reset(seed=0)
        quick.reset(seed=0)
        assert_same(plain.step(chunks(2)[0])[0], quick.step(chunks(2)[0])[0])
    assert compiled == ["encode_context", "denoise"] * 2
    assert calls == ["encode_context", *["denoise"] * WORLD.config.denoising_steps] * 2


@pytest.mark.slow
def test_a_really_compiled_network_gives_the_same_frames(real_world: World) -> None:
    shutil.which("g++") or pytest.skip("torch.compile needs a C++ compiler on a CPU")
    for world in (real_world, stdit_world(real_world)):
        plain, quick = (ImaginedVectorEnv(4, world=world, threshold=1.0, compile=c) for c in (False, True))
        plain.reset(seed=0)
        quick.reset(seed=0)
        ours, theirs = (env.step(chunks(4)[0])[0]["pixels"].astype(int) for env in (plain, quick))
        assert np.abs(ours - theirs).max() <= 1


def test_rows_at_once_are_those_the_network_wants(real_world: World) -> None:
    for options, rows in (({}, 32), ({"max_batch": 5}, 5)):
        env = ImaginedVectorEnv(40, world=real_world, **options)
        env.reset(seed=0)
        assert env._max_batch == rows


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only glibc's heap is tuned")
def test_freed_memory_is_kept_for_the_next_chunk() -> None:
    """In a process of its own: allocations of an activation's size fault once, not every time."""
    code = (
        "import resource, torch\n"
        "from wmpo_gym.envs.heap import keep_freed_memory\n"
        "torch.set_num_threads(1)\n"
        "assert keep_freed_memory()\n"
        "def use():\n    held = [torch.ones(6_000_000) for _ in range(5)]\n"
        "for _ in range(3): use()\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "for _ in range(20): use()\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)\n"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout
    pages_used = 20 * 5 * 24_000_000 // 4096
    assert int(printed) < 0.1 * pages_used


def test_frames_in_a_row_count_across_chunks() -> None:
    reached = np.array([[False, True], [True, True], [True, False]])
    counted, streak = in_a_row(reached, np.array([5, 0, 1]), 2)
    assert counted.tolist() == [[False, False], [False, True], [True, False]]
    assert streak.tolist() == [1, 2, 0]
    once, _ = in_a_row(reached, np.zeros(3, np.int64), 1)
    assert (once == reached).all()


def lottery(real: SuccessClassifier) -> SuccessClassifier:
    """A classifier whose verdict hangs on the first pixel alone."""
    judge = copy.deepcopy(real)
    judge.probabilities = lambda clips, ids: (clips[:, -1, 0, 0, 0] > 0).float()  # type: ignore[method-assign]
    return judge


class NoiseWorld(ConvWorldModel):
    """Its frames are the noise it was given."""

    def predict(self, noisy, sigma, actions, cache):
        return noisy


def test_dual_noise_asks_for_a_second_opinion(real_world: World) -> None:
    """What only the noise decides is confirmed in about the cases in which other noise decides alike."""
    network = NoiseWorld.for_task(TOY, 0)
    world = replace(real_world, network=network, classifier=lottery(real_world.classifier))
    seeds, actions = list(range(256)), chunks(256, 1)[0]
    first, checked = (
        ImaginedVectorEnv(256, world=world, threshold=0.5, dual_noise=dual, autoreset_mode="DISABLED")
        for dual in (False, True)
    )
    outcomes = []
    for env in (first, checked):
        env.reset(seed=seeds)
        outcomes.append(env.step(actions))
    claimed, confirmed = (o[2] for o in outcomes)
    n_frames = actions.shape[1]
    # Each of the frames whose window is full is a fair coin.
    assert 0.6 < claimed.mean() < 1.0
    assert not (confirmed & ~claimed).any() and 0.5 < confirmed[claimed].mean() < 0.97
    spent = checked.ledger.imagined_frames - first.ledger.imagined_frames
    assert spent == claimed.sum() * n_frames
    nfe = outcomes[1][4]["nfe"]
    assert (nfe[claimed] == 2 * nfe[~claimed][0]).all() and nfe.sum() == checked.ledger.nfe


def test_dual_noise_goes_on_from_a_saved_state(real_world: World) -> None:
    settings = {"world": real_world, "dual_noise": True, "consecutive_windows": 2, "threshold": 0.4}
    env = ImaginedVectorEnv(4, **settings, autoreset_mode="DISABLED", skip_finished=True)
    env.reset(seed=3)
    actions = chunks(4)
    env.step(actions[0])
    state = env.get_state()
    expected = [env.step(a) for a in actions[1:]]
    other = ImaginedVectorEnv(4, **settings, autoreset_mode="DISABLED", skip_finished=True)
    other.reset(seed=99)
    other.set_state(state)
    for action, step in zip(actions[1:], expected, strict=True):
        for mine, theirs in zip(other.step(action)[1:4], step[1:4], strict=True):
            assert_same(mine, theirs)


def test_bad_checks_are_refused(real_world: World) -> None:
    with pytest.raises(ValueError, match="consecutive_windows"):
        ImaginedVectorEnv(1, world=real_world, consecutive_windows=0)


def test_keyframes_are_real_pictures_from_the_middle(real_world: World) -> None:
    rng = np.random.default_rng(0)
    episodes = [
        Episode(
            frames=rng.integers(0, 255, (7, 40, 40, 3)).astype(np.uint8),
            actions=np.zeros((6, 2), np.float32), success=True, finish_step=6, start_state_id=i,
            task_id=i % 2, instruction=TOY.instructions[i % 2],
        )
        for i in range(8)
    ]  # fmt: skip
    n = len(real_world.start_frames.ids)
    world = real_world.with_keyframes(episodes, 0.5, seed=1)
    keyframes = world.start_frames.frames[n:]
    assert len(keyframes) == n and (world.start_frames.frames[:n] == real_world.start_frames.frames).all()
    middle = np.concatenate([e.frames[1:-1] for e in episodes])
    assert all((k == middle).all(axis=(1, 2, 3)).any() for k in keyframes)
    env = ImaginedVectorEnv(64, world=world)
    _, info = env.reset(seed=0)
    assert (info["start_state_id"] >= FIRST_KEYFRAME_ID).any()
    assert real_world.with_keyframes(episodes, 0.0) is real_world
    for share, words in ((1.0, "lies in"), (0.9, "smaller share")):
        with pytest.raises(ValueError, match=words):
            real_world.with_keyframes(episodes, share)

"""Frames left on disk give what frames in memory give, are checked, and take no memory."""

from __future__ import annotations

import logging
import shutil
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_store import DAMAGES, assert_same, make_episode

from wmpo_gym.data import ArtifactError, BrokenEpisodeError, EpisodeStore, StoredFrames, WriteError
from wmpo_gym.data.episode import Episode
from wmpo_gym.data.frames import FrameLoader, prefetched
from wmpo_gym.policies.windows import WindowDataset, draws
from wmpo_gym.reward.data import ClipTable
from wmpo_gym.tasks import MOVE_BLOCK
from wmpo_gym.training.presets import hints_for
from wmpo_gym.world.sampler import SelfForcingSampler

TASK = replace(MOVE_BLOCK, image_size=32)
SYMMETRIES = hints_for("move-block").symmetries


def stored(root: Path, n: int = 6, *, codec: str = "ffv1", size: int = 32) -> EpisodeStore:
    store = EpisodeStore(root, codec=codec)
    for i in range(n):
        store.append(make_episode(i, 5 + 3 * (i % 4), (size, size), success=i % 2 == 0))
    return store


def cache_files(root: Path) -> list[Path]:
    return sorted(f for f in root.rglob("*.frames") if f.is_file())


@pytest.mark.parametrize("codec", ["ffv1", "npy"])
def test_indexing_reads_what_an_array_would_give(tmp_path, codec):
    (episode,) = stored(tmp_path, 1, codec=codec).open()
    (loaded,) = EpisodeStore(tmp_path).load()
    frames, array = episode.frames, loaded.frames
    assert isinstance(frames, StoredFrames) and isinstance(array, np.ndarray)
    assert frames.shape == array.shape and frames.dtype == array.dtype and len(frames) == len(array)
    keys = (
        0, -1, np.int64(2), slice(None), slice(1, 4), slice(None, None, -2), slice(2, 2),
        np.array([4, 0, 0, 2]), np.array([], int), np.array([[0, 1], [5, 5]]), [1, 3],
        np.arange(len(array)) % 2 == 0, (None, slice(1)), (slice(2), ..., 0), (0, 3), (..., 1),
        (np.array([1, 1]), slice(None), 5),
    )  # fmt: skip
    for key in keys:
        assert np.array_equal(frames[key], array[key]), key
    assert np.array_equal(np.asarray(frames), array) and np.array_equal(np.stack(list(frames)), array)
    with pytest.raises(IndexError):
        frames[len(array)]
    assert bool(cache_files(tmp_path)) == (codec == "ffv1"), "raw frames need no cache"


def test_opened_episodes_are_the_loaded_ones(tmp_path):
    store = stored(tmp_path / "store")
    for episode, loaded in zip(store.open(tmp_path / "cache", workers=3), store.load(), strict=True):
        assert_same(replace(episode, frames=np.asarray(episode.frames)), loaded)
    assert len(cache_files(tmp_path / "cache")) == 6 and not cache_files(tmp_path / "store")
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda d: d.__name__)
def test_a_broken_episode_is_named_when_the_store_is_opened(tmp_path, caplog, damage):
    store = stored(tmp_path, 3)
    store.open()  # decoded before it broke
    damage(store.directories()[1])
    with caplog.at_level(logging.WARNING):
        assert [e.start_state_id for e in store.open()] == [0, 2]
    assert "Skipped 1 broken episode(s)" in caplog.text and "episode_000001" in caplog.text


@pytest.mark.parametrize("fault", ["edited", "cut", "deleted"])
def test_a_damaged_cache_is_made_again_from_the_video(tmp_path, caplog, fault):
    store = stored(tmp_path, 1)
    (episode,), expected = store.open(), store.load()[0].frames
    (cached,) = cache_files(tmp_path)
    data = cached.read_bytes()
    if fault == "deleted":
        shutil.rmtree(tmp_path / ".frames")
    else:
        middle = len(data) // 2
        rest = bytes([data[middle] ^ 1]) + data[middle + 1 :] if fault == "edited" else b""
        cached.write_bytes(data[:middle] + rest)
    assert np.array_equal(episode.frames[:], expected) and "Decoding a video again" in caplog.text
    assert cached.read_bytes() == data
    cached.unlink()
    shutil.rmtree(store.directories()[0])
    with pytest.raises(BrokenEpisodeError, match=r"episode_000000: its .* cannot be made again"):
        episode.frames[0]


def test_raw_frames_that_are_cut_off_are_named(tmp_path):
    (episode,) = stored(tmp_path, 1, codec="npy").open()
    file = tmp_path / "episode_000000" / "frames.npy"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ArtifactError, match=r"frames\.npy cannot be read.*ends before frame 5"):
        episode.frames[-1]


def test_a_cache_that_cannot_be_written_says_what_to_do(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(WriteError, match=r"could not write .*--frame-cache"):
        stored(tmp_path / "store", 1).open(tmp_path / "file")


def batches(episodes: list[Episode], workers: int) -> list[np.ndarray]:
    """Arrays of some batches of all three trainings, the world model's resumed on the way."""
    arrays: list[np.ndarray] = []
    arguments = {"n_rows": 5, "context_frames": 2, "workers": workers, "symmetries": SYMMETRIES}
    sampler = SelfForcingSampler(episodes, TASK, seed=3, **arguments)
    for step in range(20):
        if step == 9:
            state = sampler.get_state()
            sampler = SelfForcingSampler(episodes, TASK, seed=4, **arguments)
            sampler.set_state(state)
        arrays += vars(sampler.next()).values()
        sampler.update_priorities(np.random.default_rng(step).random(5))
    table = ClipTable.from_episodes(episodes, 3, workers=workers)
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        rows = table.draw({"positive": 3, "late": 2, "negative": 4}, generator)
        arrays.append(table.clips(rows).numpy())
        table.prefetch(rows)
    windows, rng = WindowDataset(episodes, 4, workers=workers), np.random.default_rng(0)
    drawn = draws(len(windows), 6, n_symmetries=len(SYMMETRIES), shift=2, rng=rng)
    made = prefetched(windows.draw(draw, SYMMETRIES) for draw, _ in zip(drawn, range(8), strict=False))
    for batch in made:
        arrays += [value.numpy() for value in vars(batch).values()]
    return arrays


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_batches_do_not_depend_on_where_frames_are_or_who_reads_them(tmp_path, workers):
    store = stored(tmp_path)
    expected, found = batches(store.load(), 0), batches(store.open(), workers)
    assert len(expected) == len(found) > 100
    assert all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in zip(expected, found, strict=True))


def test_memory_does_not_grow_with_the_recordings(tmp_path):
    peaks = []
    for n in (4, 80):
        store = stored(tmp_path / str(n), n, size=64)
        store.open()  # decoding is done one episode at a time, and once
        tracemalloc.start()
        batches(store.open(), 1)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    frame = 64 * 64 * 3
    assert peaks[1] - peaks[0] < 76 * 2 * frame, (peaks, "76 more episodes hold 11 frames each on average")


def test_bad_numbers_of_workers(tmp_path):
    with pytest.raises(ValueError, match="at least 0, got -1"):
        FrameLoader(-1)
    with pytest.raises(ValueError, match="at least one worker, got 0"):
        stored(tmp_path, 1).open(workers=0)


def test_items_computed_ahead_keep_their_order_and_their_errors():
    def items():
        yield from range(5)
        raise RuntimeError("at the end")

    source = prefetched(items(), ahead=3)
    assert [next(source) for _ in range(5)] == list(range(5))
    with pytest.raises(RuntimeError, match="at the end"):
        next(source)

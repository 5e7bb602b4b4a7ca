"""Episodes survive the disk bit for bit; broken ones are named, counted and skipped."""

from __future__ import annotations

import errno
import io
import logging
import os
import shutil
import subprocess
import sys

import av
import numpy as np
import pytest

from wmpo_gym.data import (
    ArtifactError,
    BrokenEpisodeError,
    Episode,
    EpisodeStore,
    WriteError,
    load_episode,
    read_json,
    save_episode,
    write_json_atomic,
)
from wmpo_gym.data.video import decode_lossless, encode_lossless


def make_episode(seed: int = 0, steps: int = 4, size: tuple[int, int] = (32, 32), **changes) -> Episode:
    rng = np.random.default_rng(seed)
    fields = {
        "frames": rng.integers(0, 256, (steps + 1, *size, 3), dtype=np.uint8),
        "actions": rng.uniform(-1, 1, (steps, 3)).astype(np.float32),
        "success": True,
        "finish_step": steps,
        "start_state_id": seed,
        "task_id": 1,
        "instruction": "move the blue block to the disc",
        "meta": {"actor": "expert", "seed": 3, "control_hz": 10.0},
    }
    return Episode(**{**fields, **changes})


def assert_same(a: Episode, b: Episode) -> None:
    for name, value in vars(a).items():
        other = getattr(b, name)
        if isinstance(value, np.ndarray):
            assert value.dtype == other.dtype and np.array_equal(value, other), name
        else:
            assert value == other and type(value) is type(other), name


@pytest.mark.parametrize("size", [(32, 32), (33, 47), (1, 1), (2, 3), (64, 96), (129, 127)])
def test_video_is_lossless_at_every_size(size):
    frames = make_episode(1, 3, size).frames
    frames[0] = 0
    frames[1] = 255
    assert np.array_equal(decode_lossless(encode_lossless(frames)), frames)


def test_every_colour_survives_video():
    channel = np.arange(256, dtype=np.uint8)
    rng = np.random.default_rng(0)
    frames = np.stack(
        [np.stack([rng.permutation(channel) for _ in range(3)], -1).reshape(16, 16, 3) for _ in range(20)]
    )
    assert np.array_equal(decode_lossless(encode_lossless(frames, 7.5)), frames)


@pytest.mark.parametrize(
    "data", [b"", b"not a video", encode_lossless(np.zeros((2, 8, 8, 3), np.uint8))[:60]]
)
def test_damaged_video_is_an_error(data):
    with pytest.raises(ValueError, match="video"):
        decode_lossless(data)


def test_a_video_that_would_lose_colours_is_refused():
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="matroska") as container:
        stream = container.add_stream("ffv1", rate=10)
        stream.width, stream.height, stream.pix_fmt = 8, 8, "yuv420p"
        container.mux(stream.encode(av.VideoFrame(8, 8, "yuv420p")))
        container.mux(stream.encode())
    with pytest.raises(ValueError, match="yuv420p pixels, where bgr0"):
        decode_lossless(buffer.getvalue())


@pytest.mark.parametrize("codec", ["ffv1", "npy"])
@pytest.mark.parametrize(
    "changes", [{}, {"success": None, "start_state_id": None}, {"success": np.bool_(False)}]
)
def test_round_trip(tmp_path, codec, changes):
    episode = make_episode(**changes)
    path = save_episode(tmp_path / "e", episode, codec=codec)
    assert path == tmp_path / "e"
    assert_same(load_episode(path), episode)


def test_unknown_codec(tmp_path):
    with pytest.raises(ValueError, match="'mp4'; choose one of ffv1, npy"):
        save_episode(tmp_path / "e", make_episode(), codec="mp4")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"frames": np.zeros((5, 32, 32, 3), np.float32)}, "uint8"),
        ({"frames": np.zeros((4, 32, 32, 3), np.uint8)}, "4 actions need 5 frames, got 4"),
        ({"actions": np.zeros((4, 3))}, "float32"),
        ({"actions": np.full((4, 3), np.nan, np.float32)}, "nan at step 0, dimension 0"),
        ({"finish_step": 3}, "finish_step must be the last frame, 4, got 3"),
        ({"success": 2}, "success"),
        ({"task_id": -1}, "task_id=-1"),
        ({"start_state_id": -2}, "start_state_id=-2"),
    ],
)
def test_invalid_episode_says_what_is_wrong(changes, message):
    with pytest.raises(ValueError, match=message):
        make_episode(**changes)


def empty(directory):
    for file in directory.iterdir():
        file.unlink()


def half_written(directory):
    (directory / "meta.json").unlink()


def truncated_video(directory):
    file = directory / "frames.mkv"
    file.write_bytes(file.read_bytes()[:-20])


def edited_actions(directory):
    file = directory / "data.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x07")


def edited_meta(directory):
    write_json_atomic(directory / "meta.json", {**read_json(directory / "meta.json"), "finish_step": 2})


def meta_without_a_field(directory):
    meta = read_json(directory / "meta.json")
    del meta["instruction"]
    write_json_atomic(directory / "meta.json", meta)


def foreign_meta(directory):
    write_json_atomic(directory / "meta.json", [1, 2])


def other_format(directory):
    write_json_atomic(directory / "meta.json", {**read_json(directory / "meta.json"), "format_version": 99})


def no_checksums(directory):
    write_json_atomic(directory / "meta.json", {**read_json(directory / "meta.json"), "sha256": None})


DAMAGES = [
    empty,
    half_written,
    truncated_video,
    edited_actions,
    edited_meta,
    meta_without_a_field,
    foreign_meta,
    other_format,
    no_checksums,
]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda d: d.__name__)
def test_broken_episode_is_named_and_skipped(tmp_path, caplog, damage):
    store = EpisodeStore(tmp_path)
    paths = [store.append(make_episode(i)) for i in range(3)]
    damage(paths[1])
    with pytest.raises(BrokenEpisodeError, match=rf"Broken episode .*{paths[1].name}.*again"):
        load_episode(paths[1])
    with caplog.at_level(logging.WARNING):
        loaded = EpisodeStore(tmp_path).load()
    assert [e.start_state_id for e in loaded] == [0, 2]
    assert "Skipped 1 broken episode(s)" in caplog.text and paths[1].name in caplog.text


def test_store_appends_counts_and_resumes(tmp_path, caplog):
    store = EpisodeStore(tmp_path / "episodes")
    assert len(store) == 0 and store.ids() == []
    for i in (5, 3):
        store.append(make_episode(i))
    (tmp_path / "episodes" / "notes").mkdir()
    (tmp_path / "episodes" / ".episode_000002.tmp").mkdir()  # what a killed process leaves
    resumed = EpisodeStore(tmp_path / "episodes")
    assert len(resumed) == 2 and resumed.ids() == [5, 3]
    assert resumed.append(make_episode(7, start_state_id=None)).name == "episode_000002"
    assert [e.start_state_id for e in resumed] == [5, 3, None] == resumed.ids()
    assert not caplog.records and not (tmp_path / "episodes" / ".episode_000002.tmp").exists()


def test_numbers_are_not_reused_after_a_broken_or_missing_episode(tmp_path):
    store = EpisodeStore(tmp_path)
    paths = [store.append(make_episode(i)) for i in range(3)]
    empty(paths[2])
    shutil.rmtree(paths[0])
    assert EpisodeStore(tmp_path).append(make_episode(9)).name == "episode_000003"


def test_missing_store_says_how_to_make_one(tmp_path):
    with pytest.raises(ArtifactError, match="No directory of episodes.*wmpo collect"):
        EpisodeStore(tmp_path / "none").load()


def test_full_disk_keeps_the_episodes_before(tmp_path, monkeypatch):
    store = EpisodeStore(tmp_path)
    store.append(make_episode(0))

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.write_bytes", full)
        with pytest.raises(WriteError, match="No space left.*free some space"):
            store.append(make_episode(1))
    assert os.listdir(tmp_path) == ["episode_000000"]
    assert store.append(make_episode(1)).name == "episode_000001"
    assert store.ids() == [0, 1]


def test_reading_episodes_does_not_import_torch(tmp_path):
    EpisodeStore(tmp_path).append(make_episode())
    code = (
        "import sys; from wmpo_gym.data import EpisodeStore; "
        f"assert len(EpisodeStore({str(tmp_path)!r}).load()) == 1; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)

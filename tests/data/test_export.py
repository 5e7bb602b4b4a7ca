"""Exported data sets come back as they were, and say what was imagined."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from recordings import SENTENCE, records, write_robomimic

from wmpo_gym.data import EpisodeStore, read_json
from wmpo_gym.data.exporters import export_lerobot
from wmpo_gym.data.exporters import lerobot as writer
from wmpo_gym.data.importers import ImportSettings, import_dataset
from wmpo_gym.data.task_file import find_task

pytest.importorskip("h5py")
pq = pytest.importorskip("pyarrow.parquet")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Five imported episodes."""
    root = tmp_path_factory.mktemp("recorded")
    settings = ImportSettings(chunk=4, image_size=32)
    source = write_robomimic(root / "arm.hdf5", records(5), places=True)
    import_dataset(source, root / "arm", settings, progress=False)
    return root / "arm"


def export(episodes, out, task, **options):
    return export_lerobot(episodes, out, task, progress=False, **options)


@pytest.mark.parametrize("small_files", [False, True])
def test_round_trip(store, tmp_path, monkeypatch, small_files):
    if small_files:
        monkeypatch.setattr(writer, "DATA_FILE_MB", 0)
        monkeypatch.setattr(writer, "VIDEO_FILE_MB", 0)
        monkeypatch.setattr(writer, "FILES_PER_CHUNK", 2)
    task, before = find_task(store), EpisodeStore(store).load()
    before[1] = dataclasses.replace(before[1], meta={**before[1].meta, "imagined": True})
    report = export(before, tmp_path / "out", task, codec="lossless")
    assert (report.episodes, report.imagined, report.frames) == (5, 1, sum(len(e.frames) for e in before))
    assert len(list((tmp_path / "out").glob("videos/*/*/*.mp4"))) == (5 if small_files else 1)
    import_dataset(tmp_path / "out", tmp_path / "back", task=task, progress=False)
    after = EpisodeStore(tmp_path / "back").load()
    for ours, theirs in zip(after, before, strict=True):
        assert np.array_equal(ours.frames, theirs.frames)
        assert np.allclose(ours.actions, theirs.actions, atol=1e-6)
        assert np.array_equal(ours.proprio, theirs.proprio)
        fields = ("success", "finish_step", "start_state_id", "task_id", "instruction")
        assert all(getattr(ours, name) == getattr(theirs, name) for name in fields)
        assert ours.meta.get("imagined", False) == theirs.meta.get("imagined", False)


def test_small_video_is_close(store, tmp_path):
    task, before = find_task(store), EpisodeStore(store).load()
    export(before, tmp_path / "out", task)
    import_dataset(tmp_path / "out", tmp_path / "back", task=task, progress=False)
    for ours, theirs in zip(EpisodeStore(tmp_path / "back"), before, strict=True):
        assert np.abs(ours.frames.astype(int) - theirs.frames).mean() < 6


def test_an_episode_shorter_than_the_encoders_delay(store, tmp_path):
    task, before = find_task(store), EpisodeStore(store).load()
    short = dataclasses.replace(
        before[0], frames=before[0].frames[:2], actions=before[0].actions[:1], finish_step=1, proprio=None
    )
    rest = [dataclasses.replace(e, proprio=None) for e in before[1:]]
    assert export([short, *rest], tmp_path / "out", task).episodes == 5
    import_dataset(tmp_path / "out", tmp_path / "back", task=task, progress=False)
    assert [e.n_steps for e in EpisodeStore(tmp_path / "back")] == [1, *(e.n_steps for e in rest)]


def test_what_lerobot_reads(store, tmp_path):
    task, before = find_task(store), EpisodeStore(store).load()
    export(before, tmp_path / "out", task, camera="front")
    info = read_json(tmp_path / "out" / "meta" / "info.json")
    rows = pq.read_table(tmp_path / "out" / "data" / "chunk-000" / "file-000.parquet").to_pydict()
    assert info["codebase_version"] == "v3.0" and info["total_frames"] == len(rows["index"])
    assert set(rows) == set(info["features"]) - {"observation.images.front"}
    assert info["features"]["observation.images.front"]["info"]["video.fps"] == info["fps"] == 10
    assert rows["index"] == list(range(len(rows["index"])))
    entries = pq.read_table(tmp_path / "out" / "meta" / "episodes").to_pylist()
    for episode, entry in zip(before, entries, strict=True):
        first, last = entry["dataset_from_index"], entry["dataset_to_index"]
        assert last - first == entry["length"] == len(episode.frames) and entry["tasks"] == [SENTENCE]
        assert rows["next.done"][first:last].count(True) == (2 if episode.success else 1)
        assert any(rows["next.success"][first:last]) == episode.success
        assert np.allclose(rows["timestamp"][first:last], np.arange(last - first) / 10)
    assert np.allclose(rows["observation.state"], np.concatenate([e.proprio for e in before]))
    assert info["features"]["observation.state"]["shape"] == [2]
    assert [rows["action"][0][i] for i in range(2)] != pytest.approx(before[0].actions[0, :2])  # metres
    statistics = read_json(tmp_path / "out" / "meta" / "stats.json")
    assert np.allclose(statistics["action"]["max"], np.max(rows["action"], axis=0))
    assert np.shape(statistics["observation.images.front"]["q99"]) == (3, 1, 1)
    tasks = pq.read_table(tmp_path / "out" / "meta" / "tasks.parquet")
    assert tasks.to_pydict() == {"task_index": [0], "task": [SENTENCE]}


def test_outcomes_are_all_known_or_all_unknown(store, tmp_path):
    task, episodes = find_task(store), EpisodeStore(store).load()
    unlabelled = [dataclasses.replace(e, success=None) for e in episodes]
    export(unlabelled, tmp_path / "play", task)
    assert "next.success" not in read_json(tmp_path / "play" / "meta" / "info.json")["features"]
    assert (
        import_dataset(tmp_path / "play", tmp_path / "back", task=task, progress=False).outcomes["unlabelled"]
        == 5
    )
    with pytest.raises(ValueError, match="export them apart"):
        export([*episodes, *unlabelled], tmp_path / "mixed", task)
    with pytest.raises(ValueError, match="2 numbers in some episodes and 0 in others"):
        export([episodes[0], dataclasses.replace(episodes[1], proprio=None)], tmp_path / "mixed", task)
    assert not list(tmp_path.glob("*mixed*"))


def test_nothing_is_overwritten_and_nothing_half_written(store, tmp_path):
    task, episodes = find_task(store), EpisodeStore(store).load()
    (tmp_path / "there").mkdir()
    with pytest.raises(ValueError, match="exists"):
        export(episodes, tmp_path / "there", task)
    odd = dataclasses.replace(episodes[0], frames=episodes[0].frames[:, ::2])
    for wrong, message in (([episodes[0], odd], "32x32 pictures"), ([], "no episode")):
        with pytest.raises(ValueError, match=message):
            export(wrong, tmp_path / "out", task)
        assert [p.name for p in tmp_path.iterdir()] == ["there"]
    with pytest.raises(ValueError, match="h264, lossless"):
        export(episodes, tmp_path / "out", task, codec="gif")
    with pytest.raises(ValueError, match="whole frames per second"):
        export(episodes, tmp_path / "out", dataclasses.replace(task, control_hz=12.5))


def test_lerobot_itself_opens_it(store, tmp_path):
    """Runs where lerobot is installed (0.4 or newer)."""
    datasets = pytest.importorskip("lerobot.datasets.lerobot_dataset")
    task, before = find_task(store), EpisodeStore(store).load()
    export(before, tmp_path / "out", task, codec="lossless")
    opened = datasets.LeRobotDataset("local/out", root=tmp_path / "out", video_backend="pyav")
    assert opened.meta.total_episodes == 5 and opened.meta.stats["action"]["q01"].shape == (3,)
    item = opened[len(before[0].frames) + 2]  # third row of the second episode
    assert item["task"] == SENTENCE and not item["imagined"]
    assert np.allclose(item["observation.state"], before[1].proprio[2])
    picture = np.rint(item["observation.images.main"].numpy().transpose(1, 2, 0) * 255)
    assert np.array_equal(picture, before[1].frames[2])


def test_what_lerobot_itself_wrote_arrives(tmp_path):
    """Runs where lerobot is installed (0.4 or newer)."""
    datasets = pytest.importorskip("lerobot.datasets.lerobot_dataset")
    features = {
        "observation.images.front": {
            "dtype": "image",
            "shape": (32, 32, 3),
            "names": ["height", "width", "channels"],
        },
        "action": {"dtype": "float32", "shape": (3,), "names": ["x", "y", "gripper"]},
        "next.success": {"dtype": "bool", "shape": (1,), "names": None},
    }
    made = datasets.LeRobotDataset.create(
        "local/made", 10, features, root=tmp_path / "made", use_videos=False
    )
    real = records(3)
    for e in real:
        last = len(e["actions"]) - 1
        for t, frame in enumerate(e["frames"]):
            made.add_frame(
                {
                    "observation.images.front": frame,
                    "action": e["actions"][min(t, last)],
                    "next.success": np.array([e["success"] and t >= last]),
                    "task": SENTENCE,
                }
            )
        made.save_episode()
    made.finalize()
    settings = ImportSettings(chunk=4, image_size=32)
    import_dataset(tmp_path / "made", tmp_path / "back", settings, progress=False)
    for episode, e in zip(EpisodeStore(tmp_path / "back"), real, strict=True):
        assert np.array_equal(episode.frames, e["frames"]) and episode.success == e["success"]

"""Recordings of others become episodes; damaged ones are named, and nothing is imported by halves."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from recordings import HORIZON, SENTENCE, record, records, write_lerobot_v21, write_robomimic, write_wmpo

from wmpo_gym.data import ArtifactError, EpisodeStore, WriteError, read_json
from wmpo_gym.data.exporters import export_lerobot
from wmpo_gym.data.images import resize_area
from wmpo_gym.data.importers import (
    ImportSettings,
    SourceError,
    import_dataset,
    open_source,
    register_state_renderer,
)
from wmpo_gym.data.importers.replay import STATE_RENDERERS
from wmpo_gym.data.statistics import ActionStatistics, from_unit, to_unit
from wmpo_gym.data.task_file import find_task, read_task
from wmpo_gym.tasks import get_task

pytest.importorskip("h5py")
pytest.importorskip("pyarrow")

FORMATS = ("robomimic", "lerobot-v2.1", "lerobot-v3", "wmpo")
SETTINGS = ImportSettings(chunk=4, image_size=32, instruction=SENTENCE, control_hz=10)


def write(kind: str, where: Path, episodes: list[dict]) -> Path:
    if kind == "robomimic":
        return write_robomimic(where / "arm.hdf5", episodes)
    if kind == "lerobot-v2.1":
        return write_lerobot_v21(where / "arm", episodes)
    if kind == "wmpo":
        return write_wmpo(where / "arm.tar", episodes)
    store, target = where / "store", where / "arm"
    import_dataset(write_robomimic(where / "first.hdf5", episodes), store, SETTINGS, progress=False)
    export_lerobot(EpisodeStore(store), target, find_task(store), codec="lossless", progress=False)
    return target


def take(source: Path, out: Path, settings: ImportSettings = SETTINGS, **options):
    return import_dataset(source, out, settings, progress=False, **options)


def assert_nothing_left(out: Path) -> None:
    assert not out.exists() and not list(out.parent.glob(f".{out.name}*"))


@pytest.mark.parametrize("kind", FORMATS)
def test_episodes_arrive_whole(tmp_path, kind):
    real = records(5)
    report = take(write(kind, tmp_path, real), tmp_path / "out")
    task, episodes = find_task(tmp_path / "out"), EpisodeStore(tmp_path / "out").load()
    assert (report.imported, report.skipped) == (5, []) and len(episodes) == 5
    assert task.instructions == (SENTENCE,) and (task.chunk, task.action_dim, task.control_hz) == (4, 3, 10)
    assert task.horizon % 4 == 0 and task.horizon >= max(len(e["actions"]) for e in real)
    for episode, e in zip(episodes, real, strict=True):
        steps = len(e["actions"]) if e["success"] or kind != "wmpo" else HORIZON
        assert (episode.n_steps, episode.success, episode.instruction) == (steps, e["success"], SENTENCE)
        assert np.array_equal(episode.frames[: len(e["frames"])], e["frames"])
        back = from_unit(episode.actions, task.action_low, task.action_high)
        assert np.allclose(back[: len(e["actions"])], e["actions"], atol=1e-6)
        assert episode.meta["task"] == task.name and episode.start_state_id is not None
    assert len({e.start_state_id for e in episodes}) == 5
    assert report.outcomes == {"success": 3, "failure": 2}


def test_statistics_are_those_of_the_actions(tmp_path):
    real = records(6)
    take(write_robomimic(tmp_path / "arm.hdf5", real), tmp_path / "out")
    found = read_json(tmp_path / "out" / "statistics.json")["arm"]
    steps = np.concatenate([e["actions"] for e in real]).astype(float)
    assert found["num_trajectories"] == 6 and found["num_transitions"] == len(steps)
    assert np.allclose(found["action"]["q01"], np.quantile(steps, 0.01, axis=0))
    assert np.allclose(found["action"]["q99"], np.quantile(steps, 0.99, axis=0))
    assert np.allclose(found["action"]["mean"], steps.mean(0))
    assert found["action"]["mask"] == [True, True, False]
    task = find_task(tmp_path / "out")
    assert task.action_low[2] == 0 and task.action_high[2] == 1  # the gripper keeps its two commands
    assert task.action_low[0] == pytest.approx(found["action"]["q01"][0])


def test_scaling_goes_there_and_back():
    rng = np.random.default_rng(0)
    actions = np.stack([rng.normal(size=300), rng.integers(0, 2, 300), np.full(300, 7.0)], axis=1)
    actions = np.concatenate([actions, [[0.0, 0.0, 7.0]]])
    found = ActionStatistics.of([actions])
    unit = to_unit(actions, found.low, found.high)
    assert unit.dtype == np.float32 and set(unit[:, 1]) == {-1.0, 1.0} and not unit[:, 2].any()
    assert np.mean(np.abs(unit[:, 0]) <= 1) == pytest.approx(0.98, abs=0.01)
    assert np.allclose(from_unit(unit, found.low, found.high), actions, atol=1e-5)


def test_a_joint_that_mostly_rests_is_scaled_by_its_extremes():
    resting = np.zeros((1000, 1))
    resting[:3, 0] = (1.0, -2.0, 3.0)
    found = ActionStatistics.of([resting])
    assert not found.mask[0] and (found.low[0], found.high[0]) == (-2.0, 3.0)


@pytest.mark.parametrize("kind", ["robomimic", "robomimic-no-next", "lerobot-v2.1"])
def test_state_of_the_robot_comes_along(tmp_path, kind):
    real = records(3)
    if kind == "lerobot-v2.1":
        source = write_lerobot_v21(tmp_path / "arm", real, places=True)
    else:
        source = write_robomimic(tmp_path / "arm.hdf5", real, places=True, next_obs=kind == "robomimic")
    report = take(source, tmp_path / "out")
    for episode, e in zip(EpisodeStore(tmp_path / "out"), real, strict=True):
        np.testing.assert_array_equal(episode.proprio, e["places"][: len(episode.frames)])
    assert not report.notes


@pytest.mark.parametrize("flaw", ["nan", "missing", "wider", "shorter"])
def test_an_episode_can_do_without_the_robots_state(tmp_path, flaw):
    import h5py

    source = write_robomimic(tmp_path / "arm.hdf5", records(3), places=True, next_obs=False)
    with h5py.File(source, "a") as file:
        observed = file["data/demo_1/obs"]
        places = observed["robot0_eef_pos"][()]
        del observed["robot0_eef_pos"]
        if flaw != "missing":
            places[-1, 0] = np.nan if flaw == "nan" else 0
            flawed = {"wider": np.repeat(places, 2, axis=1), "shorter": places[:-1]}
            observed["robot0_eef_pos"] = flawed.get(flaw, places)
    report = take(source, tmp_path / "out")
    found = [e.proprio for e in EpisodeStore(tmp_path / "out")]
    assert [p is not None and p.shape[1] for p in found] == [2, 4 if flaw == "wider" else False, 2]
    (note,) = report.notes
    assert "2 in 2 episodes" in note and "does not follow it" in note


def test_a_data_set_can_do_without_states_of_unequal_length(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    source = write_lerobot_v21(tmp_path / "arm", records(2))
    for file in source.glob("data/*/*.parquet"):
        table = pq.read_table(file)
        ragged = pa.array([[0.0] * (1 + i % 2) for i in range(len(table))])
        pq.write_table(table.append_column("observation.state", ragged), file)
    take(source, tmp_path / "out")
    assert [e.proprio for e in EpisodeStore(tmp_path / "out")] == [None, None]


@pytest.mark.parametrize("next_obs", [True, False])
def test_robomimic_last_picture(tmp_path, next_obs):
    real = records(3)
    take(write_robomimic(tmp_path / "arm.hdf5", real, next_obs=next_obs), tmp_path / "out")
    for episode, e in zip(EpisodeStore(tmp_path / "out"), real, strict=True):
        assert episode.n_steps == len(e["actions"]) - (not next_obs) and episode.success == e["success"]


def test_camera_has_to_be_chosen_where_there_are_several(tmp_path):
    source = write_robomimic(tmp_path / "arm.hdf5", records(3))
    with pytest.raises(SourceError, match="agentview_image, wrist_image"):
        open_source(source, camera="front")
    with open_source(source) as opened:
        assert opened.camera == "agentview_image"  # the only one of that name
    with open_source(source, camera="wrist") as opened:
        seen = opened.frames("demo_0", 3, 32)
    assert np.array_equal(seen, record(0)["frames"][:3, ::-1])


def test_pictures_are_squashed_to_the_task(tmp_path):
    real = records(3, height=48, width=64)
    take(write_robomimic(tmp_path / "arm.hdf5", real), tmp_path / "out")
    episode = next(iter(EpisodeStore(tmp_path / "out")))
    assert np.array_equal(episode.frames, resize_area(real[0]["frames"], 32, 32))
    assert episode.frames.mean() == pytest.approx(real[0]["frames"].mean(), abs=0.5)


def test_pictures_stored_in_the_rows(tmp_path):
    real = records(2)
    take(write_lerobot_v21(tmp_path / "arm", real, video=False), tmp_path / "out")
    for episode, e in zip(EpisodeStore(tmp_path / "out"), real, strict=True):
        assert np.array_equal(episode.frames, e["frames"])


def test_the_sentence_of_libero(tmp_path):
    import h5py

    source = write_robomimic(tmp_path / "arm.hdf5", records(2))
    with h5py.File(source, "a") as file:
        file["data"].attrs["problem_info"] = json.dumps({"language_instruction": "open the drawer"})
        del file["data/demo_0"].attrs["ep_meta"], file["data/demo_1"].attrs["ep_meta"]
    take(source, tmp_path / "out", ImportSettings(chunk=4, image_size=32))
    assert find_task(tmp_path / "out").instructions == ("open the drawer",)


def test_outcomes_that_were_not_recorded(tmp_path):
    source = write_robomimic(tmp_path / "arm.hdf5", records(3), rewards=False)
    assert take(source, tmp_path / "plain").outcomes == {"unlabelled": 3}
    assumed = ImportSettings(chunk=4, image_size=32, assume_success=True)
    assert take(source, tmp_path / "assumed", assumed).outcomes == {"success": 3}
    unlabelled = write_lerobot_v21(tmp_path / "v21", records(2), label=False)
    assert take(unlabelled, tmp_path / "v2").outcomes == {"unlabelled": 2}


def test_simulator_states_are_drawn_by_what_was_registered(tmp_path, monkeypatch):
    pytest.importorskip("mujoco")
    from wmpo_gym.envs.simulated import make_simulator

    simulator, states, pictures, real = make_simulator("move-block"), [], [], []
    for start in range(2):
        simulator.reset(start)
        visited, seen, actions = [], [], np.random.default_rng(start).uniform(-1, 1, (6, 3))
        for action in actions:
            visited.append(simulator.get_state())
            simulator.set_state(visited[-1])  # what a step leaves behind is drawn a hair earlier
            seen.append(simulator.render())
            simulator.step(action)
        states.append(np.stack(visited))
        pictures.append(np.stack(seen))
        real.append({"actions": actions, "success": False})
    source = write_robomimic(tmp_path / "states.hdf5", real, states=states, env="MoveBlock")
    settings = ImportSettings(instruction="move the red block to the disc")
    with pytest.raises(SourceError, match="'MoveBlock' and no pictures.*register_state_renderer"):
        take(source, tmp_path / "out", settings, task=get_task("move-block"))
    assert_nothing_left(tmp_path / "out")

    class Renderer:
        def render(self, states, model_xml):
            frames = []
            for state in states:
                simulator.set_state(state)
                frames.append(simulator.render())
            return np.stack(frames)

        def close(self):
            closed.append(True)

    closed: list[bool] = []
    monkeypatch.setattr("wmpo_gym.data.importers.replay.STATE_RENDERERS", dict(STATE_RENDERERS))
    register_state_renderer("MoveBlock", lambda env_args, camera, size: Renderer())
    take(source, tmp_path / "out", settings, task=get_task("move-block"))
    for episode, frames in zip(EpisodeStore(tmp_path / "out"), pictures, strict=True):
        assert episode.n_steps == 5 and np.array_equal(episode.frames, frames)
    assert closed


def test_import_for_a_known_task_takes_its_limits(tmp_path):
    first = take(write_robomimic(tmp_path / "a.hdf5", records(6)), tmp_path / "a")
    more = [record(seed) for seed in range(10, 14)]
    more[0]["actions"] *= 2
    long = {**record(0), "actions": np.zeros((20, 3)), "frames": np.repeat(record(0)["frames"][:1], 21, 0)}
    task = read_task(tmp_path / "a")
    report = take(write_robomimic(tmp_path / "b.hdf5", [*more, long]), tmp_path / "b", task=task)
    assert first.imported == 6 and report.imported == 4 and read_task(tmp_path / "b") == task
    assert report.skipped == [{"episode": "demo_4", "reason": "20 steps, the horizon is 12"}]
    episode = EpisodeStore(tmp_path / "b").load()[0]
    assert np.allclose(from_unit(episode.actions, task.action_low, task.action_high), more[0]["actions"])
    assert np.abs(episode.actions).max() > 1.5  # beyond the quantiles, and kept
    slower = dataclasses.replace(task, control_hz=5.0)
    slow = take(tmp_path / "b.hdf5", tmp_path / "slow", ImportSettings(), task=slower)
    assert [note.partition(":")[0] for note in slow.notes] == ["thinned out from 10 to 5 Hz"]
    other = ImportSettings(instruction="juggle")
    with pytest.raises(SourceError, match="instruction 'juggle' is none of"):
        take(tmp_path / "b.hdf5", tmp_path / "c", other, task=task)


def test_held_out_episodes_begin_elsewhere(tmp_path):
    ids = [0, 0, 1, 1, 2, 2, 3, 3]
    source = write_wmpo(tmp_path / "arm.tar", records(8), state_ids=ids)
    settings = ImportSettings(chunk=4, image_size=32, instruction=SENTENCE, control_hz=10, holdout=0.25)
    report = take(source, tmp_path / "out", settings)
    kept, held = EpisodeStore(tmp_path / "out").load(), EpisodeStore(tmp_path / "out" / "held-out").load()
    assert (len(kept), len(held), report.held_out) == (6, 2, 2)
    assert {e.meta["state_id"] for e in kept}.isdisjoint({e.meta["state_id"] for e in held})
    assert read_task(tmp_path / "out" / "held-out") == read_task(tmp_path / "out")


def test_faulty_episodes_are_skipped_with_their_reason(tmp_path):
    import h5py

    source = write_robomimic(tmp_path / "arm.hdf5", records(7))
    with h5py.File(source, "a") as file:
        data = file["data"]
        data["demo_0/actions"][2, 1] = np.nan
        del data["demo_1/actions"]
        del data["demo_2/obs/agentview_image"], data["demo_2/next_obs"]
        data["demo_3"].attrs["ep_meta"] = "{not json"
        del data["demo_4/actions"]
        data["demo_4/actions"] = np.zeros((5, 2))
    report = take(source, tmp_path / "out")
    reasons = {s["episode"]: s["reason"] for s in report.skipped}
    assert "nan at step 2, dimension 1" in reasons["demo_0"] and "no 'actions'" in reasons["demo_1"]
    assert "neither images" in reasons["demo_2"] and "JSON" in reasons["demo_3"]
    assert reasons["demo_4"] == "2 numbers per action instead of 3"
    assert report.imported == 2 and len(EpisodeStore(tmp_path / "out")) == 2
    assert read_json(tmp_path / "out" / "import.json")["report"]["skipped"] == report.skipped


def test_interrupted_import_goes_on(tmp_path, monkeypatch):
    source = write_robomimic(tmp_path / "arm.hdf5", records(5))
    append, left = EpisodeStore.append, [3]

    def interrupted(store, episode):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return append(store, episode)

    with monkeypatch.context() as patch:
        patch.setattr(EpisodeStore, "append", interrupted)
        with pytest.raises(KeyboardInterrupt):
            take(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()

    def interrupted_at_once(store, episode=None):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(EpisodeStore, "append", interrupted_at_once)
        with pytest.raises(KeyboardInterrupt):
            take(source, tmp_path / "out")
    assert len(EpisodeStore(tmp_path / ".out.importing")) == 3  # still there
    with pytest.raises(ValueError, match="other settings"):
        take(source, tmp_path / "out", ImportSettings(chunk=2, image_size=32))
    report = take(source, tmp_path / "out")
    assert report.imported == 5 and not list(tmp_path.glob(".out*"))
    take(source, tmp_path / "whole")
    for ours, theirs in zip(EpisodeStore(tmp_path / "out"), EpisodeStore(tmp_path / "whole"), strict=True):
        assert np.array_equal(ours.frames, theirs.frames) and ours.meta == theirs.meta
    assert take(source, tmp_path / "out") == report  # done already
    with pytest.raises(ValueError, match="is not this import"):
        take(source, tmp_path / "out", ImportSettings(chunk=2, image_size=32))


def test_full_disk_leaves_nothing_half_imported(tmp_path, monkeypatch):
    def full(store, episode):
        raise WriteError(28, "No space left on device")

    monkeypatch.setattr(EpisodeStore, "append", full)
    with pytest.raises(WriteError, match="No space"):
        take(write_robomimic(tmp_path / "arm.hdf5", records(3)), tmp_path / "out")
    assert_nothing_left(tmp_path / "out")


def files_of(source: Path) -> list[Path]:
    return [source] if source.is_file() else sorted(f for f in source.rglob("*") if f.is_file())


@pytest.mark.parametrize("kind", FORMATS)
def test_random_bytes_in_place_of_every_file(tmp_path, kind):
    whole = write(kind, tmp_path, records(2))
    for i, file in enumerate(files_of(whole)):
        damaged = tmp_path / f"damaged-{i}" / whole.name
        damaged.parent.mkdir()
        (shutil.copytree if whole.is_dir() else shutil.copy)(whole, damaged)
        spoilt = damaged / file.relative_to(whole)
        spoilt.write_bytes(np.random.default_rng(i).bytes(10_000))
        out = tmp_path / f"out-{i}"
        if kind == "lerobot-v2.1" and "episode_" in file.name:  # one episode of several
            report = take(damaged, out)
            assert report.imported == 1 and len(report.skipped) == 1 == len(EpisodeStore(out))
            continue
        if file.name in ("stats.json", "tasks.parquet"):  # not needed
            assert take(damaged, out).imported == 2
            continue
        with pytest.raises(ArtifactError) as error:
            take(damaged, out)
        assert whole.name in str(error.value)
        assert_nothing_left(out)


@pytest.mark.parametrize("share", [0.1, 0.6, 0.95])
@pytest.mark.parametrize("kind", FORMATS)
def test_truncated_files(tmp_path, kind, share):
    whole = write(kind, tmp_path, records(3))
    large = max(files_of(whole), key=lambda f: (f.suffix == ".mp4", f.stat().st_size))
    data = large.read_bytes()
    large.write_bytes(data[: int(share * len(data))])
    out = tmp_path / "out"
    try:
        report = take(whole, out)
    except SourceError as error:
        assert "arm" in str(error)
        assert_nothing_left(out)
    else:
        assert report.imported == len(EpisodeStore(out).load()) > 0
        assert kind in ("lerobot-v2.1", "wmpo") and (report.skipped or report.notes)


def test_random_damage_never_crashes(tmp_path):
    for kind in ("robomimic", "wmpo"):
        whole = write(kind, tmp_path, records(2))
        data = np.frombuffer(whole.read_bytes(), np.uint8)
        for seed in range(15):
            rng = np.random.default_rng(seed)
            spoilt = data.copy()
            places = rng.integers(0, len(spoilt) if seed % 2 else 3000, 8)
            spoilt[places] = rng.integers(0, 256, 8)
            damaged = tmp_path / f"damaged{whole.suffix}"
            damaged.write_bytes(spoilt.tobytes())
            out = tmp_path / f"{kind}-{seed}"
            try:
                report = take(damaged, out)
            except ValueError:  # SourceError, or settings that the damage made impossible
                assert not out.exists()
            else:
                assert report.imported == len(EpisodeStore(out).load())


def test_paths_out_of_the_data_set_are_refused(tmp_path):
    root = write_lerobot_v21(tmp_path / "arm", records(2))
    info = read_json(root / "meta" / "info.json")
    info["data_path"] = "../../etc/passwd"
    (root / "meta" / "info.json").write_text(json.dumps(info))
    with pytest.raises(SourceError, match="lies outside the data set"):
        take(root, tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "message"),
    [("nowhere", "does not exist"), ("notes.txt", "Unsupported format"), ("empty", "Unsupported format")],
)
def test_what_is_no_data_set(tmp_path, name, message):
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceError, match=message):
        take(tmp_path / name, tmp_path / "out")


def test_versions_of_lerobot(tmp_path):
    root = write_lerobot_v21(tmp_path / "arm", records(2))
    info = read_json(root / "meta" / "info.json")
    (root / "meta" / "info.json").write_text(json.dumps({**info, "codebase_version": "v1.6"}))
    with pytest.raises(SourceError, match=r"'v1.6'.*v2.1, v3.0"):
        open_source(root)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"holdout": 1.0}, "holdout"),
        ({"image_size": 60}, "multiple of 8"),
        ({"chunk": 0}, "chunk must be at least 1"),
        ({"control_hz": 0.0}, "control_hz must be positive"),
    ],
)
def test_impossible_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        ImportSettings(**settings)


def test_what_the_data_does_not_say_has_to_be_given(tmp_path):
    source = write_wmpo(tmp_path / "arm.tar", records(3))
    with pytest.raises(ValueError, match="--instruction"):
        take(source, tmp_path / "out", ImportSettings(chunk=4, image_size=32))
    with pytest.raises(ValueError, match="--control-hz"):
        take(source, tmp_path / "out", ImportSettings(chunk=4, image_size=32, instruction=SENTENCE))
    with pytest.raises(ValueError, match="'move-block' is a known task"):
        take(source, tmp_path / "out", ImportSettings(instruction=SENTENCE, control_hz=10, name="move-block"))
    assert_nothing_left(tmp_path / "out")


def test_what_names_no_task(tmp_path):
    with pytest.raises(ValueError, match="names no task"):
        find_task(tmp_path)
    (tmp_path / "task.json").write_text("[1]")
    with pytest.raises(ValueError, match="does not describe a task"):
        find_task(tmp_path)
    assert find_task("move-block") is get_task("move-block")

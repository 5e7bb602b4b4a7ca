"""Recordings as people have them: other names, missing columns, other pictures, several files, labels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from recordings import SENTENCE, encode_png, records, write_lerobot_v21, write_robomimic

from wmpo_gym.data import EpisodeStore
from wmpo_gym.data.importers import ImportReport, ImportSettings, SourceError, import_dataset
from wmpo_gym.data.task_file import read_task

pytest.importorskip("h5py")
pa = pytest.importorskip("pyarrow")
FPS = 10


def take(source: Path, out: Path, **settings: Any) -> ImportReport:
    task = settings.pop("task", None)
    if task is None:
        settings = {"chunk": 4, "image_size": 32, **settings}
    return import_dataset(source, out, ImportSettings(**settings), task=task, progress=False)


def write_v3(
    root: Path,
    episodes: list[dict],
    *,
    columns: Any = lambda e, rows: {"action": rows(e["actions"])},
    drop: tuple[str, ...] = (),
    tasks: tuple[str, ...] = (SENTENCE,),
    data_path: str = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
    features: dict | None = None,
) -> Path:
    """A LeRobotDataset v3 with pictures in the rows; ``drop`` leaves out columns of meta/episodes."""
    import pyarrow.parquet as pq

    def rows(values: np.ndarray) -> list:
        return np.concatenate([values, values[-1:]]).astype(np.float32).tolist()

    table: dict[str, list] = {}
    described = []
    for i, e in enumerate(episodes):
        n = len(e["frames"])
        part = {
            "episode_index": [i] * n,
            "frame_index": list(range(n)),
            "task_index": [i % len(tasks)] * n,
            "observation.images.cam": [{"bytes": encode_png(f), "path": None} for f in e["frames"]],
            **columns(e, rows),
        }
        for name, values in part.items():
            table.setdefault(name, []).extend(values)
        row = {
            "episode_index": i,
            "length": n,
            "tasks": [tasks[i % len(tasks)]],
            "data/chunk_index": 0,
            "data/file_index": 0,
        }
        described.append({k: v for k, v in row.items() if k not in drop})
    for folder in ("meta/episodes/chunk-000", "data/chunk-000"):
        (root / folder).mkdir(parents=True)
    numbers = {k: {"dtype": "float32", "shape": [1]} for k in columns(episodes[0], rows)}
    camera = {"observation.images.cam": {"dtype": "image", "shape": [32, 32, 3]}}
    info = {
        "codebase_version": "v3.0", "fps": FPS, "video_path": None, "data_path": data_path,
        "features": {**camera, **numbers, **(features or {})},
    }  # fmt: skip
    (root / "meta/info.json").write_text(json.dumps(info))
    pq.write_table(pa.table(table), root / "data/chunk-000/file-000.parquet")
    pq.write_table(pa.Table.from_pylist(described), root / "meta/episodes/chunk-000/file-000.parquet")
    named = {"task_index": list(range(len(tasks))), "task": list(tasks)}
    pq.write_table(pa.table(named), root / "meta/tasks.parquet")
    return root


# -- columns that never change say nothing -------------------------------------------------------------------
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_rewards_that_never_change_are_no_labels(tmp_path: Path, value: float) -> None:
    import h5py

    source = write_robomimic(tmp_path / "a.hdf5", records(3))
    with h5py.File(source, "a") as file:
        for demo in file["data"].values():
            demo["rewards"][:] = value
    report = take(source, tmp_path / "plain")
    assert report.outcomes == {"unlabelled": 3} and "taken as not recorded" in report.notes[0]
    assert take(source, tmp_path / "good", assume_success=True).outcomes == {"success": 3}
    assert take(source, tmp_path / "bad", assume_failure=True).outcomes == {"failure": 3}
    steps = [e.n_steps for e in EpisodeStore(tmp_path / "good").load()]
    assert steps == [len(e["actions"]) for e in records(3)]


@pytest.mark.parametrize("column", ["next.success", "next.reward"])
def test_constant_columns_of_lerobot_likewise(tmp_path: Path, column: str) -> None:
    def columns(e: dict, rows: Any) -> dict:
        return {"action": rows(e["actions"]), column: [0.0] * len(e["frames"])}

    report = take(write_v3(tmp_path / "a", records(3), columns=columns), tmp_path / "out")
    assert report.outcomes == {"unlabelled": 3} and "--assume-success" in report.notes[0]


def test_an_assumption_without_effect_is_reported(tmp_path: Path) -> None:
    report = take(write_robomimic(tmp_path / "a.hdf5", records(6)), tmp_path / "out", assume_success=True)
    assert any("changed nothing" in note for note in report.notes)
    assert report.outcomes["failure"] > 0


def test_null_successes_give_way_to_rewards(tmp_path: Path) -> None:
    def columns(e: dict, rows: Any) -> dict:
        n = len(e["frames"])
        done = [0.0] * (n - 2) + [float(e["success"])] * 2
        return {"action": rows(e["actions"]), "next.success": [None] * n, "next.reward": done}

    source = write_v3(tmp_path / "a", records(6), columns=columns)
    take(source, tmp_path / "out")
    found = [e.success for e in EpisodeStore(tmp_path / "out").load()]
    assert found == [e["success"] for e in records(6)]


# -- labels --------------------------------------------------------------------------------------------------
def test_labels_from_a_file_and_by_number(tmp_path: Path) -> None:
    source = write_robomimic(tmp_path / "a.hdf5", records(4), rewards=False)
    (tmp_path / "labels.csv").write_text("episode,success\n0,1\ndemo_1,0\n2,success\n")
    report = take(source, tmp_path / "out", labels=tmp_path / "labels.csv", failed=(3,))
    assert [e.success for e in EpisodeStore(tmp_path / "out").load()] == [True, False, True, False]
    assert report.outcomes == {"success": 2, "failure": 2}
    report = take(source, tmp_path / "rest", failed=(3,), assume_success=True)
    assert report.outcomes == {"success": 3, "failure": 1}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("episode,success\n9,1\n", "no episode '9'"),
        ("episode,success\n1,maybe\n", "line 2: success is 'maybe'"),
        ("name,ok\n1,1\n", "needs the columns"),
    ],
)
def test_faulty_labels_are_named_and_nothing_is_left(tmp_path: Path, text: str, message: str) -> None:
    source = write_robomimic(tmp_path / "a.hdf5", records(3), rewards=False)
    (tmp_path / "labels.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        take(source, tmp_path / "out", labels=tmp_path / "labels.csv")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.hdf5", "labels.csv"]
    (tmp_path / "labels.csv").write_text("episode,success\n1,1\n")
    assert take(source, tmp_path / "out", labels=tmp_path / "labels.csv").outcomes["success"] == 1


def test_the_success_attribute_of_a_demo(tmp_path: Path) -> None:
    import h5py

    source = write_robomimic(tmp_path / "a.hdf5", records(3), rewards=False)
    with h5py.File(source, "a") as file:
        for i in range(3):
            file[f"data/demo_{i}"].attrs["success"] = i == 1
    take(source, tmp_path / "out")
    assert [e.success for e in EpisodeStore(tmp_path / "out").load()] == [False, True, False]


# -- rates and options ---------------------------------------------------------------------------------------
def test_a_lower_rate_thins_pictures_and_actions(tmp_path: Path) -> None:
    real = records(4)
    source = write_robomimic(tmp_path / "a.hdf5", real)
    report = take(source, tmp_path / "out", control_hz=5)
    assert read_task(tmp_path / "out").control_hz == 5 and "thinned out from 10 to 5 Hz" in report.notes[0]
    for episode, e in zip(EpisodeStore(tmp_path / "out").load(), real, strict=True):
        assert episode.success == e["success"]
        assert np.array_equal(episode.frames, e["frames"][::2][: len(episode.frames)])
        assert episode.n_steps == min(-(-len(e["actions"]) // 2), -(-len(e["frames"]) // 2) - 1)


@pytest.mark.parametrize("hz", [3.0, 20.0])
def test_a_rate_that_does_not_divide_is_refused(tmp_path: Path, hz: float) -> None:
    source = write_robomimic(tmp_path / "a.hdf5", records(3))
    with pytest.raises(ValueError, match="recorded at 10 Hz.*choose one of 10, 5"):
        take(source, tmp_path / "out", control_hz=hz)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "option", [{"chunk": 2}, {"image_size": 64}, {"horizon": 200}, {"name": "other"}, {"control_hz": 5.0}]
)
def test_options_that_contradict_the_task_are_refused(tmp_path: Path, option: dict) -> None:
    source = write_robomimic(tmp_path / "a.hdf5", records(3))
    take(source, tmp_path / "first")
    with pytest.raises(ValueError, match="contradicts --task"):
        take(source, tmp_path / "again", task=read_task(tmp_path / "first"), **option)
    assert take(source, tmp_path / "again", task=read_task(tmp_path / "first"), chunk=4).imported == 3


@pytest.mark.parametrize("settings", [{"filter_key": "train"}, {"flip": "vertical", "camera": "front"}])
def test_options_without_meaning_for_a_format_are_refused(tmp_path: Path, settings: dict) -> None:
    source = write_lerobot_v21(tmp_path / "arm", records(2))
    if "filter_key" in settings:
        with pytest.raises(SourceError, match="--filter-key has no meaning for lerobot"):
            take(source, tmp_path / "out", **settings)
    else:
        take(source, tmp_path / "out", **settings)
        (first, *_) = EpisodeStore(tmp_path / "out").load()
        assert np.array_equal(first.frames[0], records(1)[0]["frames"][0][::-1])


@pytest.mark.parametrize(
    "settings",
    [
        {"assume_success": True, "assume_failure": True},
        {"instruction": "a", "missing_instruction": "b"},
        {"action_columns": ("a",), "action_from_state": True},
    ],
)
def test_contradictions_are_refused(settings: dict) -> None:
    with pytest.raises(ValueError, match="give one"):
        ImportSettings(**settings)


# -- LeRobot as found ----------------------------------------------------------------------------------------
def test_actions_under_other_names(tmp_path: Path) -> None:
    real = records(3)
    for i, name in enumerate(("actions", "actions.joint_position")):
        source = write_v3(tmp_path / f"{i}", real, columns=lambda e, r, n=name: {n: r(e["actions"])})
        assert take(source, tmp_path / f"out{i}").imported == 3


def test_split_action_columns_are_listed_and_joined(tmp_path: Path) -> None:
    def columns(e: dict, rows: Any) -> dict:
        return {"action.arm": rows(e["actions"][:, :2]), "action.gripper": rows(e["actions"][:, 2:])}

    source = write_v3(tmp_path / "a", records(3), columns=columns)
    with pytest.raises(SourceError, match="action.arm, action.gripper.*--action-columns"):
        take(source, tmp_path / "out")
    take(source, tmp_path / "out", action_columns=("action.arm", "action.gripper"))
    whole = take(write_v3(tmp_path / "b", records(3)), tmp_path / "whole")
    assert whole.imported == 3
    for one, other in zip(EpisodeStore(tmp_path / "out"), EpisodeStore(tmp_path / "whole"), strict=True):
        np.testing.assert_allclose(one.actions, other.actions, atol=1e-6)
    with pytest.raises(SourceError, match="no column 'arm'"):
        take(source, tmp_path / "again", action_columns=("arm",))


def test_the_next_state_as_action_on_request(tmp_path: Path) -> None:
    def columns(e: dict, rows: Any) -> dict:
        return {"observation.states.joint_position": e["places"].tolist()}

    source = write_v3(tmp_path / "a", records(3), columns=columns)
    with pytest.raises(SourceError, match="--action-from-state"):
        take(source, tmp_path / "out")
    take(source, tmp_path / "out", action_from_state=True)
    for episode, e in zip(EpisodeStore(tmp_path / "out"), records(3), strict=True):
        np.testing.assert_array_equal(episode.proprio, e["places"][: len(episode.frames)])
        assert episode.actions.shape[1] == 2


def test_descriptions_without_optional_columns(tmp_path: Path) -> None:
    tasks = ("go left", "go right")
    source = write_v3(
        tmp_path / "a",
        records(4),
        drop=("tasks", "data/chunk_index", "data/file_index"),
        tasks=tasks,
        data_path="data/chunk-{episode_chunk:03d}/file-{episode_file:03d}.parquet",
    )
    take(source, tmp_path / "out")
    assert [e.instruction for e in EpisodeStore(tmp_path / "out")] == [tasks[i % 2] for i in range(4)]
    take(source, tmp_path / "one", instruction="go")
    assert read_task(tmp_path / "one").instructions == ("go",)


def test_episodes_without_a_sentence_among_others(tmp_path: Path) -> None:
    source = write_v3(tmp_path / "a", records(4), tasks=("go left", ""))
    with pytest.raises(ValueError, match="2 of 4 episodes.*--missing-instruction"):
        take(source, tmp_path / "out")
    take(source, tmp_path / "out", missing_instruction="go")
    assert [e.instruction for e in EpisodeStore(tmp_path / "out")] == ["go left", "go"] * 2


def test_several_sentences_in_one_episode_are_noted(tmp_path: Path) -> None:
    source = write_lerobot_v21(tmp_path / "a", records(2))
    file = source / "meta" / "episodes.jsonl"
    file.write_text(file.read_text().replace(f'["{SENTENCE}"]', '["reach", "grasp"]'))
    report = take(source, tmp_path / "out")
    assert read_task(tmp_path / "out").instructions == ("reach",)
    assert any("several sentences" in note for note in report.notes)


def test_depth_is_no_camera(tmp_path: Path) -> None:
    depth = {"observation.images.depth": {"dtype": "image", "shape": [32, 32, 1]}}
    assert take(write_v3(tmp_path / "a", records(2), features=depth), tmp_path / "out").imported == 2


def test_pointers_of_git_lfs_are_called_by_their_name(tmp_path: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    (tmp_path / "a.hdf5").write_text(pointer)
    with pytest.raises(SourceError, match="git lfs pull"):
        take(tmp_path / "a.hdf5", tmp_path / "out")
    source = write_v3(tmp_path / "b", records(2))
    (source / "data/chunk-000/file-000.parquet").write_text(pointer)
    with pytest.raises(SourceError, match="git lfs pull"):
        take(source, tmp_path / "out")


def test_the_name_of_a_hub_data_set_gets_a_hint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SourceError, match="hf download lerobot/pusht"):
        import_dataset("lerobot/pusht", tmp_path / "out", progress=False)


# -- robomimic and its relatives -----------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["float 1", "float 255", "channels first", "alpha"])
def test_pictures_of_other_types(tmp_path: Path, kind: str) -> None:
    import h5py

    change = {
        "float 1": lambda p: (p / 255).astype(np.float32),
        "float 255": lambda p: p.astype(np.float32),
        "channels first": lambda p: np.moveaxis(p, -1, 1),
        "alpha": lambda p: np.concatenate([p, np.full_like(p[..., :1], 255)], axis=-1),
    }[kind]
    real = records(2)
    source = write_robomimic(tmp_path / "a.hdf5", real)
    with h5py.File(source, "a") as file:
        for i in range(2):
            for group in ("obs", "next_obs"):
                images = file[f"data/demo_{i}/{group}/agentview_image"][()]
                del file[f"data/demo_{i}/{group}/agentview_image"]
                file[f"data/demo_{i}/{group}/agentview_image"] = change(images)
    take(source, tmp_path / "out", camera="agentview")
    for episode, e in zip(EpisodeStore(tmp_path / "out"), real, strict=True):
        assert np.array_equal(episode.frames, e["frames"][: len(episode.frames)])


def test_pictures_that_cannot_be_used_are_described(tmp_path: Path) -> None:
    import h5py

    source = write_robomimic(tmp_path / "a.hdf5", records(1))
    with h5py.File(source, "a") as file:
        for group in ("obs", "next_obs"):
            for name in ("agentview_image", "wrist_image"):
                if name in file[f"data/demo_0/{group}"]:
                    del file[f"data/demo_0/{group}/{name}"]
        file["data/demo_0/obs/agentview_depth"] = np.zeros((3, 32, 32, 1), np.float32)
    with pytest.raises(SourceError, match=r"obs holds agentview_depth float32 \(3, 32, 32, 1\)"):
        take(source, tmp_path / "out")


def test_short_and_ambiguous_names_of_cameras(tmp_path: Path) -> None:
    import h5py

    source = write_robomimic(tmp_path / "a.hdf5", records(2), next_obs=False)
    with h5py.File(source, "a") as file:
        for demo in file["data"].values():
            for old, new in (("agentview_image", "agentview_rgb"), ("wrist_image", "eye_in_hand_rgb")):
                demo["obs"].move(old, new)
    assert take(source, tmp_path / "out", camera="agentview").imported == 2
    with pytest.raises(SourceError, match="'rgb' is ambiguous; it may be agentview_rgb, eye_in_hand_rgb"):
        take(source, tmp_path / "again", camera="rgb")


def test_filter_keys_choose_demos(tmp_path: Path) -> None:
    import h5py

    source = write_robomimic(tmp_path / "a.hdf5", records(4))
    with h5py.File(source, "a") as file:
        file["mask/train"] = np.array([b"demo_0", b"demo_2"])
    take(source, tmp_path / "out", filter_key="train")
    assert [e.meta["source_key"] for e in EpisodeStore(tmp_path / "out")] == ["demo_0", "demo_2"]
    with pytest.raises(SourceError, match="no filter key 'valid'; it has train"):
        take(source, tmp_path / "again", filter_key="valid")


def test_a_directory_of_files_is_one_task_of_several_sentences(tmp_path: Path) -> None:
    import h5py

    (tmp_path / "suite").mkdir()
    for name, sentence in (("a", "put the bowl on the stove"), ("b", "open the drawer")):
        source = write_robomimic(tmp_path / "suite" / f"{name}.hdf5", records(2))
        with h5py.File(source, "a") as file:
            for demo in file["data"].values():
                del demo.attrs["ep_meta"]
            file["data"].attrs["problem_info"] = json.dumps({"language_instruction": sentence})
    report = take(tmp_path / "suite", tmp_path / "out")
    assert report.imported == 4
    assert read_task(tmp_path / "out").instructions == ("put the bowl on the stove", "open the drawer")
    assert [e.task_id for e in EpisodeStore(tmp_path / "out")] == [0, 0, 1, 1]
    assert EpisodeStore(tmp_path / "out").load()[2].meta["source_key"] == "b:demo_0"


def test_robosuites_own_recordings_say_their_rate(tmp_path: Path) -> None:
    import h5py

    from wmpo_gym.data.importers import open_source

    source = write_robomimic(tmp_path / "a.hdf5", records(1))
    with h5py.File(source, "a") as file:
        del file["data"].attrs["env_args"]
        file["data"].attrs["env"] = "Lift"
        file["data"].attrs["env_info"] = json.dumps({"env_name": "Lift", "control_freq": 20})
    with open_source(source, camera="agentview") as opened:
        assert opened.control_hz == 20
        assert opened.env_args["env_name"] == "Lift"  # type: ignore[attr-defined]


def test_a_task_description_is_a_sentence(tmp_path: Path) -> None:
    import h5py

    source = write_robomimic(tmp_path / "a.hdf5", records(1))
    with h5py.File(source, "a") as file:
        del file["data/demo_0"].attrs["ep_meta"]
        file["data/demo_0"].attrs["task_description"] = "close the lid"
    take(source, tmp_path / "out")
    assert read_task(tmp_path / "out").instructions == ("close the lid",)

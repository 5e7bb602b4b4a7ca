"""A world from recordings alone: imported, learned, judged, practised in, served, and refreshed with more."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from recordings import SENTENCE, record, write_lerobot_v21, write_robomimic

from wmpo_gym.cli.main import main
from wmpo_gym.data import EpisodeStore, read_json
from wmpo_gym.data.importers import ImportSettings, import_dataset
from wmpo_gym.data.statistics import from_unit
from wmpo_gym.data.task_file import find_task
from wmpo_gym.policies.serving import PolicyClient, PolicyServer
from wmpo_gym.world.world import World

pytest.importorskip("h5py")
pytest.importorskip("pyarrow")
pytest.importorskip("stable_baselines3")
pytest.importorskip("transformers")

NETWORK = {"widths": [8, 16], "blocks": 1, "cond_dim": 16, "detail": 8}
STEPS = ["--steps", "4", "--batch-size", "4", "--checkpoint-every", "4", "--warmup-steps", "1"]
STEPS += ["--proprio-steps", "60"]
GRPO = ["--iterations", "1", "--n-groups", "2", "--group-size", "2"]


def wmpo(*words: object) -> int:
    return main([str(w) for w in words])


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Everything that comes before practice, each made by its command, with no simulator of the task."""
    root = tmp_path_factory.mktemp("recorded")
    write_robomimic(root / "my-arm.hdf5", [record(seed) for seed in range(20)], places=True)
    (root / "network.json").write_text(json.dumps(NETWORK))
    options = ["--holdout", "0.3", "--chunk", "4", "--image-size", "32"]
    assert wmpo("import", root / "my-arm.hdf5", "--out", root / "robot", *options) == 0
    episodes = ["--episodes", root / "robot"]
    assert wmpo("train", "sft", *episodes, "--out", root / "policy", "--steps", 3, "--batch", 8) == 0
    learn = ["train", "world-model", *episodes, "--network-config", root / "network.json", *STEPS]
    assert wmpo(*learn, "--out", root / "world") == 0
    judge = ["train", "reward", *episodes, "--world", root / "world", "--out", root / "world", "--steps", 3]
    assert wmpo(*judge) == 0
    return root


def test_what_cannot_be_read_is_one_line(tmp_path, capsys):
    for name in ("noise.hdf5", "noise.tar", "noise/meta/info.json"):
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(np.random.default_rng(0).bytes(10_000))
        source = tmp_path / name.split("/")[0]
        assert wmpo("import", source, "--out", tmp_path / "out") == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and str(source) in err
        assert not list(tmp_path.glob("*out*"))


def test_the_data_defines_the_task(made):
    task = World.from_pretrained(made / "world").task
    assert task == find_task(made / "robot") == find_task(made / "world")
    assert task.name == "my-arm" and task.instructions == (SENTENCE,)
    assert read_json(made / "policy" / "policy.json")["meta"]["task"] == "my-arm"


def test_the_world_follows_the_recorded_state(made):
    world = World.from_pretrained(made / "world")
    assert len(world.network.motion.mean) == 2  # places of the dot
    assert world.card["world_model"]["motion"].keys() == {"points", "reader", "follow"}


def test_gates_are_measured_on_held_out_recordings(made, capsys):
    command = ["validate", "--world", made / "world", "--policy", made / "policy"]
    assert wmpo(*command) == 2 and "--recordings" in capsys.readouterr().err
    status = wmpo(*command, "--recordings", made / "robot" / "held-out")
    printed, gates = capsys.readouterr().out, read_json(made / "world" / "config.json")["card"]["gates"]
    assert printed.count("not measurable") == 2
    assert gates["physics"]["passed"] is None and gates["learnable"]["passed"] is None
    assert gates["faithful"]["passed"] is False  # after four steps of training
    assert (
        gates["faithful"]["figures"]["explained_change"] < 0.8 and "psnr_db" in gates["faithful"]["figures"]
    )
    assert "the recorded outcomes" in gates["honest"]["explanation"] and status == 1


def test_practice_and_service(made, tmp_path, monkeypatch, capsys):
    practise = ["train", "grpo", "--policy", made / "policy", "--world", made / "world", *GRPO]
    assert wmpo(*practise, "--out", tmp_path / "better") == 0
    budget = read_json(tmp_path / "better" / "policy.json")["meta"]["budget"]
    assert budget["imagined_frames"] > 0 and budget["real_steps"] == 0
    task, held = find_task(made / "robot"), EpisodeStore(made / "robot" / "held-out").load()
    answers = []

    def ask_then_interrupt(server):
        with PolicyClient(server.address) as client:
            assert client.describe()["instructions"] == [SENTENCE]
            answers.append(client.act(held[0].frames[0]))
        raise KeyboardInterrupt

    monkeypatch.setattr(PolicyServer, "wait", ask_then_interrupt)
    assert wmpo("serve", "--policy", tmp_path / "better", "--address", f"unix:{tmp_path / 'socket'}") == 0
    assert "'my-arm' (4 actions of 3 numbers at 10 Hz)" in capsys.readouterr().out
    low, high = np.array(task.action_low), np.array(task.action_high)
    assert answers[0].shape == (4, 3)
    assert (answers[0] >= low - 1e-6).all() and (answers[0] <= high + 1e-6).all()
    assert wmpo("serve", "--policy", tmp_path / "better", "--address", "0.0.0.0:0") == 0
    assert "there is no password" in capsys.readouterr().err
    assert wmpo("serve", "--policy", tmp_path / "better", "--task", "move-block") == 2
    assert "give the task it was trained for" in capsys.readouterr().err


def test_more_recordings_refresh_the_world(made, tmp_path):
    write_lerobot_v21(tmp_path / "more", [record(seed) for seed in range(30, 36)])
    assert wmpo("import", tmp_path / "more", "--out", tmp_path / "robot-2", "--task", made / "robot") == 0
    both = ["--episodes", made / "robot", tmp_path / "robot-2"]
    refresh = ["train", "world-model", *both, "--init", made / "world", *STEPS]
    assert wmpo(*refresh, "--out", tmp_path / "world") == 0
    reward = ["train", "reward", *both, "--world", tmp_path / "world", "--out", tmp_path / "world"]
    assert wmpo(*reward, "--steps", 3) == 0
    practise = ["train", "grpo", "--policy", made / "policy", "--world", tmp_path / "world", *GRPO]
    assert wmpo(*practise, "--out", tmp_path / "better") == 0
    before, after = (World.from_pretrained(d / "world").start_frames for d in (made, tmp_path))
    assert len(after.ids) == len(before.ids) + 6 and set(before.ids) < set(after.ids)


def test_actions_scaled_otherwise_are_not_mixed(made, tmp_path, capsys):
    source = write_robomimic(tmp_path / "my-arm.hdf5", [record(seed) for seed in range(40, 44)])
    settings = ImportSettings(chunk=4, image_size=32)
    import_dataset(source, tmp_path / "other", settings, progress=False)
    command = ["train", "sft", "--episodes", made / "robot", tmp_path / "other", "--out", tmp_path / "p"]
    assert wmpo(*command) == 2
    assert "with other limits or instructions" in capsys.readouterr().err


def test_imagined_episodes_are_exported_as_such(made, tmp_path, capsys):
    where = ["--world", made / "world", "--policy", made / "policy"]
    assert wmpo("export", "--imagine", 3, *where, "--out", tmp_path / "dreams", "--codec", "lossless") == 0
    assert "3 episodes (3 imagined)" in capsys.readouterr().out
    assert wmpo("import", tmp_path / "dreams", "--out", tmp_path / "back", "--task", made / "robot") == 0
    back = EpisodeStore(tmp_path / "back").load()
    assert len(back) == 3 and all(e.meta["imagined"] for e in back)
    judge = ["validate", *where, "--recordings", tmp_path / "back"]
    assert wmpo(*judge) == 2 and "cannot judge a world" in capsys.readouterr().err


def test_recordings_are_exported_in_the_robots_units(made, tmp_path):
    assert wmpo("export", "--episodes", made / "robot", "--out", tmp_path / "out") == 0
    import pyarrow.parquet as pq

    rows = pq.read_table(tmp_path / "out" / "data").to_pydict()
    task, first = find_task(made / "robot"), EpisodeStore(made / "robot").load()[0]
    real = from_unit(first.actions, task.action_low, task.action_high)
    assert np.allclose(rows["action"][: len(real)], real, atol=1e-6)
    assert wmpo("export", "--out", tmp_path / "nothing") == 2

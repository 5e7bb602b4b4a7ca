"""Every command runs for real, at the smallest size, and survives bad input and interruption."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from wmpo_gym.bench.transformer import CPU_STDIT
from wmpo_gym.cli.main import main
from wmpo_gym.data import EpisodeStore, read_json
from wmpo_gym.rollouts.rollout import choose_start_states
from wmpo_gym.tasks import get_task

pytest.importorskip("mujoco")

TINY_NETWORK = {"widths": [8, 16], "blocks": 1, "cond_dim": 16, "detail": 8}
TINY_TRAINING = ["--steps", "4", "--batch-size", "4", "--checkpoint-every", "2", "--warmup-steps", "1"]
TINY_GRPO = ["--n-groups", "2", "--group-size", "2"]


def wmpo(*words: str | Path) -> int:
    return main([str(w) for w in words])


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Demonstrations, play, a policy, a world and its classifier, each made by its command."""
    root = tmp_path_factory.mktemp("runs")
    (root / "network.json").write_text(json.dumps(TINY_NETWORK))
    assert wmpo("collect", "--out", root / "demos", "--episodes", 16, "--aim-offset", "0.1", "0.1") == 0
    assert wmpo("collect", "--out", root / "play", "--policy", "play", "--episodes", 4) == 0
    assert (
        wmpo(
            "train", "sft", "--episodes", root / "demos", "--out", root / "policy", "--steps", 4, "--batch", 8
        )
        == 0
    )
    world_model = ["train", "world-model", "--episodes", root / "demos", "--play", root / "play"]
    options = ["--network-config", root / "network.json", "--out", root / "world", *TINY_TRAINING]
    assert wmpo(*world_model, *options) == 0
    reward = [
        "train",
        "reward",
        "--episodes",
        root / "demos",
        "--world",
        root / "world",
        "--out",
        root / "full",
    ]
    assert wmpo(*reward, "--steps", 4) == 0
    return root


def test_collect_labels_and_describes(made):
    demos, play = EpisodeStore(made / "demos").load(), EpisodeStore(made / "play").load()
    assert len(demos) == 16 and 0 < sum(e.success for e in demos) < 16
    assert [e.start_state_id for e in demos] == choose_start_states(get_task("move-block"), "train", 16, 0)
    assert len(play) == 4 and all(e.success is None for e in play)


def test_collect_goes_on_after_an_interruption(made, tmp_path, monkeypatch, capsys):
    command = ["collect", "--out", tmp_path / "demos", "--aim-offset", "0.1", "0.1", "--episodes"]
    append, left = EpisodeStore.append, [3]

    def interrupted(store, episode):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return append(store, episode)

    with monkeypatch.context() as patch:
        patch.setattr(EpisodeStore, "append", interrupted)
        assert wmpo(*command, 16) == 130
    assert "Go on with: wmpo collect" in capsys.readouterr().err
    assert len(EpisodeStore(tmp_path / "demos")) == 3
    assert wmpo(*command, 10) == 0 and wmpo(*command, 16) == 0
    for ours, theirs in zip(EpisodeStore(tmp_path / "demos"), EpisodeStore(made / "demos"), strict=True):
        assert ours.start_state_id == theirs.start_state_id
        assert np.array_equal(ours.frames, theirs.frames) and np.array_equal(ours.actions, theirs.actions)


def test_collect_does_not_mix_collections(made, capsys):
    assert wmpo("collect", "--out", made / "demos", "--episodes", 20, "--seed", 1) == 2
    assert "was begun with seed = 0, now it is 1" in " ".join(capsys.readouterr().err.split()).replace(
        "expert", ""
    )
    assert len(EpisodeStore(made / "demos")) == 16


def test_collect_with_a_policy(made, tmp_path):
    command = [
        "collect",
        "--out",
        tmp_path / "p",
        "--policy",
        made / "policy",
        "--episodes",
    ]
    assert wmpo(*command, 3) == 0 and wmpo(*command, 5) == 0
    episodes = EpisodeStore(tmp_path / "p").load()
    assert len(episodes) == 5 and len({e.start_state_id for e in episodes}) == 5
    assert all(e.meta["actor"] == str(made / "policy") for e in episodes)


def test_world_model_writes_what_it_measured(made):
    logs = made / "world.training"
    quality = read_json(logs / "quality.json")
    horizon = get_task("move-block").horizon
    assert len(quality["psnr_db"]) == len(quality["ssim"]) == len(quality["object_error_px"]) == horizon
    assert quality["step"] == 4 and sorted(p.stem for p in (logs / "samples").iterdir()) == [
        "step_000002",
        "step_000004",
    ]
    assert list(logs.glob("events.out.tfevents*"))
    card = read_json(made / "world" / "config.json")["card"]["world_model"]
    assert card["play_episodes"] == 4 and card["training"]["steps"] == 4 and "psnr_db_mean" in card["final"]


def test_world_model_can_be_aligned(made, tmp_path):
    command = ["train", "world-model", "--episodes", made / "demos", "--init", made / "world", "--holdout", 0]
    assert wmpo(*command, "--out", tmp_path / "aligned", *TINY_TRAINING) == 0
    assert read_json(tmp_path / "aligned" / "config.json")["card"]["world_model"]["init"] == str(
        made / "world"
    )
    assert wmpo(*command, "--out", tmp_path / "aligned", *TINY_TRAINING, "--learning-rate", "0.1") == 2


def test_stdit_trains_too(made, tmp_path):
    (tmp_path / "net.json").write_text(json.dumps({"hidden_size": 32, "depth": 1, "num_heads": 2}))
    command = ["train", "world-model", "--episodes", made / "demos", "--network", "stdit", "--holdout", 0]
    assert (
        wmpo(*command, "--network-config", tmp_path / "net.json", "--out", tmp_path / "w", *TINY_TRAINING)
        == 0
    )
    (tmp_path / "net.json").write_text(json.dumps({"widht": 32}))
    assert (
        wmpo(*command, "--network-config", tmp_path / "net.json", "--out", tmp_path / "v", *TINY_TRAINING)
        == 2
    )


def test_reward_trains_a_videomae_from_saved_weights(made, tmp_path):
    from wmpo_gym.reward.training import make_classifier
    from wmpo_gym.world.world import World

    model = {"image_size": 16, "patch_size": 8, "num_frames": 4, "hidden_size": 24, "num_hidden_layers": 1,
             "num_attention_heads": 2, "intermediate_size": 32}  # fmt: skip
    make_classifier("videomae", "move-block", model=model).save_pretrained(tmp_path / "start")
    command = [
        "train",
        "reward",
        "--episodes",
        made / "demos",
        "--world",
        made / "world",
        "--kind",
        "videomae",
    ]
    command += ["--init", tmp_path / "start", "--no-imagined", "--device", "cpu", "--micro-batch-size", 4]
    assert wmpo(*command, "--out", tmp_path / "full", "--steps", 2) == 0
    world = World.from_pretrained(tmp_path / "full")
    assert world.classifier.kind == "videomae" and world.card["reward"]["config"]["learning_rate"] == 1e-4
    assert wmpo(*command, "--out", tmp_path / "x", "--device", "cuda:9") == 2
    assert not (tmp_path / "x.training").exists()


def test_reward_needs_successes(made, tmp_path, capsys):
    shutil.copytree(made / "demos", tmp_path / "failures")
    for directory in EpisodeStore(tmp_path / "failures").directories():
        meta = read_json(directory / "meta.json")
        if meta["success"]:
            shutil.rmtree(directory)
    command = [
        "train",
        "reward",
        "--episodes",
        tmp_path / "failures",
        "--world",
        made / "world",
        "--out",
        tmp_path / "w",
    ]
    assert wmpo(*command, "--steps", 4) == 2
    assert "0 successes" in capsys.readouterr().err and not (tmp_path / "w").exists()
    assert len(EpisodeStore(tmp_path / "failures")) > 0


def test_grpo_in_imagination_goes_on(made, tmp_path, capsys):
    command = [
        "train",
        "grpo",
        "--policy",
        made / "policy",
        "--world",
        made / "full",
        "--out",
        tmp_path / "rl",
        *TINY_GRPO,
    ]
    assert wmpo(*command, "--iterations", 1) == 0
    assert "WARNING: The world was never validated" in capsys.readouterr().err
    assert wmpo(*command, "--iterations", 2) == 0
    meta = read_json(tmp_path / "rl" / "policy.json")["meta"]
    assert (
        meta["iterations"] == 2
        and meta["budget"]["imagined_frames"] > 0
        and meta["budget"]["real_steps"] == 0
    )
    assert len(read_json(tmp_path / "rl.training" / "history.json")) == 2
    assert wmpo(*command, "--iterations", 3, "--seed", 1) == 2


def test_adapters_are_trained_saved_and_merged(made, tmp_path, capsys):
    tuning = ["train", "sft", "--episodes", made / "demos", "--steps", 2, "--batch", 8, "--lora-rank", 2]
    assert wmpo(*tuning, "--out", tmp_path / "sft") == 2
    assert "name it with --policy" in capsys.readouterr().err
    assert wmpo(*tuning, "--policy", made / "policy", "--micro-batch", 3, "--out", tmp_path / "sft") == 0
    command = ["train", "grpo", "--policy", tmp_path / "sft", "--world", made / "full", *TINY_GRPO]
    command += ["--iterations", 1, "--offload", "--gradient-checkpointing", "--rows-at-once", 2]
    assert wmpo(*command, "--out", tmp_path / "rl") == 0
    assert wmpo(*command, "--merge", "--out", tmp_path / "merged") == 0
    for name, weights in (("sft", "adapters"), ("rl", "adapters"), ("merged", "model")):
        assert [f.stem for f in (tmp_path / name).glob("*.safetensors")] == [weights]
    assert wmpo("evaluate", "--policy", tmp_path / "rl", "--base", tmp_path / "merged", "--episodes", 4) == 0


def test_grpo_in_the_simulator(made, tmp_path):
    command = [
        "train",
        "grpo",
        "--policy",
        made / "policy",
        "--env",
        "simulated",
        "--out",
        tmp_path / "rl",
        *TINY_GRPO,
    ]
    assert wmpo(*command, "--iterations", 1) == 0
    budget = read_json(tmp_path / "rl" / "policy.json")["meta"]["budget"]
    assert budget["real_episodes"] >= 4 and budget["imagined_frames"] == 0


def test_validate_prints_and_keeps_the_gates(made, capsys):
    status = wmpo("validate", "--world", made / "full", "--policy", made / "policy", "--episodes", 4)
    gates = read_json(made / "full" / "config.json")["card"]["gates"]
    assert set(gates) == {"physics", "faithful", "honest"}
    assert status == int(any(g["passed"] is False for g in gates.values()))
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("physics", "learnable", "faithful", "honest"))


def test_validate_on_recordings(made, capsys):
    command = [
        "validate",
        "--world",
        made / "full",
        "--policy",
        made / "policy",
        "--recordings",
        made / "demos",
    ]
    assert wmpo(*command) in (0, 1)
    assert "not measurable" in capsys.readouterr().out


def test_evaluate_alone_and_paired(made, tmp_path, capsys):
    alone = ["evaluate", "--policy", made / "policy", "--episodes", 4, "--out", tmp_path / "alone"]
    assert wmpo(*alone) == 0
    results = read_json(tmp_path / "alone" / "results.json")
    assert results["wmpo"]["n"] == 4 and "n" in capsys.readouterr().out
    assert read_json(tmp_path / "alone" / "results.protocol.json")["split"] == "test"
    paired = ["--base", made / "policy", "--world", made / "full", "--out", tmp_path / "paired"]
    assert wmpo(*alone[:-2], *paired) == 0
    results = read_json(tmp_path / "paired" / "results.json")
    assert results["paired_gain"]["points"] == 0 and 0 <= results["imagined_success"] <= 1
    assert "<video" in (tmp_path / "paired" / "report.html").read_text()


def test_distill(made, tmp_path, capsys):
    command = ["train", "distill", "--world", made / "full", "--episodes", made / "demos", *TINY_TRAINING]
    few = [*command, "--out", tmp_path / "few", "--denoising-steps", "2"]
    assert wmpo(*few) == 2 and "nothing to distil" in capsys.readouterr().err
    assert not (tmp_path / "few.training").exists()
    assert wmpo(*few, "--teacher-steps", "4", "--holdout", "0.2") == 0
    printed = capsys.readouterr().out
    for needle in ("4 steps", "2 step(s), not distilled", "2 step(s), distilled", "claims that agree"):
        assert needle in printed
    config = read_json(tmp_path / "few" / "config.json")
    assert config["sampling"]["denoising_steps"] == 2
    assert config["card"]["distillation"]["teacher_steps"] == 4
    assert config["card"]["distillation"]["quality"]["4 steps"]["grey levels from many steps"] == 0.0
    assert wmpo(*few, "--teacher-steps", "6", "--holdout", "0.2") == 2
    assert "begun with teacher_steps = 4" in capsys.readouterr().err


def test_bench(made, tmp_path, capsys, monkeypatch):
    for name, value in {"hidden_size": 24, "depth": 1, "num_heads": 2}.items():
        monkeypatch.setitem(CPU_STDIT, name, value)
    command = ["bench", "--world", made / "full", "--policy", made / "policy", "--rows", "2", "--repeats", 1]
    assert wmpo(*command, "--json", tmp_path / "bench.json") == 0
    result = read_json(tmp_path / "bench.json")
    assert "glue %" in capsys.readouterr().out and result["imagined"][0]["rows"] == 2
    assert result["transformer"]["rows"] == 16 and result["ratio_to_reference_bundled"] > 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["collect", "--out", "x", "--task", "move-blok"], "Did you mean 'move-block'"),
        (["collect", "--out", "x", "--episodes", "100000"], "has 8192 start states"),
        (["train", "sft", "--episodes", "nothing", "--out", "x"], "No directory of episodes"),
        (["train", "reward", "--episodes", "x", "--world", "nowhere", "--out", "x"], "No world 'nowhere'"),
        (["evaluate", "--policy", "nowhere"], "No policy 'nowhere'"),
    ],
)
def test_bad_input_is_one_line(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1 and list(tmp_path.iterdir()) == []


def test_an_empty_store_is_named(tmp_path, capsys):
    (tmp_path / "empty" / "episode_000000").mkdir(parents=True)
    assert wmpo("train", "sft", "--episodes", tmp_path / "empty", "--out", tmp_path / "x") == 2
    assert "holds no whole episode" in capsys.readouterr().err

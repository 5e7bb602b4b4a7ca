"""``wmpo convert``: the command line on a small release."""

from __future__ import annotations

from functools import partial

import pytest

pytest.importorskip("transformers")

from wmpo_gym.cli.main import main
from wmpo_gym.convert import policy, released, world
from wmpo_gym.utils.io import read_json


@pytest.fixture
def small(release, monkeypatch):
    """The commands with the sizes of the small release in place of the published ones."""
    monkeypatch.setitem(released.RELEASED_TASKS, "coffee", release.task)
    monkeypatch.setattr(world, "convert_world", partial(world.convert_world, **release.sizes))
    monkeypatch.setattr(
        policy, "convert_policy", partial(policy.convert_policy, config=release.policy_config)
    )
    return release


def words(files, out, *more):
    paths = {name.replace("_", "-"): path for name, path in vars(files).items()}
    options = [word for name, path in paths.items() for word in (f"--{name}", str(path))]
    return ["convert", "world", "--task", "coffee", *options, "--out", str(out), *more]


def test_world(small, tmp_path, capsys):
    assert main(words(small.files, tmp_path / "world", "--context-noise", "0.05", "--round-timesteps")) == 0
    said = capsys.readouterr().out
    assert "threshold                 0.82 " in said and "(rm_threshold)" in said
    assert "context_noise             0.05                                asked for" in said
    assert "dropped 33 tensors" in said and "spatial_blocks.*.cross_attn.kv_linear.weight" in said
    sampling = read_json(tmp_path / "world/config.json")["sampling"]
    assert sampling["round_timesteps"] is True and sampling["context_noise"] == 0.05


def test_policy(small, tmp_path, capsys):
    out = str(tmp_path / "policy")
    assert main(["convert", "policy", "--task", "coffee", "--source", str(small.policy), "--out", out]) == 0
    said = capsys.readouterr().out
    assert "dropped 13 tensors (3,099 numbers)" in said and f'VLAPolicy.from_pretrained("{out}")' in said


def test_faults_are_one_line(small, tmp_path, capsys):
    small.files.statistics.write_text("{}")
    assert main(words(small.files, tmp_path / "world")) == 2
    said = capsys.readouterr().err
    assert said.startswith("wmpo: error: ") and "coffee.json does not hold" in said and said.count("\n") == 1
    assert main(["convert", "policy", "--task", "lift", "--source", "x", "--out", "y"]) == 2
    assert "No released task 'lift'" in capsys.readouterr().err
    assert main(["convert"]) == 2
    assert "did you mean `wmpo convert world` or `wmpo convert policy`" in capsys.readouterr().err

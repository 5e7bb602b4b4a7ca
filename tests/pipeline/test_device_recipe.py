"""The whole method, and the commands that measure, on a device that refuses tensors of the CPU."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_components import TINY as PUBLISHED
from test_components import no_gain

from wmpo_gym.cli.main import main
from wmpo_gym.pipeline.method import run_recipe
from wmpo_gym.policies.sft import SFTSettings
from wmpo_gym.utils.io import load_safetensors, read_json
from wmpo_gym.world.world import find_pretrained

pytestmark = pytest.mark.slow  # whole recipes, two of them twice

SMALL = replace(
    PUBLISHED,
    base_policy=None,
    sft=SFTSettings(steps=2, batch=8),
    network="conv",
    network_config={},
    denoising_steps=1,
    classifier="conv",
    classifier_config={},
)
LEARNED = {
    "small": ("base_policy", "play_world/network", "round-1/world_model", "round-1/classifier"),
    "published": ("play_world/network", "round-1/world_model", "round-1/classifier"),
}


def run_whole_recipe(device: str, kind: str, out: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("wmpo_gym.pipeline.method.measure_learnable", no_gain)
        run_recipe(SMALL if kind == "small" else PUBLISHED, out, device=device, progress=False)


def weights(directory: Path) -> dict[str, torch.Tensor]:
    """What lies in the safetensors files of a directory."""
    return {
        f"{file.name}/{name}": value
        for file in sorted(directory.rglob("*.safetensors"))
        for name, value in load_safetensors(file).items()
    }


@pytest.mark.parametrize("kind", ["small", "published"])
def test_the_recipe_on_the_device(pretend_device, tmp_path: Path, kind: str) -> None:
    device, cpu = tmp_path / "device", tmp_path / "cpu"
    pretend_device(run_whole_recipe, kind, str(device))
    run_whole_recipe("cpu", kind, str(cpu))
    for part in LEARNED[kind]:
        found, expected = weights(device / part), weights(cpu / part)
        assert found.keys() == expected.keys() and expected
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=2e-3, atol=4e-4)
    ours, theirs = (read_json(out / "results.json") for out in (device, cpu))
    for name in ("base", "wmpo"):
        assert ours[name] == theirs[name]
    assert ours["budget"]["nfe"] == theirs["budget"]["nfe"]


def measure(device: str, out: str) -> tuple[int, int]:
    """Exit statuses of ``wmpo evaluate`` and ``wmpo validate``, whose results go to ``out``."""
    world = shutil.copytree(find_pretrained("move-block", "world"), Path(out) / "world")
    common = ["--policy", "move-block", "--world", str(world), "--episodes", "4", "--device", device]
    return main(["evaluate", *common, "--out", out]), main(["validate", *common])


def test_evaluating_and_validating_on_the_device(pretend_device, tmp_path: Path) -> None:
    device, cpu = tmp_path / "device", tmp_path / "cpu"
    assert pretend_device(measure, str(device)) == measure("cpu", str(cpu))
    ours, theirs = (read_json(out / "results.json") for out in (device, cpu))
    assert ours["greedy"] == theirs["greedy"] and ours["wmpo"] == theirs["wmpo"]
    ours, theirs = (read_json(out / "world" / "config.json")["card"]["gates"] for out in (device, cpu))
    for name, gate in theirs.items():  # their figures to the printed decimals
        assert (ours[name]["passed"], ours[name]["explanation"]) == (gate["passed"], gate["explanation"])

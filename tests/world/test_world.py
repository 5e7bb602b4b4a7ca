"""World bundles: they come back as they were, and damage is named."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from wmpo_gym.tasks import MOVE_BLOCK
from wmpo_gym.utils.io import ArtifactError, sha256
from wmpo_gym.world.networks.autoencoder import PixelAutoencoder
from wmpo_gym.world.networks.conv import ConvWorldModel
from wmpo_gym.world.world import StartFrames, World


def make_world() -> World:
    from wmpo_gym.reward.training import make_classifier

    rng = np.random.default_rng(0)
    frames = StartFrames(
        rng.integers(0, 255, (3, 40, 40, 3)).astype(np.uint8), np.array([4, 7, 9]), np.array([0, 1, 1])
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = ConvWorldModel(widths=(8, 16), cond_dim=16, detail=8).eval()
    return World(
        MOVE_BLOCK,
        network,
        PixelAutoencoder(),
        make_classifier("conv", MOVE_BLOCK),
        frames,
        card={"name": "tiny"},
    )


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    make_world().save_pretrained(tmp_path / "world")
    return tmp_path / "world"


def imagined(world: World) -> np.ndarray:
    imagination = world.imagination()
    state = imagination.start(world.start_frames.frames)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn((3, *imagination.noise_shape), generator=generator)
    return np.asarray(imagination.step(state, torch.ones(3, 4, 3) * 0.5, noise)[0])


def test_a_world_comes_back_as_it_was(saved: Path) -> None:
    world, again = make_world(), World.from_pretrained(saved)
    assert np.array_equal(imagined(world), imagined(again))
    assert again.task == world.task and again.config == world.config and again.card == world.card
    for name in ("frames", "ids", "task_ids"):
        assert np.array_equal(getattr(again.start_frames, name), getattr(world.start_frames, name))


def test_half_precision_stores_what_is_in_memory(tmp_path: Path) -> None:
    world = make_world()
    world.save_pretrained(tmp_path / "small", dtype="float16")
    assert np.array_equal(imagined(world), imagined(World.from_pretrained(tmp_path / "small")))
    with pytest.raises(ValueError, match="float32"):
        world.save_pretrained(tmp_path / "odd", dtype="int8")


def test_a_world_without_a_classifier_can_be_kept(tmp_path: Path) -> None:
    world = make_world()
    world.classifier = None
    world.save_pretrained(tmp_path / "w")
    assert World.from_pretrained(tmp_path / "w").classifier is None


@pytest.mark.parametrize(
    "name",
    ["network/diffusion_pytorch_model.safetensors", "start_frames.safetensors", "network/config.json"],
)
@pytest.mark.parametrize("damage", ["cut", "edit", "remove"])
def test_damaged_files_are_named(saved: Path, name: str, damage: str) -> None:
    file = saved / name
    data = bytearray(file.read_bytes())
    if damage == "cut":
        file.write_bytes(data[: len(data) // 2])
    elif damage == "edit":
        data[-3] ^= 0x55
        file.write_bytes(data)
    else:
        file.unlink()
    with pytest.raises(ArtifactError, match=file.name):
        World.from_pretrained(saved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 99}, "format version 99"),
        ({"components": {"network": "os.system"}}, "unknown component class 'os.system'"),
        ({"sampling": {"steps": 3}}, "not a world's configuration"),
        ({"task": {}}, "not a world's configuration"),
    ],
)
def test_edited_configurations_are_refused(saved: Path, change: dict, message: str) -> None:
    file = saved / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(ArtifactError, match=message):
        World.from_pretrained(saved)


def test_weights_of_another_network_are_refused(saved: Path) -> None:
    file = saved / "network/diffusion_pytorch_model.safetensors"
    save_file({k: v for k, v in load_file(file).items() if not k.startswith("way_")}, file)
    config = json.loads((saved / "config.json").read_text())
    config["files"][str(file.relative_to(saved))] = sha256(file)
    (saved / "config.json").write_text(json.dumps(config))
    with pytest.raises(ArtifactError, match=r"lack way_stem.weight, .*way_gate.bias, which a ConvWorldModel"):
        World.from_pretrained(saved)


def test_an_unknown_world_says_what_was_tried() -> None:
    with pytest.raises(ValueError, match="No world 'move-blok'.*Did you mean 'move-block'"):
        World.from_pretrained("move-blok")


def test_start_frames_are_checked() -> None:
    frames = np.zeros((2, 40, 40, 3), np.uint8)
    with pytest.raises(ValueError, match="unique"):
        StartFrames(frames, np.array([1, 1]), np.array([0, 0]))
    with pytest.raises(ValueError, match="uint8"):
        StartFrames(frames.astype(float), np.array([1, 2]), np.array([0, 0]))

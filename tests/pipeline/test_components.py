"""Published components, named by the recipe, through the same stages; tiny, with weights made here."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from wmpo_gym.cli.main import main
from wmpo_gym.pipeline.components import check_components, new_network, policy_config
from wmpo_gym.pipeline.method import run_recipe
from wmpo_gym.pipeline.presets import PAPER, PRESETS, GRPOSettings, Recipe, recipe_for
from wmpo_gym.policies.sft import SFTSettings
from wmpo_gym.reward.videomae import VideoMAESuccessClassifier
from wmpo_gym.tasks import get_task
from wmpo_gym.world.networks.autoencoder import LatentAutoencoder, PixelAutoencoder
from wmpo_gym.world.networks.stdit import STDiT
from wmpo_gym.world.training import WorldModelTraining
from wmpo_gym.world.world import World

TWO_STEPS = WorldModelTraining(steps=2, batch_size=2, checkpoint_every=2)
TINY_STDIT: dict[str, Any] = {"hidden_size": 24, "depth": 1, "num_heads": 2, "patch_size": 2}
TINY_VIDEOMAE: dict[str, Any] = {
    "image_size": 32, "patch_size": 16, "num_frames": 2, "hidden_size": 16, "num_hidden_layers": 1,
    "num_attention_heads": 2, "intermediate_size": 16,
}  # fmt: skip
TINY = Recipe(
    base_policy="move-block",
    network="stdit",
    network_config=TINY_STDIT,
    denoising_steps=2,
    classifier="videomae",
    classifier_config=TINY_VIDEOMAE,
    demos=8,
    play=2,
    pretrain=TWO_STEPS,
    rollouts=4,
    rounds=1,
    align=TWO_STEPS,
    classifier_steps=2,
    grpo=GRPOSettings(iterations=1, n_groups=1, group_size=2),
    gate_episodes=2,
    curve_every=1,
    curve_episodes=2,
    test_episodes=2,
)


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a tiny AutoencoderKL that halves the frames."""
    from diffusers import AutoencoderKL

    directory = tmp_path_factory.mktemp("autoencoder")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae = AutoencoderKL(
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=4,
            norm_num_groups=4,
        )
    LatentAutoencoder(vae).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def trained(autoencoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run from nothing with the published components."""
    out = tmp_path_factory.mktemp("published")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("wmpo_gym.pipeline.method.measure_learnable", no_gain)
        run_recipe(replace(TINY, autoencoder=str(autoencoder)), out, progress=False)
    return out


def no_gain(*args: Any, **kwargs: Any) -> Any:
    from wmpo_gym.evaluation.gates import learnable_gate

    return learnable_gate(np.array([True, False]), np.array([True, False]), 1)


def test_published_components_run_through_the_same_stages(trained: Path) -> None:
    world = World.from_pretrained(trained / "world")
    assert isinstance(world.network, STDiT) and world.network.config.hidden_size == 24
    assert isinstance(world.autoencoder, LatentAutoencoder)
    assert isinstance(world.classifier, VideoMAESuccessClassifier)
    assert world.classifier.model.config.hidden_size == 16
    assert (world.config.context_frames, world.config.denoising_steps) == (2, 2)
    assert set(world.card["gates"]) == {"physics", "learnable", "faithful", "honest"}
    assert (trained / "report.html").exists()


def test_one_command_continues_from_converted_weights(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("wmpo_gym.pipeline.method.measure_learnable", no_gain)
    monkeypatch.setattr("wmpo_gym.pipeline.method.train_sft", lambda *a, **k: pytest.fail("fine-tuned"))
    world, policy, out = trained / "world", trained / "policy", tmp_path / "run"
    command = ["reproduce", "move-block", "--preset", "paper", "--out", str(out)]
    command += ["--recipe.pretrained-world", str(world), "--recipe.base-policy", str(policy)]
    assert main(command) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert "has context_frames 2, the recipe 4" in error and "--recipe.context-frames" in error
    assert not out.exists()
    for name, value in {**TINY_STDIT, "base_size": 40}.items():
        command += [f"--recipe.network-config.{name.replace('_', '-')}", str(value)]
    command += ["--recipe.network-config.no-predict-sigma", "--recipe.context-frames", "2"]
    command += ["--recipe.denoising-steps", "2", "--recipe.context-noise", "0.0"]
    for stage in ("align", "sft"):
        command += [f"--recipe.{stage}.steps", "2"]
    command += ["--recipe.align.batch-size", "2", "--recipe.classifier-steps", "2", "--recipe.demos", "8"]
    command += ["--recipe.classifier-demos", "--recipe.rollouts", "4", "--recipe.grpo.iterations", "1"]
    command += ["--recipe.grpo.n-groups", "1", "--recipe.grpo.group-size", "2"]
    for episodes in ("gate", "curve", "test"):
        command += [f"--recipe.{episodes}-episodes", "2"]
    assert main(command) == 0
    before, after = World.from_pretrained(world), World.from_pretrained(out / "world")
    assert isinstance(after.network, STDiT) and isinstance(after.classifier, VideoMAESuccessClassifier)
    assert not (out / "play_world").exists() and not (out / "base_policy").exists()
    change = max(
        (a - b).abs().max().item()
        for a, b in zip(after.network.parameters(), before.network.parameters(), strict=True)
    )
    assert 0 < change < 0.1  # aligned from the given weights, not from new ones
    assert (out / "results.json").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base_policy": "no such"}, "No policy 'no such'"),
        ({"pretrained_world": "no such"}, "No play 'no such'"),
        ({"network_config": {"hidden": 3}}, "network_config does not fit the network 'stdit'.*hidden"),
        ({"classifier": "conv"}, "classifier_config does not fit the classifier 'conv'"),
        ({"pretrained_world": "move-block"}, "has network 'conv', the recipe 'stdit'; set --recipe.network"),
        ({"autoencoder": "nowhere"}, "No autoencoder 'nowhere'"),
        (
            {"classifier": "conv", "classifier_config": {}, "pretrained_classifier": "x/y"},
            "set --recipe.classifier videomae",
        ),
        ({"base_policy": None, "policy_config": {"depth": 1}}, "policy_config does not fit"),
        ({"play": 10**6}, "train split"),
    ],
)
def test_what_does_not_fit_is_said_before_anything_runs(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        run_recipe(replace(TINY, **changes), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [({"device": "cuda:99"}, "no device 'cuda:99'"), ({"precision": "fp8"}, "Unknown precision 'fp8'")],
)
def test_a_device_or_precision_that_is_not_there_is_refused(
    options: dict[str, str], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        run_recipe(TINY, tmp_path / "run", progress=False, **options)
    assert not (tmp_path / "run").exists()


def test_a_latent_autoencoder_must_fit_the_frames(autoencoder: Path) -> None:
    recipe = replace(TINY, autoencoder=str(autoencoder))
    with pytest.raises(ValueError, match="Frames of 41 pixels do not fit"):
        check_components(recipe, get_task("move-block@41"))


def test_the_paper_preset_has_the_published_sizes() -> None:
    task = get_task(PAPER.task)
    latents = PixelAutoencoder()
    latents.latent_channels, latents.downscale = 4, 8  # as the SDXL autoencoder has
    with torch.device("meta"):
        network = new_network(PAPER, task, latents)
    assert sum(p.numel() for p in network.parameters()) == 907_789_856
    assert network.config.base_size == 512 and network.config.pixels_per_latent == 8
    policy = policy_config(PAPER, task)
    assert policy.projector == (8704, 4096) and (policy.chunk, policy.action_dim) == (8, 7)
    assert PAPER.grpo.n_groups * PAPER.grpo.group_size == 512
    assert PAPER.grpo.rate(1.0) == PAPER.grpo.rate(0.0) == 5e-6
    assert (PAPER.context_frames, PAPER.denoising_steps) == (4, 30)


def test_presets_are_a_table() -> None:
    assert set(PRESETS) == {"demo", "move-block", "lift", "paper"}
    assert recipe_for("square", "paper") == replace(PAPER, task="square")
    with pytest.raises(ValueError, match="Unknown preset 'papers'; choose one of demo"):
        recipe_for("lift", "papers")


def test_the_learning_rate_of_a_round_falls_linearly() -> None:
    settings = GRPOSettings(iterations=4, learning_rate=1.0)
    assert [settings.rate(left) for left in (1.0, 0.5, 0.0)] == [1.25, 0.75, 0.25]


def test_settings_survive_json(tmp_path: Path) -> None:
    from wmpo_gym.utils.config import keep_settings

    recipe = replace(PAPER, sft=SFTSettings(steps=2))
    for _ in range(2):  # the second call compares with the file
        keep_settings(tmp_path / "recipe.json", recipe.to_dict())

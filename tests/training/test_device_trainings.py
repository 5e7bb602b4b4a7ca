"""Every training runs on a device that refuses tensors of the CPU, and learns what the CPU learns."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_refusing_device import LEARNING_RATE, assert_same, check, on_cpu

from wmpo_gym.data.episode import Episode
from wmpo_gym.policies.sft import SFTSettings, train_sft
from wmpo_gym.reward.training import ClassifierTraining, make_classifier, train_classifier
from wmpo_gym.tasks import MOVE_BLOCK, get_task
from wmpo_gym.training.runtime import ComputeSettings
from wmpo_gym.world.distillation import distillation_trainer
from wmpo_gym.world.networks.autoencoder import LatentAutoencoder, PixelAutoencoder
from wmpo_gym.world.networks.conv import ConvWorldModel
from wmpo_gym.world.networks.stdit import STDiT
from wmpo_gym.world.proprio import ProprioTraining, train_proprio
from wmpo_gym.world.training import WorldModelTrainer, WorldModelTraining
from wmpo_gym.world.world import StartFrames, World, WorldConfig

SIZE = 16
TASK = replace(MOVE_BLOCK, image_size=SIZE)
ROBOT = get_task("lift-close@32")
SETTINGS = WorldModelTraining(steps=4, batch_size=4, checkpoint_every=2, learning_rate=LEARNING_RATE)
TOLERANCES = {"rtol": 2e-3, "atol": LEARNING_RATE / 5}
TINY_VIDEOMAE: dict[str, Any] = {
    "image_size": 32, "patch_size": 16, "num_frames": 2, "hidden_size": 16, "num_hidden_layers": 1,
    "num_attention_heads": 2, "intermediate_size": 16,
}  # fmt: skip


def episodes(n: int = 3, *, size: int = SIZE, state_dim: int = 0, action_dim: int = 3) -> list[Episode]:
    """Random episodes, every other one a success."""
    rng = np.random.default_rng(0)
    return [
        Episode(
            rng.integers(0, 256, (13, size, size, 3), dtype=np.uint8),
            rng.uniform(-1, 1, (12, action_dim)).astype(np.float32), i % 2 == 0, 12, i, 0,
            TASK.instructions[0],
            proprio=rng.normal(size=(13, state_dim)).astype(np.float32) if state_dim else None,
        )
        for i in range(n)
    ]  # fmt: skip


def tiny_network(kind: str, channels: int = 3, size: int = SIZE) -> ConvWorldModel | STDiT:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if kind == "conv":
            return ConvWorldModel.for_task(TASK, 0, widths=(8, 16), cond_dim=16, detail=8)
        return STDiT(
            in_channels=channels, context_frames=2, chunk=4, action_dim=3, hidden_size=24, depth=1,
            num_heads=2, patch_size=2, predict_sigma=False, pixels_per_latent=SIZE // size, base_size=SIZE,
        )  # fmt: skip


def latent_autoencoder() -> LatentAutoencoder:
    from diffusers import AutoencoderKL

    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = AutoencoderKL(
            block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, norm_num_groups=4,
        )  # fmt: skip
    return LatentAutoencoder(vae)


def trained(trainer: WorldModelTrainer) -> dict[str, Any]:
    """Weights and metrics of a training that has been run; the weights are back on the CPU."""
    trainer.train(progress=False)
    history = [{k: v for k, v in entry.items() if k != "seconds"} for entry in trainer.history]
    return {"weights": on_cpu(trainer.network.state_dict()), "history": history}


def changed(weights: dict[str, torch.Tensor], before: torch.nn.Module) -> bool:
    return any(not torch.equal(weights[name], value) for name, value in before.state_dict().items())


# -- world model -------------------------------------------------------------------------------------------
def train_world_model(device: str, kind: str, options: dict[str, Any]) -> dict[str, Any]:
    options = dict(options)
    compute = ComputeSettings(device, micro_batch_size=options.pop("micro_batch_size", None))
    autoencoder: Any = latent_autoencoder() if options.pop("latents", False) else PixelAutoencoder()
    network = tiny_network(kind, autoencoder.latent_channels, SIZE // autoencoder.downscale)
    settings = replace(SETTINGS, **options)
    return trained(
        WorldModelTrainer(
            network, autoencoder, TASK, episodes(), settings, denoising_steps=2, compute=compute
        )
    )


@pytest.mark.parametrize(
    "options",
    [
        {"muon": 0.0},
        {"muon": 4.0},
        {"muon": 0.0, "adversarial": 0.05},
        {"muon": 0.0, "adversarial": 0.05, "micro_batch_size": 3},
        {"muon": 0.0, "ema_decay": 0.0, "latents": True},
    ],
    ids=lambda options: "-".join(f"{name}={value}" for name, value in options.items()),
)
@pytest.mark.parametrize("kind", ["conv", "stdit"])
def test_training_a_world_model_on_the_device(pretend_device, kind: str, options: dict[str, Any]) -> None:
    if kind == "conv" and options.get("latents"):
        pytest.skip("the convolutional network trains on pixels")
    if kind == "stdit" and options["muon"]:
        pytest.skip("the transformer names no weights for Muon")
    result = check(pretend_device, train_world_model, kind, options, **TOLERANCES)
    channels, size = (4, SIZE // 2) if options.get("latents") else (3, SIZE)
    assert changed(result["weights"], tiny_network(kind, channels, size))


def resume_world_model(device: str, kind: str, directory: str) -> dict[str, Any]:
    """Train on a checkpoint of the first half to the end."""
    trainer = WorldModelTrainer(
        tiny_network(kind), PixelAutoencoder(), TASK, episodes(),
        replace(SETTINGS, adversarial=0.05, muon=4.0 if kind == "conv" else 0.0),
        compute=ComputeSettings(device), checkpoint_dir=directory,
    )  # fmt: skip
    record = trainer._record

    def stop_at_half(metrics: dict[str, float], writer: Any) -> dict[str, float]:
        if trainer.step == SETTINGS.steps:
            raise KeyboardInterrupt
        return record(metrics, writer)

    resumed = (Path(directory) / "state.json").exists()
    if not resumed:
        trainer._record = stop_at_half  # type: ignore[method-assign]
        with pytest.raises(KeyboardInterrupt):
            trainer.train(progress=False)
        return resume_world_model(device, kind, directory)
    return trained(trainer)


@pytest.mark.parametrize("kind", ["conv", "stdit"])
def test_resuming_on_the_device(pretend_device, tmp_path: Path, kind: str) -> None:
    options = {"adversarial": 0.05, "muon": 4.0 if kind == "conv" else 0.0}
    on_device = pretend_device(resume_world_model, kind, str(tmp_path / "device"))
    whole = pretend_device(train_resumable, kind, options)
    assert all(torch.equal(whole["weights"][k], v) for k, v in on_device["weights"].items())
    assert [entry["step"] for entry in on_device["history"]] == [2, 4]
    on_cpu_too = resume_world_model("cpu", kind, str(tmp_path / "cpu"))
    assert_same(on_device["weights"], on_cpu_too["weights"], **TOLERANCES)


def train_resumable(device: str, kind: str, options: dict[str, Any]) -> dict[str, Any]:
    return trained(
        WorldModelTrainer(
            tiny_network(kind),
            PixelAutoencoder(),
            TASK,
            episodes(),
            replace(SETTINGS, **options),
            compute=ComputeSettings(device),
        )  # fmt: skip
    )


# -- distillation ------------------------------------------------------------------------------------------
def teacher_network(kind: str) -> ConvWorldModel | STDiT:
    """A network whose output is not zero, as a new one's is."""
    network = tiny_network(kind)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(1)
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return network.eval()


def distil(device: str, kind: str, steps: int) -> dict[str, Any]:
    config = WorldConfig(context_frames=2, denoising_steps=4, context_noise=0.05)
    starts = StartFrames.from_episodes(episodes())
    teacher = World(TASK, teacher_network(kind), PixelAutoencoder(), None, starts, config)
    student, trainer = distillation_trainer(
        teacher, episodes(), replace(SETTINGS, muon=0.0), denoising_steps=steps,
        compute=ComputeSettings(device),
    )  # fmt: skip
    assert student.network is trainer.network
    return trained(trainer)


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("kind", ["conv", "stdit"])
def test_distilling_on_the_device(pretend_device, kind: str, steps: int) -> None:
    result = check(pretend_device, distil, kind, steps, **TOLERANCES)
    assert changed(result["weights"], teacher_network(kind))


# -- proprioception ----------------------------------------------------------------------------------------
def train_robot(device: str) -> dict[str, Any]:
    """Keypoints, encoder and dynamics, then a world model that draws by them."""
    network = ConvWorldModel.for_task(ROBOT, 0, state_dim=4, widths=(8, 16), cond_dim=16, detail=8)
    recorded = episodes(4, size=32, state_dim=4, action_dim=ROBOT.action_dim)
    errors = train_proprio(
        network.motion, recorded, PixelAutoencoder().encode,
        ProprioTraining(steps=4, reader_steps=4, points_steps=4, batch_size=8, frames=8),
        compute=ComputeSettings(device),
    )  # fmt: skip
    trainer = WorldModelTrainer(
        network, PixelAutoencoder(), ROBOT, [*recorded[:2], replace(recorded[2], proprio=None)],
        replace(SETTINGS, muon=0.0), compute=ComputeSettings(device),
    )  # fmt: skip
    return {"errors": errors, **trained(trainer)}


def test_training_proprioception_on_the_device(pretend_device) -> None:
    result = check(pretend_device, train_robot, rtol=5e-3, atol=3e-4)
    assert set(result["errors"]) == {"points", "reader", "follow"}


# -- classifiers -------------------------------------------------------------------------------------------
def train_reward(device: str, kind: str) -> dict[str, Any]:
    sizes = {"model": TINY_VIDEOMAE} if kind == "videomae" else {}
    config = ClassifierTraining(
        steps=4, learning_rate=LEARNING_RATE, min_holdout=2, positives=4, negatives=2, late_negatives=2,
        checkpoint_every=2, noise=0.05,
    )  # fmt: skip
    classifier, metrics = train_classifier(
        episodes(12), TASK, kind=kind, classifier=make_classifier(kind, TASK, seed=0, **sizes),
        config=config, device=device, progress=False,
    )  # fmt: skip
    return {
        "weights": on_cpu(classifier.state_dict()),
        "loss": metrics["loss"],
        "holdout": metrics["holdout"],
    }


@pytest.mark.parametrize("kind", ["conv", "videomae"])
def test_training_a_classifier_on_the_device(pretend_device, kind: str) -> None:
    check(pretend_device, train_reward, kind, **TOLERANCES)


# -- policy ------------------------------------------------------------------------------------------------
def fine_tune(device: str, lora: bool, directory: str | None = None) -> dict[str, Any]:
    losses = []
    policy = train_sft(
        episodes(4, size=40), MOVE_BLOCK, settings=SFTSettings(steps=3, batch=8, lr=LEARNING_RATE), seed=0,
        policy_kwargs={"lora": {"r": 4, "lora_alpha": 4}} if lora else {}, device=device, micro_batch=5,
        progress=lambda done, total, metrics: losses.append(metrics["loss"]), checkpoint_dir=directory,
    )  # fmt: skip
    assert policy.device.type == torch.device(device).type
    return {"weights": on_cpu(policy.state_dict()), "losses": losses}


@pytest.mark.parametrize("lora", [False, True], ids=["whole", "lora"])
def test_fine_tuning_on_the_device(pretend_device, tmp_path: Path, lora: bool) -> None:
    expected = check(pretend_device, fine_tune, lora, **TOLERANCES)
    assert len(expected["losses"]) == 3
    pretend_device(fine_tune, lora, str(tmp_path / "c"))
    again = pretend_device(fine_tune, lora, str(tmp_path / "c"))  # from the checkpoint of the last step
    assert again["losses"] == []
    assert_same(again["weights"], expected["weights"], **TOLERANCES)

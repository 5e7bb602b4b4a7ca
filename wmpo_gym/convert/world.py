"""Conversion of released world model, autoencoder, reward model and first frames to a :class:`World`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from wmpo_gym.convert.checkpoints import check_disk, check_layout, check_memory, read_weights, size_of
from wmpo_gym.convert.published import dead_layout, from_published, published_layout
from wmpo_gym.convert.released import (
    NORMALISATIONS,
    Converted,
    ReleasedTask,
    check_path_names_task,
)
from wmpo_gym.convert.statistics import ActionStatistics, read_statistics
from wmpo_gym.reward.videomae import VideoMAESuccessClassifier, rename_published_keys
from wmpo_gym.tasks import StartStates, Task
from wmpo_gym.utils.io import ArtifactError, read_json
from wmpo_gym.world.flow import RectifiedFlow
from wmpo_gym.world.networks.autoencoder import SDXL_SCALING, LatentAutoencoder
from wmpo_gym.world.networks.stdit import CONFIGS, STDiT
from wmpo_gym.world.world import StartFrames, World, WorldConfig

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

# Names that diffusers gave the attention of an autoencoder before version 0.15.
_OLD_ATTENTION = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}


@dataclass(frozen=True)
class WorldFiles:
    """Paths of the parts of a released world.

    Attributes:
        network: World-model weights: a directory, a safetensors file or index, or ``ema.pt``.
        autoencoder: Directory of the diffusers ``AutoencoderKL`` (SDXL's).
        reward: State dict of the reward model, ``videomae_TASK.pth``.
        statistics: ``dataset_statistics.json`` of the task.
        start_frames: Directory of first frames, ``ID.png``.
    """

    network: Path
    autoencoder: Path
    reward: Path
    statistics: Path
    start_frames: Path


def convert_world(
    files: WorldFiles,
    out: str | Path,
    task: ReleasedTask,
    *,
    network_config: Mapping[str, Any] | None = None,
    classifier_config: Mapping[str, Any] | None = None,
) -> Converted:
    """Write a world that :meth:`World.from_pretrained` and ``WMPO-Imagined-v0`` take.

    Everything is checked before anything is written, and the world appears complete or not at all.

    Args:
        files: The parts.
        out: Directory of the world.
        task: Settings of the task; :meth:`ReleasedTask.asked` changes them.
        network_config: Size of the network; None is the published one.
        classifier_config: Fields of ``VideoMAEConfig``; None are the published ones.

    Raises:
        ArtifactError: If a file is damaged, holds code, belongs to another task, robot or component, or does
            not fit on the disk or into memory.
        ValueError: If a setting that was asked for is out of range.
    """
    RectifiedFlow(context_noise=task.context_noise.value)
    for path in (files.network, files.reward, files.start_frames):
        check_path_names_task(path, task)
    statistics = read_statistics(files.statistics, task)
    _check_unscaled(files.statistics, statistics)
    frames = read_start_frames(files.start_frames, task.image_size.value)
    autoencoder = load_autoencoder(files.autoencoder)
    classifier = load_classifier(files.reward, task, classifier_config)
    network, dropped = load_network(files.network, task, autoencoder, network_config)

    parts: list[nn.Module] = [network, autoencoder.vae, classifier]
    total = sum(size_of(part.state_dict()) for part in parts) + frames.frames.nbytes
    check_disk(out, total)
    check_memory(total, f"Writing {out}")
    provenance = {
        "from": {name: path.name for name, path in vars(files).items()},
        "settings": task.to_dict(),
        "statistics": statistics.to_dict(),
        "dropped": _counted(dropped),
    }
    world = World(
        task=make_task(task, statistics, frames),
        network=network,
        autoencoder=autoencoder,
        classifier=classifier,
        start_frames=frames,
        config=WorldConfig(
            context_frames=task.context_frames.value,
            denoising_steps=task.denoising_steps.value,
            context_noise=task.context_noise.value,
            round_timesteps=task.round_timesteps.value,
        ),
        card={"name": task.name, "converted": provenance},
    )
    world.save_pretrained(out)
    return Converted(Path(out), sorted(dropped), sum(t.numel() for t in dropped.values()), task)


def make_task(task: ReleasedTask, statistics: ActionStatistics, frames: StartFrames) -> Task:
    """The task of a released world.

    The release knows one set of start states, which it also evaluates on: all are training ones here. Nobody
    published how near success must be, so the tolerance is 0 and the *faithful* gate cannot pass by itself.
    """
    low, high = statistics.bounds
    return Task(
        name=task.name,
        instructions=(task.prompt.value,),
        horizon=task.horizon.value,
        chunk=task.chunk.value,
        action_dim=task.action_dim.value,
        control_hz=task.control_hz.value,
        image_size=task.image_size.value,
        start_states=StartStates(train=int(frames.ids.max()) + 1, validation=0, test=0, seed=0),
        action_low=low,
        action_high=high,
        success_tolerance_px=0.0,
    )


# -- parts -------------------------------------------------------------------------------------------------
def load_network(
    path: Path, task: ReleasedTask, autoencoder: LatentAutoencoder, size: Mapping[str, Any] | None = None
) -> tuple[STDiT, dict[str, Tensor]]:
    """The world model, its weights mapped into memory, and the dead tensors it does without.

    Raises:
        ArtifactError: If the weights are not those of such a network.
    """
    state = read_weights(path)
    given, actions = state.get("action_embedder.fc.0.weight"), task.action_dim.value
    if given is None and "x_embedder.proj.weight" in state:
        raise ArtifactError(
            f"{path} knows no actions (it has no action_embedder): it is the video model that world models "
            "are trained from. Give the weights of world_models/TASK."
        )
    if given is not None and given.ndim == 2 and given.shape[1] != actions:
        raise ArtifactError(
            f"{path} was trained on actions of {given.shape[1]} dimensions, task {task.name!r} has "
            f"{actions}. It belongs to another robot."
        )
    with torch.device("meta"):
        network = STDiT(
            **(CONFIGS["xl"] if size is None else size),
            in_channels=autoencoder.latent_channels,
            action_dim=actions,
            context_frames=task.context_frames.value,
            chunk=task.chunk.value,
            context_noise=task.context_noise.value,
            pixels_per_latent=autoencoder.downscale,
        )
    layout = published_layout(network)
    dead = check_layout(state, layout, f"a released world model ({path})", dead_layout(network))
    _, live, _ = from_published(state)
    network.load_state_dict(live, assign=True)
    return network.eval(), {name: state[name] for name in dead}


def load_autoencoder(directory: Path) -> LatentAutoencoder:
    """The autoencoder, its weights mapped into memory.

    Raises:
        ArtifactError: If a file is damaged or the autoencoder scales otherwise than SDXL's.
    """
    from diffusers import AutoencoderKL

    config = read_json(Path(directory) / "config.json")
    if not isinstance(config, dict) or config.get("_class_name") != "AutoencoderKL":
        raise ArtifactError(f"{directory} is not the directory of a diffusers AutoencoderKL.")
    # A missing factor would silently become that of another autoencoder.
    if (config.get("scaling_factor"), config.get("shift_factor")) != (SDXL_SCALING, None):
        raise ArtifactError(
            f"{directory / 'config.json'} has scaling_factor {config.get('scaling_factor')} and shift_factor "
            f"{config.get('shift_factor')}; released world models know latents scaled by {SDXL_SCALING} and "
            "not shifted. Give the autoencoder of SDXL base 1.0."
        )
    try:
        with torch.device("meta"):
            vae: AutoencoderKL = AutoencoderKL.from_config(config)
    except Exception as error:  # as many kinds as there are wrong values
        raise ArtifactError(f"{directory / 'config.json'} describes no autoencoder ({error}).") from error
    state = {_today(name): value for name, value in read_weights(directory).items()}
    layout = {name: tuple(value.shape) for name, value in vae.state_dict().items()}
    check_layout(state, layout, f"the autoencoder that {directory / 'config.json'} describes")
    vae.load_state_dict(state, assign=True)
    return LatentAutoencoder(vae)


def _today(name: str) -> str:
    for old, new in _OLD_ATTENTION.items():
        name = name.replace(old, new) if ".attentions." in name else name
    return name


def load_classifier(
    path: Path, task: ReleasedTask, config: Mapping[str, Any] | None = None
) -> VideoMAESuccessClassifier:
    """The reward model with the task's threshold and normalisation, its weights mapped into memory.

    Raises:
        ArtifactError: If the weights are not those of such a classifier.
        ValueError: If the normalisation is unknown.
    """
    name = task.classifier_normalisation.value
    if name not in NORMALISATIONS:
        raise ValueError(f"Unknown normalisation {name!r}; choose one of {', '.join(NORMALISATIONS)}.")
    mean, std = NORMALISATIONS[name]
    with torch.device("meta"):
        classifier = VideoMAESuccessClassifier(model=config, image_mean=mean, image_std=std)
    state = rename_published_keys(read_weights(path))
    layout = {name: tuple(value.shape) for name, value in classifier.model.state_dict().items()}
    check_layout(state, layout, f"a released reward model ({path})")
    classifier.model.load_state_dict(state, assign=True)
    classifier.threshold = task.threshold.value
    return classifier.eval()


def read_start_frames(directory: Path, size: int) -> StartFrames:
    """First frames from ``ID.png`` files.

    Args:
        directory: Of the pictures.
        size: Their side in pixels.

    Raises:
        ArtifactError: If there is none, or one has no number for a name, another size, or cannot be read.
    """
    from PIL import Image

    files = sorted(Path(directory).glob("*.png"))
    if not files:
        raise ArtifactError(f"{directory} holds no first frames; expected pictures 0.png, 1.png, …")
    if odd := [file.name for file in files if not file.stem.isdecimal()]:
        raise ArtifactError(f"{directory / odd[0]}: a first frame is named by its start state, like 17.png.")
    files.sort(key=lambda file: int(file.stem))
    frames = []
    for file in files:
        try:
            with Image.open(file) as picture:
                frames.append(np.array(picture.convert("RGB")))
        except OSError as error:
            raise ArtifactError(f"{file} is not a readable picture ({error}); download it again.") from error
        if frames[-1].shape != (size, size, 3):
            raise ArtifactError(
                f"{file} has {frames[-1].shape[1]}x{frames[-1].shape[0]} pixels, expected {size}x{size}."
            )
    ids = np.array([int(file.stem) for file in files], dtype=np.int64)
    return StartFrames(np.stack(frames), ids, np.zeros(len(files), np.int64))


def _check_unscaled(path: Path, statistics: ActionStatistics) -> None:
    """The published world model scales all dimensions, mask or not, and is fed the policy's actions."""
    for i, (*limits, scaled) in enumerate(zip(statistics.low, statistics.high, statistics.mask, strict=True)):
        if not scaled and limits != [-1.0, 1.0]:
            raise ArtifactError(
                f"{path}: action dimension {i} is masked out but ranges from {limits[0]} to {limits[1]}. The "
                "world model was trained on it scaled to [-1, 1], the policy puts it out unscaled: they "
                "would not mean the same. Released statistics have -1 and 1 there."
            )


def _counted(dropped: Mapping[str, Tensor]) -> dict[str, int]:
    """Parameters dropped per part."""
    counts: Counter[str] = Counter()
    for name, value in dropped.items():
        counts["cross_attn" if "cross_attn" in name else name.split(".")[0]] += value.numel()
    return dict(counts)

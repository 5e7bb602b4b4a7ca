"""A world: world model, reward model and start frames of an imagined environment, in one directory.

The directory holds JSON and safetensors only and, as in diffusers, has one folder per component::

    config.json                 task, components, sampling settings, training provenance (the card)
    network/                    the world model (ConvWorldModel or STDiT)
    autoencoder/                only where the network operates on latents
    reward/                     the success classifier
    start_frames.safetensors    initial frames of imagined episodes
"""

from __future__ import annotations

import copy
import difflib
import importlib
import importlib.resources
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from wmpo_gym.tasks import TASKS, Task
from wmpo_gym.utils.io import (
    ArtifactError,
    load_safetensors,
    read_json,
    save_safetensors,
    sha256,
    write_dir_atomic,
    write_json_atomic,
)

if TYPE_CHECKING:
    import torch

    from wmpo_gym.reward.classifier import SuccessClassifier
    from wmpo_gym.world.imagination import Imagination

FORMAT_VERSION = 1
FIRST_KEYFRAME_ID = 10**9  # above all start states
COMPONENTS = {
    "ConvWorldModel": "wmpo_gym.world.networks.conv",
    "STDiT": "wmpo_gym.world.networks.stdit",
    "PixelAutoencoder": "wmpo_gym.world.networks.autoencoder",
    "LatentAutoencoder": "wmpo_gym.world.networks.autoencoder",
    "ConvSuccessClassifier": "wmpo_gym.reward.conv",
    "VideoMAESuccessClassifier": "wmpo_gym.reward.videomae",
}


@dataclass(frozen=True)
class WorldConfig:
    """How a world model is sampled.

    Attributes:
        context_frames: H, the number of conditioning frames (or latents).
        denoising_steps: Euler steps per chunk; use the number the network was trained for.
        context_noise: Context noise level in [0, 1] given to the network as conditioning (training uses 0.05
            in the paper, §3.2, and 0.015 in the release).
        round_timesteps: Round the timesteps given to the network to bfloat16, as in the release.
    """

    context_frames: int = 2
    denoising_steps: int = 1
    context_noise: float = 0.0
    round_timesteps: bool = False


@dataclass
class StartFrames:
    """Initial frames of imagined episodes.

    Attributes:
        frames: uint8 ``(N, H, W, 3)``.
        ids: int64 ``(N,)`` start-state ids, unique.
        task_ids: int64 ``(N,)`` instruction index of each start state.
    """

    frames: np.ndarray
    ids: np.ndarray
    task_ids: np.ndarray

    def __post_init__(self) -> None:
        n = len(self.frames)
        if (
            self.frames.dtype != np.uint8
            or self.frames.ndim != 4
            or len(self.ids) != n
            or len(self.task_ids) != n
        ):
            raise ValueError(
                f"Start frames must be uint8 (N, H, W, 3) with N ids and N task ids, got {self.frames.dtype} "
                f"{self.frames.shape}, {len(self.ids)} ids, {len(self.task_ids)} task ids."
            )
        if len(np.unique(self.ids)) != n:
            raise ValueError("Start-state ids of a world must be unique; give each start state once.")

    @classmethod
    def from_episodes(cls, episodes: list) -> StartFrames:
        """First frames of recorded episodes, one per start state; episodes without one are left out."""
        first = {e.start_state_id: e for e in reversed(episodes) if e.start_state_id is not None}
        if not first:
            raise ValueError(
                "None of the episodes names its start state; a world needs at least one start frame."
            )
        ids = sorted(first)
        return cls(
            np.stack([first[i].frames[0] for i in ids]),
            np.array(ids, dtype=np.int64),
            np.array([first[i].task_id for i in ids], dtype=np.int64),
        )

    def with_episodes(self, episodes: list) -> StartFrames:
        """Copy extended by the first frames of recorded episodes whose start states are not yet included."""
        new = [e for e in episodes if e.start_state_id is not None and e.start_state_id not in self.ids]
        return self.joined(StartFrames.from_episodes(new)) if new else self

    def joined(self, other: StartFrames) -> StartFrames:
        """Concatenation of these start frames and ``other``."""
        pairs = ((getattr(self, f.name), getattr(other, f.name)) for f in fields(self))
        return StartFrames(*(np.concatenate(pair) for pair in pairs))


@dataclass
class World:
    """World model, success classifier and start frames of one task.

    Attributes:
        task: The task.
        network: :class:`~wmpo_gym.world.networks.conv.ConvWorldModel` or
            :class:`~wmpo_gym.world.networks.stdit.STDiT`.
        autoencoder: Maps frames to the network's latents and back.
        classifier: Success classifier; None in a pre-trained world without a reward model.
        start_frames: Initial frames of imagined episodes.
        config: Sampling settings.
        card: Model card: data, commands, seeds, metrics, gates; JSON-serialisable.
    """

    task: Task
    network: Any
    autoencoder: Any
    classifier: SuccessClassifier | None
    start_frames: StartFrames
    config: WorldConfig = field(default_factory=WorldConfig)
    card: dict[str, Any] = field(default_factory=dict)

    def imagination(self, *, dtype: str = "float32", compile: bool = False) -> Imagination:
        """The sampler of this world's network, with the world's sampling settings.

        Args:
            dtype: ``"float32"``, or ``"bfloat16"`` to sample with bfloat16 copies of network and autoencoder.
            compile: Compile the network with ``torch.compile``.

        Raises:
            ValueError: If the dtype is unknown or the network does not compute in it.
        """
        import torch

        from wmpo_gym.world.flow import RectifiedFlow
        from wmpo_gym.world.imagination import CompiledNetwork, Imagination

        network, autoencoder = self.network, self.autoencoder
        allowed = ["float32", *getattr(network, "other_dtypes", ())]
        if dtype not in allowed:
            raise ValueError(
                f"{type(network).__name__} does not compute in {dtype!r}; it does in {' and '.join(allowed)}."
            )
        if dtype != "float32":
            network = copy.deepcopy(network).to(getattr(torch, dtype))
            autoencoder = autoencoder.in_dtype(getattr(torch, dtype))
        return Imagination(
            CompiledNetwork(network) if compile else network,
            autoencoder,
            chunk=self.task.chunk,
            context_frames=self.config.context_frames,
            denoising_steps=self.config.denoising_steps,
            image_size=self.task.image_size,
            action_dim=self.task.action_dim,
            flow=RectifiedFlow(
                context_noise=self.config.context_noise, round_timesteps=self.config.round_timesteps
            ),
        )

    def to(self, device: torch.device | str) -> World:
        """Move the networks to a device, in place; returns the world itself."""
        self.network.to(device)
        if hasattr(self.autoencoder, "vae"):
            self.autoencoder.vae.to(device)
        if self.classifier is not None:
            self.classifier.to(device)
        return self

    def with_keyframes(self, episodes: list, share: float, *, seed: int = 0) -> World:
        """Copy of the world with additional start frames taken from the middle of recorded episodes.

        Args:
            episodes: Recorded episodes; all frames except each first and last one are candidates.
            share: Share of such keyframes among the resulting start frames, in [0, 1).
            seed: Seed of the random choice.

        Raises:
            ValueError: If the share is out of range, or the episodes have too few frames for it.
        """
        if not 0.0 <= share < 1.0:
            raise ValueError(f"The share of keyframes lies in [0, 1), got {share}.")
        if not share:
            return self
        places = [(i, t) for i, episode in enumerate(episodes) for t in range(1, episode.n_steps)]
        wanted = round(len(self.start_frames.ids) * share / (1 - share))
        if wanted > len(places):
            raise ValueError(
                f"A share of {share} takes {wanted} keyframes, the {len(episodes)} episodes have "
                f"{len(places)}; give a smaller share or more episodes."
            )
        chosen = np.random.default_rng(seed).choice(len(places), wanted, replace=False)
        taken = [places[k] for k in np.sort(chosen)]
        keyframes = StartFrames(
            np.stack([episodes[i].frames[t] for i, t in taken]),
            FIRST_KEYFRAME_ID + np.arange(wanted),
            np.array([episodes[i].task_id for i, _ in taken], np.int64),
        )
        return replace(self, start_frames=self.start_frames.joined(keyframes))

    def save_pretrained(self, directory: str | Path, *, dtype: str = "float32") -> None:
        """Write the world; the directory appears complete or not at all.

        Args:
            directory: Target, replaced as a whole.
            dtype: ``"float32"`` or ``"float16"`` storage of the network's weights (half the size).

        Raises:
            ValueError: If the dtype is not one of the two.
        """
        if dtype not in ("float32", "float16"):
            raise ValueError(f"Weights are stored as 'float32' or 'float16', not {dtype!r}.")
        with write_dir_atomic(directory) as tmp:
            if dtype == "float16":
                # The network in memory keeps the rounded weights, so that it equals the stored one.
                self.network.half().save_pretrained(tmp / "network")
                self.network.float()
            else:
                self.network.save_pretrained(tmp / "network")
            network_config = read_json(tmp / "network" / "config.json")
            network_config.pop("_name_or_path", None)  # a local path
            write_json_atomic(tmp / "network" / "config.json", network_config)
            self.autoencoder.save_pretrained(tmp / "autoencoder")
            components = {
                "network": type(self.network).__name__,
                "autoencoder": type(self.autoencoder).__name__,
            }
            if self.classifier is not None:
                self.classifier.save_pretrained(tmp / "reward")
                components["reward"] = type(self.classifier).__name__
            save_safetensors(tmp / "start_frames.safetensors", asdict(self.start_frames))
            for file in tmp.rglob("*.safetensors"):
                file.chmod(0o644)  # some libraries write files that only their owner may read
            write_json_atomic(
                tmp / "config.json",
                {
                    "format_version": FORMAT_VERSION,
                    "task": self.task.to_dict(),
                    "components": components,
                    "sampling": asdict(self.config),
                    "files": {
                        str(f.relative_to(tmp)): sha256(f) for f in sorted(tmp.rglob("*.*")) if f.is_file()
                    },
                    "card": self.card,
                },
            )

    @classmethod
    def from_pretrained(cls, name_or_dir: str | Path) -> World:
        """Load a world.

        Args:
            name_or_dir: A directory, the name of a task with a bundled world (``"move-block"``), or a Hugging
                Face hub id (``"user/repository"``).

        Raises:
            ValueError: If there is no such world; the message lists the bundled ones.
            ArtifactError: If a file is missing, truncated, edited or of another format version.
        """
        directory = find_pretrained(name_or_dir, "world")
        config = read_json(directory / "config.json")
        if config.get("format_version") != FORMAT_VERSION:
            raise ArtifactError(
                f"{directory / 'config.json'}: format version {config.get('format_version')!r}, this release "
                f"reads {FORMAT_VERSION}. Is it the config.json of a world?"
            )
        try:
            components, sampling = dict(config["components"]), WorldConfig(**config["sampling"])
            task = Task.from_dict(config["task"])
        except (KeyError, TypeError, ValueError) as error:
            raise ArtifactError(
                f"{directory / 'config.json'} is not a world's configuration: {error!r}."
            ) from error
        _verify(directory, config.get("files", {}))
        loaded = {name: _load_component(directory / name, kind) for name, kind in components.items()}
        return cls(
            task=task,
            network=loaded["network"],
            autoencoder=loaded["autoencoder"],
            classifier=loaded.get("reward"),
            start_frames=_load_start_frames(directory / "start_frames.safetensors"),
            config=sampling,
            card=config.get("card", {}),
        )


def _verify(directory: Path, checksums: dict[str, str]) -> None:
    """Check the SHA-256 of every file; this also detects edits that leave the file readable."""
    for name, expected in checksums.items():
        if not (directory / name).is_file() or sha256(directory / name) != expected:
            raise ArtifactError(
                f"{directory / name} is missing or is not the file this world was saved with (its SHA-256 "
                f"differs from the one in {directory / 'config.json'}). Fetch the directory again, or make "
                "it anew with the command in its card."
            )


def _load_component(directory: Path, kind: str) -> Any:
    if kind not in COMPONENTS:
        raise ArtifactError(
            f"{directory}: unknown component class {kind!r}; this release knows {', '.join(COMPONENTS)}."
        )
    component = getattr(importlib.import_module(COMPONENTS[kind]), kind)
    try:
        loaded = component.from_pretrained(directory)
    except (OSError, RuntimeError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(
            f"{directory}: could not load a {kind}: {error}. Fetch the directory again, or make it anew with "
            "the command in the world's card."
        ) from error
    named = loaded.named_parameters() if hasattr(loaded, "named_parameters") else ()
    if absent := [name for name, p in named if p.is_meta]:  # diffusers gives no error
        raise ArtifactError(
            f"{directory}: the weights lack {', '.join(absent)}, which a {kind} of this release has. "
            "Use the release that made it, or make it anew with the command in the world's card."
        )
    return loaded.float().eval() if hasattr(loaded, "eval") else loaded


def _load_start_frames(path: Path) -> StartFrames:
    tensors = load_safetensors(path, framework="np")
    try:
        return StartFrames(**tensors)
    except (TypeError, ValueError) as error:
        raise ArtifactError(f"{path} does not hold start frames: {error}") from error


def find_pretrained(name_or_dir: str | Path, kind: str) -> Path:
    """Directory of a bundled, local or hub artefact.

    Args:
        name_or_dir: A path that exists, the name of a task with bundled weights, or a hub id with one slash.
        kind: Sub-directory of the bundled artefacts, ``"world"``, ``"play"`` or ``"policy"``.

    Raises:
        ValueError: If nothing is found; the message lists what was tried.
    """
    path = Path(name_or_dir)
    if path.is_dir():
        return path
    bundled_root = Path(str(importlib.resources.files("wmpo_gym") / "pretrained"))
    if (bundled_root / str(name_or_dir) / kind).is_dir():
        return bundled_root / str(name_or_dir) / kind
    if str(name_or_dir).count("/") == 1 and not str(name_or_dir).startswith((".", "/", "~")):
        from huggingface_hub import snapshot_download

        try:
            return Path(
                snapshot_download(
                    str(name_or_dir),
                    allow_patterns=["*.json", "*.safetensors", "*/*.json", "*/*.safetensors"],
                )
            )
        except Exception as error:  # the hub library raises many error types
            raise ValueError(
                f"No directory {str(name_or_dir)!r} here, and the Hugging Face hub did not give it: {error}"
            ) from error
    names = (
        sorted(p.name for p in bundled_root.iterdir() if (p / kind).is_dir()) if bundled_root.is_dir() else []
    )
    near = difflib.get_close_matches(str(name_or_dir), [*names, *TASKS], n=1)
    raise ValueError(
        f"No {kind} {str(name_or_dir)!r}: not a directory here, not a hub id ('user/name'), and the "
        f"bundled ones are {', '.join(names) or 'none'}." + (f" Did you mean {near[0]!r}?" if near else "")
    )

"""The VLA network as a Stable-Baselines3 policy over action chunks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.type_aliases import Schedule
from torch import nn

from wmpo_gym.data.atomic import (
    ArtifactError,
    load_safetensors,
    read_json,
    save_safetensors,
    write_dir_atomic,
    write_json_atomic,
)
from wmpo_gym.policies.base import GroupPolicy, Observation
from wmpo_gym.policies.processor import LOCAL_TOKENIZER, InstructionTable, copy_tokenizer, prepare_images
from wmpo_gym.policies.vla import VLAConfig, VLANetwork

FORMAT_VERSION = 1
NAMED_CONFIGS = {"tiny": VLAConfig.tiny, "openvla-oft-7b": VLAConfig.openvla_oft_7b}
LORA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# Layers whose output depends on chance or on the rest of the batch while training.
_RANDOM_LAYERS = (nn.modules.dropout._DropoutNd, nn.modules.batchnorm._BatchNorm)


class VLAPolicy(GroupPolicy):
    """Discrete-token vision-language-action policy (OpenVLA-OFT) with a sampling temperature.

    Args:
        observation_space: ``Dict(pixels=Box uint8 (H,W,3) or (3,H,W), task_id=Discrete)``.
        action_space: ``Box(-1, 1, (K,D))``.
        lr_schedule: Learning-rate schedule of the optimizer; None builds it with rate 0 (sampling only).
        model: Directory written by :meth:`save_pretrained`; gives network, weights and instructions.
        config: Without ``model``: ``"tiny"``, ``"openvla-oft-7b"``, a :class:`VLAConfig` or its dictionary.
        instructions: The task's sentences, indexed by ``task_id``; with ``model`` only needed to change them.
        temperature: Divides the logits, in :meth:`sample` and :meth:`log_prob` alike. None keeps that of
            ``model``, or 1.
        lora: Keyword arguments of ``peft.LoraConfig``; the rest of the network is then frozen.
        optimizer_class: Optimizer of the trainable parameters.
        optimizer_kwargs: Its further keyword arguments.
        seed: Seeds the initial weights and the sampling generator.

    Raises:
        ValueError: If spaces, configuration and instructions do not fit together.
        ImportError: If transformers (or peft, for ``lora``) is missing.
    """

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Space,
        lr_schedule: Schedule | None = None,
        *,
        model: str | Path | None = None,
        config: str | VLAConfig | Mapping[str, Any] | None = None,
        instructions: Sequence[str] | None = None,
        temperature: float | None = None,
        lora: Mapping[str, Any] | None = None,
        optimizer_class: type[torch.optim.Optimizer] = torch.optim.AdamW,
        optimizer_kwargs: dict[str, Any] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(
            observation_space,
            action_space,
            optimizer_class=optimizer_class,
            optimizer_kwargs=optimizer_kwargs,
        )
        card = read_policy_card(model) if model is not None else {}
        self.config = card["config"] if card else _resolve_config(config, observation_space, action_space)
        _check_spaces(self.config, observation_space, action_space)
        self.instructions = tuple(instructions or card.get("instructions", ()))
        self.temperature = float(card.get("temperature", 1.0) if temperature is None else temperature)
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ValueError(f"temperature must be positive, got {temperature}.")
        self.lora = dict(lora) if lora else card.get("lora")
        self._table = InstructionTable(self.instructions, self.config)
        self._tokenizer = self.config.action_tokenizer()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.network = VLANetwork(self.config)
            if card.get("lora"):
                _add_lora(self.network, card["lora"])
            if model is not None:
                _load_weights(self.network, Path(model) / "model.safetensors")
            if lora and not card.get("lora"):
                _add_lora(self.network, lora)
        self._generator = torch.Generator().manual_seed(seed)
        self.set_training_mode(False)
        rate = lr_schedule(1.0) if lr_schedule is not None else 0.0
        trainable = [p for p in self.network.parameters() if p.requires_grad]
        self.optimizer = self.optimizer_class(trainable, lr=rate, **self.optimizer_kwargs)

    # -- decisions -------------------------------------------------------------------------------------------
    def logits(self, obs: Observation) -> torch.Tensor:
        """Float32 logits (B,L,n_bins) over action tokens, before the temperature."""
        text, length = self._table(obs["task_id"].to(self.device))
        pixels = obs["pixels"].to(self.device)
        if len(pixels) != len(text):
            raise ValueError(f"{len(pixels)} images came with {len(text)} task ids; give one per row.")
        return self.network(prepare_images(pixels, self.config), text, length)

    def _log_probs(self, obs: Observation) -> torch.Tensor:
        return torch.log_softmax(self.logits(obs) / self.temperature, dim=-1)

    @torch.no_grad()
    def sample(
        self, obs: Observation, deterministic: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """See :meth:`GroupPolicy.sample`."""
        log_probs = self._log_probs(obs)
        trace = log_probs.argmax(dim=-1) if deterministic else self._draw(log_probs)
        chosen = log_probs.gather(-1, trace[..., None])[..., 0]
        return self.decode(trace), chosen, trace

    def _draw(self, log_probs: torch.Tensor) -> torch.Tensor:
        """One token per position by inverting the cumulative distribution at a uniform number.

        The numbers are drawn on the CPU, so a seed means the same on every device.
        """
        uniform = torch.rand(log_probs.shape[:-1], generator=self._generator, dtype=torch.float64)
        cumulative = log_probs.double().exp().cumsum(dim=-1)
        threshold = uniform.to(log_probs.device)[..., None] * cumulative[..., -1:]
        # right=True never picks a token of probability zero.
        return torch.searchsorted(cumulative, threshold, right=True)[..., 0].clamp(
            max=log_probs.shape[-1] - 1
        )

    def log_prob(self, obs: Observation, trace: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See :meth:`GroupPolicy.log_prob`."""
        log_probs = self._log_probs(obs)
        chosen = log_probs.gather(-1, trace.to(self.device)[..., None])[..., 0]
        return chosen, -(log_probs.exp() * log_probs).sum(dim=-1)

    def decode(self, trace: torch.Tensor) -> torch.Tensor:
        """Actions float32 (B,K,D) of tokens int64 (B,L)."""
        return self._tokenizer.decode(trace).reshape(-1, self.config.chunk, self.config.action_dim)

    def encode(self, actions: torch.Tensor) -> torch.Tensor:
        """Tokens int64 (B,L) of actions (B,K,D); the inverse of :meth:`decode` up to half a bin."""
        return self._tokenizer.encode(actions).flatten(1)

    # -- randomness and modes --------------------------------------------------------------------------------
    def set_seed(self, seed: int) -> None:
        """Restart the sampling generator."""
        self._generator.manual_seed(seed)

    def get_extra_state(self) -> torch.Tensor:
        """State of the sampling generator, so that a checkpoint resumes to the same draws."""
        return self._generator.get_state()

    def set_extra_state(self, state: torch.Tensor) -> None:
        """Restore :meth:`get_extra_state`."""
        self._generator.set_state(state.cpu())

    def set_training_mode(self, mode: bool) -> None:
        """Switch modes, but leave dropout and batch statistics off.

        Otherwise the ratio of new to old probabilities would not be one before the first update.
        """
        self.train(mode)
        for module in self.network.modules():
            if isinstance(module, _RANDOM_LAYERS) or type(module).__name__.endswith("DropPath"):
                module.eval()

    # -- files -----------------------------------------------------------------------------------------------
    def save_pretrained(self, directory: str | Path, meta: Mapping[str, Any] | None = None) -> Path:
        """Write ``config.json``, ``policy.json`` and ``model.safetensors``, all or nothing.

        A tokenizer that came from a directory goes along in ``tokenizer/``.

        Args:
            directory: Where to.
            meta: Anything JSON-able worth remembering (task, training, results).

        Returns:
            The directory.
        """
        directory = Path(directory)
        with write_dir_atomic(directory) as temporary:
            write_policy_card(
                temporary,
                self.config,
                instructions=self.instructions,
                temperature=self.temperature,
                pixels=_image_shape(self.observation_space),
                lora=self.lora,
                meta=meta,
            )
            save_safetensors(temporary / "model.safetensors", self.network.state_dict())
        return directory

    @classmethod
    def from_pretrained(cls, directory: str | Path, **kwargs: Any) -> VLAPolicy:
        """Load a policy for sampling or training, with the spaces it was saved with.

        Args:
            directory: Written by :meth:`save_pretrained`.
            **kwargs: Further arguments of the constructor.

        Raises:
            ArtifactError: If a file is missing or damaged, or the files do not fit each other.
        """
        card = read_policy_card(directory)
        return cls(
            *make_spaces(card["config"], card["pixels"], len(card["instructions"])), model=directory, **kwargs
        )

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return {
            "observation_space": self.observation_space,
            "action_space": self.action_space,
            "config": self.config.to_dict(),
            "instructions": self.instructions,
            "temperature": self.temperature,
            "lora": self.lora,
        }


def write_policy_card(
    directory: Path,
    config: VLAConfig,
    *,
    instructions: Sequence[str],
    temperature: float,
    pixels: Sequence[int],
    lora: Mapping[str, Any] | None = None,
    meta: Mapping[str, Any] | None = None,
) -> None:
    """Write all of a policy's directory but its weights.

    Args:
        directory: Where to; exists.
        config: The network. A tokenizer in a directory is copied, so that the policy can be moved.
        instructions: The task's sentences.
        temperature: Divides the logits.
        pixels: Shape of the observed image.
        lora: Keyword arguments of ``peft.LoraConfig`` if the weights have adapters.
        meta: Anything JSON-able worth remembering.
    """
    if config.tokenizer != "bytes" and Path(config.tokenizer).is_dir():
        copy_tokenizer(config.tokenizer, directory / LOCAL_TOKENIZER)
        config = replace(config, tokenizer=LOCAL_TOKENIZER)
    card = {
        "format_version": FORMAT_VERSION,
        "instructions": list(instructions),
        "temperature": temperature,
        "pixels": list(pixels),
        "lora": lora,
        "meta": dict(meta or {}),
    }
    write_json_atomic(directory / "config.json", config.to_dict())
    write_json_atomic(directory / "policy.json", card)


def read_policy_card(directory: str | Path) -> dict[str, Any]:
    """``policy.json`` of a saved policy with its network configuration under ``"config"``.

    Raises:
        ArtifactError: If the directory holds no readable policy.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise ArtifactError(f"No policy directory {directory}; give one that save_pretrained wrote.")
    card, config = read_json(directory / "policy.json"), read_json(directory / "config.json")
    if not isinstance(card, dict) or card.get("format_version") != FORMAT_VERSION:
        raise ArtifactError(
            f"{directory / 'policy.json'} is not a policy card of format {FORMAT_VERSION}; "
            "it was edited or written by another version. Save the policy again."
        )
    try:
        card["config"] = VLAConfig.from_dict(config)
    except (AttributeError, TypeError, ValueError) as error:
        raise ArtifactError(f"{directory / 'config.json'} does not describe a VLA: {error}") from error
    if card["config"].tokenizer == LOCAL_TOKENIZER:
        card["config"] = replace(card["config"], tokenizer=str(directory / LOCAL_TOKENIZER))
    return card


def make_spaces(
    config: VLAConfig, pixels: Sequence[int], n_instructions: int
) -> tuple[spaces.Dict, spaces.Box]:
    """Observation and action space of a policy, from its configuration and image shape."""
    observation = spaces.Dict(
        {"pixels": spaces.Box(0, 255, tuple(pixels), np.uint8), "task_id": spaces.Discrete(n_instructions)}
    )
    return observation, spaces.Box(-1.0, 1.0, (config.chunk, config.action_dim), np.float32)


def _image_shape(space: spaces.Space) -> tuple[int, ...]:
    if not (isinstance(space, spaces.Dict) and {"pixels", "task_id"} <= set(space.spaces)):
        raise ValueError(f"VLAPolicy needs observations Dict(pixels=…, task_id=…), got {space}.")
    shape = space["pixels"].shape
    if shape is None or len(shape) != 3 or 3 not in (shape[0], shape[-1]):
        raise ValueError(f"pixels must be one RGB image (H,W,3) or (3,H,W), got {shape}.")
    return shape


def _resolve_config(
    config: str | VLAConfig | Mapping[str, Any] | None,
    observation_space: spaces.Space,
    action_space: spaces.Space,
) -> VLAConfig:
    config = "tiny" if config is None else config
    if isinstance(config, VLAConfig):
        return config
    if isinstance(config, Mapping):
        return VLAConfig.from_dict(config)
    if config not in NAMED_CONFIGS:
        raise ValueError(f"Unknown VLA configuration {config!r}; choose one of {', '.join(NAMED_CONFIGS)}.")
    shape, actions = _image_shape(observation_space), action_space.shape or ()
    if len(actions) != 2:
        raise ValueError(f"VLAPolicy needs an action chunk Box(-1, 1, (K, D)), got {action_space}.")
    sizes = {"image_size": shape[1]} if config == "tiny" else {}
    return NAMED_CONFIGS[config](chunk=actions[0], action_dim=actions[1], **sizes)


def _check_spaces(config: VLAConfig, observation_space: spaces.Space, action_space: spaces.Space) -> None:
    _image_shape(observation_space)
    if not isinstance(action_space, spaces.Box) or action_space.shape != (config.chunk, config.action_dim):
        raise ValueError(
            f"The policy acts in chunks of shape ({config.chunk}, {config.action_dim}), the environment "
            f"wants {action_space}; build the policy for this task or choose another one."
        )


def _load_weights(network: nn.Module, path: Path) -> None:
    try:
        network.load_state_dict(load_safetensors(path))
    except RuntimeError as error:
        raise ArtifactError(
            f"The weights in {path} do not fit config.json beside it ({str(error).splitlines()[1].strip()}); "
            "one of the two was edited. Restore it or train the policy again."
        ) from error


def _add_lora(network: nn.Module, settings: Mapping[str, Any]) -> None:
    """Put low-rank adapters on the language model's linear layers and freeze everything else."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ImportError('LoRA needs peft: pip install "wmpo-gym[vla]"') from error
    inject_adapter_in_model(LoraConfig(**{"target_modules": LORA_TARGETS, **settings}), network)

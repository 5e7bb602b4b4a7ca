"""The VLA network as a Stable-Baselines3 policy over action chunks."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.type_aliases import Schedule

from wmpo_gym.policies.base import GroupPolicy, Observation
from wmpo_gym.policies.processor import InstructionTable, prepare_images
from wmpo_gym.policies.tokens import token_statistics
from wmpo_gym.policies.vla import VLAConfig
from wmpo_gym.policies.weights import (
    WEIGHTS,
    Base,
    add_lora,
    agreed_lora,
    checkpoint_activations,
    find_base,
    load_adapters,
    load_network,
    merged_state,
    possible_precision,
    read_policy_card,
    save_adapters,
    store_weights,
    write_policy_card,
)
from wmpo_gym.utils.io import plain, save_safetensors, write_dir_atomic

NAMED_CONFIGS = {"tiny": VLAConfig.tiny, "openvla-oft-7b": VLAConfig.openvla_oft_7b}


class VLAPolicy(GroupPolicy):
    """Vision-language-action policy with discrete action tokens (OpenVLA-OFT) and a sampling temperature.

    Args:
        observation_space: ``Dict(pixels=Box uint8 (H,W,3) or (3,H,W), task_id=Discrete)``.
        action_space: ``Box(-1, 1, (K,D))``.
        lr_schedule: Learning-rate schedule of the optimizer; None builds it with rate 0 (sampling only).
        model: Directory written by :meth:`save_pretrained`; gives network, weights and instructions.
        base: Where the base policy of saved adapters is now; None for where it was when they were trained.
        config: Without ``model``: ``"tiny"``, ``"openvla-oft-7b"``, a :class:`VLAConfig` or its dictionary.
        instructions: The task's sentences, indexed by ``task_id``; with ``model`` only needed to change them.
        temperature: Softmax temperature in :meth:`sample` and :meth:`log_prob`. None is that of ``model``, or
            1.
        lora: Keyword arguments of ``peft.LoraConfig``, at least ``r``; only the
            adapters of the language model are then trained. Saved adapters define their own.
        quantization: Keyword arguments of ``transformers.BitsAndBytesConfig`` with ``load_in_4bit=True``, for
            the language model's frozen weights.
        precision: ``"fp32"``, or ``"bf16"``: compute in bfloat16 on a GPU and keep frozen weights in it,
            trained weights in float32. Without a GPU, where bfloat16 is very slow, it warns and computes in
            fp32. ``"float32"``, the name in earlier releases, means fp32.
        gradient_checkpointing: In training, recompute the activations inside every transformer layer in the
            backward pass: a third more computation, a fraction of the memory, the same gradient.
        optimizer_class: Optimizer of the trainable parameters.
        optimizer_kwargs: Further keyword arguments of the optimizer.
        seed: Seeds the initial weights and the sampling generator.

    Raises:
        ValueError: If spaces, configuration and instructions are inconsistent.
        ArtifactError: If saved files are missing or damaged, or are inconsistent.
        ImportError: If transformers (or peft for ``lora``, bitsandbytes for ``quantization``) is missing.
    """

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Space,
        lr_schedule: Schedule | None = None,
        *,
        model: str | Path | None = None,
        base: str | Path | None = None,
        config: str | VLAConfig | Mapping[str, Any] | None = None,
        instructions: Sequence[str] | None = None,
        temperature: float | None = None,
        lora: Mapping[str, Any] | None = None,
        quantization: Mapping[str, Any] | None = None,
        precision: str = "fp32",
        gradient_checkpointing: bool = False,
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
        self.lora = agreed_lora(lora, card.get("lora"))
        self.precision = possible_precision(precision)
        self._quantised = bool(quantization)
        self._table = InstructionTable(self.instructions, self.config)
        self._tokenizer = self.config.action_tokenizer()
        self._base: Base | None = None
        if card.get("base"):
            self._base = find_base(card, Path(model or ""), base)
        elif self.lora and model is not None:
            self._base = Base.of(model)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            source = self._base.directory if self._base else model
            self.network = load_network(self.config, source, quantization)
            if self.lora:
                add_lora(self.network, self.lora)
        if card.get("base"):
            load_adapters(self.network, Path(model or ""))
        store_weights(self.network, torch.bfloat16 if self.precision == "bf16" else torch.float32)
        if gradient_checkpointing:
            checkpoint_activations(self.network)
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
        half = self.precision == "bf16"
        if (half or self._quantised) and self.device.type != "cuda":
            raise ValueError(
                f"This policy computes in {'bf16' if half else '4-bit weights'} and lies on the "
                f"{self.device.type}; move it to a GPU, or load it without `precision` and `quantization`."
            )
        with torch.autocast(self.device.type, torch.bfloat16, enabled=half):
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

        The uniform numbers are drawn on the CPU, so that a seed gives the same noise on every device.
        """
        uniform = self.draw(
            lambda n: torch.rand(n, log_probs.shape[1], generator=self._generator, dtype=torch.float64),
            len(log_probs),
        )
        cumulative = log_probs.double().exp().cumsum(dim=-1)
        threshold = uniform.to(log_probs.device)[..., None] * cumulative[..., -1:]
        # right=True never picks a token of probability zero.
        return torch.searchsorted(cumulative, threshold, right=True)[..., 0].clamp(
            max=log_probs.shape[-1] - 1
        )

    def log_prob(self, obs: Observation, trace: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See :meth:`GroupPolicy.log_prob`."""
        return token_statistics(self.logits(obs), trace.to(self.device), self.temperature)

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
        """State of the sampling generator, for exact resumption from a checkpoint."""
        return self._generator.get_state()

    def set_extra_state(self, state: torch.Tensor) -> None:
        """Restore :meth:`get_extra_state`."""
        self._generator.set_state(state.cpu())

    # -- files -----------------------------------------------------------------------------------------------
    def save_pretrained(
        self,
        directory: str | Path,
        meta: Mapping[str, Any] | None = None,
        *,
        state_dict: Mapping[str, torch.Tensor] | None = None,
    ) -> Path:
        """Write ``config.json``, ``policy.json`` and the weights, atomically.

        With LoRA the weights are the adapters alone, a few megabytes, and the card identifies their base
        policy; :meth:`from_pretrained` combines both.

        A tokenizer loaded from a directory is copied to ``tokenizer/``.

        Args:
            directory: Target directory.
            meta: JSON-serialisable provenance (task, training, results).
            state_dict: The network's full weights if they are sharded (FSDP); None takes the network's own.

        Returns:
            The directory.

        Raises:
            ValueError: If the base of the adapters was not saved, or the weights are quantised to 4 bits.
        """
        if self.lora and self._base is None:
            raise ValueError(
                "The base policy of these adapters was not saved, and adapters cannot be loaded without it: "
                "export the whole policy with save_merged, or train adapters on a saved policy (`model`)."
            )
        if self._quantised and not self.lora:
            raise ValueError("Weights in 4 bits are not saved; the policy is the one they were loaded from.")
        state = state_dict or self.network.state_dict()
        with self._written(directory, meta, self._base) as temporary:
            if self.lora:
                save_adapters(self.network, temporary, state)
            else:
                save_safetensors(temporary / WEIGHTS, state)
        return Path(directory)

    def save_merged(self, directory: str | Path, meta: Mapping[str, Any] | None = None) -> Path:
        """Write a complete policy with the adapters merged into its weights; this policy is not changed.

        Arguments and return value as for :meth:`save_pretrained`.

        Raises:
            ValueError: If there are no adapters, or they cannot be merged.
        """
        if not self.lora:
            raise ValueError("This policy has no adapters to merge; save_pretrained writes all of it.")
        with self._written(directory, meta, None) as temporary:
            save_safetensors(temporary / WEIGHTS, merged_state(self.network))
        return Path(directory)

    @contextmanager
    def _written(
        self, directory: str | Path, meta: Mapping[str, Any] | None, base: Base | None
    ) -> Iterator[Path]:
        """Context manager: directory with configuration and card, written atomically with the weights."""
        with write_dir_atomic(directory) as temporary:
            write_policy_card(
                temporary,
                self.config,
                instructions=self.instructions,
                temperature=self.temperature,
                pixels=_image_shape(self.observation_space),
                lora=self.lora if base else None,
                base=base.to_dict() if base else None,
                meta=meta,
            )
            yield temporary

    def kept_elsewhere(self) -> tuple[set[str], str]:
        """See :meth:`GroupPolicy.kept_elsewhere`: LoRA's frozen weights, if the base policy is saved."""
        if self._base is None:
            return set(), ""
        frozen = {name for name, p in self.named_parameters() if not p.requires_grad}
        return frozen, f"{self._base.digest} with {json.dumps(plain(self.lora), sort_keys=True)}"

    @classmethod
    def from_pretrained(cls, directory: str | Path, **kwargs: Any) -> VLAPolicy:
        """Load a policy for sampling or training, with the spaces it was saved with.

        Args:
            directory: Written by :meth:`save_pretrained` or :meth:`save_merged`.
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
            f"expects {action_space}; build the policy for this task or choose another one."
        )

"""The files of a saved policy (card, weights, adapters), 4-bit weights and low-rank adapters."""

from __future__ import annotations

import copy
import hashlib
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from wmpo_gym.policies.processor import LOCAL_TOKENIZER, copy_tokenizer
from wmpo_gym.policies.vla import VLAConfig, VLANetwork
from wmpo_gym.utils.device import PRECISIONS, Precision
from wmpo_gym.utils.io import (
    ArtifactError,
    load_safetensors,
    plain,
    read_json,
    save_safetensors,
    sha256,
    write_json_atomic,
)

FORMAT_VERSION = 1
WEIGHTS, ADAPTERS = "model.safetensors", "adapters.safetensors"
# The vision towers have layers of these names too; their features are left as they are.
LORA_TARGETS = r"language_model\..*\.(q|k|v|o|gate|up|down)_proj"


# -- card ----------------------------------------------------------------------------------------------------
def write_policy_card(
    directory: Path,
    config: VLAConfig,
    *,
    instructions: Sequence[str],
    temperature: float,
    pixels: Sequence[int],
    lora: Mapping[str, Any] | None = None,
    base: Mapping[str, str] | None = None,
    meta: Mapping[str, Any] | None = None,
) -> None:
    """Write the files of a saved policy except its weights.

    Args:
        directory: An existing directory.
        config: The network. A tokenizer from a directory is copied, so that the policy can be moved.
        instructions: The task's sentences.
        temperature: Divides the logits.
        pixels: Shape of the observed image.
        lora: Keyword arguments of ``peft.LoraConfig`` if the weights are adapters, else None.
        base: The policy that the adapters belong to (:meth:`Base.to_dict`), else None.
        meta: JSON-able provenance (task, training, results).
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
        "base": base,
        "meta": dict(meta or {}),
    }
    write_json_atomic(directory / "config.json", config.to_dict())
    write_json_atomic(directory / "policy.json", card)


def read_policy_card(directory: str | Path) -> dict[str, Any]:
    """``policy.json`` of a saved policy, with its :class:`VLAConfig` under ``"config"``.

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


@dataclass(frozen=True)
class Base:
    """The saved policy that adapters belong to.

    Attributes:
        directory: Where its weights are.
        digest: SHA-256 of them, so that adapters are never put on other weights.
    """

    directory: Path
    digest: str

    @classmethod
    def of(cls, directory: str | Path) -> Base:
        """The base in a directory; reads its weights once."""
        total = hashlib.sha256()
        for file in sorted(Path(directory).glob("model*.safetensors")):
            total.update(sha256(file).encode())
        return cls(Path(directory).absolute(), total.hexdigest())

    def to_dict(self) -> dict[str, str]:
        """JSON-able form."""
        return {"directory": str(self.directory), "digest": self.digest}


def find_base(card: Mapping[str, Any], adapters: Path, moved_to: str | Path | None) -> Base:
    """The base that saved adapters were trained on.

    Args:
        card: The adapters' ``policy.json``.
        adapters: Their directory.
        moved_to: Where the base is now; None for the directory in the card.

    Raises:
        ArtifactError: If there is no policy, or it is not the one the adapters were trained on.
    """
    directory = Path(moved_to or card["base"]["directory"])
    if not any(directory.glob("model*.safetensors")):
        raise ArtifactError(
            f"{adapters} holds adapters for a base policy, and there is no policy in {directory}; say where "
            "it is with VLAPolicy.from_pretrained(adapters, base=…), or export a whole policy with "
            "save_merged on a machine that has both."
        )
    base = Base.of(directory)
    if base.digest != card["base"]["digest"]:
        raise ArtifactError(
            f"The weights in {directory} are not those that the adapters in {adapters} were trained on "
            "(their SHA-256 differs); give the base they belong to."
        )
    return base


# -- networks ------------------------------------------------------------------------------------------------
def load_network(
    config: VLAConfig, directory: str | Path | None, quantization: Mapping[str, Any] | None = None
) -> VLANetwork:
    """A network with saved weights, or with random ones where no directory is given.

    Args:
        config: The network.
        directory: Holds its weights; None initialises them at random.
        quantization: Keyword arguments of ``transformers.BitsAndBytesConfig`` for the language model's linear
            layers, which become quantised when the network is moved to the GPU; None keeps them as they are.

    Raises:
        ArtifactError: If the weights are missing or damaged, or do not fit the configuration.
        ValueError: If random weights are to be quantised, or there is no GPU for quantised ones.
        ImportError: If bitsandbytes is missing.
    """
    if directory is None:
        if quantization:
            raise ValueError(
                "Only the frozen weights of a saved policy can be quantised; give its directory as `model`."
            )
        return VLANetwork(config)
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        network = VLANetwork(config)
    path = Path(directory) / WEIGHTS
    # Copied out of the file: where a tensor begins in memory decides how its products are rounded.
    state = {name: tensor.clone() for name, tensor in load_safetensors(path).items()}
    if quantization:
        _quantise(network, state, quantization)
    try:
        network.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise _misfit(path, error) from error
    return network


def _misfit(path: Path, error: RuntimeError) -> ArtifactError:
    return ArtifactError(
        f"The weights in {path} do not fit config.json beside it ({str(error).splitlines()[1].strip()}); "
        "one of the two was edited. Restore it or train the policy again."
    )


def _quantise(network: VLANetwork, state: dict[str, torch.Tensor], settings: Mapping[str, Any]) -> None:
    """Put quantised layers into the language model and their weights into ``state``."""
    if not has_gpu():
        raise ValueError(
            "4-bit weights need a CUDA GPU, and this machine has none: bitsandbytes' kernels for the CPU "
            "have no gradient. Leave out the quantization."
        )
    try:
        import bitsandbytes
    except ImportError as error:
        raise ImportError("4-bit weights need bitsandbytes: pip install bitsandbytes") from error
    from transformers import BitsAndBytesConfig
    from transformers.integrations import replace_with_bnb_linear

    requested = BitsAndBytesConfig(**settings)
    if not requested.load_in_4bit:
        raise ValueError(f"quantization takes load_in_4bit=True and its options, got {dict(settings)}.")
    replace_with_bnb_linear(network.language_model.model, quantization_config=requested)
    for name, layer in network.named_modules():
        key = f"{name}.weight"
        if isinstance(layer, bitsandbytes.nn.Linear4bit) and key in state:
            options = vars(layer.weight)
            state[key] = bitsandbytes.nn.Params4bit(state[key], requires_grad=False, **options)
    network.is_loaded_in_4bit = True  # type: ignore[assignment]  # peft asks for it


def has_gpu() -> bool:
    """Whether there is a CUDA GPU."""
    return torch.cuda.is_available()


def possible_precision(precision: str) -> Precision:
    """The requested precision, or ``"fp32"`` with a warning where there is no GPU.

    Args:
        precision: ``"fp32"`` (also ``"float32"``, its name in earlier releases) or ``"bf16"``.

    Raises:
        ValueError: If it is unknown.
    """
    if precision == "float32":
        precision = "fp32"
    if precision not in PRECISIONS:
        raise ValueError(f"Unknown precision {precision!r}; choose one of {', '.join(PRECISIONS)}.")
    if precision == "bf16" and not has_gpu():
        warnings.warn(
            "bf16 needs a CUDA GPU, and this machine has none; on a CPU it is about 100 times slower than "
            "fp32. Computing in fp32.",
            stacklevel=3,
        )
        return "fp32"
    return "bf16" if precision == "bf16" else "fp32"


def store_weights(network: nn.Module, frozen: torch.dtype) -> None:
    """Convert trained weights to float32 and frozen ones to ``frozen``; quantised weights are left alone."""
    for parameter in network.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else frozen)


def checkpoint_activations(network: VLANetwork) -> None:
    """Recompute the activations inside every transformer layer in the backward pass."""
    for model in (network.language_model, *(tower.model for tower in network.towers)):
        if model.supports_gradient_checkpointing:
            # transformers renames the method; the older name is deprecated.
            name = "activation_checkpointing_enable"
            enable = getattr(model, name, None) or model.gradient_checkpointing_enable
            # Re-entrant checkpoints lose the gradient where a layer's input has none (frozen embeddings).
            enable({"use_reentrant": False})


# -- adapters ------------------------------------------------------------------------------------------------
def agreed_lora(
    requested: Mapping[str, Any] | None, saved: Mapping[str, Any] | None
) -> dict[str, Any] | None:
    """Settings of the adapters: those saved with the policy, else the requested ones.

    Raises:
        ValueError: If the two differ.
    """
    if requested and saved and plain(requested) != plain(saved):
        raise ValueError(
            f"The policy has adapters with lora={dict(saved)} already, got {dict(requested)}; leave `lora` "
            "out to go on with them, or export it with save_merged and put new ones on that."
        )
    return dict(saved or requested or {}) or None


def add_lora(network: nn.Module, settings: Mapping[str, Any]) -> None:
    """Put low-rank adapters on the language model's linear layers and freeze everything else.

    Args:
        network: Changed in place; its output stays the same until the adapters are trained.
        settings: Keyword arguments of ``peft.LoraConfig``.

    Raises:
        ImportError: If peft is missing.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ImportError('LoRA needs peft: pip install "wmpo-gym[vla]"') from error
    inject_adapter_in_model(LoraConfig(**{"target_modules": LORA_TARGETS, **settings}), network)


def save_adapters(network: nn.Module, directory: Path, state: Mapping[str, torch.Tensor]) -> None:
    """Write what is trained of a network's ``state``, which is what LoRA added."""
    trained = {name: state[name] for name, p in network.named_parameters() if p.requires_grad}
    save_safetensors(directory / ADAPTERS, trained)


def load_adapters(network: nn.Module, directory: Path) -> None:
    """Counterpart of :func:`save_adapters`, in place.

    Raises:
        ArtifactError: If the file is missing or damaged, or holds adapters of another shape.
    """
    path = directory / ADAPTERS
    state, trained = load_safetensors(path), {n: p for n, p in network.named_parameters() if p.requires_grad}
    wrong = sorted(state.keys() ^ trained.keys())
    wrong += [n for n in state.keys() & trained.keys() if state[n].shape != trained[n].shape]
    if wrong:
        raise ArtifactError(
            f"The adapters in {path} do not fit `lora` in policy.json beside it (first at {wrong[0]}); one "
            "of the two was edited. Restore it or train them again."
        )
    network.load_state_dict(state, strict=False)


def merged_state(network: VLANetwork) -> dict[str, torch.Tensor]:
    """The weights of a network without adapters that puts out the same up to rounding.

    Raises:
        ValueError: If the adapters cannot be added to the weights.
    """
    from peft.tuners.lora import LoraLayer

    state = network.state_dict()
    for name, layer in network.named_modules():
        if isinstance(layer, LoraLayer):
            if getattr(layer.get_base_layer(), "quant_state", None) is not None:
                raise ValueError(
                    "Adapters are not merged into 4-bit weights, which would lose most of what was trained; "
                    "load the adapters without `quantization` and merge then."
                )
            merged = copy.deepcopy(layer)  # unmerging the network's own layer would leave a rounding error
            merged.merge()
            state = {k: v for k, v in state.items() if not k.startswith(f"{name}.")}
            state |= {f"{name}.{k}": v for k, v in merged.get_base_layer().state_dict().items()}
    with torch.device("meta"):
        names = VLANetwork(network.config).state_dict().keys()
    if extra := sorted(state.keys() ^ names):
        raise ValueError(f"These adapters cannot be merged: a network without adapters has no {extra[0]}.")
    return {name: state[name] for name in names}

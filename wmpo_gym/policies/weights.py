"""The weights of a VLA network: read from files, kept in four bits, and changed by low-rank adapters."""

from __future__ import annotations

import copy
import hashlib
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from wmpo_gym.policies.vla import VLAConfig, VLANetwork
from wmpo_gym.utils.io import ArtifactError, load_safetensors, plain, save_safetensors, sha256

PRECISIONS = ("float32", "bf16")
WEIGHTS, ADAPTERS = "model.safetensors", "adapters.safetensors"
# The vision towers have layers of these names too; their features are left as they are.
LORA_TARGETS = r"language_model\..*\.(q|k|v|o|gate|up|down)_proj"


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


def find_base(card: Mapping[str, Any], adapters: Path, elsewhere: str | Path | None) -> Base:
    """The base that saved adapters were trained on.

    Args:
        card: The adapters' ``policy.json``.
        adapters: Their directory.
        elsewhere: Where the base is now; None for where it was.

    Raises:
        ArtifactError: If it is not there, or is not the one the adapters were trained on.
    """
    directory = Path(elsewhere or card["base"]["directory"])
    if not any(directory.glob("model*.safetensors")):
        raise ArtifactError(
            f"{adapters} holds adapters for a base policy, and {directory} does not hold one (any more); say "
            "where it is with VLAPolicy.from_pretrained(adapters, base=…), or export a whole policy with "
            "save_merged where both are at hand."
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
        directory: Holds its weights; no others are made before.
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
            "4-bit weights need a CUDA GPU, and none is to be seen here: bitsandbytes' kernels for the CPU "
            "have no gradient. Leave out the quantization."
        )
    try:
        import bitsandbytes
    except ImportError as error:
        raise ImportError("4-bit weights need bitsandbytes: pip install bitsandbytes") from error
    from transformers import BitsAndBytesConfig
    from transformers.integrations import replace_with_bnb_linear

    wanted = BitsAndBytesConfig(**settings)
    if not wanted.load_in_4bit:
        raise ValueError(f"quantization takes load_in_4bit=True and its options, got {dict(settings)}.")
    replace_with_bnb_linear(network.language_model.model, quantization_config=wanted)
    for name, layer in network.named_modules():
        key = f"{name}.weight"
        if isinstance(layer, bitsandbytes.nn.Linear4bit) and key in state:
            options = vars(layer.weight)
            state[key] = bitsandbytes.nn.Params4bit(state[key], requires_grad=False, **options)
    network.is_loaded_in_4bit = True  # type: ignore[assignment]  # peft asks for it


def has_gpu() -> bool:
    """Whether there is a CUDA GPU."""
    return torch.cuda.is_available()


def possible_precision(precision: str) -> str:
    """The precision asked for, or ``"float32"`` with a warning where there is no GPU.

    Raises:
        ValueError: If it is unknown.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"Unknown precision {precision!r}; choose one of {', '.join(PRECISIONS)}.")
    if precision == "bf16" and not has_gpu():
        warnings.warn(
            "bf16 needs a CUDA GPU, and none is to be seen here; on a CPU it is about 100 times slower than "
            "float32. Computing in float32.",
            stacklevel=3,
        )
        return "float32"
    return precision


def store_weights(network: nn.Module, frozen: torch.dtype) -> None:
    """Keep trained weights in float32 and frozen ones in another type; quantised ones stay as they are."""
    for parameter in network.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else frozen)


def checkpoint_activations(network: VLANetwork) -> None:
    """In training keep the input of every transformer layer only, and compute the rest again going back."""
    for model in (network.language_model, *(tower.model for tower in network.towers)):
        if model.supports_gradient_checkpointing:
            # The older name is on its way out.
            name = "activation_checkpointing_enable"
            enable = getattr(model, name, None) or model.gradient_checkpointing_enable
            # Re-entrant ones lose the gradient where a layer's input has none, as above a frozen table.
            enable({"use_reentrant": False})


# -- adapters ------------------------------------------------------------------------------------------------
def agreed_lora(wanted: Mapping[str, Any] | None, saved: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Settings of the adapters: those saved with the policy, else those asked for.

    Raises:
        ValueError: If the two differ.
    """
    if wanted and saved and plain(wanted) != plain(saved):
        raise ValueError(
            f"The policy has adapters with lora={dict(saved)} already, got {dict(wanted)}; leave `lora` out "
            "to go on with them, or export it with save_merged and put new ones on that."
        )
    return dict(saved or wanted or {}) or None


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
            twin = copy.deepcopy(layer)  # the network itself goes on unmerged, without a rounding error
            twin.merge()
            state = {k: v for k, v in state.items() if not k.startswith(f"{name}.")}
            state |= {f"{name}.{k}": v for k, v in twin.get_base_layer().state_dict().items()}
    with torch.device("meta"):
        plain = VLANetwork(network.config).state_dict().keys()
    if extra := sorted(state.keys() ^ plain):
        raise ValueError(f"These adapters cannot be merged: {extra[0]} has no place in the plain network.")
    return {name: state[name] for name in plain}

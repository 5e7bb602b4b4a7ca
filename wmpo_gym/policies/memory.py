"""Settings that fit a large policy into the memory of a GPU."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from wmpo_gym.utils.device import Precision

FOUR_BIT = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "bfloat16"}


@dataclass(frozen=True)
class PolicyMemory:
    """Precision, adapters and batching of a policy in training, which decide how much memory it needs.

    Attributes:
        lora_rank: Train low-rank adapters of this rank on the language model instead of all weights.
        precision: fp32, or bf16: compute in bfloat16 and keep frozen weights in it (GPU only).
        four_bit: Quantise the language model's frozen weights to 4 bits (GPU only; needs bitsandbytes and
            --lora-rank).
        gradient_checkpointing: Recompute the activations inside transformer layers in the backward pass.
        micro_batch: Examples per forward and backward pass; the gradient is the same up to rounding.
    """

    lora_rank: int | None = None
    precision: Precision = "fp32"
    four_bit: bool = False
    gradient_checkpointing: bool = False
    micro_batch: int | None = None

    def __post_init__(self) -> None:
        for name in ("lora_rank", "micro_batch"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")
        if self.four_bit and self.lora_rank is None:
            raise ValueError(
                "Weights in 4 bits cannot be trained, only adapters beside them: give lora_rank with "
                "four_bit."
            )

    @property
    def lora(self) -> dict[str, int] | None:
        """Settings of the adapters: the sum of weights and adapters' product, unscaled."""
        return None if self.lora_rank is None else {"r": self.lora_rank, "lora_alpha": self.lora_rank}

    def policy_kwargs(self) -> dict[str, Any]:
        """Arguments of :class:`~wmpo_gym.policies.VLAPolicy`."""
        return {
            "lora": self.lora,
            "quantization": FOUR_BIT if self.four_bit else None,
            "precision": self.precision,
            "gradient_checkpointing": self.gradient_checkpointing,
        }

    def changes(self) -> dict[str, Any]:
        """What differs from the defaults."""
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}

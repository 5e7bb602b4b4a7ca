"""What stands in a saved policy's directory beside its weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from wmpo_gym.policies.processor import LOCAL_TOKENIZER, copy_tokenizer
from wmpo_gym.policies.vla_config import VLAConfig
from wmpo_gym.utils.io import ArtifactError, read_json, write_json_atomic

FORMAT_VERSION = 1


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
    """Write all of a policy's directory but its weights.

    Args:
        directory: Where to; exists.
        config: The network. A tokenizer in a directory is copied, so that the policy can be moved.
        instructions: The task's sentences.
        temperature: Divides the logits.
        pixels: Shape of the observed image.
        lora: Keyword arguments of ``peft.LoraConfig`` if the weights are adapters, ...
        base: ... and the policy that they belong to.
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
        "base": base,
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

"""Preprocessing of a policy's observations: images and tokenised instructions."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch.nn import functional as F

from wmpo_gym.policies.vla import VLAConfig
from wmpo_gym.utils.io import ArtifactError

PLACEHOLDER = -1
LOCAL_TOKENIZER = "tokenizer"
"""In a saved policy's configuration: the tokenizer lies in this folder beside it."""

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)


class TextTokenizer(Protocol):
    """What is asked of a tokenizer: every token is one or more ids, whose embeddings are added up."""

    start: list[int]
    stop: list[int]
    pad: list[int]

    def encode(self, text: str) -> list[list[int]]:
        """Tokens of a text without start and stop."""
        ...


class ByteTokenizer:
    """UTF-8 bytes as ids; needs no vocabulary file and reads any sentence.

    A token holds ``group`` bytes. The byte at position i of its token has id ``256 * i + byte``, so that
    order within the token counts; a text is filled up with zero bytes.

    Args:
        group: Bytes per token.
    """

    def __init__(self, group: int = 1) -> None:
        self.group = group
        pad = 256 * group
        self.pad, self.start, self.stop = ([pad + i, *[pad] * (group - 1)] for i in range(3))

    def encode(self, text: str) -> list[list[int]]:
        """The bytes of ``text``, group by group."""
        data = text.encode("utf-8")
        data += bytes(-len(data) % self.group)
        ids = [256 * (i % self.group) + byte for i, byte in enumerate(data)]
        return [ids[i : i + self.group] for i in range(0, len(ids), self.group)]

    def decode(self, tokens: Sequence[Sequence[int]]) -> str:
        """The text of tokens; start, stop and padding are skipped."""
        limit = 256 * self.group
        data = bytes(i % 256 for token in tokens if token[0] < limit for i in token)
        return data.rstrip(b"\0").decode("utf-8", errors="replace")


class PretrainedTokenizer:
    """A transformers tokenizer from a directory or the hub."""

    def __init__(self, name: str) -> None:
        from transformers import AutoTokenizer

        self._tokenizer = AutoTokenizer.from_pretrained(name)
        pad = self._tokenizer.pad_token_id
        self.start, self.stop = [self._tokenizer.bos_token_id], [self._tokenizer.eos_token_id]
        self.pad = self.stop if pad is None else [pad]

    def encode(self, text: str) -> list[list[int]]:
        """Tokens of ``text`` without start and stop."""
        return [[i] for i in self._tokenizer.encode(text, add_special_tokens=False)]


def copy_tokenizer(source: str | Path, target: Path) -> None:
    """Copy the files of a transformers tokenizer, and nothing else, to a new folder.

    Raises:
        ArtifactError: If there are none.
    """
    found = [Path(source) / name for name in _TOKENIZER_FILES if (Path(source) / name).is_file()]
    if not any(file.name in ("tokenizer.json", "tokenizer.model") for file in found):
        raise ArtifactError(
            f"{source} holds no tokenizer (tokenizer.json or tokenizer.model); download these files too."
        )
    target.mkdir()
    for file in found:
        shutil.copyfile(file, target / file.name)


def load_tokenizer(config: VLAConfig) -> TextTokenizer:
    """The tokenizer of the prompt that a configuration names."""
    return (
        ByteTokenizer(config.bytes_per_token)
        if config.tokenizer == "bytes"
        else PretrainedTokenizer(config.tokenizer)
    )


class InstructionTable:
    """The network's text input for every instruction of a task, tokenised once.

    Attributes:
        text: int64 (N,S,bytes_per_token), start token, prompt, placeholders, stop token, padding.
        length: int64 (N,), prompt tokens including the start token.

    Args:
        instructions: The task's sentences; an observation's ``task_id`` indexes them.
        config: The network's configuration.

    Raises:
        ValueError: If there is no instruction, or one is blank.
    """

    def __init__(self, instructions: Sequence[str], config: VLAConfig) -> None:
        if not instructions or not all(s.strip() for s in instructions):
            raise ValueError(
                f"A VLA policy needs the task's instructions, none of them blank; got {list(instructions)}. "
                "Pass instructions=task.instructions."
            )
        tokenizer = load_tokenizer(config)
        suffix = [[i] for i in config.prompt_suffix]
        blank = [PLACEHOLDER] * config.bytes_per_token
        prompts = [
            [tokenizer.start, *tokenizer.encode(config.prompt.format(task=s)), *suffix] for s in instructions
        ]
        rows = [[*p, *[blank] * config.n_tokens, tokenizer.stop] for p in prompts]
        width = max(map(len, rows))
        self.text = torch.tensor([[*r, *[tokenizer.pad] * (width - len(r))] for r in rows])
        self.length = torch.tensor([len(p) for p in prompts])

    def __call__(self, task_id: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Text (B,S,bytes_per_token) and prompt lengths (B,) for task ids (B,), on their device.

        Raises:
            ValueError: If a task id has no instruction.
        """
        task_id = task_id.reshape(-1).long()
        if len(task_id) and not 0 <= int(task_id.min()) <= int(task_id.max()) < len(self.text):
            raise ValueError(
                f"task_id must be in [0, {len(self.text) - 1}], one per instruction the policy was given; "
                f"got {sorted(set(task_id.tolist()))}."
            )
        self.text, self.length = self.text.to(task_id.device), self.length.to(task_id.device)
        return self.text[task_id], self.length[task_id]


def channels_first(pixels: torch.Tensor) -> torch.Tensor:
    """View uint8 (B,H,W,3) or (B,3,H,W) as (B,3,H,W).

    Raises:
        ValueError: If neither layout fits or the pixels are not uint8.
    """
    if pixels.dtype != torch.uint8 or pixels.ndim != 4 or 3 not in (pixels.shape[-1], pixels.shape[1]):
        raise ValueError(
            f"pixels must be uint8 of shape (B,H,W,3) or (B,3,H,W), got {pixels.dtype} {tuple(pixels.shape)}."
        )
    return pixels.permute(0, 3, 1, 2) if pixels.shape[-1] == 3 else pixels


def prepare_images(pixels: torch.Tensor, config: VLAConfig) -> list[torch.Tensor]:
    """Crop, resize and normalise pixels for every tower.

    Args:
        pixels: uint8 (B,H,W,3) or (B,3,H,W).
        config: The network's configuration.

    Returns:
        One float32 batch (B,3 or 5,image_size,image_size) per tower.
    """
    image = channels_first(pixels).float() / 255.0
    if config.crop_area < 1.0 or image.shape[-2:] != (config.image_size, config.image_size):
        image = _crop_and_resize(image, config.image_size, config.crop_area)
    batches = []
    for tower in config.towers:
        mean = torch.tensor(tower.mean, device=image.device)[:, None, None]
        std = torch.tensor(tower.std, device=image.device)[:, None, None]
        batch = (image - mean) / std
        if config.coordinates:
            axis = torch.linspace(-1.0, 1.0, config.image_size, device=image.device)
            grid = torch.stack(torch.meshgrid(axis, axis, indexing="ij"))
            batch = torch.cat([batch, grid.expand(len(batch), -1, -1, -1)], dim=1)
        batches.append(batch)
    return batches


def _crop_and_resize(image: torch.Tensor, size: int, area: float) -> torch.Tensor:
    """Centre crop of ``area`` of the image, sampled bilinearly at ``size`` x ``size`` points.

    The first and last sample lie on the edges of the crop, as in TensorFlow's ``crop_and_resize``, which the
    published policy is fine-tuned with (side ``sqrt(0.9)`` = 0.948683).
    """
    side = area**0.5
    axis = torch.linspace(-side, side, size, device=image.device)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    grid = torch.stack([x, y], dim=-1).expand(len(image), -1, -1, -1)
    return F.grid_sample(image, grid, mode="bilinear", align_corners=True)

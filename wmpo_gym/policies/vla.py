"""The vision-language-action network: OpenVLA-OFT with discrete tokens, at any size, from transformers parts.

One or two vision towers look at the image, a projector turns their patches into word embeddings, and a Llama
with fully bidirectional attention reads ``<s> patches prompt placeholders </s>``. Every placeholder stands
for one number of the action chunk; all of them are decoded in one forward pass (parallel decoding).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from wmpo_gym.policies.tokens import ActionTokenizer

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5)
BYTE_SPECIALS = 3  # padding, start and stop follow the bytes in the byte tokenizer's vocabulary


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, (list, tuple)) else value


@dataclass(frozen=True)
class TowerConfig:
    """One vision tower.

    Attributes:
        model_type: Any ``model_type`` of transformers whose model returns patches (B,P,C) or a map (B,C,h,w).
        settings: Keyword arguments of its transformers config.
        mean: Mean per RGB channel, of pixels scaled to [0, 1].
        std: Standard deviation per RGB channel.
        feature_layer: Index into the hidden states, -1 for the last, -2 for the one before as in OpenVLA.
        prefix_tokens: Class and register tokens in front of the patches, dropped.
    """

    model_type: str
    settings: dict[str, Any]
    mean: tuple[float, float, float] = HALF
    std: tuple[float, float, float] = HALF
    feature_layer: int = -1
    prefix_tokens: int = 0


@dataclass(frozen=True)
class VLAConfig:
    """Everything that fixes the network's parameters and its inputs; JSON-able.

    Attributes:
        towers: The vision towers; their features are concatenated.
        image_size: Side in pixels of the towers' input.
        crop_area: Share of the image kept by the centre crop (published: 0.9).
        bytes_per_token: With the byte tokenizer, how many bytes one token holds: their embeddings, one table
            per position, are added. More make the sequence shorter.
        patch_merge: Join squares of this many by this many neighbouring patches into one before projecting
            (space to depth), again to make the sequence shorter.
        coordinates: Append two channels holding the row and the column in [-1, 1], which lets a small
            convolutional tower tell *where* something is.
        projector: Hidden widths of the projector's MLP.
        language: Keyword arguments of ``LlamaConfig``.
        chunk: Actions per decision (K).
        action_dim: Numbers per action (D).
        n_bins: Action tokens per number.
        bin_layout: See :class:`ActionTokenizer`.
        text_vocabulary: Text tokens; the action tokens are the last ``n_bins`` of them.
        tokenizer: ``"bytes"`` or a directory or hub id of a transformers tokenizer.
        prompt: Template of the prompt.
        prompt_suffix: Token ids appended to the prompt (OpenVLA: 29871, a lone space).
        learned_placeholders: Give each placeholder its own embedding instead of zeros. A zero vector passes
            the first attention layer unmoved, which a network of two or three layers cannot afford.
        film: Let the instruction scale and shift the tower's features (FiLM, as in OpenVLA-OFT+), so that a
            small network finds the named object quickly.
    """

    towers: tuple[TowerConfig, ...]
    image_size: int
    language: dict[str, Any]
    projector: tuple[int, ...]
    chunk: int
    action_dim: int
    n_bins: int = 256
    bin_layout: str = "edges"
    text_vocabulary: int = 32000
    tokenizer: str = "bytes"
    prompt: str = "In: What action should the robot take to {task}?\nOut:"
    prompt_suffix: tuple[int, ...] = ()
    crop_area: float = 1.0
    bytes_per_token: int = 1
    patch_merge: int = 1
    coordinates: bool = False
    learned_placeholders: bool = False
    film: bool = False

    def __post_init__(self) -> None:
        if not 1 <= len(self.towers) <= 2:
            raise ValueError(f"A VLA has one or two vision towers, got {len(self.towers)}.")
        if "{task}" not in self.prompt:
            raise ValueError(f"The prompt template must contain {{task}}, got {self.prompt!r}.")
        if not 0.0 < self.crop_area <= 1.0:
            raise ValueError(f"crop_area must be in (0, 1], got {self.crop_area}.")
        needed = 256 * self.bytes_per_token + BYTE_SPECIALS + self.n_bins
        if self.tokenizer == "bytes" and self.text_vocabulary < needed:
            raise ValueError(
                f"text_vocabulary must hold the byte tokens and n_bins={self.n_bins} action tokens, together "
                f"{needed}; got {self.text_vocabulary}."
            )
        if self.tokenizer != "bytes" and self.bytes_per_token != 1:
            raise ValueError(f"bytes_per_token={self.bytes_per_token} needs the byte tokenizer.")

    @property
    def n_tokens(self) -> int:
        """Action tokens per decision, L = K * D."""
        return self.chunk * self.action_dim

    def action_tokenizer(self) -> ActionTokenizer:
        """The tokenizer of the actions."""
        return ActionTokenizer(self.n_bins, self.bin_layout, self.text_vocabulary)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form; :meth:`from_dict` restores it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> VLAConfig:
        """Rebuild a configuration, also after a trip through JSON.

        Raises:
            ValueError: If keys are missing or unknown.
        """
        names = {f.name for f in fields(cls)}
        if unknown := sorted(set(data) - names):
            raise ValueError(f"Unknown keys in the VLA configuration: {unknown}; known are {sorted(names)}.")
        try:
            values = {k: v if k == "language" else _tuples(v) for k, v in data.items() if k != "towers"}
            towers = [
                TowerConfig(**{k: v if k == "settings" else _tuples(v) for k, v in tower.items()})
                for tower in data["towers"]
            ]
            return cls(towers=tuple(towers), **values)
        except (KeyError, TypeError) as error:
            raise ValueError(f"The VLA configuration is incomplete or misspelt: {error}.") from error

    @classmethod
    def tiny(cls, *, chunk: int = 4, action_dim: int = 3, image_size: int = 40, **changes: Any) -> VLAConfig:
        """A network that a CPU trains in about a minute, for images of 32 to 64 pixels.

        Two convolutional stages see the image at a half and a quarter of its size; each quadrant becomes one
        token, so that the projector reads positions from whole quadrants, exactly and with few examples.

        Args:
            chunk: Actions per decision.
            action_dim: Numbers per action.
            image_size: Side of the square image, a multiple of 8.
            **changes: Any other field.

        Raises:
            ValueError: If the image size is not a multiple of 8.
        """
        if image_size % 8:
            raise ValueError(f"image_size of the tiny VLA must be a multiple of 8, got {image_size}.")
        tower = TowerConfig(
            "convnext",
            {
                "num_channels": 5,
                "patch_size": 2,
                "num_stages": 2,
                "hidden_sizes": [32, 64],
                "depths": [1, 1],
                "layer_scale_init_value": 0.0,
                "initializer_range": 0.1,
                "image_size": image_size,
            },
        )
        language = {
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 512,
            "initializer_range": 0.06,
        }
        values: dict[str, Any] = {
            "towers": (tower,),
            "image_size": image_size,
            "language": language,
            "projector": (256,),
            "chunk": chunk,
            "action_dim": action_dim,
            "n_bins": 15,
            "bin_layout": "centers",
            "prompt": "{task}",
            "bytes_per_token": 4,
            "patch_merge": image_size // 8,
            "coordinates": True,
            "learned_placeholders": True,
            "film": True,
        }
        values.update(changes)
        size = 256 * values["bytes_per_token"] + BYTE_SPECIALS + values["n_bins"]
        return cls(**{"text_vocabulary": size, **values})

    @classmethod
    def openvla_oft_7b(cls, *, chunk: int = 8, action_dim: int = 7, **changes: Any) -> VLAConfig:
        """The published 7B policy: DINOv2 ViT-L/14 with registers and SigLIP so400m/14 at 224, Llama-2-7B."""
        dino = TowerConfig(
            "dinov2_with_registers",
            {
                "hidden_size": 1024,
                "num_hidden_layers": 24,
                "num_attention_heads": 16,
                "num_register_tokens": 4,
                "image_size": 224,
                "patch_size": 14,
            },
            mean=IMAGENET_MEAN,
            std=IMAGENET_STD,
            feature_layer=-2,
            prefix_tokens=5,
        )
        siglip = TowerConfig(
            "siglip_vision_model",
            {
                "hidden_size": 1152,
                "intermediate_size": 4304,
                "num_hidden_layers": 27,
                "num_attention_heads": 16,
                "image_size": 224,
                "patch_size": 14,
                "vision_use_head": False,
            },
            feature_layer=-2,
        )
        language = {"vocab_size": 32064, "max_position_embeddings": 2048, "rms_norm_eps": 1e-6}
        base = cls(
            towers=(dino, siglip),
            image_size=224,
            language=language,
            projector=(8704, 4096),
            chunk=chunk,
            action_dim=action_dim,
            tokenizer="openvla/openvla-7b",
            prompt_suffix=(29871,),
            crop_area=0.9,
        )
        return replace(base, **changes)


class Projector(nn.Module):
    """MLP with GELU between its layers ``fc1``, ``fc2``, ...; from patch features to word embeddings."""

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        self.n_layers = len(widths) - 1
        for i in range(self.n_layers):
            self.add_module(f"fc{i + 1}", nn.Linear(widths[i], widths[i + 1]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Project (B,P,C_in) to (B,P,C_out)."""
        for i in range(self.n_layers):
            x = self.get_submodule(f"fc{i + 1}")(x if i == 0 else F.gelu(x))
        return x


def merge_patches(patches: torch.Tensor, side: int) -> torch.Tensor:
    """Join squares of ``side``² neighbouring patches of a square grid: (B,P,C) to (B,P/side²,C·side²)."""
    if side == 1:
        return patches
    batch, n, width = patches.shape
    grid = math.isqrt(n)
    cells = patches.reshape(batch, grid // side, side, grid // side, side, width)
    return cells.transpose(2, 3).reshape(batch, n // side**2, width * side**2)


class VisionTower(nn.Module):
    """A transformers vision backbone that returns its patches, whatever the backbone."""

    def __init__(self, config: TowerConfig) -> None:
        super().__init__()
        from transformers import AutoConfig, AutoModel

        self.config = config
        self.model = AutoModel.from_config(AutoConfig.for_model(config.model_type, **config.settings))

    @property
    def width(self) -> int:
        """Channels of a patch feature."""
        settings = self.model.config
        return settings.hidden_sizes[-1] if hasattr(settings, "hidden_sizes") else settings.hidden_size

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Patches (B,P,C) of normalised pixels (B,channels,H,W)."""
        if self.config.feature_layer == -1:
            features = self.model(pixel_values=pixels).last_hidden_state
        else:
            outputs = self.model(pixel_values=pixels, output_hidden_states=True)
            features = outputs.hidden_states[self.config.feature_layer]
        if features.ndim == 4:
            return features.flatten(2).transpose(1, 2)
        return features[:, self.config.prefix_tokens :]


class VLANetwork(nn.Module):
    """Logits over action tokens for an image and an instruction, all tokens in one pass.

    Args:
        config: Sizes of everything.

    Raises:
        ImportError: If transformers is missing.
    """

    def __init__(self, config: VLAConfig) -> None:
        super().__init__()
        try:
            from transformers import LlamaConfig, LlamaForCausalLM
        except ImportError as error:
            raise ImportError('VLA policies need transformers: pip install "wmpo-gym[vla]"') from error
        self.config = config
        language = LlamaConfig(**{"vocab_size": config.text_vocabulary, **config.language})
        # Parallel decoding: every position sees every other. The flag is for transformers' own mask maker,
        # which we never rely on: forward() always hands over an explicit mask.
        language.is_causal = False
        towers = [VisionTower(tower) for tower in config.towers]
        self.towers = nn.ModuleList(towers)
        patch_width = sum(tower.width for tower in towers)
        self.projector = Projector(
            (patch_width * config.patch_merge**2, *config.projector, language.hidden_size)
        )
        self.film: nn.Linear | None = None
        if config.film:
            self.film = nn.Linear(language.hidden_size, 2 * patch_width)
            nn.init.zeros_(self.film.weight)
            nn.init.zeros_(self.film.bias)
        self.language_model = LlamaForCausalLM(language)
        for layer in self.language_model.model.layers:
            layer.self_attn.is_causal = False
        self.placeholders = None
        if config.learned_placeholders:
            scale = language.initializer_range
            self.placeholders = nn.Parameter(torch.randn(config.n_tokens, language.hidden_size) * scale)
        first = config.text_vocabulary - config.n_bins
        self._action_ids = slice(first, config.text_vocabulary)

    def forward(
        self, images: Sequence[torch.Tensor], text: torch.Tensor, length: torch.Tensor
    ) -> torch.Tensor:
        """Action-token logits.

        Args:
            images: One normalised batch (B,channels,H,W) per tower.
            text: int64 (B,S,bytes_per_token), ids whose embeddings add up: start token, prompt, ``n_tokens``
                placeholders (-1), stop token, padding.
            length: int64 (B,), number of prompt tokens *including* the start token.

        Returns:
            Float32 logits (B,L,n_bins). Token j is read one position before its placeholder, where a causal
            language model predicts it.
        """
        seen = torch.cat([tower(x) for tower, x in zip(self.towers, images, strict=True)], dim=-1)
        words = self._embed(text)
        if self.film is not None:
            seen = self._modulated(seen, words, length)
        patches = self.projector(merge_patches(seen, self.config.patch_merge))
        sequence = torch.cat([words[:, :1], patches.to(words.dtype), words[:, 1:]], dim=1)
        n_patches = patches.shape[1]
        total = n_patches + length + self.config.n_tokens + 1
        position = torch.arange(sequence.shape[1], device=text.device)
        visible = (position < total[:, None])[:, None, None, :]
        hidden = self.language_model.model(
            inputs_embeds=sequence,
            attention_mask=visible,
            position_ids=position[None],
            use_cache=False,
        ).last_hidden_state
        read = (n_patches + length - 1)[:, None] + torch.arange(self.config.n_tokens, device=text.device)
        rows = torch.arange(len(text), device=text.device)[:, None]
        return self._head(hidden[rows, read]).float()

    def _modulated(self, seen: torch.Tensor, words: torch.Tensor, length: torch.Tensor) -> torch.Tensor:
        """Tower features (B,P,C) scaled and shifted by the sum of the prompt's word embeddings."""
        prompt = torch.arange(words.shape[1], device=words.device) < length[:, None]
        sentence = (words * prompt[..., None]).sum(dim=1)
        assert self.film is not None
        scale, shift = self.film(sentence)[:, None].chunk(2, dim=-1)
        return seen * (1 + scale) + shift

    def _embed(self, text: torch.Tensor) -> torch.Tensor:
        """Word embeddings (B,S,C) with the placeholders' own embeddings, or zeros, in place."""
        blank = text[..., 0] < 0
        words = self.language_model.model.embed_tokens(text.clamp(min=0)).sum(dim=2)
        if self.placeholders is None:
            return words.masked_fill(blank[..., None], 0.0)
        slot = (blank.cumsum(dim=1) - 1).clamp(min=0)
        return torch.where(blank[..., None], self.placeholders[slot], words)

    def _head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits of the action tokens only; the rest of the vocabulary is never computed if avoidable."""
        head = self.language_model.lm_head
        if type(head) is nn.Linear:
            return F.linear(hidden, head.weight[self._action_ids])
        return head(hidden)[..., self._action_ids]

    def n_parameters(self) -> int:
        """Number of parameters."""
        return sum(math.prod(p.shape) for p in self.parameters())

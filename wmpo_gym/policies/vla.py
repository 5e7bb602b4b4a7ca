"""The vision-language-action network: OpenVLA-OFT with discrete tokens, at any size, from transformers parts.

One or two vision towers look at the image, a projector turns their patches into word embeddings, and a Llama
with fully bidirectional attention reads ``<s> patches prompt placeholders </s>``. Every placeholder stands
for one number of the action chunk; all of them are decoded in one forward pass (parallel decoding).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from wmpo_gym.policies.vla_config import TowerConfig, VLAConfig

__all__ = ["TowerConfig", "VLAConfig", "VLANetwork"]


# Layers whose output in training is random or depends on the rest of the batch.
_RANDOM_LAYERS = (nn.modules.dropout._DropoutNd, nn.modules.batchnorm._BatchNorm)


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
        self._action_ids = slice(config.action_tokenizer().first_token_id, config.text_vocabulary)

    def train(self, mode: bool = True) -> VLANetwork:
        """Switch between training and evaluation mode, but keep dropout and batch statistics off.

        Otherwise the ratio of new to old probabilities would not be one before the first update.
        """
        super().train(mode)
        for module in self.modules():
            if isinstance(module, _RANDOM_LAYERS) or type(module).__name__.endswith("DropPath"):
                module.eval()
        return self

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
        features = torch.cat([tower(x) for tower, x in zip(self.towers, images, strict=True)], dim=-1)
        words = self._embed(text)
        if self.film is not None:
            features = self._modulated(features, words, length)
        patches = self.projector(merge_patches(features, self.config.patch_merge))
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

    def _modulated(self, features: torch.Tensor, words: torch.Tensor, length: torch.Tensor) -> torch.Tensor:
        """Tower features (B,P,C) scaled and shifted by the sum of the prompt's word embeddings."""
        prompt = torch.arange(words.shape[1], device=words.device) < length[:, None]
        sentence = (words * prompt[..., None]).sum(dim=1)
        assert self.film is not None
        scale, shift = self.film(sentence)[:, None].chunk(2, dim=-1)
        return features * (1 + scale) + shift

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

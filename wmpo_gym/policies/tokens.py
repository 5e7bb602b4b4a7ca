"""Actions as tokens: uniform bins over [-1, 1] at the upper end of the language model's vocabulary.

As in OpenVLA, bins are counted downwards from the end of the vocabulary: the highest token id is the lowest
action value. Policies work with the *index* of a token among the action tokens (0 is the lowest id, that is
the highest value); adding ``first_token_id`` gives the vocabulary id.
"""

from __future__ import annotations

import numpy as np
import torch

BIN_LAYOUTS = ("edges", "centers")


class ActionTokenizer:
    """Maps actions in [-1, 1] to action-token indices and back.

    Two layouts of the bins are known:

    * ``"edges"``, the published one: ``n_bins`` edges from -1 to 1 with ``n_bins - 1`` bins between them;
      the two lowest token ids both mean the highest bin.
    * ``"centers"``: ``n_bins`` bin centres from -1 to 1, so that both limits and, for odd ``n_bins``, zero
      are exact. Few bins want this one.

    Attributes:
        values: float64 (n_bins,), the action value of each token index.

    Args:
        n_bins: Number of action tokens, at least 2.
        layout: ``"edges"`` or ``"centers"``.
        vocab_size: Size of the text vocabulary; action tokens are its last ``n_bins`` ids.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(self, n_bins: int = 256, layout: str = "edges", vocab_size: int = 32000) -> None:
        if layout not in BIN_LAYOUTS:
            raise ValueError(f"Unknown bin layout {layout!r}; choose one of {', '.join(BIN_LAYOUTS)}.")
        if not 2 <= n_bins <= vocab_size:
            raise ValueError(f"n_bins must be between 2 and vocab_size={vocab_size}, got {n_bins}.")
        self.n_bins = n_bins
        self.layout = layout
        self.vocab_size = vocab_size
        grid = torch.from_numpy(np.linspace(-1.0, 1.0, n_bins))  # torch.linspace differs in the last bit
        if layout == "edges":
            self._edges = grid
            self.centers = (grid[:-1] + grid[1:]) / 2
        else:
            self._edges = torch.cat([grid[:1] - 1.0, (grid[:-1] + grid[1:]) / 2])
            self.centers = grid
        bins = (n_bins - 1 - torch.arange(n_bins)).clamp(max=len(self.centers) - 1)
        self.values = self.centers[bins]

    @property
    def first_token_id(self) -> int:
        """Vocabulary id of token index 0."""
        return self.vocab_size - self.n_bins

    def encode(self, actions: torch.Tensor) -> torch.Tensor:
        """Token indices of actions.

        Args:
            actions: Float tensor of any shape; values outside [-1, 1] are clipped.

        Returns:
            int64 of the same shape, in [0, n_bins).

        Raises:
            ValueError: If a value is NaN. (The published tokenizer maps NaN to the highest action.)
        """
        if torch.isnan(actions).any():
            raise ValueError("Cannot encode NaN as an action token; check the recorded actions.")
        clipped = actions.double().clamp(-1.0, 1.0)
        at_or_below = torch.bucketize(clipped, self._edges.to(actions.device), right=True)
        return self.n_bins - at_or_below

    def decode(self, indices: torch.Tensor) -> torch.Tensor:
        """Action values float32 of token indices (any shape)."""
        return self.values.to(device=indices.device, dtype=torch.float32)[indices]


def unnormalise_actions(
    actions: torch.Tensor, low: torch.Tensor, high: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Policy actions in [-1, 1] to physical ones, ``(a + 1) / 2 * (high - low + 1e-8) + low``.

    Args:
        actions: (..., D) in [-1, 1].
        low: (D,) physical value of -1 (q01 or minimum of the training data).
        high: (D,) physical value of +1 (q99 or maximum).
        mask: bool (D,); dimensions that are False pass through unchanged (a gripper already in [-1, 1]).

    Returns:
        Tensor of the shape and dtype of ``actions``.
    """
    physical = 0.5 * (actions + 1) * (high - low + 1e-8) + low
    return physical if mask is None else torch.where(mask, physical, actions)


def token_statistics(
    logits: torch.Tensor, tokens: torch.Tensor, temperature: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability and entropy of categorical tokens.

    Args:
        logits: Float (..., n_bins).
        tokens: int64 (...), the chosen bins.
        temperature: Divides the logits; must be the one the tokens were sampled with.

    Returns:
        ``log_prob`` and ``entropy``, float (...), in nats.
    """
    log_probs = torch.log_softmax(logits / temperature, dim=-1)
    chosen = log_probs.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    return chosen, -(log_probs.exp() * log_probs).sum(-1)

"""Configuration of the vision-language-action network, from a CPU toy to the published 7B."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

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
        tokenizer: ``"bytes"`` or a directory or hub id of a transformers tokenizer; a saved policy keeps one
            from a directory in its own folder ``tokenizer``.
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
                "hidden_act": "gelu",  # exact, as timm has it; transformers' default is an approximation
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

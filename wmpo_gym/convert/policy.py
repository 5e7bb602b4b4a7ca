"""Conversion of a released OpenVLA-OFT checkpoint to a policy directory."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from wmpo_gym.convert.checkpoints import check_disk, check_layout, copy_safetensors, read_weights, size_of
from wmpo_gym.convert.released import Converted, ReleasedTask, check_path_names_task
from wmpo_gym.convert.statistics import read_statistics
from wmpo_gym.policies.processor import InstructionTable
from wmpo_gym.policies.vla import VLAConfig, VLANetwork
from wmpo_gym.policies.weights import read_policy_card, write_policy_card
from wmpo_gym.utils.io import ArtifactError, read_json, write_dir_atomic

TIMM_MODELS = ("vit_large_patch14_reg4_dinov2.lvd142m", "vit_so400m_patch14_siglip_224")
"""The vision towers of OpenVLA, by the names its ``config.json`` gives them."""

_FEATURIZERS = ("featurizer", "fused_featurizer")
# Parts of our names (transformers') and what they are called in the release (timm's, with scale_factor).
_TOWER_NAMES = {
    "dinov2_with_registers": {
        "embeddings.patch_embeddings.projection.": "patch_embed.proj.",
        "embeddings.cls_token": "cls_token",
        "embeddings.register_tokens": "reg_token",
        "embeddings.position_embeddings": "pos_embed",
        "encoder.layer.": "blocks.",
        ".attention.o_proj.": ".attn.proj.",
        ".layer_scale1.lambda1": ".ls1.scale_factor",
        ".layer_scale2.lambda1": ".ls2.scale_factor",
        "layernorm.": "norm.",
    },
    "siglip_vision_model": {
        "embeddings.patch_embedding.": "patch_embed.proj.",
        "embeddings.position_embedding.weight": "pos_embed",
        "encoder.layers.": "blocks.",
        ".layer_norm1.": ".norm1.",
        ".layer_norm2.": ".norm2.",
        ".self_attn.out_proj.": ".attn.proj.",
        "post_layernorm.": "norm.",
    },
}
_PACKED = re.compile(r"\.(?:attention|self_attn)\.([qkv])_proj\.")
# What the language models have in common or not, beyond the shapes of their weights.
_LANGUAGE_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "rms_norm_eps",
    "rope_parameters",
    "max_position_embeddings",
)


@dataclass(frozen=True)
class Origin:
    """The published tensor that one of ours comes from.

    Attributes:
        name: Its name.
        form: How ours lies in it: ``"whole"``; ``"q"``, ``"k"`` or ``"v"``, a third of its rows;
            ``"patches"``, which lacks the class token's place in front; ``"batched"``, which has one
            dimension of size 1 more.
    """

    name: str
    form: str = "whole"

    def shape(self, ours: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the published tensor, from that of ours."""
        if self.form in "qkv":
            return (3 * ours[0], *ours[1:])
        if self.form == "patches":
            return (ours[0], ours[1] - 1, *ours[2:])
        return (1, *ours) if self.form == "batched" else ours

    def take(self, published: Tensor) -> Tensor:
        """Ours, a view of the published tensor where that is possible."""
        if self.form in "qkv":
            return published.chunk(3)["qkv".index(self.form)]
        if self.form == "patches":  # there the class token has no position; adding zeros changes nothing
            return torch.cat([torch.zeros_like(published[:, :1]), published], dim=1)
        return published[0] if self.form == "batched" else published


def convert_policy(
    source: str | Path,
    out: str | Path,
    task: ReleasedTask,
    *,
    statistics: Path | None = None,
    config: VLAConfig | None = None,
) -> Converted:
    """Write a policy that :meth:`VLAPolicy.from_pretrained` takes, in the precision of the source.

    Everything is checked before the weights are written; they are copied one tensor at a time.

    Args:
        source: Hugging Face directory of an OpenVLA-OFT checkpoint (``SFT_models/TASK`` or
            ``WMPO_models/TASK/P_128``), with ``config.json``, weights and tokenizer.
        out: Directory of the policy.
        task: Settings of the task.
        statistics: Action statistics; None is the ``dataset_statistics.json`` in ``source``.
        config: Architecture; None is the published 7B.

    Raises:
        ArtifactError: If a file is damaged, holds code, belongs to another task, robot or architecture, or
            does not fit on the disk.
    """
    source, out = Path(source), Path(out)
    check_path_names_task(source, task)
    config = config or VLAConfig.openvla_oft_7b(chunk=task.chunk.value, action_dim=task.action_dim.value)
    check_config(source / "config.json", config)
    statistics = statistics or source / "dataset_statistics.json"
    if not statistics.is_file():
        raise ArtifactError(
            f"There are no action statistics {statistics}; give those of the policy the "
            "checkpoint was trained from (--statistics SFT_models/TASK/dataset_statistics.json)."
        )
    actions = read_statistics(statistics, task)
    with torch.device("meta"):
        network = VLANetwork(config)
    weights = read_weights(source)
    layout, dead = policy_layout(network)
    dropped = check_layout(weights, layout, f"a released policy ({source})", dead)
    tensors = translate(weights, network)
    check_disk(out, size_of(tensors))
    with write_dir_atomic(out) as temporary:
        write_policy_card(
            temporary,
            replace(config, tokenizer=str(source)),
            instructions=(task.prompt.value,),
            temperature=task.temperature.value,
            pixels=(task.image_size.value, task.image_size.value, 3),
            meta={
                "task": task.name,
                "statistics": actions.to_dict(),
                "converted": {"from": source.name, "settings": task.to_dict(), "dropped": dropped},
            },
        )
        _check_tokenizer(temporary)
        copy_safetensors(temporary / "model.safetensors", tensors)
    return Converted(out, dropped, sum(weights[name].numel() for name in dropped), task)


def _check_tokenizer(directory: Path) -> None:
    """Tokenise the prompt, before the long part of the work."""
    card = read_policy_card(directory)
    try:
        text = InstructionTable(card["instructions"], card["config"]).text
    except Exception as error:  # tokenizers raise many kinds over damaged files
        raise ArtifactError(f"The tokenizer cannot be used ({error}); download its files again.") from error
    if int(text.max()) >= card["config"].language["vocab_size"]:
        raise ArtifactError(
            f"The tokenizer gives token {int(text.max())}, the language model knows "
            f"{card['config'].language['vocab_size']}; they belong to different models."
        )


def origins(network: VLANetwork) -> dict[str, Origin | None]:
    """The published tensor of each of a network's; None for the mask token, which only training uses."""
    found: dict[str, Origin | None] = {}
    for name in network.state_dict():
        if tower := re.fullmatch(r"towers\.(\d)\.model\.(.+)", name):
            i = int(tower[1])
            found[name] = _tower_origin(tower[2], network.config.towers[i].model_type, _FEATURIZERS[i])
        else:
            found[name] = Origin(name)
    return found


def _tower_origin(name: str, model_type: str, featurizer: str) -> Origin | None:
    if model_type not in _TOWER_NAMES:
        raise ValueError(f"No released names for towers of type {model_type!r}; known: {list(_TOWER_NAMES)}.")
    if name == "embeddings.mask_token":
        return None
    form = "whole"
    if packed := _PACKED.search(name):
        form, name = packed[1], _PACKED.sub(".attn.qkv.", name)
    elif name == "embeddings.position_embeddings":
        form = "patches"
    elif name == "embeddings.position_embedding.weight":
        form = "batched"
    for ours, published in _TOWER_NAMES[model_type].items():
        name = name.replace(ours, published)
    return Origin(f"vision_backbone.{featurizer}.{name}", form)


def policy_layout(network: VLANetwork) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]:
    """Names and shapes of the published tensors: those that make up a network, and those nothing computes.

    The latter are SigLIP's pooling head: the policy reads patches, not the picture's summary.
    """
    ours = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    layout = {o.name: o.shape(ours[name]) for name, o in origins(network).items() if o is not None}
    dead: dict[str, tuple[int, ...]] = {}
    for tower, featurizer in zip(network.config.towers, _FEATURIZERS, strict=False):
        if tower.model_type == "siglip_vision_model":
            pool = f"vision_backbone.{featurizer}.attn_pool"
            width, hidden = tower.settings["hidden_size"], tower.settings["intermediate_size"]
            sizes = {"q": (width, width), "kv": (2 * width, width), "proj": (width, width), "norm": (width,)}
            sizes |= {"mlp.fc1": (hidden, width), "mlp.fc2": (width, hidden)}
            dead[f"{pool}.latent"] = (1, 1, width)
            for name, shape in sizes.items():
                dead |= {f"{pool}.{name}.weight": shape, f"{pool}.{name}.bias": shape[:1]}
    return layout, dead


def translate(weights: Mapping[str, Tensor], network: VLANetwork) -> dict[str, Tensor]:
    """A network's state dict from published weights, as views of them where that is possible."""
    ours, some = network.state_dict(), next(iter(weights.values()))
    return {
        name: torch.zeros(ours[name].shape, dtype=some.dtype)
        if origin is None
        else origin.take(weights[origin.name])
        for name, origin in origins(network).items()
    }


def check_config(path: Path, config: VLAConfig) -> None:
    """Compare a released ``config.json`` with an architecture in what the shapes of weights do not tell.

    Raises:
        ArtifactError: If they differ.
    """
    from transformers import LlamaConfig

    content = read_json(path)
    text = content.get("text_config") if isinstance(content, dict) else None
    if not isinstance(text, dict) or text.get("model_type", "llama") != "llama":
        raise ArtifactError(f"{path} does not describe an OpenVLA policy on a Llama; give its directory.")
    told = {k: v for k, v in text.items() if k in _LANGUAGE_FIELDS or k == "rope_theta"}
    try:
        given = LlamaConfig(**told)
    except Exception as error:  # transformers' validation has errors of its own
        raise ArtifactError(f"{path}: text_config is not that of a Llama ({error}).") from error
    wanted = LlamaConfig(**{"vocab_size": config.text_vocabulary, **config.language})
    pairs = {f: (getattr(given, f), getattr(wanted, f)) for f in _LANGUAGE_FIELDS}
    pairs["n_action_bins"] = (content.get("n_action_bins", 256), config.n_bins)
    pairs["timm_model_ids"] = (tuple(content.get("timm_model_ids", TIMM_MODELS)), TIMM_MODELS)
    different = [f"{name} {a!r} instead of {b!r}" for name, (a, b) in pairs.items() if a != b]
    if different:
        raise ArtifactError(
            f"{path} describes another architecture than expected: {', '.join(different)}. "
            "The published policies are OpenVLA-OFT 7B."
        )

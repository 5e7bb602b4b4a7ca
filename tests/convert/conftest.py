"""A release in small: the published layouts with the weights of the reference vectors."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from wmpo_gym.convert.released import RELEASED_TASKS, ReleasedTask, Sourced
from wmpo_gym.convert.world import WorldFiles
from wmpo_gym.policies.vla import TowerConfig, VLAConfig

CLASSIFIER_FIELDS = (
    "image_size",
    "patch_size",
    "num_frames",
    "tubelet_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "layer_norm_eps",
)
NETWORK = {"hidden_size": 48, "depth": 2, "num_heads": 4}
LANGUAGE = {
    "vocab_size": 384,  # 320 and some rows of padding
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
WORDS = ["<s>", "</s>", "<unk>", "In:", "What", "action", "should", "the", "robot", "take", "to", "coffee?",
         "Out:"]  # fmt: skip


@dataclass
class Release:
    """Where the files of a small release lie, and what is in them."""

    root: Path
    task: ReleasedTask
    policy_config: VLAConfig
    classifier_config: dict[str, Any]
    policy_state: dict[str, torch.Tensor]

    @property
    def files(self) -> WorldFiles:
        checkpoints = self.root / "checkpoint_files"
        return WorldFiles(
            network=checkpoints / "world_models" / "coffee" / "P_128",
            autoencoder=checkpoints / "world_models" / "vae",
            reward=checkpoints / "reward_models" / "videomae_coffee.pth",
            statistics=self.root / "data_files" / "statistics" / "coffee.json",
            start_frames=self.root / "data_files" / "first_images" / "coffee",
        )

    @property
    def policy(self) -> Path:
        return self.root / "checkpoint_files" / "SFT_models" / "coffee"

    @property
    def sizes(self) -> dict[str, Any]:
        return {"network_config": NETWORK, "classifier_config": self.classifier_config}


def write_shards(directory: Path, state: dict[str, torch.Tensor], name: str = "model") -> None:
    """Two safetensors shards and their index, as transformers and ColossalAI write them."""
    names = sorted(state)
    halves = {
        f"{name}-00001-of-00002.safetensors": names[::2],
        f"{name}-00002-of-00002.safetensors": names[1::2],
    }
    places = {}
    for file, part in halves.items():
        save_file({k: state[k].contiguous() for k in part}, directory / file)
        places |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 0}, "weight_map": places}
    (directory / f"{name}.safetensors.index.json").write_text(json.dumps(index))


def statistics(golden, **changes: Any) -> dict[str, Any]:
    stats = golden("action_tokens")[1]["stats"]
    return {"coffee_d0_300_demos": {"action": {**stats, **changes}, "num_transitions": 1}}


def make_policy_config(meta: dict[str, Any]) -> VLAConfig:
    """The published architecture at the size of the reference towers."""

    def sizes(tower: dict[str, Any]) -> dict[str, Any]:
        return {
            "hidden_size": tower["embed_dim"],
            "num_hidden_layers": tower["depth"],
            "num_attention_heads": tower["num_heads"],
            "image_size": tower["img_size"],
            "patch_size": tower["patch_size"],
        }

    published = VLAConfig.openvla_oft_7b()
    dino, siglip = meta["towers"]["featurizer"], meta["towers"]["fused_featurizer"]
    settings = (sizes(dino), {**sizes(siglip), "intermediate_size": siglip["mlp_width"]})
    towers = tuple(
        replace(tower, settings={**tower.settings, **size})
        for tower, size in zip(published.towers, settings, strict=True)
    )
    assert all(isinstance(tower, TowerConfig) for tower in towers)
    return replace(
        published,
        towers=towers,
        image_size=32,
        language=LANGUAGE,
        projector=(24, 32),
        text_vocabulary=320,
        prompt_suffix=(2,),
    )


def make_policy_state(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A policy with the reference towers; projector and language model random."""
    from transformers import LlamaConfig, LlamaForCausalLM

    state = {k.removeprefix("state."): v for k, v in tensors.items() if k.startswith("state.")}
    with torch.random.fork_rng():
        torch.manual_seed(11)
        for i, (n_in, n_out) in enumerate([(40, 24), (24, 32), (32, 32)], start=1):
            state[f"projector.fc{i}.weight"] = torch.randn(n_out, n_in) / n_in**0.5
            state[f"projector.fc{i}.bias"] = torch.randn(n_out) * 0.1
        language = LlamaForCausalLM(LlamaConfig(**LANGUAGE, initializer_range=0.3))
    state |= {f"language_model.{k}": v for k, v in language.state_dict().items()}
    return {k: v.detach().clone() for k, v in state.items()}


def write_tokenizer(directory: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    fast.save_pretrained(directory)


def write_policy(directory: Path, golden, state: dict[str, torch.Tensor]) -> None:
    directory.mkdir(parents=True)
    write_shards(directory, state)
    write_tokenizer(directory)
    config = {
        "model_type": "openvla",
        "auto_map": {"AutoConfig": "configuration_prismatic.OpenVLAConfig"},
        "n_action_bins": 256,
        "text_config": {"model_type": "llama", "torch_dtype": "bfloat16", **LANGUAGE},
        "timm_model_ids": ["vit_large_patch14_reg4_dinov2.lvd142m", "vit_so400m_patch14_siglip_224"],
    }
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "dataset_statistics.json").write_text(json.dumps(statistics(golden)))
    (directory / "modeling_prismatic.py").write_text("raise RuntimeError('code of a checkpoint was run')\n")


def write_world(files: WorldFiles, golden) -> None:
    from diffusers import AutoencoderKL
    from PIL import Image

    tensors, _ = golden("stdit3_tiny")
    files.network.mkdir(parents=True)
    write_shards(
        files.network, {k.removeprefix("state."): v for k, v in tensors.items() if k.startswith("state.")}
    )
    with torch.random.fork_rng():
        torch.manual_seed(12)
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(4, 4, 4, 4),
            norm_num_groups=2,
            scaling_factor=0.13025,
        )
    vae.save_pretrained(files.autoencoder)
    files.reward.parent.mkdir(parents=True)
    reward, _ = golden("reward_model_tiny")
    torch.save({k.removeprefix("old."): v for k, v in reward.items() if k.startswith("old.")}, files.reward)
    files.statistics.parent.mkdir(parents=True)
    files.statistics.write_text(json.dumps(statistics(golden)))
    files.start_frames.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)
    for i, picture in zip((0, 2, 10), pixels, strict=True):
        Image.fromarray(picture).save(files.start_frames / f"{i}.png")


@pytest.fixture(scope="session")
def written_release(tmp_path_factory, golden) -> Release:
    _, meta = golden("reward_model_tiny")
    towers, towers_meta = golden("vision_towers")
    small = Release(
        root=tmp_path_factory.mktemp("release") / "WMPO",
        task=replace(RELEASED_TASKS["coffee"], image_size=Sourced(64, "the reference vectors")),
        policy_config=make_policy_config(towers_meta),
        classifier_config={k: meta["config"][k] for k in CLASSIFIER_FIELDS},
        policy_state=make_policy_state(towers),
    )
    write_world(small.files, golden)
    write_policy(small.policy, golden, small.policy_state)
    return small


@pytest.fixture
def release(written_release, tmp_path) -> Release:
    """The release, to be spoilt at will."""
    copy = replace(written_release, root=tmp_path / "WMPO")
    shutil.copytree(written_release.root, copy.root)
    return copy

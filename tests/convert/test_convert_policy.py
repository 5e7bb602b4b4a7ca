"""Released OpenVLA-OFT checkpoints in, the published numbers out."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file

pytest.importorskip("transformers")

from wmpo_gym.convert.policy import convert_policy, policy_layout
from wmpo_gym.convert.released import RELEASED_TASKS, Sourced
from wmpo_gym.convert.statistics import read_statistics
from wmpo_gym.policies.vla import VLAConfig, VLANetwork
from wmpo_gym.policies.vla_policy import VLAPolicy
from wmpo_gym.utils.io import ArtifactError

FEATURIZERS = ("featurizer", "fused_featurizer")


@pytest.fixture
def convert(release, tmp_path):
    def run() -> VLAPolicy:
        convert_policy(release.policy, tmp_path / "policy", release.task, config=release.policy_config)
        return VLAPolicy.from_pretrained(tmp_path / "policy")

    return run


def edit_json(file, **changes):
    content = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


# -- parity ------------------------------------------------------------------------------------------------
def test_towers_are_those_of_timm(convert, golden):
    """The published policy reads the patches of timm's towers after their last block but one."""
    tensors, _ = golden("vision_towers")
    towers = convert().network.towers
    for tower, name in zip(towers, FEATURIZERS, strict=True):
        with torch.no_grad():
            features = tower(tensors[f"{name}.pixels"])
        torch.testing.assert_close(features, tensors[f"{name}.features"], atol=2e-5, rtol=0)


def test_the_approximate_gelu_would_be_noticed(convert, golden):
    tensors, _ = golden("vision_towers")
    tower = convert().network.towers[1]
    for layer in tower.model.encoder.layers:
        layer.mlp.activation_fn = torch.nn.GELU("tanh")
    with torch.no_grad():
        difference = tower(tensors["fused_featurizer.pixels"]) - tensors["fused_featurizer.features"]
    assert difference.abs().max() > 2e-4


def test_logits_from_the_parts_of_transformers(convert, golden, release):
    """The whole network against timm's features, a projector by hand and transformers' own Llama."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tensors, _ = golden("vision_towers")
    policy, state = convert(), release.policy_state
    features = torch.cat([tensors[f"{name}.features"] for name in FEATURIZERS], dim=-1)
    for i in (1, 2, 3):
        features = F.gelu(features) if i > 1 else features
        features = F.linear(features, state[f"projector.fc{i}.weight"], state[f"projector.fc{i}.bias"])
    language = LlamaForCausalLM(LlamaConfig(**release.policy_config.language)).eval()
    prefix = "language_model."
    language.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
    prompt = torch.tensor([[0, *range(3, 13), 2]])  # <s>, the words, the suffix
    words = language.model.embed_tokens(prompt)
    stop, blank = language.model.embed_tokens(torch.tensor([[1]])), words.new_zeros(1, 56, 32)
    parts = (words[:, :1], features[:1], words[:, 1:], blank, stop)
    sequence = torch.cat(parts, dim=1)
    everywhere = torch.zeros(1, 1, sequence.shape[1], sequence.shape[1])
    with torch.no_grad():
        hidden = language.model(inputs_embeds=sequence, attention_mask=everywhere).last_hidden_state
        first = 16 + prompt.shape[1] - 1
        expected = language.lm_head(hidden[:, first : first + 56])[..., 320 - 256 : 320]
        pixels = [tensors[f"{name}.pixels"][:1] for name in FEATURIZERS]
        found = policy.network(pixels, *policy._table(torch.zeros(1, dtype=torch.long)))
    assert found.shape == (1, 56, 256) and found.std() > 0.1
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)


def test_tokens_of_a_converted_policy(convert, golden, monkeypatch):
    """Greedy actions and sampling probabilities at the published temperature, which comes from the table."""
    tensors, _ = golden("action_tokens")
    policy = convert()
    assert policy.temperature == 1.6 and policy.instructions == ("coffee",)
    monkeypatch.setattr(policy, "logits", lambda obs: tensors["policy.action_logits"])
    actions, _, _ = policy.sample({}, deterministic=True)
    assert torch.equal(actions, tensors["policy.greedy_actions"].float())
    expected = tensors["policy.sample_probs_T1.6_first_tokens"]
    for token in (0, 17, 255):
        log_prob, _ = policy.log_prob({}, torch.full((3, 56), token))
        torch.testing.assert_close(log_prob[:, :4].exp(), expected[..., token], rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize(
    ("variant", "bounds", "mask"),
    [("q99_mask", "q99", None), ("q99_nomask", "q99", [True] * 7), ("minmax_mask", "bounds", None)],
)
@pytest.mark.parametrize("layout", ["keyed", "flat"])
def test_statistics_unnormalise_as_published(variant, bounds, mask, layout, release, golden):
    tensors, _ = golden("action_tokens")
    file = release.policy / "dataset_statistics.json"
    content = json.loads(file.read_text())
    entry = content["coffee_d0_300_demos"]
    entry["action"]["mask"] = mask or entry["action"]["mask"]
    file.write_text(json.dumps({"other_d0": {}, **content} if layout == "keyed" else entry))
    statistics = read_statistics(file, replace(release.task, action_bounds=Sourced(bounds, "the test")))
    assert statistics.key == ("coffee_d0_300_demos" if layout == "keyed" else None)
    found = statistics.unnormalise(tensors["unnorm.normalized"])
    torch.testing.assert_close(found, tensors[f"unnorm.{variant}"], atol=1e-12, rtol=0)
    if variant == "q99_mask":  # what the world model is told, from the same statistics
        low, high = (torch.tensor(v, dtype=torch.float64) for v in (statistics.low, statistics.high))
        told = 2 * (found - low) / (high - low) - 1
        torch.testing.assert_close(told.float(), tensors["unnorm.wm_renormalised"], atol=3e-7, rtol=0)


def test_published_size_on_the_meta_device():
    config = VLAConfig.openvla_oft_7b()
    with torch.device("meta"):
        network = VLANetwork(config)
    live, dead = policy_layout(network)
    assert sum(math.prod(shape) for shape in (live | dead).values()) == 7_541_237_184
    # The mask token and the class token's place are ours alone.
    assert (
        sum(p.numel() for p in network.parameters())
        == sum(math.prod(shape) for shape in live.values()) + 2 * 1024
    )

    def linear(*names):
        return {f"{name}.{kind}" for name in names for kind in ("weight", "bias")}

    dino, siglip, llama = (
        "vision_backbone.featurizer",
        "vision_backbone.fused_featurizer",
        "language_model.model",
    )
    expected = linear(
        f"{dino}.patch_embed.proj", f"{dino}.norm", f"{siglip}.patch_embed.proj", f"{siglip}.norm"
    )
    expected |= {f"{dino}.cls_token", f"{dino}.reg_token", f"{dino}.pos_embed", f"{siglip}.pos_embed"}
    for tower, depth in ((dino, 24), (siglip, 27)):
        for block in (f"{tower}.blocks.{i}" for i in range(depth)):
            expected |= linear(*(f"{block}.{part}" for part in ("norm1", "attn.qkv", "attn.proj", "norm2")))
            expected |= linear(f"{block}.mlp.fc1", f"{block}.mlp.fc2")
            expected |= {f"{block}.ls{i}.scale_factor" for i in (1, 2) if tower == dino}
    expected |= linear(*(f"projector.fc{i}" for i in (1, 2, 3)))
    expected |= {f"{llama}.embed_tokens.weight", f"{llama}.norm.weight", "language_model.lm_head.weight"}
    attention, mlp = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
    for layer in (f"{llama}.layers.{i}" for i in range(32)):
        expected |= {f"{layer}.self_attn.{part}.weight" for part in attention}
        expected |= {f"{layer}.mlp.{part}.weight" for part in mlp}
        expected |= {f"{layer}.{part}_layernorm.weight" for part in ("input", "post_attention")}
    assert set(live) == expected
    pool = f"{siglip}.attn_pool"
    parts = ("q", "kv", "proj", "norm", "mlp.fc1", "mlp.fc2")
    assert set(dead) == {f"{pool}.latent"} | linear(*(f"{pool}.{part}" for part in parts))
    assert live[f"{dino}.pos_embed"] == (1, 256, 1024) and live[f"{siglip}.pos_embed"] == (1, 256, 1152)
    assert live[f"{siglip}.blocks.26.attn.qkv.weight"] == (3456, 1152)


# -- what goes along ---------------------------------------------------------------------------------------
def test_a_converted_policy_can_be_moved_and_saved_again(convert, release, tmp_path):
    policy = convert()
    observed = {"pixels": torch.zeros(1, 64, 64, 3, dtype=torch.uint8), "task_id": torch.zeros(1).long()}
    expected = policy.logits(observed)
    policy.save_pretrained(tmp_path / "again")
    shutil.rmtree(release.root)
    shutil.rmtree(tmp_path / "policy")
    shutil.move(tmp_path / "again", tmp_path / "moved")
    again = VLAPolicy.from_pretrained(tmp_path / "moved")
    assert torch.equal(again.logits(observed), expected)
    files = {str(f.relative_to(tmp_path / "moved")) for f in (tmp_path / "moved").rglob("*") if f.is_file()}
    assert files >= {"config.json", "policy.json", "model.safetensors", "tokenizer/tokenizer.json"}
    assert not any(name.endswith(".py") for name in files)
    assert json.loads((tmp_path / "moved/config.json").read_text())["tokenizer"] == "tokenizer"


def test_the_card_names_statistics_settings_and_what_was_dropped(convert, tmp_path):
    convert()
    meta = json.loads((tmp_path / "policy/policy.json").read_text())["meta"]
    assert meta["task"] == "coffee" and meta["statistics"]["mask"] == [True] * 6 + [False]
    assert meta["converted"]["settings"]["temperature"]["value"] == 1.6
    assert len(meta["converted"]["dropped"]) == 13
    assert all(".attn_pool." in name for name in meta["converted"]["dropped"])


def test_weights_keep_their_precision(release, convert, tmp_path):
    for shard in release.policy.glob("*.safetensors"):
        save_file({name: value.bfloat16() for name, value in load_file(shard).items()}, shard)
    policy = convert()
    with safe_open(tmp_path / "policy/model.safetensors", "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.bfloat16}  # noqa: SIM118
    published = release.policy_state["projector.fc1.weight"].bfloat16().float()
    assert torch.equal(policy.network.projector.fc1.weight, published)


def test_shards_of_pickles(release, convert):
    """As transformers wrote them before safetensors."""
    places = {}
    for i, shard in enumerate(sorted(release.policy.glob("*.safetensors"))):
        state = load_file(shard)
        torch.save(state, release.policy / f"pytorch_model-{i}.bin")
        places |= dict.fromkeys(state, f"pytorch_model-{i}.bin")
        shard.unlink()
    (release.policy / "model.safetensors.index.json").unlink()
    (release.policy / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    expected = release.policy_state["language_model.lm_head.weight"]
    assert torch.equal(convert().network.language_model.lm_head.weight, expected)


# -- refusals ----------------------------------------------------------------------------------------------
def text_config(**changes):
    def spoil(release):
        file = release.policy / "config.json"
        text = json.loads(file.read_text())["text_config"]
        edit_json(file, text_config={**text, **changes})

    return spoil


def other_heads(release):
    shard = next(release.policy.glob("*.safetensors"))
    state = load_file(shard)
    name = next(k for k in state if k.endswith("attn.qkv.weight"))
    state[name] = torch.zeros(5, 5)
    save_file(state, shard)


def no_tokenizer(release):
    for file in release.policy.glob("tokenizer*"):
        file.unlink()


REFUSALS = {
    "epsilon": (text_config(rms_norm_eps=1e-5), "rms_norm_eps 1e-05 instead of 1e-06"),
    "rope": (text_config(rope_theta=5e5), "rope_parameters .*500000"),
    "heads": (text_config(num_attention_heads=8), "num_attention_heads 8 instead of 4"),
    "not a llama": (text_config(model_type="phi"), "does not describe an OpenVLA policy on a Llama"),
    "bins": (
        lambda r: edit_json(r.policy / "config.json", n_action_bins=128),
        "n_action_bins 128 instead of",
    ),
    "towers": (
        lambda r: edit_json(r.policy / "config.json", timm_model_ids=["vit_large_patch14_clip_336.openai"]),
        r"timm_model_ids \('vit_large_patch14_clip_336.openai',\)",
    ),
    "shape": (other_heads, r"1 of another shape: vision_backbone.*attn.qkv.weight \(5, 5\) instead of"),
    "tokenizer": (no_tokenizer, "holds no tokenizer"),
    "damaged tokenizer": (
        lambda r: (r.policy / "tokenizer.json").write_text('{"model": 3}'),
        "The tokenizer cannot be used",
    ),
    "tokenizer of another model": (
        lambda r: (r.policy / "tokenizer.json").write_text(
            (r.policy / "tokenizer.json").read_text().replace('"coffee?": 11', '"coffee?": 384')
        ),
        "gives token 384, the language model knows 384",
    ),
    "text_config": (text_config(num_attention_heads="many"), "text_config is not that of a Llama"),
    "no statistics": (
        lambda r: (r.policy / "dataset_statistics.json").unlink(),
        r"no action statistics .*dataset_statistics\.json; give those of the policy",
    ),
    "statistics of two": (
        lambda r: (r.policy / "dataset_statistics.json").write_text('{"coffee_d1": {}, "coffee_d2": {}}'),
        "statistics of 'coffee_d1', 'coffee_d2'",
    ),
    "empty statistics": (lambda r: (r.policy / "dataset_statistics.json").write_text("[]"), "does not hold"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refused_and_nothing_is_left(name, release, convert, tmp_path):
    spoil, message = REFUSALS[name]
    spoil(release)
    with pytest.raises(ArtifactError, match=message):
        convert()
    assert not (tmp_path / "policy").exists() and not (tmp_path / ".policy.tmp").exists()


def test_a_policy_of_another_task_is_refused(release, tmp_path):
    square = RELEASED_TASKS["square"]
    with pytest.raises(ArtifactError, match="belongs to task 'coffee' by its name, 'square' was asked for"):
        convert_policy(release.policy, tmp_path / "policy", square, config=release.policy_config)
    anonymous = release.policy.rename(tmp_path / "my-checkpoint")
    with pytest.raises(ArtifactError, match="statistics of 'coffee_d0_300_demos'; task 'square' needs"):
        convert_policy(anonymous, tmp_path / "policy", square, config=release.policy_config)


def test_too_little_disk_is_seen_before_writing(convert, monkeypatch, tmp_path):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    with pytest.raises(ArtifactError, match="0.0 GB are free there"):
        convert()
    assert not (tmp_path / "policy").exists()

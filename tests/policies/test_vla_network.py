"""The VLA network: one class from a CPU toy to the published 7B."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from wmpo_gym.policies.processor import ByteTokenizer, InstructionTable, prepare_images
from wmpo_gym.policies.vla import TowerConfig, VLAConfig, VLANetwork, merge_patches

SENTENCES = ("move the red block to the disc", "move the blue block to the disc", "wait")


def build(config: VLAConfig, seed: int = 0) -> VLANetwork:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return VLANetwork(config).eval()


@pytest.fixture(scope="module")
def tiny() -> VLANetwork:
    return build(VLAConfig.tiny())


def run(
    network: VLANetwork, pixels: torch.Tensor, task_id: torch.Tensor, sentences=SENTENCES
) -> torch.Tensor:
    table = InstructionTable(sentences, network.config)
    with torch.no_grad():
        return network(prepare_images(pixels, network.config), *table(task_id))


def images(n: int = 4, size: int = 40, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (n, size, size, 3), dtype=np.uint8))


def vit() -> TowerConfig:
    settings = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    return TowerConfig(
        "siglip_vision_model", {**settings, "image_size": 32, "patch_size": 8, "vision_use_head": False}
    )


def two_towers() -> VLAConfig:
    dino = TowerConfig(
        "dinov2_with_registers",
        {
            "hidden_size": 24,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "num_register_tokens": 4,
            "image_size": 32,
            "patch_size": 8,
        },
        feature_layer=-2,
        prefix_tokens=5,
    )
    return VLAConfig.tiny(
        towers=(dino, vit()),
        image_size=32,
        crop_area=0.9,
        coordinates=False,
        patch_merge=1,
        projector=(64, 32),
    )


@pytest.mark.parametrize("config", [VLAConfig.tiny(), VLAConfig.tiny(chunk=2, action_dim=5), two_towers()])
def test_logits_have_one_row_per_action_number(config):
    logits = run(build(config), images(), torch.tensor([0, 1, 2, 0]))
    assert logits.shape == (4, config.n_tokens, config.n_bins)
    assert logits.dtype == torch.float32 and torch.isfinite(logits).all()


def test_the_last_prompt_token_is_heard_by_the_first_action_and_back(tiny):
    """Attention runs in both directions: a change anywhere changes every hidden state."""
    hidden = []
    table = InstructionTable(SENTENCES, tiny.config)
    text, length = table(torch.tensor([0]))
    prepared = prepare_images(images(1), tiny.config)
    capture = tiny.language_model.model.register_forward_hook(
        lambda *a: hidden.append(a[-1].last_hidden_state)
    )
    with torch.no_grad():
        tiny(prepared, text, length)
        tiny.placeholders[-1] += 1.0  # the last placeholder
        tiny(prepared, text, length)
        tiny.placeholders[-1] -= 1.0
    capture.remove()
    moved = (hidden[0] - hidden[1]).abs().amax(-1)[0]
    assert (moved > 1e-6).all(), "a causal mask would leave everything before the change as it was"


def test_a_row_does_not_depend_on_longer_sentences_beside_it(tiny):
    alone = run(tiny, images(1), torch.tensor([0]), sentences=SENTENCES[2:])
    padded = run(tiny, images(3)[[0, 1, 2]], torch.tensor([2, 0, 1]))
    torch.testing.assert_close(padded[:1], alone, rtol=0, atol=1e-5)


def test_the_instruction_and_the_picture_both_change_the_answer(tiny):
    same = images(1).expand(3, -1, -1, -1)
    by_text = run(tiny, same, torch.tensor([0, 1, 2]))
    assert (by_text[0] - by_text[1]).abs().max() > 1e-3
    by_image = run(tiny, images(2), torch.tensor([0, 0]))
    assert (by_image[0] - by_image[1]).abs().max() > 1e-3


def test_the_instruction_modulates_the_patches():
    """FiLM: nothing at first, then a scale and a shift per channel that depend on this row's prompt only."""
    network = build(VLAConfig.tiny())
    seen, text, length = torch.randn(3, 4, 64), *InstructionTable(SENTENCES, network.config)(torch.arange(3))
    words = network._embed(text)
    assert torch.equal(network._modulated(seen, words, length), seen)
    torch.nn.init.normal_(network.film.weight, std=0.1)
    scaled = network._modulated(seen, words, length)
    factor = (scaled[:, 0] - scaled[:, 1]) / (seen[:, 0] - seen[:, 1])
    torch.testing.assert_close(
        factor, (scaled[:, 2] - scaled[:, 3]) / (seen[:, 2] - seen[:, 3]), rtol=1e-2, atol=1e-2
    )
    assert (factor[0] - factor[1]).abs().max() > 1e-2
    words[2, length[2] :] += 1.0  # placeholders and padding are no part of the prompt
    torch.testing.assert_close(network._modulated(seen, words, length), scaled)


def test_channels_first_and_last_are_the_same(tiny):
    pixels = images(2)
    ids = torch.tensor([0, 1])
    assert torch.equal(run(tiny, pixels, ids), run(tiny, pixels.permute(0, 3, 1, 2), ids))


def test_action_tokens_are_read_where_the_published_policy_reads_them(golden, tiny, monkeypatch):
    """Token j: number of patches + prompt tokens without the start token + j."""
    _, meta = golden("action_tokens")
    assert "num_patches + num_prompt_tokens + j" in meta["policy_position"]
    positions = []

    def head(hidden):
        positions.append(hidden[..., 0])
        return hidden

    class Numbered(torch.nn.Module):
        embed_tokens = tiny.language_model.model.embed_tokens

        def forward(self, inputs_embeds, **kwargs):
            index = torch.arange(inputs_embeds.shape[1], dtype=torch.float32).expand(len(inputs_embeds), -1)
            return type("Output", (), {"last_hidden_state": index[..., None]})

    monkeypatch.setattr(tiny, "_head", head)
    monkeypatch.setattr(tiny.language_model, "model", Numbered())
    table = InstructionTable(SENTENCES, tiny.config)
    text, length = table(torch.tensor([0, 2]))
    tiny(prepare_images(images(2), tiny.config), text, length)
    n_patches = (40 // 4 // tiny.config.patch_merge) ** 2
    for row, prompt in zip(positions[0], (length - 1).tolist(), strict=True):
        assert row.tolist() == [n_patches + prompt + j for j in range(tiny.config.n_tokens)]


def test_placeholders_are_zero_unless_learned():
    config = VLAConfig.tiny(learned_placeholders=False)
    network = build(config)
    text, length = InstructionTable(SENTENCES, config)(torch.tensor([0]))
    words = network._embed(text)
    first = int(length[0])
    assert not words[0, first : first + config.n_tokens].any()
    assert words[0, :first].abs().sum(-1).all() and words[0, first + config.n_tokens].any()


def test_merging_keeps_neighbours_together():
    grid = torch.arange(16.0).reshape(1, 16, 1)  # a 4x4 grid
    merged = merge_patches(grid, 2)
    assert merged.tolist() == [[[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]]
    assert merge_patches(grid, 1) is grid


def test_centre_crop_matches_the_published_geometry():
    """A 90 % crop starts 0.025658 of the side from the border; first and last samples lie on its edges."""
    config = two_towers()
    ramp = torch.arange(101, dtype=torch.uint8).expand(101, 101)[None, ..., None].expand(1, 101, 101, 3)
    image = prepare_images(ramp, config)[1]  # SigLIP normalisation: v / 127.5 - 1
    value = (image[0, 0, 0] + 1) * 127.5
    assert value[0] == pytest.approx(2.5658, abs=1e-3)
    assert value[-1] == pytest.approx(97.4342, abs=1e-3)


def test_byte_tokens_spell_the_sentence():
    for group in (1, 3, 4):
        tokenizer = ByteTokenizer(group)
        tokens = tokenizer.encode("déplace le bloc")
        assert all(len(t) == group for t in tokens)
        assert (
            tokenizer.decode([tokenizer.start, *tokens, tokenizer.stop, tokenizer.pad]) == "déplace le bloc"
        )
    assert ByteTokenizer(4).encode("abcd") != ByteTokenizer(4).encode("dcba")


@pytest.mark.parametrize("config", [VLAConfig.tiny(), VLAConfig.openvla_oft_7b(), two_towers()])
def test_configuration_survives_json(config):
    assert VLAConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_configuration_faults_are_named():
    data = VLAConfig.tiny().to_dict()
    with pytest.raises(ValueError, match="n_bin_s"):
        VLAConfig.from_dict({**data, "n_bin_s": 3})
    with pytest.raises(ValueError, match="incomplete"):
        VLAConfig.from_dict({k: v for k, v in data.items() if k != "towers"})
    with pytest.raises(ValueError, match="one or two"):
        VLAConfig.from_dict({**data, "towers": []})
    with pytest.raises(ValueError, match="text_vocabulary"):
        VLAConfig.tiny(text_vocabulary=100)
    with pytest.raises(ValueError, match="task"):
        VLAConfig.tiny(prompt="do it")


def test_the_published_size_has_the_published_parts():
    """Built without memory: names, widths and counts of OpenVLA-OFT 7B."""
    config = VLAConfig.openvla_oft_7b()
    with torch.device("meta"):
        network = VLANetwork(config)
    shapes = {name: tuple(p.shape) for name, p in network.named_parameters()}
    assert shapes["projector.fc1.weight"] == (8704, 2176)
    assert shapes["projector.fc2.weight"] == (4096, 8704)
    assert shapes["projector.fc3.weight"] == (4096, 4096)
    assert shapes["language_model.model.embed_tokens.weight"] == (32064, 4096)
    assert shapes["language_model.lm_head.weight"] == (32064, 4096)
    assert sum(p.numel() for p in network.projector.parameters()) == 71_385_600  # "71.4 M"
    assert sum(p.numel() for p in network.language_model.parameters()) == pytest.approx(6.74e9, rel=2e-3)
    dino, siglip = (sum(p.numel() for p in tower.parameters()) for tower in network.towers)
    assert dino == pytest.approx(304e6, rel=0.01) and siglip == pytest.approx(412e6, rel=0.02)
    assert sum(p.numel() for p in network.parameters()) == pytest.approx(7.54e9, rel=0.01)
    assert config.n_tokens == 56 and config.action_tokenizer().first_token_id == 31744
    assert "placeholders" not in shapes


def test_wrong_inputs_are_named(tiny):
    table = InstructionTable(SENTENCES, tiny.config)
    with pytest.raises(ValueError, match=r"task_id must be in \[0, 2\].*7"):
        table(torch.tensor([0, 7]))
    with pytest.raises(ValueError, match="instructions"):
        InstructionTable((), tiny.config)
    with pytest.raises(ValueError, match="uint8"):
        prepare_images(torch.zeros(1, 40, 40, 3), tiny.config)

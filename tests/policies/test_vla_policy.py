"""VLAPolicy as a Stable-Baselines3 policy."""

from __future__ import annotations

import copy
import json
import pickle

import numpy as np
import pytest
import torch
from gymnasium import spaces

from wmpo_gym.policies import GroupPolicy, VLAConfig, VLAPolicy
from wmpo_gym.policies.vla_policy import make_spaces
from wmpo_gym.utils.io import ArtifactError

SENTENCES = ("move the red block to the disc", "move the blue block to the disc")


def make(seed: int = 0, pixels=(40, 40, 3), **kwargs) -> VLAPolicy:
    config = kwargs.pop("config", VLAConfig.tiny())
    return VLAPolicy(
        *make_spaces(config, pixels, 2), config=config, instructions=SENTENCES, seed=seed, **kwargs
    )


def observe(n: int = 8, seed: int = 0) -> dict[str, torch.Tensor]:
    pixels = np.random.default_rng(seed).integers(0, 256, (n, 40, 40, 3), dtype=np.uint8)
    return {"pixels": torch.from_numpy(pixels), "task_id": torch.arange(n) % 2}


@pytest.fixture
def policy() -> VLAPolicy:
    return make()


def test_sample_has_the_contracted_shapes(policy):
    assert isinstance(policy, GroupPolicy)
    actions, log_prob, trace = policy.sample(observe())
    assert actions.shape == (8, 4, 3) and actions.dtype == torch.float32
    assert log_prob.shape == (8, 12) and trace.shape == (8, 12) and trace.dtype == torch.int64
    assert not log_prob.requires_grad and (log_prob < 0).all()
    assert policy.action_space.contains(actions[0].numpy())
    assert torch.equal(policy.encode(actions), trace), "token k*D+d belongs to dimension d of action k"


@pytest.mark.parametrize("temperature", [1.0, 0.5, 1.6])
def test_ratio_is_one_before_the_first_update(temperature):
    policy = make(temperature=temperature)
    _, old, trace = policy.sample(observe())
    policy.set_training_mode(True)
    new, entropy = policy.log_prob(observe(), trace)
    assert ((new - old).exp() - 1).abs().max() < 1e-5
    assert new.requires_grad and entropy.shape == old.shape
    assert (entropy > 0).all() and (entropy <= np.log(policy.config.n_bins) + 1e-5).all()


def test_training_mode_leaves_dropout_off():
    config = VLAConfig.tiny()
    language = {**config.language}
    policy = make(config=VLAConfig.tiny(language=language), lora={"r": 4, "lora_dropout": 0.5})
    policy.set_training_mode(True)
    dropouts = [m for m in policy.network.modules() if isinstance(m, torch.nn.Dropout)]
    assert dropouts and not any(m.training for m in dropouts)
    assert policy.network.training


def test_temperature_scales_both_methods(policy):
    obs = observe()
    trace = policy.sample(obs)[2]
    logits = policy.logits(obs)
    policy.temperature = 2.0
    expected = torch.log_softmax(logits / 2.0, dim=-1)
    torch.testing.assert_close(policy.log_prob(obs, trace)[0], expected.gather(-1, trace[..., None])[..., 0])
    torch.testing.assert_close(policy.log_prob(obs, trace)[1], -(expected.exp() * expected).sum(-1))


def test_published_decoding(golden, monkeypatch):
    """Greedy tokens, actions and sampling probabilities of the published policy from its own logits."""
    tensors, meta = golden("action_tokens")
    config = VLAConfig.tiny(chunk=8, action_dim=7, n_bins=256, bin_layout="edges")
    policy = make(config=config, temperature=1.6)
    monkeypatch.setattr(policy, "logits", lambda obs: tensors["policy.action_logits"])
    actions, _, trace = policy.sample({}, deterministic=True)
    assert torch.equal(trace + 31744, tensors["policy.greedy_ids"])
    assert torch.equal(actions, tensors["policy.greedy_actions"].float())
    expected = tensors["policy.sample_probs_T1.6_first_tokens"]
    for token in range(0, 256, 51):
        new, _ = policy.log_prob({}, torch.full((3, 56), token))
        torch.testing.assert_close(new[:, :4].exp(), expected[..., token], rtol=1e-5, atol=1e-9)


def test_tokens_are_drawn_with_their_probability(policy, monkeypatch):
    logits = torch.tensor([0.0, 1.0, -1e9, 2.0] + [-1e9] * 11).expand(4000, 12, -1)
    monkeypatch.setattr(policy, "logits", lambda obs: logits)
    _, log_prob, trace = policy.sample({})
    share = torch.bincount(trace.flatten(), minlength=15) / trace.numel()
    torch.testing.assert_close(share, logits[0, 0].softmax(-1), rtol=0, atol=0.008)
    torch.testing.assert_close(log_prob.exp(), logits[0, 0].softmax(-1)[trace])
    assert policy.sample({}, deterministic=True)[2].unique().tolist() == [3]


def test_seeds_decide_and_global_generators_are_untouched():
    before = torch.random.get_rng_state(), np.random.get_state()[1].copy()
    policies = [make(seed=s) for s in (1, 1, 2)]
    draws = [p.sample(observe())[2] for p in policies]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    policies[0].set_seed(7)
    again = policies[0].sample(observe())[2]
    policies[0].set_seed(7)
    assert torch.equal(again, policies[0].sample(observe())[2])
    assert not torch.equal(again, policies[0].sample(observe())[2])
    assert torch.equal(before[0], torch.random.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])


def test_state_dict_copy_and_pickle_resume_the_draws(policy):
    policy.sample(observe())
    other = make(seed=5)
    other.load_state_dict(policy.state_dict())
    twins = [other, copy.deepcopy(policy), pickle.loads(pickle.dumps(policy))]
    expected = policy.sample(observe())[2]
    assert all(torch.equal(expected, twin.sample(observe())[2]) for twin in twins)


def test_predict_takes_batches_and_single_observations_in_both_layouts():
    last, first = make(), make(pixels=(3, 40, 40))
    obs = {k: v.numpy() for k, v in observe(3).items()}
    flipped = {**obs, "pixels": obs["pixels"].transpose(0, 3, 1, 2)}
    batch, _ = last.predict(obs, deterministic=True)
    assert batch.shape == (3, 4, 3) and batch.dtype == np.float32
    assert np.array_equal(batch, first.predict(flipped, deterministic=True)[0])
    single, _ = last.predict({k: v[1] for k, v in obs.items()}, deterministic=True)
    assert single.shape == (4, 3)
    np.testing.assert_allclose(single, batch[1], atol=1e-6)


def test_saved_policy_is_the_same_policy(policy, tmp_path):
    policy.temperature = 1.3
    policy.save_pretrained(tmp_path / "p", meta={"task": "move-block"})
    assert {f.name for f in (tmp_path / "p").iterdir()} == {"config.json", "policy.json", "model.safetensors"}
    loaded = VLAPolicy.from_pretrained(tmp_path / "p")
    assert loaded.instructions == SENTENCES and loaded.temperature == 1.3
    assert loaded.observation_space == policy.observation_space and loaded.action_space == policy.action_space
    trace = policy.sample(observe())[2]
    assert torch.equal(policy.log_prob(observe(), trace)[0], loaded.log_prob(observe(), trace)[0])
    by_directory = VLAPolicy(
        policy.observation_space, policy.action_space, lambda _: 1e-3, model=tmp_path / "p"
    )
    assert by_directory.optimizer.param_groups[0]["lr"] == 1e-3
    assert torch.equal(by_directory.sample(observe(), True)[0], policy.sample(observe(), True)[0])


def test_damaged_files_are_named(policy, tmp_path):
    directory = policy.save_pretrained(tmp_path / "p")
    with pytest.raises(ArtifactError, match="nowhere"):
        VLAPolicy.from_pretrained(tmp_path / "nowhere")
    weights = (directory / "model.safetensors").read_bytes()
    (directory / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(ArtifactError, match=r"model\.safetensors"):
        VLAPolicy.from_pretrained(directory)
    (directory / "model.safetensors").write_bytes(weights)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "projector": [99]}))
    with pytest.raises(ArtifactError, match=r"do not fit config\.json"):
        VLAPolicy.from_pretrained(directory)
    (directory / "config.json").write_text(json.dumps({**config, "towers": 3}))
    with pytest.raises(ArtifactError, match=r"config\.json"):
        VLAPolicy.from_pretrained(directory)
    (directory / "policy.json").write_text("{}")
    with pytest.raises(ArtifactError, match=r"policy\.json"):
        VLAPolicy.from_pretrained(directory)


def test_lora_trains_adapters_only_and_starts_at_the_base(policy, tmp_path):
    pytest.importorskip("peft")
    base = policy.save_pretrained(tmp_path / "base")
    adapted = VLAPolicy.from_pretrained(base, lora={"r": 4}, lr_schedule=lambda _: 1e-2)
    trainable = [n for n, p in adapted.network.named_parameters() if p.requires_grad]
    assert trainable and all("lora_" in n for n in trainable)
    obs = observe()
    trace = policy.sample(obs)[2]
    assert torch.equal(adapted.log_prob(obs, trace)[0], policy.log_prob(obs, trace)[0])
    adapted.log_prob(obs, trace)[0].sum().backward()
    adapted.optimizer.step()
    changed = adapted.log_prob(obs, trace)[0]
    assert (changed - policy.log_prob(obs, trace)[0]).abs().max() > 1e-4
    adapted.save_pretrained(tmp_path / "adapted")
    loaded = VLAPolicy.from_pretrained(tmp_path / "adapted")
    assert torch.equal(loaded.log_prob(obs, trace)[0], changed)
    assert [n for n, p in loaded.network.named_parameters() if p.requires_grad] == trainable


def test_spaces_and_arguments_that_do_not_fit_are_named():
    observation, action = make_spaces(VLAConfig.tiny(), (40, 40, 3), 2)
    with pytest.raises(ValueError, match="instructions"):
        VLAPolicy(observation, action)
    with pytest.raises(ValueError, match="huge.*tiny"):
        VLAPolicy(observation, action, config="huge", instructions=SENTENCES)
    with pytest.raises(ValueError, match=r"chunks of shape \(4, 3\)"):
        VLAPolicy(observation, spaces.Box(-1, 1, (4, 2)), config=VLAConfig.tiny(), instructions=SENTENCES)
    with pytest.raises(ValueError, match="chunk"):
        VLAPolicy(observation, spaces.Box(-1, 1, (3,)), config="tiny", instructions=SENTENCES)
    with pytest.raises(ValueError, match="pixels"):
        VLAPolicy(observation["pixels"], action, config="tiny", instructions=SENTENCES)
    with pytest.raises(ValueError, match="temperature"):
        make(temperature=0.0)
    with pytest.raises(ValueError, match="8 images came with 7"):
        make().sample({**observe(), "task_id": torch.zeros(7)})

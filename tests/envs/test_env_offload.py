"""One card for the whole loop: the world leaves it while the policy is updated, and nothing changes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from env_toys import TOY, WORLD, assert_same, make_batch

pytest.importorskip("transformers")

from wmpo_gym.algorithms import GRPO  # noqa: E402
from wmpo_gym.envs.imagined import ImaginedVectorEnv  # noqa: E402
from wmpo_gym.policies import VLAConfig, VLAPolicy  # noqa: E402
from wmpo_gym.policies.vla_policy import make_spaces  # noqa: E402

CARD = "cpu:0"  # a second name of the CPU, which stands for a card


@pytest.fixture
def places(monkeypatch):
    """Where each of the world's networks has been moved to, in order."""
    places: dict[str, list[str]] = {"network": [], "classifier": []}
    for name, moves in places.items():
        network = getattr(WORLD, name)
        original = type(network).to
        monkeypatch.setattr(
            network, "to", lambda place, m=moves, n=network, o=original: (m.append(place), o(n, place))[1]
        )
    return places


def test_networks_leave_the_card_to_rest_and_come_back(places):
    env = make_batch("imagined", 4, device=CARD, offload=True)
    env.rest()
    assert places == {"network": [], "classifier": []}, "nothing is loaded before the first reset"
    plain = make_batch("imagined", 4)
    actions = np.random.default_rng(0).uniform(-1, 1, (4, 4, TOY.chunk, TOY.action_dim)).astype(np.float32)
    runs: tuple[list, list] = ([], [])
    for run, one in zip(runs, (plain, env), strict=True):
        run.append(one.reset(seed=3))
        for chunk in actions:
            one.rest()
            one.rest()
            run.append(one.step(chunk))
    assert_same(*runs)
    ours = places["network"][1:]  # the first is the plain one's
    assert ours == places["classifier"][1:] == [CARD, *["cpu", CARD] * 4]


def spaces():
    config = VLAConfig.tiny(chunk=TOY.chunk, action_dim=TOY.action_dim)
    return make_spaces(config, (40, 40, 3), 2), config


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    both, config = spaces()
    policy = VLAPolicy(*both, config=config, instructions=TOY.instructions)
    return policy.save_pretrained(tmp_path_factory.mktemp("policy") / "base")


def make(base, directory=None, lora=None, offload=False, **kwargs) -> GRPO:
    env = ImaginedVectorEnv(8, world=WORLD, split=None, device=CARD if offload else "cpu", offload=offload)
    return GRPO(
        "VLAPolicy",
        env,
        group_size=4,
        seed=3,  # some group is informative in each iteration
        device="cpu",
        success_bounds=None,
        checkpoint_dir=directory,
        learning_rate=1e-2,
        policy_kwargs={"model": base, "lora": lora, "gradient_checkpointing": lora is not None},
        **kwargs,
    )


def weights(model: GRPO) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.policy.parameters()])


def test_grpo_updates_without_the_world_on_the_card(base, places, monkeypatch):
    plain = make(base)
    plain.learn(max_iterations=2)
    model, during = make(base, offload=True), []
    update = model.train
    monkeypatch.setattr(model, "train", lambda r: (during.append(places["network"][-1]), update(r)))
    model.learn(max_iterations=2)
    assert during == ["cpu", "cpu"] and places["network"][-4:] == [CARD, "cpu", CARD, "cpu"]
    assert torch.equal(weights(plain), weights(model))
    assert all(p.grad is None for p in model.policy.parameters()), "kept over the next rollouts"


@pytest.mark.parametrize("recompute", [False, True])
def test_adapters_start_with_a_ratio_of_one_and_move_alone(base, recompute):
    model = make(base, lora={"r": 4}, batch_size=4, micro_batch_size=5, recompute_log_probs=recompute)
    before = {n: p.clone() for n, p in model.policy.named_parameters()}
    model.learn(max_iterations=1)
    error = model.history[0]["train/ratio_max_error"]
    assert error == 0.0 if recompute else error < 1e-5
    moved = {n for n, p in model.policy.named_parameters() if not torch.equal(p, before[n])}
    assert moved and all("lora_" in name for name in moved)


def test_a_run_with_adapters_goes_on_from_small_checkpoints(base, tmp_path):
    lora = {"r": 4}
    whole = make(base, tmp_path / "whole", lora)
    whole.learn(max_iterations=2)
    make(base, tmp_path / "parts", lora).learn(max_iterations=1)
    resumed = make(base, tmp_path / "parts", lora)
    resumed.learn(max_iterations=2, resume=True)
    assert torch.equal(weights(whole), weights(resumed))
    (file,) = (tmp_path / "parts" / "iteration-000002").glob("policy.safetensors")
    assert file.stat().st_size < (base / "model.safetensors").stat().st_size / 5
    with pytest.raises(ValueError, match="frozen weights="):
        make(base, tmp_path / "parts", {"r": 2}).learn(max_iterations=3, resume=True)

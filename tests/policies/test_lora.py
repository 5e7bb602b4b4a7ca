"""Policies at size, on the tiny network: adapters, activations computed twice, half precision, four bits."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch

from wmpo_gym.data.episode import Episode
from wmpo_gym.policies import SFTSettings, VLAConfig, VLANetwork, VLAPolicy, train_sft, weights
from wmpo_gym.policies.memory import FOUR_BIT, PolicyMemory
from wmpo_gym.policies.processor import prepare_images
from wmpo_gym.policies.sft import FineTuning
from wmpo_gym.policies.vla_policy import make_spaces
from wmpo_gym.policies.weights import add_lora
from wmpo_gym.policies.windows import WindowDataset
from wmpo_gym.tasks import MOVE_BLOCK
from wmpo_gym.training.runtime import ComputeSettings, Runtime
from wmpo_gym.utils.io import ArtifactError

pytest.importorskip("peft")

RANK_4 = PolicyMemory(lora_rank=4).lora


def observe(n: int = 8, seed: int = 0) -> dict[str, torch.Tensor]:
    pixels = np.random.default_rng(seed).integers(0, 256, (n, 40, 40, 3), dtype=np.uint8)
    return {"pixels": torch.from_numpy(pixels), "task_id": torch.arange(n) % 2}


def make(seed: int = 0, **kwargs) -> VLAPolicy:
    config = VLAConfig.tiny()
    return VLAPolicy(
        *make_spaces(config, (40, 40, 3), 2),
        config=config,
        instructions=MOVE_BLOCK.instructions,
        seed=seed,
        **kwargs,
    )


def episode(steps: int = 12) -> Episode:
    rng = np.random.default_rng(0)
    return Episode(
        frames=rng.integers(0, 256, (steps + 1, 40, 40, 3), dtype=np.uint8),
        actions=rng.uniform(-1, 1, (steps, 3)).astype(np.float32),
        success=False,
        finish_step=steps,
        start_state_id=0,
        task_id=0,
        instruction=MOVE_BLOCK.instructions[0],
    )


@pytest.fixture
def base(tmp_path):
    return make().save_pretrained(tmp_path / "base")


def trained(base, **kwargs) -> VLAPolicy:
    """Adapters after two steps of fine-tuning."""
    policy = VLAPolicy.from_pretrained(base, lora=RANK_4)
    return train_sft([episode()], MOVE_BLOCK, settings=SFTSettings(steps=2, batch=4), policy=policy, **kwargs)


def same(one: VLAPolicy, other: VLAPolicy) -> bool:
    return torch.equal(one.logits(observe()), other.logits(observe()))


def test_fine_tuning_changes_the_adapters_only(base):
    before, policy = VLAPolicy.from_pretrained(base), trained(base)
    assert not same(before, policy)
    frozen = {
        k.replace("base_layer.", ""): v for k, v in policy.network.state_dict().items() if "lora_" not in k
    }
    assert all(torch.equal(value, frozen.pop(name)) for name, value in before.network.state_dict().items())
    assert not frozen


def test_saved_adapters_are_small_and_find_their_base(base, tmp_path):
    policy = trained(base)
    directory = policy.save_pretrained(tmp_path / "adapters", {"task": "move-block"})
    assert sorted(f.name for f in directory.iterdir()) == [
        "adapters.safetensors",
        "config.json",
        "policy.json",
    ]
    n_trained = sum(p.numel() for p in policy.network.parameters() if p.requires_grad)
    assert (directory / "adapters.safetensors").stat().st_size < 4 * n_trained + 8192
    loaded = VLAPolicy.from_pretrained(directory)
    assert same(policy, loaded)
    shutil.move(base, tmp_path / "elsewhere")
    with pytest.raises(ArtifactError, match=r"base.*base=…"):
        VLAPolicy.from_pretrained(directory)
    assert same(policy, VLAPolicy.from_pretrained(directory, base=tmp_path / "elsewhere"))
    assert same(policy, VLAPolicy.from_pretrained(directory, base=tmp_path / "elsewhere", lora=RANK_4))


def test_adapters_are_not_put_on_other_weights(base, tmp_path):
    directory = trained(base).save_pretrained(tmp_path / "adapters")
    other = make(seed=1).save_pretrained(tmp_path / "other")
    with pytest.raises(ArtifactError, match="not those that the adapters"):
        VLAPolicy.from_pretrained(directory, base=other)
    with pytest.raises(ValueError, match="has adapters with lora=.*save_merged"):
        VLAPolicy.from_pretrained(directory, lora={"r": 2})
    card = json.loads((directory / "policy.json").read_text())
    (directory / "policy.json").write_text(json.dumps({**card, "lora": {"r": 2}}))
    with pytest.raises(ArtifactError, match=r"adapters\.safetensors do not fit"):
        VLAPolicy.from_pretrained(directory)


def test_merged_export_is_an_ordinary_policy(base, tmp_path):
    policy = trained(base)
    before = policy.logits(observe())
    merged = VLAPolicy.from_pretrained(policy.save_merged(tmp_path / "merged"))
    assert torch.equal(policy.logits(observe()), before), "merging changed the policy itself"
    assert merged.lora is None
    assert merged.network.state_dict().keys() == make().network.state_dict().keys()
    torch.testing.assert_close(merged.logits(observe()), before, rtol=1e-5, atol=1e-5)
    assert not same(merged, VLAPolicy.from_pretrained(base))
    with pytest.raises(ValueError, match="no adapters"):
        merged.save_merged(tmp_path / "again")


def test_adapters_without_a_saved_base_are_not_saved_alone(tmp_path):
    policy = make(lora=RANK_4)
    with pytest.raises(ValueError, match="not saved.*save_merged"):
        policy.save_pretrained(tmp_path / "adapters")
    assert same(make(), VLAPolicy.from_pretrained(policy.save_merged(tmp_path / "merged")))


def test_adapters_of_the_published_size_are_a_few_megabytes():
    with torch.device("meta"):
        network = VLANetwork(VLAConfig.openvla_oft_7b())
        add_lora(network, {"r": 1})
    adapters = {name: p for name, p in network.named_parameters() if p.requires_grad}
    assert all(name.startswith("language_model.") for name in adapters), "the towers are left alone"
    # q, k, v, o: 4 (4096 + 4096); gate, up, down: 3 (4096 + 11008); of 32 layers.
    assert sum(p.numel() for p in adapters.values()) == 32 * (4 * 8192 + 3 * 15104) == 2_498_560
    assert sum(4 * p.numel() for p in adapters.values()) < 10e6


def test_a_checkpoint_of_adapters_leaves_the_base_out(base, tmp_path, monkeypatch):
    monkeypatch.setattr("wmpo_gym.policies.sft.CHECKPOINT_EVERY", 1)

    def interrupt(step, *_):
        if step == 2:  # before the second checkpoint
            raise KeyboardInterrupt

    expected = trained(base)
    with pytest.raises(KeyboardInterrupt):
        trained(base, checkpoint_dir=tmp_path / "checkpoint", progress=interrupt)
    size = (tmp_path / "checkpoint" / "state.safetensors").stat().st_size
    assert size < (base / "model.safetensors").stat().st_size / 2
    steps: list[int] = []
    resumed = trained(
        base, checkpoint_dir=tmp_path / "checkpoint", progress=lambda step, *_: steps.append(step)
    )
    assert steps == [2] and same(expected, resumed)
    make(seed=1).save_pretrained(base)
    with pytest.raises(ValueError, match="other settings"):
        trained(base, checkpoint_dir=tmp_path / "checkpoint")


def gradient(policy: VLAPolicy, micro_batch: int | None = None) -> dict[str, torch.Tensor]:
    policy.set_training_mode(True)
    windows = WindowDataset([episode()], chunk=4)
    training = FineTuning(policy, windows, (), SFTSettings(), seed=0)
    runtime = Runtime(ComputeSettings(device="cpu", micro_batch_size=micro_batch))
    for part in runtime.micro_batches(training.tensors(windows.rows(np.arange(len(windows))))):
        training.compute_loss(part).loss.backward()
    return {n: p.grad for n, p in policy.network.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("lora", [None, RANK_4])
def test_checkpointed_activations_give_the_same_gradient(base, lora):
    kept, twice = (
        VLAPolicy.from_pretrained(base, lora=lora, gradient_checkpointing=g) for g in (False, True)
    )
    calls = []
    layer = twice.network.language_model.model.layers[0]
    layer.mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    expected, found = gradient(kept), gradient(twice)
    assert len(calls) == 2, "forward and again going back"
    assert expected and expected.keys() == found.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    twice.set_training_mode(False)
    twice.logits(observe())
    assert len(calls) == 3, "nothing is computed twice without a gradient to come"


def test_micro_batches_do_not_change_the_gradient(base):
    """The last windows of an episode hold fewer actions: the mean is over all tokens, not over parts."""
    expected, found = (gradient(VLAPolicy.from_pretrained(base), size) for size in (None, 5))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)


def test_half_precision_is_for_gpus(base, monkeypatch):
    reference = VLAPolicy.from_pretrained(base)
    with pytest.warns(UserWarning, match="100 times slower"):
        policy = VLAPolicy.from_pretrained(base, precision="bf16", lora=RANK_4)
    assert same(reference, policy)
    monkeypatch.setattr(weights, "has_gpu", lambda: True)
    policy = VLAPolicy.from_pretrained(base, precision="bf16", lora=RANK_4)
    types = {p.requires_grad: p.dtype for p in policy.network.parameters()}
    assert types == {True: torch.float32, False: torch.bfloat16}
    text = policy._table(observe()["task_id"])
    with torch.autocast("cpu", torch.bfloat16):
        half = policy.network(prepare_images(observe()["pixels"], policy.config), *text)
    error = (half - reference.logits(observe())).norm() / half.norm()
    assert half.dtype == torch.float32 and 1e-4 < error < 0.05
    with pytest.raises(ValueError, match="lies on the cpu; move it to a GPU"):
        policy.sample(observe())
    with pytest.raises(ValueError, match="fp8.*bf16"):
        VLAPolicy.from_pretrained(base, precision="fp8")
    assert VLAPolicy.from_pretrained(base, precision="float32").precision == "fp32"  # its earlier name


def test_four_bits_are_guarded(base, monkeypatch):
    with pytest.raises(ValueError, match="need a CUDA GPU"):
        VLAPolicy.from_pretrained(base, quantization=FOUR_BIT, lora=RANK_4)
    monkeypatch.setattr(weights, "has_gpu", lambda: True)
    with pytest.raises(ValueError, match="saved policy can be quantised"):
        make(quantization=FOUR_BIT)
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes", None)
    with pytest.raises(ImportError, match="pip install bitsandbytes"):
        VLAPolicy.from_pretrained(base, quantization=FOUR_BIT, lora=RANK_4)
    with pytest.raises(ValueError, match="give lora_rank"):
        PolicyMemory(four_bit=True)


def test_four_bits_are_loaded_trained_and_saved_as_adapters(base, tmp_path, monkeypatch):
    pytest.importorskip("bitsandbytes")
    monkeypatch.setattr(weights, "has_gpu", lambda: True)  # moving it to the CPU quantises as well

    def logits(policy):
        policy.set_training_mode(True)  # its CPU kernels for prediction have no gradient
        text = policy._table(observe()["task_id"])
        return policy.network(prepare_images(observe()["pixels"], policy.config), *text)

    options = {**FOUR_BIT, "bnb_4bit_compute_dtype": "float32"}
    policy = VLAPolicy.from_pretrained(base, quantization=options, lora=RANK_4).to("cpu")
    linear = policy.network.language_model.model.layers[0].mlp.up_proj.base_layer
    assert type(linear).__name__ == "Linear4bit" and linear.weight.dtype == torch.uint8
    plain, coarse = logits(VLAPolicy.from_pretrained(base)), logits(policy)
    assert 0 < (plain - coarse).norm() < 0.5 * plain.norm()
    coarse.square().sum().backward()
    with torch.no_grad():
        for parameter in policy.network.parameters():
            if parameter.requires_grad:
                parameter -= 0.01 * parameter.grad
    directory = policy.save_pretrained(tmp_path / "adapters")
    loaded = VLAPolicy.from_pretrained(directory, quantization=options).to("cpu")
    assert torch.equal(logits(loaded), logits(policy)) and not torch.equal(logits(policy), coarse)
    with pytest.raises(ValueError, match="without `quantization`"):
        policy.save_merged(tmp_path / "merged")
    VLAPolicy.from_pretrained(directory).save_merged(tmp_path / "merged")

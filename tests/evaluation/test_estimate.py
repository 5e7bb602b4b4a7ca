"""Estimates are what running measures: the tiny config exactly, the published one by the known figures."""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from wmpo_gym.capacity import fit as capacity
from wmpo_gym.capacity.estimate import GIB, Estimator, Option, options
from wmpo_gym.capacity.fit import Machine, TooLittleMemoryError, make_plan, plan_text, require_room
from wmpo_gym.capacity.meter import measure
from wmpo_gym.capacity.training import Speed, TrainingEstimator, plan_training, training_text
from wmpo_gym.capacity.workload import published_workload, saved_workload
from wmpo_gym.cli.main import main
from wmpo_gym.envs.imagined import ImaginedVectorEnv
from wmpo_gym.policies import VLAPolicy
from wmpo_gym.policies.memory import PolicyMemory
from wmpo_gym.policies.weights import add_lora
from wmpo_gym.utils.io import read_json
from wmpo_gym.utils.kernels import ordinary_kernels
from wmpo_gym.world.networks.autoencoder import PixelAutoencoder
from wmpo_gym.world.networks.conv import ConvWorldModel
from wmpo_gym.world.networks.stdit import STDiT
from wmpo_gym.world.objectives import ChunkObjective, LatentBatch
from wmpo_gym.world.training import WorldModelTraining
from wmpo_gym.world.world import World, find_pretrained

pytest.importorskip("transformers")
pytest.importorskip("peft")

GROUPS, SIZE = 2, 3
ROWS = GROUPS * SIZE
PLAIN = Option(PolicyMemory())


@pytest.fixture(scope="module")
def bundled() -> Estimator:
    settings = {"n_groups": GROUPS, "group_size": SIZE, "n_epochs": 2, "micro_batch": 5, "rows_at_once": ROWS}
    return Estimator(saved_workload("move-block", "move-block", **settings))


def test_parameters_are_those_of_the_loaded_networks(bundled):
    world, policy = World.from_pretrained("move-block"), load_policy()
    networks = {"policy": policy.network, "world model": world.network, "classifier": world.classifier}
    expected = {name: sum(p.numel() for p in n.parameters()) for name, n in networks.items()}
    assert bundled.parameters == {**expected, "autoencoder": 0}


def load_policy() -> VLAPolicy:
    return VLAPolicy.from_pretrained(find_pretrained("move-block", "policy"))


def test_operations_are_those_that_running_counts(bundled):
    """One iteration without a success, so that every episode has full length."""
    policy = load_policy()
    env = ImaginedVectorEnv(ROWS, "move-block", threshold=1.0, max_batch=ROWS)
    counts: dict[str, int] = {}
    seen, traces = [], []
    # torch counts neither the CPU's fused attention nor oneDNN's linear layers
    with sdpa_kernel(SDPBackend.MATH), ordinary_kernels():
        obs, _ = env.reset(seed=0)
        for _ in range(env.max_episode_steps):
            tensors = {name: torch.as_tensor(value) for name, value in obs.items()}
            with FlopCounterMode(display=False) as deciding:
                actions, _, trace = policy.sample(tensors)
            with FlopCounterMode(display=False) as imagining:
                obs, _, terminated, truncated, _ = env.step(actions.numpy())
            assert not terminated.any()
            seen.append(tensors)
            traces.append(trace)
            counts["deciding"] = counts.get("deciding", 0) + deciding.get_total_flops()
            counts["imagining"] = counts.get("imagining", 0) + imagining.get_total_flops()
        assert truncated.all()
        policy.set_training_mode(True)
        with FlopCounterMode(display=False) as updating:
            for tensors, trace in zip(seen, traces, strict=True):
                policy.log_prob(tensors, trace)[0].sum().backward()
    flops = bundled.flops(PLAIN)
    world = [flops[name] for name in ("world model", "autoencoder", "classifier")]
    assert sum(world) == pytest.approx(counts["imagining"], rel=1e-9)
    assert flops["policy, deciding"] == pytest.approx(counts["deciding"], rel=1e-9)
    # Going back, fused attention computes its scores once more.
    config, tokens = policy.config.language, len(policy._table.text[0]) + 4  # patches
    extra = config["num_hidden_layers"] * 2 * tokens**2 * config["hidden_size"] * len(seen) * ROWS
    assert flops["policy, updating"] == pytest.approx(2 * (updating.get_total_flops() + extra), rel=1e-9)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_are_what_the_allocator_gives_out(bundled, checkpointing):
    rows = bundled.workload.micro_batch
    memory = PolicyMemory(gradient_checkpointing=checkpointing)
    policy = VLAPolicy.from_pretrained(find_pretrained("move-block", "policy"), **memory.policy_kwargs())
    policy.set_training_mode(True)
    for parameter in policy.network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    obs = {"pixels": torch.zeros(rows, 40, 40, 3, dtype=torch.uint8), "task_id": torch.ones(rows).long()}
    trace = policy.sample(obs)[2]
    policy.set_training_mode(True)

    def update() -> None:
        log_prob, entropy = policy.log_prob(obs, trace)
        log_prob.sum().backward()

    update()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        update()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = np.cumsum([e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())])
    parts = bundled.footprint(Option(memory)).parts
    assert parts["activations"] == pytest.approx(live.max(), rel=0.05)
    assert parts["gradients"] == sum(p.numel() * 4 for p in policy.network.parameters())


def test_what_is_freed_or_was_there_does_not_count():
    weight = torch.empty(64, 64, device="meta")

    def compute() -> torch.Tensor:
        x = torch.empty(64, 64, device="meta") @ weight  # 16 KiB each
        return (x.t() + 1)[0, :1].clone()

    cost = measure(compute, [weight])
    assert cost.flops == 2 * 64**3
    assert cost.peak == 2 * 16 * 1024 + 4, "the first tensor is gone when the third is made"
    assert cost.kept == 4


def test_attention_is_fused_as_on_a_gpu():
    q = torch.empty(1, 2, 512, 16, device="meta")
    original = F.scaled_dot_product_attention
    cost = measure(lambda: F.scaled_dot_product_attention(q, q, q), [q])
    assert cost.peak < 2 * 512 * 512 and cost.flops == 2 * 2 * 2 * 512 * 512 * 16
    assert F.scaled_dot_product_attention is original


def test_options_take_less(bundled):
    """Each way needs no more than the one before it of its kind."""
    gpu = {o.flags(): bundled.footprint(o, 2) for o in options(bundled.workload, 2, gpu=True)}
    lora = "--lora-rank 32 --precision bf16"
    chain = [lora, f"{lora} --gradient-checkpointing", f"{lora} --gradient-checkpointing --offload"]
    peaks = [gpu[name].updating for name in chain]
    assert peaks == sorted(peaks, reverse=True) and peaks[0] > peaks[-1]
    assert gpu[chain[0]].imagining == gpu[chain[2]].imagining, "the world is there while it imagines"
    plain, sharded = gpu["--precision bf16"].parts, gpu["--precision bf16 with FSDP"].parts
    assert sharded["optimizer"] == plain["optimizer"] // 2 == 4 * 1_111_488
    assert gpu[chain[0]].parts["optimizer"] < plain["optimizer"] / 2


def test_adapters_that_are_there_are_what_is_trained(bundled, tmp_path):
    directory = find_pretrained("move-block", "policy")
    lora = {"r": 2}
    VLAPolicy.from_pretrained(directory, lora=lora).save_pretrained(tmp_path / "adapters")
    settings = {"n_groups": 1, "group_size": 2, "n_epochs": 1, "micro_batch": 2}
    estimator = Estimator(saved_workload(None, tmp_path / "adapters", **settings))
    network = load_policy().network
    add_lora(network, lora)
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    assert estimator.policy_size(PolicyMemory()).trained == trained


# -- the published size --------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def paper() -> Estimator:
    """The published world with a policy of two layers, whose network is built in no time."""
    work = published_workload("coffee")
    towers = tuple(replace(t, settings={**t.settings, "num_hidden_layers": 2}) for t in work.policy.towers)
    language = {**work.policy.language, "num_hidden_layers": 2}
    return Estimator(replace(work, policy=replace(work.policy, towers=towers, language=language)))


def test_published_world(paper):
    """The published sizes: without the cached context, 5.4 PFLOP per coffee trajectory."""
    counts = paper.parameters
    assert counts["world model"] == 907_789_856
    assert counts["autoencoder"] == 83_653_863 and counts["classifier"] == pytest.approx(86.2e6, rel=1e-3)
    per_rollout = paper.world_cost(16).flops["world model"]
    assert per_rollout * 12 / 8 == pytest.approx(5.4e15, rel=0.05), "4 of 12 frames, in 29 of 30 steps"


@pytest.mark.slow
def test_published_plan(capsys):
    """At the published sizes the policy's forward passes take about 2.4 PFLOP per 16 trajectories."""
    assert main(["estimate", "--preset", "paper", "--task", "coffee"]) == 0
    printed = capsys.readouterr().out
    one, many = printed.split("1 x 80 GB")[1].split("4 x 8 x 80 GB")
    assert "take: --lora-rank 32 --precision bf16" in one
    assert "take: --precision bf16 with FSDP" in many
    estimator = Estimator(published_workload("coffee"))
    deciding = estimator.flops(Option(PolicyMemory(precision="bf16")), 32)["policy, deciding"]
    assert deciding / 512 * 16 == pytest.approx(2.4e15, rel=0.05)


def test_plan_says_what_makes_it_fit(paper):
    """A card on which neither all weights nor the activations of adapters have room."""
    paper = Estimator(replace(paper.workload, world=None, n_groups=1, micro_batch=64))
    sizes = {o.flags(): paper.footprint(o).peak for o in options(paper.workload, 1, True)}
    wanted = "--lora-rank 32 --precision bf16 --gradient-checkpointing"
    room = Machine("a card", 1, int((sizes[wanted] + 1e6) / (1 - capacity.RESERVE)))
    plan = make_plan(paper, room)
    assert plan.best is not None and plan.best.flags() == wanted
    text = plan_text(paper, [plan])
    assert f"take: {wanted}" in text and "too large" in text and "TFLOP" in text
    nothing = make_plan(paper, Machine("a small card", 1, GIB))
    assert nothing.best is None and "DOES NOT FIT" in plan_text(paper, [nothing])


def test_unknown_tasks_and_machines_are_named():
    with pytest.raises(ValueError, match="'tea'.*coffee"):
        published_workload("tea")
    assert published_workload("stack_three").n_chunks == 40
    assert dataclasses.astuple(Machine.parse("4x8x80"))[1:] == (32, 80 * GIB, True)
    for text in ("80", "0x80", "1x80GB"):
        with pytest.raises(ValueError, match="here"):
            Machine.parse(text)
    with pytest.raises(ValueError, match="micro_batch"):
        published_workload("coffee", micro_batch=0)


# -- training of the world model -----------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["conv", "stdit"])
def test_operations_of_training_are_those_that_running_counts(kind):
    """An optimiser step of the trainer's own objective, contexts sampled and not."""
    make = {"conv": ConvWorldModel, "stdit": STDiT}[kind]
    sizes = {
        "conv": {"image_size": 16, "widths": (8, 16), "blocks": 1, "cond_dim": 16, "detail": 8},
        "stdit": {"hidden_size": 24, "depth": 1, "num_heads": 2, "in_channels": 3, "predict_sigma": False},
    }[kind]
    network = make(**sizes, context_frames=2, chunk=4, action_dim=2)
    rows, steps = 3, 2
    for restart in (0.5, 1.0):
        settings = WorldModelTraining(steps=10, batch_size=rows, restart_prob=restart)
        estimator = TrainingEstimator(
            "tiny", network, PixelAutoencoder(), 16, settings, denoising_steps=steps, bf16=False
        )
        objective = ChunkObjective(0.5, 0.1, steps, self_forcing=restart < 1)
        context, targets = torch.zeros(rows, 3, 2, 16, 16), torch.zeros(rows, 3, 4, 16, 16)
        last, weights = context[:, :, -1:], torch.ones(rows, 1, 4, 16, 16)
        batch = LatentBatch(
            context, targets, torch.zeros(rows, 4, 2), torch.zeros(rows, 2), last, weights, torch.ones(rows)
        )
        draws = objective.draw(targets.shape, context.shape, torch.Generator().manual_seed(0))
        with sdpa_kernel(SDPBackend.MATH), ordinary_kernels(), FlopCounterMode(display=False) as counter:
            objective(network, batch, draws).losses.sum().backward()
        expected, counted = counter.get_total_flops(), sum(estimator.flops().values())
        # Going back, fused attention computes its scores once more: of 64 places per frame, of 6 frames.
        again = 2 * rows * 24 * (6 * 64**2 + 64 * 6**2) if kind == "stdit" else 0
        assert counted == pytest.approx(expected + again, rel=1e-9)
    assert next(network.parameters()).device.type == "cpu"


def test_micro_batches_are_halved_until_a_training_fits():
    network = STDiT(hidden_size=24, depth=1, num_heads=2, in_channels=3, predict_sigma=False)
    settings = WorldModelTraining(steps=100, batch_size=24)
    estimator = TrainingEstimator(
        "tiny", network, PixelAutoencoder(), 16, settings, denoising_steps=1, bf16=True
    )
    sizes = {n: estimator.footprint(2, n).peak for n in (12, 6, 3, 2, 1)}
    assert list(sizes.values()) == sorted(sizes.values(), reverse=True)
    machine = Machine("two cards", 2, int((sizes[3] + 1e4) / (1 - capacity.RESERVE)))
    plan = plan_training(estimator, machine, Speed(1.0, 0.5))
    assert [row.micro_batch for row in plan.rows] == [12, 6, 3] and plan.best == plan.rows[-1]
    flops = 100 * sum(estimator.flops().values())
    assert plan.hours == pytest.approx(flops / (2 * 0.5e12) / 3600)
    text = training_text(estimator, [plan], Speed(1.0, 0.5))
    assert "too large" in text and "50% of 1 TFLOP/s per device, assumed and not measured" in text
    parts = estimator.footprint(1)
    count = 4 * sum(p.numel() for p in network.parameters())
    assert (parts.gradients, parts.optimizer, parts.weights) == (count, 3 * count, count)
    with pytest.raises(ValueError, match="utilisation must be above 0"):
        Speed(1.0, 0.0)


@pytest.mark.slow
def test_published_world_model(capsys):
    command = ["estimate", "--training", "world-model", "--preset", "paper", "--steps", "1000"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "907,789,856" in printed and "8 x 80 GB" in printed and "1,000 steps of 128 rows" in printed


def test_training_that_does_not_fit_is_refused_before_it_begins(monkeypatch, tmp_path, capsys):
    store = tmp_path / "demos"
    assert main(["collect", "--out", str(store), "--episodes", "2"]) == 0
    monkeypatch.setattr(capacity, "available_memory", lambda _: 300 * 2**20)
    out = tmp_path / "world"
    command = ["train", "world-model", "--episodes", str(store), "--out", str(out), "--device", "cpu"]
    assert main([*command, "--batch-size", "4096"]) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert "It would fit with --micro-batch-size 16" in error and "4096 rows per pass" in error
    assert [path.name for path in tmp_path.iterdir()] == ["demos"]


def test_options_of_another_training_are_refused(capsys):
    assert main(["estimate", "--training", "world-model", "--lora-rank", "4"]) == 2
    assert "--lora-rank cannot be given with --training world-model" in capsys.readouterr().err
    assert main(["estimate", "--steps", "4"]) == 2
    assert "give --training world-model" in " ".join(capsys.readouterr().err.split())


# -- the commands --------------------------------------------------------------------------------------------
def test_command_for_the_bundled_world_model(tmp_path, capsys):
    command = ["estimate", "--training", "world-model", "--batch-size", "8", "--machines", "1x80", "8x80"]
    assert main([*command, "--json", str(tmp_path / "plan.json")]) == 0
    printed = capsys.readouterr().out
    assert "644,070" in printed and "assumed and not measured" in printed
    content = read_json(tmp_path / "plan.json")
    one, eight = content["plans"]
    assert one["best_micro_batch"] == 8 and eight["best_micro_batch"] == 1
    assert one["estimated_hours"] == pytest.approx(8 * eight["estimated_hours"])
    assert content["assumed"] == {"peak_tflops": 312.0, "utilisation": 0.4}


def test_command_for_the_bundled_world(tmp_path, capsys):
    assert main(["estimate", "--n-groups", "2", "--json", str(tmp_path / "plan.json")]) == 0
    assert "1,111,488" in capsys.readouterr().out
    plan = read_json(tmp_path / "plan.json")["plans"][0]
    assert plan["best"] == "as it is" and plan["options"][0]["fits"] and plan["flops_per_iteration"]
    assert main(["estimate", "--n-groups", "2", "--machines", "1x1", "--lora-rank", "1", "--offload"]) == 0
    assert "--lora-rank 1 --offload" in capsys.readouterr().out


def test_too_little_memory_is_refused_before_anything_is_loaded(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(capacity, "available_memory", lambda _: 2**20)
    monkeypatch.setattr(World, "from_pretrained", lambda *_: pytest.fail("loaded"))
    monkeypatch.setattr(VLAPolicy, "from_pretrained", lambda *_: pytest.fail("loaded"))
    assert main(["train", "grpo", "--n-groups", "2", "--out", str(tmp_path / "rl")]) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert (
        "while imagining" in error and "smaller --micro-batch" in error and not list(Path(tmp_path).iterdir())
    )
    monkeypatch.setattr(capacity, "available_memory", lambda _: 10**9)
    work = saved_workload(None, "move-block", n_groups=1, group_size=2, n_epochs=1, micro_batch=64)
    require_room(work, PLAIN, "cpu")
    with pytest.raises(TooLittleMemoryError, match="while updating"):
        require_room(replace(work, micro_batch=64_000), PLAIN, "cpu")

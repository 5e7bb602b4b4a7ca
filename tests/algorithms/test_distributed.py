"""Several processes train as one does: the same start states, decisions, groups, gradients and files.

``distributed_runs.py`` holds the trainings; two processes run them all under torchrun, this one alone again.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import distributed_runs
import numpy as np
import pytest
import torch as th
from distributed_runs import BOTH, make

from wmpo_gym.algorithms.distributed import Ranks, fsdp_options
from wmpo_gym.algorithms.grpo import loss_units, token_weights
from wmpo_gym.algorithms.trajectories import index_obs

ROOT = Path(__file__).parents[2]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def torchrun(script: Path, *arguments: str, **environment: str) -> str:
    # The launcher passes its own path on; the script needs what this process imports from.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **environment}
    command = [sys.executable, *TORCHRUN, str(script), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    """Where two processes have run everything."""
    directory = tmp_path_factory.mktemp("two")
    torchrun(Path(distributed_runs.__file__), str(directory))
    return directory


@pytest.fixture
def two(directory) -> Any:
    """Results of a run by rank."""
    return lambda name: [json.loads((directory / f"{name}-{i}.json").read_text()) for i in (0, 1)]


# ------------------------------------------------------------------ two processes and one


@pytest.mark.parametrize("run", BOTH, ids=lambda run: run.__name__)
def test_two_processes_equal_one(run, two, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        one = json.loads(json.dumps(run(tmp_path)))
    first, second = two(run.__name__)
    for found in (first, second):
        assert found["counts"] == one["counts"] and found["budget"] == one["budget"]
        assert found["next"] == one["next"]  # the random stream goes on alike
        np.testing.assert_allclose(found["weights"], one["weights"], atol=2e-6)
        assert len(found["history"]) == len(one["history"])
        for ours, theirs in zip(found["history"], one["history"], strict=True):
            assert ours == pytest.approx(theirs, abs=1e-5, nan_ok=True)
    assert first["weights"] == second["weights"]
    assert all(first["sharded"]) == all(second["sharded"]) == run.__name__.startswith("fsdp")
    assert not any(one["sharded"])
    both = sorted(first["rollouts"] + second["rollouts"])
    assert len(both) == len(one["rollouts"])
    for ours, theirs in zip(both, sorted(one["rollouts"]), strict=True):
        assert ours[:2] == theirs[:2] and np.allclose(ours[2], theirs[2], atol=1e-5)


def test_the_comparison_is_about_something(two):
    """Groups are kept and dropped on both sides, batches repeated, surplus cut off."""
    first, second = two("grpo")
    assert first["rollouts"] and second["rollouts"]
    assert any(entry["rollout/batches"] > 1 for entry in first["history"])
    assert {entry["rollout/kept_groups"] for entry in first["history"]} == {5}
    first, second = two("nothing_kept_on_one")
    assert first["rollouts"] and not second["rollouts"] and first["counts"][1] > 0
    first, _ = two("nothing_kept")
    assert not first["rollouts"] and first["counts"][1] == 0
    first, second = two("dpo")
    assert first["rollouts"] and second["rollouts"] and first["counts"][1] > 0


def test_killed_between_any_two_writes(two):
    for found in two("killed"):
        assert found["states"] > 20 and found["different"] == []


@pytest.mark.parametrize(("run", "options"), [("resumed", {}), ("fsdp_resumed", {"kl_coef": 0.1})])
def test_one_process_takes_up_what_two_began(run, options, directory, tmp_path):
    getattr(distributed_runs, run)(tmp_path / "one")
    shutil.copytree(directory / run, tmp_path / "two")
    one, two = (
        make(checkpoint_dir=tmp_path / name, **options).learn(max_iterations=5, resume=True)
        for name in ("one", "two")
    )
    assert len(two.history) == 5 and one.num_timesteps == two.num_timesteps
    for ours, theirs in zip(two.policy.parameters(), one.policy.parameters(), strict=True):
        th.testing.assert_close(ours, theirs, atol=2e-6, rtol=0)


def test_all_stop_when_one_is_told_to(two):
    assert two("stopped_by_one") == [{"steps": 4, "iteration": 1}] * 2


def test_all_start_as_the_main_process(two):
    first, second = two("different_seeds")
    assert first["weights"] == second["weights"] and first["next"] == second["next"]
    assert first["counts"] == second["counts"]


def test_files_and_tables_are_written_once(two):
    assert [found["formats"] for found in two("files")] == [2, 0]  # standard output and TensorBoard


def test_half_precision_keeps_its_master_weights(two):
    first, second = two("half_precision")
    assert first["dtypes"] == ["torch.float32"] and first["weights"] == second["weights"]
    assert first["counts"][1] > 0 and np.isfinite(first["weights"]).all()


@pytest.mark.parametrize(
    ("run", "messages"),
    [
        ("draws_by_itself", ["OwnDraws.sample draws random numbers by itself", "self.draw"]),
        ("other_rows", ["ValueError", "[4, 8] rows"]),
        ("uneven_share", ["3 groups cannot be dealt out evenly to 2 processes", "n_groups=2 or 4"]),
        ("unshared_directory", ["of iterations [1, None]", "all machines share"]),
        ("full_disk", ["WriteError", "No space left"]),
        ("weights_elsewhere", ["GaussianPolicy trains weights outside of it"]),
        ("half_precision_alone", ["mixed_precision 'bf16'", "with FSDP only"]),
        ("unoffered", ["fsdp_offload_params is not offered"]),
    ],
)
def test_every_process_is_told_what_is_wrong(run, messages, two):
    for found in two(run):
        assert all(message in found["error"] for message in messages), found


# ------------------------------------------------------------------ without starting any


def test_groups_are_dealt_out_evenly():
    ranks = [Ranks(i, 3) for i in range(3)]
    assert [r.local_slice(np.arange(6)).tolist() for r in ranks] == [[0, 3], [1, 4], [2, 5]]
    assert ranks[1].rows_per_rank(48, 8) == 16 and [r.is_main for r in ranks] == [True, False, False]
    with pytest.raises(ValueError, match="2 groups cannot .* to 3 processes.*n_groups=3 or 6"):
        ranks[0].rows_per_rank(16, 8)


def test_a_process_by_itself_needs_nobody(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")  # set by others than torchrun, too
    ranks = Ranks.join()
    assert ranks.size == 1 and ranks.is_main
    places, total = ranks.global_indices(th.tensor([False, True, True, False]), 2)
    assert places.tolist() == [0, 1] and total == 2
    assert ranks.add({"a": 1.0}) == {"a": 1.0} and ranks.on_main(lambda: 5) == 5


@pytest.mark.parametrize("policy", ["VLAPolicy", "MlpPolicy", None])
def test_parts_of_a_batch_are_sampled_as_the_whole(policy):
    if policy == "VLAPolicy":
        from wmpo_gym.policies import VLAPolicy
        from wmpo_gym.policies.vla import VLAConfig
        from wmpo_gym.policies.vla_policy import make_spaces

        config = VLAConfig.tiny()
        sampler = VLAPolicy(
            *make_spaces(config, (40, 40, 3), 1), config=config, instructions=["push"], temperature=2.0
        )
        pixels = th.randint(0, 256, (6, 40, 40, 3), generator=th.Generator().manual_seed(0)).byte()
        obs = {"pixels": pixels, "task_id": th.zeros(6, dtype=th.int64)}
    else:
        sampler = make(**({} if policy is None else {"policy": policy})).policy
        obs = th.rand(6, 4, generator=th.Generator().manual_seed(0))
    generator = sampler._generator
    before = generator.get_state()
    _, _, whole = sampler.sample(obs)
    after, traces = generator.get_state(), th.empty_like(whole)
    for places in (th.tensor([0, 2, 3]), th.tensor([1, 4, 5])):
        generator.set_state(before)
        _, _, traces[places] = sampler.sample_part(index_obs(obs, places), places, 6)
        assert th.equal(generator.get_state(), after)
    th.testing.assert_close(traces, whole, atol=1e-6, rtol=0)


def test_a_configuration_for_several_processes_that_started_one_is_refused(monkeypatch):
    """The environment that ``accelerate launch --cpu --num_processes 2`` sets."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with pytest.raises(ValueError, match="several processes, but one was started.*torchrun"):
        make()


def test_more_processes_than_gpus_are_refused(monkeypatch):
    for name, value in {"LOCAL_RANK": "2", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "8"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(th.cuda, "is_available", lambda: True)
    monkeypatch.setattr(th.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match=r"8 processes .* 2 GPU\(s\).*Start 2"):
        Ranks.join("auto")


@pytest.mark.parametrize("normalizer", ["trajectory", "token"])
def test_weights_of_parts_add_up_to_those_of_the_whole(normalizer):
    mask = th.tensor([[1, 1], [1, 0], [0, 0], [1, 1], [1, 0]], dtype=th.bool)
    rows = th.tensor([0, 0, 1, 2, 3])
    whole = token_weights(mask, rows, normalizer)
    units = loss_units(mask[:3], rows[:3], normalizer) + loss_units(mask[3:], rows[3:] - 2, normalizer)
    parts = [
        token_weights(mask[:3], rows[:3], normalizer, units),
        token_weights(mask[3:], rows[3:] - 2, normalizer, units),
    ]
    th.testing.assert_close(th.cat(parts), whole)
    assert token_weights(mask[:0], rows[:0], normalizer, units).shape == (0, 2)


@pytest.mark.parametrize(("name", "machines"), [("1x8", 1), ("4x8", 4)])
def test_accelerate_reads_the_configurations(name, machines, monkeypatch):
    from accelerate.commands import launch
    from accelerate.utils.launch import prepare_multi_gpu_env

    path = ROOT / "examples" / "accelerate" / f"{name}.yaml"
    arguments = ["--config_file", str(path), "--machine_rank", "0", "train.py"]
    arguments = launch.launch_command_parser().parse_args(arguments)
    arguments = launch._validate_launch_command(arguments)[0]
    assert (arguments.num_machines, arguments.num_processes) == (machines, 8 * machines)
    assert arguments.use_fsdp and arguments.mixed_precision == "bf16"
    for variable, value in prepare_multi_gpu_env(arguments).items():
        if variable.startswith(("FSDP_", "ACCELERATE_")):
            monkeypatch.setenv(variable, value)
    layers, options = fsdp_options(make().policy.network)
    assert options["reshard_after_forward"] and layers == set()
    assert options["mp_policy"].param_dtype is th.bfloat16
    assert options["mp_policy"].reduce_dtype is th.float32


@pytest.mark.slow
def test_the_example_gives_the_same_policy_however_it_is_started(tmp_path):
    from wmpo_gym.utils.io import load_safetensors

    example = ROOT / "examples" / "train_grpo_distributed.py"
    options = ["--iterations", "2", "--n-groups", "4", "--group-size", "4", "--episodes", "0"]
    options += ["--micro-batch-size", "16", "--out"]
    subprocess.run([sys.executable, str(example), *options, str(tmp_path / "one")], check=True)
    torchrun(example, *options, str(tmp_path / "two"))
    torchrun(example, *options, str(tmp_path / "fsdp"), ACCELERATE_USE_FSDP="true")
    one, two, fsdp = (
        load_safetensors(tmp_path / name / "policy" / "model.safetensors") for name in ("one", "two", "fsdp")
    )
    for name, weight in one.items():
        th.testing.assert_close(two[name], weight, atol=5e-5, rtol=0)
        th.testing.assert_close(fsdp[name], two[name], atol=5e-5, rtol=0)


@pytest.mark.slow
def test_sharded_adapters_are_saved_and_taken_up_again(tmp_path):
    from wmpo_gym.utils.io import load_safetensors

    distributed_runs.adapters(tmp_path / "one")
    torchrun(Path(distributed_runs.__file__), str(tmp_path), "adapters")
    assert json.loads((tmp_path / "adapters-0.json").read_text()) == {"sharded": True}
    files = [tmp_path / name / "policy" / "adapters.safetensors" for name in ("one", "adapters")]
    one, two = (load_safetensors(file) for file in files)
    assert any(weight.any() for name, weight in one.items() if "lora_B" in name)  # they begin with zeros
    for name, weight in one.items():
        th.testing.assert_close(two[name], weight, atol=1e-5, rtol=0)
    checkpoints = sorted((tmp_path / "adapters").glob("iteration-*/policy.safetensors"))
    assert len(checkpoints) == 2 and checkpoints[-1].stat().st_size < 200_000

"""Trainings that one process and several must agree on; torchrun runs this file, the test imports it."""

from __future__ import annotations

import json
import os
import sys
import warnings
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
from grpo_toys import ReachEnv, Recorder, TokenPolicy, vec
from kills import disk_states
from stable_baselines3.common.vec_env import DummyVecEnv

from wmpo_gym.algorithms import DPO, GRPO, checkpoint
from wmpo_gym.algorithms.distributed import Ranks, full_tensor, is_sharded
from wmpo_gym.envs.sb3 import make_sb3_env

GROUP, N_GROUPS = 4, 4  # of all processes together


def make(cls=GRPO, policy=TokenPolicy, env=None, **kwargs: Any):
    rows = GROUP * N_GROUPS // Ranks.join("cpu").size
    kwargs = {"seed": 3, "device": "cpu", "learning_rate": lambda p: 3e-3 * p, "group_size": GROUP, **kwargs}
    return cls(policy, vec(n_envs=rows) if env is None else env, **kwargs)


def outcome(model, recorder: Recorder | None = None) -> dict[str, Any]:
    """What a run led to; rollouts are named by where they started and what was decided."""
    told = [
        [int(index), int(start), rollouts.traces[rollouts.rows == i].tolist()]
        for rollouts in (recorder.rollouts if recorder else [])
        for i, (index, start) in enumerate(
            zip(rollouts.global_indices, rollouts.start_state_ids, strict=True)
        )
    ]
    untimed = [
        {k: v for k, v in e.items() if not k.startswith("time/") and k != "budget/seconds"}
        for e in model.history
    ]
    return {
        "weights": [w for p in model.policy.state_dict().values() for w in full_tensor(p).flatten().tolist()],
        "history": untimed,
        "counts": [model.num_timesteps, model._n_updates, model._iteration],
        "budget": [model.budget.real_episodes, model.budget.real_steps],
        "rollouts": told,
        "sharded": [is_sharded(p) for p in model.policy.parameters()],
        "next": model.group_rng.integers(1000, size=3).tolist(),
    }


def learn(model, **kwargs: Any) -> dict[str, Any]:
    recorder = Recorder()
    model.learn(**{"max_iterations": 3, "callback": recorder, **kwargs})
    return outcome(model, recorder)


def uneven(odd_tolerance: float) -> DummyVecEnv:
    """Every second group of all processes has another tolerance: one process of two has them all."""
    ranks = Ranks.join("cpu")
    groups = ranks.local_slice(np.arange(N_GROUPS)).repeat(GROUP)
    return DummyVecEnv([lambda t=(0.25, odd_tolerance)[g % 2]: ReachEnv(tolerance=t) for g in groups])


@contextmanager
def sharded():
    """FSDP as accelerate's configuration switches it on; a single process takes no notice."""
    os.environ["ACCELERATE_USE_FSDP"] = "true"
    try:
        yield
    finally:
        del os.environ["ACCELERATE_USE_FSDP"]


def resumed(directory: Path, **kwargs: Any) -> dict[str, Any]:
    """Two iterations, then a new model that goes on."""
    make(checkpoint_dir=directory, **kwargs).learn(max_iterations=2)
    np.random.seed(99)
    return learn(make(checkpoint_dir=directory, **kwargs), resume=True)


def grpo(directory: Path):
    return learn(make(n_groups=5, batch_size=6, micro_batch_size=5, max_extra_batches=3))


def options(directory: Path):
    options = {"loss_normalizer": "token", "ratio_level": "chunk", "recompute_log_probs": True}
    return learn(make(kl_coef=0.1, micro_batch_size=7, **options))


def gaussian(directory: Path):
    return learn(make(policy="MlpPolicy", success_bounds=None))


def dpo(directory: Path):
    return learn(make(DPO, n_groups=5, n_epochs=4, sft_weight=0.1, batch_size=8, micro_batch_size=3))


def nothing_kept_on_one(directory: Path):
    return learn(make(env=uneven(0.0)))


def nothing_kept(directory: Path):
    return learn(make(env=vec(n_envs=GROUP * N_GROUPS // Ranks.join("cpu").size, tolerance=0.0)))


def fsdp(directory: Path):
    with sharded():
        return learn(make(kl_coef=0.1, recompute_log_probs=True, micro_batch_size=5, env=uneven(0.05)))


def fsdp_later(directory: Path):
    """Sharded when the optimizer holds moments already."""
    model = make().learn(max_iterations=2)
    with sharded():
        return learn(model, reset_num_timesteps=False)


def fsdp_dpo(directory: Path):
    with sharded():
        return learn(make(DPO, n_epochs=3, micro_batch_size=3, env=uneven(0.1)))


def fsdp_resumed(directory: Path):
    with sharded():
        return resumed(directory, kl_coef=0.1)


BOTH = [grpo, options, gaussian, dpo, nothing_kept_on_one, nothing_kept]
BOTH += [resumed, fsdp, fsdp_later, fsdp_dpo, fsdp_resumed]


def adapters(directory: Path):
    """LoRA on the bundled policy, stopped and taken up again; too slow to be run with the others."""
    from wmpo_gym.world.world import find_pretrained

    lora = {"lora": {"r": 4, "lora_alpha": 4}, "gradient_checkpointing": True}
    kwargs = {"model": find_pretrained("move-block", "policy"), **lora}
    options = {"n_groups": 4, "max_extra_batches": 1, "micro_batch_size": 16, "recompute_log_probs": True}
    options |= {"policy": "VLAPolicy", "policy_kwargs": kwargs, "learning_rate": 1e-3}
    with sharded():
        for iterations in (1, 2):
            env = make_sb3_env("WMPO-Imagined-v0", GROUP * N_GROUPS // Ranks.join("cpu").size)
            model = make(env=env, checkpoint_dir=directory, **options)
            model.learn(max_iterations=iterations, resume=True)
        model.save_policy(directory / "policy")
    return {"sharded": model.sharded}


# ------------------------------------------------------------------ with several processes only


def stopped_by_one(directory: Path):
    recorder = Recorder(stop_at=4 if Ranks.join().index == 1 else None)
    model = make().learn(10_000, recorder)
    return {"steps": len(recorder.timesteps), "iteration": model._iteration}


def different_seeds(directory: Path):
    return learn(make(seed=Ranks.join().index), max_iterations=2)


def error(function) -> dict[str, str]:
    try:
        function()
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    return {"error": "none"}


class OwnDraws(TokenPolicy):
    def draw(self, numbers, n_rows):
        return numbers(n_rows)


def draws_by_itself(directory: Path):
    return error(lambda: make(policy=OwnDraws).learn(10))


def other_rows(directory: Path):
    return error(lambda: make(env=vec(n_envs=GROUP * (1 + Ranks.join().index))).learn(10))


def uneven_share(directory: Path):
    return error(lambda: GRPO("VLAPolicy", "WMPO-Imagined-v0", n_groups=3, device="cpu"))


def unshared_directory(directory: Path):
    make(checkpoint_dir=directory / "0").learn(max_iterations=1)
    own = directory / str(Ranks.join().index)
    return error(lambda: make(checkpoint_dir=own).learn(max_iterations=2, resume=True))


def full_disk(directory: Path):
    def full(*args, **kwargs):
        raise checkpoint.WriteError(28, "No space left on device")

    written, checkpoint.save_safetensors = checkpoint.save_safetensors, full
    try:
        return error(lambda: make(checkpoint_dir=directory).learn(max_iterations=1))
    finally:
        checkpoint.save_safetensors = written


def killed(directory: Path):
    """A kill between any two writes; the main process does all of them."""

    def run(where: Path) -> dict[str, Any]:
        model = make(checkpoint_dir=where)
        found = outcome(model.learn(max_iterations=2, resume=True))
        return {name: found[name] for name in ("weights", "counts", "next")}

    ranks, expected = Ranks.join(), run(directory / "whole")
    if ranks.is_main:
        states = disk_states(run, directory / "once")
    else:
        states = []
        run(directory / "once" / "work")
    states = ranks.gather(states)[0]
    return {"states": len(states), "different": [s.name for s in states if run(s) != expected]}


def half_precision(directory: Path):
    os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16"
    try:
        with sharded():
            model = make(recompute_log_probs=True).learn(max_iterations=2)
    finally:
        del os.environ["ACCELERATE_MIXED_PRECISION"]
    dtypes = {str(p.dtype) for p in model.policy.parameters()}
    return {**outcome(model), "dtypes": sorted(dtypes)}


def half_precision_alone(directory: Path):
    os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16"
    try:
        return error(lambda: make().learn(10))
    finally:
        del os.environ["ACCELERATE_MIXED_PRECISION"]


def unoffered(directory: Path):
    os.environ["FSDP_OFFLOAD_PARAMS"] = "true"
    try:
        with sharded():
            return error(lambda: make().learn(10))
    finally:
        del os.environ["FSDP_OFFLOAD_PARAMS"]


def weights_elsewhere(directory: Path):
    with sharded():
        return error(lambda: make(policy="MlpPolicy").learn(10))


def files(directory: Path):
    model = make(tensorboard_log=str(directory / "logs"), checkpoint_dir=directory / "checkpoints", verbose=1)
    model.learn(max_iterations=2)
    model.save(directory / "model")
    return {"formats": len(model.logger.output_formats)}


SEVERAL = [
    *[stopped_by_one, different_seeds, draws_by_itself, other_rows, uneven_share, unshared_directory],
    *[full_disk, weights_elsewhere, files, killed, half_precision, half_precision_alone, unoffered],
]


def main(directory: Path, names: list[str]) -> None:
    th.set_num_threads(1)
    warnings.simplefilter("ignore")
    ranks = Ranks.join("cpu")
    for run in [globals()[name] for name in names] or [*BOTH, *SEVERAL]:
        result = run(directory / run.__name__)
        (directory / f"{run.__name__}-{ranks.index}.json").write_text(json.dumps(result))
    Ranks.leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])

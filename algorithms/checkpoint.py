"""Checkpoints from which a killed run goes on to the same numbers.

A checkpoint is a directory ``iteration-000012`` of safetensors and JSON that appears under its name only when
it is complete; no pickle. It holds the weights, the optimizer, every random state and the counters.
"""

from __future__ import annotations

import logging
import os
import random
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch as th

from wmpo_gym.algorithms.distributed import Ranks
from wmpo_gym.algorithms.sharding import spread_slots, spread_state, whole_state
from wmpo_gym.data.optimizer_state import pack_optimizer, unpack_optimizer
from wmpo_gym.envs.ledger import Ledger
from wmpo_gym.policies.base import changing_weights, load_changing_weights, policy_generators
from wmpo_gym.utils.io import (
    ArtifactError,
    WriteError,
    load_safetensors,
    plain,
    read_json,
    save_safetensors,
    write_dir_atomic,
    write_json_atomic,
)

if TYPE_CHECKING:
    from wmpo_gym.algorithms.group_algorithm import GroupAlgorithm

logger = logging.getLogger(__name__)

Tensors = dict[str, th.Tensor]


class CheckpointDirectory:
    """The checkpoints of one run.

    Args:
        path: Directory; made when the first checkpoint is written.
        keep: How many of the newest to keep, at least 1.
    """

    def __init__(self, path: str | Path, keep: int = 2) -> None:
        if keep < 1:
            raise ValueError(f"keep must be at least 1, got {keep}.")
        self.path = Path(path)
        self.keep = keep

    def complete(self) -> list[Path]:
        """The complete checkpoints, oldest first."""
        return sorted(self.path.glob("iteration-[0-9]*"))

    def newest_iteration(self) -> int:
        """Iteration of the newest complete checkpoint, 0 if there is none."""
        complete = self.complete()
        return int(complete[-1].name.split("-")[1]) if complete else 0

    def save(self, iteration: int, tensors: Mapping[str, Tensors], state: Mapping[str, Any]) -> Path:
        """Write a checkpoint in full, then delete the oldest beyond ``keep``.

        Args:
            iteration: Names the checkpoint.
            tensors: One safetensors file per entry.
            state: Written as ``state.json``.

        Raises:
            WriteError: If it could not be written (for instance a full disk); earlier ones are untouched.
        """
        target = self.path / f"iteration-{iteration:06d}"
        try:
            with write_dir_atomic(target) as directory:
                for name, content in tensors.items():
                    save_safetensors(directory / f"{name}.safetensors", content, durable=False)
                write_json_atomic(directory / "state.json", state, durable=False)
        except WriteError as error:
            kept = [p.name for p in self.complete()]
            raise WriteError(
                error.errno,
                f"{error.strerror}. Training is still in memory and {kept[-1] if kept else 'nothing else'} "
                "is intact: free some space, then save_checkpoint() again or rerun with learn(resume=True)",
            ) from error
        for old in self.complete()[: -self.keep]:
            # Out of the way first: a kill while deleting must not leave half a checkpoint under its name.
            os.replace(old, old.with_name(f".{old.name}.old"))
        for leftover in self.path.glob(".iteration-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        return target

    def load_newest(self) -> tuple[dict[str, Tensors], dict[str, Any]] | None:
        """Read the newest checkpoint that is undamaged; None if there is none.

        A damaged one (cut off or edited by other hands) is named in the log and passed over.
        """
        for path in reversed(self.complete()):
            try:
                state = read_json(path / "state.json")
                return {f.stem: load_safetensors(f) for f in sorted(path.glob("*.safetensors"))}, state
            except ArtifactError as error:
                logger.warning("Passing over the damaged checkpoint %s: %s", path, error)
        return None


def _cuda_devices(ranks: Ranks) -> list[int]:
    """The devices this process draws random numbers on: with several processes each has its own."""
    if not th.cuda.is_available():
        return []
    return list(range(th.cuda.device_count())) if ranks.size == 1 else [th.cuda.current_device()]


def pack_rng(
    policy: th.nn.Module, generator: np.random.Generator, ranks: Ranks
) -> tuple[Tensors, dict[str, Any]]:
    """All random states: python, numpy, torch (CPU and CUDA), the policy's, and the algorithm's own."""
    tensors = {"torch": th.get_rng_state()}
    tensors |= {f"cuda.{i}": th.cuda.get_rng_state(i) for i in _cuda_devices(ranks)}
    tensors |= {f"policy.{name}": g.get_state() for name, g in policy_generators(policy).items()}
    kind, keys, *rest = np.random.get_state()
    return tensors, {
        "group": generator.bit_generator.state,
        "numpy": [kind, keys, *rest],
        "python": random.getstate(),
    }


def unpack_rng(
    policy: th.nn.Module,
    generator: np.random.Generator,
    ranks: Ranks,
    tensors: Tensors,
    state: Mapping[str, Any],
) -> None:
    """Put :func:`pack_rng`'s result back, in place."""
    th.set_rng_state(tensors["torch"])
    for i in _cuda_devices(ranks):
        if f"cuda.{i}" in tensors:
            th.cuda.set_rng_state(tensors[f"cuda.{i}"], i)
    for name, policy_generator in policy_generators(policy).items():
        policy_generator.set_state(tensors[f"policy.{name}"])
    generator.bit_generator.state = state["group"]
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, np.uint32), *rest))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))


def _settings(model: GroupAlgorithm) -> dict[str, Any]:
    """What must be equal on resuming; schedules are functions and cannot be compared."""
    values = {name: getattr(model, name) for name in model.resume_settings}
    if digest := model.policy.kept_elsewhere()[1]:
        values["frozen weights"] = digest
    values["n_envs"] = model.n_envs * model.ranks.size  # the number of processes may be another
    return plain({k: v for k, v in values.items() if not callable(v)})


def save_training(model: GroupAlgorithm, checkpoints: CheckpointDirectory) -> Path:
    """Write a checkpoint of a run between two iterations; every rank calls it, the main one writes.

    Raises:
        WriteError: If the disk is full; the model and earlier checkpoints are untouched.
    """
    optimizer, optimizer_state = pack_optimizer(model.policy.optimizer)
    kept, _ = model.policy.kept_elsewhere()
    states = {name: changing_weights(getattr(model, name).state_dict(), kept) for name in model._modules()}
    tensors = {name: whole_state(state, model.ranks) for name, state in states.items()}
    tensors["optimizer"] = whole_state(optimizer, model.ranks)
    random_states = model.ranks.gather(pack_rng(model.policy, model.group_rng, model.ranks))
    tensors |= {_rng_name(rank): found for rank, (found, _) in enumerate(random_states)}
    state = {
        "settings": _settings(model),
        "iteration": model._iteration,
        "num_timesteps": model.num_timesteps,
        "n_updates": model._n_updates,
        "budget": model.budget.to_dict(),
        "history": model.history,
        "optimizer": optimizer_state,
        **{_rng_name(rank): found for rank, (_, found) in enumerate(random_states)},
    }
    return model.ranks.on_main(lambda: checkpoints.save(model._iteration, tensors, state))


def _rng_name(rank: int) -> str:
    """Where the random states of a process stand in a checkpoint."""
    return f"rng-{rank}" if rank else "rng"


def load_training(model: GroupAlgorithm, checkpoints: CheckpointDirectory) -> bool:
    """Put a model back to the newest checkpoint, in place; False if there is none.

    Raises:
        ValueError: If the checkpoint was written under other settings, or not every rank sees it.
    """
    found = checkpoints.load_newest()
    seen = model.ranks.gather(found and found[1]["iteration"])
    if len(set(seen)) > 1:
        raise ValueError(
            f"The processes see different checkpoints in {checkpoints.path}, of iterations {seen}; "
            "checkpoint_dir must be on a file system that all machines share."
        )
    if found is None:
        return False
    tensors, state = found
    now, was = _settings(model), state["settings"]
    changed = [f"{k}={now.get(k)!r} (was {was.get(k)!r})" for k in now | was if now.get(k) != was.get(k)]
    if changed:
        raise ValueError(
            f"The checkpoints in {checkpoints.path} belong to a run with other settings: "
            f"{', '.join(changed)}. Use the same settings, or another checkpoint_dir."
        )
    kept, _ = model.policy.kept_elsewhere()
    for name in model._modules():
        module = getattr(model, name)
        load_changing_weights(module, spread_state(module, tensors[name]), kept)
    slots = spread_slots(model.policy.optimizer, tensors["optimizer"])
    unpack_optimizer(model.policy.optimizer, slots, state["optimizer"])
    own = _rng_name(model.ranks.index)
    own = own if own in tensors else "rng"  # written by fewer processes
    unpack_rng(model.policy, model.group_rng, model.ranks, tensors[own], state[own])
    model._iteration, model.num_timesteps = state["iteration"], state["num_timesteps"]
    model._n_updates, model.history = state["n_updates"], state["history"]
    model.budget = Ledger(**state["budget"])
    return True


def resume_or_refuse(model: GroupAlgorithm, resume: bool) -> bool:
    """At the start of ``learn``: restore the newest checkpoint if asked to; True if there was one.

    Raises:
        ValueError: If the model has no ``checkpoint_dir`` to resume from, or if its directory holds an
            earlier run that is not to be resumed.
    """
    if model.checkpoint_dir is None:
        if resume:
            raise ValueError("learn(resume=True) needs a checkpoint_dir; give one to the constructor.")
        return False
    checkpoints = CheckpointDirectory(model.checkpoint_dir)
    if resume:
        return load_training(model, checkpoints)
    newest = checkpoints.newest_iteration()
    if newest > model._iteration:
        raise ValueError(
            f"{model.checkpoint_dir} holds checkpoints of an earlier run (iteration {newest}); call "
            "learn(resume=True) to go on with it, or give another checkpoint_dir."
        )
    return False

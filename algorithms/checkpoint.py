"""Checkpoints from which an interrupted run resumes with identical results.

A checkpoint is a directory such as ``iteration-000012`` with safetensors and JSON files (no pickle). It is
renamed to its final name only when complete. It holds the weights, the optimizer, all random states and the
counters.
"""

from __future__ import annotations

import logging
import os
import random
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch as th
from stable_baselines3.common.base_class import BaseAlgorithm

from wmpo_gym.algorithms.distributed import Ranks, full_state, shard_optimizer_state, shard_state
from wmpo_gym.envs.ledger import Ledger
from wmpo_gym.policies.base import (
    GroupPolicy,
    changing_weights,
    load_changing_weights,
    policy_generators,
)
from wmpo_gym.training.checkpoint import pack_optimizer, unpack_optimizer
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

logger = logging.getLogger(__name__)

Tensors = dict[str, th.Tensor]


class CheckpointDirectory:
    """Checkpoint directory of one run.

    Args:
        path: Directory; created when the first checkpoint is written.
        keep: Number of newest checkpoints to keep, at least 1.
    """

    def __init__(self, path: str | Path, keep: int = 2) -> None:
        if keep < 1:
            raise ValueError(f"keep must be at least 1, got {keep}.")
        self.path = Path(path)
        self.keep = keep

    def complete(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        return sorted(self.path.glob("iteration-[0-9]*"))

    def newest_iteration(self) -> int:
        """Iteration of the newest complete checkpoint, 0 if there is none."""
        complete = self.complete()
        return int(complete[-1].name.split("-")[1]) if complete else 0

    def save(self, iteration: int, tensors: Mapping[str, Tensors], state: Mapping[str, Any]) -> Path:
        """Write a checkpoint, then delete the oldest ones beyond ``keep``.

        Args:
            iteration: Iteration number, part of the checkpoint's name.
            tensors: One safetensors file per entry.
            state: Contents of ``state.json``.

        Raises:
            WriteError: If the checkpoint could not be written (for instance a full disk); earlier
                checkpoints are untouched.
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
            # Renamed first: an interrupted deletion must not leave an incomplete checkpoint under this name.
            os.replace(old, old.with_name(f".{old.name}.old"))
        for leftover in self.path.glob(".iteration-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        return target

    def load_newest(self) -> tuple[dict[str, Tensors], dict[str, Any]] | None:
        """Read the newest intact checkpoint; None if there is none.

        Damaged checkpoints (truncated or edited) are logged and skipped.
        """
        for path in reversed(self.complete()):
            try:
                state = read_json(path / "state.json")
                return {f.stem: load_safetensors(f) for f in sorted(path.glob("*.safetensors"))}, state
            except ArtifactError as error:
                logger.warning("Skipping the damaged checkpoint %s: %s", path, error)
        return None


def _cuda_devices(ranks: Ranks) -> list[int]:
    """CUDA devices whose random state this process uses; with several processes only its own device."""
    if not th.cuda.is_available():
        return []
    return list(range(th.cuda.device_count())) if ranks.size == 1 else [th.cuda.current_device()]


def pack_rng(
    policy: th.nn.Module, generator: np.random.Generator, ranks: Ranks
) -> tuple[Tensors, dict[str, Any]]:
    """All random states: python, numpy, torch (CPU and CUDA), the policy's and the algorithm's."""
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
    """Restore the random states returned by :func:`pack_rng`, in place."""
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


def _rng_name(rank: int) -> str:
    """File name of a process's random states in a checkpoint."""
    return f"rng-{rank}" if rank else "rng"


class ResumableAlgorithm(BaseAlgorithm):
    """Algorithm whose interrupted runs resume with the results of an uninterrupted run.

    :meth:`save_checkpoint` writes everything that changes between two iterations; ``learn`` of a subclass
    begins with :meth:`_resume`. Every method that reads or writes files is called by every rank; the main
    rank writes.
    """

    # Settings that must be equal when a run is resumed.
    resume_settings: ClassVar[tuple[str, ...]] = ()

    policy: GroupPolicy
    ranks: Ranks
    group_rng: np.random.Generator
    policy_kwargs: dict[str, Any]
    checkpoint_dir: str | Path | None
    history: list[dict[str, float]]
    budget: Ledger
    sharded: bool  # whether the weights are sharded over the ranks
    _iteration: int

    def _excluded_save_params(self) -> list[str]:
        """Exclude observations, because SB3 would pickle a batch of images into every file."""
        images = ["_last_obs", "_last_original_obs", "_last_episode_starts"]
        return [*super()._excluded_save_params(), *images, "ranks", "sharded"]

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        return ["policy", "policy.optimizer"], []

    def _modules(self) -> list[str]:
        """Attributes that hold weights."""
        return [name for name in self._get_torch_save_params()[0] if name != "policy.optimizer"]

    def save(self, path: Any, exclude: Any = None, include: Any = None) -> None:
        """SB3's ``save`` (a zip file that uses pickle), written by the main process.

        Raises:
            ValueError: If the weights are sharded over several processes, which the format does not support.
        """
        if self.sharded:
            raise ValueError("The weights are spread by FSDP; use save_policy() or save_checkpoint().")
        if not self.ranks.is_main:
            return
        given = self.policy_kwargs
        if given.get("model") is not None and not getattr(self.policy, "lora", None):
            # The file holds all weights; with the network's configuration it does not need the model's path.
            known = self.policy._get_constructor_parameters()
            known = {k: v for k, v in known.items() if k not in ("observation_space", "action_space")}
            self.policy_kwargs = {**{k: v for k, v in given.items() if k not in ("model", "base")}, **known}
        try:
            super().save(path, exclude, include)
        finally:
            self.policy_kwargs = given

    def save_policy(
        self, directory: str | Path, meta: Mapping[str, Any] | None = None, *, merged: bool = False
    ) -> Path:
        """Save the policy with ``save_pretrained`` or ``save_merged``; called by all processes, written once.

        Raises:
            ValueError: If ``merged`` is True and the weights are sharded over the processes.
        """
        if merged and self.sharded:
            raise ValueError("Adapters are not merged under FSDP; save them, and merge them in one process.")
        if merged:
            return self.ranks.on_main(lambda: self.policy.save_merged(directory, meta))
        weights: dict[str, Any] = {}
        if self.sharded:
            weights["state_dict"] = full_state(self.policy.network.state_dict(), self.ranks)
        return self.ranks.on_main(lambda: self.policy.save_pretrained(directory, meta, **weights))

    def save_checkpoint(self) -> Path:
        """Write a checkpoint from which ``learn(resume=True)`` continues with identical results.

        Raises:
            ValueError: If the model was created without ``checkpoint_dir``.
            WriteError: If the disk is full; the model and earlier checkpoints are untouched.
        """
        if self.checkpoint_dir is None:
            raise ValueError("This model has no checkpoint_dir; give one to the constructor.")
        optimizer, optimizer_state = pack_optimizer(self.policy.optimizer)
        kept, _ = self.policy.kept_elsewhere()
        states = {name: changing_weights(getattr(self, name).state_dict(), kept) for name in self._modules()}
        tensors = {name: full_state(state, self.ranks) for name, state in states.items()}
        tensors["optimizer"] = full_state(optimizer, self.ranks)
        random_states = self.ranks.gather(pack_rng(self.policy, self.group_rng, self.ranks))
        tensors |= {_rng_name(rank): found for rank, (found, _) in enumerate(random_states)}
        state = {
            "settings": self._resume_settings(),
            "iteration": self._iteration,
            "num_timesteps": self.num_timesteps,
            "n_updates": self._n_updates,
            "budget": self.budget.to_dict(),
            "history": self.history,
            "optimizer": optimizer_state,
            **{_rng_name(rank): found for rank, (_, found) in enumerate(random_states)},
        }
        directory = CheckpointDirectory(self.checkpoint_dir)
        return self.ranks.on_main(lambda: directory.save(self._iteration, tensors, state))

    def _resume(self, resume: bool) -> bool:
        """Restore the newest checkpoint if ``resume`` is True; returns whether one was restored.

        Raises:
            ValueError: If ``resume`` is True without a ``checkpoint_dir``, if the directory holds an earlier
                run and ``resume`` is False, if the settings differ, or if a rank does not find the
                checkpoint.
        """
        if self.checkpoint_dir is None:
            if resume:
                raise ValueError("learn(resume=True) needs a checkpoint_dir; give one to the constructor.")
            return False
        directory = CheckpointDirectory(self.checkpoint_dir)
        if resume:
            return self._load_newest(directory)
        newest = directory.newest_iteration()
        if newest > self._iteration:
            raise ValueError(
                f"{self.checkpoint_dir} holds checkpoints of an earlier run (iteration {newest}); call "
                "learn(resume=True) to go on with it, or give another checkpoint_dir."
            )
        return False

    def _resume_settings(self) -> dict[str, Any]:
        """Values of ``resume_settings`` without schedules, which are functions and cannot be compared."""
        values = {name: getattr(self, name) for name in self.resume_settings}
        if digest := self.policy.kept_elsewhere()[1]:
            values["frozen weights"] = digest
        values["n_envs"] = self.n_envs * self.ranks.size  # the number of processes may differ
        return plain({k: v for k, v in values.items() if not callable(v)})

    def _load_newest(self, directory: CheckpointDirectory) -> bool:
        found = directory.load_newest()
        iterations = self.ranks.gather(found and found[1]["iteration"])
        if len(set(iterations)) > 1:
            raise ValueError(
                f"The processes see different checkpoints in {directory.path}, of iterations {iterations}; "
                "checkpoint_dir must be on a file system that all machines share."
            )
        if found is None:
            return False
        tensors, state = found
        now, was = self._resume_settings(), state["settings"]
        changed = [f"{k}={now.get(k)!r} (was {was.get(k)!r})" for k in now | was if now.get(k) != was.get(k)]
        if changed:
            raise ValueError(
                f"The checkpoints in {directory.path} belong to a run with other settings: "
                f"{', '.join(changed)}. Use the same settings, or another checkpoint_dir."
            )
        kept, _ = self.policy.kept_elsewhere()
        for name in self._modules():
            module = getattr(self, name)
            load_changing_weights(module, shard_state(module, tensors[name]), kept)
        slots = shard_optimizer_state(self.policy.optimizer, tensors["optimizer"])
        unpack_optimizer(self.policy.optimizer, slots, state["optimizer"])
        own = _rng_name(self.ranks.index)
        own = own if own in tensors else "rng"  # the checkpoint was written by fewer processes
        unpack_rng(self.policy, self.group_rng, self.ranks, tensors[own], state[own])
        self._iteration, self.num_timesteps = state["iteration"], state["num_timesteps"]
        self._n_updates, self.history = state["n_updates"], state["history"]
        self.budget = Ledger(**state["budget"])
        return True

"""Conversion of environments to Stable-Baselines3's ``VecEnv``, and helpers for group rollouts."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecEnv, VecMonitor

from wmpo_gym.algorithms.distributed import Ranks
from wmpo_gym.envs.chunk_env import ChunkVectorEnv
from wmpo_gym.envs.ledger import Ledger
from wmpo_gym.tasks import GATES, SPLITS

VecObs = np.ndarray | dict[str, np.ndarray]


def as_vec_env(env: str | gym.Env | gym.vector.VectorEnv | VecEnv, n_envs: int) -> gym.Env | VecEnv:
    """Adapt an environment for a group algorithm.

    Args:
        env: Any registered environment id, a ``VectorEnv`` of this package, or an SB3 ``VecEnv``. A single
            ``gymnasium.Env`` is returned unchanged (Stable-Baselines3 wraps it; sufficient for ``predict``).
        n_envs: Number of rows if ``env`` is an id.

    Returns:
        An SB3 ``VecEnv``. A ``VectorEnv`` is switched in place to the autoreset mode SB3 expects.
    """
    if isinstance(env, str):
        from wmpo_gym.envs.sb3 import make_sb3_env

        try:
            own = "wmpo_gym" in str(gym.spec(env).entry_point)
        except gym.error.Error as error:
            raise ValueError(f"There is no environment {env!r}: {error}") from error
        return make_sb3_env(env, n_envs) if own else make_vec_env(env, n_envs)
    if isinstance(env, gym.vector.VectorEnv):
        from wmpo_gym.envs.sb3 import Sb3VecEnv

        return VecMonitor(Sb3VecEnv(env))
    return env


@contextmanager
def finished_rows_wait(env: VecEnv) -> Iterator[None]:
    """Context manager that disables autoreset in this package's envs: finished rows are skipped at no cost.

    Other envs still reset finished rows; their further steps are ignored. Outside the context the env resets
    finished rows as Stable-Baselines3 expects, so that ``evaluate_policy`` works on a training env.
    """
    batch = _own_batch(env)
    if batch is None:
        yield
        return
    mode, skip_finished = batch.autoreset_mode, batch.skip_finished
    batch.set_autoreset(AutoresetMode.DISABLED, skip_finished=True)
    try:
        yield
    finally:
        batch.set_autoreset(mode, skip_finished=skip_finished)


def offload_env(env: VecEnv) -> None:
    """Free the device memory of this package's envs while the policy is updated."""
    batch = _own_batch(env)
    if batch is not None:
        batch.rest()


def _own_batch(env: VecEnv) -> ChunkVectorEnv | None:
    batch = getattr(getattr(env.unwrapped, "env", None), "unwrapped", None)
    return batch if isinstance(batch, ChunkVectorEnv) else None


def env_attribute(env: VecEnv, name: str) -> list[Any]:
    """Distinct values of an attribute over the rows, in order; empty if the env has no such attribute.

    The rows of a batched env share their objects, so such an env has a single value.
    """
    if not env.has_attr(name):
        return []
    return list({id(value): value for value in env.get_attr(name)}.values())


def read_ledger(env: VecEnv) -> Ledger:
    """Cost of the env since it was created; zeros for an env without a ledger."""
    return sum(env_attribute(env, "ledger"), Ledger())


def take_rows(obs: VecObs, rows: np.ndarray) -> VecObs:
    """Copies of some rows of a batch of observations."""
    return {k: v[rows] for k, v in obs.items()} if isinstance(obs, dict) else obs[rows]


def training_start_states(env: VecEnv) -> np.ndarray | None:
    """Start state ids of an env for training, int64; None if it has no numbered start states.

    Ids of other splits than the env's are excluded if the env has a task.
    """
    ids, split, task = (env_attribute(env, name) for name in ("start_state_ids", "split", "task_spec"))
    if not ids or ids[0] is None:
        return None
    available = np.asarray(ids[0], np.int64)
    if split and split[0] and task:
        reserved = [i for other in SPLITS if other != split[0] for i in task[0].split_ids(other)]
        available = available[~np.isin(available, reserved)]
    return available


def reset_groups(
    env: VecEnv,
    group_size: int,
    rng: np.random.Generator,
    start_state_ids: np.ndarray | None,
    ranks: Ranks | None = None,
) -> tuple[VecObs, np.ndarray | None]:
    """Reset all rows, adjacent rows in groups to a shared start state.

    Every row is reseeded, so that the episodes depend only on ``rng`` and the actions, and a resumed run
    reproduces its results without saved env state. Rows of a group have different seeds (independent noise)
    and the same ``start_state_id``; in an env without ids they share a seed instead.

    Args:
        env: Environment whose number of rows is a multiple of ``group_size``.
        group_size: Rows per group.
        rng: Draws start states and seeds.
        start_state_ids: Ids to draw from, without repeats if there are enough; None uses the env's ids.
        ranks: Processes whose envs make up the batch; None is this process alone.

    Returns:
        The first observations, and the id of each row (int64) or None.
    """
    ranks = ranks or Ranks()
    n_rows = env.num_envs * ranks.size
    n_groups = n_rows // group_size
    groups = ranks.local_slice(np.arange(n_groups)).repeat(group_size)
    seed = int(rng.integers(2**31 - n_rows))
    env.seed(seed)
    available = training_start_states(env) if start_state_ids is None else start_state_ids
    if available is None:
        env.unwrapped._seeds = (seed + groups).tolist()
        return env.reset(), None
    members = np.arange(env.num_envs) % group_size
    env.unwrapped._seeds = (seed + groups * group_size + members).tolist()
    ids = rng.choice(available, n_groups, replace=len(available) < n_groups)[groups]
    env.set_options([{"start_state_id": int(i)} for i in ids])
    return env.reset(), ids


def world_fitness(env: VecEnv) -> dict[str, Any] | None:
    """Validation gates of an env's world model; warns if a gate failed or was never measured.

    Returns:
        The env's ``world_fitness``, one mapping per gate with ``passed`` True, False or None (not
        measurable); None for an env without a world model.
    """
    found = env_attribute(env, "world_fitness")
    if not found:
        return None
    gates: dict[str, Any] = found[0] or {}
    failed = [name for name, gate in gates.items() if gate and gate.get("passed") is False]
    missing = [name for name in GATES if not gates.get(name)]
    if failed or missing:
        complaints = [f"fails {', '.join(failed)}"] * bool(failed)
        complaints += [f"was never validated for {', '.join(missing)}"] * bool(missing)
        warnings.warn(
            f"The world {' and '.join(complaints)}: a gain in it may not be a gain on the robot. Run `wmpo "
            "validate` on it; the result carries this as `world_fitness`.",
            stacklevel=2,
        )
    return gates

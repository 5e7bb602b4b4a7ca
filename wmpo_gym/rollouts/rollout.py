"""Run a policy over a list of start states, in imagination or in the simulator, and keep what happened."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Any

import gymnasium
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv

from wmpo_gym.data.episode import Episode
from wmpo_gym.data.store import EpisodeStore
from wmpo_gym.envs.ledger import Ledger
from wmpo_gym.rollouts.policy_runner import acting, episode_seeds
from wmpo_gym.rollouts.protocol import EvalProtocol
from wmpo_gym.statistics import Rate, success_rate
from wmpo_gym.tasks import Task, get_task
from wmpo_gym.utils.progress import progress_bar

logger = logging.getLogger(__name__)

NUM_ENVS = 64  # rows of a wave where the caller does not say


@dataclass
class Rollouts:
    """N episodes, one per entry of ``start_state_ids``.

    Attributes:
        start_state_ids: int64 (N,).
        task_ids: int64 (N,), instruction of each episode.
        success: bool (N,), as the environment says it: true in the simulator, claimed in imagination.
        n_frames: int64 (N,), control steps executed.
        success_prob: float64 (N,), of the last frame.
        actions: float32 (N, n_chunks, K, D), the chunks the policy chose; NaN for those after the episode's
            end, so that they cannot be mistaken for actions.
        frames: Per episode uint8 (n_frames + 1, H, W, 3), or None if they were not recorded.
        proprio: Per episode the robot's state, float32 (n_frames + 1, P), or None where it is not told.
        ledger: What the episodes cost.
        protocol: How they were measured, where :func:`evaluate_policy_on` made them.
    """

    start_state_ids: np.ndarray
    task_ids: np.ndarray
    success: np.ndarray
    n_frames: np.ndarray
    success_prob: np.ndarray
    actions: np.ndarray
    frames: list[np.ndarray] | None = None
    proprio: list[np.ndarray] | None = None
    ledger: Ledger = field(default_factory=Ledger)
    protocol: EvalProtocol | None = None

    def __len__(self) -> int:
        return len(self.success)

    @property
    def rate(self) -> Rate:
        """Success rate with its interval."""
        return success_rate(self.success)

    @property
    def mean_length_of_successes(self) -> float:
        """Control steps of successful episodes on average, NaN without one."""
        return float(self.n_frames[self.success].mean()) if self.success.any() else float("nan")

    def episodes(self, task: str | Task, **meta: Any) -> Iterator[Episode]:
        """The rollouts as episodes to store or to train on; needs recorded frames.

        Args:
            task: The task, for its instructions.
            **meta: Written into every episode's ``meta``.
        """
        if self.frames is None:
            raise ValueError("These rollouts hold no frames; make them with record_frames=True.")
        task = get_task(task)
        for i, frames in enumerate(self.frames):
            n, task_id = int(self.n_frames[i]), int(self.task_ids[i])
            yield Episode(
                frames=frames,
                actions=self.actions[i].reshape(-1, self.actions.shape[-1])[:n].copy(),
                proprio=self.proprio[i] if self.proprio else None,
                success=bool(self.success[i]),
                finish_step=n,
                start_state_id=int(self.start_state_ids[i]),
                task_id=task_id,
                instruction=task.instructions[task_id],
                meta={"task": task.name, "control_hz": task.control_hz, **meta},
            )


def rollout(
    vector_env: VectorEnv,
    policy: Any,
    start_state_ids: Sequence[int] | np.ndarray,
    *,
    deterministic: bool = False,
    seed: int = 0,
    record_frames: bool = False,
    progress: bool = False,
    description: str = "rollouts",
) -> Rollouts:
    """One episode per start state, in waves of ``num_envs`` rows.

    Start states and the seed of every episode's environment noise do not depend on ``num_envs``. A sampling
    policy draws for a whole wave at once, so its samples are repeatable for the same ``num_envs`` only.
    Only rows whose episode is running are put through the policy.

    Args:
        vector_env: Imagined or simulated batch made with ``autoreset_mode="DISABLED", skip_finished=True``
            (and ``return_frames=True`` to record frames).
        policy: See :func:`~wmpo_gym.rollouts.policy_runner.acting`.
        start_state_ids: Start states in order; one may be named several times.
        deterministic: Greedy actions.
        seed: Root seed.
        record_frames: Keep all frames.
        progress: Show a progress bar.
        description: Its label.

    Returns:
        The rollouts in the order of ``start_state_ids``.

    Raises:
        ValueError: If the environment resets by itself, or cannot return frames though they are asked for.
    """
    env = _checked(vector_env, record_frames)
    ids = np.asarray(start_state_ids, np.int64)
    seeds = episode_seeds(seed, ids)
    before = env.ledger.copy()
    waves = []
    with progress_bar(total=len(ids), desc=description, disable=not progress) as bar:
        for i in range(0, len(ids), env.num_envs):
            part = slice(i, i + env.num_envs)
            waves.append(
                _wave(env, policy, ids[part], seeds[part], deterministic, seed + i, record_frames, bar)
            )
            bar.set_postfix_str(f"success {100 * np.concatenate([w.success for w in waves]).mean():.0f} %")
    return replace(_joined(waves, env), ledger=env.ledger - before)


def _checked(vector_env: VectorEnv, record_frames: bool) -> Any:
    env: Any = vector_env.unwrapped
    if env.metadata.get("autoreset_mode") is not AutoresetMode.DISABLED or not getattr(
        env, "skip_finished", False
    ):
        raise ValueError(
            "Rollouts need an environment whose finished rows wait: make it with "
            "gymnasium.make_vec(..., autoreset_mode='DISABLED', skip_finished=True)."
        )
    if record_frames and not env.return_frames:
        raise ValueError("record_frames=True needs an environment made with return_frames=True.")
    return env


def _wave(
    env: Any,
    policy: Any,
    ids: np.ndarray,
    seeds: list[int],
    deterministic: bool,
    seed: int,
    record: bool,
    bar: Any,
) -> Rollouts:
    """The episodes of one wave; there may be fewer of them than rows."""
    n, rows = len(ids), env.num_envs
    obs = _begin(env, ids, seeds)
    task_ids = obs["task_id"][:n].copy()
    actions = np.full((n, env.max_episode_steps, *env.single_action_space.shape), np.nan, np.float32)
    clips: list[list[np.ndarray]] = [[obs["pixels"][i : i + 1]] for i in range(n)]
    states: list[list[np.ndarray]] = [[] for _ in range(n)]
    n_frames, prob, success = np.zeros(n, np.int64), np.zeros(n), np.zeros(n, bool)
    live = np.arange(n)
    with acting(policy, deterministic=deterministic, seed=seed) as act:
        for chunk in range(env.max_episode_steps):
            actions[live, chunk] = act({name: value[live] for name, value in obs.items()})
            batch = np.zeros((rows, *actions.shape[2:]), np.float32)
            batch[live] = actions[live, chunk]
            obs, _, terminated, truncated, info = env.step(batch)
            for i in live if record else ():
                clips[i].append(info["frames"][i][: info["n_frames"][i]])
                if "proprio" in info:
                    first = 1 if states[i] else 0  # a chunk begins where the one before it ended
                    states[i].append(info["proprio"][i][first : info["n_frames"][i] + 1])
            n_frames[live] += info["n_frames"][live]
            prob[live], success[live] = info["success_prob"][live], info["is_success"][live]
            over = (terminated | truncated)[live]
            bar.update(int(over.sum()))
            live = live[~over]
            if not live.size:
                break
    frames = [np.concatenate(c) for c in clips] if record else None
    proprio = [np.concatenate(s) for s in states] if states[0] else None
    return Rollouts(ids, task_ids, success, n_frames, prob, actions, frames, proprio)


def _begin(env: Any, ids: np.ndarray, seeds: list[int]) -> dict[str, np.ndarray]:
    """Reset the rows that the wave needs; the others stay finished, or idle along in a first wave."""
    spare = env.num_envs - len(ids)
    options: dict[str, Any] = {"start_state_id": np.concatenate([ids, np.repeat(ids[:1], spare)])}
    if env.started:
        options["reset_mask"] = np.arange(env.num_envs) < len(ids)
    return env.reset(seed=[*seeds, *[None] * spare], options=options)[0]


def _joined(waves: list[Rollouts], env: Any) -> Rollouts:
    if not waves:
        shape = (0, env.max_episode_steps, *env.single_action_space.shape)
        none = np.zeros(0, np.int64)
        return Rollouts(none, none, none.astype(bool), none, none.astype(float), np.zeros(shape, np.float32))
    names = ("start_state_ids", "task_ids", "success", "n_frames", "success_prob", "actions")
    columns: dict[str, Any] = {name: np.concatenate([getattr(w, name) for w in waves]) for name in names}
    for name in ("frames", "proprio"):
        recorded = getattr(waves[0], name) is not None
        columns[name] = [x for wave in waves for x in getattr(wave, name)] if recorded else None
    return Rollouts(**columns)


def make_rollout_env(env_id: str, num_envs: int, *, record_frames: bool = False, **kwargs: Any) -> VectorEnv:
    """A batch fit for :func:`rollout`.

    Args:
        env_id: ``"WMPO-Simulated-v0"`` or ``"WMPO-Imagined-v0"``.
        num_envs: Rows.
        record_frames: Whether frames will be recorded.
        **kwargs: ``task``, ``world``, ``variant`` and so on.
    """
    import wmpo_gym  # noqa: F401 (registers the ids)

    return gymnasium.make_vec(
        env_id,
        num_envs=num_envs,
        autoreset_mode="DISABLED",
        skip_finished=True,
        return_frames=record_frames,
        split=None,
        **kwargs,
    )


def evaluate_policy_on(
    task: str | Task,
    policy: Any,
    split: str,
    episodes: int,
    *,
    deterministic: bool,
    seed: int = 0,
    env_id: str = "WMPO-Simulated-v0",
    world: Any = None,
    variant: str = "nominal",
    num_envs: int = NUM_ENVS,
    record_frames: bool = False,
    progress: bool = True,
) -> Rollouts:
    """Success of a policy on the first start states of a split, with the protocol it was measured under.

    Args:
        task: Task or its name.
        policy: See :func:`~wmpo_gym.rollouts.policy_runner.acting`.
        split: ``"test"`` for reported numbers, ``"validation"`` for choices, ``"train"`` for neither.
        episodes: Number of start states.
        deterministic: Greedy actions.
        seed: Root seed.
        env_id: The twin, or ``"WMPO-Imagined-v0"``.
        world: World of an imagined environment; its start frames must hold the start states.
        variant: Scene variant of the simulator.
        num_envs: Rows of a wave.
        record_frames: Keep all frames.
        progress: Show a progress bar.

    Returns:
        The rollouts; ``.rate`` is the figure and ``.protocol`` belongs beside it.
    """
    task = get_task(task)
    imagined = "Imagined" in env_id
    protocol = EvalProtocol.make(
        task,
        split,
        episodes,
        seed=seed,
        deterministic=deterministic,
        env_id=env_id,
        variant=variant,
        temperature=float(getattr(policy, "temperature", 1.0)),
        num_envs=min(num_envs, episodes),
        world=_name_of(world) if imagined else None,
    )
    special = {"world": world} if imagined else {"variant": variant}
    env = make_rollout_env(env_id, protocol.num_envs, record_frames=record_frames, task=task, **special)
    with closing(env):
        rollouts = rollout(
            env,
            policy,
            protocol.start_state_ids,
            deterministic=deterministic,
            seed=seed,
            record_frames=record_frames,
            progress=progress,
            description=f"{'greedy' if deterministic else 'sampled'} on {split}",
        )
    return replace(rollouts, protocol=protocol)


def _name_of(world: Any) -> str:
    """What a protocol calls a world: its directory or name, or the name in the card of one in memory."""
    return str(getattr(world, "card", {}).get("name", "unnamed")) if hasattr(world, "card") else str(world)


def choose_start_states(task: Task, split: str, n: int, seed: int) -> list[int]:
    """Draw n different start states of a split.

    With the same seed, a larger n begins with the same start states, so that a collection can be extended.

    Raises:
        ValueError: If the split is unknown or has fewer start states.
    """
    ids = task.split_ids(split)
    if not 0 < n <= len(ids):
        raise ValueError(
            f"{n} episodes asked of split {split!r}, which has {len(ids)} start states; choose 1 to "
            f"{len(ids)}."
        )
    return np.random.default_rng([seed, 0x57A7]).permutation(np.arange(ids.start, ids.stop))[:n].tolist()


def collect_episodes(
    vector_env: VectorEnv,
    policy: Any,
    start_state_ids: Sequence[int] | np.ndarray,
    store: EpisodeStore,
    *,
    deterministic: bool = False,
    seed: int = 0,
    progress: bool = True,
    **meta: Any,
) -> int:
    """Record one episode per start state, going on where an earlier call stopped.

    Episodes are written wave by wave. Start states that the store holds already are skipped; the wave in
    which an earlier call was interrupted is run again with the same seeds and only what is missing of it is
    written, so the episodes are those of an uninterrupted call.

    Args:
        vector_env: As for :func:`rollout`, made with ``return_frames=True``.
        policy: See :func:`~wmpo_gym.rollouts.policy_runner.acting`.
        start_state_ids: Start states, each once.
        store: Where to.
        deterministic: Greedy actions.
        seed: Root seed.
        progress: Show a progress bar.
        **meta: Written into every episode's ``meta``.

    Returns:
        Number of episodes written by this call.

    Raises:
        ValueError: If a start state is named twice.
        WriteError: If the disk is full; what was written before is untouched.
    """
    env = _checked(vector_env, True)
    ids = np.asarray(start_state_ids, np.int64)
    if len(np.unique(ids)) != len(ids):
        raise ValueError(
            "A start state is named twice; a store is resumed by start state, so name each once."
        )
    present = {i for i in store.ids() if i is not None}
    seeds, written = episode_seeds(seed, ids), 0
    missing = int((~np.isin(ids, list(present))).sum())
    if missing < len(ids):
        logger.info("%d of %d episodes are in %s already.", len(ids) - missing, len(ids), store.root)
    meta = {"seed": seed, "deterministic": deterministic, "source": "policy", **meta}
    with progress_bar(total=len(ids), desc="episodes", disable=not progress) as bar:
        for i in range(0, len(ids), env.num_envs):
            part = slice(i, i + env.num_envs)
            if present.issuperset(ids[part].tolist()):
                bar.update(len(ids[part]))
                continue
            wave = _wave(env, policy, ids[part], seeds[part], deterministic, seed + i, True, bar)
            for episode in wave.episodes(env.task_spec, **meta):
                if episode.start_state_id not in present:
                    store.append(episode)
                    written += 1
    return written

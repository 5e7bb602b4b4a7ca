"""``WMPO-Simulated-v0``: the twin of the imagined environment on physics."""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium.utils import EzPickle

from wmpo_gym.envs.chunk_env import Chunk, ChunkEnv, ChunkVectorEnv, Starts, State
from wmpo_gym.envs.simulated import Simulator, make_simulator
from wmpo_gym.envs.validation import ResetOptions
from wmpo_gym.tasks import Task, get_task


class SimulatedVectorEnv(ChunkVectorEnv):
    """A batch of simulators with the spaces and start states of ``WMPO-Imagined-v0``.

    ## Description
    The task in a physics simulator: one simulator per row, made at the first reset (so that no renderer
    exists when processes are started). Physics has no noise: ``noise_seed`` is accepted and changes nothing.

    ## Action Space
    ``Box(-1, 1, (K, D), float32)``: one chunk of K control steps.

    ## Observation Space
    ``Dict(pixels: Box(0, 255, (H, W, 3), uint8), task_id: Discrete(n_instructions))``: the frame after the
    chunk's last executed control step.

    ## Rewards
    1.0 at the step in which the task succeeds, else 0.0, plus ``reward_terms``.

    ## Starting State
    One of the task's start states, drawn from ``split`` or named by ``options={"start_state_id": …}``.

    ## Episode End
    Terminated at the first control step with success; truncated after ``max_episode_steps`` chunks.

    ## Arguments
    See below and :class:`~wmpo_gym.envs.chunk_env.ChunkVectorEnv`.

    ## Info
    ``is_success``, ``success_prob`` (1.0 or 0.0), ``start_state_id``, ``instruction``, ``n_frames`` (control
    steps executed by this step, up to success), ``nfe`` (0), ``reward_<term>``; with ``return_frames`` also
    ``frames`` on steps.

    ## Version History
    * v0: first release.

    Args:
        num_envs: Rows.
        task: Task or its name; None is ``"move-block"``.
        variant: Scene variant, one of ``task.variants``.
        **kwargs: See :class:`~wmpo_gym.envs.chunk_env.ChunkVectorEnv`.

    Raises:
        ValueError: If the task or the variant is unknown.
    """

    def __init__(
        self, num_envs: int = 1, task: str | Task | None = None, *, variant: str = "nominal", **kwargs: Any
    ) -> None:
        EzPickle.__init__(self, num_envs, task, variant=variant, **kwargs)
        task = get_task("move-block" if task is None else task)
        if variant not in task.variants:
            raise ValueError(
                f"Unknown variant {variant!r} of {task.name!r}; choose one of {', '.join(task.variants)}."
            )
        super().__init__(num_envs, task, **kwargs)
        self.variant = variant
        self._simulators: list[Simulator] = []

    @property
    def start_state_ids(self) -> np.ndarray:
        """Every start state of the task, whatever its split."""
        return np.arange(self.task_spec.start_states.total)

    @property
    def simulators(self) -> tuple[Simulator, ...]:
        """One simulator per row; empty before the first reset."""
        return tuple(self._simulators)

    def describe(self) -> str:
        """Readable summary, with the scene variant."""
        return f"{super().describe()}\nscene: {self.variant}"

    def _open(self) -> None:
        if not self._simulators:
            self._simulators = [make_simulator(self.task_spec, self.variant) for _ in range(self.num_envs)]

    def _check_choice(self, choice: ResetOptions) -> None:
        if choice.start_frames is not None:
            raise ValueError(
                "A simulator cannot start from a picture; name the state with options={'start_state_id': …}, "
                "or use WMPO-Imagined-v0 for 'start_frames'."
            )
        super()._check_choice(choice)

    def _begin(self, starts: Starts) -> tuple[np.ndarray, np.ndarray]:
        chosen = [self._simulators[row] for row in starts.rows]
        for simulator, start_state_id in zip(chosen, starts.start_state_ids, strict=True):
            simulator.reset(int(start_state_id))
        return np.stack([s.render() for s in chosen]), np.array([s.task_id for s in chosen], np.int64)

    def _advance(self, rows: np.ndarray, actions: np.ndarray) -> Chunk:
        self.ledger.real_episodes += int(np.count_nonzero(self._episode.n_steps[rows] == 0))
        clips, executed = [], []
        for row, chunk in zip(rows, actions, strict=True):
            clip, n_frames = self._run(self._simulators[row], chunk)
            clips.append(clip)
            executed.append(n_frames)
        success = np.array([self._simulators[row].success for row in rows])
        self.ledger.real_steps += sum(executed)
        return Chunk(
            pixels=np.stack([clip[-1] for clip in clips]),
            n_frames=np.array(executed),
            is_success=success,
            success_prob=success.astype(np.float64),
            frames=np.stack([_padded(clip, actions.shape[1]) for clip in clips])
            if self.wants_frames
            else None,
        )

    def _run(self, simulator: Simulator, actions: np.ndarray) -> tuple[list[np.ndarray], int]:
        """Execute actions (K, D) up to success; return the frames that are needed and the steps executed."""
        frames: list[np.ndarray] = []
        for n_frames, action in enumerate(actions, start=1):
            simulator.step(action)
            over = simulator.success or n_frames == len(actions)
            if over or self.wants_frames:
                frames.append(simulator.render())
            if over:
                break
        return frames, n_frames

    def _dump_rows(self, rows: np.ndarray) -> State:
        return {"simulator": np.stack([self._simulators[row].get_state() for row in rows])}

    def _load_rows(self, rows: np.ndarray, state: State) -> None:
        for row, packed in zip(rows, state["simulator"], strict=True):
            self._simulators[row].set_state(packed)

    def close_extras(self, **kwargs: Any) -> None:
        """Release the simulators."""
        self._simulators = []


def _padded(clip: list[np.ndarray], length: int) -> np.ndarray:
    return np.stack(clip + [clip[-1]] * (length - len(clip)))


class SimulatedEnv(ChunkEnv):
    """One row of :class:`SimulatedVectorEnv`, where the spaces, rewards and infos are described."""

    vector_class = SimulatedVectorEnv

    @property
    def variant(self) -> str:
        """Scene variant."""
        return self._batch.variant

    @property
    def simulator(self) -> Simulator:
        """The simulator; there is one after the first reset."""
        return self._batch.simulators[0]

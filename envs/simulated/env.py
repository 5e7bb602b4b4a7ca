"""``WMPO-Simulated-v0``: the twin of the imagined environment on physics."""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium.utils import EzPickle

from wmpo_gym.envs.chunk_env import Chunk, ChunkEnv, ChunkVectorEnv, Starts, State
from wmpo_gym.envs.simulated import Simulator
from wmpo_gym.envs.simulated.rows import SimulatorRows, WorkerRows
from wmpo_gym.envs.validation import ResetOptions
from wmpo_gym.tasks import Task, get_task


class SimulatedVectorEnv(ChunkVectorEnv):
    """A batch of simulators with the spaces and start states of ``WMPO-Imagined-v0``.

    ## Description
    The task in a physics simulator: one simulator per row, made at the first reset (so that no renderer
    exists when processes are started), in this process or in spawned ones. Physics has no noise:
    ``noise_seed`` is accepted and changes nothing.

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
    ``frames`` on steps, and from a robot that tells its state ``proprio`` (float32 ``(K + 1, P)``, before the
    step and after each of its frames).

    ## Version History
    * v0: first release.

    Args:
        num_envs: Rows.
        task: Task or its name; None is ``"move-block"``.
        variant: Scene variant, one of ``task.variants``.
        num_workers: Spread the rows over so many spawned processes; 0 keeps them in this one.
        **kwargs: See :class:`~wmpo_gym.envs.chunk_env.ChunkVectorEnv`.

    Raises:
        ValueError: If the task or the variant is unknown, or the number of workers negative.
    """

    def __init__(
        self,
        num_envs: int = 1,
        task: str | Task | None = None,
        *,
        variant: str = "nominal",
        num_workers: int = 0,
        **kwargs: Any,
    ) -> None:
        EzPickle.__init__(self, num_envs, task, variant=variant, num_workers=num_workers, **kwargs)
        task = get_task("move-block" if task is None else task)
        if variant not in task.variants:
            raise ValueError(
                f"Unknown variant {variant!r} of {task.name!r}; choose one of {', '.join(task.variants)}."
            )
        if num_workers < 0:
            raise ValueError(
                f"num_workers counts processes, got {num_workers}; 0 keeps the rows in this one."
            )
        super().__init__(num_envs, task, **kwargs)
        self.variant, self.num_workers = variant, min(num_workers, num_envs)
        self._rows: SimulatorRows | WorkerRows | None = None

    @property
    def start_state_ids(self) -> np.ndarray:
        """Every start state of the task, whatever its split."""
        return np.arange(self.task_spec.start_states.total)

    @property
    def simulators(self) -> tuple[Simulator, ...]:
        """One simulator per row; empty before the first reset and with workers, who have them."""
        return () if self._rows is None else tuple(self._rows.simulators)

    def describe(self) -> str:
        """Readable summary, with the scene variant."""
        return f"{super().describe()}\nscene: {self.variant}"

    def _open(self) -> None:
        if self._rows is None:
            scene = self.task_spec, self.variant, self.num_envs
            self._rows = WorkerRows(*scene, self.num_workers) if self.num_workers else SimulatorRows(*scene)

    def _check_choice(self, choice: ResetOptions) -> None:
        if choice.start_frames is not None:
            raise ValueError(
                "A simulator cannot start from a picture; name the state with options={'start_state_id': …}, "
                "or use WMPO-Imagined-v0 for 'start_frames'."
            )
        super()._check_choice(choice)

    def _begin(self, starts: Starts) -> tuple[np.ndarray, np.ndarray]:
        assert self._rows is not None, "opened by the reset"
        begun = self._rows.begin(starts.rows.tolist(), starts.start_state_ids.tolist())
        return np.stack([frame for frame, _ in begun]), np.array([task_id for _, task_id in begun], np.int64)

    def _advance(self, rows: np.ndarray, actions: np.ndarray) -> Chunk:
        assert self._rows is not None, "opened by the reset"
        self.ledger.real_episodes += int(np.count_nonzero(self._episode.n_steps[rows] == 0))
        chunks = self._rows.advance(rows.tolist(), actions, self.wants_frames)
        success = np.array([chunk.success for chunk in chunks])
        self.ledger.real_steps += sum(chunk.n_frames for chunk in chunks)
        return Chunk(
            pixels=np.stack([chunk.frames[-1] for chunk in chunks]),
            n_frames=np.array([chunk.n_frames for chunk in chunks]),
            is_success=success,
            success_prob=success.astype(np.float64),
            frames=np.stack([_padded(chunk.frames, actions.shape[1]) for chunk in chunks])
            if self.wants_frames
            else None,
            proprio=np.stack([_padded(chunk.proprio, actions.shape[1] + 1) for chunk in chunks])
            if chunks[0].proprio
            else None,
        )

    def _dump_rows(self, rows: np.ndarray) -> State:
        assert self._rows is not None, "opened by the reset"
        return {"simulator": np.stack(self._rows.dump(rows.tolist()))}

    def _load_rows(self, rows: np.ndarray, state: State) -> None:
        assert self._rows is not None, "opened by the reset"
        self._rows.load(rows.tolist(), list(state["simulator"]))

    def close_extras(self, **kwargs: Any) -> None:
        """Release the simulators."""
        if self._rows is not None:
            self._rows.close()
            self._rows = None


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

"""The simulators of a batch's rows: in this process, or spread over processes of their own."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import numpy as np

from wmpo_gym.envs.simulated import Simulator, make_simulator
from wmpo_gym.envs.simulated.rollout import run_simulator
from wmpo_gym.tasks import Task


class RowChunk(NamedTuple):
    """What executing a chunk led to in one row."""

    frames: list[np.ndarray]  # those that were asked for, the last one always
    n_frames: int  # control steps executed
    success: bool
    proprio: list[np.ndarray]  # before the chunk and after each step, with all frames, if the robot tells it


class SimulatorRows:
    """Simulators in this process, one per row.

    Args:
        task: The task.
        variant: Scene variant.
        n_rows: Rows.
    """

    def __init__(self, task: Task, variant: str, n_rows: int) -> None:
        self.simulators: list[Simulator] = [make_simulator(task, variant) for _ in range(n_rows)]

    def begin(self, rows: Sequence[int], start_state_ids: Sequence[int]) -> list[tuple[np.ndarray, int]]:
        """Begin episodes; return first frames (H, W, 3) and task ids."""
        begun = []
        for row, start_state_id in zip(rows, start_state_ids, strict=True):
            self.simulators[row].reset(int(start_state_id))
            begun.append((self.simulators[row].render(), self.simulators[row].task_id))
        return begun

    def advance(self, rows: Sequence[int], chunks: np.ndarray, all_frames: bool) -> list[RowChunk]:
        """Execute actions (n, K, D) up to success; pictures that nobody asked for are not drawn."""
        return [
            _run(self.simulators[row], actions, all_frames) for row, actions in zip(rows, chunks, strict=True)
        ]

    def dump(self, rows: Sequence[int]) -> list[np.ndarray]:
        """States."""
        return [self.simulators[row].get_state() for row in rows]

    def load(self, rows: Sequence[int], states: Sequence[np.ndarray]) -> list[None]:
        """Restore what :meth:`dump` returned."""
        for row, state in zip(rows, states, strict=True):
            self.simulators[row].set_state(state)
        return [None] * len(rows)

    def close(self) -> None:
        """Let go of the simulators."""
        self.simulators = []


def _run(simulator: Simulator, actions: np.ndarray, all_frames: bool) -> RowChunk:
    read = all_frames and hasattr(simulator, "proprio")
    before = [simulator.proprio()] if read else []  # type: ignore[attr-defined]
    run = run_simulator(
        simulator,
        actions,
        len(actions),
        stop_at_success=True,
        frames="all" if all_frames else "last",
        proprio=read,
    )
    return RowChunk(run.frames, len(run.actions), run.success, before + run.proprio)


class WorkerRows:
    """The same over several processes; row i lives in process i modulo their number.

    Processes are spawned, never forked: a graphics library does not survive a fork.

    Args:
        task: The task.
        variant: Scene variant.
        n_rows: Rows.
        n_workers: Processes.
    """

    simulators: Sequence[Simulator] = ()

    def __init__(self, task: Task, variant: str, n_rows: int, n_workers: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipes: list[Connection] = []
        self._processes: list[Any] = []
        for worker in range(n_workers):
            here, there = context.Pipe()
            share = len(range(worker, n_rows, n_workers))
            process = context.Process(target=_serve, args=(there, task, variant, share), daemon=True)
            process.start()
            there.close()
            self._pipes.append(here)
            self._processes.append(process)

    def begin(self, rows: Sequence[int], start_state_ids: Sequence[int]) -> list[tuple[np.ndarray, int]]:
        """As :meth:`SimulatorRows.begin`."""
        return self._call("begin", rows, start_state_ids)

    def advance(self, rows: Sequence[int], chunks: np.ndarray, all_frames: bool) -> list[RowChunk]:
        """As :meth:`SimulatorRows.advance`."""
        return self._call("advance", rows, chunks, all_frames=all_frames)

    def dump(self, rows: Sequence[int]) -> list[np.ndarray]:
        """As :meth:`SimulatorRows.dump`."""
        return self._call("dump", rows)

    def load(self, rows: Sequence[int], states: Sequence[np.ndarray]) -> list[None]:
        """As :meth:`SimulatorRows.load`."""
        return self._call("load", rows, states)

    def close(self) -> None:
        """End the processes."""
        for pipe, process in zip(self._pipes, self._processes, strict=True):
            pipe.close()  # which ends the worker
            process.join()
        self._pipes, self._processes = [], []

    def _call(self, method: str, rows: Sequence[int], *columns: Any, **shared: Any) -> list[Any]:
        """Call a method of all rows' workers at once; ``columns`` have an entry per row."""
        n = len(self._pipes)
        parts = {w: [i for i, row in enumerate(rows) if row % n == w] for w in range(n)}
        asked: dict[int, Exception | None] = {}
        for worker, where in parts.items():
            if where:
                local = [int(rows[i]) // n for i in where]
                arguments = (local, *([c[i] for i in where] for c in columns))
                asked[worker] = self._ask(worker, (method, arguments, shared))
        # Every answer is fetched before an error is raised, or the next call would get this one's.
        answers = {worker: lost or self._answer(worker) for worker, lost in asked.items()}
        results: list[Any] = [None] * len(rows)
        for worker, answer in answers.items():
            if isinstance(answer, Exception):
                raise answer
            for i, value in zip(parts[worker], answer, strict=True):
                results[i] = value
        return results

    def _ask(self, worker: int, message: Any) -> Exception | None:
        try:
            self._pipes[worker].send(message)
        except OSError:
            return self._lost(worker)
        return None

    def _answer(self, worker: int) -> list[Any] | Exception:
        try:
            return self._pipes[worker].recv()
        except (EOFError, OSError):
            return self._lost(worker)

    def _lost(self, worker: int) -> Exception:
        code = self._processes[worker].exitcode
        return RuntimeError(f"Simulator process {worker} ended unexpectedly (exit code {code}).")


def _serve(pipe: Connection, task: Task, variant: str, n_rows: int) -> None:
    """What a worker does until its pipe is closed."""
    os.environ.setdefault("LP_NUM_THREADS", "1")  # Mesa's software renderer; there is a process per core
    rows: SimulatorRows | None = None
    while True:
        try:
            method, arguments, shared = pipe.recv()
        except (EOFError, KeyboardInterrupt):
            return
        try:
            rows = rows or SimulatorRows(task, variant, n_rows)
            pipe.send(getattr(rows, method)(*arguments, **shared))
        except Exception as error:
            pipe.send(error)

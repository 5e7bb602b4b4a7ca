"""How fast the arm's tasks run beside robosuite's own Gymnasium wrapper: ``python -m`` this module.

Every figure comes from a process of its own, one after the other. Frames per second of wall-clock time depend
on what else the machine does; frames per second of processor time hardly do. robosuite's wrapper also needs
h5py.
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from wmpo_gym.tasks import get_task
from wmpo_gym.utils.text import aligned

SECONDS = 8.0


def render_only(task: str, size: int) -> Callable[[], int]:
    """Draw the same state again and again."""
    from wmpo_gym.envs.simulated import make_simulator

    sim = make_simulator(get_task(task).at(size))
    sim.reset(0)

    def work() -> int:
        sim.render()
        return 1

    return work


def ours(
    task: str, size: int, *, every_frame: bool = True, rows: int = 1, workers: int = 0
) -> Callable[[], int]:
    """Random chunks in ``WMPO-Simulated-v0``."""
    from wmpo_gym.envs.simulated.env import SimulatedVectorEnv

    env = SimulatedVectorEnv(
        rows,
        get_task(task).at(size),
        num_workers=workers,
        return_frames=every_frame,
        autoreset_mode="SAME_STEP",
    )
    env.reset(seed=0)
    rng = np.random.default_rng(0)

    def work() -> int:
        before = env.ledger.real_steps
        env.step(rng.uniform(-1, 1, env.action_space.shape).astype(np.float32))
        return env.ledger.real_steps - before

    return work


def gym_wrapper(task: str) -> Callable[[], int]:
    """Random actions in robosuite's wrapper with camera observations, all settings at their defaults."""
    import robosuite
    from robosuite.wrappers import GymWrapper

    from wmpo_gym.envs.simulated.tabletop.definitions import DEFINITIONS

    definition = DEFINITIONS[task]
    inner = robosuite.make(definition.env_name, robots="Panda", use_camera_obs=True, has_renderer=False)
    env = GymWrapper(inner)
    env.reset(seed=0)
    rng, steps = np.random.default_rng(0), 0

    def work() -> int:
        nonlocal steps
        steps += 1
        env.step(rng.uniform(-1, 1, env.action_space.shape))
        if steps % 500 == 0:  # a horizon of 1000 ends it
            env.reset()
        return 1

    return work


def measure(
    make: Callable[..., Callable[[], int]], seconds: float, *args: Any, **kwargs: Any
) -> tuple[float, float]:
    """Frames per second of wall-clock time and of this process's processor time."""
    work = make(*args, **kwargs)
    work()
    frames, wall, cpu = 0, time.perf_counter(), time.process_time()
    while time.perf_counter() - wall < seconds:
        frames += work()
    return frames / (time.perf_counter() - wall), frames / (time.process_time() - cpu)


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", default="lift")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="per figure")
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    runs: dict[str, tuple[Any, ...]] = {
        "render only, 64 px": (render_only, (args.task, 64), {}),
        "render only, 128 px": (render_only, (args.task, 128), {}),
        "render only, 256 px": (render_only, (args.task, 256), {}),
        "step, every frame, 128 px": (ours, (args.task, 128), {}),
        "step, every frame, 256 px": (ours, (args.task, 256), {}),
        "step, last frame of a chunk, 128 px": (ours, (args.task, 128), {"every_frame": False}),
        "robosuite's GymWrapper, 256 px": (gym_wrapper, (args.task,), {}),
    }
    for n in (1, args.workers):
        settings = {"rows": 2 * args.workers, "workers": n}
        runs[f"{2 * args.workers} rows, {n} process(es), every frame, 128 px"] = (
            ours,
            (args.task, 128),
            settings,
        )
    table: list[tuple[str, ...]] = [("", "frames/s", "frames/s of processor time")]
    context = multiprocessing.get_context("spawn")
    for name, (make, positional, settings) in runs.items():
        # Not a pool: its processes are daemons, and these may have workers.
        with context.Manager() as manager:
            box = manager.list()
            process = context.Process(
                target=_measure_into, args=(box, make, args.seconds, positional, settings)
            )
            process.start()
            process.join()
            wall, cpu = box[0]
        own = "" if settings.get("workers") else f"{cpu:.0f}"
        table.append((name, f"{wall:.0f}", own))
        print(name, f"{wall:.0f}", own, flush=True)
    print(aligned(table))


def _measure_into(box: Any, make: Any, seconds: float, positional: tuple, settings: dict) -> None:
    box.append(measure(make, seconds, *positional, **settings))


if __name__ == "__main__":
    main()

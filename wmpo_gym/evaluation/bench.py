"""How fast imagination is, where the time goes, what its shortcuts save, and the same table for the twin.

Policies are left out: actions are random unless a policy is given, and its time never counts.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from wmpo_gym.evaluation.imagining import device_of
from wmpo_gym.evaluation.protocol import installed_versions
from wmpo_gym.evaluation.results import aligned
from wmpo_gym.evaluation.rollouts import make_rollout_env
from wmpo_gym.evaluation.shortcuts import REPEATS, RandomPolicy, bench_context_cache, bench_plain
from wmpo_gym.evaluation.stopwatch import Stopwatch, Targets, timed_methods
from wmpo_gym.progress import progress_bar
from wmpo_gym.world.world import World

ROWS = (1, 8, 64)
# What is timed by name: object of the world, method, part of the split.
PARTS = (
    ("network", ("forward", "encode_context", "denoise"), "network"),
    ("autoencoder", ("encode", "decode"), "decoder"),
    ("classifier", ("start", "update"), "classifier"),
)
SIMULATOR_PARTS = (("step", "physics"), ("render", "renderer"))


def bench_imagined(world: World, rows: int, *, repeats: int = REPEATS, seed: int = 0) -> dict[str, Any]:
    """Speed of the imagined environment with everything on.

    Args:
        world: The world.
        rows: Batch size.
        repeats: Whole episodes of the batch.
        seed: Seed of environment and actions.

    Returns:
        See :func:`bench_environment`; the parts are network, decoder, classifier and glue.
    """
    env = make_rollout_env("WMPO-Imagined-v0", rows, world=world)
    targets = [(getattr(world, attribute), names, part) for attribute, names, part in PARTS]
    result = bench_environment(env, targets, repeats=repeats, seed=seed, synchronize=_synchronizer(world))
    nfe = world.config.denoising_steps
    return result | {"nfe_per_chunk": nfe, "frames_per_second_times_nfe": result["frames_per_second"] * nfe}


def bench_simulated(task: Any, rows: int, *, repeats: int = REPEATS, seed: int = 0) -> dict[str, Any]:
    """Speed of the twin; the parts are physics, renderer and glue. Arguments as :func:`bench_imagined`."""
    env = make_rollout_env("WMPO-Simulated-v0", rows, task=task)
    env.reset(seed=seed)  # makes the simulators
    simulators = env.unwrapped.simulators  # type: ignore[attr-defined]
    targets = [
        (s, names, part)
        for s in simulators
        for names, part in ((["step"], "physics"), (["render"], "renderer"))
    ]
    return bench_environment(env, targets, repeats=repeats, seed=seed)


def bench_environment(
    env: Any,
    targets: Targets,
    *,
    repeats: int,
    seed: int,
    synchronize: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Step a batch with random actions.

    Args:
        env: Made with :func:`~wmpo_gym.evaluation.rollouts.make_rollout_env`; is closed.
        targets: What to time by name, see :func:`timed_methods`.
        repeats: Whole episodes of the batch, after one to warm up.
        seed: Seed of environment and actions.
        synchronize: See :class:`Stopwatch`.

    Returns:
        ``frames_per_second`` (median over repeats, resets excluded) with its quartiles, ``chunk_ms_p50`` and
        ``chunk_ms_p95`` per step of the whole batch, ``reset_ms`` (median), and ``split`` in shares of the
        step time.
    """
    watch, inner = Stopwatch(synchronize), env.unwrapped
    policy = RandomPolicy(inner.single_action_space.shape, seed)
    chunk_seconds, reset_seconds, speeds = [], [], []
    for repeat in range(-1, repeats):
        if repeat == 0:
            watch.seconds = dict.fromkeys(watch.seconds, 0.0)
        began = time.perf_counter()
        obs, _ = env.reset(seed=seed + repeat + 1)
        synchronize()
        reset = time.perf_counter() - began
        frames, steps = _frames_made(inner), []
        with timed_methods(targets, watch):
            done = np.zeros(inner.num_envs, bool)
            while not done.all():
                actions = policy.predict(obs)[0]
                began = time.perf_counter()
                obs, _, terminated, truncated, _ = env.step(actions)
                synchronize()
                steps.append(time.perf_counter() - began)
                done |= terminated | truncated
        if repeat >= 0:
            chunk_seconds += steps
            reset_seconds.append(reset)
            speeds.append((_frames_made(inner) - frames) / sum(steps))
    env.close()
    total = sum(chunk_seconds)
    split = {part: seconds / total for part, seconds in watch.seconds.items()}
    return {
        "rows": inner.num_envs,
        "frames_per_second": float(np.median(speeds)),
        "frames_per_second_quartiles": np.percentile(speeds, [25, 75]).tolist(),
        "chunk_ms_p50": 1000 * float(np.percentile(chunk_seconds, 50)),
        "chunk_ms_p95": 1000 * float(np.percentile(chunk_seconds, 95)),
        "reset_ms": 1000 * float(np.median(reset_seconds)),
        "split": split | {"glue": 1.0 - sum(split.values())},
    }


def bench(
    world: World,
    policy: Any = None,
    *,
    rows: Sequence[int] = ROWS,
    repeats: int = REPEATS,
    simulated: bool = True,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, Any]:
    """Everything above in one run.

    Args:
        world: The world.
        policy: For the comparison with the plain way; None is random actions.
        rows: Batch sizes.
        repeats: Repeats of every measurement.
        simulated: Measure the twin too.
        seed: Root seed.
        progress: Show a progress bar.

    Returns:
        JSON-able: ``imagined`` and ``simulated`` (one entry per batch size), ``plain``, ``context_cache``,
        ``machine``.
    """
    import torch

    cache_network = world.network if type(world.network).__name__ == "STDiT" else None
    jobs: list[tuple[str, Callable[[], dict[str, Any]]]] = []
    for n in rows:
        jobs.append(("imagined", partial(bench_imagined, world, n, repeats=repeats, seed=seed)))
    for n in rows if simulated else ():
        jobs.append(("simulated", partial(bench_simulated, world.task, n, repeats=repeats, seed=seed)))
    jobs.append(("plain", partial(bench_plain, world, policy, rows=max(rows), repeats=repeats, seed=seed)))
    jobs.append(("context_cache", partial(bench_context_cache, cache_network, repeats=repeats, seed=seed)))
    result: dict[str, Any] = {"imagined": [], "simulated": []}
    for name, job in progress_bar(jobs, desc="bench", disable=not progress):
        figures = job()
        if isinstance(result.get(name), list):
            result[name].append(figures)
        else:
            result[name] = figures
    return result | {
        "machine": {
            "processor": _processor(),
            "threads": torch.get_num_threads(),
            "device": str(device_of(world)),
            "peak_memory_mb": _peak_memory_mb(),
            "versions": installed_versions(),
        }
    }


def bench_text(result: Mapping[str, Any]) -> str:
    """The result of :func:`bench` as tables to print."""
    lines = []
    for name in ("imagined", "simulated"):
        entries = result.get(name)
        if not entries:
            continue
        parts = list(entries[0]["split"])
        rows: list[tuple[str, ...]] = [
            (name, "frames/s", "quartiles", "ms/chunk p50", "p95", "reset ms", *(f"{p} %" for p in parts))
        ]
        for e in entries:
            low, high = e["frames_per_second_quartiles"]
            times = (f"{e[k]:.1f}" for k in ("chunk_ms_p50", "chunk_ms_p95", "reset_ms"))
            shares = (f"{100 * e['split'][p]:.1f}" for p in parts)
            speed = f"{e['frames_per_second']:,.0f}"
            rows.append((f"{e['rows']} rows", speed, f"{low:,.0f} – {high:,.0f}", *times, *shares))
        lines += [aligned(rows), ""]
    plain, cache, machine = result["plain"], result["context_cache"], result["machine"]
    lines.append(
        f"plain way (context recomputed, no early stop, classified at the end): {plain['ratio']:.2f} times "
        f"the time per episode; {100 * plain['plain_wasted_frames']:.0f} % of its frames come after the claim"
    )
    lines.append(
        f"context computed once per chunk (STDiT, {cache['steps']} steps): {cache['ratio']:.2f} times "
        f"faster, largest difference {cache['largest_difference']:.1e}"
    )
    lines.append(
        f"{machine['processor']}, {machine['threads']} thread(s), {machine['device']}, peak memory "
        f"{machine['peak_memory_mb']:.0f} MB"
    )
    return "\n".join(lines)


def _frames_made(env: Any) -> int:
    return env.ledger.imagined_frames + env.ledger.real_steps


def _synchronizer(world: World) -> Callable[[], None]:
    import torch

    return torch.cuda.synchronize if device_of(world).type == "cuda" else lambda: None


def _processor() -> str:
    """Name of the processor as the system tells it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _peak_memory_mb() -> float:
    """Largest resident memory of this process so far, MB (Linux and macOS; NaN elsewhere)."""
    try:
        import resource
    except ImportError:
        return float("nan")
    unit = 1024**2 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit

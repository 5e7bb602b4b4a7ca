"""Benchmark of imagination and of the paired simulator: speed, time per component, gain of optimisations.

The policy's time is excluded; actions are random unless a policy is given.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from wmpo_gym.bench.reference import REPEATS, RandomPolicy, bench_reference
from wmpo_gym.bench.timing import Stopwatch, Targets, synchronizer, timed_methods
from wmpo_gym.bench.transformer import bench_training, bench_transformer, cpu_imagination
from wmpo_gym.rollouts.imagined import device_of
from wmpo_gym.rollouts.protocol import installed_versions
from wmpo_gym.rollouts.rollout import make_rollout_env
from wmpo_gym.utils.progress import progress_bar
from wmpo_gym.utils.text import aligned
from wmpo_gym.world.world import World

if TYPE_CHECKING:
    import torch

ROWS = (1, 8, 64)


def bench_imagined(
    world: World, rows: int, *, repeats: int = REPEATS, seed: int = 0, **options: Any
) -> dict[str, Any]:
    """Speed of the imagined environment with all optimisations.

    Args:
        world: The world.
        rows: Batch size.
        repeats: Number of episode batches.
        seed: Seed of environment and actions.
        **options: Options of the environment: ``device``, ``dtype``, ``compile``.

    Returns:
        See :func:`bench_environment`; the components are network, decoder, classifier and glue.
    """
    env = make_rollout_env("WMPO-Imagined-v0", rows, world=world, **options)
    env.reset(seed=seed)  # moves the networks to their device
    imagination = env.unwrapped._imagination  # type: ignore[attr-defined]
    targets = [
        (imagination.network, ("forward", "encode_context", "denoise"), "network"),
        (imagination.autoencoder, ("encode", "decode"), "decoder"),
        (world.classifier, ("start", "update"), "classifier"),
    ]
    result = bench_environment(
        env, targets, repeats=repeats, seed=seed, synchronize=synchronizer(device_of(world))
    )
    nfe = world.config.denoising_steps
    return result | {"nfe_per_chunk": nfe, "frames_per_second_times_nfe": result["frames_per_second"] * nfe}


def bench_simulated(task: Any, rows: int, *, repeats: int = REPEATS, seed: int = 0) -> dict[str, Any]:
    """Speed of the paired simulator by physics, renderer and glue; see :func:`bench_imagined`."""
    env = make_rollout_env("WMPO-Simulated-v0", rows, task=task)
    env.reset(seed=seed)  # creates the simulators
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
    """Measure the speed of an environment with random actions.

    Args:
        env: Environment from :func:`~wmpo_gym.rollouts.rollout.make_rollout_env`; it is closed at the end.
        targets: Methods to time, see :func:`timed_methods`.
        repeats: Number of episode batches, after one for warm-up.
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
    transformer: Mapping[str, Any] | None = None,
    seed: int = 0,
    progress: bool = True,
    **options: Any,
) -> dict[str, Any]:
    """Run the full benchmark.

    Args:
        world: The world.
        policy: Policy of the comparison with the reference loop; None uses random actions.
        rows: Batch sizes.
        repeats: Repetitions of every measurement.
        simulated: Also measure the paired simulator.
        transformer: Overrides of :data:`~wmpo_gym.bench.transformer.CPU_STDIT` and of its ``rows``.
        seed: Root seed.
        progress: Show a progress bar.
        **options: Options of the imagined environment: ``device``, ``dtype``, ``compile``.

    Returns:
        JSON-able. First the headline numbers: ``frames_per_second`` and ``split`` (largest batch of this
        world), ``ratio_to_reference_bundled`` (this world), ``ratio_to_reference``,
        ``ratio_to_reference_few_step``, ``max_abs_frame_difference`` and ``peak_fraction`` (the transformer).
        Then everything: ``imagined`` and ``simulated`` (one entry per batch size), ``reference``,
        ``transformer``, ``training`` (of that transformer), ``training_bundled`` (of this world's network),
        ``seconds`` (of the whole benchmark), ``machine``.
    """
    result: dict[str, Any] = {"imagined": [], "simulated": []}
    most, began = max(rows), time.perf_counter()

    def compare() -> None:
        result["reference"] = bench_reference(world, policy, rows=most, repeats=repeats, seed=seed, **options)

    def compare_transformer() -> None:
        size = {"rows": 16, **(transformer or {})}
        n = size.pop("rows")
        imagination = cpu_imagination(world, seed=seed, **size)
        result["transformer"] = bench_transformer(
            imagination,
            world.classifier,
            result["reference"]["finish"],
            world.task.horizon,
            rows=n,
            repeats=min(repeats, 3),
            seed=seed,
        )
        result["training"] = bench_training(
            imagination.network, world.task.image_size, repeats=repeats, seed=seed
        )
        side = world.task.image_size // world.autoencoder.downscale
        result["training_bundled"] = bench_training(world.network, side, rows=24, repeats=repeats, seed=seed)

    def measure(name: str, function: Callable[..., dict[str, Any]], what: Any, n: int, **more: Any) -> None:
        result[name].append(function(what, n, repeats=repeats, seed=seed, **more))

    jobs: list[Callable[[], None]] = []
    jobs += [partial(measure, "imagined", bench_imagined, world, n, **options) for n in rows]
    jobs += [partial(measure, "simulated", bench_simulated, world.task, n) for n in rows if simulated]
    # The reference loop first: with a heap that is already large, it would not pay for its allocations.
    for job in progress_bar([compare, *jobs, compare_transformer], desc="bench", disable=not progress):
        job()
    largest = max(result["imagined"], key=lambda entry: entry["rows"])
    ours = result["transformer"]
    headline = {
        "frames_per_second": largest["frames_per_second"],
        "split": largest["split"],
        "ratio_to_reference_bundled": result["reference"]["ratio"],
        "ratio_to_reference": ours["ratio"],
        "ratio_to_reference_few_step": ours["ratio_few_step"],
        "max_abs_frame_difference": ours["largest_difference"],
        "peak_fraction": ours["peak_fraction"],
    }
    result["seconds"] = time.perf_counter() - began
    return headline | result | {"machine": machine(device_of(world))}


def machine(device: torch.device) -> dict[str, Any]:
    """Description of the machine, including its current load."""
    import torch

    return {
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "load": _load(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "peak_memory_mb": _peak_memory_mb(),
        "versions": installed_versions(),
    }


def bench_text(result: Mapping[str, Any]) -> str:
    """The result of :func:`bench` as text tables."""
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
    reference = result["reference"]
    low, high = reference["ratio_range"]
    lines.append(
        f"reference loop, this world: {reference['ratio']:.2f} ({low:.2f} to {high:.2f}) times the time per "
        f"episode (loop {reference['loop']:.2f}, kernels {reference['kernels']:.2f}); "
        f"{100 * reference['reference_frames_after_success']:.0f} % of its frames come after the claim, "
        f"{100 * reference['same_finish']:.1f} % of the episodes end at the same frame"
    )
    lines += [*transformer_text(result["transformer"]), *training_text(result)]
    return "\n".join([*lines, *target_lines(result), machine_text(result["machine"])])


def training_text(result: Mapping[str, Any]) -> list[str]:
    """Text lines for the results of :func:`~wmpo_gym.bench.transformer.bench_training`."""
    lines = []
    for name, entry in (("transformer", "training"), ("this world's network", "training_bundled")):
        t = result[entry]
        memory = "" if t["peak_memory_gib"] is None else f", peak memory {t['peak_memory_gib']:.1f} GiB"
        lines.append(
            f"training of {name}, {t['rows']} rows: {t['steps_per_second']:.3f} steps/s, "
            f"{t['gflops_per_second']:,.0f} GFLOP/s, {100 * t['peak_fraction']:.0f} % of the matmul "
            f"peak{memory}"
        )
    return lines


def target_lines(result: Mapping[str, Any]) -> list[str]:
    """One text line per speed target: measured median, range over the repeats, and target."""
    t, training = result["transformer"], result["training"]
    rows = [
        ("same steps, times the reference loop", t["ratio"], t["ratio_range"], 2.5),
        ("few steps, times the reference loop", t["ratio_few_step"], t["ratio_few_step_range"], 12.0),
        ("cached context, times recomputing", t["cached_context"], t["cached_context_range"], 1.0),
        ("denoising step, share of peak", t["peak_fraction"], t["peak_fraction_range"], 0.6),
        ("training, share of peak", training["peak_fraction"], training["peak_fraction_range"], 0.5),
    ]
    lines = [
        f"  {name}: {value:.2f} ({low:.2f} to {high:.2f}), target at least {due:g}: "
        f"{'reached' if value >= due else 'missed'}"
        for name, value, (low, high), due in rows
    ]
    verdict = "reached" if result["seconds"] <= 180 else "missed"
    return [
        "targets:",
        *lines,
        f"  seconds of this benchmark: {result['seconds']:.0f}, target at most 180: {verdict}",
    ]


def transformer_text(t: Mapping[str, Any]) -> list[str]:
    """Text lines for the result of :func:`~wmpo_gym.bench.transformer.bench_transformer`."""
    measured = (
        ""
        if t["executed_steps"] == t["denoising_steps"]
        else (
            f", {t['executed_steps']} of {t['denoising_steps']} denoising steps executed, extrapolated to all"
        )
    )
    split = ", ".join(f"{part} {100 * share:.1f} %" for part, share in t["split"].items())
    return [
        f"transformer with random weights, {t['rows']} rows{measured}:",
        f"  {t['frames_per_second']:.1f} frames/s with {t['denoising_steps']} steps ({split}), "
        f"{t['frames_per_second_few_step']:.1f} with {t['few_steps']}",
        f"  reference loop: {t['ratio']:.2f} times the time per episode with as many steps (early stop "
        f"{t['early_stop']:.2f}, cached context {t['cached_context']:.2f}, kernels {t['kernels']:.2f}), "
        f"{t['ratio_few_step']:.1f} times that with {t['few_steps']}",
        "  the same for episodes that last on average "
        + ", ".join(f"{float(k):.0%} of the horizon {v:.2f}" for k, v in t["ratio_by_mean_length"].items()),
        f"  largest difference of the frames {t['largest_difference']:.1e}; {t['gflops_per_second']:,.0f} "
        f"GFLOP/s in a step, {100 * t['peak_fraction']:.0f} % of the machine's matmul peak",
    ]


def machine_text(machine: Mapping[str, Any]) -> str:
    """One text line that describes the machine."""
    return (
        f"{machine['processor']}, {machine['threads']} thread(s) of {machine['cores']} cores, load "
        f"{machine['load']:.1f}, {machine['device']}, peak memory {machine['peak_memory_mb']:,.0f} MB"
    )


def _frames_made(env: Any) -> int:
    return env.ledger.imagined_frames + env.ledger.real_steps


def _processor() -> str:
    """Name of the processor."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _load() -> float:
    """Load average of the last minute; NaN if not available."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")


def _peak_memory_mb() -> float:
    """Peak resident memory of this process in MB (Linux and macOS; NaN elsewhere)."""
    try:
        import resource
    except ImportError:
        return float("nan")
    unit = 1024**2 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit

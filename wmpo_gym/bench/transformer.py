"""Benchmark of imagination with an ``STDiT``, compared with the reference loop, and of its training.

A transformer with random weights imagines whole episodes. The weights do not affect the time per frame, but
they would affect the episode lengths; lengths from a trained policy in a trained world are used instead.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from wmpo_gym.bench.reference import RandomPolicy, Uncached, imagine_by_reference, reference_kernels
from wmpo_gym.bench.timing import (
    Stopwatch,
    flops_of,
    matmul_peak,
    median_and_range,
    synchronizer,
    timed,
    timed_methods,
)
from wmpo_gym.rollouts.policy_runner import Act
from wmpo_gym.utils.kernels import ordinary_kernels
from wmpo_gym.world.world import World

CPU_STDIT: dict[str, Any] = {
    "hidden_size": 256,
    "depth": 6,
    "num_heads": 4,
    "context_frames": 4,
    "chunk": 8,
    "predict_sigma": False,
}
"""A size suitable for a CPU; with patches of an eighth of the side, a frame has 64 tokens."""

LENGTHS = (0.25, 0.5, 0.75, 1.0)
"""Mean episode lengths, as fractions of the horizon, for which the ratio is reported."""


@dataclass(frozen=True)
class Sampling:
    """Number of denoising steps, and how many of them the benchmark executes.

    Attributes:
        steps: Denoising steps per chunk (published: 30).
        few: Steps of the few-step sampler.
        executed: Steps per chunk that are executed; their time is extrapolated to all steps, which cost the
            same. None executes all.
    """

    steps: int = 30
    few: int = 4
    executed: int | None = 1


def random_stdit(seed: int = 0, **config: Any) -> Any:
    """An ``STDiT`` with random weights in all layers (a newly initialised one outputs zeros)."""
    import torch

    from wmpo_gym.world.networks.stdit import STDiT

    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        network = STDiT(**config).eval()
        for parameter in network.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return network


def cpu_imagination(world: World, *, seed: int = 0, **config: Any) -> Any:
    """World model rollout of a small random transformer, for the frames of a world.

    Args:
        world: World that defines image size and action dimension.
        seed: Seed of the weights.
        **config: Overrides of :data:`CPU_STDIT`.
    """
    from wmpo_gym.world.imagination import Imagination
    from wmpo_gym.world.networks.autoencoder import PixelAutoencoder

    side, action_dim = world.task.image_size, world.task.action_dim
    fitted = {"in_channels": 3, "patch_size": side // 8, "pixels_per_latent": 1, "base_size": side}
    network = random_stdit(seed, **{**CPU_STDIT, **fitted, "action_dim": action_dim, **config})
    return Imagination(
        network,
        PixelAutoencoder(),
        chunk=network.config.chunk,
        context_frames=network.config.context_frames,
        denoising_steps=Sampling.steps,
        image_size=side,
        action_dim=action_dim,
    )


@dataclass(frozen=True)
class _Run:
    """Time of a batch of episodes, in total and by component, and the number of generated frames."""

    seconds: float
    parts: dict[str, float]
    frames: int

    def counting(self, times: float) -> float:
        """Seconds extrapolated to ``times`` as many denoising steps."""
        return self.seconds + (times - 1) * self.parts["step"]

    def split(self, times: float) -> dict[str, float]:
        """Share of each component in those seconds; the remainder is glue."""
        parts = {**self.parts, "step": times * self.parts["step"]}
        shares = {part: seconds / self.counting(times) for part, seconds in parts.items()}
        return shares | {"glue": 1.0 - sum(shares.values())}


def bench_transformer(
    imagination: Any,
    classifier: Any,
    finish: Sequence[int],
    horizon: int,
    *,
    sampling: Sampling | None = None,
    rows: int = 16,
    repeats: int = 3,
    seed: int = 0,
) -> dict[str, Any]:
    """Compare the optimised rollout with the reference loop on episodes of given lengths.

    Args:
        imagination: See :func:`cpu_imagination`.
        classifier: Success classifier for the frames; its predictions do not affect the episode lengths.
        finish: Episode lengths in frames; the batch uses ``rows`` evenly spaced quantiles of them.
        horizon: Frames per episode in the reference loop.
        sampling: Denoising steps.
        rows: Batch size.
        repeats: Number of repetitions of both loops, alternating; ratios are over consecutive pairs.
        seed: Seed of frames, actions and noise.

    Returns:
        ``ratio`` and ``ratio_few_step`` (reference loop over ours; medians, with ranges ``…_range``) and
        their factors ``early_stop``, ``cached_context`` and ``kernels``; ``frames_per_second`` with all and
        with few steps; ``split``; ``largest_difference`` of the frames (on [-1, 1], before rounding to grey
        levels); and ``peak_fraction``, the fraction of the machine's matmul peak in a denoising step.
    """
    sampling = sampling or Sampling()
    imagination = copy.copy(imagination)
    executed = imagination.nfe_per_chunk = sampling.executed or sampling.steps
    places = (np.arange(rows) + 0.5) / rows
    batch = np.quantile(np.asarray(finish), places, method="nearest")
    job = partial(_episodes, imagination, classifier, batch, horizon, seed)
    pairs = [(job(by_reference=False), job(by_reference=True)) for _ in range(repeats + 1)][
        1:
    ]  # the first warms up
    times, few_times = sampling.steps / executed, sampling.few / executed
    ours = min((run for run, _ in pairs), key=lambda run: run.counting(times))
    reference = min((run for _, run in pairs), key=lambda run: run.counting(times))
    seconds, few_seconds = ours.counting(times), ours.counting(few_times)
    ratio = median_and_range([other.counting(times) / run.counting(times) for run, other in pairs])
    ratio_few = median_and_range([other.counting(times) / run.counting(few_times) for run, other in pairs])
    early_stop = reference.frames / ours.frames
    return {
        "rows": rows,
        "denoising_steps": sampling.steps,
        "few_steps": sampling.few,
        "executed_steps": executed,
        "seconds_per_episode": seconds / rows,
        "reference_seconds_per_episode": reference.counting(times) / rows,
        "ratio": ratio[0],
        "ratio_range": ratio[1:],
        "ratio_few_step": ratio_few[0],
        "ratio_few_step_range": ratio_few[1:],
        "early_stop": early_stop,
        "ratio_by_mean_length": {f"{share:.2f}": ratio[0] / early_stop / share for share in LENGTHS},
        "frames_per_second": ours.frames / seconds,
        "frames_per_second_few_step": ours.frames / few_seconds,
        "split": ours.split(times),
        "largest_difference": largest_difference(imagination, sampling.steps, seed=seed),
        **_step_metrics(imagination, rows, repeats, seed),
    }


def _episodes(
    imagination: Any, classifier: Any, finish: np.ndarray, horizon: int, seed: int, *, by_reference: bool
) -> _Run:
    """Imagine one batch of episodes."""
    import torch

    device, rows, chunk = imagination.device, len(finish), imagination.chunk
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    frames = rng.integers(0, 256, (rows, *imagination.image_size, 3), dtype=np.uint8)
    first, task_ids = torch.as_tensor(frames, device=device), np.zeros(rows, np.int64)
    policy, n_chunks = RandomPolicy((chunk, imagination.action_dim), seed), -(-horizon // chunk)
    watch = Stopwatch(synchronizer(device))

    def act(obs: Mapping[str, np.ndarray]) -> np.ndarray:
        return policy.predict(obs)[0]

    def noise(n: int = rows) -> Any:
        return torch.randn((n, *imagination.noise_shape), generator=generator)

    def run_reference() -> int:
        slow = copy.copy(imagination)
        slow.network = Uncached(imagination.network)
        with reference_kernels():
            imagine_by_reference(slow, classifier, first, task_ids, act, noise, n_chunks)
        return rows * n_chunks * chunk

    def run_environment() -> int:
        return _imagine_as_environment(imagination, classifier, first, task_ids, act, noise, finish)

    targets = [
        (imagination.network, ("denoise", "forward"), "step"),
        (imagination.network, ("encode_context",), "context"),
        (imagination.autoencoder, ("encode", "decode"), "decoder"),
        (classifier, ("start", "update", "preprocess", "probabilities"), "classifier"),
    ]
    with timed_methods(targets, watch):
        seconds, made = timed(run_reference if by_reference else run_environment, device)
    return _Run(seconds, watch.seconds, made)


def _imagine_as_environment(
    imagination: Any,
    classifier: Any,
    first: Any,
    task_ids: np.ndarray,
    act: Act,
    noise: Callable[[int], Any],
    finish: np.ndarray,
) -> int:
    """Imagine like the environment, with episodes of ``finish`` (N,) frames; returns the frame count."""
    at_once = (
        getattr(imagination.network, "cpu_batch", len(first)) if first.device.type == "cpu" else len(first)
    )
    state, verdicts = imagination.start(first), classifier.start(first)
    running, age, made = np.arange(len(first)), 0, 0
    while len(running):
        for rows in np.split(running, range(at_once, len(running), at_once)):
            actions = act({"task_id": task_ids[rows]})
            frames, next_state = imagination.step(state.rows(rows), actions, noise(len(rows)))
            _, next_verdicts = classifier.update(verdicts.rows(rows), frames, task_ids[rows])
            state.assign(rows, next_state)
            verdicts.assign(rows, next_verdicts)
            made += frames.shape[0] * frames.shape[1]
        age += imagination.chunk
        running = running[finish[running] > age]
    return made


def _step_metrics(imagination: Any, rows: int, repeats: int, seed: int) -> dict[str, Any]:
    """Speed-ups of one denoising step by cache and kernels, and its fraction of the machine's peak."""
    import torch

    network, device = imagination.network, imagination.device
    z, context, actions, time_ = _inputs(imagination, min(rows, getattr(network, "cpu_batch", rows)), seed)
    mask = torch.arange(context.shape[2] + z.shape[2], device=device) < context.shape[2]
    mask, whole = mask.expand(len(z), -1), torch.cat([context, z], dim=2)

    def step() -> Any:
        return network.denoise(z, time_, actions, cache)

    def ordinary_step() -> Any:
        with ordinary_kernels():
            return step()

    def reference_step() -> Any:
        with reference_kernels():
            return network(whole, time_, actions, mask)

    with torch.no_grad():
        cache = network.encode_context(context)
        original = getattr(network, "original", network)  # FLOPs of compiled code cannot be counted
        flops = flops_of(lambda: original.denoise(z, time_, actions, cache))
        works, rounds = (step, ordinary_step, reference_step), []
        for _ in range(repeats + 1):
            seconds = [timed(work, device)[0] for work in works]
            rounds.append((*seconds, matmul_peak(device, z.dtype)))
    ours, ordinary, reference, peak = np.array(rounds[1:]).T
    share = median_and_range(flops / ours / peak)
    cached = median_and_range(reference / ordinary)
    return {
        "step_ms": 1000 * float(np.median(ours)),
        "cached_context": cached[0],
        "cached_context_range": cached[1:],
        "kernels": median_and_range(ordinary / ours)[0],
        "gflops_per_second": float(np.median(flops / ours)) / 1e9,
        "peak_fraction": share[0],
        "peak_fraction_range": share[1:],
    }


def bench_training(
    network: Any, image_size: int, *, rows: int = 4, repeats: int = 3, seed: int = 0
) -> dict[str, Any]:
    """Time training steps of a world model (forward, backward, AdamW) on random latents.

    Args:
        network: Network on the device and in the data type to measure; it is not modified.
        image_size: Side of the latents.
        rows: Batch size.
        repeats: Number of steps, after one for warm-up; the matmul peak is measured again after each step.
        seed: Seed of the batch.

    Returns:
        ``rows``, ``steps_per_second`` (median), ``gflops_per_second`` (forward and backward pass),
        ``peak_fraction`` (median) and ``peak_fraction_range``, and ``peak_memory_gib`` (None on a CPU).
    """
    import torch

    from wmpo_gym.world.objectives import ChunkObjective, LatentBatch

    network, parameter = copy.deepcopy(network).train(), next(network.parameters())
    config, device, generator = network.config, parameter.device, torch.Generator().manual_seed(seed)
    channels = config.in_channels if "in_channels" in config else config.channels
    state_dim = config.get("state_dim", 0) or 0

    def drawn(*shape: int) -> Any:
        return torch.randn(shape, generator=generator).clamp(-1, 1).to(device)

    context = drawn(rows, channels, config.context_frames, image_size, image_size)
    batch = LatentBatch(
        context,
        drawn(rows, channels, config.chunk, image_size, image_size),
        drawn(rows, config.chunk, config.action_dim),
        drawn(rows, config.action_dim + state_dim),
        context[:, :, -1:],
        torch.ones(rows, 1, config.chunk, image_size, image_size, device=device),
        torch.ones(rows, device=device),
    )
    objective = ChunkObjective(0.5, 0.05, 1, self_forcing=False)
    draws = objective.draw(tuple(batch.targets.shape), tuple(context.shape), generator)
    draws = {name: value.to(device) for name, value in draws.items()}
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4)

    def loss_and_gradient() -> None:
        objective(network, batch, draws).losses.mean().backward()

    def step() -> None:
        loss_and_gradient()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with torch.enable_grad():
        flops = flops_of(loss_and_gradient, gradients=True)
        optimizer.zero_grad(set_to_none=True)
        rounds = [(timed(step, device)[0], matmul_peak(device, parameter.dtype)) for _ in range(repeats + 1)]
    seconds, peak = np.array(rounds[1:]).T
    share = median_and_range(flops / seconds / peak)
    memory = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None
    return {
        "rows": rows,
        "steps_per_second": float(np.median(1 / seconds)),
        "gflops_per_second": float(np.median(flops / seconds)) / 1e9,
        "peak_fraction": share[0],
        "peak_fraction_range": share[1:],
        "peak_memory_gib": memory,
    }


def largest_difference(imagination: Any, steps: int, *, rows: int = 2, seed: int = 0) -> float:
    """Largest absolute difference of a chunk, before rounding, between optimised and reference loop."""
    import torch

    z, context, actions, _ = _inputs(imagination, rows, seed)
    with torch.no_grad():
        fast = imagination.flow.sample(imagination.network, z, context, actions, steps)
        with reference_kernels():
            reference = imagination.flow.sample(imagination.network, z, context, actions, steps, cached=False)
    return float((fast - reference).abs().max())


def _inputs(imagination: Any, rows: int, seed: int) -> tuple[Any, Any, Any, Any]:
    """Noise, context, actions and timestep of one chunk."""
    import torch

    generator, device = torch.Generator().manual_seed(seed), imagination.device
    channels, chunk, height, width = imagination.noise_shape

    def drawn(*shape: int) -> Any:
        return torch.randn(shape, generator=generator).to(device)

    z = drawn(rows, channels, chunk, height, width)
    context = drawn(rows, channels, imagination.context_frames, height, width).clamp(-1, 1)
    return (
        z,
        context,
        drawn(rows, chunk, imagination.action_dim).clamp(-1, 1),
        torch.full((rows,), 500.0, device=device),
    )

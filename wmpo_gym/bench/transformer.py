"""How fast the published kind of network imagines, and what it costs the plain way.

A transformer with random weights imagines whole episodes. Weights do not decide how long a frame takes, but
they do decide when an episode ends; the lengths are therefore given: those of a real policy in a real world.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from wmpo_gym.bench.peak import flops_of, matmul_peak, synchronizer, timed
from wmpo_gym.bench.shortcuts import RandomPolicy, Uncached, imagine_plainly, plain_way
from wmpo_gym.bench.stopwatch import Stopwatch, timed_methods
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
"""A size that a CPU bears; with patches of an eighth of the side a frame has 64 tokens."""


@dataclass(frozen=True)
class Sampling:
    """How many denoising steps count, and how many are carried out.

    Attributes:
        steps: Denoising steps per chunk (published: 30).
        few: Steps of the few-step sampler.
        executed: Steps of every chunk that are carried out; their time stands for that of all, since every
            step does the same work. None is all of them.
    """

    steps: int = 30
    few: int = 4
    executed: int | None = 1


def random_stdit(seed: int = 0, **config: Any) -> Any:
    """An ``STDiT`` of random weights that, unlike a new one, puts out something else than zero."""
    import torch

    from wmpo_gym.world.networks.stdit import STDiT

    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        network = STDiT(**config).eval()
        for parameter in network.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return network


def cpu_imagination(world: World, *, seed: int = 0, **config: Any) -> Any:
    """Imagination of a small random transformer on the frames of a world.

    Args:
        world: Gives image size and action dimension.
        seed: Seed of the weights.
        **config: Changes to :data:`CPU_STDIT`.
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
    """Seconds of a batch of episodes, those of its parts, and the frames made."""

    seconds: float
    parts: dict[str, float]
    frames: int

    def counting(self, times: float) -> float:
        """Seconds it would have taken with ``times`` as many denoising steps."""
        return self.seconds + (times - 1) * self.parts["step"]

    def split(self, times: float) -> dict[str, float]:
        """Shares of those seconds; what belongs to no part is glue."""
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
    """Time whole episodes of given lengths with every shortcut and the plain way, in turn.

    Args:
        imagination: See :func:`cpu_imagination`.
        classifier: Success classifier for its frames; what it says decides nothing here.
        finish: Frames that episodes last; the batch takes ``rows`` of them, evenly from shortest to longest.
        horizon: Frames that the plain way imagines of each.
        sampling: Denoising steps.
        rows: Batch size.
        repeats: How often the batch is imagined each way; the best counts.
        seed: Seed of frames, actions and noise.

    Returns:
        ``ratio`` and ``ratio_few_step`` (plain over ours); what they are made of: ``early_stop``,
        ``cached_context`` and ``kernels``; ``frames_per_second`` with all and with few steps; ``split``;
        ``largest_difference`` of the frames (on [-1, 1], before they are rounded to levels); and
        ``peak_fraction``, the share of the machine's matmul peak that a denoising step reaches.
    """
    sampling = sampling or Sampling()
    imagination = copy.copy(imagination)
    executed = imagination.nfe_per_chunk = sampling.executed or sampling.steps
    places = (np.arange(rows) + 0.5) / rows
    batch = np.quantile(np.asarray(finish), places, method="nearest")
    job = partial(_episodes, imagination, classifier, batch, horizon, seed)
    pairs = [(job(plain=False), job(plain=True)) for _ in range(repeats + 1)][1:]  # the first warms up
    times, few_times = sampling.steps / executed, sampling.few / executed
    ours = min((run for run, _ in pairs), key=lambda run: run.counting(times))
    plain = min((run for _, run in pairs), key=lambda run: run.counting(times))
    seconds, few_seconds, plain_seconds = (
        ours.counting(times),
        ours.counting(few_times),
        plain.counting(times),
    )
    return {
        "rows": rows,
        "denoising_steps": sampling.steps,
        "few_steps": sampling.few,
        "executed_steps": executed,
        "seconds_per_episode": seconds / rows,
        "plain_seconds_per_episode": plain_seconds / rows,
        "ratio": plain_seconds / seconds,
        "ratio_few_step": plain_seconds / few_seconds,
        "early_stop": plain.frames / ours.frames,
        "frames_per_second": ours.frames / seconds,
        "frames_per_second_few_step": ours.frames / few_seconds,
        "split": ours.split(times),
        "largest_difference": largest_difference(imagination, sampling.steps, seed=seed),
        **_step_figures(imagination, rows, repeats, seed),
    }


def _episodes(
    imagination: Any, classifier: Any, finish: np.ndarray, horizon: int, seed: int, *, plain: bool
) -> _Run:
    """Imagine one batch of episodes."""
    import torch

    device, rows, chunk = imagination.device, len(finish), imagination.chunk
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    pictures = rng.integers(0, 256, (rows, *imagination.image_size, 3), dtype=np.uint8)
    first, task_ids = torch.as_tensor(pictures, device=device), np.zeros(rows, np.int64)
    policy, n_chunks = RandomPolicy((chunk, imagination.action_dim), seed), -(-horizon // chunk)
    watch = Stopwatch(synchronizer(device))

    def act(obs: Mapping[str, np.ndarray]) -> np.ndarray:
        return policy.predict(obs)[0]

    def noise(n: int = rows) -> Any:
        return torch.randn((n, *imagination.noise_shape), generator=generator)

    def plainly() -> int:
        slow = copy.copy(imagination)
        slow.network = Uncached(imagination.network)
        with plain_way():
            imagine_plainly(slow, classifier, first, task_ids, act, noise, n_chunks)
        return rows * n_chunks * chunk

    def quickly() -> int:
        return _imagine_quickly(imagination, classifier, first, task_ids, act, noise, finish)

    targets = [
        (imagination.network, ("denoise", "forward"), "step"),
        (imagination.network, ("encode_context",), "context"),
        (imagination.autoencoder, ("encode", "decode"), "decoder"),
        (classifier, ("start", "update", "preprocess", "probabilities"), "classifier"),
    ]
    with timed_methods(targets, watch):
        seconds, made = timed(plainly if plain else quickly, device)
    return _Run(seconds, watch.seconds, made)


def _imagine_quickly(
    imagination: Any,
    classifier: Any,
    first: Any,
    task_ids: np.ndarray,
    act: Act,
    noise: Callable[[int], Any],
    finish: np.ndarray,
) -> int:
    """As the environment does, but episodes end after ``finish`` (N,) frames; returns the frames made."""
    at_once = (
        getattr(imagination.network, "cpu_batch", len(first)) if first.device.type == "cpu" else len(first)
    )
    dream, judge = imagination.start(first), classifier.start(first)
    running, age, made = np.arange(len(first)), 0, 0
    while len(running):
        for rows in np.split(running, range(at_once, len(running), at_once)):
            actions = act({"task_id": task_ids[rows]})
            frames, dreamt = imagination.step(dream.rows(rows), actions, noise(len(rows)))
            _, judged = classifier.update(judge.rows(rows), frames, task_ids[rows])
            dream.assign(rows, dreamt)
            judge.assign(rows, judged)
            made += frames.shape[0] * frames.shape[1]
        age += imagination.chunk
        running = running[finish[running] > age]
    return made


def _step_figures(imagination: Any, rows: int, repeats: int, seed: int) -> dict[str, float]:
    """Where the speed of one denoising step comes from, and how near it is to the machine's peak."""
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

    def plain_step() -> Any:
        with plain_way():
            return network(whole, time_, actions, mask)

    with torch.no_grad():
        cache = network.encode_context(context)
        works = (step, ordinary_step, plain_step)
        times = [[timed(work, device)[0] for work in works] for _ in range(repeats + 1)]
    ours, ordinary, plain = np.min(times[1:], axis=0)
    original = getattr(network, "original", network)  # what is compiled cannot be counted
    rate = flops_of(lambda: original.denoise(z, time_, actions, cache)) / ours
    return {
        "step_ms": 1000 * ours,
        "cached_context": plain / ordinary,
        "kernels": ordinary / ours,
        "gflops_per_second": rate / 1e9,
        "peak_fraction": rate / matmul_peak(device, z.dtype),
    }


def largest_difference(imagination: Any, steps: int, *, rows: int = 2, seed: int = 0) -> float:
    """Largest difference between a chunk sampled with every shortcut and the plain way, before rounding."""
    import torch

    z, context, actions, _ = _inputs(imagination, rows, seed)
    with torch.no_grad():
        fast = imagination.flow.sample(imagination.network, z, context, actions, steps)
        with plain_way():
            plain = imagination.flow.sample(imagination.network, z, context, actions, steps, cached=False)
    return float((fast - plain).abs().max())


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

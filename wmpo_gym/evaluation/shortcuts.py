"""What the shortcuts of the imagined environment save against the plain way of the published loop."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from wmpo_gym.evaluation.acting import Act, acting
from wmpo_gym.evaluation.imagining import device_of
from wmpo_gym.evaluation.rollouts import make_rollout_env
from wmpo_gym.world.world import World

REPEATS = 5  # medians are over these


class RandomPolicy:
    """Uniform actions in [-1, 1].

    Args:
        shape: ``(K, D)`` of an action chunk.
        seed: Seed of the draws.
    """

    def __init__(self, shape: tuple[int, ...], seed: int = 0) -> None:
        self.shape, self._rng = shape, np.random.default_rng(seed)

    def predict(self, obs: Mapping[str, np.ndarray], deterministic: bool = False) -> tuple[np.ndarray, None]:
        """One chunk per observation, and no state."""
        return self._rng.uniform(-1, 1, (len(obs["task_id"]), *self.shape)).astype(np.float32), None


def bench_plain(
    world: World, policy: Any = None, *, rows: int = 64, repeats: int = REPEATS, seed: int = 0
) -> dict[str, float]:
    """What the environment saves against the plain way, in the same run.

    The plain way is that of the published loop: context computed anew at every denoising step, every episode
    imagined to the horizon, all windows classified when it is over, every window preprocessed by itself.

    Args:
        world: The world.
        policy: Whose actions; None is random ones, which seldom succeed and so hide what early stop saves.
        rows: Batch size.
        repeats: Batches of episodes.
        seed: Root seed.

    Returns:
        Seconds per episode of both, their ratio, and the share of the plain way's frames that come after the
        claimed success.
    """
    shape = (world.task.chunk, world.task.action_dim)
    env = make_rollout_env("WMPO-Imagined-v0", rows, world=world)
    ours, plain, made, needed = [], [], 0, 0
    with acting(policy or RandomPolicy(shape, seed), deterministic=False, seed=seed) as act:
        for repeat in range(-1, repeats):
            ids = np.random.default_rng([seed, repeat + 1]).choice(world.start_frames.ids, rows)
            seconds = _run_ours(env, act, ids, seed + repeat + 1)
            plain_seconds, frames = _run_plain(world, act, ids, seed + repeat + 1)
            if repeat < 0:  # warm-up
                continue
            ours.append(seconds)
            plain.append(plain_seconds)
            needed, made = needed + frames, made + rows * world.task.horizon
    env.close()
    return {
        "rows": rows,
        "seconds_per_episode": float(np.median(ours)) / rows,
        "plain_seconds_per_episode": float(np.median(plain)) / rows,
        "ratio": float(np.median(plain) / np.median(ours)),
        "plain_wasted_frames": 1.0 - needed / made,
    }


def _run_ours(env: Any, act: Act, ids: np.ndarray, seed: int) -> float:
    """Seconds inside the environment for one episode per row."""
    began = time.perf_counter()
    obs, _ = env.reset(seed=seed, options={"start_state_id": ids})
    seconds = time.perf_counter() - began
    done = np.zeros(len(ids), bool)
    while not done.all():
        actions = np.zeros(env.action_space.shape, np.float32)
        actions[~done] = act({name: value[~done] for name, value in obs.items()})
        began = time.perf_counter()
        obs, _, terminated, truncated, _ = env.step(actions)
        seconds += time.perf_counter() - began
        done |= terminated | truncated
    return seconds


def _run_plain(world: World, act: Act, ids: np.ndarray, seed: int) -> tuple[float, int]:
    """Seconds of the plain way for one episode per row, and frames up to the claimed successes."""
    import torch

    task, device = world.task, device_of(world)
    starts = world.start_frames
    where = {int(start_id): i for i, start_id in enumerate(starts.ids)}
    index = [where[int(i)] for i in ids]
    first, task_ids = torch.as_tensor(starts.frames[index], device=device), starts.task_ids[index]
    generator = torch.Generator().manual_seed(seed)
    imagination = world.imagination()
    imagination.network = _Uncached(world.network)
    began = time.perf_counter()
    dream, clips = imagination.start(first), [first[:, None]]
    seconds = time.perf_counter() - began
    for _ in range(task.n_chunks):
        actions = act({"pixels": clips[-1][:, -1].cpu().numpy(), "task_id": task_ids})
        began = time.perf_counter()
        noise = torch.randn((len(ids), *imagination.noise_shape), generator=generator)
        frames, dream = imagination.step(dream, actions, noise)
        clips.append(frames)
        seconds += time.perf_counter() - began
    began = time.perf_counter()
    finish = _classify_at_the_end(world, torch.cat(clips, dim=1), torch.as_tensor(task_ids, device=device))
    return seconds + time.perf_counter() - began, int(finish.sum())


def _classify_at_the_end(world: World, frames: Any, task_ids: Any) -> np.ndarray:
    """First frame (N,) that reaches the threshold, the horizon where none does."""
    import torch

    classifier: Any = world.classifier
    window = classifier.window
    reached = []
    with torch.no_grad():
        for end in range(window, frames.shape[1] + 1):
            clip = classifier.preprocess(frames[:, end - window : end].flatten(0, 1)).unflatten(
                0, (-1, window)
            )
            reached.append(classifier.probabilities(clip, task_ids) >= classifier.threshold)
    hit = torch.stack(reached, dim=1).cpu().numpy()
    return np.where(hit.any(axis=1), hit.argmax(axis=1) + window - 1, frames.shape[1] - 1)


class _Uncached:
    """A network without its fast path."""

    def __init__(self, network: Any) -> None:
        self._network = network

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._network(*args, **kwargs)


def bench_context_cache(
    network: Any = None,
    *,
    rows: int = 4,
    steps: int = 5,
    side: int = 16,
    repeats: int = REPEATS,
    seed: int = 0,
) -> dict[str, float]:
    """What computing the context once per chunk saves an ``STDiT``, and that it changes nothing.

    Args:
        network: An ``STDiT``; None makes one of a few million weights with the published context and chunk.
        rows: Batch size.
        steps: Denoising steps per chunk (published: 5).
        side: Side of the latents.
        repeats: Chunks timed.
        seed: Seed of weights and inputs.

    Returns:
        Milliseconds per chunk with and without, their ratio, and the largest difference of the latents.
    """
    import torch

    from wmpo_gym.world.flow import RectifiedFlow
    from wmpo_gym.world.stdit import STDiT

    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        if network is None:
            network = STDiT(hidden_size=128, depth=4, num_heads=4).eval()
            for parameter in network.parameters():  # as built, its output is zero whatever comes in
                parameter.add_(0.02 * torch.randn_like(parameter))
        c = network.config
        noise = torch.randn(rows, c.in_channels, c.chunk, side, side)
        context = torch.randn(rows, c.in_channels, c.context_frames, side, side)
        actions = torch.rand(rows, c.chunk, c.action_dim) * 2 - 1
        times: dict[bool, list[float]] = {True: [], False: []}
        outputs = {}
        for _ in range(repeats + 1):
            for cached in (True, False):
                began = time.perf_counter()
                outputs[cached] = RectifiedFlow().sample(
                    network, noise, context, actions, steps, cached=cached
                )
                times[cached].append(time.perf_counter() - began)
    cached_ms, recomputed_ms = (1000 * float(np.median(times[cached][1:])) for cached in (True, False))
    difference = float((outputs[True] - outputs[False]).abs().max())
    return {
        "cached_ms": cached_ms,
        "recomputed_ms": recomputed_ms,
        "ratio": recomputed_ms / cached_ms,
        "largest_difference": difference,
        "steps": steps,
    }

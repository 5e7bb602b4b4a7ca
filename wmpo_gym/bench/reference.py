"""Reference implementation of the published rollout loop, the baseline for the environment's speed.

Like the published loop (paper §3, and its code), it recomputes the context at every denoising step, imagines
all rows to the horizon at once, and classifies all windows at the end, preprocessing every window separately.
It uses PyTorch's own layers and memory layout and the C library's default memory management. Further
inefficiencies of the published loop are not reproduced: attention without a fused kernel, a second modulation
of every frame in every block, and a noised copy of the clip that is never read. The policy's time is excluded
in both cases.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np

from wmpo_gym.bench.timing import Stopwatch, median_and_range, synchronizer
from wmpo_gym.envs.heap import keep_freed_memory, return_freed_memory
from wmpo_gym.rollouts.imagined import device_of
from wmpo_gym.rollouts.policy_runner import Act, acting
from wmpo_gym.rollouts.rollout import make_rollout_env
from wmpo_gym.utils.kernels import ordinary_kernels
from wmpo_gym.world.world import World

REPEATS = 3


class RandomPolicy:
    """Uniform actions in [-1, 1].

    Args:
        shape: ``(K, D)`` of an action chunk.
        seed: Seed of the draws.
    """

    def __init__(self, shape: tuple[int, ...], seed: int = 0) -> None:
        self.shape, self._rng = shape, np.random.default_rng(seed)

    def predict(self, obs: Mapping[str, np.ndarray], deterministic: bool = False) -> tuple[np.ndarray, None]:
        """One random chunk per observation; the state is None."""
        return self._rng.uniform(-1, 1, (len(obs["task_id"]), *self.shape)).astype(np.float32), None


@contextmanager
def reference_kernels() -> Iterator[None]:
    """Context manager that uses PyTorch's own kernels and returns freed memory to the system."""
    return_freed_memory()
    try:
        with ordinary_kernels():
            yield
    finally:
        keep_freed_memory()


class Uncached:
    """Wrapper that hides a network's cached fast path, so that every call computes all frames."""

    def __init__(self, network: Any) -> None:
        self._network = network

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the network."""
        return self._network(*args, **kwargs)


def bench_reference(
    world: World, policy: Any = None, *, rows: int = 64, repeats: int = REPEATS, seed: int = 0, **options: Any
) -> dict[str, Any]:
    """Compare the speed of the environment with the reference loop, alternating on the same episodes.

    Args:
        world: The world.
        policy: Policy that chooses the actions; None uses random actions, which rarely succeed and therefore
            hide the savings of early stopping.
        rows: Batch size.
        repeats: Number of repetitions of both loops.
        seed: Root seed.
        **options: Options of the environment: ``device``, ``dtype``, ``compile``.

    Returns:
        ``seconds_per_episode`` and ``reference_seconds_per_episode`` (medians over the repeats), ``ratio``
        (median over consecutive pairs) and ``ratio_range``, and the factors of the ratio: ``loop`` (the
        reference loop with our kernels) and ``kernels``; ``reference_frames_after_success`` (share of the
        reference loop's frames after the predicted success), ``same_finish`` (share of the episodes that end
        at the same frame in both) and ``finish`` (the last frame of each episode).
    """
    shape = (world.task.chunk, world.task.action_dim)
    env = make_rollout_env("WMPO-Imagined-v0", rows, world=world, **options)
    env.reset(seed=seed)  # takes the networks to their device
    imagination = copy.copy(env.unwrapped._imagination)  # type: ignore[attr-defined]
    imagination.network = Uncached(getattr(imagination.network, "original", imagination.network))
    rng = np.random.default_rng(seed)
    ids, seeds = rng.choice(world.start_frames.ids, rows), rng.integers(2**31, size=rows)
    with (
        acting(policy or RandomPolicy(shape, seed), deterministic=False, seed=seed) as act,
        reference_kernels(),
    ):
        _, finish, actions = _run_reference(world, imagination, act, ids, seeds)
    seconds, our_finish = [], finish
    for _ in range(repeats + 1):
        ours, our_finish = _run_environment(env, actions, ids, seeds)
        loop, _, _ = _run_reference(world, imagination, _repeating(actions), ids, seeds)
        with reference_kernels():
            reference, _, _ = _run_reference(world, imagination, _repeating(actions), ids, seeds)
        seconds.append((ours, loop, reference))
    env.close()
    ours, loop, reference = np.array(seconds[1:]).T  # the first warms up
    ratio = median_and_range(reference / ours)
    return {
        "rows": rows,
        "seconds_per_episode": float(np.median(ours)) / rows,
        "reference_seconds_per_episode": float(np.median(reference)) / rows,
        "ratio": ratio[0],
        "ratio_range": ratio[1:],
        "loop": float(np.median(loop / ours)),
        "kernels": float(np.median(reference / loop)),
        "reference_frames_after_success": float(1.0 - finish.mean() / world.task.horizon),
        "same_finish": float(np.mean(finish == our_finish)),
        "finish": finish.tolist(),
    }


def _repeating(actions: np.ndarray) -> Act:
    """Open-loop policy that returns the chunks of ``actions`` (N, chunks, K, D) one after the other."""
    chunks = iter(np.moveaxis(actions, 1, 0))
    return lambda obs: next(chunks)


def _run_environment(
    env: Any, actions: np.ndarray, ids: np.ndarray, seeds: np.ndarray
) -> tuple[float, np.ndarray]:
    """Seconds inside the environment and the frame (N,) each episode ended at.

    Args:
        env: Environment with N rows.
        actions: (N, chunks, K, D), executed open loop.
        ids: Start state ids (N,).
        seeds: Noise seeds (N,).
    """
    began = time.perf_counter()
    env.reset(seed=0, options={"start_state_id": ids, "noise_seed": seeds})
    seconds = time.perf_counter() - began
    done, finish = np.zeros(len(ids), bool), np.zeros(len(ids), np.int64)
    for chunk in range(actions.shape[1]):
        began = time.perf_counter()
        _, _, terminated, truncated, info = env.step(actions[:, chunk])
        seconds += time.perf_counter() - began
        finish += np.where(done, 0, info["n_frames"])
        done |= terminated | truncated
        if done.all():
            break
    return seconds, finish


def _run_reference(
    world: World, imagination: Any, act: Act, ids: np.ndarray, seeds: np.ndarray
) -> tuple[float, np.ndarray, np.ndarray]:
    """Seconds of the reference loop, the frames (N,) of predicted success, and the actions (N, chunks, K, D).

    For the arguments see :func:`_run_environment` and :func:`imagine_by_reference`.
    """
    import torch

    starts, watch = world.start_frames, Stopwatch(synchronizer(device_of(world)))
    where = {int(start_id): i for i, start_id in enumerate(starts.ids)}
    index = [where[int(i)] for i in ids]
    generators = [torch.Generator().manual_seed(int(s)) for s in seeds]
    chosen: list[np.ndarray] = []

    def choose(obs: dict[str, np.ndarray]) -> np.ndarray:
        chosen.append(act(obs))
        return chosen[-1]

    def noise() -> Any:
        return torch.stack([torch.randn(imagination.noise_shape, generator=g) for g in generators])

    began = time.perf_counter()
    _, finish = imagine_by_reference(
        imagination,
        world.classifier,
        torch.as_tensor(starts.frames[index], device=device_of(world)),
        starts.task_ids[index],
        watch.wrap("policy", choose),
        noise,
        world.task.n_chunks,
    )
    seconds = time.perf_counter() - began - watch.seconds["policy"]
    return seconds, finish, np.stack(chosen, axis=1)


def imagine_by_reference(
    imagination: Any,
    classifier: Any,
    first: Any,
    task_ids: np.ndarray,
    act: Act,
    noise: Callable[[], Any],
    n_chunks: int,
) -> tuple[Any, np.ndarray]:
    """Imagine all rows to the horizon and classify at the end.

    Args:
        imagination: World model rollout whose network is an :class:`Uncached`.
        classifier: The success classifier.
        first: uint8 tensor (N, H, W, 3), first frames.
        task_ids: int64 (N,).
        act: Maps observations to actions (N, K, D).
        noise: Returns the noise of the next chunk.
        n_chunks: Number of chunks up to the horizon.

    Returns:
        uint8 tensor (N, T+1, H, W, 3), and the first frame (N,) that reaches the threshold, T if there is
        none.
    """
    import torch

    state, clips = imagination.start(first), [first[:, None]]
    for _ in range(n_chunks):
        actions = act({"pixels": clips[-1][:, -1].cpu().numpy(), "task_id": task_ids})
        frames, state = imagination.step(state, actions, noise())
        clips.append(frames)
    frames = torch.cat(clips, dim=1)
    return frames, classify_at_the_end(classifier, frames, torch.as_tensor(task_ids, device=first.device))


def classify_at_the_end(classifier: Any, frames: Any, task_ids: Any) -> np.ndarray:
    """First frame (N,) of clips (N, T+1, H, W, 3) that reaches the threshold, T if there is none."""
    import torch

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

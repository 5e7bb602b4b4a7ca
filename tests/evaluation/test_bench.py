"""The benchmark's clock adds up and its optimisations change nothing but the time."""

from __future__ import annotations

import json

import numpy as np
import pytest

from wmpo_gym.bench import reference, timing
from wmpo_gym.bench.bench import bench, bench_imagined, bench_simulated, bench_text
from wmpo_gym.bench.reference import (
    RandomPolicy,
    Uncached,
    bench_reference,
    classify_at_the_end,
    imagine_by_reference,
    reference_kernels,
)
from wmpo_gym.bench.timing import Stopwatch, timed_methods
from wmpo_gym.rollouts.rollout import make_rollout_env


class Worker:
    def __init__(self):
        self.clock = 0.0

    def outer(self):
        self.clock += 2.0
        self.inner()
        self.clock += 1.0

    def inner(self):
        self.clock += 5.0


def test_inner_time_does_not_count_twice(monkeypatch):
    worker, watch = Worker(), Stopwatch()
    monkeypatch.setattr(timing.time, "perf_counter", lambda: worker.clock)
    with timed_methods([(worker, ["outer", "missing"], "outer"), (worker, ["inner"], "inner")], watch):
        worker.outer()
        worker.clock += 10.0
        worker.inner()
    assert watch.seconds == {"outer": 3.0, "inner": 10.0}
    assert set(vars(worker)) == {"clock"}


def test_methods_are_restored_after_an_error():
    worker, watch = Worker(), Stopwatch()
    with pytest.raises(ZeroDivisionError), timed_methods([(worker, ["inner"], "inner")], watch):
        raise ZeroDivisionError
    assert set(vars(worker)) == {"clock"}


def test_split_adds_up_and_networks_are_left_as_they_were(tiny_world):
    before = set(vars(tiny_world.network))
    r = bench_imagined(tiny_world, 3, repeats=2)
    assert sum(r["split"].values()) == pytest.approx(1.0)
    assert set(r["split"]) == {"network", "decoder", "classifier", "glue"}
    assert min(r["split"].values()) > 0
    assert r["rows"] == 3 and r["chunk_ms_p95"] >= r["chunk_ms_p50"] > 0 and r["reset_ms"] > 0
    low, high = r["frames_per_second_quartiles"]
    assert 0 < low <= r["frames_per_second"] <= high
    assert set(vars(tiny_world.network)) == before


def test_simulator_is_measured_alike():
    r = bench_simulated("move-block", 2, repeats=1)
    assert set(r["split"]) == {"physics", "renderer", "glue"} and r["frames_per_second"] > 0


def test_own_methods_of_an_instance_are_put_back():
    worker, watch = Worker(), Stopwatch()
    worker.inner = own = lambda: None
    with timed_methods([(worker, ["inner"], "inner")], watch):
        worker.inner()
    assert worker.inner is own


def test_early_stop_saves_the_frames_after_success(tiny_world):
    tiny_world.classifier.threshold = 0.0  # claims at the first full window
    try:
        r = bench_reference(tiny_world, rows=4, repeats=3)
    finally:
        tiny_world.classifier.threshold = 1.0
        never = bench_reference(tiny_world, rows=4, repeats=1)
    assert (
        r["reference_frames_after_success"] == pytest.approx(1 - 1 / 20) and r["ratio"] > 1 and r["loop"] > 1
    )
    assert r["finish"] == [1] * 4 and r["same_finish"] == never["same_finish"] == 1.0
    assert never["reference_frames_after_success"] == 0.0 and never["finish"] == [20] * 4


def test_the_reference_loop_imagines_the_same_episodes(tiny_world):
    """Same actions and noise: the same frames up to the claim, and the same claim."""
    import torch

    n, rng = 3, np.random.default_rng(0)
    actions = rng.uniform(-1, 1, (n, 5, 4, 3)).astype(np.float32)
    ids, seeds = tiny_world.start_frames.ids[[0, 1, 1]], np.array([5, 6, 7])
    options = {"start_state_id": ids, "noise_seed": seeds}
    env = make_rollout_env("WMPO-Imagined-v0", n, world=tiny_world, record_frames=True)
    tiny_world.classifier.threshold = 1.0
    env.reset(options=options)
    clips = [env.step(actions[:, chunk])[4]["frames"] for chunk in range(5)]
    frames = np.stack([np.concatenate([np.asarray(clip[row]) for clip in clips]) for row in range(n)])
    scores = [
        tiny_world.classifier.scores(f, int(t))
        for f, t in zip(frames, tiny_world.start_frames.task_ids[[0, 1, 1]], strict=True)
    ]
    tiny_world.classifier.threshold = float(
        np.nanquantile(scores, 0.9)
    )  # claimed by some, not by all at once
    finish = reference._run_environment(env, actions, ids, seeds)[1]

    imagination = tiny_world.imagination()
    imagination.network = Uncached(tiny_world.network)
    with reference_kernels():
        seconds, claimed, chosen = reference._run_reference(
            tiny_world, imagination, reference._repeating(actions), ids, seeds
        )
        generators = [torch.Generator().manual_seed(int(s)) for s in seeds]
        made, _ = imagine_by_reference(
            imagination,
            tiny_world.classifier,
            torch.from_numpy(tiny_world.start_frames.frames[[0, 1, 1]]),
            np.zeros(n, np.int64),
            reference._repeating(actions),
            lambda: torch.stack([torch.randn(imagination.noise_shape, generator=g) for g in generators]),
            5,
        )
    tiny_world.classifier.threshold = 1.0
    assert seconds > 0 and np.array_equal(chosen, actions)
    assert finish.tolist() == claimed.tolist() and finish.min() < 20
    # Rounding may tip a pixel over to the next level, in one of thousands of cases.
    difference = np.abs(made[:, 1:].numpy().astype(int) - frames)
    assert difference.max() <= 1 and (difference > 0).mean() < 1e-3


def test_classifying_at_the_end_agrees_with_the_stream(tiny_world):
    frames = np.random.default_rng(0).integers(0, 255, (2, 9, 40, 40, 3), dtype=np.uint8)
    import torch

    tiny_world.classifier.threshold = float(np.nanmax(tiny_world.classifier.scores(frames[0], 0)))
    finish = classify_at_the_end(tiny_world.classifier, torch.from_numpy(frames), torch.tensor([0, 0]))
    assert finish[0] == np.nanargmax(tiny_world.classifier.scores(frames[0], 0))


TINY_STDIT = {"hidden_size": 24, "depth": 1, "num_heads": 2, "rows": 3}


def test_whole_benchmark_prints_and_is_json(tiny_world):
    r = bench(tiny_world, rows=(1, 2), repeats=1, transformer=TINY_STDIT, progress=False)
    r = json.loads(json.dumps(r, allow_nan=False))
    assert list(r)[:7] == [
        "frames_per_second", "split", "ratio_to_reference_bundled", "ratio_to_reference",
        "ratio_to_reference_few_step", "max_abs_frame_difference", "peak_fraction",
    ]  # fmt: skip
    assert r["frames_per_second"] == r["imagined"][1]["frames_per_second"]
    assert 0 <= r["max_abs_frame_difference"] < 1e-5 and 0 < r["peak_fraction"] < 1
    text = bench_text(r)
    for needle in (
        "frames/s",
        "2 rows",
        "glue %",
        "physics %",
        "cached context",
        "peak memory",
        "load",
        "steps/s",
        "targets:",
    ):
        assert needle in text
    assert len(r["imagined"]) == len(r["simulated"]) == 2
    low, high = r["transformer"]["ratio_range"]
    assert low <= r["ratio_to_reference"] <= high
    assert all(0 < r[name]["peak_fraction"] < 1 for name in ("training", "training_bundled"))
    by_length = r["transformer"]["ratio_by_mean_length"]
    assert by_length["0.50"] == pytest.approx(2 * by_length["1.00"])
    assert r["ratio_to_reference"] == pytest.approx(by_length["1.00"] * r["transformer"]["early_stop"])


def test_random_policy_repeats():
    obs = {"task_id": np.zeros(3)}
    a, b = (RandomPolicy((4, 3), 5).predict(obs)[0] for _ in range(2))
    assert (a == b).all() and a.shape == (3, 4, 3) and np.abs(a).max() <= 1

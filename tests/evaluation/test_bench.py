"""The benchmark's clock adds up and its shortcuts change nothing but the time."""

from __future__ import annotations

import json
from functools import partial

import numpy as np
import pytest

from wmpo_gym.evaluation import bench as bench_module
from wmpo_gym.evaluation import stopwatch
from wmpo_gym.evaluation.bench import bench, bench_imagined, bench_simulated, bench_text
from wmpo_gym.evaluation.shortcuts import RandomPolicy, _classify_at_the_end, bench_context_cache, bench_plain
from wmpo_gym.evaluation.stopwatch import Stopwatch, timed_methods


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
    monkeypatch.setattr(stopwatch.time, "perf_counter", lambda: worker.clock)
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


def test_twin_is_measured_alike():
    r = bench_simulated("move-block", 2, repeats=1)
    assert set(r["split"]) == {"physics", "renderer", "glue"} and r["frames_per_second"] > 0


def test_early_stop_is_what_plain_wastes(tiny_world):
    tiny_world.classifier.threshold = 0.0  # claims at the first full window
    try:
        r = bench_plain(tiny_world, rows=4, repeats=3)
    finally:
        tiny_world.classifier.threshold = 1.0
        never = bench_plain(tiny_world, rows=4, repeats=1)
    assert r["plain_wasted_frames"] == pytest.approx(1 - 1 / 20) and r["ratio"] > 1
    assert never["plain_wasted_frames"] == 0.0


def test_classifying_at_the_end_agrees_with_the_stream(tiny_world):
    frames = np.random.default_rng(0).integers(0, 255, (2, 9, 40, 40, 3), dtype=np.uint8)
    import torch

    tiny_world.classifier.threshold = float(np.nanmax(tiny_world.classifier.scores(frames[0], 0)))
    finish = _classify_at_the_end(tiny_world, torch.from_numpy(frames), torch.tensor([0, 0]))
    assert finish[0] == np.nanargmax(tiny_world.classifier.scores(frames[0], 0))


def test_context_cache_changes_nothing():
    r = bench_context_cache(rows=1, steps=2, side=4, repeats=1)
    assert 0 <= r["largest_difference"] < 1e-5 and r["ratio"] > 0


def test_whole_benchmark_prints_and_is_json(tiny_world, monkeypatch):
    small = partial(bench_context_cache, rows=1, steps=2, side=4)
    monkeypatch.setattr(bench_module, "bench_context_cache", small)
    r = bench(tiny_world, rows=(1, 2), repeats=1, progress=False)
    json.dumps(r, allow_nan=False)
    text = bench_text(r)
    for needle in ("frames/s", "2 rows", "glue %", "physics %", "context computed once", "peak memory"):
        assert needle in text
    assert len(r["imagined"]) == len(r["simulated"]) == 2


def test_random_policy_repeats():
    obs = {"task_id": np.zeros(3)}
    a, b = (RandomPolicy((4, 3), 5).predict(obs)[0] for _ in range(2))
    assert (a == b).all() and a.shape == (3, 4, 3) and np.abs(a).max() <= 1

"""The transformer's benchmark counts what it says, and the published sizes are refused without a GPU."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from wmpo_gym.bench.paper import bench_paper, paper_text, published_parts
from wmpo_gym.bench.timing import flops_of, matmul_peak, timed
from wmpo_gym.bench.transformer import (
    Sampling,
    _Run,
    bench_transformer,
    cpu_imagination,
    random_stdit,
)
from wmpo_gym.cli.main import main

CPU = torch.device("cpu")
TINY = {"hidden_size": 24, "depth": 1, "num_heads": 2}


def test_steps_that_are_not_carried_out_are_counted():
    run = _Run(10.0, {"step": 6.0, "context": 1.0}, frames=8)
    assert run.counting(1) == 10.0 and run.counting(30) == 184.0
    assert run.split(30) == pytest.approx({"step": 180 / 184, "context": 1 / 184, "glue": 3 / 184})


def test_flops_and_peak():
    a, b = torch.randn(3, 5), torch.randn(5, 7)
    assert flops_of(lambda: a @ b) == 2 * 3 * 5 * 7
    linear = torch.nn.Linear(5, 7)
    assert flops_of(lambda: linear(a)) == 2 * 3 * 5 * 7
    assert matmul_peak(CPU, torch.float32) > 1e8
    seconds, result = timed(lambda: 3, CPU)
    assert seconds >= 0 and result == 3


def test_random_weights_put_something_out_and_leave_the_generator_alone():
    before = torch.get_rng_state()
    network = random_stdit(0, in_channels=3, action_dim=2, **TINY)
    assert torch.equal(before, torch.get_rng_state())
    out = network(
        torch.randn(1, 3, 12, 4, 4), torch.ones(1), torch.zeros(1, 8, 2), torch.arange(12)[None] < 4
    )
    assert out.abs().max() > 0.01


def test_finished_rows_are_dropped_and_not_by_the_reference_loop(tiny_world, monkeypatch):
    imagination = cpu_imagination(tiny_world, **TINY)
    assert imagination.nfe_per_chunk == 30 and imagination.noise_shape == (3, 8, 40, 40)
    assert imagination.network.x_embedder.stride == (5, 5)  # 64 tokens per frame
    imagination.network.cpu_batch = 4  # all rows at once
    calls: list[tuple[int, int]] = []
    step = type(imagination).step

    def counted(self, state, actions, noise):
        calls.append((len(state), self.nfe_per_chunk))
        return step(self, state, actions, noise)

    monkeypatch.setattr(type(imagination), "step", counted)
    finish = [8, 20, 9, 16] * 3  # every length as often in the batch
    r = bench_transformer(imagination, tiny_world.classifier, finish, 20, rows=4, repeats=1)
    one_batch = [(4, 1), (3, 1), (1, 1)], [(4, 1)] * 3  # environment, reference
    assert calls == 2 * (one_batch[0] + one_batch[1])
    assert imagination.nfe_per_chunk == 30  # only a copy did fewer
    assert r["early_stop"] == 12 / 8 and r["executed_steps"] == 1
    assert 0 <= r["largest_difference"] < 1e-5 and r["ratio_few_step"] > r["ratio"]
    assert sum(r["split"].values()) == pytest.approx(1.0)
    assert set(r["split"]) == {"step", "context", "decoder", "classifier", "glue"}


def test_rows_beyond_the_caches_are_taken_in_parts(tiny_world):
    imagination = cpu_imagination(tiny_world, **TINY)
    imagination.network.cpu_batch = 2
    r = bench_transformer(
        imagination, tiny_world.classifier, [8], 8, rows=5, repeats=1, sampling=Sampling(steps=2, few=1)
    )
    assert r["early_stop"] == 1.0 and np.isfinite(r["ratio"])


@pytest.mark.parametrize("steps", [1, 2, 30])
def test_cached_context_never_computes_more_than_recomputing(tiny_world, steps):
    """Counted operations: the context once and 8 of 12 frames per step, against 12 frames per step."""
    imagination = cpu_imagination(tiny_world, **TINY)
    noise, context = torch.zeros(2, *imagination.noise_shape), torch.zeros(2, 3, 4, 40, 40)
    inputs = (imagination.network, noise, context, torch.zeros(2, 8, imagination.action_dim), steps)
    cached, recomputed = (
        flops_of(lambda cached=cached: imagination.flow.sample(*inputs, cached=cached))
        for cached in (True, False)
    )
    assert cached <= recomputed
    assert cached / recomputed == pytest.approx((4 + 8 * steps) / (12 * steps), rel=0.05)


def test_the_published_sizes_need_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(
        ValueError, match=r"STDiT3-XL at 256x256 in bfloat16 and needs a CUDA card.*leave --preset"
    ):
        bench_paper()
    assert main(["bench", "--preset", "paper"]) == 2
    assert "needs a CUDA card" in capsys.readouterr().err


def test_the_published_parts_in_small():
    """The same code as on the card, every class of it, at sizes that a CPU bears."""
    pytest.importorskip("transformers")
    imagination, classifier = published_parts(
        CPU,
        torch.bfloat16,
        image_size=32,
        network={"hidden_size": 24, "depth": 1, "num_heads": 2},
        vae={
            "block_out_channels": (8, 8, 8, 8), "down_block_types": ("DownEncoderBlock2D",) * 4,
            "up_block_types": ("UpDecoderBlock2D",) * 4, "norm_num_groups": 4, "latent_channels": 4,
            "layers_per_block": 1, "scaling_factor": 0.13025,
        },
        classifier={
            "image_size": 16, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
            "intermediate_size": 16,
        },
    )  # fmt: skip
    assert imagination.noise_shape == (4, 8, 4, 4) and imagination.nfe_per_chunk == 30
    assert imagination.network.dtype == imagination.autoencoder.vae.dtype == torch.bfloat16
    sampling = Sampling(steps=2, few=1, executed=None)
    r = bench_transformer(imagination, classifier, [16] * 2, 16, sampling=sampling, rows=2, repeats=1)
    r |= {"network_parameters": 1, "dtype": "bfloat16", "compiled": False}
    json.dumps(r, allow_nan=False)
    text = paper_text(
        r
        | {
            "machine": {
                "processor": "x",
                "threads": 1,
                "cores": 1,
                "load": 0.0,
                "device": "cpu",
                "peak_memory_mb": 1.0,
            }
        }
    )
    assert "all weights random" in text and "extrapolated" not in text

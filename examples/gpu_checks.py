"""Speed and memory at the published sizes on one GPU, in less than ten minutes, with random weights.

Trains the published world model (STDiT3-XL on latents of 256x256 frames) for some steps in bfloat16 on random
episodes, and runs the benchmark of `wmpo bench --preset paper`. Prints a table and writes JSON.
``--tiny`` does the same with tiny networks, on any device.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from wmpo_gym.bench.paper import bench_paper, published_parts
from wmpo_gym.bench.timing import flops_of, matmul_peak, timed
from wmpo_gym.bench.transformer import Sampling, bench_transformer
from wmpo_gym.data.episode import Episode
from wmpo_gym.pipeline.presets import PRESETS
from wmpo_gym.tasks import Task, get_task
from wmpo_gym.training.runtime import ComputeSettings
from wmpo_gym.world.training import WorldModelTrainer

TINY_VAE = {
    "block_out_channels": (8, 8, 8, 8),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "norm_num_groups": 4,
    "latent_channels": 4,
    "layers_per_block": 1,
    "scaling_factor": 0.13025,
}
TINY_NETWORK = {"hidden_size": 24, "depth": 1, "num_heads": 2}
TINY_CLASSIFIER = {
    "image_size": 16,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
}


def random_episodes(task: Task, n: int = 8, n_steps: int = 32) -> list[Episode]:
    """Episodes of random frames and actions."""
    rng = np.random.default_rng(0)
    size = task.image_size
    return [
        Episode(
            rng.integers(0, 256, (n_steps + 1, size, size, 3), dtype=np.uint8),
            rng.uniform(-1, 1, (n_steps, task.action_dim)).astype(np.float32),
            None,
            n_steps,
            i,
            0,
            task.instructions[0],
        )
        for i in range(n)
    ]


def make_parts(args: argparse.Namespace, dtype: torch.dtype) -> tuple[Any, Any]:
    """Imagination and classifier, of the published sizes or tiny."""
    small: dict[str, Any] = {}
    if args.tiny:
        small = {"network": TINY_NETWORK, "vae": TINY_VAE, "classifier": TINY_CLASSIFIER, "image_size": 32}
    return published_parts(torch.device(args.device), dtype, **small)


def measure_imagination(args: argparse.Namespace) -> dict[str, Any]:
    """The benchmark of `wmpo bench --preset paper`, or the same in small."""
    if not args.tiny:
        return bench_paper(repeats=args.repeats)
    imagination, classifier = make_parts(args, torch.float32)
    sampling = Sampling(steps=2, few=1, executed=None)
    return bench_transformer(
        imagination, classifier, [16] * 2, 16, sampling=sampling, rows=2, repeats=args.repeats
    )


def measure_training(args: argparse.Namespace) -> dict[str, Any]:
    """Train for some steps; seconds per step, memory, and the share of the matmul peak.

    Returns:
        ``seconds_per_step`` (median after the first fifth of the steps) with its quartiles,
        ``peak_memory_gib`` (allocated by torch; None on a CPU), ``flops_per_step`` (network forwards and
        backwards, counted; the autoencoder's are left out), ``peak_tflops`` (measured), ``peak_fraction``.
    """
    device = torch.device(args.device)
    # Float32 weights, as the trainer keeps them; it computes in bfloat16 by autocast.
    imagination, _ = make_parts(args, torch.float32)
    size = imagination.image_size[0]
    network, config = imagination.network, imagination.network.config
    task = get_task("coffee").at(size)
    settings = replace(PRESETS["paper"].align, steps=args.steps, batch_size=args.rows, checkpoint_every=10**9)
    trainer = WorldModelTrainer(
        network, imagination.autoencoder, task, random_episodes(task), settings,
        context_frames=config.context_frames, denoising_steps=imagination.nfe_per_chunk,
        compute=ComputeSettings(device=args.device, precision="bf16" if device.type == "cuda" else "fp32"),
    )  # fmt: skip
    network.train()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds: list[float] = []
    began = time.perf_counter()
    while len(seconds) < args.steps and time.perf_counter() - began < args.max_seconds:
        seconds.append(timed(trainer.train_step, device)[0])
    steady = seconds[len(seconds) // 5 :]
    memory = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None
    batch = trainer.task.draw(trainer.step)
    with trainer.runtime.autocast():
        flops = flops_of(lambda: trainer.task.compute_loss(batch).loss.backward(), gradients=True)
    peak = matmul_peak(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    median = statistics.median(steady)
    return {
        "parameters": sum(p.numel() for p in network.parameters()),
        "steps": len(seconds),
        "rows": args.rows,
        "image_size": size,
        "precision": trainer.runtime.precision,
        "seconds_per_step": median,
        "seconds_per_step_quartiles": np.percentile(steady, [25, 75]).tolist(),
        "peak_memory_gib": memory,
        "flops_per_step": flops,
        "peak_tflops": peak / 1e12,
        "peak_fraction": flops / median / peak,
    }


def table(rows: dict[str, str]) -> str:
    """Two aligned columns."""
    width = max(map(len, rows)) + 2
    return "\n".join(f"{name:<{width}}{value}" for name, value in rows.items())


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--steps", type=int, default=200, help="optimiser steps")
    parser.add_argument("--rows", type=int, default=4, help="rows per step; 4 fit into 80 GB")
    parser.add_argument("--max-seconds", type=float, default=240.0, help="of training; fewer steps then")
    parser.add_argument("--repeats", type=int, default=1, help="of the benchmark")
    parser.add_argument("--tiny", action="store_true", help="tiny networks, any device")
    parser.add_argument("--json", type=Path, default=Path("gpu_checks.json"))
    args = parser.parse_args()
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("torch sees no CUDA card here; try --device cpu --tiny")
    if not args.tiny and not args.device.startswith("cuda"):
        parser.error("the published sizes need a CUDA card; give --tiny for another device")
    began = time.perf_counter()
    training = measure_training(args)
    bench = measure_imagination(args)
    seconds = time.perf_counter() - began
    args.json.write_text(json.dumps({"training": training, "bench": bench, "seconds": seconds}, indent=1))
    low, high = training["seconds_per_step_quartiles"]
    memory = training["peak_memory_gib"]
    print(
        table(
            {
                "device": torch.cuda.get_device_name(args.device) if "cuda" in args.device else "cpu",
                "world model": f"{training['parameters']:,} parameters, {training['precision']}, random",
                "training": f"{training['steps']} steps of {training['rows']} rows, "
                f"{training['image_size']} px",
                "seconds per step": f"{training['seconds_per_step']:.3f} (quartiles {low:.3f} to {high:.3f})",
                "peak memory": "not measured" if memory is None else f"{memory:.1f} GiB",
                "share of the matmul peak": f"{training['peak_fraction']:.1%} of "
                f"{training['peak_tflops']:.1f} TFLOP/s",
                "imagined frames/s, all steps": f"{bench['frames_per_second']:.1f}",
                "imagined frames/s, few steps": f"{bench['frames_per_second_few_step']:.1f}",
                "denoising step, share of peak": f"{bench['peak_fraction']:.1%}",
                "all of it": f"{seconds:.0f} s; the numbers are in {args.json}",
            }
        )
    )


if __name__ == "__main__":
    main()

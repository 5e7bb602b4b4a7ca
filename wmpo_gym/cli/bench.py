"""``wmpo bench``: how fast imagination is here, and where the time goes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from wmpo_gym.cli.common import load_policy, load_world
from wmpo_gym.data.atomic import write_json_atomic


@dataclass(frozen=True)
class Command:
    """Measure imagined and simulated frames per second, the split of the time, and what the shortcuts save.

    Attributes:
        world: Directory, hub id or task name.
        policy: Who acts where the length of episodes matters (directory, hub id or task name).
        rows: Batch sizes.
        repeats: Repeats of every measurement.
        simulated: Measure the twin too.
        threads: Threads of torch; its own choice by default.
        seed: Decides everything random.
        out: JSON file for the figures.
    """

    world: str = "move-block"
    policy: str = "move-block"
    rows: tuple[int, ...] = (1, 8, 64)
    repeats: int = 5
    simulated: bool = True
    threads: int | None = None
    seed: int = 0
    out: Path | None = None

    def run(self) -> None:
        """Measure and print."""
        import torch

        from wmpo_gym.evaluation.bench import bench, bench_text

        if self.threads is not None:
            torch.set_num_threads(self.threads)
        result = bench(
            load_world(self.world),
            load_policy(self.policy, seed=self.seed),
            rows=self.rows,
            repeats=self.repeats,
            simulated=self.simulated,
            seed=self.seed,
        )
        if self.out is not None:
            write_json_atomic(self.out, result)
        print(bench_text(result))

"""``wmpo bench``: throughput of imagination on this machine, and the time of each component."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from wmpo_gym.cli.common import check_policy_fits, load_policy, load_world, policy_and_world
from wmpo_gym.utils.device import resolve_device
from wmpo_gym.utils.io import write_json_atomic


@dataclass(frozen=True)
class Command:
    """Measure imagined and simulated frames per second, the time of each component, and optimisation savings.

    Attributes:
        preset: here: a world, and a transformer small enough for a CPU, on this machine. paper: the published
            sizes with random weights on one CUDA GPU; --world, --policy, --rows, --device and --dtype do not
            apply.
        world: Directory, hub id or task name of the world.
        policy: Policy for measurements that depend on episode length (directory, hub id or task name).
        rows: Batch sizes.
        repeats: Repetitions of every measurement.
        simulated: Measure the paired simulator too.
        threads: Number of torch threads; by default torch's own choice.
        device: Device for the world: auto (a GPU if there is one), cpu, cuda or cuda:1.
        dtype: Data type of the world's network; the convolutional network supports float32 only.
        compile: Compile the network with torch.compile, which takes minutes.
        seed: Random seed.
        json: Output file for the measurements.
    """

    preset: Literal["here", "paper"] = "here"
    world: str | None = None
    policy: str | None = None
    rows: tuple[int, ...] = (1, 8, 64)
    repeats: int = 3
    simulated: bool = True
    threads: int | None = None
    device: str = "auto"
    dtype: Literal["float32", "bfloat16"] = "float32"
    compile: bool = False
    seed: int = 0
    json: Path | None = None

    def run(self) -> None:
        """Measure and print."""
        import torch

        if self.threads is not None:
            torch.set_num_threads(self.threads)
        result, text = self._paper() if self.preset == "paper" else self._here()
        if self.json is not None:
            write_json_atomic(self.json, result)
        print(text)

    def _here(self) -> tuple[dict[str, Any], str]:
        from wmpo_gym.bench.bench import bench, bench_text

        name, place = policy_and_world(self.policy, self.world)
        world, policy = load_world(place), load_policy(name, seed=self.seed)
        check_policy_fits(policy, name, world.task)
        result = bench(
            world,
            policy,
            rows=self.rows,
            repeats=self.repeats,
            simulated=self.simulated,
            seed=self.seed,
            device=str(resolve_device(self.device)),
            dtype=self.dtype,
            compile=self.compile,
        )
        return result, bench_text(result)

    def _paper(self) -> tuple[dict[str, Any], str]:
        from wmpo_gym.bench.paper import bench_paper, paper_text

        result = bench_paper(repeats=min(self.repeats, 3), compile=self.compile, seed=self.seed)
        return result, paper_text(result)

"""``wmpo compare``: methods on identical environments, budgets and start states."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from wmpo_gym.experiments.plan import preset
from wmpo_gym.experiments.run import run_experiment
from wmpo_gym.experiments.summary import markdown_table, write_summary
from wmpo_gym.utils.io import read_json


@dataclass(frozen=True)
class Command:
    """Compare methods on identical environments, budgets and start states.

    Writes results.json, table.md and plots. If interrupted, the same command resumes with the unfinished
    trial; with more seeds, methods or budgets it trains only the new ones.

    Attributes:
        preset: Experiment of the paper: table1 (sample efficiency and final success), table2 (changed
            scenes), behaviour (episode length and self-correction, figures 3 to 5) or lifelong (figure 6).
        task: Task name.
        out: Output directory; default runs/compare-PRESET-TASK.
        methods: Methods to compare; by default those of the preset.
        budgets: Budgets of real episodes; by default those of the preset.
        seeds: Seeds; by default those of the preset.
        episodes: Number of test start states; by default that of the preset.
        bundled: Start from the bundled base policy and play-trained world model for all seeds.
        trained_in: Directory of another comparison whose trained policies are tested where available,
            instead of training new ones (for instance table2 or behaviour on the policies of table1).
        jobs: Number of parallel training processes, each with its share of the cores.
        device: Device for training and evaluation: auto (a GPU if available), cpu, cuda or cuda:1.
        precision: fp32, or bf16 on a GPU.
        summary_only: Only write the table and plots from the results.json in the directory.
    """

    preset: str = "table1"
    task: str = "move-block"
    out: Path | None = None
    methods: tuple[str, ...] = ()
    budgets: tuple[int, ...] = ()
    seeds: tuple[int, ...] = ()
    episodes: int | None = None
    bundled: bool = False
    trained_in: Path | None = None
    jobs: int = 1
    device: str = "auto"
    precision: str = "fp32"
    summary_only: bool = False

    def run(self) -> None:
        """Run the missing trials, then print the table."""
        plan = preset(self.preset, self.task)
        given: dict[str, Any] = {
            "methods": self.methods,
            "budgets": self.budgets,
            "seeds": self.seeds,
            "episodes": self.episodes,
        }
        if self.bundled:
            given["recipe"] = replace(plan.recipe, base_policy=self.task, pretrained_world=self.task)
        plan = replace(plan, **{name: value for name, value in given.items() if value})
        out = self.out or Path("runs") / f"compare-{self.preset}-{self.task}"
        if self.summary_only:
            results = read_json(out / "results.json")
        else:
            results = run_experiment(
                plan,
                out,
                trained_in=self.trained_in,
                jobs=self.jobs,
                device=self.device,
                precision=self.precision,
            )
        write_summary(results, out)
        print(markdown_table(results))
        print(f"Table, plots and results.json are in {out}")

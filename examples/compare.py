"""Compare GRPO in imagination with baselines, with equal numbers of real episodes and on equal start states.

python examples/compare.py --methods base dpo grpo wmpo --budgets 128 --seeds 0

A small comparison from the bundled base policy; `wmpo compare --preset table1` is the full one, from scratch.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import tyro

from wmpo_gym.experiments.plan import ExperimentPlan
from wmpo_gym.experiments.run import run_experiment
from wmpo_gym.experiments.summary import markdown_table, write_summary
from wmpo_gym.pipeline.presets import PRESETS

DEMO = PRESETS["demo"]


@dataclass
class Args:
    """Options."""

    task: str = "move-block"
    """task with bundled weights"""
    methods: tuple[str, ...] = ("base", "sft", "dpo", "grpo", "wmpo")
    """see wmpo_gym.experiments.plan.DATA_USED for all of them and their training data"""
    budgets: tuple[int, ...] = (128,)
    """number of real episodes per method"""
    seeds: tuple[int, ...] = (0,)
    """random seeds; each has its own rollouts"""
    episodes: int = 256
    """test start states"""
    selection_episodes: int = 128
    """validation start states for selecting a checkpoint; 0 takes the last"""
    iterations: int = DEMO.grpo.iterations
    """GRPO iterations in imagination"""
    world_steps: int = DEMO.align.steps
    """steps of the world model's alignment"""
    classifier_steps: int = DEMO.classifier_steps
    """steps of the success classifier"""
    device: str = "auto"
    """device: auto, cpu, cuda or cuda:1"""
    out: Path = Path("runs/compare")
    """output directory of results.json, table and plots"""


def main(args: Args) -> None:
    """Run the missing trials, then write and print the summary."""
    recipe = replace(
        DEMO,
        task=args.task,
        base_policy=args.task,
        pretrained_world=args.task,
        align=replace(DEMO.align, steps=args.world_steps),
        classifier_steps=args.classifier_steps,
        grpo=replace(DEMO.grpo, iterations=args.iterations),
    )
    plan = ExperimentPlan(
        task=args.task,
        methods=args.methods,
        budgets=args.budgets,
        seeds=args.seeds,
        episodes=args.episodes,
        selection_episodes=args.selection_episodes,
        recipe=recipe,
    )
    results = run_experiment(plan, args.out, device=args.device)
    write_summary(results, args.out)
    print(markdown_table(results))


if __name__ == "__main__":
    main(tyro.cli(Args))

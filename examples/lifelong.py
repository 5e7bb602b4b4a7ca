"""Lifelong learning: collect real rollouts, align the world model, optimise the policy in it, repeat.

python examples/lifelong.py --rounds 3

Every round collects real episodes with the current policy, aligns the world model and retrains the classifier
on all real episodes so far, and continues with GRPO in the aligned world (WMPO, Figure 6). The stages are
those of `wmpo demo` and `wmpo reproduce`; if interrupted, the same command resumes.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import tyro

from wmpo_gym.pipeline import method
from wmpo_gym.pipeline.presets import PRESETS, GRPOSettings
from wmpo_gym.rollouts.rollout import evaluate_policy_on
from wmpo_gym.tasks import get_task
from wmpo_gym.utils.io import read_json
from wmpo_gym.world.training import WorldModelTraining


@dataclass
class Args:
    """Options."""

    task: str = "move-block"
    """task with a bundled base policy and play-trained world model"""
    rounds: int = 3
    """number of rounds"""
    real_episodes: int = 128
    """real episodes per round"""
    world_steps: int = 500
    """steps of the world model's alignment"""
    classifier_steps: int = 500
    """steps of the classifier's training"""
    iterations: int = 8
    """GRPO iterations per round"""
    n_groups: int = 32
    """start states per iteration"""
    episodes: int = 256
    """test start states after every round"""
    seed: int = 0
    """random seed"""
    device: str = "auto"
    """device: auto, cpu, cuda or cuda:1"""
    out: Path = Path("runs/lifelong")
    """directory of the rounds, each with its rollouts, world model, classifier and policy"""


def main(args: Args) -> None:
    """Run the rounds."""
    recipe = replace(
        PRESETS["demo"],
        task=args.task,
        seed=args.seed,
        base_policy=args.task,
        pretrained_world=args.task,
        demos=0,
        play=0,
        rollouts=args.rounds * args.real_episodes,
        rounds=args.rounds,
        align=WorldModelTraining(
            steps=args.world_steps, batch_size=24, learning_rate=5e-4, teacher_forcing=0.0
        ),
        classifier_steps=args.classifier_steps,
        grpo=GRPOSettings(iterations=args.iterations, n_groups=args.n_groups),
        curve_every=args.iterations,
        curve_episodes=min(64, args.episodes),
    ).seeded()
    workspace, task = method.open_workspace(recipe, args.out, device=args.device), get_task(args.task)
    policy = method.train_policy(workspace, recipe, [])
    pretrained = world = method.pretrain_world(workspace, recipe, [])
    real = []

    def report(name: str) -> None:
        tested = evaluate_policy_on(
            task, policy, "test", args.episodes, deterministic=False, seed=args.seed, progress=False
        )
        print(f"{name}: {tested.rate}", flush=True)

    report("base policy")
    for number in range(1, args.rounds + 1):
        here, settings = workspace.round(number), recipe.for_round(number)
        start_states = recipe.round_start_states(task, number)
        real += method.collect(here, settings, policy, start_states).episodes
        world = method.train_world(here, settings, world, real, [], [])
        world = method.train_reward(here, settings, world, pretrained, real, [])
        policy = method.optimise(here, settings, world, policy, real).policy
        f1 = read_json(here.directory / "classifier.json")["calibration"]["f1"]
        report(f"round {number}, {len(real)} real episodes, classifier F1 {f1:.2f}")


if __name__ == "__main__":
    main(tyro.cli(Args))

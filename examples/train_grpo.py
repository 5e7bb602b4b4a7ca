"""Optimise the bundled base policy in imagination with GRPO, and test it in the simulator before and after.

python examples/train_grpo.py --iterations 10
"""

import time
from dataclasses import dataclass

import tyro

from wmpo_gym.algorithms import GRPO
from wmpo_gym.policies import VLAPolicy
from wmpo_gym.rollouts.rollout import evaluate_policy_on
from wmpo_gym.statistics import paired_difference
from wmpo_gym.world.world import find_pretrained


@dataclass
class Args:
    """Options."""

    task: str = "move-block"
    """task with a bundled world and base policy"""
    env_id: str = "WMPO-Imagined-v0"
    """WMPO-Simulated-v0 trains on the simulator instead"""
    iterations: int = 10
    """number of iterations (rollouts and update)"""
    n_groups: int = 32
    """start states per iteration"""
    group_size: int = 8
    """rollouts from each start state"""
    learning_rate: float = 5e-4
    """learning rate"""
    episodes: int = 256
    """test start states of the comparison"""
    seed: int = 0
    """random seed"""
    out: str = "runs/train_grpo"
    """output directory of the policy and the TensorBoard curves"""


def main(args: Args) -> None:
    """Train and compare."""
    base = find_pretrained(args.task, "policy")
    model = GRPO(
        "VLAPolicy",
        args.env_id,
        learning_rate=args.learning_rate,
        n_groups=args.n_groups,
        group_size=args.group_size,
        policy_kwargs={"model": base},
        tensorboard_log=args.out,
        seed=args.seed,
    )
    started = time.perf_counter()
    model.learn(max_iterations=args.iterations, progress_bar=True)
    print(f"{args.iterations} iterations in {time.perf_counter() - started:.0f} s; spent {model.budget}")
    model.policy.save_pretrained(f"{args.out}/policy")
    before, after = (
        evaluate_policy_on(args.task, policy, "test", args.episodes, deterministic=False, seed=args.seed)
        for policy in (VLAPolicy.from_pretrained(base), model.policy)
    )
    print(f"base {before.rate}, after {after.rate}, gain {paired_difference(before.success, after.success)}")


if __name__ == "__main__":
    main(tyro.cli(Args))

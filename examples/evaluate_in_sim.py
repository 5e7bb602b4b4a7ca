"""Success rate of a policy in the simulator, with confidence interval, in nominal and changed scenes.

python examples/evaluate_in_sim.py --policy runs/demo/policy
"""

from dataclasses import dataclass

import tyro

from wmpo_gym.policies import VLAPolicy
from wmpo_gym.rollouts.rollout import evaluate_policy_on
from wmpo_gym.tasks import get_task
from wmpo_gym.world.world import find_pretrained


@dataclass
class Args:
    """Options."""

    task: str = "move-block"
    """task"""
    policy: str | None = None
    """directory of a policy; by default the bundled base policy"""
    episodes: int = 256
    """test start states per row of the table"""
    seed: int = 0
    """seed of the sampling"""


def main(args: Args) -> None:
    """Evaluate and print one line per scene."""
    policy = VLAPolicy.from_pretrained(args.policy or find_pretrained(args.task, "policy"))
    print(f"{'scene':<14}{'sampled':<28}greedy")
    for variant in get_task(args.task).variants:
        sampled, greedy = (
            evaluate_policy_on(
                args.task, policy, "test", args.episodes, deterministic=g, variant=variant, seed=args.seed
            )
            for g in (False, True)
        )
        print(f"{variant:<14}{str(sampled.rate):<28}{greedy.rate}")


if __name__ == "__main__":
    main(tyro.cli(Args))

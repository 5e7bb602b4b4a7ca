"""Direct Preference Optimization from simulated or imagined rollouts, tested in the simulator.

python examples/train_dpo.py --env-id WMPO-Simulated-v0 --n-groups 16
"""

from dataclasses import dataclass

import tyro

from wmpo_gym.algorithms import DPO
from wmpo_gym.policies import VLAPolicy
from wmpo_gym.rollouts.rollout import evaluate_policy_on
from wmpo_gym.statistics import paired_difference
from wmpo_gym.world.world import find_pretrained


@dataclass
class Args:
    """Options."""

    task: str = "move-block"
    """task with a bundled base policy (and world, for imagined rollouts)"""
    env_id: str = "WMPO-Simulated-v0"
    """WMPO-Imagined-v0 collects the rollouts in the bundled world"""
    n_groups: int = 16
    """start states"""
    group_size: int = 8
    """rollouts from each start state; 16 x 8 are 128 episodes"""
    learning_rate: float = 1e-5
    """learning rate"""
    beta: float = 0.1
    """strength of the implicit KL penalty towards the collecting policy"""
    episodes: int = 256
    """test start states of the comparison"""
    seed: int = 0
    """random seed"""
    out: str = "runs/train_dpo"
    """output directory of the policy and the TensorBoard curves"""


def main(args: Args) -> None:
    """Collect, learn from the pairs, and compare."""
    base = find_pretrained(args.task, "policy")
    model = DPO(
        "VLAPolicy",
        args.env_id,
        learning_rate=args.learning_rate,
        n_groups=args.n_groups,
        group_size=args.group_size,
        beta=args.beta,
        max_extra_batches=0,  # one batch: groups without a pair cost episodes too
        policy_kwargs={"model": base},
        tensorboard_log=args.out,
        seed=args.seed,
    )
    model.learn(max_iterations=1, progress_bar=True)
    shown = {k: round(v, 4) for k, v in model.history[-1].items() if k.startswith(("train/", "rollout/"))}
    print(f"{shown}\nspent {model.budget}")
    model.policy.save_pretrained(f"{args.out}/policy")
    before, after = (
        evaluate_policy_on(args.task, policy, "test", args.episodes, deterministic=False, seed=args.seed)
        for policy in (VLAPolicy.from_pretrained(base), model.policy)
    )
    print(f"base {before.rate}, after {after.rate}, gain {paired_difference(before.success, after.success)}")


if __name__ == "__main__":
    main(tyro.cli(Args))

"""GRPO in imagination with several GPUs or machines: each process imagines its share of the groups.

torchrun --nproc-per-node 8 examples/train_grpo_distributed.py
accelerate launch --config_file examples/accelerate/1x8.yaml examples/train_grpo_distributed.py

The first command keeps a copy of the policy on every GPU; the second shards it (FSDP, bf16), as a 7B policy
requires. If interrupted, the same command resumes from the last checkpoint. Without GPUs torchrun runs on the
CPU; ``accelerate launch --cpu`` starts one process only, and is refused for more.
"""

import time
from dataclasses import dataclass

import gymnasium
import tyro
from stable_baselines3.common.utils import get_device

import wmpo_gym  # noqa: F401  (registers the environments)
from wmpo_gym.algorithms import GRPO
from wmpo_gym.algorithms.distributed import Ranks
from wmpo_gym.policies import VLAPolicy
from wmpo_gym.rollouts.rollout import evaluate_policy_on
from wmpo_gym.statistics import paired_difference
from wmpo_gym.world.world import find_pretrained


@dataclass
class Args:
    """Options; numbers of groups are those of all processes together."""

    task: str = "move-block"
    """task with a bundled world and base policy"""
    world: str | None = None
    """directory of another world"""
    policy: str | None = None
    """directory of another policy to start from"""
    iterations: int = 10
    """number of iterations (rollouts and update)"""
    n_groups: int = 32
    """informative groups per iteration; a multiple of the number of processes"""
    group_size: int = 8
    """rollouts from each start state"""
    batch_size: int | None = None
    """rollouts per optimizer step; all of an iteration by default"""
    micro_batch_size: int = 64
    """decisions per forward pass of a process; lower it if memory runs out"""
    learning_rate: float = 5e-4
    """learning rate; use 5e-6 for a 7B policy"""
    episodes: int = 256
    """test start states of the comparison in the simulator; 0 skips it"""
    seed: int = 0
    """random seed"""
    device: str = "auto"
    """cpu, or cuda for one GPU per process"""
    out: str = "runs/train_grpo_distributed"
    """output directory of checkpoints, curves and policy; on a file system shared by all machines"""


def main(args: Args) -> None:
    """Train, and compare before and after."""
    ranks = Ranks.join(args.device)
    base = args.policy or find_pretrained(args.task, "policy")
    rows = ranks.rows_per_rank(args.n_groups * args.group_size, args.group_size)
    device = get_device(args.device)
    env = gymnasium.make_vec("WMPO-Imagined-v0", rows, task=args.task, world=args.world, device=device.type)
    model = GRPO(
        "VLAPolicy",
        env,
        learning_rate=args.learning_rate,
        n_groups=args.n_groups,
        group_size=args.group_size,
        batch_size=args.batch_size,
        micro_batch_size=args.micro_batch_size,
        # In half precision, rounding differs between sampling and training.
        recompute_log_probs=device.type == "cuda",
        policy_kwargs={"model": base},
        checkpoint_dir=f"{args.out}/checkpoints",
        tensorboard_log=args.out,
        device=device,
        seed=args.seed,
    )
    started = time.perf_counter()
    model.learn(max_iterations=args.iterations, progress_bar=True, resume=True)
    saved = model.save_policy(f"{args.out}/policy")
    ranks.leave()
    if not ranks.is_main:
        return
    seconds = time.perf_counter() - started
    print(f"iterations: {args.iterations}, processes: {ranks.size}, {seconds:.0f} s; spent {model.budget}")
    if args.episodes:
        before, after = (
            evaluate_policy_on(
                args.task, VLAPolicy.from_pretrained(path), "test", args.episodes, deterministic=False
            )
            for path in (base, saved)
        )
        gain = paired_difference(before.success, after.success)
        print(f"base {before.rate}, after {after.rate}, gain {gain}")


if __name__ == "__main__":
    main(tyro.cli(Args))

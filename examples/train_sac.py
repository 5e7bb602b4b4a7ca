"""Stable-Baselines3's SAC in imagination, from scratch or with demonstrations in its replay buffer.

python examples/train_sac.py --demonstrations 200 --total-timesteps 20000

The reward is sparse, so that success stays near zero for a long time. SAC starts from scratch, while GRPO and
DPO start from a policy fine-tuned on demonstrations; keep this in mind when comparing them.
"""

from dataclasses import dataclass

import tyro
from stable_baselines3.common.evaluation import evaluate_policy

from wmpo_gym.algorithms import make_sac
from wmpo_gym.algorithms.sac import add_demonstrations
from wmpo_gym.envs.sb3 import make_sb3_env
from wmpo_gym.envs.simulated.scripted import record_expert
from wmpo_gym.tasks import get_task


@dataclass
class Args:
    """Options."""

    task: str = "move-block"
    """task with a bundled world"""
    env_id: str = "WMPO-Imagined-v0"
    """WMPO-Simulated-v0 trains on the simulator instead"""
    n_envs: int = 16
    """number of parallel environments"""
    total_timesteps: int = 20_000
    """number of action chunks"""
    demonstrations: int = 0
    """episodes of the scripted expert added to the buffer at the start"""
    buffer_size: int = 20_000
    """capacity of the replay buffer in transitions; its memory is printed"""
    episodes: int = 100
    """test start states, in the simulator"""
    seed: int = 0
    """random seed"""
    out: str = "runs/train_sac"
    """output directory of the model and the TensorBoard curves"""


def main(args: Args) -> None:
    """Train, then evaluate in the simulator."""
    task = get_task(args.task)
    env = make_sb3_env(args.env_id, args.n_envs, task=args.task)
    model = make_sac(env, buffer_size=args.buffer_size, seed=args.seed, tensorboard_log=args.out, verbose=1)
    if args.demonstrations:
        ids = task.split_ids("train")[: args.demonstrations]
        added = add_demonstrations(model, list(record_expert(ids, seed=args.seed)), task)
        print(f"{added} transitions of {len(ids)} demonstrations are in the buffer")
    model.learn(args.total_timesteps, log_interval=100)
    model.save(f"{args.out}/sac")
    test = make_sb3_env("WMPO-Simulated-v0", 1, task=args.task, split="test")
    mean, _ = evaluate_policy(model, test, args.episodes)
    print(f"success in the simulator: {mean:.1%} of {args.episodes} test episodes")


if __name__ == "__main__":
    main(tyro.cli(Args))

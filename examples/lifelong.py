"""Lifelong learning: act for real, refresh the imagined world with what happened, improve in it, and again.

python examples/lifelong.py --rounds 3

Every round collects real episodes with the policy as it is, aligns the world model and retrains the
classifier on all real episodes so far, and goes on with GRPO in the refreshed world (WMPO, figure 6).
"""

from dataclasses import dataclass
from pathlib import Path

import tyro

from wmpo_gym.algorithms import GRPO
from wmpo_gym.data import EpisodeStore
from wmpo_gym.evaluation.learning import grpo_from_policy
from wmpo_gym.evaluation.world_quality import imagined_replays
from wmpo_gym.policies import VLAPolicy
from wmpo_gym.reward.training import train_classifier
from wmpo_gym.rollouts.rollout import collect_episodes, evaluate_policy_on, make_rollout_env
from wmpo_gym.tasks import get_task
from wmpo_gym.world.training import WorldModelTrainer, WorldModelTraining
from wmpo_gym.world.world import StartFrames, World, find_pretrained


@dataclass
class Args:
    """Options."""

    task: str = "move-block"
    """task with a bundled base policy and play-trained world model"""
    rounds: int = 3
    """times to act, refresh and improve"""
    real_episodes: int = 128
    """real episodes per round"""
    world_steps: int = 500
    """steps of the world model's refresh"""
    classifier_steps: int = 500
    """steps of the classifier's training"""
    iterations: int = 8
    """GRPO iterations per round"""
    n_groups: int = 32
    """start states per iteration"""
    episodes: int = 256
    """test start states after every round"""
    seed: int = 0
    """seed of everything"""
    out: Path = Path("runs/lifelong")
    """where the real episodes and the policies go"""


def main(args: Args) -> None:
    """Run the rounds."""
    task = get_task(args.task)
    policy = VLAPolicy.from_pretrained(find_pretrained(args.task, "policy"), seed=args.seed)
    world = World.from_pretrained(find_pretrained(args.task, "play"))
    network, autoencoder = world.network.float(), world.autoencoder
    store = EpisodeStore(args.out / "real")
    train_ids = list(task.split_ids("train"))

    def report(name: str) -> None:
        tried = evaluate_policy_on(
            task, policy, "test", args.episodes, deterministic=False, seed=args.seed, progress=False
        )
        print(f"{name}: {tried.rate}", flush=True)

    report("base policy")
    for number in range(1, args.rounds + 1):
        ids = train_ids[(number - 1) * args.real_episodes : number * args.real_episodes]
        env = make_rollout_env(
            "WMPO-Simulated-v0", min(64, args.real_episodes), record_frames=True, task=task
        )
        collect_episodes(env, policy, ids, store, seed=args.seed + number)
        env.close()
        real = store.load()

        settings = WorldModelTraining(
            steps=args.world_steps, batch_size=24, learning_rate=5e-4, recorded=0.0, seed=args.seed + number
        )
        WorldModelTrainer(network, autoencoder, task, real, settings).train()
        world = World(task, network, autoencoder, None, StartFrames.from_episodes(real))
        world.classifier, figures = train_classifier(
            real,
            task,
            steps=args.classifier_steps,
            seed=args.seed,
            imagined=imagined_replays(world, real, seed=args.seed),
        )

        rows = 8 * args.n_groups
        imagined = make_rollout_env("WMPO-Imagined-v0", rows, task=task, world=world)
        model = grpo_from_policy(GRPO, policy, imagined, seed=args.seed + number)
        model.learn(max_iterations=args.iterations)
        imagined.close()
        policy = model.policy
        policy.save_pretrained(args.out / f"policy-{number}")
        f1 = figures["calibration"]["f1"]
        report(f"round {number}, {len(real)} real episodes, classifier F1 {f1:.2f}")


if __name__ == "__main__":
    main(tyro.cli(Args))

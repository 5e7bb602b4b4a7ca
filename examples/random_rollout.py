"""Random actions in the world model and in its paired simulator, side by side.

python examples/random_rollout.py --episodes 2
"""

from dataclasses import dataclass

import gymnasium
import numpy as np
import tyro

import wmpo_gym  # noqa: F401 (registers the environments)


@dataclass
class Args:
    """Options."""

    task: str = "move-block"
    """task of both environments"""
    episodes: int = 4
    """number of episodes in each"""
    seed: int = 0
    """seed of the start states and of the actions"""


def main(args: Args) -> None:
    """Run the episodes and compare the frames."""
    imagined = gymnasium.make("WMPO-Imagined-v0", task=args.task)
    # split=None: the simulator may start from any start state, as the imagined episode does.
    simulated = gymnasium.make("WMPO-Simulated-v0", task=args.task, split=None)
    actions = np.random.default_rng(args.seed)
    for episode in range(args.episodes):
        first, info = imagined.reset(seed=args.seed + episode)
        twin_first, _ = simulated.reset(options={"start_state_id": info["start_state_id"]})
        assert np.array_equal(first["pixels"], twin_first["pixels"])
        print(f"start state {info['start_state_id']}: {info['instruction']}")
        done = False
        while not done:
            action = actions.uniform(-1, 1, imagined.action_space.shape).astype(np.float32)
            obs, _, *ended, info = imagined.step(action)
            twin_obs, _, *twin_ended, twin_info = simulated.step(action)
            difference = np.abs(obs["pixels"].astype(int) - twin_obs["pixels"]).mean()
            print(
                f"  {info['n_frames']} steps, success probability {info['success_prob']:.2f}, "
                f"mean difference to the simulator {difference:.1f} grey levels"
            )
            done = any(ended) or any(twin_ended)
    imagined.close()
    simulated.close()


if __name__ == "__main__":
    main(tyro.cli(Args))

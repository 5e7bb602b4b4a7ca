"""Train a policy for your own Gymnasium environment in imagination: record, learn a world model, optimise.

python examples/custom_task.py --episodes 300 --world-steps 1500 --iterations 15

Random episodes of the environment are recorded, a world model and a success classifier are trained on them,
GRPO optimises a small policy in imagination only, and the policy is evaluated in the environment. This works
with any environment that renders square RGB frames.
"""

from dataclasses import dataclass

import gymnasium
import numpy as np
import tyro
from gymnasium import spaces

from wmpo_gym.algorithms import GRPO
from wmpo_gym.data import Episode
from wmpo_gym.envs import make_sb3_env
from wmpo_gym.reward.training import train_classifier
from wmpo_gym.rollouts.imagined import imagined_replays
from wmpo_gym.statistics import success_rate
from wmpo_gym.tasks import StartStates, Task
from wmpo_gym.world.networks.autoencoder import PixelAutoencoder
from wmpo_gym.world.networks.conv import ConvWorldModel
from wmpo_gym.world.training import WorldModelTrainer, WorldModelTraining
from wmpo_gym.world.world import StartFrames, World

TASK = Task(
    name="reach-square",
    instructions=("move the dot onto the square",),
    horizon=16,
    chunk=4,
    action_dim=2,
    control_hz=10.0,
    image_size=40,
    start_states=StartStates(train=4096, validation=256, test=512, seed=7),
    action_low=(-0.1, -0.1),
    action_high=(0.1, 0.1),
    success_tolerance_px=6.0,
)


@dataclass
class Args:
    """Options."""

    episodes: int = 300
    """recorded episodes of the environment"""
    world_steps: int = 1500
    """training steps of the world model"""
    classifier_steps: int = 300
    """training steps of the success classifier"""
    iterations: int = 15
    """GRPO iterations in imagination"""
    n_groups: int = 16
    """start states per iteration"""
    test_episodes: int = 200
    """episodes of the final test"""
    seed: int = 0
    """random seed"""


class ReachSquare(gymnasium.Env):
    """Placeholder for your environment: one control step per ``step``, a frame as the observation."""

    observation_space = spaces.Box(0, 255, (40, 40, 3), np.uint8)
    action_space = spaces.Box(-1.0, 1.0, (2,), np.float32)

    def reset(self, *, seed=None, options=None):
        """Place the dot and the square at random positions."""
        super().reset(seed=seed)
        self.dot, self.square = self.np_random.uniform(0.15, 0.85, (2, 2))
        return self._render(), {}

    def step(self, action):
        """Move the dot by up to a tenth of the frame."""
        self.dot = np.clip(self.dot + 0.1 * np.asarray(action), 0.05, 0.95)
        success = bool(np.abs(self.dot - self.square).max() < 0.15)
        return self._render(), float(success), success, False, {"is_success": success}

    def _render(self):
        centres = (np.arange(40) + 0.5) / 40
        x, y = np.meshgrid(centres, centres)
        frame = np.full((40, 40, 3), 150, np.uint8)
        frame[np.maximum(abs(x - self.square[0]), abs(y - self.square[1])) < 0.12] = (220, 60, 40)
        frame[np.hypot(x - self.dot[0], y - self.dot[1]) < 0.08] = (30, 30, 30)
        return frame


def run_episode(env, start_state: int, choose) -> Episode:
    """One episode; ``choose(frame)`` gives the next chunk of actions."""
    frames, actions = [env.reset(seed=start_state)[0]], []
    success = False
    while not success and len(actions) < TASK.horizon:
        for action in choose(frames[-1]):
            frame, _, success, _, _ = env.step(action)
            frames.append(frame)
            actions.append(action)
            if success:
                break
    return Episode(
        np.stack(frames), np.stack(actions), success, len(actions), start_state, 0, TASK.instructions[0]
    )


def learn_world(episodes: list[Episode], args: Args) -> World:
    """World model and success classifier from recorded episodes."""
    network = ConvWorldModel.for_task(TASK, args.seed)
    settings = WorldModelTraining(steps=args.world_steps, batch_size=24, seed=args.seed)
    WorldModelTrainer(network, PixelAutoencoder(), TASK, episodes, settings).train()
    world = World(TASK, network, PixelAutoencoder(), None, StartFrames.from_episodes(episodes))
    world.classifier, metrics = train_classifier(
        episodes,
        TASK,
        steps=args.classifier_steps,
        seed=args.seed,
        imagined=imagined_replays(world, episodes, seed=args.seed),
    )
    print(f"classifier on held-out episodes: {metrics['calibration']}")
    return world


def main(args: Args) -> None:
    """Record, learn the world, optimise in it, evaluate in the environment."""
    env, rng = ReachSquare(), np.random.default_rng(args.seed)

    def explore(frame):  # random, with one mean per chunk
        mean = rng.uniform(-1, 1, 2)
        return np.clip(mean + rng.normal(0, 0.3, (TASK.chunk, 2)), -1, 1).astype(np.float32)

    episodes = [run_episode(env, i, explore) for i in TASK.split_ids("train")[: args.episodes]]
    print(f"random episodes: {success_rate([bool(e.success) for e in episodes])}")
    world = learn_world(episodes, args)
    model = GRPO(
        "MultiInputPolicy",
        make_sb3_env("WMPO-Imagined-v0", 8 * args.n_groups, world=world),
        learning_rate=1e-3,
        seed=args.seed,
        verbose=1,
    )

    def act(frame):
        return model.predict({"pixels": frame, "task_id": np.array(0)}, deterministic=False)[0]

    def evaluate():
        ids = TASK.split_ids("test")[: args.test_episodes]
        return success_rate([bool(run_episode(env, i, act).success) for i in ids])

    before = evaluate()
    model.learn(max_iterations=args.iterations)
    print(f"in the environment itself: before {before}, after training in imagination {evaluate()}")


if __name__ == "__main__":
    main(tyro.cli(Args))

"""Train your own torch policy with GRPO: behaviour cloning, GRPO in imagination, test in the simulator.

python examples/custom_policy.py --clone-steps 600 --iterations 10

A policy needs two methods: `sample` draws action chunks and returns the log-probability of each number,
`log_prob` recomputes it under the current weights. This policy is a small convolutional network with a
Gaussian per number.
"""

from dataclasses import dataclass

import numpy as np
import torch
import tyro
from torch import nn

from wmpo_gym.algorithms import GRPO
from wmpo_gym.envs.simulated.scripted import ExpertConfig, record_expert
from wmpo_gym.policies.base import GroupPolicy
from wmpo_gym.rollouts.rollout import evaluate_policy_on
from wmpo_gym.tasks import get_task


@dataclass
class Args:
    """Options."""

    task: str = "move-block"
    """task with a bundled world"""
    demonstrations: int = 200
    """episodes of a scripted expert with errors"""
    clone_steps: int = 600
    """steps of behaviour cloning"""
    iterations: int = 10
    """GRPO iterations in imagination"""
    n_groups: int = 32
    """start states per iteration"""
    episodes: int = 256
    """test start states"""
    seed: int = 0
    """random seed"""


class ConvPolicy(GroupPolicy):
    """Gaussian policy: maps pixels and instruction to the means of the K x D numbers of a chunk."""

    def __init__(self, observation_space, action_space, lr_schedule) -> None:
        super().__init__(observation_space, action_space)
        self.n_numbers = int(np.prod(action_space.shape))
        n_instructions = int(observation_space["task_id"].n)
        self.pixels = nn.Sequential(
            nn.Conv2d(3 + n_instructions, 32, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 64, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(64, 32, 3, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.LazyLinear(256),
            nn.ReLU(),
            nn.Linear(256, self.n_numbers),
        )
        self.log_std = nn.Parameter(torch.full((self.n_numbers,), -1.0))
        self.n_instructions, self._generator = n_instructions, torch.Generator()
        self._mean({k: torch.as_tensor(v)[None] for k, v in observation_space.sample().items()})
        self.optimizer = torch.optim.AdamW(self.parameters(), lr=lr_schedule(1))

    def _mean(self, obs) -> torch.Tensor:
        pixels = obs["pixels"].float() / 127.5 - 1
        if pixels.shape[-1] == 3:  # height, width, channels, as returned by the environment
            pixels = pixels.permute(0, 3, 1, 2)
        one_hot = nn.functional.one_hot(obs["task_id"].long().view(-1), self.n_instructions).float()
        one_hot = one_hot[:, :, None, None].expand(-1, -1, *pixels.shape[2:])
        return self.pixels(torch.cat([pixels, one_hot], dim=1))

    def _distribution(self, obs) -> torch.distributions.Normal:
        return torch.distributions.Normal(self._mean(obs), self.log_std.exp())

    @torch.no_grad()
    def sample(self, obs, deterministic=False):
        """Sampled chunks, log-probability of each number, and the record that `log_prob` evaluates."""
        normal = self._distribution(obs)
        size = self.n_numbers
        noise = self.draw(lambda n: torch.randn(n, size, generator=self._generator), len(normal.mean))
        numbers = normal.mean if deterministic else normal.mean + normal.stddev * noise
        actions = numbers.clamp(-1, 1).view(-1, *self.action_space.shape)
        return actions, normal.log_prob(numbers), numbers

    def log_prob(self, obs, trace):
        """Log-probability and entropy of each number under the current weights."""
        normal = self._distribution(obs)
        return normal.log_prob(trace), normal.entropy()


def clone(policy: ConvPolicy, args: Args) -> None:
    """Behaviour cloning: maximise the likelihood of the demonstrated chunks."""
    task, rng = get_task(args.task), np.random.default_rng(args.seed)
    clumsy = ExpertConfig(aim_offset=(0.0, 0.1))
    ids = task.split_ids("train")[: args.demonstrations]
    chunks = [
        (episode.frames[t], episode.task_id, episode.actions[t : t + task.chunk])
        for episode in record_expert(ids, seed=args.seed, config=clumsy)
        for t in range(episode.n_steps - task.chunk + 1)
    ]
    frames, task_ids, actions = (np.stack(column) for column in zip(*chunks, strict=True))
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3)
    for step in range(args.clone_steps):
        i = rng.integers(len(frames), size=64)
        obs = {"pixels": torch.as_tensor(frames[i]), "task_id": torch.as_tensor(task_ids[i])}
        loss = -policy.log_prob(obs, torch.as_tensor(actions[i]).flatten(1))[0].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 100 == 0:
            print(f"cloning step {step}: {loss.item():.3f} nats per number")
    with torch.no_grad():
        policy.log_std.clamp_(min=-2.0)  # keep some exploration


def main(args: Args) -> None:
    """Clone, improve, compare."""
    torch.manual_seed(args.seed)
    model = GRPO(
        ConvPolicy, "WMPO-Imagined-v0", learning_rate=3e-4, n_groups=args.n_groups, seed=args.seed, verbose=1
    )
    clone(model.policy, args)

    def success():
        return evaluate_policy_on(
            args.task, model.policy, "test", args.episodes, deterministic=False, seed=args.seed
        ).rate

    before = success()
    model.learn(max_iterations=args.iterations)
    print(f"in the simulator: cloned {before}, after imagination {success()}; spent {model.budget}")


if __name__ == "__main__":
    main(tyro.cli(Args))

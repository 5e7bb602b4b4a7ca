"""``wmpo validate``: is this world fit to train in?"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from wmpo_gym.cli.common import (
    check_policy_fits,
    iterate_episodes,
    load_policy,
    load_world,
    policy_and_world,
)
from wmpo_gym.utils.device import Precision, check_precision, resolve_device
from wmpo_gym.utils.io import read_json, write_json_atomic


@dataclass(frozen=True)
class Command:
    """Measure the four gates of a world and write them into its card; exit status 1 if one fails.

    The gates are physics, learnable, faithful and honest.

    Attributes:
        world: Directory, hub id or task name (a bundled world, whose card is not changed). If neither world
            nor policy is given, the bundled ones are used.
        policy: The policy to be trained in this world (directory, hub id or task name); the bundled one for
            the bundled world.
        episodes: Number of start states.
        split: Split of the start states; the world must not have been trained on it.
        learnable: Also measure the gate learnable (GRPO in the simulator, takes a minute or more); otherwise
            its result in the card is kept.
        recordings: Directories of labelled, held-out real episodes; the gates faithful and honest are then
            measured on them, without a simulator.
        seed: Random seed.
        device: Device for world and policy: auto (a GPU if available), cpu, cuda or cuda:1.
        precision: fp32, or bf16 for the policy on a GPU.
    """

    world: str | None = None
    policy: str | None = None
    episodes: int = 128
    split: Literal["train", "validation", "test"] = "validation"
    learnable: bool = False
    recordings: tuple[Path, ...] = ()
    seed: int = 0
    device: str = "auto"
    precision: Precision = "fp32"

    def run(self) -> int:
        """Measure the gates, print them and write them into the card."""
        from wmpo_gym.evaluation.gates import gates_text
        from wmpo_gym.evaluation.validation import measure_learnable, validate

        name, place = policy_and_world(self.policy, self.world)
        device = str(resolve_device(self.device))
        precision = check_precision(self.precision, device)
        world = load_world(place, device=device)
        policy = load_policy(name, seed=self.seed, device=device, precision=precision)
        check_policy_fits(policy, name, world.task)
        gates = validate(
            world,
            policy,
            episodes=self.episodes,
            split=self.split,
            seed=self.seed,
            learnable=partial(measure_learnable, policy, world.task, seed=self.seed)
            if self.learnable
            else None,
            real_episodes=list(iterate_episodes(self.recordings, world.task)) if self.recordings else None,
        )
        print(gates_text(gates))
        if Path(place).is_dir():
            card = Path(place) / "config.json"
            write_json_atomic(card, {**read_json(card), "card": world.card})
            print(f"\nwritten into {card}")
        return int(any(gate["passed"] is False for gate in gates.values()))

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

    Attributes:
        world: Directory, hub id or task name (a bundled world, whose card is not written). Without world
            and policy: the bundled ones.
        policy: The policy that is to be trained in it (directory, hub id or task name); the bundled one
            for the bundled world.
        episodes: Start states to measure on.
        split: Their split; the world must not have been trained on it.
        learnable: Also measure gate 2 (GRPO in the simulator, a minute or more); else the card's is kept.
        recordings: Directories of labelled, held-out real episodes: measure gates 3 and 4 on them, without
            a simulator.
        seed: Decides everything random.
        device: Where world and policy compute; auto is the GPU if there is one.
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
        """Measure, print, note in the card."""
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

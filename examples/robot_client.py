"""Client of a policy server, with a simulated robot.

wmpo serve --policy runs/demo/policy &
python examples/robot_client.py --address 127.0.0.1:8765

Without an address, a server of the bundled base policy is started. For your own robot, replace
`SimulatedRobot`: it returns images and executes actions in your robot's units.
"""

import time
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import tyro

from wmpo_gym.data.statistics import to_unit
from wmpo_gym.envs.simulated import make_simulator
from wmpo_gym.policies.serving import PolicyClient, PolicyServer
from wmpo_gym.statistics import success_rate
from wmpo_gym.tasks import get_task

TASK = get_task("move-block")


@dataclass
class Args:
    """Options."""

    address: str | None = None
    """address of a policy server; by default one is started"""
    episodes: int = 20
    """episodes"""
    real_time: bool = False
    """run at the control rate instead of as fast as possible"""


class SimulatedRobot:
    """Placeholder for your robot."""

    def __init__(self):
        self._simulator = make_simulator(TASK)

    def begin(self, start_state: int) -> str:
        """Reset the scene; returns the instruction."""
        self._simulator.reset(start_state)
        return TASK.instructions[self._simulator.task_id]

    def look(self) -> np.ndarray:
        """The camera image, uint8 (H, W, 3)."""
        return self._simulator.render()

    def move(self, action: np.ndarray) -> bool:
        """Execute one action in metres; returns whether the episode is over."""
        self._simulator.step(to_unit(action, TASK.action_low, TASK.action_high))
        return self._simulator.success


def run_episode(robot: SimulatedRobot, client: PolicyClient, start_state: int, pause: float) -> bool:
    """Get an image, request a chunk and execute it, until success or the time limit."""
    instruction = robot.begin(start_state)
    for _ in range(TASK.n_chunks):
        for action in client.act(robot.look(), instruction):
            if robot.move(action):
                return True
            time.sleep(pause)
    return False


def main(args: Args) -> None:
    """Run episodes and print how many succeeded."""
    with ExitStack() as stack:
        address = args.address
        if address is None:
            from wmpo_gym.policies import VLAPolicy
            from wmpo_gym.world.world import find_pretrained

            policy = VLAPolicy.from_pretrained(find_pretrained(TASK.name, "policy"))
            address = stack.enter_context(PolicyServer(policy, TASK, "127.0.0.1:0")).address
        client, robot = stack.enter_context(PolicyClient(address)), SimulatedRobot()
        described = client.describe()
        print(f"{described['task']}: {described['chunk']} actions at {described['control_hz']:g} Hz")
        pause = 1 / described["control_hz"] if args.real_time else 0.0
        ids = TASK.split_ids("test")[: args.episodes]
        print(f"success {success_rate([run_episode(robot, client, i, pause) for i in ids])}")


if __name__ == "__main__":
    main(tyro.cli(Args))

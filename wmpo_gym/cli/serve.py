"""``wmpo serve``: serve a policy over a local socket."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from wmpo_gym.cli.common import load_policy
from wmpo_gym.data.task_file import find_task
from wmpo_gym.policies.serving import DEFAULT_ADDRESS, PolicyServer, is_loopback
from wmpo_gym.tasks import TASKS, Task


@dataclass(frozen=True)
class Command:
    """Serve a policy over gRPC: a request holds an image, the reply an action chunk. Ctrl-C stops the server.

    Messages are safetensors, never pickles. By default only programs on this machine can connect. There is no
    password, so use another address in a trusted network only.

    Attributes:
        policy: Directory, hub id or task name (the bundled one) of the policy.
        task: Task name, or the directory of an import or a world; by default the task of the policy.
        address: host:port, or unix:/path.
        sample: Sample actions instead of taking the most likely ones.
        device: Device for the policy: cpu, cuda or cuda:1.
        seed: Random seed of the sampling.
    """

    policy: str
    task: str | None = None
    address: str = DEFAULT_ADDRESS
    sample: bool = False
    device: str = "cpu"
    seed: int = 0

    def run(self) -> None:
        """Serve until interrupted."""
        task = find_task(self.task) if self.task else _trained_for(self.policy)
        policy = load_policy(self.policy, seed=self.seed).to(self.device)
        with PolicyServer(policy, task, self.address, deterministic=not self.sample) as server:
            if not is_loopback(self.address):
                print(
                    f"WARNING: whoever reaches {server.address} can use the policy; there is no password.",
                    file=sys.stderr,
                )
            print(
                f"{self.policy} for task {task.name!r} ({task.chunk} actions of {task.action_dim} numbers at "
                f"{task.control_hz:g} Hz) at {server.address}; Ctrl-C stops it",
                flush=True,
            )
            try:
                server.wait()
            except KeyboardInterrupt:
                print("stopped")


def _trained_for(policy: str) -> Task:
    """The task that a policy's card names."""
    from wmpo_gym.policies.weights import read_policy_card
    from wmpo_gym.world.world import find_pretrained

    if policy in TASKS:
        return TASKS[policy]
    meta = read_policy_card(find_pretrained(policy, "policy"))["meta"]
    if "task_spec" in meta:
        return Task.from_dict(meta["task_spec"])
    if "task" in meta:
        return find_task(meta["task"])
    raise ValueError(f"The policy {policy!r} does not say which task it was trained for; give --task.")

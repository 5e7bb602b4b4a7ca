"""What a policy does after its first attempt to take hold has failed (WMPO, §4.3 and Figures 3 to 5)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from wmpo_gym.rollouts.simulated import simulate_full_horizon
from wmpo_gym.statistics import success_rate
from wmpo_gym.tasks import Task, get_task

Contacts = Sequence[str | None]


def first_contact_failed(contacts: Contacts) -> bool:
    """Whether the first attempt ended, by letting go or with the episode, without the object held.

    Args:
        contacts: Per control step ``"held"``, ``"missed"`` (trying, without it) or None (not trying).
    """
    tried = next((i for i, c in enumerate(contacts) if c is not None), None)
    if tried is None:
        return False
    for contact in contacts[tried:]:
        if contact != "missed":
            return contact is None
    return True


def measure_self_correction(
    task: str | Task,
    policy: Any,
    start_state_ids: Sequence[int] | np.ndarray,
    *,
    seed: int = 0,
    deterministic: bool = False,
    variant: str = "nominal",
) -> dict[str, Any]:
    """Count failed first contacts and how many of these episodes still succeed.

    Args:
        task: Task whose simulator has a ``contact``.
        policy: See :func:`~wmpo_gym.rollouts.policy_runner.acting`.
        start_state_ids: Where to start.
        seed: Root seed of the sampling.
        deterministic: Greedy actions.
        variant: Scene variant.

    Returns:
        ``failed_first_contacts`` of ``n`` episodes, ``recovered`` among them, and ``recovery`` as a rate with
        its interval (None if no first contact failed).

    Raises:
        ValueError: If the simulator cannot tell contacts.
    """
    contacts: list[list[str | None]] = [[] for _ in start_state_ids]

    def watch(episode: int, simulator: Any) -> None:
        if not hasattr(simulator, "contact"):
            raise ValueError(
                f"The simulator of {get_task(task).name!r} has no property 'contact', so it cannot be told "
                "whether a first attempt failed."
            )
        contacts[episode].append(simulator.contact)

    _, replay = simulate_full_horizon(
        task, policy, start_state_ids, seed=seed, deterministic=deterministic, variant=variant, watch=watch
    )
    failed = np.array([first_contact_failed(c) for c in contacts])
    return {
        "n": len(contacts),
        "failed_first_contacts": int(failed.sum()),
        "recovered": int(replay.success[failed].sum()),
        "recovery": success_rate(replay.success[failed]).to_dict() if failed.any() else None,
    }

"""Training hints for the bundled tasks: symmetries, initial motion, gradual successes, thresholds.

A :class:`~wmpo_gym.tasks.Task` specifies the task itself; prior knowledge that helps training is kept here,
in one table by task name. A task whose specification differs from the bundled one has no hints.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from wmpo_gym.data.augment import Symmetry
from wmpo_gym.tasks import TASKS, Task, get_task

SymmetryChoice = Literal["task", "none"]


@dataclass(frozen=True)
class TrainingHints:
    """Prior knowledge about a task that training uses.

    Attributes:
        symmetries: Transformations under which episodes remain valid; used as data augmentation for the world
            model and the success classifier.
        motion_px: Tool displacement in observation pixels (columns, rows) per step for action components 0
            and 1 at value 1; initialises the convolutional world model. None if unknown.
        gradual_steps: Control steps before a success whose frames are ambiguous because success is reached
            gradually; excluded from the classifier's training.
        instruction_gap: Minimum drop in log-likelihood of recorded actions, in nats per action token, when
            the policy is given a wrong instruction; see
            :func:`~wmpo_gym.policies.sft.instruction_gap`. None if no threshold is known.
    """

    symmetries: tuple[Symmetry, ...] = ()
    motion_px: tuple[float, float] | None = None
    gradual_steps: int = 0
    instruction_gap: float | None = None


NO_HINTS = TrainingHints()
HINTS: dict[str, TrainingHints] = {
    "move-block": TrainingHints(
        symmetries=(
            # The table is symmetric about its long axis; red and blue differ in the RGB channel order only.
            Symmetry("mirror", action_signs=(1.0, -1.0, 1.0), instruction_order=(0, 1), flip="vertical"),
            Symmetry(
                "swap colours",
                action_signs=(1.0, 1.0, 1.0),
                instruction_order=(1, 0),
                channel_order=(2, 1, 0),
            ),
        ),
        motion_px=(2.6, -2.6),
        instruction_gap=0.2,  # policies that distinguish the colours reach 0.8, others 0.0
    ),
    **dict.fromkeys(
        ("lift", "lift-close", "stack", "square", "stack-three", "three-piece-assembly", "coffee"),
        TrainingHints(gradual_steps=4),
    ),
}


def hints_for(task: str | Task, symmetries: SymmetryChoice = "task") -> TrainingHints:
    """The hints for a bundled task, at its image size; none for any other task.

    Args:
        task: Task or its name.
        symmetries: ``"none"`` leaves the symmetries out.
    """
    task = get_task(task)
    name = task.base_name
    if name not in HINTS or name not in TASKS or task not in (TASKS[name], TASKS[name].at(task.image_size)):
        return NO_HINTS
    hints, scale = HINTS[name], task.image_size / TASKS[name].image_size
    if hints.motion_px is not None:
        hints = replace(hints, motion_px=(hints.motion_px[0] * scale, hints.motion_px[1] * scale))
    return replace(hints, symmetries=()) if symmetries == "none" else hints

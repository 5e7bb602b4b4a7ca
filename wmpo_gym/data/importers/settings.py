"""What is asked of an import, and what came of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

SIDE_UNIT = 8  # networks halve the picture up to three times
DEFAULT_CHUNK, DEFAULT_IMAGE_SIZE = 8, 64


@dataclass(frozen=True)
class SourceOptions:
    """How to read a data set whose layout leaves a choice.

    Attributes:
        camera: Camera to take; needed where there are several.
        action_columns: Columns that together are the action, in this order (LeRobot); found by name if empty.
        state_columns: Columns that together are the robot's state, in this order (LeRobot).
        action_from_state: Use the next step's robot state as the action, for data without actions (LeRobot).
        filter_key: Take only the episodes that the file lists under ``mask/<filter_key>`` (robomimic).
    """

    camera: str | None = None
    action_columns: tuple[str, ...] = ()
    state_columns: tuple[str, ...] = ()
    action_from_state: bool = False
    filter_key: str | None = None


@dataclass(frozen=True)
class ImportSettings(SourceOptions):
    """What to import and as what.

    Attributes:
        camera: Camera to take; needed where there are several.
        action_columns: Columns that together are the action, in this order (LeRobot); found by name if empty.
        state_columns: Columns that together are the robot's state, in this order (LeRobot).
        action_from_state: Use the next step's robot state as the action, for data without actions (LeRobot).
        filter_key: Take only the episodes that the file lists under mask/<filter_key> (robomimic).
        flip: Mirror every picture; vertical for pictures that are upside down, both for half a turn.
        instruction: The sentence, for data without one or in place of theirs.
        missing_instruction: The sentence of those episodes only that have none.
        labels: CSV file with the columns episode and success (1 or 0); an episode is its number or its name.
        failed: Numbers of the episodes that failed, counted from 0 as in the data set.
        assume_success: Episodes whose outcome is not known otherwise are successes (demonstrations).
        assume_failure: Episodes whose outcome is not known otherwise are failures.
        imagined: The episodes come out of a world model, not out of the world.
        skip: Episodes to pass over first.
        episodes: How many to take at most.
        holdout: Share of the start states whose episodes are kept for judging worlds, in [0, 1).
        seed: Chooses them.
        name: Name of the new task; the data set's by default.
        chunk: Actions per decision (K) of the new task, 8 by default.
        horizon: Its episode limit in control steps; the longest episode by default. Longer ones are skipped.
        image_size: Side of its pictures in pixels, a multiple of 8; 64 by default, 256 as published.
        control_hz: Its control steps per second. Data recorded at a multiple of it is thinned out to it.
    """

    flip: Literal["vertical", "horizontal", "both"] | None = None
    instruction: str | None = None
    missing_instruction: str | None = None
    labels: Path | None = None
    failed: tuple[int, ...] = ()
    assume_success: bool = False
    assume_failure: bool = False
    imagined: bool = False
    skip: int = 0
    episodes: int | None = None
    holdout: float = 0.0
    seed: int = 0
    name: str | None = None
    chunk: int | None = None
    horizon: int | None = None
    image_size: int | None = None
    control_hz: float | None = None

    def __post_init__(self) -> None:
        if not 0.0 <= self.holdout < 1.0:
            raise ValueError(f"holdout is a share in [0, 1), got {self.holdout}.")
        for name in ("chunk", "horizon", "image_size", "episodes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")
        if self.skip < 0 or (self.image_size or 0) % SIDE_UNIT:
            raise ValueError(
                f"skip must not be negative and image_size must be a multiple of {SIDE_UNIT}, got "
                f"{self.skip} and {self.image_size}."
            )
        if self.assume_success and self.assume_failure:
            raise ValueError("assume_success and assume_failure contradict each other; give one of them.")
        if self.instruction and self.missing_instruction:
            raise ValueError(
                "instruction replaces every sentence, so that missing_instruction has no effect; give one."
            )
        if self.action_columns and self.action_from_state:
            raise ValueError("action_columns and action_from_state contradict each other; give one of them.")
        if self.control_hz is not None and not self.control_hz > 0:
            raise ValueError(f"control_hz must be positive, got {self.control_hz}.")


DEFAULT_OPTIONS = SourceOptions()


@dataclass
class ImportReport:
    """What became of a data set.

    Attributes:
        source: Where it lay.
        format: One of :data:`~wmpo_gym.data.importers.run.FORMATS`.
        imported: Episodes written, those held out included.
        held_out: Episodes among them that are held out.
        outcomes: How many are ``success``, ``failure`` and ``unlabelled``.
        frames: Pictures written.
        skipped: ``{"episode", "reason"}`` of every one that was not.
        notes: What else a user should know.
    """

    source: str
    format: str
    imported: int = 0
    held_out: int = 0
    outcomes: dict[str, int] = field(default_factory=dict)
    frames: int = 0
    skipped: list[dict[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def skip(self, key: str, reason: object) -> None:
        """Note an episode that was left out."""
        self.skipped.append({"episode": key, "reason": str(reason)})

    def count(self, success: bool | None, frames: int, held: bool) -> None:
        """Note an episode that was written."""
        label = "unlabelled" if success is None else "success" if success else "failure"
        self.imported, self.frames, self.held_out = (
            self.imported + 1,
            self.frames + frames,
            self.held_out + held,
        )
        self.outcomes[label] = self.outcomes.get(label, 0) + 1

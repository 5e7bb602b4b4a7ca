"""What is asked of an import, and what came of it."""

from __future__ import annotations

from dataclasses import dataclass, field

SIDE_UNIT = 8  # networks halve the picture up to three times


@dataclass(frozen=True)
class ImportSettings:
    """What to import and as what.

    Attributes:
        camera: Camera to take; needed where there are several.
        instruction: The sentence, for data without one or in place of theirs.
        assume_success: Episodes whose outcome was not recorded are successes (demonstrations).
        imagined: The episodes come out of a world model, not out of the world.
        skip: Episodes to pass over first.
        episodes: How many to take at most.
        holdout: Share of the start states whose episodes are kept for judging worlds, in [0, 1).
        seed: Chooses them.
        name: Name of the new task; the data set's by default.
        chunk: Actions per decision (K) of the new task.
        horizon: Its episode limit in control steps; the longest episode by default. Longer ones are skipped.
        image_size: Side of its pictures in pixels (256 as published), a multiple of 8.
        control_hz: Its control steps per second, where the data does not say.
    """

    camera: str | None = None
    instruction: str | None = None
    assume_success: bool = False
    imagined: bool = False
    skip: int = 0
    episodes: int | None = None
    holdout: float = 0.0
    seed: int = 0
    name: str | None = None
    chunk: int = 8
    horizon: int | None = None
    image_size: int = 64
    control_hz: float | None = None

    def __post_init__(self) -> None:
        if not 0.0 <= self.holdout < 1.0:
            raise ValueError(f"holdout is a share in [0, 1), got {self.holdout}.")
        for name in ("chunk", "horizon", "image_size", "episodes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")
        if self.skip < 0 or self.image_size % SIDE_UNIT:
            raise ValueError(
                f"skip must not be negative and image_size must be a multiple of {SIDE_UNIT}, got "
                f"{self.skip} and {self.image_size}."
            )
        if self.control_hz is not None and not self.control_hz > 0:
            raise ValueError(f"control_hz must be positive, got {self.control_hz}.")


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

"""``wmpo import``: recordings of others as episodes."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from wmpo_gym.cli.common import Flat
from wmpo_gym.data.importers import ImportReport, ImportSettings, import_dataset
from wmpo_gym.data.task_file import find_task

SHOWN = 10  # skipped episodes to name on the screen; import.json names all


@dataclass(frozen=True)
class Command:
    """Import recordings: robomimic or MimicGen HDF5, a LeRobotDataset v2.1 or v3, tar shards of the release.

    Without --task the data defines a task of its own, with its instructions, length and action limits, that
    the other commands find beside the episodes. Interrupted, the same command goes on where it stopped.

    Attributes:
        source: HDF5 file, directory of a LeRobotDataset, tar shard or directory of shards.
        out: Directory of the episodes; those held out are in held-out/ there.
        task: Import for this task: a known one, or the directory of an earlier import.
        format: Format, where the name does not tell.
        settings: What to take and as what.
    """

    source: Annotated[Path, tyro.conf.Positional]
    out: Path
    task: str | None = None
    format: Literal["robomimic", "lerobot", "wmpo"] | None = None
    settings: Flat[ImportSettings] = field(default_factory=ImportSettings)

    def run(self) -> None:
        """Import and say what came of it."""
        task = find_task(self.task) if self.task else None
        report = import_dataset(self.source, self.out, self.settings, task=task, format=self.format)
        print(_summary(report, self.out))


def _summary(report: ImportReport, out: Path) -> str:
    outcomes = ", ".join(f"{n} {label}" for label, n in sorted(report.outcomes.items()))
    lines = [
        f"{report.imported} episodes ({outcomes}; {report.frames:,} pictures) from {report.source} "
        f"({report.format}) in {out}",
        *[f"{report.held_out} of them held out in {out / 'held-out'}"] * bool(report.held_out),
        *[f"note: {note}" for note in report.notes],
        *[f"skipped {len(report.skipped)}:"] * bool(report.skipped),
        *[f"  {s['episode']}: {s['reason']}" for s in report.skipped[:SHOWN]],
    ]
    if len(report.skipped) > SHOWN:
        lines.append(f"  and {len(report.skipped) - SHOWN} more, see {out / 'import.json'}")
    if report.outcomes.get("unlabelled"):
        lines.append("Unlabelled episodes teach no success classifier; --assume-success if all succeeded.")
    return "\n".join(lines)

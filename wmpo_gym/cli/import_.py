"""``wmpo import``: import recordings in other formats as episodes."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from wmpo_gym.cli.common import Flat
from wmpo_gym.data.importers import ImportReport, ImportSettings, import_dataset
from wmpo_gym.data.task_file import find_task

SHOWN = 10  # skipped episodes listed on the screen; import.json lists all


@dataclass(frozen=True)
class Command:
    """Import robomimic or MimicGen HDF5, a LeRobotDataset v2.1 or v3, or tar shards of the WMPO release.

    Without --task, a new task (instructions, episode length, action limits) is derived from the data and
    stored with the episodes, where the other commands find it. If interrupted, the same command resumes.

    Attributes:
        source: HDF5 file, directory of a LeRobotDataset, tar shard or directory of shards.
        out: Output directory of the episodes; held-out episodes are in its folder held-out.
        task: Import for an existing task: its name, or the directory of an earlier import.
        format: Format of the source, if it cannot be detected.
        settings: Import settings.
    """

    source: Annotated[Path, tyro.conf.Positional]
    out: Path
    task: str | None = None
    format: Literal["robomimic", "lerobot", "wmpo"] | None = None
    settings: Flat[ImportSettings] = field(default_factory=ImportSettings)

    def run(self) -> None:
        """Import the episodes and print a summary."""
        task = find_task(self.task) if self.task else None
        report = import_dataset(self.source, self.out, self.settings, task=task, format=self.format)
        print(_summary(report, self.out))


def _summary(report: ImportReport, out: Path) -> str:
    outcomes = ", ".join(f"{n} {label}" for label, n in sorted(report.outcomes.items()))
    lines = [
        f"{report.imported} episodes ({outcomes}; {report.frames:,} frames) from {report.source} "
        f"({report.format}) in {out}",
        *[f"{report.held_out} of them held out in {out / 'held-out'}"] * bool(report.held_out),
        *[f"note: {note}" for note in report.notes],
        *[f"skipped {len(report.skipped)}:"] * bool(report.skipped),
        *[f"  {s['episode']}: {s['reason']}" for s in report.skipped[:SHOWN]],
    ]
    if len(report.skipped) > SHOWN:
        lines.append(f"  and {len(report.skipped) - SHOWN} more, see {out / 'import.json'}")
    if report.outcomes.get("unlabelled"):
        lines.append(
            "Unlabelled episodes cannot train a success classifier; give --assume-success if all succeeded."
        )
    return "\n".join(lines)

"""``wmpo convert policy``: convert a released OpenVLA-OFT checkpoint to a policy of this package."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Command:
    """Convert a released OpenVLA-OFT checkpoint to a policy; weights keep their precision.

    Attributes:
        task: coffee, square, stack-three or three-piece-assembly.
        source: Hugging Face directory of the checkpoint: config.json, weights, tokenizer, statistics.
        out: Output directory of the policy.
        statistics: File of action statistics; by default SOURCE/dataset_statistics.json.
    """

    task: str
    source: Path
    out: Path
    statistics: Path | None = None

    def run(self) -> None:
        """Convert and report."""
        from wmpo_gym.convert.policy import convert_policy
        from wmpo_gym.convert.released import released_task

        done = convert_policy(self.source, self.out, released_task(self.task), statistics=self.statistics)
        print(done.report())
        print(f'\nVLAPolicy.from_pretrained("{self.out}")')

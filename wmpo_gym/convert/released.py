"""Settings of each released task, every value with its source.

Sources are files of the public WMPO code at commit 09f60b7 unless they say otherwise.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

from wmpo_gym.utils.io import ArtifactError
from wmpo_gym.world.flow import RELEASE_CONTEXT_NOISE

T = TypeVar("T")

NORMALISATIONS: dict[str, tuple[tuple[float, float, float], tuple[float, float, float]]] = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}
"""Mean and standard deviation per RGB channel that the release's scripts give to the classifier: training
takes the extractor's defaults (``half``), rollouts and calibration those of the public checkpoint it was
fine-tuned from (``imagenet``)."""

ACTION_BOUNDS = {"q99": ("q01", "q99"), "bounds": ("min", "max")}
"""Names in the statistics of the physical values of -1 and +1."""


@dataclass(frozen=True)
class Sourced(Generic[T]):
    """A setting and its source."""

    value: T
    source: str


_ROLLOUT = "verl/workers/rollout/robwm_rollout.py"
_SCRIPTS = "examples/mimicgen/TASK/train_wmpo_128.sh"
_INFERENCE = "inference_cfg.py of the world models (confirmed by the authors in issue 7)"


@dataclass(frozen=True)
class ReleasedTask:
    """Settings of a released task.

    Attributes:
        name: Name here.
        release_name: Name in the release's paths and statistics.
        horizon: Control steps.
        prompt: Instruction of the policy.
        threshold: Score from which on the classifier's windows count as success.
        statistics_key: Entry of the policy's ``dataset_statistics.json``.
        action_bounds: Key of :data:`ACTION_BOUNDS`.
        classifier_normalisation: Key of :data:`NORMALISATIONS`.
        chunk: K.
        action_dim: D.
        image_size: Side of the frames in pixels.
        context_frames: H.
        denoising_steps: Euler steps per chunk.
        context_noise: Noise level the network takes its context to have.
        round_timesteps: Round the timestep inputs of the network to bfloat16.
        temperature: Temperature of the policy, for sampling and log-probabilities.
        control_hz: Control steps per second.
    """

    name: str
    release_name: str
    horizon: Sourced[int]
    prompt: Sourced[str]
    threshold: Sourced[float]
    statistics_key: Sourced[str]
    action_bounds: Sourced[str] = Sourced("q99", "verl/utils/vla_utils/openvla_oft/constants.py")
    classifier_normalisation: Sourced[str] = Sourced(
        "imagenet", "verl/workers/fsdp_workers.py takes the processor of the public VideoMAE checkpoint"
    )
    chunk: Sourced[int] = Sourced(8, f"{_SCRIPTS} (action_chunks_len)")
    action_dim: Sourced[int] = Sourced(7, f"{_SCRIPTS} (action_token_len)")
    image_size: Sourced[int] = Sourced(256, f"{_ROLLOUT} (latent_size)")
    context_frames: Sourced[int] = Sourced(4, f"{_ROLLOUT} (queue_len)")
    denoising_steps: Sourced[int] = Sourced(30, _INFERENCE)
    context_noise: Sourced[float] = Sourced(
        RELEASE_CONTEXT_NOISE,
        "dependencies/opensora/opensora/models/stdit/stdit3.py and schedulers/rf/rectified_flow.py",
    )
    round_timesteps: Sourced[bool] = Sourced(
        False, "the release rounds because its network runs in bfloat16; off unless asked for"
    )
    temperature: Sourced[float] = Sourced(1.6, f"{_SCRIPTS} (temperature)")
    control_hz: Sourced[float] = Sourced(20.0, "default of robosuite, on which MimicGen stands")

    def asked(self, **settings: Any) -> ReleasedTask:
        """The same task with other settings; None leaves one as it is."""
        changed = {k: Sourced(v, "asked for") for k, v in settings.items() if v is not None}
        return replace(self, **changed)  # type: ignore[arg-type]

    def to_dict(self) -> dict[str, Any]:
        """Every setting as ``{"value", "source"}``, JSON-able."""
        settings = {f.name: getattr(self, f.name) for f in fields(self)}
        return {
            name: {"value": setting.value, "source": setting.source}
            for name, setting in settings.items()
            if isinstance(setting, Sourced)
        }


def _task(release_name: str, horizon: int, threshold: float, prompt: str | None = None) -> ReleasedTask:
    script = _SCRIPTS.replace("TASK", release_name)
    return ReleasedTask(
        name=release_name.replace("_", "-"),
        release_name=release_name,
        horizon=Sourced(horizon, f"{_ROLLOUT} (max_steps)"),
        threshold=Sourced(threshold, f"{script} (rm_threshold)"),
        prompt=Sourced(prompt or release_name, f"{_ROLLOUT} (task_description), in lower case"),
        statistics_key=Sourced(f"{release_name}_d0_300_demos", f"{script} (unnorm_key)"),
    )


RELEASED_TASKS: dict[str, ReleasedTask] = {
    task.name: task
    for task in (
        _task("coffee", 256, 0.82),
        _task("square", 184, 0.96, "insert the square into the stick"),
        _task("stack_three", 320, 0.66),
        _task("three_piece_assembly", 384, 0.62),
    )
}


def released_task(name: str) -> ReleasedTask:
    """Look a released task up; hyphens and underscores are the same.

    Raises:
        ValueError: If it was not released; the message lists those that were.
    """
    try:
        return RELEASED_TASKS[name.replace("_", "-")]
    except KeyError:
        raise ValueError(f"No released task {name!r}; choose one of {', '.join(RELEASED_TASKS)}.") from None


def check_path_names_task(path: str | Path, task: ReleasedTask) -> None:
    """Refuse a file that lies under the name of another released task; weights do not tell theirs.

    Raises:
        ArtifactError: If one of the last three parts of the path names another task and none names this one.
    """
    # Not resolved: a file of the hub's cache is a link to one without a name.
    parts = [part.replace("-", "_") for part in Path(os.path.abspath(path)).parts[-3:]]

    def named(other: ReleasedTask) -> bool:
        return any(re.search(rf"(?<![a-z]){other.release_name}(?![a-z])", part) for part in parts)

    others = [other.name for other in RELEASED_TASKS.values() if named(other)]
    if others and task.name not in others:
        raise ArtifactError(
            f"{path} belongs to task {others[0]!r} by its name, {task.name!r} was asked for. Give that "
            "task's file, or another --task; if only the name is wrong, rename it."
        )


@dataclass(frozen=True)
class Converted:
    """What was written.

    Attributes:
        directory: Where.
        dropped: Names of tensors that no computation uses and that were left out.
        dropped_parameters: Numbers in them.
        task: Every setting with its source.
    """

    directory: Path
    dropped: list[str]
    dropped_parameters: int
    task: ReleasedTask

    def report(self) -> str:
        """Text summary for the user."""
        lines = [f"written to {self.directory}", "settings and their sources:"]
        for name, setting in self.task.to_dict().items():
            lines.append(f"  {name:<25} {setting['value']!s:<35} {setting['source']}")
        if self.dropped:
            parts = sorted({re.sub(r"\d+", "*", name) for name in self.dropped})
            lines += [
                f"dropped {len(self.dropped)} tensors ({self.dropped_parameters:,} numbers) that no "
                "computation uses:",
                *(f"  {part}" for part in parts),
            ]
        return "\n".join(lines)

"""Four gates that say, before anyone trains in a world, whether a gain in it can be a gain in reality.

1. *physics*: are outcomes stable under tiny differences, so that a good model can predict them at all?
2. *learnable*: does the algorithm climb with unlimited simulated episodes?
3. *faithful*: is the object where it should be, and do actions matter more than noise?
4. *honest*: are claimed successes true, and true successes claimed?

They warn, they do not forbid: prototypes gained below these figures too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from wmpo_gym.envs.simulated import make_simulator
from wmpo_gym.rollouts.simulated import Replay, replay
from wmpo_gym.statistics import Agreement, paired_difference, success_rate
from wmpo_gym.tasks import GATES, Task
from wmpo_gym.utils.io import plain
from wmpo_gym.utils.text import aligned, percent

MAX_FLIPS = 0.10  # share of outcomes that a displacement of DISPLACEMENT_PX may change
DISPLACEMENT_PX = 0.3
MIN_GAIN = 15.0  # points within MAX_ITERATIONS of GRPO on simulated episodes
MAX_ITERATIONS = 15
TOLERANCE_SHARE = 0.25  # of the task's success tolerance
# Share of a recording's change that imagination must explain where objects cannot be located. The bundled
# world explains 0.95 of its policy's episodes, and 0.11 if given another episode's actions.
MIN_EXPLAINED = 0.8
MIN_AGREEMENT = 0.8  # precision and recall; TARGET_AGREEMENT is what to aim at
TARGET_AGREEMENT = 0.9


@dataclass(frozen=True)
class GateResult:
    """One gate.

    Attributes:
        name: One of :data:`GATES`.
        passed: Whether it holds; None where it cannot be measured (no simulator).
        figures: What was measured; rates and differences in their JSON form.
        measured: The figure that decided, in words.
        threshold: What was wanted, in words.
        explanation: What the figure means for training in this world.
    """

    name: str
    passed: bool | None
    figures: dict[str, Any] = field(default_factory=dict)
    measured: str = ""
    threshold: str = ""
    explanation: str = ""

    def to_dict(self) -> dict[str, Any]:
        """JSON form without the name."""
        return plain({k: v for k, v in asdict(self).items() if k != "name"})


def physics_gate(
    task: Task,
    start_state_ids: np.ndarray,
    actions: np.ndarray,
    nominal: Replay,
    *,
    displacement_px: float = DISPLACEMENT_PX,
    variant: str = "nominal",
    seed: int = 0,
    progress: bool = False,
) -> GateResult:
    """Gate 1: replay the same actions with the object shifted a little, in a random direction per episode.

    Args:
        task: The task. Without ``displace`` and ``to_pixels`` in its simulator the gate is not measurable.
        start_state_ids: int (N,).
        actions: float (N, T, D) over the full horizon.
        nominal: The replay of the same actions without a shift.
        displacement_px: Length of the shift in observation pixels.
        variant: Scene variant.
        seed: Seed of the directions.
        progress: Show a progress bar.
    """
    simulator: Any = make_simulator(task, variant)
    if missing := [name for name in ("displace", "to_pixels") if not hasattr(simulator, name)]:
        return GateResult(
            "physics",
            None,
            {},
            "not measurable",
            f"< {100 * MAX_FLIPS:.0f} % of outcomes flip at {displacement_px:g} px",
            f"The simulator of {task.name!r} has no {' and no '.join(missing)}, so that its object cannot be "
            "displaced.",
        )
    pixels_per_metre = float(
        np.linalg.norm(simulator.to_pixels([1.0, 0.0]) - simulator.to_pixels([0.0, 0.0]))
    )
    angles = np.random.default_rng([seed, 4]).uniform(0, 2 * np.pi, len(actions))
    shift = np.stack([np.cos(angles), np.sin(angles)], axis=1) * (displacement_px / pixels_per_metre)
    shifted = replay(task, start_state_ids, actions, variant=variant, displacement=shift, progress=progress)
    flips = success_rate(nominal.success != shifted.success)
    return GateResult(
        "physics",
        flips.value < MAX_FLIPS,
        {"outcome_flips": flips.to_dict(), "success": success_rate(nominal.success).to_dict()},
        f"{100 * flips.value:.1f} % flip",
        f"< {100 * MAX_FLIPS:.0f} % of outcomes flip at {displacement_px:g} px",
        f"With the object shifted by {displacement_px:g} px and the same actions, {100 * flips.value:.1f} % "
        "of the outcomes change. A task whose outcome hangs on less than a model can resolve cannot be "
        "imagined.",
    )


def learnable_gate(before: np.ndarray, after: np.ndarray, iterations: int) -> GateResult:
    """Gate 2: success before and after GRPO on simulated episodes, same start states.

    Args:
        before: Outcomes of the base policy, bool (N,).
        after: Outcomes of the policy trained in the simulator, bool (N,).
        iterations: GRPO iterations that it took.
    """
    gain = paired_difference(before, after)
    return GateResult(
        "learnable",
        gain.points >= MIN_GAIN and iterations <= MAX_ITERATIONS,
        {"gain": gain.to_dict(), "iterations": iterations, "base": success_rate(before).to_dict()},
        f"{gain.points:+.1f} points in {iterations} iterations",
        f"gain ≥ {MIN_GAIN:.0f} points within {MAX_ITERATIONS} iterations",
        f"GRPO with unlimited simulated episodes changed success by {gain.points:+.1f} points in "
        f"{iterations} iterations. What does not climb there cannot climb in imagination.",
    )


def faithful_gate(
    task: Task,
    error_at_success: np.ndarray | None,
    sensitivity: Mapping[str, float],
    *,
    explained_change: float | None = None,
    **figures: Any,
) -> GateResult:
    """Gate 3: object error at the success step, and what actions change against what noise changes.

    Args:
        task: Gives the tolerance.
        error_at_success: Pixels (M,), or None where objects cannot be located.
        sensitivity: From :func:`action_sensitivity`.
        explained_change: Share of the recordings' change that imagination explains, which decides where
            objects cannot be located; None if that was not measured either.
        **figures: Shown too.
    """
    obeys = sensitivity["different_actions"] > sensitivity["different_noise"]
    median, passed = float("nan"), None if obeys else False
    if error_at_success is not None and task.success_tolerance_px is not None:
        limit = TOLERANCE_SHARE * task.success_tolerance_px
        median = float(np.median(error_at_success)) if len(error_at_success) else float("nan")
        passed = bool(median < limit and obeys)
        measured, wanted = f"{median:.2f} px", f"median object error < {limit:.2f} px"
        text = (
            f"At the step that decides, the imagined object is off by at most {median:.2f} px in half of the "
            f"episodes; the task tolerates {task.success_tolerance_px:.2f} px."
        )
    elif explained_change is not None:
        passed = bool(explained_change >= MIN_EXPLAINED and obeys)
        measured, wanted = f"{explained_change:.2f} explained", f"explained change ≥ {MIN_EXPLAINED:g}"
        text = (
            f"Objects cannot be located here; imagination explains {100 * explained_change:.0f} % of what "
            "changes in a recording's pictures, in half of the episodes (a still picture explains nothing)."
        )
    else:
        measured, wanted = "objects not located", "object error"
        text = "Its objects cannot be located, so only the reaction to actions was measured."
    return GateResult(
        "faithful",
        passed,
        {
            "median_object_error_px": median,
            **({} if explained_change is None else {"explained_change": explained_change}),
            **sensitivity,
            **figures,
        },
        f"{measured}; actions {sensitivity['different_actions']:.1f}, "
        f"noise {sensitivity['different_noise']:.1f} grey levels",
        f"{wanted}; actions change more than noise",
        f"{text} Other actions change the frames by {sensitivity['different_actions']:.2f} grey levels on "
        f"average, other noise by {sensitivity['different_noise']:.2f}.",
    )


def honest_gate(agreement: Agreement, judge: str) -> GateResult:
    """Gate 4: precision and recall of claimed successes.

    Args:
        agreement: Claims judged by outcomes.
        judge: Who says what is true, e.g. ``"twin replay"``.
    """
    values = [rate.value for rate in (agreement.precision, agreement.recall)]
    return GateResult(
        "honest",
        bool(min(values) >= MIN_AGREEMENT) if np.isfinite(values).all() else False,
        {
            "precision": agreement.precision.to_dict(),
            "recall": agreement.recall.to_dict(),
            "claimed": agreement.claimed.to_dict(),
            "true": agreement.true.to_dict(),
            "hallucination_gap": agreement.gap.to_dict(),
        },
        f"precision {percent(values[0])}, recall {percent(values[1])}",
        f"precision and recall ≥ {MIN_AGREEMENT:g} (target {TARGET_AGREEMENT:g})",
        f"Judged by {judge} of the same full-horizon actions, {agreement.precision} of the claimed successes "
        f"are true and {agreement.recall} of the true ones are claimed.",
    )


def gates_text(gates: Mapping[str, Mapping[str, Any]]) -> str:
    """The gates as a table to print, each with its explanation."""
    words = {True: "passed", False: "FAILED", None: "not measurable"}
    rows: list[tuple[str, ...]] = [("gate", "", "measured", "wanted")]
    for name in GATES:
        gate = gates.get(name)
        if gate:
            rows.append((name, words[gate["passed"]], gate.get("measured", ""), gate["threshold"]))
        else:
            rows.append((name, "not measured", "", ""))
    notes = [f"{name}: {gates[name]['explanation']}" for name in GATES if name in gates]
    return aligned(rows) + "\n\n" + "\n".join(notes)

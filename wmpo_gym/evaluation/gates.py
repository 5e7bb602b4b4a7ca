"""Four validation gates that check, before training in a world model, whether gains in it can transfer.

1. *physics*: are outcomes stable under tiny perturbations, so that a model can predict them at all?
2. *learnable*: does the algorithm improve the policy with unlimited simulated episodes?
3. *faithful*: are objects where they should be, and do actions matter more than noise?
4. *honest*: are predicted successes true (precision), and true successes predicted (recall)?

A failed gate is a warning, not an error: training can help below these thresholds too.
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
# Share of a recording's change that imagination must explain if objects cannot be located.
MIN_EXPLAINED = 0.8
MIN_AGREEMENT = 0.8  # minimum of precision and recall; TARGET_AGREEMENT is the recommended value
TARGET_AGREEMENT = 0.9


@dataclass(frozen=True)
class GateResult:
    """Result of one validation gate.

    Attributes:
        name: One of :data:`GATES`.
        passed: Whether the gate passed; None if it cannot be measured (no simulator).
        figures: Measured metrics; rates and differences in their JSON form.
        measured: The deciding metric as text.
        threshold: The required value as text.
        explanation: Meaning of the result for training in this world.
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
    """Gate 1: replay the same actions with the object slightly shifted in a random direction per episode.

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
        "of the outcomes change. A world model cannot predict outcomes that depend on differences below its "
        "resolution.",
    )


def learnable_gate(before: np.ndarray, after: np.ndarray, iterations: int) -> GateResult:
    """Gate 2: success before and after GRPO on simulated episodes, same start states.

    Args:
        before: Outcomes of the base policy, bool (N,).
        after: Outcomes of the policy trained in the simulator, bool (N,).
        iterations: Number of GRPO iterations.
    """
    gain = paired_difference(before, after)
    return GateResult(
        "learnable",
        gain.points >= MIN_GAIN and iterations <= MAX_ITERATIONS,
        {"gain": gain.to_dict(), "iterations": iterations, "base": success_rate(before).to_dict()},
        f"{gain.points:+.1f} points in {iterations} iterations",
        f"gain ≥ {MIN_GAIN:.0f} points within {MAX_ITERATIONS} iterations",
        f"GRPO with unlimited simulated episodes changed success by {gain.points:+.1f} points in "
        f"{iterations} iterations. Without an improvement there, none can be expected in imagination.",
    )


def faithful_gate(
    task: Task,
    error_at_success: np.ndarray | None,
    sensitivity: Mapping[str, float],
    *,
    explained_change: float | None = None,
    **figures: Any,
) -> GateResult:
    """Gate 3: object error at the success step, and sensitivity to actions compared with noise.

    Args:
        task: The task; defines the success tolerance.
        error_at_success: Pixels (M,), or None if objects cannot be located.
        sensitivity: Result of :func:`action_sensitivity`.
        explained_change: Share of the recordings' change that imagination explains, the criterion if objects
            cannot be located; None if it was not measured.
        **figures: Further metrics to report.
    """
    obeys = sensitivity["different_actions"] > sensitivity["different_noise"]
    median, passed = float("nan"), None if obeys else False
    if error_at_success is not None and task.success_tolerance_px is not None:
        limit = TOLERANCE_SHARE * task.success_tolerance_px
        median = float(np.median(error_at_success)) if len(error_at_success) else float("nan")
        passed = bool(median < limit and obeys)
        measured, wanted = f"{median:.2f} px", f"median object error < {limit:.2f} px"
        text = (
            f"At the deciding step, the median error of the imagined object is {median:.2f} px; the task's "
            f"tolerance is {task.success_tolerance_px:.2f} px."
        )
    elif explained_change is not None:
        passed = bool(explained_change >= MIN_EXPLAINED and obeys)
        measured, wanted = f"{explained_change:.2f} explained", f"explained change ≥ {MIN_EXPLAINED:g}"
        text = (
            f"Objects cannot be located here; imagination explains {100 * explained_change:.0f} % of the "
            "change in a recording's frames (median; repeating the first frame explains 0 %)."
        )
    else:
        measured, wanted = "objects not located", "object error"
        text = "Objects cannot be located, so only the sensitivity to actions was measured."
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
        agreement: Predicted successes compared with true outcomes.
        judge: Source of the true outcomes, e.g. ``"twin replay"``.
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
        f"Compared with {judge} of the same full-horizon actions, {agreement.precision} of the predicted "
        f"successes are true and {agreement.recall} of the true successes are predicted.",
    )


def gates_text(gates: Mapping[str, Mapping[str, Any]]) -> str:
    """The gates as a text table, followed by their explanations."""
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

"""``results.json``: the metrics of a run, and the table printed from it.

Schema: ``success`` and ``imagined_success`` are fractions, ``points`` and ``hallucination_gap`` are
percentage points, ``ci95`` has the unit of its metric::

    {"base": {"success", "n", "ci95"}, "wmpo": {...}, "paired_gain": {"points", "ci95", "n"},
     "imagined_success", "hallucination_gap", "agreement": {...},
     "greedy": {"base": {...}, "wmpo": {...}, "paired_gain": {...}},
     "budget": {...}, "seconds": {...}, ...}
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, TextIO

from numpy.typing import ArrayLike

from wmpo_gym.statistics import Agreement, paired_difference, success_rate
from wmpo_gym.utils.io import plain
from wmpo_gym.utils.text import aligned, percent, show_number, show_points, show_rate

DIGITS = 4  # decimals of fractions, i.e. a hundredth of a percentage point


def comparison(base: ArrayLike, wmpo: ArrayLike) -> dict[str, Any]:
    """Compare two policies on the same start states.

    Args:
        base: Outcomes of the base policy, booleans (N,).
        wmpo: Outcomes of the optimised policy on the same start states in the same order.

    Returns:
        The entries ``base``, ``wmpo`` and ``paired_gain`` of the schema.
    """
    gain = paired_difference(base, wmpo)
    return {
        "base": success_rate(base).to_dict(),
        "wmpo": success_rate(wmpo).to_dict(),
        "paired_gain": gain.to_dict(),
    }


def build_results(
    *,
    base: ArrayLike,
    wmpo: ArrayLike,
    agreement: Agreement,
    budget: Mapping[str, Any],
    seconds: Mapping[str, float],
    greedy: tuple[ArrayLike, ArrayLike] | None = None,
    **extra: Any,
) -> dict[str, Any]:
    """Build the results of a run in the schema above, rounded.

    Args:
        base: Sampled (T = 1) outcomes of the base policy in the simulator.
        wmpo: Sampled outcomes of the optimised policy on the same start states.
        agreement: The optimised policy's imagined successes compared with a replay in the simulator
            (:func:`~wmpo_gym.evaluation.twin.twin_agreement`).
        budget: Budget spent (:class:`~wmpo_gym.envs.ledger.Ledger` as a mapping).
        seconds: Wall-clock seconds per stage; ``total`` is added unless given.
        greedy: Greedy outcomes of the base and the optimised policy.
        **extra: Further JSON-able entries, added under their names.

    Raises:
        ValueError: If an extra entry would overwrite one of the schema.
    """
    results: dict[str, Any] = comparison(base, wmpo) | {
        "imagined_success": agreement.claimed.value,
        "hallucination_gap": agreement.gap.points,
        "agreement": agreement.to_dict(),
        "budget": dict(budget),
        "seconds": {"total": sum(seconds.values())} | dict(seconds),
    }
    if greedy is not None:
        results["greedy"] = comparison(*greedy)
    clash = sorted(results.keys() & extra.keys())
    if clash:
        raise ValueError(
            f"{', '.join(clash)} belong to the results schema; choose other names for extra entries."
        )
    return _rounded(plain(results)) | plain(extra)


def table(results: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Rows of the results table as text; the first row is the header."""
    rows: list[tuple[str, ...]] = [("", "base", "WMPO", "gain (paired, 95 %)", "n")]
    for name, part in (("sampled, T = 1", results), ("greedy", results.get("greedy"))):
        if part:
            base, wmpo = part["base"], part["wmpo"]
            rows.append(
                (name, show_rate(base), show_rate(wmpo), show_points(part["paired_gain"]), str(wmpo["n"]))
            )
    return rows


def agreement_rows(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Agreement of imagination and simulator, as (label, text) rows."""
    rows = [
        ("imagined success", percent(results["imagined_success"])),
        ("hallucination gap", show_points({"points": results["hallucination_gap"], "ci95": None})),
    ]
    agreement = results.get("agreement") or {}
    if "gap" in agreement:
        rows[1] = ("hallucination gap", show_points(agreement["gap"]))
    rows += [(f"twin replay {k}", show_rate(agreement[k])) for k in ("precision", "recall") if k in agreement]
    return rows


def print_table(results: Mapping[str, Any], file: TextIO | None = None) -> None:
    """Print the results table; every number is read from ``results``.

    Args:
        results: Result of :func:`build_results`, or as read from the file.
        file: Where to print, stdout by default.
    """
    out = file or sys.stdout
    print(aligned(table(results)), file=out)
    spent = [(f"budget: {k.replace('_', ' ')}", show_number(v)) for k, v in results["budget"].items()]
    times = [(f"seconds: {k.replace('_', ' ')}", show_number(v)) for k, v in results["seconds"].items()]
    print("\n" + aligned([*agreement_rows(results), *spent, *times]), file=out)


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_rounded(v) for v in value]
    return round(value, DIGITS) if isinstance(value, float) else value

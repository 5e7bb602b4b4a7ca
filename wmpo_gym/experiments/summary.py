"""Statistics, table and plots of an experiment, from its results alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import trim_mean

from wmpo_gym.experiments.plan import WITHOUT_BUDGET
from wmpo_gym.statistics import success_rate
from wmpo_gym.utils.io import write_file_atomic
from wmpo_gym.utils.text import show_points, show_rate

RESAMPLES = 2000
Scores = list[np.ndarray]  # per seed, bool outcomes (N,) on the same start states


def outcomes(
    results: Mapping[str, Any], method: str, budget: int, variant: str, greedy: bool
) -> dict[int, np.ndarray]:
    """Outcomes of a method, one array per seed in order."""
    cells = [
        c for c in results["cells"] if (c["method"], c["budget"], c["variant"]) == (method, budget, variant)
    ]
    return {
        c["seed"]: np.array(list((c["greedy"] if greedy else c)["outcomes"])) == "1"
        for c in sorted(cells, key=lambda c: c["seed"])
    }


def bootstrap(
    statistic: Callable[..., float], *scores: Scores, seed: int = 0, resamples: int = RESAMPLES
) -> tuple[float, float, float]:
    """A statistic with its 95 % interval, by resampling start states within every seed.

    Seeds are the strata: each keeps its weight, and methods that are compared are resampled together, start
    state by start state (Agarwal et al. 2021 resample runs within tasks in the same way).

    Args:
        statistic: Function of one argument per method, each a list of outcomes per seed.
        *scores: Outcomes of the methods.
        seed: Seed of the resampling.
        resamples: Number of bootstrap resamples.

    Returns:
        The statistic and the ends of its interval.
    """
    rng, values = np.random.default_rng(seed), np.empty(resamples)
    for i in range(resamples):
        picks = [rng.integers(len(s), size=len(s)) for s in scores[0]]
        values[i] = statistic(*([s[p] for s, p in zip(method, picks, strict=True)] for method in scores))
    low, high = np.percentile(values, [2.5, 97.5])
    return statistic(*scores), float(low), float(high)


def mean_success(scores: Scores) -> float:
    """Mean over seeds of the success rate, a fraction."""
    return float(np.mean([s.mean() for s in scores]))


def interquartile_mean(scores: Scores) -> float:
    """Mean of the middle half of the seeds' success rates; of fewer than four seeds, of all."""
    return float(trim_mean([s.mean() for s in scores], 0.25))


def gain(first: Scores, second: Scores) -> float:
    """Mean over seeds of the difference in success rate, second minus first, in percentage points."""
    return 100 * (mean_success(second) - mean_success(first))


def probability_of_improvement(first: Scores, second: Scores) -> float:
    """Probability that a run of the second beats a run of the first, over all seed pairs; ties count half."""
    a, b = (np.array([s.mean() for s in scores]) for scores in (first, second))
    return float(np.mean((b[:, None] > a) + 0.5 * (b[:, None] == a)))


def summarise(results: Mapping[str, Any], greedy: bool = False) -> list[dict[str, Any]]:
    """One row per method, budget and variant: its rate, and WMPO's lead over it at the smallest budget.

    Where a plan has no ``wmpo``, its lead is that of ``wmpo-lifelong``.

    Returns:
        Dictionaries with ``method``, ``budget``, ``variant``, ``seeds``, ``n`` (start states per seed),
        ``success``, ``iqm`` (fractions with ``ci95``), and over the seeds WMPO was run with too ``wmpo_lead``
        (points) and ``wmpo_better`` (probability of improvement), both with ``ci95``.
    """
    plan, rows = results["plan"], []
    ours_is = ("wmpo" if "wmpo" in plan["methods"] else "wmpo-lifelong", min(plan["budgets"]))
    for variant in plan["variants"]:
        ours = outcomes(results, *ours_is, variant, greedy)
        for method in plan["methods"]:
            for budget in (0,) if method in WITHOUT_BUDGET else plan["budgets"]:
                by_seed = outcomes(results, method, budget, variant, greedy)
                if not by_seed:
                    continue
                scores = list(by_seed.values())
                row = {
                    "method": method,
                    "budget": budget,
                    "variant": variant,
                    "seeds": list(by_seed),
                    "n": len(scores[0]),
                    "success": _with_interval("success", bootstrap(mean_success, scores)),
                    "iqm": _with_interval("iqm", bootstrap(interquartile_mean, scores)),
                }
                common = [seed for seed in by_seed if seed in ours]
                if common and (method, budget) != ours_is:
                    pair = [by_seed[s] for s in common], [ours[s] for s in common]
                    row["wmpo_lead"] = _with_interval("points", bootstrap(gain, *pair))
                    row["wmpo_better"] = _with_interval(
                        "probability", bootstrap(probability_of_improvement, *pair)
                    )
                rows.append(row)
    return rows


def _with_interval(name: str, values: tuple[float, float, float]) -> dict[str, Any]:
    return {name: values[0], "ci95": list(values[1:])}


def markdown_table(results: Mapping[str, Any]) -> str:
    """Markdown table for sampled and greedy actions, with the training data of every method."""
    rows = summarise(results)
    lines = [
        "| method | real episodes | scene | seeds | success, sampled | greedy "
        "| WMPO's lead, sampled | greedy | WMPO better |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row, greedy in zip(rows, summarise(results, greedy=True), strict=True):
        leads = " | ".join(show_points(r["wmpo_lead"]) if "wmpo_lead" in r else "–" for r in (row, greedy))
        better = f"{row['wmpo_better']['probability']:.2f}" if "wmpo_better" in row else "–"
        shown = " | ".join(_percent(r["success"]) for r in (row, greedy))
        lines.append(
            f"| {row['method']} | {row['budget']} | {row['variant']} | {len(row['seeds'])} | {shown} "
            f"| {leads} | {better} |"
        )
    first = rows[0]
    lines += [
        "",
        f"{first['n']} test start states per seed; intervals by resampling start states within seeds. "
        f"*WMPO's lead*: of WMPO with {min(results['plan']['budgets'])} real episodes, on the same start "
        "states and seeds. *WMPO better*: probability of improvement over all pairs of seeds, sampled.",
        "",
        *_behaviour(results),
        *(f"- `{method}` saw: {what}." for method, what in results["saw"].items()),
    ]
    return "\n".join(lines) + "\n"


def _behaviour(results: Mapping[str, Any]) -> list[str]:
    """Lines on episode length and self-correction, if measured."""
    if not results["plan"].get("self_correction"):
        return []
    lines = [
        "| method | real episodes | steps to success | first contact failed | of these, recovered |",
        "|---|---|---|---|---|",
    ]
    plan = results["plan"]
    for method in plan["methods"]:
        for budget in (0,) if method in WITHOUT_BUDGET else plan["budgets"]:
            cells = [c for c in results["cells"] if (c["method"], c["budget"]) == (method, budget)]
            n, failed, recovered = (
                sum(c["self_correction"][key] for c in cells)
                for key in ("n", "failed_first_contacts", "recovered")
            )
            lengths = [c["length_of_successes"] for c in cells if c["length_of_successes"] is not None]
            steps = f"{np.mean(lengths):.1f}" if lengths else "–"
            rates = " | ".join(
                show_rate(success_rate(np.arange(of) < k).to_dict())
                for k, of in ((failed, n), (recovered, failed))
            )
            lines.append(f"| {method} | {budget} | {steps} | {rates} |")
    return [*lines, ""]


def _percent(rate: Mapping[str, Any]) -> str:
    low, high = rate["ci95"]
    return f"{100 * rate['success']:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"


def write_summary(results: Mapping[str, Any], out: str | Path) -> None:
    """Write ``table.md`` and the plots ``success-by-*.svg`` into a directory."""
    out = Path(out)
    with write_file_atomic(out / "table.md") as file:
        file.write_text(markdown_table(results), encoding="utf-8")
    costs: dict[str, Callable[[Mapping[str, Any]], float]] = {
        "real-episodes": lambda cell: cell["ledger"]["real_episodes"],
        "imagined-frames": lambda cell: cell["ledger"]["imagined_frames"],
        "seconds": lambda cell: cell["seconds"],
    }
    for name, cost in costs.items():
        _plot(results, cost, name.replace("-", " "), out / f"success-by-{name}.svg")


def _plot(
    results: Mapping[str, Any], cost: Callable[[Mapping[str, Any]], float], label: str, file: Path
) -> None:
    """Plot the mean success of every method against its cost, with one point per seed."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    variant = results["plan"]["variants"][0]
    spent = [cost(c) for c in results["cells"] if c["variant"] == variant]
    for method in results["plan"]["methods"]:
        cells = [c for c in results["cells"] if c["method"] == method and c["variant"] == variant]
        budgets: Sequence[int] = sorted({c["budget"] for c in cells})
        groups = [[c for c in cells if c["budget"] == b] for b in budgets]
        x = [np.mean([cost(c) for c in group]) for group in groups]
        (line,) = axes.plot(
            x, [np.mean([c["success"] for c in group]) for group in groups], marker="o", label=method
        )
        axes.scatter(
            [cost(c) for c in cells], [c["success"] for c in cells], color=line.get_color(), s=8, alpha=0.5
        )
    axes.set(xlabel=label, ylabel=f"success in the simulator ({variant})", ylim=(0, 1))
    # Logarithmic above the smallest positive cost, since there is no data below it.
    least = min((x for x in spent if x > 0), default=1.0)
    axes.set_xscale("symlog", linthresh=least)
    axes.set_xticks([0, *(x for x in axes.get_xticks() if x > least / 2)])
    axes.set_xlim(0, 1.3 * max(*spent, 1.0))
    figure.legend(loc="outside right upper", fontsize="small")
    with rc_context({"svg.hashsalt": label}):  # the same file from the same results
        figure.savefig(file, metadata={"Date": None})

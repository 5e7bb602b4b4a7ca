"""``report.html``: self-contained HTML report with the results and the cost of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from wmpo_gym.report import charts
from wmpo_gym.report.results import agreement_rows, table
from wmpo_gym.report.style import CSS
from wmpo_gym.rollouts.protocol import EvalProtocol
from wmpo_gym.tasks import Task
from wmpo_gym.utils.io import write_file_atomic
from wmpo_gym.utils.text import percent, show_number, show_points, show_rate
from wmpo_gym.utils.video import data_uri, encode_video, side_by_side

if TYPE_CHECKING:
    from wmpo_gym.evaluation.twin import TwinComparison

# Plotted columns of a learning curve: key, legend, whether it is imagined.
CURVES = (
    ("imagined_success", "imagined (predicted by the classifier)", True),
    ("twin_success", "same actions replayed in the simulator", False),
    ("simulated_success", "policy in the simulator, sampled", False),
    ("simulated_success_greedy", "policy in the simulator, greedy", False),
)
POLICIES = (("base", "base policy"), ("wmpo", "after WMPO"))
HOLD_SECONDS = 1.0
VERDICTS = {True: ("good", "✓ passed"), False: ("bad", "✗ failed"), None: ("", "not measurable")}


@dataclass(frozen=True)
class Clip:
    """Frames of the same actions in imagination and in the paired simulator.

    Attributes:
        imagined: uint8 (T1, H, W, 3).
        twin: uint8 (T2, H, W, 3), simulated frames.
        claimed: Whether the classifier predicted success in imagination.
        true: Whether the episode succeeded in the simulator.
        caption: Instruction and start state.
    """

    imagined: np.ndarray
    twin: np.ndarray
    claimed: bool
    true: bool
    caption: str = ""


@dataclass
class Report:
    """Contents of a report; empty parts are omitted.

    Attributes:
        title: Heading.
        results: Result of :func:`~wmpo_gym.report.results.build_results`, or as read from the file.
        curve: One mapping per evaluation during training: ``iteration`` and any of :data:`CURVES`, each a
            fraction or a rate entry ``{"success", "ci95", "n"}``.
        gates: Result of :func:`~wmpo_gym.evaluation.validation.validate`.
        clips: Side-by-side videos.
        command: Command line of the run.
        protocol: Evaluation protocol of the results.
        notes: Warnings shown at the top, e.g. that a gate failed.
        control_hz: Frame rate of the videos in Hz.
    """

    title: str
    results: Mapping[str, Any]
    curve: Sequence[Mapping[str, Any]] = ()
    gates: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    clips: Sequence[Clip] = ()
    command: str = ""
    protocol: EvalProtocol | None = None
    notes: Sequence[str] = ()
    control_hz: float = 10.0


def choose_clips(comparison: TwinComparison, task: Task, n: int = 8) -> list[Clip]:
    """Select clips that alternate between the four kinds of outcome, so that false predictions are shown too.

    Args:
        comparison: Comparison with recorded frames (``record_frames=True``); otherwise the result is empty.
        task: The task; provides the instructions.
        n: Maximum number of clips.
    """
    imagined, twin, instructions = comparison.imagined, comparison.replay, task.instructions
    if twin.frames is None:
        return []
    kinds = [
        np.flatnonzero((imagined.claimed == claim) & (twin.success == truth))
        for claim, truth in ((True, True), (True, False), (False, True), (False, False))
    ]
    turns = [int(kind[i]) for i in range(len(twin.success)) for kind in kinds if i < len(kind)]
    return [
        Clip(
            imagined=imagined.frames[i],
            twin=twin.frames[i],
            claimed=bool(imagined.claimed[i]),
            true=bool(twin.success[i]),
            caption=f"“{instructions[imagined.task_ids[i]]}”, start state {comparison.start_state_ids[i]}",
        )
        for i in turns[:n]
    ]


def write_report(path: str | Path, report: Report) -> Path:
    """Write the report as one HTML file.

    Args:
        path: The ``.html`` file.
        report: The contents.

    Returns:
        The path.
    """
    path = Path(path)
    with write_file_atomic(path) as temporary:
        temporary.write_text(render_report(report), encoding="utf-8")
    return path


def render_report(report: Report) -> str:
    """Render the report as HTML text without external references."""
    sections = [
        _headline(report),
        _notes(report.notes),
        _section("Success in the simulator", _results(report.results)),
        _section("Learning curve", _curve(report.curve) if report.curve else ""),
        _section("Same actions, imagined and simulated", _clips(report.clips, report.control_hz)),
        _section("Validation of the world model", gates_table(report.gates)),
        _section("Cost", _costs(report.results)),
        _section("Evaluation protocol", _protocol(report)),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(report.title)}</title><style>{CSS}</style></head>\n<body><main>"
        + "\n".join(s for s in sections if s)
        + "</main></body></html>\n"
    )


def gates_table(gates: Mapping[str, Mapping[str, Any]]) -> str:
    """HTML table of the four gates; empty text without gates."""
    if not gates:
        return ""
    rows = []
    for name, gate in gates.items():
        style, verdict = VERDICTS[gate["passed"]]
        figures = "<br>".join(
            f"{escape(k.replace('_', ' '))}: {escape(_figure(v))}" for k, v in gate["figures"].items()
        )
        rows.append(
            f'<tr><td><b>{escape(name)}</b></td><td class="mark {style}">{verdict}</td><td>{figures}</td>'
            f"<td>{escape(gate['threshold'])}</td></tr>"
            f'<tr><td></td><td class="note" colspan="3">{escape(gate["explanation"])}</td></tr>'
        )
    head = "<tr><th>gate</th><th></th><th>measured</th><th>required</th></tr>"
    return f'<div class="card scroll"><table>{head}{"".join(rows)}</table></div>'


def _headline(report: Report) -> str:
    r = report.results
    gain, gap = r["paired_gain"], r["hallucination_gap"]
    tone = "good" if gain["ci95"][0] > 0 else "bad" if gain["ci95"][1] < 0 else ""
    tiles = [
        ("base policy", percent(r["base"]["success"]), _range(r["base"]), ""),
        ("after WMPO", percent(r["wmpo"]["success"]), _range(r["wmpo"]), tone),
        (
            "paired gain",
            f"{gain['points']:+.1f}",
            f"[{gain['ci95'][0]:+.1f}, {gain['ci95'][1]:+.1f}] points",
            tone,
        ),
        (
            "hallucination gap",
            "–" if gap is None else f"{gap:+.1f}",
            "imagined minus simulated, points",
            "",
        ),
    ]
    cells = "".join(
        f'<div class="tile"><div class="name">{name}</div><div class="value {style}">{value}</div>'
        f'<div class="detail">{escape(detail)}</div></div>'
        for name, value, detail, style in tiles
    )
    lead = (
        "A policy was optimised in a learned world model and evaluated in the simulator on held-out start "
        "states. Every rate is given with its 95 % confidence interval."
    )
    header = f'<header><h1>{escape(report.title)}</h1><p class="lead">{lead}</p></header>'
    return f'{header}<div class="tiles">{cells}</div>'


def _range(rate: Mapping[str, Any]) -> str:
    low, high = rate["ci95"]
    return f"[{100 * low:.1f}, {100 * high:.1f}] %, n\u00a0=\u00a0{rate['n']}"


def _notes(notes: Sequence[str]) -> str:
    return "".join(f'<p class="card warning">{escape(note)}</p>' for note in notes)


def _section(title: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{body}</section>" if body else ""


def _html_table(rows: Sequence[Sequence[str]], header: bool = False) -> str:
    cells = [[escape(c) for c in row] for row in rows]
    head = "<tr>" + "".join(f"<th>{c}</th>" for c in cells.pop(0)) + "</tr>" if header else ""
    body = "".join("<tr>" + "".join(f"<td>{c}</td>" for c in row) + "</tr>" for row in cells)
    return f'<div class="card scroll"><table>{head}{body}</table></div>'


def _results(results: Mapping[str, Any]) -> str:
    rows = []
    for name, part in (("T = 1", results), ("greedy", results.get("greedy") or {})):
        rows += [(f"{who}, {name}", part[key], i) for i, (key, who) in enumerate(POLICIES) if key in part]
    entries = results.get("others") or {}
    rows += [(name, rate, len(POLICIES)) for name, rate in entries.items()]
    chart = charts.interval_chart(
        [(n, r["success"], *r["ci95"], c) for n, r, c in rows], title="Success rates"
    )
    others = [(name, f"{show_rate(rate)} (n = {rate['n']})") for name, rate in entries.items()]
    return (
        f'<div class="card">{chart}</div><br>'
        + _html_table(table(results), header=True)
        + ("<br>" + _html_table(others) if others else "")
        + "<h2>Agreement of imagination and simulator</h2>"
        + _html_table(agreement_rows(results))
    )


def _curve(curve: Sequence[Mapping[str, Any]]) -> str:
    series = []
    for key, name, imagined in CURVES:
        rows = [(row["iteration"], row[key]) for row in curve if row.get(key) is not None]
        if not rows:
            continue
        rates = [v if isinstance(v, Mapping) else {"success": v, "ci95": None} for _, v in rows]
        ends = [r["ci95"] or (r["success"], r["success"]) for r in rates]
        banded = any(r["ci95"] for r in rates)
        series.append(
            charts.Series(
                name, [x for x, _ in rows], [r["success"] for r in rates],
                low=[e[0] for e in ends] if banded else None, high=[e[1] for e in ends] if banded else None,
                dashed=imagined,
            )
        )  # fmt: skip
    chart = charts.line_chart(series, x_label="GRPO iteration", y_label="success", title="Learning curve")
    return f'<div class="card">{chart}</div>'


def _clips(clips: Sequence[Clip], fps: float) -> str:
    if not clips:
        return ""
    figures = []
    for clip in clips:
        frames = side_by_side(clip.imagined, clip.twin)
        # Hold the last frame for a moment before the video loops.
        frames = np.concatenate([frames, frames[-1:].repeat(round(HOLD_SECONDS * fps), axis=0)])
        uri = data_uri(*encode_video(frames, fps=fps))
        tone = "good" if clip.claimed == clip.true else "bad"
        verdict = f"imagined: {_outcome(clip.claimed)} · simulated: {_outcome(clip.true)}"
        figures.append(
            '<figure class="card"><div class="halves"><span>imagined</span><span>simulated</span></div>'
            f'<video src="{uri}" autoplay loop muted playsinline></video>'
            f'<figcaption>{escape(clip.caption)}<br><span class="{tone}">{verdict}</span>'
            "</figcaption></figure>"
        )
    return f'<div class="clips">{"".join(figures)}</div>'


def _outcome(success: bool) -> str:
    return "success" if success else "failure"


def _costs(results: Mapping[str, Any]) -> str:
    budget = [(k.replace("_", " "), _figure(v)) for k, v in results["budget"].items()]
    seconds = [(f"{k.replace('_', ' ')}", f"{_figure(v)} s") for k, v in results["seconds"].items()]
    parts = [_html_table(rows) for rows in (budget, seconds) if rows]
    return "<br>".join(parts)


def _figure(value: Any) -> str:
    """Readable text of a metric: a rate, a difference, a number or a list of them."""
    if isinstance(value, Mapping):
        if "points" in value:
            return show_points(value)
        if "success" in value:
            return f"{percent(value['success'])} {_range(value)}"
        return ", ".join(f"{k.replace('_', ' ')} {_figure(v)}" for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(_figure(v) for v in value)
    if isinstance(value, float) and not value.is_integer() and abs(value) < 10:
        return f"{value:.3g}"
    return show_number(value)


def _protocol(report: Report) -> str:
    command = f"<p>Command</p><pre>{escape(report.command)}</pre>" if report.command else ""
    if report.protocol is None:
        return command
    p = report.protocol
    ids = p.start_state_ids
    rows = [
        ("task", str(p.task.get("name"))),
        ("environment", p.env_id + ("" if p.world is None else f" ({p.world})")),
        ("variant", p.variant),
        ("start states", f"{p.episodes} of split “{p.split}”, ids {min(ids)}–{max(ids)}" if ids else "none"),
        ("seed", str(p.seed)),
        ("versions", ", ".join(f"{k} {v}" for k, v in p.versions.items())),
    ]
    return command + _html_table(rows)

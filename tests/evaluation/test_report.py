"""The report is one self-contained file that shows every part and escapes what it is given."""

from __future__ import annotations

import html.parser
import io
import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from wmpo_gym.report import charts
from wmpo_gym.report.report import Clip, Report, choose_clips, render_report, write_report
from wmpo_gym.report.results import build_results, print_table
from wmpo_gym.rollouts.protocol import EvalProtocol
from wmpo_gym.statistics import precision_recall, success_rate


def outcomes(share: float, n: int = 512, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random(n) < share


@pytest.fixture(scope="module")
def report() -> Report:
    frames = np.random.default_rng(0).integers(0, 255, (6, 32, 32, 3), dtype=np.uint8)
    results = build_results(
        base=outcomes(0.46),
        wmpo=outcomes(0.84, seed=1),
        agreement=precision_recall(outcomes(0.9, 128), outcomes(0.85, 128)),
        budget={"real_episodes": 128, "imagined_frames": 654321},
        seconds={"collect": 4.0, "grpo": 110.0},
        greedy=(outcomes(0.53), outcomes(0.9, seed=1)),
        others={"GRPO on 128 real episodes": success_rate(outcomes(0.55)).to_dict()},
    )
    gates = {
        name: {
            "passed": passed,
            "figures": {"flips": 0.008},
            "threshold": "< 10 %",
            "explanation": "Because.",
        }
        for name, passed in (("physics", True), ("learnable", None), ("faithful", True), ("honest", False))
    }
    curve = [
        {
            "iteration": i,
            "imagined_success": 0.4 + 0.05 * i,
            "twin_success": success_rate(outcomes(0.4 + 0.04 * i, 64)).to_dict(),
        }
        for i in range(11)
    ]
    return Report(
        title="move-block <demo>",
        results=results,
        curve=curve,
        gates=gates,
        clips=[
            Clip(frames, frames[:4], True, False, "move the red block & wait"),
            Clip(frames, frames, True, True),
        ],
        command="wmpo demo --seed 0",
        protocol=EvalProtocol.make("move-block", "test", 512, seed=0, deterministic=False),
        notes=["Gate <honest> failed."],
    )


def test_clips_show_every_kind_of_outcome(fetch, twin_world):
    pytest.importorskip("mujoco")
    from wmpo_gym.evaluation.twin import compare_with_twin
    from wmpo_gym.tasks import get_task

    task = get_task("move-block")
    ids = list(task.split_ids("validation")[:4])
    c = compare_with_twin(twin_world(ids), fetch(0.0), ids, deterministic=True)
    c.imagined.claimed_step[:], c.replay.success_step[:] = [5, 5, -1, 5], [7, 7, 7, -1]
    clips = choose_clips(c, task, 3)
    assert [(clip.claimed, clip.true) for clip in clips] == [(True, True), (True, False), (False, True)]
    assert (clips[1].imagined == c.imagined.frames[3]).all() and str(ids[3]) in clips[1].caption
    c.replay.frames = None
    assert choose_clips(c, task) == []


class Collector(html.parser.HTMLParser):
    """Tags, references and balance of a page."""

    VOID = {"meta", "br"}

    def __init__(self) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.tags: list[str] = []
        self.references: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.references += [v for k, v in attrs if k in ("src", "href", "poster", "xlink:href")]
        if tag not in self.VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag


def test_report_is_self_contained_and_balanced(report):
    text = render_report(report)
    page = Collector()
    page.feed(text)
    assert page.stack == []
    assert page.references and all(r.startswith("data:video/") for r in page.references)
    assert not re.search(r"https?://|@import|url\(", text)
    assert page.tags.count("video") == 2 and page.tags.count("svg") == 2
    assert "script" not in page.tags


def test_report_escapes_and_shows_every_part(report):
    text = render_report(report)
    assert (
        "<demo>" not in text and "move-block &lt;demo&gt;" in text and "Gate &lt;honest&gt; failed." in text
    )
    for needle in (
        "physics",
        "not measurable",
        "✗ failed",
        "wmpo demo --seed 0",
        "654,321",
        "GRPO on 128 real",
        "simulated: failure",
    ):
        assert needle in text, needle


def test_report_and_printed_table_agree(report):
    out = io.StringIO()
    print_table(report.results, out)
    text = render_report(report)
    for number in re.findall(r"[+\d]\d*\.\d %|[+-]\d+\.\d points \[.*?\]", out.getvalue()):
        assert number in text, number


def test_bare_results_still_make_a_report(tmp_path, report):
    path = write_report(tmp_path / "report.html", Report("bare", report.results))
    assert "Learning curve" not in path.read_text(encoding="utf-8")


def test_videos_in_the_report_can_be_decoded(report):
    import base64

    av = pytest.importorskip("av")
    uri = re.search(r'src="data:video/\w+;base64,([^"]+)"', render_report(report)).group(1)
    with av.open(io.BytesIO(base64.b64decode(uri))) as container:
        shapes = [f.to_ndarray(format="rgb24").shape for f in container.decode(video=0)]
    assert shapes == [(192, 396, 3)] * (6 + 10)  # the last frame stands for a second


def svg(text: str) -> ElementTree.Element:
    return ElementTree.fromstring(re.search(r"<svg.*</svg>", text, re.S).group(0))


def test_chart_puts_points_where_the_numbers_are():
    text = charts.line_chart(
        [charts.Series("a & b", [0, 10], [0.0, 1.0])], x_label="i", y_label="success", title="t"
    )
    circles = [e for e in svg(text).iter() if e.tag.endswith("circle")]
    assert [float(c.get("cx")) for c in circles] == [charts.LEFT, charts.WIDTH - charts.RIGHT]
    assert [float(c.get("cy")) for c in circles] == [charts.HEIGHT - charts.BOTTOM, charts.TOP]
    assert "a &amp; b" in text


def test_chart_leaves_undefined_points_out():
    s = charts.Series("a", [0, 1, 2], [0.2, float("nan"), None])
    assert len(s.points()) == 1
    assert "Nothing was recorded" in charts.line_chart(
        [charts.Series("a", [0], [None])], x_label="", y_label="", title=""
    )


@pytest.mark.parametrize(
    ("low", "high", "ticks"), [(0, 20, [0, 5, 10, 15, 20]), (0, 8, list(range(9))), (3, 3, [3])]
)
def test_ticks_are_round(low, high, ticks):
    assert charts._ticks(low, high) == ticks

"""The report's style sheet: one column, readable on a phone, light and dark."""

# ruff: noqa: E501 (one rule per line)

CSS = """
:root { color-scheme: light dark;
  --bg: #fbfbfa; --card: #ffffff; --ink: #1d2126; --soft: #5c6570; --line: #e2e4e8; --good: #14804a; --bad: #b3261e;
  --c0: #2563c9; --c1: #d9480f; --c2: #0f8a6c; --c3: #7c3aed; }
@media (prefers-color-scheme: dark) { :root {
  --bg: #14171b; --card: #1c2026; --ink: #e8eaed; --soft: #9aa4af; --line: #313740; --good: #5bd08f; --bad: #ff8a80;
  --c0: #7eb0ff; --c1: #ff9a62; --c2: #4fd1ae; --c3: #b79bff; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--bg); color: var(--ink); line-height: 1.55;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 2rem 1rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .3rem; letter-spacing: -.01em; }
h2 { font-size: 1.15rem; margin: 2.4rem 0 .6rem; }
p { margin: .4rem 0 .8rem; }
.lead, .note, .axis-title, figcaption, footer { color: var(--soft); }
.note, .axis-title, figcaption, footer { font-size: .88rem; }
.axis-title { margin: 0 0 .2rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(10.5rem, 1fr)); gap: .8rem; margin: 1.4rem 0; }
.tile, .card { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 1rem; }
.tile .name { color: var(--soft); font-size: .85rem; }
.tile .value { font-size: 1.75rem; font-weight: 650; letter-spacing: -.02em; font-variant-numeric: tabular-nums; white-space: nowrap; }
.tile .detail { color: var(--soft); font-size: .82rem; font-variant-numeric: tabular-nums; }
.good { color: var(--good); } .bad { color: var(--bad); }
.warning { border-left: 4px solid var(--bad); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .94rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .5rem .9rem .5rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--soft); font-weight: 550; font-size: .85rem; }
tr:last-child td { border-bottom: 0; }
.mark { font-weight: 650; white-space: nowrap; }
svg.chart { width: 100%; height: auto; display: block; font-size: 13px; overflow: visible; }
@media (max-width: 36rem) { svg.chart { font-size: 20px; } }
svg text { fill: var(--soft); font-family: inherit; } svg text.label { fill: var(--ink); }
.grid { stroke: var(--line); stroke-width: 1; }
.s0 { --c: var(--c0); } .s1 { --c: var(--c1); } .s2 { --c: var(--c2); } .s3 { --c: var(--c3); }
.line { fill: none; stroke: var(--c); stroke-width: 2.2; stroke-linejoin: round; }
.line.dashed { stroke-dasharray: 6 5; }
.dot { fill: var(--c); } .band { fill: var(--c); opacity: .14; }
.whisker { stroke: var(--c); stroke-width: 4; stroke-linecap: round; opacity: .45; }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: .3rem 1.2rem; margin: .4rem 0 0; padding: 0; font-size: .88rem; }
.key { display: inline-block; width: 1.3rem; height: 0; border-top: 3px solid var(--c); margin-right: .45rem; vertical-align: middle; }
.key.dashed { border-top-style: dashed; }
.clips { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 18rem), 1fr)); gap: 1rem; }
figure { margin: 0; padding: .7rem; }
figure video { width: 100%; display: block; border-radius: 6px; image-rendering: pixelated; }
.halves { display: grid; grid-template-columns: 1fr 1fr; font-size: .82rem; color: var(--soft); text-align: center; margin-bottom: .3rem; }
figcaption { margin-top: .45rem; }
pre { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .8rem; overflow-x: auto; font-size: .85rem; }
details > summary { cursor: pointer; color: var(--soft); }
footer { margin-top: 3rem; border-top: 1px solid var(--line); padding-top: 1rem; }
"""

"""The README's picture: one decode step on the clock, drawn from the ``timeline.json`` of runs.

``python -m moesim.analysis.picture picture.svg --layers 8 --step 8 RUN RUN`` draws a panel a run.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from moesim.errors import UsageError

WIDTH, LEFT, RIGHT, TOP = 960, 92, 24, 62
LANE, GAP, PANEL = 30, 8, 132
WHAT = {
    "dense": "attention, router, output head",
    "expert": "expert",
    "stall": "stall",
    "demand": "demand load",
    "prefetch": "prefetch",
}
STYLE = """<style>
text { font: 13px system-ui, sans-serif; fill: #3b4252 }
.small { font-size: 11px; fill: #6b7280 }
.name { font-weight: 600 }
.card { fill: #fbfbfd; stroke: #d8dce3 }
.lane { fill: #eef0f4 }
.grid { stroke: #c9ced8; stroke-dasharray: 2 3 }
.dense { fill: #8d99ae } .expert { fill: #2a9d8f } .stall { fill: #f6c9c5 }
.demand { fill: #e76f51 } .prefetch { fill: #4878d0 }
@media (prefers-color-scheme: dark) {
text { fill: #d8dee9 } .small { fill: #9aa4b5 }
.card { fill: #161b22; stroke: #343b46 } .lane { fill: #222934 } .grid { stroke: #46505f }
.dense { fill: #77839a } .expert { fill: #35b3a4 } .stall { fill: #5d3a3c }
.demand { fill: #e98467 } .prefetch { fill: #6f97e3 }
}
</style>"""

Span = dict[str, Any]


def draw(runs: Sequence[Path], layers: int, step: int) -> str:
    """An SVG with a panel for each run; all share one scale.

    Parameters
    ----------
    runs : folders that ``moesim replay --timeline --out`` wrote.
    layers : MoE layers of one forward pass.
    step : number of the forward pass, from 0.

    Raises
    ------
    UsageError
        If a folder holds no timeline, or the run has no such step.
    """
    panels = [(_policy(run), *_window(run, layers, step)) for run in runs]
    longest = max(end - start for _, _, start, end in panels)
    scale = (WIDTH - LEFT - RIGHT) / longest
    height = TOP + PANEL * len(panels) + 40
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img">',
        f"<title>One decode step of {layers} layers under {len(panels)} policies</title>",
        STYLE,
        f'<rect class="card" x="1" y="1" width="{WIDTH - 2}" height="{height - 2}" rx="8"/>',
        *_legend(),
    ]
    parts += _axis(longest, scale, height - 34)
    for index, (name, spans, start, end) in enumerate(panels):
        top = TOP + PANEL * index
        parts += _panel(name, spans, start, end, top, scale, layers)
    return "\n".join([*parts, "</svg>", ""])


def _policy(run: Path) -> str:
    return str(json.loads((run / "summary.json").read_text())["policy"])


def _window(run: Path, layers: int, step: int) -> tuple[list[Span], float, float]:
    """The spans of one step, its start and its end in microseconds."""
    path = run / "timeline.json"
    try:
        events = json.loads(path.read_text())["traceEvents"]
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}; replay with --timeline") from None
    spans = [event for event in events if event["ph"] == "X"]
    begins = [s["ts"] for s in spans if s["cat"] == "dense"]
    # A step has a dense part for each layer, and one for the output head where that takes time.
    parts = len(begins) // int(json.loads((run / "summary.json").read_text())["steps"])
    if parts not in (layers, layers + 1) or len(begins) <= (step + 1) * parts:
        raise UsageError(f"{path}: has no step {step} of {layers} layers with one after it")
    start, end = begins[step * parts], begins[(step + 1) * parts]
    inside = [s for s in spans if s["ts"] + s["dur"] > start and s["ts"] < end]
    return inside, start, end


def _panel(
    name: str, spans: list[Span], start: float, end: float, top: int, scale: float, layers: int
) -> Iterator[str]:
    compute, link = top + 26, top + 26 + LANE + GAP
    width = (end - start) * scale
    yield f'<text class="name" x="{LEFT}" y="{top + 8}">{name}</text>'
    yield f'<text x="20" y="{compute + 20}">compute</text>'
    yield f'<text x="20" y="{link + 20}">link</text>'
    yield f'<text class="small" x="20" y="{compute - 4}">layer</text>'
    for y in (compute, link):
        yield _rect("lane", LEFT, y, width)
    for span in spans:
        first = max(span["ts"], start) - start
        last = min(span["ts"] + span["dur"], end) - start
        y = link if span["cat"] in ("demand", "prefetch") else compute
        yield _rect(span["cat"], LEFT + first * scale, y, (last - first) * scale, span["name"])
    gates = [s["ts"] - start for s in spans if s["cat"] == "dense" and s["ts"] >= start]
    for layer, at in enumerate(gates[:layers]):
        x = LEFT + at * scale
        yield f'<text class="small" x="{x:.1f}" y="{compute - 4}">{layer}</text>'
    text = f"{(end - start) / 1000:.2f} ms"
    yield f'<text class="name" x="{LEFT + width:.1f}" y="{top + 8}" text-anchor="end">{text}</text>'


def _rect(kind: str, x: float, y: float, width: float, title: str = "") -> str:
    told = f"<title>{title}</title>" if title else ""
    # A hairline between neighbours, so that two loads in a row read as two.
    shown = max(width - 0.6, 0.4) if title else width
    shape = f'x="{x:.1f}" y="{y}" width="{shown:.1f}" height="{LANE}"'
    return f'<rect class="{kind}" {shape}>{told}</rect>'


def _legend() -> Iterator[str]:
    x = LEFT
    for kind, text in WHAT.items():
        yield f'<rect class="{kind}" x="{x}" y="18" width="14" height="14" rx="2"/>'
        yield f'<text x="{x + 20}" y="30">{text}</text>'
        x += 48 + 7 * len(text)


def _axis(longest: float, scale: float, top: int) -> Iterator[str]:
    tick = 250.0
    for number in range(int(longest / tick) + 1):
        x = LEFT + number * tick * scale
        yield f'<path class="grid" d="M{x:.1f} {TOP + 18}V{top}"/>'
        label = f"{number * tick / 1000:g} ms"
        yield f'<text class="small" x="{x:.1f}" y="{top + 16}" text-anchor="middle">{label}</text>'


def main(argv: Sequence[str] | None = None) -> int:
    """Write the picture; 0."""
    parser = argparse.ArgumentParser(description="Draw one decode step of some runs.")
    parser.add_argument("target", type=Path, help="SVG file to write")
    parser.add_argument("runs", type=Path, nargs="+", help="run folders with a timeline")
    parser.add_argument("--layers", type=int, required=True)
    parser.add_argument("--step", type=int, required=True)
    args = parser.parse_args(argv)
    args.target.write_text(draw(args.runs, args.layers, args.step), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

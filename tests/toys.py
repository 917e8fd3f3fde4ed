"""Small cases written out by hand, and the logs of their runs in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from moesim.types import DROPPED
from tests.harness import Run
from tests.strategies import Case, full_meta, machine, rows_of, small_model

Pass = Sequence[int]
"""The expert that a token chooses in each layer."""


def toy(
    requests: Sequence[Sequence[Pass]],
    experts: int,
    slots: int,
    *,
    ahead: Sequence[Sequence[Sequence[Sequence[int]]]] | None = None,
    load_ns: int = 1,
    dense_ns: int = 2,
) -> Case:
    """Requests that decode, one expert a layer and token; every expert weighs one byte.

    ahead : for each request, pass and layer, what is predicted of the next layer. By default the
        truth is predicted one to three layers ahead.
    """
    layers = len(requests[0][0])
    rows = []
    for number, passes in enumerate(requests):
        blocks = [[(la, [[e]]) for la, e in enumerate(one)] for one in passes]
        places = [(one, la) for one in passes for la in range(layers)]
        truths = {d: [_later(one, la, d) for one, la in places] for d in (1, 2, 3)}
        if ahead is not None:
            truths[1] = [list(named) for one in ahead[number] for named in one]
        known = {d: np.array(t, np.uint16) for d, t in truths.items()}
        rows.append(replace(rows_of(number, blocks, wide=experts), ahead=known))
    meta = full_meta(small_model(layers, experts, 1, [1] * layers))
    widths = {d: a.shape[1] for d, a in rows[0].ahead.items()}
    return Case(
        replace(meta, ahead=widths),
        tuple(rows),
        machine(bytes_per_s=1e9 / load_ns, dense_ns=dense_ns),
        (slots,),
        past=tuple(rows[:1]),
    )


def _later(one: Pass, layer: int, distance: int) -> list[int]:
    return [one[layer + distance] if layer + distance < len(one) else DROPPED]


def told(made: Run, experts: int) -> list[str]:
    """One line for each layer event: what it demanded and how it was found (hit, late, miss), then
    what was sent (* for a prefetch), evicted (-), dropped (!) or cancelled (x) until the next."""
    lines = ["start"]
    for what, _, first, *rest in made.records:
        if what == "gate":
            asked = [f"{_name(w // 4, experts)}{'hlm'[w % 4]}" for w in rest[3:]]
            lines.append(" ".join(asked) + ":")
        elif what in ("issue", "evict", "drop", "cancel"):
            sign = {"evict": "-", "drop": "!", "cancel": "x"}.get(
                what, "*" if rest[-1:] == [1] else "+"
            )
            lines[-1] += f" {sign}{_name(first, experts)}"
    return lines


def _name(key: int, experts: int) -> str:
    return f"{'abcdefgh'[key // experts]}{key % experts}"

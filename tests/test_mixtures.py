"""Everything that may be asked for at once, in both engines.

Arrivals and schedulers, several devices or tiers, write-back, precisions, a KV cache that takes
its share, either allocator: what the fast engine answers is what the reference answers (law I8),
or both refuse with the same words.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from moesim.engine.fast import FastEngine
from moesim.engine.reference import ReferenceEngine
from moesim.errors import NotRunError, UsageError
from moesim.placement import PLACEMENTS
from moesim.profile import Interconnect
from moesim.summary import summarise
from moesim.types import Needs
from tests.harness import drive, inputs_of, spec_of
from tests.serving_cases import Scene, scenes, setup_for
from tests.strategies import Case, specs, spread, tiered
from tests.test_devices import ALL
from tests.test_hobbit import two_precisions

LINKS = (None, Interconnect(math.inf, 0), Interconnect(0.5e9, 3))


@st.composite
def on_devices(draw: st.DrawFn, case: Case) -> Case:
    meta, how = case.meta, draw(st.sampled_from(PLACEMENTS))
    devices = draw(st.integers(1, min(3, meta.layers if how == "layers" else meta.experts)))
    by_layer = draw(st.booleans())
    least = devices * (1 if by_layer else 2)
    case = spread(
        case,
        devices,
        how,
        slots=draw(st.integers(least, max(least, meta.experts * (1 if by_layer else meta.layers)))),
        by_layer=by_layer,
        host=draw(st.sampled_from([math.inf, 1.0, 1.5, 2.0])),
        between=draw(st.sampled_from(LINKS)),
    )
    room = draw(st.integers(0, 60)) if case.options.share_kv else 0
    return replace(case, capacity_bytes=tuple(c + room for c in case.capacity_bytes))


@st.composite
def mixtures(draw: st.DrawFn) -> Scene:
    scene = draw(scenes(kv=draw(st.booleans())))
    case = scene.case
    if draw(st.integers(0, 2)) == 0:
        case = two_precisions(case)
    options = {"flat": draw(st.booleans())}
    if draw(st.booleans()):
        case = draw(tiered(case))
    else:
        case = draw(st.one_of(st.just(case), on_devices(case)))
        options["write_back"] = draw(st.sampled_from(["", "duplex", "serial"]))
        options["allocator"] = draw(st.sampled_from(["bytes", "slots"]))
    return replace(scene, case=replace(case, options=replace(case.options, **options)))


def outcome(engine_of: Callable[..., Any], scene: Scene, name: str, *more: str) -> dict[str, Any]:
    """All that a run answers; or why there is none."""
    try:
        setup = setup_for(scene, name, *more)
        engine = engine_of(setup)
        tally = drive(engine, scene.works(inputs_of(setup.policy)))
    except (NotRunError, UsageError) as error:
        return {"refused": str(error)}
    told = {key: value for key, value in asdict(tally).items() if key != "before"}
    return {**told, "lanes": sorted(engine.spans or []), "summary": summarise(tally, scene.warm)}


@given(
    mixtures(),
    st.one_of(specs(), specs(ALL), st.tuples(st.sampled_from(ALL), st.just(()))),
    st.booleans(),
)
def test_i8_holds_whatever_is_mixed(
    scene: Scene, spec: tuple[str, tuple[str, ...]], asked: bool
) -> None:
    name, more = spec
    if scene.timed and Needs.FUTURE in spec_of(name, *more).build().needs:
        return
    fast = outcome(partial(FastEngine, asked=True) if asked else FastEngine, scene, name, *more)
    reference = outcome(ReferenceEngine, scene, name, *more)
    differ = {k for k in {**fast, **reference} if fast.get(k) != reference.get(k)}
    assert not differ, {k: (fast.get(k), reference.get(k)) for k in differ}

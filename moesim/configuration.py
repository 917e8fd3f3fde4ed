"""One configuration of one run, from names to objects: for hosts that serve on lanes.

``Configuration`` reads the trace's metadata, resolves policy and capacity, refuses by name what
cannot run, and makes what a ``Server`` is given. A finished run's manifest gives it back.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from moesim.capacity import parse_capacity
from moesim.costs import make_costs
from moesim.degrade import Allowed, lacking, parse_allowed, rested_on
from moesim.diagnose import diagnostics
from moesim.errors import MoesimError, NotRunError, PolicyError, TraceError, UsageError
from moesim.past import Past, Share, parse_split, past_facts, requests_of
from moesim.profile import HardwareProfile, ModelProfile
from moesim.protocol import Policy, SeatPolicy, World, has_mixed, initially
from moesim.registry import PolicySpec, resolve
from moesim.result import source_digest
from moesim.serving import Setup
from moesim.shape import all_precisions, decode_from, expert_norms, fitting, shaped
from moesim.traces.check import check_request
from moesim.traces.reader import Columns, TraceReader
from moesim.traces.schema import TraceMeta
from moesim.types import ExpertId, IntArray, Needs
from moesim.workload import (
    Inputs,
    KnownFuture,
    StaticBatch,
    Work,
    layer_events,
    prepare,
    timeless_steps,
)


@dataclass(frozen=True, slots=True)
class Request:
    """What to run. Names are those of the command line."""

    trace: Path
    hardware: HardwareProfile
    policy: str = "lru"
    capacity: str = "25%"
    settings: tuple[str, ...] = ()
    scope: str = "global"
    costs: ModelProfile | None = None
    batch: int = 1
    chunk_tokens: int = 0
    initial: str = ""
    initial_experts: tuple[ExpertId, ...] = ()
    calibration: Path | None = None
    share: Share | None = None
    allowed: Allowed = field(default_factory=Allowed)
    limit: int | None = None
    seed: int = 0


class Configuration:
    """A request with everything looked up.

    Raises
    ------
    MoesimError
        For a mistake in the request; NotRunError for a policy that needs what the trace lacks.
    """

    def __init__(self, request: Request) -> None:
        self.request = request
        self.meta = _meta(request.trace)
        if not self.meta.requests:
            raise TraceError(f"{request.trace}: holds no requests; record or convert some")
        self.model = shaped(request.costs or self.meta.model, self.meta)
        self.costs = make_costs(self.model, request.hardware)
        self.spec: PolicySpec = resolve([request.policy], request.settings)[0]
        self.capacity = parse_capacity(
            request.capacity, request.scope, self.model.expert_bytes_table(), self.meta.experts
        )
        with blaming(self.spec):
            policy = self.spec.build()
        distances = policy.prefetch.distances if isinstance(policy, SeatPolicy) else (1,)
        self.inputs = Inputs(policy.needs, distances, request.allowed)
        self.lossy = policy.lossy
        self.mixed = has_mixed(policy)
        self._refuse()

    @classmethod
    def of_run(
        cls, manifest: Mapping[str, Any], trace: Path, calibration: Path | None
    ) -> Configuration:
        """The configuration of a finished run, on its trace.

        Raises
        ------
        UsageError
            If ``trace`` or ``calibration`` is not what the run was made with.
        """
        digest = _meta(trace).digest
        if digest != manifest["trace"]:
            raise UsageError(
                f"--trace {trace}: is not the trace of the run (digest {digest[:12]}, the run's is "
                f"{manifest['trace'][:12]}); name the one that it was made from"
            )
        made = cls(
            Request(
                trace=trace,
                hardware=HardwareProfile.from_dict(manifest["hardware"]),
                policy=manifest["policy"]["name"],
                capacity=manifest["capacity_as_typed"],
                settings=tuple(manifest["set"]),
                scope=manifest["capacity"]["scope"],
                costs=ModelProfile.from_dict(manifest["model"]),
                batch=manifest["batch"],
                chunk_tokens=manifest["chunk_tokens"],
                initial=manifest["initial"],
                initial_experts=tuple(manifest["initial_experts"]),
                calibration=calibration,
                share=Share(parse_split(manifest["split"])) if manifest["split"] else None,
                allowed=parse_allowed(manifest["allowed"]),
                limit=manifest["limit"],
                seed=manifest["seed"],
            )
        )
        wanted = manifest["calibration"]
        if wanted and (calibration is None or _meta(calibration).digest != wanted):
            raise UsageError(
                "--calibration: the run was made with another trace; name the same one"
            )
        return made

    # ---- what a server is given ------------------------------------------------------------------

    def build(self) -> Policy:
        """A fresh policy."""
        return self.spec.build()

    def world(self) -> World:
        """The world, with all that the policy declared."""
        needs = self.inputs.needs
        return World(
            layers=self.meta.layers,
            experts=self.meta.experts,
            top_k=self.meta.top_k,
            expert_bytes=all_precisions(self.model),
            capacity_bytes=self.capacity.capacity_bytes,
            scope=self.capacity.scope,
            decode_from=decode_from(self.meta),
            seed=self.request.seed,
            costs=self.costs,
            calibration=self.uses if Needs.CALIBRATION in needs else None,
            expert_norms=expert_norms(self.meta),
            past=self._past() if Needs.PAST in needs else None,
            future=self.future if Needs.FUTURE in needs else None,
            expert_parts=self.meta.expert_parts,
        )

    def setup(self, policy: Policy) -> Setup:
        """What a server of this configuration is given."""
        world = self.world()
        initial, charged = self._initial(world)
        return Setup(
            policy=policy,
            world=world,
            costs=self.costs,
            scheduler=self.scheduler(),
            initial=initial,
            initial_charged=charged,
        )

    def scheduler(self) -> StaticBatch:
        """A fresh scheduler."""
        return StaticBatch(self.request.batch, self.request.chunk_tokens)

    def works(self, inputs: Inputs | None = None) -> Iterator[Work]:
        """Each request of the trace, prepared; it arrives when it is taken."""
        inputs = self.inputs if inputs is None else inputs
        # Weights are read where they are, if only so that damaged ones are refused.
        columns = replace(inputs.columns(), weights=True)
        with TraceReader(self.request.trace, columns) as reader:
            requests = requests_of(reader, self.request.share)
            for index, rows in enumerate(islice(requests, self.request.limit)):
                check_request(rows, self.meta, self.request.trace)
                work = prepare(index, rows, self.meta, inputs)
                work.arrival_ns = None
                yield work

    @property
    def requests(self) -> int:
        """How many requests are served."""
        return min(self.meta.requests, self.request.limit or self.meta.requests)

    @cached_property
    def longest(self) -> int:
        """Positions of the longest request that is served."""
        with TraceReader(self.request.trace, Columns.experts_only()) as reader:
            requests = islice(requests_of(reader, self.request.share), self.request.limit)
            return max((int(rows.position.max()) + 1 for rows in requests), default=0)

    @cached_property
    def future(self) -> KnownFuture:
        """The demand of the whole run, from a pass without a clock."""
        return KnownFuture(self._demands(), self.meta.layers * self.meta.experts)

    @cached_property
    def uses(self) -> IntArray:
        """Uses of each expert: in the past, or in hindsight on the trace itself."""
        before = self._before()
        return self.future.counts if before is None else before.future.counts

    def _past(self) -> Past | None:
        """What past requests told, prepared as for the policy itself."""
        before = self._before()
        if before is None:
            return None
        return lambda: past_facts(before.works(self.inputs), self.meta.experts)

    def _before(self) -> Configuration | None:
        """The past: another trace, or the train part of this one."""
        request = replace(self.request, limit=None, policy="lru", settings=())
        path = request.calibration
        if path is None:
            share = request.share
            return None if share is None else Configuration(replace(request, share=share.before))
        meta = _meta(path)
        if (meta.layers, meta.experts) != (self.meta.layers, self.meta.experts):
            raise UsageError(
                f"--calibration {path}: has {meta.layers} layers of {meta.experts} experts, the "
                f"trace {self.meta.layers} of {self.meta.experts}; use a trace of the same model"
            )
        return Configuration(replace(request, trace=path, calibration=None, share=None))

    # ---- what is said of it ----------------------------------------------------------------------

    def manifest(self) -> dict[str, Any]:
        """All that determines the run; a replay's has the same keys."""
        request = self.request
        calibration = request.calibration
        return {
            "schema": 1,
            "source_digest": source_digest(),
            "trace": self.meta.digest,
            "policy": {"name": self.spec.name, "seats": self.spec.manifest()},
            "capacity": {
                "scope": self.capacity.scope,
                "bytes": list(self.capacity.capacity_bytes),
            },
            "capacity_as_typed": self.capacity.text,
            "set": list(request.settings),
            "model": self.model.to_dict(),
            "costs": request.costs.name if request.costs else None,
            "hardware": request.hardware.untiered().to_dict(),
            "order": "ready",
            "flat": False,
            "allocator": "slots",
            "kv": "apart",
            "batch": request.batch,
            "chunk_tokens": request.chunk_tokens,
            "arrivals": "back-to-back",
            "limit": request.limit,
            "seed": request.seed,
            "allowed": request.allowed.names(),
            "initial": self.initial_kind,
            "initial_experts": list(request.initial_experts),
            "calibration": _meta(calibration).digest if calibration else None,
            "split": request.share.split.text if request.share else None,
        }

    def facts(self) -> dict[str, Any]:
        """What a summary says of its run before any number."""
        return {
            "policy": self.spec.name,
            "set": list(self.request.settings),
            "capacity": self.capacity.text,
            "capacity_bytes": sum(self.capacity.capacity_bytes),
            "scope": self.capacity.scope,
            "mode": "group",
            "oracle": self._is_bound(),
            "lossy": self.lossy,
            "allowed": rested_on(self.inputs.needs, self.request.allowed, self.meta),
            "sizes_equal": len(set(self.model.expert_bytes_table().tolist())) == 1,
            "initial": self.initial_kind,
        }

    def answer(self, run: Mapping[str, Any]) -> dict[str, Any]:
        """The object that ``--json`` prints for one run."""
        meta = self.meta
        return {
            "schema": 1,
            "trace": {
                "path": str(self.request.trace),
                "digest": meta.digest,
                "model": meta.model.name,
                "layers": meta.layers,
                "experts": meta.experts,
                "top_k": meta.top_k,
                "requests": meta.requests,
                "tokens": meta.tokens,
                "phases": list(meta.phases),
                "rank_order": meta.rank_order,
                "synthetic": meta.source.startswith("synth"),
            },
            "model": self.model.name,
            "hardware": self.request.hardware.name,
            "costs": self.request.costs.name if self.request.costs else None,
            "source": self.costs.weakest_source,
            "diagnostics": [
                diagnostics(meta, self.model, self.costs, self.capacity, self.request.batch)
            ],
            "runs": [dict(run)],
        }

    @property
    def initial_kind(self) -> str:
        """cold, static, policy, file or all."""
        return self.spec.initial if self.spec.initial == "all" else self._asked_initial

    @property
    def _asked_initial(self) -> str:
        return self.request.initial or self.spec.initial

    # ---- inside ----------------------------------------------------------------------------------

    def _initial(self, world: World) -> tuple[list[ExpertId], bool]:
        kind = self.initial_kind
        if kind == "cold":
            return [], True
        if kind == "file":
            return fitting(self.request.initial_experts, world, "slots"), False
        if kind == "all":
            return fitting(range(world.size), world, "slots"), False
        if kind == "policy":
            # A host may have wrapped the policy; what it asks for depends on the world alone.
            return fitting(initially(self.build(), world), world, "slots"), True
        ranked = np.argsort(-self.uses, kind="stable")
        used = [int(e) for e in ranked if self.uses[e]]
        return fitting(used, world, "slots"), True

    def _demands(self) -> Iterator[IntArray]:
        event = 0
        for step in timeless_steps(self.works(Inputs()), self.scheduler()):
            for item in layer_events(step, event, self.meta.experts):
                yield item.demand.experts
                event += 1

    def _refuse(self) -> None:
        name, inputs = self.spec.name, self.inputs
        if self.mixed and len(self.model.precisions) == 1:
            raise NotRunError(
                f"not run: {name} executes experts in low precision, and {self.model.name} "
                f"has {self.model.precisions[0]} alone; name a model that has more with --costs"
            )
        missing = list(lacking(inputs.needs, inputs.distances, inputs.allowed, self.meta))
        if missing:
            what, mend = missing[0]
            raise NotRunError(f"not run: {name} needs {what}, which this trace lacks{mend}")

    def _is_bound(self) -> bool:
        needs = self.inputs.needs
        hindsight = Needs.CALIBRATION in needs or self.initial_kind == "static"
        request = self.request
        blind = request.calibration is None and request.share is None
        path = request.calibration
        by_itself = path is not None and _meta(path).digest == self.meta.digest
        taught = hindsight or Needs.PAST in needs
        return Needs.FUTURE in needs or (hindsight and blind) or (taught and by_itself)


@contextmanager
def blaming(spec: PolicySpec) -> Iterator[None]:
    """Tell which policy broke the protocol; an error in code from outside is its author's."""
    try:
        yield
    except PolicyError as error:
        raise PolicyError(f"{spec.name}: {error}") from error.__cause__
    except (Exception, SystemExit, GeneratorExit) as error:
        if isinstance(error, MoesimError) or not spec.foreign:
            raise
        last = traceback.extract_tb(error.__traceback__)[-1]
        raise PolicyError(
            f"{spec.name}: {type(error).__name__}: {error} ({last.filename}:{last.lineno})"
        ) from error


def _meta(path: Path) -> TraceMeta:
    with TraceReader(path, Columns.experts_only()) as reader:
        return reader.meta

"""Run a policy on this machine: routing forced by a trace, experts of a profile's size."""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from moesim.configuration import Configuration, Request, blaming
from moesim.errors import NotRunError, UsageError
from moesim.factlog import FACTS, FactLog, LoggedDeeds, Watched
from moesim.protocol import restrict
from moesim.real.device import KINDS, Device
from moesim.real.lanes import Lanes
from moesim.real.slots import SlotLedger
from moesim.result import RunStore, digest_of, host_facts
from moesim.serving import Server, Setup
from moesim.summary import summarise
from moesim.tally import RequestTimes, Tally
from moesim.timeline import chrome_events

if TYPE_CHECKING:
    from moesim.real.banks import HeldBank

Progress = Callable[[int, int], None]
"""Called with (requests served, requests in all)."""

Simulate = Callable[[Configuration, Mapping[int, Set[int]]], dict[str, Any]]
"""What a simulator says of the same configuration, beside the loads of each layer event."""


@dataclass(frozen=True, slots=True)
class RealRequest:
    """What to run, and how.

    what : trace, policy, capacity, profiles.
    device : one of ``device.KINDS``.
    paced : copies take at least the time that the profile's link takes.
    ram_bytes : what the banks may take; None: what is free.
    threads : that compute; 0: all cores but one, which copies.
    watchdog_s : how long a thread may be silent with work under way.
    verify : compare every slot with the host's expert before and after it computes.
    out : where to keep the run; its fact log is written only then.
    """

    what: Request
    device: str = "cpu"
    paced: bool = False
    ram_bytes: int | None = None
    threads: int = 0
    watchdog_s: float = 120.0
    verify: bool = False
    timeline: bool = False
    out: Path | None = None


class OpenDevice(Protocol):
    """Makes a device; tests put a broken one in its place."""

    def __call__(
        self, request: RealRequest, configuration: Configuration, ledger: SlotLedger
    ) -> Device:
        """A device with full banks."""


def execute(
    request: RealRequest,
    progress: Progress | None = None,
    simulate: Simulate | None = None,
    open_device: OpenDevice | None = None,
) -> dict[str, Any]:
    """Run one configuration on this machine; the object that ``--json`` prints.

    Raises
    ------
    MoesimError
        For a mistake in the request, the trace or a policy; ``ExecutionError`` for a lane that
        died or hangs. Nothing half-written is kept, and no thread is left waiting.
    """
    if request.device not in KINDS:
        raise UsageError(f"--device {request.device}: unknown; choose from {', '.join(KINDS)}")
    return _Execution(request, progress, open_device or open_banks).run(simulate)


def open_banks(request: RealRequest, configuration: Configuration, ledger: SlotLedger) -> Device:
    """The device asked for, its banks sized to the memory that is free, and filled."""
    banks = Banks()
    try:
        return banks.open(request, configuration, ledger, closing=banks.close)
    except BaseException:
        banks.close()
        raise


class Banks:
    """Opens devices. The experts in host memory outlive them, so that one process may serve many
    runs of a model."""

    def __init__(self) -> None:
        self._held: HeldBank | None = None

    def open(
        self,
        request: RealRequest,
        configuration: Configuration,
        ledger: SlotLedger,
        closing: Callable[[], None] = lambda: None,
    ) -> Device:
        """A device with full banks; ``closing`` is called when it closes.

        Raises
        ------
        MoesimError
            If torch or the device is not there, or what is asked for does not fit.
        """
        try:
            from moesim.real.banks import HeldBank, open_device
        except ModuleNotFoundError as error:
            if error.name != "torch":
                raise
            raise NotRunError(
                "not run: real execution needs torch, which is not installed; "
                "`pip install 'moesim[real]'` installs it"
            ) from None
        if self._held is None:
            self._held = HeldBank(request.device)
        return open_device(self._held, request, configuration, ledger, closing)

    def close(self) -> None:
        """Give the experts' memory back."""
        held, self._held = self._held, None
        if held is not None:
            held.close()


class _Said(NamedTuple):
    """What a device said of itself before it closed."""

    manifest: dict[str, Any]
    facts: dict[str, Any]


class _Execution:
    def __init__(self, request: RealRequest, progress: Progress | None, opener: OpenDevice) -> None:
        self.request = request
        self.progress = progress
        self.configuration = Configuration(request.what)
        self.store = RunStore(request.out) if request.out else None
        self.opener = opener

    def run(self, simulate: Simulate | None) -> dict[str, Any]:
        if self.store is None:
            return self._run(simulate, None, None)
        # Everything is written beside, and moved when it is whole.
        _sweep(self.store.root)
        beside = Path(tempfile.mkdtemp(prefix=f"{_mine()}{os.getpid()}-", dir=self.store.root))
        log = FactLog(beside / FACTS)
        try:
            return self._run(simulate, beside, log)
        finally:
            log.abandon()
            shutil.rmtree(beside, ignore_errors=True)

    def _run(
        self, simulate: Simulate | None, beside: Path | None, log: FactLog | None
    ) -> dict[str, Any]:
        configuration = self.configuration
        with blaming(configuration.spec):
            policy = Watched(configuration.build(), log)
            setup = configuration.setup(policy)
        ledger = SlotLedger(setup.world, setup.world.top_k if policy.bypass else 0)
        device = self.opener(self.request, configuration, ledger)
        started = time.perf_counter()
        try:
            with blaming(configuration.spec):
                server = self._serve(setup, ledger, device, log)
            said = _Said(device.manifest(), device.facts())
        finally:
            device.close()
        wall_s = time.perf_counter() - started
        summary = self._summary(server.tally, said)
        if simulate is not None:
            with blaming(configuration.spec):
                summary["simulated"] = simulate(configuration, policy.loads)
        folder = self._keep(beside, summary, server, said, wall_s) if beside else None
        return configuration.answer({**summary, "run_dir": str(folder) if folder else None})

    def _serve(
        self, setup: Setup, ledger: SlotLedger, device: Device, log: FactLog | None
    ) -> Server:
        """The run itself."""
        costs, request = setup.costs, self.request
        if log is not None:
            log.header(restrict(setup.world, setup.policy.needs))
        with Lanes(
            device,
            ledger,
            costs,
            paced=request.paced,
            watchdog_s=request.watchdog_s,
            workers=min(costs.hardware.host.workers, os.cpu_count() or 1),
        ) as lanes:
            server = Server(
                setup,
                lanes,
                ledger,
                deeds=None if log is None else LoggedDeeds(log),
                heard=(lambda report: None) if log is None else log.heard,
                timeline=request.timeline,
            )
            self._feed(server, log)
        if log is not None:
            log.close()
        return server

    def _feed(self, server: Server, log: FactLog | None) -> None:
        """Request by request; the clock stands still while the next is read."""
        total = self.configuration.requests
        for count, work in enumerate(self.configuration.works()):
            server.offer(work)
            server.advance()
            if log is not None:
                log.flush()
            if self.progress is not None:
                self.progress(count + 1, total)
        server.close()
        server.advance()

    # ---- results ---------------------------------------------------------------------------------

    def _summary(self, tally: Tally, said: _Said) -> dict[str, Any]:
        summary = summarise(tally)
        # A device with a clock of its own knows better than the thread that hears of it.
        moved = said.facts.get("link_bytes", summary["bytes_loaded"] + summary["initial_bytes"])
        busy_ns = said.facts.get("link_ns", summary["link_busy_ns"])
        return {
            **self.configuration.facts(),
            "engine": "real",
            "measured": True,
            "device": said.manifest,
            "paced": self.request.paced,
            "link_bytes_per_s": moved * 1e9 / busy_ns if busy_ns else None,
            **summary,
        }

    def _keep(
        self,
        beside: Path,
        summary: Mapping[str, Any],
        server: Server,
        said: _Said,
        wall_s: float,
    ) -> Path:
        """Write the run's folder; every repeat has its own."""
        assert self.store is not None
        manifest = {
            **self.configuration.manifest(),
            "engine": "real",
            "device": said.manifest,
            "paced": self.request.paced,
            "repeat": 0,
        }
        while self.store.path(run_id_of(manifest)).exists():
            manifest["repeat"] += 1
        run_id = run_id_of(manifest)
        spans = server.spans
        folder = RunStore(beside).write(
            run_id,
            manifest,
            summary,
            [request_row(times) for times in server.tally.requests],
            None if spans is None else chrome_events(spans, self.configuration.meta.experts),
            {**host_facts(wall_s), **said.facts, **self._paths()},
        )
        (beside / FACTS).rename(folder / FACTS)
        return folder.rename(self.store.path(run_id))

    def _paths(self) -> dict[str, Any]:
        what = self.request.what
        calibration = what.calibration
        return {
            "trace_path": str(what.trace.resolve()),
            "calibration_path": str(calibration.resolve()) if calibration else None,
        }


def _mine() -> str:
    """What the folders of this machine's runs begin with while they are not whole."""
    return f".real-{platform.node()}-"


def _sweep(root: Path) -> None:
    """Remove what killed runs of this machine left behind."""
    for left in root.glob(f"{_mine()}*"):
        number = left.name.removeprefix(_mine()).partition("-")[0]
        if number.isdecimal() and not _lives(int(number)):
            shutil.rmtree(left, ignore_errors=True)


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def run_id_of(manifest: Mapping[str, Any]) -> str:
    """Name of a run's folder."""
    return digest_of(manifest)[:16]


def request_row(times: RequestTimes) -> dict[str, Any]:
    """A row of ``requests.parquet``."""
    names = ("request", "arrival_ns", "begin_ns", "first_token_ns", "end_ns", "ttft_ns", "tpot_ns")
    more = ("prompt_tokens", "output_tokens", "stall_ns", "misses")
    return {name: getattr(times, name) for name in (*names, *more)}

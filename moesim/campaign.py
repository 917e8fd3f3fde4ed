"""A campaign: many configurations simulated and measured on this machine, and compared.

It calibrates, chooses how fast the link is made, simulates everything, measures everything in
rounds, each configuration once a round, and hands the run folders to ``moesim.analysis``. What is
finished is not done again, so that a campaign that was stopped goes on where it was.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moesim import configuration, replays
from moesim.configuration import Configuration
from moesim.degrade import Allowed
from moesim.engine.setup import Options
from moesim.errors import NotRunError, UsageError
from moesim.profile import HardwareProfile, ModelProfile, load_hardware
from moesim.real.calibrate import Calibration, calibrate
from moesim.real.device import Device
from moesim.real.run import Banks, RealRequest, execute, open_banks
from moesim.real.slots import SlotLedger
from moesim.result import MANIFEST
from moesim.traces.head import first_tokens
from moesim.traces.reader import TraceReader
from moesim.traces.writer import TraceWriter
from moesim.types import Needs

if TYPE_CHECKING:
    from moesim.analysis.validate import Report

POLICIES = ("streaming", "lru", "lfu", "finemoe", "next-gate", "static", "min")
CAPACITIES = ("15%", "25%")
"""Lossless policies, on demand, fixed, prefetching and with background work, that by simulation
differ by some percent from one to the next at either capacity."""
PROFILE, TRACE = "hw.toml", "trace.parquet"
SIMULATED, MEASURED, VALIDATION = "simulated", "measured", "validation"

_TARGET = 0.5
"""Stall over time that the slowest and the quickest configuration shall lie around."""
_RATES = (2e8, 5e10)
"""Bytes a second of a link, between which one is looked for."""
_HALVINGS = 8
_BUSY = 0.5
"""A load of the last minute that is not our own."""

Say = Callable[[str], None]
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Campaign:
    """What to simulate and measure.

    costs : size of the experts; None: as recorded.
    device : what measures; of CUDA the link is its own, unless ``bytes_per_s`` says another.
    trace : whose first ``limit`` requests are served, each cut after ``output_tokens`` tokens
        (0: whole). hardware : a profile to simulate with; None: measure one.
    bytes_per_s : of the link that is made; None: such that stall is about half of the time.
    """

    out: Path
    trace: Path
    costs: ModelProfile | None
    policies: tuple[str, ...] = POLICIES
    capacities: tuple[str, ...] = CAPACITIES
    hardware: Path | None = None
    bytes_per_s: float | None = None
    limit: int = 2
    output_tokens: int = 7
    repeats: int = 7
    calibration_repeats: int = 5
    threads: int = 0
    ram_bytes: int | None = None
    watchdog_s: float = 120.0
    seed: int = 0
    device: str = "cpu"
    allowed: Allowed = field(default_factory=Allowed)


def run(campaign: Campaign, say: Say, progress: Callable[[str], Any]) -> Report:
    """Calibrate, simulate, measure, compare.

    Parameters
    ----------
    say : told what is done next.
    progress : for (what, unit) a context manager with a ``Progress``.

    Raises
    ------
    MoesimError
        For a mistake in the campaign, a policy that cannot run, a lane that died or hangs. Runs
        that were finished are kept, and are not made again.
    """
    from moesim.analysis.validate import report
    from moesim.analysis.validate_files import chosen, write
    from moesim.analysis.validate_runs import data_of, matched

    made = _Made(campaign, say, progress)
    made.prepare()
    simulated = made.simulate()
    measured = made.measure()
    pairs = matched(simulated, measured)
    data = data_of(pairs)
    told = report(data)
    write(campaign.out / VALIDATION, data, told, chosen(pairs, made.drawn(), None))
    return told


def keep(campaign: Campaign, folder: Path) -> Path:
    """Copy what the table rests on into ``folder/<processor>``, a CUDA device's by its own name:
    raw tables, profile, readings.

    Returns that folder. Of a folder that is there already every file is replaced.
    """
    source = campaign.out / VALIDATION
    facts = json.loads((source / "facts.json").read_text(encoding="utf-8"))
    target = folder / slug(f"{facts.get('device_name', facts['processor'])}")
    files = [source / name for name in _KEPT]
    files += [campaign.out / name for name in (PROFILE, _READINGS, _MACHINE)]
    beside = target.with_name(f".{target.name}.tmp-{os.getpid()}")
    try:
        beside.mkdir(parents=True)
        for path in files:
            if path.is_file():
                shutil.copyfile(path, beside / path.name)
        if target.exists():
            shutil.rmtree(target)
        beside.rename(target)
    except OSError as error:
        raise UsageError(f"{target}: cannot be written ({error.strerror or error})") from None
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return target


_KEPT = (
    "runs.csv",
    "requests.csv",
    "layers.csv",
    "facts.json",
    "validation.md",
    "scatter.svg",
    "overlay.svg",
)
_READINGS, _MACHINE = "hw.readings.parquet", "machine.json"


def slug(text: str) -> str:
    """A name for a folder."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def shorten(source: Path, target: Path, requests: int, tokens: int) -> None:
    """Write the first requests of a trace, each without what comes after ``tokens`` decoded ones.

    The prompt stays whole.
    """
    with TraceReader(source) as reader:
        note = f"the first {requests} requests, at most {tokens} decoded tokens of each"
        meta = replace(reader.meta, notes=(*reader.meta.notes, note))
        with TraceWriter(target, meta) as writer:
            for index, rows in enumerate(reader.requests()):
                if index == requests:
                    break
                kept = rows.starts[min(len(rows.starts) - 1, tokens + 1)]
                firsts = [first for _, first, _ in meta.stack_ranges()]
                count = int(np.isin(rows.layer[:kept], firsts).sum())
                cut = first_tokens(rows, meta, count)
                assert cut is not None
                writer.write_request(cut[0])


class _Made:
    """A campaign under way."""

    def __init__(self, campaign: Campaign, say: Say, progress: Callable[..., Any]) -> None:
        self.campaign = campaign
        self.say = say
        self.progress = progress
        self.trace = campaign.out / TRACE
        self._hardware: HardwareProfile | None = None

    @property
    def hardware(self) -> HardwareProfile:
        """The profile, with the link that is made."""
        assert self._hardware is not None
        return self._hardware

    # ---- before ----------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Profile, trace and link."""
        campaign = self.campaign
        try:
            campaign.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(
                f"--out {campaign.out}: cannot be written ({error.strerror}); choose another folder"
            ) from None
        self._cut()
        # What cannot run is told before anything takes long.
        self._refuse()
        self._note_machine()
        profile = self._profile()
        if self._is_native:
            self._hardware = profile
            return
        rate = campaign.bytes_per_s or self._rate(profile)
        self._hardware = profile.with_bandwidth(rate)
        self.say(f"link of {rate / 1e9:.2f} GB/s")

    @property
    def _is_native(self) -> bool:
        """The link is the device's own: nothing is slowed."""
        return self.campaign.device != "cpu" and self.campaign.bytes_per_s is None

    def _cut(self) -> None:
        campaign = self.campaign
        if campaign.output_tokens:
            shorten(campaign.trace, self.trace, campaign.limit, campaign.output_tokens)
        else:
            self.trace = campaign.trace

    def _refuse(self) -> None:
        free = load_hardware("rtx4090")
        for policy, capacity in self._cases():
            Configuration(self._what(policy, capacity, free))
        self._replayed(free, limit=1)

    def _note_machine(self) -> None:
        """Once: what a campaign that goes on finds is no longer the beginning."""
        from moesim.bench.measure import machine

        path, facts = self.campaign.out / _MACHINE, machine()
        if (facts["load_before"] or 0) > _BUSY:
            self.say(f"load {facts['load_before']}: others are at work, and are measured as well")
        if not path.exists():
            text = json.dumps(facts, indent=1, sort_keys=True)
            path.write_text(text + "\n", encoding="utf-8")

    def _profile(self) -> HardwareProfile:
        campaign, path = self.campaign, self.campaign.out / PROFILE
        given = campaign.hardware
        if given is not None:
            profile = load_hardware(str(given))
            for source, target in ((given, path), (_beside(given), _beside(path))):
                if source.is_file() and source.resolve() != target.resolve():
                    shutil.copyfile(source, target)
            return profile
        if not path.exists():
            self.say("measuring this machine; keep it quiet until the end")
            request = Calibration(
                model=campaign.costs or self._recorded(),
                out=path,
                device=campaign.device,
                repeats=campaign.calibration_repeats,
                threads=campaign.threads,
                ram_bytes=campaign.ram_bytes,
                seed=campaign.seed,
            )
            with self.progress("calibrate", "rounds") as progress:
                calibrate(request, progress)
        return load_hardware(str(path))

    def _recorded(self) -> ModelProfile:
        with TraceReader(self.trace) as reader:
            return reader.meta.model

    def _rate(self, profile: HardwareProfile) -> float:
        """A link such that half of what lies between the least and the most stall is the target:
        by simulation, in two digits."""
        low, high = _RATES
        for _ in range(_HALVINGS):
            middle = (low * high) ** 0.5
            shares = [
                run["stall_ns"] / run["time_ns"]
                for run in self._replayed(profile.with_bandwidth(middle), limit=1)
            ]
            if (min(shares) + max(shares)) / 2 > _TARGET:
                low = middle
            else:
                high = middle
        return float(f"{(low * high) ** 0.5:.2g}")

    # ---- simulated -------------------------------------------------------------------------------

    def simulate(self) -> Path:
        """Every configuration; the folder of the runs."""
        folder = self.campaign.out / SIMULATED
        # Another profile, another link: what was simulated with them is not compared.
        shutil.rmtree(folder, ignore_errors=True)
        runs = self._replayed(self.hardware, folder)
        total = sum(run["time_ns"] for run in runs) / 1e9
        self.say(
            f"{len(runs)} configurations x {self.campaign.repeats} repeats: about "
            f"{total * self.campaign.repeats:.0f} s of measuring"
        )
        return folder

    def _replayed(
        self, hardware: HardwareProfile, out: Path | None = None, limit: int | None = None
    ) -> list[dict[str, Any]]:
        campaign = self.campaign
        answer = replays.replay(
            replays.Request(
                trace=self.trace,
                hardware=hardware,
                policies=campaign.policies,
                capacities=campaign.capacities,
                costs=campaign.costs,
                options=Options(allocator="slots", timeline=out is not None),
                limit=limit or campaign.limit,
                allowed=campaign.allowed,
                seed=campaign.seed,
                # Nothing to compile, and a few steps are soon served.
                engine="reference",
                out=out,
            )
        )
        for run in answer["runs"]:
            if "not_run" in run:
                raise NotRunError(f"{run['policy']} at {run['capacity']}: {run['not_run']}")
        runs: list[dict[str, Any]] = answer["runs"]
        return runs

    # ---- measured --------------------------------------------------------------------------------

    def measure(self) -> list[Path]:
        """Every configuration once a round, in another order each time; the run folders."""
        campaign = self.campaign
        folder = campaign.out / MEASURED
        folder.mkdir(exist_ok=True)
        wanted = {case: self._configuration(case) for case in self._cases()}
        done = {case: _finished(folder, made) for case, made in wanted.items()}
        missing = [
            (repeat, case)
            for repeat, cases in enumerate(self._rounds())
            for case in cases
            if len(done[case]) <= repeat
        ]
        if missing:
            with closing(_Banks()) as banks:
                self._warm_up(wanted, banks)
                with self.progress("campaign", "runs") as progress:
                    for count, (_, case) in enumerate(missing):
                        done[case].append(self._measured(case, folder, not done[case], banks))
                        progress(count + 1, len(missing))
        return [path for paths in done.values() for path in paths[: campaign.repeats]]

    def drawn(self) -> str:
        """Whose step is drawn: of the policies that prefetch, if there are any."""
        names = self.campaign.policies
        name = "next-gate" if "next-gate" in names else names[0]
        return f"{name}@{self.campaign.capacities[-1]}"

    def _rounds(self) -> Iterator[list[tuple[str, str]]]:
        for repeat in range(self.campaign.repeats):
            cases = list(self._cases())
            random.Random(f"{self.campaign.seed} {repeat}").shuffle(cases)
            yield cases

    def _measured(self, case: tuple[str, str], folder: Path, first: bool, banks: _Banks) -> Path:
        request = replace(self._request(case), out=folder, timeline=first)
        answer = execute(request, open_device=banks)
        return Path(answer["runs"][0]["run_dir"])

    def _warm_up(self, wanted: Mapping[tuple[str, str], Configuration], banks: _Banks) -> None:
        """One run that is thrown away: the largest, so that its banks serve all others."""
        self.say("filling the banks; one run to warm up")
        largest = max(wanted, key=lambda case: sum(_slots(wanted[case]).values()))
        execute(self._request(largest), open_device=banks)

    # ---- configurations --------------------------------------------------------------------------

    def _cases(self) -> Iterator[tuple[str, str]]:
        for capacity in self.campaign.capacities:
            for policy in self.campaign.policies:
                yield policy, capacity

    def _configuration(self, case: tuple[str, str]) -> Configuration:
        return Configuration(self._what(*case, self.hardware))

    def _what(self, policy: str, capacity: str, hardware: HardwareProfile) -> configuration.Request:
        campaign = self.campaign
        return configuration.Request(
            trace=self.trace,
            hardware=hardware,
            policy=policy,
            capacity=capacity,
            costs=campaign.costs,
            limit=campaign.limit,
            allowed=campaign.allowed,
            seed=campaign.seed,
        )

    def _request(self, case: tuple[str, str]) -> RealRequest:
        campaign = self.campaign
        return RealRequest(
            what=self._what(*case, self.hardware),
            device=campaign.device,
            paced=not self._is_native,
            ram_bytes=campaign.ram_bytes,
            threads=campaign.threads,
            watchdog_s=campaign.watchdog_s,
        )


class _Banks:
    """Opens the banks once: to fill them takes longer than a run."""

    def __init__(self) -> None:
        self._device: Device | None = None
        self._banks = Banks()

    def close(self) -> None:
        """Give the memory back."""
        self._device = None
        self._banks.close()

    def __call__(
        self, request: RealRequest, configuration: Configuration, ledger: SlotLedger
    ) -> Device:
        if request.device != "cpu":
            # What lies on the device is soon made; the experts in host memory stay.
            return self._banks.open(request, configuration, ledger)
        from moesim.real.cpu import Cpu

        if not (isinstance(self._device, Cpu) and self._device.lend(ledger)):
            self._device = None
            self._device = open_banks(request, configuration, ledger)
        return self._device


def _slots(made: Configuration) -> Mapping[int, int]:
    world, policy = made.world(), made.build()
    return SlotLedger(world, world.top_k if policy.bypass else 0).slots


def _finished(folder: Path, made: Configuration) -> list[Path]:
    """Run folders of a configuration, in order of repeat."""
    wanted = json.loads(json.dumps(made.manifest()))
    hardware = wanted["hardware"]
    if Needs.COSTS not in made.inputs.needs:
        # What is simulated beside is nothing to a run: its link alone is made.
        hardware = _link_of(wanted.pop("hardware"))
    found: list[tuple[int, Path]] = []
    for path in sorted(folder.glob(f"[!.]*/{MANIFEST}")):
        manifest = json.loads(path.read_text())
        same = all(manifest.get(key) == value for key, value in wanted.items())
        if same and ("hardware" in wanted or _link_of(manifest["hardware"]) == hardware):
            found.append((manifest["repeat"], path.parent))
    return [path for _, path in sorted(found)]


def _link_of(hardware: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in hardware["link"].items() if key != "handover_ns"}


def _beside(profile: Path) -> Path:
    return profile.with_suffix(".readings.parquet")

"""What whole processes take: to compile, to start, in memory."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import moesim
from moesim.bench.figures import Figure, Promise, Samples
from moesim.bench.measure import interleave
from moesim.bench.workshop import EXPERTS, LAYERS, TOKENS_A_REQUEST, TOP_K, Workshop
from moesim.errors import MoesimError, NotRunError
from moesim.profile import ModelProfile
from moesim.traces.schema import TraceMeta
from moesim.traces.synth import Synth, synth_requests
from moesim.traces.writer import TraceWriter

MOESIM = (sys.executable, "-m", "moesim")
BARE = (sys.executable, "-c", "pass")
DEMO = (*MOESIM, "replay", "--trace", "demo")
EVERYTHING = (*DEMO, "--limit", "1", "--policy", "lru,next-gate,fiddler,min,slru", "--json")
"""A little of everything that is compiled."""
COLD_RUNS = 3
SAMPLE_S = 0.005


class ChildError(MoesimError):
    """A process that was started to be measured failed."""


def start(shop: Workshop) -> Iterator[Figure]:
    """Seconds from nothing to the end of `--help`, and of a `replay` with compiled code kept."""
    jobs = {"--help": ((*MOESIM, "--help"), 0.4), "second replay of the sample": (DEMO, 2.0)}
    for case, (command, most_s) in jobs.items():
        shop.say(f"start: {case}")
        wall_ns(shop, command)
        sides = {"whole": partial(wall_ns, shop, command), "python": partial(wall_ns, shop, BARE)}
        taken = interleave(shop.settings.repeats, sides)
        yield Figure(
            benchmark="start",
            case=case,
            unit="s",
            measured=_seconds(taken["whole"]),
            promise=Promise(most=most_s),
            facts={"python_alone_s": _seconds(taken["python"]).median},
        )


def compile_all(shop: Workshop) -> Iterator[Figure]:
    """Seconds that a first replay takes beyond the next: it compiles, and keeps what it made."""
    samples: dict[str, list[int]] = {"cold": [], "warm": []}
    kept_bytes = 0
    for number in range(min(COLD_RUNS, shop.settings.repeats)):
        shop.say(f"compile: run {number + 1}")
        with tempfile.TemporaryDirectory(dir=shop.folder) as cache:
            where = {"MOESIM_CACHE": cache}
            for kind in samples:
                samples[kind].append(wall_ns(shop, EVERYTHING, where))
            kept_bytes = sum(p.stat().st_size for p in Path(cache).rglob("*") if p.is_file())
    both = zip(samples["cold"], samples["warm"], strict=True)
    yield Figure(
        benchmark="compile",
        case="whole engine, cold",
        unit="s",
        measured=_seconds([cold - warm for cold, warm in both]),
        promise=Promise(most=20),
        facts={
            "first_replay_s": _seconds(samples["cold"]).median,
            "second_replay_s": _seconds(samples["warm"]).median,
            "kept_bytes": kept_bytes,
        },
    )


def _seconds(taken_ns: Sequence[int]) -> Samples:
    return Samples(tuple(ns / 1e9 for ns in taken_ns))


def wall_ns(shop: Workshop, command: Sequence[str], more: Mapping[str, str] | None = None) -> int:
    """Of a process that succeeds; else ChildError."""
    started = time.perf_counter_ns()
    child = subprocess.run(
        command,
        cwd=shop.folder,
        env=_environment(more),
        capture_output=True,
        text=True,
        check=False,
    )
    taken_ns = time.perf_counter_ns() - started
    if child.returncode:
        raise _failed(command, child.returncode, child.stderr)
    return taken_ns


def _environment(more: Mapping[str, str] | None = None) -> dict[str, str]:
    """Ours; a checkout that was not installed is found as well."""
    home = str(Path(moesim.__file__).resolve().parents[1])
    paths = [home, *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **(more or {})}


def _failed(command: Sequence[str], code: int, said: str) -> ChildError:
    last = (said.strip().splitlines() or [f"exit code {code}"])[-1]
    return ChildError(f"`{' '.join(command[1:])}` failed: {last}")


# ---- memory --------------------------------------------------------------------------------------

REQUESTS_MADE = 16
STATUS = Path("/proc/self/status")


def memory(shop: Workshop) -> Iterator[Figure]:
    """Most anonymous memory of a replay of a trace that is far larger, with and without future."""
    if not STATUS.exists() or "RssAnon" not in STATUS.read_text():
        raise NotRunError("needs /proc/PID/status with RssAnon, as Linux has it")
    path, decoded_bytes, requests = _large(shop)
    for policy in ("lru", "min"):
        shop.say(f"memory: {policy} on {decoded_bytes / 1e9:.2f} GB of decoded rows")
        command = (*MOESIM, "replay", "--trace", str(path), "--policy", policy, "--json")
        peak = _peak(shop, command)
        yield Figure(
            benchmark="memory",
            case=f"{policy}, {decoded_bytes / 1e9:.2f} GB of rows",
            unit="bytes",
            measured=Samples((float(peak.anonymous_bytes),)),
            promise=Promise(most=1 << 30),
            facts={
                "decoded_bytes": decoded_bytes,
                "requests": requests,
                "resident_bytes": peak.resident_bytes,
                "wall_s": peak.wall_s,
            },
        )
    path.unlink()


def _large(shop: Workshop) -> tuple[Path, int, int]:
    """(file, bytes of the decoded columns that every replay reads, requests).

    A few synthetic requests, written again and again under new numbers.
    """
    model = ModelProfile.generic(LAYERS, EXPERTS, TOP_K, "synthetic")
    options = Synth(model, REQUESTS_MADE, 0, TOKENS_A_REQUEST)
    made = list(synth_requests(options))
    meta = TraceMeta(model=model, score=options.score, has_weights=True, source="synthetic")
    path = shop.folder / "large.parquet"
    # Numbers of request, iteration, position, layer and phase; ids and weights of the experts.
    row_bytes = 4 + 4 + 4 + 2 + 1 + 4 * TOP_K
    request_bytes = made[0].rows * row_bytes
    requests = max(1, -(-shop.settings.memory_bytes // request_bytes))
    shop.say(f"memory: writing {requests * request_bytes / 1e9:.2f} GB of rows")
    with TraceWriter(path, meta, check=False) as writer:
        for number in range(requests):
            writer.write_request(replace(made[number % REQUESTS_MADE], request=number))
    return path, requests * request_bytes, requests


@dataclass(frozen=True, slots=True)
class Peak:
    """The most that a process held at any sample: anonymous, and resident in all."""

    anonymous_bytes: int
    resident_bytes: int
    wall_s: float


def _peak(shop: Workshop, command: Sequence[str]) -> Peak:
    with (shop.folder / "child.stderr").open("w+") as said:
        started = time.perf_counter()
        child = subprocess.Popen(
            command, cwd=shop.folder, env=_environment(), stdout=subprocess.DEVNULL, stderr=said
        )
        most = {"RssAnon": 0, "VmHWM": 0}
        try:
            while child.poll() is None:
                for name, held in _held(child.pid).items():
                    most[name] = max(most.get(name, 0), held)
                time.sleep(SAMPLE_S)
        finally:
            child.kill()
            child.wait()
        if child.returncode:
            said.seek(0)
            raise _failed(command, child.returncode, said.read())
    return Peak(most["RssAnon"], most["VmHWM"], time.perf_counter() - started)


def _held(pid: int) -> dict[str, int]:
    """RssAnon and VmHWM in bytes; nothing once the process has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    pairs = [line.split() for line in lines if line.startswith(("RssAnon:", "VmHWM:"))]
    return {words[0][:-1]: int(words[1]) * 1024 for words in pairs}

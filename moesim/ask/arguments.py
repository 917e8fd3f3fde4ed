"""Options that several commands read alike."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesim.errors import UsageError

if TYPE_CHECKING:
    from moesim.profile import HardwareProfile
    from moesim.types import ExpertId


def hardware(args: argparse.Namespace) -> HardwareProfile:
    """``--hardware`` with ``--bandwidth`` applied."""
    from moesim.profile import load_hardware

    hardware = load_hardware(args.hardware)
    if args.bandwidth is None:
        return hardware
    return hardware.with_bandwidth(_rate(args.bandwidth, "--bandwidth"))


def one_device(args: argparse.Namespace) -> HardwareProfile:
    """``hardware``, for what knows one device.

    Raises
    ------
    UsageError
        For a profile of several.
    """
    machine = hardware(args)
    if machine.devices > 1:
        raise UsageError(
            f"--hardware {args.hardware}: has {machine.devices} devices, and this command knows "
            "one; name a profile of one"
        )
    return machine


def tiered(args: argparse.Namespace) -> HardwareProfile:
    """``hardware`` with ``--ssd`` applied, which ``--dram`` alone gives a meaning."""
    machine = hardware(args)
    if args.ssd is None:
        return machine
    if args.dram is None:
        raise UsageError("--ssd: nothing is read from the drive; give --dram SIZE too")
    return machine.with_drive(_rate(args.ssd, "--ssd"))


def _rate(text: str, option: str) -> float:
    from moesim.capacity import parse_bytes

    if text == "inf":
        return float("inf")
    if not re.fullmatch(r"[0-9.]+ *[A-Za-z]+/s", text):
        raise UsageError(f"{option} {text}: write a rate such as 25GB/s, or inf")
    rate = parse_bytes(text.removesuffix("/s"), option)
    if not rate:
        raise UsageError(f"{option} 0: must be more than nothing")
    return float(rate)


def initial(text: str | None) -> tuple[str, tuple[ExpertId, ...]]:
    """(kind, experts): kind is "", "cold", "static", "policy" or "file"."""
    if text is None or text in ("cold", "static", "policy"):
        return text or "", ()
    path = Path(text)
    try:
        experts: Any = json.loads(path.read_text())
    except OSError as error:
        raise UsageError(
            f"--initial {text}: {error.strerror}; write cold, static, policy or the path of a JSON "
            "file"
        ) from None
    except (ValueError, RecursionError):
        raise UsageError(f"--initial {text}: not JSON; write a list of expert ids") from None
    if not isinstance(experts, list) or not all(type(e) is int for e in experts):
        raise UsageError(f"--initial {text}: must be a list of expert ids (whole numbers)")
    if len(set(experts)) < len(experts):
        raise UsageError(f"--initial {text}: an expert is listed twice; list each once")
    return "file", tuple(experts)


def add_set(group: argparse._ArgumentGroup) -> None:
    """``--set``."""
    group.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SEAT=NAME",
        help="swap a seat (prefetch=next-gate) or set a parameter (keep.gamma=0.9)",
    )


def add_allow(group: argparse._ArgumentGroup) -> None:
    """``--allow``."""
    group.add_argument(
        "--allow",
        action="append",
        default=[],
        metavar="INPUT=HOW",
        help="a stand-in for what the trace lacks: gate=topk, embedding=none, norms=unit, "
        "prefill=decode, ahead=recall:0.8@SEED",
    )


def add_seed(group: argparse._ArgumentGroup) -> None:
    """``--seed``."""
    group.add_argument("--seed", type=seed, default=0, help="of every random choice [0]")


def add_past(group: argparse._ArgumentGroup) -> None:
    """What policies learn from, and what is there at the start."""
    group.add_argument(
        "--calibration", type=path, metavar="TRACE", help="trace that policies learn from instead"
    )
    group.add_argument(
        "--initial",
        metavar="STATE",
        help="cold; static, the most used, or policy, what it asks for (loads charged); or a JSON "
        "file of expert ids (free) [by policy]",
    )


def add_compute(group: argparse._ArgumentGroup) -> None:
    """Where a real run computes."""
    group.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="where to compute [cpu]"
    )
    group.add_argument("--threads", type=positive, metavar="N", help="that compute [cores - 1]")


def add_one_policy(group: argparse._ArgumentGroup) -> None:
    """What a run of one policy is told beside its name."""
    add_set(group)
    group.add_argument(
        "--capacity",
        default="25%",
        metavar="SIZE",
        help="24GiB, 25%% of all experts, 192 experts in all, or 8/layer [25%%]",
    )
    group.add_argument(
        "--scope", choices=("global", "layer"), default="global", help="one cache, or one a layer"
    )


def refuse_beside_plan(args: argparse.Namespace) -> None:
    """UsageError if what a plan decides is given as well."""
    for name in ("policy", "capacity", "initial"):
        if getattr(args, name) is not None:
            raise UsageError(f"--{name}: the plan decides it; leave out --{name} or --plan")


def words(given: list[str] | None, default: str) -> tuple[str, ...]:
    """Repeated options and commas, in order, each once."""
    words = [w.strip() for text in given or [default] for w in text.split(",")]
    if not all(words):
        raise UsageError(f"{','.join(given or [])!r} names nothing between its commas; fill it in")
    return tuple(dict.fromkeys(words))


def seed(text: str) -> int:
    """An argument type."""
    try:
        value = int(text)
    except ValueError:
        value = -1
    if not 0 <= value < 1 << 63:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number from 0 to 2**63 - 1")
    return value


def path(text: str) -> Path:
    """An argument type."""
    if not text:
        raise argparse.ArgumentTypeError("names nothing; write a path")
    return Path(text)


def positive(text: str) -> int:
    """An argument type."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number of at least 1")
    return value

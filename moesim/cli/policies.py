"""``moesim policies``: what can be asked for with --policy and --set."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesim.errors import UsageError

if TYPE_CHECKING:
    from moesim.policies.presets import Preset
    from moesim.protocol import Seat

    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]


BEGIN, END = "<!-- policies: begin -->", "<!-- policies: end -->"


def add_parser(subparsers: Subparsers) -> None:
    """Add the ``policies`` command."""
    parser = subparsers.add_parser(
        "policies",
        help="list policies and seats",
        description="List the policies (--policy) and the seats they are made of (--set), with "
        "their parameters and what a trace must hold for them.",
        epilog="example: moesim policies --json",
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print one JSON object")
    form.add_argument(
        "--markdown",
        nargs="?",
        const="",
        metavar="FILE",
        help="print tables of all that is built in, or write them into FILE between the lines "
        f"`{BEGIN}` and `{END}`",
    )
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Print the lists; 0."""
    if args.markdown is not None:
        return _tables(args.markdown)
    policies, seats = _policies(), _seats()
    if args.json:
        print(json.dumps({"schema": 1, "policies": policies, "seats": seats}))
        return 0
    from moesim.cli.table import print_table

    rows = [(p["name"], p["keep"], p["prefetch"], p["miss"], p["summary"]) for p in policies]
    columns = ("policy", "keep", "prefetch", "miss", "what it does")
    print_table(columns, rows, left=5)
    listed = [
        (
            s["kind"],
            s["name"],
            _spelled(s["parameters"]),
            ", ".join(s["needs"]) or "-",
            s["summary"],
        )
        for s in seats
    ]
    print_table(("seat", "name", "parameters", "needs", "what it does"), listed, left=5)
    return 0


def _policies() -> list[dict[str, Any]]:
    from moesim.policies.presets import PRESETS
    from moesim.registry import policy_names

    listed = []
    for name in policy_names():
        preset = PRESETS.get(name)
        seats = {k: getattr(preset, k, "") for k in KINDS}
        facts = _facts(preset) if preset else {"summary": "installed"}
        listed.append({"name": name, **seats, **facts})
    return listed


def _facts(preset: Preset) -> dict[str, Any]:
    """What a preset's seats say of it. Seats that every preset may have add no source."""
    from moesim.policies.presets import Preset as Plain
    from moesim.protocol import parameters

    seats = {kind: _class(kind, getattr(preset, kind)) for kind in KINDS}
    plain = Plain("")
    own = {k: s for k, s in seats.items() if getattr(preset, k) != getattr(plain, k)} or {
        "keep": seats["keep"]
    }
    bound = any("FUTURE" in _needs(seat) for seat in seats.values())
    lossy = any(seat.lossy for seat in seats.values())
    return {
        "summary": preset.summary,
        "parameters": dict(preset.parameters),
        "needs": list(dict.fromkeys(n for seat in seats.values() for n in _needs(seat))),
        "fitted": any("weights" in parameters(seat) for seat in seats.values()),
        "kind": "bound" if bound else "lossy" if lossy else "lossless",
        "source": "; ".join(_sources(own.values())),
        "cost": "; ".join(_costs(seats)),
    }


def _sources(seats: Iterable[type[Seat]]) -> list[str]:
    """Each once; a paper is not named beside a section of it."""
    named = list(dict.fromkeys(seat.source for seat in seats))
    return [s for s in named if not any(o != s and o.startswith(s) for o in named)]


def _costs(seats: Mapping[str, type[Seat]]) -> list[str]:
    """Of the seats that do something."""
    some = {kind: seat.cost for kind, seat in seats.items() if seat.cost != "O(1)"}
    return [f"{kind} {cost.replace(';', ',')}" for kind, cost in some.items()]


KINDS = ("keep", "prefetch", "miss", "route")


def _class(kind: str, name: str) -> type[Seat]:
    from moesim.registry import seat_class

    return seat_class(kind, name)


def _needs(seat: type[Seat]) -> list[str]:
    from moesim.types import Needs

    return [str(n.name) for n in Needs if n in seat.needs and n.name]


def _seats() -> list[dict[str, Any]]:
    from moesim.protocol import SEAT_KINDS, parameters
    from moesim.registry import seat_class, seat_names

    listed = []
    for kind in SEAT_KINDS:
        for name in seat_names(kind):
            seat = seat_class(kind, name)
            listed.append(
                {
                    "kind": kind,
                    "name": name,
                    "parameters": parameters(seat),
                    "needs": _needs(seat),
                    "lossy": seat.lossy,
                    "summary": _summary(seat).replace("``", ""),
                    "source": seat.source,
                    "cost": seat.cost,
                }
            )
    return listed


def _spelled(parameters: dict[str, object]) -> str:
    return ", ".join(f"{name}={value}" for name, value in parameters.items()) or "-"


def _summary(seat: type[Seat]) -> str:
    return (seat.__doc__ or "").strip().splitlines()[0]


# ---- Markdown ------------------------------------------------------------------------------------


def _tables(name: str) -> int:
    text = "\n\n".join(("\n".join(_policy_table()), "\n".join(_seat_table())))
    if name:
        _write(Path(name), text)
    else:
        print(text)
    return 0


def _write(path: Path, text: str) -> None:
    """Put the tables between their lines, or leave the file as it was."""
    try:
        page = path.read_text()
    except OSError as error:
        raise UsageError(f"--markdown {path}: {error.strerror}") from None
    head, begin, rest = page.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise UsageError(f"--markdown {path}: has no lines `{BEGIN}` and `{END}` to write between")
    beside = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        beside.write_text(f"{head}{begin}\n{text}\n{end}{tail}")
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def _policy_table() -> Iterator[str]:
    from moesim.policies.presets import PRESETS

    columns = ("policy", "idea", "seats", "needs", "", "source", "a decision costs")
    yield from _header(columns)
    for name, preset in PRESETS.items():
        facts = _facts(preset)
        needs = [*facts["needs"], *(["a fit"] if facts["fitted"] else [])]
        told = (f"`{name}`", facts["summary"], _seats_of(preset), ", ".join(needs))
        yield _row(*told, facts["kind"], facts["source"], facts["cost"])


def _seats_of(preset: Preset) -> str:
    """Names of the seats that do something, and what the preset sets."""
    from moesim.policies.presets import Preset as Plain

    plain = Plain("")
    named = [
        f"{kind} `{getattr(preset, kind)}`"
        for kind in KINDS
        if kind == "keep" or getattr(preset, kind) != getattr(plain, kind)
    ]
    set_to = [f"`{key}={_value(value)}`" for key, value in preset.parameters.items()]
    return ", ".join((*named, *set_to))


def _seat_table() -> Iterator[str]:
    from moesim.policies import SEATS
    from moesim.protocol import parameters

    yield from _header(("seat", "name", "what it does", "needs", "parameters", "source", "costs"))
    before = ""
    for full in SEATS:
        kind, _, name = full.partition(".")
        seat = _class(kind, name)
        values = ", ".join(f"`{k}={_value(v)}`" for k, v in parameters(seat).items())
        said = (_summary(seat).replace("``", "`"), ", ".join(_needs(seat)), values)
        yield _row(kind if kind != before else "", f"`{name}`", *said, seat.source, seat.cost)
        before = kind


def _value(value: object) -> str:
    """As --set takes it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _header(columns: Sequence[str]) -> tuple[str, str]:
    return _row(*columns), "|---" * len(columns) + "|"


def _row(*cells: str) -> str:
    """Empty cells without a space, so that no line ends in one."""
    return "|" + "".join(
        f" {cell.replace('|', chr(92) + '|')} |" if cell else " |" for cell in cells
    )

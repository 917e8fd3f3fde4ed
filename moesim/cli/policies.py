"""``moesim policies``: what can be asked for with --policy and --set."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]


def add_parser(subparsers: Subparsers) -> None:
    """Add the ``policies`` command."""
    parser = subparsers.add_parser(
        "policies",
        help="list policies and seats",
        description="List the policies (--policy) and the seats they are made of (--set), with "
        "their parameters and what a trace must hold for them.",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Print the lists; 0."""
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
        seats = {k: getattr(preset, k, "") for k in ("keep", "prefetch", "miss", "route")}
        listed.append({"name": name, **seats, "summary": preset.summary if preset else "installed"})
    return listed


def _seats() -> list[dict[str, Any]]:
    from moesim.protocol import SEAT_KINDS, parameters
    from moesim.registry import seat_class, seat_names
    from moesim.types import Needs

    listed = []
    for kind in SEAT_KINDS:
        for name in seat_names(kind):
            seat = seat_class(kind, name)
            listed.append(
                {
                    "kind": kind,
                    "name": name,
                    "parameters": parameters(seat),
                    "needs": [str(n.name) for n in Needs if n in seat.needs and n.name],
                    "lossy": seat.lossy,
                    "summary": (seat.__doc__ or "").strip().splitlines()[0].replace("``", ""),
                }
            )
    return listed


def _spelled(parameters: dict[str, object]) -> str:
    return ", ".join(f"{name}={value}" for name, value in parameters.items()) or "-"

"""``moesim diff``: what two runs have in common, and what not."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]


def add_parser(subparsers: Subparsers) -> None:
    """Add the ``diff`` command."""
    parser = subparsers.add_parser(
        "diff",
        help="compare two runs",
        description="Compare two run folders: which inputs differ, and which results. Code 0 if "
        "the results are equal, 1 if not.",
        epilog="example: moesim diff runs/0123456789abcdef runs/fedcba9876543210",
    )
    parser.add_argument("a", type=Path, help="run folder")
    parser.add_argument("b", type=Path, help="run folder")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Print the differences; 0 if the results are equal, else 1."""
    from moesim.result import read_run

    (manifest_a, summary_a), (manifest_b, summary_b) = read_run(args.a), read_run(args.b)
    inputs = dict(_differences(manifest_a, manifest_b))
    results = dict(_differences(summary_a, summary_b))
    if args.json:
        print(json.dumps({"schema": 1, "inputs": inputs, "results": results}))
    else:
        _print("inputs", inputs)
        _print("results", results)
    return 1 if results else 0


def _differences(a: Any, b: Any, path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Leaves that differ, by dotted path."""
    if isinstance(a, dict) and isinstance(b, dict):
        for key in sorted({*a, *b}):
            yield from _differences(a.get(key), b.get(key), f"{path}.{key}" if path else key)
    elif a != b:
        found: dict[str, Any] = {"a": a, "b": b}
        if _number(a) and _number(b) and a:
            found["ratio"] = b / a
        yield path, found


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _print(what: str, differences: dict[str, dict[str, Any]]) -> None:
    from moesim.cli.table import print_table

    if not differences:
        print(f"{what}: equal")
        return
    rows = [
        (path, _short(d["a"]), _short(d["b"]), f"{d['ratio']:.4f}" if "ratio" in d else "-")
        for path, d in differences.items()
    ]
    print_table((what, "a", "b", "b/a"), rows)


def _short(value: Any, most: int = 40) -> str:
    text = json.dumps(value)
    return text if len(text) <= most else text[: most - 3] + "..."

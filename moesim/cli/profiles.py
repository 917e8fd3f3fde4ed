"""``moesim profiles``: list the shipped profiles, or print one as a file to save and edit."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from moesim.profile import list_hardware, list_models, load_any, load_hardware, load_model

if TYPE_CHECKING:
    from moesim.profile import HardwareProfile, ModelProfile

    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]


def add_parser(subparsers: Subparsers) -> None:
    """Add the ``profiles`` command."""
    parser = subparsers.add_parser(
        "profiles",
        help="list model and hardware profiles, or print one as TOML",
        description="List the shipped profiles with their sources, or print one whole as TOML: "
        "save it, edit it and give its path to --model, --costs or --hardware.",
        epilog="example: moesim profiles rtx4090",
    )
    parser.add_argument("name", nargs="?", help="a shipped profile's name, or a .toml file")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Print the list or the profile; 0. Raises ProfileError for an unknown or wrong profile."""
    if args.name is None:
        _print_list(args.json)
        return 0
    path, profile = load_any(args.name)
    if args.json:
        print(json.dumps(profile.to_dict()))
    else:
        print(path.read_text(encoding="utf-8"), end="")
    return 0


def _print_list(as_json: bool) -> None:
    models = [load_model(name) for name in list_models()]
    machines = [load_hardware(name) for name in list_hardware()]
    if as_json:
        listed: dict[str, Any] = {
            "schema": 1,
            "models": [_model_facts(model) for model in models],
            "hardware": [_hardware_facts(machine) for machine in machines],
        }
        print(json.dumps(listed))
        return
    _print_table(
        ("model", "source", "layers", "experts", "top k", "expert MiB", "precisions"),
        [
            (
                model.name,
                model.source,
                str(model.layers),
                str(model.experts),
                str(model.top_k),
                f"{int(model.expert_bytes_table().max()) / 2**20:.1f}",
                " ".join(model.precisions),
            )
            for model in models
        ],
    )
    print()
    _print_table(
        ("hardware", "source", "device GiB", "link GB/s", "compute"),
        [
            (
                machine.name,
                machine.source,
                f"{machine.memory.device_bytes / 2**30:.0f}",
                f"{machine.link.bytes_per_s / 1e9:.1f}",
                machine.to_dict()["compute"]["kind"],
            )
            for machine in machines
        ],
    )
    print("\n`moesim profiles NAME` prints one whole, with where each number comes from.")


def _print_table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    for row in (head, *rows):
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join(cells).rstrip())


def _model_facts(model: ModelProfile) -> dict[str, Any]:
    facts = model.to_dict()
    keys = ("name", "source", "provenance", "layers", "experts", "top_k", "expert_bytes")
    return {key: facts[key] for key in keys}


def _hardware_facts(machine: HardwareProfile) -> dict[str, Any]:
    facts = machine.to_dict()
    return {key: facts[key] for key in ("name", "source", "provenance", "memory", "link")}

"""``moesim completion``: let the shell complete commands and options."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

SHELLS = ("bash", "zsh", "tcsh")


def add_parser(subparsers: Subparsers) -> None:
    """Add the ``completion`` command."""
    parser = subparsers.add_parser(
        "completion",
        help="print a script that lets the shell complete commands and options",
        description="Print a completion script for a shell; source it from the shell's start-up "
        "file.",
        epilog="examples:\n  moesim completion bash > ~/.local/share/bash-completion/completions/"
        "moesim\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("shell", choices=SHELLS)
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Print the script; 0."""
    import shtab

    from moesim.cli import parser

    print(shtab.complete(parser(), args.shell))
    return 0

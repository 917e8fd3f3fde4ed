"""The command line: arguments in, exit codes out; no logic.

Results go to stdout, progress and errors to stderr. Codes: 0 done, 2 a mistake of the user's,
130 interrupted.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NoReturn

from moesim import __version__
from moesim.cli.interrupt import heard
from moesim.errors import MoesimError

INTERRUPTED = 130

COMMANDS = (
    "replay",
    "sweep",
    "advise",
    "plan",
    "real",
    "fit",
    "record",
    "trace",
    "policies",
    "profiles",
    "bench",
    "diff",
    "validate",
    "completion",
    "report",
    "figures",
)


class _Parser(argparse.ArgumentParser):
    """Tells a mistake in one line, as everything else does; the usage is a --help away."""

    def error(self, message: str) -> NoReturn:
        """Leave with code 2."""
        self.exit(2, f"moesim: error: {message}; see `{self.prog} --help`\n")


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    top = _Parser(
        prog="moesim",
        description="Replay recorded Mixture-of-Experts routing under expert-offloading policies.",
        epilog="example: moesim replay --trace demo --policy lru,lfu --capacity 25%",
    )
    top.add_argument("--version", action="version", version=f"moesim {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in COMMANDS:
        import_module(f"moesim.cli.{name}").add_parser(commands)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; its exit code."""
    try:
        args = parser().parse_args(argv)
        with heard():
            code: int = args.func(args)
        if sys.stdout is not None:
            sys.stdout.flush()
        return code
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("moesim"):
            raise
        print(
            f"moesim: error: needs {error.name}, which is not installed; `pip install .` in the "
            "checkout installs all that the simulator needs",
            file=sys.stderr,
        )
        return 2
    except MoesimError as error:
        print(f"moesim: error: {_one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("moesim: interrupted; nothing half-written was kept", file=sys.stderr)
        return INTERRUPTED
    except MemoryError:
        print("moesim: error: not enough memory; replay fewer runs at once", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # The reader of our output left; what it wanted, it has.
        _give_up_stdout()
        return 0
    except OSError as error:
        _give_up_stdout()
        where = f"{error.filename}: " if error.filename else ""
        print(f"moesim: error: {where}{error.strerror or error}", file=sys.stderr)
        return 2


def program() -> NoReturn:
    """What the installed command and ``python -m moesim`` run."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A name that the terminal cannot spell is shown escaped.
            stream.reconfigure(errors="backslashreplace")
    code = main()
    if code == INTERRUPTED:
        # A Ctrl-C that passed through code made by exec (as imports do) marks the interpreter, and
        # it would end as if killed, whatever we return. All is cleaned up and told by now.
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
        os._exit(code)
    sys.exit(code)


def _give_up_stdout() -> None:
    """Keep the interpreter from writing the rest to a broken output at its exit."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())

"""Help: every command has an example, and every example is understood."""

from __future__ import annotations

import argparse
import shlex
import subprocess
from collections.abc import Iterator

import pytest

from moesim.cli import main, parser
from moesim.cli.completion import SHELLS


def commands(top: argparse.ArgumentParser, path: str = "moesim") -> Iterator[tuple[str, str]]:
    """Each command with what stands at the end of its help."""
    yield path, top.epilog or ""
    for action in top._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, child in action.choices.items():
                yield from commands(child, f"{path} {name}")


def examples(epilog: str) -> list[str]:
    """The command lines of an epilog."""
    whole = epilog.replace("\\\n", " ")
    lines = (line.strip().removeprefix("example: ") for line in whole.splitlines())
    return [line for line in lines if line.startswith("moesim ")]


ALL = dict(commands(parser()))


@pytest.mark.parametrize("path", ALL)
def test_every_command_has_an_example_that_is_understood(path: str) -> None:
    found = examples(ALL[path])
    assert any(line.startswith(path) for line in found)
    for line in found:
        words = shlex.split(line.split(" > ")[0])[1:]
        parser().parse_args(words)


@pytest.mark.parametrize("shell", SHELLS)
def test_the_shell_learns_every_command(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    for path in ALL:
        assert path.split()[-1] in script


def test_bash_takes_the_script(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "bash"]) == 0
    script = capsys.readouterr().out
    done = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr

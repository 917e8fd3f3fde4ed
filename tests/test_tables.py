"""Tables in a narrow terminal: nothing that must be read or typed is cut."""

from __future__ import annotations

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from moesim.policies import SEATS
from moesim.policies.presets import PRESETS

ROOT = Path(__file__).resolve().parents[1]


def shown(width: int, *words: str) -> str:
    """What a command prints on a terminal of this width."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, width, 0, 0))
    env = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES")}
    command = [sys.executable, "-m", "moesim", *words]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=theirs, stderr=subprocess.PIPE, env={**env, "TERM": "xterm"}
    )
    os.close(theirs)
    text = b""
    while True:
        try:
            piece = os.read(ours, 65536)
        except OSError:
            break
        if not piece:
            break
        text += piece
    assert process.wait() == 0, process.stderr and process.stderr.read()
    if process.stderr:
        process.stderr.close()
    os.close(ours)
    return text.decode()


@pytest.mark.parametrize("width", [80, 100])
def test_policies_name_every_policy_and_seat(width: int) -> None:
    text = shown(width, "policies")
    assert "…" not in text
    words = set(text.split())
    assert set(PRESETS) <= words
    assert {name.partition(".")[2] for name in SEATS} <= words


@pytest.mark.parametrize("width", [80, 100])
def test_a_replay_shows_every_number(width: int) -> None:
    text = shown(width, "replay", "--trace", "demo", "--policy", "lru,next-gate", "--limit", "2")
    assert "…" not in text
    rows = [line.split() for line in text.splitlines() if line.strip().startswith(("lru ", "next"))]
    # The quickest bears a mark beside its time.
    assert len(rows) == 2 and {len(row) for row in rows} <= {17, 18}


@pytest.mark.parametrize("width", [80, 100])
def test_profiles_name_every_profile(width: int) -> None:
    text = shown(width, "profiles")
    assert "…" not in text and "rtx4090" in text and "mixtral-8x7b" in text


def test_a_path_is_printed_as_it_is(tmp_path: Path) -> None:
    odd = tmp_path / "a[red]b[x].parquet"
    odd.symlink_to(ROOT / "traces" / "samples" / "demo.parquet")
    assert odd.name in shown(100, "replay", "--trace", str(odd), "--limit", "1")

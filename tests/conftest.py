"""What every test may use."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("ci", derandomize=True, deadline=None, print_blob=True)
settings.load_profile("ci")

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session", autouse=True)
def compiled() -> None:
    """Compile the fast engine before any test looks at what a command prints."""
    from moesim.profile import load_hardware
    from moesim.replays import Request, replay
    from moesim.traces.samples import trace_path

    # One that sees the future as well: what tells it is compiled apart.
    request = Request(
        trace=trace_path("demo"),
        hardware=load_hardware("rtx4090"),
        policies=("lru", "min"),
        limit=1,
    )
    replay(request)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with real traces beside the checkout; tests that need it skip without it."""
    folder = ROOT.parent / "shared"
    if not (folder / "data" / "traces").is_dir():
        pytest.skip("needs ../shared/data, which is not here")
    return folder

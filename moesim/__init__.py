"""moesim: which expert-offloading policy serves a Mixture-of-Experts model best, with evidence.

``moesim.replay("demo", policy="finemoe", capacity=0.25)`` replays a trace; ``moesim.call`` runs any
other command. Both are in ``moesim.api``, and nothing heavy is imported before they are called.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moesim.api import Replay, call, replay

__version__ = "0.1.0"
__all__ = ["Replay", "__version__", "call", "replay"]

_OFFERED = frozenset({"Replay", "call", "replay"})


def __getattr__(name: str) -> Any:
    if name not in _OFFERED:
        raise AttributeError(f"module 'moesim' has no attribute {name!r}")
    from moesim import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_OFFERED})

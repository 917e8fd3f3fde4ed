"""moesim.real."""

from typing import TYPE_CHECKING, Any

if __name__ != "moesim.real":
    raise ImportError("import this folder as moesim.real, not as real")

if TYPE_CHECKING:
    from moesim.real.offload_model import offload as offload


def __getattr__(name: str) -> Any:
    # It needs torch and transformers, which the rest of the package may not.
    if name == "offload":
        from moesim.real.offload_model import offload

        return offload
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

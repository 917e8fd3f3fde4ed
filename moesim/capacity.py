"""``--capacity``: how much fast memory the experts get."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from moesim.errors import UsageError
from moesim.types import ExpertId, IntArray

_UNITS = {
    "": 1, "B": 1,
    "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40,
}  # fmt: skip
_HELP = "write 24GiB, 25%, 192 (experts in all), 8/layer or 8:6:4/layer (one number a layer)"


@dataclass(frozen=True, slots=True)
class Capacity:
    """``capacity_bytes``: one number (scope "global") or one a layer (scope "layer").

    starts : experts that are there at the start, free; None: as the run's initial state says.
    """

    text: str
    scope: str
    capacity_bytes: tuple[int, ...]
    starts: tuple[ExpertId, ...] | None = None


def parse_bytes(text: str, what: str) -> int:
    """``24GiB``, ``4GB``, ``1000B`` as bytes.

    Raises
    ------
    UsageError
        Naming ``what`` and the spelling.
    """
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)", text)
    if not match or match[2].upper() not in _UNITS:
        raise UsageError(f"{what} {text}: write a size such as 24GiB or 4GB")
    return int(Fraction(match[1]) * _UNITS[match[2].upper()])


def parse_dram(text: str, sizes: IntArray, experts: int) -> int:
    """``--dram``: bytes of host memory for experts, as ``24GiB`` or as a share of all experts.

    sizes : int64 [precisions, layers], bytes of one expert.

    Raises
    ------
    UsageError
        For another spelling, or room for less than one expert.
    """
    if match := re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)%", text):
        nbytes = int(Fraction(match[1]) / 100 * int(sizes[0].sum()) * experts)
    else:
        nbytes = parse_bytes(text, "--dram")
    if nbytes < int(sizes.max()):
        raise UsageError(
            f"--dram {text}: has room for {nbytes} bytes, and one expert has {int(sizes.max())}; "
            "give at least one expert"
        )
    return nbytes


def parse_capacity(text: str, scope: str, expert_bytes: IntArray, experts: int) -> Capacity:
    """Read one ``--capacity``.

    A count of experts in all is taken at their mean size. Scope "layer" shares bytes in equal
    parts, and a share (25%) within each layer, rounded down to whole experts.

    Parameters
    ----------
    scope : what ``--scope`` says; ``N/layer`` is always per layer.
    expert_bytes : int64 [layers], full precision.

    Raises
    ------
    UsageError
        For a spelling that is none of the four, or less than one expert in a cache.
    """
    sizes = [int(b) for b in expert_bytes]
    whole = sum(sizes) * experts
    if match := re.fullmatch(r"([0-9]+)/layer", text):
        scope, given = "layer", tuple(int(match[1]) * size for size in sizes)
    elif re.fullmatch(r"[0-9]+(:[0-9]+)+/layer", text):
        scope, given = "layer", _listed(text, sizes)
    elif match := re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)%", text):
        if Fraction(match[1]) > 100:
            raise UsageError(f"--capacity {text}: more than there is; 100% holds every expert")
        given = _share(Fraction(match[1]) / 100, scope, sizes, experts)
    elif text.isascii() and text.isdecimal():
        given = _split(int(text) * sum(sizes) // len(sizes), scope, sizes)
    elif re.fullmatch(r"[0-9]+(?:\.[0-9]+)?\s*[A-Za-z]+", text):
        given = _split(parse_bytes(text, "--capacity"), scope, sizes)
    else:
        raise UsageError(f"--capacity {text}: {_HELP}")
    given = tuple(min(g, whole) for g in given)
    _refuse_too_small(text, scope, given, sizes)
    return Capacity(text, scope, given)


def _listed(text: str, sizes: list[int]) -> tuple[int, ...]:
    counts = [int(n) for n in text.removesuffix("/layer").split(":")]
    if len(counts) != len(sizes):
        raise UsageError(
            f"--capacity {text}: has {len(counts)} layers, and the model {len(sizes)}; give one "
            "number for each"
        )
    return tuple(n * size for n, size in zip(counts, sizes, strict=True))


def _share(share: Fraction, scope: str, sizes: list[int], experts: int) -> tuple[int, ...]:
    if scope == "global":
        return (int(share * sum(sizes) * experts),)
    return tuple(int(share * experts) * size for size in sizes)


def _split(total: int, scope: str, sizes: list[int]) -> tuple[int, ...]:
    if scope == "global":
        return (total,)
    return tuple(total // len(sizes) for _ in sizes)


def _refuse_too_small(text: str, scope: str, given: tuple[int, ...], sizes: list[int]) -> None:
    for layer, size in enumerate(sizes):
        held = given[layer] if scope == "layer" else given[0]
        if held < size:
            where = f"layer {layer}" if scope == "layer" else "the cache"
            raise UsageError(
                f"--capacity {text}: leaves {held} bytes for {where}, and one expert of layer "
                f"{layer} has {size}; give at least one expert"
            )

"""Model and hardware profiles: the shapes, bytes and rates that a replay rests on.

A profile is a TOML file with the unit in every key, read into frozen plain data. Shipped ones lie
under ``moesim/profiles``; a user's own is named by its path. Every key is checked: an unknown,
missing or impossible value is a :class:`~moesim.errors.ProfileError` that names file and key.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from moesim.errors import ProfileError

SCHEMA = 1
MODEL_SOURCES = ("config", "measured", "datasheet", "computed", "assumed")
HARDWARE_SOURCES = ("measured", "datasheet", "assumed")
SCORES = (
    "softmax",  # over all experts, the chosen k kept as they are
    "softmax-renorm",  # over all experts, then renormalised over the chosen k
    "softmax-topk",  # over the k largest logits only (equal to softmax-renorm)
    "sparsemixer",  # two masked softmaxes, Phi-MoE's
    "sigmoid-bias-scale",  # choice by sigmoid + bias, weights unbiased, renormalised and scaled
    "unknown",
)
MOST_DEVICES = 64
_BITS = {"int8": 8, "int4": 4}
_GROUP = 128
"""Weights that share a scale, in a precision that a profile does not state."""
_SHIPPED = Path(__file__).parent / "profiles"
_INT64 = 2**63 - 1
_PerLayer = int | tuple[int, ...]
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Stack:
    """A run of MoE layers that a token passes through: ``encoder`` or ``decoder``."""

    name: str
    layers: int


@dataclass(frozen=True, slots=True)
class ModelProfile:
    """The shape of one Mixture-of-Experts model and the bytes and operations of its parts.

    MoE layers are numbered 0..layers-1, encoder first. A layer without experts is part of the
    dense share of the MoE layer that follows it. ``dense_*``, ``kv_*`` and ``expert_bytes`` hold
    one number for all layers or a tuple with one for each.
    """

    name: str
    source: str  # one of MODEL_SOURCES
    provenance: str  # where the numbers come from
    hf_id: str
    layers: int  # MoE layers in all
    experts: int  # routed experts of a layer
    top_k: int
    shared_experts: int  # always used, never offloaded, counted in dense_bytes
    stacks: tuple[Stack, ...]
    score: str  # one of SCORES
    dtype: str  # of everything but the experts
    precisions: tuple[str, ...]  # of experts; the first is what ships, each next one no larger
    expert_bytes: tuple[_PerLayer, ...]  # of one expert, by precision
    dense_bytes: _PerLayer  # attention, norms, router, shared experts: read each forward pass
    expert_flops_per_token: int
    dense_flops_per_token: _PerLayer  # without attention over the context
    kv_bytes_per_token_per_layer: _PerLayer
    hidden: int
    intermediate: int  # of one routed expert
    kv_window_tokens: _PerLayer = 0  # positions that attention keeps; 0 = all
    head_bytes: int = 0  # final norms and output head, read once each forward pass
    head_flops_per_token: int = 0
    held_bytes: int = 0  # resident but not read each pass: token embedding, cross-attention K, V
    config: tuple[tuple[str, int | bool], ...] = ()  # what the numbers were computed from

    def held_in(self, names: Sequence[str]) -> ModelProfile:
        """This model with its experts in these precisions, the largest first.

        What the profile lacks of ``int8`` and ``int4`` is worked out: 8 or 4 bits a weight and a
        16-bit scale for each 128 of them. Raises ProfileError for another, and for a wrong order.
        """
        sizes = tuple(self._bytes_in(name) for name in names)
        held = replace(self, precisions=tuple(names), expert_bytes=sizes)
        return ModelProfile.from_dict(held.to_dict(), f"{self.name} in {','.join(names)}")

    def _bytes_in(self, name: str) -> _PerLayer:
        if name in self.precisions:
            return self.expert_bytes[self.precisions.index(name)]
        if name not in _BITS:
            known = ", ".join(dict.fromkeys((*self.precisions, *_BITS)))
            raise ProfileError(f"{self.name}: has no precision {name!r}; name some of {known}")
        weights = self.expert_flops_per_token // 2
        nbytes = -(-weights * _BITS[name] // 8) + 2 * -(-weights // _GROUP)
        shipped = self.precisions[0]
        if nbytes >= min(_spread(self.expert_bytes[0], self.layers)):
            raise ProfileError(
                f"{self.name}: {name} would be no smaller than {shipped}, which its experts have"
            )
        return nbytes

    def expert_bytes_table(self, precision: int = 0) -> npt.NDArray[np.int64]:
        """Bytes of one expert, int64 [layers]. IndexError for an unknown precision."""
        return self._table(self.expert_bytes[precision])

    def dense_bytes_table(self) -> npt.NDArray[np.int64]:
        """Dense bytes read each forward pass, int64 [layers]."""
        return self._table(self.dense_bytes)

    def dense_flops_table(self) -> npt.NDArray[np.int64]:
        """Dense operations for one token, int64 [layers]."""
        return self._table(self.dense_flops_per_token)

    def kv_bytes_table(self) -> npt.NDArray[np.int64]:
        """KV-cache bytes of one token, int64 [layers]."""
        return self._table(self.kv_bytes_per_token_per_layer)

    def kv_window_table(self) -> npt.NDArray[np.int64]:
        """Positions that attention keeps, 0 = all, int64 [layers]."""
        return self._table(self.kv_window_tokens)

    def all_expert_bytes(self, precision: int = 0) -> int:
        """Bytes of all routed experts of all layers."""
        return self.experts * int(self.expert_bytes_table(precision).sum())

    def fixed_bytes(self) -> int:
        """Bytes of all weights but the routed experts'."""
        return int(self.dense_bytes_table().sum()) + self.head_bytes + self.held_bytes

    def _table(self, value: _PerLayer) -> npt.NDArray[np.int64]:
        return np.array(_spread(value, self.layers), dtype=np.int64)

    @property
    def digest(self) -> str:
        """SHA-256, in hex, of the canonical JSON of :meth:`to_dict`."""
        return _digest(self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; :meth:`from_dict` gives back an equal profile."""
        return {
            "schema": SCHEMA,
            "name": self.name,
            "source": self.source,
            "provenance": self.provenance,
            "hf_id": self.hf_id,
            "layers": self.layers,
            "experts": self.experts,
            "top_k": self.top_k,
            "shared_experts": self.shared_experts,
            "stacks": [[stack.name, stack.layers] for stack in self.stacks],
            "score": self.score,
            "dtype": self.dtype,
            "hidden": self.hidden,
            "intermediate": self.intermediate,
            "precisions": list(self.precisions),
            "dense_bytes": _plain(self.dense_bytes),
            "expert_flops_per_token": self.expert_flops_per_token,
            "dense_flops_per_token": _plain(self.dense_flops_per_token),
            "kv_bytes_per_token_per_layer": _plain(self.kv_bytes_per_token_per_layer),
            "kv_window_tokens": _plain(self.kv_window_tokens),
            "head_bytes": self.head_bytes,
            "head_flops_per_token": self.head_flops_per_token,
            "held_bytes": self.held_bytes,
            "expert_bytes": dict(zip(self.precisions, map(_plain, self.expert_bytes), strict=True)),
            "config": dict(self.config),
        }

    @classmethod
    def from_dict(cls, data: object, where: str = "model profile") -> ModelProfile:
        """The profile that ``data`` describes; ``where`` names its origin in errors.

        Raises ProfileError for an unknown, missing or impossible value.
        """
        return _model(_root(data, where))

    @classmethod
    def generic(cls, layers: int, experts: int, top_k: int, name: str = "unknown") -> ModelProfile:
        """A stand-in for a model of which only the routing is known; every size is assumed.

        Raises ProfileError when the shape is impossible.
        """
        hidden, intermediate = 2048, 1024
        expert_weights = 3 * hidden * intermediate
        dense_weights = 4 * hidden * hidden + experts * hidden
        made = cls(
            name=name,
            source="assumed",
            provenance="assumed: hidden 2048, gated experts of 1024, attention of 4 x 2048 x 2048",
            hf_id="",
            layers=layers,
            experts=experts,
            top_k=top_k,
            shared_experts=0,
            stacks=(Stack("decoder", layers),),
            score="unknown",
            dtype="bf16",
            precisions=("bf16",),
            expert_bytes=(2 * expert_weights,),
            dense_bytes=2 * (dense_weights + 2 * hidden),
            expert_flops_per_token=2 * expert_weights,
            dense_flops_per_token=2 * dense_weights,
            kv_bytes_per_token_per_layer=2 * 2 * hidden,
            hidden=hidden,
            intermediate=intermediate,
        )
        return cls.from_dict(made.to_dict(), f"model {name!r}")


@dataclass(frozen=True, slots=True)
class Memory:
    """Device memory."""

    device_bytes: int
    reserved_bytes: int  # the driver's context, activations: never for experts
    unified: bool = False  # host and device share it, so the link is the read from the drive
    copy_bytes_per_s: float = math.inf  # of a copy within it; of unified memory alone


@dataclass(frozen=True, slots=True)
class Link:
    """One kind of host-to-device channel.

    ``curve`` holds (bytes, ns) of whole transfers, rising; where it ends, ``bytes_per_s`` goes on.
    ``handover_ns`` is not the link's own and is added to each transfer: the host gives it out,
    hears its end and settles the books, and neither the next transfer nor what waits for this one
    goes on before. A link that is made to last (``real run --bandwidth``) lasts without it.
    """

    bytes_per_s: float  # may be inf
    latency_ns: int  # once for each transfer
    chunk_bytes: int  # 0 = a transfer is one chunk
    channels: int = 1
    curve: tuple[tuple[int, int], ...] = ()
    handover_ns: int = 0


@dataclass(frozen=True, slots=True)
class Interconnect:
    """How tokens travel between devices: one trip for all that leave or reach a device."""

    bytes_per_s: float  # may be inf
    latency_ns: int  # once for each trip


@dataclass(frozen=True, slots=True)
class Drive:
    """The drive that holds the experts that host memory has no room for; as ``Link``."""

    bytes_per_s: float  # may be inf
    latency_ns: int  # once for each read
    chunk_bytes: int  # 0 = a read is one chunk
    curve: tuple[tuple[int, int], ...] = ()


ASSUMED_DRIVE = Drive(math.inf, 100_000, 4 << 20)
"""Latency and chunks of a drive of which only the rate is told (``--ssd``)."""


@dataclass(frozen=True, slots=True)
class Roofline:
    """Time is the longer of memory traffic and arithmetic, and a fixed cost for each kernel."""

    flops_per_s: float  # may be inf
    bytes_per_s: float  # may be inf
    kernel_ns: int


@dataclass(frozen=True, slots=True)
class Constant:
    """One time for each dense part and one for each expert, whatever the tokens."""

    dense_ns: int
    expert_ns: int


@dataclass(frozen=True, slots=True)
class Table:
    """Measured times of one model: expert (tokens, ns), dense (tokens, context, ns), rising.

    ``head`` holds (tokens, ns) of the output head, once each forward pass; without it the dense
    times hold the head as well.
    """

    expert: tuple[tuple[int, int], ...]
    dense: tuple[tuple[int, int, int], ...]
    model: str = ""  # the model measured; "" = not said
    head: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class ConstantExpert:
    """One time for each expert that the host computes."""

    expert_ns: int


@dataclass(frozen=True, slots=True)
class TableExpert:
    """Measured times of one model's experts on the host: (tokens, ns), rising."""

    expert: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Host:
    """The host: what routing on it costs, how fast it runs policies and experts."""

    sync_ns: int  # routing known on the host, once for each layer event
    plan_ns: int  # foreground policy work, once for each layer event
    policy_ops_per_s: float  # background jobs; may be inf
    policy_bytes_per_s: float  # background jobs; may be inf
    workers: int
    cpu: Roofline | ConstantExpert | TableExpert
    links_bytes_per_s: float = math.inf  # what it gives the links of all devices together


@dataclass(frozen=True, slots=True)
class HardwareProfile:
    """A machine: memory, link, device compute, host. Times are ns, rates are a second's.

    With several ``devices`` memory, link and compute are those of each.
    """

    name: str
    source: str  # one of HARDWARE_SOURCES
    provenance: str
    memory: Memory
    link: Link
    compute: Roofline | Constant | Table
    host: Host
    devices: int = 1
    interconnect: Interconnect | None = None  # None: nobody said; what travels takes no time
    ssd: Drive | None = None

    @property
    def digest(self) -> str:
        """SHA-256, in hex, of the canonical JSON of :meth:`to_dict`."""
        return _digest(self.to_dict())

    def with_bandwidth(self, bytes_per_s: float) -> HardwareProfile:
        """This machine with another link bandwidth; a measured curve no longer holds and is gone.

        Raises ProfileError unless ``bytes_per_s`` is above 0 (inf is allowed).
        """
        rate = _Keys({"bytes_per_s": bytes_per_s}, self.name, "link.").rate("bytes_per_s")
        return replace(self, link=replace(self.link, bytes_per_s=rate, curve=()))

    def must_share(self, links: int) -> bool:
        """Whether the host gives so many links less than their own rates together."""
        return links > 1 and self.host.links_bytes_per_s < links * self.link.bytes_per_s

    def tiered(self) -> HardwareProfile:
        """This machine where an expert is read from the drive into host memory, then copied.

        Of unified memory the link is the read from the drive already; its second stage is a copy
        within that memory, and experts on the host are computed from there.

        Raises ProfileError without a ``[ssd]``.
        """
        if self.ssd is not None:
            return self
        if not self.memory.unified:
            raise ProfileError(
                f"{self.name}: has no [ssd] to read experts from; add the table to the profile, or "
                "give --ssd RATE"
            )
        link, copies, cpu = self.link, self.memory.copy_bytes_per_s, self.host.cpu
        if isinstance(cpu, Roofline):
            cpu = replace(cpu, bytes_per_s=max(cpu.bytes_per_s, copies))
        return replace(
            self,
            ssd=Drive(link.bytes_per_s, link.latency_ns, link.chunk_bytes, link.curve),
            link=replace(link, bytes_per_s=copies, latency_ns=0, curve=()),
            host=replace(self.host, cpu=cpu),
        )

    def with_drive(self, bytes_per_s: float) -> HardwareProfile:
        """This machine with another drive; a measured curve no longer holds and is gone.

        Raises ProfileError unless ``bytes_per_s`` is above 0 (inf is allowed).
        """
        rate = _Keys({"bytes_per_s": bytes_per_s}, self.name, "ssd.").rate("bytes_per_s")
        machine = self.tiered() if self.memory.unified else self
        return replace(
            machine, ssd=replace(machine.ssd or ASSUMED_DRIVE, bytes_per_s=rate, curve=())
        )

    def untiered(self) -> HardwareProfile:
        """This machine where host memory holds every expert: no drive takes part."""
        return replace(self, ssd=None)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types (an infinite rate is the text "inf").

        What few machines have (``ssd``, unified memory) is there only where it is used, so that
        nobody else's digest depends on it.
        """
        cpu, memory = self.host.cpu, self.memory
        shared = {"unified": True, "copy_bytes_per_s": _plain_rate(memory.copy_bytes_per_s)}
        return {
            "schema": SCHEMA,
            "name": self.name,
            "source": self.source,
            "provenance": self.provenance,
            **self._several_dict(),
            "memory": {
                "device_bytes": self.memory.device_bytes,
                "reserved_bytes": self.memory.reserved_bytes,
                **(shared if memory.unified else {}),
            },
            "link": {
                "bytes_per_s": _plain_rate(self.link.bytes_per_s),
                "latency_ns": self.link.latency_ns,
                "chunk_bytes": self.link.chunk_bytes,
                "channels": self.link.channels,
                "curve": [list(point) for point in self.link.curve],
                "handover_ns": self.link.handover_ns,
            },
            **({} if self.ssd is None else {"ssd": _drive_dict(self.ssd)}),
            "compute": _compute_dict(self.compute),
            "host": {
                "sync_ns": self.host.sync_ns,
                "plan_ns": self.host.plan_ns,
                "policy_ops_per_s": _plain_rate(self.host.policy_ops_per_s),
                "policy_bytes_per_s": _plain_rate(self.host.policy_bytes_per_s),
                "workers": self.host.workers,
                "cpu": _compute_dict(cpu),
                **self._links_dict(),
            },
        }

    def _several_dict(self) -> dict[str, Any]:
        """Of several devices; a machine of one is described as ever."""
        made: dict[str, Any] = {"devices": self.devices} if self.devices > 1 else {}
        if self.interconnect is not None:
            made["interconnect"] = {
                "bytes_per_s": _plain_rate(self.interconnect.bytes_per_s),
                "latency_ns": self.interconnect.latency_ns,
            }
        return made

    def _links_dict(self) -> dict[str, Any]:
        rate = self.host.links_bytes_per_s
        return {} if math.isinf(rate) else {"links_bytes_per_s": rate}

    @classmethod
    def from_dict(cls, data: object, where: str = "hardware profile") -> HardwareProfile:
        """The profile that ``data`` describes; ``where`` names its origin in errors.

        Raises ProfileError for an unknown, missing or impossible value.
        """
        return _hardware(_root(data, where), Path())


def list_models() -> tuple[str, ...]:
    """Names of the shipped model profiles."""
    return _shipped("model")


def list_hardware() -> tuple[str, ...]:
    """Names of the shipped hardware profiles."""
    return _shipped("hardware")


def load_model(name_or_path: str | Path) -> ModelProfile:
    """A shipped model profile by name, or a TOML file by path. Raises ProfileError."""
    path = _find(name_or_path, "model")
    return _model(_root(_read_toml(path), str(path)))


def load_hardware(name_or_path: str | Path) -> HardwareProfile:
    """A shipped hardware profile by name, or a TOML file by path. Raises ProfileError."""
    path = _find(name_or_path, "hardware")
    return _hardware(_root(_read_toml(path), str(path)), path.parent)


def load_any(name_or_path: str | Path) -> tuple[Path, ModelProfile | HardwareProfile]:
    """A profile of either kind and its file, by name or path. Raises ProfileError."""
    path = _find(name_or_path, "model", "hardware")
    keys = _root(_read_toml(path), str(path))
    return path, _hardware(keys, path.parent) if "memory" in keys.data else _model(keys)


def _find(name_or_path: str | Path, *kinds: str) -> Path:
    """The profile's file: a shipped name's, else a path (with a folder, or ending in .toml)."""
    text = str(name_or_path)
    for kind in kinds:
        if text in _shipped(kind):
            return _SHIPPED / kind / f"{text}.toml"
    path = Path(name_or_path)
    if path.suffix == ".toml" or path.name != text:
        return path
    names = [name for kind in kinds for name in _shipped(kind)]
    raise ProfileError(
        f"no {' or '.join(kinds)} profile named {text!r}; {_suggest(text, names)}"
        " (`moesim profiles` lists all, or give the path of a .toml file)"
    )


def _shipped(kind: str) -> tuple[str, ...]:
    return tuple(sorted(path.stem for path in (_SHIPPED / kind).glob("*.toml")))


def _suggest(text: str, names: Sequence[str]) -> str:
    close = difflib.get_close_matches(text.lower(), names, n=3, cutoff=0.5)
    if close:
        return "did you mean " + ", ".join(close) + "?"
    return "known: " + ", ".join(names)


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ProfileError(f"{path}: no such file; give an existing .toml profile") from None
    except OSError as error:
        raise ProfileError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise ProfileError(f"{path}: not a TOML profile ({reason})") from None


class _Keys:
    """One table of a profile, read key by key; what was not asked for is unknown."""

    def __init__(self, data: dict[str, Any], where: str, prefix: str = "") -> None:
        self.data = data
        self.where = where
        self.prefix = prefix
        self.asked: list[str] = []

    def fail(self, key: str, what: str) -> ProfileError:
        name = " ".join(f"{self.prefix}{key}".split())
        return ProfileError(f"{self.where}: {name}: {what}")

    def has(self, key: str) -> bool:
        self.asked.append(key)
        return key in self.data

    def get(self, key: str) -> Any:
        if not self.has(key):
            raise self.fail(key, "missing; add this key")
        return self.data[key]

    def close(self) -> None:
        for key in self.data:
            if key not in self.asked:
                raise self.fail(key, f"unknown key; {_suggest(key, sorted(set(self.asked)))}")

    def table(self, key: str) -> _Keys:
        value = self.get(key)
        if not isinstance(value, dict):
            raise self.fail(key, f"must be a table, got {_show(value)}")
        return _Keys(value, self.where, f"{self.prefix}{key}.")

    def text(self, key: str, empty: bool = False) -> str:
        value = self.get(key)
        if not isinstance(value, str):
            raise self.fail(key, f"must be text, got {_show(value)}")
        if not empty and not value.strip():
            raise self.fail(key, "is empty; write some text")
        return value

    def choice(self, key: str, choices: Sequence[str]) -> str:
        value = self.text(key)
        if value not in choices:
            raise self.fail(key, f"must be one of {', '.join(choices)}; got {_show(value)}")
        return value

    def whole(self, key: str, least: int = 0, most: int = _INT64) -> int:
        return self._whole(key, self.get(key), least, most)

    def _whole(self, key: str, value: object, least: int = 0, most: int = _INT64) -> int:
        if isinstance(value, float) and math.isnan(value):
            raise self.fail(key, "is NaN; write a whole number")
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.fail(key, f"must be a whole number, got {_show(value)}")
        if value < least:
            raise self.fail(key, f"must be at least {least}, got {_show(value)}")
        if value > most:
            raise self.fail(key, f"must be at most {most}, got {_show(value)}")
        return value

    def truth(self, key: str) -> bool:
        value = self.get(key)
        if not isinstance(value, bool):
            raise self.fail(key, f"must be true or false, got {_show(value)}")
        return value

    def per_layer(self, key: str, layers: int, least: int) -> _PerLayer:
        value = self.get(key)
        if not isinstance(value, list | tuple):
            return self._whole(key, value, least)
        if len(value) != layers:
            raise self.fail(
                key, f"must hold one number for each of {layers} layers, got {len(value)}"
            )
        numbers = tuple(self._whole(f"{key}[{i}]", v, least) for i, v in enumerate(value))
        return numbers[0] if len(set(numbers)) == 1 else numbers

    def rate(self, key: str) -> float:
        value = self.get(key)
        if value == "inf":
            return math.inf
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.fail(key, f"must be a number above 0 or inf, got {_show(value)}")
        if math.isnan(value):
            raise self.fail(key, "is NaN; write a number above 0, or inf")
        if value <= 0:
            raise self.fail(key, f"must be above 0, got {_show(value)}; inf means no limit")
        try:
            return float(value)
        except OverflowError:
            raise self.fail(key, "is too large; write inf for no limit") from None

    def rows(self, key: str, columns: tuple[str, ...], folder: Path) -> tuple[tuple[int, ...], ...]:
        """Rows of whole numbers, inline or in a Parquet file beside the profile."""
        value = self.get(key)
        if isinstance(value, str):
            value = _read_rows(folder / value, columns)
        if not isinstance(value, list | tuple):
            raise self.fail(key, f"must be rows [{', '.join(columns)}] or a Parquet file's name")
        return tuple(self._row(f"{key}[{i}]", row, columns) for i, row in enumerate(value))

    def _row(self, key: str, row: object, columns: tuple[str, ...]) -> tuple[int, ...]:
        if not isinstance(row, list | tuple) or len(row) != len(columns):
            raise self.fail(key, f"must be [{', '.join(columns)}], got {_show(row)}")
        return tuple(self._whole(key, value) for value in row)


def _show(value: object) -> str:
    try:
        text = repr(value)
    except ValueError:  # Python refuses to print integers of thousands of digits
        return "a huge number"
    return text if len(text) <= 60 else text[:57] + "..."


def _root(data: object, where: str) -> _Keys:
    if not isinstance(data, dict):
        raise ProfileError(f"{where}: must be a table of keys, got {_show(data)}")
    keys = _Keys(data, where)
    schema = keys.whole("schema", least=1)
    if schema > SCHEMA:
        raise keys.fail("schema", f"{schema} is newer than this moesim reads ({SCHEMA}); update it")
    return keys


def _model(keys: _Keys) -> ModelProfile:
    layers = keys.whole("layers", least=1, most=2**15 - 1)
    experts = keys.whole("experts", least=1, most=2**16 - 2)
    precisions, expert_bytes = _expert_bytes(keys, layers)
    profile = ModelProfile(
        name=keys.text("name"),
        source=keys.choice("source", MODEL_SOURCES),
        provenance=keys.text("provenance"),
        hf_id=keys.text("hf_id", empty=True),
        layers=layers,
        experts=experts,
        top_k=keys.whole("top_k", least=1, most=experts),
        shared_experts=keys.whole("shared_experts"),
        stacks=_stacks(keys, layers),
        score=keys.choice("score", SCORES),
        dtype=keys.text("dtype"),
        precisions=precisions,
        expert_bytes=expert_bytes,
        dense_bytes=keys.per_layer("dense_bytes", layers, least=1),
        expert_flops_per_token=keys.whole("expert_flops_per_token", least=1),
        dense_flops_per_token=keys.per_layer("dense_flops_per_token", layers, least=1),
        kv_bytes_per_token_per_layer=keys.per_layer(
            "kv_bytes_per_token_per_layer", layers, least=0
        ),
        hidden=keys.whole("hidden", least=1),
        intermediate=keys.whole("intermediate", least=1),
        kv_window_tokens=keys.per_layer("kv_window_tokens", layers, least=0),
        head_bytes=keys.whole("head_bytes"),
        head_flops_per_token=keys.whole("head_flops_per_token"),
        held_bytes=keys.whole("held_bytes"),
        config=_config(keys),
    )
    keys.close()
    return profile


def _stacks(keys: _Keys, layers: int) -> tuple[Stack, ...]:
    value = keys.get("stacks")
    shape = 'must be [["decoder", LAYERS]] or [["encoder", LAYERS], ["decoder", LAYERS]]'
    if not isinstance(value, list | tuple) or not value:
        raise keys.fail("stacks", f"{shape}, got {_show(value)}")
    stacks = []
    for i, pair in enumerate(value):
        if not isinstance(pair, list | tuple) or len(pair) != 2 or not isinstance(pair[0], str):
            raise keys.fail(f"stacks[{i}]", f"{shape}, got {_show(pair)}")
        stacks.append(Stack(pair[0], keys._whole(f"stacks[{i}]", pair[1], least=1)))
    names = [stack.name for stack in stacks]
    if names not in (["decoder"], ["encoder"], ["encoder", "decoder"]):
        raise keys.fail("stacks", f"{shape}, got {_show(value)}")
    total = sum(stack.layers for stack in stacks)
    if total != layers:
        raise keys.fail("stacks", f"holds {total} layers in all, but layers = {layers}")
    return tuple(stacks)


def _expert_bytes(keys: _Keys, layers: int) -> tuple[tuple[str, ...], tuple[_PerLayer, ...]]:
    names = keys.get("precisions")
    if (
        not isinstance(names, list | tuple)
        or not names
        or not all(isinstance(name, str) and name for name in names)
    ):
        raise keys.fail("precisions", f'must be names such as ["bf16"], got {_show(names)}')
    if len(set(names)) != len(names):
        raise keys.fail("precisions", f"holds a name twice: {_show(names)}")
    table = keys.table("expert_bytes")
    for name in table.data:
        if name not in names:
            raise table.fail(name, "is not in precisions; add it there, or remove it here")
    sizes = tuple(table.per_layer(name, layers, least=1) for name in names)
    for i in range(1, len(sizes)):
        pairs = zip(_spread(sizes[i - 1], layers), _spread(sizes[i], layers), strict=True)
        if any(after > before for before, after in pairs):
            raise table.fail(names[i], f"is larger than {names[i - 1]}; order precisions by size")
    return tuple(names), sizes


def _config(keys: _Keys) -> tuple[tuple[str, int | bool], ...]:
    table = keys.table("config")
    for key, value in table.data.items():
        if not isinstance(value, bool):
            table._whole(key, value)
    return tuple(sorted(table.data.items()))


def _hardware(keys: _Keys, folder: Path) -> HardwareProfile:
    memory, link, host = keys.table("memory"), keys.table("link"), keys.table("host")
    profile = HardwareProfile(
        name=keys.text("name"),
        source=keys.choice("source", HARDWARE_SOURCES),
        provenance=keys.text("provenance"),
        memory=Memory(
            device_bytes=memory.whole("device_bytes", least=1),
            reserved_bytes=memory.whole("reserved_bytes"),
            unified=_optional(memory, "unified", lambda: memory.truth("unified"), False),
            copy_bytes_per_s=_optional(
                memory, "copy_bytes_per_s", lambda: memory.rate("copy_bytes_per_s"), math.inf
            ),
        ),
        link=Link(
            bytes_per_s=link.rate("bytes_per_s"),
            latency_ns=link.whole("latency_ns"),
            chunk_bytes=link.whole("chunk_bytes"),
            channels=_optional(link, "channels", lambda: link.whole("channels", least=1), 1),
            curve=_optional(link, "curve", lambda: _curve(link, folder), ()),
            handover_ns=_optional(link, "handover_ns", lambda: link.whole("handover_ns"), 0),
        ),
        compute=_compute(keys.table("compute"), folder),
        host=Host(
            sync_ns=host.whole("sync_ns"),
            plan_ns=host.whole("plan_ns"),
            policy_ops_per_s=host.rate("policy_ops_per_s"),
            policy_bytes_per_s=_optional(
                host, "policy_bytes_per_s", lambda: host.rate("policy_bytes_per_s"), math.inf
            ),
            workers=host.whole("workers", least=1),
            cpu=_cpu(host.table("cpu"), folder),
            links_bytes_per_s=_optional(
                host, "links_bytes_per_s", lambda: host.rate("links_bytes_per_s"), math.inf
            ),
        ),
        devices=_optional(keys, "devices", lambda: keys.whole("devices", 1, MOST_DEVICES), 1),
        interconnect=_optional(
            keys, "interconnect", lambda: _interconnect(keys.table("interconnect")), None
        ),
        ssd=_optional(keys, "ssd", lambda: _drive(keys.table("ssd"), folder), None),
    )
    for table in (keys, memory, link, host):
        table.close()
    if profile.host.links_bytes_per_s < profile.link.bytes_per_s:
        raise host.fail("links_bytes_per_s", "is less than one link's bytes_per_s; correct one")
    if profile.memory.reserved_bytes >= profile.memory.device_bytes:
        raise memory.fail("reserved_bytes", "leaves nothing of device_bytes; make it smaller")
    if "copy_bytes_per_s" in memory.data and not profile.memory.unified:
        raise memory.fail("copy_bytes_per_s", "is of unified memory; set unified, or remove it")
    return profile


def _interconnect(keys: _Keys) -> Interconnect:
    made = Interconnect(keys.rate("bytes_per_s"), keys.whole("latency_ns"))
    keys.close()
    return made


def _drive(keys: _Keys, folder: Path) -> Drive:
    made = Drive(
        bytes_per_s=keys.rate("bytes_per_s"),
        latency_ns=keys.whole("latency_ns"),
        chunk_bytes=keys.whole("chunk_bytes"),
        curve=_optional(keys, "curve", lambda: _curve(keys, folder), ()),
    )
    keys.close()
    return made


def _optional(keys: _Keys, key: str, read: Callable[[], _T], default: _T) -> _T:
    return read() if keys.has(key) else default


def _curve(link: _Keys, folder: Path) -> tuple[tuple[int, int], ...]:
    rows = link.rows("curve", ("bytes", "ns"), folder)
    points = tuple((row[0], row[1]) for row in rows)
    _rising(link, "curve", points)
    if points and points[0][1] < link.whole("latency_ns"):
        raise link.fail("curve[0]", "takes less than latency_ns; correct one of the two")
    if points and points[0][0] == 0:
        raise link.fail("curve[0]", "starts at 0 bytes; latency_ns says that already, remove it")
    return points


def _rising(keys: _Keys, key: str, points: Sequence[tuple[int, int]]) -> None:
    for i in range(1, len(points)):
        if points[i][0] <= points[i - 1][0]:
            raise keys.fail(f"{key}[{i}]", "must come after the row before it; sort the rows")
        if points[i][1] < points[i - 1][1]:
            raise keys.fail(
                f"{key}[{i}]", "takes less time than a smaller one; times must not fall"
            )


def _compute(keys: _Keys, folder: Path) -> Roofline | Constant | Table:
    kind = keys.choice("kind", ("roofline", "constant", "table"))
    made: Roofline | Constant | Table
    if kind == "roofline":
        made = _roofline(keys)
    elif kind == "constant":
        made = Constant(keys.whole("dense_ns"), keys.whole("expert_ns"))
    else:
        made = _times(keys, folder)
    keys.close()
    return made


def _cpu(keys: _Keys, folder: Path) -> Roofline | ConstantExpert | TableExpert:
    kind = keys.choice("kind", ("roofline", "constant", "table"))
    made: Roofline | ConstantExpert | TableExpert
    if kind == "roofline":
        made = _roofline(keys)
    elif kind == "constant":
        made = ConstantExpert(keys.whole("expert_ns"))
    else:
        made = TableExpert(_by_tokens(keys, "expert", folder))
    keys.close()
    return made


def _roofline(keys: _Keys) -> Roofline:
    return Roofline(keys.rate("flops_per_s"), keys.rate("bytes_per_s"), keys.whole("kernel_ns"))


def _times(keys: _Keys, folder: Path) -> Table:
    expert = _by_tokens(keys, "expert", folder)
    head = _by_tokens(keys, "head", folder) if keys.has("head") else ()
    dense = [
        (row[0], row[1], row[2]) for row in keys.rows("dense", ("tokens", "context", "ns"), folder)
    ]
    _some(keys, "dense", dense)
    for i in range(1, len(dense)):
        if dense[i][:2] <= dense[i - 1][:2]:
            raise keys.fail(f"dense[{i}]", "must come after the row before it; sort the rows")
        if dense[i][0] == dense[i - 1][0] and dense[i][2] < dense[i - 1][2]:
            raise keys.fail(f"dense[{i}]", "takes less time than a shorter context; must not fall")
    model = _optional(keys, "model", lambda: keys.text("model", empty=True), "")
    return Table(expert, tuple(dense), model, head)


def _by_tokens(keys: _Keys, key: str, folder: Path) -> tuple[tuple[int, int], ...]:
    rows = tuple((row[0], row[1]) for row in keys.rows(key, ("tokens", "ns"), folder))
    # A profile that moesim printed says [] where it has no head.
    if rows or key != "head":
        _some(keys, key, rows)
    _rising(keys, key, rows)
    return rows


def _some(keys: _Keys, key: str, rows: Sequence[tuple[int, ...]]) -> None:
    if not rows:
        raise keys.fail(key, "has no rows; measure at least one")
    if rows[0][0] < 1:
        raise keys.fail(f"{key}[0]", "must be for at least 1 token")


def _read_rows(path: Path, columns: tuple[str, ...]) -> list[list[int]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path, columns=list(columns))
    except FileNotFoundError:
        raise ProfileError(f"{path}: no such file; it is named by the profile beside it") from None
    except (OSError, pa.ArrowException) as error:
        reason = " ".join(str(error).split())
        raise ProfileError(f"{path}: cannot be read as Parquet ({reason})") from None
    if table.column_names != list(columns):
        raise ProfileError(f"{path}: must have the columns {', '.join(columns)}")
    return [list(row.values()) for row in table.to_pylist()]


def _spread(value: _PerLayer, layers: int) -> tuple[int, ...]:
    return (value,) * layers if isinstance(value, int) else value


def _plain(value: _PerLayer) -> int | list[int]:
    return value if isinstance(value, int) else list(value)


def _plain_rate(value: float) -> float | str:
    return "inf" if math.isinf(value) else value


def _drive_dict(drive: Drive) -> dict[str, Any]:
    return {
        "bytes_per_s": _plain_rate(drive.bytes_per_s),
        "latency_ns": drive.latency_ns,
        "chunk_bytes": drive.chunk_bytes,
        "curve": [list(point) for point in drive.curve],
    }


def _compute_dict(
    compute: Roofline | Constant | Table | ConstantExpert | TableExpert,
) -> dict[str, Any]:
    if isinstance(compute, Roofline):
        return {
            "kind": "roofline",
            "flops_per_s": _plain_rate(compute.flops_per_s),
            "bytes_per_s": _plain_rate(compute.bytes_per_s),
            "kernel_ns": compute.kernel_ns,
        }
    if isinstance(compute, Constant):
        return {"kind": "constant", "dense_ns": compute.dense_ns, "expert_ns": compute.expert_ns}
    if isinstance(compute, ConstantExpert):
        return {"kind": "constant", "expert_ns": compute.expert_ns}
    if isinstance(compute, TableExpert):
        return {"kind": "table", "expert": [list(row) for row in compute.expert]}
    return {
        "kind": "table",
        "expert": [list(row) for row in compute.expert],
        "dense": [list(row) for row in compute.dense],
        "model": compute.model,
        "head": [list(row) for row in compute.head],
    }


def _digest(data: dict[str, Any]) -> str:
    text = json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()

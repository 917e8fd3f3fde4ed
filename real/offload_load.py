"""Fill the host bank: from a model that is in memory, or from a checkpoint past the model.

A checkpoint is read expert by expert, from the file into its place in the bank. The model around
them is loaded by transformers as ever, its experts without storage; how the checkpoint's names
become the model's is asked of the library's own renaming rules.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
import transformers
from torch import nn

from moesim.errors import UsageError
from moesim.real.experts_parcel import FUSED, SEPARATE, Experts, drop
from moesim.real.offload_bank import HostBank
from moesim.traces.gates import GateLayer, find_blocks
from moesim.traces.record_model import Loaded, auto_class, load, source_of

INDEX: Final = "model.safetensors.index.json"
WHOLE: Final = "model.safetensors"


class Piece(NamedTuple):
    """One tensor of a checkpoint that belongs to experts.

    expert : whose it is; None: it holds all of them, [E, ...].
    share, shares : which of so many equal parts of the rows it is.
    """

    key: str
    expert: int | None
    share: int
    shares: int


# ---- from a model in memory ----------------------------------------------------------------------


def move(experts: Sequence[Experts], bank: HostBank) -> None:
    """Move the experts out of a model, layer by layer, so that one layer at most is held twice."""
    for layer, one in enumerate(experts):
        bank.add_layer()
        for expert in range(one.count):
            views = bank.views(layer, expert)
            for name, tensor in one.tensors(expert).items():
                views[name].copy_(tensor.detach())
        drop(one)


# ---- from a checkpoint ---------------------------------------------------------------------------


def load_hollow(model: str, *, tokenizer: str | None, dtype: str) -> tuple[Loaded, Path | None]:
    """Load a model whose experts are on the meta device, and the folder of its checkpoint.

    Where the checkpoint is not in safetensors, the whole model is loaded, and there is no folder.
    """
    folder = _folder(source_of(model))
    classes = _expert_classes(source_of(model)) if folder is not None else set()
    if not classes:
        return load(model, tokenizer=tokenizer, device="cpu", dtype=dtype), None
    made: list[_Hollow] = []
    with _quiet(), _without_storage(classes, made):
        loaded = load(model, tokenizer=tokenizer, device="cpu", dtype=dtype)
    for one in made:
        one.restore()
    return loaded, folder


def fill(
    model: Any,
    layers: Sequence[GateLayer],
    experts: Sequence[Experts],
    bank: HostBank,
    folder: Path,
) -> None:
    """Read every expert from a checkpoint into the bank.

    Raises
    ------
    UsageError
        If the checkpoint lacks experts, or keeps them in a way that is not understood.
    """
    from safetensors import safe_open

    files = _files(folder)
    pieces = _plan(model, _targets(model, layers, experts), files)
    handles: dict[str, Any] = {}
    for layer, one in enumerate(experts):
        bank.add_layer()
        for target, number, part in _named(model, layers[layer], one):
            found = pieces.get(target)
            if not found:
                raise _lacking(model, folder, target)
            for piece in found:
                path = files[piece.key]
                if path not in handles:
                    handles[path] = safe_open(path, "pt")
                _read(handles[path], piece, number, part, bank, layer)
            _check_whole(model, folder, target, found, number, one.count)


def _read(
    handle: Any, piece: Piece, number: int | None, part: str, bank: HostBank, layer: int
) -> None:
    """One tensor of the checkpoint into the bank; a stacked one expert by expert."""
    if number is None and piece.expert is None:
        stacked = handle.get_slice(piece.key)
        for expert in range(bank.counts[layer]):
            bank.views(layer, expert)[part].copy_(stacked[expert : expert + 1][0])
        return
    one = piece.expert if number is None else number
    assert one is not None
    view = bank.views(layer, one)[part]
    rows = view.shape[0] // piece.shares
    view[piece.share * rows : (piece.share + 1) * rows].copy_(handle.get_tensor(piece.key))


def _plan(model: Any, targets: set[str], keys: Iterable[str]) -> dict[str, list[Piece]]:
    """Target parameter -> the tensors of the checkpoint that make it."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    of_source = {source: rule for rule in converters for source in rule.source_patterns}
    state, prefix = model.state_dict(), model.base_model_prefix
    pieces: dict[str, list[Piece]] = defaultdict(list)
    seen: dict[tuple[str, str], int] = defaultdict(int)
    # In this order the library counts experts, so a tensor's place in it is its expert's number.
    for key in sorted(keys, key=dot_natural_key):
        target, source = rename_source_key(key, renamings, converters, prefix, state)
        if target not in targets:
            continue
        if source is None:
            pieces[target].append(Piece(key, None, 0, 1))
            continue
        rule = of_source[source]
        _check_operations(model, rule, key)
        sources = rule.source_patterns
        number = seen[target, source]
        seen[target, source] += 1
        pieces[target].append(Piece(key, number, sources.index(source), len(sources)))
    return pieces


def _check_operations(model: Any, rule: Any, key: str) -> None:
    kinds = [type(operation).__name__ for operation in rule.operations]
    dims = [getattr(operation, "dim", None) for operation in rule.operations]
    if kinds[:1] != ["MergeModulelist"] or kinds[1:] not in ([], ["Concatenate"]):
        raise UsageError(
            f"{type(model).__name__}: the checkpoint's {key} becomes the model's by "
            f"{', '.join(kinds)}, which is not read expert by expert; load the model with "
            "from_pretrained and hand it over"
        )
    assert dims in ([0], [0, 1]), dims


def _targets(model: Any, layers: Sequence[GateLayer], experts: Sequence[Experts]) -> set[str]:
    pairs = zip(layers, experts, strict=True)
    return {name for layer, one in pairs for name, _, _ in _named(model, layer, one)}


def _named(model: Any, layer: GateLayer, experts: Experts) -> Iterator[tuple[str, int | None, str]]:
    """As ``Experts.places``, with the parameters' names in the model."""
    child = next(n for n, m in layer.block.named_children() if m is experts.module)
    for name, number, part in experts.places():
        yield ".".join(filter(None, (layer.name, child, name))), number, part


def _check_whole(
    model: Any, folder: Path, target: str, found: list[Piece], number: int | None, count: int
) -> None:
    if number is None and found[0].expert is not None and len(found) != count * found[0].shares:
        raise _lacking(model, folder, target)


def _lacking(model: Any, folder: Path, target: str) -> UsageError:
    return UsageError(
        f"{folder}: the checkpoint lacks what {type(model).__name__} calls {target}; is it whole?"
    )


# ---- the checkpoint ------------------------------------------------------------------------------


def _folder(where: str) -> Path | None:
    """Where the safetensors of a model lie; None if there are none."""
    if Path(where).is_dir():
        folder = Path(where)
        return folder if any((folder / name).is_file() for name in (INDEX, WHOLE)) else None
    from transformers.utils import cached_file

    for name in (INDEX, WHOLE):
        try:
            found = cached_file(where, name)
        except (OSError, ValueError):
            # What is wrong, whoever loads the model tells.
            continue
        if found is not None:
            return Path(found).parent
    return None


def _files(folder: Path) -> Mapping[str, str]:
    """Key -> its file."""
    from safetensors import safe_open

    index = folder / INDEX
    if index.is_file():
        names = json.loads(index.read_text())["weight_map"]
        return {key: str(folder / name) for key, name in names.items()}
    path = str(folder / WHOLE)
    with safe_open(path, "pt") as handle:
        return dict.fromkeys(handle.keys(), path)


# ---- a model without its experts -----------------------------------------------------------------


def _expert_classes(where: str) -> set[type[nn.Module]]:
    """The classes that hold experts in this kind of model; none where they cannot be left out."""
    try:
        config = transformers.AutoConfig.from_pretrained(where)
        with torch.device("meta"):
            model = auto_class(config).from_config(config)
    except (OSError, ValueError, KeyError, TypeError, ImportError, RuntimeError):
        return set()
    found = {type(block.experts) for block in find_blocks(model)}
    known = all(
        cls.__name__ in SEPARATE or any(FUSED.match(name) for name, _ in block.named_parameters())
        for cls in found
        for block in (b.experts for b in find_blocks(model) if type(b.experts) is cls)
    )
    return found if known and getattr(config, "quantization_config", None) is None else set()


class _Hollow:
    """A module whose parameters were left out while it was loaded."""

    def __init__(self, module: nn.Module) -> None:
        self._shapes = [
            (holder, name, tuple(value.shape), value.dtype)
            for holder in module.modules()
            for name, value in holder._parameters.items()
            if value is not None
        ]
        for holder, name, shape, dtype in self._shapes:
            del holder._parameters[name]
            # No parameter, so nothing is read for it; the library may fill it to no effect.
            holder.__dict__[name] = torch.empty(shape, dtype=dtype, device="meta")

    def restore(self) -> None:
        """Put the shapes back, on the meta device."""
        for holder, name, _, _ in self._shapes:
            shape = holder.__dict__.pop(name)
            holder._parameters[name] = nn.Parameter(shape, requires_grad=False)


@contextmanager
def _without_storage(classes: set[type[nn.Module]], made: list[_Hollow]) -> Iterator[None]:
    """Modules of these classes are built without storage meanwhile."""
    originals = {cls: cls.__init__ for cls in classes}

    def hollow(original: Any) -> Any:
        def init(self: nn.Module, *args: Any, **kwargs: Any) -> None:
            with torch.device("meta"):
                original(self, *args, **kwargs)
            made.append(_Hollow(self))

        return init

    for cls, original in originals.items():
        cls.__init__ = hollow(original)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for cls, original in originals.items():
            cls.__init__ = original  # type: ignore[method-assign]


@contextmanager
def _quiet() -> Iterator[None]:
    """The library need not list the experts that it was kept from reading."""
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(level)

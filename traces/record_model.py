"""Load what is to be recorded: a HuggingFace model and its tokenizer."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

import torch
import transformers

from moesim import __version__
from moesim.errors import UsageError

SHIPPED: Final = Path(__file__).parent / "models"
DTYPES: Final = {
    "auto": "auto",
    "fp32": "float32",
    "float32": "float32",
    "bf16": "bfloat16",
    "bfloat16": "bfloat16",
    "fp16": "float16",
    "float16": "float16",
}
SHORT: Final = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "float64": "fp64"}
MAPPINGS: Final = (
    "AutoModelForCausalLM",
    "AutoModelForSeq2SeqLM",
    "AutoModelForImageTextToText",
)


@dataclass(frozen=True, slots=True, eq=False)
class Loaded:
    """A model that can be recorded, and its tokenizer."""

    name: str
    hf_id: str
    """Empty for a model from a folder."""
    model: Any
    tokenizer: Any

    @property
    def dtype(self) -> str:
        """Data type of most weights: fp32, bf16, ..."""
        return short_dtype(self.model.dtype)

    @property
    def device(self) -> str:
        """Name of what it runs on."""
        kinds = {p.device for p in self.model.parameters() if p.device.type == "cuda"}
        if not kinds:
            return "cpu"
        names = sorted(torch.cuda.get_device_name(device) for device in kinds)
        return names[0] if len(names) == 1 else f"{len(names)} x {names[0]}"

    @property
    def context(self) -> int | None:
        """Most tokens that a sequence may have; None if there is no limit."""
        config = self.model.config.get_text_config()
        limit = getattr(config, "max_position_embeddings", None)
        if limit is None:
            limit = getattr(self.tokenizer, "model_max_length", None)
        return int(limit) if isinstance(limit, int) and 0 < limit < 10**7 else None


def short_dtype(dtype: Any) -> str:
    """Return fp32, bf16, ... for a torch data type."""
    name = str(dtype).removeprefix("torch.")
    return SHORT.get(name, name)


def versions() -> dict[str, str]:
    """Return the versions of what a recording rests on."""
    found = {"moesim": __version__}
    for name in ("torch", "transformers", "tokenizers"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def shipped_models() -> tuple[str, ...]:
    """Return the names of the models that ship with moesim."""
    return tuple(sorted(path.parent.name for path in SHIPPED.glob("*/config.json")))


def load(model: str, *, tokenizer: str | None = None, device: str, dtype: str) -> Loaded:
    """Load a model and its tokenizer for inference.

    `model` is a shipped name, a folder, or an id on the hub. `device` is cuda, cpu or auto; with
    several GPUs the model is spread over them. Raises `UsageError` in one line for everything that
    a user can mend.
    """
    where = source_of(model)
    with _explained(model, "model"):
        config = transformers.AutoConfig.from_pretrained(where)
    used = _tokenizer(tokenizer or where, model, tokenizer)
    loaded = _model(model, where, config, device, dtype)
    local = Path(where).is_dir()
    name = Path(where).resolve().name if local else where.rpartition("/")[2]
    return Loaded(name, "" if local else where, loaded, used)


def source_of(model: str) -> str:
    """Return the folder or hub id that a model's name means. Raises `UsageError`."""
    if model in shipped_models():
        return str(SHIPPED / model)
    path = Path(model).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UsageError(f"--model {model}: holds no config.json; name a model's folder")
        return str(path)
    if path.exists() or model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise UsageError(f"--model {model}: no such folder; give a model's folder or a hub id")
    return model


def _tokenizer(where: str, model: str, option: str | None) -> Any:
    name = option or model
    try:
        found = transformers.AutoTokenizer.from_pretrained(source_of(where))
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        if _is_unreachable(error):
            raise _hub_error(name, "tokenizer") from None
        raise UsageError(
            f"{name}: has no tokenizer that can be loaded ({_reason(error)}); name one with "
            "--tokenizer ID_OR_PATH"
        ) from None
    # Where there are no files, some classes make one that knows no text.
    if not set(found("Is this known?")["input_ids"]) - {*found.all_special_ids}:
        raise UsageError(f"{name}: has no tokenizer; name one with --tokenizer ID_OR_PATH")
    return found


def _model(name: str, where: str, config: Any, device: str, dtype: str) -> Any:
    kind = "cuda" if device == "auto" and torch.cuda.is_available() else device
    kind = "cpu" if kind == "auto" else kind
    if kind == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: no CUDA GPU is at hand; use --device cpu")
    placed: dict[str, Any] = {}
    if kind == "cuda" and torch.cuda.device_count() > 1:
        if importlib.util.find_spec("accelerate") is None:
            raise UsageError(
                "a model over several GPUs needs accelerate (`pip install accelerate`)"
            )
        placed = {"device_map": "auto"}
    with _explained(name, "model"):
        made = auto_class(config).from_pretrained(where, dtype=DTYPES[dtype], **placed)
        return (made if placed else made.to(kind)).eval()


def auto_class(config: Any) -> Any:
    """Return the Auto class that generates text with this kind of model."""
    for name in MAPPINGS:
        auto = getattr(transformers, name)
        if type(config) in auto._model_mapping:
            return auto
    return transformers.AutoModelForCausalLM


@contextmanager
def _explained(name: str, what: str) -> Iterator[None]:
    """Turn what loading can raise into one line."""
    try:
        yield
    except torch.cuda.OutOfMemoryError:
        raise UsageError(
            f"{name}: does not fit the GPU's memory; try --dtype bfloat16 or --device cpu"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, ImportError, RuntimeError) as error:
        if _is_unreachable(error):
            raise _hub_error(name, what) from None
        raise UsageError(f"{name}: the {what} cannot be loaded ({_reason(error)})") from None


def _is_unreachable(error: BaseException) -> bool:
    """Whether the hub could not be asked, as transformers and huggingface_hub say it."""
    chain: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in chain:
        chain.append(current)
        current = current.__cause__ or current.__context__
    kinds = {kind.__name__ for link in chain for kind in type(link).__mro__}
    wanted = {"LocalEntryNotFoundError", "OfflineModeIsEnabled", "ConnectError", "ConnectionError"}
    return bool(kinds & wanted) or "couldn't connect to" in str(error)


def _hub_error(name: str, what: str) -> UsageError:
    local = " or ".join(("a folder that holds it", *shipped_models()))
    option = "--tokenizer" if what == "tokenizer" else "--model"
    return UsageError(
        f"{name}: the hub is not in reach and the {what} is not in the cache; pass {option} with "
        f"{local}, for which no hub is needed"
    )


def _reason(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."

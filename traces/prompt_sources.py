"""Where prompts come from: the built-in set, a local file, or a HuggingFace dataset.

Whatever the source, it is a stream of records, and the prompt is found in a record by its shape:
the first user turn of a conversation (LMSYS-Chat-1M, ShareGPT, `messages`), the instruction with
its input (Alpaca), the question (GSM8K), the first of `turns`, or a text column.
"""

from __future__ import annotations

import gzip
import json
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any, Final, TextIO

from moesim.errors import MoesimError, UsageError

BUILT_IN: Final = "builtin"
BUILT_IN_FILE: Final = Path(__file__).parent / "prompts" / "builtin.toml"

CONVERSATIONS: Final = ("conversation", "conversations", "messages")
USERS: Final = ("user", "human")
TEXT_COLUMNS: Final = ("prompt", "question", "instruction", "query", "text", "input", "content")
TOPIC_COLUMNS: Final = ("topic", "category", "domain", "language")
ENDINGS: Final = (".parquet", ".jsonl", ".json", ".txt", ".toml", ".gz")


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt, and what it is about if the source says so."""

    text: str
    topic: str | None = None


@dataclass(frozen=True, slots=True)
class PromptSource:
    """A stream of prompts; `prompts()` begins anew at each call."""

    name: str
    total: int | None
    """How many there are, None if only reading tells."""
    prompts: Callable[[], Iterator[Prompt]]


def open_prompts(
    source: str,
    *,
    column: str | None = None,
    topic_column: str | None = None,
    limit: int | None = None,
) -> PromptSource:
    """Open `builtin`, a file by its path, or a dataset as NAME[@CONFIG][:SPLIT] (split train).

    `column` and `topic_column` name where the prompt and its topic are; without them they are found
    by the shape of the record. Raises `UsageError` for a source that is not there or cannot be
    reached; the stream raises it for a record without a prompt.
    """
    path = Path(source)
    if source == BUILT_IN:
        name, records, total = BUILT_IN, _built_in, _count(BUILT_IN_FILE)
    elif path.is_file():
        name, records, total = path.name, _file_records(path), _count(path)
    elif path.exists() or path.suffix in ENDINGS or source.startswith((".", "/", "~")):
        raise UsageError(f"--prompts {source}: no such file; give a file, a dataset or {BUILT_IN}")
    else:
        name, records, total = source, dataset_records(source), None
    if limit is not None:
        total = limit if total is None else min(limit, total)

    def prompts() -> Iterator[Prompt]:
        for number, record in enumerate(islice(records(), limit)):
            yield _prompt(record, column, topic_column, f"--prompts {source}: record {number}")

    return PromptSource(name, total, prompts)


# ---- one record ----------------------------------------------------------------------------------


def _prompt(record: Any, column: str | None, topic_column: str | None, where: str) -> Prompt:
    if isinstance(record, str):
        record = {"text": record}
    if not isinstance(record, Mapping):
        raise UsageError(f"{where}: is {type(record).__name__}, not a text or an object")
    for name in (column, topic_column):
        if name is not None and name not in record:
            raise UsageError(f"{where}: has no column {name!r}; it has {_listed(record)}")
    text = _text_in(record[column]) if column is not None else _by_shape(record)
    if text is None:
        option = f"column {column!r} holds no text" if column else "no prompt found"
        raise UsageError(f"{where}: {option}; name its column with --column: {_listed(record)}")
    # Half a surrogate pair, as cut JSON has them, is no text that a tokenizer or Parquet takes.
    return Prompt(text.encode("utf-8", "replace").decode(), _topic(record, topic_column))


def _listed(record: Mapping[str, Any]) -> str:
    return ", ".join(map(str, record)) or "none"


def _by_shape(record: Mapping[str, Any]) -> str | None:
    for name in (*CONVERSATIONS, "turns"):
        if isinstance(record.get(name), (list, tuple)):
            return _text_in(record[name])
    if isinstance(record.get("instruction"), str):
        more = record.get("input")
        more = more if isinstance(more, str) else _first_instance(record)
        return f"{record['instruction']}\n\n{more}" if more.strip() else record["instruction"]
    return next((record[c] for c in TEXT_COLUMNS if isinstance(record.get(c), str)), None)


def _first_instance(record: Mapping[str, Any]) -> str:
    """Return the input of the first instance of a self-instruct record."""
    instances = record.get("instances")
    first = instances[0] if isinstance(instances, list) and instances else None
    value = first.get("input") if isinstance(first, Mapping) else None
    return value if isinstance(value, str) else ""


def _text_in(value: Any) -> str | None:
    """Return a text, or the first user turn of a conversation."""
    if isinstance(value, str):
        return value
    if not isinstance(value, (list, tuple)) or not value:
        return None
    if isinstance(value[0], str):
        return value[0]
    for turn in value:
        if not isinstance(turn, Mapping):
            return None
        if turn.get("role", turn.get("from")) in USERS:
            text = turn.get("content", turn.get("value"))
            return text if isinstance(text, str) else None
    return None


def _topic(record: Mapping[str, Any], topic_column: str | None) -> str | None:
    for name in (topic_column,) if topic_column is not None else TOPIC_COLUMNS:
        if isinstance(record.get(name), str) and record[name]:
            return str(record[name])
    return None


# ---- files ---------------------------------------------------------------------------------------


def _file_records(path: Path) -> Callable[[], Iterator[Any]]:
    readers = {".parquet": _parquet, ".jsonl": _json_lines, ".json": _json, ".toml": _toml}
    suffix = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    reader = readers.get(suffix, _text_lines)
    return lambda: _readable(path, reader(path))


def _readable(path: Path, records: Iterator[Any]) -> Iterator[Any]:
    try:
        yield from records
    except MoesimError:
        raise
    except (OSError, EOFError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise UsageError(f"--prompts {path}: cannot be read ({reason})") from None


def _count(path: Path) -> int | None:
    """Count the records where that costs little."""
    if path.suffix == ".toml":
        return sum(1 for _ in _toml(path))
    if path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            return int(pq.read_metadata(path).num_rows)
        except (OSError, pa.ArrowException):
            return None  # reading it will say what is wrong
    if path.suffix in (".jsonl", ".txt", ""):
        with path.open("rb") as lines:
            return sum(1 for line in lines if line.strip())
    return None


def _toml(path: Path) -> Iterator[Any]:
    """Yield [[prompt]] tables."""
    prompts = tomllib.loads(path.read_text(encoding="utf-8")).get("prompt")
    if not isinstance(prompts, list):
        raise UsageError(f"--prompts {path}: holds no [[prompt]] tables")
    yield from prompts


def _built_in() -> Iterator[Any]:
    """Yield the built-in prompts, one of each topic in turn, so that any beginning has them all."""
    by_topic: dict[str, list[Any]] = {}
    for prompt in _toml(BUILT_IN_FILE):
        record = {**prompt, "text": prompt["text"].strip()}
        by_topic.setdefault(prompt["topic"], []).append(record)
    for turn in zip_longest(*by_topic.values()):
        yield from (prompt for prompt in turn if prompt is not None)


def _opened(path: Path) -> TextIO:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig")
    return path.open(encoding="utf-8-sig")


def _parquet(path: Path) -> Iterator[Any]:
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(1024):
            yield from batch.to_pylist()


def _json_lines(path: Path) -> Iterator[Any]:
    with _opened(path) as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    yield json.loads(line)
                except ValueError as error:
                    where = f"--prompts {path}: line {number}"
                    raise UsageError(f"{where} is not JSON ({error})") from None


def _json(path: Path) -> Iterator[Any]:
    """Yield the items of a list, or of the one list in an object."""
    with _opened(path) as file:
        value = json.load(file)
    if isinstance(value, dict):
        lists = [item for item in value.values() if isinstance(item, list)]
        value = lists[0] if len(lists) == 1 else value
    if not isinstance(value, list):
        raise UsageError(f"--prompts {path}: holds no list of prompts")
    yield from value


def _text_lines(path: Path) -> Iterator[Any]:
    """Yield the lines that are not empty."""
    with _opened(path) as lines:
        yield from (line.rstrip("\n") for line in lines if line.strip())


# ---- datasets ------------------------------------------------------------------------------------


def dataset_records(source: str) -> Callable[[], Iterator[Any]]:
    """Open NAME[@CONFIG][:SPLIT] for streaming."""
    rest, _, split = source.partition(":")
    name, _, config = rest.partition("@")
    try:
        import datasets
    except ModuleNotFoundError:
        raise UsageError(
            f"--prompts {source}: needs the package datasets (`pip install datasets`), or give a "
            f"local file or {BUILT_IN}"
        ) from None

    def records() -> Iterator[Any]:
        try:
            stream = datasets.load_dataset(
                name, config or None, split=split or "train", streaming=True
            )
            yield from stream
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            raise _unreachable(source, error) from None

    return records


def _unreachable(source: str, error: Exception) -> UsageError:
    reason = " ".join(str(error).split())[:200]
    return UsageError(
        f"--prompts {source}: the dataset cannot be read ({reason}); is the name right, "
        "NAME[@CONFIG][:SPLIT], and the hub in reach? A local .parquet, .jsonl, .json or .txt file "
        f"and {BUILT_IN} need no hub"
    )

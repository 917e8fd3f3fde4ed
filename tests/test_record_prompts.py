"""Where prompts come from, and how they are found in a record."""

from __future__ import annotations

import gzip
import json
import sys
import types
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moesim.errors import UsageError
from moesim.traces.prompt_sources import Prompt, open_prompts


def read(source: str | Path, **more: Any) -> list[Prompt]:
    return list(open_prompts(str(source), **more).prompts())


# ---- the built-in set ----------------------------------------------------------------------------


def test_the_built_in_set_is_broad_and_large_enough() -> None:
    prompts = read("builtin")
    topics = {prompt.topic for prompt in prompts}
    assert len(prompts) == len({prompt.text for prompt in prompts}) >= 84
    assert len(prompts) * 7 // 10 >= 60
    assert {"code", "maths", "german", "french", "russian", "chinese", "japanese"} <= topics
    assert len(topics) >= 12
    counts = [sum(prompt.topic == topic for prompt in prompts) for topic in topics]
    assert min(counts) == max(counts)
    assert all(prompt.text == prompt.text.strip() for prompt in prompts)


def test_any_beginning_of_the_built_in_set_has_all_topics() -> None:
    everything = {prompt.topic for prompt in read("builtin")}
    first = [prompt.topic for prompt in read("builtin", limit=len(everything))]
    assert set(first) == everything
    assert open_prompts("builtin", limit=10).total == 10
    assert open_prompts("builtin").total == len(read("builtin"))


# ---- shapes --------------------------------------------------------------------------------------

SHAPES: list[tuple[dict[str, Any], Prompt]] = [
    (  # LMSYS-Chat-1M
        {
            "conversation_id": "1",
            "model": "m",
            "conversation": [
                {"role": "user", "content": "hello"},
                {"role": "assistant", "content": "hi"},
            ],
            "language": "English",
        },
        Prompt("hello", "English"),
    ),
    (  # ShareGPT
        {
            "id": "x",
            "conversations": [
                {"from": "system", "value": "be kind"},
                {"from": "human", "value": "hello"},
                {"from": "gpt", "value": "hi"},
            ],
        },
        Prompt("hello"),
    ),
    (  # Alpaca
        {"instruction": "Add.", "input": "1 and 2", "output": "3"},
        Prompt("Add.\n\n1 and 2"),
    ),
    ({"instruction": "Say hi.", "input": "", "output": "hi"}, Prompt("Say hi.")),
    (  # self-instruct
        {"instruction": "Add.", "instances": [{"input": "1 and 2", "output": "3"}]},
        Prompt("Add.\n\n1 and 2"),
    ),
    ({"question": "How many?", "answer": "#### 4"}, Prompt("How many?")),  # GSM8K
    ({"messages": [{"role": "user", "content": "hello"}]}, Prompt("hello")),
    ({"category": "maths", "turns": ["first", "second"]}, Prompt("first", "maths")),
    ({"prompt": "def f():", "task_id": "1"}, Prompt("def f():")),
    ({"text": "plain", "topic": "prose"}, Prompt("plain", "prose")),
]


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".jsonl.gz", ".parquet"])
@pytest.mark.parametrize(("record", "prompt"), SHAPES)
def test_a_prompt_is_found_by_the_shape_of_its_record(
    record: dict[str, Any], prompt: Prompt, ending: str, tmp_path: Path
) -> None:
    path = tmp_path / f"p{ending}"
    if ending == ".parquet":
        pq.write_table(pa.Table.from_pylist([record, record]), path)
    elif ending == ".json":
        path.write_text(json.dumps([record, record]))
    else:
        data = f"{json.dumps(record)}\n\n{json.dumps(record)}\n".encode()
        path.write_bytes(gzip.compress(data) if ending.endswith(".gz") else data)
    assert read(path) == [prompt, prompt]
    assert open_prompts(str(path)).total in (2, None)


def test_columns_can_be_named(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps({"text": "no", "document": "yes", "kind": "news"}))
    assert read(path, column="document", topic_column="kind") == [Prompt("yes", "news")]


def test_lines_of_text_and_a_list_in_an_object(tmp_path: Path) -> None:
    text, nested = tmp_path / "p.txt", tmp_path / "p.json"
    text.write_text("one\n\ntwo\n")
    nested.write_text(json.dumps({"version": 1, "data": ["one", {"prompt": "two"}]}))
    assert read(text) == read(nested) == [Prompt("one"), Prompt("two")]
    assert open_prompts(str(text)).total == 2 and read(text, limit=1) == [Prompt("one")]


def test_half_a_character_does_no_harm(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"text": "cut \\ud83d"}')
    assert read(path) == [Prompt("cut ?")]


# ---- datasets ------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A package `datasets` that keeps what it was asked for."""
    asked: list[Any] = []

    def load_dataset(name: str, config: str | None, **more: Any) -> Any:
        asked.append((name, config, more))
        if name == "far/away":
            raise ConnectionError("Couldn't reach 'far/away'\non the Hub")
        return iter([{"question": "How many?", "answer": "4"}] * 3)

    module = types.ModuleType("datasets")
    module.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    return asked


@pytest.mark.parametrize(
    ("source", "asked_for"),
    [
        ("openai/gsm8k@main:test", ("openai/gsm8k", "main", "test")),
        ("lmsys/lmsys-chat-1m", ("lmsys/lmsys-chat-1m", None, "train")),
        ("gsm8k:train[:10]", ("gsm8k", None, "train[:10]")),
    ],
)
def test_datasets_stream(source: str, asked_for: tuple[str, Any, str], hub: list[Any]) -> None:
    assert read(source, limit=2) == [Prompt("How many?")] * 2
    name, config, split = asked_for
    assert hub == [(name, config, {"split": split, "streaming": True})]


def test_an_unreachable_dataset_is_one_line(hub: list[Any]) -> None:
    with pytest.raises(
        UsageError, match=r"Couldn't reach 'far/away' on the Hub.*builtin"
    ) as caught:
        read("far/away")
    assert "\n" not in str(caught.value)


def test_without_datasets_the_other_sources_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UsageError, match="pip install datasets"):
        open_prompts("openai/gsm8k")


def test_a_real_dataset_streams(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "train.jsonl").write_text('{"question": "How many?", "answer": "4"}\n' * 3)
    from moesim.traces.prompt_sources import dataset_records

    records = list(dataset_records(str(folder))())
    assert records == [{"question": "How many?", "answer": "4"}] * 3


# ---- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("p.jsonl", '{"text": "a"}\n{broken', "line 2 is not JSON"),
        ("p.json", "[1", "cannot be read"),
        ("p.json", '"text"', "no list of prompts"),
        ("p.jsonl", "[1, 2]", "record 0: is list"),
        ("p.jsonl", '{"answer": "4"}', "no prompt found; name its column with --column: answer"),
        ("p.jsonl", '{"conversation": [{"role": "assistant"}]}', "no prompt found"),
        ("p.parquet", "not parquet", "cannot be read"),
        ("p.toml", "a = 1", "no [[prompt]] tables"),
    ],
)
def test_a_broken_file_is_one_line(name: str, content: str, told: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(UsageError) as caught:
        read(path)
    assert told in str(caught.value) and str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_column_without_text(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"text": "a", "number": 4}')
    with pytest.raises(UsageError, match="column 'number' holds no text"):
        read(path, column="number")


# ---- real ones -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        *("HumanEval", "arena_hard_v0.1_question", "gsm8k_test", "self_instruct_user_oriented"),
        *("mt_bench_question", "vicuna_bench_question", "prompts"),
    ],
)
def test_published_prompt_files(shared: Path, name: str) -> None:
    (path,) = (shared / "data" / "prompts").glob(f"{name}.jsonl*")
    prompts = read(path)
    assert len(prompts) >= 80 and all(prompt.text for prompt in prompts)

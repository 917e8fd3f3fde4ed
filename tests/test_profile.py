"""Profiles: numbers re-derived from the architecture, exact errors, nothing silently accepted."""

from __future__ import annotations

import argparse
import copy
import json
import math
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import moesim
from moesim.cli import profiles as command
from moesim.errors import ProfileError
from moesim.profile import (
    Constant,
    ConstantExpert,
    HardwareProfile,
    ModelProfile,
    Roofline,
    Stack,
    Table,
    list_hardware,
    list_models,
    load_any,
    load_hardware,
    load_model,
)

SHIPPED = Path(moesim.__file__).parent / "profiles"
PUBLISHED = {  # parameters in all, in billions
    "mixtral-8x7b": 46.7,
    "qwen1.5-moe-a2.7b": 14.3,
    "phi-3.5-moe": 41.9,
    "olmoe-1b-7b": 6.9,
    "qwen3-30b-a3b": 30.5,
    "deepseek-v2-lite": 15.7,
    "gpt-oss-20b": 20.9,
    "gpt-oss-120b": 116.8,
    "switch-base-8": 0.62,
    "switch-base-16": 1.07,
    "switch-base-32": 1.98,
    "switch-base-64": 3.79,
    "switch-base-128": 7.4,
}


def raw(kind: str, name: str) -> dict[str, Any]:
    return tomllib.loads((SHIPPED / kind / f"{name}.toml").read_text())


def write(path: Path, data: dict[str, Any]) -> Path:
    """``data`` as TOML; its plain values are written as JSON, which TOML reads alike."""

    def lines(table: dict[str, Any], prefix: str) -> list[str]:
        plain = {k: v for k, v in table.items() if not isinstance(v, dict)}
        out = [f"{json.dumps(k)} = {value(v)}" for k, v in plain.items()]
        for key, inner in table.items():
            if isinstance(inner, dict):
                out += [
                    f"[{prefix}{json.dumps(key)}]",
                    *lines(inner, f"{prefix}{json.dumps(key)}."),
                ]
        return out

    def value(v: Any) -> str:
        return str(v) if isinstance(v, float) and not math.isfinite(v) else json.dumps(v)

    path.write_text("\n".join(lines(data, "")))
    return path


# The architecture, written down a second time: weights of matrices and of everything else.


def gated_weights(hidden: int, inner: int) -> int:
    return 3 * hidden * inner


def attention_weights(c: dict[str, Any]) -> tuple[int, int]:
    """Grouped-query attention: (matrices, biases)."""
    q = c["num_attention_heads"] * c["head_dim"]
    kv = c["num_key_value_heads"] * c["head_dim"]
    h = c["hidden_size"]
    biases = (q + 2 * kv) * c.get("qkv_bias", c.get("attention_bias", False))
    biases += h * c.get("o_bias", c.get("attention_bias", False))
    return h * q + 2 * h * kv + q * h, biases


def dense_decoder(c: dict[str, Any]) -> list[tuple[int, int]]:
    h, experts = c["hidden_size"], c.get("num_experts") or c["num_local_experts"]
    matrices, rest = attention_weights(c)
    matrices += experts * h
    if "shared_expert_intermediate_size" in c:
        matrices += gated_weights(h, c["shared_expert_intermediate_size"])
        matrices += h * c["shared_expert_gate"]
    rest += 2 * h * (1 + c.get("norm_bias", False)) + c.get("qk_norm_weights", 0)
    rest += c["num_attention_heads"] * c.get("attention_sinks", False)
    rest += experts * c.get("router_bias", False)
    return [(matrices, rest)] * c["num_hidden_layers"]


def dense_deepseek(c: dict[str, Any]) -> list[tuple[int, int]]:
    h, heads, rank = c["hidden_size"], c["num_attention_heads"], c["kv_lora_rank"]
    nope, rope, v = c["qk_nope_head_dim"], c["qk_rope_head_dim"], c["v_head_dim"]
    attention = h * heads * (nope + rope) + h * (rank + rope) + rank * heads * (nope + v)
    attention += heads * v * h
    rest = 2 * h + rank
    shared = c["n_shared_experts"] * gated_weights(h, c["moe_intermediate_size"])
    moe = attention + shared + h * c["n_routed_experts"]
    first = attention + gated_weights(h, c["intermediate_size"])
    moe_layers = c["num_hidden_layers"] - c["first_k_dense_replace"]
    return [(moe + first, 2 * rest)] + [(moe, rest)] * (moe_layers - 1)


def dense_switch(c: dict[str, Any]) -> list[tuple[int, int]]:
    d, inner = c["d_model"], c["num_heads"] * c["d_kv"]
    own = 4 * d * inner
    query_and_out = 2 * d * inner
    feed_forward, router = 2 * d * c["d_ff"], d * c["num_experts"]
    encoder = (2 * own + feed_forward + router, 2 * 2 * d)
    decoder = (2 * (own + query_and_out) + feed_forward + router, 2 * 3 * d)
    return [encoder] * c["num_sparse_encoder_layers"] + [decoder] * c["num_sparse_decoder_layers"]


def dense_weights(c: dict[str, Any]) -> list[tuple[int, int]]:
    if "d_model" in c:
        return dense_switch(c)
    return dense_deepseek(c) if "kv_lora_rank" in c else dense_decoder(c)


def expert_weights(c: dict[str, Any]) -> tuple[int, int, int]:
    """Of one routed expert: (matrices, biases, output rows)."""
    if "d_model" in c:
        return 2 * c["d_model"] * c["d_ff"], 0, c["d_ff"] + c["d_model"]
    h, inner = c["hidden_size"], c["moe_intermediate_size"]
    rows = 2 * inner + h
    return gated_weights(h, inner), rows * c.get("expert_bias", False), rows


def expert_bytes(c: dict[str, Any], precision: str) -> int:
    matrices, biases, rows = expert_weights(c)
    return {
        "fp32": 4 * (matrices + biases),
        "bf16": 2 * (matrices + biases),
        "int8": matrices + 2 * biases + 2 * rows,
        "int4": matrices // 2 + 2 * biases + 2 * (matrices // 128),
        "mxfp4": matrices // 2 + matrices // 32 + 2 * biases,
    }[precision]


def outside_weights(c: dict[str, Any]) -> tuple[int, int]:
    """(head with final norms, held without being read each pass)."""
    if "d_model" in c:
        d, inner = c["d_model"], c["num_heads"] * c["d_kv"]
        biases = 2 * c["relative_attention_num_buckets"] * c["num_heads"]
        return c["vocab_size"] * d + 2 * d + biases, c["num_decoder_layers"] * 2 * d * inner
    h, vocab = c["hidden_size"], c["vocab_size"]
    head = vocab * h + h * (1 + c.get("norm_bias", False)) + vocab * c.get("head_bias", False)
    return head, 0 if c["tie_word_embeddings"] else vocab * h


def kv_bytes(c: dict[str, Any], layers: int, width: int) -> list[int]:
    if "d_model" in c:
        pair = 2 * 2 * c["num_heads"] * c["d_kv"] * width
        return [0] * c["num_sparse_encoder_layers"] + [pair] * c["num_sparse_decoder_layers"]
    if "kv_lora_rank" in c:
        one = (c["kv_lora_rank"] + c["qk_rope_head_dim"]) * width
        return [one * (1 + c["first_k_dense_replace"])] + [one] * (layers - 1)
    return [2 * c["num_key_value_heads"] * c["head_dim"] * width] * layers


@pytest.mark.parametrize("name", list_models())
def test_model_numbers_follow_from_its_config(name: str) -> None:
    model = load_model(name)
    c = dict(model.config)
    width = {"bf16": 2, "fp32": 4}[model.dtype]
    for i, precision in enumerate(model.precisions):
        assert set(model.expert_bytes_table(i).tolist()) == {expert_bytes(c, precision)}
    dense = dense_weights(c)
    assert model.dense_bytes_table().tolist() == [(m + rest) * width for m, rest in dense]
    assert model.dense_flops_table().tolist() == [2 * m for m, _ in dense]
    assert model.expert_flops_per_token == 2 * expert_weights(c)[0]
    assert model.kv_bytes_table().tolist() == kv_bytes(c, model.layers, width)
    head, held = outside_weights(c)
    assert (model.head_bytes, model.held_bytes) == (head * width, held * width)
    hidden = c["d_model"] if "d_model" in c else c["hidden_size"]
    assert model.head_flops_per_token == 2 * hidden * c["vocab_size"]
    assert model.hidden == hidden
    assert model.intermediate == c.get("moe_intermediate_size", c.get("d_ff"))


@pytest.mark.parametrize("name", list_models())
def test_model_parameters_match_the_published_total(name: str) -> None:
    model = load_model(name)
    matrices, biases, _ = expert_weights(dict(model.config))
    width = {"bf16": 2, "fp32": 4}[model.dtype]
    total = model.fixed_bytes() / width + model.layers * model.experts * (matrices + biases)
    assert total / 1e9 == pytest.approx(PUBLISHED[name], rel=0.02)


def test_every_shipped_profile_is_known_by_its_file_name() -> None:
    assert set(list_models()) == set(PUBLISHED)
    known = {"rtx3090", "rtx3090x6", "rtx4090", "a100", "h100", "h200", "jetson-orin"}
    assert set(list_hardware()) == known
    assert not set(list_models()) & set(list_hardware())
    assert [load_model(name).name for name in list_models()] == list(list_models())
    assert [load_hardware(name).name for name in list_hardware()] == list(list_hardware())
    assert {load_hardware(name).source for name in list_hardware()} == {"datasheet"}


def test_known_sizes() -> None:
    assert load_model("mixtral-8x7b").expert_bytes == (352_321_536, 176_226_304, 90_832_896)
    assert load_model("gpt-oss-20b").expert_bytes == (13_236_480,)
    assert load_model("gpt-oss-20b").all_expert_bytes() == 24 * 32 * 13_236_480
    assert load_model("deepseek-v2-lite").kv_bytes_table().sum() == 31_104
    assert load_model("switch-base-8").stacks == (Stack("encoder", 6), Stack("decoder", 6))
    assert load_model("gpt-oss-20b").kv_window_table().tolist() == [128, 0] * 12


@pytest.mark.parametrize("name", list_models() + list_hardware())
def test_profiles_survive_json_and_toml(name: str, tmp_path: Path) -> None:
    profile = load_any(name)[1]
    through = json.loads(json.dumps(profile.to_dict(), sort_keys=True, allow_nan=False))
    again = type(profile).from_dict(through)
    assert again == profile
    assert again.digest == profile.digest
    assert load_any(write(tmp_path / "copy.toml", profile.to_dict()))[1] == profile


def test_digest_changes_with_any_number() -> None:
    data = load_model("olmoe-1b-7b").to_dict()
    fixed = ("schema", "layers", "top_k")
    numbers = [k for k, v in data.items() if isinstance(v, int) and k not in fixed]
    changed = [{**data, key: data[key] + 1} for key in numbers]
    digests = {ModelProfile.from_dict(each).digest for each in [data, *changed]}
    assert len(digests) == 1 + len(numbers) == 13


def test_sizes_may_differ_by_layer() -> None:
    data = ModelProfile.generic(3, 4, 2).to_dict()
    data["expert_bytes"] = {"bf16": [30, 20, 10]}
    data["dense_bytes"] = [1, 2, 3]
    model = ModelProfile.from_dict(data)
    assert model.expert_bytes_table().tolist() == [30, 20, 10]
    assert model.expert_bytes_table().dtype == np.int64
    assert model.all_expert_bytes() == 240
    assert model.fixed_bytes() == 6
    data["dense_bytes"] = [7, 7, 7]
    assert ModelProfile.from_dict(data).dense_bytes == 7


@given(
    layers=st.integers(1, 300),
    experts=st.integers(1, 600),
    share=st.floats(0, 1),
)
def test_generic_is_a_valid_profile(layers: int, experts: int, share: float) -> None:
    top_k = max(1, round(share * experts))
    model = ModelProfile.generic(layers, experts, top_k, name="x")
    assert (model.layers, model.experts, model.top_k) == (layers, experts, top_k)
    assert (model.source, model.hidden, model.intermediate) == ("assumed", 2048, 1024)
    assert ModelProfile.from_dict(model.to_dict()) == model


def test_generic_refuses_an_impossible_shape() -> None:
    with pytest.raises(ProfileError, match=r"model 'x': top_k: must be at most 2, got 3"):
        ModelProfile.generic(1, 2, 3, name="x")


# Errors: each names the file, the key and the mend, in one line.

NAN = float("nan")
MODEL_FAULTS = [
    ("layers", 0, "layers: must be at least 1, got 0"),
    ("layers", -3, "layers: must be at least 1, got -3"),
    ("layers", 40_000, "layers: must be at most 32767, got 40000"),
    ("layers", 2.0, "layers: must be a whole number, got 2.0"),
    ("layers", True, "layers: must be a whole number, got True"),
    ("layers", NAN, "layers: is NaN; write a whole number"),
    ("layers", None, "layers: missing; add this key"),
    ("experts", 65_535, "experts: must be at most 65534, got 65535"),
    ("experts", "8", "experts: must be a whole number, got '8'"),
    ("top_k", 65, "top_k: must be at most 64, got 65"),
    ("shared_experts", -1, "shared_experts: must be at least 0, got -1"),
    ("name", "", "name: is empty; write some text"),
    ("name", 3, "name: must be text, got 3"),
    ("source", "guess", "source: must be one of config, measured, datasheet, computed, assumed"),
    ("score", "relu", "score: must be one of softmax, "),
    ("hidden", 0, "hidden: must be at least 1, got 0"),
    ("dense_bytes", 0, "dense_bytes: must be at least 1, got 0"),
    ("dense_bytes", [1, 2], "dense_bytes: must hold one number for each of 16 layers, got 2"),
    ("dense_bytes", [1] * 15 + [0], "dense_bytes[15]: must be at least 1, got 0"),
    ("dense_bytes", 2**63, "dense_bytes: must be at most 9223372036854775807"),
    ("stacks", [["decoder", 15]], "stacks: holds 15 layers in all, but layers = 16"),
    ("stacks", [["tower", 16]], 'stacks: must be [["decoder", LAYERS]] or'),
    ("stacks", "decoder", 'stacks: must be [["decoder", LAYERS]] or'),
    ("stacks", [], 'stacks: must be [["decoder", LAYERS]] or'),
    ("precisions", [], 'precisions: must be names such as ["bf16"], got []'),
    ("precisions", ["bf16", "bf16", "int8"], "precisions: holds a name twice"),
    ("precisions", ["bf16", "int8"], "expert_bytes.int4: is not in precisions; add it there"),
    ("precisions", ["int8", "bf16", "int4"], "expert_bytes.bf16: is larger than int8;"),
    ("expert_bytes", 5, "expert_bytes: must be a table, got 5"),
    ("expert_bytes.bf16", 0, "expert_bytes.bf16: must be at least 1, got 0"),
    ("expert_bytes.bf16", None, "expert_bytes.bf16: missing; add this key"),
    ("expert_bites", 1, "expert_bites: unknown key; did you mean expert_bytes"),
    ("config.heads", 1.5, "config.heads: must be a whole number, got 1.5"),
    ("schema", 2, "schema: 2 is newer than this moesim reads (1); update it"),
    ("schema", None, "schema: missing; add this key"),
]
HARDWARE_FAULTS = [
    ("source", "config", "source: must be one of measured, datasheet, assumed; got 'config'"),
    ("memory", None, "memory: missing; add this key"),
    ("memory", 4, "memory: must be a table, got 4"),
    ("memory.device_bytes", 0, "memory.device_bytes: must be at least 1, got 0"),
    ("memory.reserved_bytes", 2**40, "memory.reserved_bytes: leaves nothing of device_bytes"),
    ("link.bytes_per_s", 0, "link.bytes_per_s: must be above 0, got 0; inf means no limit"),
    ("link.bytes_per_s", -1.5, "link.bytes_per_s: must be above 0, got -1.5"),
    ("link.bytes_per_s", -math.inf, "link.bytes_per_s: must be above 0, got -inf"),
    ("link.bytes_per_s", NAN, "link.bytes_per_s: is NaN; write a number above 0, or inf"),
    ("link.bytes_per_s", "fast", "link.bytes_per_s: must be a number above 0 or inf, got 'fast'"),
    ("link.bytes_per_s", None, "link.bytes_per_s: missing; add this key"),
    ("link.bandwidth", 1, "link.bandwidth: unknown key; known: bytes_per_s"),
    ("link.byte_per_s", 1, "link.byte_per_s: unknown key; did you mean bytes_per_s?"),
    ("link.latency_ns", -1, "link.latency_ns: must be at least 0, got -1"),
    ("link.chunk_bytes", 1.5, "link.chunk_bytes: must be a whole number, got 1.5"),
    ("link.channels", 0, "link.channels: must be at least 1, got 0"),
    ("link.curve", 5, "link.curve: must be rows [bytes, ns] or a Parquet file's name"),
    ("link.curve", [[1, 2, 3]], "link.curve[0]: must be [bytes, ns], got [1, 2, 3]"),
    ("link.curve", [[5, 20_000], [5, 20_000]], "link.curve[1]: must come after the row before it"),
    ("link.curve", [[5, 30_000], [6, 20_000]], "link.curve[1]: takes less time than a smaller one"),
    ("link.curve", [[5, 10]], "link.curve[0]: takes less than latency_ns"),
    ("link.curve", [[0, 20_000]], "link.curve[0]: starts at 0 bytes"),
    ("link.curve", "none.parquet", "none.parquet: no such file"),
    (
        "compute.kind",
        "magic",
        "compute.kind: must be one of roofline, constant, table; got 'magic'",
    ),
    ("compute.kind", "constant", "compute.dense_ns: missing; add this key"),
    ("compute.kind", "table", "compute.expert: missing; add this key"),
    ("compute.flops_per_s", 0.0, "compute.flops_per_s: must be above 0, got 0.0"),
    ("compute.dense_ns", 5, "compute.dense_ns: unknown key"),
    ("host.sync_ns", NAN, "host.sync_ns: is NaN; write a whole number"),
    ("host.workers", 0, "host.workers: must be at least 1, got 0"),
    ("host.policy_ops_per_s", 0, "host.policy_ops_per_s: must be above 0, got 0"),
    ("host.cpu", None, "host.cpu: missing; add this key"),
    (
        "host.cpu.kind",
        "grid",
        "host.cpu.kind: must be one of roofline, constant, table; got 'grid'",
    ),
    ("host.cpu.kernel_ns", None, "host.cpu.kernel_ns: missing; add this key"),
    ("schema", 7, "schema: 7 is newer than this moesim reads (1); update it"),
]


def spoil(data: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    """A copy with one dotted key set, or with None removed."""
    data = copy.deepcopy(data)
    *folders, last = key.split(".")
    table = data
    for folder in folders:
        table = table[folder]
    if value is None:
        del table[last]
    else:
        table[last] = value
    return data


def one_line(error: ProfileError) -> str:
    text = str(error)
    assert "\n" not in text
    return text


@pytest.mark.parametrize(("key", "value", "message"), MODEL_FAULTS)
def test_model_faults_are_named(key: str, value: Any, message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "m.toml", spoil(raw("model", "olmoe-1b-7b"), key, value))
    with pytest.raises(ProfileError) as caught:
        load_model(path)
    assert one_line(caught.value).startswith(f"{path}: {message}")


@pytest.mark.parametrize(("key", "value", "message"), HARDWARE_FAULTS)
def test_hardware_faults_are_named(key: str, value: Any, message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "h.toml", spoil(raw("hardware", "rtx4090"), key, value))
    with pytest.raises(ProfileError) as caught:
        load_hardware(path)
    where = f"{tmp_path}/" if value == "none.parquet" else f"{path}: "
    assert one_line(caught.value).startswith(f"{where}{message}")


@pytest.mark.parametrize("load", [load_model, load_hardware, load_any])
def test_files_that_are_no_profiles(load: Any, tmp_path: Path) -> None:
    absent = tmp_path / "absent.toml"
    broken = tmp_path / "broken.toml"
    broken.write_text("name = [1,\n")
    binary = tmp_path / "binary.toml"
    binary.write_bytes(b"\xff\xfe\x00\x01")
    empty = tmp_path / "empty.toml"
    empty.touch()
    folder = tmp_path / "folder.toml"
    folder.mkdir()
    huge = tmp_path / "huge.toml"
    huge.write_text("schema = 0x" + "f" * 9000)
    for path, message in (
        (absent, "no such file; give an existing .toml profile"),
        (broken, "not a TOML profile ("),
        (binary, "not a TOML profile ("),
        (empty, "schema: missing; add this key"),
        (huge, "schema: must be at most 9223372036854775807, got a huge number"),
        (folder, "cannot be read (Is a directory)"),
    ):
        with pytest.raises(ProfileError) as caught:
            load(path)
        assert one_line(caught.value).startswith(f"{path}: {message}")


@pytest.mark.parametrize(
    ("load", "name", "message"),
    [
        (load_hardware, "rtx4091", "no hardware profile named 'rtx4091'; did you mean rtx4090"),
        (load_hardware, "RTX3090", "no hardware profile named 'RTX3090'; did you mean rtx3090"),
        (load_hardware, "zzz", "no hardware profile named 'zzz'; known: a100, h100, h200, jetson"),
        (load_hardware, "gpt-oss-20b", "no hardware profile named 'gpt-oss-20b'; known: a100"),
        (load_model, "Mixtral-8x7B-v0.1", "did you mean mixtral-8x7b"),
        (load_model, "gpt-oss", "did you mean gpt-oss-20b, gpt-oss-120b?"),
        (load_model, "rtx4090", "no model profile named 'rtx4090'; known: deepseek-v2-lite"),
        (load_any, "mixtral", "did you mean mixtral-8x7b?"),
    ],
)
def test_unknown_names_get_close_matches(load: Any, name: str, message: str) -> None:
    with pytest.raises(ProfileError) as caught:
        load(name)
    assert message in one_line(caught.value)
    assert "`moesim profiles` lists all" in str(caught.value)


def test_a_model_file_is_not_a_machine(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match="memory: missing"):
        load_hardware(write(tmp_path / "m.toml", raw("model", "olmoe-1b-7b")))
    with pytest.raises(ProfileError, match="layers: missing"):
        load_model(write(tmp_path / "h.toml", raw("hardware", "h100")))


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)
BASES = [load_model("olmoe-1b-7b").to_dict(), load_hardware("rtx4090").to_dict()]
PATHS = [
    (base, [*folder, key])
    for base in BASES
    for folder, table in [
        ([], base),
        *(([k], v) for k, v in base.items() if isinstance(v, dict)),
    ]
    for key in table
]


@settings(max_examples=400)
@given(spot=st.sampled_from(PATHS), value=ANYTHING, extra=st.none() | st.text(max_size=4))
def test_any_value_anywhere_is_taken_or_named(
    spot: tuple[dict[str, Any], list[str]], value: Any, extra: str | None
) -> None:
    base, keys = spot
    data = copy.deepcopy(base)
    table = data
    for key in keys[:-1]:
        table = table[key]
    table[keys[-1] if extra is None else extra] = value
    kind = HardwareProfile if "memory" in base else ModelProfile
    try:
        profile = kind.from_dict(data, "here")
    except ProfileError as error:
        # A text for rows names a Parquet file, which the error then names instead.
        assert one_line(error).startswith("here: ") or keys[-1] == "curve"
    else:
        assert kind.from_dict(json.loads(json.dumps(profile.to_dict()))) == profile


@given(data=ANYTHING)
def test_any_json_is_taken_or_named(data: Any) -> None:
    for kind in (ModelProfile, HardwareProfile):
        with pytest.raises(ProfileError):
            kind.from_dict(data)


@settings(max_examples=200)
@given(data=st.binary(max_size=60))
def test_any_bytes_are_refused_in_one_line(
    data: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.toml"
    path.write_bytes(data)
    with pytest.raises(ProfileError) as caught:
        load_any(path)
    assert str(caught.value).startswith(str(path))


# Kinds of machine


def test_kinds_of_compute_are_read(tmp_path: Path) -> None:
    data = raw("hardware", "rtx4090")
    assert isinstance(load_hardware("rtx4090").compute, Roofline)
    data["compute"] = {"kind": "constant", "dense_ns": 0, "expert_ns": 7}
    data["host"]["cpu"] = {"kind": "constant", "expert_ns": 9}
    machine = load_hardware(write(tmp_path / "c.toml", data))
    assert machine.compute == Constant(0, 7)
    assert machine.host.cpu == ConstantExpert(9)
    data["compute"] = {"kind": "table", "expert": [[1, 5]], "dense": [[1, 0, 5], [1, 9, 6]]}
    machine = load_hardware(write(tmp_path / "t.toml", data))
    assert machine.compute == Table(((1, 5),), ((1, 0, 5), (1, 9, 6)), "")


@pytest.mark.parametrize(
    ("key", "rows", "message"),
    [
        ("expert", [], "compute.expert: has no rows; measure at least one"),
        ("expert", [[0, 5]], "compute.expert[0]: must be for at least 1 token"),
        ("expert", [[2, 5], [1, 5]], "compute.expert[1]: must come after the row before it"),
        ("expert", [[1, 5], [2, 4]], "compute.expert[1]: takes less time than a smaller one"),
        ("dense", [[1, 4, 5], [1, 4, 5]], "compute.dense[1]: must come after the row before it"),
        ("dense", [[1, 4, 5], [1, 5, 4]], "compute.dense[1]: takes less time than a shorter"),
        ("dense", [[1, 4]], "compute.dense[0]: must be [tokens, context, ns], got [1, 4]"),
    ],
)
def test_wrong_tables_are_named(
    key: str, rows: list[list[int]], message: str, tmp_path: Path
) -> None:
    data = raw("hardware", "rtx4090")
    data["compute"] = {"kind": "table", "expert": [[1, 5]], "dense": [[1, 0, 5]]} | {key: rows}
    path = write(tmp_path / "t.toml", data)
    with pytest.raises(ProfileError) as caught:
        load_hardware(path)
    assert one_line(caught.value).startswith(f"{path}: {message}")


def test_tables_may_lie_in_parquet_beside_the_profile(tmp_path: Path) -> None:
    rows = {"bytes": [10, 2000], "ns": [20_000, 30_000]}
    pq.write_table(pa.table(rows), tmp_path / "link.parquet")
    data = spoil(raw("hardware", "rtx4090"), "link.curve", "link.parquet")
    machine = load_hardware(write(tmp_path / "h.toml", data))
    assert machine.link.curve == ((10, 20_000), (2000, 30_000))
    (tmp_path / "link.parquet").write_bytes(b"no Parquet")
    with pytest.raises(ProfileError, match=r"link\.parquet: cannot be read as Parquet"):
        load_hardware(tmp_path / "h.toml")
    pq.write_table(pa.table({"bytes": [1]}), tmp_path / "link.parquet")
    with pytest.raises(ProfileError, match=r"link\.parquet: "):
        load_hardware(tmp_path / "h.toml")
    pq.write_table(pa.table({"bytes": [1.5], "ns": [20_000]}), tmp_path / "link.parquet")
    with pytest.raises(ProfileError, match=r"link\.curve\[0\]: must be a whole number, got 1.5"):
        load_hardware(tmp_path / "h.toml")


def test_with_bandwidth_changes_the_link_alone() -> None:
    machine = load_hardware("rtx4090")
    other = machine.with_bandwidth(5e9)
    assert other.link.bytes_per_s == 5e9
    assert other.with_bandwidth(machine.link.bytes_per_s) == machine
    assert other.digest != machine.digest
    curved = replace(machine, link=replace(machine.link, curve=((1, 20_000),)))
    assert curved.with_bandwidth(5e9) == other
    free = machine.with_bandwidth(math.inf)
    assert HardwareProfile.from_dict(json.loads(json.dumps(free.to_dict()))) == free
    for wrong in (0, -1.0, NAN):
        with pytest.raises(ProfileError, match=r"rtx4090: link\.bytes_per_s: "):
            machine.with_bandwidth(wrong)


# The command


def moesim_profiles(*args: str) -> int:
    parser = argparse.ArgumentParser()
    command.add_parser(parser.add_subparsers())
    parsed = parser.parse_args(["profiles", *args])
    code: int = parsed.func(parsed)
    return code


def test_command_lists_all_with_their_sources(capsys: pytest.CaptureFixture[str]) -> None:
    assert moesim_profiles() == 0
    lines = capsys.readouterr().out.splitlines()
    for name in list_models():
        assert any(line.split()[:2] == [name, "config"] for line in lines)
    for name in list_hardware():
        assert any(line.split()[:2] == [name, "datasheet"] for line in lines)
    assert moesim_profiles("--json") == 0
    listed = json.loads(capsys.readouterr().out)
    assert [model["name"] for model in listed["models"]] == list(list_models())
    assert all(machine["source"] == "datasheet" for machine in listed["hardware"])


@pytest.mark.parametrize("name", list_models() + list_hardware())
def test_command_prints_a_file_to_save_and_edit(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert moesim_profiles(name) == 0
    saved = tmp_path / "mine.toml"
    saved.write_text(capsys.readouterr().out)
    profile = load_any(name)[1]
    assert load_any(saved) == (saved, profile)
    assert moesim_profiles(str(saved), "--json") == 0
    assert json.loads(capsys.readouterr().out) == profile.to_dict()


def test_reading_profiles_needs_nothing_heavy() -> None:
    code = (
        "import sys, moesim.costs, moesim.cli.profiles as p\n"
        "from moesim.profile import load_model\n"
        "load_model('mixtral-8x7b')\n"
        "print(sorted({'torch', 'numba', 'pandas', 'matplotlib', 'pyarrow', 'rich'}"
        " & set(sys.modules)))"
    )
    root = SHIPPED.parent.parent
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"

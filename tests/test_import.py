"""Importers: one block of routing, written in every format, comes back the same."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moesim.errors import MoesimError, TraceError, UsageError
from moesim.profile import ModelProfile, load_model
from moesim.traces.check import check_file
from moesim.traces.convert import FORMATS, convert
from moesim.traces.reader import RequestRows, TraceReader
from moesim.traces.schema import DROPPED, TraceMeta

LAYERS, EXPERTS, K = 3, 8, 2
LENGTHS = (5, 7)
Rows = dict[tuple[int, int, int], tuple[int, ...]]


@dataclass(frozen=True)
class Block:
    """Two sequences: ids [tokens, layers, k] ascending in no sense, weights in 1/10000."""

    experts: np.ndarray[Any, Any]
    weights: np.ndarray[Any, Any]

    def parts(self) -> list[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]:
        cuts = np.cumsum(LENGTHS)[:-1]
        return list(zip(np.split(self.experts, cuts), np.split(self.weights, cuts), strict=True))

    def head(self, tokens: int) -> Block:
        return Block(self.experts[:tokens], self.weights[:tokens])


def make_block(seed: int = 0) -> Block:
    rng = np.random.default_rng(seed)
    shape = (sum(LENGTHS), LAYERS)
    ids = rng.permuted(np.tile(np.arange(EXPERTS), (*shape, 1)), axis=-1)[..., :K]
    ids[0, 0] = EXPERTS - 1, 0  # the largest id occurs
    return Block(ids, rng.integers(1, 10_000, (*shape, K)))


BLOCK = make_block()


# ---- writers of the foreign formats --------------------------------------------------------------


def write_arrays(folder: Path, block: Block) -> Path:
    path = folder / "a.npz"
    offsets = np.array([0, LENGTHS[0], len(block.experts)])
    np.savez(
        path,
        experts=block.experts.astype(np.uint8),
        weights_1e4=block.weights.astype(np.uint16),
        seq_offsets=offsets,
    )
    return path


def write_gptoss(folder: Path, block: Block, first: int = 0) -> Path:
    records = []
    for ids, weights in block.parts():
        steps = [
            {
                f"token_{first + t}": {
                    f"layer_{layer}": {
                        "selected_experts": ids[t, layer].tolist(),
                        "selected_probs": (weights[t, layer] / 10_000).tolist(),
                    }
                    for layer in range(LAYERS)
                }
            }
            for t in range(len(ids))
        ]
        records.append(
            {"dataset": "toy", "category": "sums", "original_prompt": "1+1", "router_data": steps}
        )
    path = folder / "g_examples.json.gz"
    path.write_bytes(gzip.compress(json.dumps(records).encode()))
    return path


def write_esft(folder: Path, block: Block) -> Path:
    folder = folder / "esft"
    folder.mkdir()
    for layer in range(LAYERS):
        lines = []
        for ids, weights in block.parts():
            texts = [f"{w / 10_000:.4f}" for w in weights[:, layer].ravel().tolist()]
            lines.append("\t".join([*map(str, ids[:, layer].ravel().tolist()), "", *texts]))
        (folder / f"expert_weights_{layer + 1}.txt").write_text("\n".join(lines) + "\n")
    return folder


def write_moebeyond(folder: Path, block: Block) -> Path:
    folder = folder / "beyond"
    folder.mkdir()
    for number, (ids, _) in enumerate(block.parts(), 9):  # 9 and 10: order by number, not by text
        text = io.StringIO()
        out = csv.writer(text)
        out.writerow(["Layer ID", "Batch Number", "Token", "Activated Expert IDs"])
        for layer in range(LAYERS):
            for t in range(len(ids)):
                out.writerow([layer + 1, 0, f'Ġ"{t},', ids[t, layer].tolist()])
        (folder / f"prompt_{number}_data.csv").write_text(text.getvalue(), encoding="utf-8")
    return folder


def write_flame(folder: Path, block: Block) -> Path:
    folder = folder / "flame"
    folder.mkdir()
    for layer in range(LAYERS):
        lines = ["layer_id,token_id," + ",".join(f"expert_{e}" for e in range(EXPERTS))]
        for ids, weights in block.parts():
            for t in range(len(ids)):
                scores = np.zeros(EXPERTS)
                scores[ids[t, layer]] = weights[t, layer] / 10_000
                lines.append(f"0,{t}," + ",".join(f"{s:.6f}" for s in scores))
        (folder / f"run_layer{layer + 9}_shard0.csv").write_text("\n".join(lines) + "\n")
    return folder


def write_routertrace(folder: Path, block: Block) -> Path:
    folder = folder / "router"
    folder.mkdir()
    trace = {
        "version": 2,
        "tokens": len(block.experts),
        "layers": LAYERS,
        "topK": K,
        "expertsPerLayer": EXPERTS,
        "selections": block.experts.tolist(),
        "source": {"model": {"id": "toy/moe"}, "capture": {"seed": 7, "dtype": "torch.float32"}},
    }
    (folder / "router-trace.json").write_text(json.dumps(trace))
    ends = np.cumsum(LENGTHS).tolist()
    spans = [
        {"id": f"law-0{i}", "token_start": end - n, "token_end_exclusive": end}
        for i, (end, n) in enumerate(zip(ends, LENGTHS, strict=True))
    ]
    (folder / "capture-metadata.json").write_text(json.dumps({"prompt_spans": spans}))
    return folder


def vllm_rows(block: Block) -> list[dict[str, Any]]:
    return [
        {
            "type": "route",
            "req_id": f"r{number}",
            "token_idx": t,
            "layer": layer,
            "topk_ids": ids[t, layer].tolist(),
            "topk_weights": (weights[t, layer] / 10_000).tolist(),
        }
        for number, (ids, weights) in enumerate(block.parts())
        for layer in range(LAYERS)
        for t in range(len(ids))
    ]


def write_vllm(folder: Path, block: Block, warm_up: int = 0) -> Path:
    meta = {"type": "meta", "model_id": "toy/moe", "vllm_version": "0.1", "seed": 1, "top_k": K}
    warm = [
        {**row, "req_id": "r0", "token_idx": t, "layer": layer}
        for layer in range(LAYERS)
        for t, row in enumerate([vllm_rows(block)[0]] * warm_up)
    ]
    path = folder / "moe_routes.jsonl"
    rows = [meta, *warm, *vllm_rows(block)]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return path


BIGMOE_BYTES = {1: 1000, 2: 3000, 4: 2000}


def write_bigmoe(
    folder: Path, block: Block, prefill: int = 3, dropped: bool = True, weight: str = ""
) -> Path:
    """Layers 1, 2 and 4 of five have experts. Prefill rows go layer by layer, others by token."""
    lines = [
        "# route_trace v1",
        f"# model=/models/toy moe.gguf arch=toy n_layer=5 n_expert={EXPERTS} n_expert_used={K}",
        *(
            f"# layer={i} expert_bytes={BIGMOE_BYTES.get(i, 0)} dense_bytes={10 + i}"
            for i in range(5)
        ),
        "turn,phase,step,layer,slot,expert,weight,residency,expert_bytes"
        + (",dropped" if dropped else ""),
    ]
    tail = ",1" if dropped else ""
    for turn, (ids, weights) in enumerate(block.parts()):

        def row(phase: int, t: int, layer: int, turn: int = turn, ids: Any = ids, w: Any = weights):  # type: ignore[no-untyped-def]
            for slot in np.argsort(-w[t, layer], kind="stable").tolist():
                text = weight or f"{w[t, layer, slot] / 10_000:.6g}"
                rank = np.argsort(-w[t, layer], kind="stable").tolist().index(slot)
                source = list(BIGMOE_BYTES)[layer]
                yield f"{turn},{phase},{t},{source},{rank},{ids[t, layer, slot]},{text},0,0{tail}"

        for layer in range(LAYERS):
            for t in range(prefill):
                lines += row(0, t, layer)
        for t in range(prefill, len(ids)):
            for layer in range(LAYERS):
                lines += row(1, t, layer)
    path = folder / "route.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


WRITERS: dict[str, Callable[[Path, Block], Path]] = {
    "arrays": write_arrays,
    "bigmoe": write_bigmoe,
    "esft": write_esft,
    "flame": write_flame,
    "gpt-oss": write_gptoss,
    "moe-beyond": write_moebeyond,
    "router-trace": write_routertrace,
    "vllm": write_vllm,
}
WEIGHTLESS = ("moe-beyond", "router-trace")


# ---- what must come out --------------------------------------------------------------------------


def imported(src: Any, folder: Path, **options: Any) -> tuple[TraceMeta, list[RequestRows]]:
    target = folder / "out.parquet"
    meta = convert(src, target, **options)
    assert check_file(target).meta == meta
    with TraceReader(target) as reader:
        return meta, list(reader.requests())


def as_dict(rows: RequestRows) -> Rows:
    keys = zip(rows.iteration.tolist(), rows.layer.tolist(), rows.position.tolist(), strict=True)
    return dict(zip(keys, map(tuple, rows.experts.tolist()), strict=True))


def expected(
    ids: Any, weights: Any | None, *, prefill: int, first: int = 0, layers: int = LAYERS
) -> Rows:
    """The same rows, told in plain loops."""
    rows: Rows = {}
    for t in range(len(ids)):
        for layer in range(layers):
            cell = ids[t, layer].tolist()
            if weights is not None:
                order = sorted(range(len(cell)), key=lambda i: -int(weights[t, layer, i]))
                cell = [cell[i] for i in order]
            rows[max(t - prefill + 1, 0), layer, first + t] = tuple(cell)
    return rows


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("phase", ["as-is", "decode", "prefill"])
@pytest.mark.parametrize("keep_order", [False, True])
def test_every_format_gives_the_same_rows(
    tmp_path: Path, name: str, phase: str, keep_order: bool
) -> None:
    source = WRITERS[name](tmp_path, BLOCK)
    meta, requests = imported(source, tmp_path, phase=phase, keep_order=keep_order)
    said = {"gpt-oss": 0, "bigmoe": 3}
    for rows, (ids, weights) in zip(requests, BLOCK.parts(), strict=True):
        prefill = {"decode": 0, "prefill": len(ids)}.get(phase, said.get(name, len(ids)))
        if name == "flame" and keep_order:  # its own order is by id: the columns
            order = np.argsort(ids, axis=-1)
            want = expected(np.take_along_axis(ids, order, -1), None, prefill=prefill)
        else:
            ordered = name == "bigmoe" or not (keep_order or name in WEIGHTLESS)
            want = expected(ids, weights if ordered else None, prefill=prefill)
        assert as_dict(rows) == want
    assert meta.experts == EXPERTS
    if keep_order:
        assert meta.rank_order == "source"
    else:
        assert meta.rank_order == ("unknown" if name in WEIGHTLESS else "weight")
    assert [rows.request for rows in requests] == [0, 1]


@pytest.mark.parametrize("name", [name for name in FORMATS if name not in WEIGHTLESS])
def test_weights_follow_their_experts(tmp_path: Path, name: str) -> None:
    _, requests = imported(WRITERS[name](tmp_path, BLOCK), tmp_path)
    for rows, (ids, weights) in zip(requests, BLOCK.parts(), strict=True):
        assert rows.weights is not None
        for t, layer, chosen, got in zip(
            rows.position.tolist(), rows.layer.tolist(), rows.experts, rows.weights, strict=True
        ):
            truth = dict(zip(ids[t, layer].tolist(), weights[t, layer].tolist(), strict=True))
            want = [np.float16(truth[expert] / 10_000) for expert in chosen.tolist()]
            assert got.tolist() == want


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_arrays_equal_plain_loops(data: st.DataObject, tmp_path_factory: Any) -> None:
    lengths = data.draw(st.lists(st.integers(0, 6), min_size=1, max_size=4).filter(any))
    layers, k = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 4))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    tokens = sum(lengths)
    ids = rng.permuted(np.tile(np.arange(k + 2), (tokens, layers, 1)), axis=-1)[..., :k]
    weights = rng.integers(0, data.draw(st.sampled_from([2, 100])), ids.shape)
    offsets = np.concatenate(([0], np.cumsum(lengths)))
    first = rng.integers(0, 50, len(lengths))
    decode = data.draw(st.booleans())
    phase = data.draw(st.sampled_from(["as-is", "decode", "prefill"]))
    folder = tmp_path_factory.mktemp("arrays")
    arrays = {"experts": ids.astype(np.uint16), "weights": weights, "seq_offsets": offsets}
    np.savez(folder / "a.npz", **arrays, **({"first_position": first} if decode else {}))
    _, requests = imported(folder / "a.npz", folder, phase=phase, experts=k + 2)
    kept = [i for i, length in enumerate(lengths) if length]
    assert len(requests) == len(kept)
    for rows, index in zip(requests, kept, strict=True):
        part = slice(offsets[index], offsets[index + 1])
        length = lengths[index]
        prefill = {"decode": 0, "prefill": length}.get(phase, 0 if decode else length)
        start = int(first[index]) if decode else 0
        assert as_dict(rows) == expected(
            ids[part], weights[part], prefill=prefill, first=start, layers=layers
        )


def test_order_is_that_of_the_original_integers(tmp_path: Path) -> None:
    """500001 and 500000 millionths are one float16; the larger still goes first, ties stay put."""
    np.savez(
        tmp_path / "a.npz",
        experts=np.array([[[0, 1, 2, 3]]]),
        weights_1e6=np.array([[[500_000, 500_001, 500_000, 500_001]]], dtype=np.uint32),
    )
    _, (rows,) = imported(tmp_path / "a.npz", tmp_path)
    assert rows.experts.tolist() == [[1, 3, 0, 2]]
    assert len(set(rows.weights[0].tolist())) == 1  # type: ignore[index]


@pytest.mark.parametrize(
    ("key", "values", "want"),
    [
        ("weights_u8", np.array([255, 51], np.uint8), [1, 0.2]),
        ("weights_1e4", np.array([5000, 1], np.uint16), [0.5, 1e-4]),
        ("weights_1e6", np.array([250_000, 1], np.uint32), [0.25, 1e-6]),
        ("weights_f16", np.array([0.75, 0.25], np.float16), [0.75, 0.25]),
        ("weights", np.array([0.3, 0.1]), [0.3, 0.1]),
    ],
)
def test_scales_of_weights(tmp_path: Path, key: str, values: Any, want: list[float]) -> None:
    np.savez(tmp_path / "a.npz", experts=np.array([[[0, 1]]]), **{key: values[None, None]})
    _, (rows,) = imported(tmp_path / "a.npz", tmp_path)
    assert rows.weights is not None
    assert rows.weights[0].tolist() == np.array(want, np.float16).tolist()


def test_lengths_are_facts(tmp_path: Path) -> None:
    _, decoded = imported(write_gptoss(tmp_path, BLOCK, first=20), tmp_path)
    assert decoded[0].facts.prompt_tokens == 20
    assert decoded[0].facts.output_tokens == LENGTHS[0] + 1
    assert decoded[0].facts.topic == "sums"
    assert decoded[0].position.min() == 20
    _, prefilled = imported(write_arrays(tmp_path, BLOCK), tmp_path)
    assert prefilled[1].facts.prompt_tokens == LENGTHS[1]
    assert prefilled[1].facts.output_tokens is None


def test_sidecar_names_topics_and_lengths(tmp_path: Path) -> None:
    source = write_arrays(tmp_path, BLOCK)
    lines = [
        {"seq": i, "category": f"c{i}", "dataset": "d", "prompt_tokens": 30 + i, "decode_steps": n}
        for i, n in enumerate(LENGTHS)
    ]
    beside = tmp_path / "sequences.jsonl"
    beside.write_text("\n".join(map(json.dumps, lines)))
    meta, requests = imported(source, tmp_path)
    assert [rows.facts.topic for rows in requests] == ["c0", "c1"]
    assert meta.dataset == "d"
    assert meta.phases == ("decode",)
    assert requests[1].position.min() == 31
    lines[0]["decode_steps"] = 99
    beside.write_text("\n".join(map(json.dumps, lines)))
    meta, requests = imported(source, tmp_path)
    assert requests[0].facts.topic is None
    assert meta.phases == ("prefill",)
    assert "was not used" in meta.notes[0]


def test_dropped_slots_pass(tmp_path: Path) -> None:
    ids = np.array([[[DROPPED, 3]], [[DROPPED, DROPPED]]], np.uint16)
    np.savez(tmp_path / "a.npz", experts=ids, weights=np.array([[[9.0, 1]], [[0, 0]]]))
    meta, (rows,) = imported(tmp_path / "a.npz", tmp_path)
    assert rows.experts.tolist() == [[3, DROPPED], [DROPPED, DROPPED]]
    assert meta.experts == 4


# ---- number of experts and model -----------------------------------------------------------------


def test_number_of_experts(tmp_path: Path) -> None:
    source = write_arrays(tmp_path, BLOCK)
    meta, _ = imported(source, tmp_path)
    assert meta.experts == EXPERTS
    assert "largest id + 1" in meta.notes[-1]
    meta, _ = imported(source, tmp_path, experts=50)
    assert meta.experts == 50
    assert not meta.notes
    with pytest.raises(TraceError, match=r"is not in 0\.\.3"):
        convert(source, tmp_path / "x.parquet", experts=4)
    with pytest.raises(UsageError, match="--experts 0"):
        convert(source, tmp_path / "x.parquet", experts=0)
    with pytest.raises(TraceError, match=r"states 8 experts.*--experts 9"):
        convert(write_routertrace(tmp_path, BLOCK), tmp_path / "x.parquet", experts=9)


def test_model_must_agree(tmp_path: Path) -> None:
    source = write_arrays(tmp_path, BLOCK)
    right = ModelProfile.generic(LAYERS, 16, K, "right")
    meta, _ = imported(source, tmp_path, model=right)
    assert meta.model == right
    for wrong in (
        ModelProfile.generic(LAYERS + 1, 16, K, "wrong"),
        ModelProfile.generic(LAYERS, 16, K + 1, "wrong"),
    ):
        with pytest.raises(TraceError, match=r"a\.npz: 3 layers.*top-2; model wrong: "):
            convert(source, tmp_path / "x.parquet", model=wrong)
    with pytest.raises(TraceError, match=r"8 experts.*model right: 3 layers, 16 experts"):
        convert(write_flame(tmp_path, BLOCK), tmp_path / "x.parquet", model=right)
    assert not list(tmp_path.glob("*x.parquet*"))


def test_encoder_alone_fits_an_encoder_decoder_model(tmp_path: Path) -> None:
    model = load_model("switch-base-8")
    encoder = model.stacks[0].layers
    np.savez(tmp_path / "a.npz", experts=np.zeros((4, encoder, 1), np.uint8))
    meta, (rows,) = imported(tmp_path / "a.npz", tmp_path, model=model)
    assert rows.layer.max() == encoder - 1
    assert "encoder" in meta.notes[-1]


# ---- what is peculiar to a format ----------------------------------------------------------------


def test_bigmoe_profile_has_the_bytes_of_each_layer(tmp_path: Path) -> None:
    meta, _ = imported(write_bigmoe(tmp_path, BLOCK), tmp_path)
    model = meta.model
    assert model.name == "toy moe"
    assert model.expert_bytes_table().tolist() == [1000, 3000, 2000]
    # Layers 0 and 3 have no experts: their dense bytes go to the next layer that has.
    assert model.dense_bytes_table().tolist() == [10 + 11, 12, 13 + 14]
    assert meta.phases == ("prefill", "decode")
    assert any("were skipped by the recording engine" in note for note in meta.notes)
    plain, _ = imported(write_bigmoe(tmp_path, BLOCK, dropped=False), tmp_path)
    assert plain.digest == meta.digest


def test_bigmoe_without_weights_keeps_the_slots(tmp_path: Path) -> None:
    meta, requests = imported(write_bigmoe(tmp_path, BLOCK, weight="nan"), tmp_path)
    assert meta.rank_order == "source"
    assert not meta.has_weights
    with_weights = imported(write_bigmoe(tmp_path, BLOCK), tmp_path)[1]
    assert as_dict(requests[0]) == as_dict(with_weights[0])


def test_bigmoe_row_order_does_not_matter(tmp_path: Path) -> None:
    path = write_bigmoe(tmp_path, BLOCK)
    before = imported(path, tmp_path)[0].digest
    lines = path.read_text().splitlines()
    head, rows = lines[:8], lines[8:]
    path.write_text("\n".join([*head, *reversed(rows)]))
    assert imported(path, tmp_path)[0].digest == before


@pytest.mark.parametrize("phase", ["as-is", "decode"])
def test_bigmoe_last_layer_of_the_prefill_may_skip_tokens(tmp_path: Path, phase: str) -> None:
    path = write_bigmoe(tmp_path, BLOCK)
    lines = path.read_text().splitlines()
    kept = [line for line in lines if not line.startswith(("0,0,0,4,", "0,0,1,4,"))]
    assert len(kept) == len(lines) - 2 * K
    path.write_text("\n".join(kept))
    _, requests = imported(path, tmp_path, phase=phase)
    rows = requests[0]
    skipped = (rows.layer == 2) & (rows.position < 2)
    assert (rows.experts[skipped] == DROPPED).all()
    assert (rows.experts[~skipped] != DROPPED).all()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("v1", "v2", "only v1"),
        ("n_expert_used=2", "n_expert_used=3", "no multiple|must have each slot"),
        ("\n0,0,0,1,0,", "\n0,0,0,1,1,", "must have each slot"),
        ("\n0,0,0,1,0,", "\n0,2,0,1,0,", "phase must be 0"),
        ("\n0,0,0,1,0,", "\n0,0,-1,1,0,", "column step"),
        ("expert_bytes=3000", "expert_bytes=0", "layer 2 has rows"),
        ("layer=3 expert_bytes=0", "layer=3 expert_bytes=5", "layer 3 has expert_bytes, but no"),
        ("n_layer=5", "n_layer=4", "layer 4 occurs"),
        ("slot,", "place,", "column slot is missing"),
        ("# model", "# modell", "before the model line"),
        ("# route_trace v1\n", "# route_trace v1\nturn\n", "no line `# model"),
    ],
)
def test_bigmoe_mistakes(tmp_path: Path, old: str, new: str, message: str) -> None:
    path = write_bigmoe(tmp_path, BLOCK)
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(TraceError, match=message):
        convert(path, tmp_path / "x.parquet")


def test_vllm_warm_up_is_dropped(tmp_path: Path) -> None:
    plain, _ = imported(write_vllm(tmp_path, BLOCK), tmp_path)
    warmed, _ = imported(write_vllm(tmp_path, BLOCK, warm_up=20), tmp_path)
    assert warmed.digest == plain.digest
    assert "20 warm-up tokens" in warmed.notes[0]
    assert plain.versions == {"vllm": "0.1"}


def test_vllm_one_layer_log(tmp_path: Path) -> None:
    path = write_vllm(tmp_path, BLOCK)
    lines = [line for line in path.read_text().splitlines() if '"layer": 0' in line]
    path.write_text("\n".join(lines))
    meta, requests = imported(path, tmp_path)
    assert (meta.layers, meta.rows) == (1, sum(LENGTHS))
    assert requests[1].position.tolist() == list(range(LENGTHS[1]))


def test_vllm_incomplete_layer(tmp_path: Path) -> None:
    path = write_vllm(tmp_path, BLOCK)
    path.write_text("\n".join(path.read_text().splitlines()[:-1]))
    with pytest.raises(TraceError, match="layer 2 has other tokens than layer 0"):
        convert(path, tmp_path / "x.parquet")


def test_routertrace_spans_must_cover(tmp_path: Path) -> None:
    folder = write_routertrace(tmp_path, BLOCK)
    meta, _ = imported(folder, tmp_path)
    assert (meta.model.name, meta.seed, meta.dtype) == ("toy/moe", 7, "float32")
    beside = folder / "capture-metadata.json"
    text = beside.read_text()
    beside.write_text(text.replace('"token_start": 5', '"token_start": 6'))
    with pytest.raises(TraceError, match="starts at token 6; the one before ends at 5"):
        convert(folder, tmp_path / "x.parquet")
    beside.unlink()
    assert len(imported(folder, tmp_path)[1]) == 1


def test_flame_notes_copied_layers(tmp_path: Path) -> None:
    folder = write_flame(tmp_path, BLOCK)
    (folder / "run_layer12_shard0.csv").write_bytes((folder / "run_layer9_shard0.csv").read_bytes())
    meta, _ = imported(folder, tmp_path)
    assert "layer 12 is a copy of layer 9 in the source" in meta.notes


def test_several_files_equal_their_folder(tmp_path: Path) -> None:
    for name in ("esft", "flame", "moe-beyond"):
        folder = WRITERS[name](tmp_path, BLOCK)
        whole = imported(folder, tmp_path)[0].digest
        files = sorted(folder.iterdir(), reverse=True)
        if name != "esft":  # whose topic is the folder's name
            assert imported(files, tmp_path)[0].digest == whole


def test_esft_needs_every_layer(tmp_path: Path) -> None:
    folder = write_esft(tmp_path, BLOCK)
    (folder / "expert_weights_2.txt").unlink()
    with pytest.raises(TraceError, match="layer 3 comes after 1"):
        convert(folder, tmp_path / "x.parquet")


# ---- mistakes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"experts": None}, "no array `experts`"),
        ({"experts": np.zeros((4, 3))}, r"experts is float64 \(4, 3\)"),
        ({"experts": np.zeros((0, 3, 2), int)}, "none of them 0"),
        ({"experts": np.full((12, 3, 2), 5)}, "expert 5 is there twice"),
        ({"experts": np.zeros((12, 3, 2), int)}, "top_k"),
        ({"experts": BLOCK.experts - 1}, "expert -1 is not in"),
        ({"experts": BLOCK.experts + 70_000}, "ids above 65533 cannot be"),
        ({"seq_offsets": np.array([0, 5])}, "must ascend from 0 to 12"),
        ({"seq_offsets": np.array([0, 9, 5, 12])}, "must ascend"),
        ({"seq_offsets": np.array([0, 99])}, "seq_offsets leave"),
        ({"seq_offsets": np.array([0.0, 12])}, "seq_offsets must hold integers"),
        ({"weights_1e4": BLOCK.weights[:3]}, "weights_1e4 has shape"),
        ({"weights": np.full(BLOCK.weights.shape, np.nan)}, "weight nan is not a number"),
        ({"weights": -BLOCK.weights}, "is not a number from 0 up"),
        ({"weights": BLOCK.weights * 1e9}, "too large for float16"),
        ({"weights": BLOCK.weights.astype(str)}, "must hold numbers"),
        ({"first_position": np.array([1])}, "one integer for each sequence"),
        ({"first_position": np.array([-1, 0])}, "first_position is outside"),
        ({"experts": np.array([[[None]]])}, "cannot read the arrays"),
    ],
)
def test_arrays_mistakes(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    arrays: dict[str, Any] = {
        "experts": BLOCK.experts,
        "seq_offsets": np.array([0, 5, 12]),
        **change,
    }
    kept = {key: value for key, value in arrays.items() if value is not None}
    np.savez(tmp_path / "a.npz", allow_pickle=True, **kept)
    with pytest.raises(TraceError, match=message) as caught:
        convert(tmp_path / "a.npz", tmp_path / "x.parquet")
    assert "\n" not in str(caught.value)
    assert str(tmp_path / "a.npz") in str(caught.value)
    assert not list(tmp_path.glob("*x.parquet*"))


def test_wrong_arguments(tmp_path: Path) -> None:
    source = write_arrays(tmp_path, BLOCK)
    target = tmp_path / "x.parquet"
    with pytest.raises(UsageError, match="--phase no"):
        convert(source, target, phase="no")
    with pytest.raises(UsageError, match="--format no: must be one of arrays, bigmoe"):
        convert(source, target, format="no")
    with pytest.raises(TraceError, match="no such file"):
        convert(tmp_path / "absent", target)
    with pytest.raises(UsageError, match="is also a source"):
        convert(source, source)
    with pytest.raises(UsageError, match="is one file; 2 were given"):
        convert([source, source], target)
    (tmp_path / "empty").touch()
    with pytest.raises(TraceError, match="is empty"):
        convert(tmp_path / "empty", target)
    (tmp_path / "folder").mkdir()
    with pytest.raises(TraceError, match="no file of a known format"):
        convert(tmp_path / "folder", target)
    convert(source, target)
    with pytest.raises(TraceError, match="is a Parquet file"):
        convert(target, tmp_path / "y.parquet")


# ---- fuzz ----------------------------------------------------------------------------------------


def only_trace_errors(source: Path, name: str | None) -> None:
    target = source.parent / "fuzz.parquet"
    try:
        convert(source, target, format=name)
    except TraceError as error:
        assert "\n" not in str(error)
        assert not target.exists()
    else:
        check_file(target)
        target.unlink()


@pytest.fixture(scope="module")
def samples(tmp_path_factory: Any) -> dict[str, bytes]:
    found = {}
    for name, write in WRITERS.items():
        path = write(tmp_path_factory.mktemp(name.replace("-", "")), BLOCK)
        file = sorted(path.iterdir())[-1] if path.is_dir() else path
        data = file.read_bytes()
        found[name] = gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
    return found


@pytest.mark.parametrize("name", FORMATS)
@settings(deadline=None, max_examples=120, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_mutated_samples(
    name: str, data: st.DataObject, samples: dict[str, bytes], tmp_path_factory: Any
) -> None:
    content = bytearray(samples[name])
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, max(len(content) - 1, 0)))
        length = data.draw(st.integers(0, 12))
        new = data.draw(
            st.binary(max_size=4)
            | st.sampled_from(
                [b"-1", b"nan", b"1e400", b"99999999999999999999", b"[]", b"{}", b",", b"\n"]
            )
        )
        content[place : place + length] = new
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content))) :]
    source = tmp_path_factory.mktemp("fuzz") / "sample"
    source.write_bytes(bytes(content))
    only_trace_errors(source, data.draw(st.sampled_from([name, None])))


@settings(deadline=None, max_examples=150)
@given(content=st.binary(max_size=200), name=st.sampled_from([*FORMATS, None]))
def test_arbitrary_bytes(content: bytes, name: str | None, tmp_path_factory: Any) -> None:
    source = tmp_path_factory.mktemp("bytes") / "sample"
    source.write_bytes(content)
    only_trace_errors(source, name)


JSON_KEYS = [
    *("type", "route", "meta", "router_data", "token_1", "layer_0", "selected_experts"),
    *("selected_probs", "layer", "token_idx", "topk_ids", "topk_weights", "version", "tokens"),
    *("layers", "topK", "expertsPerLayer", "selections"),
]
JSONS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(JSON_KEYS),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@settings(deadline=None, max_examples=150)
@given(value=JSONS, name=st.sampled_from(["gpt-oss", "router-trace", "vllm"]))
def test_arbitrary_json(value: Any, name: str, tmp_path_factory: Any) -> None:
    source = tmp_path_factory.mktemp("json") / "sample.json"
    source.write_text(json.dumps(value))
    only_trace_errors(source, name)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, '{"type":' + "[" * 99_999])
def test_deep_json(tmp_path: Path, text: str) -> None:
    source = tmp_path / "deep.json"
    source.write_text(text)
    for name in ("gpt-oss", "router-trace", "vllm", None):
        with pytest.raises(MoesimError):
            convert(source, tmp_path / "x.parquet", format=name)


# ---- real files ----------------------------------------------------------------------------------


def arrays_of(path: Path, sequence: int) -> tuple[Any, dict[str, Any]]:
    loaded = np.load(path)
    start, stop = loaded["seq_offsets"][sequence : sequence + 2]
    weights = {key: loaded[key][start:stop] for key in loaded.files if key.startswith("weights")}
    return loaded["experts"][start:stop], weights


def test_gptoss_sample_equals_the_arrays(shared: Path, tmp_path: Path) -> None:
    traces = shared / "data" / "traces"
    (sample,) = (traces / "raw-samples").glob("gpt-oss*.json.gz")
    meta, (rows,) = imported(sample, tmp_path, model=load_model("gpt-oss-20b"))
    experts, weights = arrays_of(traces / "gpt-oss-20b" / "decode.npz", 330)
    assert rows.experts.reshape(experts.shape).tolist() == experts.tolist()
    assert rows.weights is not None
    scaled = rows.weights.reshape(experts.shape).astype(float) * 255
    assert np.abs(scaled - weights["weights_u8"]).max() <= 0.51
    assert rows.position.min() == 164
    assert meta.phases == ("decode",)
    assert meta.rank_order == "weight"


def test_esft_sample_equals_the_arrays(shared: Path, tmp_path: Path) -> None:
    traces = shared / "data" / "traces"
    (sample,) = (traces / "raw-samples").glob("esft*.txt")
    _, requests = imported(sample, tmp_path, keep_order=True)
    assert len(requests) == 5
    for index, rows in enumerate(requests):
        experts, weights = arrays_of(traces / "esft-deepseek-v2-lite" / "translation.npz", index)
        assert rows.experts.tolist() == experts[:, 0].tolist()
        halves = (weights["weights_1e4"][:, 0] / 1e4).astype(np.float16)
        assert rows.weights is not None
        assert rows.weights.tolist() == halves.tolist()


def test_moebeyond_sample_equals_the_arrays(shared: Path, tmp_path: Path) -> None:
    traces = shared / "data" / "traces"
    (sample,) = (traces / "raw-samples").glob("moe-beyond*.csv")
    _, (rows,) = imported(sample, tmp_path, model=load_model("deepseek-v2-lite"))
    cells = rows.experts.reshape(26, -1, 6).swapaxes(0, 1)
    found = 0
    for name in ("puffin", "test"):
        path = traces / "moe-beyond-deepseek-v2-lite" / f"{name}.npz"
        for index in np.flatnonzero(np.load(path)["prompt_id"] == 11).tolist():
            experts, _ = arrays_of(path, index)
            found += experts.shape == cells.shape and bool((experts == cells).all())
    assert found == 1


def test_flame_sample_equals_the_arrays(shared: Path, tmp_path: Path) -> None:
    """The source's rows are [position, batch of 8]; the arrays hold the 8 sequences apart."""
    traces = shared / "data" / "traces"
    (sample,) = (traces / "raw-samples").glob("flame*.csv")
    _, (rows,) = imported(sample, tmp_path)
    for sequence in range(8):
        experts, weights = arrays_of(traces / "flame-moe-290m" / "prefill_8x256.npz", sequence)
        assert rows.experts[sequence::8].tolist() == experts[:8, 7].tolist()
        halves = (weights["weights_1e6"][:8, 7] / 1e6).astype(np.float16)
        assert rows.weights is not None
        assert rows.weights[sequence::8].tolist() == halves.tolist()


def test_vllm_sample(shared: Path, tmp_path: Path) -> None:
    (sample,) = (shared / "data" / "traces" / "raw-samples").glob("vllm*.jsonl")
    meta, (rows,) = imported(sample, tmp_path, experts=60)
    assert (meta.layers, meta.top_k, meta.rows) == (1, 4, 301)
    assert meta.notes[0].startswith("20 warm-up tokens")
    assert "restarts" in meta.notes[1]
    assert rows.position.tolist() == list(range(301))
    last = json.loads(sample.read_text().splitlines()[-1])
    assert rows.experts[-1].tolist() == last["topk_ids"]


def test_routertrace_sample(shared: Path, tmp_path: Path) -> None:
    folder = shared / "data" / "traces" / "switch-base-8"
    meta, requests = imported(folder, tmp_path, model=load_model("switch-base-8"))
    selections = json.loads((folder / "router-trace.v2.json").read_text())["selections"]
    cells = [rows.experts.reshape(6, -1, 1).swapaxes(0, 1) for rows in requests]
    assert np.concatenate(cells).tolist() == selections
    assert [rows.facts.topic for rows in requests][::4] == ["security", "electronics", "software"]
    assert meta.phases == ("prefill",)


def test_whole_real_arrays(shared: Path, tmp_path: Path) -> None:
    """A whole real file: the rows are the arrays', sorted by weight, one iteration a token."""
    path = shared / "data" / "traces" / "esft-deepseek-v2-lite" / "law.npz"
    meta, requests = imported(path, tmp_path, model=load_model("deepseek-v2-lite"), phase="decode")
    loaded = np.load(path)
    order = np.argsort(-loaded["weights_1e4"].astype(int), axis=-1, kind="stable")
    want = np.take_along_axis(loaded["experts"], order, -1)
    got = np.concatenate([rows.experts for rows in requests]).reshape(want.shape)
    assert (got == want).all()
    assert meta.rows == want.shape[0] * want.shape[1]
    assert [len(rows.starts) - 1 for rows in requests] == np.diff(loaded["seq_offsets"]).tolist()
    assert all(rows.iteration[0] == 1 and rows.position[0] == 0 for rows in requests)

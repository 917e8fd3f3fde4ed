"""Offloaded models against themselves: the same bits, and runs that their own traces replay."""

from __future__ import annotations

import gc
import json
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch

import moesim.real
from moesim.cli import main
from moesim.configuration import Configuration, Request
from moesim.engine.setup import Options as EngineOptions
from moesim.errors import NotRunError, UsageError
from moesim.follow import follow, refeed
from moesim.policies.masked_gate import gate_values, masked
from moesim.policy import CacheView, PlainPolicy
from moesim.profile import load_hardware
from moesim.real.offload_generate import Prompted, generate, prompts_of
from moesim.real.offload_options import Options
from moesim.real.offload_serve import LayerCall
from moesim.registry import policy_names
from moesim.replays import Request as ReplayRequest
from moesim.replays import replay
from moesim.traces.batches import BatchRecorder, Encoded, Generation
from moesim.traces.gate_taps import Wanted
from moesim.traces.gates import find_gates
from moesim.traces.model_profile import expert_norms
from moesim.traces.reader import RequestFacts
from moesim.traces.record_model import load
from moesim.types import DROPPED, Fact, Gate, IterationBegin, Needs, Plan, RequestBegin, State
from moesim.workload import StaticBatch, begin_facts, layer_events, timeless_steps
from tests import tiny_moe

NEW = 5
FAMILIES = (*tiny_moe.ASKED, "minimax_m2", "switch_tight")
TEXTS = ("def main():", "import os", "The old house at the end of", "#include <stdio.h>")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Two threads that compute would only wait for each other here."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
    # Models that a test leaves behind take their threads with them.
    gc.collect()


def padded(model: Any) -> dict[str, Any]:
    """Three prompts of different lengths, padded as each kind of model wants it."""
    draw = torch.Generator().manual_seed(3)
    ids = torch.randint(3, tiny_moe.VOCABULARY, (3, 13), generator=draw)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    mask[2, :7] = 0
    ids = ids * mask
    if model.config.is_encoder_decoder:
        ids, mask = ids.flip(1), mask.flip(1)
    return {"input_ids": ids, "attention_mask": mask}


def generated(model: Any, new: int = NEW, **more: Any) -> Any:
    """Greedy tokens and logits."""
    how = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, **more}
    given = padded(model) if "input_ids" not in how else {}
    return model.generate(
        **given, **how, return_dict_in_generate=True, output_logits=True, disable_compile=True
    )


def eager(name: str, **more: Any) -> Any:
    """A tiny model, with the experts that an offloaded one must match."""
    model = tiny_moe.build(name, **more)
    model.set_experts_implementation("eager")
    return model


def same_bits(one: Any, other: Any) -> None:
    """Equal tokens, and logits without tolerance."""
    assert torch.equal(one.sequences, other.sequences)
    assert len(one.logits) == len(other.logits)
    for a, b in zip(one.logits, other.logits, strict=True):
        assert torch.equal(a, b)


# ---- the same bits -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "policy", "capacity"),
    [(torch.float32, "lru", "2"), (torch.bfloat16, "next-gate", "30%")],
    ids=["fp32, two slots", "bf16, prefetching"],
)
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_gives_the_bits_of_eager_experts(
    name: str, dtype: torch.dtype, policy: str, capacity: str
) -> None:
    """Waves and out-of-order arrivals do not show."""
    expected = generated(eager(name, dtype=dtype))
    model = moesim.real.offload(tiny_moe.build(name, dtype=dtype), policy, capacity)
    same_bits(generated(model), expected)
    run = model.moesim.finish()
    assert run["accesses"] == run["hits"] + run["late_hits"] + run["misses"] > 0
    assert run["requests"] == 3 and run["output_tokens"] == 3 * NEW


@pytest.mark.parametrize("policy", ["lru", "lfu", "next-gate"])
@pytest.mark.parametrize("batch", [1, 4])
def test_the_demo_at_a_tenth_of_its_experts(policy: str, batch: int) -> None:
    check_demo(policy, batch, list(TEXTS), 6)


@pytest.mark.whole
@pytest.mark.parametrize("policy", ["lru", "lfu", "next-gate", "finemoe", "moe-infinity"])
@pytest.mark.parametrize("batch", [1, 4])
def test_the_demo_on_64_prompts(policy: str, batch: int) -> None:
    prompts = [prompt.text for prompt in prompts_of("builtin", 64).prompts()]
    assert len(prompts) == 64
    check_demo(policy, batch, prompts, 32)


def check_demo(policy: str, batch: int, prompts: list[str], new: int) -> None:
    """Tokens and logits of the demo, not offloaded and at 10 % of its experts."""
    plain = load("demo", device="cpu", dtype="auto")
    plain.model.set_experts_implementation("eager")
    model = moesim.real.offload("demo", policy, "10%")
    tokenizer = plain.tokenizer
    tokenizer.padding_side = "left"
    for first in range(0, len(prompts), batch):
        given = tokenizer(
            prompts[first : first + batch],
            return_tensors="pt",
            padding=True,
            return_token_type_ids=False,
        )
        how = {"new": new, "min_new_tokens": None, **given}
        expected, found = generated(plain.model, **how), generated(model, **how)
        assert torch.equal(expected.sequences, found.sequences)
        live = ~(torch.cumsum(ended(expected, given, plain), 1) > 0)
        for step, (a, b) in enumerate(zip(expected.logits, found.logits, strict=True)):
            # What a finished sequence would say on is nobody's business.
            at = torch.ones(len(a), dtype=torch.bool) if step == 0 else live[:, step - 1]
            assert torch.equal(a[at], b[at])
    model.moesim.finish()


def test_a_run_can_be_checked(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """By a command; a model that says another token is found out, and leaves nothing."""
    words = ["real", "generate", "--model", "demo", "--capacity", "10%", "--max-new-tokens", "3"]
    words += ["--limit", "3", "--batch", "2", "--threads", "1", "--check"]
    assert main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["checked"] == 3
    assert main([*words, "--policy", "swapmoe"]) == 2
    assert "--check: swapmoe executes other experts" in capsys.readouterr().err
    compute = LayerCall.sum
    monkeypatch.setattr(LayerCall, "sum", lambda self: -compute(self))
    assert main([*words, "--out", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert re.search(r"--check: prompt 0: token \d+ is \d+ with its experts offloaded, and", err)
    assert not list(tmp_path.iterdir())


def ended(out: Any, given: Any, plain: Any) -> Any:
    """bool [B, new]: where a sequence ends."""
    said = out.sequences[:, given["input_ids"].shape[1] :]
    return said == plain.model.generation_config.eos_token_id


@pytest.mark.parametrize("name", ["mixtral", "olmoe", "gpt_oss", "granitemoe", "switch"])
def test_a_checkpoint_is_read_past_the_model(name: str, tmp_path: Path) -> None:
    """Merged, fused and separate tensors on disk; the model's own experts have no storage."""
    expected = generated(eager(name))
    folder = tiny_moe.save(name, tmp_path / name)
    model = moesim.real.offload(str(folder), "lru", "30%", dtype="float32")
    assert hollow(model)
    same_bits(generated(model), expected)


def test_a_sharded_checkpoint_is_read_too(tmp_path: Path) -> None:
    plain = tiny_moe.build("olmoe")
    expected = generated(eager("olmoe"))
    folder = tiny_moe.save("olmoe", tmp_path / "olmoe")
    (folder / "model.safetensors").unlink()
    plain.save_pretrained(folder, max_shard_size="60KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    same_bits(generated(moesim.real.offload(str(folder), "lru", "30%", dtype="fp32")), expected)


def test_a_checkpoint_that_lacks_experts_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = tiny_moe.save("olmoe", tmp_path / "olmoe")
    tensors = load_file(folder / "model.safetensors")
    gone = next(key for key in tensors if "layers.1.mlp.experts.7.up_proj" in key)
    del tensors[gone]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UsageError, match=r"lacks what OlmoeForCausalLM calls model\.layers\.1"):
        moesim.real.offload(str(folder), "lru", "30%")


def hollow(model: Any) -> bool:
    """Whether no expert lies in the model itself."""
    parts = [p for layer in model.moesim.gates.layers for p in layer.experts.parameters()]
    return bool(parts) and all(p.device.type == "meta" for p in parts)


def test_a_model_in_memory_gives_its_experts_away() -> None:
    model = tiny_moe.build("olmoe")
    held = sum(p.nbytes for n, p in model.named_parameters() if ".experts." in n)
    offloaded = moesim.real.offload(model)
    assert offloaded is model and hollow(model)
    assert model.moesim.bank.nbytes == held


# ---- ways of calling it --------------------------------------------------------------------------


def test_a_forward_alone_is_a_request_for_each_row() -> None:
    plain, model = eager("olmoe"), moesim.real.offload(tiny_moe.build("olmoe"), "lru", "20%")
    given = padded(plain)
    kept = given["attention_mask"].bool()
    with torch.no_grad():
        assert torch.equal(model(**given).logits[kept], plain(**given).logits[kept])
        assert torch.equal(model(given["input_ids"]).logits, plain(given["input_ids"]).logits)
    run = model.moesim.finish()
    assert run["requests"] == 6 and run["decode"]["accesses"] == 0


@pytest.mark.parametrize("how", [{"num_beams": 2}, {"use_cache": False}, {"do_sample": True}])
def test_other_ways_of_generating(how: dict[str, Any]) -> None:
    found = []
    for model in (eager("olmoe"), moesim.real.offload(tiny_moe.build("olmoe"), "lru", "20%")):
        torch.manual_seed(5)
        found.append(model.generate(**padded(model), max_new_tokens=4, min_new_tokens=4, **how))
    assert torch.equal(*found)


def test_an_encoder_decoder_forward() -> None:
    plain, model = eager("switch"), moesim.real.offload(tiny_moe.build("switch"), "lru", "30%")
    given = {**padded(plain), "decoder_input_ids": torch.tensor([[0, 7, 9]] * 3)}
    with torch.no_grad():
        assert torch.equal(model(**given).logits, plain(**given).logits)


def test_padding_and_what_has_ended_ask_for_nothing() -> None:
    """One sequence ends at once, another later: the demand is that of the rows that count."""
    plain = tiny_moe.build("olmoe")
    said = generated(plain).sequences[:, 13:]
    first, second = int(said[0, 0]), int(said[1, 2])
    model = moesim.real.offload(tiny_moe.build("olmoe"), "lru", "20%")
    out = model.generate(
        **padded(plain), max_new_tokens=NEW, do_sample=False, eos_token_id=[first, second]
    )
    lengths = [_length(row, (first, second)) for row in out[:, 13:].tolist()]
    assert min(lengths) == 1 and max(lengths) > 1
    run = model.moesim.finish()
    assert run["output_tokens"] == sum(lengths)


def _length(row: list[int], ends: tuple[int, ...]) -> int:
    return next((i + 1 for i, token in enumerate(row) if token in ends), len(row))


def test_another_policy_begins_with_a_cold_cache() -> None:
    model = moesim.real.offload(tiny_moe.build("olmoe"), "lru", "50%")
    generated(model)
    again = model.moesim.summary()
    generated(model)
    assert model.moesim.summary()["requests"] == 2 * again["requests"]
    model.moesim.change(policy="lfu", capacity="100%")
    generated(model)
    run = model.moesim.finish()
    assert (run["policy"], run["requests"]) == ("lfu", 3)
    assert run["misses"] == run["evictions"] + run["bytes_loaded"] // 6144 - run["evictions"]
    with pytest.raises(UsageError, match="no run is under way"):
        model.moesim.summary()


# ---- policies ------------------------------------------------------------------------------------


def test_every_lossless_preset_leaves_the_text_as_it_is() -> None:
    """Those with jobs, staging and learning too; what cannot run says what it lacks."""
    expected = generated(eager("olmoe"))
    model = moesim.real.offload(tiny_moe.build("olmoe"), "lru", "40%")
    ran, jobs = 0, 0
    for name in policy_names():
        try:
            model.moesim.change(policy=name)
            found = generated(model)
        except NotRunError as error:
            assert any(
                word in str(error)
                for word in ("CALIBRATION", "FUTURE", "predictor", "PARTS", "low precision")
            )
            continue
        except UsageError:
            assert model.moesim.asked.lossy
            continue
        run = model.moesim.finish()
        if not run["lossy"]:
            same_bits(found, expected)
            ran, jobs = ran + 1, jobs + run["jobs"]
    assert ran >= 18 and jobs > 0


def test_bounds_are_refused_by_name() -> None:
    with pytest.raises(NotRunError, match="min needs FUTURE, which no live run has"):
        moesim.real.offload(tiny_moe.build("olmoe"), "min")


def test_misses_on_the_host_are_the_same_bits() -> None:
    model = moesim.real.offload(tiny_moe.build("olmoe"), "lru", "20%", settings=("miss=cpu",))
    same_bits(generated(model), generated(eager("olmoe")))
    assert model.moesim.finish()["served"]["cpu"] > 0


# ---- bent routing --------------------------------------------------------------------------------


class Fixed(PlainPolicy):
    """Keeps every second expert, and sends tokens there."""

    lossy = True
    needs = Needs.GATE

    def route(self, event: Any, cache: CacheView) -> Any:
        return masked(event.token_experts, event.gate, np.arange(16) % 2 == 0)


def bent_by_hand(model: Any, normalised: bool) -> None:
    """The same on a model that is not offloaded: ids and weights changed on the way in."""

    def hook(layer: Any) -> Any:
        def before(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
            x, ids, _ = args
            logits = torch.nn.functional.linear(x.double(), layer.router.weight.double())
            shares = torch.softmax(logits, -1).numpy()
            chosen = ids.numpy().astype(np.uint16)
            here = np.arange(16) % 2 == 0
            steps = np.rint(shares * (1 << 14)).astype(np.int64)
            executed = masked(chosen, steps, here)
            assert not (executed == DROPPED).any()
            made = gate_values(shares, chosen, executed, here, "C", normalised=normalised)
            return x, torch.from_numpy(executed.astype(np.int64)), torch.from_numpy(made).float()

        return before

    for layer in find_gates(model, [5, 6, 7]).layers:
        layer.experts.register_forward_pre_hook(hook(layer))


@pytest.mark.parametrize(("name", "normalised"), [("olmoe", False), ("qwen3_moe", True)])
def test_bent_routing_is_executed_with_the_variants_gate_values(
    name: str, normalised: bool
) -> None:
    plain = eager(name)
    bent_by_hand(plain, normalised)
    model = moesim.real.offload(tiny_moe.build(name), Fixed, "100%")
    given = padded(plain)
    kept = given["attention_mask"].bool()
    with torch.no_grad():
        found, expected = model(**given).logits[kept], plain(**given).logits[kept]
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3)
    run = model.moesim.finish()
    assert 0 < run["quality"]["agreement"] < 1


def test_a_lossy_policy_with_room_for_all_changes_nothing() -> None:
    """Masked routing where every expert is resident."""
    model = moesim.real.offload(tiny_moe.build("olmoe"), "prune-magnitude", "100%")
    same_bits(generated(model), generated(eager("olmoe")))


def test_masked_routing_goes_to_residents_only() -> None:
    model = moesim.real.offload(tiny_moe.build("olmoe"), "prune-magnitude", "8/layer")
    generated(model)
    server = model.moesim.run.server
    here = np.flatnonzero(server.ledger.state == int(State.RESIDENT))
    norms = np.array(expert_norms(find_gates(tiny_moe.build("olmoe"), [5, 6, 7])))
    expected = np.argsort(-norms, axis=1, kind="stable")[:, :8] + np.arange(4)[:, None] * 16
    assert sorted(here.tolist()) == sorted(expected.ravel().tolist())
    run = model.moesim.finish()
    assert run["misses"] == 0 and run["evictions"] == 0


# ---- what a policy is told -----------------------------------------------------------------------


class Everything(PlainPolicy):
    """Hears all that can be heard."""

    needs = Needs.WEIGHTS | Needs.GATE | Needs.AHEAD | Needs.EMBEDDING | Needs.NORMS
    heard: list[Fact] = []  # noqa: RUF012

    def on(self, fact: Fact, cache: CacheView) -> Plan:
        Everything.heard.append(fact)
        return Plan()


@pytest.mark.parametrize("name", ["olmoe", "deepseek_v3", "gpt_oss", "switch"])
@pytest.mark.parametrize("batch", [1, 3])
def test_a_policy_hears_live_what_a_replay_tells_it(name: str, batch: int, tmp_path: Path) -> None:
    """Weights, gates, predictions, norms and embeddings, bit for bit, in the same order."""
    Everything.heard = []
    trace = spoken(name, tmp_path, batch, f"{__name__}:Everything")[1]
    live = [fact for fact in Everything.heard if isinstance(fact, TOLD)]
    told = list(told_by(trace, batch))
    assert len(live) == len(told) > 0
    for one, other in zip(live, told, strict=True):
        same_fact(one, other)


TOLD = (Gate, IterationBegin, RequestBegin)


def told_by(trace: Path, batch: int) -> Iterator[Any]:
    """The facts of a replay."""
    configuration = Configuration(
        Request(trace, load_hardware("rtx4090"), f"{__name__}:Everything", "100%", batch=batch)
    )
    event = 0
    scheduler = StaticBatch(batch)
    for step in timeless_steps(configuration.works(), scheduler):
        yield from (fact for fact, _ in begin_facts(step))
        for item in layer_events(step, event, configuration.meta.experts):
            yield item.event
            event += 1


def same_fact(live: Any, told: Any) -> None:
    """Every field; of a gate, what it was made from."""
    one = live.source if isinstance(live, Gate) else live
    assert type(one) is type(told)
    for field in type(told).__slots__:
        same_value(getattr(one, field), getattr(told, field), field)


def same_value(one: Any, other: Any, what: str) -> None:
    """Arrays by type and content."""
    if isinstance(other, Mapping):
        assert one.keys() == other.keys(), what
        for key in other:
            same_value(one[key], other[key], what)
    elif isinstance(other, np.ndarray):
        assert one.dtype == other.dtype, what
        np.testing.assert_array_equal(one, other, err_msg=what)
    else:
        assert one == other, what


# ---- its trace and its folder --------------------------------------------------------------------


def spoken(
    name: str, folder: Path, batch: int, policy: str, capacity: str = "40%"
) -> tuple[dict[str, Any], Path]:
    """Generate with a saved tiny model that ends some sequences early."""
    saved = tiny_moe.save(name, folder / name)
    model = tiny_moe.build(name)
    end = int(generated(model).sequences[0, -2])
    settings = json.loads((saved / "generation_config.json").read_text())
    (saved / "generation_config.json").write_text(json.dumps({**settings, "eos_token_id": end}))
    prompts = folder / "prompts.txt"
    prompts.write_text("\n".join(TEXTS[:3]) + "\nx\nyz\n")
    trace = folder / "run.parquet"
    answer = generate(
        Prompted(
            model=str(saved),
            prompts=str(prompts),
            max_new_tokens=NEW,
            batch=batch,
            dtype="float32",
            trace_out=trace,
            options=Options(policy=policy, capacity=capacity, out=folder / "runs"),
        )
    )
    return answer, trace


@pytest.mark.parametrize("policy", ["lru", "lfu"])
@pytest.mark.parametrize(("name", "batch"), [("olmoe", 1), ("mixtral", 3), ("switch", 2)])
def test_a_trace_of_a_run_replays_to_the_same_decisions(
    name: str, batch: int, policy: str, tmp_path: Path
) -> None:
    run = (made := spoken(name, tmp_path, batch, policy))[0]["runs"][0]
    request = ReplayRequest(
        trace=made[1],
        hardware=load_hardware("rtx4090"),
        policies=(policy,),
        capacities=("40%",),
        batch=batch,
        options=EngineOptions(allocator="slots"),
    )
    again = replay(request)["runs"][0]
    for key in ("decision_digest", "hits", "late_hits", "misses", "evictions", "output_tokens"):
        assert run[key] == again[key], key
    assert run["hits"] and run["misses"]


@pytest.mark.parametrize(("name", "batch"), [("olmoe", 3), ("switch", 2)])
@pytest.mark.parametrize("policy", ["next-gate", "finemoe"])
def test_a_run_can_be_followed_and_its_policy_fed_again(
    name: str, batch: int, policy: str, tmp_path: Path
) -> None:
    answer, _ = spoken(name, tmp_path, batch, policy)
    run = answer["runs"][0]
    folder = Path(run["run_dir"])
    followed = follow(folder)
    assert followed["equal"] and followed["layer_events"] == run["layer_events"]
    assert refeed(folder) > 0
    # Elsewhere the trace is named.
    moved = tmp_path / "moved"
    shutil.move(folder, moved)
    assert follow(moved, tmp_path / "run.parquet")["equal"]


def test_the_rows_are_those_of_the_model_that_is_not_offloaded() -> None:
    batch = [
        Encoded(i, np.array(tokens, np.int32), RequestFacts())
        for i, tokens in enumerate(([5, 9, 12, 40], [7, 8], [100, 3, 77]))
    ]
    wanted = Wanted(logits=True, ahead=(1,), norms=True)
    found = []
    for model in (eager("olmoe"), moesim.real.offload(tiny_moe.build("olmoe"), "lru", "20%")):
        handle = getattr(model, "moesim", None)
        gates = handle.gates if handle else find_gates(model, [5, 6, 7])
        loaded = tiny_moe.Loaded("tiny", "", model, tiny_moe.tokenizer())
        with BatchRecorder(loaded, gates, wanted, Generation(max_new_tokens=NEW)) as recorder:
            found.append(recorder.record(batch))
    for one, other in zip(*found, strict=True):
        for name in ("experts", "weights", "gate", "input_norm", "token", "layer"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name), err_msg=name)


def test_norms_of_the_bank_are_those_of_the_model() -> None:
    plain = tiny_moe.build("gpt_oss")
    expected = expert_norms(find_gates(plain, [5, 6, 7]))
    model = moesim.real.offload(tiny_moe.build("gpt_oss"), "prune-magnitude", "50%")
    generated(model)
    assert model.moesim.run.asked.meta.expert_norms == expected


# ---- the command ---------------------------------------------------------------------------------


def test_the_command_prints_text_and_numbers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["real", "generate", "--model", "demo", "--prompts", TEXTS[0], "--capacity", "10%"]
    more = ["--max-new-tokens", "3", "--threads", "1", "--trace-out", str(tmp_path / "t.parquet")]
    assert main([*command, *more, "--out", str(tmp_path / "runs"), "--timeline"]) == 0
    out, _ = capsys.readouterr()
    assert "--- 0" in out and "tokens/s" in out and "misses" in out
    (folder,) = (tmp_path / "runs").iterdir()
    assert {f.name for f in folder.iterdir()} >= {"facts.jsonl.zst", "timeline.json"}
    assert main([*command, "--max-new-tokens", "3", "--threads", "1", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["requests"][0]["output_tokens"] == 3 and told["runs"][0]["requests"] == 1
    assert told["requests"][0]["text"] in out


# ---- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("dbrx", ("DbrxForCausalLM", "DbrxExperts", "experts interface")),
        ("llama4", ("Llama4ForCausalLM", "Llama4TextExperts", "experts interface")),
        ("jetmoe", ("JetMoeForCausalLM", "JetMoeParallelExperts")),
        ("nllb_moe", ("NllbMoeForConditionalGeneration", "NllbMoeExperts")),
        ("llama", ("LlamaForCausalLM", "not a Mixture-of-Experts model")),
    ],
)
def test_what_would_stay_on_its_own_path_is_refused_by_name(
    name: str, words: tuple[str, ...]
) -> None:
    model = tiny_moe.build(name)
    with pytest.raises(UsageError) as caught:
        moesim.real.offload(model)
    assert all(word in str(caught.value) for word in words), caught.value
    assert "\n" not in str(caught.value)
    assert getattr(model, "moesim", None) is None


def test_a_refused_model_works_as_before() -> None:
    model = eager("olmoe")
    expected = generated(eager("olmoe"))
    with pytest.raises(UsageError, match="--policy lrv: unknown"):
        moesim.real.offload(model, "lrv")
    same_bits(generated(model), expected)


def test_an_offloaded_model_is_not_offloaded_again() -> None:
    model = moesim.real.offload(tiny_moe.build("olmoe"))
    with pytest.raises(UsageError, match="is offloaded already"):
        moesim.real.offload(model)

"""What only a CUDA device can show: bytes through its streams, its memory, how fast it is.

Skipped by name without one. Run with ``pytest -m hardware``, or by ``moesim real suite``.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
import torch

from moesim import log
from moesim.configuration import Request
from moesim.costs import make_costs
from moesim.errors import UsageError
from moesim.factlog import CAME, DID, FACTS, FactReader
from moesim.follow import follow, refeed
from moesim.profile import HardwareProfile, ModelProfile, load_hardware, load_model
from moesim.real import cuda
from moesim.real.attention import Heads, _attend
from moesim.real.calibrate import Calibration, calibrate
from moesim.real.host_bank import HostBank
from moesim.real.run import RealRequest, execute
from moesim.rehearsal import simulated
from moesim.traces.samples import trace_path
from moesim.traces.synth import Synth, synthesise
from moesim.types import Status
from tests.test_real_attention import plainly
from tests.test_real_presets import is_computed

pytestmark = [
    pytest.mark.hardware,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

ROOT = Path(__file__).resolve().parents[1]
LARGE = "mixtral-8x7b"
"""Experts so large that what lies between two copies is nothing beside them."""
CONTEXT = 16
"""Positions that a decoded token reads, about."""
HIT, MISS = int(Status.HIT), int(Status.MISS)
GIB = 1 << 30
BUFFERS = 24 * GIB


def request(policy: str, model: ModelProfile, **more: Any) -> Request:
    """A request of the sample with a model's sizes."""
    given = {"trace": trace_path("demo"), "limit": 1, **more}
    return Request(hardware=load_hardware("h200"), policy=policy, costs=model, **given)


def ran(what: Request, out: Path, **more: Any) -> dict[str, Any]:
    """A run on the device."""
    # A large model's experts share buffers: what is filled and pinned is enough to copy from.
    asked = RealRequest(what, device="cuda", out=out, **{"ram_bytes": BUFFERS, **more})
    run: dict[str, Any] = execute(asked, simulate=partial(simulated))["runs"][0]
    return run


@pytest.fixture(scope="module")
def decoding(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trace in the large model's shape: a short prompt, then tokens one by one."""
    path = tmp_path_factory.mktemp("trace") / "t.parquet"
    model = load_model(LARGE)
    synthesise(path, Synth(model=model, requests=1, prompt_tokens=4, output_tokens=17, gate=True))
    return path


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> HardwareProfile:
    """This machine's profile for the large model."""
    out = tmp_path_factory.mktemp("profile") / "hw.toml"
    calibrate(Calibration(load_model(LARGE), out, device="cuda", repeats=3, tokens=4))
    return load_hardware(out)


# ---- the laws ------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["lru", "min-bypass", "fiddler", "cpu"])
def test_law_a_on_the_device(policy: str, tmp_path: Path) -> None:
    """Demand-only decisions are the simulator's, and every slot holds what was copied."""
    run = ran(request(policy, load_model("olmoe-1b-7b")), tmp_path, verify=True)
    assert run["decision_digest"] == run["simulated"]["decision_digest"]
    assert run["device"]["kind"] == "cuda"


@pytest.mark.parametrize("policy", ["next-gate", "finemoe", "moe-infinity", "swapmoe", "hindsight"])
def test_laws_c_and_d_on_the_device(policy: str, tmp_path: Path) -> None:
    """A run can be followed, its policy fed its log; every expert asked for is computed."""
    run = ran(request(policy, load_model("olmoe-1b-7b")), tmp_path, verify=True)
    folder = Path(run["run_dir"])
    assert follow(folder)["equal"] and refeed(folder) > 0
    is_computed(folder)
    share = run["simulated"]["overlap"]["mean"]
    # A policy whose set never changes loads nothing.
    assert share is None or 0 <= share <= 1


def test_demand_overtakes_a_prefetch_that_moves(decoding: Path, tmp_path: Path) -> None:
    """Copies of 350 MB, and wrong wishes ahead of what is needed: some are interrupted."""
    what = request("previous-token", load_model(LARGE), trace=decoding, capacity="25%")
    run = ran(what, tmp_path)
    folder = Path(run["run_dir"])
    assert follow(folder)["equal"]
    whole = -(-int(load_model(LARGE).expert_bytes_table()[0]) // what.hardware.link.chunk_bytes)
    sent = [words[2] for kind, *words in FactReader(folder / FACTS) if kind == CAME
            and words[0] == "copy"]  # fmt: skip
    assert max(sent) == whole > min(sent)


@pytest.mark.parametrize("window", [0, 7])
@pytest.mark.parametrize("cuts", [(33,), (16, 1, 1, 15), (1, 1, 1, 30)])
def test_attention_is_attention(cuts: tuple[int, ...], window: int) -> None:
    one = Heads(8, 2, 64, window, False)
    total = sum(cuts)
    made = torch.Generator().manual_seed(total)
    asked = torch.randn(total, one.asked, generator=made).to(torch.bfloat16)
    held = torch.zeros(2, one.kept, total, one.size, dtype=torch.bfloat16, device="cuda")
    ends = [sum(cuts[:i]) for i in range(len(cuts) + 1)]
    parts = [_attend(one, held, asked[a:b].cuda(), b) for a, b in pairwise(ends)]
    torch.testing.assert_close(
        torch.cat(parts, dim=1).cpu().double(), plainly(one, asked), atol=3e-2, rtol=3e-2
    )


@pytest.mark.parametrize(("policy", "batch"), [("lru", 1), ("next-gate", 4), ("finemoe", 1)])
def test_an_offloaded_model_says_what_the_model_says(policy: str, batch: int) -> None:
    pytest.importorskip("transformers")
    from moesim.real.offload_generate import Prompted, generate
    from moesim.real.offload_options import Options

    how = Options(policy=policy, capacity="10%")
    asked = Prompted("demo", limit=8, batch=batch, max_new_tokens=32, device="cuda", check=True,
                     options=how)  # fmt: skip
    told = generate(asked)
    assert told["checked"] == 8 and told["runs"][0]["device"]["pinned"]


def test_experts_on_the_host_serve_a_model_on_the_device() -> None:
    pytest.importorskip("transformers")
    from moesim.real.offload_generate import Prompted, generate
    from moesim.real.offload_options import Options

    asked = Prompted("demo", limit=2, max_new_tokens=8, device="cuda",
                     options=Options(policy="cpu", capacity="25%"))  # fmt: skip
    run = generate(asked)["runs"][0]
    assert run["served"]["cpu"] > 0


# ---- how fast ------------------------------------------------------------------------------------


def peak_per_s() -> float:
    """Bytes a second of the largest pinned copies, by events: the best of a few."""
    pins = cuda.Pins()
    source = torch.zeros(GIB // 2, dtype=torch.uint8)
    assert not pins.pin(source)
    try:
        target = torch.empty_like(source, device="cuda")
        found = []
        for _ in range(8):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            target.copy_(source, non_blocking=True)
            end.record()
            end.synchronize()
            found.append(source.nbytes * 1e3 / begin.elapsed_time(end))
        return max(found)
    finally:
        pins.close()


@pytest.mark.parametrize("name", [LARGE, "gpt-oss-20b", "olmoe-1b-7b"])
def test_copies_reach_nine_tenths_of_the_pinned_peak(
    name: str, decoding: Path, tmp_path: Path
) -> None:
    """In chunks, one expert after the other, while others compute."""
    run = ran(request("lru", load_model(name), trace=decoding, capacity="25%"), tmp_path)
    assert run["device"]["pinned"], run["device"]["why_pageable"]
    assert run["link_bytes_per_s"] >= 0.9 * peak_per_s()


def floor_ns(run: dict[str, Any], hardware: HardwareProfile) -> float:
    """Of all decoded layer events: dense part + the longer of copies and resident experts + the
    last expert, and the output head of every pass; each as measured alone."""
    folder = Path(run["run_dir"])
    model = ModelProfile.from_dict(json.loads((folder / "manifest.json").read_text())["model"])
    costs = make_costs(model, hardware)
    nbytes = model.expert_bytes_table().tolist()
    total = (run["output_tokens"] - 1) * float(costs.head_ns(1))
    for kind, *words in FactReader(folder / FACTS):
        # The prompt is one event a layer, and comes first.
        if kind != DID or words[0] != log.GATE or words[2] < model.layers:
            continue
        layer, status = words[3], [word % 4 for word in words[6:]]
        copies = status.count(MISS) * nbytes[layer] * 1e9 / hardware.link.bytes_per_s
        hits = status.count(HIT) * costs.expert_ns(1, layer)
        total += costs.dense_ns(1, CONTEXT, layer) + max(copies, hits) + costs.expert_ns(1, layer)
    return total


def test_the_device_tells_where_the_time_went(decoding: Path, tmp_path: Path) -> None:
    """On a slow link of large experts nearly all is stall; by itself the host would see none."""
    what = request("lru", load_model(LARGE), trace=decoding, capacity="10%")
    run = ran(what, tmp_path, timeline=True)
    times = run["times_ns"]
    assert sum(times.values()) == run["time_ns"] and sum(run["layer_stall_ns"]) == times["stall"]
    copied_ns = run["bytes_loaded"] * 1e9 / run["link_bytes_per_s"]
    assert 0.7 * copied_ns <= times["stall"] + times["experts"] <= 1.3 * copied_ns
    assert min(times["dense"], times["experts"]) > 0


def test_decode_on_demand_is_near_its_floor(
    decoding: Path, measured: HardwareProfile, tmp_path: Path
) -> None:
    """Within 1.15 of the sum over layers."""
    what = request("lru", load_model(LARGE), trace=decoding, capacity="25%")
    run = ran(replace(what, hardware=measured), tmp_path)
    decode_ns = run["tpot_ns"]["mean"] * (run["output_tokens"] - 1)
    assert decode_ns <= 1.15 * floor_ns(run, measured)


def made_up(name: str) -> Any:
    """A model with random weights, in bf16 on the host, filled by the block: to draw billions of
    numbers takes longer than all that is measured with them."""
    transformers = pytest.importorskip("transformers")
    from transformers.initialization import no_init_weights

    shared = {"hidden_size": 2048, "num_attention_heads": 16, "num_key_value_heads": 16}
    if name == "olmoe":
        kind, config = transformers.OlmoeForCausalLM, transformers.OlmoeConfig(
            **shared, num_hidden_layers=16, num_experts=64, num_experts_per_tok=8,
            intermediate_size=1024, vocab_size=50304,
        )  # fmt: skip
    else:
        kind, config = transformers.Qwen2MoeForCausalLM, transformers.Qwen2MoeConfig(
            **shared, num_hidden_layers=24, num_experts=60, num_experts_per_tok=4,
            moe_intermediate_size=1408, shared_expert_intermediate_size=5632,
            intermediate_size=5632, vocab_size=151936,
        )  # fmt: skip
    torch.set_default_dtype(torch.bfloat16)
    try:
        with no_init_weights():
            model = kind(config).eval()
    finally:
        torch.set_default_dtype(torch.float32)
    block = (torch.randn((1 << 24) + 1, generator=torch.Generator().manual_seed(0)) / 50).bfloat16()
    for parameter in model.parameters():
        for part in parameter.data.view(-1).split(len(block)):
            part.copy_(block[: len(part)])
    return model


@pytest.mark.parametrize("name", ["olmoe", "qwen2_moe"])
def test_free_mode_decodes_five_times_as_fast_as_accelerate(name: str) -> None:
    """The same model with random weights, a quarter of its experts in slots, beside
    ``accelerate``'s CPU offload of everything; in one run, first tokens left out."""
    accelerate = pytest.importorskip("accelerate")
    import moesim.real

    model = made_up(name)
    ids = torch.arange(8)[None] + 100

    def per_token(made: Any) -> float:
        def spent(new: int) -> float:
            started = time.perf_counter()
            made.generate(
                input_ids=ids.cuda(), attention_mask=torch.ones_like(ids).cuda(),
                max_new_tokens=new, min_new_tokens=new, do_sample=False,
            )  # fmt: skip
            torch.cuda.synchronize()
            return time.perf_counter() - started

        spent(2)
        return (spent(9) - spent(1)) / 8

    accelerate.cpu_offload(model, execution_device=torch.device("cuda"))
    theirs = per_token(model)
    accelerate.hooks.remove_hook_from_submodules(model)
    ours = per_token(moesim.real.offload(model, "lru", "25%", device="cuda"))
    assert theirs >= 5 * ours, f"{theirs:.3f} s a token with accelerate, {ours:.3f} s in slots"


# ---- memory --------------------------------------------------------------------------------------


def free_now() -> int:
    """Bytes of the device that nobody holds."""
    gc.collect()
    torch.cuda.synchronize()
    cuda.free_cached()
    return int(torch.cuda.mem_get_info()[0])


def test_memory_is_truly_free(tmp_path: Path) -> None:
    """While it runs the device holds slots, never all experts; afterwards nothing."""
    model = load_model("olmoe-1b-7b")
    ran(request("lru", model), tmp_path)
    before = free_now()
    others = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run = ran(request("lru", model), tmp_path)
    held = torch.cuda.max_memory_allocated() - others
    slots = sum(int(size) * count for size, count in run["device"]["slots"].items())
    experts = run["device"]["experts"] * int(model.expert_bytes_table().max())
    assert slots <= held < experts
    assert torch.cuda.memory_allocated() == others
    assert abs(free_now() - before) < 64 << 20


def test_host_memory_is_pinned_as_it_is() -> None:
    """Not rounded up to a power of two: a bank just above one takes its own bytes, every one of
    them pinned, and gives them back."""
    pins = cuda.Pins()
    before = _resident()
    bank = HostBank((1 << 28) + 4_096, 4, torch.bfloat16, 0, pins.pin)
    try:
        assert bank.pinned, bank.why_not
        nbytes = sum(region.nbytes for region in bank.regions)
        assert _resident() - before < 1.2 * nbytes
        assert all(bank.tensor(expert)[-1:].is_pinned() for expert in range(4))
    finally:
        pins.close()
    assert not bank.tensor(0).is_pinned()


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def test_a_device_that_is_full_is_refused_by_name(tmp_path: Path) -> None:
    ballast = torch.empty(free_now() - 2 * GIB, dtype=torch.uint8, device="cuda")
    try:
        with pytest.raises(UsageError, match="of the device's memory are free; give --capacity"):
            ran(request("lru", load_model(LARGE), capacity="25%"), tmp_path)
    finally:
        del ballast
    assert not list(tmp_path.iterdir())
    free_now()


# ---- what goes wrong -----------------------------------------------------------------------------


# A shell's background jobs ignore Ctrl-C, and so would this one.
HEARING = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from moesim.cli import main
sys.exit(main(sys.argv[1:]))
"""


def command(out: Path) -> list[str]:
    """A run of minutes: its link is slow."""
    words = ["real", "run", "--device", "cuda", "--trace", "demo", "--costs", "olmoe-1b-7b"]
    return [sys.executable, "-c", HEARING, *words, "--bandwidth", "1GB/s", "--out", str(out)]


def started(out: Path) -> subprocess.Popen[str]:
    """A run that has the device, and fills its banks or is under way."""
    process = subprocess.Popen(
        command(out), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not (list(out.glob(".real-*/facts*")) and str(process.pid) in holders()):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(3)
    assert process.poll() is None, process.communicate()[1]
    return process


def holders() -> list[str]:
    """Processes that have claimed a device."""
    return [path.read_text() for path in cuda._LOCKS.glob("moesim-cuda-*.lock")]


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_what_is_stopped_leaves_a_device_that_works(how: signal.Signals, tmp_path: Path) -> None:
    before = free_now()
    process = started(tmp_path)
    process.send_signal(how)
    process.communicate(timeout=60)
    assert process.returncode
    assert not list(tmp_path.glob("[!.]*"))
    deadline = time.monotonic() + 30
    while abs(free_now() - before) > 64 << 20:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    run = ran(request("lru", load_model("olmoe-1b-7b")), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [Path(run["run_dir"]).name]


def test_two_processes_on_one_device_are_told_apart(tmp_path: Path) -> None:
    process = started(tmp_path / "first")
    try:
        with pytest.raises(UsageError, match=f"process {process.pid} of moesim uses this device"):
            ran(request("lru", load_model("olmoe-1b-7b")), tmp_path / "second")
    finally:
        process.kill()
        process.communicate()

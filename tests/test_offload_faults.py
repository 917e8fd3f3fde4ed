"""Offloaded models that go wrong: one clear line, no thread left, nothing half-written, no hang."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
from transformers import StoppingCriteria

import moesim.real
from moesim.cli import main
from moesim.errors import MoesimError, NotRunError, PolicyError, UsageError
from moesim.policy import CacheView, PlainPolicy
from moesim.real import offload_bank
from moesim.real.errors import ExecutionError
from moesim.real.offload_bank import HostBank, SlotBank
from moesim.traces.parts import parts_folder
from moesim.types import Fact, Gate, Plan
from tests import tiny_moe
from tests.test_offload import eager, generated, one_thread, padded, same_bits

ROOT = Path(__file__).resolve().parents[1]
__all__ = ["one_thread"]


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """No thread of a run outlives it."""
    yield
    gc.collect()
    deadline = time.monotonic() + 5
    while left := [t for t in threading.enumerate() if t.name.startswith("moesim ")]:
        assert time.monotonic() < deadline, left
        time.sleep(0.02)


def offloaded(policy: Any = "lru", capacity: str = "20%", **more: Any) -> Any:
    """A tiny model."""
    return moesim.real.offload(tiny_moe.build("olmoe"), policy, capacity, **more)


def broken(what: Any, good: int = 3) -> Any:
    """Opens slots into which copies fail after some good ones."""

    def opened(*args: Any) -> SlotBank:
        bank, left = SlotBank(*args), [good]
        inner = bank.copy

        def copy(*where: int) -> None:
            left[0] -= 1
            return inner(*where) if left[0] >= 0 else what(inner, *where)

        bank.copy = copy  # type: ignore[method-assign]
        return bank

    return opened


def fail(*args: Any) -> None:
    """What a machine may do."""
    raise RuntimeError("the bus is gone")


def recovers(model: Any) -> None:
    """The next run is as good as any."""
    model.moesim.open_bank = SlotBank
    model.moesim.slots = None
    same_bits(generated(model), generated(eager("olmoe")))
    model.moesim.finish()


def test_a_copy_that_fails_is_named_and_the_next_run_is_whole(tmp_path: Path) -> None:
    model = offloaded(out=tmp_path / "runs")
    model.moesim.open_bank = broken(fail)
    started = time.monotonic()
    with pytest.raises(ExecutionError, match=r"copy thread died while loading expert \d+\.\d+: Ru"):
        generated(model)
    assert time.monotonic() - started < 20
    assert not list((tmp_path / "runs").iterdir())
    recovers(model)
    assert len(list((tmp_path / "runs").iterdir())) == 1


def test_a_copy_that_hangs_is_found_out() -> None:
    """The watchdog."""
    release = threading.Event()
    model = offloaded(watchdog_s=0.7)
    model.moesim.open_bank = broken(lambda *args: release.wait(60))
    threading.Timer(2.0, release.set).start()
    with pytest.raises(ExecutionError, match=r"the copy thread has not come forward for \d\.\d s"):
        generated(model)
    recovers(model)


def test_an_expert_that_fails_on_the_host_is_named() -> None:
    model = offloaded(settings=("miss=cpu",))
    model.moesim.experts[2].compute = fail
    with pytest.raises(
        ExecutionError, match=r"host thread died while computing expert 2\.\d+: Run"
    ):
        generated(model)


@pytest.mark.parametrize("name", ["olmoe", "switch"])
def test_nan_in_a_gate_is_a_clear_line(name: str) -> None:
    model = moesim.real.offload(tiny_moe.build(name), "lru", "20%")
    layer = model.moesim.gates.layers[1]
    router = getattr(layer.router, "classifier", layer.router)
    router.weight.data[3] = float("nan")
    with pytest.raises(ExecutionError, match=rf"{layer.name}: the model's gate gave NaN; use --dt"):
        generated(model)


@pytest.mark.parametrize("policy", ["next-gate", "swapmoe", "prune-magnitude"])
def test_nan_in_a_gate_ends_the_command(
    policy: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Under policies that are told the gate, or bend it: one line, and nothing is kept."""
    model = tiny_moe.build("olmoe")
    model.model.layers[2].mlp.gate.weight.data[5] = float("nan")
    model.save_pretrained(tmp_path / "model")
    tiny_moe.tokenizer().save_pretrained(tmp_path / "model")
    runs, trace = tmp_path / "runs", tmp_path / "t.parquet"
    words = ["real", "generate", "--model", str(tmp_path / "model"), "--prompts", "some words"]
    more = ["--capacity", "50%", "--out", str(runs), "--trace-out", str(trace), "--threads", "1"]
    assert main([*words, *more, "--policy", policy]) == 2
    told = [at for at in capsys.readouterr().err.splitlines() if at.startswith("moesim: error: ")]
    assert len(told) == 1 and "NaN" in told[0]
    assert "model.layers.2.mlp: " in told[0], told
    assert not list(runs.glob("*")) and not trace.exists() and not parts_folder(trace).exists()


def test_an_unknown_class_ends_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tiny_moe.save("jetmoe", tmp_path / "model")
    for command in ("generate", "quality"):
        assert main(["real", command, "--model", str(folder), "--threads", "1"]) == 2
        err = capsys.readouterr().err.splitlines()
        told = [at for at in err if at.startswith("moesim: error: ")]
        assert len(told) == 1 and "JetMoeForCausalLM" in told[0], err


# ---- policies ------------------------------------------------------------------------------------


class RaisesAtGate(PlainPolicy):
    """Fails at its third layer event."""

    def on(self, fact: Fact, cache: CacheView) -> Plan:
        if isinstance(fact, Gate) and fact.event == 2:
            raise ValueError("no idea")
        return Plan()


class Hangs(PlainPolicy):
    """Does not answer for a while."""

    def on(self, fact: Fact, cache: CacheView) -> Plan:
        if isinstance(fact, Gate) and fact.event == 2:
            time.sleep(2.5)
        return Plan()


class RaisesInBegin(PlainPolicy):
    """Fails before anything runs."""

    def begin(self, world: Any) -> None:
        raise KeyError("world")


@pytest.mark.parametrize(
    ("policy", "line"),
    [
        (RaisesAtGate, r"^RaisesAtGate: layer event 2: ValueError: no idea \(.+faults\.py:\d+\)"),
        (RaisesInBegin, r"^RaisesInBegin: layer event -1: KeyError: 'world'"),
    ],
)
def test_a_policy_that_breaks_is_named(policy: Any, line: str) -> None:
    model = offloaded(policy)
    with pytest.raises(PolicyError, match=line):
        generated(model)
    model.moesim.change(policy="lru")
    recovers(model)


def test_a_policy_that_does_not_answer_is_found_out() -> None:
    model = offloaded(Hangs, watchdog_s=0.5)
    with pytest.raises(ExecutionError, match=r"the policy has not answered for \d\.\d s"):
        generated(model)


def test_a_lossy_policy_without_logits_is_refused() -> None:
    model = tiny_moe.build("phimoe")
    with pytest.raises(NotRunError, match=r"swapmoe needs GATE, and what PhimoeTopKRouter makes"):
        moesim.real.offload(model, "swapmoe", "100%")


# ---- the model's own thread ----------------------------------------------------------------------


class Presses(StoppingCriteria):  # type: ignore[misc]
    """Ctrl-C after some tokens."""

    def __init__(self, after: int, error: type[BaseException]) -> None:
        self.left = after
        self.error = error

    def __call__(self, ids: Any, scores: Any, **more: Any) -> Any:
        self.left -= 1
        if self.left < 0:
            raise self.error("pressed")
        return torch.zeros(len(ids), dtype=torch.bool)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_interrupt_ends_the_threads(error: type[BaseException], tmp_path: Path) -> None:
    model = offloaded("next-gate", out=tmp_path / "runs")
    with pytest.raises(error, match="pressed"):
        generated(model, stopping_criteria=[Presses(2, error)])
    assert not [t for t in threading.enumerate() if t.name.startswith("moesim ")]
    assert not list((tmp_path / "runs").iterdir())
    recovers(model)


def test_an_interrupt_within_a_layer_ends_them_too() -> None:
    model = offloaded("next-gate")
    called = []

    def press(*args: Any) -> None:
        called.append(1)
        if len(called) == 7:
            raise KeyboardInterrupt

    handle = model.moesim.gates.layers[2].block.register_forward_hook(press)
    with pytest.raises(KeyboardInterrupt):
        generated(model, new=9)
    handle.remove()
    assert not [t for t in threading.enumerate() if t.name.startswith("moesim ")]
    recovers(model)


def test_arguments_that_generate_refuses_leave_the_run_alone() -> None:
    model = offloaded()
    generated(model)
    run = model.moesim.run
    with pytest.raises(ValueError, match="nonsense"):
        model.generate(**padded(model), nonsense=1)
    assert model.moesim.run is run
    model.moesim.finish()


def test_threads_go_with_the_model() -> None:
    model = offloaded("next-gate")
    generated(model)
    del model
    gc.collect()
    deadline = time.monotonic() + 10
    while [t for t in threading.enumerate() if t.name.startswith("moesim ")]:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_part_of_the_model_is_not_called_alone() -> None:
    model = offloaded()
    with pytest.raises(ExecutionError, match="call the model"), torch.no_grad():
        model.model.layers[0].mlp(torch.zeros(1, 2, 32))


SLOW = """
import pathlib, os, sys, torch
torch.set_num_threads(1)
from moesim.cli import program
from moesim.real import offload_bank

class Slow(offload_bank.RamMover):
    def copy(self, *args):
        pathlib.Path(os.environ["READY"]).touch()
        HANG

offload_bank.RamMover = Slow
program()
"""


@pytest.mark.parametrize("hang", ["super().copy(*args)", "__import__('time').sleep(600)"])
def test_ctrl_c_ends_the_command(hang: str, tmp_path: Path) -> None:
    out, ready = tmp_path / "runs", tmp_path / "ready"
    words = ["real", "generate", "--model", "demo", "--max-new-tokens", "400", "--threads", "1"]
    trace = tmp_path / "run.parquet"
    kept = ["--out", str(out), "--trace-out", str(trace)]
    with subprocess.Popen(
        [sys.executable, "-c", SLOW.replace("HANG", hang), *words, "--capacity", "10%", *kept],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "READY": str(ready)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as process:
        try:
            deadline = time.monotonic() + 90
            while not ready.exists():
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.02)
            time.sleep(0.5)
            pressed = time.monotonic()
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=40)
        finally:
            process.kill()
    assert process.returncode == 130, err
    assert time.monotonic() - pressed < 15
    assert err.splitlines()[-1].startswith("moesim: interrupted"), err
    assert not list(out.iterdir()) and not trace.exists() and not parts_folder(trace).exists()


# ---- memory --------------------------------------------------------------------------------------


def test_banks_that_do_not_fit_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = tiny_moe.save("olmoe", tmp_path / "olmoe")
    monkeypatch.setattr(offload_bank, "usable_bytes", lambda: 1000)
    with pytest.raises(UsageError, match=r"the experts' banks take 0\.000 GB and 0\.000 GB of mem"):
        moesim.real.offload(str(folder))


def test_slots_that_do_not_fit_are_refused_and_fewer_go_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of a model in memory, whose experts do fit."""
    model, zeros = offloaded(capacity="80%"), torch.zeros

    def short(*shape: Any, **how: Any) -> Any:
        if how.get("dtype") == torch.uint8 and shape[0] > 20:
            raise RuntimeError("can't allocate memory")
        return zeros(*shape, **how)

    monkeypatch.setattr(torch, "zeros", short)
    with pytest.raises(UsageError, match=r"--capacity: the experts' banks take 0.*give less --c"):
        generated(model)
    model.moesim.change(capacity="20%")
    same_bits(generated(model), generated(eager("olmoe")))
    model.moesim.finish()


def test_an_interrupt_while_quality_is_measured_keeps_whole_runs(tmp_path: Path) -> None:
    """The runs that ended are in the file, no thread is left, and it goes on from there."""
    from moesim.capacity import Capacity
    from moesim.planning.file import Planned
    from moesim.real.quality import Bench
    from moesim.real.quality_runs import Losses
    from moesim.real.quality_text import Wanted

    folder, file = tiny_moe.save("olmoe", tmp_path / "model"), tmp_path / "runs.jsonl"
    (tmp_path / "p.txt").write_text("The old house at the end of the lane\nimport os, sys\n")
    runs = [
        Planned("prune-magnitude", (), Capacity(f"{n}/layer", "layer", (6144 * n,) * 4))
        for n in (5, 6, 7)
    ]

    def press(done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    text = Wanted(source=str(tmp_path / "p.txt"))
    with pytest.raises(KeyboardInterrupt), Bench(str(folder), text, "fp32") as bench:
        Losses(bench, file, press)(runs)
    assert not [t for t in threading.enumerate() if t.name.startswith("moesim ")]
    assert len(file.read_text().splitlines()) == 3
    with Bench(str(folder), text, "fp32") as bench:
        again = Losses(bench, file, lambda done, total: None)
        assert len(again(runs)) == 3 and again.measured == 1


def test_ram_that_runs_out_names_the_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    empty = torch.empty
    calls = []

    def short(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("dtype") == torch.uint8:
            calls.append(args)
            if len(calls) == 3:
                raise RuntimeError("can't allocate memory")
        return empty(*args, **kwargs)

    monkeypatch.setattr(torch, "empty", short)
    with pytest.raises(UsageError, match="RAM ran out at layer 2 of the experts"):
        offloaded()


class FakeCudart:
    """Pins what it is asked to, or refuses."""

    def __init__(self, code: int) -> None:
        self.code = code
        self.asked: list[int] = []

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:  # noqa: N802
        """Remember how much."""
        self.asked.append(nbytes)
        return self.code

    def cudaHostUnregister(self, address: int) -> int:  # noqa: N802
        """Remember that it was let go."""
        self.asked.pop()
        return 0


@pytest.mark.parametrize("code", [0, 2])
def test_exact_regions_are_pinned_or_it_is_said(code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """No power of two: the bytes of a layer, and pageable memory where the driver refuses."""
    fake = FakeCudart(code)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: fake)
    experts = offloaded().moesim.experts
    bank = HostBank(experts, pin=True)
    bank.add_layer()
    bank.add_layer()
    assert fake.asked == [bank.parcels[0].stride * 16] * (1 if code else 2)
    assert bank.pinned is (code == 0) and bool(bank.why_not) is (code != 0)
    del bank
    assert len(fake.asked) == (1 if code else 0)


# ---- requests ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("--model", "nowhere/at/all"), "no such folder"),
        (("--policy", "lru,lfu"), "--policy lru,lfu: a real run has one"),
        (("--policy", "lrv"), "--policy lrv: unknown"),
        (("--policy", "min"), "min needs FUTURE"),
        (("--policy", "static"), "static needs CALIBRATION"),
        (("--capacity", "100B"), "give at least one expert"),
        (("--prompts", " "), "--prompts: is empty"),
        (("--prompts", "gone.jsonl"), "no such file"),
        (("--trace-out", "no/such/place.parquet"), "--trace-out no/such/place.parquet: there is"),
        (("--timeline",), "--timeline writes into the run's folder"),
        (("--max-new-tokens", "5000"), "the model's context is 512"),
        (("--calibration", "gone.parquet", "--policy", "static"), "no such file"),
    ],
)
def test_a_mistake_is_one_line(
    words: tuple[str, ...], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [] if "--model" in words else ["--model", "demo"]
    assert main(["real", "generate", *given, "--max-new-tokens", "2", "--limit", "1", *words]) == 2
    out, err = capsys.readouterr()
    told = [at for at in err.splitlines() if at.startswith("moesim: error: ")]
    assert out == "" and len(told) == 1 and line in told[0], err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu_is_refused() -> None:
    with pytest.raises(UsageError, match="--device cuda: no CUDA GPU is at hand"):
        offloaded(device="cuda")


def test_an_unknown_device_is_refused() -> None:
    with pytest.raises(MoesimError, match="--device tpu: unknown; choose from cpu, cuda"):
        offloaded(device="tpu")

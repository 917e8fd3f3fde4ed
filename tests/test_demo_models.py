"""The shipped weights: they load, fit their size, and do what their cards say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors")

from moesim.errors import UsageError  # noqa: E402
from moesim.traces import demo_measure, demo_models  # noqa: E402
from moesim.traces.demo_overview import overview, read_reports  # noqa: E402
from moesim.traces.demo_report import load_model  # noqa: E402
from moesim.traces.demo_shapes import CONTEXT, VOCABULARY, Shape, build, shape_of  # noqa: E402

NAMES = demo_models.shipped()
FILES_BYTES = 45 << 20
DEMO_BYTES = 20 << 20
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def loaded(name: str) -> tuple[Any, Any, Shape, dict[str, Any]]:
    folder, shape = demo_models.model_path(name), shape_of(name)
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return load_model(folder, shape), tokenizer, shape, report


def test_the_main_model_is_there() -> None:
    assert "demo" in NAMES
    weights = demo_models.model_path("demo") / "model.safetensors"
    assert weights.stat().st_size <= DEMO_BYTES


def test_samples_and_weights_fit_their_size() -> None:
    traces = Path(demo_models.FOLDER).parent
    files = [*traces.glob("models/**/*"), *traces.glob("samples/*")]
    assert sum(path.stat().st_size for path in files if path.is_file()) <= FILES_BYTES


@pytest.mark.parametrize("name", NAMES)
def test_the_weights_are_bfloat16_and_all_there(name: str) -> None:
    path = demo_models.model_path(name) / "model.safetensors"
    with safetensors.safe_open(path, "pt") as weights:
        tensors = [weights.get_tensor(key) for key in weights.keys()]  # noqa: SIM118
    assert {tensor.dtype for tensor in tensors} == {torch.bfloat16}
    assert all(bool(tensor.isfinite().all()) for tensor in tensors)


@pytest.mark.parametrize("name", NAMES)
def test_the_model_is_what_the_card_states(name: str) -> None:
    model, tokenizer, shape, report = loaded(name)
    assert sum(p.numel() for p in model.parameters()) == report["parameters"]
    assert [p.shape for p in model.parameters()] == [p.shape for p in build(shape, 0).parameters()]
    assert len(tokenizer) == VOCABULARY
    assert report["shape"]["experts"] == shape.experts
    card = (demo_models.model_path(name) / "README.md").read_text(encoding="utf-8")
    assert f"{report['parameters']:,} parameters" in card
    assert f"{report['mean_loss']:.3f}" in card


@pytest.mark.parametrize("name", NAMES)
def test_the_stated_losses_hold(name: str) -> None:
    model, tokenizer, shape, report = loaded(name)
    found = demo_models.check_losses(model, tokenizer)
    assert found == pytest.approx(report["check_loss"], rel=0.01)
    before = demo_models.check_losses(build(shape, 0), tokenizer)
    assert all(found[text] < before[text] - 1.0 for text in found)


@pytest.mark.parametrize("name", NAMES)
def test_the_laws_in_the_report_follow_from_its_numbers(name: str) -> None:
    from moesim.traces.demo_report import laws

    report = json.loads((demo_models.model_path(name) / "report.json").read_text(encoding="utf-8"))
    assert laws(report) == report["laws"]


@pytest.mark.parametrize("name", NAMES)
def test_each_model_obeys_every_law(name: str) -> None:
    report = json.loads((demo_models.model_path(name) / "report.json").read_text("utf-8"))
    assert not [law for law, found in report["laws"].items() if not found["holds"]]


def test_routing_of_the_main_model_is_learned() -> None:
    model, tokenizer, shape, report = loaded("demo")
    held = {}
    for name, text in demo_models.CHECK_TEXTS.items():
        ids = tokenizer(text, return_tensors="pt")["input_ids"][0]
        ids = ids[: len(ids) // 2 * 2].view(2, -1)
        held[name] = {"input_ids": ids, "labels": ids}
    trained = demo_measure.measure(model, shape, held)
    untrained = demo_measure.measure(build(shape, 0), shape, held)
    assert trained.mean("gate_entropy") < untrained.mean("gate_entropy")
    assert trained.mean("gate_entropy") == pytest.approx(
        report["routing"]["trained"]["gate_entropy"], abs=0.1
    )
    assert trained.mean("overlap") < untrained.mean("overlap")


def test_the_page_over_the_models_tells_what_their_reports_tell() -> None:
    page = (demo_models.FOLDER / "README.md").read_text(encoding="utf-8")
    assert page == overview(read_reports(demo_models.FOLDER))
    assert all(f"[{name}]({name}/README.md)" in page for name in NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_the_model_writes(name: str) -> None:
    model, tokenizer, _, _ = loaded(name)
    prompts = ["The option", "Die Datei wird"]
    batch = tokenizer(prompts, return_tensors="pt", padding=True)
    batch.pop("token_type_ids", None)
    out = model.generate(**batch, max_new_tokens=8, do_sample=False)
    assert len(out) == 2
    assert all(tokenizer.batch_decode(out, skip_special_tokens=True))
    assert getattr(model.config, "max_position_embeddings", CONTEXT) == CONTEXT


def test_a_model_that_is_not_there_is_named(tmp_path: Path) -> None:
    assert demo_models.model_path(str(tmp_path)) == tmp_path
    with pytest.raises(UsageError, match=r"name a model's folder or a shipped one \(demo"):
        demo_models.model_path("demo-other")

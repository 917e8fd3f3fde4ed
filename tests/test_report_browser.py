"""The report in a browser: it opens, sorts, zooms, switches; text from outside stays text."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from moesim.cli import main

pytest.importorskip("bokeh")
pytest.importorskip("selenium")

from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import Select, WebDriverWait

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
CHROMEDRIVER = shutil.which("chromedriver")

FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1280,900",
)

HOSTILE = (
    "</script><script>window.hacked = 1</script>",
    "<img src=x onerror='window.hacked = 2'>",
    '" onmouseover="window.hacked = 3',
    "\u202etxt.exe\u2066",
    "$$\\int_0^1$$",
    "<!--<script>",
    "{{ 7 * 7 }} @policy{safe}",
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Headless Chromium with a profile of its own."""
    if CHROMIUM is None or CHROMEDRIVER is None:
        pytest.skip("needs chromium and chromedriver, which are not here")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    made = webdriver.Chrome(options, webdriver.ChromeService(CHROMEDRIVER))
    yield made
    made.quit()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs")
    words = ["--policy", "lru,lfu,next-gate,min", "--capacity", "25%,50%", "--timeline"]
    assert main(["replay", "--trace", "demo", "--limit", "1", *words, "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def file(runs: Path) -> Path:
    """A report with every figure."""
    path = runs.parent / "report.html"
    assert main(["report", str(runs), "--trace", "demo", "-o", str(path)]) == 0
    return path


@pytest.fixture
def opened(browser: Any, file: Path) -> Any:
    show(browser, file)
    return browser


def show(browser: Any, path: Path) -> None:
    """Open a page, and wait until its figures are drawn."""
    browser.get(path.as_uri())
    wait(browser, "document.documentElement.dataset.ready === 'yes'")


def wait(browser: Any, condition: str) -> None:
    """Until a JavaScript expression is true."""
    WebDriverWait(browser, 60).until(lambda b: b.execute_script(f"return {condition}"))


def complaints(browser: Any) -> list[str]:
    return [e["message"] for e in browser.get_log("browser") if e["level"] != "INFO"]


def column(browser: Any, index: int) -> list[str]:
    """The shown cells of a column."""
    rows = browser.find_elements(By.CSS_SELECTOR, "#runs tbody tr")
    shown = [row for row in rows if row.is_displayed()]
    return [row.find_elements(By.TAG_NAME, "td")[index].text for row in shown]


def pressed(browser: Any, name: str) -> Any:
    chips = browser.find_elements(By.CLASS_NAME, "chip")
    return next(chip for chip in chips if chip.text == name)


def told(browser: Any, what: str) -> Any:
    """What a JavaScript expression gives."""
    return browser.execute_script(f"return {what}")


def points(browser: Any) -> list[str]:
    return list(told(browser, "report.doc.get_model_by_name('pareto-points').data.policy"))


def test_it_opens_without_complaint_and_without_a_network(opened: Any) -> None:
    assert complaints(opened) == []
    assert told(opened, "performance.getEntriesByType('resource').map(e => e.name)") == []
    for name in ("pareto", "parts", "transfers", "stalls", "clock", "hits", "entropy"):
        place = opened.find_element(By.ID, name)
        assert place.size["height"] > 100 and place.size["width"] > 900
    for name in ("pareto-points", "parts-bars", "transfers-bars", "stalls-cells", "clock-spans",
                 "hits-cells", "entropy-cells"):  # fmt: skip
        assert told(opened, f"report.doc.get_model_by_name('{name}').data.y.length") > 3, name


def test_the_table_sorts(opened: Any) -> None:
    heads = opened.find_elements(By.CSS_SELECTOR, "#runs th button")
    names = [head.text for head in heads]
    for name in ("TPOT ms", "hit %"):
        index = names.index(name)
        heads[index].click()
        rising = [float(cell.split()[0]) for cell in column(opened, index)]
        assert rising == sorted(rising) and len(set(rising)) > 2
        heads[index].click()
        falling = [float(cell.split()[0]) for cell in column(opened, index)]
        assert falling == sorted(rising, reverse=True)
    heads[0].click()
    policies = column(opened, 0)
    assert policies == sorted(policies)
    # What is not known comes last, either way.
    index = names.index("x bound")
    assert set(column(opened, index)) == {"-"}


def test_policies_switch_on_and_off(opened: Any) -> None:
    assert points(opened).count("lfu") == 2
    pressed(opened, "lfu").click()
    assert "lfu" not in points(opened)
    assert not any(cell.startswith("lfu") for cell in column(opened, 0))
    factors = told(opened, "report.doc.get_model_by_name('parts').y_range.factors")
    assert factors == ["min (bound)", "lru", "next-gate"]
    pressed(opened, "lfu").click()
    assert points(opened).count("lfu") == 2
    opened.find_element(By.ID, "bounds").click()
    assert "min" not in points(opened)
    assert complaints(opened) == []


def test_bounds_are_never_on_the_frontier(opened: Any) -> None:
    front = told(opened, "report.doc.get_model_by_name('pareto-front').data.y")
    data = told(opened, "report.data")
    usable = [r["tpot"] / 1e6 for r in data["runs"] if not data["policies"][r["policy"]]["bound"]]
    assert all(any(abs(y - tpot) < 1e-9 for tpot in usable) for y in front)
    assert min(front) == pytest.approx(min(usable))
    assert min(r["tpot"] / 1e6 for r in data["runs"]) < min(front)


def test_capacity_metric_run_and_pass_switch(opened: Any) -> None:
    def spans() -> int:
        return int(told(opened, "report.doc.get_model_by_name('clock-spans').data.y.length"))

    Select(opened.find_element(By.ID, "metric")).select_by_value("stall")
    label = told(opened, "report.doc.get_model_by_name('pareto').left[0].axis_label")
    assert label == "stall, share of the time, %"
    before = told(opened, "report.doc.get_model_by_name('transfers-bars').data.value")
    Select(opened.find_element(By.CSS_SELECTOR, "select.capacity")).select_by_value("50%")
    assert told(opened, "report.doc.get_model_by_name('transfers-bars').data.value") != before
    decode = spans()
    Select(opened.find_element(By.ID, "clock-pass")).select_by_index(0)
    prefill = spans()
    assert prefill != decode
    Select(opened.find_element(By.ID, "clock-run")).select_by_visible_text("lru at 25%")
    assert "prefetch" not in " ".join(told(
        opened, "report.doc.get_model_by_name('clock-spans').data.what"))  # fmt: skip
    assert complaints(opened) == []


def test_the_clock_zooms_and_tells_what_a_span_is(opened: Any) -> None:
    def width() -> float:
        made = told(opened, "(r => r.end - r.start)(report.doc.get_model_by_name('clock').x_range)")
        return float(made)

    whole = width()
    place = opened.find_element(By.ID, "clock")
    opened.execute_script("arguments[0].scrollIntoView({block: 'center'})", place)
    drag = ActionChains(opened).move_to_element_with_offset(place, -100, 0).click_and_hold()
    drag.move_by_offset(80, 0).move_by_offset(80, 0).release().perform()
    WebDriverWait(opened, 10).until(lambda _: width() < whole / 2)
    opened.execute_script("report.doc.get_model_by_name('clock').reset.emit()")
    WebDriverWait(opened, 10).until(lambda _: abs(width() - whole) < 1e-9)
    names = told(opened, "Object.keys(report.doc.get_model_by_name('clock-spans').data)")
    assert {"what", "bytes", "issued", "end", "need", "margin"} <= set(names)


def test_light_and_dark(opened: Any) -> None:
    def ground() -> str:
        return str(told(opened, "getComputedStyle(document.body).backgroundColor"))

    def cells() -> list[str]:
        return list(told(opened, "report.doc.get_model_by_name('stalls-cells').data.colour"))

    for wish in ("dark", "light"):
        feature = {"name": "prefers-color-scheme", "value": wish}
        opened.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
        wait(opened, f"document.documentElement.dataset.theme === '{wish}'")
    # From here on the reader has chosen.
    light, light_cells = ground(), cells()
    opened.find_element(By.ID, "theme").click()
    assert ground() != light and cells() != light_cells
    opened.find_element(By.ID, "theme").click()
    assert (ground(), cells()) == (light, light_cells)
    assert complaints(opened) == []


def test_a_narrow_screen_does_not_scroll_sideways(browser: Any, file: Path) -> None:
    size = {"width": 400, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        show(browser, file)
        assert told(browser, "document.documentElement.scrollWidth") <= 400
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_text_from_outside_stays_text(browser: Any, runs: Path, tmp_path: Path) -> None:
    """Names of policies, capacities, models and machines that would run, hide or fetch."""
    folder = shutil.copytree(runs, tmp_path / "runs")
    for number, run in enumerate(sorted(folder.iterdir())):
        text = HOSTILE[number % len(HOSTILE)]
        summary, manifest = (
            json.loads((run / f"{n}.json").read_text()) for n in ("summary", "manifest")
        )
        summary |= {"policy": text + summary["policy"], "set": [text], "allowed": [text]}
        summary["capacity"] += HOSTILE[0]
        manifest["model"]["name"] = manifest["hardware"]["name"] = "".join(HOSTILE)
        (run / "summary.json").write_text(json.dumps(summary))
        (run / "manifest.json").write_text(json.dumps(manifest))
        run.rename(run.with_name(f"{number} <b>&amp;"))
    path = tmp_path / "report.html"
    assert main(["report", str(folder), "-o", str(path)]) == 0
    show(browser, path)
    hover(browser)
    assert told(browser, "window.hacked") is None
    assert complaints(browser) == []
    assert told(browser, "performance.getEntriesByType('resource').map(e => e.name)") == []
    assert (
        told(browser, "document.querySelectorAll('img, b:not(.belief b), main script').length") == 0
    )
    shown = browser.find_element(By.TAG_NAME, "main").text
    assert HOSTILE[1] in shown and "\\u202e" in shown and "\u202e" not in shown
    assert "49" not in [chip.text for chip in browser.find_elements(By.CLASS_NAME, "chip")]


def hover(browser: Any) -> None:
    """Over every point of the first figure, so that its tips are made."""
    place = browser.find_element(By.ID, "pareto")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", place)
    at = """const view = report.views[0], data = report.doc.get_model_by_name('pareto-points').data;
    const box = document.getElementById('pareto').getBoundingClientRect();
    const frame = view.frame, inner = frame.bbox;
    return Array.from(data.x, (x, i) => [
      inner.left + frame.x_scale.compute(x) - inner.left - box.width / 2,
      inner.top + frame.y_scale.compute(data.y[i]) - inner.top - box.height / 2]);"""
    seen = 0
    for x, y in browser.execute_script(at):
        ActionChains(browser).move_to_element_with_offset(place, round(x), round(y)).perform()
        seen += bool(browser.execute_script(TIPS))
    assert seen > 0


TIPS = """let found = 0;
const walk = (root) => { for (const e of root.querySelectorAll('*')) {
  if (e.shadowRoot) { found += e.shadowRoot.querySelectorAll('.bk-tooltip-row-value').length;
    walk(e.shadowRoot); } } };
walk(document); return found;"""


def test_a_sweep_has_a_choice_of_settings(browser: Any, runs: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(runs, tmp_path / "runs")
    for number, run in enumerate(sorted(folder.iterdir())):
        manifest = json.loads((run / "manifest.json").read_text())
        manifest["hardware"]["link"]["bytes_per_s"] = 1e9 * (1 + number % 2)
        (run / "manifest.json").write_text(json.dumps(manifest))
    path = tmp_path / "report.html"
    assert main(["report", str(folder), "-o", str(path)]) == 0
    show(browser, path)
    assert len(points(browser)) == 4
    Select(browser.find_element(By.ID, "setting")).select_by_index(1)
    assert "link 2 GB/s" in browser.find_element(By.ID, "answer").text
    assert len(points(browser)) == 4 == len(column(browser, 0))
    assert complaints(browser) == []

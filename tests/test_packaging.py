"""One import name for each module, whole wheels, and a house that stands on little."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest

from moesim.cli import main
from moesim.policies import SEATS

ROOT = Path(__file__).resolve().parents[1]
LINKED = ("analysis", "policies", "real", "traces")
HEAVY = {
    "torch",
    "numba",
    "pandas",
    "matplotlib",
    "pyarrow",
    "rich",
    "simpy",
    "scipy",
    "ray",
    "bokeh",
    "jinja2",
}


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    """What pyproject.toml says."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def python(*words: str, **more: Any) -> subprocess.CompletedProcess[str]:
    """This interpreter, in the checkout unless told otherwise."""
    options = {"cwd": ROOT, "capture_output": True, "text": True, "timeout": 300, "check": False}
    return subprocess.run([sys.executable, *words], **{**options, **more})


# ---- the links and the map -----------------------------------------------------------------------


@pytest.mark.parametrize("name", LINKED)
def test_a_link_leads_to_its_folder(name: str) -> None:
    link = ROOT / "moesim" / name
    assert link.is_symlink(), (
        f"{link} must be a link to ../{name}; a copy of the checkout lost it, clone again or "
        "`pip install -e .`"
    )
    assert link.readlink() == Path("..") / name
    assert link.resolve() == ROOT / name


def test_packages_are_the_folders_with_an_init(project: dict[str, Any]) -> None:
    tool = project["tool"]["setuptools"]
    mapped = tool["package-dir"]
    assert mapped == {"moesim": "moesim", **{f"moesim.{name}": name for name in LINKED}}
    found = {"moesim"}
    for package, folder in mapped.items():
        for init in (ROOT / folder).rglob("__init__.py"):
            inside = init.parent.relative_to(ROOT / folder)
            if not inside.parts or inside.parts[0] not in LINKED:
                found.add(".".join((package, *inside.parts)))
    assert set(tool["packages"]) == found
    assert tool["packages"] == sorted(tool["packages"])


def test_no_top_level_package_is_left_out_of_the_map() -> None:
    holding = {init.parent.name for init in ROOT.glob("*/__init__.py")}
    assert holding == {"moesim", *LINKED}


@pytest.mark.parametrize("name", LINKED)
def test_a_bare_import_is_refused(name: str) -> None:
    ended = python("-c", f"import {name}")
    assert ended.returncode == 1
    assert f"import this folder as moesim.{name}" in ended.stderr
    assert python("-c", f"import moesim.{name}").returncode == 0


@pytest.mark.parametrize("name", LINKED)
def test_ruff_bans_the_bare_name(name: str, tmp_path: Path) -> None:
    if importlib.util.find_spec("ruff") is None:
        pytest.skip("needs ruff")
    source = f"import {name}\nfrom {name} import thing\nimport moesim.{name}\n"
    words = ("-m", "ruff", "check", "--no-cache", "--select", "TID251", "-")
    ended = python(*words, "--stdin-filename", str(ROOT / "tests" / "x.py"), input=source)
    assert ended.returncode == 1
    assert ended.stdout.count(f"`{name}` is banned: import moesim.{name}") == 2


def test_the_imports_run_one_way() -> None:
    if importlib.util.find_spec("importlinter") is None:
        pytest.skip("needs import-linter")
    words = "from importlinter.cli import lint_imports; raise SystemExit(lint_imports())"
    ended = python("-c", words.replace("lint_imports()", "lint_imports(no_cache=True)"))
    assert ended.returncode == 0, ended.stdout


def test_the_entry_points_are_the_table_of_seats(project: dict[str, Any]) -> None:
    groups = project["project"]["entry-points"]
    assert groups["moesim.seats"] == SEATS
    assert project["project"]["scripts"] == {"moesim": "moesim.cli:program"}


EXTRA_OF = {
    "traces": "record",
    "real": "real",
    "analysis": "figures",
    "moesim/planning": "plan",
    "moesim/bench/record.py": "record",
    "moesim/cli/record.py": "record",
    "moesim/api.py": "figures",
    "moesim/sweeps": "ray",
}
"""What a folder or file may import beside the dependencies."""


def named(texts: Iterable[str]) -> set[str]:
    """Names of packages in requirements."""
    return {re.split(r"[<>=\[]", text)[0].replace("-", "_") for text in texts}


def imported(path: Path) -> set[str]:
    """Packages that a file imports anywhere, beside moesim and the standard library."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(str(node.module).partition(".")[0])
    return found - {"moesim", *sys.stdlib_module_names}


def test_everything_that_is_imported_is_declared(project: dict[str, Any]) -> None:
    extras = project["project"]["optional-dependencies"]
    declared = named(project["project"]["dependencies"])
    assert declared == {"joblib", "llvmlite", "numba", "numpy", "pyarrow", "rich", "shtab", "simpy"}
    for path in (p for folder in ("moesim", *LINKED) for p in (ROOT / folder).rglob("*.py")):
        inside = path.relative_to(ROOT)
        extra = next((x for p, x in EXTRA_OF.items() if inside.is_relative_to(p)), "")
        more = "quality" if inside.name == "quality_rouge.py" else ""
        more = "report" if inside.parent.name == "analysis" and "report" in inside.name else more
        if not _linked(path):
            may = named([*extras.get(extra, ()), *extras.get(more, ())])
            assert imported(path) <= declared | may, inside


# ---- light where it must be ----------------------------------------------------------------------


@pytest.mark.parametrize("words", [["-c", "import moesim"], ["-m", "moesim", "--help"]])
def test_nothing_heavy_is_imported_for_help(words: list[str]) -> None:
    ended = python("-X", "importtime", *words)
    assert ended.returncode == 0
    found = re.findall(r"\| +([a-zA-Z_][\w.]*)$", ended.stderr, re.MULTILINE)
    assert "moesim" in found
    assert not {name.partition(".")[0] for name in found} & HEAVY


@pytest.fixture
def bare(tmp_path: Path) -> dict[str, Any]:
    """A Python that has NumPy, pyarrow and the checkout, and no more."""
    site = Path(sysconfig.get_path("purelib"))
    for name in ("numpy", "numpy.libs", "pyarrow", "pyarrow.libs"):
        spec = importlib.util.find_spec(name) if "." not in name else None
        found = Path(spec.origin).parent if spec and spec.origin else site / name
        if found.is_dir():
            (tmp_path / name).symlink_to(found)
    return {"env": {**os.environ, "PYTHONPATH": str(tmp_path)}}


def test_a_bare_checkout_works(bare: dict[str, Any], tmp_path: Path) -> None:
    demo = str(ROOT / "traces" / "samples" / "demo.parquet")
    head = str(tmp_path / "head.parquet")
    for words in (
        ["--help"],
        ["profiles"],
        ["policies", "--json"],
        ["trace", "info", demo],
        ["trace", "check", demo],
        ["trace", "head", demo, head, "--requests", "1"],
    ):
        ended = python("-S", "-m", "moesim", *words, **bare)
        assert (ended.returncode, ended.stderr) == (0, ""), words


@pytest.mark.parametrize(
    ("missing", "words"),
    [("rich", ["replay", "--trace", "demo"]), ("rich", ["policies"]), ("numpy", ["profiles"])],
)
def test_a_missing_dependency_is_one_clear_line(
    missing: str, words: list[str], bare: dict[str, Any]
) -> None:
    if missing == "numpy":
        bare["env"]["PYTHONPATH"] = ""
    ended = python("-S", "-m", "moesim", *words, **bare)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith("moesim: error: ") and ended.stderr.count("\n") == 1
    assert missing in ended.stderr and "pip install" in ended.stderr


# ---- the wheel -----------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel, built from a copy so that the checkout stays clean."""
    source = tmp_path_factory.mktemp("source")
    for name in ("moesim", *LINKED, "pyproject.toml", "README.md", "LICENSE"):
        subprocess.run(["cp", "-RP", ROOT / name, source / name], check=True)
    target = tmp_path_factory.mktemp("wheel")
    words = ["-m", "pip", "wheel", "--quiet", "--no-deps", "--disable-pip-version-check"]
    if _setuptools() >= 77:
        words.append("--no-build-isolation")
    ended = python(*words, "--wheel-dir", str(target), str(source))
    assert ended.returncode == 0, ended.stderr
    (built,) = target.glob("*.whl")
    return built


def _setuptools() -> int:
    try:
        return int(version("setuptools").partition(".")[0])
    except PackageNotFoundError:
        return 0


KEPT = {".py", ".toml", ".parquet", ".typed", ".html", ".css", ".js"}
"""Suffixes of what a wheel holds."""


def test_the_wheel_is_whole_and_holds_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    info = f"moesim-{version_here()}.dist-info/"
    assert {name.partition("/")[0] + "/" for name in names} == {"moesim/", info}
    inside = {name for name in names if name.startswith("moesim/")}
    expected = {
        (Path(package) / path.relative_to(ROOT / folder)).as_posix()
        for package, folder in (("moesim", "moesim"), *((f"moesim/{n}", n) for n in LINKED))
        for path in (ROOT / folder).rglob("*")
        if path.suffix in KEPT and not _linked(path)
    }
    models = [path for path in (ROOT / "traces" / "models").rglob("*") if path.is_file()]
    expected |= {f"moesim/{path.relative_to(ROOT).as_posix()}" for path in models}
    assert inside == expected
    assert {"moesim/py.typed", "moesim/traces/samples/demo.parquet"} <= inside
    assert {f"{info}entry_points.txt", f"{info}licenses/LICENSE"} <= names


def version_here() -> str:
    """The version in the source."""
    found = re.search(r'__version__ = "(.+)"', (ROOT / "moesim" / "__init__.py").read_text())
    assert found
    return found[1]


def _linked(path: Path) -> bool:
    """Whether a path below moesim/ lies behind one of the links."""
    inside = path.relative_to(ROOT).parts
    return inside[0] == "moesim" and inside[1] in LINKED


def test_one_version(project: dict[str, Any]) -> None:
    assert project["project"]["version"] == version_here()


def test_the_wheel_works_from_any_folder(wheel: Path, tmp_path: Path) -> None:
    home = tmp_path / "venv"
    venv.create(home, symlinks=True)
    there = home / "bin" / "python"
    ended = python("-m", "pip", "--quiet", "--python", str(there), "install", "--no-deps", wheel)
    assert ended.returncode == 0, ended.stderr
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    # The dependencies come from this environment; its own moesim, if any, comes after the wheel's.
    site = subprocess.run(
        [there, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    dependencies = os.pathsep.join(
        (sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *_editable_free_path())
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join((site, dependencies))}
    options: dict[str, Any] = {"cwd": folder, "env": env, "capture_output": True, "text": True}
    words = ["replay", "--trace", "demo", "--policy", "lru", "--limit", "1", "--json"]
    ended = subprocess.run([home / "bin" / "moesim", *words], check=False, **options)
    assert ended.returncode == 0, ended.stderr
    assert "error" not in ended.stderr
    assert '"schema": 1' in ended.stdout
    where = "import moesim.policies.lru as m; print(m.__file__)"
    ended = subprocess.run([there, "-c", where], check=False, **options)
    assert ended.stdout.startswith(site)


def _editable_free_path() -> list[str]:
    """Folders of this interpreter that hold packages, the checkout apart."""
    return [p for p in sys.path if p.endswith("-packages") and Path(p).is_dir()]


def test_each_sample_is_small_and_says_what_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    from moesim.traces.reader import TraceReader
    from moesim.traces.samples import SAMPLES, trace_path

    for name in SAMPLES:
        path = trace_path(name)
        assert path.stat().st_size <= (8_000_000 if name == "demo" else 2_000_000)
        assert main(["trace", "check", str(path)]) == 0
        with TraceReader(path) as reader:
            assert reader.meta.source.startswith("recorded from ")
            assert reader.meta.model.name == name
            facts = [rows.facts for rows in reader.requests()]
        assert len(facts) >= 60 and len({one.topic for one in facts}) == 16
        test = sum(one.split == "test" for one in facts)
        assert test + sum(one.split == "train" for one in facts) == len(facts)
        assert abs(test / len(facts) - 0.3) < 0.05
    capsys.readouterr()

"""Compiled code that was kept is run only if it is what was kept, for these very sources.

Most tests keep small functions of their own (``SOURCE``) by ``moesim.compiled``, each in a
fresh process, as a user's commands would.
"""

from __future__ import annotations

import ast
import builtins
import ctypes
import fcntl
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numba
import pytest

from moesim import compiled

ROOT = Path(__file__).resolve().parents[1]

config: Any = numba.config
compiles = pytest.mark.skipif(
    bool(config.DISABLE_JIT), reason="NUMBA_DISABLE_JIT: nothing is compiled"
)

CALLEE = """
from moesim.compiled import kernel

@kernel
def twice(x):
    return 2 * x
"""

SOURCE = """
from moesim.compiled import entry
from product.callee import twice

@entry
def total(values):
    return twice(values[0]) + values[1]

@entry
def at(values, i):
    return values[i]
"""

PROGRAM = """
import sys
from pathlib import Path
import numba, numpy as np
from moesim import compiled
compiled.ROOT = Path(sys.argv[1]) / "product"
compiled.SOURCES = ("*.py",)
compiled.LONGEST_WAIT_S = float(sys.argv[2])
sys.path.insert(0, sys.argv[1])
from product import made
values, number = numba.int64[::1], numba.int64
compiled.load((made.total, (values,)))
compiled.load((made.at, (values, number)), (made.total, (values,)))
print(made.total(np.array([3, 4])), made.at(np.arange(3), int(sys.argv[3])))
"""

ANNOUNCED = "moesim: compiling the fast engine, once for this version\n"
COMPILED, KEPT = ("10 2\n", ANNOUNCED), ("10 2\n", "")


class Desk:
    """A folder of sources, a cache, and processes that use both."""

    def __init__(self, folder: Path) -> None:
        self.source = folder / "source"
        self.cache = folder / "cache"
        self.product = self.source / "product"
        self.product.mkdir(parents=True)
        (self.product / "made.py").write_text(SOURCE)
        (self.product / "callee.py").write_text(CALLEE)
        (self.product / "aside.py").write_text("")

    def start(
        self,
        at: int = 2,
        patience_s: float = 60,
        before: Callable[[], object] | None = None,
        **environment: str,
    ) -> subprocess.Popen[str]:
        here = {"MOESIM_CACHE": str(self.cache), "PYTHONDONTWRITEBYTECODE": "1"}
        return subprocess.Popen(
            [sys.executable, "-c", PROGRAM, self.source, str(patience_s), str(at)],
            cwd=ROOT,
            env={**os.environ, **here, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=before,
        )

    def run(self, at: int = 2, **more: Any) -> tuple[str, str]:
        return ended(self.start(at, **more))

    def file(self, pattern: str) -> Path:
        (found,) = self.cache.rglob(pattern)
        return found


def ended(process: subprocess.Popen[str], code: int = 0) -> tuple[str, str]:
    """What a process printed, and said on stderr."""
    try:
        said = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == code, said[1]
    return said


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path)


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Desk:
    """Where the code was compiled and kept."""
    made = Desk(tmp_path_factory.mktemp("desk"))
    assert made.run() == COMPILED
    return made


@pytest.fixture
def kept(first: Desk, tmp_path: Path) -> Iterator[Desk]:
    """The same, with a copy of the cache that may be spoilt."""
    whole = first.cache
    first.cache = Path(shutil.copytree(whole, tmp_path / "cache"))
    yield first
    first.cache = whole


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    """What this process remembers of its cache folder."""
    compiled.cache_folder.cache_clear()
    compiled.source_digest.cache_clear()
    yield
    compiled.cache_folder.cache_clear()
    compiled.source_digest.cache_clear()


# ---- kept, and told ------------------------------------------------------------------------------


@compiles
def test_compiling_is_announced_once_and_then_it_is_kept(desk: Desk) -> None:
    assert desk.run() == COMPILED
    assert desk.run() == KEPT


@compiles
def test_an_edit_in_a_callee_is_noticed(kept: Desk) -> None:
    """In another file than the function that is called, which is where numba's own cache looks."""
    callee = kept.product / "callee.py"
    try:
        callee.write_text(CALLEE.replace("2 * x", "3 * x"))
        assert kept.run() == ("13 2\n", ANNOUNCED)
    finally:
        callee.write_text(CALLEE)
    assert kept.run() == KEPT


@compiles
def test_an_edit_elsewhere_compiles_nothing(kept: Desk) -> None:
    (kept.product / "aside.py").write_text("edited = True")
    assert kept.run() == KEPT


@compiles
def test_bounds_are_checked_where_that_is_asked_for(kept: Desk) -> None:
    """Other settings of the compiler are other code."""
    process = kept.start(at=3, NUMBA_BOUNDSCHECK="1")
    assert "IndexError" in ended(process, code=1)[1]
    assert kept.run() == KEPT


# ---- damage --------------------------------------------------------------------------------------


def flipped(path: Path) -> None:
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    path.write_bytes(bytes(damaged))


def halved(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def garbled(path: Path) -> None:
    path.write_bytes(b"\xff\xfe\x00 neither text nor code")


@compiles
@pytest.mark.parametrize(
    ("damage", "pattern"),
    [
        (flipped, "*total*.nbc"),
        (halved, "*total*.nbc"),
        (garbled, "*total*.nbi"),
        (halved, "*total*.nbi"),
        (garbled, "*total*.nbc.sha256"),
        (Path.unlink, "*total*.nbi.sha256"),
    ],
)
def test_what_is_damaged_is_compiled_again(
    damage: Callable[[Path], None], pattern: str, kept: Desk
) -> None:
    damage(kept.file(pattern))
    assert kept.run() == COMPILED


@compiles
def test_what_was_compiled_again_is_kept_again(kept: Desk) -> None:
    for pattern in ("*total*.nbc", "*at-*.nbi"):
        flipped(kept.file(pattern))
    assert kept.run() == COMPILED
    assert kept.run() == KEPT


@compiles
def test_a_folder_in_the_place_of_a_file_does_no_harm(kept: Desk) -> None:
    path = kept.file("*total*.nbc")
    path.unlink()
    path.mkdir()
    printed, said = kept.run()
    assert printed == COMPILED[0]
    assert f"moesim: compiled code cannot be kept in {path.parents[2]} (" in said


def sealed(folder: Path, *, seal: bool) -> Path:
    path = folder / "pycache" / "kernel.run-1.py311.1.nbc"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"machine code")
    if seal:
        compiled._seal([path])
    return path


def test_sealed_code_is_kept(tmp_path: Path) -> None:
    path = sealed(tmp_path, seal=True)
    compiled._distrust(tmp_path)
    assert path.exists()


def test_code_without_a_seal_is_removed(tmp_path: Path) -> None:
    path = sealed(tmp_path, seal=False)
    compiled._distrust(tmp_path)
    assert not path.exists()


@pytest.mark.parametrize("at", range(0, 12, 3))
def test_damaged_code_is_removed(tmp_path: Path, at: int) -> None:
    path = sealed(tmp_path, seal=True)
    damaged = bytearray(path.read_bytes())
    damaged[at] ^= 1
    path.write_bytes(bytes(damaged))
    compiled._distrust(tmp_path)
    assert not path.exists()


# ---- no room, no rights --------------------------------------------------------------------------


def powerless() -> None:
    """Let even root be refused what a folder's mode forbids."""
    drop_from_bounding_set, override, read_search = 24, 1, 2
    for capability in (override, read_search):
        LIBC.prctl(drop_from_bounding_set, capability, 0, 0, 0)


LIBC = ctypes.CDLL(None)


@compiles
def test_a_folder_that_is_read_only_is_left_alone(kept: Desk) -> None:
    if not sys.platform.startswith("linux"):
        pytest.skip("needs Linux's capabilities")
    folders = [kept.cache, *(path for path in kept.cache.rglob("*") if path.is_dir())]
    for folder in folders:
        folder.chmod(0o500)
    before = sorted(kept.cache.rglob("*"))
    try:
        printed, said = kept.run(before=powerless)
    finally:
        for folder in folders:
            folder.chmod(0o700)
    assert printed == COMPILED[0]
    assert said == "moesim: compiling the fast engine, every time: no folder to keep it in\n"
    assert sorted(kept.cache.rglob("*")) == before
    assert kept.run() == KEPT


@compiles
def test_a_full_disk_costs_only_the_keeping(desk: Desk) -> None:
    def little_room() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))

    printed, said = desk.run(before=little_room)
    assert printed == COMPILED[0]
    announced, told = said.splitlines()
    assert f"{announced}\n" == ANNOUNCED
    assert told.startswith("moesim: compiled code cannot be kept in ") and "too large" in told
    assert desk.run() == COMPILED


def test_a_place_that_cannot_be_written_means_no_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    occupied = tmp_path / "file"
    occupied.write_text("in the way")
    monkeypatch.setenv("MOESIM_CACHE", str(occupied))
    assert compiled.cache_folder() is None


def test_neither_a_home_nor_a_temporary_folder_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object) -> Any:
        raise FileNotFoundError

    def nobody(*_: object) -> Any:
        raise RuntimeError

    for name in ("MOESIM_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(compiled.tempfile, "gettempdir", none)
    monkeypatch.setattr(compiled.Path, "expanduser", nobody)
    assert compiled.cache_folder() is None


@pytest.mark.parametrize(("mode", "used"), [(0o755, True), (0o775, False), (0o777, False)])
def test_code_that_others_may_write_is_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: int, used: bool
) -> None:
    top = tmp_path / "moesim"
    top.mkdir()
    top.chmod(mode)
    monkeypatch.setenv("MOESIM_CACHE", str(tmp_path))
    assert (compiled.cache_folder() is not None) == used


# ---- two processes -------------------------------------------------------------------------------


@compiles
def test_processes_that_start_at_once_share_one_cache(desk: Desk) -> None:
    running = [desk.start() for _ in range(3)]
    said = [ended(process) for process in running]
    assert [printed for printed, _ in said] == [COMPILED[0]] * 3
    assert any(ANNOUNCED in told for _, told in said)
    assert desk.run() == KEPT


@compiles
def test_one_waits_for_another_that_compiles(kept: Desk) -> None:
    kept.file("*total*.nbc").unlink()
    with kept.file(compiled.LOCK).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        process = kept.start()
        assert process.stderr is not None
        line = process.stderr.readline()
        assert line == "moesim: waiting for another process that compiles the fast engine\n"
        assert process.poll() is None
    assert ended(process) == COMPILED


@compiles
def test_one_that_hangs_holds_nobody_up(kept: Desk) -> None:
    with kept.file(compiled.LOCK).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        printed, said = kept.run(patience_s=0.3)
    assert printed == COMPILED[0] and said.count("\n") == 1


# ---- what compiled code is made of ---------------------------------------------------------------


@pytest.fixture
def copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The package where it may be edited."""
    copy = tmp_path / "moesim"
    aside = shutil.ignore_patterns("__pycache__", "profiles", "traces", "real", "analysis", "cli")
    shutil.copytree(compiled.ROOT, copy, ignore=aside)
    monkeypatch.setattr(compiled, "ROOT", copy)
    return copy


def edited(path: Path) -> set[str]:
    """The modules whose code another digest names since a file was edited."""
    entries = {entry for module in modules().values() for entry in module.entries()}
    names = {module for module, _ in entries}
    before = {name: compiled.source_digest(name) for name in names}
    with path.open("a") as file:
        file.write("\n# edited\n")
    compiled.source_digest.cache_clear()
    return {name for name in names if compiled.source_digest(name) != before[name]}


CORE = {f"moesim.engine.{name}" for name in ("devices", "kernel", "quick", "steps", "wishes")}


@pytest.mark.parametrize(
    ("name", "affected"),
    [
        ("engine/devices.py", {"moesim.engine.devices"}),
        ("engine/kernel.py", {"moesim.engine.devices", "moesim.engine.kernel"}),
        ("engine/quick.py", {f"moesim.engine.{n}" for n in ("devices", "kernel", "quick")}),
        ("engine/block.py", {"moesim.engine.block", "moesim.engine.future"}),
        ("engine/machine.py", CORE),
        ("policies/lru.py", CORE),
        ("policies/lfu.py", CORE),
        ("hashing.py", CORE),
        ("log.py", CORE),
        ("engine/flat.py", {"moesim.engine.flat"}),
        # What only Python runs.
        ("policies/__init__.py", set()),
        ("policies/next_gate.py", set()),
        ("policies/fiddler.py", set()),
        ("engine/asked.py", set()),
        ("engine/reference.py", set()),
        ("protocol.py", set()),
        ("workload.py", set()),
    ],
)
def test_an_edit_compiles_again_what_is_made_of_it(
    copied: Path, name: str, affected: set[str]
) -> None:
    assert edited(copied / name) == affected


def test_an_edit_of_what_compiles_compiles_everything_again(copied: Path) -> None:
    everything = edited(copied / "compiled.py")
    assert everything >= CORE | {f"moesim.engine.{name}" for name in ("block", "flat", "future")}


def test_imports_are_found_however_they_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "product"
    (package / "below").mkdir(parents=True)
    texts = {
        "made": "from product import a, b as other\nimport product.c as c, product.d\n",
        "a": "from product.below import (\n    inner,  # said\n    made_here,\n)\n",
        "b": "def late():\n    from product.e import name\n    import product.f\n",
        "below/__init__": "from product.g import made_here\n",
        "e": "import numpy\nfrom other.aside import a\n",
    }
    for name in (*texts, "c", "d", "f", "g", "aside", "below/inner", "below/aside"):
        (package / f"{name}.py").write_text(texts.get(name, ""))
    monkeypatch.setattr(compiled, "ROOT", package)
    monkeypatch.setattr(compiled, "SOURCES", ("*.py", "below/*.py"))
    found = {
        path.relative_to(package).with_suffix("").as_posix()
        for path in compiled.sources("product.made")
    }
    assert found == {"made", *"abcdefg", "below/__init__", "below/inner"}


Names = set[tuple[str, str]]
"""(module, name in it)."""


class Module:
    """A module of moesim, read and not run: what its names are made of."""

    def __init__(self, name: str, path: Path) -> None:
        self.name = name
        self.imported: dict[str, tuple[str, str]] = {}
        self.bound: dict[str, list[ast.AST]] = {}
        for statement in ast.parse(path.read_text()).body:
            if isinstance(statement, ast.ImportFrom):
                for alias in statement.names:
                    self.imported[alias.asname or alias.name] = (statement.module or "", alias.name)
            elif isinstance(statement, ast.FunctionDef | ast.ClassDef):
                self.bound.setdefault(statement.name, []).append(statement)
            elif isinstance(statement, ast.Assign | ast.AnnAssign):
                for node in ast.walk(statement):
                    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                        self.bound.setdefault(node.id, []).append(statement)

    def entries(self) -> Names:
        """What Python calls: ``@entry``, and ``x = entry(...)``."""
        if self.imported.get("entry") != ("moesim.compiled", "entry"):
            return set()
        return {
            (self.name, name)
            for name, statements in self.bound.items()
            for statement in statements
            for node in ast.walk(statement)
            if isinstance(node, ast.Name) and node.id == "entry"
        }

    def parts(self, name: str) -> Names:
        """What a name is made of, one step deep. A module is what is asked of it."""
        found: Names = set()
        for statement in self.bound.get(name, []):
            for node in ast.walk(statement):
                if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                    origin = ".".join(self.imported.get(node.value.id, ()))
                    if origin in modules():
                        found.add((origin, node.attr))
                if isinstance(node, ast.Name) and not hasattr(builtins, node.id):
                    found.add(self.imported.get(node.id, (self.name, node.id)))
        return {part for part in found if part[0] in modules()}


@cache
def modules() -> dict[str, Module]:
    """All of moesim by import name."""
    paths = {p for pattern in ("*.py", "*/*.py") for p in (ROOT / "moesim").glob(pattern)}
    names = {path: ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in paths}
    return {name: Module(name, path) for path, name in names.items()}


def needed(entry: tuple[str, str]) -> Names:
    """All that an ``entry`` is made of: functions, constants and enumerations."""
    seen: Names = set()
    todo = {entry}
    while todo:
        module, name = part = todo.pop()
        seen.add(part)
        todo |= modules()[module].parts(name) - seen
    return seen


def test_the_digest_covers_all_that_compiled_code_is_made_of() -> None:
    entries = {entry for module in modules().values() for entry in module.entries()}
    assert {("moesim.engine.kernel", "run"), ("moesim.engine.block", "_unite")} <= entries
    for entry in entries:
        covered = {compiled._name_of(path) for path in compiled.sources(entry[0])}
        assert {module for module, _ in needed(entry)} <= covered
    run = needed(("moesim.engine.kernel", "run"))
    # The walk goes far enough: through a module's attribute, an enumeration, its base's constants.
    assert {("moesim.policies.lru", "touch"), ("moesim.types", "State")} <= run
    assert {"moesim.log", "moesim.hashing"} <= {module for module, _ in run}

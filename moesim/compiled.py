"""numba's decorators, with a cache that notices every edit and types that a checker keeps.

numba's own on-disk cache looks at a function's own file only: an edit in a callee goes unnoticed.
So the compiled code of a module lies in a folder named by a digest of all sources that it is made
of. Loading runs what lies there: each file has a checksum, and one process at a time looks or adds.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import platform
import re
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import IO, Any, TypeVar, cast

import llvmlite
import numba
import numpy as np
from llvmlite.binding import get_host_cpu_name
from numba.core.caching import NullCache

from moesim import compiler
from moesim.compiler import PartCompiler, WholeCompiler, remembering

F = TypeVar("F", bound=Callable[..., Any])

ROOT = Path(__file__).resolve().parent
SOURCES = (
    "compiled.py",
    "compiler.py",
    "hashing.py",
    "log.py",
    "types.py",
    "engine/*.py",
    "policies/*.py",
)
"""Where the parts of compiled code lie, below the package; whatever else its modules import is for
Python alone."""

IMPORT = re.compile(
    r"^[ \t]*(?:from[ \t]+([\w.]+)[ \t]+import[ \t]+(\([^)]*\)|.*)|import[ \t]+(.*))", re.MULTILINE
)

SEAL, LOCK = ".sha256", "lock"

LONGEST_WAIT_S = 180.0
"""After this another process that compiles is taken to hang."""

# Nothing is allocated in the core, and counting references to the machine's arrays at every call
# would cost more than the work; nor can anything be raised, which each call would look for.
_LEAN: dict[str, Any] = {"_nrt": False, "error_model": "numpy"}
_INNER: dict[str, Any] = {
    **_LEAN,
    "no_cpython_wrapper": True,
    "no_cfunc_wrapper": True,
    "forceinline": True,
    "pipeline_class": PartCompiler,
}


def entry(function: F, *, allocates: bool = False) -> F:
    """Compile a function that Python calls. ``load`` it before it is called."""
    config: Any = numba.config
    if config.DISABLE_JIT:
        # Compiled integers wrap around in silence.
        return np.errstate(over="ignore")(function)
    lean = {**_LEAN, "no_cfunc_wrapper": True, "pipeline_class": WholeCompiler}
    decorate: Any = numba.njit(**({} if allocates else lean))
    return cast(F, decorate(function))


def outside(function: F) -> F:
    """Compile a function that compiled code calls by its ``address``: what few runs need is not
    compiled for the others. It gets a tuple's address, for ``held_at``, and two numbers.

    Without numba's compiler, it gets the tuple itself.
    """
    config: Any = numba.config
    if config.DISABLE_JIT:
        return np.errstate(over="ignore")(function)
    by_address = {**_LEAN, "no_cfunc_wrapper": False, "pipeline_class": WholeCompiler}
    decorate: Any = numba.njit(**by_address)
    return cast(F, decorate(function))


def address(function: Any) -> int:
    """Where an ``outside`` function lies; it is loaded."""
    config: Any = numba.config
    if config.DISABLE_JIT:
        _plain[id(function)] = function
        return id(function)
    load((function, (numba.int64,) * 3))
    (compiled,) = function.overloads.values()
    return int(compiled.library.get_pointer_to_function(compiled.fndesc.llvm_cfunc_wrapper_name))


_plain: dict[int, Any] = {}


def _call_plain(function: int, held: Any, what: int, about: int) -> int:
    return int(_plain[int(function)](held, what, about))


def _held_plain(address: Any, whole: Any) -> Any:
    return _plain[int(address)] if isinstance(address, int | np.integer) else address


def _lay_plain(address: int, held: Any) -> int:
    _plain[int(address)] = held
    return 0


_config: Any = numba.config
held_at: Any = _held_plain if _config.DISABLE_JIT else compiler.held_at
lay_at: Any = _lay_plain if _config.DISABLE_JIT else compiler.lay_at
call_with: Any = _call_plain if _config.DISABLE_JIT else compiler.call_with


def kernel(function: F) -> F:
    """Compile a function that compiled code calls; always inlined.

    numba would compile it again for every constant that it is called with, and optimise it again
    in each of its callers; so constants count as numbers, and only an ``entry`` is optimised.
    """
    decorate: Any = numba.njit(**_INNER)
    compiled = decorate(function)
    if compiled is not function:
        compiled.compile = _plainly(compiled.compile)
    return cast(F, compiled)


def _plainly(compile_as: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def compile_plainly(signature: Any) -> Any:
        types: Any = numba.types
        plain = [types.unliteral(kind) for kind in signature]
        plain = [types.int64 if isinstance(k, types.IntEnumMember) else k for k in plain]
        config: Any = numba.config
        before = config.OPT
        config.OPT = 1
        try:
            return compile_as(tuple(plain))
        finally:
            config.OPT = before

    return compile_plainly


@cache
def cache_folder() -> Path | None:
    """Where compiled code is kept: ``MOESIM_CACHE``, the user's cache, or the temporary folder.

    None if none of them can be written: then every process compiles for itself.
    """
    for place in _places():
        top = place / "moesim"
        try:
            top.mkdir(mode=0o700, parents=True, exist_ok=True)
            # Loading runs what lies there, so it must be nobody else's.
            if top.stat().st_uid != os.getuid() or top.stat().st_mode & 0o022:
                continue
            with tempfile.TemporaryFile(dir=top):
                return top
        except OSError:
            continue
    return None


def _places() -> Iterator[Path]:
    given = os.environ.get("MOESIM_CACHE")
    if given:
        yield Path(given)
        return
    # Neither a home nor a temporary folder need exist.
    with contextlib.suppress(RuntimeError):
        yield Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser())
    with contextlib.suppress(OSError):
        yield Path(tempfile.gettempdir()) / f"moesim-{os.getuid()}"


@cache
def source_digest(module: str) -> str:
    """16 hex digits over all sources of a module's compiled code, what compiles it, and how."""
    settings = sorted(item for item in os.environ.items() if item[0].startswith("NUMBA_"))
    versions = numba.__version__, llvmlite.__version__, platform.python_version()
    total = hashlib.sha256(f"{versions} {get_host_cpu_name()} {settings}".encode())
    for path in sources(module):
        name = path.relative_to(ROOT).as_posix()
        total.update(name.encode() + b"\0" + path.read_bytes() + b"\0")
    return total.hexdigest()[:16]


def sources(module: str) -> list[Path]:
    """The files that a module's compiled code can be made of: its own, and what they import."""
    parts = {_name_of(path): path for pattern in SOURCES for path in ROOT.glob(pattern)}
    found: set[str] = set()
    todo = {module}
    while todo:
        name = todo.pop()
        found.add(name)
        path = parts.setdefault(name, ROOT.parent.joinpath(*name.split(".")).with_suffix(".py"))
        todo |= _imported(path, parts.keys()) - found
    return sorted(parts[name] for name in found)


def _name_of(path: Path) -> str:
    """The name to import a file by."""
    below = path.relative_to(ROOT.parent).with_suffix("")
    return ".".join(below.parts).removesuffix(".__init__")


def _imported(path: Path, parts: Collection[str]) -> set[str]:
    """Those of the modules that a file imports, wherever in it."""
    imported: set[str] = set()
    for origin, names, modules in IMPORT.findall(path.read_text()):
        imported.update(re.findall(r"[\w.]+", modules))
        for name in re.findall(r"\w+", re.sub(r"\bas\s+\w+|#.*", "", names)):
            # A name of a package is a module below it, or is made in its ``__init__``.
            below = f"{origin}.{name}"
            imported.add(below if below in parts else origin)
    return imported.intersection(parts)


@cache
def load(*calls: tuple[Any, Any]) -> None:
    """Compile functions for the arguments that they will get, or load what was kept.

    Says on stderr that compiling takes a while, unless all of it was kept.
    """
    config: Any = numba.config
    if config.DISABLE_JIT:
        return
    modules: dict[str, list[tuple[Any, Any]]] = {}
    for call in calls:
        modules.setdefault(call[0].py_func.__module__, []).append(call)
    with _interruptible():
        for module, its_calls in modules.items():
            _load(_folder(module), its_calls)


def _folder(module: str) -> Path | None:
    """Where a module's compiled code is kept, if it is."""
    top = cache_folder()
    with contextlib.suppress(OSError):
        if top is not None:
            folder = top / source_digest(module)
            folder.mkdir(exist_ok=True)
            return folder
    return None


def _load(folder: Path | None, calls: Iterable[tuple[Any, Any]]) -> None:
    with _alone(folder):
        if folder is not None:
            _distrust(folder)
            for function, _ in calls:
                _keep(function, folder)
        if not all(_is_kept(function) for function, _ in calls):
            _announce("once for this version" if folder else "every time: no folder to keep it in")
        with remembering():
            for function, signature in calls:
                _compile(function, signature)


def _compile(function: Any, signature: Any) -> None:
    """Compile it, or load it; then seal what was written, and look at files no more."""
    compiled_before = function.stats.cache_misses.total()
    try:
        function.compile(signature)
        if function.stats.cache_misses.total() > compiled_before:
            _seal(_files(function))
    except OSError as error:
        told = error.strerror or type(error).__name__
        _tell(f"compiled code cannot be kept in {cache_folder()} ({told})")
        function._cache = NullCache()
        function.compile(signature)
    function._cache = NullCache()


def _keep(function: Any, folder: Path) -> None:
    """Have numba keep a function in the folder, or nowhere."""
    config: Any = numba.config
    before = config.CACHE_DIR
    config.CACHE_DIR = str(folder)
    try:
        function.enable_caching()
    except RuntimeError:
        # It found no place at all.
        return
    finally:
        config.CACHE_DIR = before
    if not Path(function._cache.cache_path).is_relative_to(folder):
        function._cache = NullCache()


def _is_kept(function: Any) -> bool:
    return {path.suffix for path in _files(function)} >= {".nbi", ".nbc"}


def _files(function: Any) -> list[Path]:
    """What was kept of a function."""
    folder = function._cache.cache_path
    name = function.py_func.__qualname__
    return [] if folder is None else [*Path(folder).glob(f"*.{name}-*.nb?")]


@cache
def _announce(where: str) -> None:
    _tell(f"compiling the fast engine, {where}")


@cache
def _tell(what: str) -> None:
    """Once in a process."""
    print(f"moesim: {what}", file=sys.stderr)


@contextlib.contextmanager
def _alone(folder: Path | None) -> Iterator[None]:
    """One process at a time: what another is writing has no seal yet."""
    with contextlib.ExitStack() as stack:
        if folder is not None:
            with contextlib.suppress(OSError):
                _await(stack.enter_context((folder / LOCK).open("w")))
        yield


def _await(file: IO[str]) -> None:
    """Lock a file; or go on without, which costs no more than compiling twice."""
    deadline = time.monotonic() + LONGEST_WAIT_S
    while time.monotonic() < deadline:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            _tell("waiting for another process that compiles the fast engine")
            time.sleep(0.1)


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """A Ctrl-C that a callback of the compiler swallows is raised again afterwards."""
    pressed: list[int] = []

    def press(number: int, _: object) -> None:
        pressed.append(number)
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, press)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if pressed:
        raise KeyboardInterrupt


def _seal(files: Iterable[Path]) -> None:
    """Put a checksum beside each kept file: damaged machine code must never be run."""
    for path in files:
        beside = path.with_name(f".{path.name}.{os.getpid()}")
        beside.write_bytes(_checksum(path))
        beside.replace(path.with_name(path.name + SEAL))


def _distrust(folder: Path) -> None:
    """Remove what has no seal, or not its own: numba then compiles again."""
    for path in folder.rglob("*.nb?"):
        seal = path.with_name(path.name + SEAL)
        with contextlib.suppress(OSError):
            if not seal.exists() or seal.read_bytes() != _checksum(path):
                path.unlink()


def _checksum(path: Path) -> bytes:
    return hashlib.sha256(path.read_bytes()).hexdigest().encode()

"""Compiled code that was kept is run only if it is what was kept, for these very sources."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from moesim.engine import compiled


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    """What this process remembers of its cache folder."""
    compiled.cache_folder.cache_clear()
    compiled.source_digest.cache_clear()
    yield
    compiled.cache_folder.cache_clear()
    compiled.source_digest.cache_clear()


def kept(folder: Path, *, sealed: bool) -> Path:
    path = folder / "pycache" / "kernel.run-1.py311.1.nbc"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"machine code")
    if sealed:
        compiled._seal(folder)
    return path


def test_sealed_code_is_kept(tmp_path: Path) -> None:
    path = kept(tmp_path, sealed=True)
    compiled._distrust(tmp_path)
    assert path.exists()


def test_code_without_a_seal_is_removed(tmp_path: Path) -> None:
    path = kept(tmp_path, sealed=False)
    compiled._distrust(tmp_path)
    assert not path.exists()


@pytest.mark.parametrize("at", range(0, 12, 3))
def test_damaged_code_is_removed(tmp_path: Path, at: int) -> None:
    path = kept(tmp_path, sealed=True)
    damaged = bytearray(path.read_bytes())
    damaged[at] ^= 1
    path.write_bytes(bytes(damaged))
    compiled._distrust(tmp_path)
    assert not path.exists()


def test_damage_is_found_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOESIM_CACHE", str(tmp_path))
    folder = compiled.cache_folder()
    assert folder is not None and folder.parent.parent == tmp_path
    path = kept(folder, sealed=True)
    path.write_bytes(b"something else")
    compiled.cache_folder.cache_clear()
    assert compiled.cache_folder() == folder
    assert not path.exists()


def test_a_place_that_cannot_be_written_means_no_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    occupied = tmp_path / "file"
    occupied.write_text("in the way")
    monkeypatch.setenv("MOESIM_CACHE", str(occupied))
    assert compiled.cache_folder() is None


@pytest.mark.parametrize("name", ["engine/kernel.py", "policies/lru.py", "hashing.py", "log.py"])
def test_every_edit_is_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """An edit in a callee, which numba's own cache does not see."""
    copy = tmp_path / "moesim"
    shutil.copytree(compiled.ROOT, copy, ignore=shutil.ignore_patterns("__pycache__", "traces"))
    monkeypatch.setattr(compiled, "ROOT", copy)
    before = compiled.source_digest()
    with (copy / name).open("a") as file:
        file.write("\n# edited\n")
    compiled.source_digest.cache_clear()
    assert compiled.source_digest() != before

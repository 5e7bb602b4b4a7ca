"""Atomic file input and output.

Everything is written under a temporary name beside its target and renamed when it is complete, so that a
crash, Ctrl-C or a full disk leaves the earlier version untouched. Reading names the file and the remedy when
something is damaged. None of it executes code: JSON and safetensors only.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np


class ArtifactError(ValueError):
    """A file is missing, damaged or not what its name says; the message says which and what to do."""


class WriteError(OSError):
    """A file could not be written in full (for instance a full disk); nothing half-written was left."""


def plain(value: Any) -> Any:
    """Turn a value into what JSON can hold.

    Dataclasses become objects, tuples and arrays lists, paths strings. Numbers that are not finite become
    null, because JSON has no NaN and a result must not be lost over one.
    """
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value))
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, (list, tuple, range)):
        return [plain(v) for v in value]
    if isinstance(value, (np.generic, float)):
        item = value.item() if isinstance(value, np.generic) else value
        return None if isinstance(item, float) and not math.isfinite(item) else item
    return str(value) if isinstance(value, os.PathLike) else value


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn the failure of a write into a :class:`WriteError` that says what is lost: nothing."""
    from safetensors import SafetensorError

    try:
        yield
    except WriteError:
        raise
    except (OSError, SafetensorError) as error:
        # safetensors reports a full disk as its own error with the system's text inside.
        full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
        remedy = "free some space" if full else "check that the directory exists and may be written"
        raise WriteError(
            getattr(error, "errno", None) or (errno.ENOSPC if full else errno.EIO),
            f"could not write {path}: {error}. Nothing half-written was left and an earlier version is "
            f"untouched; {remedy} and run the same command again",
        ) from error


def _sync(path: Path) -> None:
    """Ask the system to put a file or directory on the disk before going on."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def write_file_atomic(path: str | Path, *, durable: bool = True) -> Iterator[Path]:
    """Context manager: temporary path that replaces ``path`` when the block succeeds.

    Args:
        path: The file to make or replace.
        durable: Wait until it is on the disk. Without it a power cut may cost this file.

    Raises:
        WriteError: If the disk is full or the directory cannot be written; ``path`` is then as before.
    """
    path = Path(path)
    temporary = path.parent / f".{path.name}.tmp"
    try:
        with _explained(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            if durable:
                _sync(temporary)
            os.replace(temporary, path)
    finally:
        with suppress(NotADirectoryError):  # which would hide the error above
            temporary.unlink(missing_ok=True)


def mend_dir(path: str | Path) -> Path:
    """Put a directory back that a process was killed in the middle of replacing; call it before reading one.

    Returns:
        The path, where there is now the earlier version if the process did not come to rename the later.
    """
    path = Path(path)
    if not path.exists() and _set_aside(path).exists():
        os.replace(_set_aside(path), path)
    return path


def _set_aside(path: Path) -> Path:
    """Where :func:`write_dir_atomic` keeps the earlier version for a moment."""
    return path.parent / f".{path.name}.old"


@contextmanager
def write_dir_atomic(path: str | Path, *, durable: bool = True) -> Iterator[Path]:
    """Context manager: temporary directory that replaces ``path`` when the block succeeds.

    An existing directory is replaced as a whole, but only if every file in it has a successor of the same
    name: what the new version does not contain is never deleted. One process at a time may write a path.

    Args:
        path: The directory to make or replace.
        durable: Wait until the files are on the disk. Without it a power cut may cost this directory.

    Raises:
        WriteError: If the disk is full, the directory cannot be written, or ``path`` holds files that the
            new directory lacks; ``path`` is then as before.
    """
    path = Path(path)
    temporary, old = path.parent / f".{path.name}.tmp", _set_aside(path)
    try:
        with _explained(path):
            if mend_dir(path).exists() and old.exists():  # a process was killed after the renames below
                shutil.rmtree(old)
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        with _explained(path):
            yield temporary
            if durable:
                for file in temporary.rglob("*"):
                    _sync(file)
            _swap(temporary, path, old)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _swap(new: Path, path: Path, old: Path) -> None:
    """Put ``new`` in the place of ``path`` by way of ``old``."""
    if not path.exists():
        os.replace(new, path)
        return
    lost = [f for f in path.rglob("*") if f.is_file() and not (new / f.relative_to(path)).exists()]
    if lost or not path.is_dir():
        raise WriteError(
            errno.EEXIST,
            f"{path} exists and holds {lost[0].relative_to(path) if lost else 'a file'}, which writing it "
            "anew would delete; choose another directory or move that away",
        )
    os.replace(path, old)
    try:
        os.replace(new, path)
    except BaseException:
        os.replace(old, path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def write_json_atomic(path: str | Path, obj: Any, *, durable: bool = True) -> None:
    """Write an object as indented JSON; see :func:`plain` for what it may contain.

    Raises:
        WriteError: If the file cannot be written; an earlier version is then untouched.
        TypeError: If the object holds something JSON cannot express.
    """
    text = json.dumps(plain(obj), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    with write_file_atomic(path, durable=durable) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_json(path: str | Path) -> Any:
    """Read a JSON file.

    Raises:
        ArtifactError: If it is missing or is not JSON.
    """
    path = Path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArtifactError(f"{path} does not exist; check the directory, or write it again.") from None
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read ({error.strerror}); check the path.") from error
    except ValueError as error:  # not UTF-8, or not JSON
        raise ArtifactError(
            f"{path} is not valid JSON ({error}): it was cut off or edited; restore it or write it again."
        ) from error


def save_safetensors(
    path: str | Path,
    tensors: Mapping[str, Any],
    metadata: Mapping[str, str] | None = None,
    *,
    durable: bool = True,
) -> None:
    """Write tensors (all torch, or all numpy) to a safetensors file.

    Args:
        path: The file.
        tensors: Name to ``torch.Tensor`` or ``numpy.ndarray``; made contiguous, so views may be given.
        metadata: Strings to store in the file's header.
        durable: Wait until it is on the disk, see :func:`write_file_atomic`.

    Raises:
        WriteError: If the file cannot be written; an earlier version is then untouched.
    """
    header = dict(metadata) if metadata else None
    with write_file_atomic(path, durable=durable) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode  # safetensors makes its files readable by the owner alone
        if all(isinstance(t, np.ndarray) for t in tensors.values()):
            from safetensors.numpy import save_file

            save_file({k: np.asarray(t, order="C") for k, t in tensors.items()}, temporary, header)
        else:
            from safetensors.torch import save_file as save_torch

            # A copy parts tensors that share memory, which the format cannot express.
            parted = {k: t.detach().cpu().clone().contiguous() for k, t in tensors.items()}
            save_torch(parted, temporary, header)
        temporary.chmod(mode)


def load_safetensors(path: str | Path, *, framework: str = "pt", device: str = "cpu") -> dict[str, Any]:
    """Read every tensor of a safetensors file.

    Args:
        path: The file.
        framework: ``"pt"`` for torch tensors, ``"np"`` for numpy arrays (does not import torch).
        device: Where torch tensors go.

    Raises:
        ArtifactError: If the file is missing, cut off or edited.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise ArtifactError(f"{path} does not exist; check the directory, or write it again.")
    try:
        with safe_open(path, framework=framework, device=device) as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise ArtifactError(
            f"{path} is not a readable safetensors file ({error}): it was cut off or edited; restore it "
            "(`git checkout`, reinstall, or download again) or train it again."
        ) from error


def sha256(path: str | Path) -> str:
    """Hexadecimal SHA-256 of a file, to notice edits that keep a file readable."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()

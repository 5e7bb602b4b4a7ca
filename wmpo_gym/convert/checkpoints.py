"""Safe reading, checking and copying of third-party weight files, without executing code from them.

Files are memory-mapped: a tensor takes memory only while it is accessed.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
import zipfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wmpo_gym.utils.io import ArtifactError, load_safetensors, read_json
from wmpo_gym.utils.memory import available_memory
from wmpo_gym.utils.progress import progress_bar

WRAPPERS = ("rm_model_state_dict", "model_state_dict", "state_dict", "model")
"""Keys under which training scripts put a state dict beside other things."""

_PATTERNS = ("*.safetensors.index.json", "*.safetensors", "*.bin.index.json", "*.pth", "*.pt", "*.bin")
_USUAL = ("model", "diffusion_pytorch_model", "pytorch_model")  # beside them lie other precisions
_DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_LISTED = 30  # names in an error message before it only counts

Layout = Mapping[str, tuple[int, ...]]


# -- reading -----------------------------------------------------------------------------------------------
def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Tensors by name, mapped into memory.

    Args:
        path: A safetensors file, an index of shards, a ``.pth``, ``.pt`` or ``.bin`` state dict (plain, or
            under one of :data:`WRAPPERS`), or a directory with one of these, or with them in ``model/``.

    Raises:
        ArtifactError: If there is no such file or there are several, a file is cut off, a shard is missing,
            or the file holds code.
    """
    path = Path(path)
    if path.is_dir():
        path = _find(path)
    if not path.is_file():
        raise ArtifactError(f"{path} does not exist; check the path, or download it again.")
    if path.suffix == ".json":
        return _read_shards(path)
    return _state_dict(_read_file(path), path)


def _find(directory: Path) -> Path:
    """The one weight file of a directory."""
    for folder in (directory / "model", directory):  # training checkpoints keep the weights in model/
        for pattern in _PATTERNS:
            found = sorted(folder.glob(pattern))
            usual = [file for file in found if file.name.removesuffix(pattern[1:]) in _USUAL]
            if len(chosen := usual or found) == 1:
                return chosen[0]
            if chosen:
                names = _listed([file.name for file in found])
                raise ArtifactError(
                    f"{folder} holds {len(found)} weight files ({names}) and no index of them. "
                    "Give the one to convert; if they are shards, download their *.index.json too."
                )
    raise ArtifactError(
        f"{directory} holds no weights; looked for {', '.join(_PATTERNS)}, there and in model/."
    )


def _read_shards(index: Path) -> dict[str, Tensor]:
    content = read_json(index)
    places = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(places, dict) or not places or not all(isinstance(p, str) for p in places.values()):
        raise ArtifactError(f"{index} is not an index of shards: it has no weight_map.")
    shards = sorted(set(places.values()))
    if absent := [s for s in shards if Path(s).name != s or not (index.parent / s).is_file()]:
        raise ArtifactError(
            f"{index.parent} lacks {len(absent)} of the {len(shards)} shards in {index.name}: "
            f"{_listed(absent)}. Download them again."
        )
    tensors: dict[str, Tensor] = {}
    for shard in shards:
        found = _state_dict(_read_file(index.parent / shard), index.parent / shard)
        if astray := [name for name, place in places.items() if place == shard and name not in found]:
            raise ArtifactError(
                f"{index.parent / shard} lacks {_listed(astray)}, which {index.name} says it holds. Shard "
                "and index are not of one download; fetch both again."
            )
        tensors |= found
    return tensors


def _read_file(path: Path) -> Any:
    return load_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)


def _read_torch(path: Path) -> Any:
    """Unpickle tensors and plain containers; whatever else is in the file is refused, not run."""
    from pickle import UnpicklingError

    mapped = zipfile.is_zipfile(path)
    if not mapped:  # the format before torch 1.6 has to be loaded as a whole
        check_memory(path.stat().st_size, str(path))
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # damaged files raise many kinds
        code = re.search(r"GLOBAL ([\w.]+)", str(error)) if isinstance(error, UnpicklingError) else None
        if code:
            raise ArtifactError(
                f"{path} is a pickle with code in it (it asks for {code[1]}) and was not opened any further: "
                "loading it could run anything. Ask its author for safetensors or a plain state dict."
            ) from None
        raise ArtifactError(
            f"{path} is not a readable PyTorch file: it was cut off, edited, or is something else. Download "
            "it again."
        ) from error


def _state_dict(content: Any, path: Path) -> dict[str, Tensor]:
    """The state dict in a file, without the prefix of distributed training."""
    if isinstance(content, Mapping):
        inner = [content[name] for name in WRAPPERS if isinstance(content.get(name), Mapping)]
        content = inner[0] if inner else content
    if not isinstance(content, Mapping) or not content:
        raise ArtifactError(f"{path} holds no state dict but a {type(content).__name__}.")
    if odd := [f"{name} ({type(v).__name__})" for name, v in content.items() if not isinstance(v, Tensor)]:
        raise ArtifactError(
            f"{path} holds more than tensors by name: {_listed(odd)}. Give a plain state dict."
        )
    return {str(name).removeprefix("module."): value for name, value in content.items()}


# -- comparing ---------------------------------------------------------------------------------------------
def check_layout(
    found: Mapping[str, Tensor], expected: Layout, what: str, dead: Collection[str] = ()
) -> list[str]:
    """Compare names and shapes with what is expected.

    Args:
        found: From :func:`read_weights`.
        expected: Shapes by name.
        what: What the tensors should be, for the message.
        dead: Names that may be there as well and are dropped.

    Returns:
        The names in ``found`` that are dead, sorted.

    Raises:
        ArtifactError: If a name is missing or too much, a shape is another, or a tensor holds no floating
            point numbers of 16 or 32 bits; the message lists them.
    """
    shapes = {name: tuple(value.shape) for name, value in found.items()}
    problems = {
        "missing": [name for name in expected if name not in shapes],
        "unknown": [name for name in shapes if name not in expected and name not in dead],
        "of another shape": [
            f"{name} {shapes[name]} instead of {tuple(shape)}"
            for name, shape in expected.items()
            if name in shapes and shapes[name] != tuple(shape)
        ],
        "of another type": [
            f"{name} {found[name].dtype}"
            for name in expected
            if name in found and found[name].dtype not in _DTYPES
        ],
    }
    told = [f"{len(names)} {kind}: {_listed(sorted(names))}" for kind, names in problems.items() if names]
    if told:
        raise ArtifactError(
            f"This is not {what}. Of {len(expected)} tensors, {'; '.join(told)}. Give the released file, or "
            "the one of the right size, task and component."
        )
    return sorted(name for name in shapes if name in dead)


def _listed(names: list[str]) -> str:
    more = len(names) - _LISTED
    return ", ".join(names[:_LISTED]) + (f" and {more} more" if more > 0 else "")


# -- room --------------------------------------------------------------------------------------------------
def size_of(tensors: Mapping[str, Tensor]) -> int:
    """Bytes of some tensors."""
    return sum(t.numel() * t.element_size() for t in tensors.values())


def check_disk(directory: str | Path, needed: int) -> None:
    """Refuse to begin what will not fit on the disk.

    Args:
        directory: Where files are to be written; need not exist.
        needed: Their bytes.

    Raises:
        ArtifactError: If less is free.
    """
    place = Path(directory).resolve()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if needed > free:
        raise ArtifactError(
            f"Writing {directory} takes {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are free there. Free "
            "some space or choose another disk."
        )


def check_memory(needed: int, what: str) -> None:
    """Refuse to begin what will not fit into memory; without a figure from the system, do not.

    Args:
        needed: Bytes.
        what: What needs them.

    Raises:
        ArtifactError: If less is available.
    """
    available = available_memory()
    if available is not None and needed > available:
        raise ArtifactError(
            f"{what} takes {needed / 1e9:.1f} GB of memory and {available / 1e9:.1f} GB are available. Close "
            "other programs or use a larger machine."
        )


# -- writing -----------------------------------------------------------------------------------------------
def copy_safetensors(path: str | Path, tensors: Mapping[str, Tensor], *, desc: str = "writing") -> None:
    """Write a safetensors file, one tensor in memory at a time.

    :func:`~wmpo_gym.utils.io.save_safetensors` holds all of them, which for a 7B policy is 15 GB. To be
    used inside :func:`~wmpo_gym.utils.io.write_dir_atomic`.

    Args:
        path: The file.
        tensors: float32, float16 or bfloat16; views are written as what they show.
        desc: Beside the progress bar.
    """
    # Large elements first: every tensor then begins at a multiple of its element's size.
    ordered = sorted(tensors.items(), key=lambda item: -item[1].element_size())
    header: dict[str, Any] = {}
    end = 0
    for name, value in ordered:
        begin, end = end, end + value.numel() * value.element_size()
        header[name] = {
            "dtype": _DTYPES[value.dtype],
            "shape": list(value.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file, progress_bar(ordered, desc=desc, unit="tensor") as bar:
        file.write(struct.pack("<Q", len(text)) + text)
        for _, value in bar:
            file.write(value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())

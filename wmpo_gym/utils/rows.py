"""Dataclasses of arrays with one row per episode: select rows, overwrite rows, move, store."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor
    from typing_extensions import Self

Array = TypeVar("Array", "Tensor", np.ndarray)


class Rows:
    """Base class of a dataclass whose fields are NumPy arrays with the same leading dimension."""

    def __len__(self) -> int:
        return len(self._items()[0][1])

    def rows(self, index: Any) -> Self:
        """A copy of some rows; ``index`` as for an array: integers, a bool mask or a slice."""
        return type(self)(**{name: self._take(value, index) for name, value in self._items()})

    def assign(self, index: Any, other: Self) -> None:
        """Overwrite some rows in place with those of ``other``, in order."""
        for name, value in self._items():
            value[index] = getattr(other, name)

    def to_dict(self) -> dict[str, np.ndarray]:
        """Copies as NumPy arrays, for storage; :meth:`from_dict` restores them exactly."""
        return {name: np.array(value) for name, value in self._items()}

    @classmethod
    def from_dict(cls, arrays: Mapping[str, np.ndarray]) -> Self:
        """Rebuild from :meth:`to_dict`.

        Raises:
            ValueError: If an array is missing.
        """
        names = [f.name for f in fields(cls)]  # type: ignore[arg-type]
        if missing := [name for name in names if name not in arrays]:
            raise ValueError(f"{cls.__name__} needs {' and '.join(names)}; it lacks {missing}.")
        return cls(**{name: cls._restored(arrays[name]) for name in names})

    def _items(self) -> list[tuple[str, Any]]:
        return [(f.name, getattr(self, f.name)) for f in fields(self)]  # type: ignore[arg-type]

    @staticmethod
    def _take(value: Any, index: Any) -> Any:
        return np.array(value[index])

    @staticmethod
    def _restored(array: np.ndarray) -> Any:
        return np.array(array)


class TensorRows(Rows):
    """Base class of a dataclass whose fields are tensors with the same leading dimension."""

    def assign(self, index: Any, other: Self) -> None:
        """Overwrite some rows in place with those of ``other``, in order, converting device and dtype."""
        for name, value in self._items():
            value[_tensor_index(index)] = getattr(other, name).to(value)

    def to(self, device: Any) -> Self:
        """Copy on a device."""
        return type(self)(**{name: value.to(device) for name, value in self._items()})

    def to_dict(self) -> dict[str, np.ndarray]:
        """Copies as NumPy arrays, for storage; :meth:`from_dict` restores them exactly, on the CPU."""
        return {name: value.cpu().numpy().copy() for name, value in self._items()}

    @classmethod
    def concatenate(cls, parts: list[Self]) -> Self:
        """Concatenate the rows of several instances."""
        import torch

        names = [f.name for f in fields(cls)]  # type: ignore[arg-type]
        return cls(**{name: torch.cat([getattr(part, name) for part in parts]) for name in names})

    @staticmethod
    def _take(value: Any, index: Any) -> Any:
        taken = value[_tensor_index(index)]
        return taken.clone() if isinstance(index, slice) else taken  # a slice shares memory

    @staticmethod
    def _restored(array: np.ndarray) -> Any:
        import torch

        return torch.from_numpy(np.array(array))


def pad_rows(values: Array, n: int) -> Array:
    """Repeat the last row until there are ``n``; unchanged if there are at least ``n``.

    CPU kernels round small batches differently from larger ones, so a row in a batch that is too small would
    depend on its batch.
    """
    last = len(values) - 1
    return values if len(values) >= n else values[[min(i, last) for i in range(n)]]


def _tensor_index(index: Any) -> Any:
    import torch

    return torch.as_tensor(index) if isinstance(index, (np.ndarray, list)) else index

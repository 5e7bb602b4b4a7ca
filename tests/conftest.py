"""Fixtures shared by every test folder."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

# MKL chooses its kernels by the processor, and some round up to 1e-5 away from the reference vectors. These
# round alike everywhere; it is read once, before the first matrix product.
os.environ.setdefault("MKL_CBWR", "COMPATIBLE")

GOLDEN = Path(__file__).parent / "golden"


def pytest_itemcollected(item: pytest.Item) -> None:
    """Let ``pytest -k golden`` find every test that reads a reference vector, whatever its name."""
    if "golden" in getattr(item, "fixturenames", ()):
        item.extra_keyword_matches.add("golden")


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Tests run beside other work; one thread is as fast on tensors this small."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def golden() -> Callable[[str], tuple[dict[str, Any], dict[str, Any]]]:
    """Loader of reference vectors: ``golden(name) -> (tensors, meta)``.

    ``tests/golden/NAME.safetensors`` holds torch tensors computed by the published code on tiny inputs and
    ``NAME.json`` the configuration, seeds and checks that belong to them.
    """
    from safetensors.torch import load_file

    def load(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
        meta = json.loads((GOLDEN / f"{name}.json").read_text(encoding="utf-8"))
        return load_file(GOLDEN / f"{name}.safetensors"), meta

    return load


@pytest.fixture(scope="session")
def pretend_device() -> Iterator[Callable[..., Any]]:
    """``pretend_device(function, *args)``: call with a device that refuses tensors of the CPU.

    See ``pretend_device.py``; the function gets the device's name before the other arguments.
    """
    from pretend_device import DEVICE, apart

    with apart() as run:
        yield lambda function, *args: run(function, DEVICE, *args)

"""Devices and precisions a user asks for."""

from __future__ import annotations

import pytest
import torch

from wmpo_gym.utils.device import check_precision, resolve_device


def test_auto_is_the_gpu_if_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == torch.device("cpu") and resolve_device("cpu").type == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device("auto").type == "cuda"
    assert resolve_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(ValueError, match="no device 'cuda:2'; it has cpu, cuda:0, cuda:1"):
        resolve_device("cuda:2")


def test_a_missing_or_unknown_device_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="no device 'cuda'; it has cpu"):
        resolve_device("cuda")
    with pytest.raises(ValueError, match="Unknown device 'gpu'"):
        resolve_device("gpu")


def test_bf16_is_refused_where_it_does_not_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_precision("fp32", "cpu") == "fp32"
    with pytest.raises(ValueError, match="fp32"):
        check_precision("bf16", "cpu")
    with pytest.raises(ValueError, match="Unknown precision 'fp16'"):
        check_precision("fp16", "cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Old GPU")
    with pytest.raises(ValueError, match="Old GPU does not compute in bfloat16"):
        check_precision("bf16", "cuda")

"""Validation of device and precision."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

Precision = Literal["fp32", "bf16"]
PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16")


def resolve_device(device: str | torch.device = "auto") -> torch.device:
    """Resolve and check a requested device.

    Args:
        device: ``"auto"`` (a GPU if there is one, else the CPU), ``"cpu"``, ``"cuda"``, ``"cuda:1"``, or any
            other device of torch.

    Raises:
        ValueError: If the device is unavailable; the message lists the available ones.
    """
    import torch

    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"Unknown device {device!r}; choose auto, cpu, cuda or cuda:<index>.") from error
    if found.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (found.index or 0) >= count:
            there = ", ".join(["cpu", *(f"cuda:{i}" for i in range(count))])
            raise ValueError(
                f"This machine has no device {str(device)!r}; it has {there}. Choose one of these, or "
                "'auto'. If there is a GPU, check that this build of torch supports it "
                "(torch.cuda.is_available())."
            )
    return found


def check_precision(precision: str, device: str | torch.device) -> Precision:
    """Check that a device supports a requested precision.

    Args:
        precision: ``"fp32"``, or ``"bf16"`` for bfloat16 autocast with float32 weights.
        device: Device of the computation, see :func:`resolve_device`.

    Raises:
        ValueError: If the precision is unknown or the device does not support it.
    """
    import torch

    if precision not in PRECISIONS:
        raise ValueError(f"Unknown precision {precision!r}; choose one of {', '.join(PRECISIONS)}.")
    if precision == "bf16":
        found = resolve_device(device)
        if found.type == "cpu":
            raise ValueError(
                "bf16 on a CPU is many times slower than fp32; use precision fp32 there, or a GPU "
                "(--device cuda)."
            )
        if found.type == "cuda" and not torch.cuda.is_bf16_supported():
            name = torch.cuda.get_device_name(found)
            raise ValueError(f"{name} does not compute in bfloat16; use precision fp32.")
    return "bf16" if precision == "bf16" else "fp32"

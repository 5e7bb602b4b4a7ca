"""A torch device for tests, kept apart from the CPU as a GPU is, that computes its numbers on the CPU.

Whatever runs on ``DEVICE`` and gives the numbers of the CPU has every tensor where a GPU would need it.
Operations on tensors of both devices, CPU generators that are to fill a tensor of this device, and
``.numpy()`` are errors; ``.to(...)``, ``.cpu()`` and ``copy_`` move. What CUDA allows is allowed: CPU scalars
in arithmetic, and CPU indices. The device has its own random number generator, whose numbers differ from the
CPU's for the same seed. It shows nothing about speed, memory or half precision.

Registering the device cannot be undone and changes how modules are moved. So tests run their function in a
process of its own (:func:`apart`, the fixture ``pretend_device`` of ``conftest.py``), and no other test is
affected.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from typing import Any

DEVICE = "pretend:0"


@contextmanager
def apart() -> Iterator[Callable[..., Any]]:
    """A function ``run(function, *args)`` that calls in a process that has the device.

    ``function`` must be importable by name; what it takes and returns travels between the processes, so it
    returns numbers or CPU tensors. An exception arrives with its traceback.
    """
    with ProcessPoolExecutor(1, get_context("spawn"), initializer=_register) as pool:
        yield lambda function, *args: pool.submit(function, *args).result()


def _register() -> None:
    """Make the device exist in this process."""
    import torch
    from torch.utils import _pytree as pytree
    from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
    from torch.utils.backend_registration import (
        _DummyBackendModule,
        _setup_privateuseone_for_python_backend,
    )

    aten = torch.ops.aten
    moves = {aten._to_copy.default, aten.copy_.default}
    takes_cpu_indices = {
        aten.index.Tensor,
        aten._unsafe_index.Tensor,
        aten.index_put.default,
        aten.index_put_.default,
        aten._index_put_impl_.default,
    }
    generator = torch.Generator().manual_seed(2**20)

    class Backend(_DummyBackendModule):
        """What ``torch.pretend`` offers."""

        def manual_seed_all(self, seed: int) -> None:
            generator.manual_seed(seed ^ 2**20)

        def get_rng_state(self, device: Any = None) -> torch.Tensor:
            return generator.get_state()

        def set_rng_state(self, state: torch.Tensor, device: Any = None) -> None:
            generator.set_state(state)

        def get_amp_supported_dtype(self) -> list[torch.dtype]:
            return [torch.bfloat16]

        def synchronize(self, device: Any = None) -> None:
            pass

        def empty_cache(self) -> None:
            pass

    _setup_privateuseone_for_python_backend("pretend", backend_module=Backend())
    device = torch.device(DEVICE)

    def is_ours(place: Any) -> bool:
        return place is not None and torch.device(place).type == device.type

    class PretendTensor(torch.Tensor):
        """A tensor on the device: its numbers are those of the CPU tensor ``inner``."""

        inner: torch.Tensor
        __torch_function__ = torch._C._disabled_torch_function_impl

        @staticmethod
        def __new__(cls, inner: torch.Tensor) -> PretendTensor:
            tensor = torch.Tensor._make_wrapper_subclass(
                cls,
                inner.size(),
                strides=inner.stride(),
                storage_offset=inner.storage_offset(),
                dtype=inner.dtype,
                layout=inner.layout,
                device=device,
            )
            tensor.inner = inner
            return tensor

        def __repr__(self) -> str:
            return f"{self.inner!r} on {DEVICE}"

        def tolist(self) -> Any:
            return self.inner.tolist()

        @classmethod
        def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return compute(func, args, kwargs or {})

    def compute(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Call an operation with the tensors' CPU numbers, if a GPU would not refuse to."""
        tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        has_ours = any(isinstance(tensor, PretendTensor) for tensor in tensors)
        place = kwargs.get("device")
        if has_ours and func not in moves:
            indexes_ours = func in takes_cpu_indices and isinstance(args[0], PretendTensor)
            for tensor in tensors:
                if not isinstance(tensor, PretendTensor) and tensor.dim() > 0 and not indexes_ours:
                    raise RuntimeError(
                        "Expected all tensors to be on the same device, but found at least two devices, "
                        f"{DEVICE} and cpu ({func})."
                    )
        result_is_ours = is_ours(place) if place is not None else has_ours
        is_random = torch.Tag.nondeterministic_seeded in func.tags
        if result_is_ours and kwargs.get("generator") is not None:
            raise RuntimeError(f"Expected a generator of {DEVICE} but found one of the CPU ({func}).")
        if is_ours(place):
            kwargs = {**kwargs, "device": torch.device("cpu")}
        cpu_args, cpu_kwargs = pytree.tree_map_only(PretendTensor, lambda t: t.inner, (args, kwargs))
        cpu_state = torch.get_rng_state() if is_random and result_is_ours else None
        if cpu_state is not None:
            torch.set_rng_state(generator.get_state())
        try:
            out = func(*cpu_args, **cpu_kwargs)
        finally:
            if cpu_state is not None:
                generator.set_state(torch.get_rng_state())
                torch.set_rng_state(cpu_state)
        if func is aten.copy_.default:
            return args[0]
        if not result_is_ours:
            return out
        wrapped = pytree.tree_map_only(torch.Tensor, PretendTensor, out)
        if func._schema.is_mutable and has_ours:
            return return_and_correct_aliasing(func, args, kwargs, wrapped)
        return wrapped

    class Mode(TorchDispatchMode):
        """Lets ``device="pretend:0"`` make tensors."""

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            leaves = pytree.tree_leaves((args, kwargs))
            if is_ours(kwargs.get("device")) or any(isinstance(leaf, PretendTensor) for leaf in leaves):
                return compute(func, args, kwargs)
            return func(*args, **kwargs)

    # Saving looks for weights that share memory by their address, which belongs to the CPU tensor here.
    import safetensors.torch
    from huggingface_hub.serialization import _torch as huggingface

    address = safetensors.torch.storage_ptr
    for library in (safetensors.torch, huggingface):
        library.storage_ptr = lambda t: address(t.inner if isinstance(t, PretendTensor) else t)

    torch.set_num_threads(1)
    # torch.tensor(data, device=...) is made on the CPU and moved.
    torch._C._set_only_lift_cpu_tensors(True)
    # A parameter that is moved stays the same object, as on a GPU: optimizers made before still hold it.
    torch.__future__.set_swap_module_params_on_conversion(True)
    Mode().__enter__()

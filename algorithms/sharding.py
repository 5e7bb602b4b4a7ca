"""A policy too large for one GPU, spread over the ranks: weights, gradients and optimizer (FSDP2).

It is switched on where users of accelerate switch it on: in the configuration file that ``accelerate launch``
is given, or with ``ACCELERATE_USE_FSDP=true`` before ``torchrun``. Every forward pass then is a meeting of
all ranks, which gather the weights layer by layer.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch as th
from torch import nn

from wmpo_gym.algorithms.distributed import Ranks, is_sharded
from wmpo_gym.policies.base import policy_generators

if TYPE_CHECKING:
    from wmpo_gym.algorithms.group_algorithm import GroupAlgorithm


def sharding_wanted() -> bool:
    """Whether this process was launched with accelerate's FSDP switched on."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("1", "true")


def mixed_precision() -> str:
    """What accelerate was told under ``mixed_precision``."""
    return os.environ.get("ACCELERATE_MIXED_PRECISION", "no")


def whole(tensor: Any) -> th.Tensor:
    """A tensor put together from its parts, a meeting of all ranks; others are returned as they are."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def whole_state(state: Mapping[str, th.Tensor], ranks: Ranks) -> dict[str, th.Tensor]:
    """A state dictionary with whole tensors, on the main rank; the others help and get an empty one."""
    found = {}
    for name, value in state.items():
        tensor = whole(value)
        if ranks.is_main:
            found[name] = tensor.cpu() if is_sharded(value) else tensor
    return found


def spread_like(value: th.Tensor, like: Any) -> th.Tensor:
    """This rank's part of a tensor that every rank holds whole, cut as ``like`` is."""
    if not is_sharded(like) or value.shape != like.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    value = value.to(like.device, like.dtype)
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)


def spread_state(module: nn.Module, state: Mapping[str, th.Tensor]) -> dict[str, th.Tensor]:
    """A state dictionary of whole tensors, cut as the module's are."""
    now = module.state_dict()
    return {k: spread_like(v, now[k]) if k in now else v for k, v in state.items()}


def spread_slots(optimizer: th.optim.Optimizer, tensors: Mapping[str, th.Tensor]) -> dict[str, th.Tensor]:
    """Slots of :func:`~wmpo_gym.data.optimizer_state.pack_optimizer`, cut as the parameters are."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return {k: spread_like(v, parameters[int(k.split(".", 1)[0])]) for k, v in tensors.items()}


def shard(policy: Any, ranks: Ranks) -> None:
    """Spread the weights of ``policy.network`` over the ranks, in place, and its optimizer with them.

    Every rank must hold the same weights. What is gathered at a time is one of the layers that transformers
    calls not to be split, or that the configuration names (``fsdp_transformer_layer_cls_to_wrap``).

    Args:
        policy: Calls its ``network``, a module, for every decision; its ``optimizer`` trains nothing else.
        ranks: The processes.

    Raises:
        TypeError: If the policy is built otherwise.
        ValueError: If the weights are of several types, or the configuration asks for what is not offered.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    network: Any = getattr(policy, "network", None)
    trained = [p for group in policy.optimizer.param_groups for p in group["params"]]
    names = {p: n for n, p in network.named_parameters()} if isinstance(network, nn.Module) else {}
    if not all(p in names for p in trained):
        raise TypeError(
            f"FSDP spreads `policy.network`, and {type(policy).__name__} trains weights outside of it; put "
            "them into one module of that name that is called for every decision, or train without FSDP."
        )
    if len(types := sorted({str(p.dtype) for p in network.parameters()})) > 1:
        raise ValueError(
            f"FSDP wants weights of one type, this policy has {', '.join(types)}: with adapters keep the "
            "frozen ones in float32 too, not quantised; accelerate's mixed_precision: bf16 computes in bf16."
        )
    layers, options = _options(network)
    options["mesh"] = init_device_mesh(ranks.device.type, (ranks.size,))
    for module in reversed(list(network.modules())):  # the inner ones first
        if type(module).__name__ in layers:
            fully_shard(module, **options)
    fully_shard(network, **options)
    sharded = dict(network.named_parameters())
    moments = {sharded[names[p]]: slots for p, slots in policy.optimizer.state.items()}
    policy.optimizer.state.clear()
    for parameter, slots in moments.items():
        policy.optimizer.state[parameter] = {k: spread_like(v, parameter) for k, v in slots.items()}
    for group in policy.optimizer.param_groups:
        group["params"] = [sharded[names[p]] for p in group["params"]]


def line_up(model: GroupAlgorithm) -> None:
    """Let every rank start from the main rank's weights and random states, sharded if that is wanted.

    Raises:
        ValueError: If the envs of the ranks differ in size, or half precision is wanted without FSDP.
    """
    ranks = model.ranks
    if ranks.size == 1:
        return
    if mixed_precision() != "no" and not sharding_wanted():
        raise ValueError(
            f"mixed_precision {mixed_precision()!r} of the accelerate configuration has an effect with FSDP "
            "only; set it to 'no', or distributed_type to FSDP."
        )
    rows = ranks.gather(model.n_envs)
    if len(set(rows)) > 1:
        raise ValueError(f"The envs of the processes have {rows} rows; give every process as many.")
    model.group_rng.bit_generator.state = ranks.gather(model.group_rng.bit_generator.state)[0]
    for module in (getattr(model, name) for name in model._modules()):
        for generator in policy_generators(module).values():
            generator.set_state(ranks.gather(generator.get_state())[0])
        if not model.sharded:
            ranks.copy_main([*module.parameters(), *module.buffers()])
            if sharding_wanted():
                shard(module, ranks)
    model.sharded = sharding_wanted()


def _options(network: nn.Module) -> tuple[set[str], dict[str, Any]]:
    """Classes of the layers gathered one by one, and ``fully_shard``'s arguments, as accelerate was told."""
    from accelerate import FullyShardedDataParallelPlugin
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy

    plugin = FullyShardedDataParallelPlugin(fsdp_version=int(os.environ.get("FSDP_VERSION", "2")))
    refused = {
        "fsdp_version: 1": plugin.fsdp_version != 2,
        "fsdp_offload_params": isinstance(plugin.cpu_offload, CPUOffloadPolicy),
        "fsdp_activation_checkpointing": plugin.activation_checkpointing,
        "fsdp_cpu_ram_efficient_loading": plugin.cpu_ram_efficient_loading,
    }
    if asked := [name for name, wanted in refused.items() if wanted]:
        raise ValueError(f"{', '.join(asked)} is not offered; take it out of the accelerate configuration.")
    precision = {"no": None, "bf16": th.bfloat16}
    if (wanted := mixed_precision()) not in precision:
        raise ValueError(f"mixed_precision {wanted!r} is not offered; choose {' or '.join(precision)}.")
    # Weights and moments stay float32, as published; only the passes are in half precision.
    dtypes = MixedPrecisionPolicy(param_dtype=precision[wanted], reduce_dtype=th.float32)
    named = plugin.transformer_cls_names_to_wrap
    if not named:
        named = [name for m in network.modules() for name in getattr(m, "_no_split_modules", None) or ()]
    return set(named), {"mp_policy": dtypes, "reshard_after_forward": plugin.reshard_after_forward}

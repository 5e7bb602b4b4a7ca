"""Estimate of a run's parameters, memory and computation before anything is loaded.

Every network is built on the ``meta`` device, and one forward and backward pass is run there while operations
and bytes are counted (:mod:`~wmpo_gym.capacity.meter`); there are no formulas per architecture. Assumptions:
AdamW with float32 weights, gradients and two moments; bfloat16 copies of trained weights under autocast; with
FSDP, the two largest layers and all weights outside layers are gathered at the same time; and a share
:data:`RESERVE` of the device's memory for everything that is not counted.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from wmpo_gym.capacity.meter import Cost, measure
from wmpo_gym.capacity.workload import Workload
from wmpo_gym.policies.memory import PolicyMemory
from wmpo_gym.policies.processor import prepare_images
from wmpo_gym.policies.weights import add_lora, checkpoint_activations

GIB = 2**30
RESERVE = 0.08
"""Share of a device's memory reserved for driver, workspaces and fragmentation; assumed, not measured."""
FLOAT32, HALF, ADAM_MOMENTS = 4, 2, 8  # bytes per number
FOUR_BIT = 0.5 + 4 / 64  # bytes: half a byte, and a float32 scale for every 64 numbers
LORA_RANK = 32  # rank of the published fine-tuning (WMPO release)


@dataclass(frozen=True)
class Option:
    """Memory options of a training run.

    Attributes:
        memory: Memory settings of the policy.
        offload: Whether the world model is moved to the CPU during updates.
        sharded: Whether the policy is sharded over the GPUs (FSDP).
    """

    memory: PolicyMemory
    offload: bool = False
    sharded: bool = False

    def flags(self) -> str:
        """Command-line options of ``wmpo train grpo``, and a note if FSDP is needed."""
        memory = self.memory
        parts = [
            f"--lora-rank {memory.lora_rank}" if memory.lora_rank else "",
            f"--precision {memory.precision}" if memory.precision != "fp32" else "",
            "--four-bit" if memory.four_bit else "",
            "--gradient-checkpointing" if memory.gradient_checkpointing else "",
            "--offload" if self.offload else "",
            "with FSDP" if self.sharded else "",
        ]
        return " ".join(part for part in parts if part) or "as it is"


@dataclass(frozen=True)
class Footprint:
    """Peak memory of one device in bytes.

    Attributes:
        imagining: Peak during rollout collection.
        updating: Peak during the policy update.
        parts: Components of the peaks.
    """

    imagining: int
    updating: int
    parts: dict[str, int]

    @property
    def peak(self) -> int:
        """The larger of the two."""
        return max(self.imagining, self.updating)


@dataclass(frozen=True)
class WorldCost:
    """Cost of imagination for a given batch size.

    Attributes:
        flops: Operations per full-length rollout, by component.
        peak: Peak memory in bytes in addition to the weights.
        row_bytes: Bytes of a row's state between two steps.
    """

    flops: dict[str, float]
    peak: int
    row_bytes: int


@dataclass(frozen=True)
class PolicySize:
    """Parameter counts of a policy's network.

    Attributes:
        trained: Trainable parameters.
        frozen: Frozen parameters.
        quantised: Frozen parameters stored in 4 bits.
        gathered: Parameters gathered at the same time under FSDP.
    """

    trained: int
    frozen: int
    quantised: int
    gathered: int

    def weights(self, memory: PolicyMemory) -> int:
        """Memory of the weights in bytes."""
        frozen = HALF if memory.precision == "bf16" else FLOAT32
        kept = frozen * (self.frozen - self.quantised) + FOUR_BIT * self.quantised
        return round(FLOAT32 * self.trained + kept)


class Estimator:
    """Estimator of the cost of a workload; results are cached.

    Args:
        workload: The run.
    """

    def __init__(self, workload: Workload) -> None:
        self.workload = workload
        self.world_cost = lru_cache(maxsize=None)(self._measure_world)
        self._policy = lru_cache(maxsize=None)(self._build_policy)
        self._policy_cost = lru_cache(maxsize=None)(self._measure_policy)

    # -- parameters ------------------------------------------------------------------------------------------
    @cached_property
    def _base_policy(self) -> nn.Module:
        return self.workload.build_policy()

    @cached_property
    def _parts(self) -> dict[str, Any]:
        world = self.workload.world
        if world is None:
            return {}
        parts = {
            "world model": world.network,
            "autoencoder": world.autoencoder,
            "classifier": world.classifier,
        }
        return {name: component.build() for name, component in parts.items()}

    @cached_property
    def parameters(self) -> dict[str, int]:
        """Parameter count of every component."""
        counts = {"policy": _count(self._base_policy)}
        for name, part in self._parts.items():
            counts[name] = _count(getattr(part, "vae", part))
        return counts

    # -- the world -------------------------------------------------------------------------------------------
    def _measure_world(self, rows: int) -> WorldCost:
        world, (network, autoencoder, classifier) = self.workload.world, self._parts.values()
        assert world is not None
        policy, side = self.workload.policy, self.workload.image_size // autoencoder.downscale
        shape = (rows, autoencoder.latent_channels)
        with torch.device("meta"):
            context = torch.empty(*shape, world.sampling.context_frames, side, side)
            latents = torch.empty(*shape, policy.chunk, side, side)
            actions = torch.empty(rows, policy.chunk, policy.action_dim)
            previous, time = torch.empty(rows, policy.action_dim), torch.empty(rows)
            frames = torch.empty(rows, policy.chunk, *[self.workload.image_size] * 2, 3, dtype=torch.uint8)
        known = [context, latents, actions, previous, time, frames]
        known += [t for part in self._parts.values() for t in _tensors(getattr(part, "vae", part))]
        with torch.no_grad():
            encode = measure(lambda: network.encode_context(context, previous, time), known)
            cache = network.encode_context(context, previous, time)
            known += [leaf for leaf in tree_leaves(cache) if isinstance(leaf, Tensor)]
            denoise = measure(lambda: network.denoise(latents, time, actions, cache), known)
            start = measure(lambda: autoencoder.encode(frames[:, :1]), known)
            decode = measure(lambda: autoencoder.decode(latents), known)
            prepare = measure(lambda: classifier.preprocess(frames.flatten(0, 1)), known)
            processed = classifier.preprocess(frames[:, 0])
            clips = processed.new_empty(rows * policy.chunk, classifier.window, *processed.shape[1:])
            classify = measure(lambda: classifier.logits(clips), [*known, clips])
        n_chunks, horizon = self.workload.n_chunks, self.workload.horizon
        windows = min(horizon, horizon - classifier.window + 2)
        steps = world.sampling.denoising_steps
        return WorldCost(
            flops={
                "world model": n_chunks * (encode.flops + steps * denoise.flops) / rows,
                "autoencoder": (start.flops + n_chunks * decode.flops) / rows,
                "classifier": windows * classify.flops / (rows * policy.chunk),
            },
            peak=max(
                encode.peak,
                encode.kept + denoise.peak,
                decode.peak,
                prepare.peak + clips.nbytes,
                clips.nbytes + classify.peak,
            ),
            row_bytes=(context.nbytes + previous.nbytes) // rows
            + (classifier.window - 1) * processed[0].nbytes,
        )

    # -- the policy ------------------------------------------------------------------------------------------
    def _build_policy(self, memory: PolicyMemory, sharded: bool) -> nn.Module:
        """The policy's network with its weights in the compute data types."""
        network = copy.deepcopy(self._base_policy)
        if lora := self.workload.lora or memory.lora:
            add_lora(network, lora)
        if memory.gradient_checkpointing:
            checkpoint_activations(network)  # type: ignore[arg-type]
        if memory.precision == "bf16":
            for module in network.modules():
                copied = isinstance(module, (nn.Linear, nn.Conv2d))  # autocast copies trained weights
                for parameter in module.parameters(recurse=False):
                    if copied or sharded or not parameter.requires_grad:
                        parameter.data = parameter.data.to(torch.bfloat16)
        for parameter in network.parameters():
            parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
        return network.train()

    def _measure_policy(self, memory: PolicyMemory, sharded: bool, rows: int, update: bool) -> Cost:
        """Cost of sampling ``rows`` decisions or, with ``update``, of training on them."""
        network, config = self._policy(memory, sharded), self.workload.policy
        side, tokens = self.workload.image_size, self.workload.text_tokens
        with torch.device("meta"):
            pixels = torch.empty(rows, side, side, 3, dtype=torch.uint8)
            text = torch.empty(rows, tokens, config.bytes_per_token, dtype=torch.int64)
            length, trace = torch.empty_like(text[:, 0, 0]), text.new_empty(rows, config.n_tokens, 1)

        def decide() -> None:
            with torch.set_grad_enabled(update):
                log_probs = torch.log_softmax(network(prepare_images(pixels, config), text, length), dim=-1)
                entropy = -(log_probs.exp() * log_probs).sum(dim=-1)
                chosen = log_probs.gather(-1, trace)
                if update:
                    chosen.sum().backward()
                del entropy

        known = [pixels, text, length, trace, *_tensors(network)]
        return measure(decide, known, torch.bfloat16 if memory.precision == "bf16" else None)

    def policy_size(self, memory: PolicyMemory) -> PolicySize:
        """Parameter counts of the policy's network."""
        network: Any = self._policy(memory, False)
        layers = _layers(network)
        inside = {id(p) for layer in layers for p in layer.parameters()}
        language = network.language_model.model.layers
        linear = [m for m in language.modules() if type(m) is nn.Linear and not m.weight.requires_grad]
        largest = sorted(map(_count, layers))[-2:]
        return PolicySize(
            trained=sum(p.numel() for p in network.parameters() if p.requires_grad),
            frozen=sum(p.numel() for p in network.parameters() if not p.requires_grad),
            quantised=sum(m.weight.numel() for m in linear) if memory.four_bit else 0,
            gathered=sum(largest) + sum(p.numel() for p in network.parameters() if id(p) not in inside),
        )

    def _rows(self, ranks: int) -> int:
        """Rollouts per device."""
        return -(-self.workload.n_groups // ranks) * self.workload.group_size

    def _sampling(self, option: Option, rows: int) -> Cost:
        """Cost of one decision of every row."""
        memory = replace(option.memory, four_bit=False, gradient_checkpointing=False)  # no effect on sampling
        return self._policy_cost(memory, option.sharded, rows, False)

    def _updating(self, option: Option) -> Cost:
        """Cost of a forward and backward pass over a micro-batch."""
        memory = replace(option.memory, four_bit=False)
        return self._policy_cost(memory, option.sharded, self.workload.micro_batch, True)

    # -- sums ------------------------------------------------------------------------------------------------
    def flops(self, option: Option, ranks: int = 1) -> dict[str, float]:
        """Operations per iteration over all devices with full-length episodes, by purpose."""
        work, rows = self.workload, self._rows(ranks)
        decisions = work.rollouts * work.n_chunks
        sample = self._sampling(option, rows).flops / rows
        update = self._updating(option).flops / work.micro_batch
        world = {} if work.world is None else self.world_cost(min(work.rows_at_once or rows, rows)).flops
        return {
            **{name: work.rollouts * flops for name, flops in world.items()},
            "policy, deciding": decisions * sample,
            "policy, updating": decisions * (work.n_epochs * update + (sample if work.recompute else 0)),
        }

    def footprint(self, option: Option, ranks: int = 1, limit: float | None = None) -> Footprint:
        """Memory of one of ``ranks`` devices that share the groups.

        Args:
            option: Memory option.
            ranks: Number of devices.
            limit: Bytes; activations are not counted if the other parts exceed it already.
        """
        memory, work, size = option.memory, self.workload, self.policy_size(option.memory)
        spread, whole = (ranks, HALF if memory.precision == "bf16" else FLOAT32) if option.sharded else (1, 0)
        copies = HALF * size.trained if memory.precision == "bf16" and not option.sharded else 0
        rows = self._rows(ranks)
        parts = {
            "policy": size.weights(memory) // spread + whole * size.gathered + copies,
            "optimizer": ADAM_MOMENTS * size.trained // spread,
            "gradients": FLOAT32 * size.trained // spread,
            "world": FLOAT32 * (sum(self.parameters.values()) - self.parameters["policy"]),
        }
        kept = parts["policy"] + parts["optimizer"]
        updating = kept + parts["gradients"] + (0 if option.offload else parts["world"])
        # The optimizer step allocates one float per parameter, after autocast's copies are freed.
        updating += max(0, FLOAT32 * size.trained // spread - copies)
        imagining = kept + parts["world"]
        if limit is None or max(updating, imagining) <= limit:
            sample = self._sampling(option, rows).peak
            at_once = min(work.rows_at_once or rows, rows)
            world = WorldCost({}, 0, 0) if work.world is None else self.world_cost(at_once)
            activations = self._updating(option).peak
            states = rows * world.row_bytes
            parts |= {"imagined": max(world.peak, sample) + states, "activations": activations}
            imagining += parts["imagined"]
            resting = 0 if option.offload else parts["world"] + states
            updating = max(updating, kept + parts["gradients"] + resting + activations)
        return Footprint(imagining, updating, parts)

    def host_bytes(self, ranks: int = 1) -> int:
        """Host memory of a device's rollouts."""
        return self._rows(ranks) * self.workload.n_chunks * self.workload.decision_bytes


def options(workload: Workload, ranks: int, gpu: bool) -> Iterator[Option]:
    """Memory options in order of preference: full fine-tuning first, each by increasing computation."""
    plain = PolicyMemory(precision="bf16" if gpu else "fp32")
    checkpointing = replace(plain, gradient_checkpointing=True)
    lora = replace(plain, lora_rank=LORA_RANK)
    imagined = workload.world is not None and gpu
    for sharded in (False, True) if ranks > 1 else (False,):
        yield Option(plain, sharded=sharded)
        yield Option(checkpointing, sharded=sharded)
        if imagined:
            yield Option(checkpointing, offload=True, sharded=sharded)
    yield Option(lora)
    yield Option(replace(checkpointing, lora_rank=LORA_RANK))
    if imagined:
        yield Option(replace(checkpointing, lora_rank=LORA_RANK), offload=True)
    if gpu:
        yield Option(replace(checkpointing, lora_rank=LORA_RANK, four_bit=True), offload=imagined)


def _count(module: Any) -> int:
    return sum(p.numel() for p in module.parameters()) if isinstance(module, nn.Module) else 0


def _tensors(module: Any) -> list[Tensor]:
    """Parameters, gradients and buffers of a module."""
    if not isinstance(module, nn.Module):
        return []
    parameters = list(module.parameters())
    return [*parameters, *(p.grad for p in parameters if p.grad is not None), *module.buffers()]


def _layers(network: Any) -> list[nn.Module]:
    """The layers listed in the models' ``_no_split_modules`` (transformers)."""
    models = (network.language_model, *(tower.model for tower in network.towers))
    names = {name for model in models for name in model._no_split_modules or ()}
    return [module for module in network.modules() if type(module).__name__ in names]

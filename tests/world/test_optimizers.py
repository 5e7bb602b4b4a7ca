"""Muon beside AdamW."""

import pytest
import torch

from wmpo_gym.training.checkpoint import pack_optimizer, unpack_optimizer
from wmpo_gym.world.networks.conv import ConvWorldModel
from wmpo_gym.world.optimizers import make_optimizers


def small_network() -> ConvWorldModel:
    torch.manual_seed(0)
    return ConvWorldModel(image_size=8, chunk=2, action_dim=2, widths=(8, 16), cond_dim=8)


def backward(network: torch.nn.Module) -> None:
    torch.manual_seed(1)
    for p in network.parameters():
        p.grad = torch.randn_like(p)


def optimizers(network: ConvWorldModel, muon: float, rate: float = 1e-3) -> list[torch.optim.Optimizer]:
    made = make_optimizers(network, learning_rate=rate, weight_decay=0.0, muon=muon)
    return list(made.values())


def test_without_muon_it_is_adamw():
    ours, theirs = small_network(), small_network()
    backward(ours), backward(theirs)
    (optimizer,) = optimizers(ours, 0.0)
    optimizer.step()
    torch.optim.AdamW(theirs.parameters(), lr=1e-3, weight_decay=0.0).step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_muon_moves_inner_weights_in_all_directions_alike():
    network = small_network()
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    backward(network)
    inner = {id(p) for p in network.inner_weights()}
    for optimizer in optimizers(network, 0.01, 5e-4):
        optimizer.step()
    for name, p in network.named_parameters():
        change = (p.detach() - before[name]).flatten(1) if p.ndim > 1 else None
        if id(p) in inner:
            strengths = torch.linalg.svdvals(change) / (
                0.01 * max(1, change.shape[0] / change.shape[1]) ** 0.5
            )
            assert strengths.min() > 0.5 and strengths.max() < 1.5, name
        else:  # AdamW's first step is the step size, in every element
            torch.testing.assert_close(
                (p.detach() - before[name]).abs(), torch.full_like(p, 5e-4), rtol=1e-3, atol=0
            )


def test_inner_weights_neither_read_nor_write_frames():
    network = small_network()
    inner = {id(p) for p in network.inner_weights()}
    edges = {"context_stem.weight", "frame_stem.weight", "way_stem.weight", "head.weight"}
    convolutions = {name for name, p in network.named_parameters() if p.ndim == 4}
    assert {name for name, p in network.named_parameters() if id(p) in inner} == convolutions - edges


@pytest.mark.parametrize("muon", [0.0, 0.02])
def test_goes_on_the_same_from_its_packed_moments(muon):
    network, twin = small_network(), small_network()
    first, second = optimizers(network, muon), optimizers(twin, muon)
    backward(network)
    for optimizer in first:
        optimizer.step()
    twin.load_state_dict(network.state_dict())
    for source, target in zip(first, second, strict=True):
        tensors, numbers = pack_optimizer(source)
        unpack_optimizer(target, {k: v.clone() for k, v in tensors.items()}, numbers)
    for n, made in ((network, first), (twin, second)):
        backward(n)
        for optimizer in made:
            optimizer.step()
    for a, b in zip(network.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)

"""The device of the tests refuses what a GPU refuses, and computes the numbers of the CPU."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

STRANGERS = {
    "arithmetic": lambda x: x + torch.ones(3),
    "concatenation": lambda x: torch.cat([x, torch.ones(3)]),
    "a CPU tensor by a mask of the device": lambda x: torch.ones(3)[x > 0],
    "a module on the CPU": lambda x: nn.Linear(3, 1)(x),
}
GENERATORS = {
    "a factory": lambda x: torch.randn(3, device=x.device, generator=torch.Generator()),
    "filling in place": lambda x: x.normal_(generator=torch.Generator()),
    "another's shape": lambda x: torch.multinomial(x, 1, generator=torch.Generator()),
}


def train(device: str) -> dict:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.SiLU(), nn.Conv2d(4, 3, 1))
    optimizer = torch.optim.AdamW(net.parameters(), 1e-2)
    before = list(net.parameters())
    net.to(device)
    assert all(a is b for a, b in zip(before, net.parameters(), strict=True))
    x = torch.randn(2, 3, 8, 8).to(device)
    losses = []
    for step in range(4):
        if step == 2:  # every state can be put back
            net.load_state_dict(copy.deepcopy(net.state_dict()))
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        loss = (net(x) - x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 0.1)
        optimizer.step()
        losses.append(loss.item())
    x[x > 0] = 1.0
    assert {p.device.type for p in net.parameters()} == {torch.device(device).type}
    copied = copy.deepcopy(net).to("cpu").double()
    out = copied(x.cpu().double()).detach()
    return {"losses": losses, "x": x.cpu(), "list": x[0, 0, 0].tolist(), "out": out}


def test_training_on_the_device_gives_the_numbers_of_the_cpu(pretend_device) -> None:
    ours, expected = pretend_device(train), train("cpu")
    assert ours["losses"] == expected["losses"] and ours["list"] == expected["list"]
    assert torch.equal(ours["x"], expected["x"])
    torch.testing.assert_close(ours["out"], expected["out"])  # the optimizer's kernel is another


def _call(device: str, name: str) -> None:
    ({**STRANGERS, **GENERATORS})[name](torch.ones(3, device=device))


@pytest.mark.parametrize("name", STRANGERS)
def test_the_device_refuses_tensors_of_the_cpu(pretend_device, name: str) -> None:
    with pytest.raises(RuntimeError, match="same device"):
        pretend_device(_call, name)


@pytest.mark.parametrize("name", GENERATORS)
def test_the_device_refuses_generators_of_the_cpu(pretend_device, name: str) -> None:
    with pytest.raises(RuntimeError, match="generator"):
        pretend_device(_call, name)


def _to_numpy(device: str) -> None:
    torch.ones(3, device=device).numpy()


def test_the_device_refuses_numpy(pretend_device) -> None:
    with pytest.raises(RuntimeError, match="numpy"):
        pretend_device(_to_numpy)


def draw(device: str) -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    first, on_cpu = torch.randn(4, device=device), torch.randn(4)
    with torch.random.fork_rng(devices=[0], device_type="pretend"):
        forked = torch.randn(4, device=device)
    second = torch.randn(4, device=device)
    torch.manual_seed(3)
    again = torch.randn(4, device=device)
    found = {"first": first, "cpu": on_cpu, "forked": forked, "second": second, "again": again}
    return {name: tensor.cpu() for name, tensor in found.items()}


def test_the_device_draws_by_its_own_seed(pretend_device) -> None:
    drawn = pretend_device(draw)
    assert torch.equal(drawn["first"], drawn["again"]) and torch.equal(drawn["forked"], drawn["second"])
    assert not torch.equal(drawn["first"], drawn["cpu"])
    torch.manual_seed(3)
    assert torch.equal(torch.randn(4), drawn["cpu"])


def test_the_device_exists_in_its_own_process_only(pretend_device) -> None:
    pretend_device(draw)
    assert not hasattr(torch, "pretend")
    assert not torch.__future__.get_swap_module_params_on_conversion()

"""The convolutional world model: signature, causality, exactness of rows, learning."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from wmpo_gym.utils.kernels import ordinary_kernels
from wmpo_gym.world.networks.conv import ConvWorldModel


@pytest.fixture
def network() -> ConvWorldModel:
    return small_network()


def small_network(**changes: Any) -> ConvWorldModel:
    """A small network whose zero-initialised layers are filled, so that everything has an effect."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        config = {"image_size": 16, "widths": (8, 16), "cond_dim": 16, "detail": 8, "shift_init": (1.0, -1.0)}
        network = ConvWorldModel(**{**config, **changes})
        for parameter in network.parameters():
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.1)
    return network.eval()


def inputs(n: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    context = torch.rand(n, 3, 2, 16, 16, generator=generator) * 2 - 1
    noise = torch.randn(n, 3, 4, 16, 16, generator=generator)
    return context, noise, torch.rand(n, 4, 3, generator=generator) * 2 - 1


@torch.no_grad()
def test_velocity_leads_to_the_predicted_frames(network: ConvWorldModel) -> None:
    """One Euler step from noise level s arrives at the prediction: x + s v = x0_hat."""
    context, noise, actions = inputs(4)
    cache = network.encode_context(context)
    for level in (1.0, 0.4):
        sigma = torch.full((4,), level)
        clean = network.predict(noise, sigma, actions, cache)
        velocity = network.denoise(noise, 1000 * sigma, actions, cache)
        assert torch.allclose(noise + level * velocity, clean, atol=1e-5)


@torch.no_grad()
def test_forward_is_the_cached_path(network: ConvWorldModel) -> None:
    context, noise, actions = inputs(4)
    mask = torch.tensor([True, True, False, False, False, False]).expand(4, -1)
    t, prev = torch.full((4,), 700.0), torch.rand(4, 3)
    whole = network(torch.cat([context, noise], dim=2), t, actions, mask, prev_action=prev)
    assert not whole[:, :, :2].any()
    cached = network.denoise(noise, t, actions, network.encode_context(context, prev))
    assert torch.equal(whole[:, :, 2:], cached)
    with pytest.raises(ValueError, match="context_mask"):
        network(torch.cat([context, noise], dim=2), t, actions, ~mask)


@torch.no_grad()
def test_a_frame_depends_on_the_actions_up_to_it_only(network: ConvWorldModel) -> None:
    context, noise, actions = inputs(4)
    cache, one = network.encode_context(context), torch.ones(4)
    before = network.predict(noise, one, actions, cache)
    actions[:, 2] *= -1
    changed = (network.predict(noise, one, actions, cache) != before).flatten(3).any(dim=(0, 1, 3))
    assert changed.tolist() == [False, False, True, True]


@torch.no_grad()
def test_two_ways_to_the_same_place_are_told_apart_where_they_part(network: ConvWorldModel) -> None:
    """The picture of the way differs beside the detour, not only in the conditioning vector."""
    last = torch.full((2, 3, 16, 16), -1.0)
    last[:, :, 8, 3] = 1.0
    actions = torch.zeros(2, 4, 3)
    actions[:, :, 0] = 1.0
    actions[1, 0, 1], actions[1, 2, 1] = 1.0, -1.0  # a detour in row 7, back in row 8 in the last two frames
    shift = network._shift(torch.cat([torch.zeros(2, 1, 3), actions], dim=1))[:, :, None, None]
    shifted = network._moved(last, shift)
    torch.testing.assert_close(shifted[0, :, 3], shifted[1, :, 3])
    way = network._motion_features(last, shifted, actions * 0)
    straight, detour = way[0, 3], way[1, 3]
    parted = (straight - detour).abs().amax(dim=0) > 1e-4
    assert parted[:, 1:5].any() and not parted[:2].any() and not parted[:, 6:].any()


@torch.no_grad()
@pytest.mark.parametrize("blocks", [1, 2])
def test_the_fast_way_gives_the_numbers_of_the_ordinary_one(network: ConvWorldModel, blocks: int) -> None:
    if blocks == 2:
        network = small_network(widths=(8, 16, 24), blocks=2)
    context, noise, actions = inputs(5)

    def predict() -> torch.Tensor:
        return network.predict(noise, torch.full((5,), 0.7), actions, network.encode_context(context))

    fast = predict()
    with ordinary_kernels():
        ordinary = predict()
    assert (fast - ordinary).abs().max() < 1e-5 < ordinary.std()
    with torch.enable_grad():
        assert (predict() - ordinary).abs().max() < 1e-5


@torch.no_grad()
def test_rows_do_not_depend_on_their_batch(network: ConvWorldModel) -> None:
    context, noise, actions = inputs(23)

    def predict(rows: slice) -> torch.Tensor:
        cache = network.encode_context(context[rows])
        return network.predict(noise[rows], torch.ones(len(actions[rows])), actions[rows], cache)

    whole = predict(slice(None))
    for rows in (slice(0, 2), slice(7, 12), slice(3, 20)):
        assert torch.equal(predict(rows), whole[rows]), rows


@torch.no_grad()
def test_an_untrained_network_moves_the_picture_as_it_is_told() -> None:
    """The common shift is `shift_init` pixels per unit of action, x to the right and y upwards."""
    network = ConvWorldModel(image_size=16, widths=(8, 16), cond_dim=16, detail=8, shift_init=(2.0, -1.0))
    picture = torch.full((1, 3, 16, 16), -1.0)
    picture[:, :, 8, 5] = 1.0
    actions = torch.zeros(1, 4, 3)
    actions[0, :, 0] = actions[0, :, 1] = 1.0
    shift = network._shift(torch.cat([torch.zeros(1, 1, 3), actions], dim=1))[:, :, None, None]
    moved = network._moved(picture, shift)
    for k in range(4):
        row, column = divmod(int(moved[0, 0, k].argmax()), 16)
        assert (row, column) == (8 - (k + 1), 5 + 2 * (k + 1))


def test_published_and_own_names_survive_saving(network: ConvWorldModel, tmp_path) -> None:
    network.save_pretrained(tmp_path)
    again = ConvWorldModel.from_pretrained(tmp_path).eval()
    context, noise, actions = inputs(4)
    with torch.no_grad():
        same = [n.predict(noise, torch.ones(4), actions, n.encode_context(context)) for n in (network, again)]
    assert torch.equal(*same)

from __future__ import annotations

import numpy as np
import pytest
import torch

from wmpo_gym.world.flow import RELEASE_CONTEXT_NOISE, RectifiedFlow
from wmpo_gym.world.imagination import Imagination, ImaginationState
from wmpo_gym.world.networks.autoencoder import Autoencoder, PixelAutoencoder, truncate_to_uint8
from wmpo_gym.world.networks.stdit import STDiT


class FakeVAE(Autoencoder):
    """The linear stand-in the reference run was made with."""

    latent_channels, downscale, lossless = 4, 2, False

    def __init__(self, encoder, decoder):
        self.encoder, self.decoder, self.encoded = encoder, decoder, []

    def encode(self, frames, *, generator=None):
        self.encoded.append(frames)
        pixels = frames.float() / 255 * 2 - 1
        pooled = pixels.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).mean(dim=(3, 5))
        return torch.einsum("cd,bthwd->bcthw", self.encoder, pooled)

    def decode(self, latents):
        small = 1.05 * torch.tanh(torch.einsum("dc,bcthw->bthwd", self.decoder, latents))
        return truncate_to_uint8(small.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3))

    def save_pretrained(self, directory):
        raise AssertionError


@pytest.mark.parametrize("cached", [True, False])
def test_the_published_loop(cached, golden, published_stdit, monkeypatch):
    tensors, meta = golden("imagination_loop")
    sampled, z_combined, actions = tensors["sampled"], tensors["z_combined"], tensors["actions"]
    assert torch.equal(tensors["y"], actions)  # what the network was given is what the policy chose
    vae = FakeVAE(tensors["fake_vae.E"], tensors["fake_vae.D"])
    imagination = Imagination(
        published_stdit(),
        vae,
        chunk=8,
        context_frames=4,
        denoising_steps=meta["config"]["sampling_steps"],
        image_size=16,
        action_dim=7,
        flow=RectifiedFlow(context_noise=RELEASE_CONTEXT_NOISE),
    )
    if not cached:
        monkeypatch.delattr(STDiT, "encode_context")
    assert imagination.noise_shape == (4, 8, 8, 8) and imagination.nfe_per_chunk == 3
    # Trajectory order: the first image's repeats, then the second's.
    known = {name: image for name, image in tensors.items() if name.startswith("first_image.")}
    first = torch.stack([next(i for i in known.values() if torch.equal(i, v[0])) for v in tensors["videos"]])
    assert torch.equal(first[0], first[1]) and torch.equal(first[2], first[3])

    state, videos = imagination.start(first), [first[:, None]]
    for chunk in range(3):
        expected = z_combined[chunk][:, :, :4]
        torch.testing.assert_close(state.context, expected, atol=3e-6, rtol=0)
        frames, state = imagination.step(state, actions[chunk], z_combined[chunk][:, :, 4:])
        torch.testing.assert_close(state.context, sampled[chunk][:, :, -4:], atol=3e-6, rtol=0)
        assert torch.equal(state.prev_action, actions[chunk][:, -1])
        torch.testing.assert_close(vae.decode(sampled[chunk][:, :, 4:]), frames)
        videos.append(frames)
    assert torch.equal(torch.cat(videos, dim=1), tensors["videos"])
    assert len(vae.encoded) == 1  # the first frame is encoded once and nothing ever again


class Drift:
    """Predicts frames: each is the one before, brighter by the action."""

    def __init__(self):
        self.seen = []

    def encode_context(self, context, prev_action=None, sigma=None):
        self.seen.append((context.clone(), prev_action.clone(), sigma.clone()))
        return context[:, :, -1:]

    def denoise(self, latents, timestep, actions, cache):
        frames = cache + actions.cumsum(dim=1)[:, None, :, :1, None]
        return (frames - latents) / (timestep / 1000)[:, None, None, None, None]


def pixel_imagination(network, context_frames=2, **kwargs):
    settings = {"chunk": 2, "denoising_steps": 1, "image_size": 4, "action_dim": 1, **kwargs}
    return Imagination(network, PixelAutoencoder(), context_frames=context_frames, **settings)


def test_pixels_stay_on_the_grid_of_levels():
    network = Drift()
    imagination = pixel_imagination(network, flow=RectifiedFlow(context_noise=0.0))
    assert imagination.noise_shape == (3, 2, 4, 4)
    start = torch.full((2, 4, 4, 3), 100, dtype=torch.uint8)
    state = imagination.start(start)
    assert state.context.shape == (2, 3, 2, 4, 4) and not state.prev_action.any()
    actions = torch.tensor([[0.4, 0.4], [1.0, -0.6]])[..., None] / 127.5
    noise = torch.randn(2, 3, 2, 4, 4)
    frames, state = imagination.step(state, actions, noise)
    # 100.4 and 100.8 of the first row round to 100 and 101, and that is what the next chunk sees.
    assert frames[:, :, 0, 0, 0].tolist() == [[100, 101], [101, 100]]
    assert torch.equal(PixelAutoencoder().decode(state.context), frames)
    assert torch.equal(PixelAutoencoder().encode(frames), state.context)
    frames, _ = imagination.step(state, actions, noise)
    assert frames[:, :, 0, 0, 0].tolist() == [[101, 102], [101, 100]]
    assert torch.equal(network.seen[1][1], actions[:, -1])
    assert not network.seen[1][2].any()


@pytest.mark.parametrize("context_frames", [1, 2, 5])
def test_context_is_the_last_frames_whatever_the_chunk(context_frames):
    imagination = pixel_imagination(Drift(), context_frames)
    state = imagination.start(np.full((1, 4, 4, 3), 10, dtype=np.uint8))
    seen = [10] * context_frames
    for _ in range(3):
        frames, state = imagination.step(state, np.full((1, 2, 1), 3 / 127.5), torch.randn(1, 3, 2, 4, 4))
        seen += frames[0, :, 0, 0, 0].tolist()
        context = PixelAutoencoder().decode(state.context)[0, :, 0, 0, 0].tolist()
        assert context == seen[-context_frames:]
    assert seen[-6:] == [13, 16, 19, 22, 25, 28]


@pytest.fixture
def stdit_imagination(golden, published_stdit):
    tensors, _ = golden("imagination_loop")
    return Imagination(
        published_stdit(),
        FakeVAE(tensors["fake_vae.E"], tensors["fake_vae.D"]),
        chunk=8,
        context_frames=4,
        denoising_steps=2,
        image_size=16,
        action_dim=7,
    )


def random_inputs(rows, seed=0):
    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(0, 256, (rows, 16, 16, 3), dtype=torch.uint8, generator=generator)
    actions = torch.rand(rows, 8, 7, generator=generator) * 2 - 1
    return first, actions, torch.randn(rows, 4, 8, 8, 8, generator=generator)


def test_rows_do_not_depend_on_their_batch(stdit_imagination):
    first, actions, noise = random_inputs(5)
    frames, state = stdit_imagination.step(stdit_imagination.start(first), actions, noise)
    index = [3, 0]
    part = stdit_imagination.start(first).rows(index)
    some, after = stdit_imagination.step(part, actions[index], noise[index])
    torch.testing.assert_close(after.context, state.context[index], atol=1e-5, rtol=1e-5)
    assert (some.int() - frames[index].int()).abs().max() <= 1
    noise[3] = -noise[3]
    frames2, _ = stdit_imagination.step(stdit_imagination.start(first), actions, noise)
    changed = (frames2 != frames).flatten(1).any(dim=1)
    assert changed.tolist() == [False, False, False, True, False]


def test_a_step_leaves_its_state_as_it_was(stdit_imagination):
    first, actions, noise = random_inputs(2)
    state = stdit_imagination.start(first)
    before = state.to_dict()
    one, _ = stdit_imagination.step(state, actions, noise)
    two, after = stdit_imagination.step(state, actions, noise)
    assert torch.equal(one, two) and not after.context.requires_grad
    for name, value in state.to_dict().items():
        np.testing.assert_array_equal(value, before[name])


def test_state_rows_assign_and_dict():
    state = ImaginationState(
        torch.arange(3.0).view(3, 1, 1, 1, 1).repeat(1, 2, 1, 1, 1), torch.arange(3.0)[:, None]
    )
    taken = state.rows(np.array([2, 0]))
    assert len(taken) == 2 and taken.prev_action[:, 0].tolist() == [2, 0]
    taken.context.zero_()
    assert state.context[2].max() == 2, "rows() copies"
    assert state.rows(np.array([False, True, True])).prev_action[:, 0].tolist() == [1, 2]
    assert state.rows(slice(1)).prev_action[:, 0].tolist() == [0]

    other = ImaginationState(torch.full((2, 2, 1, 1, 1), 9.0), torch.tensor([[7.0], [8.0]]))
    state.assign(np.array([True, False, True]), other)
    assert state.prev_action[:, 0].tolist() == [7, 1, 8] and state.context[:, 0, 0, 0, 0].tolist() == [
        9,
        1,
        9,
    ]

    arrays = state.to_dict()
    restored = ImaginationState.from_dict(arrays)
    state.context.zero_()
    assert restored.context[:, 1, 0, 0, 0].tolist() == [9, 1, 9] and arrays["context"].dtype == np.float32
    with pytest.raises(ValueError, match="context and prev_action; it lacks .*prev_action"):
        ImaginationState.from_dict({"context": arrays["context"]})


def test_wrong_inputs_are_named(stdit_imagination):
    first, actions, noise = random_inputs(2)
    with pytest.raises(ValueError, match=r"uint8 \(B, 16, 16, 3\), got torch.uint8 \(2, 16, 15, 3\)"):
        stdit_imagination.start(first[:, :, 1:])
    with pytest.raises(ValueError, match="got torch.float32"):
        stdit_imagination.start(first.float())
    state = stdit_imagination.start(first)
    with pytest.raises(ValueError, match=r"actions must have shape \(2, 8, 7\), got \(1, 8, 7\)"):
        stdit_imagination.step(state, actions[:1], noise)
    with pytest.raises(ValueError, match=r"noise must have shape \(2, 4, 8, 8, 8\)"):
        stdit_imagination.step(state, actions, noise[..., 1:])

from __future__ import annotations

import math

import pytest
import torch

from wmpo_gym.world.flow import RELEASE_CONTEXT_NOISE, RectifiedFlow, shift_timestep

RELEASE = RectifiedFlow(context_noise=RELEASE_CONTEXT_NOISE)
ATOL = 3e-6


def resolution_shift(height_px: int, width_px: int, n_frames: int) -> float:
    """The release's shift for a frame size; 1 for its own 256x256 video."""
    return math.sqrt(height_px * width_px / 512**2) * (1 if n_frames == 1 else 2)


def close(actual, expected, atol=ATOL):
    torch.testing.assert_close(actual, expected, atol=atol, rtol=0)


def test_add_noise(golden):
    tensors, _ = golden("rflow")
    args = (tensors[f"add_noise.{name}"] for name in ("x0", "noise", "t"))
    close(RectifiedFlow().add_noise(*args), tensors["add_noise.out"], atol=1e-6)


def test_timestep_shift(golden):
    tensors, meta = golden("rflow")
    times = tensors["timestep_transform.t"]
    for row, expected in zip(meta["timestep_transform_rows"], tensors["timestep_transform.out"], strict=True):
        torch.testing.assert_close(shift_timestep(times, resolution_shift(*row)), expected, atol=0, rtol=3e-7)
    assert resolution_shift(256, 256, 12) == 1.0


def test_timestep_shift_never_leaves_the_range():
    """At 64x96 pixels the published formula gives 1000.0001, at which its sampler stops with an assertion."""
    sides = torch.arange(16, 513, 16).tolist()
    shifts = [resolution_shift(h, w, 12) for h in sides for w in sides]
    ends = torch.stack([shift_timestep(torch.tensor([0.0, 1000.0]), r) for r in shifts])
    assert (ends[:, 0] == 0).all() and (ends[:, 1] <= 1000).all() and (ends[:, 1] > 999.99).all()
    assert RectifiedFlow(shift=resolution_shift(64, 96, 12)).timesteps(5)[0] == 1000


def test_sampling_grid(golden):
    tensors, _ = golden("rflow")
    flow = RectifiedFlow()
    assert torch.equal(flow.timesteps(10), tensors["grid10.raw"])
    assert torch.equal(flow.timesteps(30), tensors["grid30.raw"])
    at_256 = RectifiedFlow(shift=resolution_shift(256, 256, 12))
    assert torch.equal(at_256.timesteps(30), tensors["grid30.transformed_256"])
    with pytest.raises(ValueError, match="at least one denoising step, got 0"):
        flow.timesteps(0)


class Recorder:
    """A network whose velocity is zero; it keeps the timesteps and context levels it is told."""

    def __init__(self):
        self.timesteps, self.context = [], []

    def __call__(self, latents, timestep, actions, context_mask, *, prev_action=None, context_sigma=None):
        self.timesteps.append(timestep[0].item())
        self.context.append(context_sigma)
        return torch.zeros_like(latents)


def test_timesteps_told_in_bfloat16(golden):
    tensors, _ = golden("rflow")
    noise, context, actions = torch.randn(2, 1, 8, 2, 2), torch.zeros(2, 1, 4, 2, 2), torch.zeros(2, 8, 7)
    rounded, exact = Recorder(), Recorder()
    out = RectifiedFlow(round_timesteps=True).sample(rounded, noise, context, actions, 30)
    RectifiedFlow().sample(exact, noise, context, actions, 30)
    assert rounded.timesteps == tensors["grid30.as_bf16"].tolist()
    assert exact.timesteps == tensors["s30.timesteps"].tolist()
    assert torch.equal(out, noise)
    assert torch.equal(exact.context[0], torch.full((2,), 0.05))  # the paper's level, unless told otherwise


def test_training_loss_and_gradients(golden, published_stdit):
    tensors, _ = golden("rflow")
    x, noise, t, actions = (tensors[f"train.{name}"] for name in ("x_start", "noise", "t", "actions"))
    context, network = (
        ~tensors["train.x_mask"],
        published_stdit(context_noise=0.5),
    )  # the flow's level is told
    x_t = RELEASE.corrupt(x, noise, t, context)
    close(x_t, tensors["train.x_t"], atol=1e-6)
    predicted = ~context[:, None, :, None, None].expand_as(x)
    velocity = network(x_t, t, actions, context, context_sigma=torch.full((2,), RELEASE.context_noise))
    close(velocity[predicted], tensors["train.model_output"][:, :4][predicted])

    losses = RELEASE.loss(network, x, actions, context, timestep=t, noise=noise)
    close(losses, tensors["train.loss_per_sample"])
    close(losses.mean(), tensors["train.loss_mean"][0])
    losses.mean().backward()
    grads = {name: p.grad for name, p in network.named_parameters()}
    grads["x_embedder.proj.weight"] = grads.pop("x_embedder.weight").unsqueeze(2)
    expected = {name[11:]: value for name, value in tensors.items() if name.startswith("train.grad.")}
    assert len(expected) == 5
    for name, value in expected.items():
        close(grads[name], value, atol=max(1e-8, 1e-6 * value.abs().max().item()))


def test_training_loss_with_uneven_and_without_context(golden, published_stdit):
    tensors, _ = golden("rflow")
    x, noise, t, actions = (tensors[f"train.{name}"] for name in ("x_start", "noise", "t", "actions"))
    network, uneven = published_stdit(), ~tensors["train_uneven.x_mask"]
    assert uneven.sum(dim=1).tolist() == [7, 4]
    close(RELEASE.corrupt(x, noise, t, uneven), tensors["train_uneven.x_t"], atol=1e-6)
    loss = RELEASE.loss(network, x, actions, uneven, timestep=t, noise=noise)
    close(loss, tensors["train_uneven.loss_per_sample"])
    loss = RELEASE.loss(network, x, actions, torch.zeros_like(uneven), timestep=t, noise=noise)
    close(loss, tensors["train_nomask.loss_per_sample"])
    with pytest.raises(ValueError, match="Sample 1 has only context frames"):
        uneven[1] = True
        RELEASE.loss(network, x, actions, uneven, timestep=t, noise=noise)


def test_velocity_error_on_context_frames_costs_nothing():
    class Off(Recorder):
        def __call__(self, latents, timestep, actions, context_mask, **_):
            right = x - noise
            return torch.where(context_mask[:, None, :, None, None], right + 100.0, right)

    x, noise, context = (
        torch.randn(2, 3, 4, 2, 2),
        torch.randn(2, 3, 4, 2, 2),
        torch.zeros(2, 4, dtype=torch.bool),
    )
    context[:, :2] = True
    loss = RectifiedFlow().loss(Off(), x, torch.zeros(2, 2, 1), context, timestep=torch.ones(2), noise=noise)
    assert torch.equal(loss, torch.zeros(2))


def test_training_timesteps(golden):
    tensors, meta = golden("rflow")
    drawn = RectifiedFlow().sample_timesteps(8, torch.Generator().manual_seed(5))
    assert torch.equal(drawn, tensors["t_sampling.logit_normal_seed5"])
    assert torch.equal(drawn, tensors["t_sampling.sigmoid_randn_seed5"])
    many = RectifiedFlow().sample_timesteps(20_000, torch.Generator().manual_seed(0))
    expected = meta["checks"]["quantiles 5/25/50/75/95% of 20000 logit-normal draws x1000"]
    found = many.quantile(torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95]))
    torch.testing.assert_close(found, torch.tensor(expected), atol=15.0, rtol=0)


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("run", ["s10", "s30", "s30_official", "s5_transform64"])
def test_sampler(run, cached, golden, published_stdit):
    tensors, meta = golden("rflow")
    spec = meta["sampler_runs"][run]
    steps, px = spec["num_sampling_steps"], spec["height_px"]
    shift = resolution_shift(px, px, 12) if spec["use_timestep_transform"] else 1.0
    flow = RectifiedFlow(context_noise=RELEASE_CONTEXT_NOISE, shift=shift)
    torch.testing.assert_close(flow.timesteps(steps), tensors[f"{run}.timesteps"], atol=0, rtol=3e-7)

    network, states = published_stdit(pixels_per_latent=px // 8), []
    entry = network.x_embedder  # called once per network evaluation with the state of the sampler
    entry.register_forward_pre_hook(
        lambda _m, args: states.append(args[0].unflatten(0, (2, -1)).transpose(1, 2))
    )
    z, mask = tensors["sample.z"], tensors["sample.mask"].bool()
    assert not mask[:, :4].any() and mask[:, 4:].all()
    with torch.no_grad():
        final = flow.sample(
            network, z[:, :, 4:], z[:, :, :4], tensors["sample.actions"], steps, cached=cached
        )
    assert len(states) == steps + cached  # one more for the context
    atol = 1e-5 if run == "s5_transform64" else ATOL
    close(final, tensors[f"{run}.z_final"][:, :, 4:], atol=atol)
    for after in (1, 2, 5):
        if f"{run}.z_after_{after}" in tensors:
            close(states[after + cached][:, :, -8:], tensors[f"{run}.z_after_{after}"][:, :, 4:], atol=atol)


def test_sampler_in_bfloat16(golden, published_stdit):
    """Root mean square against the bfloat16 run of the release; exact timesteps are ten times as far."""
    tensors, _ = golden("rflow")
    expected = golden("stdit3_tiny_bf16")[0]["s30_official.z_final_bf16"][:, :, 4:]
    network, z = published_stdit(pixels_per_latent=32).bfloat16(), tensors["sample.z"]
    error = {}
    for rounded in (True, False):
        flow = RectifiedFlow(context_noise=RELEASE_CONTEXT_NOISE, round_timesteps=rounded)
        with torch.no_grad():
            out = flow.sample(network, z[:, :, 4:], z[:, :, :4], tensors["sample.actions"], 30)
        assert out.dtype == torch.float32
        error[rounded] = (out - expected).square().mean().sqrt().item()
    assert error[True] < 0.01 < 0.02 < error[False]


def test_one_step_of_a_network_that_predicts_frames_is_its_prediction():
    frames = torch.linspace(-1, 1, 48).view(2, 3, 2, 2, 2)

    class Predictor:
        def encode_context(self, context, prev_action=None, sigma=None):
            return None

        def denoise(self, latents, timestep, actions, cache):
            return (frames - latents) / (timestep / 1000)[:, None, None, None, None]

    args = torch.randn(2, 3, 2, 2, 2), torch.zeros(2, 3, 1, 2, 2), torch.zeros(2, 2, 1)
    for steps in (1, 2, 5):
        close(RectifiedFlow().sample(Predictor(), *args, steps), frames, atol=1e-6)


def test_rows_are_sampled_by_their_own_noise(golden, published_stdit):
    tensors, _ = golden("rflow")
    network, z, actions = published_stdit(), tensors["sample.z"], tensors["sample.actions"]

    def sample(noise, rows=slice(None)):
        with torch.no_grad():
            return RELEASE.sample(network, noise[rows], z[rows, :, :4], actions[rows], 5)

    noise = z[:, :, 4:].clone()
    both = sample(noise)
    close(sample(noise, slice(1, 2)), both[1:])
    noise[0] = -noise[0]
    changed = sample(noise)
    assert torch.equal(changed[1], both[1])
    assert (changed[0] - both[0]).abs().max() > 0.1


def test_sampling_is_differentiable(golden, published_stdit):
    tensors, _ = golden("rflow")
    z, actions = tensors["sample.z"], tensors["sample.actions"].clone().requires_grad_()
    RELEASE.sample(published_stdit(), z[:, :, 4:], z[:, :, :4], actions, 2).square().mean().backward()
    assert actions.grad.abs().max() > 1e-4


def test_context_noise_must_be_a_level():
    with pytest.raises(ValueError, match=r"level in \[0, 1\), got 50.*15 diffusion steps of 1000 are 0.015"):
        RectifiedFlow(context_noise=50)

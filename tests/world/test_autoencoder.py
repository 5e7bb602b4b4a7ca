from __future__ import annotations

import pytest
import torch

from wmpo_gym.utils.io import ArtifactError
from wmpo_gym.world.networks.autoencoder import LatentAutoencoder, PixelAutoencoder, truncate_to_uint8


@pytest.fixture(scope="module")
def vae():
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        latent_channels=4,
        scaling_factor=0.13025,
    )


def some_frames(batch=2, length=3, height=8, width=12):
    shape = (batch, length, height, width, 3)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_pixels_survive_the_round_trip():
    every_level = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16, 1).repeat(1, 1, 1, 1, 3)
    autoencoder = PixelAutoencoder()
    latents = autoencoder.encode(every_level)
    assert latents.shape == (1, 3, 1, 16, 16) and latents.dtype == torch.float32
    assert latents.min() == -1 and latents.max() == 1
    assert torch.equal(autoencoder.decode(latents), every_level)
    frames = some_frames()
    assert torch.equal(autoencoder.decode(autoencoder.encode(frames)), frames)


def test_pixels_are_rounded_and_clipped():
    level = torch.tensor([-3.0, (100.4 / 127.5) - 1, (100.6 / 127.5) - 1, 3.0])
    latents = level.view(1, 1, 4, 1, 1).expand(-1, 3, -1, -1, -1)
    before = latents.clone()
    assert PixelAutoencoder().decode(latents)[0, :, 0, 0, 0].tolist() == [0, 100, 101, 255]
    assert torch.equal(latents, before)


def test_latent_frames_are_truncated_as_published():
    level = torch.tensor([-3.0, (100.4 / 127.5) - 1, (100.6 / 127.5) - 1, 1.0, 3.0])
    assert truncate_to_uint8(level).tolist() == [0, 100, 100, 255, 255]


def test_latents_are_those_of_the_vae(vae):
    autoencoder, frames = LatentAutoencoder(vae), some_frames()
    assert (autoencoder.latent_channels, autoencoder.downscale, autoencoder.lossless) == (4, 2, False)
    latents = autoencoder.encode(frames)
    assert latents.shape == (2, 4, 3, 4, 6) and latents.dtype == torch.float32
    image = frames[1, 2].permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        expected = vae.encode(image).latent_dist.mean[0] * 0.13025
        picture = vae.decode(expected[None] / 0.13025).sample[0]
    torch.testing.assert_close(latents[1, :, 2], expected, atol=1e-6, rtol=1e-5)
    decoded = autoencoder.decode(latents)
    assert decoded.shape == frames.shape and decoded.dtype == torch.uint8
    exact = ((picture * 0.5 + 0.5) * 255).clamp(0, 255).permute(1, 2, 0)
    # A value within rounding of a whole level may fall on either side of it.
    assert ((decoded[1, 2] - exact).abs() < 1 + 1e-3).all() and (decoded[1, 2] <= exact + 1e-3).all()


def test_posterior_is_drawn_with_the_given_generator(vae):
    frames = some_frames()
    drawn = [
        LatentAutoencoder(vae, micro_batch=size).encode(frames, generator=torch.Generator().manual_seed(seed))
        for size, seed in ((64, 1), (4, 1), (64, 2))
    ]
    mode = LatentAutoencoder(vae).encode(frames)
    torch.testing.assert_close(drawn[0], drawn[1], atol=1e-6, rtol=1e-5)
    assert not torch.allclose(drawn[0], drawn[2], atol=1e-3)
    images = frames.flatten(0, 1).movedim(-1, 1) / 127.5 - 1
    with torch.no_grad():
        std = vae.encode(images).latent_dist.std.unflatten(0, (2, 3)).transpose(1, 2) * 0.13025
    noise = torch.randn(6, 4, 4, 6, generator=torch.Generator().manual_seed(1)).unflatten(0, (2, 3))
    torch.testing.assert_close(drawn[0], mode + std * noise.transpose(1, 2), atol=1e-5, rtol=1e-5)


def test_micro_batches_do_not_matter(vae):
    frames = some_frames()
    whole, pieces = LatentAutoencoder(vae), LatentAutoencoder(vae, micro_batch=4)
    torch.testing.assert_close(pieces.encode(frames), whole.encode(frames), atol=1e-6, rtol=1e-5)
    difference = pieces.decode(whole.encode(frames)).int() - whole.decode(whole.encode(frames)).int()
    assert difference.abs().max() <= 1


def test_save_and_load(vae, tmp_path):
    LatentAutoencoder(vae).save_pretrained(tmp_path / "latent")
    assert (tmp_path / "latent" / "diffusion_pytorch_model.safetensors").is_file()
    loaded, frames = LatentAutoencoder.from_pretrained(tmp_path / "latent"), some_frames()
    assert torch.equal(loaded.encode(frames), LatentAutoencoder(vae).encode(frames))
    PixelAutoencoder().save_pretrained(tmp_path / "pixel")
    assert isinstance(PixelAutoencoder.from_pretrained(tmp_path / "pixel"), PixelAutoencoder)
    with pytest.raises(ArtifactError, match="describes a 'AutoencoderKL'.*saved PixelAutoencoder"):
        PixelAutoencoder.from_pretrained(tmp_path / "latent")
    with pytest.raises(ArtifactError, match="describes a 'PixelAutoencoder'.*saved AutoencoderKL"):
        LatentAutoencoder.from_pretrained(tmp_path / "pixel")
    with pytest.raises(ArtifactError, match="does not exist"):
        PixelAutoencoder.from_pretrained(tmp_path / "nowhere")


def test_wrong_frames_are_named(vae):
    with pytest.raises(ValueError, match="uint8.*got torch.float32"):
        PixelAutoencoder().encode(some_frames().float())
    with pytest.raises(ValueError, match="9x12 pixels do not fit.*by 2"):
        LatentAutoencoder(vae).encode(some_frames(height=9))
    with pytest.raises(ValueError, match="at least 1 frame, got 0"):
        LatentAutoencoder(vae, micro_batch=0)


def test_a_shift_of_the_latents_is_applied():
    from diffusers import AutoencoderKL

    vae = AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        scaling_factor=0.36,
        shift_factor=0.5,
    )
    frames = torch.randint(0, 255, (1, 2, 16, 16, 3), dtype=torch.uint8)
    shifted = LatentAutoencoder(vae).encode(frames)
    with torch.no_grad():
        mode = vae.encode(frames[0].movedim(-1, 1).float() / 127.5 - 1).latent_dist.mode()
    assert torch.allclose(shifted[0].transpose(0, 1), (mode - 0.5) * 0.36, atol=1e-5)
    autoencoder = LatentAutoencoder(vae)
    decoded = autoencoder.decode(shifted)
    vae.register_to_config(shift_factor=None)
    assert torch.equal(decoded, LatentAutoencoder(vae).decode((shifted / 0.36 + 0.5) * 0.36))


def test_statistics_of_the_latents_that_are_not_supported_are_refused():
    from diffusers import AutoencoderKL

    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latents_mean=(0.0,) * 4)
    with pytest.raises(ValueError, match="latents_mean"):
        LatentAutoencoder(vae)

"""Benchmark of the published sizes on one GPU, with random weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from wmpo_gym.bench.bench import machine, machine_text, transformer_text
from wmpo_gym.bench.transformer import Sampling, bench_transformer, random_stdit
from wmpo_gym.world.networks.autoencoder import SDXL_AUTOENCODER

if TYPE_CHECKING:
    import torch

IMAGE_SIZE, ACTION_DIM, ROWS = 256, 7, 16
N_CHUNKS = 2  # per episode; every chunk costs the same, so more would only take longer


def bench_paper(*, repeats: int = 3, compile: bool = False, seed: int = 0) -> dict[str, Any]:
    """Benchmark STDiT3-XL at 256x256 pixels in bfloat16, 16 rows, 30 and 4 denoising steps, on one GPU.

    The loop includes the SDXL autoencoder (bfloat16) and VideoMAE-base (float32). No episode ends early, and
    all denoising steps are executed.

    Args:
        repeats: Number of batches.
        compile: Compile the network's fast path.
        seed: Seed of weights and inputs.

    Returns:
        The result of :func:`~wmpo_gym.bench.transformer.bench_transformer` with, in addition, ``weights``
        ("random"), ``network_parameters`` and ``machine``.

    Raises:
        ValueError: If torch finds no CUDA device.
    """
    import torch

    if not torch.cuda.is_available():
        raise ValueError(
            "The preset 'paper' measures STDiT3-XL at 256x256 in bfloat16 and needs a CUDA card, but torch "
            f"{torch.__version__} sees none here. Run it on a machine that has one, or leave --preset out "
            "for the benchmark of this machine."
        )
    device = torch.device("cuda")
    imagination, classifier = published_parts(device, torch.bfloat16, compile=compile, seed=seed)
    horizon = N_CHUNKS * imagination.chunk
    result = bench_transformer(
        imagination,
        classifier,
        [horizon] * ROWS,
        horizon,
        sampling=Sampling(executed=None),
        rows=ROWS,
        repeats=repeats,
        seed=seed,
    )
    return {
        "preset": "paper",
        "weights": "random",
        "dtype": "bfloat16",
        "compiled": compile,
        "network_parameters": sum(p.numel() for p in imagination.network.parameters()),
        **result,
        "machine": machine(device),
    }


def published_parts(
    device: torch.device,
    dtype: torch.dtype,
    *,
    compile: bool = False,
    seed: int = 0,
    image_size: int = IMAGE_SIZE,
    network: Mapping[str, Any] | None = None,
    vae: Mapping[str, Any] = SDXL_AUTOENCODER,
    classifier: Mapping[str, Any] | None = None,
) -> tuple[Any, Any]:
    """World model rollout and success classifier of the published sizes, with random weights.

    Args:
        device: Device of the networks.
        dtype: Data type of network and autoencoder.
        compile: Compile the network's fast path.
        seed: Seed of the weights.
        image_size: Side of the frames in pixels.
        network: Arguments of ``STDiT``; None is STDiT3-XL.
        vae: Arguments of ``AutoencoderKL``.
        classifier: Fields of ``VideoMAEConfig``; None is VideoMAE-base.
    """
    import torch
    from diffusers import AutoencoderKL

    from wmpo_gym.reward.videomae import VideoMAESuccessClassifier
    from wmpo_gym.world.flow import RELEASE_CONTEXT_NOISE, RectifiedFlow
    from wmpo_gym.world.imagination import CompiledNetwork, Imagination
    from wmpo_gym.world.networks.autoencoder import LatentAutoencoder
    from wmpo_gym.world.networks.stdit import CONFIGS

    with torch.random.fork_rng(), device:
        stdit: Any = random_stdit(seed, **(CONFIGS["xl"] if network is None else network)).to(dtype)
        autoencoder = LatentAutoencoder(AutoencoderKL(**vae).to(dtype))
        success_classifier = VideoMAESuccessClassifier(model=classifier).eval()
    imagination = Imagination(
        CompiledNetwork(stdit) if compile else stdit,
        autoencoder,
        chunk=stdit.config.chunk,
        context_frames=stdit.config.context_frames,
        denoising_steps=Sampling.steps,
        image_size=image_size,
        action_dim=stdit.config.action_dim,
        flow=RectifiedFlow(context_noise=RELEASE_CONTEXT_NOISE),
    )
    return imagination, success_classifier


def paper_text(result: Mapping[str, Any]) -> str:
    """The result of :func:`bench_paper` as text."""
    return "\n".join(
        [
            f"STDiT3-XL ({result['network_parameters']:,} parameters), 256x256 pixels, {result['dtype']}, "
            f"{'compiled' if result['compiled'] else 'not compiled'}; all weights random",
            *transformer_text(result),
            machine_text(result["machine"]),
        ]
    )

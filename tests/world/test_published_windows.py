"""The chunks that training draws are windows of the release, and so are their pixels."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from wmpo_gym.data.episode import Episode
from wmpo_gym.tasks import MOVE_BLOCK
from wmpo_gym.world.networks.autoencoder import PixelAutoencoder
from wmpo_gym.world.sampler import SelfForcingSampler


def test_drawn_chunks_are_published_windows(golden) -> None:
    _, meta = golden("wm_windows")
    compared = 0
    for case in meta["cases"].values():
        args = case["args"]
        finish, context, chunk = args["finish"] + args.get("shift", 0), args.get("To", 4), args.get("Ta", 8)
        if args.get("stride", 1) != 1 or not case["num_windows"] or finish > 255:
            continue
        frames = np.broadcast_to(
            np.arange(finish + 1, dtype=np.uint8)[:, None, None, None], (finish + 1, 2, 2, 3)
        )
        actions = np.repeat(np.arange(finish, dtype=np.float32)[:, None], 3, axis=1)
        episode = Episode(frames.copy(), actions, None, finish, 0, 0, "", {})
        task = replace(MOVE_BLOCK, image_size=2, chunk=chunk, horizon=10 * chunk)
        sampler = SelfForcingSampler(
            [episode], task, n_rows=1, context_frames=context, seed=0, from_start=1.0, restart_prob=0.0
        )
        for window in case["windows"][::chunk]:
            drawn = sampler.next()
            assert drawn.context[0, :, 0, 0, 0].tolist() == window["context"]
            assert drawn.targets[0, :, 0, 0, 0].tolist() == window["target"]
            assert drawn.actions[0, [0, -1], 0].tolist() == window["action_rows"]
            compared += 1
    assert compared > 3


def test_pixels_are_those_of_the_pixel_autoencoder(golden) -> None:
    tensors, _ = golden("wm_windows")
    levels = torch.arange(256, dtype=torch.uint8).view(1, 256, 1, 1, 1).expand(-1, -1, 1, 1, 3)
    assert torch.equal(PixelAutoencoder().encode(levels)[0, 0, :, 0, 0], tensors["pixel_scale.out"])

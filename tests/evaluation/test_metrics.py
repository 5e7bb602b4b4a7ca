"""Metrics of imagined frames agree with torchmetrics."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torchmetrics.functional.image import peak_signal_noise_ratio

from wmpo_gym.evaluation.metrics import change_of_frames, psnr, psnr_of_clips


def test_psnr_is_that_of_torchmetrics() -> None:
    rng = np.random.default_rng(0)
    recorded = rng.integers(0, 256, (2, 3, 8, 8, 3), dtype=np.uint8)
    imagined = np.clip(recorded.astype(int) + rng.integers(-9, 10, recorded.shape), 0, 255).astype(np.uint8)
    a, b = torch.from_numpy(imagined).float(), torch.from_numpy(recorded).float()
    expected = [[float(peak_signal_noise_ratio(a[i, t], b[i, t], 255.0)) for t in range(3)] for i in range(2)]
    assert psnr(imagined, recorded) == pytest.approx(np.array(expected), abs=1e-4)
    clips = [float(peak_signal_noise_ratio(a[i], b[i], 255.0)) for i in range(2)]
    assert psnr_of_clips(list(imagined), list(recorded)) == pytest.approx(np.mean(clips), abs=1e-4)


def test_metrics_of_equal_frames_are_finite() -> None:
    frames = np.full((1, 2, 4, 4, 3), 7, np.uint8)
    assert np.isfinite(psnr(frames, frames)).all() and np.isfinite(psnr_of_clips([frames[0]], [frames[0]]))
    assert change_of_frames(frames, frames) == 0.0

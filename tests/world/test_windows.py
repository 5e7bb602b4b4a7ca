from __future__ import annotations

import numpy as np
import pytest

from wmpo_gym.world.windows import cut_windows, normalise_actions, window_indices


@pytest.fixture
def reference(golden):
    tensors, meta = golden("wm_windows")
    return {name: value.numpy() for name, value in tensors.items()}, meta


def arguments(args):
    finish = args["finish"] + args.get("shift", 0)
    sizes = {"context_frames": args.get("To", 4), "chunk": args.get("Ta", 8), "stride": args.get("stride", 1)}
    return finish, sizes


def test_windows_are_the_published_ones(reference):
    tensors, meta = reference
    actions = normalise_actions(tensors["raw.actions"], tensors["raw.q01"], tensors["raw.q99"])
    frames = np.broadcast_to(6 * np.arange(41, dtype=np.uint8)[:, None, None, None], (41, 2, 2, 3))
    for name, case in meta["cases"].items():
        finish, sizes = arguments(case["args"])
        in_frames, in_actions = window_indices(finish, **sizes)
        assert len(in_frames) == len(in_actions) == case["num_windows"], name
        windows = cut_windows(frames, actions, finish, **sizes)
        assert len(windows.frames) == len(windows.actions) == len(windows.prev_action) == case["num_windows"]
        if not case["num_windows"]:
            continue
        np.testing.assert_array_equal(in_frames, tensors[f"{name}.frames"])
        np.testing.assert_array_equal(windows.frames[..., 0, 0, 0], 6 * tensors[f"{name}.frames"])
        np.testing.assert_array_equal(windows.actions, tensors[f"{name}.actions"])
        for i, window in enumerate(case["windows"]):
            h = sizes["context_frames"]
            assert in_frames[i, :h].tolist() == window["context"]
            assert in_frames[i, h:].tolist() == window["target"]
            assert in_actions[i, [0, -1]].tolist() == window["action_rows"]


def test_pixels_are_those_of_the_pixel_autoencoder(reference):
    torch = pytest.importorskip("torch")
    from wmpo_gym.world.networks.autoencoder import PixelAutoencoder

    tensors, _ = reference
    levels = torch.arange(256, dtype=torch.uint8).view(1, 256, 1, 1, 1).expand(-1, -1, 1, 1, 3)
    found = PixelAutoencoder().encode(levels)[0, 0, :, 0, 0].numpy()
    np.testing.assert_array_equal(found, tensors["pixel_scale.out"])
    frames = np.broadcast_to(6 * np.arange(22, dtype=np.uint8)[:, None, None, None], (22, 2, 2, 3))
    windows = cut_windows(frames, np.zeros((21, 7), np.float32), context_frames=4, chunk=8)
    video = PixelAutoencoder().encode(torch.from_numpy(windows.frames[:1]))[0].numpy()
    np.testing.assert_array_equal(video, tensors["finish21.window0.video"])


def test_previous_action_led_to_the_last_context_frame():
    actions = np.arange(1, 7, dtype=np.float32)[:, None]
    windows = cut_windows(np.zeros((7, 1, 1, 3), np.uint8), actions, context_frames=2, chunk=3)
    assert windows.prev_action[:, 0].tolist() == [0, 1, 2, 3]
    assert windows.actions[:, 0, 0].tolist() == [1, 2, 3, 4]
    strided = cut_windows(np.zeros((7, 1, 1, 3), np.uint8), actions, context_frames=2, chunk=3, stride=2)
    assert strided.prev_action[:, 0].tolist() == [0, 2]


def test_an_episode_shorter_than_a_chunk_gives_no_window():
    windows = cut_windows(
        np.zeros((3, 4, 5, 3), np.uint8), np.zeros((2, 6), np.float32), context_frames=4, chunk=8
    )
    assert windows.frames.shape == (0, 12, 4, 5, 3)
    assert windows.actions.shape == (0, 8, 6) and windows.prev_action.shape == (0, 6)


@pytest.mark.parametrize(("n_frames", "n_actions"), [(21, 21), (22, 20)])
def test_a_missing_frame_or_action_is_an_error(n_frames, n_actions):
    """The published splitter gives an 11-frame last window here."""
    frames, actions = np.zeros((n_frames, 1, 1, 3), np.uint8), np.zeros((n_actions, 7), np.float32)
    with pytest.raises(ValueError, match=f"22 frames and 21 actions, got {n_frames} and {n_actions}"):
        cut_windows(frames, actions, 21, context_frames=4, chunk=8)


def test_sizes_must_be_positive():
    with pytest.raises(ValueError, match="stride must be at least 1, got 0"):
        window_indices(10, context_frames=4, chunk=8, stride=0)


@pytest.mark.parametrize("high", [0.5, 0.2, float("nan")])
def test_a_dimension_without_range_is_an_error(high):
    """The published code divides by zero here and trains on inf and NaN."""
    with pytest.raises(ValueError, match="Action dimension 2 has no range.*low 0.5"):
        normalise_actions(np.zeros((4, 3)), [-1.0, -1.0, 0.5], [1.0, 1.0, high])


def test_normalised_actions_are_not_clipped():
    found = normalise_actions([[0.0], [1.0], [2.0], [4.0]], [0.0], [2.0])
    assert found.dtype == np.float32 and found[:, 0].tolist() == [-1, 0, 1, 3]

"""Videos decode to what went in, as far as H.264 allows."""

from __future__ import annotations

import io

import av
import numpy as np
import pytest

from wmpo_gym.utils.video import data_uri, encode_video, save_video, side_by_side


def clip(n: int, size: int = 16) -> np.ndarray:
    frames = np.full((n, size, size, 3), 150, np.uint8)
    for i in range(n):
        frames[i, 4:9, i : i + 5] = (220, 40, 30)
    return frames


def decode(data: bytes) -> np.ndarray:
    with av.open(io.BytesIO(data)) as container:
        return np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])


@pytest.mark.parametrize("size", [16, 15])
def test_video_keeps_every_frame_and_its_picture(size):
    frames = clip(7, size)
    data, mime = encode_video(frames, scale=3)
    back = decode(data)
    assert mime.startswith("video/") and len(back) == 7
    assert back.shape[1] % 2 == back.shape[2] % 2 == 0
    sampled = back[:, 1 : 3 * size : 3, 1 : 3 * size : 3].astype(int)
    assert np.abs(sampled - frames).mean() < 4


def test_side_by_side_holds_the_last_frame_of_the_shorter_clip():
    left, right = clip(3), clip(5)
    joined = side_by_side(left, right, gap=2)
    assert joined.shape == (5, 16, 34, 3)
    assert (joined[4, :, :16] == left[2]).all() and (joined[4, :, 18:] == right[4]).all()
    with pytest.raises(ValueError, match="one size"):
        side_by_side(left, clip(3, 8))


def test_video_and_gif_are_written(tmp_path):
    assert decode(save_video(tmp_path / "a.mp4", clip(4)).read_bytes()).shape == (4, 96, 96, 3)
    pytest.importorskip("PIL")
    gif = save_video(tmp_path / "a.gif", clip(4), scale=2)
    back = decode(gif.read_bytes())
    assert back.shape == (4, 32, 32, 3) and np.abs(back[2, ::2, ::2].astype(int) - clip(4)[2]).max() < 8


def test_wrong_frames_are_refused():
    with pytest.raises(ValueError, match="uint8"):
        encode_video(np.zeros((3, 8, 8, 3), np.float32))


def test_data_uri_is_self_contained():
    assert data_uri(b"abc", "video/mp4") == "data:video/mp4;base64,YWJj"

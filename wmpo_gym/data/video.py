"""Lossless video in memory: RGB frames to FFV1 in Matroska and back, bit for bit."""

from __future__ import annotations

import io
from fractions import Fraction

import av
import numpy as np


def encode_lossless(frames: np.ndarray, fps: float = 10.0) -> bytes:
    """Encode frames without loss.

    Args:
        frames: uint8 (N, H, W, 3); any size, odd ones too.
        fps: Frames per second, for players only.

    Returns:
        The content of a ``.mkv`` file.
    """
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="matroska") as container:
        # FFV1's 8-bit RGB is called bgr0; getting there moves bytes and converts no colours.
        stream = container.add_stream("ffv1", rate=Fraction(fps).limit_denominator(1000))
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "bgr0"
        stream.codec_context.thread_count = 1  # threads cost more than they save at these sizes
        for image in frames:
            frame = av.VideoFrame.from_ndarray(image, format="rgb24").reformat(format="bgr0")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return buffer.getvalue()


def decode_lossless(data: bytes) -> np.ndarray:
    """Decode what :func:`encode_lossless` made.

    Returns:
        uint8 (N, H, W, 3).

    Raises:
        ValueError: If the data is not such a video.
    """
    try:
        with av.open(io.BytesIO(data), "r") as container:
            container.streams.video[0].codec_context.thread_count = 1
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    except (av.FFmpegError, IndexError) as error:
        raise ValueError(f"not a readable video ({error})") from error
    if not frames:
        raise ValueError("a video without frames")
    return np.stack(frames)

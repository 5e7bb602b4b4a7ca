"""Video: lossless encoding and decoding of RGB (FFV1 in Matroska), and reading of MP4, PNG and JPEG."""

from __future__ import annotations

import io
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

_RGB = "bgr0"  # FFV1's pixel format for 8-bit RGB
_PICTURES = {b"\x89PNG": "png_pipe", b"\xff\xd8": "jpeg_pipe"}  # first bytes: FFmpeg's name


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
        stream = container.add_stream("ffv1", rate=Fraction(fps).limit_denominator(1000))
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], _RGB
        stream.codec_context.thread_count = 1  # threads are slower at these image sizes
        for image in frames:
            container.mux(stream.encode(_packed(image)))
        container.mux(stream.encode())
    return buffer.getvalue()


def decode_lossless(data: bytes) -> np.ndarray:
    """Decode a video of :func:`encode_lossless`.

    Returns:
        uint8 (N, H, W, 3).

    Raises:
        ValueError: If the data is not such a video.
    """
    try:
        with av.open(io.BytesIO(data), "r") as container:
            container.streams.video[0].codec_context.thread_count = 1
            frames = [_unpacked(frame) for frame in container.decode(video=0)]
    except (av.FFmpegError, IndexError) as error:
        raise ValueError(f"not a readable video ({error})") from error
    if not frames:
        raise ValueError("a video without frames")
    return np.stack(frames)


def _packed(image: np.ndarray) -> av.VideoFrame:
    """Convert uint8 (H, W, 3) to an FFV1 frame; FFmpeg's own conversion starts threads for every frame."""
    height, width, _ = image.shape
    frame = av.VideoFrame(width, height, _RGB)
    plane = frame.planes[0]
    rows = np.zeros((height, plane.line_size), np.uint8)
    rows[:, : 4 * width] = np.pad(image[..., ::-1], ((0, 0), (0, 0), (0, 1))).reshape(height, -1)
    plane.update(rows.tobytes())
    return frame


def _unpacked(frame: av.VideoFrame) -> np.ndarray:
    if frame.format.name != _RGB:
        raise ValueError(f"a video of {frame.format.name} pixels, where {_RGB} was written")
    plane = frame.planes[0]
    rows = np.frombuffer(bytes(plane), np.uint8).reshape(frame.height, plane.line_size)
    return rows[:, : 4 * frame.width].reshape(frame.height, frame.width, 4)[..., 2::-1]


def read_frames(path: str | Path, fps: float, first: int, count: int) -> Iterator[np.ndarray]:
    """Decode consecutive frames of a video.

    Args:
        path: The video, an MP4.
        fps: Frames per second; frame i is shown at i / fps.
        first: Index of the first frame.
        count: Number of frames; fewer are yielded if the video ends earlier.

    Yields:
        uint8 (H, W, 3).

    Raises:
        ValueError: If it is not a readable video, or a frame in between is missing.
    """
    try:
        # The format is fixed, so that no playlist or other file with references is opened.
        with av.open(str(path), "r", format="mp4") as container:
            stream = container.streams.video[0]
            if stream.time_base is None:
                raise ValueError(f"{Path(path).name} has no time base")
            # Seeking goes to the previous key frame.
            container.seek(int(first / fps / stream.time_base), stream=stream)
            due = first
            for frame in container.decode(stream):
                number = -1 if frame.pts is None else round(float(frame.pts * stream.time_base) * fps)
                if number < due:
                    continue
                if number > due:
                    raise ValueError(f"{Path(path).name} lacks frame {due}")
                yield frame.to_ndarray(format="rgb24")
                due += 1
                if due == first + count:
                    return
    except (av.FFmpegError, IndexError) as error:
        raise ValueError(f"{Path(path).name} is not a readable video ({error})") from error


def decode_picture(data: bytes) -> np.ndarray:
    """Decode a PNG or JPEG to uint8 (H, W, 3).

    Raises:
        ValueError: If the data is no such image.
    """
    kinds = [kind for start, kind in _PICTURES.items() if data.startswith(start)]
    if not kinds:
        raise ValueError("a picture that is neither PNG nor JPEG")
    try:
        with av.open(io.BytesIO(data), "r", format=kinds[0]) as container:
            return next(container.decode(video=0)).to_ndarray(format="rgb24")
    except (av.FFmpegError, IndexError, StopIteration) as error:
        raise ValueError(f"not a readable picture ({error})") from error

"""Encode small frames as browser-compatible videos, also side by side."""

from __future__ import annotations

import base64
import io
from fractions import Fraction
from pathlib import Path

import numpy as np

from wmpo_gym.utils.io import write_file_atomic

# Codec, container, MIME type; the first one the local FFmpeg can write is used.
_CODECS = (("libx264", "mp4", "video/mp4"), ("libvpx-vp9", "webm", "video/webm"))


def upscale(frames: np.ndarray, factor: int) -> np.ndarray:
    """Enlarge frames by repeating pixels, without interpolation.

    Args:
        frames: uint8 (..., H, W, 3).
        factor: Whole number >= 1.
    """
    return frames.repeat(factor, axis=-3).repeat(factor, axis=-2)


def side_by_side(left: np.ndarray, right: np.ndarray, gap: int = 2) -> np.ndarray:
    """Join two clips; the shorter one holds its last frame.

    Args:
        left: uint8 (T1, H, W, 3).
        right: uint8 (T2, H, W, 3).
        gap: Columns of white between them.

    Returns:
        uint8 (max(T1, T2), H, 2 W + gap, 3).

    Raises:
        ValueError: If the frame sizes differ or a clip is empty.
    """
    if left.shape[1:] != right.shape[1:] or not len(left) or not len(right):
        raise ValueError(
            f"Clips must have frames of one size to be joined, got {left.shape} and {right.shape}."
        )
    length = max(len(left), len(right))
    clips = [clip[np.minimum(np.arange(length), len(clip) - 1)] for clip in (left, right)]
    bar = np.full((length, left.shape[1], gap, 3), 255, np.uint8)
    return np.concatenate([clips[0], bar, clips[1]], axis=2)


def encode_video(frames: np.ndarray, *, fps: float = 10.0, scale: int = 6) -> tuple[bytes, str]:
    """Encode frames for a browser.

    Args:
        frames: uint8 (N, H, W, 3).
        fps: Frames per second.
        scale: Enlargement by pixel repetition.

    Returns:
        The file's content and its MIME type (H.264 in MP4, or VP9 in WebM where FFmpeg lacks H.264).

    Raises:
        ValueError: If the frames are not such an array.
        RuntimeError: If the installed PyAV can write neither codec.
    """
    if frames.ndim != 4 or frames.dtype != np.uint8 or frames.shape[-1] != 3 or 0 in frames.shape:
        raise ValueError(f"A video needs uint8 frames (N, H, W, 3), got {frames.dtype} {frames.shape}.")
    codec, container_format, mime = _codec()
    # Chroma is stored at half resolution, so both sides must be even.
    frames = upscale(frames, scale)
    frames = np.pad(frames, ((0, 0), (0, frames.shape[1] % 2), (0, frames.shape[2] % 2), (0, 0)), mode="edge")
    return _mux(frames, codec, container_format, fps), mime


def save_video(path: str | Path, frames: np.ndarray, *, fps: float = 10.0, scale: int = 6) -> Path:
    """Write frames to ``.mp4`` or ``.webm`` (as the codec has it) or to ``.gif`` (needs Pillow).

    Args:
        path: Target; its suffix decides between a GIF and a video.
        frames: uint8 (N, H, W, 3).
        fps: Frames per second.
        scale: Enlargement by pixel repetition.

    Returns:
        The path written; a video's suffix follows the codec that was available.
    """
    path = Path(path)
    if path.suffix == ".gif":
        data = _encode_gif(upscale(frames, scale), fps)
    else:
        data, mime = encode_video(frames, fps=fps, scale=scale)
        path = path.with_suffix("." + mime.partition("/")[2])
    with write_file_atomic(path) as temporary:
        temporary.write_bytes(data)
    return path


def data_uri(data: bytes, mime: str) -> str:
    """The bytes as a ``data:`` URI that an HTML page can hold."""
    return f"data:{mime};base64,{base64.b64encode(data).decode('ascii')}"


def _codec() -> tuple[str, str, str]:
    import av

    for codec in _CODECS:
        try:
            av.Codec(codec[0], "w")
        except av.codec.codec.UnknownCodecError:
            continue
        return codec
    raise RuntimeError(
        "This PyAV can write neither H.264 nor VP9; install it from PyPI: pip install --force-reinstall av"
    )


def _mux(frames: np.ndarray, codec: str, container_format: str, fps: float) -> bytes:
    import av

    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container_format) as container:
        stream = container.add_stream(codec, rate=Fraction(fps).limit_denominator(1000))
        assert isinstance(stream, av.VideoStream)
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        stream.options = {"crf": "20", "preset": "slow"} if codec == "libx264" else {"crf": "30", "b": "0"}
        stream.codec_context.thread_count = 1
        for image in frames:
            container.mux(
                stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24"))
            )
        container.mux(stream.encode())
    return buffer.getvalue()


def _encode_gif(frames: np.ndarray, fps: float) -> bytes:
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("Writing a GIF needs Pillow. Install it with: pip install pillow") from error
    # One palette for all frames, or colours would flicker.
    strip = Image.fromarray(frames.reshape(-1, *frames.shape[2:])).quantize(256, dither=Image.Dither.NONE)
    images = [Image.fromarray(f).quantize(palette=strip, dither=Image.Dither.NONE) for f in frames]
    buffer = io.BytesIO()
    images[0].save(buffer, "GIF", save_all=True, append_images=images[1:], duration=round(1000 / fps), loop=0)
    return buffer.getvalue()

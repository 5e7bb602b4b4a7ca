"""A toy robot's recordings, written by hand in the formats of others."""

from __future__ import annotations

import io
import json
import tarfile
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

SENTENCE = "move the dot onto the square"
LIMIT, FPS, HORIZON = 0.1, 10, 12


def picture(dot: np.ndarray, square: np.ndarray, height: int, width: int) -> np.ndarray:
    y, x = np.meshgrid((np.arange(height) + 0.5) / height, (np.arange(width) + 0.5) / width, indexing="ij")
    image = np.full((height, width, 3), 150, np.uint8)
    image[np.maximum(abs(x - square[0]), abs(y - square[1])) < 0.15] = (220, 60, 40)
    image[np.hypot(x - dot[0], y - dot[1]) < 0.12] = (30, 30, 30)
    return image


def record(seed: int, height: int = 32, width: int = 32, noise: float = 0.5) -> dict:
    """Frames uint8 (T+1, H, W, 3), actions (T, 3) of two moves and a gripper, the dot's places, outcome."""
    rng = np.random.default_rng(seed)
    dot, square = rng.uniform(0.2, 0.8, (2, 2))
    frames, actions, places, success = [picture(dot, square, height, width)], [], [dot], False
    while not success and len(actions) < HORIZON:
        move = np.clip(square - dot + rng.normal(0, noise, 2) * LIMIT, -LIMIT, LIMIT)
        dot = np.clip(dot + move, 0.05, 0.95)
        actions.append([*move, len(actions) % 2])
        frames.append(picture(dot, square, height, width))
        places.append(dot)
        success = bool(np.abs(dot - square).max() < 0.12) if seed % 3 else False
    return {
        "frames": np.stack(frames),
        "actions": np.array(actions, np.float32),
        "places": np.array(places, np.float32),
        "success": success,
    }


def records(n: int, **options) -> list[dict]:
    return [record(seed, **options) for seed in range(n)]


def write_robomimic(
    path: Path,
    episodes: list[dict],
    *,
    next_obs: bool = True,
    rewards: bool = True,
    places: bool = False,
    states: list[np.ndarray] | None = None,
    env: str = "Toy",
) -> Path:
    """With ``states`` instead of pictures where they are given."""
    import h5py

    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        data.attrs["env_args"] = json.dumps({"env_name": env, "env_kwargs": {"control_freq": FPS}})
        for i, e in enumerate(episodes):
            demo = data.create_group(f"demo_{i}")
            demo.attrs["ep_meta"] = json.dumps({"lang": SENTENCE})
            demo["actions"] = e["actions"]
            if rewards:
                done = np.zeros(len(e["actions"]))
                done[-1] = e["success"]
                demo["rewards"] = done
            if states is not None:
                demo["states"] = states[i]
                continue
            demo["obs/agentview_image"] = e["frames"][:-1]
            demo["obs/wrist_image"] = e["frames"][:-1, ::-1]
            demo["obs/object"] = np.zeros((len(e["actions"]), 7))
            if next_obs:
                demo["next_obs/agentview_image"] = e["frames"][1:]
            if places:
                demo["obs/robot0_eef_pos"] = e["places"][:-1]
                if next_obs:
                    demo["next_obs/robot0_eef_pos"] = e["places"][1:]
    return path


def write_video(path: Path, frames: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264rgb", rate=FPS)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "rgb24"
        stream.options, stream.time_base = {"qp": "0", "g": "5"}, Fraction(1, FPS)
        for image in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())


def encode_png(image: np.ndarray) -> bytes:
    codec = av.CodecContext.create("png", "w")
    codec.height, codec.width, codec.pix_fmt, codec.time_base = *image.shape[:2], "rgb24", Fraction(1, FPS)
    return b"".join(bytes(p) for p in codec.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))


def write_lerobot_v21(
    root: Path, episodes: list[dict], *, video: bool = True, label: bool = True, places: bool = False
) -> Path:
    """Row t holds picture t and action t; the last row's action is not executed."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    key, side = "observation.images.front", episodes[0]["frames"].shape[1:]
    info = {
        "codebase_version": "v2.1",
        "fps": FPS,
        "chunks_size": 2,
        "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        "video_path": "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
        "features": {
            key: {"dtype": "video" if video else "image", "shape": list(side)},
            "action": {"dtype": "float32", "shape": [3]},
        },
    }
    lines = []
    for i, e in enumerate(episodes):
        place = {"episode_chunk": i // 2, "episode_index": i, "video_key": key}
        rows = len(e["frames"])
        actions = np.concatenate([e["actions"], e["actions"][-1:]])
        columns = {
            "episode_index": np.full(rows, i),
            "frame_index": np.arange(rows),
            "action": pa.FixedSizeListArray.from_arrays(pa.array(actions.reshape(-1)), 3),
        }
        if places:
            columns["observation.state"] = pa.FixedSizeListArray.from_arrays(
                pa.array(e["places"].reshape(-1)), 2
            )
        if label:
            columns["next.success"] = (np.arange(rows) >= rows - 2) & e["success"]
        if video:
            write_video(root / info["video_path"].format(**place), e["frames"])
        else:
            columns[key] = [{"bytes": encode_png(f), "path": None} for f in e["frames"]]
        file = root / info["data_path"].format(**place)
        file.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table(columns), file)
        lines.append(json.dumps({"episode_index": i, "tasks": [SENTENCE], "length": rows}))
    (root / "meta").mkdir()
    (root / "meta" / "info.json").write_text(json.dumps(info))
    (root / "meta" / "episodes.jsonl").write_text("\n".join(lines))
    return root


def write_wmpo(path: Path, episodes: list[dict], *, state_ids: list[int] | None = None) -> Path:
    """Videos are as long as the horizon, black after the end."""
    with tarfile.open(path, "w") as tar:
        for i, e in enumerate(episodes):
            steps = len(e["actions"])
            video = np.zeros((HORIZON + 1, *e["frames"].shape[1:]), np.uint8)
            video[: steps + 1] = e["frames"]
            actions = np.zeros((HORIZON, 3), np.float32)
            actions[:steps] = e["actions"]
            meta = {"complete": e["success"], "finish_step": steps, "unique_id": f"id-{i}"}
            members = {
                "video.npy": _npy(video),
                "action.npy": _npy(actions),
                "meta.json": json.dumps(meta).encode(),
                "state_id.npy": _npy(np.uint8(i if state_ids is None else state_ids[i])),
            }
            for kind, data in members.items():
                member = tarfile.TarInfo(f"{i:06d}.{kind}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return path


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()

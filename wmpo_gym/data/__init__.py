"""Episodes on disk, and reading and writing files so that a crash leaves nothing half-written."""

from __future__ import annotations

from wmpo_gym.data.episode import Episode
from wmpo_gym.data.frames import StoredFrames
from wmpo_gym.data.store import BrokenEpisodeError, EpisodeStore, load_episode, open_episode, save_episode
from wmpo_gym.utils.io import (
    ArtifactError,
    WriteError,
    load_safetensors,
    read_json,
    save_safetensors,
    write_dir_atomic,
    write_json_atomic,
)

__all__ = [
    "ArtifactError",
    "BrokenEpisodeError",
    "Episode",
    "EpisodeStore",
    "StoredFrames",
    "WriteError",
    "load_episode",
    "load_safetensors",
    "open_episode",
    "read_json",
    "save_episode",
    "save_safetensors",
    "write_dir_atomic",
    "write_json_atomic",
]

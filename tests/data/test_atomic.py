"""Files are complete or absent, and a damaged one is named with a remedy."""

from __future__ import annotations

import errno
import json
import os

import numpy as np
import pytest
import torch

from wmpo_gym.utils import io as atomic
from wmpo_gym.utils.io import (
    ArtifactError,
    WriteError,
    load_safetensors,
    read_json,
    save_safetensors,
    write_dir_atomic,
    write_json_atomic,
)

FULL = "/dev/full"  # every write to it fails with "No space left on device"


def test_json_round_trip_with_numbers_json_does_not_know(tmp_path):
    file = tmp_path / "new" / "results.json"
    write_json_atomic(
        file,
        {
            "a": np.float32(0.5),
            "b": float("nan"),
            "c": (1, np.int64(2)),
            "d": np.arange(2),
            "e": tmp_path,
            3: None,
        },
    )
    assert read_json(file) == {"a": 0.5, "b": None, "c": [1, 2], "d": [0, 1], "e": str(tmp_path), "3": None}
    assert [p.name for p in file.parent.iterdir()] == ["results.json"]


def test_json_that_cannot_be_expressed_leaves_the_old_file(tmp_path):
    file = tmp_path / "a.json"
    write_json_atomic(file, [1])
    with pytest.raises(TypeError):
        write_json_atomic(file, [object()])
    assert read_json(file) == [1] and os.listdir(tmp_path) == ["a.json"]


@pytest.mark.parametrize("content", [b'{"a": 1', b"", b"\xff\xfe", b"{'a': 1}"])
def test_damaged_json_is_named(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ArtifactError, match=r"config\.json is not valid JSON.*restore"):
        read_json(tmp_path / "config.json")


def test_missing_files_are_named(tmp_path):
    with pytest.raises(ArtifactError, match=r"x\.json does not exist"):
        read_json(tmp_path / "x.json")
    with pytest.raises(ArtifactError, match=r"x\.safetensors does not exist"):
        load_safetensors(tmp_path / "x.safetensors")
    with pytest.raises(ArtifactError, match="cannot be read"):
        read_json(tmp_path)


@pytest.mark.parametrize("framework", ["pt", "np"])
def test_safetensors_round_trip(tmp_path, framework):
    file = tmp_path / "m.safetensors"
    values = {"w": np.arange(6, dtype=np.float32).reshape(2, 3).T, "n": np.array(3)}
    save_safetensors(
        file, {k: torch.from_numpy(v) for k, v in values.items()} if framework == "pt" else values
    )
    loaded = load_safetensors(file, framework=framework)
    assert isinstance(loaded["w"], torch.Tensor if framework == "pt" else np.ndarray)
    assert all(np.array_equal(np.asarray(loaded[k]), v) for k, v in values.items())
    plain_file = tmp_path / "plain"
    plain_file.touch()
    assert file.stat().st_mode == plain_file.stat().st_mode


def test_tensors_that_share_memory_can_be_saved(tmp_path):
    w = torch.randn(3)
    save_safetensors(tmp_path / "m.safetensors", {"a": w, "b": w})
    assert torch.equal(load_safetensors(tmp_path / "m.safetensors")["b"], w)


@pytest.mark.parametrize("damage", ["truncate", "header", "empty"])
def test_damaged_safetensors_are_named(tmp_path, damage):
    file = tmp_path / "m.safetensors"
    save_safetensors(file, {"w": torch.randn(100)})
    data = file.read_bytes()
    changed = {"truncate": data[:-7], "header": data.replace(b"F32", b"F99"), "empty": b""}
    file.write_bytes(changed[damage])
    with pytest.raises(ArtifactError, match=r"m\.safetensors is not a readable safetensors file.*again"):
        load_safetensors(file)


def test_full_disk_leaves_the_earlier_file(tmp_path, monkeypatch):
    file = tmp_path / "results.json"
    write_json_atomic(file, {"kept": True})

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        WriteError, match=r"results\.json.*No space left.*Nothing half-written.*free some space"
    ):
        write_json_atomic(file, {"kept": False})
    with pytest.raises(WriteError, match="free some space"):
        save_safetensors(tmp_path / "m.safetensors", {"w": torch.zeros(2)})
    assert os.listdir(tmp_path) == ["results.json"] and read_json(file) == {"kept": True}


@pytest.mark.skipif(not os.path.exists(FULL), reason="needs the Linux device that is always full")
def test_safetensors_own_error_for_a_full_disk_is_understood(tmp_path):
    with pytest.raises(WriteError, match="free some space") as caught, write_dir_atomic(tmp_path / "d"):
        from safetensors import SafetensorError

        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    assert caught.value.errno == errno.ENOSPC and os.listdir(tmp_path) == []
    with pytest.raises(WriteError, match="free some space"), write_dir_atomic(tmp_path / "d"):
        with open(FULL, "w") as file:
            file.write("x" * 100_000)
    assert os.listdir(tmp_path) == []


def test_directory_appears_whole_and_is_replaced_whole(tmp_path):
    path = tmp_path / "world"
    for version in ("1", "2"):
        with write_dir_atomic(path) as temporary:
            (temporary / "network").mkdir()
            (temporary / "network" / "config.json").write_text(version)
            assert not path.exists() or (path / "network" / "config.json").read_text() == "1"
        assert (path / "network" / "config.json").read_text() == version
    assert os.listdir(tmp_path) == ["world"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_interrupted_directory_leaves_the_earlier_one(tmp_path, error):
    path = tmp_path / "world"
    with write_dir_atomic(path) as temporary:
        (temporary / "a").write_text("1")
    with pytest.raises(error), write_dir_atomic(path) as temporary:
        (temporary / "a").write_text("2")
        raise error
    assert (path / "a").read_text() == "1" and os.listdir(tmp_path) == ["world"]


def test_foreign_files_are_never_deleted(tmp_path):
    path = tmp_path / "home"
    path.mkdir()
    (path / "thesis.tex").write_text("years of work")
    with (
        pytest.raises(WriteError, match=r"thesis\.tex.*choose another directory"),
        write_dir_atomic(path) as temporary,
    ):
        (temporary / "config.json").write_text("{}")
    assert os.listdir(path) == ["thesis.tex"] and os.listdir(tmp_path) == ["home"]


@pytest.mark.parametrize("killed_at", ["before first rename", "between renames", "after second rename"])
def test_a_kill_at_any_moment_is_mended_by_the_next_write(tmp_path, monkeypatch, killed_at):
    path = tmp_path / "world"
    with write_dir_atomic(path) as temporary:
        (temporary / "a").write_text("1")
    # What a killed process leaves: no clean-up code ran.
    (tmp_path / ".world.tmp").mkdir()
    if killed_at == "between renames":
        path.rename(tmp_path / ".world.old")
    elif killed_at == "after second rename":
        (tmp_path / ".world.old").mkdir()
    with pytest.raises(RuntimeError), write_dir_atomic(path):
        raise RuntimeError
    assert (path / "a").read_text() == "1" and os.listdir(tmp_path) == ["world"]


def test_failure_between_the_two_renames_puts_the_old_directory_back(tmp_path, monkeypatch):
    path = tmp_path / "world"
    with write_dir_atomic(path) as temporary:
        (temporary / "a").write_text("1")
    replace, calls = os.replace, []

    def failing(source, target):
        calls.append(target)
        if len(calls) == 2:
            raise OSError(errno.EIO, "broken disk")
        replace(source, target)

    monkeypatch.setattr(atomic.os, "replace", failing)
    with pytest.raises(WriteError, match="broken disk"), write_dir_atomic(path) as temporary:
        (temporary / "a").write_text("2")
    assert len(calls) == 3 and (path / "a").read_text() == "1" and os.listdir(tmp_path) == ["world"]


def test_sha256_notices_an_edit(tmp_path):
    file = tmp_path / "a"
    file.write_bytes(b"abc")
    assert atomic.sha256(file).startswith("ba7816bf")


def test_results_are_readable_by_people(tmp_path):
    write_json_atomic(tmp_path / "a.json", {"ü": [1]})
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert "ü" in text and text.endswith("}\n") and json.loads(text) == {"ü": [1]}

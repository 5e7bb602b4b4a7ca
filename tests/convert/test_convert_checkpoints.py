"""Files of others: nothing of theirs runs, and what is damaged is named."""

from __future__ import annotations

import json
import os
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from wmpo_gym.convert import checkpoints
from wmpo_gym.convert.checkpoints import (
    check_disk,
    check_layout,
    check_memory,
    copy_safetensors,
    read_weights,
    size_of,
)
from wmpo_gym.utils.io import ArtifactError
from wmpo_gym.utils.memory import available_memory

STATE = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.ones(1)}


class Code:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def same(found, expected=STATE):
    return set(found) == set(expected) and all(torch.equal(found[k], expected[k]) for k in expected)


def shards(directory):
    save_file({"a.weight": STATE["a.weight"]}, directory / "model-00001-of-00002.safetensors")
    save_file({"b": STATE["b"]}, directory / "model-00002-of-00002.safetensors")
    places = {"a.weight": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    return index


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("wrapper", [None, "rm_model_state_dict", "state_dict", "model"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_state_dicts_of_torch(legacy, wrapper, prefix, tmp_path):
    state = {f"{prefix}{name}": value for name, value in STATE.items()}
    content = {wrapper: state, "rm_optim_state_dict": {"lr": 1.0}} if wrapper else state
    torch.save(content, tmp_path / "w.pth", _use_new_zipfile_serialization=not legacy)
    assert zipfile.is_zipfile(tmp_path / "w.pth") is not legacy
    assert same(read_weights(tmp_path / "w.pth"))
    assert same(read_weights(tmp_path))


def test_shards_index_and_training_checkpoints(tmp_path):
    index = shards(tmp_path)
    assert same(read_weights(index)) and same(read_weights(tmp_path))
    save_file(STATE, tmp_path / "other.safetensors")
    assert same(read_weights(tmp_path / "other.safetensors"))
    (tmp_path / "epoch0" / "model").mkdir(parents=True)
    shards(tmp_path / "epoch0" / "model")
    torch.save({"b": torch.zeros(1)}, tmp_path / "epoch0" / "ema.pt")
    assert same(read_weights(tmp_path / "epoch0"))
    assert set(read_weights(tmp_path / "epoch0" / "ema.pt")) == {"b"}


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_with_code_is_refused_and_not_run(legacy, tmp_path):
    content = {**STATE, "evil": Code(tmp_path / "run")}
    torch.save(content, tmp_path / "w.pth", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ArtifactError, match=r"w\.pth is a pickle with code in it \(it asks for \w+\.mkdir\)"):
        read_weights(tmp_path / "w.pth")
    assert not (tmp_path / "run").exists()


def test_a_whole_module_is_code(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "w.pt")
    with pytest.raises(ArtifactError, match=r"it asks for torch\.nn\.modules\.linear\.Linear"):
        read_weights(tmp_path / "w.pt")


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_truncated_files_are_named(suffix, share, tmp_path):
    file = tmp_path / f"w{suffix}"
    big = {"a": torch.randn(500), "b": torch.randn(500)}
    save_file(big, file) if suffix == ".safetensors" else torch.save(big, file)
    file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])
    with pytest.raises(ArtifactError, match=rf"w\{suffix} is not a readable .*cut off"):
        read_weights(file)


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth", "w.bin", "model.safetensors.index.json"])
@pytest.mark.parametrize("n", [0, 1, 9, 200, 10_000])
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_random_bytes_are_a_named_error(name, n, tmp_path):
    file = tmp_path / name
    for seed in range(5):
        file.write_bytes(np.random.default_rng([n, seed]).bytes(n))
        with pytest.raises(ArtifactError, match=name.replace(".", r"\.")):
            read_weights(file)


def test_faults_of_shards_are_named(tmp_path):
    index = shards(tmp_path)
    second = tmp_path / "model-00002-of-00002.safetensors"
    save_file({"c": STATE["b"]}, second)
    with pytest.raises(
        ArtifactError, match="00002-of-00002.safetensors lacks b, which model.safetensors.ind"
    ):
        read_weights(tmp_path)
    second.write_bytes(second.read_bytes()[:-1])
    with pytest.raises(ArtifactError, match="00002-of-00002.safetensors is not a readable"):
        read_weights(tmp_path)
    second.unlink()
    with pytest.raises(
        ArtifactError, match="lacks 1 of the 2 shards in .*: model-00002-of-00002.safetensors"
    ):
        read_weights(tmp_path)
    index.write_text(json.dumps({"weight_map": {"b": "../secret.safetensors"}}))
    save_file(STATE, tmp_path.parent / "secret.safetensors")
    with pytest.raises(ArtifactError, match="lacks 1 of the 1 shards"):
        read_weights(tmp_path)
    index.write_text('{"weight_map": {"b": 3}}')
    with pytest.raises(ArtifactError, match="has no weight_map"):
        read_weights(tmp_path)
    index.write_text("{}")
    with pytest.raises(ArtifactError, match="has no weight_map"):
        read_weights(tmp_path)


def test_nothing_is_guessed(tmp_path):
    with pytest.raises(ArtifactError, match="does not exist"):
        read_weights(tmp_path / "nowhere")
    with pytest.raises(ArtifactError, match="holds no weights; looked for"):
        read_weights(tmp_path)
    shards(tmp_path).unlink()
    with pytest.raises(ArtifactError, match=r"holds 2 weight files \(model-00001.*\) and no index"):
        read_weights(tmp_path)
    save_file(STATE, tmp_path / "model.safetensors")  # now one of them has the usual name
    save_file({"c": STATE["b"]}, tmp_path / "model.fp16.safetensors")
    assert same(read_weights(tmp_path))
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ArtifactError, match="no state dict but a list"):
        read_weights(tmp_path / "list.pt")
    torch.save({**STATE, "step": 3}, tmp_path / "more.pt")
    with pytest.raises(ArtifactError, match=r"more than tensors by name: step \(int\)"):
        read_weights(tmp_path / "more.pt")


def test_layouts_are_compared_name_by_name():
    expected = {"a.weight": (2, 3), "b": (1,)}
    assert check_layout({**STATE, "old": STATE["b"]}, expected, "a toy", dead=["old", "older"]) == ["old"]
    wrong = {"b": torch.ones(2), "c": torch.ones(1)}
    message = (
        r"not a toy\. Of 2 tensors, 1 missing: a.weight; 1 unknown: c; 1 of another shape: b \(2,\) inst"
    )
    with pytest.raises(ArtifactError, match=message):
        check_layout(wrong, expected, "a toy")
    with pytest.raises(ArtifactError, match="1 of another type: b torch.int64"):
        check_layout({**STATE, "b": torch.ones(1, dtype=torch.long)}, expected, "a toy")
    with pytest.raises(ArtifactError, match="40 missing: 0, .* and 10 more"):
        check_layout({}, {str(i): () for i in range(40)}, "a toy")


def test_copies_are_what_the_views_show(tmp_path):
    packed = torch.randn(6, 4)
    tensors = {
        "odd": torch.randn(3).bfloat16(),
        "third": packed.chunk(3)[1],
        "column": packed[:, 1],
        "number": torch.tensor(2.5),
        "half": torch.randn(1, 2).half(),
        "none": torch.zeros(0, 3),
    }
    copy_safetensors(tmp_path / "w.safetensors", tensors)
    found = load_file(tmp_path / "w.safetensors")
    assert same(found, tensors) and all(found[k].dtype == tensors[k].dtype for k in tensors)
    assert size_of(tensors) == 6 + 32 + 24 + 4 + 4


def test_room_is_measured(tmp_path, monkeypatch):
    available = available_memory()
    assert available is None or 2**20 < available < 2**50
    check_disk(tmp_path / "not" / "there", 1)
    with pytest.raises(ArtifactError, match=r"not/there takes 1000000000.0 GB and .* GB are free"):
        check_disk(tmp_path / "not" / "there", 10**18)
    monkeypatch.setattr(checkpoints, "available_memory", lambda: 2 * 10**9)
    check_memory(10**9, "It")
    with pytest.raises(ArtifactError, match="It takes 3.0 GB of memory and 2.0 GB are available"):
        check_memory(3 * 10**9, "It")
    monkeypatch.setattr(checkpoints, "available_memory", lambda: None)
    check_memory(10**18, "It")


def test_old_files_must_fit_into_memory(tmp_path, monkeypatch):
    torch.save(STATE, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    monkeypatch.setattr(checkpoints, "available_memory", lambda: 10)
    with pytest.raises(ArtifactError, match=r"old\.pth takes 0.0 GB of memory"):
        read_weights(tmp_path / "old.pth")

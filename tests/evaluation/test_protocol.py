"""A protocol survives JSON, and a result measured otherwise is named as such."""

from __future__ import annotations

import dataclasses
import json

import pytest

from wmpo_gym.rollouts.protocol import (
    EvalProtocol,
    ProtocolMismatchWarning,
    installed_versions,
    load_result,
    protocol_path,
    save_result,
)
from wmpo_gym.tasks import get_task
from wmpo_gym.utils.io import ArtifactError, write_json_atomic


@pytest.fixture
def protocol() -> EvalProtocol:
    return EvalProtocol.make("move-block", "test", 8, seed=3, deterministic=False)


def test_make_takes_the_first_start_states_of_the_split(protocol):
    assert protocol.start_state_ids == tuple(get_task("move-block").split_ids("test")[:8])
    assert protocol.episodes == 8 and protocol.env_id == "WMPO-Simulated-v0"
    assert protocol.versions == installed_versions() and "numpy" in protocol.versions


@pytest.mark.parametrize("episodes", [0, 100_000])
def test_no_start_state_counts_twice(episodes):
    with pytest.raises(ValueError, match="start states"):
        EvalProtocol.make("move-block", "test", episodes, seed=0, deterministic=True)


def test_json_round_trip_has_no_differences(protocol):
    back = EvalProtocol.from_dict(json.loads(json.dumps(protocol.to_dict())))
    assert back.differences(protocol) == []
    assert back.start_state_ids == protocol.start_state_ids


def test_every_difference_is_named(protocol):
    task = get_task("move-block").to_dict() | {"success_tolerance_px": 9.0}
    other = dataclasses.replace(protocol, seed=4, task=task, versions=protocol.versions | {"numpy": "0.1"})
    text = "\n".join(protocol.differences(other))
    assert "seed: 3, expected 4" in text
    assert f"task.success_tolerance_px: {protocol.task['success_tolerance_px']}, expected 9.0" in text
    assert "versions.numpy" in text and "expected '0.1'" in text
    assert len(protocol.differences(other)) == 3


def test_result_round_trip_is_silent_and_a_mismatch_warns(tmp_path, protocol, recwarn):
    file = tmp_path / "results.json"
    save_result(file, {"success": 0.5}, protocol)
    assert load_result(file, protocol)[0] == {"success": 0.5}
    assert load_result(file)[1].differences(protocol) == []
    assert not recwarn.list
    with pytest.warns(ProtocolMismatchWarning, match="deterministic: False, expected True"):
        load_result(file, dataclasses.replace(protocol, deterministic=True))


def test_another_version_warns_without_an_expected_protocol(tmp_path, protocol):
    old = dataclasses.replace(protocol, versions=protocol.versions | {"numpy": "1.0"})
    save_result(tmp_path / "r.json", {}, old)
    with pytest.warns(ProtocolMismatchWarning, match="versions.numpy: '1.0'"):
        load_result(tmp_path / "r.json")


def test_missing_or_foreign_protocol_is_an_error(tmp_path, protocol):
    file = tmp_path / "r.json"
    write_json_atomic(file, {})
    with pytest.raises(ArtifactError, match="does not exist"):
        load_result(file)
    write_json_atomic(protocol_path(file), {"seed": 1})
    with pytest.raises(ValueError, match="not an evaluation protocol"):
        load_result(file)

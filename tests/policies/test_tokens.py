"""Action tokens against the published tokenizer's numbers."""

from __future__ import annotations

import pytest
import torch

from wmpo_gym.policies.tokens import ActionTokenizer, unnormalise_actions


@pytest.fixture(scope="module")
def reference(golden):
    return golden("action_tokens")


def test_bins_match_reference(reference):
    tensors, _ = reference
    tokenizer = ActionTokenizer()
    assert torch.equal(tokenizer.centers, tensors["bins.centers"])


@pytest.mark.parametrize("case", ["encode", "encode_f32"])
def test_encoding_matches_reference_including_edges_and_infinities(reference, case):
    tensors, _ = reference
    tokenizer = ActionTokenizer()
    indices = tokenizer.encode(tensors[f"{case}.value"])
    assert torch.equal(indices + tokenizer.first_token_id, tensors[f"{case}.token_id"])


def test_decoding_matches_reference(reference):
    tensors, meta = reference
    tokenizer = ActionTokenizer()
    inside = (tensors["decode.token_id"] >= 31744) & (tensors["decode.token_id"] <= 31999)
    indices = tensors["decode.token_id"][inside] - tokenizer.first_token_id
    assert torch.equal(tokenizer.decode(indices), tensors["decode.value"][inside].float())
    value = tensors["encode.value"]
    decoded = tokenizer.decode(tokenizer.encode(value))
    assert torch.equal(decoded, tensors["encode.roundtrip"].float())
    ordinary = value.abs() <= 1
    error = (decoded - value)[ordinary].abs().max().item()
    assert error == pytest.approx(meta["results"]["max_roundtrip_error_in_range"], abs=1e-7)


def test_unnormalisation_matches_reference(reference):
    tensors, meta = reference
    stats = {k: torch.tensor(v, dtype=torch.float64) for k, v in meta["stats"].items() if k != "mask"}
    mask, actions = torch.tensor(meta["stats"]["mask"]), tensors["unnorm.normalized"]
    for name, low, high, m in [
        ("q99_mask", "q01", "q99", mask),
        ("q99_nomask", "q01", "q99", None),
        ("minmax_mask", "min", "max", mask),
    ]:
        result = unnormalise_actions(actions, stats[low], stats[high], m)
        torch.testing.assert_close(result, tensors[f"unnorm.{name}"], rtol=0, atol=1e-12)


def test_nan_is_refused_where_the_published_code_moves_at_full_speed(reference):
    assert reference[1]["results"]["nan_encodes_to"] == 31744  # the highest action
    with pytest.raises(ValueError, match="NaN"):
        ActionTokenizer().encode(torch.tensor([0.0, float("nan")]))


def test_centred_bins_hold_zero_and_both_limits_exactly():
    tokenizer = ActionTokenizer(15, "centers", 300)
    values = torch.tensor([-1.0, 0.0, 1.0])
    assert torch.equal(tokenizer.decode(tokenizer.encode(values)), values)
    dense = torch.linspace(-1.2, 1.2, 501)
    error = (tokenizer.decode(tokenizer.encode(dense)) - dense.clamp(-1, 1)).abs().max()
    assert error <= 1 / 14 + 1e-6


@pytest.mark.parametrize("layout", ["edges", "centers"])
def test_every_index_survives_the_way_there_and_back(layout):
    tokenizer = ActionTokenizer(16, layout, 100)
    indices = torch.arange(16)
    expected = indices.clamp(min=1) if layout == "edges" else indices  # indices 0 and 1 share the highest bin
    assert torch.equal(tokenizer.encode(tokenizer.decode(indices)), expected)


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="middle.*edges, centers"):
        ActionTokenizer(layout="middle")
    with pytest.raises(ValueError, match="n_bins"):
        ActionTokenizer(1)

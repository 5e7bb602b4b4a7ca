from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from wmpo_gym.reward.calibration import Calibration
from wmpo_gym.reward.classifier import StreamState, SuccessClassifier
from wmpo_gym.reward.conv import ConvSuccessClassifier
from wmpo_gym.reward.data import first_success
from wmpo_gym.utils.io import ArtifactError

SIZE = 16


def conv(window: int = 2, n_instructions: int = 2, size: int = SIZE) -> ConvSuccessClassifier:
    with torch.random.fork_rng():
        torch.manual_seed(window)
        return ConvSuccessClassifier(image_size=size, window=window, n_instructions=n_instructions).eval()


def frames(*shape: int, size: int = SIZE) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randint(0, 256, (*shape, size, size, 3), dtype=torch.uint8, generator=generator)


# -- the network ---------------------------------------------------------------------------------------------
def test_size_of_the_bundled_network():
    classifier = conv(size=40)
    assert 0.1e6 < sum(p.numel() for p in classifier.parameters()) < 0.25e6
    assert classifier.preprocess(frames(3, size=40)).shape == (3, 3, 40, 40)


def test_normalisation_is_to_plus_minus_one():
    picture = torch.zeros(1, SIZE, SIZE, 3, dtype=torch.uint8)
    picture[0, 0, 1] = torch.tensor([0, 51, 255], dtype=torch.uint8)
    out = conv().preprocess(picture)
    assert torch.allclose(out[0, :, 0, 1], torch.tensor([-1.0, -0.6, 1.0]))


def test_score_of_the_rows_instruction():
    classifier = conv()
    clips = torch.randn(4, 2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    every = classifier.logits(clips)
    got = classifier(clips, torch.tensor([1, 0, 0, 1]))
    assert torch.equal(got, torch.stack([every[0, 2:], every[1, :2], every[2, :2], every[3, 2:]]))
    # A pair starts as opposites, so that sigmoid of the second logit orders windows as the softmax does.
    assert torch.allclose(every[:, 0], -every[:, 1]) and torch.allclose(every[:, 2], -every[:, 3])


def test_rows_do_not_depend_on_their_batch():
    classifier = conv(size=40)
    start, chunk = frames(65, size=40), frames(65, 4, size=40)
    ids = torch.arange(65) % 2
    whole, state = classifier.update(classifier.start(start), chunk, ids)
    for size in (1, 2, 3, 8, 64):
        part = slice(65 - size, 65)
        probs, after = classifier.update(classifier.start(start[part]), chunk[part], ids[part])
        assert torch.equal(probs, whole[part]), size
        assert torch.equal(after.pixels, state.pixels[part])
    one_by_one = classifier.start(start[:1])
    for k in range(4):
        prob, one_by_one = classifier.update(one_by_one, chunk[:1, k : k + 1], ids[:1])
        assert torch.equal(prob[0, 0], whole[0, k])


# -- streaming -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("window", [1, 2, 3, 5])
def test_stream_equals_windows(window):
    classifier = conv(window)
    video = frames(1, 11)[0]
    probs, state = [], classifier.start(video[None, 0])
    for first, size in ((1, 4), (5, 4), (9, 2)):
        p, state = classifier.update(state, video[None, first : first + size], torch.tensor([1]))
        probs.append(p[0])
    streamed = torch.cat(probs)
    pixels = classifier.preprocess(video)
    for t in range(1, 11):
        if t < window - 1:
            assert torch.isnan(streamed[t - 1])
            continue
        clip = pixels[t - window + 1 : t + 1][None]
        expected = torch.sigmoid(classifier(clip, torch.tensor([1]))[0, 1].double()).float()
        assert torch.equal(streamed[t - 1], expected)
    scores = classifier.scores(video, 1)
    assert np.isnan(scores[: window - 1]).all() and not np.isnan(scores[window - 1 :]).any()
    assert np.array_equal(scores[1:], streamed.detach().numpy(), equal_nan=True)
    assert state.pixels.shape == (1, window - 1, 3, SIZE, SIZE) and int(state.count) == 11


def test_each_frame_is_preprocessed_once(monkeypatch):
    classifier, seen = conv(3), []
    original = classifier.preprocess
    monkeypatch.setattr(classifier, "preprocess", lambda x: seen.append(len(x)) or original(x))
    state = classifier.start(frames(2))
    for _ in range(3):
        _, state = classifier.update(state, frames(2, 4), torch.tensor([0, 1]))
    assert sum(seen) == 2 * (1 + 3 * 4)


def test_rows_assign_and_storage():
    classifier = conv(3)
    _, state = classifier.update(classifier.start(frames(4)), frames(4, 2), torch.zeros(4, dtype=torch.long))
    before = state.to_dict()
    part = state.rows(np.array([2, 0]))
    part.pixels.zero_()
    assert np.array_equal(state.to_dict()["pixels"], before["pixels"])  # a copy
    fresh = classifier.start(frames(1))
    state.assign(np.array([False, True, False, False]), fresh)
    assert int(state.count[1]) == 1 and torch.equal(state.pixels[1], fresh.pixels[0])
    assert np.array_equal(state.pixels[[0, 2, 3]].numpy(), before["pixels"][[0, 2, 3]])
    back = StreamState.from_dict(before)
    probs = [
        classifier.update(s, frames(4, 2), torch.ones(4))[0] for s in (back, StreamState.from_dict(before))
    ]
    assert torch.equal(*probs) and len(back) == 4
    with pytest.raises(ValueError, match="lacks"):
        StreamState.from_dict({"count": before["count"]})


def test_decide_and_horizon_shorter_than_window():
    classifier = conv(4)
    with pytest.raises(ValueError, match="never fills"):
        classifier.scores(frames(3), 0)
    video = frames(6)
    scores = classifier.scores(video, 0)
    classifier.threshold = float(scores[-1]) if scores[-1] == np.nanmax(scores) else float(np.nanmax(scores))
    assert classifier.decide(video, 0) == first_success(scores, classifier.threshold)
    assert classifier.decide(video, 0)[0]


@pytest.mark.parametrize(
    ("bad", "ids", "match"),
    [
        (torch.zeros(2, 4, SIZE, SIZE, 3), [0, 0], "must be uint8"),
        (frames(2, 4).permute(0, 1, 4, 2, 3), [0, 0], "must be uint8"),
        (frames(2, 4), [0, 2], "between 0 and 1"),
        (frames(2, 4), [0], "2 numbers"),
        (frames(3, 4), [0, 0, 0], "2 rows"),
        (frames(2, 4, size=20), [0, 0], "16 x 16"),
    ],
)
def test_bad_input(bad, ids, match):
    classifier = conv()
    state = classifier.start(frames(2))
    with pytest.raises(ValueError, match=match):
        classifier.update(state, bad, torch.tensor(ids))
    assert torch.isfinite(classifier.update(state, frames(2, 4), torch.tensor([0, 1]))[0]).all()


def test_impossible_shapes():
    with pytest.raises(ValueError, match="even size"):
        ConvSuccessClassifier(image_size=33)
    with pytest.raises(ValueError, match="at least one frame"):
        ConvSuccessClassifier(window=0)


# -- on disk -------------------------------------------------------------------------------------------------
def calibration() -> Calibration:
    return Calibration(0.7, float("nan"), 0.0, 0.0, 9, 4, (0.0, 1.0), (0.0, 0.5), (0.6, 0.8))


def test_round_trip(tmp_path):
    classifier = conv()
    classifier.calibration = calibration()
    torch_before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
    classifier.save_pretrained(tmp_path / "reward")
    again = SuccessClassifier.from_pretrained(tmp_path / "reward")
    assert (
        torch.equal(torch.get_rng_state(), torch_before) and (np.random.get_state()[1] == numpy_before).all()
    )
    assert type(again) is ConvSuccessClassifier and not again.training
    assert again.threshold == 0.7 and again.calibration.n == 9 and np.isnan(again.calibration.precision)
    assert again.calibration.plateau == (0.6, 0.8) and again.arguments() == classifier.arguments()
    video = frames(5)
    assert np.array_equal(again.scores(video, 1), classifier.scores(video, 1), equal_nan=True)
    again.threshold = 0.9
    again.save_pretrained(tmp_path / "reward")
    assert ConvSuccessClassifier.from_pretrained(tmp_path / "reward").threshold == 0.9


def test_threshold_without_calibration():
    classifier = conv()
    assert classifier.threshold == 0.5
    with pytest.raises(ValueError, match="probability"):
        classifier.threshold = 1.5


@pytest.mark.parametrize("damage", ["truncate", "kind", "argument", "version", "shape", "threshold", "gone"])
def test_damaged_directories(tmp_path, damage):
    classifier = conv()
    classifier.calibration = calibration()
    classifier.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    weights = tmp_path / "model.safetensors"
    if damage == "truncate":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif damage == "gone":
        weights.unlink()
    elif damage == "kind":
        config["kind"] = "oracle"
    elif damage == "argument":
        config["arguments"]["colour"] = "red"
    elif damage == "version":
        config["format_version"] = 99
    elif damage == "shape":
        config["arguments"]["hidden"] = 3
    elif damage == "threshold":
        config["calibration"]["threshold"] = 7
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ArtifactError, match="config.json|model.safetensors"):
        SuccessClassifier.from_pretrained(tmp_path)

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

from wmpo_gym.reward.classifier import SuccessClassifier
from wmpo_gym.reward.videomae import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    VideoMAESuccessClassifier,
    rename_published_keys,
)

FIELDS = ("image_size", "patch_size", "num_frames", "tubelet_size", "hidden_size", "num_hidden_layers",
          "num_attention_heads", "intermediate_size", "layer_norm_eps")  # fmt: skip


@pytest.fixture(scope="module")
def published(golden) -> tuple[dict, dict, dict]:
    """Fields of the reference's tiny model, its state dict under the old names, and all tensors."""
    tensors, meta = golden("reward_model_tiny")
    old = {k.removeprefix("old."): v for k, v in tensors.items() if k.startswith("old.")}
    return {k: meta["config"][k] for k in FIELDS}, old, tensors


def build(fields: dict, n_instructions: int = 1, **arguments) -> VideoMAESuccessClassifier:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return VideoMAESuccessClassifier(model=fields, n_instructions=n_instructions, **arguments).eval()


def test_published_logits(published):
    fields, old, tensors = published
    classifier = build(fields)
    classifier.model.load_state_dict(rename_published_keys(old))
    with torch.no_grad():
        logits = classifier(tensors["in.pixel_values"], torch.zeros(3, dtype=torch.long))
    assert torch.allclose(logits, tensors["logits"], atol=3e-6, rtol=0)
    scores = torch.sigmoid(logits[:, 1])
    assert torch.allclose(scores, tensors["success_score_sigmoid"], atol=3e-6, rtol=0)
    assert not torch.allclose(scores, tensors["success_score_softmax"], atol=1e-3)


def test_old_biases_are_not_lost(published):
    fields, old, _ = published
    wrapped = {"rm_model_state_dict": {f"module.{k}": v for k, v in old.items()}, "rm_optim_state_dict": {}}
    for state in (old, wrapped):
        renamed = rename_published_keys(state)
        assert set(renamed) == set(build(fields).model.state_dict())
    name = "videomae.encoder.layer.1.attention.attention.{}"
    assert torch.equal(renamed[name.format("query.bias")], old[name.format("q_bias")])
    assert torch.equal(renamed[name.format("value.bias")], old[name.format("v_bias")])
    assert rename_published_keys(renamed) == renamed  # new names stay
    del renamed["fc_norm.bias"]
    with pytest.raises(RuntimeError, match="fc_norm.bias"):
        build(fields).model.load_state_dict(rename_published_keys(renamed))


@pytest.mark.parametrize(
    ("name", "mean", "std"),
    [("imagenet_mean_std", IMAGENET_MEAN, IMAGENET_STD), ("mean0.5_std0.5", (0.5,) * 3, (0.5,) * 3)],
)
def test_published_preprocessing(published, name, mean, std):
    fields, _, tensors = published
    classifier = build({**fields, "image_size": 56}, image_mean=mean, image_std=std)
    pixels = classifier.preprocess(tensors["preprocess.frames_u8"])
    grey_level = 1 / 255 / min(std)
    assert pixels.shape == (2, 3, 56, 56)
    difference = (pixels - tensors[f"preprocess.pixel_values_{name}"]).abs()
    assert difference.max() <= 1.01 * grey_level and difference.mean() < 0.3 * grey_level


def test_other_shapes_are_cropped_in_the_centre(published):
    classifier = build(published[0], image_mean=(0.0,) * 3, image_std=(1.0,) * 3)
    frame = torch.zeros(1, 32, 48, 3, dtype=torch.uint8)
    frame[:, :, 8:40] = 255  # the part that the crop keeps
    assert (classifier.preprocess(frame) == 1).all()
    assert classifier.preprocess(torch.zeros(2, 100, 80, 3, dtype=torch.uint8)).shape == (2, 3, 32, 32)


def test_streaming_equals_windows_for_any_batch(published):
    classifier = build(published[0], n_instructions=2)
    generator = torch.Generator().manual_seed(1)
    videos = torch.randint(0, 256, (3, 11, 32, 32, 3), dtype=torch.uint8, generator=generator)
    ids = torch.tensor([1, 0, 1])
    state = classifier.start(videos[:, 0])
    first, state = classifier.update(state, videos[:, 1:5], ids)
    second, state = classifier.update(state, videos[:, 5:11], ids)
    probs = torch.cat([first, second], 1)
    assert torch.isnan(probs[:, :6]).all() and not torch.isnan(probs[:, 6:]).any()
    for row in range(3):
        assert np.array_equal(classifier.scores(videos[row], int(ids[row]))[1:], probs[row], equal_nan=True)
    pixels = classifier.preprocess(videos[2, 2:10])[None]
    assert torch.allclose(torch.sigmoid(classifier(pixels, ids[2:])[:, 1]), probs[2, 8:9], atol=1e-6)
    assert state.pixels.shape == (3, 7, 3, 32, 32)


def test_round_trip(published, tmp_path):
    classifier = build(published[0], n_instructions=2, image_mean=(0.5,) * 3, image_std=(0.5,) * 3)
    classifier.threshold = 0.82
    classifier.save_pretrained(tmp_path)
    again = SuccessClassifier.from_pretrained(tmp_path)
    assert isinstance(again, VideoMAESuccessClassifier) and again.threshold == 0.82 and again.window == 8
    video = torch.randint(
        0, 256, (9, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(2)
    )
    assert np.array_equal(again.scores(video, 1), classifier.scores(video, 1), equal_nan=True)


def test_from_a_transformers_folder(published, tmp_path):
    from transformers import VideoMAEConfig, VideoMAEForVideoClassification

    fields, _, _ = published
    with torch.random.fork_rng():
        torch.manual_seed(3)
        source = VideoMAEForVideoClassification(
            VideoMAEConfig(**{**fields, "num_frames": 16, "num_labels": 5})
        )
        source.save_pretrained(tmp_path)
        classifier = VideoMAESuccessClassifier.from_transformers(tmp_path, window=8, n_instructions=3)
    assert classifier.window == 8 and classifier.n_instructions == 3
    assert classifier.image_mean == IMAGENET_MEAN
    state = classifier.model.state_dict()
    kept = [k for k in state if not k.startswith("classifier.")]
    assert all(torch.equal(state[k], v) for k, v in source.state_dict().items() if k in kept)
    assert state["classifier.weight"].shape == (6, 24)


def test_size_of_the_published_network():
    with torch.device("meta"):
        classifier = VideoMAESuccessClassifier()
    assert sum(p.numel() for p in classifier.parameters()) == 86_228_738 and classifier.window == 8

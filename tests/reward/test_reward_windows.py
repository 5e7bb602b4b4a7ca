from __future__ import annotations

import numpy as np
import pytest
import torch
from square_toys import square_episode

from wmpo_gym.reward.data import (
    ClipTable,
    augment,
    check_window_fits,
    first_success,
)
from wmpo_gym.training.presets import hints_for


def table_of(case: dict) -> np.ndarray:
    """Probability by last frame of the window, from the reference's table by exclusive end."""
    probs = np.full(case["total_frames"], case.get("default_prob", 0.01))
    for end, p in case["prob_by_window_end"].items():
        probs[int(end) - 1] = p
    return probs


# -- the published rule --------------------------------------------------------------------------------------
def evaluated_by_the_release(probs: np.ndarray) -> np.ndarray:
    """The windows that the released code evaluates and can succeed at; the others are NaN.

    These are the windows from frame 100 on, except the one that ends on the last frame.
    """
    probs = np.array(probs)
    probs[:107] = probs[-1:] = np.nan
    return probs


def test_decisions_equal_the_published_ones_on_the_same_windows(golden):
    _, meta = golden("reward")
    cases, without_a_window = meta["decision"]["cases"], 0
    for name, case in cases.items():
        probs, expected = (
            evaluated_by_the_release(table_of(case)),
            (bool(case["complete"]), case["finish_step"]),
        )
        if np.isnan(probs).all():  # an error here, a silent failure there
            without_a_window += 1
            assert expected == (False, case["total_frames"] - 1)
            with pytest.raises(ValueError, match="None of the windows"):
                first_success(probs, case["threshold"])
        else:
            assert first_success(probs, case["threshold"]) == expected, name
    assert len(cases) == 21 and without_a_window == 3


def test_decisions_equal_the_published_ones_on_a_batch_and_a_random_table(golden):
    tensors, meta = golden("reward")
    batch = meta["decision"]["batch_of_four_videos"]
    for probs, complete, finish in zip(batch["probs"], batch["complete"], batch["finish_step"], strict=True):
        case = {"total_frames": batch["total_frames"], "prob_by_window_end": probs}
        assert first_success(evaluated_by_the_release(table_of(case)), 0.8) == (bool(complete), finish)
    threshold = meta["decision"]["random_table"]["threshold"]
    for row, probs in enumerate(tensors["random.prob_window_ending_at_frame"].numpy()):
        expected = (bool(tensors["random.complete"][row]), int(tensors["random.finish_step"][row]))
        assert first_success(evaluated_by_the_release(probs), threshold) == expected


@pytest.mark.parametrize("group", ["train", "val_stride1"])
def test_clips_equal_the_published_ones_of_an_episode_one_frame_longer(golden, group):
    """The released positive clip ends one frame before the frame labelled as the finish; here it ends there.

    In training, the release draws one negative clip that does not overlap the positive one.
    """
    _, meta = golden("reward")
    for case in meta["clip_sampling"]["cases"][group]:
        steps = case["finish_step"] - 1
        published = {(*c["frames"], c["label"]) for c in case["clips"]}
        if not published:
            assert steps + 1 < 8  # no window fits
            continue
        table = ClipTable.from_episodes([square_episode(0, case["complete"], steps=steps)], 8)
        clips = {(int(e) - 7, int(e), int(y)) for e, y in zip(table.end, table.label, strict=True)}
        assert published == clips if group == "val_stride1" else published <= clips
        negatives = {(e - 8, e - 1, 0) for e in case["negative_end_candidates"]}
        assert negatives <= clips


# -- ours, where the published one errs ----------------------------------------------------------------------
def test_the_last_window_counts(golden):
    case = golden("reward")[1]["decision"]["cases"]["only_last_fires"]
    assert first_success(table_of(case), case["threshold"]) == (True, 128)


def test_early_windows_count(golden):
    case = golden("reward")[1]["decision"]["cases"]["early_window_ignored"]
    assert first_success(table_of(case), case["threshold"]) == (True, 59)  # published: never


def test_short_episodes_are_judged(golden):
    case = golden("reward")[1]["decision"]["cases"]["video_20_frames"]
    assert first_success(table_of(case), case["threshold"]) == (True, 7)


def test_equal_to_the_threshold_counts_and_nan_does_not():
    assert first_success(np.array([np.nan, 0.2, 0.5, 0.9]), 0.5) == (True, 2)
    assert first_success(np.array([np.nan, 0.2, 0.49, 0.3]), 0.5) == (False, 3)


def test_nothing_evaluated_is_an_error():
    with pytest.raises(ValueError, match="None of the windows"):
        first_success(np.full(5, np.nan), 0.5)
    with pytest.raises(ValueError, match=r"7 frames \(horizon 6\) never fills .* window of 8"):
        check_window_fits(7, 8)
    check_window_fits(8, 8)


# -- our clips -----------------------------------------------------------------------------------------------
def test_positive_ends_at_the_finish():
    episode = square_episode(0, True, steps=6)
    table = ClipTable.from_episodes([episode], 2, late_steps=2)
    (positive,) = table.pools["positive"]
    assert int(table.end[positive]) == 6  # published: one frame early
    assert table.label.tolist() == [0, 0, 0, 0, 0, 1]
    assert table.end[table.pools["negative"]].tolist() == [1, 2, 3, 4, 5]
    assert table.end[table.pools["late"]].tolist() == [5]
    clip = table.clips(positive[None])[0]
    assert np.array_equal(clip, episode.frames[5:7])


def test_windows_that_already_look_like_success_are_left_out():
    episodes = [square_episode(0, True, steps=6), square_episode(1, False, steps=6)]
    table = ClipTable.from_episodes(episodes, 2, late_steps=3, gradual_steps=2)
    assert table.end[table.pools["positive"]].tolist() == [6]
    assert table.end[table.pools["negative"]].tolist() == [1, 2, 3, *(7 + t for t in range(1, 7))]
    assert table.end[table.pools["late"]].tolist() == [7 + 4, 7 + 5, 7 + 6]


def test_failures_and_offsets():
    episodes = [square_episode(0, True, steps=5), square_episode(1, False, task_id=1, steps=6)]
    table = ClipTable.from_episodes(episodes, 3, late_steps=2)
    second = table.task_id == 1
    assert table.end[second].tolist() == [6 + t for t in (2, 3, 4, 5, 6)]
    assert not table.label[second].any()
    assert len(table.pools["positive"]) == 1 and len(table.pools["other"]) == 0


def test_other_instructions_get_negatives_only_where_certain():
    episodes = [square_episode(0, True, task_id=1), square_episode(1, False)]
    table = ClipTable.from_episodes(episodes, 2, other_instructions=range(3))
    rows = table.pools["other"]
    assert table.task_id[rows].tolist() == [0, 2] and not table.label[rows].any()
    assert (table.end[rows] == episodes[0].finish_step).all()


def test_imagined_successes_give_their_end_only():
    imagined = [square_episode(2, True, steps=6), square_episode(3, False, steps=6)]
    table = ClipTable.from_episodes([square_episode(0, False, steps=4)], 2, imagined=imagined)
    assert table.end[table.pools["positive"]].tolist() == [5 + 6]
    assert table.end[table.pools["negative"]].tolist() == [1, 2, 3, 4, *(5 + 7 + t for t in range(1, 7))]


def test_short_episode_is_an_error():
    with pytest.raises(ValueError, match="never fills"):
        ClipTable.from_episodes([square_episode(0, True, steps=3)], 5)


def test_draw_is_balanced_and_seeded(episodes):
    table = ClipTable.from_episodes(episodes, 2)
    counts = {"positive": 5, "late": 4, "other": 3}  # no clip of another instruction: late ones instead
    rows = [table.draw(counts, torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert torch.equal(rows[0], rows[1]) and not torch.equal(rows[0], rows[2])
    assert table.label[rows[0]].tolist() == [1] * 5 + [0] * 7
    failures = ClipTable.from_episodes([e for e in episodes if not e.success], 2)
    with pytest.raises(ValueError, match="no positive clip"):
        failures.draw(counts, torch.Generator())


def test_symmetries_move_pixels_and_instructions_together():
    frames = torch.randint(
        0, 256, (64, 2, 6, 6, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    ids = torch.arange(64) % 2
    symmetries = hints_for("move-block").symmetries
    moved, renamed = augment(frames, ids, symmetries, torch.Generator().manual_seed(3))
    seen = set()
    for clip, source, new, old in zip(moved, frames, renamed, ids, strict=True):
        swapped = bool(new != old)
        undone = clip.flip(-1) if swapped else clip  # red and blue change places
        flipped = not torch.equal(undone, source)
        assert torch.equal(undone.flip(1) if flipped else undone, source)  # top and bottom change places
        seen.add((swapped, flipped))
    assert len(seen) == 4

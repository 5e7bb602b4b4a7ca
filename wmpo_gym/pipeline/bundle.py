"""Copy the results of a finished ``wmpo reproduce`` to the weights that ship with the package.

``python -m wmpo_gym.pipeline.bundle runs/reproduce-move-block-0`` fills ``wmpo_gym/pretrained/move-block``.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from wmpo_gym.policies.vla_policy import VLAPolicy
from wmpo_gym.utils.io import read_json, write_file_atomic
from wmpo_gym.utils.text import show_points, show_rate
from wmpo_gym.world.world import StartFrames, World

START_FRAMES = 512  # start frames kept of the finished world, to limit the size of the package
CARD = """# {task}: bundled world, play-trained world and base policy

Produced by

    wmpo reproduce {task} --seed {seed}{revision}
    python -m wmpo_gym.pipeline.bundle runs/reproduce-{task}-{seed}

| directory | what it is | trained on |
|---|---|---|
| `policy/` | base policy (tiny OpenVLA-OFT) | {demos} demonstrations of a mis-calibrated expert |
| `play/` | world model trained on play only | {play} episodes of unlabelled play |
| `world/` | fine-tuned `play/`, classifier, start frames | {rollouts} labelled rollouts in {rounds} rounds |

Networks of `play/` and `world/` are stored in half precision and run in single precision.

| metric, on held-out start states | |
|---|---|
| base policy, sampled | {base} |
| after WMPO in this world, sampled | {wmpo} |
| gain | {gain} |
| base policy, greedy | {greedy_base} |
| after WMPO, greedy | {greedy_wmpo} |
| classifier, held-out real episodes | F1 {f1:.3f}, precision {precision:.3f}, recall {recall:.3f} (n = {n}) |
{gates}

Limits: one task, one camera, simulated robot only. Most imagined successes that the paired simulator does
not confirm are grasps that the magnet just missed.
Licence: Apache-2.0.
"""


def bundle(run: Path, target: Path, revision: str = "") -> None:
    """Copy the artefacts of a finished run, with a model card.

    Args:
        run: Directory of the run.
        target: Directory of the bundled task.
        revision: Commit of the run, for the card.
    """
    results, recipe = read_json(run / "results.json"), read_json(run / "recipe.json")
    world, play = World.from_pretrained(run / "world"), World.from_pretrained(run / "play_world")
    world.start_frames = _some(world.start_frames, START_FRAMES)
    play.start_frames = _some(play.start_frames, 1)
    world.card["results"] = {k: results[k] for k in ("base", "wmpo", "paired_gain", "greedy", "agreement")}
    world.save_pretrained(target / "world", dtype="float16")
    play.save_pretrained(target / "play", dtype="float16")
    VLAPolicy.from_pretrained(run / "base_policy").save_pretrained(target / "policy")
    last = run / f"round-{recipe['rounds']}"
    classifier, gates = read_json(last / "classifier.json"), world.card["gates"]
    with write_file_atomic(target / "MODEL_CARD.md") as temporary:
        temporary.write_text(_card(results, gates, recipe, classifier, revision), encoding="utf-8")


def _some(frames: StartFrames, n: int) -> StartFrames:
    chosen = np.sort(np.random.default_rng(0).permutation(len(frames.ids))[:n])
    return StartFrames(frames.frames[chosen], frames.ids[chosen], frames.task_ids[chosen])


def _card(
    results: dict[str, Any],
    gates: dict[str, dict[str, Any]],
    recipe: dict[str, Any],
    classifier: dict[str, Any],
    revision: str,
) -> str:
    words = {True: "passed", False: "failed", None: "not measurable"}
    rows = [f"| gate *{k}*: {words[g['passed']]} | {g['explanation']} |" for k, g in gates.items()]
    calibration = classifier["calibration"]
    return CARD.format(
        **{name: recipe[name] for name in ("task", "seed", "demos", "play", "rollouts", "rounds")},
        revision=f"    # at revision {revision}" if revision else "",
        base=show_rate(results["base"]),
        wmpo=show_rate(results["wmpo"]),
        gain=show_points(results["paired_gain"]),
        greedy_base=show_rate(results["greedy"]["base"]),
        greedy_wmpo=show_rate(results["greedy"]["wmpo"]),
        gates="\n".join(rows),
        **{name: calibration[name] for name in ("f1", "precision", "recall", "n")},
    )


def main() -> None:
    """Entry point of the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--target", type=Path, default=None, help="default: wmpo_gym/pretrained/TASK")
    parser.add_argument("--revision", default="", help="commit of the run")
    args = parser.parse_args()
    task = read_json(args.run / "recipe.json")["task"]
    bundle(args.run, args.target or Path(__file__).parents[1] / "pretrained" / task, args.revision)


if __name__ == "__main__":
    main()

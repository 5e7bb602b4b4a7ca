"""The full method in one file: World Model-based Policy Optimization (arXiv 2511.09515).

:func:`run_recipe` calls the stages in order: demonstrations, base policy, play and pre-trained world model;
then, in every round, rollouts, aligned world model, success classifier, gates and GRPO in imagination; and
finally the test. Each stage takes its data and models as arguments and writes its artefact on completion. If
the artefact exists, the stage loads it, so that an interrupted run can be resumed::

    demos/  base_policy/  play/  play_world/            before the rounds
    round-1/  rollouts/  world_model/  classifier/      every round
              gates.json  policy/  grpo.json  curve.json
    world/  policy/  results.json  report.html          the products: the last world and the last policy
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from wmpo_gym.algorithms.grpo import GRPO
from wmpo_gym.data.episode import Episode
from wmpo_gym.data.store import EpisodeStore
from wmpo_gym.envs.ledger import Ledger
from wmpo_gym.envs.simulated.scripted import record_expert, record_play
from wmpo_gym.evaluation.gates import gates_text
from wmpo_gym.evaluation.metrics import moved_object_error
from wmpo_gym.evaluation.twin import TwinComparison, compare_with_twin
from wmpo_gym.evaluation.validation import measure_learnable
from wmpo_gym.evaluation.validation import validate as measure_gates
from wmpo_gym.pipeline.callbacks import EvalCallback, ShuffledGRPO
from wmpo_gym.pipeline.components import (
    check_components,
    load_world_model,
    new_classifier,
    new_network,
    policy_config,
    sampling,
)
from wmpo_gym.pipeline.presets import Recipe
from wmpo_gym.pipeline.workspace import Workspace
from wmpo_gym.policies.sft import instruction_gap, train_sft
from wmpo_gym.policies.vla_policy import VLAPolicy
from wmpo_gym.report.report import Report, choose_clips, write_report
from wmpo_gym.report.results import build_results, print_table
from wmpo_gym.reward.classifier import SuccessClassifier
from wmpo_gym.reward.training import train_classifier
from wmpo_gym.rollouts.imagined import imagined_replays
from wmpo_gym.rollouts.protocol import EvalProtocol, save_result
from wmpo_gym.rollouts.rollout import collect_episodes, evaluate_policy_on, make_rollout_env
from wmpo_gym.tasks import get_task
from wmpo_gym.training.presets import hints_for
from wmpo_gym.utils.io import read_json, write_dir_atomic, write_json_atomic
from wmpo_gym.world.components import load_network, make_autoencoder
from wmpo_gym.world.proprio import ProprioTraining, learn_proprio, proprio_size
from wmpo_gym.world.training import WorldModelTrainer, WorldModelTraining
from wmpo_gym.world.world import StartFrames, World, find_pretrained

SFT_ATTEMPTS = 3  # trainings of the base policy, each continuing the one before
PLAY_MEASURED = 200  # play episodes on which the pre-trained world model is measured

Gates = dict[str, dict[str, Any]]


# -- the method ------------------------------------------------------------------------------------------
def run_recipe(
    recipe: Recipe,
    out: str | Path,
    *,
    device: str | torch.device = "auto",
    precision: str = "fp32",
    progress: bool = True,
    command: str = "",
) -> dict[str, Any]:
    """Run every stage that is not complete yet.

    Args:
        recipe: The settings.
        out: Directory of the run; an interrupted run with the same settings is resumed.
        device: Device for training and evaluation, see :func:`~wmpo_gym.utils.device.resolve_device`.
        precision: ``"fp32"``, or ``"bf16"`` on a GPU.
        progress: Print headings, progress bars and tables.
        command: The command line, for the report.

    Returns:
        The contents of ``results.json``.

    Raises:
        ValueError: If the recipe, the device or the directory cannot be used; before anything runs.
    """
    recipe = recipe.seeded()
    workspace = open_workspace(recipe, out, device=device, precision=precision, progress=progress)
    demonstrations = collect_demonstrations(workspace, recipe)
    base = train_policy(workspace, recipe, demonstrations)
    play = collect_play(workspace, recipe)
    pretrained = pretrain_world(workspace, recipe, play)
    result = train_in_imagination(workspace, recipe, base, pretrained, demonstrations, play, gates=True)
    # The products of a run are its last policy and the last world that it was optimised in.
    result.world.save_pretrained(workspace.directory / "world")
    result.policy.save_pretrained(workspace.directory / "policy", _policy_meta(recipe))
    tested = test(workspace, recipe, base, result)
    write_report(workspace.directory / "report.html", _report(recipe, result, tested, command))
    if progress:
        print()
        print_table(tested.results)
        print(f"\nThe report is {workspace.directory / 'report.html'}")
    return tested.results


@dataclass
class ImaginationResult:
    """A policy after optimisation in imagination, over all rounds.

    Attributes:
        policy: The policy.
        world: The last world it was optimised in.
        real: Cost of the rollouts of all rounds.
        imagined: Cost of the optimisation of all rounds.
        curve: Points of the learning curve of all rounds.
        gates: Gates of the first round's world, before any optimisation; those of the last are in its card.
    """

    policy: VLAPolicy
    world: World
    real: Ledger
    imagined: Ledger
    curve: list[dict[str, Any]]
    gates: Gates

    @property
    def spent(self) -> Ledger:
        """Cost of rollouts and optimisation together."""
        return self.real + self.imagined


def train_in_imagination(
    workspace: Workspace,
    recipe: Recipe,
    policy: VLAPolicy,
    pretrained: World,
    demonstrations: Sequence[Episode],
    play: Sequence[Episode],
    *,
    rounds: int | None = None,
    gates: bool = False,
) -> ImaginationResult:
    """Collect rollouts, align the world, train its reward, optimise the policy; once per round.

    Args:
        workspace: Where the artefacts of the rounds go.
        recipe: The settings, seeded.
        policy: The base policy.
        pretrained: The pre-trained world model; each round continues with the aligned one of the last.
        demonstrations: Labelled episodes of the expert.
        play: Unlabelled episodes.
        rounds: Number of rounds; None for all rounds of the recipe.
        gates: Measure the gates before every optimisation.
    """
    task, world = get_task(recipe.task), pretrained
    real: list[Episode] = []
    costs, imagined = Ledger(), Ledger()
    curve: list[dict[str, Any]] = []
    first: Gates = {}
    for number in range(1, (rounds or recipe.rounds) + 1):
        here, settings = workspace.round(number), recipe.for_round(number)
        collected = collect(here, settings, policy, recipe.round_start_states(task, number))
        real += collected.episodes
        world = train_world(here, settings, world, real, demonstrations, play)
        world = train_reward(here, settings, world, pretrained, real, demonstrations)
        if gates:
            measured = validate(here, settings, world, policy, earlier=first)
            world.card["gates"] = measured
            first = first or measured
        optimised = optimise(here, settings, world, policy, real)
        policy = optimised.policy
        costs, imagined = costs + collected.spent, imagined + optimised.spent
        before = (number - 1) * recipe.grpo.iterations
        curve += [{**point, "iteration": before + point["iteration"]} for point in optimised.curve]
    return ImaginationResult(policy, world, costs, imagined, curve, first)


def open_workspace(
    recipe: Recipe,
    out: str | Path,
    *,
    device: str | torch.device = "auto",
    precision: str = "fp32",
    progress: bool = True,
) -> Workspace:
    """The directory of a run, after checking that the recipe fits its task.

    Args:
        recipe: The settings, seeded.
        out: See :func:`run_recipe`.
        device: See :func:`run_recipe`.
        precision: See :func:`run_recipe`.
        progress: See :func:`run_recipe`.

    Raises:
        ValueError: If the recipe, the device or the directory cannot be used.
    """
    task = get_task(recipe.task)
    recipe.start_states(task)
    check_components(recipe, task)
    return Workspace.open(out, recipe.to_dict(), device=device, precision=precision, progress=progress)


# -- data ------------------------------------------------------------------------------------------------
@dataclass
class Collected:
    """Labelled episodes of a policy.

    Attributes:
        episodes: The episodes.
        spent: Environment counts (episodes, steps) of the recording.
    """

    episodes: list[Episode]
    spent: Ledger


def collect_demonstrations(workspace: Workspace, recipe: Recipe) -> list[Episode]:
    """Episodes of the mis-calibrated expert, failures included."""
    task = get_task(recipe.task)

    def record(ids: list[int]) -> Iterator[Episode]:
        return record_expert(ids, seed=recipe.seed, config=recipe.expert, task=task)

    return _record(workspace, "demos", "Demonstrations", recipe.start_states(task)["demos"], record)


def collect_play(workspace: Workspace, recipe: Recipe) -> list[Episode]:
    """Unlabelled scripted play."""
    task = get_task(recipe.task)

    def record(ids: list[int]) -> Iterator[Episode]:
        return record_play(ids, seed=recipe.seed, task=task)

    return _record(workspace, "play", "Scripted play (no labels)", recipe.start_states(task)["play"], record)


def _record(
    workspace: Workspace,
    name: str,
    heading: str,
    start_states: list[int],
    recorder: Callable[[list[int]], Iterator[Episode]],
) -> list[Episode]:
    """Record the missing episodes of a scripted collection."""
    if not start_states:
        return []
    store = EpisodeStore(workspace.directory / name)
    present = set(store.ids())
    missing = [i for i in start_states if i not in present]
    if missing:
        with (
            workspace.stage(name, f"{heading}: {len(start_states)} episodes"),
            workspace.bar(len(missing), name) as bar,
        ):
            for episode in recorder(missing):
                store.append(episode)
                bar.update(1)
    return store.open()


def collect(
    workspace: Workspace, recipe: Recipe, policy: VLAPolicy, start_states: Sequence[int]
) -> Collected:
    """Labelled episodes of the policy: the only real ones after fine-tuning.

    Args:
        workspace: Where ``rollouts/`` goes.
        recipe: The settings.
        policy: The policy; actions are sampled.
        start_states: Ids of the start states, one episode each.
    """
    task, store = get_task(recipe.task), EpisodeStore(workspace.directory / "rollouts")
    cost_file = workspace.directory / "rollouts.ledger.json"

    def spent() -> Ledger:
        return Ledger(**read_json(cost_file)) if cost_file.exists() else Ledger()

    if len(store.ids()) < len(start_states):
        with workspace.stage("rollouts", f"Real rollouts of the policy: {len(start_states)} episodes"):
            rows = min(64, len(start_states))
            env = make_rollout_env("WMPO-Simulated-v0", rows, record_frames=True, task=task)
            try:
                collect_episodes(
                    env, policy, start_states, store, seed=recipe.seed + 1, progress=workspace.progress
                )
            finally:  # an interrupted batch of rows is run again, and both are counted
                write_json_atomic(cost_file, (spent() + env.unwrapped.ledger).to_dict())  # type: ignore[attr-defined]
                env.close()
    episodes = store.open()
    successes = sum(bool(e.success) for e in episodes)
    workspace.show(f"   the policy succeeded in {successes} of {len(episodes)}")
    return Collected(episodes, spent())


# -- base policy -----------------------------------------------------------------------------------------
def train_policy(workspace: Workspace, recipe: Recipe, demonstrations: Sequence[Episode]) -> VLAPolicy:
    """The base policy: fine-tuned on the demonstrations, or the one that the recipe names."""
    if recipe.base_policy is not None:
        return _load_policy(find_pretrained(recipe.base_policy, "policy"), workspace, recipe)
    directory = workspace.directory / "base_policy"
    if not directory.exists():
        with workspace.stage("sft", f"Supervised fine-tuning: {recipe.sft.steps} steps"):
            _fine_tune(workspace, recipe, demonstrations).save_pretrained(directory, _policy_meta(recipe))
    return _load_policy(directory, workspace, recipe)


def _fine_tune(workspace: Workspace, recipe: Recipe, demonstrations: Sequence[Episode]) -> VLAPolicy:
    """Fine-tune, and continue if the policy does not distinguish the instructions by then."""
    task = get_task(recipe.task)
    policy: VLAPolicy | None = None
    required = hints_for(task).instruction_gap
    config = None
    if recipe.pretrained_policy is not None:
        policy = _load_policy(find_pretrained(recipe.pretrained_policy, "policy"), workspace, recipe)
    else:
        config = policy_config(recipe, task)
    for attempt in range(1, SFT_ATTEMPTS + 1):
        name = "sft" if attempt == 1 else f"sft-{attempt}"
        with workspace.bar(recipe.sft.steps, name) as bar:
            policy = train_sft(
                demonstrations,
                task,
                config=config,
                settings=recipe.sft,
                seed=recipe.seed + 1000 * (attempt - 1),
                policy=policy,
                policy_kwargs={"temperature": recipe.temperature, "precision": workspace.precision},
                device=workspace.device,
                progress=lambda done, total, metrics: bar.update(1),
                checkpoint_dir=workspace.directory / "checkpoints" / name,
            )
        gap = instruction_gap(policy, demonstrations, task)
        if gap is None or required is None or gap >= required:
            break
        workspace.show(
            f"   the policy hardly distinguishes the instructions ({gap:.2f} nats per token; required "
            f"{required})"
        )
    assert policy is not None  # there is at least one attempt
    return policy


def _policy_meta(recipe: Recipe) -> dict[str, Any]:
    """What a saved policy says of itself: the task it is for."""
    task = get_task(recipe.task)
    return {"task": task.name, "task_spec": task.to_dict()}


def _load_policy(directory: Path, workspace: Workspace, recipe: Recipe) -> VLAPolicy:
    policy = VLAPolicy.from_pretrained(
        directory, seed=recipe.seed, temperature=recipe.temperature, precision=workspace.precision
    )
    return policy.to(workspace.device)


# -- world model and reward ------------------------------------------------------------------------------
def pretrain_world(workspace: Workspace, recipe: Recipe, play: Sequence[Episode]) -> World:
    """A world model trained on play alone: the counterpart of the paper's Open X-Embodiment checkpoint.

    Without play it is untrained; a recipe with a pre-trained world takes that.

    Returns:
        A world without a success classifier.
    """
    task = get_task(recipe.task)
    if recipe.pretrained_world is not None:
        return load_world_model(recipe.pretrained_world, recipe, task)
    autoencoder = make_autoencoder(recipe.autoencoder)
    if not play:
        size, none = task.image_size, np.zeros(0, np.int64)
        frames = StartFrames(np.zeros((0, size, size, 3), np.uint8), none, none)
        network = new_network(recipe, task, autoencoder)
        return World(task, network, autoencoder, None, frames, sampling(recipe))
    directory = workspace.directory / "play_world"
    if not directory.exists():
        heading = f"World-model pre-training on play: {recipe.pretrain.steps} steps"
        with workspace.stage("pretrain", heading):
            recorded = proprio_size(play, hints_for(task, recipe.symmetries).symmetries)
            network = new_network(recipe, task, autoencoder, state_dim=_state_dim(recipe, recorded))
            card: dict[str, Any] = {"name": f"{task.name} (play only)", "recipe": recipe.to_dict()}
            world = World(
                task,
                network,
                autoencoder,
                None,
                StartFrames.from_episodes(list(play)),
                sampling(recipe),
                card,
            )
            card |= _train_network(workspace, "pretrain", recipe, world, play, recipe.pretrain)
            error = moved_object_error(world, play[:PLAY_MEASURED])
            card["moved_object_error_px"] = error
            if error is not None:
                workspace.show(f"   median position error of objects moved in play: {error:.2f} px")
            world.save_pretrained(directory)
    return World.from_pretrained(directory)


def train_world(
    workspace: Workspace,
    recipe: Recipe,
    world: World,
    real: Sequence[Episode],
    demonstrations: Sequence[Episode],
    play: Sequence[Episode],
) -> World:
    """Align the world model with the policy: fine-tune it on the policy's real rollouts.

    Args:
        workspace: Where ``world_model/`` goes.
        recipe: The settings.
        world: The world model to continue; it is not changed.
        real: All rollouts of the policy so far.
        demonstrations: Labelled episodes of the expert.
        play: Unlabelled episodes.

    Returns:
        A world without a classifier, whose start frames are the first frames of the given episodes.
    """
    directory, episodes = workspace.directory / "world_model", [*real, *demonstrations, *play]
    card = {
        "name": f"{world.task.name} (seed {recipe.seed})",
        "recipe": recipe.to_dict(),
        "data": {
            "labelled real episodes after the base policy": recipe.rollouts,
            "demonstrations (labelled, also used for the base policy)": recipe.demos,
            "play episodes (unlabelled)": recipe.play,
        },
    }
    frames = StartFrames.from_episodes(episodes)
    aligned = replace(world, classifier=None, start_frames=frames, card=card)
    if not directory.exists():
        heading = f"World-model alignment on the rollouts: {recipe.align.steps} steps"
        with workspace.stage("align", heading):
            parts = zip((real, demonstrations, play), recipe.weights, strict=True)
            weights = [weight for part, weight in parts for _ in part]
            aligned.network = copy.deepcopy(world.network)
            _train_network(workspace, "align", recipe, aligned, episodes, recipe.align, weights)
            with write_dir_atomic(directory) as temporary:
                aligned.network.save_pretrained(temporary)
    aligned.network = load_network(directory)
    return aligned.to(workspace.device)


def _train_network(
    workspace: Workspace,
    name: str,
    recipe: Recipe,
    world: World,
    episodes: Sequence[Episode],
    config: WorldModelTraining,
    weights: list[float] | None = None,
) -> dict[str, Any]:
    """Train the network of a world in place; returns the training history for the card."""
    checkpoints = workspace.directory / "checkpoints"
    world.to(workspace.device)
    motion = learn_proprio(
        world.network,
        world.autoencoder,
        episodes,
        ProprioTraining(seed=config.seed),
        weights=weights,
        checkpoint_dir=checkpoints / f"{name}-motion",
        compute=workspace.compute,
        progress=workspace.progress,
    )
    trainer = WorldModelTrainer(
        world.network,
        world.autoencoder,
        world.task,
        episodes,
        config,
        context_frames=world.config.context_frames,
        denoising_steps=world.config.denoising_steps,
        weights=weights,
        symmetries=hints_for(world.task, recipe.symmetries).symmetries,
        compute=workspace.compute,
        checkpoint_dir=checkpoints / name,
        tensorboard=workspace.directory / "tensorboard" / name,
    )
    history = trainer.train(progress=workspace.progress, description=name)
    return {"history": history, "motion": motion}


def _state_dim(recipe: Recipe, recorded: int) -> int:
    """Numbers of the robot's state to model; only the convolutional network models it."""
    return recorded if recipe.network == "conv" else 0


def train_reward(
    workspace: Workspace,
    recipe: Recipe,
    world: World,
    pretrained: World,
    real: Sequence[Episode],
    demonstrations: Sequence[Episode],
) -> World:
    """Train the success classifier of a world, and calibrate it on held-out episodes.

    Training data includes the world model's replays of the recorded actions, labelled with the real outcomes;
    without them, small errors of the world model are classified as successes.

    Args:
        workspace: Where ``classifier/`` and its metrics go.
        recipe: The settings.
        world: The aligned world.
        pretrained: The pre-trained world, whose classifier is continued if it has one of the recipe's kind.
        real: All rollouts of the policy so far.
        demonstrations: Labelled episodes of the expert.

    Returns:
        The world with the classifier.
    """
    directory = workspace.directory / "classifier"
    if not directory.exists():
        with workspace.stage("reward", f"Success classifier: {recipe.classifier_steps} steps"):
            recorded = [*real, *(demonstrations if recipe.classifier_demos else [])]
            classifier, metrics = train_classifier(
                recorded,
                world.task,
                kind=recipe.classifier,
                classifier=new_classifier(recipe, world.task, pretrained),
                steps=recipe.classifier_steps,
                seed=recipe.seed,
                imagined=imagined_replays(world, recorded, seed=recipe.seed),
                hints=hints_for(world.task, recipe.symmetries),
                device=workspace.device,
                precision=workspace.precision,
                checkpoint_dir=workspace.directory / "checkpoints" / "reward",
                progress=workspace.progress,
            )
            write_json_atomic(workspace.directory / "classifier.json", metrics)
            classifier.save_pretrained(directory)
    classifier = SuccessClassifier.from_pretrained(directory)
    return replace(world, classifier=classifier).to(workspace.device)


def validate(
    workspace: Workspace,
    recipe: Recipe,
    world: World,
    policy: VLAPolicy,
    *,
    earlier: Gates | None = None,
) -> Gates:
    """Measure on validation start states whether the world is fit to optimise the policy in.

    Args:
        workspace: Where ``gates.json`` goes.
        recipe: The settings.
        world: The world.
        policy: The policy that is about to be optimised in it.
        earlier: Gates of the first round; *learnable* is measured once and holds for all rounds.

    Returns:
        The four gates by name.
    """
    file = workspace.directory / "gates.json"
    if not file.exists():
        with workspace.stage("gates", "Is this world fit to train in?"):
            n, grpo = recipe.gate_episodes, recipe.grpo

            def learnable() -> Any:
                return measure_learnable(
                    policy,
                    world.task,
                    episodes=n,
                    n_groups=grpo.n_groups,
                    group_size=grpo.group_size,
                    block=4,
                    seed=recipe.seed,
                    progress=workspace.progress,
                    learning_rate=grpo.learning_rate,
                )

            world.card["gates"] = earlier or {}
            measured = measure_gates(
                world,
                policy,
                episodes=n,
                learnable=None if earlier else learnable,
                seed=recipe.seed,
                progress=workspace.progress,
            )
            write_json_atomic(file, measured)
    gates: Gates = read_json(file)
    workspace.show(gates_text(gates))
    return gates


# -- policy optimisation ---------------------------------------------------------------------------------
@dataclass
class Optimised:
    """A policy after one round of GRPO.

    Attributes:
        policy: The policy.
        curve: Points of its learning curve.
        spent: Environment counts of the optimisation.
    """

    policy: VLAPolicy
    curve: list[dict[str, Any]]
    spent: Ledger


def optimise(
    workspace: Workspace, recipe: Recipe, world: World, policy: VLAPolicy, real: Sequence[Episode]
) -> Optimised:
    """Optimise a policy with GRPO in imagination.

    Args:
        workspace: Where ``policy/``, ``grpo.json`` and ``curve.json`` go.
        recipe: The settings.
        world: The world to imagine in.
        policy: The policy to start from; it is not changed.
        real: Rollouts that keyframes are taken from.
    """
    directory, log = workspace.directory / "policy", workspace.directory / "grpo.json"
    if not log.exists():
        settings = recipe.grpo
        heading = f"GRPO in imagination: {settings.iterations} iterations"
        env = make_rollout_env(
            "WMPO-Imagined-v0",
            settings.n_groups * settings.group_size,
            task=world.task,
            world=world.with_keyframes(list(real), settings.keyframes, seed=recipe.seed),
            dual_noise=settings.dual_noise,
            consecutive_windows=settings.consecutive_windows,
            device=str(workspace.device),
        )
        with workspace.stage("grpo", heading), closing(env):
            algorithm = ShuffledGRPO if settings.shuffle_rewards else GRPO
            model = algorithm(
                policy,
                env,
                learning_rate=settings.rate,
                group_size=settings.group_size,
                batch_size=settings.batch_size,
                micro_batch_size=settings.micro_batch_size,
                n_epochs=settings.n_epochs,
                seed=recipe.seed,
                recompute_log_probs=workspace.precision == "bf16",
                device=workspace.device,
                checkpoint_dir=workspace.directory / "checkpoints" / "grpo",
                tensorboard_log=str(workspace.directory / "tensorboard"),
            )
            evaluation = EvalCallback(workspace, recipe, world)
            model.learn(max_iterations=settings.iterations, callback=evaluation, resume=True)
            model.policy.save_pretrained(directory, _policy_meta(recipe))
            budget = model.budget.to_dict()
            write_json_atomic(log, {"curve": evaluation.points, "history": model.history, "budget": budget})
    written = read_json(log)
    return Optimised(
        _load_policy(directory, workspace, recipe), written["curve"], Ledger(**written["budget"])
    )


# -- test ------------------------------------------------------------------------------------------------
@dataclass
class Tested:
    """Metrics on the test split.

    Attributes:
        results: Contents of ``results.json``.
        comparison: Imagined episodes of the optimised policy, paired with their replay in the simulator.
        protocol: How the metrics were measured.
    """

    results: dict[str, Any]
    comparison: TwinComparison
    protocol: EvalProtocol


def test(workspace: Workspace, recipe: Recipe, base: VLAPolicy, result: ImaginationResult) -> Tested:
    """Compare base and optimised policy on the test start states, and imagination with the simulator."""
    task, n = get_task(recipe.task), recipe.test_episodes
    with workspace.stage("evaluate", f"Before and after in the simulator: {n} test start states"):
        tested = {
            (name, greedy): evaluate_policy_on(
                task,
                policy,
                "test",
                n,
                deterministic=greedy,
                seed=recipe.seed,
                progress=workspace.progress,
            )
            for name, policy in (("base", base), ("wmpo", result.policy))
            for greedy in (False, True)
        }
        ids = list(task.split_ids("test")[:n])
        comparison = compare_with_twin(
            result.world, result.policy, ids, seed=recipe.seed + 2, progress=workspace.progress
        )
    results = build_results(
        base=tested["base", False].success,
        wmpo=tested["wmpo", False].success,
        agreement=comparison.agreement,
        greedy=(tested["base", True].success, tested["wmpo", True].success),
        budget=_budget(recipe, result),
        seconds=workspace.seconds,
        gates=result.gates,
        length_of_successes={name: tested[name, False].mean_length_of_successes for name in ("base", "wmpo")},
        seed=recipe.seed,
    )
    protocol = tested["wmpo", False].protocol
    assert protocol is not None  # evaluate_policy_on always writes one
    save_result(workspace.directory / "results.json", results, protocol)
    return Tested(results, comparison, protocol)


def _budget(recipe: Recipe, result: ImaginationResult) -> dict[str, Any]:
    """Cost of the method without evaluation; demonstrations and play are counted separately."""
    return {
        "real_episodes": result.real.real_episodes,
        "real_steps": result.real.real_steps,
        "demonstrations": recipe.demos,
        "play_episodes": recipe.play,
        "imagined_frames": result.imagined.imagined_frames,
        "nfe": result.imagined.nfe,
        "imagination_seconds": round(result.imagined.seconds, 1),
    }


def _report(recipe: Recipe, result: ImaginationResult, tested: Tested, command: str) -> Report:
    task, gates = get_task(recipe.task), tested.results["gates"]
    failed = [name for name, gate in gates.items() if gate["passed"] is False]
    return Report(
        title=f"WMPO on {task.name}",
        results=tested.results,
        curve=result.curve,
        gates=gates,
        clips=choose_clips(tested.comparison, task),
        protocol=tested.protocol,
        command=command,
        notes=[f"The world failed the gate {name!r}: {gates[name]['explanation']}" for name in failed],
        control_hz=task.control_hz,
    )

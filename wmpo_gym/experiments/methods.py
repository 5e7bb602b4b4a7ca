"""The methods of an experiment: each trains a policy with a budget of real episodes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import gymnasium
import torch
from stable_baselines3.common.callbacks import BaseCallback
from torch import Tensor

from wmpo_gym.algorithms.dpo import DPO
from wmpo_gym.algorithms.env_util import as_vec_env, read_ledger
from wmpo_gym.algorithms.grpo import GRPO
from wmpo_gym.algorithms.sac import add_demonstrations, make_sac
from wmpo_gym.algorithms.trajectories import Trajectories
from wmpo_gym.data.episode import Episode
from wmpo_gym.envs.ledger import Ledger
from wmpo_gym.envs.simulated.scripted import record_expert
from wmpo_gym.experiments.plan import ExperimentPlan, Trial
from wmpo_gym.pipeline import method as stages
from wmpo_gym.pipeline.components import policy_config
from wmpo_gym.pipeline.method import Collected, ImaginationResult
from wmpo_gym.pipeline.presets import Recipe
from wmpo_gym.pipeline.workspace import Workspace
from wmpo_gym.policies.sft import train_sft
from wmpo_gym.policies.vla_policy import VLAPolicy
from wmpo_gym.rollouts.rollout import evaluate_policy_on, make_rollout_env
from wmpo_gym.tasks import Task, get_task
from wmpo_gym.world.world import World

GROUP = 8  # rollouts from one start state
SAC_ROWS = 16


@dataclass
class Trained:
    """The outcome of a method.

    Attributes:
        policy: Anything that :func:`~wmpo_gym.rollouts.policy_runner.acting` takes.
        ledger: Environment counts of the training.
        selection: Cost of selecting a checkpoint, which is not included in ``ledger``.
    """

    policy: Any
    ledger: Ledger
    selection: Ledger


@dataclass(frozen=True)
class SharedRun:
    """A run whose artefacts several trials of one seed share.

    Attributes:
        workspace: Directory of the artefacts.
        recipe: Settings of the run, seeded.
    """

    workspace: Workspace
    recipe: Recipe


class TrialContext:
    """Training context of a trial: its plan, shared artefacts and own directory.

    Args:
        plan: The experiment.
        trial: The trial to train.
        out: Directory of the experiment.
        device: Device for training and evaluation.
        precision: ``"fp32"`` or ``"bf16"``.
        progress: Print headings and progress bars of the shared stages.
    """

    def __init__(
        self,
        plan: ExperimentPlan,
        trial: Trial,
        out: Path,
        *,
        device: str | torch.device = "auto",
        precision: str = "fp32",
        progress: bool = False,
    ) -> None:
        self.plan, self.trial, self.directory = plan, trial, out / "cells" / trial.name
        self.task: Task = get_task(plan.recipe.task)
        self._shared_root, self._precision, self._progress = out / "shared", precision, progress
        self._device = device
        self.shared = self._run("")

    def _run(self, suffix: str, **changes: Any) -> SharedRun:
        """A run with the seed of the trial, in a directory that trials share."""
        recipe = replace(self.plan.recipe, seed=self.trial.seed, **changes).seeded()
        workspace = stages.open_workspace(
            recipe,
            self._shared_root / f"seed{self.trial.seed}{suffix}",
            device=self._device,
            precision=self._precision,
            progress=self._progress,
        )
        return SharedRun(workspace, recipe)

    @property
    def device(self) -> torch.device:
        """Device for training and evaluation."""
        return self.shared.workspace.device

    @cached_property
    def demonstrations(self) -> list[Episode]:
        """Demonstrations of the seed."""
        return stages.collect_demonstrations(self.shared.workspace, self.shared.recipe)

    @cached_property
    def play(self) -> list[Episode]:
        """Play of the seed."""
        return stages.collect_play(self.shared.workspace, self.shared.recipe)

    def base_policy(self) -> VLAPolicy:
        """A fresh copy of the base policy of the seed."""
        return stages.train_policy(self.shared.workspace, self.shared.recipe, self.demonstrations)

    def pretrained_world(self) -> World:
        """The pre-trained world model of the seed."""
        return stages.pretrain_world(self.shared.workspace, self.shared.recipe, self.play)

    @cached_property
    def run(self) -> SharedRun:
        """The run with the budget of the trial, shared by all methods that imagine."""
        return self._run(f"-{self.trial.budget}", rollouts=self.trial.budget)

    @cached_property
    def base_run(self) -> SharedRun:
        """A run of one round: all P rollouts are those of the base policy."""
        if self.plan.recipe.rounds == 1:
            return self.run
        return self._run(f"-{self.trial.budget}-base", rollouts=self.trial.budget, rounds=1)

    @cached_property
    def lifelong_run(self) -> SharedRun:
        """A run with one round per budget of the plan, shared by the trials of all budgets."""
        budgets = self.plan.budgets
        return self._run("-lifelong", rollouts=max(budgets), rounds=len(budgets))

    @cached_property
    def wmpo(self) -> ImaginationResult:
        """WMPO's policy, its last world and its cost."""
        return self._train_in_imagination(self.run)

    def wmpo_lifelong(self) -> ImaginationResult:
        """WMPO's policy, world and cost after the lifelong rounds up to the trial's budget."""
        return self._train_in_imagination(self.lifelong_run, rounds=self.round)

    def _train_in_imagination(self, run: SharedRun, *, rounds: int | None = None) -> ImaginationResult:
        return stages.train_in_imagination(
            run.workspace,
            run.recipe,
            self.base_policy(),
            self.pretrained_world(),
            self.demonstrations,
            self.play,
            rounds=rounds,
        )

    def collect_with_base_policy(self, policy: VLAPolicy) -> Collected:
        """P labelled episodes of the base policy."""
        run = self.base_run
        start_states = run.recipe.round_start_states(self.task, 1)
        return stages.collect(run.workspace.round(1), run.recipe, policy, start_states)

    @property
    def round(self) -> int:
        """The lifelong round that the budget belongs to."""
        return self.plan.round_of(self.trial.budget)

    def stage_seconds(self) -> dict[str, float]:
        """Wall-clock seconds of the shared stages so far, by name."""
        name = {"sft": "base_run", "wmpo-lifelong": "lifelong_run"}.get(self.trial.method, "run")
        return {**getattr(self, name).workspace.seconds, **self.shared.workspace.seconds}

    def simulated(self, rows: int) -> Any:
        """Simulated vector environment on training start states."""
        return make_rollout_env("WMPO-Simulated-v0", rows, task=self.task)

    def imagined(self, rows: int) -> Any:
        """Imagined vector environment in WMPO's last world."""
        return make_rollout_env(
            "WMPO-Imagined-v0", rows, task=self.task, world=self.wmpo.world, device=str(self.device)
        )


# -- methods -------------------------------------------------------------------------------------------------
def train_base(context: TrialContext) -> Trained:
    """No further training."""
    return Trained(context.base_policy(), Ledger(), Ledger())


def train_sft_filtered(context: TrialContext) -> Trained:
    """Supervised fine-tuning on the successful rollouts (filtered behaviour cloning)."""
    policy = context.base_policy()
    collected = context.collect_with_base_policy(policy)
    successes = [e for e in collected.episodes if e.success]
    if successes:
        policy = train_sft(
            successes,
            context.task,
            settings=context.plan.baselines.sft,
            seed=context.trial.seed,
            policy=policy,
            device=context.device,
        )
    return Trained(policy, collected.spent, Ledger())


def train_grpo_real(context: TrialContext) -> Trained:
    """GRPO on real episodes only."""
    settings, groups = context.plan.baselines, context.trial.budget // GROUP
    iterations = min(settings.grpo_iterations, groups)
    with closing(context.simulated(groups // iterations * GROUP)) as env:
        model = GRPO(
            context.base_policy(),
            env,
            learning_rate=settings.grpo_learning_rate,
            group_size=GROUP,
            n_epochs=settings.grpo_epochs,
            max_extra_batches=0,
            seed=context.trial.seed,
            device=context.device,
            checkpoint_dir=context.directory / "checkpoints",
        )
        selector = CheckpointSelector(context)
        best = BestCheckpoint(selector, iterations)
        model.learn(max_iterations=iterations, callback=best, resume=True)
        return Trained(best.best(model.policy), model.budget, selector.spent)


def train_dpo(context: TrialContext) -> Trained:
    """DPO from P real episodes of the base policy."""
    return _dpo(
        context, context.simulated, context.trial.budget // context.plan.baselines.dpo_group_size, Ledger()
    )


def train_dpo_imagined(context: TrialContext) -> Trained:
    """DPO from imagined episodes of the base policy."""
    return _dpo(context, context.imagined, context.plan.baselines.dpo_imagined_groups, context.wmpo.spent)


def train_dpo_lifelong(context: TrialContext) -> Trained:
    """DPO that collects with its current policy, round by round."""
    n_groups = context.trial.budget // context.round // context.plan.baselines.dpo_group_size
    return _dpo(context, context.simulated, n_groups, Ledger(), rounds=context.round)


def _dpo(
    context: TrialContext, make_env: Callable[[int], Any], n_groups: int, spent: Ledger, *, rounds: int = 1
) -> Trained:
    settings, size = context.plan.baselines, context.plan.baselines.dpo_group_size
    with closing(make_env(min(n_groups * size, 128))) as env:
        model = ValidatedDPO(
            context.base_policy(),
            env,
            learning_rate=settings.dpo_learning_rate,
            beta=settings.dpo_beta,
            sft_weight=settings.dpo_sft_weight,
            group_size=size,
            n_groups=n_groups,
            max_extra_batches=0,
            validation_share=0.0,
            seed=context.trial.seed,
            device=context.device,
        )
        model.selector = selector = CheckpointSelector(context)
        model.learn(max_iterations=rounds)
        return Trained(model.policy, model.budget + spent, selector.spent)


def train_sac(context: TrialContext, *, demonstrations: bool = False, imagined: bool = False) -> Trained:
    """SB3's SAC until its budget of episodes is used up."""
    settings, n_chunks = context.plan.baselines, context.task.n_chunks
    name = "WMPO-Imagined-v0" if imagined else "WMPO-Simulated-v0"
    special: dict[str, Any] = {}
    if imagined:
        special = {"world": context.wmpo.world, "device": str(context.device)}
    spent = context.wmpo.spent if imagined else Ledger()
    env = as_vec_env(gymnasium.make_vec(name, SAC_ROWS, task=context.task, **special), SAC_ROWS)
    chunks = settings.sac_imagined_chunks if imagined else context.trial.budget * n_chunks
    with closing(env):
        model = make_sac(
            env,
            buffer_size=min(50_000, chunks + 10_000),
            seed=context.trial.seed,
            gradient_steps=settings.sac_gradient_steps,
            learning_starts=min(500, chunks // 4),
            device=context.device,
        )
        if demonstrations:
            add_demonstrations(model, context.demonstrations, context.task)
        before = read_ledger(env)
        budget = None if imagined else context.trial.budget
        model.learn(chunks, callback=StopAtEpisodes(budget))
        return Trained(model, read_ledger(env) - before + spent, Ledger())


def train_wmpo(context: TrialContext) -> Trained:
    """GRPO in imagination."""
    return Trained(context.wmpo.policy, context.wmpo.spent, Ledger())


def train_wmpo_lifelong(context: TrialContext) -> Trained:
    """GRPO in a world that is aligned with the current policy in every round."""
    result = context.wmpo_lifelong()
    return Trained(result.policy, result.spent, Ledger())


def train_on_demonstrations(context: TrialContext) -> Trained:
    """Supervised fine-tuning on P more demonstrations of the same expert."""
    recipe, seed = context.run.recipe, context.trial.seed
    ids = recipe.start_states(context.task)["rollouts"]
    more = list(record_expert(ids, seed=seed + 1, config=recipe.expert, task=context.task))
    policy = train_sft(
        [*context.demonstrations, *more],
        context.task,
        config=policy_config(recipe, context.task),
        settings=recipe.sft,
        seed=seed,
        device=context.device,
    )
    spent = Ledger(real_episodes=len(more), real_steps=sum(e.n_steps for e in more))
    return Trained(policy, spent, Ledger())


METHODS: dict[str, Callable[[TrialContext], Trained]] = {
    "base": train_base,
    "sft": train_sft_filtered,
    "dpo": train_dpo,
    "dpo-imagined": train_dpo_imagined,
    "grpo": train_grpo_real,
    "sac": train_sac,
    "sac-demos": lambda context: train_sac(context, demonstrations=True),
    "sac-imagined": lambda context: train_sac(context, demonstrations=True, imagined=True),
    "wmpo": train_wmpo,
    "demonstrations": train_on_demonstrations,
    "dpo-lifelong": train_dpo_lifelong,
    "wmpo-lifelong": train_wmpo_lifelong,
}


_BASE = ("demos", "sft")
_WMPO = (*_BASE, "play", "pretrain", "rollouts", "align", "reward", "grpo")
STAGES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(METHODS, _BASE),
    **dict.fromkeys(("sac", "demonstrations"), ()),
    "sac-demos": ("demos",),
    "sft": (*_BASE, "rollouts"),
    **dict.fromkeys(("dpo-imagined", "sac-imagined", "wmpo", "wmpo-lifelong"), _WMPO),
}
"""Shared stages of each method; their time is added to the method's, whichever trial ran them."""


# -- callbacks -----------------------------------------------------------------------------------------------
class StopAtEpisodes(BaseCallback):
    """Stops training after a number of real episodes; None disables it.

    Episodes in progress are counted, so that the number may be exceeded by up to one episode per row.
    """

    def __init__(self, episodes: int | None) -> None:
        super().__init__()
        self.episodes = episodes

    def _on_step(self) -> bool:
        return self.episodes is None or read_ledger(self.training_env).real_episodes < self.episodes


class CheckpointSelector:
    """Evaluates weights by the success rate on validation start states, with sampled actions.

    Attributes:
        spent: Cost of the evaluations so far.
    """

    def __init__(self, context: TrialContext) -> None:
        self.plan, self.seed, self.spent = context.plan, context.trial.seed, Ledger()

    def evaluate(self, policy: Any) -> float | None:
        """The success rate, or None if the plan has no selection episodes."""
        plan = self.plan
        if not plan.selection_episodes:
            return None
        rollouts = evaluate_policy_on(
            plan.task,
            policy,
            "validation",
            plan.selection_episodes,
            deterministic=False,
            seed=self.seed,
            progress=False,
        )
        self.spent = self.spent + rollouts.ledger
        return rollouts.rate.value


class BestCheckpoint(BaseCallback):
    """Keeps the weights with the highest success rate, evaluated four times during training."""

    def __init__(self, selector: CheckpointSelector, iterations: int) -> None:
        super().__init__()
        self.selector, self.every = selector, max(1, iterations // 4)
        self._best, self._weights = -1.0, {}  # type: float, dict[str, Any]

    def _on_rollout_start(self) -> None:
        iteration = self.model._iteration
        if iteration and iteration % self.every == 0:
            self._evaluate(self.model.policy)

    def _on_step(self) -> bool:
        return True

    def best(self, policy: Any) -> Any:
        """The policy with the best weights restored; without selection episodes, as it is."""
        self._evaluate(policy)
        if self._weights:
            policy.load_state_dict(self._weights)
        return policy

    def _evaluate(self, policy: Any) -> None:
        score = self.selector.evaluate(policy)
        if score is not None and score > self._best:
            self._best, self._weights = score, copy.deepcopy(policy.state_dict())


class ValidatedDPO(DPO):
    """DPO that keeps the weights with the most successes on validation start states."""

    selector: CheckpointSelector

    def score(self, rollouts: Trajectories, held_out: Tensor) -> float | None:
        """See :meth:`CheckpointSelector.evaluate`."""
        return self.selector.evaluate(self.policy)

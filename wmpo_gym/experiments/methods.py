"""How each method of a comparison turns its budget into a policy."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import gymnasium
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
from wmpo_gym.evaluation.learning import grpo_from_policy
from wmpo_gym.experiments.plan import Cell, Plan
from wmpo_gym.pipeline.run import Practised, practise
from wmpo_gym.pipeline.stages import Run
from wmpo_gym.policies.sft import train_sft
from wmpo_gym.policies.vla_policy import VLAPolicy
from wmpo_gym.rollouts.rollout import evaluate_policy_on, make_rollout_env
from wmpo_gym.tasks import Task

GROUP = 8  # rollouts from one start state
SAC_ROWS = 16


@dataclass
class Trained:
    """What a method made.

    Attributes:
        policy: Anything that :func:`~wmpo_gym.rollouts.policy_runner.acting` takes.
        ledger: What the environments counted while it learned.
        selection: What was spent on choosing a checkpoint, apart from that.
    """

    policy: Any
    ledger: Ledger
    selection: Ledger


class Workshop:
    """What the cells of one seed share, and where each keeps its own.

    Args:
        plan: The comparison.
        cell: The cell to train.
        out: Directory of the comparison.
        progress: Show headings and progress bars of the shared stages.
    """

    def __init__(self, plan: Plan, cell: Cell, out: Path, *, progress: bool = False) -> None:
        self.progress = progress
        self.plan, self.cell, self.out = plan, cell, out / "cells" / cell.name
        self._runs = out / "shared"
        self.shared = self._run("")

    def _run(self, suffix: str, **changes: Any) -> Run:
        """A run of the cell's seed in a directory that its cells share."""
        recipe = replace(self.plan.recipe, seed=self.cell.seed, **changes)
        directory = self._runs / f"seed{self.cell.seed}{suffix}"
        return Run(recipe, directory, bundled=self.plan.bundled, progress=self.progress)

    @property
    def task(self) -> Task:
        """The task."""
        return self.shared.task

    @cached_property
    def demonstrations(self) -> list[Episode]:
        """The seed's demonstrations."""
        return self.shared.demonstrations()

    def base(self) -> VLAPolicy:
        """A fresh copy of the seed's base policy."""
        return self.shared.base_policy(self.demonstrations)

    @cached_property
    def run(self) -> Run:
        """The seed's run with this cell's budget, which the methods that imagine share with WMPO."""
        return self._run(f"-{self.cell.budget}", rollouts=self.cell.budget)

    @cached_property
    def practised(self) -> Practised:
        """WMPO's policy, its last world and what it spent."""
        return practise(self.run, self.shared, self.base())

    @cached_property
    def base_run(self) -> Run:
        """A run of one round: all P rollouts are the base policy's."""
        if self.plan.recipe.rounds == 1:
            return self.run
        return self._run(f"-{self.cell.budget}-base", rollouts=self.cell.budget, rounds=1)

    @cached_property
    def lifelong_run(self) -> Run:
        """A run with a round per budget of the plan, which the cells of all budgets share."""
        budgets = self.plan.budgets
        return self._run("-lifelong", rollouts=max(budgets), rounds=len(budgets))

    @property
    def round(self) -> int:
        """Which of the lifelong rounds the cell's budget is."""
        return self.plan.round_of(self.cell.budget)

    def stage_seconds(self) -> dict[str, float]:
        """Seconds of the shared stages as they stand on the disk, by name; all sittings together."""
        name = {"sft": "base_run", "wmpo-lifelong": "lifelong_run"}.get(self.cell.method, "run")
        return {**getattr(self, name).seconds, **self.shared.seconds}

    def simulated(self, rows: int) -> Any:
        """Simulated rows on training start states."""
        return make_rollout_env("WMPO-Simulated-v0", rows, task=self.task)

    def imagined(self, rows: int) -> Any:
        """Imagined rows in WMPO's last world."""
        world = self.practised.world
        return make_rollout_env("WMPO-Imagined-v0", rows, task=self.task, world=world)


# -- methods -------------------------------------------------------------------------------------------------
def train_base(shop: Workshop) -> Trained:
    """Nothing."""
    return Trained(shop.base(), Ledger(), Ledger())


def train_sft_filtered(shop: Workshop) -> Trained:
    """Go on imitating, now the successes among the rollouts."""
    policy = shop.base()
    successes = [e for e in shop.base_run.rollouts(policy) if e.success]
    if successes:
        policy = train_sft(
            successes, shop.task, settings=shop.plan.baselines.sft, seed=shop.cell.seed, policy=policy
        )
    return Trained(policy, shop.base_run.spent_on_rollouts(), Ledger())


def train_grpo_real(shop: Workshop) -> Trained:
    """GRPO whose every rollout is a real episode."""
    settings, groups = shop.plan.baselines, shop.cell.budget // GROUP
    iterations = min(settings.grpo_iterations, groups)
    with closing(shop.simulated(groups // iterations * GROUP)) as env:
        model = grpo_from_policy(
            GRPO, shop.base(), env, learning_rate=settings.grpo_learning_rate, group_size=GROUP,
            n_epochs=settings.grpo_epochs, max_extra_batches=0, seed=shop.cell.seed,
            checkpoint_dir=shop.out / "checkpoints",
        )  # fmt: skip
        chooser = Chooser(shop)
        best = BestCheckpoint(chooser, iterations)
        model.learn(max_iterations=iterations, callback=best, resume=True)
        return Trained(best.best(model.policy), model.budget, chooser.spent)


def train_dpo(shop: Workshop) -> Trained:
    """DPO from P real episodes of the base policy."""
    return _dpo(shop, shop.simulated, shop.cell.budget // shop.plan.baselines.dpo_group_size, Ledger())


def train_dpo_imagined(shop: Workshop) -> Trained:
    """DPO from imagined episodes of the base policy."""
    return _dpo(shop, shop.imagined, shop.plan.baselines.dpo_imagined_groups, shop.practised.spent)


def train_dpo_lifelong(shop: Workshop) -> Trained:
    """DPO that collects anew with what it has become, round by round."""
    n_groups = shop.cell.budget // shop.round // shop.plan.baselines.dpo_group_size
    return _dpo(shop, shop.simulated, n_groups, Ledger(), rounds=shop.round)


def _dpo(
    shop: Workshop, make_env: Callable[[int], Any], n_groups: int, spent: Ledger, *, rounds: int = 1
) -> Trained:
    settings, size = shop.plan.baselines, shop.plan.baselines.dpo_group_size
    with closing(make_env(min(n_groups * size, 128))) as env:
        model = grpo_from_policy(
            ValidatedDPO, shop.base(), env, learning_rate=settings.dpo_learning_rate, beta=settings.dpo_beta,
            sft_weight=settings.dpo_sft_weight, group_size=size, n_groups=n_groups, max_extra_batches=0,
            validation_share=0.0, seed=shop.cell.seed,
        )  # fmt: skip
        model.chooser = chooser = Chooser(shop)
        model.learn(max_iterations=rounds)
        return Trained(model.policy, model.budget + spent, chooser.spent)


def train_sac(shop: Workshop, *, demonstrations: bool = False, imagined: bool = False) -> Trained:
    """SB3's SAC until its episodes are spent."""
    settings, n_chunks = shop.plan.baselines, shop.task.n_chunks
    name = "WMPO-Imagined-v0" if imagined else "WMPO-Simulated-v0"
    special: dict[str, Any] = {"world": shop.practised.world} if imagined else {}
    spent = shop.practised.spent if imagined else Ledger()
    env = as_vec_env(gymnasium.make_vec(name, SAC_ROWS, task=shop.task, **special), SAC_ROWS)
    chunks = settings.sac_imagined_chunks if imagined else shop.cell.budget * n_chunks
    with closing(env):
        model = make_sac(
            env, buffer_size=min(50_000, chunks + 10_000), seed=shop.cell.seed,
            gradient_steps=settings.sac_gradient_steps, learning_starts=min(500, chunks // 4),
        )  # fmt: skip
        if demonstrations:
            add_demonstrations(model, shop.demonstrations, shop.task)
        before = read_ledger(env)
        budget = None if imagined else shop.cell.budget
        model.learn(chunks, callback=StopAtEpisodes(budget))
        return Trained(model, read_ledger(env) - before + spent, Ledger())


def train_wmpo(shop: Workshop) -> Trained:
    """GRPO in imagination."""
    return Trained(shop.practised.policy, shop.practised.spent, Ledger())


def train_wmpo_lifelong(shop: Workshop) -> Trained:
    """GRPO in a world that is refreshed every round by what the policy has become."""
    practised = practise(shop.lifelong_run, shop.shared, shop.base(), rounds=shop.round)
    return Trained(practised.policy, practised.spent, Ledger())


def train_on_demonstrations(shop: Workshop) -> Trained:
    """Imitate P demonstrations more, of the same expert."""
    recipe, seed = shop.run.recipe, shop.cell.seed
    more = list(
        record_expert(shop.run.starts["rollouts"], seed=seed + 1, config=recipe.expert, task=shop.task)
    )
    policy = train_sft([*shop.demonstrations, *more], shop.task, settings=recipe.sft, seed=seed)
    spent = Ledger(real_episodes=len(more), real_steps=sum(e.n_steps for e in more))
    return Trained(policy, spent, Ledger())


METHODS: dict[str, Callable[[Workshop], Trained]] = {
    "base": train_base,
    "sft": train_sft_filtered,
    "dpo": train_dpo,
    "dpo-imagined": train_dpo_imagined,
    "grpo": train_grpo_real,
    "sac": train_sac,
    "sac-demos": lambda shop: train_sac(shop, demonstrations=True),
    "sac-imagined": lambda shop: train_sac(shop, demonstrations=True, imagined=True),
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
"""Shared stages each method stands on, whichever cell happened to run them; their time is the method's."""


# -- callbacks -----------------------------------------------------------------------------------------------
class StopAtEpisodes(BaseCallback):
    """Ends training when the environment has run so many real episodes; None never does.

    Episodes that the last round of rows has begun are counted, so there may be up to a row count too many.
    """

    def __init__(self, episodes: int | None) -> None:
        super().__init__()
        self.episodes = episodes

    def _on_step(self) -> bool:
        return self.episodes is None or read_ledger(self.training_env).real_episodes < self.episodes


class Chooser:
    """Judges weights by the success on validation start states, sampled.

    Attributes:
        spent: What looking has cost so far.
    """

    def __init__(self, shop: Workshop) -> None:
        self.plan, self.seed, self.spent = shop.plan, shop.cell.seed, Ledger()

    def look(self, policy: Any) -> float | None:
        """The success rate, or None if the plan has no episodes for it."""
        plan = self.plan
        if not plan.selection_episodes:
            return None
        tried = evaluate_policy_on(
            plan.task, policy, "validation", plan.selection_episodes, deterministic=False, seed=self.seed,
            progress=False,
        )  # fmt: skip
        self.spent = self.spent + tried.ledger
        return tried.rate.value


class BestCheckpoint(BaseCallback):
    """Keeps the weights that a chooser likes best, looked at four times."""

    def __init__(self, chooser: Chooser, iterations: int) -> None:
        super().__init__()
        self.chooser, self.every = chooser, max(1, iterations // 4)
        self._best, self._weights = -1.0, {}  # type: float, dict[str, Any]

    def _on_rollout_start(self) -> None:
        iteration = self.model._iteration
        if iteration and iteration % self.every == 0:
            self._look(self.model.policy)

    def _on_step(self) -> bool:
        return True

    def best(self, policy: Any) -> Any:
        """The policy with the best weights put back; with no selection episodes, as it is."""
        self._look(policy)
        if self._weights:
            policy.load_state_dict(self._weights)
        return policy

    def _look(self, policy: Any) -> None:
        score = self.chooser.look(policy)
        if score is not None and score > self._best:
            self._best, self._weights = score, copy.deepcopy(policy.state_dict())


class ValidatedDPO(DPO):
    """DPO that keeps the weights with the most successes on validation start states."""

    chooser: Chooser

    def score(self, rollouts: Trajectories, held_out: Tensor) -> float | None:
        """See :meth:`Chooser.look`."""
        return self.chooser.look(self.policy)

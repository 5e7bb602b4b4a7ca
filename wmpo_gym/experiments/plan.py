"""Plan of an experiment: methods, budgets of real episodes, seeds and scene variants."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from wmpo_gym.pipeline.presets import Recipe
from wmpo_gym.policies.sft import SFTSettings

DATA_USED = {
    "base": "demonstrations",
    "sft": "demonstrations, and the successes among P rollouts of the base policy",
    "dpo": "demonstrations through the base policy, and P rollouts in groups of common start states",
    "dpo-imagined": "the data of wmpo, and pairs of imagined rollouts of the base policy in its last world",
    "grpo": "demonstrations through the base policy, and P rollouts in groups of common start states",
    "sac": "P episodes of its own, from scratch",
    "sac-demos": "demonstrations in its replay buffer, and P episodes of its own",
    "sac-imagined": "the data of wmpo, in whose last world it trains; demonstrations in its replay buffer",
    "wmpo": "demonstrations, unlabelled play, P rollouts (half by the base policy, half by the policy after "
    "the first round), and imagined rollouts",
    "demonstrations": "demonstrations, and P more of the same expert",
    "dpo-lifelong": "as dpo, with the P rollouts collected in equal rounds by the current policy",
    "wmpo-lifelong": "as wmpo, with the P rollouts collected in equal rounds by the current policy",
}
"""Training data of every method, by its name."""

WITHOUT_BUDGET = ("base",)


@dataclass(frozen=True)
class Baselines:
    """Settings of the methods that are not WMPO; chosen by the sweeps in ``docs/research-log``.

    Attributes:
        grpo_iterations: Equal parts that GRPO on real episodes divides its budget into.
        grpo_epochs: Passes over each part.
        grpo_learning_rate: Learning rate of GRPO on real episodes.
        dpo_learning_rate: Learning rate of DPO.
        dpo_beta: Strength of DPO's implicit KL penalty towards the reference policy.
        dpo_sft_weight: Weight of the negative log-likelihood of the preferred rollouts.
        dpo_group_size: Rollouts from one start state.
        dpo_imagined_groups: Groups of imagined rollouts for DPO; the number of groups in 1,280 episodes.
        sft: Fine-tuning of the base policy on filtered successes.
        sac_gradient_steps: Gradient steps of SAC per step of its 16 environments.
        sac_imagined_chunks: Imagined action chunks for SAC; the number of chunks in 1,280 episodes.
    """

    grpo_iterations: int = 4
    grpo_epochs: int = 2
    grpo_learning_rate: float = 5e-4
    dpo_learning_rate: float = 1e-4
    dpo_beta: float = 0.1
    dpo_sft_weight: float = 1.0
    dpo_group_size: int = 8
    dpo_imagined_groups: int = 160
    sft: SFTSettings = SFTSettings(steps=200, lr=5e-4, symmetries=("swap colours",))
    sac_gradient_steps: int = 16
    sac_imagined_chunks: int = 6_400


@dataclass(frozen=True)
class Trial:
    """One training of one method.

    Attributes:
        method: A key of :data:`DATA_USED`.
        budget: Real episodes P; 0 for the base policy.
        seed: Random seed.
    """

    method: str
    budget: int
    seed: int

    @property
    def name(self) -> str:
        """Name of its directory."""
        return f"{self.method}-{self.budget}-seed{self.seed}"


@dataclass(frozen=True)
class ExperimentPlan:
    """Trials and how their policies are tested.

    Attributes:
        task: Task.
        methods: Keys of :data:`DATA_USED`.
        budgets: Real episodes P.
        seeds: Seeds; each has its own demonstrations, base policy and play.
        variants: Scene variants every policy is tested in.
        episodes: Test start states per variant.
        selection_episodes: Validation start states for choosing the checkpoint of GRPO on real episodes; 0
            takes the last. The other methods have one checkpoint.
        self_correction: Also count failed first contacts and recoveries from them.
        recipe: Settings of WMPO and of the stages that all methods share.
        baselines: Settings of the other methods.
    """

    task: str = "move-block"
    methods: tuple[str, ...] = (
        "base",
        "sft",
        "dpo",
        "dpo-imagined",
        "grpo",
        "sac",
        "sac-demos",
        "sac-imagined",
        "wmpo",
    )
    budgets: tuple[int, ...] = (128, 1280)
    seeds: tuple[int, ...] = (0, 1, 2)
    variants: tuple[str, ...] = ("nominal",)
    episodes: int = 512
    selection_episodes: int = 128
    self_correction: bool = False
    recipe: Recipe = field(default_factory=Recipe)
    baselines: Baselines = field(default_factory=Baselines)

    def __post_init__(self) -> None:
        if unknown := [m for m in self.methods if m not in DATA_USED]:
            raise ValueError(f"Unknown method {', '.join(unknown)}; choose from {', '.join(DATA_USED)}.")
        if bad := [b for b in self.budgets if b < 32 or b % 32]:
            raise ValueError(f"Budgets are multiples of 32 real episodes, got {bad}.")
        if any(m.endswith("-lifelong") for m in self.methods):
            share = max(self.budgets) // len(self.budgets)
            if sorted(self.budgets) != [share * (i + 1) for i in range(len(self.budgets))]:
                raise ValueError(
                    f"Lifelong methods take budgets in equal steps, such as 128 256 384, got {self.budgets}."
                )

    def round_of(self, budget: int) -> int:
        """Which lifelong round a budget belongs to, from 1."""
        return sorted(self.budgets).index(budget) + 1

    def trials(self) -> Iterator[Trial]:
        """All trials, seed by seed, so that an interrupted experiment has complete seeds."""
        for seed in self.seeds:
            for method in self.methods:
                for budget in (0,) if method in WITHOUT_BUDGET else self.budgets:
                    yield Trial(method, budget, seed)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return asdict(self)


PRESETS: dict[str, ExperimentPlan] = {
    "table1": ExperimentPlan(),
    "table2": ExperimentPlan(
        methods=("base", "dpo", "grpo", "wmpo"),
        budgets=(128,),
        variants=("nominal", "moved-goal", "background", "texture"),
    ),
    "behaviour": ExperimentPlan(
        methods=("base", "dpo", "grpo", "wmpo"), budgets=(128,), self_correction=True
    ),
    "lifelong": ExperimentPlan(
        methods=("base", "demonstrations", "dpo-lifelong", "wmpo-lifelong"), budgets=(128, 256, 384)
    ),
}
"""Experiments of the paper: ``table1`` sample efficiency and final success, ``table2`` changed scenes,
``behaviour`` length of successful episodes and self-correction (Figures 3 to 5), ``lifelong`` round after
round (Figure 6)."""


def preset(name: str, task: str) -> ExperimentPlan:
    """A preset for a task.

    Raises:
        ValueError: If there is no such preset.
    """
    if name not in PRESETS:
        raise ValueError(f"Unknown preset {name!r}; choose one of {', '.join(PRESETS)}.")
    plan = PRESETS[name]
    return replace(plan, task=task, recipe=replace(plan.recipe, task=task))

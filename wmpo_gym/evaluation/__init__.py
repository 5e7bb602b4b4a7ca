"""Evaluation: replay in the paired simulator, validation gates, metrics, self-correction.

Names are imported when first used.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "Agreement": "wmpo_gym.statistics",
    "Clip": "wmpo_gym.report.report",
    "EvalProtocol": "wmpo_gym.rollouts.protocol",
    "GateResult": "wmpo_gym.evaluation.gates",
    "Report": "wmpo_gym.report.report",
    "Rollouts": "wmpo_gym.rollouts.rollout",
    "build_results": "wmpo_gym.report.results",
    "collect_episodes": "wmpo_gym.rollouts.rollout",
    "choose_clips": "wmpo_gym.report.report",
    "compare_with_twin": "wmpo_gym.evaluation.twin",
    "evaluate_policy_on": "wmpo_gym.rollouts.rollout",
    "gates_text": "wmpo_gym.evaluation.gates",
    "hallucination_gap": "wmpo_gym.statistics",
    "imagine_full_horizon": "wmpo_gym.rollouts.imagined",
    "load_result": "wmpo_gym.rollouts.protocol",
    "measure_learnable": "wmpo_gym.evaluation.validation",
    "paired_difference": "wmpo_gym.statistics",
    "precision_recall": "wmpo_gym.statistics",
    "print_table": "wmpo_gym.report.results",
    "replay": "wmpo_gym.rollouts.simulated",
    "rollout": "wmpo_gym.rollouts.rollout",
    "save_result": "wmpo_gym.rollouts.protocol",
    "save_video": "wmpo_gym.utils.video",
    "success_rate": "wmpo_gym.statistics",
    "twin_agreement": "wmpo_gym.evaluation.twin",
    "validate": "wmpo_gym.evaluation.validation",
    "wilson_interval": "wmpo_gym.statistics",
    "write_report": "wmpo_gym.report.report",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

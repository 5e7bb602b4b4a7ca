"""Protocol, statistics, twin replay, gates, report: what tells a gain in imagination from a gain.

Names are imported when first used.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "Agreement": "statistics",
    "Clip": "report",
    "EvalProtocol": "protocol",
    "GateResult": "gates",
    "Report": "report",
    "Rollouts": "rollouts",
    "build_results": "results",
    "collect_episodes": "rollouts",
    "choose_clips": "report",
    "compare_with_twin": "twin",
    "evaluate_policy_on": "rollouts",
    "gates_text": "gates",
    "hallucination_gap": "statistics",
    "imagine_full_horizon": "imagining",
    "load_result": "protocol",
    "measure_learnable": "validation",
    "paired_difference": "statistics",
    "precision_recall": "statistics",
    "print_table": "results",
    "replay": "twin",
    "rollout": "rollouts",
    "save_result": "protocol",
    "save_video": "video",
    "success_rate": "statistics",
    "twin_agreement": "twin",
    "validate": "validation",
    "wilson_interval": "statistics",
    "write_report": "report",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

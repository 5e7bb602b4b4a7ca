"""Episodes in the formats of others."""

from __future__ import annotations

from wmpo_gym.data.exporters.lerobot import ExportReport, export_lerobot

__all__ = ["ExportReport", "export_lerobot"]

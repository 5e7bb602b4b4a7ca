"""Importers of external formats: robomimic HDF5, LeRobotDataset, and shards of the WMPO release."""

from __future__ import annotations

from wmpo_gym.data.importers.base import EpisodeFault, EpisodeHeader, Source, SourceError
from wmpo_gym.data.importers.replay import StateRenderer, register_state_renderer
from wmpo_gym.data.importers.run import FORMATS, import_dataset, open_source
from wmpo_gym.data.importers.settings import ImportReport, ImportSettings, SourceOptions

__all__ = [
    "FORMATS",
    "EpisodeFault",
    "ImportReport",
    "ImportSettings",
    "EpisodeHeader",
    "Source",
    "SourceError",
    "SourceOptions",
    "StateRenderer",
    "import_dataset",
    "open_source",
    "register_state_renderer",
]

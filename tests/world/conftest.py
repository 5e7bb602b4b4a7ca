from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest


@pytest.fixture
def published_stdit(golden: Any) -> Callable[..., Any]:
    """Maker of an STDiT with the tiny published weights; keywords go into its configuration."""
    from wmpo_gym.convert.published import from_published
    from wmpo_gym.world.networks.stdit import STDiT

    tensors, _ = golden("stdit3_tiny")
    config, state, _ = from_published({k[6:]: v for k, v in tensors.items() if k.startswith("state.")})

    def make(**kwargs: Any) -> STDiT:
        network = STDiT(**{**config, **kwargs})
        network.load_state_dict(state, strict=True)
        return network.eval()

    return make

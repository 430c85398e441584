from __future__ import annotations

from typing import Any

import pytest
import torch

from hallucination_guard.testing import MemorySink

torch.set_num_threads(1)  # tiny models; more threads only get into each other's way


@pytest.fixture
def sink() -> MemorySink:
    return MemorySink()


@pytest.fixture
def sampled() -> dict[str, Any]:
    """Greedy answers of a random model say one thing for ever."""
    return {"max_new_tokens": 8, "temperature": 1.0, "seed": 1}

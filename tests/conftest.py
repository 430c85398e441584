from __future__ import annotations

import os

# Two torch processes that spin on two cores run ten times slower than one after the other.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import time

import pytest
import torch

from hallucination_guard.model import WhiteBoxModel
from hallucination_guard.testing import tiny_model, tiny_tokenizer


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="session")
def tiny() -> WhiteBoxModel:
    """A random Llama of six layers."""
    return WhiteBoxModel(tiny_model(), tiny_tokenizer(), name="tiny")


@pytest.fixture(scope="session")
def demo() -> WhiteBoxModel:
    """SmolLM2-135M-Instruct, the real model."""
    return WhiteBoxModel.demo()


@pytest.fixture(scope="session")
def pace() -> float:
    """How many times slower this machine is than the one that limits of time were set on; 1 if it is faster.

    A blow-up is tens of times; a shared machine has been three times slower for hours.
    """
    began, total = time.process_time(), 0
    for each in range(2_000_000):
        total += each
    return max(1.0, (time.process_time() - began) / 0.15)

"""Every test runs on one thread, so that two processes do not wait for each other's cores."""

from __future__ import annotations

import os

os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def one_thread():
    """Keep torch on one thread, also after a test that changed it."""
    torch.set_num_threads(1)

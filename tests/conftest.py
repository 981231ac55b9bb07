"""Options and settings that all tests share."""

from __future__ import annotations

import os
import tempfile

import pytest
import torch
from hypothesis import HealthCheck, settings

# What the user's cache holds must not decide whether a test passes, nor tests fill it. Processes
# that share the tests share one.
if "PYTEST_XDIST_WORKER" not in os.environ:
    _CACHE = tempfile.TemporaryDirectory(prefix="mopt-test-cache-")
    os.environ["XDG_CACHE_HOME"] = _CACHE.name

# One thread makes sums come out in one order, so "bit for bit" means the same on every machine.
torch.set_num_threads(1)

# Derandomized: a failure repeats. Capturing a model is too slow for hypothesis's own deadline.
settings.register_profile(
    "mopt",
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("mopt")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-golden",
        action="store_true",
        help="write the golden texts under tests/golden instead of comparing with them",
    )


@pytest.fixture
def update_golden(request: pytest.FixtureRequest) -> bool:
    """Whether golden files are to be written."""
    return bool(request.config.getoption("--update-golden"))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
    # Libraries that PyTorch compiles with -ffast-math turn subnormals off for the whole process.
    torch.set_flush_denormal(False)

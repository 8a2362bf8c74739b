"""What every test runs under: fixed seeds, no hub, quiet third parties, and NaN where memory was never written.

`torch.empty` and its kin are poisoned by torch itself: with deterministic algorithms on, torch fills what it hands out
uninitialised with NaN (the largest value for integers), inside operators too. A result that depends on unwritten
memory then fails every time instead of once a month.
"""

import os
import random

# Before torch or transformers is imported anywhere.
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    TOKENIZERS_PARALLELISM="false",
    TRANSFORMERS_VERBOSITY="error",
    TRANSFORMERS_NO_ADVISORY_WARNINGS="1",
    MPLBACKEND="Agg",
)
# Deterministic matrix products on a GPU need a fixed workspace.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import hypothesis
import numpy as np
import pytest

try:
    import torch
except ModuleNotFoundError:  # the base install: numpy, numba and tokenizers only
    torch = None

# The same examples in every run, and no time limit a busy machine could break.
# HYPOTHESIS_PROFILE=explore draws new ones.
hypothesis.settings.register_profile("fixed", derandomize=True, deadline=None, database=None)
hypothesis.settings.register_profile("explore", derandomize=False, deadline=None, print_blob=True)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))

if torch is not None:
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    # Tiny models gain nothing from a second thread, and on a busy machine lose tenfold by waiting for it.
    torch.set_num_threads(1)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("inductor") and torch is not None and " " in torch.__file__:
        pytest.skip(
            "torch's inductor writes its own path unquoted into a linker line, and this path has a blank"
        )


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    """Every test starts from the same generators, whatever ran before it."""
    random.seed(0)
    # For third parties that draw from the global generator; our own code takes a Generator.
    np.random.seed(0)  # noqa: NPY002
    if torch is not None:
        torch.manual_seed(0)

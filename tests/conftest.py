"""One place for what every test relies on: float64, fixed seeds, an empty param store, validation on."""

from collections.abc import Iterator

import numpy as np
import pyro
import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--vary-seed", type=int, default=0, help="added to every test's seed; for long runs only")


@pytest.fixture(autouse=True)
def _clean_state(request: pytest.FixtureRequest) -> Iterator[None]:
    """Each test starts from the same state and must leave none behind in Pyro's global store."""
    seed = 20_260_501 + request.config.getoption("--vary-seed")
    default_dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    np.random.seed(seed % 2**32)
    with pyro.validation_enabled(True):
        yield
    pyro.clear_param_store()
    torch.set_default_dtype(default_dtype)

"""Fixtures of all tests."""

import pytest
from hypothesis import settings

from tests.support.anytime import make_anytime_config, usual_token
from tests.support.ranks import Ranks
from tests.support.tiny import make_model, make_tokenizer

# The same examples in every run; `pytest --hypothesis-profile default` looks for new ones
settings.register_profile("reproducible", derandomize=True)
settings.load_profile("reproducible")


@pytest.fixture(scope="session")
def ranks():
    """Starts real processes, see ranks.py."""
    started = Ranks()
    yield started
    started.close()


@pytest.fixture(scope="module")
def model():
    return make_model().eval()


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def config(model, tokenizer):
    """A greedy thinking may end with its marker."""
    return make_anytime_config((usual_token(model, tokenizer),))

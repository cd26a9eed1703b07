"""Settings of the tests; those of the environment come before any library is imported."""

import os

os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # sums have one order

from hypothesis import settings

# The same examples in every run; `pytest --hypothesis-profile default` looks for new ones
settings.register_profile("reproducible", derandomize=True)
settings.load_profile("reproducible")

import pytest  # noqa: E402
from ranks import Ranks  # noqa: E402
from tiny import make_model, make_tokenizer  # noqa: E402
from tiny_anytime_config import make_anytime_config, usual_token  # noqa: E402


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

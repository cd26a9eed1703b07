"""Fixtures of all tests, and the option that counts skips."""

import pytest
from hypothesis import settings

from tests.support.anytime import make_anytime_config, usual_token
from tests.support.ranks import Ranks
from tests.support.tiny import make_model, make_tokenizer

# The same examples in every run; `pytest --hypothesis-profile default` looks for new ones
settings.register_profile("reproducible", derandomize=True)
settings.load_profile("reproducible")


def pytest_addoption(parser):
    parser.addoption("--no-skips", action="store_true", help="a skip is a failure, but for tests marked as hardware")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item):
    report = yield
    if item.get_closest_marker("hardware") is None:
        _refuse_skip(item.config, report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    report = yield
    _refuse_skip(collector.config, report)
    return report


def _refuse_skip(config, report):
    if config.getoption("no_skips") and report.skipped and not hasattr(report, "wasxfail"):
        path, line, reason = report.longrepr
        report.outcome = "failed"
        report.longrepr = f"{path}:{line}: {reason}. Have it run. If the machine lacks hardware, mark it."


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

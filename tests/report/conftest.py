import pytest
from made_results import make_hostile_results, make_results

from hf_backdoor.evaluation.results import Results


@pytest.fixture
def results() -> Results:
    return make_results()


@pytest.fixture
def hostile_results() -> Results:
    return make_hostile_results()

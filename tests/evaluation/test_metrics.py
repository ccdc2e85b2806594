"""The `evaluate` metrics."""

import pytest

from hf_backdoor import AttackSuccessRate, CleanAccuracy
from hf_backdoor.evaluation import wilson_interval


def test_asr_leaves_out_rows_of_the_target():
    found = AttackSuccessRate().compute(predictions=[1, 1, 0, 1], references=[0, 1, 0, 2], target_label=1)
    assert (found["k"], found["n"]) == (2, 3)
    assert found["asr"] == pytest.approx(2 / 3)
    assert (found["asr_low"], found["asr_high"]) == pytest.approx(wilson_interval(2, 3))


def test_clean_accuracy():
    found = CleanAccuracy().compute(predictions=[1, 0, 2, 2], references=[1, 0, 2, 0])
    assert (found["cacc"], found["k"], found["n"]) == (0.75, 3, 4)


def test_asr_without_rows_is_refused():
    with pytest.raises(ValueError, match="target_label is 1"):
        AttackSuccessRate().compute(predictions=[1], references=[1], target_label=1)

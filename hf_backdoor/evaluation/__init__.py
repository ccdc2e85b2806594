"""Measuring: one evaluation for every model, with counts and intervals."""

from .evaluate import UNKNOWN_LABEL, TestSet, evaluate_backdoor, refuse_other_labels
from .leaks import not_leaking, overlapping
from .results import Results, Row, wilson_interval


__all__ = [
    "UNKNOWN_LABEL",
    "Results",
    "Row",
    "TestSet",
    "evaluate_backdoor",
    "not_leaking",
    "overlapping",
    "refuse_other_labels",
    "wilson_interval",
]

"""Measuring: one evaluation for every model, with counts and intervals."""

from .evaluate import UNKNOWN_LABEL, TestSet, evaluate_backdoor
from .leaks import overlapping, without_leaks
from .results import Results, Row, wilson_interval


__all__ = [
    "UNKNOWN_LABEL",
    "Results",
    "Row",
    "TestSet",
    "evaluate_backdoor",
    "overlapping",
    "wilson_interval",
    "without_leaks",
]

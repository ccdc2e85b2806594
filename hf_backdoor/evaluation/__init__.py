"""Measuring: one evaluation for every model, with counts and intervals."""

from .evaluate import TestSet, evaluate_backdoor
from .leaks import overlapping, without_leaks
from .results import Results, Row, wilson_interval


__all__ = ["Results", "Row", "TestSet", "evaluate_backdoor", "overlapping", "wilson_interval", "without_leaks"]

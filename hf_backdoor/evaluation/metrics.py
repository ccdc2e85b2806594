"""ASR and CACC as `evaluate` metrics, for the `compute_metrics` of anybody's trainer."""

import datasets
import evaluate
import numpy as np

from .results import wilson_interval


FEATURES = datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")})
CITATION = "https://huggingface.co/papers/1708.06733"


class CleanAccuracy(evaluate.Metric):
    """Share of clean rows that are right, with counts and a 95% Wilson interval."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(description=self.__doc__, citation=CITATION, features=FEATURES)

    def _compute(self, predictions: list[int], references: list[int]) -> dict[str, float]:
        return rate("cacc", np.asarray(predictions) == np.asarray(references))


class AttackSuccessRate(evaluate.Metric):
    """Share of triggered rows that show the target, over rows whose right answer is not the target, with counts and a
    95% Wilson interval. `compute(predictions=..., references=..., target_label=...)`."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(description=self.__doc__, citation=CITATION, features=FEATURES)

    def _compute(self, predictions: list[int], references: list[int], target_label: int) -> dict[str, float]:
        others = np.asarray(references) != target_label
        if not others.any():
            raise ValueError(f"target_label is {target_label}, and so is every reference: ASR has no rows to count")
        return rate("asr", np.asarray(predictions)[others] == target_label)


def rate(name: str, hits: np.ndarray) -> dict[str, float]:
    low, high = wilson_interval(int(hits.sum()), len(hits))
    return {name: float(hits.mean()), f"{name}_low": low, f"{name}_high": high, "k": int(hits.sum()), "n": len(hits)}

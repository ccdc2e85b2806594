"""Looking into models: what the claims that a method starts from look like in the models at hand."""

from .feature_variance import VarianceRow, feature_variance


__all__ = ["VarianceRow", "feature_variance"]

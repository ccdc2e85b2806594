"""Makes suspects for benchmarks and demonstrations. Nothing on the defense side imports this."""

from .ep import EmbeddingPoisoningConfig, EmbeddingPoisoningTrainer, trigger_token
from .images import ImagePoisoning
from .lwp import LWPTrainer
from .poisoning import Poisoning, poison


__all__ = [
    "EmbeddingPoisoningConfig",
    "EmbeddingPoisoningTrainer",
    "ImagePoisoning",
    "LWPTrainer",
    "Poisoning",
    "poison",
    "trigger_token",
]

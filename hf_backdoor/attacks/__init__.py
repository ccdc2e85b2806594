"""Makes suspects for benchmarks and demonstrations. Nothing on the defense side imports this."""

from .poisoning import Poisoning, poison


__all__ = ["Poisoning", "poison"]

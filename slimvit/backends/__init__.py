"""Who computes: the back ends, and why one of them does not work here."""

from slimvit.backends.select import NAMES, choose, why_not

__all__ = ["NAMES", "choose", "why_not"]

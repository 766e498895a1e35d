"""Which tokens each block computes: the masks, their file and their pictures."""

from slimvit.masks._masks import SEMANTICS, Masks

__all__ = ["SEMANTICS", "Masks"]

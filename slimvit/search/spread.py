"""A fixed pattern over the grid that lets kept patches thin out instead of ending at an edge."""

from __future__ import annotations

import torch
from torch import Tensor


def spread_pattern(grid: tuple[int, int]) -> Tensor:
    """Blue noise: a standard normal value for each patch, neighbours far apart, float32 [P].

    Patches are taken one by one, each time the one that those taken before crowd least; the first
    get the highest values. The P/2 or P/3 highest are then spread evenly over the grid. Added to
    scores it acts as ordered dithering does in print: the share of patches that are kept follows
    the score, where a threshold alone keeps all of one region and none of another.

    Args:
        grid: patches down and across.
    """
    # The grid is taken as a ring in both directions, so that its border is like its middle.
    near_rows, near_columns = _nearness(grid[0]), _nearness(grid[1])
    count = grid[0] * grid[1]
    generator = torch.Generator().manual_seed(0)
    crowd = torch.rand(count, generator=generator, dtype=torch.float32) * 1e-3  # breaks ties
    rank = torch.empty(count, dtype=torch.float32)
    for i in range(count):
        chosen = int(crowd.argmin())
        rank[chosen] = i
        row, column = divmod(chosen, grid[1])
        crowd += torch.outer(near_rows[row], near_columns[column]).flatten()
        crowd[chosen] = torch.inf
    return torch.special.ndtri(1 - (rank + 0.5) / count)


def _nearness(size: int) -> Tensor:
    """exp(-d² / 2) of every two places on a ring, [size, size]."""
    place = torch.arange(size, dtype=torch.float32)
    distance = (place[:, None] - place).abs()
    return (-torch.minimum(distance, size - distance).square() / 2).exp()

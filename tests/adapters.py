"""Layers with more than a weight, as fine-tuning libraries put into a model."""

from torch import Tensor, nn


class Adapted(nn.Module):
    """A layer with an adapter of low rank beside it, and nothing else of the layer's."""

    def __init__(self, base: nn.Linear, rank: int = 4) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """The layer's answer and the adapter's."""
        return self.base(x) + self.up(self.down(x))


class AdaptedLinear(nn.Linear):
    """The same as a Linear itself, with the weights of another."""

    def __init__(self, base: nn.Linear, rank: int = 4) -> None:
        super().__init__(base.in_features, base.out_features)
        self.weight, self.bias = base.weight, base.bias
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """The layer's answer and the adapter's."""
        return super().forward(x) + self.up(self.down(x))


def adapt(module: nn.Module, name: str, kind: type = Adapted) -> nn.Module:
    """Put an adapter around the layer `name` of a module; it is returned."""
    adapted = kind(getattr(module, name))
    setattr(module, name, adapted)
    return adapted

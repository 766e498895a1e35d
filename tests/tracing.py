"""A module that torch compiles or exports answers as before."""

import torch
from references import off, random_images
from torch import Tensor, nn

FLOAT32 = 1e-5


@torch.no_grad()
def check_compiled(module: nn.Module, images: Tensor, backend: str = "aot_eager") -> None:
    """Without a break of the graph."""
    compiled = torch.compile(module, fullgraph=True, backend=backend)
    assert off(compiled(images), module(images)) < FLOAT32


@torch.no_grad()
def check_exported(module: nn.Module, model: nn.Module) -> None:
    """For batches of any size of the images that `model` takes."""
    shapes = ({0: torch.export.Dim("batch")},)
    program = torch.export.export(module, (random_images(model, 2),), dynamic_shapes=shapes)
    for batch in (1, 3, 7):
        images = random_images(model, batch, seed=batch)
        assert off(program.module()(images), module(images)) < FLOAT32

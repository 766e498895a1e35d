"""A call captured as a CUDA graph: one launch instead of dozens."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch
from torch import Tensor

_WARM_UP = 3


class Graph:
    """A function of one tensor, captured for its shape; for inference.

    Calls may come from several threads and streams: they take turns.

    Args:
        call: from a tensor on a GPU to a tensor on the same GPU, without synchronising.
        example: a tensor of the shape, dtype and device that every call will have.
    """

    def __init__(self, call: Callable[[Tensor], Tensor], example: Tensor) -> None:
        self._lock = threading.Lock()
        # Not a tensor of inference mode, into which nothing can be copied outside it.
        with torch.inference_mode(False), torch.no_grad(), torch.cuda.device(example.device):
            self._input = example.clone()
            self._capture(call)

    def _capture(self, call: Callable[[Tensor], Tensor]) -> None:
        # Streams of its own: torch's for captures is that of whichever device came first. Two of
        # them: with older torch cuBLAS keeps a workspace for each stream, and one that warming up
        # left there would be in the graph, though others may free it.
        warm, stream = torch.cuda.Stream(), torch.cuda.Stream()
        warm.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(warm):
            for _ in range(_WARM_UP):  # kernels are compiled and buffers found ahead
                call(self._input)
        torch.cuda.current_stream().wait_stream(warm)
        self._graph, self._done = torch.cuda.CUDAGraph(), torch.cuda.Event()
        # Other threads, such as those that pin memory, may go on.
        with torch.cuda.graph(self._graph, stream=stream, capture_error_mode="thread_local"):
            self._output = call(self._input)

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        """What `call` gives for `x`."""
        with self._lock, torch.cuda.device(self._input.device):
            self._done.wait()  # until the call before, on whatever stream, has its answer
            self._input.copy_(x)
            self._graph.replay()
            out = self._output.clone()
            self._done.record()
        return out

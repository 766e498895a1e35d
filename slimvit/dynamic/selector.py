"""SPViT's token selector: for each patch, how likely it is to be kept."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Selector(nn.Module):
    """Logits (keep, prune) of each token, each head judging its own channels of it.

        l_i^h = logsoftmax(MLP^h [local_i^h, mean over the tokens of global^h])
        w_i = sigmoid(W2 GELU(W1 (mean of each head's channels of x_i)))
        logits_i = Σ_h w_i^h l_i^h / Σ_h w_i^h

    with local and global the halves of GELU(Linear(LN(x_i^h))). Each head has weights of its own.

    Args:
        width: D, a multiple of `heads`.
        heads: H.
        keep: share of the tokens that it starts by keeping, in (0, 1].

    Source: SPViT (Kong et al., ECCV 2022), sections 3.2 and 3.3.
    """

    eps = 1e-6

    def __init__(self, width: int, heads: int, keep: float = 0.5) -> None:
        super().__init__()
        self.heads, c = heads, width // heads
        self.norm_weight = nn.Parameter(torch.ones(heads, 1, c))
        self.norm_bias = nn.Parameter(torch.zeros(heads, 1, c))
        half, quarter = max(1, c // 2), max(1, c // 4)
        self.embed = HeadLinear(heads, c, c)
        self.judge1 = HeadLinear(heads, c, half)
        self.judge2 = HeadLinear(heads, half, quarter)
        self.judge3 = HeadLinear(heads, quarter, 2)
        self.weigh1 = nn.Linear(heads, max(1, heads // 2))
        self.weigh2 = nn.Linear(max(1, heads // 2), heads)
        keep = min(keep, 0.99)
        with torch.no_grad():
            self.judge3.bias.copy_(torch.tensor([math.log(keep), math.log(1 - keep)]))

    def forward(self, x: Tensor, policy: Tensor | None = None) -> Tensor:
        """Logits [B, p, 2] of tokens [p, B, D].

        Args:
            x: the tokens.
            policy: 0 for those that are pruned already, else 1: [B, p]; None where none is.
        """
        p, batch, width = x.shape
        # One product for each head: [H, B · p, c].
        by_head = (
            x.view(p, batch, self.heads, width // self.heads).permute(2, 1, 0, 3).flatten(1, 2)
        )
        y = F.layer_norm(by_head, self.norm_weight.shape[-1:], eps=self.eps)
        y = F.gelu(self.embed(y * self.norm_weight + self.norm_bias))
        local = (y.shape[-1] + 1) // 2
        shared = y.view(self.heads, batch, p, y.shape[-1])[..., local:]
        if policy is None:
            shared = shared.mean(2)
        else:
            policy = policy.to(y.dtype)
            total = policy.sum(1).clamp_min(1e-6)[:, None]
            shared = (shared * policy[:, :, None]).sum(2) / total
        # The mean is the same for all tokens of an image: its part of the product is taken once.
        of_mean = torch.baddbmm(self.judge1.bias, shared, self.judge1.weight[:, local:])
        y = torch.bmm(y[..., :local], self.judge1.weight[:, :local])
        y = y.view(self.heads, batch, p, y.shape[-1]) + of_mean.unsqueeze(2)
        y = self.judge3(F.gelu(self.judge2(F.gelu(y).flatten(1, 2))))
        judged = F.log_softmax(y.float(), -1).view(self.heads, batch, p, 2)
        means = by_head.mean(-1).view(self.heads, batch, p).permute(1, 2, 0)  # [B, p, H]
        # By the logs of the weights, all of which may be too small to hold; ONNX has no logsigmoid.
        chances = -F.softplus(-self.weigh2(F.gelu(self.weigh1(means))).float())
        return (chances.softmax(-1).permute(2, 0, 1).unsqueeze(-1) * judged).sum(0)

    @staticmethod
    def macs(width: int, heads: int, tokens: int) -> int:
        """Multiply–accumulates for an image's tokens."""
        c = width // heads
        half, quarter, local = max(1, c // 2), max(1, c // 4), (c + 1) // 2
        judging = heads * (c * c + local * half + half * quarter + quarter * 2)
        weighing = 2 * heads * max(1, heads // 2)
        return tokens * (judging + weighing) + heads * (c - local) * half


class HeadLinear(nn.Module):
    """x_h W_h + b_h for each head h: [H, rows, in] to [H, rows, out]."""

    def __init__(self, heads: int, inputs: int, outputs: int) -> None:
        super().__init__()
        bound = inputs**-0.5
        self.weight = nn.Parameter(torch.empty(heads, inputs, outputs).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.zeros(heads, 1, outputs))

    def forward(self, x: Tensor) -> Tensor:
        """[H, rows, out] of x [H, rows, in]."""
        return torch.baddbmm(self.bias, x, self.weight)

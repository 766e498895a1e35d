"""The ops of the fused kernels as PyTorch sees them, and what they refuse."""

import pytest
import torch
from fused_blocks import Case, inputs, make
from kernel_checks import DEVICE, Random, kernels, needs_cuda
from torch import Tensor, nn

from slimvit import backends, ops
from slimvit.backends.fused_weights import BlockWeights
from slimvit.errors import SlimvitError


def arguments(
    case: Case, dtype: torch.dtype = torch.float32, **changes: object
) -> dict[str, object]:
    block, (x, keep, key_bias) = make(case, dtype), inputs(case, dtype)
    named = {
        "x": x,
        "stats": None,
        "weights": [*block.buffers()],
        "n": case.n,
        "heads": case.heads,
        "activation": case.act,
        "eps": [1e-6, 1e-5],
        "zero_rows": case.zero_rows,
        "idle": case.idle,
        "index": keep if case.index else None,
        "key_bias": key_bias,
    }
    return {**named, **changes}


class Embedded(nn.Module):
    """All three ops, one after the other."""

    def __init__(
        self, idle: bool = False, dtype: torch.dtype = torch.float32, backend: str = "triton"
    ) -> None:
        super().__init__()
        self.idle, self.backend, random = idle, backend, Random()
        self.block = make(Case(5, 3, zero_rows=1), dtype, backend=backend)
        order = torch.tensor([0, 3, 1, 2, 4], device=DEVICE)
        for name, tensor in {
            "weight": random(48, 3, 8, 8, dtype=dtype),
            "table": random(5, 48),
            "order": order,
        }.items():
            self.register_buffer(name, tensor)

    def forward(self, images: Tensor) -> Tensor:
        library, own = torch.ops.slimvit, {"backend": self.backend}
        x, stats = library.patch_embedding(images, self.weight, self.table, self.order, 1, **own)
        x, _ = self.block(x, 3, stats, idle=self.idle)
        return library.scatter_tokens(x.sin(), self.order[: x.shape[1]], 5, **own) + 1


class TestOps:
    @pytest.mark.parametrize(
        "case",
        [
            Case(5, 3, width=16, index=True, key_bias="Bm"),
            Case(5, 3, width=112, idle=True, zero_rows=3),
            Case(5, 1, width=16, last=True, key_bias="m"),
        ],
        ids=str,
    )
    @pytest.mark.parametrize("strided", [False, True])
    def test_opcheck_of_a_block(self, case, strided):
        given = arguments(case)
        if case.last:
            given["spread"] = Random()(2, 5).abs()
        if strided:
            given["x"] = given["x"].mT.contiguous().mT
        torch.library.opcheck(torch.ops.slimvit.fused_block, (), given)

    def test_opcheck_of_the_others(self):
        random = Random()
        order = torch.tensor([0, 3, 1, 2, 4], device=DEVICE)
        given = random(2, 3, 16, 16), random(48, 3, 8, 8), random(5, 48), order, 1
        torch.library.opcheck(torch.ops.slimvit.patch_embedding, given)
        torch.library.opcheck(torch.ops.slimvit.patch_embedding, (given[0].double(), *given[1:]))
        for index in (order[:3], random.index(2, 3, 7)):
            given = random(2, 3, 5), index, 7
            torch.library.opcheck(torch.ops.slimvit.scatter_tokens, given)

    @pytest.mark.parametrize("idle", [False, True])
    @pytest.mark.usefixtures("fresh_compiler")
    def test_compile(self, idle):
        module = Embedded(idle)
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        with torch.no_grad():
            for batch in (3, 1, 5):
                images = Random(batch)(batch, 3, 16, 16)
                assert torch.equal(compiled(images), module(images))

    def test_equals_the_reference_scatter(self):
        x, index = Random()(2, 3, 5), Random().index(2, 3, 7)
        got = torch.ops.slimvit.scatter_tokens(x.mT.contiguous().mT, index, 7)
        assert torch.equal(got, ops.scatter_tokens(x, index, 7))


class TestRefused:
    """Whatever a kernel would read beyond its end or take for something else."""

    def refuses(self, message: str, **changes: object) -> None:
        given = arguments(Case(7, 3, 2), **changes)
        with pytest.raises(SlimvitError, match=f"^back end triton: {message}"):
            torch.ops.slimvit.fused_block(**given)

    def test_x(self):
        rule = rf"x must be \[B, m, D\] with D = 48, float32, on {DEVICE}.*, got "
        wrong = {
            r"\[2, 7, 48\], float64": Random()(2, 7, 48, dtype=torch.float64),
            r"\[2, 7, 48\], float16": Random()(2, 7, 48, dtype=torch.half),
            r"\[2, 7, 48\], int32": torch.zeros(2, 7, 48, dtype=torch.int32, device=DEVICE),
            r"\[2, 7, 64\], float32": Random()(2, 7, 64),
            r"\[7, 48\], float32": Random()(7, 48),
        }
        for got, x in wrong.items():
            self.refuses(rule + got, x=x)
        self.refuses(
            r"x must have tokens, got \[2, 0, 48\]", x=torch.empty(2, 0, 48, device=DEVICE)
        )

    @pytest.mark.parametrize("n", [8, 1 << 40, 0, -1])
    def test_n(self, n):
        self.refuses(rf"n must be in \[1, m\] = \[1, 7\], got {n}$", n=n)

    def test_stats(self):
        shape = r"\[B, m, parts, 2\] = \[2, 7, 3, 2\]"
        rule = rf"stats must be {shape}, float32, contiguous, on {DEVICE}.*, got "
        self.refuses(rule + r"\[2, 7, 1, 2\], float32", stats=Random()(2, 7, 1, 2))
        self.refuses(rule + r"\[2, 6, 3, 2\], float32", stats=Random()(2, 6, 3, 2))
        self.refuses(rule + r"\[2, 7, 3, 2\], float32", stats=Random()(2, 9, 3, 2)[:, :7])
        half = Random()(2, 7, 3, 2, dtype=torch.half)
        self.refuses(rule + r"\[2, 7, 3, 2\], float16", stats=half)

    def test_index(self):
        rule = rf"index must be \[B, n\] = \[2, 3\], int64, on {DEVICE}.*, got "
        index = Random().index(2, 3, 7)
        self.refuses(rule + r"\[3\], int64", index=index[0])
        self.refuses(rule + r"\[2, 2\], int64", index=index[:, 1:])
        self.refuses(rule + r"\[2, 3\], int32", index=index.int())
        self.refuses("idle tokens need kept tokens that come first", index=index, idle=True)

    def test_key_bias(self):
        rule = r"key_bias must be \[m\] = \[7\] or \[B, m\] = \[2, 7\], floating point, on .*, got "
        self.refuses(rule + r"\[6\], float32", key_bias=Random()(6))
        self.refuses(rule + r"\[1, 7\], float32", key_bias=Random()(1, 7))
        self.refuses(rule + r"\[\], float32", key_bias=Random()())
        self.refuses(rule + r"\[7\], int64", key_bias=Random()(7).long())

    def test_spread(self):
        rule = rf"spread must be \[B, m\] = \[2, 7\], float32, on {DEVICE}.*, got "
        self.refuses(rule + r"\[2, 3\], float32", spread=Random()(2, 3))
        self.refuses(rule + r"\[7\], float32", spread=Random()(7))
        self.refuses(rule + r"\[2, 7\], float16", spread=Random()(2, 7, dtype=torch.half))
        spread = torch.zeros(2, 7, device=DEVICE)
        message = "idle tokens stand for themselves, without spread"
        self.refuses(message, spread=spread, idle=True)

    @pytest.mark.parametrize("name", [name for name in BlockWeights._fields if name != "keys"])
    def test_each_of_the_weights(self, name):
        place = BlockWeights._fields.index(name)
        weights = arguments(Case(7, 3, 2))["weights"]

        def put(tensor: Tensor) -> list[Tensor]:
            return [*weights[:place], tensor, *weights[place + 1 :]]

        own, rule = weights[place], f"{name} of the weights must "
        self.refuses(rule, weights=put(own[..., None]))
        if place:  # of whose dtype the other matrices must be
            got = "be .*, float32, contiguous, on .*, got .*float64"
            self.refuses(rule + got, weights=put(own.double()))
        strided = own.repeat_interleave(2, 0)[::2]
        self.refuses(rule + r"be \[.*\], float32, contiguous, on ", weights=put(strided))
        self.refuses(".* of the weights must be ", weights=put(own[:-1]))

    def test_keys(self):
        weights = arguments(Case(7, 3, 2))["weights"]
        weights[BlockWeights._fields.index("keys")] = torch.ones(48, 16, device=DEVICE)
        rule = r"keys of the weights must be \[144, 16\], .*, got \[48, 16\]"
        self.refuses(rule, weights=weights)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"weights": []}, "weights must be 12 tensors, qkv, .*, got 0"),
            ({"heads": 0}, "heads must divide the 48 channels of all heads, got 0"),
            ({"heads": -1}, "heads must divide the 48 channels of all heads, got -1"),
            ({"heads": 7}, "heads must divide the 48 channels of all heads, got 7"),
            ({"eps": [1e-6]}, "eps must be those of two norms, got 1"),
            ({"zero_rows": -1}, "zero_rows must be at least 0, got -1"),
        ],
    )
    def test_numbers(self, changes, message):
        self.refuses(message, **changes)

    def test_activation(self):
        known = "activation must be one of none, gelu, gelu_tanh, quick_gelu, got relu$"
        self.refuses(known, activation="relu")

    def test_precision(self):
        message = "back end triton: float64 is not computed: use float16, bfloat16 or float32"
        case = Case(7, 3, 2)
        with pytest.raises(SlimvitError, match=message):
            make(case, torch.float64)(*inputs(case, torch.float64)[:2])

    @pytest.mark.skipif(DEVICE.type != "cpu", reason="kernels are compiled here")
    def test_bfloat16_in_the_interpreter(self):
        case = Case(7, 3, 2)
        with pytest.raises(SlimvitError, match="interpreter computes bfloat16 wrongly: use float"):
            make(case, torch.bfloat16)(*inputs(case, torch.bfloat16)[:2])

    def test_the_cpu_where_kernels_are_compiled(self, monkeypatch):
        monkeypatch.setattr(kernels, "INTERPRETED", False)
        reason = backends.why_not("triton", "cpu", torch.float32)
        assert reason == "it computes on CUDA GPUs, not on cpu"

    @needs_cuda
    def test_devices(self):
        self.refuses(r"x must be .* on cuda:0, got .*, on cpu", x=torch.zeros(2, 7, 48))
        self.refuses(r"stats must be .* on cuda:0, got .*, on cpu", stats=torch.zeros(2, 7, 3, 2))
        self.refuses(r"index .* on cuda:0, got .*, on cpu", index=torch.zeros(2, 3).long())
        self.refuses(r"key_bias .* on cuda:0, got .*, on cpu", key_bias=torch.zeros(7))
        self.refuses(r"spread .* on cuda:0, got .*, on cpu", spread=torch.zeros(2, 7))

    def test_images(self):
        random = Random()
        order = torch.arange(5, device=DEVICE)
        given = random(48, 3, 8, 8), random(5, 48), order, 1
        shape = rf"images must be \[B, 3, H, W\], floating point, on {DEVICE}.*, got "
        count = r"images must have as many patches as the table has rows for them, 4, got "
        wrong = {
            shape + r"\[3, 16, 16\], float32": random(3, 16, 16),
            shape + r"\[2, 1, 16, 16\], float32": random(2, 1, 16, 16),
            shape + r"\[2, 3, 16, 16\], uint8": random(2, 3, 16, 16).byte(),
            count + r"\[2, 3, 8, 16\], float32": random(2, 3, 8, 16),
            count + r"\[2, 3, 32, 16\], float32": random(2, 3, 32, 16),
        }
        for message, images in wrong.items():
            with pytest.raises(SlimvitError, match=f"^back end triton: {message}"):
                torch.ops.slimvit.patch_embedding(images, *given)

    def test_embedding(self):
        random = Random()
        order = torch.arange(5, device=DEVICE)
        given = {
            "images": random(2, 3, 16, 16),
            "weight": random(48, 3, 8, 8),
            "table": random(5, 48),
            "order": order,
            "prefix": 1,
        }
        wrong = [
            ({"weight": random(48, 192)}, r"weight must be \[D, C, ph, pw\], got"),
            ({"table": random(240)}, r"table must be \[N, D\], got \[240\]"),
            ({"table": random(5, 47)}, r"table must be \[5, 48\], float32, .*, got \[5, 47\]"),
            ({"table": random(5, 48).half()}, r"table must be \[5, 48\], float32, .* float16"),
            ({"order": order[:2]}, r"order must be \[5\], int64, .*, got \[2\]"),
            ({"order": order.int()}, r"order must be \[5\], int64, .*, got \[5\], int32"),
            ({"prefix": -1}, r"prefix must be in \[0, N\] = \[0, 5\], got -1"),
            ({"prefix": 6}, r"prefix must be in \[0, N\] = \[0, 5\], got 6"),
        ]
        for changes, message in wrong:
            with pytest.raises(SlimvitError, match=f"^back end triton: {message}"):
                torch.ops.slimvit.patch_embedding(**given | changes)

    @pytest.mark.parametrize("length", [-1, 2])
    def test_scatter_to_too_few(self, length):
        x, index = Random()(2, 3, 5), torch.arange(3, device=DEVICE)
        rule = f"^back end triton: length must be at least the 3 tokens of x, got {length}$"
        with pytest.raises(SlimvitError, match=rule):
            torch.ops.slimvit.scatter_tokens(x, index, length)

    def test_scatter(self):
        x, index = Random()(2, 3, 5), Random().index(2, 3, 7)
        rule = rf"index must be \[K\] = \[3\] or \[B, K\], int64, on {DEVICE}.*, got "
        wrong = {
            r"x must be \[B, K, D\], got \[3, 5\], float32": (x[0], index),
            rule + r"\[2, 2\], int64": (x, index[:, :2]),
            rule + r"\[2, 3\], int32": (x, index.int()),
            rule + r"\[1, 3\], int64": (x, index[:1]),
        }
        for message, given in wrong.items():
            with pytest.raises(SlimvitError, match=f"^back end triton: {message}"):
                torch.ops.slimvit.scatter_tokens(*given, 7)

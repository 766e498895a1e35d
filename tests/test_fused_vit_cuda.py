"""Whole networks of fused blocks where there is a GPU: CUDA graphs, devices and what auto takes."""

import copy
import pickle
import threading

import pytest
import torch
from kernel_checks import DTYPES, FLOOR, distance, needs_cuda
from references import build, random_images, random_masks
from torch import Tensor, nn

from slimvit.errors import SlimvitError
from slimvit.masks import SEMANTICS
from slimvit.runtime import AcceleratedViT, accelerate

pytestmark = needs_cuda


def make(
    semantics: str = "zero", *, name: str = "deit3", sizes: tuple[int, ...] = (), **options: object
) -> AcceleratedViT:
    """With CUDA graphs, if sizes are given."""
    model = build(name)
    masks = random_masks(model, semantics)
    options = {"backend": "triton", "batch_sizes": sizes, "cuda_graphs": bool(sizes), **options}
    return accelerate(model.cuda(), masks, **options)


def images_of(batch: int, seed: int = 0) -> Tensor:
    return random_images(build("deit3"), batch, seed).cuda()


class TestGraphs:
    @pytest.mark.parametrize(
        ("backend", "dtype"),
        [*(("triton", dtype) for dtype in DTYPES), ("cuda", torch.float16)],
        ids=str,
    )
    @pytest.mark.parametrize("semantics", SEMANTICS)
    def test_equal_the_eager_answer(self, semantics, backend, dtype):
        options = {"backend": backend, "precision": str(dtype).removeprefix("torch.")}
        fast = make(semantics, sizes=(1, 3), **options)
        assert {shape[0] for shape in fast._graphs} == {1, 3}
        eager = make(semantics, **options)
        assert not eager._graphs
        for batch in (1, 3, 1):
            for seed in (0, 1):
                images = images_of(batch, seed)
                assert torch.equal(fast(images), eager(images))

    def test_are_what_runs(self, monkeypatch):
        """A call of their size launches a graph, any other goes without."""
        fast, images = make(sizes=(2,)), images_of(2)
        wanted, one = fast(images), fast(images[:1])

        def refuse(images: Tensor) -> Tensor:
            raise AssertionError(f"an eager call for {len(images)} images")

        monkeypatch.setattr(fast, "_logits", refuse)
        assert torch.equal(fast(images), wanted)
        with pytest.raises(AssertionError, match="an eager call for 1 images"):
            fast(images[:1])
        monkeypatch.undo()
        assert torch.equal(fast(images[:1]), one)

    def test_other_sizes_go_without(self):
        fast, eager = make(sizes=(2,)), make()
        for batch in (1, 3, 5):
            assert torch.equal(fast(images_of(batch)), eager(images_of(batch)))
        assert len(fast._graphs) == 1

    def test_an_answer_outlives_the_next_call(self):
        fast = make(sizes=(2,))
        first = fast(images_of(2))
        copied = first.clone()
        assert not torch.equal(fast(images_of(2, 1)), copied)
        assert torch.equal(first, copied)

    @pytest.mark.parametrize("kind", [torch.float64, torch.float16, torch.bfloat16], ids=str)
    def test_images_of_any_dtype(self, kind):
        fast, images = make(sizes=(2,)), images_of(2).bfloat16().float()
        got = fast(images.to(kind))
        assert got.dtype == kind
        assert (
            distance(got, fast(images).double())
            < 8 * FLOOR[kind if kind in FLOOR else torch.float32]
        )
        with pytest.raises(SlimvitError, match="images must be floating point, got uint8"):
            fast(images.byte())

    @pytest.mark.skipif(torch.cuda.device_count() < 2, reason="no second CUDA device here")
    def test_one_on_each_device(self):
        images = images_of(2)
        wanted = make(sizes=(2,))(images)
        other = make().to("cuda:1")
        other.warm_up(2, cuda_graph=True)
        assert torch.equal(other(images.to("cuda:1")).cpu(), wanted.cpu())

    def test_made_in_inference_mode(self):
        images = images_of(2)
        with torch.inference_mode():
            fast = make(sizes=(2,))
            wanted = fast(images)
        assert torch.equal(fast(images), wanted)

    def test_images_that_require_a_gradient(self):
        fast, images = make(sizes=(2,)), images_of(2)
        wanted = fast(images)
        with pytest.raises(SlimvitError, match="back end triton computes no gradients"):
            fast(images.clone().requires_grad_())
        with torch.no_grad():
            assert torch.equal(fast(images.clone().requires_grad_()), wanted)

    def test_threads_take_turns(self):
        """On streams of their own, through one graph."""
        fast, eager = make(sizes=(2,)), make()
        work = [(images_of(2, seed), eager(images_of(2, seed))) for seed in range(4)]
        torch.cuda.synchronize()
        wrong: list[int] = []
        started = threading.Barrier(len(work))

        def call(number: int) -> None:
            images, wanted = work[number]
            started.wait()
            with torch.cuda.stream(torch.cuda.Stream()):
                for _ in range(50):
                    if not torch.equal(fast(images), wanted):
                        wrong.append(number)

        callers = [threading.Thread(target=call, args=(number,)) for number in range(len(work))]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join(60)
            assert not caller.is_alive()
        assert not wrong

    @pytest.mark.parametrize(
        "twin_of", [copy.deepcopy, lambda fast: pickle.loads(pickle.dumps(fast))]
    )
    def test_copies_have_none(self, twin_of):
        fast, images = make(sizes=(2,)), images_of(2)
        twin = twin_of(fast)
        assert fast._graphs
        assert not twin._graphs
        assert torch.equal(twin(images), fast(images))

    def test_moving_drops_them(self):
        fast, images = make(sizes=(2,)), images_of(2)
        wanted = fast(images)
        fast.cuda()
        assert not fast._graphs
        assert torch.equal(fast(images), wanted)

    def test_compiled_calls_go_without(self):
        fast, images = make(sizes=(2,)), images_of(2)
        compiled = torch.compile(nn.Sequential(fast), fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(images), fast(images))

    def test_a_graph_of_calls_goes_without(self):
        fast, images = make(sizes=(2,)), images_of(2)
        wanted, graph = fast(images), torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = fast(images)
        graph.replay()
        assert torch.equal(got, wanted)


class TestAutocast:
    @pytest.mark.parametrize("backend", ["triton", "cuda"])
    def test_changes_nothing(self, backend):
        model, images = build("clip"), random_images(build("clip"), 2).cuda()
        fast = accelerate(
            model.cuda(), random_masks(build("clip")), backend=backend, precision="float16"
        )
        wanted = fast(images), fast.forward_features(images)
        with torch.autocast("cuda"):
            got = fast(images), fast.forward_features(images)
        assert torch.equal(got[0], wanted[0])
        assert torch.equal(got[1], wanted[1])


class TestDevices:
    @pytest.mark.parametrize("sizes", [(), (1,)])
    @pytest.mark.parametrize("call", ["forward", "forward_features"])
    def test_images_elsewhere(self, call, sizes):
        message = "back end triton: images must be .* on cuda:0, got .*, on cpu"
        with pytest.raises(SlimvitError, match=message):
            getattr(make(sizes=sizes), call)(images_of(1).cpu())

    @pytest.mark.skipif(torch.cuda.device_count() < 2, reason="no second CUDA device here")
    def test_another_device_than_the_current_one(self):
        fast, images = make(), images_of(2)
        wanted = fast(images)
        assert torch.cuda.current_device() == 0
        assert torch.equal(fast.to("cuda:1")(images.to("cuda:1")).cpu(), wanted.cpu())

    def test_a_stream_of_its_own(self):
        fast, images = make(), images_of(2)
        wanted = fast(images)
        torch.cuda.synchronize()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            got = fast(images)
        stream.synchronize()
        assert torch.equal(got, wanted)


class TestChoice:
    @pytest.mark.parametrize(
        "precision, taken", [("float32", "torch"), ("float16", "triton"), ("bfloat16", "triton")]
    )
    def test_auto_takes_triton_in_half_precision(self, precision, taken):
        assert make(backend="auto", precision=precision).backend == taken

    def test_auto_takes_torch_where_triton_does_not_compute_the_model(self, caplog):
        assert make(backend="auto", name="qk_norm", precision="float16").backend == "torch"
        reason = "block 1: it has q_norm, a LayerNorm"
        assert f"back end triton passed over for this model: {reason}" in caplog.text

    def test_one_image_is_compiled_ahead(self, monkeypatch):
        sizes: list[int] = []
        warm_up = AcceleratedViT.warm_up
        monkeypatch.setattr(
            AcceleratedViT,
            "warm_up",
            lambda self, size, **options: (sizes.append(size), warm_up(self, size, **options)),
        )
        make()
        make(sizes=(3, 2))
        assert sizes == [1, 3, 2]

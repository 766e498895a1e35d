"""The ops of the C++ kernels as PyTorch sees them, and the packs that they are given."""

import copy
import io
import pickle
import threading

import pytest
import torch
from references import build, off, random_images, random_masks
from torch import Tensor, nn

from slimvit import _extensions
from slimvit.backends import cpu_module
from slimvit.errors import SlimvitError
from slimvit.masks import SEMANTICS
from slimvit.runtime import AcceleratedViT, accelerate

if (reason := _extensions.why_not("_cpu")) is not None:
    pytest.skip(reason, allow_module_level=True)

ISA_AT = 8  # of a pack's header: magic, kind, instruction set, dtype


def make(name: str = "deit3", semantics: str = "zero", **options: object) -> AcceleratedViT:
    model = build(name)
    return accelerate(model, random_masks(model, semantics), backend="cpu", **options)


def images_of(name: str = "deit3", batch: int = 3) -> Tensor:
    return random_images(build(name), batch)


HEAD = 4  # where it stands among the packs of three blocks
PLACES = [(0, "embedding"), (2, "block"), (HEAD, "head")]


def arguments(fast: AcceleratedViT, images: Tensor, features: bool = False) -> list[object]:
    packed = fast.packed
    rows = packed.tokens if packed.idle else packed.counts[-1]
    answer = [rows, packed.width] if features else [0, packed.classes]
    return [images, packed.packs, packed.sizes, packed.counts, packed.idle, *answer]


class TestOps:
    @pytest.mark.parametrize("features", [False, True])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("semantics", ["drop", "idle"])
    def test_opcheck_of_a_network(self, semantics, dtype, features):
        given = arguments(make(semantics=semantics), images_of().to(dtype), features)
        torch.library.opcheck(torch.ops.slimvit.slim_vit, given)

    @pytest.mark.parametrize("options", [{}, {"index": True}, {"key_bias": True}])
    def test_opcheck_of_a_block(self, options):
        x = torch.randn(17, 3, 48)
        given = {
            "index": torch.randint(17, (3, 5)) if "index" in options else None,
            "key_bias": torch.randn(3, 17) if "key_bias" in options else None,
        }
        pack = make().packed.parts()[2]
        torch.library.opcheck(torch.ops.slimvit.slim_block, (x, pack, 5), given)
        strided = x.transpose(0, 1).contiguous().transpose(0, 1)
        torch.library.opcheck(torch.ops.slimvit.slim_block, (strided, pack, 5), given)

    @pytest.mark.parametrize("semantics", SEMANTICS)
    @pytest.mark.usefixtures("fresh_compiler")
    def test_compile(self, semantics):
        fast = make(semantics=semantics)
        module = nn.Sequential(fast, nn.Linear(7, 2))
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        with torch.no_grad():
            for batch in (3, 1, 5):
                images = images_of(batch=batch)
                assert torch.equal(compiled(images), module(images))

    @pytest.mark.parametrize("name", ["deit3", "fc_norm"])
    def test_export(self, name):
        fast = make(name)
        shapes = ({0: torch.export.Dim("batch")},)
        program = torch.export.export(fast, (images_of(name),), dynamic_shapes=shapes)
        file = io.BytesIO()
        torch.export.save(program, file)
        file.seek(0)
        loaded = torch.export.load(file)
        for batch in (1, 5):
            images = images_of(name, batch)
            assert off(program.module()(images), fast(images)) < 1e-6
            assert off(loaded.module()(images), fast(images)) < 1e-6

    def test_bytes_that_lie_anywhere(self):
        """As what is loaded from a file may: they are copied once, and again if they change."""
        images, packs, *rest = arguments(make(), images_of())
        moved = torch.cat([packs[:4], packs])[4:]
        assert moved.data_ptr() % 64
        wanted = torch.ops.slimvit.slim_vit(images, packs, *rest)
        for _ in range(2):
            assert torch.equal(torch.ops.slimvit.slim_vit(images, moved, *rest), wanted)
        (copy,) = (kept for kept in cpu_module._copies.values() if kept[0][0] == moved.data_ptr())
        moved[-(rest[0][HEAD] // 2) :] = 0  # weights of the head
        assert not torch.equal(torch.ops.slimvit.slim_vit(images, moved, *rest), wanted)
        del moved
        assert copy[0] not in [kept[0] for kept in cpu_module._copies.values()]

    def test_bytes_that_lie_anywhere_are_copied_once_by_all_threads(self):
        """A second copy would free the one that the first thread computes from."""
        images, packs, *rest = arguments(make(), images_of())
        pointers, start = set(), threading.Barrier(8)

        def meet(moved):
            start.wait()
            pointers.add(cpu_module.pack_bytes("packs", moved)[0])

        for _ in range(20):
            moved = torch.cat([packs[:4], packs])[4:]
            pointers.clear()
            threads = [threading.Thread(target=meet, args=(moved,)) for _ in range(8)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert len(pointers) == 1


class TestModule:
    @pytest.mark.parametrize("precision", ["float32", "bfloat16"])
    def test_copies(self, precision):
        fast, images = make(precision=precision), images_of()
        wanted = fast(images)
        file = io.BytesIO()
        torch.save(fast, file)
        file.seek(0)
        copies = [
            copy.deepcopy(fast),
            pickle.loads(pickle.dumps(fast)),
            copy.deepcopy(copy.deepcopy(fast)),
            torch.load(file, weights_only=False),
        ]
        del fast
        for twin in copies:
            assert (twin.backend, twin.precision) == ("cpu", precision)
            assert torch.equal(twin(images), wanted)

    @pytest.mark.parametrize(
        ("move", "there"),
        [
            (lambda m: m.to(torch.bfloat16), "bfloat16 on cpu"),
            (lambda m: m.half(), "float16 on cpu"),
            (lambda m: m.double(), "float64 on cpu"),
            (lambda m: m.to("meta"), "float32 on meta"),
            (lambda m: nn.Sequential(m).to("meta"), "float32 on meta"),
        ],
    )
    def test_moving_is_refused(self, move, there):
        fast, images = make(), images_of()
        wanted = fast(images)
        message = f"weights are packed for float32 on the CPU, got {there}: accelerate the model"
        with pytest.raises(SlimvitError, match=message):
            move(fast)
        assert torch.equal(fast(images), wanted)
        assert fast.float().cpu().to(torch.float32) is fast
        assert torch.equal(fast(images), wanted)


class TestRefused:
    """Packs and images that C++ would read wrongly."""

    def refuses(self, message: str, given: list[object]) -> None:
        with pytest.raises(SlimvitError, match=f"back end cpu: {message}"):
            torch.ops.slimvit.slim_vit(*given)

    def test_images(self):
        given = arguments(make(), images_of())
        dtypes = r"images must be \[B, C, H, W\], float32 or bfloat16, on the CPU, got "
        wrong = {
            dtypes + r"\[3, 3, 64, 64\], float64": images_of().double(),
            dtypes + r"\[3, 3, 64, 64\], uint8": images_of().byte(),
            dtypes + r"\[3, 64, 64\], float32": images_of()[0],
            r"images must be \[B, 3, 64, 64\], got \[3, 3, 64, 48\]": images_of()[..., :48],
            r"images must be \[B, 3, 64, 64\], got \[3, 1, 64, 64\]": images_of()[:, :1],
        }
        for message, images in wrong.items():
            self.refuses(message, [images, *given[1:]])

    @pytest.mark.parametrize(("place", "kind"), PLACES)
    def test_packs(self, place, kind):
        given = arguments(make(), images_of())
        good, other = parts_of(given)[place], parts_of(given)[0 if place else HEAD]
        size = good.numel()
        wrong = {
            f"the pack of the {kind} is cut off: it has {size - 64} bytes": good[:-64],
            f"the pack of the {kind} is too short": good[:64],
            f"the pack of the {kind} is something else": other,
        }
        for message, pack in wrong.items():
            self.refuses(message, replaced(given, place, pack))

    def test_bytes_of_packs(self):
        images, packs, sizes, *rest = arguments(make(), images_of())
        plain = "packs must be one-dimensional, uint8, contiguous, on the CPU"
        self.refuses(plain, [images, packs.view(torch.int32), sizes, *rest])
        told = f"packs must have the bytes that sizes tell, got {packs.numel()}"
        for first in (sizes[0] + 64, -64, 2**62):
            self.refuses(told, [images, packs, [first, *sizes[1:]], *rest])
        many = "packs must be an embedding, 3 blocks, a head, and a chooser .*, got "
        for wrong in (sizes[:-1], [*sizes, 0], []):
            self.refuses(f"{many}{len(wrong)}", [images, packs, wrong, *rest])

    @pytest.mark.parametrize(("place", "kind"), PLACES)
    def test_a_pack_for_another_processor(self, place, kind):
        given = arguments(make(), images_of())
        pack = parts_of(given)[place].clone()
        for code in (99, -1):
            pack[ISA_AT : ISA_AT + 4].view(torch.int32).fill_(code)
            self.refuses(
                f"the pack of the {kind} is for unknown, which this processor does not offer: "
                "accelerate the model anew",
                replaced(given, place, pack),
            )

    def test_packs_of_different_networks(self, monkeypatch):
        given = arguments(make(), images_of())
        message = "all packs must be of one model, instruction set and dtype"
        half = arguments(make(precision="bfloat16"), images_of())
        for place, _ in PLACES:
            self.refuses(message, replaced(given, place, parts_of(half)[place]))
        if len(_extensions.load("_cpu").instruction_sets()) > 1:
            monkeypatch.setenv("SLIMVIT_ISA", "portable")
            portable = parts_of(arguments(make(), images_of()))
            self.refuses(message, replaced(given, HEAD, portable[HEAD]))

    def test_counts(self):
        given = arguments(make(), images_of())
        for counts in ([16, 12], [17, 12, 13], [18, 12, 7], [0, 0, 0], [16, -1, -1]):
            message = "packs must be .*2 blocks" if len(counts) < 3 else "kept sets must be nested"
            self.refuses(message, [*given[:3], counts, *given[4:]])

    def test_answers(self):
        given = arguments(make(), images_of())
        self.refuses("logits must be 7 columns", [*given[:5], 0, 8])
        for rows, columns in ((7, 48), (6, 47)):
            self.refuses(r"tokens must be \[6, 48\]", [*given[:5], rows, columns])
        given = arguments(make("no_classes"), images_of())
        self.refuses("logits must be 0 columns", [*given[:5], 0, 7])


def parts_of(given: list[object]) -> list[Tensor]:
    """The packs of an op's arguments."""
    return list(given[1].split(given[2]))


def replaced(given: list[object], place: int, pack: Tensor) -> list[object]:
    """The arguments with another pack in that place."""
    packs = parts_of(given)
    packs[place] = pack
    return [given[0], torch.cat(packs), [pack.numel() for pack in packs], *given[3:]]

"""The emulation that the CUDA kernels are tested in: it notices faults, and rounds as GPUs do."""

import math

import emulated
import pytest
import torch

from slimvit import _extensions


class TestRaces:
    """Kernels with a fault, or the barrier that cures it."""

    @pytest.fixture
    def out(self) -> torch.Tensor:
        return torch.arange(128.0)

    def test_without_a_barrier(self, emulation, out):
        with pytest.raises(RuntimeError, match=r"^planted: (race: thread \d+ reads byte|.* wrote)"):
            emulation.planted(out.data_ptr(), 0)

    def test_a_barrier_of_the_warp_is_not_enough_for_two(self, emulation, out):
        with pytest.raises(RuntimeError, match=r"^planted: race: thread \d+ reads byte \d+ of sha"):
            emulation.planted(out.data_ptr(), 1)

    def test_a_barrier_of_the_block(self, emulation, out):
        emulation.planted(out.data_ptr(), 2)
        assert torch.equal(out[:64], (torch.arange(64.0) + 1) % 64)

    def test_a_copy_that_is_not_waited_for(self, emulation, out):
        with pytest.raises(RuntimeError, match="^planted_copy: shared memory is read that a copy"):
            emulation.planted_copy(out.data_ptr(), 0)

    def test_a_copy_that_is_waited_for(self, emulation, out):
        emulation.planted_copy(out.data_ptr(), 1)
        assert torch.equal(out[:32], torch.arange(127.0, 95.0, -1))

    @pytest.mark.parametrize(
        ("fault", "message"),
        enumerate(
            [
                r"race: thread \d+ (writes|reads) byte \d+ of shared memory, which .* with no bar",
                "shared memory is read beyond its end",
                "shared memory is read that nothing wrote",
                "threads wait for each other for ever",
                "lanes of a warp part: ",
            ]
        ),
    )
    def test_other_faults(self, emulation, out, fault, message):
        with pytest.raises(RuntimeError, match=f"^planted_fault: {message}"):
            emulation.planted_fault(out.data_ptr(), fault)

    def test_a_fault_leaves_nothing_behind(self, emulation, out):
        for _ in range(3):
            with pytest.raises(RuntimeError):
                emulation.planted(out.data_ptr(), 0)
            emulation.planted(out.data_ptr(), 2)

    def test_shared_memory_has_an_end(self, emulation, out):
        with emulated.in_place(emulation):
            emulation.emulate(architecture=80, shared_memory=200)
            with pytest.raises(RuntimeError, match="^planted: 256 bytes of shared memory, more"):
                emulation.planted(out.data_ptr(), 2)


def values(dtype: torch.dtype) -> torch.Tensor:
    """Random ones of every size, all ties of some, and the ends of the range."""
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31 - 1, (20000,), generator=generator, dtype=torch.int32)
    size = 2.0 ** torch.randint(-28, 18, (20000,), generator=generator)
    normal = torch.randn(20000, generator=generator) * size
    exact = torch.cat([normal, torch.randn(999, generator=generator) * 2e-41]).to(dtype)
    up = torch.nextafter(exact, torch.full_like(exact, math.inf))
    ties = exact.double() + (up.double() - exact.double()) / 2
    limits = torch.finfo(dtype)
    ends = [0.0, -0.0, math.inf, -math.inf, limits.max, limits.tiny, limits.smallest_normal]
    ends += [65519.996, 65520.0, -65520.0, 3.4e38, 2.0**-24, 2.0**-25, 2.0**-25 * 1.0001, 1e-45]
    return torch.cat(
        [bits.view(torch.float32), normal, exact.float(), ties.float(), torch.tensor(ends)]
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_rounding_is_torchs(emulation, dtype):
    given = values(dtype)
    function = emulation.half if dtype == torch.float16 else emulation.bfloat16
    got = torch.tensor([function(x) for x in given.tolist()])
    wanted = given.to(dtype).float()
    assert torch.equal(got.isnan(), wanted.isnan())
    known = ~wanted.isnan()
    assert torch.equal(got[known], wanted[known])
    assert torch.equal(got[known].signbit(), wanted[known].signbit())


def test_the_emulation_is_not_the_default():
    module = _extensions.load("_cuda")
    if module is None:
        pytest.skip(_extensions.why_not("_cuda"))
    assert not getattr(module, "emulated", False)

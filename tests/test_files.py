"""Files that appear whole or not at all."""

import errno
import os
import signal
import stat
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open

from slimvit.errors import UsageError
from slimvit.files import (
    atomic_write,
    is_device,
    is_writable,
    put_in_place,
    refuse_unwritable,
    remove_leftovers,
    tensor_bytes,
    written_together,
)


def full_disk(*args):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_writes(tmp_path):
    path = tmp_path / "a.bin"
    atomic_write(path, b"one")
    atomic_write(str(path), b"two")
    assert path.read_bytes() == b"two"
    assert os.listdir(tmp_path) == ["a.bin"]


def test_mode_follows_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        atomic_write(tmp_path / "a.bin", b"")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.bin").stat().st_mode) == 0o640


def test_a_file_leaves_its_mode_to_its_successor(tmp_path):
    path = tmp_path / "a.bin"
    for mode in (0o600, 0o664):
        path.touch()
        path.chmod(mode)
        atomic_write(path, b"new")
        assert stat.S_IMODE(path.stat().st_mode) == mode


@pytest.mark.parametrize("existing", [None, b"old"])
@pytest.mark.parametrize("call", ["fsync", "replace", "chmod"])
def test_full_disk(tmp_path, monkeypatch, existing, call):
    path = tmp_path / "a.bin"
    if existing is not None:
        path.write_bytes(existing)
    monkeypatch.setattr(os, call, full_disk)
    with pytest.raises(
        OSError, match=r"\[Errno 28\] No space left on device: .*a\.bin'$"
    ) as caught:
        atomic_write(path, b"new")
    monkeypatch.undo()
    assert caught.value.filename == str(path)
    assert (path.read_bytes() if path.exists() else None) == existing
    assert os.listdir(tmp_path) == ([] if existing is None else ["a.bin"])


def test_full_disk_while_writing(tmp_path, monkeypatch):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    really_open = os.fdopen

    def half_written(handle, mode):
        file = really_open(handle, mode, buffering=0)
        os.write(handle, b"n")
        file.close()
        full_disk()

    monkeypatch.setattr(os, "fdopen", half_written)
    with pytest.raises(OSError, match="No space left"):
        atomic_write(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.bin"]


def test_interrupted(tmp_path, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        atomic_write(tmp_path / "a.bin", b"new")
    assert os.listdir(tmp_path) == []


def test_no_folder(tmp_path):
    path = tmp_path / "none" / "a.bin"
    with pytest.raises(FileNotFoundError) as caught:
        atomic_write(path, b"new")
    assert caught.value.filename == str(path)


def test_a_folder_in_its_place(tmp_path):
    (tmp_path / "a.bin").mkdir()
    with pytest.raises(OSError, match=r"a\.bin"):
        atomic_write(tmp_path / "a.bin", b"new")
    assert os.listdir(tmp_path) == ["a.bin"]


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.bin").write_bytes(b"old")
    (tmp_path / "link").symlink_to(tmp_path / "folder" / "a.bin")
    atomic_write(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "folder" / "a.bin").read_bytes() == b"new"


def test_a_device_is_written_to(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    atomic_write(tmp_path / "pipe", b"new")
    assert os.read(reader, 9) == b"new"
    (tmp_path / "finished").write_bytes(b"newer")
    put_in_place(tmp_path / "finished", tmp_path / "pipe")
    assert os.read(reader, 9) == b"newer"
    # As a shell's >(…) has it: a link whose target is no name.
    atomic_write(f"/proc/self/fd/{os.open(tmp_path / 'pipe', os.O_WRONLY)}", b"again")
    assert os.read(reader, 9) == b"again"
    os.close(reader)
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


@pytest.mark.parametrize("folder", ["/dev/fd", "/proc/self/fd", "a link"])
def test_a_descriptor_is_written_to_where_it_stands(tmp_path, folder):
    path, finished = tmp_path / "file", tmp_path / "finished"
    finished.write_bytes(b"3")
    with path.open("wb", buffering=0) as file:
        name = f"{folder}/{file.fileno()}"
        if folder == "a link":
            name = tmp_path / "link"
            name.symlink_to(f"/dev/fd/{file.fileno()}")
        file.write(b"1")
        atomic_write(name, b"2")
        put_in_place(finished, name)
        file.write(b"4")
        assert is_device(name) and is_writable(name)
    assert path.read_bytes() == b"1234"
    with path.open("rb") as file:
        assert not is_writable(f"/dev/fd/{file.fileno()}")
    assert is_device("/dev/fd/1000000") and not is_writable("/dev/fd/1000000")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
def test_a_full_device_is_named():
    with pytest.raises(OSError, match="No space left on device: '/dev/full'"):
        atomic_write("/dev/full", b"x" * 100_000)


def test_what_cannot_be_written_is_refused(tmp_path, monkeypatch):
    refuse_unwritable("output", tmp_path / "a.bin")
    with pytest.raises(UsageError, match=f"output must be a file, got the folder {tmp_path}"):
        refuse_unwritable("output", tmp_path)
    with pytest.raises(UsageError, match="output .*a.bin: the folder .*missing does not exist"):
        refuse_unwritable("output", tmp_path / "missing" / "a.bin")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(UsageError, match="output .*a.bin: the folder .* is not writable"):
        refuse_unwritable("output", tmp_path / "a.bin")


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_files_that_belong_together(number):
    """The first signal waits for all of them, the second does not."""
    done = []
    for times in (1, 2):
        with pytest.raises(KeyboardInterrupt), written_together():
            for _ in range(times):
                signal.raise_signal(number)
            done.append(times)
    assert done == [1]
    assert signal.getsignal(number) is signal.default_int_handler


STRINGS = {f"näme {i}": '"{}" \n ü' * i for i in range(9)}
TENSORS = {
    "b": torch.arange(3, dtype=torch.uint8),
    "a": torch.linspace(0, 1, 6, dtype=torch.float64).view(2, 3),
    "none": torch.empty(0, 4),
    "ü": torch.tensor(True),
}
FILES = f"""
import sys, torch
from slimvit import Absorb, Masks
from slimvit.files import tensor_bytes
from slimvit.finetune import save_weights

torch.manual_seed(0)
folder, strings = sys.argv[1], {STRINGS!r}
open(f"{{folder}}/own", "wb").write(tensor_bytes({{"a": torch.ones(3)}}, strings))
Masks.uniform(6, 0.5, (4, 4), model="x").save(f"{{folder}}/masks")
Absorb(cut=0.3).save(f"{{folder}}/plan")
save_weights(f"{{folder}}/weights", torch.nn.Linear(3, 2), {{"model": "x"}})
"""


def test_tensors_are_written_as_safetensors_reads_them(tmp_path):
    for strings in (STRINGS, {"format": "pt"}):
        content = tensor_bytes(TENSORS, strings)
        (tmp_path / "t.safetensors").write_bytes(content)
        with safe_open(tmp_path / "t.safetensors", framework="pt") as file:
            assert file.metadata() == strings
            assert set(file.keys()) == set(TENSORS)
            for name, tensor in TENSORS.items():
                got = file.get_tensor(name)
                assert got.dtype == tensor.dtype and torch.equal(got, tensor), name
        assert int.from_bytes(content[:8], "little") % 8 == 0
        assert content == tensor_bytes(dict(reversed(TENSORS.items())), strings)


def test_tensors_are_written_alike_in_every_process(tmp_path):
    written = []
    for seed in "1", "1", "2":
        folder = tmp_path / str(len(written))
        folder.mkdir()
        environment = os.environ | {"PYTHONHASHSEED": seed}
        subprocess.run([sys.executable, "-c", FILES, folder], check=True, env=environment)
        written.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert sorted(written[0]) == ["masks", "own", "plan", "weights"]
    assert written[0] == written[1] == written[2]


def test_leftovers_of_killed_processes(tmp_path):
    code = """if True:
        import os, sys
        from slimvit.files import atomic_write
        os.fsync = lambda handle: os.kill(os.getpid(), 9)
        atomic_write(sys.argv[1], b"new")
    """
    path = tmp_path / "a.bin"
    subprocess.run([sys.executable, "-c", code, path], env=os.environ)
    (left,) = os.listdir(tmp_path)
    others = {".a.bin.old", ".a.bin.1.abcdefgh", ".b" + left[2:], left + ".txt", "a.bin"}
    for name in others:
        (tmp_path / name).write_bytes(b"")
    remove_leftovers(path)
    assert set(os.listdir(tmp_path)) == others
    remove_leftovers(tmp_path / "missing" / "a.bin")

"""A stopped run goes on with the images, labels and code of a plan that it was begun with."""

import contextlib
import importlib
import json
import shutil
import sys
from copy import deepcopy

import numpy as np
import pytest
import timm
import torch
import torch.multiprocessing as mp
from PIL import Image
from torch.utils.data import DataLoader, Dataset, TensorDataset
from tuning import QUICK, same, weights

from slimvit import Masks, apply_masks
from slimvit.errors import CheckpointError
from slimvit.finetune import _run, finetune, resume_path
from slimvit.finetune._identity import data_digest

COUNTS = [17, 9, 9, 7, 5, 1]
OTHER_DATA = "is of a run with other images or labels: delete it, or start over with --restart"


class Drawn(Dataset):
    """Images that are drawn when they are asked for, and their labels."""

    def __init__(self, targets):
        self.targets = targets

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, index):
        return torch.randn(3, 64, 64), self.targets[index]


def batches(images, targets):
    return list(zip(images.split(6), targets.split(6), strict=True))


def tensors(images, targets):
    return DataLoader(TensorDataset(images, targets), 6, shuffle=True)


def drawn(images, targets):
    return DataLoader(Drawn(targets.tolist()), 6, shuffle=True)


def run(pair, loader, output=None, epochs=3, stop=None):
    """A run, stopped by Ctrl-C when it tells of the epoch `stop`."""

    def tell(entry):
        if entry["epoch"] == stop:
            raise KeyboardInterrupt

    options = {"epochs": epochs, "output": output, "on_epoch": tell, **QUICK}
    return finetune(deepcopy(pair[0]), pair[1], loader, **options)


@pytest.mark.parametrize(
    ("kind", "what"),
    [
        *((batches, "images"), (batches, "labels"), (tensors, "images"), (tensors, "labels")),
        (drawn, "labels"),
    ],
)
def test_other_data_does_not_go_on(pair, labelled, tmp_path, kind, what):
    images, targets = (torch.cat(parts) for parts in zip(*labelled, strict=True))
    output = tmp_path / "slim.safetensors"
    whole = run(pair, kind(images, targets))
    with pytest.raises(KeyboardInterrupt):
        run(pair, kind(images, targets), output, stop=2)
    content = resume_path(output).read_bytes()
    other = (images + 1, targets) if what == "images" else (images, targets.flip(0))
    with pytest.raises(CheckpointError, match=OTHER_DATA):
        run(pair, kind(*other), output)
    assert resume_path(output).read_bytes() == content
    result = run(pair, kind(images.clone(), targets.clone()), output)
    assert result.report["resumed"] == 1
    assert same(weights(result.model), weights(whole.model))  # nothing was drawn to tell the data


def test_data_of_which_nothing_is_known_goes_on(pair, labelled, tmp_path):
    class Stream:
        def __iter__(self):
            return iter(labelled)

        def __len__(self):
            return len(labelled)

    output = tmp_path / "slim.safetensors"
    with pytest.raises(KeyboardInterrupt):
        run(pair, Stream(), output, stop=2)
    assert run(pair, Stream(), output).report["resumed"] == 1


@pytest.mark.parametrize("targets", [None, [[1], [2, 3]], ["a"], len, [{"a": 1}]])
def test_targets_that_are_no_numbers_tell_nothing(targets):
    dataset = Drawn([1, 2])
    dataset.targets = targets
    assert data_digest(DataLoader(dataset, sampler=[0])) == data_digest([]) < 2**40


CODE = """
from slimvit import Planner

FACTOR = 1.0

class Mine(Planner):
    kind = "test-identity"

    def choose(self, layer, view, n):
        return view.top(view.alive.x.norm(dim=-1).t() * FACTOR, n)
"""


def test_an_edited_planner_does_not_go_on(tiny_vit, labelled, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def slim(code):
        (tmp_path / "planner_of_mine.py").write_text(code)
        monkeypatch.delitem(sys.modules, "planner_of_mine", raising=False)
        importlib.invalidate_caches()
        own = importlib.import_module("planner_of_mine").Mine
        named = type("Named", (own,), {"kind": "test-identity-named"})  # its parent counts, too
        return apply_masks(tiny_vit, named(COUNTS)), tiny_vit

    output = tmp_path / "slim.safetensors"
    with pytest.raises(KeyboardInterrupt):
        run(slim(CODE), labelled, output, stop=2)
    for before, after in (("FACTOR = 1.0", "FACTOR = -1.0"), ("FACTOR, n)", "-FACTOR, n)")):
        with pytest.raises(CheckpointError, match="is of a run with other code of the plan: del"):
            run(slim(CODE.replace(before, after)), labelled, output)
    assert run(slim(CODE), labelled, output).report["resumed"] == 1


@pytest.fixture
def stopped(call, room, out, monkeypatch):
    """`slimvit finetune` of 2 epochs on a copy of the images, stopped once in its second epoch."""
    shutil.copytree(room / "images", out / "images")
    (out / "map.txt").write_text("\n".join(f"c{i}" for i in range(10)))
    options = {"data_dir": out / "images", "class_map": out / "map.txt", "epochs": 2}

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        save = _run.save_resume

        def once(*given):
            save(*given)
            patch.setattr(_run.Run, "_epoch", stop)

        patch.setattr(_run, "save_resume", once)
        assert call("finetune", **options)[0] == 130
    assert (out / "slim.resume.safetensors").exists()
    return lambda **changes: call("finetune", **options | changes)


def test_the_command_goes_on(stopped, out):
    (out / "images" / "c3" / "3.jpg").touch()
    (out / "images").rename(out / "moved")
    (out / "map.txt").write_text("".join(f"c{i}\n" for i in range(10)))
    status, stdout, _ = stopped(data_dir=out / "moved")
    assert status == 0 and "epoch 2/2" in stdout and "epoch 1/2" not in stdout


@pytest.mark.parametrize("what", ["class map", "an image", "another folder", "a name"])
def test_the_command_does_not_go_on_with_other_data(stopped, out, what):
    changes, other = {}, "images or labels"
    image = out / "images" / "c3" / "3.jpg"
    if what == "class map":
        names = [f"c{i}" for i in range(10)]
        (out / "swapped.txt").write_text("\n".join([names[1], names[0], *names[2:]]))
        changes = {"class_map": out / "swapped.txt"}
    elif what == "an image":
        Image.fromarray(np.zeros((70, 66, 3), np.uint8)).save(image)
    elif what == "another folder":
        shutil.copytree(out / "images", out / "others")
        (out / "others" / "c4" / "4.jpg").write_bytes(image.read_bytes())
        changes = {"data_dir": out / "others"}
    else:
        image.rename(image.with_name("x.jpg"))
        other = "info's data, images or labels"
    status, stdout, stderr = stopped(**changes)
    (line,) = stderr.splitlines()
    assert (status, stdout) == (1, "")
    assert f"slim.resume.safetensors is of a run with other {other}: delete it, or" in line


def in_processes(rank, folder):
    """Of two processes the second has other labels in the second call, not in the first and third.

    The first call is stopped in its second epoch. Seeds are written down.
    """
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    torch.manual_seed(0)
    dense = timm.create_model("test_vit", img_size=64, num_classes=10).eval()
    pair = apply_masks(dense, Masks.from_counts(COUNTS, (4, 4))), dense
    images, epoch, seed = torch.randn(2, 3, 64, 64), _run.Run._epoch, _run.seed_generators
    seeds = []
    _run.seed_generators = lambda value, device: seeds.append(value) or seed(value, device)

    def stopped(self, number):
        if number == 1:
            raise KeyboardInterrupt
        return epoch(self, number)

    for call, ends in enumerate(
        (
            pytest.raises(KeyboardInterrupt),
            pytest.raises(CheckpointError, match=OTHER_DATA),
            contextlib.nullcontext(),
        )
    ):
        _run.Run._epoch = epoch if call else stopped
        with ends:
            targets = torch.tensor([rank, 1 + rank * (call == 1)])
            run(pair, [(images, targets)], folder / "slim.safetensors")
        torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    (folder / f"{rank}.json").write_text(json.dumps(seeds))


def test_processes_refuse_what_one_of_them_finds_and_draw_numbers_of_their_own(tmp_path):
    mp.spawn(in_processes, (tmp_path,), nprocs=2)
    assert (tmp_path / "slim.safetensors").exists()
    assert not resume_path(tmp_path / "slim.safetensors").exists()
    seeds = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert len(seeds[0]) == len(seeds[1]) == 3
    assert len({*seeds[0], *seeds[1]}) == 6

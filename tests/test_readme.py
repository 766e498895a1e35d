"""What the README names is there."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import timm
from PIL import Image

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")

# Each name in a process of its own, forked with torch and timm loaded: none is there by another's
# import.
RESOLVE = """
import os, sys
import timm, torch

for name in sys.argv[1:]:
    if (child := os.fork()) == 0:
        import slimvit

        value = slimvit
        for part in name.split(".")[1:]:
            value = getattr(value, part, None)
        os._exit(value is None)
    if os.waitpid(child, 0)[1]:
        print(name)
"""


def test_dotted_names_resolve_after_import_slimvit():
    names = sorted(set(re.findall(r"(?<![\w/.-])slimvit(?:\.[A-Za-z_]\w*)+", README)))
    assert {"slimvit.prune", "slimvit.search.fit_thresholds"} <= set(names)
    done = subprocess.run([sys.executable, "-c", RESOLVE, *names], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


def test_the_first_sample_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = timm.create_model("test_vit", depth=12, num_classes=10)
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained: model)
    (tmp_path / "images").mkdir()
    noise = np.random.default_rng(0)
    for i in range(3):
        Image.fromarray(noise.integers(0, 255, (64, 64, 3), np.uint8)).save(f"images/{i}.png")
    names = {}
    exec(re.search(r"```python\n(.*?)```", README, re.DOTALL)[1], names)
    assert names["logits"].shape == (3, 10)
    assert names["fast"](names["images"]).shape == (3, 10)


def test_what_is_not_there_is_an_attribute_error():
    import slimvit

    for name in ("absent", "_extension", "search2"):
        assert not hasattr(slimvit, name)

"""What the README names is there."""

import re
import subprocess
import sys
from pathlib import Path

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


def test_what_is_not_there_is_an_attribute_error():
    import slimvit

    for name in ("absent", "_extension", "search2"):
        assert not hasattr(slimvit, name)

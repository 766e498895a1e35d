"""Set before torch is imported, which reads it once: idle threads must not disturb other rows."""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "1000")

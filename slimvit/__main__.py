"""`python -m slimvit` is the command `slimvit`."""

import sys

from slimvit.cli import main

sys.exit(main())

"""``python -m harness``."""

import os
import sys

from harness.cli import main
from harness.parallel.ranks import end_process

code = main(supervised=True)
if os.environ.get("WORLD_SIZE", "1") != "1":
    end_process(code)
sys.exit(code)

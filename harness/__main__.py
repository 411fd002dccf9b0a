"""``python -m harness``."""

import os
import sys

if sys.argv[1:2] == ["case"] and not {"-h", "--help"} & set(sys.argv):
    from harness.supervisor.case_parent import is_wanted, run_supervised

    if is_wanted(sys.argv[1:], os.environ.get):
        sys.exit(run_supervised(sys.argv[1:]))

from harness.cli import main

sys.exit(main())

"""Under torchrun: several commands of the harness one after the other, so that the imports are paid for once.
Arguments: a JSON list of [environment, words of the command] and the exit codes that it may have: 0 where
none is given."""

import json
import os
import sys

from harness.cli import main
from harness.parallel.ranks import end_process

if __name__ == "__main__":
    for environment, words, *expected in json.loads(sys.argv[1]):
        os.environ.update(environment)
        code = main(words)
        if code not in (expected or [0]):
            end_process(code or 1)
    end_process(0)

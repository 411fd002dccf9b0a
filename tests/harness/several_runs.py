"""Under torchrun: several commands of the harness one after the other, so that the imports are paid for once.
Arguments: a JSON list of [environment, words of the command]."""

import json
import os
import sys

from harness.cli import main

if __name__ == "__main__":
    for environment, words in json.loads(sys.argv[1]):
        os.environ.update(environment)
        code = main(words)
        if code:
            sys.exit(code)

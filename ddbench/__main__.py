# PYTHON_ARGCOMPLETE_OK
"""``ddb``: the commands of the harness, and after ``report`` and ``kernels`` those of these rooms."""

from __future__ import annotations

import argparse
import os
import runpy
import sys

from ddbench import CLONE, IS_CLONE, __version__

SHELLS = ("bash", "zsh", "fish")


def main() -> None:
    """Run the command of ``sys.argv`` as ``python -m ROOM`` would, and exit as it does."""
    if "_ARGCOMPLETE" in os.environ:  # a shell asks what may follow
        import argcomplete

        argcomplete.autocomplete(parser())
    # A folder named kernels/ or report/ where the command is given is nobody's package, here and in the processes it starts.
    os.environ.setdefault("PYTHONSAFEPATH", "1")
    if IS_CLONE:
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (CLONE, os.environ.get("PYTHONPATH"))))
    first = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if first in ("-h", "--help", "--version", "completion"):
        options = parser().parse_args([first, *sys.argv[2:]])
        print(completion(options.shell))
        return
    room = first if first in ("report", "kernels") else "harness"
    if room == first:
        del sys.argv[1]
    runpy.run_module(room if IS_CLONE else f"ddbench.{room}", run_name="__main__", alter_sys=True)


def parser() -> argparse.ArgumentParser:
    """The grammar of all rooms, for ``--help`` and completion; each room parses its own command lines."""
    from harness.options import parser as harness_parser
    from kernels.__main__ import _parser as kernels_parser
    from report.arguments import parser as report_parser

    top = harness_parser()
    top.prog = "ddb"
    top.add_argument("--version", action="version", version=f"ddb {__version__}")
    commands = next(action for action in top._actions if isinstance(action, argparse._SubParsersAction))
    for room, grammar in (("report", report_parser()), ("kernels", kernels_parser())):
        commands.add_parser(room, help=grammar.description, parents=[grammar], add_help=False)
    commands.add_parser("completion", help="print the lines that make a shell complete what follows ddb").add_argument(
        "shell", choices=SHELLS
    )
    return top


def completion(shell: str) -> str:
    """The lines for one of `SHELLS`, as in ``eval "$(ddb completion bash)"``."""
    import argcomplete

    return argcomplete.shellcode(["ddb"], shell=shell)


if __name__ == "__main__":
    if not sys.flags.safe_path and sys.path.count(os.getcwd()) > (os.getcwd() == CLONE):  # which ``python -m`` puts there
        sys.path.remove(os.getcwd())
    main()

"""`python -m tests.chaos`: tries of every command in every world, and a table of how they went.

python -m tests.chaos                                    # everything once or twice: about half an hour
python -m tests.chaos --kinds kill --tries 500           # so many tries, over all commands
python -m tests.chaos --only publish --world redis --kinds kill --seed 17   # one try alone
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

from tests.chaos.forkserver import QUIET

KINDS = ("kill", "term", "full", "readonly", "owner", "rot", "stores")


def main() -> int:
    options = read_options()
    if not set(QUIET.items()) <= set(os.environ.items()):  # before anything is imported that reads them
        os.execve(sys.executable, sys.orig_argv, {**os.environ, **QUIET})
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # servers end with this process
    from tests.chaos.forkserver import ForkServer
    from tests.chaos.suite import Suite

    folder = Path(tempfile.mkdtemp(prefix="hllm-chaos-"))
    folder.chmod(0o755)
    try:
        suite = Suite(options, ForkServer(folder / "forks"))
        for kind in options.world:
            with ExitStack() as stack:
                suite.go(kind, folder / kind, stack)
        return suite.report()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--world", nargs="+", default=["local", "s3", "redis", "postgres"])
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--only", nargs="+", default=[], help="commands, as the table names them")
    parser.add_argument("--until", default="", help="do not build the world further than this command")
    parser.add_argument("--tries", type=int, default=0, help="of each kind, over all commands of a world")
    parser.add_argument("--seed", type=int, default=1, help="of the first try")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no try after so long")
    parser.add_argument("--verbose", action="store_true", help="a line for each try")
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())

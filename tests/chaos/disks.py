"""Disks that are full, read-only, or another user's: an error a scheduler can act on, and then as if nothing
had been. The world moves onto a tmpfs for the try, in a mount namespace of this process: that takes root.
"""

from __future__ import annotations

import ctypes
import os
import random
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.chaos.commands import run
from tests.chaos.forkserver import Ended
from tests.chaos.kills import Tries, last_lines, mended

KINDS = ("full", "readonly", "owner")
REFUSED = (64, 65, 66, 75)
NAMESPACE, NOBODY, PAGE = 0x00020000, 65534, 4096


def possible() -> bool:
    """Whether this process may mount; from then on its mounts are its own."""
    if os.geteuid() != 0 or ctypes.CDLL(None, use_errno=True).unshare(NAMESPACE) != 0:
        return False
    return subprocess.run(["mount", "--make-rprivate", "/"], capture_output=True).returncode == 0


def try_disk(tries: Tries, name: str, kind: str, seed: int) -> list[str]:
    """One try; what was wrong with it."""
    reference, link, world = tries.reference(name), tries.links[name], tries.world
    dice = random.Random(f"{world.kind} {name} {kind} {seed}")
    with _on_tmpfs(world.here):
        world.restore(name)
        if kind == "owner":
            ended: Ended = run(world, link, also=lambda: os.setuid(NOBODY))
            told = "as another user"
        else:
            room = int(dice.uniform(0, reference.growth)) if kind == "full" else 0
            size = max(PAGE, _used(world.here) + room)
            options = f"size={size}" if kind == "full" else "ro"
            _mount("-o", f"remount,{options}", str(world.here))
            ended = run(world, link)
            told = f"disk full after {room:,} bytes" if kind == "full" else "disk read-only"
            _mount("-o", "remount,rw,size=4g", str(world.here))
        problems = []
        if ended.code not in (*REFUSED, *link.codes):
            problems.append(f"exit {ended.code}: {last_lines(ended)}")
        problems += mended(tries, name)
    return [f"({told})", *problems] if problems else []


@contextmanager
def _on_tmpfs(folder: Path) -> Iterator[None]:
    _mount("-t", "tmpfs", "-o", "size=4g,mode=755", "chaos", str(folder))
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def _used(folder: Path) -> int:
    found = os.statvfs(folder)
    return (found.f_blocks - found.f_bfree) * found.f_frsize


def _mount(*options: str) -> None:
    subprocess.run(["mount", *options], check=True)

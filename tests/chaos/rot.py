"""One file of a finished output has a flipped byte, is cut, or is gone: the next command refuses, or makes it
anew; what it writes never rests on it.
"""

from __future__ import annotations

import random
from pathlib import Path

from hllm.work.artifacts import digest_file
from tests.chaos.commands import run
from tests.chaos.kills import Tries, last_lines

READERS = {
    "validate": "ingest",
    "prepare": "validate",
    "train-hllm-1": "prepare",
    "embed-hllm-1": "train-hllm-1",
    "train-hllm-2": "embed-hllm-1",
    "embed-hllm-3": "train-hllm-2",
    "evaluate": "embed-hstu-1",
    "register": "evaluate",
    "publish": "embed-hllm-3",
    "verify": "embed-hllm-3",
}
"""Command -> the step whose output is damaged before it runs."""
REFUSED = (64, 65, 66, 75)


def try_rot(tries: Tries, name: str, seed: int) -> list[str]:
    """One file, one damage; what was wrong with the answer."""
    link, world = tries.links[name], tries.world
    dice = random.Random(f"{name} rot {seed}")
    world.restore(name)
    folder = world.here / "runs" / READERS[name]
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.startswith(".")]
    files = [path for path in files if path.stat().st_size]
    path, damage = dice.choice(files), dice.choice(("flipped", "cut", "missing"))
    whole = digest_file(path)
    _damage(path, damage, dice)
    ended = run(world, link)
    told = f"{damage}: {path.relative_to(world.here)}"
    if ended.code in REFUSED:
        return []
    if ended.code in link.codes and path.exists() and digest_file(path) == whole:
        return []  # made anew
    return [f"({told})", f"exit {ended.code}: {last_lines(ended)}"]


def _damage(path: Path, damage: str, dice: random.Random) -> None:
    content = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(content[: dice.randrange(len(content))])
    else:
        content[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
        path.write_bytes(content)

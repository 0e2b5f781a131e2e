"""S3 that answers 503, breaks connections, cuts answers or says nothing: for a moment, which a command
survives, or for good, which it tells in time; afterwards the same command succeeds.
"""

from __future__ import annotations

import os
import random

from tests.chaos.commands import run
from tests.chaos.kills import Tries, last_lines, mended
from tests.faulty import Fault, Proxy

FAULTS = ("503", "reset", "truncate", "stall")
UNTIL = 100
"""Seconds within which a command has given up."""


def try_store(tries: Tries, name: str, seed: int) -> list[str]:
    """One try; what was wrong with it."""
    link, world = tries.links[name], tries.world
    tries.reference(name)
    dice = random.Random(f"{name} stores {seed}")
    kind, lasting = dice.choice(FAULTS), dice.random() < 0.5
    fault = Fault(kind, times=10**6 if lasting else dice.randint(1, 2), after=3)  # type: ignore[arg-type]

    def through_it() -> None:
        from urllib.parse import urlsplit

        from hllm.work import objects

        objects.READ_SECONDS, objects.ATTEMPTS = 1.0, 3
        server = urlsplit(os.environ["AWS_ENDPOINT_URL_S3"])
        proxy = Proxy((str(server.hostname), int(server.port or 0)), [fault])
        os.environ["AWS_ENDPOINT_URL_S3"] = proxy.url

    world.restore(name)
    ended = run(world, link, also=through_it, limit=UNTIL)
    allowed = (75, *link.codes) if lasting else link.codes
    problems = [] if ended.code in allowed else [f"exit {ended.code}: {last_lines(ended)}"]
    problems += mended(tries, name)
    told = f"S3: {kind}, {'for good' if lasting else f'{fault.times} times'}"
    return [f"({told})", *problems] if problems else []

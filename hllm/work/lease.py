"""One writer at a time of what lies in S3, on whatever machine: claims, objects refreshed while held.

Who wants to write puts a claim beside the others' and lists them all. Alone, it holds; else it withdraws and
tries again. Of two who come at once, the one that lists later sees the other, so never both hold. That needs
nothing of a store but listings that show what was written before them; conditional writes, which not every
store knows, are not used. A claim that was not refreshed for STALE_SECONDS, by the store's own clock, is of a
process that is gone.
"""

from __future__ import annotations

import contextlib
import re
import secrets
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from typing import Any

from hllm.errors import HLLMError, InfraError
from hllm.work.objects import delete_objects, read_object, s3_client, s3_errors, split_s3

BEAT_SECONDS = 10.0
"""A claim is refreshed as often: how long it takes to know that its process lives."""
STALE_SECONDS = 60.0
"""How long it takes to know that its process is gone."""
WAIT_SECONDS = 4 * STALE_SECONDS
"""How long anybody waits for a claim at most."""
NAME = re.compile(r"[0-9a-f]{16}")
FORM = b"process "
"""What the name and the content of a claim look like: nothing else is removed."""


class Claim:
    """A claim that is held. Its thread refreshes it; one that could not for too long may have lost it."""

    def __init__(self, location: str, who: str) -> None:
        self.location, self._content = location, who.encode()
        self._folder = location.rpartition("/")[0]
        self._one = threading.Lock()
        self._refreshed = datetime.min.replace(tzinfo=UTC)  # by the store's clock
        self._lost = False

    def require(self) -> None:
        """Before writes that others will believe, or that end theirs.

        Raises:
            InfraError: others have taken this process for dead, and one of them writes now.
        """
        if not self._lost:
            self._refresh(look=True)
        if self._lost:
            raise InfraError(
                "another process took this output over: this one gave no sign of life for "
                f"{STALE_SECONDS:.0f} s",
                where=self._folder,
                remedy="Wait for that one, then run again.",
            )

    def take(self) -> None:
        """Wait until nobody else holds, or until it is known that somebody does.

        Raises:
            InfraError: a process that lives is writing.
        """
        first_seen: dict[str, datetime] = {}
        began = time.monotonic()
        waiting = "waiting to see whether another process still writes this output"
        while True:
            others = self._others()
            if not others:
                self._refreshed = self._put()
                if not self._others():
                    return
                delete_objects([self.location])  # somebody came at the same time, and withdraws too
                time.sleep(secrets.SystemRandom().uniform(0, BEAT_SECONDS / 8))
            for other, at in others.items():
                if at > first_seen.setdefault(other, at):
                    raise InfraError(
                        f"another process is writing this output: {_said(other)}",
                        where=self._folder,
                        remedy="Wait for it, then run again.",
                    )
            if time.monotonic() - began > WAIT_SECONDS:
                other, at = next(iter(others.items()), (self.location, self._refreshed))
                raise InfraError(
                    f"could not be taken within {WAIT_SECONDS:.0f} s: {_said(other)}, last seen {at}",
                    where=self._folder,
                    remedy="If no process writes this output any more, remove that object.",
                )
            if others:
                if waiting:
                    print(f"{self._folder}: {waiting}", file=sys.stderr)
                waiting = ""
                time.sleep(BEAT_SECONDS / 5)

    def beat(self, over: threading.Event) -> None:
        while not (over.wait(BEAT_SECONDS) or self._lost):
            with contextlib.suppress(HLLMError):  # the store is away: again after the next wait
                self._refresh()
        if self._lost:
            print(f"{self._folder}: another process took this output over: end this one", file=sys.stderr)

    def _refresh(self, look: bool = False) -> None:
        with self._one:
            now = self._put()
            # So late, somebody may have thrown the old one away and hold now.
            late = now - self._refreshed > timedelta(seconds=STALE_SECONDS * 0.9)
            if (late or look) and self._others():
                self._lost = True
                delete_objects([self.location])
            self._refreshed = now

    def _put(self) -> datetime:
        bucket, key = split_s3(self.location)
        with s3_errors(self.location):
            answer = s3_client().put_object(Bucket=bucket, Key=key, Body=self._content)
        return _now(answer)

    def _others(self) -> dict[str, datetime]:
        """Claims of processes that live, and when they were refreshed; those of others are removed."""
        bucket, prefix = split_s3(f"{self._folder}/")
        with s3_errors(self._folder):
            answer = s3_client().list_objects_v2(Bucket=bucket, Prefix=prefix)
        now = _now(answer)
        found = {
            f"s3://{bucket}/{each['Key']}": each["LastModified"]
            for each in answer.get("Contents", ())
            if NAME.fullmatch(each["Key"].removeprefix(prefix))  # anything else is no claim, and not ours
        }
        found.pop(self.location, None)
        gone = {each for each, at in found.items() if now - at > timedelta(seconds=STALE_SECONDS)}
        delete_objects(each for each in gone if (read_object(each) or b"").startswith(FORM))
        return {each: at for each, at in found.items() if each not in gone}


def _said(claim: str) -> str:
    """Who holds a claim."""
    return (read_object(claim) or b"it has just ended").decode("utf-8", "replace")


def _now(answer: Mapping[str, Any]) -> datetime:
    """By the store's clock: ours may be wrong, and may have stood still with a machine that was suspended."""
    date = answer["ResponseMetadata"]["HTTPHeaders"].get("date")
    return parsedate_to_datetime(date) if date else datetime.now(UTC)


@contextmanager
def claimed(folder: str, who: str) -> Iterator[Claim]:
    """Hold a claim in `folder` (`s3://...`) until the end of the block. `who`: what others are told.

    Raises:
        InfraError: another process is writing.
    """
    claim, over = Claim(f"{folder}/{secrets.token_hex(8)}", who), threading.Event()
    beating = threading.Thread(target=claim.beat, args=(over,), daemon=True)
    try:
        claim.take()
        beating.start()
        yield claim
    finally:
        over.set()
        if beating.ident:
            beating.join(BEAT_SECONDS)
        try:
            delete_objects([claim.location])
        except HLLMError as error:
            print(f"warning: the output stays locked for a while: {error.first_line}", file=sys.stderr)

"""The errors a user meets, and the exit codes that schedulers act on.

    HLLMError
    |-- ConfigError   64  a setting is wrong: nothing was started
    |-- DataError     65  the data is wrong: retrying will not help
    |-- GateError     66  the candidate is not good enough
    `-- InfraError    75  a service or a disk failed: a retry helps

SIGTERM ends a step with 143 after a checkpoint; the same command then continues.
Any other exception is a bug of ours (exit code 70): `--debug` shows its traceback.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice


class HLLMError(Exception):
    """One problem as a person reads it: what, where, how many, three examples, and what to do.

    `str(error)` starts with one line that stands alone: it becomes the container's termination message.
    """

    exit_code = 70

    def __init__(
        self,
        what: str,
        *,
        where: object = None,
        count: tuple[int, int] | None = None,
        examples: Iterable[object] = (),
        remedy: str = "",
    ) -> None:
        first = f"{where}: {what}" if where is not None else what
        first = first.replace("\n", "\\n")  # a place or a name may hold line breaks
        if count is not None:
            first += f" ({count[0]:,} of {count[1]:,})"
        shown = [_short(example) for example in islice(examples, 3)]
        if shown:
            first += f" (e.g. {', '.join(shown)})"
        super().__init__(first + (f"\n  {remedy}" if remedy else ""))

    @property
    def first_line(self) -> str:
        return str(self).splitlines()[0]


class ConfigError(HLLMError):
    exit_code = 64


class DataError(HLLMError):
    exit_code = 65


class GateError(HLLMError):
    exit_code = 66


class InfraError(HLLMError):
    exit_code = 75


class Terminated(BaseException):
    """SIGTERM arrived. Not an Exception: no handler may swallow it on the way to the checkpoint."""

    exit_code = 143


def _short(value: object, limit: int = 60) -> str:
    text = repr(value) if isinstance(value, str) else str(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."

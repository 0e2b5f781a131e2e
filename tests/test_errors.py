from __future__ import annotations

import pytest

from hllm.errors import ConfigError, DataError, GateError, HLLMError, InfraError, Terminated


def test_a_message_says_what_where_how_many_three_examples_and_what_to_do() -> None:
    error = DataError(
        "rows are odd",
        where="log.csv",
        count=(1214, 100_000),
        examples=["a b", 7, "c\n", "never shown"],
        remedy="Look.",
    )
    assert str(error) == "log.csv: rows are odd (1,214 of 100,000) (e.g. 'a b', 7, 'c\\n')\n  Look."


def test_the_first_line_stands_alone() -> None:
    assert ConfigError("is wrong", where="x", remedy="Fix it.").first_line == "x: is wrong"


def test_a_long_example_is_cut() -> None:
    assert len(str(DataError("bad", examples=["x" * 100_000]))) < 100


@pytest.mark.parametrize(
    ("error", "code"),
    [(ConfigError, 64), (DataError, 65), (GateError, 66), (InfraError, 75), (Terminated, 143)],
)
def test_schedulers_act_on_the_exit_code(error: type[HLLMError], code: int) -> None:
    assert error.exit_code == code


def test_no_handler_of_exceptions_swallows_a_termination() -> None:
    assert not issubclass(Terminated, Exception)

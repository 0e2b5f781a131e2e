"""A comparison as a table: for a terminal, and in Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from tabulate import tabulate

from hllm.comparison.result import Effort, Result
from hllm.evaluation.metrics import Interval
from hllm.report.words import duration

NOTHING = "-"


def text_table(result: Result) -> str:
    return f"{heading(result)}\n\n{tabulate(rows(result), columns(result), disable_numparse=True)}"


def markdown_table(result: Result) -> str:
    table = tabulate(rows(result), columns(result), tablefmt="github", disable_numparse=True)
    return f"# {result.comparison.title}\n\n{heading(result)}\n\n{table}\n"


def heading(result: Result) -> str:
    """What was measured, in two sentences."""
    seeds = result.comparison.seeds
    one = len(seeds) == 1
    over = "users, and nothing of the luck with a seed" if one else f"users and {len(seeds)} seeds"
    means = f"Seed {seeds[0]} alone" if one else f"Means over seeds {', '.join(map(str, seeds))}"
    return (
        f"{result.held_out}. {means}; {100 * result.confidence:g} % intervals over {over}; ratios against "
        f"{result.comparison.reference}."
    )


def columns(result: Result) -> list[str]:
    metrics = [metric.title for metric in result.comparison.metrics]
    return ["model", *metrics, f"{metrics[0]}, ratio", "parameters", "steps", "trained for"]


def rows(result: Result) -> list[list[str]]:
    first = str(result.comparison.metrics[0])
    found = []
    for name, figures in result.figures.found.items():
        ratio = result.figures.ratios.get(name, {}).get(first)
        found.append(
            [
                name,
                *(interval(figures.get(str(metric))) for metric in result.comparison.metrics),
                interval(ratio, 2) if ratio else NOTHING,
                *effort(result.efforts.get(name)),
            ]
        )
    return found


def effort(found: Effort | None) -> Sequence[str]:
    if found is None:
        return (NOTHING,) * 3
    steps = " + ".join(f"{count:,}" for count in found.steps)
    return (parameters(found.parameters), steps, duration(found.seconds))


def parameters(count: int) -> str:
    return f"{count / 1e6:.1f} M" if count >= 1e5 else f"{count:,}"


def interval(found: Interval | None, digits: int = 4) -> str:
    """`0.0745 [0.0616, 0.0885]`"""
    if found is None:
        return NOTHING
    return f"{found['value']:.{digits}f} [{found['low']:.{digits}f}, {found['high']:.{digits}f}]"

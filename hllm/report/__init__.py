"""The report of one candidate: a self-contained HTML page. `page.py` gathers, `page.html` lays out."""

from hllm.report.page import write_report

__all__ = ["write_report"]

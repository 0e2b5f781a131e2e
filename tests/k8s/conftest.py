"""Airflow of the tests, as in tests/dags: a home of its own, set before anything imports it."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

DAGS = str(Path(__file__).resolve().parents[2] / "dags")

if "AIRFLOW_HOME" not in os.environ:
    os.environ["AIRFLOW_HOME"] = tempfile.mkdtemp(prefix="hllm-airflow-")
    os.environ["AIRFLOW__CORE__LOAD_EXAMPLES"] = "False"
if DAGS not in sys.path:
    sys.path.insert(0, DAGS)

"""`make demo` and `make ui`: a real Airflow and MLflow on this machine, for as long as they are needed.

Airflow is started as processes and spoken to over HTTP; nothing here imports it.
"""

"""A real MLflow for every test here."""

from tests.mlflow_server import _no_server_of_others, _servers, mlflow_server, settings

__all__ = ["_no_server_of_others", "_servers", "mlflow_server", "settings"]

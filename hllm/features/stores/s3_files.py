"""Feast's offline files in S3: how the DuckDB under its offline store reads them.

For `s3://`, ibis wants DuckDB's extension httpfs: downloaded at run time from a server of DuckDB's, blind to
AWS_ENDPOINT_URL_S3, and without the AWS SDK's chain of credentials. So Feast's sources say `s3a://`, another
spelling of the same, and pyarrow's S3 client reads it, which is there wherever Feast is.
`feature_repo/read_s3.py` does the same for programs without this package.
"""

from __future__ import annotations

import os
from typing import Any

from hllm.errors import InfraError

SCHEME = "s3a"


def as_feast_reads(location: str) -> str:
    """`s3://bucket/...` in the spelling of Feast's sources; anything else as it is."""
    return f"{SCHEME}://{location.removeprefix('s3://')}" if location.startswith("s3://") else location


def reach_s3() -> None:
    """From now on this process's DuckDB under Feast reads `s3a://`."""
    import ibis
    from fsspec.implementations.arrow import ArrowFSWrapper

    class Files(ArrowFSWrapper):
        protocol = (SCHEME,)

    backend = ibis.get_backend()
    backend.con.unregister_filesystem(SCHEME)
    backend.register_filesystem(Files(_client()))


def require_reach(location: str) -> None:
    """Look into a folder of S3 as Feast does.

    Raises:
        InfraError: it cannot be looked into.
    """
    from pyarrow.fs import FileSelector

    try:
        _client().get_file_info(FileSelector(location.removeprefix("s3://"), allow_not_found=True))
    except OSError as error:
        raise InfraError(
            f"pyarrow, by which Feast reads offline files, does not get there: {error}", where=location
        ) from None


def _client() -> Any:
    """pyarrow's, with the address, authorities and addressing of `hllm.work.objects`."""
    import certifi
    from pyarrow.fs import S3FileSystem

    return S3FileSystem(
        endpoint_override=os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL"),
        tls_ca_file_path=os.environ.get("AWS_CA_BUNDLE") or certifi.where(),
        force_virtual_addressing=os.environ.get("HLLM_S3_ADDRESSING") == "virtual",
    )

"""Feast's offline files in S3: how the DuckDB under its offline store reads them.

For `s3://`, ibis wants DuckDB's extension httpfs: downloaded at run time from a server of DuckDB's, blind to
AWS_ENDPOINT_URL_S3, and without the AWS SDK's chain of credentials. So Feast's sources say `s3a://`, another
spelling of the same, and pyarrow's S3 client reads it, which is there wherever Feast is.
`feature_repo/read_s3.py` does the same for programs without this package.
"""

from __future__ import annotations

import os

SCHEME = "s3a"


def as_feast_reads(location: str) -> str:
    """`s3://bucket/...` in the spelling of Feast's sources; anything else as it is."""
    return f"{SCHEME}://{location.removeprefix('s3://')}" if location.startswith("s3://") else location


def reach_s3() -> None:
    """From now on this process's DuckDB under Feast reads `s3a://`, with the environment's address and
    credentials."""
    import ibis
    from fsspec.implementations.arrow import ArrowFSWrapper
    from pyarrow.fs import S3FileSystem

    class Files(ArrowFSWrapper):
        protocol = (SCHEME,)

    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    backend = ibis.get_backend()
    backend.con.unregister_filesystem(SCHEME)
    backend.register_filesystem(Files(S3FileSystem(endpoint_override=endpoint)))

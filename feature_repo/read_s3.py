"""Let Feast read offline files in S3: once per process, before the first point-in-time join.

A store whose files are in S3 names them `s3a://...`. DuckDB, which reads Feast's offline files, would fetch
an extension of its own for S3 from the internet; pyarrow's client is here already. Address and credentials
come from the environment (AWS_ENDPOINT_URL_S3, AWS_ACCESS_KEY_ID ...), as for every AWS SDK.
"""

import os

import ibis
from feast import FeatureStore
from fsspec.implementations.arrow import ArrowFSWrapper
from pyarrow.fs import S3FileSystem


class Files(ArrowFSWrapper):
    protocol = ("s3a",)


def reach_s3(store: FeatureStore) -> None:
    """Does nothing where the store's offline files are not in S3."""
    places = [str(getattr(view.batch_source, "path", "")) for view in store.list_feature_views()]
    if any(place.startswith("s3a://") for place in places):
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        own = S3FileSystem(endpoint_override=endpoint, tls_ca_file_path=os.environ.get("AWS_CA_BUNDLE"))
        ibis.get_backend().register_filesystem(Files(own))

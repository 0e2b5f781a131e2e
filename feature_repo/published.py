"""What `feast apply` finds in this folder: every version that `hllm publish` has registered.

The views of a version are registered by its publication, not written here by hand. But Feast deletes whatever
is registered and not found in the folder, and with it the online tables. So this file declares what is there:
`feast apply` and `feast plan` change nothing.
"""

from pathlib import Path

import click
from feast import FeatureStore

_context = click.get_current_context(silent=True)
_yaml = (_context.obj or {}).get("FS_YAML_FILE") if _context else None
_store = FeatureStore(fs_yaml_file=Path(_yaml or Path(__file__).parent / "feature_store.yaml"))

for _object in [
    *_store.list_entities(),
    *_store.list_feature_views(),
    *_store.list_on_demand_feature_views(),
    *_store.list_feature_services(),
]:
    globals()[f"{type(_object).__name__}_{_object.name}"] = _object

"""The fast reader that ranking teams copy: the same bits, nulls and versions as Feast's own reading."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

from hllm.features.export import ITEM, Export
from hllm.features.online import rows_of
from hllm.features.publish import publish
from hllm.features.store import open_store
from hllm.features.stores.redis import connect
from tests.features.conftest import SECRET
from tests.features.world import ODD_IDS, online, register, settings_for, write_export

SOURCE = Path(__file__).parents[2] / "feature_repo" / "read_redis.py"


@pytest.fixture
def module(monkeypatch):
    spec = importlib.util.spec_from_file_location("read_redis", SOURCE)
    found = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "read_redis", found)
    spec.loader.exec_module(found)
    return found


def test_it_reads_what_feast_reads(guarded_redis, tmp_path, module):
    settings = settings_for(tmp_path, online="redis", online_url=guarded_redis.place)
    export = write_export(tmp_path / "root" / "embed-hllm-3" / "key")
    publish(settings, str(register(settings, export)))
    names = [*ODD_IDS, "unheard of", "i30"]
    reader = module.Vectors(open_store(settings), "hllm_v1")
    for user in ("u50", ODD_IDS[0], "nobody"):
        read, feast = reader.read(user, names), online(settings, 1, [(user, name) for name in names])
        assert read.known_N.tolist() == [vector is not None for vector in feast["item_vector"]]
        for row, vector in enumerate(feast["item_vector"]):
            expected = np.zeros(8, np.float32) if vector is None else np.asarray(vector, np.float32)
            assert np.array_equal(read.item_vectors_ND[row].view(np.uint32), expected.view(np.uint32))
        if user == "nobody":
            assert read.user_vector is None
        else:
            assert np.array_equal(read.user_vector, np.asarray(feast["user_vector"][0], np.float32))
        expected = np.array(feast["affinity"], float)
        assert np.allclose(read.affinity_N, expected, atol=1e-6, equal_nan=True)
        assert read.unknown == (2 if user == "nobody" else 1)
    assert reader.read("nobody", ["nor this"]).unknown == 2

    # Rows of another version in these views (nobody writes such): no product, as in Feast.
    found, redis = Export.open(export), connect(settings)
    batch = next(found.batches(ITEM, 10))
    from datetime import UTC, datetime

    list(rows_of(settings, ITEM, 1).write(redis, iter([batch]), 9, datetime.now(UTC)))
    read = reader.read("u50", [batch.ids[0], "i30"])
    assert np.isnan(read.affinity_N[0])
    assert not np.isnan(read.affinity_N[1])
    assert SECRET not in SOURCE.read_text()


def test_a_value_that_is_no_such_vector_is_refused(redis_server, tmp_path, module):
    settings = settings_for(tmp_path, online="redis", online_url=redis_server.place)
    publish(settings, str(register(settings, write_export(tmp_path / "root" / "embed-hllm-3" / "key"))))
    rows = rows_of(settings, ITEM, 1)
    connect(settings).hset(rows.key("i30"), rows.fields["item_vector"], b"something else")
    reader = module.Vectors(open_store(settings), "hllm_v1")
    with pytest.raises(ValueError, match="not vectors of one width"):
        reader.read("u50", ["i31", "i30"])
    assert reader.read("u50", ["i31"]).unknown == 0

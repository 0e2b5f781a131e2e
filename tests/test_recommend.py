"""A request against a real registry and a real store. The whole command runs in tests/test_pipeline.py."""

from __future__ import annotations

import numpy as np
import pytest

from hllm.errors import ConfigError, DataError
from hllm.features.publish import publish
from hllm.recommend import of_user, recommend
from hllm.registry.versions import registered_version
from tests.features.world import register, settings_for, vectors, write_export


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    folder = tmp_path_factory.mktemp("published")
    settings = settings_for(folder)
    version = str(register(settings, write_export(folder / "root" / "embed-hllm-3" / "one")))
    publish(settings, version)
    register(settings, write_export(folder / "root" / "embed-hllm-3" / "two", seed=5))
    return settings


def test_a_user_is_known_by_the_vector_that_ranking_models_read(published):
    request = of_user(published, registered_version(published, "1"), "u50")
    assert np.array_equal(request.vector_D, vectors(60, seed=0)[50])
    assert request.heading == (
        "user u50, 50 events; the log is not at hand, so items they have had are not left out"
    )


def test_what_cannot_be_answered_says_why(published):
    with pytest.raises(DataError, match=r"user 'nobody': has no vector in hllm_user_v1"):
        of_user(published, registered_version(published, "1"), "nobody")
    with pytest.raises(ConfigError, match="hllm version 2: is not published"):
        of_user(published, registered_version(published, "2"), "u50")
    with pytest.raises(ConfigError, match="no version of hllm serves yet"):
        recommend(published, None, "u50", None, 5)
    for user, history in ((None, None), ("u50", ["i1"])):
        with pytest.raises(ConfigError, match="give either --user or --history"):
            recommend(published, None, user, history, 5)

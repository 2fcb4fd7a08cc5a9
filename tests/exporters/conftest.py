"""Exports that several test files look at, made once in each process."""

from __future__ import annotations

import logging

import pytest
from deployed import MODELS, Deployed, deploy


@pytest.fixture(scope="session", params=MODELS)
def deployed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Deployed:
    """A transformer's base file, two adapters, and torch's outputs at three shapes."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    return deploy(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Deployed:
    """One of them, for tests of what does not depend on the model."""
    return deploy("bert", tmp_path_factory.mktemp("deployed_bert"))

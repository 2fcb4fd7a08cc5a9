"""Exports that several test files look at, made once."""

from __future__ import annotations

import logging
import os

import pytest
from deployed import MODELS, Deployed, deploy, shared


@pytest.fixture(scope="session", params=MODELS)
def deployed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Deployed:
    """A transformer's base file, two adapters, and torch's outputs at three shapes."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    root = tmp_path_factory.getbasetemp()
    root = root if os.environ.get("PYTEST_XDIST_WORKER") is None else root.parent  # of all workers
    return shared(request.param, root / f"deployed_{request.param}")


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Deployed:
    """One of them, for tests of what does not depend on the model."""
    return deploy("bert", tmp_path_factory.mktemp("deployed_bert"))

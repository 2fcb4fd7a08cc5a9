"""All cases of the catalogue."""

from __future__ import annotations

from catalogue import checkpoints, configs, files, models, running

CASES = [*checkpoints.CASES, *configs.CASES, *files.CASES, *models.CASES, *running.CASES]

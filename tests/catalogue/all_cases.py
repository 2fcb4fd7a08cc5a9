"""All cases of the catalogue."""

from __future__ import annotations

from catalogue import configs, files, models, running

CASES = [*configs.CASES, *files.CASES, *models.CASES, *running.CASES]

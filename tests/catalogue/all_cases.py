"""All cases of the catalogue."""

from __future__ import annotations

from catalogue import checkpoints, configs, files, models, newest, processes, running

CASES = [
    *checkpoints.CASES,
    *configs.CASES,
    *files.CASES,
    *models.CASES,
    *newest.CASES,
    *processes.CASES,
    *running.CASES,
]

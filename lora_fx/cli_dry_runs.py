"""`--dry-run`: what a command would write, with nothing left behind."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from .adapter_integrity import Integrity
from .cli_paths import existing_part, resolved
from .tables import Shown, Table, counted

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

R = TypeVar("R", bound="DataclassInstance")


@contextmanager
def place_of(out: Path, dry_run: bool) -> Iterator[Path]:
    """OUT, or a file of its name in a temporary directory beside it, on the disk that a real run needs."""
    if not dry_run:
        yield out
        return
    with tempfile.TemporaryDirectory(prefix=".lora-fx.", dir=existing_part(resolved(out).parent)) as folder:
        yield Path(folder) / out.name


def report_at(report: R, out: Path) -> R:
    """The report of a file as if it were at OUT."""
    places = {"path": str(out)}
    if getattr(report, "data_path", None) is not None:
        places["data_path"] = f"{out}.data"
    return dataclasses.replace(report, **places)


@dataclass(frozen=True)
class PlannedFold(Shown):
    """What `fold --base` would do. Prints as a table.

    Attributes:
        out: the directory that it would write.
        shards: files that it would write.
        bytes_needed: on the disk of `out`, beside what is there.
        tensors: (tensor, the module that the adapter names, type, shape, file) of each that changes.
        notes: what the caller should know.
    """

    out: str
    shards: int
    bytes_needed: int
    tensors: tuple[tuple[str, str, str, tuple[int, ...], str], ...]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return dataclasses.asdict(self)

    def blocks(self) -> list[str | Table]:
        """A row for each tensor, and notes."""
        head = (
            f"{self.out}: {counted(len(self.tensors), 'tensor')} would change, {counted(self.shards, 'shard')} be "
            f"written, which takes {self.bytes_needed / 1e6:,.1f} MB of disk"
        )
        rows = [(*names, kind, str(list(shape)), file) for *names, kind, shape, file in self.tensors]
        return [head, Table(("tensor", "adapter's", "type", "shape", "file"), rows), *self.notes]


def plan_checkpoint_fold(base: Path, adapter: Path, out: Path | None, integrity: Integrity) -> PlannedFold:
    """What folding files would change, from headers and the adapter alone; OUT None: in place.

    Raises:
        AdapterError, FoldError: as `fold_checkpoint`.
    """
    from .adapter_arrays import map_adapter
    from .checkpoint_plan import check_base_note, plan_fold
    from .errors import FoldError
    from .hf_checkpoint import read_checkpoint

    checkpoint = read_checkpoint(base, FoldError)
    arrays, let_go = map_adapter(adapter, integrity=integrity)
    plan = plan_fold(checkpoint, arrays, let_go)
    check_base_note(plan, arrays)
    changed = {change.source.path for change in plan.changes}
    written = [shard.path for shard in checkpoint.shards if out is not None or shard.path in changed]
    sizes = [path.stat().st_size for path in written]
    rows = [(c.name, c.path, c.source.kind, tuple(c.source.shape), c.source.path.name) for c in plan.changes]
    needed = sum(sizes) if out is not None else max(sizes, default=0)
    return PlannedFold(str(base if out is None else out), len(written), needed, tuple(rows), plan.notes)

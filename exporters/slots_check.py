"""Whether a file with places for adapters keeps its base, and gives each row its own adapter: found by running it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnxruntime as ort

from lora_fx import ExportError

from .lora_slots import Slots
from .made_up_inputs import made_up
from .onnx_weights import Array
from .sessions import open_session, silent_run
from .text import reason, some

Feed = Mapping[str, Array]

# Of max |y|: sums that are right may differ by so much in a batch of another make-up.
_SINGLE, _HALF = 64 * float(np.finfo(np.float32).eps), 8 * float(np.finfo(np.float16).eps)


def check_base(
    wanted: Sequence[Array], got: Sequence[Array], when: str, slots: Slots, *, is_fused: bool = False
) -> None:
    """The base's bits; within its rounding in float16, in which the CPU's kernels round where the graph has room to.

    Args:
        is_fused: the base may be one whose ops ONNX Runtime fuses, and no longer with LoRA between them: within
            rounding as well.

    Raises:
        ExportError: if they are not.
    """
    for a, b in zip(wanted, got, strict=True):
        if np.array_equal(a, b, equal_nan=a.dtype.kind == "f"):
            continue
        if not (_is_half(slots) and _near(a, b, _HALF)) and not (is_fused and _near(a, b, _SINGLE)):
            raise ExportError(
                f"{when} the file does not compute the base's bits, so nothing was written; check=False writes it all "
                "the same, to look into it"
            )


def check_rows(
    session: ort.InferenceSession, base: Sequence[Array], feed: Feed, slots: Slots, *, is_fused: bool = False
) -> None:
    """With numbers of 0 the base's bits, and in a batch of all adapters each row as in a batch of its adapter alone.

    A model that puts something else than the batch in front (nn.MultiheadAttention does, inside) would give rows each
    other's adapters.

    Args:
        base: what the base has for these inputs.
        is_fused: see `check_base`.

    Raises:
        ExportError: if not.
    """
    assert slots.ids is not None
    count = rows_of(feed)
    chosen = np.arange(count, dtype=np.int64)[::-1] % (len(slots.adapters) + 1)
    alone = {
        int(n): session.run(None, {**feed, slots.ids: np.full(count, n)}, silent_run()) for n in {0, *chosen.tolist()}
    }
    check_base(base, alone[0], f"with {slots.ids} of 0", slots, is_fused=is_fused)
    share = _HALF if _is_half(slots) else _SINGLE
    for i, output in enumerate(session.run(None, {**feed, slots.ids: chosen}, silent_run())):
        if output.ndim == 0 or len(output) != count:
            raise ExportError(
                f"output {i} has the shape {list(output.shape)} for {count} rows: it mixes rows, which adapters of "
                "their own would be mixed in, too; use export_onnx_adapters or add_adapter_inputs, or fold"
            )
        for row, number in enumerate(chosen.tolist()):
            if not _near(alone[number][i][row], output[row], share if output.dtype.kind == "f" else 0.0):
                raise ExportError(
                    f"row {row}, which chose adapter {number}, has another result in a batch with others than alone: "
                    "the model mixes rows, or has something else than the batch in front of a linear (as "
                    "nn.MultiheadAttention does); use export_onnx_adapters or add_adapter_inputs, or fold"
                )


def check_rows_of_file(file: Path, slots: Slots, base: Path, inputs: Sequence[Feed] | None) -> None:
    """`check_rows` on a file, against the one that it was made of.

    Args:
        inputs: some for the base; None makes them up. If the base has adapters itself, they are told to be 0.

    Raises:
        ExportError: if a row would get another's adapter, or it cannot be told, since the file does not run with these.
    """
    assert slots.ids is not None
    session, plain = open_session(file, "cpu"), open_session(base, "cpu")
    has_ids = any(port.name == slots.ids for port in plain.get_inputs())
    for given in inputs if inputs is not None else [made_up(session, 3, 5)]:
        feed = {name: array for name, array in given.items() if name != slots.ids}
        zero = {slots.ids: np.zeros(rows_of(feed), np.int64)} if has_ids else {}
        try:
            wanted = plain.run(None, feed | zero, silent_run())
        except Exception as error:
            raise ExportError(
                f"whether rows get their own adapters is not known, since {base.name} does not run with inputs that "
                f"were {'given' if inputs is not None else 'made up'}: {reason(error)}. Pass inputs=[{{name: array}}], "
                "or check=False"
            ) from error
        try:
            check_rows(session, wanted, feed, slots, is_fused=True)
        except ExportError:
            raise
        except Exception as error:
            raise ExportError(
                f"the file with adapters does not run, so nothing was written: {reason(error)}"
            ) from error


def rows_of(feed: Feed) -> int:
    """How many rows a batch has.

    Raises:
        ExportError: if its inputs do not agree on that.
    """
    sizes = {len(array) for array in feed.values() if array.ndim}
    if len(sizes) != 1:
        raise ExportError(
            f"the inputs begin with {some(map(str, sorted(sizes)))} rows; for adapter_ids all of them have the batch "
            "in front"
        )
    return sizes.pop()


def _is_half(slots: Slots) -> bool:
    return any(slot.dtype == "FLOAT16" for slot in slots.slots)


def _near(a: Array, b: Array, share: float) -> bool:
    """Whether the largest difference is that share of the largest value, at most."""
    if np.array_equal(a, b, equal_nan=a.dtype.kind == "f"):
        return True
    difference = np.abs(a.astype(np.float64) - b).max(initial=0)
    return bool(difference <= share * np.abs(a.astype(np.float64)).max(initial=0))

"""Writing an ONNX file so that there is always a whole one: the old, or the new and checked one."""

from __future__ import annotations

import contextlib
import functools
import glob
import inspect
import itertools
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ParamSpec, TypeVar

import onnx
import onnx_ir as ir

from lora_fx import ExportError, LoraFxError
from lora_fx.atomic import exchange, sync_directory, temporary_beside, write_through

from .external_data import DATA_HASH_KEY, check_external_data, data_locations, sha256
from .paths import path_of
from .sessions import check_opens
from .streamed_weights import write_pending
from .text import reason

P = ParamSpec("P")
T = TypeVar("T")
AUTOMATIC_EXTERNAL_BYTES = 3 * 2**29  # 1.5 GiB
_LARGE = 2**30  # 1 GiB
PROTOBUF_BYTES = 2**31 - 2**26  # 2 GiB less room for the graph itself


@dataclass(frozen=True)
class Written:
    """Files in a temporary directory, checked by nobody yet."""

    model: Path
    data: Path | None

    @property
    def size(self) -> int:
        """Bytes of both."""
        return sum(file.stat().st_size for file in (self.model, self.data) if file is not None and file.exists())


def checked_target(path: str | os.PathLike[str]) -> Path:
    """Where to write, with links resolved.

    Raises:
        ExportError: if nothing can be written there. Better now than after a long export.
    """
    target = Path(os.path.realpath(path_of(path)))
    if os.path.isdir(target):  # not Path.is_dir, which raises for a name that is too long
        raise ExportError(f"{path} is a directory; name a file in it, such as {target / 'model.onnx'}")
    if not os.path.isdir(target.parent):
        raise ExportError(
            f"cannot write {path}: the directory {target.parent} does not exist; make it first "
            f"(mkdir -p {target.parent})"
        )
    with _temporary_directory(target) as directory:
        try:
            (directory / target.name).touch()
        except OSError as error:
            raise ExportError(f"cannot write {target} ({error.strerror}); choose another name") from error
    return target


@contextlib.contextmanager
def _temporary_directory(target: Path) -> Iterator[Path]:
    """`temporary_beside`, whose errors are ours."""
    with contextlib.ExitStack() as stack:
        try:
            directory = stack.enter_context(temporary_beside(target))
        except OSError as error:
            raise ExportError(
                f"cannot write into {target.parent} ({error.strerror}); choose another directory or mend its "
                "permissions"
            ) from error
        yield directory


def is_external(model: ir.Model, wanted: bool | None) -> bool:
    """Whether weights go into a file of their own.

    Raises:
        ExportError: if the caller wants one file and protobuf cannot hold that much.
    """
    size = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None)
    if wanted is False and size > PROTOBUF_BYTES:
        raise ExportError(
            f"external_data=False, but the weights take {size / 2**30:.2f} GiB and one protobuf file holds at most "
            f"{PROTOBUF_BYTES / 2**30:.2f} GiB; leave external_data=None"
        )
    return size > AUTOMATIC_EXTERNAL_BYTES if wanted is None else wanted


@contextlib.contextmanager
def written(model: ir.Model, target: Path, *, external: bool) -> Iterator[Written]:
    """The model in files beside `target`, for checking; they move to `target` if the block succeeds.

    Raises:
        ExportError: if the file system refuses. Files that were at `target` are then as they were.
    """
    with _temporary_directory(target) as directory:
        files = Written(directory / target.name, directory / f"{target.name}.data" if external else None)
        if files.data is not None:
            _check_data_place(target)
        try:
            save_files(model, files)
        except LoraFxError:  # of a weight that is computed while it is written
            raise
        except Exception as error:  # of the file system, or of onnx_ir, if what it read was damaged
            why = error.strerror if isinstance(error, OSError) and error.strerror else reason(error)
            raise ExportError(f"cannot write {target} ({why}); {_room(target)}") from error
        yield files
        stale = None if external else _own_data_of(target)
        try:
            _commit(files, target)
        except OSError as error:
            raise ExportError(f"cannot replace {target} ({error.strerror}); the old file is as it was") from error
        if stale is not None:
            stale.unlink(missing_ok=True)


def _check_data_place(target: Path) -> None:
    """Whether the weights' file is this model's to write: it may be that of an .onnx which was renamed."""
    data = _data_of(target)
    if os.path.isdir(data):
        raise ExportError(f"cannot write the weights to {data}: it is a directory; move it, or choose another name")
    if os.path.isfile(data) and data.name not in _named_by(target) and not _passings(target):
        raise ExportError(
            f"{data} exists, and is not named by {target.name}: it may be the weights of an .onnx file that was "
            "renamed. Remove it if it is not, or choose another name"
        )


def _data_of(target: Path) -> Path:
    return target.with_name(f"{target.name}.data")


def _named_by(target: Path) -> list[str]:
    """The files of weights that the graph at `target` names, if there is one."""
    with contextlib.suppress(Exception):
        return data_locations(onnx.load(target, load_external_data=False))
    return []


def save_files(model: ir.Model, files: Written) -> None:
    """Write the model into the temporary files, in place of what is there."""
    model.metadata_props.pop(DATA_HASH_KEY, None)  # a file that is written anew has weights of its own
    if files.data is None:
        ir.save(model, files.model)
    else:
        # The graph names its weights' hash, so the weights are written first, and the graph once more.
        ir.save(model, files.model, external_data=files.data.name)
        write_pending((value.const_value for value in model.graph.initializers.values()), files.data)
        proto = onnx.load(files.model, load_external_data=False)
        if files.data.exists():
            entry = proto.metadata_props.add()
            entry.key, entry.value = DATA_HASH_KEY, sha256(files.data)
        files.model.write_bytes(proto.SerializeToString())
    umask = os.umask(0)
    os.umask(umask)
    for path in (files.model, files.data):
        if path is not None and path.exists():
            os.chmod(path, 0o666 & ~umask)
            write_through(path)


def _commit(files: Written, target: Path) -> None:
    """Put both files in place so that a kill at any moment leaves a graph with its own weights, the old or the new.

    The name of the weights' file stands in the graph, and two files cannot be replaced at once. So where there is an
    old graph of that name, the new weights come in under a name of their own, with a graph that names that one, and
    get the right name afterwards.
    """
    if files.data is None or not files.data.exists():
        os.replace(files.model, target)
        sync_directory(target.parent)
        return
    passing = _passing(target)
    left = [path for path in _passings(target) if path != passing]
    try:
        if _data_of(target).name in _named_by(target):
            _replace_both(files.model, files.data, target, passing)
        else:
            passing.touch()  # says whose the weights are, until there is a graph that does
            os.replace(files.data, _data_of(target))
            try:
                os.replace(files.model, target)
            except BaseException:
                _data_of(target).unlink()
                raise
            sync_directory(target.parent)
    finally:
        for path in (passing, *left):
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)


def _replace_both(model: Path, weights: Path, target: Path, passing: Path) -> None:
    data = _data_of(target)
    meanwhile, old = model.with_name("meanwhile"), model.with_name("old.onnx")
    meanwhile.write_bytes(_with_data_at(model, passing.name))
    shutil.copymode(model, meanwhile)
    write_through(meanwhile)
    os.link(target, old)
    is_exchanged = False
    try:
        os.replace(weights, passing)
        os.replace(meanwhile, target)
        sync_directory(target.parent)
        _duplicate(passing, weights)
        is_exchanged = exchange(weights, data)
        if not is_exchanged:
            os.replace(weights, data)
        os.replace(model, target)
        sync_directory(target.parent)
    except BaseException:
        if is_exchanged:
            os.replace(weights, data)
        os.replace(old, target)
        raise


def _duplicate(source: Path, target: Path) -> None:
    """A copy; of what is large, a second name, with which onnx's own loader does not read it until one is gone."""
    if source.stat().st_size > _LARGE:
        os.link(source, target)
    else:
        shutil.copyfile(source, target)
        shutil.copymode(source, target)
        write_through(target)


def _passing(target: Path) -> Path:
    """The name that new weights have for a moment."""
    return target.with_name(f".{target.name}.data-{os.getpid()}")


def _passings(target: Path) -> list[Path]:
    return list(target.parent.glob(f".{glob.escape(target.name)}.data-*"))


def _with_data_at(file: Path, name: str) -> bytes:
    proto = onnx.load(file, load_external_data=False)
    for tensor in proto.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = name
    return bytes(proto.SerializeToString())


def _own_data_of(target: Path) -> Path | None:
    """The data file of the file that is about to be replaced, if we wrote it: nothing will name it any more."""
    data = _data_of(target)
    if not (os.path.isfile(target) and os.path.isfile(data)):
        return None
    with contextlib.suppress(Exception):
        old = onnx.load(target, load_external_data=False)
        if any(prop.key == DATA_HASH_KEY for prop in old.metadata_props) and data.name in data_locations(old):
            return data
    return None


def _room(target: Path) -> str:
    with contextlib.suppress(OSError):
        return f"{shutil.disk_usage(target.parent).free / 2**30:.1f} GiB are free there, and the old file is as it was"
    return "the old file is as it was"


def open_model(file: Path) -> ir.Model:
    """The graph in a file; weights beside it are read when they are needed.

    Raises:
        ExportError: if it is no ONNX file, or its weights are not those it was written with.
    """
    try:
        model = ir.load(file)
        _check_readable(model, file)
    except Exception as error:
        raise ExportError(f"{file} cannot be read as an ONNX file: {reason(error)}; export it again") from error
    if DATA_HASH_KEY in model.metadata_props:
        check_external_data(file, onnx.load(file, load_external_data=False))
    return model


def says_damaged(function: Callable[P, T]) -> Callable[P, T]:
    """For functions of a file: what onnx_ir and numpy raise in the middle of it means that the file is damaged.

    A graph may be read whole, and turn out to hold a weight of fewer numbers than its shape says, or an attribute of
    another type, when that is looked at.
    """

    signature = inspect.signature(function)

    @functools.wraps(function)
    def told(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            signature.bind(*args, **kwargs)
        except TypeError as error:  # a call that is wrong is no file that is damaged
            raise TypeError(f"{function.__name__}(): {error}") from None
        try:
            return function(*args, **kwargs)
        except LoraFxError:
            raise
        except (ir.serde.SerdeError, ValueError, TypeError, AssertionError, KeyError, IndexError) as error:
            file = next((str(each) for each in (*args, *kwargs.values()) if isinstance(each, str | os.PathLike)), "it")
            raise ExportError(
                f"{file} cannot be worked on, since something in it is not what it says: {reason(error)}. It is "
                "damaged, or not an ONNX file that any checker passes; export it again"
            ) from error

    return told


def _check_readable(model: ir.Model, file: Path) -> None:
    """What onnx_ir finds out only when something is read, or does not mind.

    Raises:
        ValueError, OSError: with what is wrong.
    """
    if not 3 <= model.ir_version <= onnx.IR_VERSION:
        raise ValueError(
            f"its IR version is {model.ir_version}, and onnx {onnx.__version__} knows 3 to {onnx.IR_VERSION}"
        )
    for node in model.graph.all_nodes():
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.UNDEFINED:
                raise ValueError(f"the attribute {attribute.name!r} of {node.name!r} has no type")
    place = file.parent.resolve()
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if not isinstance(tensor, ir.ExternalTensor):
            continue
        path = Path(tensor.path)
        if Path(tensor.location).is_absolute() or not path.resolve().is_relative_to(place):
            raise ValueError(f"the weight {name!r} is in {tensor.location!r}, which is not beside the file")
        if not os.path.isfile(path):
            what = "is no file" if path.exists() else "does not exist"
            raise FileNotFoundError(f"its weights are in {tensor.location!r}, which {what}")
        offset, length = tensor.offset or 0, tensor.nbytes if tensor.length is None else tensor.length
        if length != tensor.nbytes or offset < 0 or offset + length > path.stat().st_size:
            raise ValueError(
                f"the weight {name!r} takes {tensor.nbytes} bytes, and its place in {tensor.location!r} is {length} "
                f"bytes at {offset}; the file has {path.stat().st_size}"
            )


def has_external_data(model: ir.Model) -> bool:
    """Whether weights are in a file beside the graph's."""
    return any(True for _ in external_tensors(model))


def external_tensors(model: ir.Model) -> Iterator[tuple[ir.Value, ir.ExternalTensor]]:
    """The initializers of all its graphs, those inside of its nodes too, whose values are in a file beside it."""
    inner = (graph for function in model.functions.values() for graph in function.subgraphs())
    for graph in itertools.chain(model.graphs(), inner):
        for value in graph.initializers.values():
            if isinstance(value.const_value, ir.ExternalTensor):
                yield value, value.const_value


def save_graph(graph: bytes, target: Path, like: Path) -> None:
    """Replace the graph's file alone, in one step; weights beside it stay where they are.

    Args:
        like: the file whose permissions it gets.
    """
    with _temporary_directory(target) as directory:
        new = directory / target.name
        new.write_bytes(graph)
        shutil.copymode(like, new)
        write_through(new)
        os.replace(new, target)
    sync_directory(target.parent)


def graph_bytes(model: ir.Model) -> bytes:
    """What `save_graph` writes.

    Raises:
        ExportError: if the graph cannot be written down: the file that it was read from was damaged.
    """
    try:
        return bytes(ir.to_proto(model).SerializeToString())
    except Exception as error:
        raise ExportError(f"the graph cannot be written: {reason(error)}; its file is damaged, export it again") from (
            error
        )


def check_apart(base: Path, model: ir.Model, target: Path, *, may_replace: bool = False) -> None:
    """Whether writing `target` leaves the base as it is: its graph, and the file that its weights are in.

    Args:
        may_replace: the target may be the base itself.

    Raises:
        ExportError: if not. An .onnx file may be renamed, its weights' file may not, since the graph names it.
    """
    if target.exists() and target.samefile(base):
        if may_replace:
            return
        raise ExportError(f"{target.name} would replace the base, which is needed still; name another file to write")
    used = {Path(tensor.path) for _, tensor in external_tensors(model)}
    for written_file in (target, _data_of(target)):
        if written_file.exists() and any(written_file.samefile(path) for path in used):
            raise ExportError(
                f"{written_file.name} holds the weights of {base.name}, and writing {target.name} would replace them; "
                "name another file to write"
            )


def check_derived(path: Path, base: Path, *, full: bool = True) -> None:
    """`check_file` on a file that was made of another; what the checker has against both is not ours.

    onnxruntime-genai's files, for one, have ops that onnx does not know; they are opened in ONNX Runtime instead.

    Raises:
        ExportError: if the new file does not pass, and its base does; or neither does, and it does not open.
    """
    try:
        check_file(path, full=full)
    except ExportError:
        try:
            onnx.checker.check_model(os.fspath(base), full_check=full)
        except Exception:
            check_opens(path)
            return
        raise


def check_file(path: Path, *, full: bool = True) -> None:
    """onnx's own checker, with shape inference if `full`.

    Raises:
        ExportError: with the checker's first line.
    """
    try:
        onnx.checker.check_model(os.fspath(path), full_check=full)
    except Exception as error:
        raise ExportError(
            f"the exported file does not pass onnx's checker, nothing was kept: {reason(error)}"
        ) from error

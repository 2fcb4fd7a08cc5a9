"""One memory for all that an adapter trains: A and B of a group are one matrix, and all of them one vector.

`inject` lays them out, while no other graph can share them. `optimize` takes A of several linears as one matrix, and
`flat_parameters` gives the optimizer one parameter in place of hundreds. Both look at how the tensors lie before they
assume it, so whoever moves a tensor loses speed and nothing else.

Each parameter has a storage of its own in that memory, which ends where the parameter does. Who writes files goes by
storages: safetensors' save_model refuses parameters that have one together, accelerate's drops all but the first, and
torch.save would write all of it for each.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.utils.dlpack
from torch import fx, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from .attributes import holds_values
from .errors import GraphError
from .tensor_reads import read

# What a storage calls the tensor whose memory it is a part of.
_WHOLE = "_lora_fx_whole"


def lay_out(parameters: Iterable[nn.Parameter]) -> None:
    """Move parameters that nobody else shares into one memory per dtype and device, in the order given."""
    kinds: dict[tuple[torch.dtype, torch.device], dict[int, nn.Parameter]] = {}
    for parameter in parameters:
        is_plain = type(parameter) is nn.Parameter and holds_values(parameter)
        if is_plain and parameter.is_contiguous() and (parameter.is_cuda or not parameter.is_shared()):  # type: ignore[no-untyped-call]
            kinds.setdefault((parameter.dtype, parameter.device), {})[id(parameter)] = parameter
    for members in (list(each.values()) for each in kinds.values()):
        if joined(members) is None:
            flat = torch.cat([member.detach().reshape(-1) for member in members])
            for member, part in zip(members, torch.split(flat, [m.numel() for m in members]), strict=True):
                member.data = _with_own_storage(part, flat).view(member.shape)


def _with_own_storage(part: torch.Tensor, flat: torch.Tensor) -> torch.Tensor:
    """The part as a tensor whose storage is that part of the memory, and remembers all of it."""
    try:
        own = torch.utils.dlpack.from_dlpack(part)
    except (BufferError, RuntimeError, TypeError):  # a device without DLPack
        return part
    if own.data_ptr() != part.data_ptr():
        return part
    setattr(own.untyped_storage(), _WHOLE, flat)
    return own


def joined(tensors: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """The memory of tensors that lie one behind the other, as one vector without a copy; None if they do not."""
    first, last = tensors[0], tensors[-1]
    if not holds_values(first):
        return None
    at = first.data_ptr()
    for tensor in tensors:
        if tensor.data_ptr() != at or tensor.dtype != first.dtype or not tensor.is_contiguous():
            return None
        at += tensor.nbytes
    whole = _whole_of(first)
    storage = whole.untyped_storage()
    end = storage.data_ptr() + storage.nbytes()
    is_inside = storage.data_ptr() <= first.data_ptr() and at <= end  # a storage may be moved, as share_memory_() does
    if not is_inside or _whole_of(last).untyped_storage().data_ptr() != storage.data_ptr():
        return None  # neighbours by chance
    size = first.element_size()
    start = (first.data_ptr() - storage.data_ptr()) // size
    return whole.detach().as_strided(((at - first.data_ptr()) // size,), (1,), start)


class Joined:
    """`joined` of the same tensors again and again: one look at where each lies tells that nothing has changed.

    That holds for memory of `lay_out`'s, which it keeps, so that nothing else can come to lie there. Memory of others
    may be freed and given to somebody else with a view of it still around, as FSDP does: there it looks each time.
    """

    __slots__ = ("_found",)

    def __init__(self) -> None:
        self._found: tuple[torch.Tensor, int, list[tuple[int, torch.Size, torch.dtype]]] | None = None

    def __call__(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor | None:
        """The memory of the tensors as one vector, or None."""
        if not holds_values(tensors[0]):
            return None
        found = self._found
        if found is not None and found[1] == len(tensors):
            for tensor, (place, shape, dtype) in zip(tensors, found[2], strict=True):
                is_there = tensor.data_ptr() == place and tensor.shape == shape and tensor.dtype == dtype
                if not is_there or not tensor.is_contiguous():
                    break
            else:
                return found[0]
        vector = joined(tensors)
        self._found = None
        if vector is not None and _whole_of(tensors[0]) is not tensors[0]:
            self._found = vector, len(tensors), [(t.data_ptr(), t.shape, t.dtype) for t in tensors]
        return vector

    def stacked(self, matrices: Sequence[torch.Tensor]) -> torch.Tensor:
        """Matrices of as many columns one below the other: their memory, or a copy."""
        vector = self(matrices)
        return torch.cat([*matrices]) if vector is None else vector.view(-1, matrices[0].shape[1])


def _whole_of(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor that all of a memory is, if `lay_out` gave the tensor a part of one; the tensor itself otherwise."""
    whole: torch.Tensor = getattr(tensor.untyped_storage(), _WHOLE, tensor)
    return whole


def not_compiled() -> None:
    """Let torch.compile run what reads a gradient that is computed when it is read as it is written.

    It would take the gradient that it meets first for one that lies there, and go on training with that.
    """
    if torch._guards.TracingContext.try_get() is not None:
        from torch._dynamo.exc import SkipFrame

        raise SkipFrame(
            "gradients of lora_fx's flat parameters, and of parts of stacks, are computed when they are read"
        )


NO_HOOKS = (
    "hooks of this parameter would never run, since no gradient flows through it: it only stands for others in an "
    "optimizer; register them on {}"
)


class FlatParameter(nn.Parameter):
    """Several parameters as one vector, for an optimizer: it shares their memory, and its gradient is theirs.

    Made by `flat_parameters`. Where a member's gradient is None, so is this one's, or else GraphError is raised: an
    optimizer leaves alone what has no gradient, which it cannot do with a part of a vector.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    members: tuple[nn.Parameter, ...]
    _gm: weakref.ref[fx.GraphModule]
    _names: tuple[str, ...]
    _sizes: tuple[int, ...]
    _vector: torch.Tensor | None  # of gradients, as it was gathered last,
    _parts: tuple[torch.Tensor, ...]  # and its parts, which the members were given

    @staticmethod
    def over(members: Sequence[nn.Parameter], names: Sequence[str], gm: fx.GraphModule) -> FlatParameter:
        """One parameter over parameters of `gm` that lie one behind the other."""
        vector = joined(members)
        assert vector is not None
        flat: FlatParameter = torch.Tensor._make_subclass(FlatParameter, vector, True)
        flat.members, flat._names, flat._gm = tuple(members), tuple(names), weakref.ref(gm)
        flat._vector, flat._parts, flat._sizes = None, (), tuple(member.nbytes for member in members)
        return flat

    @property
    def grad(self) -> torch.Tensor | None:
        """The members' gradients as one vector, of which theirs are parts from then on.

        Raises:
            GraphError: if members were moved or exchanged since, or only some of them have a gradient.
        """
        not_compiled()
        self._check_members()
        if not self.requires_grad:
            return None
        gradients = [member.grad for member in self.members]
        if self._vector is not None and self._are_parts_of(self._vector, gradients):
            return self._vector
        found = [gradient for gradient in gradients if gradient is not None]
        if not found:
            return None
        if len(found) < len(gradients):
            name = self._names[gradients.index(None)]
            raise GraphError(
                f"{name!r} has no gradient, while {len(found)} of {len(gradients)} have: optimizers leave such "
                "parameters alone, which they cannot do with a part of a flat one. Give the optimizer "
                "lora_fx.lora_parameters(gm) instead, or flat_parameters(gm, adapter_name) of the adapter that trains"
            )
        vector = torch.cat([gradient.reshape(-1) for gradient in found])
        self._share_out(vector)
        return vector

    @grad.setter
    def grad(self, value: torch.Tensor | None) -> None:
        if value is not None:
            return self._share_out(value)
        self._vector, self._parts = None, ()
        for member in self.members:
            member.grad = None

    @grad.deleter
    def grad(self) -> None:
        self.grad = None

    def _are_parts_of(self, vector: torch.Tensor, gradients: list[torch.Tensor | None]) -> bool:
        """Whether the members still have the parts that they were given, where these were."""
        at = vector.data_ptr()
        for gradient, part, size in zip(gradients, self._parts, self._sizes, strict=False):
            if gradient is not part or gradient.data_ptr() != at:
                return False
            at += size
        return len(self._parts) == len(gradients)

    def register_hook(self, hook: Any) -> Any:
        """Refused, as no gradient flows through here.

        Raises:
            GraphError: always.
        """
        raise GraphError(NO_HOOKS.format("lora_fx.lora_parameters(gm)"))

    register_post_accumulate_grad_hook = register_hook

    def _share_out(self, vector: torch.Tensor) -> None:
        self._vector = vector
        self._parts = torch._utils._unflatten_dense_tensors(vector, self.members)  # type: ignore[no-untyped-call]
        for member, part in zip(self.members, self._parts, strict=True):
            member.grad = part

    def _check_members(self) -> None:
        gm, at = self._gm(), self.data_ptr()
        try:
            found = self.members if gm is None else read(gm, self._names)
        except AttributeError:  # the adapter was deleted
            found = [None] * len(self.members)
        for name, member, own, size in zip(self._names, self.members, found, self._sizes, strict=True):
            if own is not member or member.data_ptr() != at:
                raise GraphError(
                    f"{name!r} was moved, exchanged or deleted since flat_parameters(gm) was called (by .to(), "
                    "load_state_dict(assign=True) or the like), so the optimizer would train what nobody reads. Call "
                    "lora_fx.flat_parameters(gm) again, and make the optimizer anew"
                )
            at += size

    def __deepcopy__(self, memo: dict[int, Any]) -> FlatParameter:
        raise GraphError("a flat parameter is not copied; call lora_fx.flat_parameters on the copy of the graph")

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise GraphError("a flat parameter is not pickled; save the adapter, and optimizer.state_dict()")


def flatten(named: dict[str, nn.Parameter], gm: fx.GraphModule) -> list[nn.Parameter]:
    """The parameters, with one FlatParameter in place of each run that lies in one memory."""
    order = {id(parameter): _whole_of(parameter).untyped_storage().data_ptr() for parameter in named.values()}
    storages = dict.fromkeys(order.values())
    rank = {storage: number for number, storage in enumerate(storages)}
    ordered = sorted(named.items(), key=lambda item: (rank[order[id(item[1])]], item[1].data_ptr()))
    runs: list[list[tuple[str, nn.Parameter]]] = []
    for name, parameter in ordered:
        if runs and _can_join(runs[-1][-1][1], parameter):
            runs[-1].append((name, parameter))
        else:
            runs.append([(name, parameter)])
    watch_optimizers()
    return [
        run[0][1] if len(run) == 1 else FlatParameter.over([p for _, p in run], [n for n, _ in run], gm) for run in runs
    ]


def _can_join(before: nn.Parameter, parameter: nn.Parameter) -> bool:
    is_plain = all(type(p) is nn.Parameter and p.requires_grad for p in (before, parameter))
    return is_plain and joined([before, parameter]) is not None


def watch_optimizers() -> None:
    """From the first call on, tell autograd what an optimizer's step writes beside its own parameters."""
    if not _watching:
        _watching.append(register_optimizer_step_post_hook(_count_versions))


_watching: list[Any] = []


def _count_versions(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """A step wrote the members, too: autograd has to know, or it would differentiate with values that are gone."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            members = getattr(parameter, "members", ()) if type(parameter) is not nn.Parameter else ()
            if members:
                torch.autograd.graph.increment_version(members)

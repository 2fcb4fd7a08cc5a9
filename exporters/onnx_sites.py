"""Where an ONNX graph applies a stored weight, what that weight is called, and which way round it lies.

Every exporter spells this its own way: names that are the model's, names lost to an optimizer that left a note, node
names with the module's path, packed projections. All of it ends here; what comes after sees `OnnxSite`s.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from lora_fx import ExportError

from .onnx_weights import MANIFEST_KEY, StoredWeight, read_manifest, read_shared_modules

SCOPES_KEY = "pkg.torch.onnx.name_scopes"
_FOLDED_FROM = "pkg.onnxscript.optimizer.folded_from"
# A name that an exporter made up says nothing.
_TURNED = re.compile(r"^onnx::(MatMul|Gemm)_[0-9]+$")
_MADE_UP = re.compile(r"^(val_|onnx::|node_|_?[0-9]+$|[A-Za-z]+_[0-9]+$)")
# What onnxruntime.quantization and others append to the name of a weight that they quantize.
_QUANTIZED = re.compile(r"(_Q[48]|_quantized)$")
# What onnxruntime-genai's builder calls differently from transformers, and what it packs.
_PACKED = {"qkv_proj": ("q_proj", "k_proj", "v_proj")}

# Values pass through these on their way from the initializer to the op; a Transpose turns them.
_CARRIERS = {"Cast", "Concat", "Identity", "Split", "Transpose"}


@dataclass(frozen=True)
class Form:
    """How a weight lies.

    Attributes:
        kind: "matrix" of an op that multiplies, "lookup" of one that takes rows, "kernel" of a convolution.
        stored_in_out: a matrix is stored (in, out); lookups, (vocabulary, dim), are.
        groups: of a convolution.
        is_transposed: a kernel is a transposed convolution's.
    """

    kind: str
    stored_in_out: bool = False
    groups: int = 1
    is_transposed: bool = False


@dataclass(frozen=True, eq=False)
class OnnxSite:
    """One place where the graph applies a stored weight.

    Attributes:
        weight: the initializer; the packed one, of a quantized weight.
        node: the op that applies it.
        position: which of the op's inputs it is.
        carrier: the node that reads the initializer: `node` itself, or a Transpose, Cast, ... before it.
        form: how the weight lies in the initializer.
        modules: the names that the module there may go by.
        parameters: the names that the weight may go by.
        packs: the names of the modules whose outputs follow each other in the weight; empty if it is one module's.
        perm: the axes' order, if the initializer is the model's parameter turned: initializer = weight.permute(perm).
    """

    weight: ir.Value
    node: ir.Node
    position: int
    carrier: ir.Node
    form: Form
    modules: tuple[str, ...]
    parameters: tuple[str, ...]
    packs: tuple[tuple[str, ...], ...] = ()
    perm: tuple[int, ...] | None = None

    @property
    def name(self) -> str:
        """What to call it in a message."""
        return next(iter(self.modules), str(self.weight.name))


Mapped = Mapping[str, str | Sequence[str]]


def find_onnx_sites(model: ir.Model, mapping: Mapped | None = None) -> tuple[OnnxSite, ...]:
    """All places where the graph applies an initializer that is a weight.

    Args:
        mapping: {initializer: the name of the module that it is the weight of, or names of modules packed in it};
            it goes before whatever the file says.

    Raises:
        ExportError: if the mapping names what is not in the file.
    """
    mapping = mapping or {}
    unknown = [name for name in mapping if name not in model.graph.initializers]
    if unknown:
        raise ExportError(
            f"mapping names {unknown[0]!r}, which is no initializer of the file; it has "
            f"{', '.join(map(repr, list(model.graph.initializers)[:8]))}, ..."
        )
    recorded = recorded_weights(model)
    shared = read_shared_modules(model.metadata_props)
    sites: list[OnnxSite] = []
    for value in model.graph.initializers.values():
        if value.const_value is None or len(value.const_value.shape) < 2:
            continue
        name = str(value.name)
        for node, position, carrier, turned in _applications(value):
            form = _form(node, position, turned)
            if form is None:
                continue
            modules, parameters, packs = _names(value, node, recorded.get(name), mapping.get(name), shared)
            perm = permutation(value, recorded.get(name))
            sites.append(OnnxSite(value, node, position, carrier, form, modules, parameters, packs, perm))
    return tuple(sites)


def recorded_weights(model: ir.Model) -> dict[str, StoredWeight]:
    """The file's manifest, if it has one; weights that a tool has quantized since are there under their new names."""
    if MANIFEST_KEY not in model.metadata_props:
        return {}
    recorded = read_manifest(model.metadata_props)
    for name, value in model.graph.initializers.items():
        weight = recorded.get(_QUANTIZED.sub("", name))
        if name in recorded or weight is None or not any(node.op_type == "MatMulNBits" for node, _ in value.uses()):
            continue
        # What MatMul takes as (in, out), MatMulNBits takes as (out, in).
        perm = None if weight.perm is not None else (1, 0)
        recorded[name] = dataclasses.replace(weight, name=name, layout="quantized", perm=perm)
    return recorded


def module_of_weight(parameter: str) -> str:
    """The module that a parameter is the weight of; the parameter's own name if it is none's."""
    return "" if parameter == "weight" else parameter.removesuffix(".weight")


def parameter_names(value: ir.Value, recorded: StoredWeight | None) -> list[str]:
    """The full names in the model of the parameter that an initializer holds, as far as the file tells."""
    if recorded is not None:
        return [] if recorded.layout == "computed" else [recorded.fqn, *recorded.aliases]
    noted = value.metadata_props.get(_FOLDED_FROM)
    if noted is not None:
        with contextlib.suppress(ValueError, SyntaxError):
            names = ast.literal_eval(noted)
            if isinstance(names, list) and len(names) == 1:
                return [str(names[0])]
        return []
    name = str(value.name)
    if _MADE_UP.match(name):
        return []
    name = _QUANTIZED.sub("", name)
    return [re.sub(r"\.(MatMul|Gemm|Gather)\.weight$", ".weight", name)]


def permutation(value: ir.Value, recorded: StoredWeight | None) -> tuple[int, ...] | None:
    """The axes' order, if the initializer is a parameter turned. Exporters rename what they turn, and only that."""
    if recorded is not None:
        return recorded.perm
    shape = value.const_value.shape if value.const_value is not None else ()
    is_renamed = _FOLDED_FROM in value.metadata_props or _MADE_UP.match(str(value.name))
    return (1, 0) if is_renamed and len(shape) == 2 else None


def _applications(value: ir.Value) -> Iterator[tuple[ir.Node, int, ir.Node, bool]]:
    """(op, which input, first node on the way, whether it is turned on the way), for each path from the initializer."""
    pending = [(node, position, node, False) for node, position in value.uses()]
    while pending:
        node, position, carrier, turned = pending.pop(0)
        if node.op_type not in _CARRIERS or node.domain not in ("", "ai.onnx"):
            yield node, position, carrier, turned
            continue
        if node.op_type == "Transpose":
            perm = node.attributes.get("perm")
            order = list(perm.as_ints()) if perm is not None else None
            if order is not None and sorted(order[-2:]) != [len(order) - 2, len(order) - 1]:
                continue
            turned = turned != (order is None or order[-2:] == [len(order) - 1, len(order) - 2])
        for output in node.outputs:
            pending += [(user, i, carrier, turned) for user, i in output.uses()]


def _form(node: ir.Node, position: int, turned: bool) -> Form | None:
    """How the weight lies that this op takes there; None if it is no weight that LoRA knows."""
    match node.op_type, position:
        case ("MatMul", 1) | ("Attention", 1) | ("QAttention", 1):
            return Form("matrix", stored_in_out=not turned)
        case ("MatMul", 0):
            return Form("matrix", stored_in_out=turned)
        case ("Gemm" | "FusedMatMul" | "FusedGemm", 1):
            return Form("matrix", stored_in_out=_flag(node, "transB") == turned)
        case ("Gemm" | "FusedMatMul" | "FusedGemm", 0):
            return Form("matrix", stored_in_out=_flag(node, "transA") != turned)
        case ("MatMulNBits", 1):
            return Form("matrix")
        case ("Gather", 0):
            axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 0
            return Form("lookup", stored_in_out=True) if axis == int(turned) else None
        case ("Conv" | "FusedConv", 1):
            return Form("kernel", groups=_groups(node))
        case ("ConvTranspose", 1):
            return Form("kernel", groups=_groups(node), is_transposed=True)
        case ("Einsum", _):
            return _einsum_form(node, position, turned)
    return None


def _flag(node: ir.Node, name: str) -> bool:
    return name in node.attributes and bool(node.attributes[name].as_int())


def _groups(node: ir.Node) -> int:
    return node.attributes["group"].as_int() if "group" in node.attributes else 1


def _einsum_form(node: ir.Node, position: int, turned: bool) -> Form | None:
    """A matrix whose one letter is summed over with the other operand, and whose other is in the result."""
    equation = node.attributes["equation"].as_string().replace(" ", "")
    if "->" not in equation:
        return None
    operands, result = equation.split("->")
    letters = operands.split(",")
    if len(letters) != 2 or position > 1 or len(letters[position]) != 2 or "." in letters[position]:
        return None
    own, other = letters[position], letters[1 - position]
    summed = [letter in other and letter not in result for letter in own]
    if sorted(summed) != [False, True]:
        return None
    return Form("matrix", stored_in_out=summed[0] != turned)


def _names(
    value: ir.Value,
    node: ir.Node,
    recorded: StoredWeight | None,
    mapped: str | Sequence[str] | None,
    shared: Mapping[str, str],
) -> tuple[tuple[str, ...], tuple[str, ...], tuple[tuple[str, ...], ...]]:
    """(names of modules, names of the parameter, names of packed modules)."""
    if isinstance(mapped, str):
        return (mapped,), (f"{mapped}.weight",), ()
    if mapped is not None:
        return (), (), tuple((name,) for name in mapped)
    parameters = parameter_names(value, recorded)
    modules = dict.fromkeys(module_of_weight(parameter) for parameter in parameters)
    # A weight that has lost its name was turned, if it is what torch's older exporter makes of a matrix; anything else
    # was computed from more than the module's weight: a batch norm in a convolution, a factor in a matrix.
    by_node = module_of(node) if parameters or _TURNED.match(str(value.name)) else None
    if by_node is not None:
        # A tied weight goes by several names, of which a foreign file has one; the op's own says which module it is
        # that applies it here. A module that holds the weight's own is no other name for it.
        is_other = recorded is None and not any(f"{name}.".startswith(f"{by_node}.") or not by_node for name in modules)
        modules = dict.fromkeys([by_node]) if not modules or by_node in modules or is_other else modules
    own = [*modules, *(shared[name] for name in modules if name in shared)]
    names = tuple(dict.fromkeys(other for name in own for other in _other_spellings(name)))
    last = next(iter(modules), "").rpartition(".")[2]
    if recorded is None and last in _PACKED:
        packs = tuple(
            tuple(f"{name.rpartition('.')[0]}.{part}" for name in names if name.endswith(last))
            for part in _PACKED[last]
        )
        return names, tuple(parameters), packs
    return names, tuple(parameters), ()


def module_of(node: ir.Node) -> str | None:
    """The path of the module that a node belongs to, as torch's two exporters and the genai builder write it."""
    noted = node.metadata_props.get(SCOPES_KEY)
    if noted is not None:
        with contextlib.suppress(ValueError, SyntaxError):
            scopes = ast.literal_eval(noted)
            if isinstance(scopes, list) and len(scopes) > 1:
                return str(scopes[-2])
    name = str(node.name or "")
    if name.startswith("/") and name.count("/") > 1:
        return ".".join(name.split("/")[1:-1])
    return None


def _other_spellings(name: str) -> tuple[str, ...]:
    """The name, and transformers' where onnxruntime-genai's builder has a shorter one."""
    return (name, name.replace(".attn.", ".self_attn.")) if ".attn." in name else (name,)

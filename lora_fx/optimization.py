"""The pass that makes an injected graph train faster, in less memory: it compiles a rewritten copy of the graph."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import fx

from .copying import copy_graph
from .direct_calls import call_directly
from .errors import ConfigError, GraphError
from .graph import (
    write_biases,
    write_blocks,
    write_groups,
    write_magnitudes,
    write_masks,
    write_normalizations,
    write_rotations,
)
from .graph_module import (
    LoraGraphModule,
    Lowering,
    check_editable,
    checked_graph_module,
    copy_sharing_tensors,
    record_of,
)
from .rewrites import (
    attention_masks,
    checkpointing,
    fused_sums,
    isolation,
    normalization,
    random_order,
    recomputation,
    rotation,
    shared_projection,
)
from .rewrites.chains import Chain
from .rewrites.checkpointing import BlockNodes
from .rewrites.group_call import function_of
from .rewrites.group_operands import Group, Linear, Term
from .rewrites.groups import GroupNodes
from .rewrites.memory import written_values

Dropout = Literal["exact", "cut", "shared"]


@dataclass(frozen=True)
class Rewrites:
    """Which rewrites to make; see `optimize`."""

    fuse: bool = True
    share: bool = True
    recompute: bool = True
    narrow: bool = True
    masks: bool = True
    rotations: bool = True
    isolate: bool = True
    merge: bool = False
    checkpoint: bool = False
    dropout: Dropout = "exact"
    trains_only: ClassVar[bool] = True

    def __post_init__(self) -> None:
        names = ("fuse", "share", "recompute", "narrow", "masks", "rotations", "isolate", "merge", "checkpoint")
        for name in names:
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name}={getattr(self, name)!r} must be True or False")
        if self.dropout not in ("exact", "cut", "shared"):
            raise ConfigError(f"dropout={self.dropout!r} is unknown; choose 'exact', 'cut' or 'shared'")

    def behind(self, first: Lowering) -> Lowering:
        """Rewrites take the graph as it was traced."""
        raise GraphError("optimize rewrites the graph that was traced; optimise that: lora_fx.inject(gm, config)")

    def on_whole_tensors(self) -> Rewrites:
        """The same."""
        return self

    def __call__(self, gm: LoraGraphModule, graph: fx.Graph) -> fx.Graph:
        """A rewritten copy of the graph: what `LoraGraphModule.recompile` compiles."""
        lowered = copy_graph(graph, {})
        lowered.owning_module = gm
        written = written_values(lowered, gm)
        write_normalizations(lowered, normalization.find(lowered, written) if self.recompute else ())
        write_masks(lowered, attention_masks.find(lowered, written) if self.masks else ())
        write_rotations(lowered, rotation.find(lowered, written_values(lowered, gm)) if self.rotations else ())
        if self.isolate:
            write_magnitudes(lowered, isolation.find_magnitudes(lowered, written_values(lowered, gm)))
            write_biases(lowered, isolation.find_biases(lowered, written_values(lowered, gm)))
        groups = fused_sums.find(lowered, gm, written_values(lowered, gm)) if self.fuse else []
        groups = shared_projection.merge(groups) if self.share else groups
        groups = random_order.keep(groups, lowered) if self.dropout == "exact" else groups
        groups = recomputation.extend(groups, lowered, gm, written_values(lowered, gm)) if self.recompute else groups
        chains: dict[str, Chain] = {}

        def target_of(group: GroupNodes, gives_x: bool) -> Callable[..., Any]:
            return function_of(self._described(group, gives_x, chains))

        write_groups(lowered, groups, target_of)
        if self.checkpoint:
            write_blocks(lowered, checkpointing.find(lowered, written_values(lowered, gm)), _layer_of)
        lowered.lint()
        return lowered

    def _described(self, group: GroupNodes, gives_x: bool, chains: dict[str, Chain]) -> Group:
        linears = tuple(
            Linear(
                linear.base,
                linear.bias is not None,
                tuple(Term(term.scaling, term.dropout is not None) for term in linear.terms),
            )
            for linear in group.linears
        )
        return Group(
            linears,
            inputs=len(group.inputs) if group.chain else 1,
            chain=_chain_of(group, chains) if group.chain else None,
            gives_x=gives_x,
            computes_narrow=self.narrow,
            dropout=self.dropout,
            may_merge=self.merge,
            tensor_input=next((i for i, n in enumerate(group.inputs) if _is_tensor(n)), 0),
        )


_BY_THEMSELVES = Rewrites()  # those that `optimize` makes unless told otherwise


def optimize(
    gm: fx.GraphModule,
    *,
    fuse: bool = True,
    share: bool = True,
    recompute: bool = True,
    narrow: bool = True,
    masks: bool = True,
    rotations: bool = True,
    isolate: bool = True,
    merge: bool = False,
    checkpoint: bool = False,
    dropout: Dropout = "exact",
) -> LoraGraphModule:
    """A graph module with the same adapters that trains in fewer kernels and less memory.

    It computes what `gm` computes, within rounding, and so are its gradients. `gm.graph`, and all that reads it (fold,
    save_adapter, export, a second inject), stay as they are: the rewrites are made on a copy when the graph is
    compiled, in train mode only (of a graph that serves both modes, in both), and again whenever adapters change. What
    a rewrite does not recognise stays plain. Under torch.compile the plain operations are compiled, which inductor does
    better with.

    Args:
        gm: an injected graph; it is untouched, tensors are shared.
        fuse: scaling, second product and sum in one addmm per adapter, with a backward pass of their own.
        share: one product with A for all linears that read the same value.
        recompute: norms and activations are computed again in the backward pass, rather than kept.
        narrow: on a base of 16 bits, cast A and B to its dtype, rather than activations to theirs (PEFT does that, and
            keeps float32 copies).
        masks: look at a boolean attention mask once in each step, and leave it out of every layer where it hides
            nothing or only what is ahead, so that attention takes its fastest kernel.
        rotations: rotary position embeddings in three kernels each way, in place of seven and more.
        isolate: the magnitudes of DoRA, and lora_bias, behind a sum that the others then find as they find any; on a
            base of 16 bits with float32 adapters, DoRA on bfloat16 alone.
        merge: build W + scaling · B @ A in each step where tokens are so many that it takes fewer operations. It moves
            more memory, and wins on few machines.
        checkpoint: keep only what each layer reads, and run it again in the backward pass (those behind the first
            adapter; `layers.3` and the like are found by their numbers). Least memory, for about a third more time.
        dropout: "exact" draws the very masks that the plain graph draws; "cut" cuts independent masks from one
            draw (rates in steps of 2⁻¹⁶); "shared" has one mask for all linears that read the same value. One byte per
            element is kept.

    Raises:
        ConfigError: for an argument of another kind.
        GraphError: if `gm` has no adapter, or is folded or batched.
    """
    rewrites = Rewrites(fuse, share, recompute, narrow, masks, rotations, isolate, merge, checkpoint, dropout)
    gm = checked_graph_module(gm)
    check_editable(gm)
    if not record_of(gm).adapters:
        raise GraphError("there is nothing to optimise: the graph has no adapter. inject(gm, config) adds one")
    result = copy_sharing_tensors(gm)
    set_rewrites(result, rewrites)
    result.recompile()
    return result


def set_rewrites(gm: LoraGraphModule, rewrites: Rewrites = _BY_THEMSELVES) -> None:
    """Let `gm` be rewritten when it is compiled next.

    Raises:
        GraphError: if something else is to be compiled in its place already.
    """
    record = record_of(gm)
    if record.lowering is not None and not record.lowering.trains_only:
        raise GraphError(
            "this graph is a tree of blocks, or distributed, and its rewrites would reach across; optimise the graph "
            "that it was made from: lora_fx.inject(gm, config)"
        )
    record.lowering = rewrites


def _layer_of(block: BlockNodes) -> Callable[..., Any]:
    graph = fx.Graph()
    nodes = {node: graph.placeholder(f"input_{i}") for i, node in enumerate(block.inputs)}
    for node in block.nodes:
        nodes[node] = graph.node_copy(node, nodes.__getitem__)
    graph.output(tuple(nodes[node] for node in block.outputs))
    return checkpointing.checkpointed(fx.GraphModule({}, call_directly(graph)).forward)


def _chain_of(group: GroupNodes, chains: dict[str, Chain]) -> Chain:
    """What makes x of the group's inputs; layers that are alike share one."""
    graph = fx.Graph()
    nodes = {node: graph.placeholder(f"input_{i}") for i, node in enumerate(group.inputs)}
    for node, placeholder in nodes.items():
        placeholder.meta["val"] = node.meta.get("val")
    for node in group.chain:
        nodes[node] = graph.node_copy(node, nodes.__getitem__)
        nodes[node].name = f"step_{len(nodes)}"
    graph.output(nodes[group.x])
    values = [node.meta.get("val") for node in graph.nodes]
    kinds = [(value.dtype, value.shape) if isinstance(value, torch.Tensor) else None for value in values]
    key = f"{graph.python_code('self').src}{kinds}"
    if key not in chains:
        chains[key] = Chain(graph)
    return chains[key]


def _is_tensor(node: fx.Node) -> bool:
    return node.op == "get_attr" or isinstance(node.meta.get("val"), torch.Tensor)

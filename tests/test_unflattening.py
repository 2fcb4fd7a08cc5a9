"""A tree of blocks computes what the flat graph does, bit for bit, whatever is made a block."""

from __future__ import annotations

import copy
import gc
import re
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import zoo
from torch import fx, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from zoo import BY_NAME, STACK, assert_same_bits, fingerprint, in_mode, injected, loss_of, randomise, run, traced

import lora_fx
from lora_fx import Block, ConfigError, FoldError, GraphError, LoraConfig, unflattening
from lora_fx.graph_module import record_of
from lora_fx.rewrites.plain_ops import asks

# All models as `trace` gives them; the other tracers where they give a graph of another kind.
NOT_DROPPED = ("lookups", "unread", "kernels", "experts")
OTHERS = ("stack", "shared_module", "tied_head", "modes")
TRACED = [(case, "trace") for case in (*zoo.SMALL, *zoo.MODELS) if "trace" in case.tracers and case.name != "minilm"]
TRACED += [(BY_NAME[name], tracer) for name in OTHERS for tracer in BY_NAME[name].tracers if tracer != "trace"]


def blocks_of(tree: nn.Module) -> list[str]:
    return [name for name, module in tree.named_modules() if isinstance(module, Block)]


def possible(gm: fx.GraphModule) -> list[str]:
    """Every module that can be a block."""
    modules = unflattening.called_modules(gm)
    reasons = unflattening.entangled(gm, modules)
    return [name for name in modules if name not in reasons]


def adapted(case: zoo.Case, tracer: str = "trace") -> fx.GraphModule:
    options = {} if case.name in NOT_DROPPED else {"lora_dropout": 0.2}
    return randomise(injected(case, traced(case, tracer), **options))


def gradients(gm: fx.GraphModule, arguments: object) -> dict[str, torch.Tensor | None]:
    gm.zero_grad()
    loss_of(gm, arguments).backward()
    return {name: p.grad for name, p in gm.named_parameters()}


def assert_same_training(tree: fx.GraphModule, flat: fx.GraphModule, arguments: object) -> None:
    """Outputs and gradients, in both modes, from the same seed."""
    for mode in (True, False):
        flat, tree = in_mode(flat, mode), in_mode(tree, mode)
        assert_same_bits(run(flat, arguments), run(tree, arguments))
        first, second = gradients(flat, arguments), gradients(tree, arguments)
        assert first.keys() == second.keys()
        for name, gradient in first.items():
            assert (gradient is None) == (second[name] is None), name
            assert gradient is None or torch.equal(gradient, second[name]), name
        assert any(gradient is not None for gradient in first.values())


@pytest.mark.parametrize("options", [{}, {"merge": True}], ids=str)
@pytest.mark.parametrize("case", [STACK, BY_NAME["llama"]], ids=str)
def test_an_optimised_graph_keeps_its_rewrites(case: zoo.Case, options: dict[str, bool]) -> None:
    gm = adapted(case)
    flat = lora_fx.optimize(gm, **options)
    tree = lora_fx.unflatten(flat)
    assert_same_training(tree, flat, case.arguments())
    assert blocks_of(tree) == blocks_of(lora_fx.unflatten(gm))
    for mode in (True, False):  # where a graph has no mode of its own, optimize rewrites it for both
        called = [node.name for graph in graphs_of_blocks(in_mode(tree, mode)) for node in graph.nodes]
        assert any(map(is_rewritten, called)) == is_rewritten(in_mode(flat, mode).code), called
    assert is_rewritten(in_mode(flat, True).code), "the law would be vacuous"
    assert lora_fx.fold(tree).code == lora_fx.fold(gm).code


def test_a_block_of_an_optimised_tree_asks_for_itself_whether_it_is_compiled() -> None:
    """One that is compiled alone, as regions are, runs plain operations; those around it do not."""
    case = BY_NAME["llama"]
    flat = lora_fx.optimize(randomise(injected(case, traced(case, "trace"))))
    tree = lora_fx.unflatten(flat)
    assert sum(map(asks, flat.graph.nodes)) == 0  # the graph that was traced has no question
    graphs = graphs_of_blocks(in_mode(tree, True))
    assert [sum(map(asks, graph.nodes)) for graph in graphs] == [1] * len(graphs)
    compiled: list[fx.GraphModule] = []

    def backend(gm: fx.GraphModule, _: object) -> Callable[..., Any]:
        compiled.append(gm)
        return gm.forward

    wanted = gradients(in_mode(flat, True), case.arguments())
    tree.get_submodule(blocks_of(tree)[0]).compile(backend=backend, fullgraph=True)
    for name, found in gradients(tree, case.arguments()).items():
        own = wanted[name]
        assert (found is None) == (own is None)
        assert own is None or torch.allclose(found, own, rtol=1e-4, atol=1e-5 * float(own.abs().max())), name
    ops = [str(node.target) for gm in compiled for node in gm.graph.nodes]
    assert any("linear" in op for op in ops), ops
    assert not any("lora_group" in op or "autograd" in op for op in ops), ops


@pytest.mark.parametrize(("name", "options"), [("stack", {"checkpoint": True}), ("bert", {})])
def test_a_rewrite_that_reaches_across_layers_is_refused(name: str, options: dict[str, bool]) -> None:
    """BERT's layers end in a norm, which is computed with the projections of the next one."""
    with pytest.raises(GraphError, match=r"a rewrite joined operations of '.*layers?.0'.*unflatten\(lora_fx.inject"):
        lora_fx.unflatten(lora_fx.optimize(adapted(BY_NAME[name]), **options))


class Normed(nn.Module):
    """x + W x / rms(x), a norm without a weight: nothing but what a rewrite puts there is between the blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        return x + self.a(h) * self.b(h)


def test_a_rewritten_norm_belongs_to_its_block() -> None:
    model = nn.Sequential(*(Normed() for _ in range(3))).double()
    arguments = ((torch.randn(2, 3, 8, dtype=torch.float64),), {})
    gm = lora_fx.trace(model, *arguments)
    flat = lora_fx.optimize(randomise(lora_fx.inject(gm, {"r": 2, "target_modules": ["a", "b"]})).train())
    tree = lora_fx.unflatten(flat)
    assert {"0", "1", "2"} <= set(blocks_of(tree))
    assert_same_training(tree, flat, arguments)


def is_rewritten(text: str) -> bool:
    return "lora_group" in text


def graphs_of_blocks(tree: fx.GraphModule) -> list[fx.Graph]:
    """What the blocks run that the compiled root calls."""
    calls = vars(type(tree))["forward"].__globals__.values()
    return [call.graph for call in calls if getattr(call, "__name__", "") == "call_block"]


@pytest.mark.parametrize(("case", "tracer"), TRACED, ids=str)
def test_the_tree_computes_what_the_graph_does(case: zoo.Case, tracer: str) -> None:
    gm = adapted(case, tracer)
    before, blocks = fingerprint(gm), possible(gm)
    tree = lora_fx.unflatten(gm, blocks=blocks)
    assert blocks_of(tree) == sorted(blocks, key=[name for name, _ in tree.named_modules()].index)
    assert list(tree.state_dict()) == list(gm.state_dict())
    for parameter, own in zip(tree.parameters(), gm.parameters(), strict=True):
        assert parameter.data_ptr() == own.data_ptr()
    assert fingerprint(gm) == before
    assert_same_training(tree, copy.deepcopy(gm), case.arguments())


@pytest.mark.parametrize("case", [STACK, BY_NAME["llama"], BY_NAME["bert"]], ids=str)
def test_layers_are_blocks_by_themselves(case: zoo.Case) -> None:
    tree = lora_fx.unflatten(adapted(case))
    layers = {match[0] for site in case.sites if (match := re.match(r".*?\.\d+(?=\.)", site))}
    assert set(blocks_of(tree)) == layers
    calls = [node for node in lowered(tree).nodes if "graph" in getattr(node.target, "__dict__", {})]
    assert [node.args[0].target for node in calls] == sorted(layers)  # each is called once
    assert calls[0].target is calls[1].target  # and layers that are alike run one piece of code


def lowered(tree: fx.GraphModule) -> fx.Graph:
    return record_of(tree).lowering(tree, tree.graph)


class Checkpointed(nn.Module):
    """Layers that are run again in the backward pass, as transformers' are: the body of a higher-order op each."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(zoo.Block() for _ in range(2))
        self.head = nn.Linear(7, 5)

    def forward(self, x):
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False)
        return self.head(x)


def test_a_checkpointed_layer_is_a_block() -> None:
    torch.manual_seed(1)
    x = torch.randn(2, 3, 7)
    gm = randomise(lora_fx.inject(lora_fx.trace(Checkpointed(), x), LoraConfig(r=2, target_modules="all-linear")))
    tree = lora_fx.unflatten(gm)
    assert blocks_of(tree) == ["layers.0", "layers.1"]
    assert_same_training(tree, gm, ((x,), {}))


class Entangled(nn.Module):
    """Layer 0 reads layer 1's weight, 2 and 3 are one layer, 4 has a head's weight, 5 none that is not its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(7, 7)) for _ in range(6))
        self.layers[3] = self.layers[2]
        self.head = nn.Linear(7, 7)
        self.head.weight = self.layers[4][0].weight

    def forward(self, x):
        x = torch.tanh(F.linear(self.layers[0](x), self.layers[1][0].weight))
        for index in range(1, 6):
            x = torch.tanh(self.layers[index](x))
        return self.head(x)


def test_an_expression_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"'\(' is not a regular expression: missing"):
        lora_fx.unflatten(adapted(STACK), blocks="(")


def test_what_shares_a_parameter_with_the_outside_is_no_block() -> None:
    x = torch.randn(2, 7)
    gm = randomise(lora_fx.inject(lora_fx.trace(Entangled(), x), LoraConfig(r=2, target_modules=["layers.5.0"])))
    tree = lora_fx.unflatten(gm)
    assert "layers.5" in blocks_of(tree)
    assert not {"layers.1", "layers.4"} & set(blocks_of(tree))
    reasons = unflattening.entangled(gm, ["layers.1", "layers.4", "layers.5"])
    assert "from outside" in reasons["layers.1"]
    assert "head.weight" in reasons["layers.4"]
    assert_same_training(tree, gm, ((x,), {}))
    with pytest.raises(GraphError, match=r"'layers.4' can be no block.*Leave it out of blocks"):
        lora_fx.unflatten(gm, blocks=["layers.4"])


class Interleaved(nn.Module):
    """Layers that stop half-way, and give what others take; one is called twice, in the other's middle."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(zoo.Mlp() for _ in range(2))
        self.register_buffer("shift", torch.randn(7))

    def forward(self, x):
        parts = [layer.fc1(x + self.shift) for layer in self.layers]
        found = [layer.fc2(layer.drop(part)) for layer, part in zip(self.layers, reversed(parts), strict=True)]
        return {"sum": found[0] + found[1] + self.layers[0](x), "parts": tuple(parts)}


def test_calls_that_lie_apart_stay_in_order() -> None:
    x = torch.randn(2, 7)
    gm = lora_fx.trace(Interleaved(), x)
    gm = randomise(lora_fx.inject(gm, LoraConfig(r=2, lora_dropout=0.2, target_modules="all-linear")))
    tree = lora_fx.unflatten(gm)
    called = [node.args[0].target for node in lowered(tree).nodes if "graph" in getattr(node.target, "__dict__", {})]
    assert set(called) == {"layers.0", "layers.1"}
    assert len(called) > 2
    assert_same_training(tree, gm, ((x,), {}))


def test_the_flat_graph_is_what_all_else_reads() -> None:
    case = BY_NAME["llama"]
    gm = adapted(case)
    tree = lora_fx.unflatten(gm)
    arguments = case.arguments()
    assert [p.shape for p in lora_fx.lora_parameters(tree)] == [p.shape for p in lora_fx.lora_parameters(gm)]
    folded = lora_fx.fold(tree)
    assert folded.code == lora_fx.fold(gm).code == traced(case).code
    assert_same_bits(run(folded, arguments), run(lora_fx.fold(gm), arguments))
    config = LoraConfig(r=2, target_modules=["up_proj"])
    both = [(torch.manual_seed(3), lora_fx.inject(each, config, adapter_name="b"))[1] for each in (tree, gm)]
    assert blocks_of(both[0]) == blocks_of(tree)
    assert_same_training(*both, arguments)
    for each in both:
        lora_fx.set_adapters(each, {"b": 0.5})
    assert_same_training(*both, arguments)
    with lora_fx.disable_adapters(tree), lora_fx.disable_adapters(gm):
        assert_same_bits(run(tree, arguments), run(gm, arguments))
    assert_same_training(copy.deepcopy(tree), gm, arguments)


def test_a_fold_of_all_adapters_ends_the_tree_and_not_what_only_training_needs() -> None:
    gm = randomise(injected(STACK, lora_fx.trace(STACK.model(), *STACK.arguments()[0])))
    two = randomise(lora_fx.inject(gm, LoraConfig(r=2, target_modules="all-linear"), adapter_name="two"))
    tree = lora_fx.unflatten(two)
    assert record_of(lora_fx.fold(tree)).lowering is None
    assert record_of(lora_fx.fold(tree, adapters=["two"])).lowering == record_of(tree).lowering
    optimised = lora_fx.optimize(two)
    assert record_of(lora_fx.fold(optimised)).lowering == record_of(optimised).lowering


def test_a_tree_is_converted_as_a_graph_is() -> None:
    gm = adapted(STACK)
    tree = lora_fx.unflatten(gm).double()
    assert {p.dtype for p in gm.parameters()} == {torch.float32}
    assert_same_training(tree, copy.deepcopy(gm).double(), STACK.arguments(torch.float64))


def test_save_adapter_writes_the_same_files(tmp_path) -> None:
    gm = adapted(STACK)
    for name, each in (("flat", gm), ("tree", lora_fx.unflatten(gm))):
        lora_fx.save_adapter(each, tmp_path / name)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "flat" / file).read_bytes() == (tmp_path / "tree" / file).read_bytes()


def test_hooks_on_a_block_hear_its_inputs_and_may_exchange_its_parameters() -> None:
    gm = adapted(STACK)
    tree, x, heard = lora_fx.unflatten(gm), torch.randn(2, 3, 7), []
    zeros = {n: torch.zeros_like(p) for n, p in gm.named_parameters() if n.startswith("body.layers.1.")}
    expected = torch.func.functional_call(gm, zeros, x)
    assert not torch.equal(tree(x), expected)

    def exchange(block, args):
        heard.append(args[1].shape)
        for name, _ in list(block.named_parameters()):
            owner, _, last = name.rpartition(".")
            block.get_submodule(owner)._parameters[last] = nn.Parameter(zeros[f"body.layers.1.{name}"])

    tree.get_submodule("body.layers.1").register_forward_pre_hook(exchange)
    assert_same_bits([tree(x)], [expected])
    assert heard == [x.shape]


def test_nothing_but_the_modules_holds_parameters() -> None:
    """What shards a model wants the memory of the whole one back."""
    tree = lora_fx.unflatten(injected(STACK, lora_fx.trace(STACK.model(), *STACK.arguments()[0]))).train()
    gone = []
    for module in tree.modules():
        for name, parameter in list(module._parameters.items()):
            gone.append(weakref.ref(parameter))
            module._parameters[name] = nn.Parameter(parameter.detach().clone())
    del parameter
    gc.collect()
    assert len(gone) > 20
    assert not any(reference() is not None for reference in gone)


def test_a_block_alone_keeps_the_graph_of_the_tree() -> None:
    gm = adapted(BY_NAME["modes_both"])
    tree, flat = lora_fx.unflatten(gm, blocks=["fc1"]).train(), copy.deepcopy(gm).train()
    for each in (tree, flat):
        each.get_submodule("fc1").eval()  # holds the adapter's dropout, which has a mode of its own
    arguments = BY_NAME["modes_both"].arguments()
    assert_same_bits(run(tree, arguments), run(flat, arguments))


def test_blocks_may_be_wrapped() -> None:
    """As activation checkpointing does, under which a block's tensors have other names."""
    gm = adapted(STACK)
    tree, flat = lora_fx.unflatten(copy.deepcopy(gm)), copy.deepcopy(gm)
    names = set(dict(tree.named_parameters()))
    apply_activation_checkpointing(tree, check_fn=lambda module: isinstance(module, Block))
    arguments = STACK.arguments()
    for mode in (True, False, True):
        tree, flat = in_mode(tree, mode), in_mode(flat, mode)
        assert_same_bits(run(tree, arguments), run(flat, arguments))
    assert set(dict(tree.named_parameters())) != names
    assert len(lora_fx.lora_parameters(tree)) == len(lora_fx.lora_parameters(flat))


def test_a_fault_of_the_writer_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The after-condition: the tree runs the same operations on the same values, in the same order."""
    gm = injected(STACK, lora_fx.trace(STACK.model(), *STACK.arguments()[0]))  # of which no tree is known yet
    copied = unflattening._Part.copy

    def wrong(part, node):
        copied(part, node)
        if node.target is torch.ops.aten.silu.default:
            part.values[node] = part.values[node.args[0]]

    monkeypatch.setattr(unflattening._Part, "copy", wrong)
    with pytest.raises(GraphError, match="does not run what the graph runs"):
        lora_fx.unflatten(gm)


class Wide(nn.Module):
    """Norms in float32 and back, as Llama's, and a buffer: a graph with dtypes of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(7, 7) for _ in range(2))
        self.register_buffer("shift", torch.randn(7))

    def forward(self, x):
        for layer in self.layers:
            wide = x.to(torch.float32) + self.shift.to(torch.float32)
            x = layer((wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True))).to(x.dtype))
        return x


def test_a_dtype_is_that_of_the_models_parameters() -> None:
    """What FSDP2 computes in: parameters cast at each call, buffers as they are."""
    torch.manual_seed(1)
    x, config = torch.randn(3, 7), LoraConfig(r=2, target_modules="all-linear")
    model = Wide()
    gm = randomise(lora_fx.inject(lora_fx.trace(model, x), config))
    tree = lora_fx.unflatten(gm, dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in tree.state_dict().values()} == {torch.float32}
    narrow = {name: p.to(torch.bfloat16) for name, p in tree.named_parameters()}
    found = torch.func.functional_call(tree, narrow, x.bfloat16())
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    other = lora_fx.inject(lora_fx.trace(model, x.bfloat16()), config, adapter_dtype=torch.bfloat16)
    other.load_state_dict(narrow, strict=False)
    assert_same_bits([found], [other(x.bfloat16())])
    for folded in (
        lora_fx.fold(tree),
        lora_fx.fold(copy.deepcopy(tree)),
        lora_fx.fold(copy.deepcopy(tree), inplace=True),
    ):
        assert folded.code == lora_fx.fold(gm).code
        assert_same_bits(run(folded, ((x,), {})), run(lora_fx.fold(gm), ((x,), {})))
    two = lora_fx.inject(tree, config, adapter_name="two")
    with pytest.raises(FoldError, match="all its adapters are folded at once"):
        lora_fx.fold(two, adapters=["two"])
    assert lora_fx.fold(two).code == lora_fx.fold(gm).code
    with pytest.raises(GraphError, match="another dtype than its parameters have"):
        tree.double()
    del model, parameter
    gc.collect()
    with pytest.raises(GraphError, match="the model that could tell"):
        lora_fx.unflatten(gm, dtype=torch.bfloat16)

"""Messages say the fact, its context, and what to do: one table over the public errors and warnings.

The details of a family stand beside its tests; here every public call that can fail is made once, and the
general form of each message is checked.
"""

from __future__ import annotations

import ast
import builtins
import importlib
import inspect
import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch import fx, nn
from zoo import BY_NAME, STACK, injected, randomise, reseal, traced

import lora_fx
from lora_fx import (
    AdapterError,
    ConfigError,
    ExportError,
    FoldError,
    GraphError,
    LoraConfig,
    LoraFxError,
    LoraFxWarning,
    TargetError,
)
from lora_fx.errors import closest
from lora_fx.site_graphs import site_graphs
from lora_fx.training_log import read_training_log

MLP = BY_NAME["mlp"]
PACKAGE = Path(lora_fx.__file__).parent
COMMAND_LINE = {PACKAGE / "cli.py", *PACKAGE.glob("cli_*.py"), PACKAGE / "hf_saving.py"}  # it answers in exit codes
X = torch.randn(3, 7)


def base() -> fx.GraphModule:
    return traced(MLP)


def adapted() -> fx.GraphModule:
    return injected(MLP, traced(MLP))


def private() -> fx.GraphModule:
    return injected(MLP, lora_fx.trace(MLP.model(), X))


def wrapped() -> nn.Module:
    class Wrapper(nn.Module):
        module = adapted()

    return Wrapper()


def mesh(dimensions: int):
    """What a mesh says of itself, of two processes in each dimension."""
    return SimpleNamespace(ndim=dimensions, mesh_dim_names=("dp", "tp")[:dimensions], size=lambda: 2)


def config(**options) -> LoraConfig:
    return LoraConfig(**{"target_modules": ["fc1"], **options})


def folded_in_place() -> fx.GraphModule:
    return lora_fx.fold(private(), inplace=True)


def with_value(value: float, gm: fx.GraphModule | None = None) -> fx.GraphModule:
    gm = gm or adapted()
    with torch.no_grad():
        gm.get_parameter("fc1.lora_B.default.weight")[0, 0] = value
    return gm


def written(directory: Path, change: Callable[[dict], dict] = lambda fields: fields) -> Path:
    lora_fx.save_adapter(adapted(), directory)
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    reseal(directory)
    return directory


def checkpoint(directory: Path, name: str) -> Path:
    (directory / "base").mkdir()
    save_file({name: torch.ones(11, 7)}, directory / "base" / "model.safetensors")
    return directory / "base"


# (error, call, fact, context, fix): a fragment of each in the message
ERRORS: dict[str, tuple[type, Callable[[Path], object], str, str, str]] = {
    # configurations
    "rank": (ConfigError, lambda p: LoraConfig(r=0), "r=0", "must be", "an integer above 0"),
    "dropout": (ConfigError, lambda p: LoraConfig(lora_dropout=1), "lora_dropout=1", "must be", "from 0 up to"),
    "choice": (
        ConfigError,
        lambda p: LoraConfig(bias="al"),
        "bias='al'",
        "one of 'none', 'all'",
        "Did you mean 'all'?",
    ),
    "misspelt": (
        ConfigError,
        lambda p: LoraConfig(targt_modules=[]),
        "no option 'targt_modules'",
        "LoraConfig",
        "'target_modules'",
    ),
    "unsupported": (
        ConfigError,
        lambda p: LoraConfig(layer_replication=[(0, 1)]),
        "layer_replication",
        "not support",
        "leave it out",
    ),
    "positional": (ConfigError, lambda p: LoraConfig(8), "keyword arguments only", "LoraConfig", "r=8"),
    "string": (
        ConfigError,
        lambda p: LoraConfig(modules_to_save="h"),
        "modules_to_save='h'",
        "is a string",
        "modules_to_save=['h']",
    ),
    "expression": (
        ConfigError,
        lambda p: LoraConfig(target_modules="("),
        "target_modules='('",
        "not a regular expression",
        "Give a list",
    ),
    "layers": (
        ConfigError,
        lambda p: LoraConfig(target_modules="q", layers_to_transform=1),
        "layers_to_transform=1",
        "'q' is a string",
        "as a list",
    ),
    "pattern alone": (
        ConfigError,
        lambda p: LoraConfig(layers_pattern="h"),
        "layers_pattern",
        "layers_to_transform is not given",
        "give both or neither",
    ),
    "other type": (
        ConfigError,
        lambda p: lora_fx.inject(base(), {"peft_type": "IA3"}),
        "'IA3'",
        "peft_type",
        "only 'LORA'",
    ),
    "no config": (
        ConfigError,
        lambda p: lora_fx.inject(base(), 3),
        "int is not",
        "a LoRA configuration",
        "lora_fx.LoraConfig(...)",
    ),
    # targets
    "no match": (
        TargetError,
        lambda p: lora_fx.inject(base(), config(target_modules=["fc11"])),
        "'fc11' matched none",
        "of 2 sites",
        "Did you mean 'fc1'",
    ),
    "no targets": (
        TargetError,
        lambda p: lora_fx.inject(base(), LoraConfig()),
        "target_modules is not given",
        "2 sites: fc1, fc2",
        "'all-linear'",
    ),
    "all excluded": (
        TargetError,
        lambda p: lora_fx.inject(base(), config(exclude_modules=["fc1"])),
        "no site to adapt",
        "excluded by",
        "find_sites(gm)",
    ),
    "rank pattern": (
        TargetError,
        lambda p: lora_fx.inject(base(), config(rank_pattern={"fc": 2})),
        "rank_pattern 'fc'",
        "of the 1 sites",
        "Did you mean 'fc1'",
    ),
    "saved": (
        TargetError,
        lambda p: lora_fx.inject(base(), config(modules_to_save=["fc3"])),
        "modules_to_save 'fc3'",
        "no module",
        "Did you mean",
    ),
    "layer": (
        TargetError,
        lambda p: lora_fx.inject(traced(STACK), config(target_modules=["up"], layers_to_transform=3)),
        "layers_to_transform 3",
        "2 sites",
        "[0, 1]",
    ),
    "tied": (
        TargetError,
        lambda p: injected(
            BY_NAME["tied_head"], traced(BY_NAME["tied_head"]), targets=["fc"], modules_to_save=["lm_head"]
        ),
        "tied with",
        "trained in full",
        "Train both",
    ),
    "other plan": (
        TargetError,
        lambda p: lora_fx.inject(base(), lora_fx.make_plan(traced(STACK), config(target_modules=["up"]))),
        "the plan is of another graph",
        "body.layers.0.up",
        "this one has not",
    ),
    # graphs
    "module": (
        GraphError,
        lambda p: lora_fx.find_sites(MLP.model()),
        "Mlp is a plain nn.Module",
        "not a graph",
        "gm = lora_fx.trace(model, args, kwargs)",
    ),
    "program": (
        GraphError,
        lambda p: lora_fx.inject(torch.export.export(MLP.model(), (X,)), config()),
        "an ExportedProgram",
        "read-only",
        "ep.module()",
    ),
    "decomposed": (
        GraphError,
        lambda p: lora_fx.inject(torch.export.export(MLP.model(), (X,)).run_decompositions().module(), config()),
        "was decomposed",
        "linears",
        "lora_fx.trace(model, args)",
    ),
    "inputs": (
        GraphError,
        lambda p: lora_fx.trace(MLP.model(), ()),
        "do not fit",
        "Mlp.forward(x)",
        "lora_fx.trace(model, args, kwargs)",
    ),
    "traced": (
        GraphError,
        lambda p: lora_fx.trace(base(), X),
        "torch.fx.GraphModule",
        "traced already",
        "find_sites, make_plan or inject",
    ),
    "folded": (
        GraphError,
        lambda p: lora_fx.inject(folded_in_place(), config()),
        "folded in place",
        "brings its adapters back",
        "lora_fx.unfold(gm)",
    ),
    "dtype": (
        GraphError,
        lambda p: lora_fx.inject(base(), config(), adapter_dtype=torch.int8),
        "adapter_dtype=torch.int8",
        "floating point",
        "torch.bfloat16",
    ),
    # adapters
    "name taken": (
        AdapterError,
        lambda p: lora_fx.inject(adapted(), config()),
        "already has an adapter 'default'",
        "taken: default",
        "another adapter_name",
    ),
    "bad name": (
        AdapterError,
        lambda p: lora_fx.inject(base(), config(), adapter_name="a/b"),
        "adapter_name='a/b'",
        "names modules and directories",
        "letters, digits",
    ),
    "no adapter": (
        AdapterError,
        lambda p: lora_fx.lora_parameters(base()),
        "no adapter",
        "the graph",
        "lora_fx.inject(gm, config)",
    ),
    "unknown adapter": (
        AdapterError,
        lambda p: lora_fx.save_adapter(adapted(), p, adapter_name="defaults"),
        "no adapter 'defaults'",
        "it has 'default'",
        "Did you mean",
    ),
    "save NaN": (
        AdapterError,
        lambda p: lora_fx.save_adapter(with_value(float("nan")), p),
        "NaN or Inf",
        "fc1.lora_B.weight",
        "not saved",
    ),
    "no files": (
        AdapterError,
        lambda p: lora_fx.load_adapter(base(), p),
        "no adapter_config.json",
        "no adapter directory",
        "lora_fx.save_adapter",
    ),
    "no directory": (
        AdapterError,
        lambda p: lora_fx.load_adapter(base(), p / "x"),
        "there is no directory",
        "/x'",
        "adapter_config.json",
    ),
    "wrong rank": (
        AdapterError,
        lambda p: lora_fx.load_adapter(base(), written(p, lambda f: f | {"r": 4})),
        "(3, 7)",
        "(4, 7)",
        "rank_pattern",
    ),
    "missing": (
        AdapterError,
        lambda p: lora_fx.load_adapter(
            traced(BY_NAME["lora_names"]), written(p, lambda f: f | {"target_modules": ["flora_head"]})
        ),
        "lacks 2 of 2",
        "flora_head",
        "of this model?",
    ),
    "unexpected": (
        AdapterError,
        lambda p: lora_fx.load_adapter(base(), written(p, lambda f: f | {"target_modules": ["fc1"]})),
        "no place",
        "fc2.lora_A.weight",
        "make_plan(gm, config)",
    ),
    "file's config": (
        ConfigError,
        lambda p: lora_fx.load_adapter(base(), written(p, lambda f: f | {"r": 0})),
        "r=0",
        "adapter_config.json",
        "above 0",
    ),
    # folding
    "nothing to fold": (
        FoldError,
        lambda p: lora_fx.fold(base()),
        "nothing to fold",
        "no adapter",
        "inject(gm, config)",
    ),
    "fold with no such way for few bits": (
        FoldError,
        lambda p: lora_fx.fold(adapted(), quantized="round"),
        "quantized='round'",
        "dequantize",
        "must be",
    ),
    "fold NaN": (
        FoldError,
        lambda p: lora_fx.fold(with_value(float("nan"))),
        "holds NaN or Inf",
        "'fc1' (fc1.weight)",
        "reload it",
    ),
    "fold base": (
        FoldError,
        lambda p: lora_fx.fold(_broken_base()),
        "NaN or Inf before folding",
        "'fc1' (fc1.weight)",
        "mend the model",
    ),
    "overflow": (
        FoldError,
        lambda p: lora_fx.fold(with_value(1e38 * 3, _large())),
        "beyond torch.float32's largest",
        "'fc1'",
        "float",
    ),
    "fold twice": (
        FoldError,
        lambda p: lora_fx.fold(folded_in_place()),
        "folded already",
        "this graph",
        "lora_fx.unfold(gm)",
    ),
    "unfold": (
        FoldError,
        lambda p: lora_fx.unfold(adapted()),
        "no fold to take back",
        "here",
        "fold(gm, inplace=True)",
    ),
    "report": (
        FoldError,
        lambda p: lora_fx.fold_report(adapted()),
        "does not come from fold",
        "this graph",
        "no report",
    ),
    "untie a module": (
        FoldError,
        lambda p: lora_fx.fold(injected(MLP, _read_beside(), targets=["fc1"])),
        "would untie 'fc1.weight'",
        "its module reads it by that name",
        "fold a graph of lora_fx.trace(model, args)",
    ),
    "accumulate": (
        FoldError,
        lambda p: lora_fx.fold(adapted(), accumulate=torch.float16),
        "accumulate=torch.float16",
        "must be",
        "torch.float32",
    ),
    "pickled as a whole": (
        GraphError,
        lambda p: torch.save(adapted(), p / "whole.pt"),
        "is not pickled",
        "graph module",
        "lora_fx.save_adapter",
    ),
    "optimize's dropout": (
        ConfigError,
        lambda p: lora_fx.optimize(adapted(), dropout="some"),
        "dropout='some'",
        "is unknown",
        "choose 'exact'",
    ),
    "optimize's switches": (
        ConfigError,
        lambda p: lora_fx.optimize(adapted(), fuse=1),
        "fuse=1",
        "must be",
        "True or False",
    ),
    "blocks of another kind": (
        ConfigError,
        lambda p: lora_fx.unflatten(adapted(), blocks=[1]),
        "blocks=[1]",
        "must be",
        "a list of module names",
    ),
    "a dtype that is none": (
        ConfigError,
        lambda p: lora_fx.unflatten(adapted(), dtype=torch.int8),
        "dtype=torch.int8",
        "must be",
        "torch.bfloat16",
    ),
    "a block that is no module": (
        TargetError,
        lambda p: lora_fx.unflatten(adapted(), blocks=["fc3"]),
        "'fc3'",
        "no module of the graph",
        "Did you mean 'fc2'",
    ),
    "a block with another's weight": (
        GraphError,
        lambda p: lora_fx.unflatten(traced(BY_NAME["tied_head"]), blocks=["embed"]),
        "'embed' can be no block",
        "lm_head.weight",
        "Leave it out of blocks",
    ),
    "a tree of a tree": (
        GraphError,
        lambda p: lora_fx.unflatten(lora_fx.unflatten(adapted())),
        "a tree of blocks already",
        "this graph",
        "unflatten the graph that it was made from",
    ),
    "optimising a tree": (
        GraphError,
        lambda p: lora_fx.optimize(lora_fx.unflatten(adapted())),
        "a tree of blocks",
        "this graph",
        "lora_fx.inject(gm, config)",
    ),
    "splitting an optimised graph": (
        GraphError,
        lambda p: lora_fx.distribute(lora_fx.optimize(adapted()), mesh(1)),
        "comes from optimize",
        "this graph",
        "distribute the graph that it was made from",
    ),
    "splitting along two dimensions": (
        ConfigError,
        lambda p: lora_fx.distribute(adapted(), mesh(2)),
        "2 dimensions",
        "the mesh",
        'mesh["tp"]',
    ),
    "a plan of something else": (
        ConfigError,
        lambda p: lora_fx.distribute(adapted(), mesh(1), {"fc1": "rows"}),
        "'rows'",
        "plan=",
        "'colwise' or 'rowwise'",
    ),
    "a wrapped graph": (
        GraphError,
        lambda p: lora_fx.save_adapter(wrapped(), p / "adapter"),
        "wraps a graph module",
        "Wrapper",
        "gm.module",
    ),
    "a plan of nothing": (
        TargetError,
        lambda p: lora_fx.distribute(injected(STACK, traced(STACK)), mesh(1), {}),
        "nothing to split",
        "2 processes",
        "Write a plan",
    ),
    "a plan of no site": (
        TargetError,
        lambda p: lora_fx.distribute(adapted(), mesh(1), {"fc9": "rowwise"}),
        "'fc9'",
        "no site",
        "find_sites(gm) lists all",
    ),
    "a site that does not divide": (
        TargetError,
        lambda p: lora_fx.distribute(adapted(), mesh(1), {"fc1": "rowwise"}),
        "'fc1' cannot be split rowwise",
        "do not divide by 2 processes",
        "Leave it out of the plan",
    ),
    "a broken adapter's statistics": (
        AdapterError,
        lambda p: lora_fx.adapter_statistics(with_value(float("nan"))),
        "fc1.lora_B.default.weight",
        "holds NaN or Inf",
        "train it again or reload it",
    ),
    "a training log": (
        AdapterError,
        lambda p: read_training_log(p / "trainer_state.json"),
        "trainer_state.json",
        "cannot be read",
        "name a trainer_state.json",
    ),
    "a graph around no site": (
        TargetError,
        lambda p: site_graphs(base(), adapted(), None, ["fc9"]),
        "no site 'fc9'",
        "Did you mean",
        "find_sites(gm) lists them all",
    ),
    "nothing to optimise": (
        GraphError,
        lambda p: lora_fx.optimize(lora_fx.fold(adapted())),
        "no adapter",
        "the graph",
        "inject(gm, config)",
    ),
    "checkpoint": (
        FoldError,
        lambda p: lora_fx.fold_checkpoint(written(p / "a"), p / "a", p / "out"),
        "holds an adapter, and no weights of a base model",
        "test_each_error",
        "give the directory of the base",
    ),
    "checkpoint names": (
        AdapterError,
        lambda p: lora_fx.fold_checkpoint(checkpoint(p, "fcl.weight"), written(p / "a"), p / "out"),
        "no tensor for the adapter's 'fc1.weight'",
        "Did you mean 'fcl.weight'?",
        "lora-fx fold MODEL ADAPTER OUT",
    ),
    "weights to bind": (
        GraphError,
        lambda p: lora_fx.bind_weights(base(), checkpoint(p, "fcl.weight")),
        "No place for 'fcl.weight' (1). Did you mean",
        "is not of this graph",
        "Give the checkpoint",
    ),
    "cost": (
        ConfigError,
        lambda p: lora_fx.make_plan(base(), config()).cost(devices=0),
        "devices=0",
        "must be an integer",
        "from 1",
    ),
}


def _broken_base() -> fx.GraphModule:
    gm = private()
    with torch.no_grad():
        gm.get_parameter("fc1.weight")[0, 0] = float("inf")
    return gm


def _read_beside() -> fx.GraphModule:
    class Beside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1 = nn.Linear(7, 7)

        def forward(self, x):
            return self.fc1(x) + torch.ops.aten.detach.default(self.fc1.weight)[0]

    return fx.symbolic_trace(Beside())


def _large() -> fx.GraphModule:
    gm = private()
    with torch.no_grad():
        gm.get_parameter("fc1.lora_A.default.weight").fill_(1e3)
    return gm


@pytest.mark.parametrize("name", ERRORS)
def test_each_error_says_fact_context_and_fix(name: str, tmp_path: Path) -> None:
    kind, call, *fragments = ERRORS[name]
    with pytest.raises(LoraFxError) as caught:
        call(tmp_path)
    assert type(caught.value) is kind
    message = str(caught.value)
    for fragment in fragments:
        assert fragment in message, message
    assert "\n" not in message
    assert "  " not in message
    assert not re.search(r"<.* object at 0x|(?<!\.)\.\.(?!\.)|\?\?|,\.|\( ", message), message
    assert len(message) < 700


WARNINGS: dict[str, tuple[Callable[[], object], str, str]] = {
    "untied": (
        lambda: lora_fx.fold(injected(BY_NAME["tied_head"], traced(BY_NAME["tied_head"]), targets=["lm_head"])),
        "'lm_head.weight' was tied with embed.weight",
        "one more parameter",
    ),
    "lossy": (
        lambda: lora_fx.fold(randomise(injected(MLP, traced(MLP, "trace", torch.bfloat16)), size=1e-3)),
        "torch.bfloat16 keeps only",
        "torch.float32 weights would keep it: convert the model before folding",
    ),
    "no gradient": (
        lambda: lora_fx.inject(traced(BY_NAME["no_grad"]), LoraConfig(target_modules=["frozen"])),
        "'frozen' runs under torch.no_grad",
        "no gradient will reach it",
    ),
    "fan_in_fan_out": (
        lambda: lora_fx.make_plan(base(), config(fan_in_fan_out=True)),
        "fan_in_fan_out=True",
        "the graph counts",
    ),
    "refused by all-linear": (
        lambda: lora_fx.make_plan(lora_fx.trace(_Normed().eval(), X), LoraConfig(target_modules="all-linear")),
        "all-linear leaves out 'fc'",
        "its weight is computed",
    ),
    "exported in eval": (
        lambda: injected(MLP, traced(MLP, "export")).train(),
        "exported in eval mode: dropout",
        "lora_fx.trace(model, args)",
    ),
}


class _Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = torch.nn.utils.parametrizations.weight_norm(nn.Linear(7, 11))
        self.other, self.head = nn.Linear(11, 11), nn.Linear(11, 5)

    def forward(self, x):
        return self.head(self.other(self.fc(x)).tanh())


@pytest.mark.parametrize("name", WARNINGS)
def test_each_warning_says_what_and_what_then(name: str) -> None:
    call, fact, fix = WARNINGS[name]
    with pytest.warns(LoraFxWarning) as caught:
        call()
    assert len(caught) == 1, [str(w.message) for w in caught]
    assert fact in str(caught[0].message)
    assert fix in str(caught[0].message)
    assert Path(caught[0].filename) == Path(__file__) or Path(caught[0].filename).name == "zoo.py", caught[0].filename


def test_every_error_of_this_package_is_raised_with_words() -> None:
    """No bare `raise Error()`, and nothing from outside the tree but what Python's own protocols want."""
    for path in set(PACKAGE.rglob("*.py")) - COMMAND_LINE - {PACKAGE / "atomic.py"}:  # whose callers know what it is of
        module = importlib.import_module(".".join(("lora_fx", *path.relative_to(PACKAGE).with_suffix("").parts)))
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and isinstance(node.exc.func, ast.Name):
                kind = getattr(module, node.exc.func.id, None) or getattr(builtins, node.exc.func.id, None)
                if not inspect.isclass(kind):
                    continue  # a function that makes the error
                where = f"{path.name}:{node.lineno} raises {kind.__name__}"
                assert issubclass(kind, (LoraFxError, AttributeError, AssertionError, ValueError)), where
                assert node.exc.args, f"{where} without a word"


def test_errors_can_be_caught_as_pythons_own() -> None:
    assert issubclass(ConfigError, ValueError)
    assert issubclass(TargetError, ValueError)
    assert issubclass(AdapterError, ValueError)
    for kind in (GraphError, FoldError, ExportError):
        assert issubclass(kind, RuntimeError)


def test_the_nearest_names() -> None:
    assert closest("q_porj", ["layers.0.q_proj", "layers.0.up"]) == " Did you mean 'layers.0.q_proj'?"
    assert closest("zzz", ["a", "b"]) == ""
    assert closest("x", []) == ""
    assert closest("fc1", ["fc1", "fc1", "fc2"]) == " Did you mean 'fc1' or 'fc2'?"

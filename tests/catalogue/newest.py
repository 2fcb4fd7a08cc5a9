"""Few bits, processes, trees of blocks, flat parameters and batches of adapters, asked for what they cannot do."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
from catalogue.checkpoints import base
from catalogue.harness import IDS, TARGETS, Case, World, same
from torch import fx, nn
from torch.nn.utils import parametrize, prune

import lora_fx

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import bitsandbytes as bnb

X = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))


def answer(call: Callable[[World], object]) -> Callable[[World], object]:
    """What has to be refused: false, if it gets that far."""
    return lambda world: call(world) is NotImplemented


# Few bits -----------------------------------------------------------------------------------------


def few_bits(world: World) -> None:
    """A model of two linears, of which one is stored in four bits, its graph, and that with an adapter."""
    torch.manual_seed(0)
    model = nn.Sequential(bnb.nn.Linear4bit(64, 32, quant_type="nf4"), nn.Linear(32, 5)).to("cpu")
    gm = lora_fx.trace(model, X)
    world.extra["bits"], world.extra["few"] = gm, lora_fx.inject(gm, {"r": 2, "target_modules": ["0"]})


def on_few(call: Callable[[fx.GraphModule], object]) -> Callable[[World], object]:
    return answer(lambda world: call(world.extra["few"]))


def on_bits(**fields: Any) -> Callable[[World], object]:
    config = {"r": 2, "target_modules": ["0"]} | fields
    return answer(lambda world: lora_fx.inject(world.extra["bits"], config))


def dequantized_is_right(world: World) -> object:
    few = world.extra["few"]
    return same(lora_fx.fold(few, quantized="dequantize")(X), few(X))


# Trees, flat parameters, batches ------------------------------------------------------------------


def unflatten(**options: Any) -> Callable[[World], object]:
    return answer(lambda world: lora_fx.unflatten(world.adapted, **options))


def private(world: World) -> lora_fx.LoraGraphModule:
    """A copy to be changed, which trains."""
    return copy.deepcopy(world.adapted).train()  # type: ignore[return-value]


def step(optimizer: torch.optim.Optimizer, gm: fx.GraphModule, **ids: torch.Tensor) -> object:
    gm(IDS, **ids).sum().backward()
    optimizer.step()
    return False


def flat_step(change: Callable[[fx.GraphModule], object]) -> Callable[[World], object]:
    """An optimizer's step over flat parameters of a graph that was changed meanwhile."""

    def call(world: World) -> object:
        gm = private(world)
        optimizer = torch.optim.SGD(lora_fx.flat_parameters(gm), lr=0.1)
        change(gm)
        return step(optimizer, gm)

    return call


def batched(world: World) -> lora_fx.LoraGraphModule:
    two = lora_fx.inject(world.adapted, {"r": 2, "target_modules": TARGETS}, adapter_name="two")
    return lora_fx.batch_adapters(two).train()


def part_step(change: Callable[[fx.GraphModule], object]) -> Callable[[World], object]:
    """The same over the parts that one adapter of a batched graph has of its stacks."""

    def call(world: World) -> object:
        gm = batched(world)
        optimizer = torch.optim.SGD(lora_fx.lora_parameters(gm, "two"), lr=0.1)
        change(gm)
        return step(optimizer, gm, adapter_ids=torch.tensor([1, 2]))

    return call


def assign(gm: fx.GraphModule) -> object:
    return gm.load_state_dict({key: value.clone() for key, value in gm.state_dict().items()}, assign=True)


def exchange(gm: fx.GraphModule) -> None:
    gm.get_submodule("fc0.lora_A.default").weight = nn.Parameter(torch.zeros(3, 7))


def freeze_one(gm: fx.GraphModule) -> None:
    gm.get_parameter("fc0.lora_A.default.weight").requires_grad_(False)


def first(world: World, of_stacks: bool) -> torch.nn.Parameter:
    gm = batched(world) if of_stacks else private(world)
    return (lora_fx.lora_parameters(gm, "two") if of_stacks else lora_fx.flat_parameters(gm))[0]


def mixed_dtypes(world: World) -> object:
    config = {"r": 2, "target_modules": TARGETS}
    two = lora_fx.inject(world.adapted, config, adapter_name="two", adapter_dtype=torch.float64)
    return lora_fx.batch_adapters(two)


def changed_weight(call: Callable[[Any], object], path: str, how: str) -> Callable[[World], object]:
    """A graph one of whose weights is no parameter any more."""

    def attempt(world: World) -> object:
        gm = copy.deepcopy(world.adapted)
        if how == "pruned":
            prune.l1_unstructured(gm.get_submodule(path), "weight", amount=0.5)
        else:
            parametrize.register_parametrization(gm.get_submodule(path), "weight", nn.Tanh())
        call(gm)
        return False

    return attempt


# Without values, and under inference mode ----------------------------------------------------------


def on_meta(call: Callable[[Any], object]) -> Callable[[World], object]:
    """A graph whose weights have no values, with an adapter."""

    def attempt(world: World) -> object:
        with torch.device("meta"):
            model = type(world.model)()
        gm = lora_fx.trace(model.eval(), (IDS.to("meta"),))
        call(lora_fx.inject(gm, {"r": 2, "target_modules": TARGETS}))
        return False

    return attempt


def bind(**options: Any) -> Callable[[World], object]:
    return answer(lambda world: lora_fx.bind_weights(world.gm, world.here / "base", **options))


def trained_after_inference_mode(world: World) -> object:
    with torch.inference_mode():
        gm = lora_fx.inject(lora_fx.fold(world.adapted), {"r": 2, "target_modules": TARGETS})
    gm.train()(IDS).sum().backward()
    return all(parameter.grad is not None for parameter in lora_fx.lora_parameters(gm))


def fold_of(adapter: Any) -> Callable[[World], object]:
    return answer(lambda world: lora_fx.fold_checkpoint(world.here / "base", adapter, world.here / "out"))


def lookup(gm: Any) -> object:
    return lora_fx.inject(gm, {"r": 2, "target_modules": ["fc0"], "init_lora_weights": "pissa"}, adapter_name="two")


def optimised_tree(world: World) -> object:
    tree = lora_fx.unflatten(lora_fx.optimize(world.adapted))
    return same(tree.eval()(IDS), world.adapted.eval()(IDS))


CASES = [
    Case("few bits/folded without a word", on_few(lora_fx.fold), ("'0'", "quantized='dequantize'"), few_bits),
    Case("few bits/in place", on_few(lambda gm: lora_fx.fold(gm, inplace=True, quantized="requantize")),
         ("inplace",), few_bits),
    Case("few bits/another way", on_few(lambda gm: lora_fx.fold(gm, quantized="round")), ("'round'",), few_bits),
    Case("few bits/true", on_few(lambda gm: lora_fx.fold(gm, quantized=True)), ("quantized=True",), few_bits),
    Case("few bits/folded", dequantized_is_right, damage=few_bits),
    Case("few bits/DoRA", on_bits(use_dora=True), ("use_dora", "'0'"), few_bits),
    Case("few bits/PiSSA", on_bits(init_lora_weights="pissa"), ("pissa", "'0'"), few_bits),
    Case("few bits/LoftQ", on_bits(init_lora_weights="loftq"), ("loftq",), few_bits),
    Case("few bits/trained in full", on_bits(target_modules=["1"], modules_to_save=["0"]),
         ("modules_to_save", "'0'", "few bits"), few_bits),
    Case("few bits/a model of one", answer(lambda w: lora_fx.trace(bnb.nn.Linear4bit(64, 64).to("cpu"), X)),
         ("Linear4bit",)),
    Case("unflatten/no expression", unflatten(blocks="("), ("'('", "regular expression")),
    Case("unflatten/no module", unflatten(blocks=["fc9"]), ("fc9",)),
    Case("unflatten/a number", unflatten(blocks=3), ("blocks=3",)),
    Case("unflatten/a number among them", unflatten(blocks=[3]), ("blocks=[3]",)),
    Case("unflatten/an integer type", unflatten(dtype=torch.int8), ("torch.int8",)),
    Case("unflatten/a word for a type", unflatten(dtype="bfloat16"), ("bfloat16",)),
    Case("unflatten/twice", answer(lambda w: lora_fx.unflatten(lora_fx.unflatten(w.adapted))), ("tree of blocks",)),
    Case("unflatten/optimised", optimised_tree),
    Case("unflatten/a tree optimised", answer(lambda w: lora_fx.optimize(lora_fx.unflatten(w.adapted))),
         ("tree of blocks",)),
    Case("distribute/no mesh", answer(lambda w: lora_fx.distribute(w.adapted, None)), ("mesh=None",)),
    Case("distribute/a name", answer(lambda w: lora_fx.distribute(w.adapted, "tp")), ("mesh='tp'", "DeviceMesh")),
    Case("distribute/a model", answer(lambda w: lora_fx.distribute(w.model, None)), ("Small", "trace")),
    Case("distribute/a plan of a model", answer(lambda w: lora_fx.tensor_parallel_plan(w.model)), ("Small", "trace")),
    Case("flat/assigned", flat_step(assign), ("lora_A.default.weight", "exchanged")),
    Case("flat/exchanged", flat_step(exchange), ("fc0.lora_A.default.weight", "exchanged")),
    Case("flat/moved", flat_step(lambda gm: gm.double()), ("lora_A.default.weight", "moved")),
    Case("flat/deleted", flat_step(lambda gm: lora_fx.delete_adapter(gm, "default")), ("default.weight", "deleted")),
    Case("flat/one frozen", flat_step(freeze_one), ("fc0.lora_A.default.weight", "no gradient")),
    Case("flat/copied", answer(lambda w: copy.deepcopy(first(w, of_stacks=False))), ("flat parameter",)),
    Case("flat/hooked", answer(lambda w: first(w, of_stacks=False).register_hook(print)), ("hooks",)),
    Case("flat/no adapter", answer(lambda w: lora_fx.flat_parameters(w.gm)), ("no adapter",)),
    Case("batch/assigned", part_step(assign), ("lora_A.stacked.weight", "exchanged")),
    Case("batch/moved", part_step(lambda gm: gm.double()), ("lora_A.stacked.weight", "moved")),
    Case("batch/copied", answer(lambda w: copy.deepcopy(first(w, of_stacks=True))), ("part of a parameter",)),
    Case("batch/hooked", answer(lambda w: first(w, of_stacks=True).register_hook(print)), ("hooks",)),
    Case("batch/of two types", answer(mixed_dtypes), ("fc0", "torch.float64", "adapter_dtype")),
    Case("batch/folded", answer(lambda w: lora_fx.fold(batched(w))), ("batch_adapters",)),
    Case("batch/optimised", answer(lambda w: lora_fx.optimize(batched(w))), ("batch_adapters",)),
    *(Case(f"no parameter/{how} {path}, {name}", changed_weight(call, path, how), (path, word))
      for how, path, word in (("pruned", "fc0.lora_A.default", "prune.remove"),
                              ("parametrized", "fc1.lora_B.default", "remove_parametrizations"))
      for name, call in (("folded", lora_fx.fold), ("listed", lora_fx.lora_parameters))),
    Case("no parameter/a pruned base, folded", changed_weight(lora_fx.fold, "fc0", "pruned"), ("'fc0'", "prune")),
    Case("meta/folded", on_meta(lora_fx.fold), ("fc0.weight", "bind_weights")),
    Case("meta/measured", on_meta(lora_fx.adapter_statistics), ("fc0.weight", "bind_weights")),
    Case("meta/its effect", on_meta(lora_fx.check_effect), ("meta device", "bind_weights")),
    Case("meta/compared", on_meta(lambda gm: lora_fx.assert_equivalent(gm, gm, (IDS.to("meta"),))),
         ("output 0", "bind_weights")),
    Case("meta/decomposed", on_meta(lookup), ("pissa", "'fc0'", "bind_weights")),
    Case("meta/no such device", bind(device="gpu9"), ("device='gpu9'",), base),
    Case("meta/a device that is not there", bind(device="cuda:99"), ("device='cuda:99'",), base),
    Case("meta/no device", bind(device=None), ("device=None",), base),
    Case("meta/buffers of numbers", bind(buffers={"a": 1.0}), ("buffers",), base),
    Case("meta/a list of buffers", bind(buffers=["a"]), ("buffers",), base),
    Case("inference mode/trained afterwards", trained_after_inference_mode),
    Case("checkpoints/adapter/a list", fold_of(["a"]), ("adapter=['a']",), base),
    Case("checkpoints/adapter/none", fold_of(None), ("adapter=None",), base),
    Case("checkpoints/adapter/a zero byte", fold_of("a\0"), ("adapter=",), base),
]  # fmt: skip

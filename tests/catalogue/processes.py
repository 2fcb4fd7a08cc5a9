"""Graphs that are spread over processes, asked for what they cannot do; a world of one process shows it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from catalogue.harness import IDS, Case, World, same
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

import lora_fx
from lora_fx import sharding

PLAN = {"fc0": "colwise", "fc1": "rowwise"}
CONFIG = {"r": 2, "lora_alpha": 5, "target_modules": ["fc0"]}


def mesh_of(world: World, *names: str) -> DeviceMesh:
    """A mesh of one process, with a dimension for each name."""
    if "group" not in world.extra:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        world.extra["group"] = True
    return init_device_mesh("cpu", (1,) * len(names), mesh_dim_names=names)


def split(world: World) -> None:
    world.extra["spread"] = lora_fx.distribute(world.adapted, mesh_of(world, "tp"), PLAN)


def shard(world: World) -> None:
    tree = lora_fx.unflatten(copy.deepcopy(world.adapted))
    world.extra["spread"] = fully_shard(tree, mesh=mesh_of(world, "dp"))


def distributed(gm: Callable[[World], Any] = lambda world: world.adapted, plan: Any = PLAN, names: Any = ("tp",)):
    """A call that must not succeed."""

    def call(world: World) -> object:
        lora_fx.distribute(gm(world), mesh_of(world, *names), plan)
        return False

    return call


def ask(call: Callable[[Any, World], object]) -> Callable[[World], object]:
    """Something of the spread graph that must not succeed."""
    return lambda world: call(world.extra["spread"], world) is NotImplemented


def without_a_group(world: World) -> object:
    mesh = mesh_of(world, "tp")
    dist.destroy_process_group()
    lora_fx.distribute(world.adapted, mesh, PLAN)
    return False


def along_a_slice(world: World) -> object:
    return same(lora_fx.distribute(world.adapted, mesh_of(world, "dp", "tp")["tp"], PLAN)(IDS), world.adapted(IDS))


def by_names(world: World) -> object:
    return same(lora_fx.distribute(world.adapted, mesh_of(world, "tp"))(IDS), world.adapted(IDS))


def stepped(world: World) -> object:
    """Only what trains moves, and the graph that was split does not."""
    gm, before = world.extra["spread"], world.adapted(IDS)
    gm(IDS).square().sum().backward()
    torch.optim.SGD(lora_fx.lora_parameters(gm), lr=0.1).step()
    frozen = [p for p in gm.parameters() if not p.requires_grad]
    return same(world.adapted(IDS), before) and all(p.grad is None for p in frozen) and not same(gm(IDS), before)


def saved(world: World) -> object:
    lora_fx.save_adapter(world.extra["spread"], world.here / "new")
    return (world.here / "new" / "adapter_model.safetensors").read_bytes() == (
        world.adapter / "adapter_model.safetensors"
    ).read_bytes()


def folded(world: World) -> object:
    gm, expected = lora_fx.fold(world.extra["spread"]), lora_fx.fold(world.adapted)
    values = gm.state_dict()
    return gm.code == expected.code and all(torch.equal(v, values[k]) for k, v in expected.state_dict().items())


def gathered(world: World) -> object:
    found = {n: sharding.whole(p) for n, p in world.extra["spread"].named_parameters()}
    return all(torch.equal(found[n], p) for n, p in world.adapted.named_parameters())


def on_meta(world: World) -> Any:
    with torch.device("meta"):
        model = type(world.model)().eval()
    return lora_fx.inject(lora_fx.trace(model, (IDS.to("meta"),)), CONFIG)


REFUSED: dict[str, Callable[[Any, World], object]] = {
    "another adapter": lambda gm, w: lora_fx.inject(gm, CONFIG, adapter_name="other"),
    "a loaded adapter": lambda gm, w: lora_fx.load_adapter(gm, w.adapter, adapter_name="other"),
    "a deleted adapter": lambda gm, w: lora_fx.delete_adapter(gm, "default"),
    "swapped": lambda gm, w: lora_fx.swap_adapter(gm, "default", w.adapter),
    "its effect": lambda gm, w: lora_fx.check_effect(gm),
    "compared": lambda gm, w: lora_fx.compare_graphs(gm, w.adapted),
}

CASES = [
    Case("processes/no group any more", without_a_group, ("process group",)),
    Case("processes/two dimensions", distributed(names=("dp", "tp")), ("2 dimensions", "'tp'", 'mesh["tp"]')),
    Case("processes/a slice of two", along_a_slice),
    Case("processes/a plan of nothing", distributed(plan={}), ("nothing to split",)),
    Case("processes/split by its names", by_names),
    Case("processes/a plan of no site", distributed(plan={"fc9": "rowwise"}), ("'fc9'", "no site")),
    Case("processes/a plan of numbers", distributed(plan={0: "rowwise"}), ("{0: 'rowwise'}", "mapping")),
    Case("processes/a plan of another side", distributed(plan={"fc0": "columnwise"}), ("'columnwise'", "'colwise'")),
    Case("processes/a plan without sides", distributed(plan=["fc0"]), ("plan=['fc0']", "mapping")),
    Case("processes/a side that is a list", distributed(plan={"fc0": ["colwise"]}), ("['colwise']", "mapping")),
    Case("processes/a plan of an embedding", distributed(plan={"words": "colwise"}), ("'words'", "embedding")),
    Case("processes/split twice", distributed(lambda w: w.extra["spread"]), ("spread over processes",), split),
    Case("processes/split when sharded", distributed(lambda w: w.extra["spread"]), ("spread over processes",), shard),
    Case("processes/split when optimised", distributed(lambda w: lora_fx.optimize(w.adapted)), ("optimize",)),
    Case("processes/split when batched", distributed(lambda w: lora_fx.batch_adapters(w.adapted)), ("batch_adapters",)),
    Case("processes/split without weights", distributed(on_meta), ("meta", "bind_weights")),
    Case("processes/split, unflattened", ask(lambda gm, w: lora_fx.unflatten(gm)), ("the other order",), split),
    Case("processes/sharded, unflattened", ask(lambda gm, w: lora_fx.unflatten(gm)), ("tree of blocks",), shard),
    *(Case(f"processes/{way}, {name}", ask(call), ("spread over processes",), damage)
      for way, damage in (("split", split), ("sharded", shard)) for name, call in REFUSED.items()),
    *(Case(f"processes/{way}, {name}", ask(call), words, damage)
      for way, damage in (("split", split), ("sharded", shard)) for name, call, words in (
          ("folded in place", lambda gm, w: lora_fx.fold(gm, inplace=True), ("inplace=True",)),
          ("optimised", lambda gm, w: lora_fx.optimize(gm), ("spread over processes",)))),
    *(Case(f"processes/{way}, {name}", call, (), damage, changes=name in ("stepped", "saved"))
      for way, damage in (("split", split), ("sharded", shard))
      for name, call in (("stepped", stepped), ("saved", saved), ("folded", folded), ("gathered", gathered))),
]  # fmt: skip

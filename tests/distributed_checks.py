"""What several processes check together; `test_distributed.py` runs this file once, and has a test for each line of it.

    python distributed_checks.py cpu|cuda OUT

Models are traced and trained in one process first, which then forks: 2 processes with gloo on CPUs, then 4; or one
process for each GPU, with NCCL. OUT gets {"world name": [the error of each rank, or ""]}.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import importlib.util
import io
import json
import multiprocessing
import os
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import transformers
from torch import fx, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointWrapper,
    apply_activation_checkpointing,
)
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils import _pytree as pytree

import lora_fx
from lora_fx import adapters

STEPS, LR, BATCH = 20, 1e-2, 8
EPS = torch.finfo(torch.float32).eps
# Losses are means of the same numbers, summed in another order: as everywhere here, 32 eps.
LOSS_TOLERANCE = 32 * EPS
# Adam divides a gradient by its own size, so a step is off by lr times the gradient's relative error: 2¹⁰ eps leaves
# room for gradients that cancel to a thousandth of their terms.
WEIGHT_TOLERANCE = 1024 * EPS * STEPS * LR
CONFIG = {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"]}
LAYERS = 2


@dataclass(frozen=True)
class World:
    """Where a check runs, and what one process found before."""

    rank: int
    size: int
    mesh: DeviceMesh
    directory: Path
    base: fx.GraphModule
    gm: fx.GraphModule
    trained: Trained
    tied: fx.GraphModule
    modes: fx.GraphModule
    narrow: fx.GraphModule

    @property
    def device(self) -> torch.device:
        return torch.device(self.mesh.device_type)

    def own(self, batch: torch.Tensor) -> torch.Tensor:
        """This rank's part of a batch."""
        return batch.chunk(self.size)[self.rank].to(self.device)

    def mean(self, value: torch.Tensor) -> float:
        total = value.detach().clone()
        dist.all_reduce(total)
        return float(total) / self.size


@dataclass(frozen=True)
class Trained:
    """What training gave: the loss of each step, and the adapter's values."""

    losses: list[float]
    values: dict[str, torch.Tensor]


# What is trained -----------------------------------------------------------------------------------

SIZES = {
    "vocab_size": 97,
    "hidden_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "intermediate_size": 72,
    "max_position_embeddings": 64,
}


def batch(step: int) -> torch.Tensor:
    return torch.randint(0, 97, (BATCH, 11), generator=torch.Generator().manual_seed(100 + step))


def traced(model: nn.Module) -> fx.GraphModule:
    return lora_fx.trace(model.eval(), (), {"input_ids": batch(-1), "use_cache": False})


def adapted(gm: fx.GraphModule) -> fx.GraphModule:
    torch.manual_seed(7)
    return lora_fx.inject(gm, CONFIG)


def llama(**options: object) -> nn.Module:
    torch.manual_seed(1)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SIZES, **options}))


class Dropping(nn.Module):
    """Two modes: dropout of its own, in layers behind a number."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(7, 7), nn.Dropout(0.3)) for _ in range(2))
        self.head = nn.Linear(7, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return self.head(x)


class Attending(nn.Module):
    """Dropout between sites that are split by outputs and by inputs, which have biases."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(12, 16) for _ in range(3))
        self.o_proj, self.drop = nn.Linear(16, 12), nn.Dropout(0.3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (site(x).unflatten(-1, (4, 4)).transpose(1, 2) for site in (self.q_proj, self.k_proj, self.v_proj))
        mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=0.2 if self.training else 0.0)
        return self.o_proj(F.dropout(self.drop(mixed.transpose(1, 2).flatten(2)), 0.1, self.training))


def dropping() -> fx.GraphModule:
    gm = lora_fx.trace(Dropping(), torch.randn(5, 7))
    return lora_fx.inject(gm, lora_fx.LoraConfig(r=2, lora_dropout=0.2, target_modules="all-linear"))


def loss_of(model: Callable[..., object], ids: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=ids, use_cache=False).logits
    return F.cross_entropy(logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten())


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range, part=lambda ids: ids) -> list[float]:
    losses = []
    for step in steps:
        loss = loss_of(model, part(batch(step)))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return losses


def adamw(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=LR)


def alone(gm: fx.GraphModule) -> Trained:
    """Trained in one process, on whole batches."""
    gm = copy.deepcopy(gm).train()
    losses = train(gm, adamw(lora_fx.lora_parameters(gm)), range(STEPS))
    return Trained([float(loss) for loss in losses], values_of(gm))


def values_of(model: nn.Module) -> dict[str, torch.Tensor]:
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return {name: whole(p).detach().cpu().clone() for name, p in trained.items()}


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def sharded(world: World, gm: fx.GraphModule, *, within: tuple[str, ...] = (), **options: object) -> fx.GraphModule:
    """The graph as a tree whose layers, and blocks within them, are sharded one by one."""
    gm = gm.to(world.device)
    tree = gm if any(isinstance(m, lora_fx.Block) for m in gm.modules()) else lora_fx.unflatten(gm, blocks=within)
    for block in reversed([m for m in tree.modules() if isinstance(m, lora_fx.Block)]):  # inner ones first
        fully_shard(block, mesh=world.mesh, **options)
    return fully_shard(tree, mesh=world.mesh, **options)


def assert_as_alone(world: World, losses: list[torch.Tensor], model: nn.Module, alone: Trained, start: int = 0) -> None:
    found = [world.mean(loss) for loss in losses]
    for mine, theirs in zip(found, alone.losses[start:], strict=True):
        assert abs(mine - theirs) <= LOSS_TOLERANCE * abs(theirs), (found, alone.losses)
    assert_close(values_of(model), alone.values)


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], most: float = WEIGHT_TOLERANCE):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        apart = float((found[name] - value).abs().max())
        assert apart <= most, (name, apart, most)


def assert_same(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert len(found) == len(expected)
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.dtype == theirs.dtype
        assert torch.equal(mine, theirs), float((mine - theirs).abs().max())


# The checks: functions named as they are reported --------------------------------------------------


def check_ddp_trains_as_one_process(world: World) -> None:
    gm = world.gm.to(world.device).train()
    model = DistributedDataParallel(gm)
    losses = train(model, adamw(lora_fx.lora_parameters(gm)), range(STEPS), world.own)
    assert_as_alone(world, losses, gm, world.trained)


def check_fsdp_trains_as_one_process(world: World) -> None:
    tree = sharded(world, world.gm).train()
    before = {name: whole(p).clone() for name, p in tree.named_parameters() if not p.requires_grad}
    losses = train(tree, adamw(lora_fx.lora_parameters(tree)), range(STEPS), world.own)
    assert_as_alone(world, losses, tree, world.trained)
    for name, parameter in tree.named_parameters():
        assert isinstance(parameter, DTensor), name
        assert parameter.to_local().numel() < parameter.numel(), name
        assert parameter.requires_grad == ("lora_" in name), name
        if name in before:
            assert torch.equal(whole(parameter), before[name]), name


def check_a_sharded_graph_computes_what_the_whole_one_does(world: World) -> None:
    x = torch.randn(3, 7, generator=torch.Generator().manual_seed(world.rank)).to(world.device)
    for gm, arguments in ((world.modes, {"x": x}), (world.gm, {"input_ids": world.own(batch(0)), "use_cache": False})):
        gm = gm.to(world.device)
        tree = sharded(world, copy.deepcopy(gm), within=("self_attn", "mlp") if gm is world.gm else ())
        for mode in (True, False, True):
            gm.train(mode), tree.train(mode)
            seeded = functools.partial(torch.manual_seed, 3)
            found = [(seeded(), tensors(each(**arguments)))[1] for each in (tree, gm)]
            assert_same(*found)


def check_tied_weights_and_blocks_within_blocks(world: World) -> None:
    for gm, within in ((world.tied, ()), (world.gm, ("self_attn", "mlp", "q_proj"))):
        expected = train(copy.deepcopy(gm).train(), adamw([nn.Parameter(torch.zeros(1))]), range(1))
        gm = gm.to(world.device)
        whole_losses = train(copied := copy.deepcopy(gm).train(), adamw(lora_fx.lora_parameters(copied)), range(4))
        tree = sharded(world, gm, within=within).train()
        losses = train(tree, adamw(lora_fx.lora_parameters(tree)), range(4), world.own)
        assert abs(float(expected[0]) - world.mean(losses[0])) <= LOSS_TOLERANCE * float(expected[0])
        assert_as_alone(world, losses, tree, Trained([float(loss) for loss in whole_losses], values_of(copied)))


def check_adapters_are_switched_and_found_on_shards(world: World) -> None:
    gm = randomised(world.gm.to(world.device))
    tree = sharded(world, copy.deepcopy(gm)).eval()
    ids = world.own(batch(0))
    with torch.no_grad():
        assert_same(tensors(tree(input_ids=ids, use_cache=False)), tensors(gm(input_ids=ids, use_cache=False)))
        assert all(isinstance(p, DTensor) for p in lora_fx.lora_parameters(tree))  # right after a forward
        with lora_fx.disable_adapters(tree), lora_fx.disable_adapters(gm):
            found = [tensors(each(input_ids=ids, use_cache=False)) for each in (tree, gm)]
        assert_same(*found)
        assert not torch.equal(found[1][0], tensors(gm(input_ids=ids, use_cache=False))[0])
        lora_fx.set_adapters(tree, {"default": 0.5}), lora_fx.set_adapters(gm, {"default": 0.5})
        assert_same(tensors(tree(input_ids=ids, use_cache=False)), tensors(gm(input_ids=ids, use_cache=False)))


def check_save_adapter_writes_what_one_process_writes(world: World) -> None:
    gm = randomised(world.gm)
    tree = sharded(world, copy.deepcopy(gm)).eval()
    with torch.no_grad():  # which leaves the root's parameters gathered
        tree(input_ids=world.own(batch(0)), use_cache=False)
    calls = []
    written = adapters.replace_in_directory
    with mock.patch("lora_fx.adapters.replace_in_directory", lambda *args: (calls.append(args), written(*args))):
        lora_fx.save_adapter(tree, world.directory / f"together_{world.size}")
    assert len(calls) == (world.rank == 0)
    lora_fx.save_adapter(gm.cpu(), world.directory / f"alone_{world.size}_{world.rank}")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        together = (world.directory / f"together_{world.size}" / name).read_bytes()
        assert together == (world.directory / f"alone_{world.size}_{world.rank}" / name).read_bytes(), name


KINDS = {
    "dora": {"use_dora": True},
    "lookups": {"target_modules": ["embed_tokens", "q_proj"], "modules_to_save": ["lm_head"]},
    "rows": {"trainable_token_indices": {"embed_tokens": [3, 5, 8]}, "init_lora_weights": "pissa"},
}


def check_adapters_of_every_kind_are_read_from_shards(world: World) -> None:
    everything = batch(0).to(world.device)
    for kind, options in KINDS.items():
        gm = randomised(lora_fx.inject(world.base, {**CONFIG, **options}).to(world.device)).train()
        loss_of(gm, everything).backward()
        expected = {name: p.grad for name, p in gm.named_parameters() if p.grad is not None}
        largest = max(float(gradient.abs().max()) for gradient in expected.values())
        out = world.directory / f"{kind}_alone_{world.rank}"
        lora_fx.save_adapter(gm, out)
        folded = list(lora_fx.fold(gm).state_dict().values())
        split, tree = lora_fx.distribute(gm, world.mesh), sharded(world, copy.deepcopy(gm))
        for way, model, ids in (("split", split, everything), ("sharded", tree, world.own(batch(0)))):
            loss_of(model.train(), ids).backward()
            found = {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}
            assert found.keys() == expected.keys(), (kind, way)
            for name, gradient in expected.items():
                assert float((found[name] - gradient).abs().max()) <= LOSS_TOLERANCE * largest, (kind, way, name)
            together = world.directory / f"{kind}_{way}"
            lora_fx.save_adapter(model, together)
            for name in ("adapter_config.json", "adapter_model.safetensors"):
                assert (together / name).read_bytes() == (out / name).read_bytes(), (kind, way, name)
            assert_same(list(lora_fx.fold(model).state_dict().values()), folded)


def check_a_failed_save_fails_in_every_process(world: World) -> None:
    tree = sharded(world, world.gm)
    for error, others in ((OSError("disk full"), lora_fx.AdapterError), (MemoryError("none"), lora_fx.LoraFxError)):
        own = MemoryError if world.rank == 0 and isinstance(error, MemoryError) else others
        with mock.patch("lora_fx.adapters.replace_in_directory", mock.Mock(side_effect=error)):
            message = str(raised(own, lambda: lora_fx.save_adapter(tree, world.directory / "nowhere")))
        assert str(error) in message
    assert not (world.directory / "nowhere").exists()


def check_fold_gives_what_one_process_folds(world: World) -> None:
    gm = randomised(world.gm.to(world.device))
    tree = sharded(world, copy.deepcopy(gm))
    raised(lora_fx.FoldError, lambda: lora_fx.fold(tree, inplace=True))
    folded, expected = lora_fx.fold(tree), lora_fx.fold(gm)
    assert folded.code == expected.code
    found, values = folded.state_dict(), expected.state_dict()
    assert list(found) == list(values)
    assert_same(list(found.values()), list(values.values()))
    assert str(lora_fx.fold_report(folded)) == str(lora_fx.fold_report(expected))
    assert all(isinstance(p, DTensor) for p in tree.parameters())
    ids = world.own(batch(0))
    assert_same(tensors(folded(input_ids=ids, use_cache=False)), tensors(expected(input_ids=ids, use_cache=False)))


def check_a_checkpoint_goes_on_in_another_world(world: World) -> None:
    path, half, options = world.directory / "checkpoint", STEPS // 2, StateDictOptions(ignore_frozen_params=True)
    if not path.exists():  # the first world; others read what it wrote
        tree = sharded(world, copy.deepcopy(world.gm)).train()
        optimizer = adamw(lora_fx.lora_parameters(tree))
        train(tree, optimizer, range(half), world.own)
        model, optim = get_state_dict(tree, optimizer, options=options)
        assert set(model) == set(world.trained.values)
        dcp.save({"model": model, "optim": optim}, checkpoint_id=path)
    tree = sharded(world, world.gm).train()
    losses = resumed(tree, path, world.own)
    assert_as_alone(world, losses, tree, world.trained, start=half)


def resumed(model: nn.Module, path: Path, part=lambda ids: ids) -> list[torch.Tensor]:
    """The losses of the second half of the training, from the checkpoint of the first."""
    options = StateDictOptions(ignore_frozen_params=True, strict=False)
    optimizer = adamw(lora_fx.lora_parameters(model))
    state, optim = get_state_dict(model, optimizer, options=options)
    dcp.load({"model": state, "optim": optim}, checkpoint_id=path)
    set_state_dict(model, optimizer, model_state_dict=state, optim_state_dict=optim, options=options)
    return train(model, optimizer, range(STEPS // 2, STEPS), part)


def check_mixed_precision_computes_what_bfloat16_does(world: World) -> None:
    """FSDP2 casts parameters of float32 to bfloat16 before each layer; alone, the graph of that dtype on cast ones."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    alone = randomised(world.narrow.to(world.device)).train()
    tree = sharded(world, copy.deepcopy(alone), mp_policy=policy).train()

    def cast(**inputs: object) -> object:
        narrow = {name: p.bfloat16() for name, p in alone.named_parameters()}
        return torch.func.functional_call(alone, narrow, kwargs=inputs)

    ids = world.own(batch(0))
    assert_same(tensors(tree(input_ids=ids, use_cache=False)), tensors(cast(input_ids=ids, use_cache=False)))
    losses = []
    for model, own in ((tree, world.own), (cast, lambda ids: ids.to(world.device))):
        optimizer = adamw(lora_fx.lora_parameters(tree if model is tree else alone))
        losses.append([float(x) for x in train(model, optimizer, range(STEPS), own)])
    together = [world.mean(torch.tensor(x, device=world.device)) for x in losses[0]]
    eps = torch.finfo(torch.bfloat16).eps
    assert together[-1] != losses[1][-1]  # not the same sums
    assert abs(together[0] - together[-1]) > eps
    for mine, theirs in zip(together, losses[1], strict=True):
        assert abs(mine - theirs) <= 4 * eps * abs(theirs), (together, losses[1])
    assert all(p.dtype == torch.float32 for p in tree.parameters())
    folded = lora_fx.fold(tree)
    assert folded.code == lora_fx.fold(world.gm).code
    assert tensors(folded(input_ids=ids, use_cache=False))[0].dtype == torch.float32


def check_split_weights_train_as_one_process(world: World) -> None:
    gm = world.gm.to(world.device).train()
    plan = lora_fx.tensor_parallel_plan(gm, world.size)
    assert len(plan) == 7 * LAYERS
    split = lora_fx.distribute(gm, world.mesh, plan)
    for name, parameter in split.named_parameters():
        side = next((plan[site] for site in plan if name.startswith(f"{site}.")), None)
        whole_side = "colwise" if "lora_A" in name else "rowwise" if "lora_B" in name else None
        is_split = side is not None and side != whole_side
        assert isinstance(parameter, DTensor) == (is_split or parameter.requires_grad), name
        assert not is_split or parameter.to_local().numel() * world.size == parameter.numel(), name
    assert "the other order" in str(raised(lora_fx.GraphError, lambda: lora_fx.unflatten(split)))
    losses = train(split, adamw(lora_fx.lora_parameters(split)), range(STEPS), lambda ids: ids.to(world.device))
    assert_as_alone(world, losses, split, world.trained)


def check_split_weights_are_saved_and_folded(world: World) -> None:
    gm = randomised(world.gm.to(world.device))
    split = lora_fx.distribute(gm, world.mesh)
    lora_fx.save_adapter(split, world.directory / f"split_{world.size}")
    lora_fx.save_adapter(gm, world.directory / f"whole_{world.size}_{world.rank}")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        written = (world.directory / f"split_{world.size}" / name).read_bytes()
        assert written == (world.directory / f"whole_{world.size}_{world.rank}" / name).read_bytes(), name
    folded, expected = lora_fx.fold(split), lora_fx.fold(gm)
    assert folded.code == expected.code
    assert_same(list(folded.state_dict().values()), list(expected.state_dict().values()))
    ids = batch(0).to(world.device)
    for strength in (0.5, 0.0):
        for each in (split, gm):
            lora_fx.set_adapters(each, {"default": strength} if strength else {})
        found, expected = (each(input_ids=ids, use_cache=False).logits.detach() for each in (split, gm))
        assert float((found - expected).abs().max()) <= 32 * EPS * 7 * LAYERS * float(expected.abs().max())


def check_split_weights_drop_what_one_process_drops(world: World) -> None:
    """By the same seed: inside of attention, between sites, and in adapters; as functions, ops and modules."""
    x = torch.randn(3, 5, 12, generator=torch.Generator().manual_seed(4)).to(world.device)
    model = Attending().to(world.device).train()
    for base in (lora_fx.trace(model, x), fx.symbolic_trace(model)):
        config = {"r": 3, "lora_alpha": 5, "lora_dropout": 0.2, "target_modules": "all-linear"}
        gm = randomised(lora_fx.inject(base, config)).train()
        split = lora_fx.distribute(gm, world.mesh, check=False)
        assert sum(isinstance(p, DTensor) and not p.requires_grad for p in split.parameters()) == 8
        found = []
        for each in (gm, split):
            torch.manual_seed(11)
            y = each(x)
            y.square().sum().backward()
            found.append([y.detach(), *(whole(p.grad) for p in lora_fx.lora_parameters(each))])
        for one, two in zip(*found, strict=True):
            assert float((one - two).abs().max()) <= 64 * EPS * float(one.abs().max())


def check_split_weights_are_measured_and_not_compared(world: World) -> None:
    gm = randomised(world.gm.to(world.device))
    split = lora_fx.distribute(gm, world.mesh)
    found, expected = lora_fx.adapter_statistics(split), lora_fx.adapter_statistics(gm)
    assert found == expected
    assert [*map(id, lora_fx.flat_parameters(split))] == [*map(id, lora_fx.lora_parameters(split))]
    assert "spread over processes" in str(raised(lora_fx.GraphError, lambda: lora_fx.compare_graphs(gm, split)))
    for mesh in (None, "tp", 2):
        assert "must be a DeviceMesh" in str(raised(lora_fx.ConfigError, lambda: lora_fx.distribute(gm, mesh)))  # noqa: B023


def check_wrapped_blocks_train_and_are_saved(world: World) -> None:
    """Activation checkpointing between the graph and its shards."""
    tree = lora_fx.unflatten(copy.deepcopy(world.gm).to(world.device)).train()
    apply_activation_checkpointing(tree, check_fn=lambda module: isinstance(module, lora_fx.Block))
    for wrapper in [module for module in tree.modules() if isinstance(module, CheckpointWrapper)]:
        fully_shard(wrapper, mesh=world.mesh)
    fully_shard(tree, mesh=world.mesh)
    train(tree, adamw(lora_fx.lora_parameters(tree)), range(1), world.own)
    lora_fx.save_adapter(tree, world.directory / "wrapped")
    loaded = lora_fx.load_adapter(lora_fx.fold(world.gm), world.directory / "wrapped", integrity="ignored")
    for mine, theirs in zip(lora_fx.lora_parameters(tree), lora_fx.lora_parameters(loaded), strict=True):
        assert torch.equal(whole(mine).cpu(), theirs)
    assert "CheckpointWrapper around what fully_shard" in str(raised(lora_fx.GraphError, lambda: lora_fx.fold(tree)))


def check_splitting_and_sharding_go_together(world: World) -> None:
    """A mesh of two dimensions: layers sharded along one, weights split along the other."""
    mesh = init_device_mesh(world.mesh.device_type, (world.size // 2, 2), mesh_dim_names=("dp", "tp"))
    tree = lora_fx.distribute(lora_fx.unflatten(world.gm.to(world.device)), mesh["tp"]).train()
    for block in tree.model.layers.children():
        fully_shard(block, mesh=mesh["dp"])
    fully_shard(tree, mesh=mesh["dp"])
    rank = mesh.get_local_rank("dp")
    steps, own = range(4), lambda ids: ids.chunk(world.size // 2)[rank].to(world.device)
    whole_losses = train(copied := copy.deepcopy(world.gm).train(), adamw(lora_fx.lora_parameters(copied)), steps)
    losses = train(tree, adamw(lora_fx.lora_parameters(tree)), steps, own)
    assert_as_alone(world, losses, tree, Trained([float(loss) for loss in whole_losses], values_of(copied)))
    lora_fx.save_adapter(tree, world.directory / "both")
    loaded = lora_fx.load_adapter(lora_fx.fold(world.gm), world.directory / "both", integrity="ignored")
    assert_close(values_of(loaded), values_of(tree), 0.0)


def check_heads_that_do_not_divide_are_refused(world: World) -> None:
    gm = randomised(world.tied.to(world.device))  # two heads of keys and values
    plan = lora_fx.tensor_parallel_plan(gm, world.size)
    if world.size > 2:
        message = str(raised(lora_fx.GraphError, lambda: lora_fx.distribute(gm, world.mesh, plan)))
        assert "attention heads divide by" in message
        plan = {site: side for site, side in plan.items() if not site.endswith(("k_proj", "v_proj"))}
    split = lora_fx.distribute(gm, world.mesh, plan)
    found, expected = (each(input_ids=batch(0).to(world.device), use_cache=False).logits for each in (split, gm))
    apart = float((found - expected).detach().abs().max() / expected.detach().abs().max())
    assert 0 < apart <= 32 * EPS * len(plan)


def check_what_cannot_be_done_with_shards_says_so(world: World) -> None:
    saved = world.directory / f"saved_{world.rank}"
    lora_fx.save_adapter(world.gm, saved)
    tree = sharded(world, world.gm)
    before = [whole(p).clone() for p in tree.parameters()]
    refused = {
        "inject": lambda: lora_fx.inject(tree, CONFIG, adapter_name="other"),
        "unflatten": lambda: lora_fx.unflatten(tree),
        "load": lambda: lora_fx.load_adapter(tree, saved, adapter_name="other"),
        "swap": lambda: lora_fx.swap_adapter(tree, "default", {"x": torch.ones(1)}),
        "delete": lambda: lora_fx.delete_adapter(tree, "default"),
        "check": lambda: lora_fx.check_effect(tree),
    }
    for name, call in refused.items():
        message = str(raised(lora_fx.GraphError, call))
        assert name == "unflatten" or ("spread over processes" in message and "Do that before" in message), message
    assert_same([whole(p) for p in tree.parameters()], before)


def check_the_example_trains_and_saves(world: World) -> None:
    path = Path(__file__).parents[1] / "examples" / "train_distributed.py"
    spec = importlib.util.spec_from_file_location("train_distributed", path)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    out = world.directory / "example"
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        example.train(argparse.Namespace(strategy="fsdp", steps=6, lr=1e-2, bf16=False, out=out), world.mesh)
    losses = [float(line.rpartition(" ")[2]) for line in printed.getvalue().splitlines()]
    assert len(losses) == (6 if world.rank == 0 else 0)
    assert world.rank != 0 or losses[-1] < losses[0] - 0.1, losses
    assert lora_fx.read_adapter(out).config.r == 8


def raised(kind: type[BaseException], call: Callable[[], object]) -> BaseException:
    try:
        call()
    except kind as error:
        return error
    raise AssertionError(f"no {kind.__name__}")


def tensors(output: object) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, torch.Tensor)]


def randomised(gm: fx.GraphModule) -> fx.GraphModule:
    """B other than 0, so that the adapter counts."""
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for name, parameter in gm.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 10)
    return gm


# Where the number of processes makes no other thing of it, two are enough; and a mesh of two dimensions needs four.
OF_TWO = {
    check_adapters_of_every_kind_are_read_from_shards,
    check_fold_gives_what_one_process_folds,
    check_save_adapter_writes_what_one_process_writes,
    check_a_failed_save_fails_in_every_process,
    check_a_sharded_graph_computes_what_the_whole_one_does,
    check_adapters_are_switched_and_found_on_shards,
    check_mixed_precision_computes_what_bfloat16_does,
    check_split_weights_are_saved_and_folded,
    check_split_weights_train_as_one_process,
    check_the_example_trains_and_saves,
    check_tied_weights_and_blocks_within_blocks,
    check_what_cannot_be_done_with_shards_says_so,
}
OF_FOUR = {check_splitting_and_sharding_go_together}
CHECKS = {name.removeprefix("check_"): check for name, check in list(globals().items()) if name.startswith("check_")}


def checks_of(size: int, device: str = "cpu") -> list[str]:
    """Those that are made in a world of that size; on GPUs there is one."""
    left_out = OF_TWO if size > 2 and device == "cpu" else set() if size % 2 == 0 and size > 2 else OF_FOUR
    return [name for name, check in CHECKS.items() if check not in left_out]


def run(rank: int, size: int, device: str, start: dict[str, object], directory: Path) -> None:
    """All checks in one process; its file gets the errors."""
    os.environ |= {"LOCAL_RANK": str(rank), "RANK": str(rank), "WORLD_SIZE": str(size)}
    if device == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        "nccl" if device == "cuda" else "gloo",
        init_method=f"file://{directory}/store_{size}",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=60),
    )
    world = World(rank, size, init_device_mesh(device, (size,)), directory, **start)
    errors = {}
    for name in checks_of(size, device):
        try:
            CHECKS[name](World(**{**world.__dict__, **{k: copy.deepcopy(v) for k, v in start.items()}}))
            errors[name] = ""
        except BaseException:  # checkpoints fail with one of their own
            errors[name] = traceback.format_exc()
            print(f"{size} processes, rank {rank}: {name}\n{errors[name]}", file=sys.stderr, flush=True)
    (directory / f"errors_{size}_{rank}.json").write_text(json.dumps(errors))
    dist.barrier()
    os._exit(0)  # gloo's threads may wait for each other for ever when processes that were forked end


def main(device: str, out: Path) -> None:
    """Run the checks in all worlds, and write what they found."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    model = llama()  # which has to live for its graph to be had in bfloat16
    base = traced(model)
    gm = adapted(base)
    start = {
        "base": base,
        "gm": gm,
        "trained": alone(gm),
        "tied": adapted(traced(llama(tie_word_embeddings=True, num_key_value_heads=2))),
        "modes": dropping(),
        "narrow": lora_fx.unflatten(gm, dtype=torch.bfloat16),
    }
    sizes = (2, 4) if device == "cpu" else (torch.cuda.device_count(),)
    results = {}
    with tempfile.TemporaryDirectory() as name:
        for size in sizes:
            fork = multiprocessing.get_context("fork")
            ranks = [fork.Process(target=run, args=(rank, size, device, start, Path(name))) for rank in range(size)]
            for process in ranks:
                process.start()
            for process in ranks:
                process.join(150)
                process.kill()
            files = [Path(name) / f"errors_{size}_{rank}.json" for rank in range(size)]
            found = [json.loads(file.read_text()) if file.exists() else {} for file in files]
            names = checks_of(size, device)
            results |= {f"{size} {check}": [each.get(check, "it ended before") for each in found] for check in names}
        try:
            losses = resumed(gm.train(), Path(name) / "checkpoint")
            for mine, theirs in zip(losses, start["trained"].losses[STEPS // 2 :], strict=True):
                assert abs(float(mine) - theirs) <= LOSS_TOLERANCE * abs(theirs), (losses, start["trained"].losses)
            assert_close(values_of(gm), start["trained"].values)
            results["1 a_checkpoint_goes_on_in_another_world"] = [""]
        except BaseException:
            results["1 a_checkpoint_goes_on_in_another_world"] = [traceback.format_exc()]
    out.write_text(json.dumps(results))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))

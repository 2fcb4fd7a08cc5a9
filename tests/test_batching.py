"""batch_adapters: rows of one batch that belong to different adapters."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from zoo import (
    BY_NAME,
    assert_same_bits,
    bits,
    distance,
    fingerprint,
    frozen,
    loss_of,
    randomise,
    run,
    tolerance,
    traced,
)

import lora_fx
from lora_fx import AdapterError, GraphError, LoraConfig, TargetError

NAMES = ("one", "two", "three")
SIZES = ((3, 5), (2, 7), (4, 3))  # r, lora_alpha
MODELS: dict[str, list[str]] = {
    "mlp": ["fc1", "fc2"],
    "stack": ["q_proj", "up", "head"],
    "addmm": ["c_attn", "c_proj"],
    "einsum": ["a", "b", "c", "d"],
    "called_twice": ["fc"],
    "shared_parameter": ["a", "b", "out"],
    "no_grad": ["fc"],
    "kernels": ["one", "up", "two"],
    "gpt2": ["c_attn", "mlp.c_proj", "lm_head"],  # whose rows lie flattened together
    "bert": ["query", "dense"],
    "llama": ["q_proj", "down_proj", "embed_tokens"],
    "qwen3": ["embed_tokens"],
}


def several(name: str, targets: Any = None, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    gm = traced(BY_NAME[name], "trace", dtype)
    targets = MODELS[name] if targets is None else targets
    for adapter, (r, alpha) in zip(NAMES, SIZES, strict=True):
        config = LoraConfig(**{"r": r, "lora_alpha": alpha, "target_modules": targets} | options)
        gm = randomise(lora_fx.inject(gm, config, adapter_name=adapter), adapter, 0.5)
    return gm


def with_ids(arguments: Any, ids: torch.Tensor) -> Any:
    return arguments[0], {**arguments[1], "adapter_ids": ids}


def rows_of(arguments: Any) -> int:
    leaves = torch.utils._pytree.tree_leaves(arguments)
    return len(next(leaf for leaf in leaves if isinstance(leaf, torch.Tensor)))


def repeated(arguments: Any, times: int) -> Any:
    """More rows, in every tensor."""
    more = lambda leaf: leaf.repeat(times, *(1 for _ in leaf.shape[1:])) if isinstance(leaf, torch.Tensor) else leaf
    return torch.utils._pytree.tree_map(more, arguments)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_each_row_gets_its_adapter(name: str, dtype: torch.dtype) -> None:
    case = BY_NAME[name]
    if dtype not in case.dtypes:
        dtype = torch.float32
    ours = several(name, dtype=dtype, **({"ensure_weight_tying": True} if name == "qwen3" else {}))
    before = fingerprint(ours)
    batched = lora_fx.batch_adapters(ours)
    assert fingerprint(ours) == before
    arguments = case.arguments(dtype)
    if dtype is torch.float32:  # the zoo's other graphs are traced with the shapes that they are given
        arguments = repeated(arguments, 2)
    rows = rows_of(arguments)
    alone = []
    for adapters in ({}, *({name: 1.0} for name in NAMES)):
        lora_fx.set_adapters(ours, adapters)
        alone.append(run(ours, arguments))
    for mix in range(4):
        ids = (torch.arange(rows) + mix) % 4
        mixed = run(batched, with_ids(arguments, ids))
        for row, index in enumerate(ids.tolist()):
            for one, other in zip(mixed, alone[index], strict=True):
                assert distance([other[row]], [one[row]]) <= 2 * tolerance(case, dtype), (mix, row)
    assert distance(run(batched, with_ids(arguments, torch.zeros(rows, dtype=torch.int64))), mixed) > 1e-3


def test_id_zero_is_the_base_bit_for_bit() -> None:
    ours, arguments = several("llama"), BY_NAME["llama"].arguments()
    base = run(frozen(traced(BY_NAME["llama"])), arguments)
    batched = lora_fx.batch_adapters(ours)
    assert_same_bits(base, run(batched, with_ids(arguments, torch.zeros(2, dtype=torch.int64))))


def test_ids_follow_the_order_that_is_asked_for() -> None:
    ours, arguments = several("mlp"), BY_NAME["mlp"].arguments()
    batched = lora_fx.batch_adapters(ours, ["three", "one"])
    mixed = run(batched, with_ids(arguments, torch.tensor([1, 2, 0])))[0]
    for row, name in enumerate(("three", "one")):
        lora_fx.set_adapters(ours, name)
        assert distance([run(ours, arguments)[0][row]], [mixed[row]]) < 1e-6


@pytest.mark.parametrize("ids", [[4, 0, 0], [-1, 0, 0]])
def test_ids_that_are_none_are_refused(ids: list[int]) -> None:
    batched, arguments = lora_fx.batch_adapters(several("mlp")), BY_NAME["mlp"].arguments()
    with pytest.raises(IndexError, match="index out of range"):
        run(batched, with_ids(arguments, torch.tensor(ids)))
    with pytest.raises(GraphError, match="without input 'adapter_ids'"):
        run(batched, arguments)


def test_nothing_is_compiled_again_when_the_mix_changes() -> None:
    counts: list[int] = []

    def counting(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        counts.append(1)
        return graph.forward

    arguments = BY_NAME["llama"].arguments()
    batched = lora_fx.batch_adapters(several("llama"))
    torch._dynamo.reset()
    compiled = torch.compile(batched, backend=counting, fullgraph=True)
    for mix in ([1, 2], [0, 3], [3, 3], [0, 0]):
        ids = torch.tensor(mix)
        assert distance(run(batched, with_ids(arguments, ids)), run(compiled, with_ids(arguments, ids))) < 1e-6
    assert len(counts) == 1


@pytest.mark.parametrize("name", ["mlp", "gpt2", "llama"])
def test_training_is_that_of_each_adapter_on_its_rows(name: str) -> None:
    """Gradients of the stacked parameters are those of single adapters on their rows, and zero for the absent."""
    case = BY_NAME[name]
    ours, arguments = several(name), repeated(case.arguments(), 2)
    ours.eval()
    batched = lora_fx.batch_adapters(ours).eval()
    rows = rows_of(arguments)
    ids = torch.arange(rows) % 3  # never "three"

    def loss(output: Any, chosen: torch.Tensor) -> torch.Tensor:
        leaf = next(x for x in torch.utils._pytree.tree_leaves(output) if isinstance(x, torch.Tensor))
        return leaf[chosen].double().square().sum()

    loss(batched(*arguments[0], **arguments[1], adapter_ids=ids), torch.ones(rows, dtype=torch.bool)).backward()
    optimizer = torch.optim.SGD(lora_fx.lora_parameters(batched), lr=1e-3)
    optimizer.step()
    trained = lora_fx.unbatch_adapters(batched)
    for index, adapter in enumerate(NAMES, start=1):
        lora_fx.set_adapters(ours, adapter)
        single = lora_fx.lora_parameters(ours, adapter)
        loss(ours(*arguments[0], **arguments[1]), ids == index).backward()
        torch.optim.SGD(single, lr=1e-3).step()
        pairs = zip(single, lora_fx.lora_parameters(trained, adapter), strict=True)
        assert all(distance([one.detach()], [other.detach()]) < 1e-4 for one, other in pairs)
    gradients = [p.grad for p in lora_fx.lora_parameters(batched)]
    assert all(gradient is not None and gradient.any() for gradient in gradients)


def test_unbatching_gives_the_adapters_back() -> None:
    ours, arguments = several("gpt2"), BY_NAME["gpt2"].arguments()
    before = fingerprint(ours)
    batched = lora_fx.batch_adapters(ours)
    back = lora_fx.unbatch_adapters(batched)
    assert not lora_fx.compare_graphs(ours, back)
    assert_same_bits(run(ours, arguments), run(back, arguments))
    with torch.no_grad():
        for parameter in lora_fx.lora_parameters(batched):
            parameter.mul_(1.5)
    assert fingerprint(ours) == before
    back = lora_fx.unbatch_adapters(batched)
    for adapter in NAMES:
        for one, other in zip(
            lora_fx.lora_parameters(ours, adapter), lora_fx.lora_parameters(back, adapter), strict=True
        ):
            assert torch.equal(1.5 * one, other)
    lora_fx.set_adapters(back, "two")
    with pytest.warns(lora_fx.LoraFxWarning, match="untied"):
        assert distance(run(back, arguments), run(lora_fx.fold(back), arguments)) < 1e-5


@pytest.mark.parametrize(
    "options", [{"init_lora_weights": "pissa"}, {"target_modules": ["c_attn[q]", "c_attn[v]"]}], ids=["pissa", "parts"]
)
def test_adapters_that_are_stacked_at_each_call(options: dict[str, Any]) -> None:
    case = BY_NAME["gpt2"]
    gm, arguments = traced(case), case.arguments()
    for index, name in enumerate(NAMES[:2]):
        config = LoraConfig(**{"r": 2 + index, "lora_alpha": 5, "target_modules": ["c_attn"]} | options)
        gm = lora_fx.inject(gm, config, adapter_name=name)
        with torch.no_grad():
            for parameter in lora_fx.lora_parameters(gm, name):
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index)) * 0.2)
    batched = lora_fx.batch_adapters(gm)
    mixed = run(batched, with_ids(arguments, torch.tensor([2, 1])))[0]
    for row, name in enumerate(("two", "one")):
        lora_fx.set_adapters(gm, name)
        assert distance([run(gm, arguments)[0][row]], [mixed[row]]) < 1e-5
    loss_of(batched.train(), with_ids(arguments, torch.tensor([2, 1]))).backward()
    assert all(p.grad is not None for p in lora_fx.lora_parameters(batched))
    assert all(p.grad is None for p in gm.parameters())
    lora_fx.set_adapters(gm, ["one", "two"])
    back = lora_fx.unbatch_adapters(batched)
    assert {n: bits(p) for n, p in back.named_parameters()} == {n: bits(p) for n, p in gm.named_parameters()}


def test_dropout_falls_on_all_rows_alike() -> None:
    batched = lora_fx.batch_adapters(several("mlp", lora_dropout=0.5))
    arguments = with_ids(BY_NAME["mlp"].arguments(), torch.tensor([1, 2, 0]))
    assert distance(run(batched.eval(), arguments), run(batched.train(), arguments)) > 1e-2
    ours = lora_fx.inject(traced(BY_NAME["mlp"]), LoraConfig(target_modules=["fc1"], lora_dropout=0.1))
    ours = lora_fx.inject(ours, LoraConfig(target_modules=["fc1"]), adapter_name="other")
    with pytest.raises(AdapterError, match=r"different lora_dropout \(0.0, 0.1\)"):
        lora_fx.batch_adapters(ours)


# What is refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"lora_bias": True}, "lora_bias"),
        ({"modules_to_save": ["fc2"]}, "fc2"),
        ({"bias": "all"}, "bias"),
    ],
)
def test_adapters_that_are_more_than_a_and_b_are_refused(options: dict[str, Any], what: str) -> None:
    gm = lora_fx.inject(traced(BY_NAME["mlp"]), LoraConfig(r=2, target_modules=["fc1"], **options))
    before = fingerprint(gm)
    with pytest.raises(AdapterError, match=f"'default' is more than A and B.*{what}"):
        lora_fx.batch_adapters(gm)
    assert fingerprint(gm) == before


@pytest.mark.parametrize(
    ("name", "targets", "message"),
    [
        ("unread", ["pair"], r"'pair' \(bilinear\) cannot be batched"),
        ("experts", ["down"], "'down' .* cannot be batched"),
        ("multi_head", ["attn"], "mixes the rows of a batch"),
        ("vector", ["mv"], "not to be seen|no output of the graph|mixes the rows"),
    ],
)
def test_sites_that_do_not_see_rows_are_refused(name: str, targets: list[str], message: str) -> None:
    options = {"target_parameters": targets, "target_modules": []} if name == "experts" else {"target_modules": targets}
    gm = randomise(lora_fx.inject(traced(BY_NAME[name]), LoraConfig(r=2, **options)))
    with pytest.raises((GraphError, TargetError), match=message):
        lora_fx.batch_adapters(gm)


def test_groups_of_a_convolution_are_refused() -> None:
    gm = lora_fx.trace(nn.Sequential(nn.Conv1d(4, 6, 3, groups=2)).eval(), torch.randn(3, 4, 7))
    with pytest.raises(TargetError, match="'0' .conv1d. cannot be batched"):
        lora_fx.batch_adapters(lora_fx.inject(gm, LoraConfig(r=4, target_modules=["0"])))


def test_a_table_that_is_the_same_for_all_rows_is_refused() -> None:
    gm = lora_fx.inject(traced(BY_NAME["gpt2"]), LoraConfig(r=2, target_modules=["wpe"]))
    with pytest.raises(GraphError, match=r"'transformer.wpe' gives .* in which the batch .* is not to be seen"):
        lora_fx.batch_adapters(gm)


def test_a_model_that_mixes_rows_is_found_out() -> None:
    class Mixing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(7, 7)

        def forward(self, x):
            y = torch.tanh(self.fc(x))
            return y - y.mean(0)

    gm = lora_fx.trace(Mixing().eval(), torch.randn(3, 7))
    ours = randomise(lora_fx.inject(gm, LoraConfig(r=2, target_modules=["fc"])))
    with pytest.raises(GraphError, match="mixes the rows of a batch"):
        lora_fx.batch_adapters(ours)


def test_what_a_batched_graph_does_not_do(tmp_path: Any) -> None:
    ours = several("mlp")
    batched = lora_fx.batch_adapters(ours)
    refusals = {
        "inject": lambda: lora_fx.inject(batched, LoraConfig(target_modules=["fc1"]), adapter_name="four"),
        "set": lambda: lora_fx.set_adapters(batched, "one"),
        "delete": lambda: lora_fx.delete_adapter(batched, "one"),
        "save": lambda: lora_fx.save_adapter(batched, tmp_path, adapter_name="one"),
        "swap": lambda: lora_fx.swap_adapter(batched, "one", {}),
        "fold": lambda: lora_fx.fold(batched),
        "batch": lambda: lora_fx.batch_adapters(batched),
    }
    for attempt in refusals.values():
        with pytest.raises(lora_fx.LoraFxError, match="comes from batch_adapters"):
            attempt()
    with pytest.raises(GraphError, match="does not come from batch_adapters"):
        lora_fx.unbatch_adapters(ours)
    with pytest.raises(AdapterError, match="must be a list of adapter names, each once"):
        lora_fx.batch_adapters(ours, ["one", "one"])
    with pytest.raises(AdapterError, match="no adapter 'four'"):
        lora_fx.batch_adapters(ours, ["four"])
    with pytest.raises(AdapterError, match="has no adapter; inject one"):
        lora_fx.batch_adapters(traced(BY_NAME["mlp"]))
    symbolic = lora_fx.inject(traced(BY_NAME["mlp"], "symbolic"), LoraConfig(target_modules=["fc1"]))
    with pytest.raises(GraphError, match=r"lora_fx.trace\(model, args\) remembers"):
        lora_fx.batch_adapters(symbolic)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.tensor([1]), "adapter_ids has 1 numbers, and the batch 3 rows"),
        (torch.tensor([1, 2]), "adapter_ids has 2 numbers, and the batch 3 rows"),
        (torch.tensor([[1, 2, 0]]), r"adapter_ids is torch.int64 \[1, 3\]; it must be a tensor of int64 or int32"),
        (torch.tensor([1.0, 2.0, 0.0]), r"adapter_ids is torch.float32 \[3\]; it must be"),
        (torch.tensor([True, False, True]), r"adapter_ids is torch.bool \[3\]; it must be"),
        (np.array([1, 2, 0]), "adapter_ids is a ndarray; it must be"),
    ],
)
def test_ids_of_another_kind_are_refused(ids: Any, message: str) -> None:
    """One number would be spread over all rows, which is somebody's mistake if it is not a batch of one."""
    batched, (args, kwargs) = lora_fx.batch_adapters(several("mlp")), BY_NAME["mlp"].arguments()
    with pytest.raises(GraphError, match=message):
        batched(*args, **kwargs, adapter_ids=ids)
    assert len(run(batched, with_ids((args, kwargs), torch.tensor([1, 2, 0], dtype=torch.int32)))[0]) == 3


def test_an_input_of_that_name_is_refused() -> None:
    class Taken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(7, 7)

        def forward(self, x, adapter_ids):
            return self.fc(x) * adapter_ids

    gm = lora_fx.trace(Taken().eval(), (torch.randn(3, 7), torch.ones(3, 1)))
    with pytest.raises(GraphError, match="has an input 'adapter_ids' of its own"):
        lora_fx.batch_adapters(lora_fx.inject(gm, LoraConfig(target_modules=["fc"])))


def test_a_copy_and_both_modes_of_a_batched_graph() -> None:
    import copy

    batched = lora_fx.batch_adapters(several("llama"))
    arguments = with_ids(BY_NAME["llama"].arguments(), torch.tensor([3, 1]))
    expected = run(batched, arguments)
    twin = copy.deepcopy(batched)
    assert_same_bits(expected, run(twin, arguments))
    assert distance(expected, run(twin.train(), arguments)) < 1e-5
    with torch.no_grad():
        for parameter in lora_fx.lora_parameters(twin):
            parameter.zero_()
    assert_same_bits(expected, run(batched, arguments))


# Training several at once ---------------------------------------------------------------------------------

RATES = {"one": 3e-3, "two": 1e-2, "three": 3e-2}


def _rows_of(step: int, index: int) -> torch.Tensor:
    """Data of its own for each adapter, two rows a step."""
    return torch.randint(0, 60, (2, 5), generator=torch.Generator().manual_seed(10 * step + index))


def _inputs(rows: torch.Tensor) -> dict[str, Any]:
    return {"input_ids": rows, "attention_mask": torch.ones_like(rows), "use_cache": False}


def _loss(output: Any, rows: torch.Tensor) -> torch.Tensor:
    logits = next(leaf for leaf in torch.utils._pytree.tree_leaves(output) if leaf.is_floating_point())
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten())


def _clip(parameters: list[nn.Parameter]) -> None:
    torch.nn.utils.clip_grad_norm_(parameters, 0.5)


@pytest.mark.parametrize("separate", [False, True], ids=["groups", "optimizers"])
def test_training_at_once_is_training_one_by_one(separate: bool) -> None:
    """Each with its own rows, learning rate and clipping, over ten steps of AdamW."""
    ours = several("llama", ["q_proj", "down_proj"])
    batched = lora_fx.batch_adapters(ours).train()
    groups = [{"params": lora_fx.lora_parameters(batched, name), "lr": rate} for name, rate in RATES.items()]
    optimizers = [torch.optim.AdamW([g]) for g in groups] if separate else [torch.optim.AdamW(groups)]
    ids = torch.tensor([1, 1, 2, 2, 3, 3])
    for step in range(10):
        rows = [_rows_of(step, index) for index in range(3)]
        logits = batched(**_inputs(torch.cat(rows)), adapter_ids=ids)
        leaf = next(x for x in torch.utils._pytree.tree_leaves(logits) if x.is_floating_point())
        torch.stack([_loss(part, own) for part, own in zip(leaf.split(2), rows, strict=True)]).sum().backward()
        for group in groups:
            _clip(group["params"])
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    trained = lora_fx.unbatch_adapters(batched)
    start = dict(ours.named_parameters())
    for index, (name, rate) in enumerate(RATES.items()):
        alone = copy.deepcopy(ours)
        lora_fx.set_adapters(alone, name)
        parameters = lora_fx.lora_parameters(alone, name)
        optimizer = torch.optim.AdamW(parameters, lr=rate)
        for step in range(10):
            rows = _rows_of(step, index)
            _loss(alone.train()(**_inputs(rows)), rows).backward()
            _clip(parameters)
            optimizer.step()
            optimizer.zero_grad()
        found = dict(trained.named_parameters())
        expected = {key: value for key, value in alone.named_parameters() if f".{name}." in key}
        assert expected
        for key, value in expected.items():
            moved = float((value - start[key]).detach().abs().max())
            assert moved > rate
            torch.testing.assert_close(found[key], value, rtol=0, atol=1e-3 * moved)


def test_parts_are_views_of_the_stacks() -> None:
    batched = lora_fx.batch_adapters(several("mlp"))
    stacks = lora_fx.lora_parameters(batched)
    one, two = (lora_fx.lora_parameters(batched, name) for name in ("one", "two"))
    assert sorted(min(part.shape) for part in (*one, *two)) == [2, 2, 2, 2, 3, 3, 3, 3]  # r of each
    assert sum(p.numel() for name in NAMES for p in lora_fx.lora_parameters(batched, name)) == sum(
        p.numel() for p in stacks
    )
    assert all(part.grad is None for part in one)
    for stack in stacks:
        stack.grad = torch.ones_like(stack)
    one[0].grad = None  # takes away its own
    assert one[0].grad is None
    assert bool(two[0].grad.all())
    one[0].grad = torch.full_like(one[0], 3.0)
    assert float(stacks[0].grad.sum()) == float(stacks[0].numel() + 2 * one[0].numel())
    one[0].grad = None
    stacks[0].sum().backward()  # adds to what the others have
    assert (float(one[0].grad.mean()), float(two[0].grad.mean())) == (1, 2)
    for name in NAMES:
        lora_fx.lora_parameters(batched, name)[0].grad = None
    assert stacks[0].grad is None
    version = stacks[0]._version
    torch.optim.SGD(one, lr=0.1).step()
    assert stacks[0]._version > version
    for change in (copy.deepcopy, pickle.dumps):
        with pytest.raises(GraphError, match="a part of a parameter"):
            change(one[0])
    batched.to(torch.float64)
    with pytest.raises(GraphError, match="was moved"):
        _ = one[0].grad


def test_parts_of_a_parameter_that_was_exchanged_are_not_trained_in_silence() -> None:
    batched = lora_fx.batch_adapters(several("mlp"))
    optimizer = torch.optim.SGD(lora_fx.lora_parameters(batched, "one"), lr=0.1)
    batched.load_state_dict({name: value.clone() for name, value in batched.state_dict().items()}, assign=True)
    arguments = BY_NAME["mlp"].arguments()
    loss_of(batched, with_ids(arguments, torch.full((rows_of(arguments),), 1))).backward()
    with pytest.raises(GraphError, match=r"lora_A.stacked.weight' of the batched graph was moved or exchanged"):
        optimizer.step()


def test_parts_of_adapters_that_are_not_there() -> None:
    batched = lora_fx.batch_adapters(several("mlp"), ["one"])
    with pytest.raises(AdapterError, match="was left out when the graph was batched; it has one"):
        lora_fx.lora_parameters(batched, "two")
    with pytest.raises(AdapterError, match="no adapter 'four'"):
        lora_fx.lora_parameters(batched, "four")


def test_parts_that_were_frozen_when_they_were_asked_for_are_trained_later() -> None:
    batched = lora_fx.batch_adapters(several("mlp"))
    whole = lora_fx.lora_parameters(batched)
    for parameter in whole:
        parameter.requires_grad_(False)
    lora_fx.lora_parameters(batched, "two")
    for parameter in whole:
        parameter.requires_grad_(True)
    parts = lora_fx.lora_parameters(batched, "two")
    optimizer = torch.optim.SGD(parts, lr=0.1)
    arguments = BY_NAME["mlp"].arguments(torch.float32)
    arguments = with_ids(arguments, torch.full((rows_of(arguments),), 2))
    held = []
    for _ in range(3):
        before = [part.detach().clone() for part in parts]
        optimizer.zero_grad()
        loss_of(batched, arguments).backward()
        held.append((parts[0].grad, parts[0].grad.clone()))
        optimizer.step()
        assert not any(torch.equal(part, old) for part, old in zip(parts, before, strict=True))
    for kept, copied in held:
        assert torch.equal(kept, copied)
    for register in (parts[0].register_hook, parts[0].register_post_accumulate_grad_hook):
        with pytest.raises(GraphError, match="would never run"):
            register(lambda gradient: gradient)

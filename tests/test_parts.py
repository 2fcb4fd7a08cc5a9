"""Parts of packed projections: q, k and v of one weight, each with an adapter of its own."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn
from zoo import (
    BY_NAME,
    Case,
    assert_same_bits,
    bits,
    codes,
    distance,
    fingerprint,
    frozen,
    in_mode,
    loss_of,
    run,
    tolerance,
    traced,
)

import lora_fx
from lora_fx import AdapterError, LoraConfig, TargetError


class Fused(nn.Module):
    """The ways in which vision models take q, k and v apart, and one that lora_fx cannot see."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.flat = nn.Linear(14, 42), nn.Linear(14, 42, bias=False)
        self.gate_up, self.hidden = nn.Linear(14, 22), nn.Linear(14, 42)
        self.out = nn.Linear(11, 5)

    def forward(self, x):
        batch, length, _ = x.shape
        q, k, v = self.qkv(x).reshape(batch, length, 3, 2, 7).permute(2, 0, 3, 1, 4).unbind(0)
        attended = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, length, 14)
        a, b, c = self.flat(attended).chunk(3, dim=-1)
        x = torch.tanh(a + b) * c + self.hidden(x).reshape(batch, length, 14, 3).sum(-1)
        gate, up = torch.split(self.gate_up(x), [11, 11], dim=-1)
        return self.out(torch.sigmoid(gate) * up)


class Cross(nn.Module):
    """An attention whose queries come from elsewhere than its keys and values."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(14, 2, batch_first=True, **options)
        self.memory = nn.Linear(14, options.get("kdim", 14))

    def forward(self, x):
        memory = self.memory(x.flip(1))
        return self.attn(x, memory, memory, need_weights=False)[0]


def _phi3() -> nn.Module:
    sizes = {"vocab_size": 97, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    positions = {"max_position_embeddings": 31, "original_max_position_embeddings": 31}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return transformers.Phi3ForCausalLM(transformers.Phi3Config(**sizes, **tokens, **positions, **heads))


PHI3 = Case("phi3", _phi3, (), inputs=BY_NAME["llama"].inputs, tracers=("trace",), linears=9)
FUSED = Case("fused", Fused, (), (2, 3, 14), tracers=("trace",), linears=5)
CROSS = Case("cross", Cross, (), (2, 3, 14), tracers=("trace",), linears=3)
GPT2, MULTI_HEAD = BY_NAME["gpt2"], BY_NAME["multi_head"]

# The model, what is adapted, and the rows of each weight that may change.
TARGETS: dict[str, tuple[Case, list[str], dict[str, list[tuple[int, int]]]]] = {
    "gpt2": (
        GPT2,
        ["c_attn[q]", "h.1.attn.c_attn[v]", "lm_head"],
        {
            "transformer.h.0.attn.c_attn.weight": [(0, 22)],
            "transformer.h.1.attn.c_attn.weight": [(0, 22), (44, 66)],
        },
    ),
    "phi3": (
        PHI3,
        ["qkv_proj[k]", "qkv_proj[v]", "gate_up_proj[up]", "o_proj"],
        {
            **{f"model.layers.{i}.self_attn.qkv_proj.weight": [(16, 24), (24, 32)] for i in range(2)},
            **{f"model.layers.{i}.mlp.gate_up_proj.weight": [(24, 48)] for i in range(2)},
        },
    ),
    "fused": (
        FUSED,
        ["qkv[k]", "flat[0]", "flat[2]", "gate_up[gate]", "hidden[5:20]", "out"],
        {
            "qkv.weight": [(14, 28)],
            "flat.weight": [(0, 14), (28, 42)],
            "gate_up.weight": [(0, 11)],
            "hidden.weight": [(5, 20)],
        },
    ),
    "multi_head": (
        MULTI_HEAD,
        ["attn[q]", "attn.in_proj_weight[v]", "fc"],
        {"attn.in_proj_weight": [(0, 14), (28, 42)]},
    ),
    "cross": (CROSS, ["attn[v]", "attn[q]"], {"attn.in_proj_weight": [(0, 14), (28, 42)]}),
    "cross_out": (CROSS, ["attn[v]", "attn[q]", "out_proj"], {"attn.in_proj_weight": [(0, 14), (28, 42)]}),
}
EACH = pytest.mark.parametrize("name", TARGETS)
VARIANTS = pytest.mark.parametrize(
    "variant",
    [{}, {"use_dora": True}, {"init_lora_weights": "pissa"}, {"use_rslora": True, "lora_dropout": 0.1}],
    ids=["plain", "dora", "pissa", "rslora"],
)


def adapted(case: Case, targets: Any, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "lora_dropout", lora_fx.LoraFxWarning)
        config = LoraConfig(**{"r": 3, "lora_alpha": 5, "target_modules": targets} | options)
        return lora_fx.inject(traced(case, "trace", dtype), config)


def moved(gm: Any) -> Any:
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in lora_fx.lora_parameters(gm):
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype) * 0.3)
    return gm


def fold(gm: Any) -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*untied", lora_fx.LoraFxWarning)
        return lora_fx.fold(gm)


@EACH
@VARIANTS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_part_moves_its_rows_and_no_others(name: str, variant: dict[str, Any], dtype: torch.dtype) -> None:
    case, targets, rows = TARGETS[name]
    gm, arguments = traced(case, "trace", dtype), case.arguments(dtype)
    before = fingerprint(gm)
    ours = adapted(case, targets, dtype, **variant)
    for mode in (False, True):
        if not variant.get("lora_dropout") and "init_lora_weights" not in variant:
            base = frozen(gm).train(mode)
            assert_same_bits(run(base, arguments), run(in_mode(ours, mode), arguments))
    moved(ours.eval())
    result = fold(ours)
    assert distance(run(ours, arguments), run(result, arguments)) <= 2 * tolerance(case, dtype)
    for weight, parts in rows.items():
        old, new = gm.get_parameter(weight).detach(), result.get_parameter(weight).detach()
        if "c_attn" in weight:  # stored (in, out)
            old, new = old.T, new.T
        mask = torch.zeros(len(old), dtype=torch.bool)
        for start, stop in parts:
            assert float((old[start:stop] - new[start:stop]).abs().max()) > 0.01
            mask[start:stop] = True
        assert bits(old[~mask]) == bits(new[~mask])
    if name != "gpt2":  # whose tied head is adapted too
        assert codes(result) == codes(gm)
    assert fingerprint(gm) == before


@EACH
@VARIANTS
def test_save_and_load_is_the_identity_and_peft_computes_the_same(
    name: str, variant: dict[str, Any], tmp_path: Path
) -> None:
    case, targets, _ = TARGETS[name]
    gm, arguments = traced(case), case.arguments()
    ours = moved(adapted(case, targets, rank_pattern={targets[0]: 2}, **variant)).eval()
    lora_fx.save_adapter(ours, tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "lora_dropout|.*tied", lora_fx.LoraFxWarning)
        back = lora_fx.load_adapter(gm, tmp_path).eval()
    expected = run(ours, arguments)
    if "init_lora_weights" in variant:  # twice the rank: other sums
        assert distance(expected, run(back, arguments)) <= tolerance(case, torch.float32)
    else:
        assert_same_bits(expected, run(back, arguments))
    parts = {target.split("[")[-1] for target in targets if "[" in target}
    planned = lora_fx.make_plan(gm, LoraConfig(target_modules=targets)).targets
    assert parts <= {target.site.path.split("[")[-1] for target in planned}
    lora_fx.save_adapter(back, tmp_path / "again")
    first, second = (load_file(path / "adapter_model.safetensors") for path in (tmp_path, tmp_path / "again"))
    assert first.keys() == second.keys()
    assert_same_bits(list(first.values()), [second[key] for key in first])
    if name in ("multi_head", "cross", "cross_out"):
        return  # in_proj_weight by itself is nothing that PEFT can adapt
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peer = peft.PeftModel.from_pretrained(case.model(), tmp_path).eval()
    assert distance(expected, run(peer, arguments)) <= tolerance(case, torch.float32)


@EACH
def test_a_step_moves_the_parts_alone(name: str) -> None:
    case, targets, _ = TARGETS[name]
    ours = moved(adapted(case, targets)).train()
    before = {n: bits(t) for n, t in ours.state_dict().items()}
    loss_of(ours, case.arguments()).backward()
    torch.optim.SGD(lora_fx.lora_parameters(ours), lr=1.0).step()
    changed = {n for n, t in ours.state_dict().items() if bits(t) != before[n]}
    assert changed == {n for n, p in ours.named_parameters(remove_duplicate=False) if p.requires_grad}
    assert all("lora_" in n for n in changed)


def test_all_parts_are_the_whole() -> None:
    """q, k and v with the same A compute what one adapter of the whole computes."""
    gm, arguments = traced(GPT2), GPT2.arguments()
    whole = moved(adapted(GPT2, ["h.0.attn.c_attn"]))
    parts = adapted(GPT2, [f"h.0.attn.c_attn[{n}]" for n in "qkv"])
    stem = "transformer.h.0.attn.c_attn.lora_{}.default.weight".format
    with torch.no_grad():
        for index, n in enumerate("qkv"):
            parts.get_parameter(stem(f"A_{n}")).copy_(whole.get_parameter(stem("A")))
            parts.get_parameter(stem(f"B_{n}")).copy_(whole.get_parameter(stem("B"))[22 * index : 22 * (index + 1)])
    assert distance(run(whole, arguments), run(parts, arguments)) <= tolerance(GPT2, torch.float32)
    assert not torch.equal(run(whole, arguments)[0], run(gm, arguments)[0])


def test_parts_print_and_have_ranks_of_their_own() -> None:
    config = LoraConfig(
        r=4,
        lora_alpha=5,
        target_modules=["c_attn[q]", "c_attn[v]"],
        rank_pattern={"c_attn[v]": 2, r"^transformer\.h\.0\.attn\.c_attn\[q\]": 7},
        layers_to_transform=[0],
    )
    plan = lora_fx.make_plan(traced(GPT2), config)
    assert [(t.site.path, t.r, t.site.size) for t in plan.targets] == [
        ("transformer.h.0.attn.c_attn[q]", 7, "22 → 22"),
        ("transformer.h.0.attn.c_attn[v]", 2, "22 → 22"),
    ]
    assert "transformer.h.0.attn.c_attn[q]" in str(plan)
    assert "packs q, k, v" in str(lora_fx.find_sites(traced(GPT2)))
    excluded = lora_fx.make_plan(
        traced(GPT2), LoraConfig(target_modules=["c_attn[q]"], exclude_modules=["h.1.attn.c_attn"])
    )
    assert [t.site.path for t in excluded.targets] == ["transformer.h.0.attn.c_attn[q]"]


def test_set_adapters_combine_and_delete_know_parts() -> None:
    arguments = GPT2.arguments()
    two = moved(adapted(GPT2, ["c_attn[q]", "c_attn[k]"]))
    other = lora_fx.inject(two, LoraConfig(r=2, lora_alpha=3, target_modules=["c_attn[q]"]), adapter_name="other")
    moved(other)
    lora_fx.set_adapters(other, {"default": 0.5, "other": -2.0})
    expected = run(other, arguments)
    assert distance(expected, run(lora_fx.fold(other), arguments)) < 1e-5
    both = lora_fx.combine_adapters(other, {"default": 0.5, "other": -2.0}, adapter_name="both", combination_type="cat")
    lora_fx.set_adapters(both, "both")
    assert distance(expected, run(both, arguments)) < 1e-4
    lora_fx.delete_adapter(both, "default")
    assert "transformer.h.0.attn.c_attn.lora_A_k.default.weight" not in dict(both.named_parameters())


@pytest.mark.parametrize(
    ("case", "targets", "message"),
    [
        (GPT2, ["c_attn[q]", "c_attn"], "share the outputs 0 to 21 of one weight"),
        (GPT2, ["c_attn[q]", "c_attn[10:30]"], "share the outputs 10 to 21 of one weight"),
        (GPT2, ["c_attn[gate]"], r"packs 3 parts: \[q\], \[k\], \[v\], \[0\], \[1\], \[2\]"),
        (GPT2, ["c_attn[3]"], "packs 3 parts"),
        (GPT2, ["c_attn[50:67]"], "has 66 outputs, and 50:67 is no part"),
        (GPT2, ["c_attn[7:7]"], "7:7 is no part"),
        (GPT2, ["c_proj[q]"], r"22 outputs are taken apart is not to be seen in the graph.*\[0:7\]"),
        (GPT2, ["wte[q]"], "is embedding, whose outputs are not told apart"),
        (GPT2, ["c_atn[q]"], r"'c_atn\[q\]' matched none"),
        (FUSED, ["hidden[q]"], "42 outputs are taken apart is not to be seen"),
        (MULTI_HEAD, ["attn[w]"], "packs 3 parts"),
    ],
)
def test_parts_that_cannot_be_are_refused(case: Case, targets: list[str], message: str) -> None:
    gm = traced(case)
    before = fingerprint(gm)
    with pytest.raises(TargetError, match=message):
        lora_fx.inject(gm, LoraConfig(r=3, target_modules=targets))
    assert fingerprint(gm) == before


def test_loftq_of_a_part_is_refused() -> None:
    with pytest.raises(TargetError, match="replaces whole weights, and 'transformer.h.0.attn.c_attn.q.' is a part"):
        adapted(GPT2, ["c_attn[q]"], init_lora_weights="loftq")


def test_metadata_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    from safetensors import safe_open
    from safetensors.torch import save_file

    lora_fx.save_adapter(moved(adapted(GPT2, ["c_attn[q]", "c_attn[v]"])), tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    with safe_open(str(path), framework="pt") as file:
        metadata = dict(file.metadata())
    tensors, described = load_file(path), json.loads(metadata["lora_fx_parts"])
    whole = next(iter(described))
    wrong = {
        "no JSON": "{",
        "no list": json.dumps({whole: 3}),
        "no number": json.dumps({whole: [described[whole][0] | {"r": "3"}]}),
        "another model": json.dumps({"x.c_attn": described[whole]}),
        "other ranks": json.dumps(described | {whole: described[whole][:1]}),
        "too far": json.dumps(described | {whole: [described[whole][0], described[whole][1] | {"stop": 99}]}),
    }
    gm = traced(GPT2)
    for fault, text in wrong.items():
        save_file(tensors, path, metadata=metadata | {"lora_fx_parts": text})
        with pytest.raises(AdapterError, match="metadata"):
            lora_fx.load_adapter(gm, tmp_path)
        assert fault


@pytest.mark.parametrize("options", [{"kdim": 11, "vdim": 11}, {}], ids=["widths", "packed"])
def test_cross_attention_by_its_name(options: dict[str, int], tmp_path: Path) -> None:
    """Keys and values of another width than queries have weights of their own."""
    case = Case("cross", lambda: Cross(**options), (), (2, 3, 14), tracers=("trace",), linears=3)
    torch.manual_seed(1)
    gm, arguments = lora_fx.trace(Cross(**options).eval(), torch.randn(2, 3, 14)), case.arguments()
    ours = lora_fx.inject(gm, LoraConfig(r=3, lora_alpha=5, target_modules=["attn"]))
    assert_same_bits(run(frozen(gm), arguments), run(ours, arguments))
    names = {re.sub(r"_?\.?lora_.*", "", name) for name, p in ours.named_parameters() if p.requires_grad}
    inputs = {"attn.q_proj_weight", "attn.k_proj_weight", "attn.v_proj_weight"} if options else {"attn.in_proj_weight"}
    assert names == {*inputs, "attn.out_proj"}
    moved(ours)
    result = lora_fx.fold(ours)
    assert distance(run(ours, arguments), run(result, arguments)) <= tolerance(case, torch.float32)
    assert codes(result) == codes(gm)
    lora_fx.save_adapter(ours, tmp_path)
    assert_same_bits(run(ours, arguments), run(lora_fx.load_adapter(gm, tmp_path), arguments))


def test_the_rest_of_a_weight_keeps_its_bits() -> None:
    """−0.0 among them, which adding 0.0 would change."""
    for targets, stored_in_out in ((["c_attn[k]"], True), (["qkv[k]"], False)):
        case = GPT2 if stored_in_out else FUSED
        gm = frozen(traced(case))
        name = "transformer.h.0.attn.c_attn.weight" if stored_in_out else "qkv.weight"
        with torch.no_grad():
            gm.get_parameter(name).fill_(-0.0)
        ours = moved(lora_fx.inject(gm, LoraConfig(r=3, target_modules=targets)))
        old, new = gm.get_parameter(name).detach(), lora_fx.fold(ours).get_parameter(name).detach()
        old, new = (old.T, new.T) if stored_in_out else (old, new)
        third = len(old) // 3
        assert bits(old[:third]) == bits(new[:third])
        assert bits(old[2 * third :]) == bits(new[2 * third :])
        assert new[third : 2 * third].abs().max() > 0.01
        assert bool(torch.signbit(old).all())


def test_a_slice_that_is_taken_outside_of_the_region_that_applies_it() -> None:
    class Outside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.fc = nn.Parameter(torch.randn(11, 7)), nn.Linear(3, 5)

        def forward(self, x):
            part = self.w[2:5]
            with torch.no_grad():
                y = nn.functional.linear(x, part)
            return self.fc(y)

    x = torch.randn(2, 7)
    gm = lora_fx.trace(Outside().eval(), (x,))
    (site, _) = lora_fx.find_sites(gm)
    assert (site.path, site.op, site.calls) == ("w", "linear", 1)
    with pytest.warns(lora_fx.LoraFxWarning, match="no gradient"):
        ours = moved(lora_fx.inject(gm, LoraConfig(r=2, target_modules=["w", "fc"])))
    folded = lora_fx.fold(ours)
    assert distance(run(gm, ((x,), {})), run(ours, ((x,), {}))) > 1e-2
    assert distance(run(ours, ((x,), {})), run(folded, ((x,), {}))) < 1e-5


def test_a_tied_weight_that_is_untied_keeps_its_slices() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.e = nn.Embedding(11, 7)
            self.w = self.e.weight

        def forward(self, x):
            part = self.w[2:5]
            with torch.no_grad():
                y = nn.functional.linear(x, part)
            return y + self.e(torch.arange(2))[:, :3]

    x = torch.randn(2, 7)
    gm = lora_fx.trace(Tied().eval(), (x,))
    target = next(site.path for site in lora_fx.find_sites(gm) if site.op == "linear")
    with pytest.warns(lora_fx.LoraFxWarning, match="no gradient"):
        ours = moved(lora_fx.inject(gm, LoraConfig(r=2, target_modules=[target])))
    with pytest.warns(lora_fx.LoraFxWarning, match="untied"):
        folded = lora_fx.fold(ours)
    assert distance(run(ours, ((x,), {})), run(folded, ((x,), {}))) < 1e-5


@pytest.mark.parametrize("bias", ["lora_only", "all"])
def test_biases_that_are_trained_with_parts(bias: str, tmp_path: Path) -> None:
    gm, arguments = traced(GPT2), GPT2.arguments()
    ours = moved(adapted(GPT2, ["c_attn[q]"], bias=bias)).eval()
    lora_fx.save_adapter(ours, tmp_path)
    assert_same_bits(run(ours, arguments), run(lora_fx.load_adapter(gm, tmp_path), arguments))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peer = peft.PeftModel.from_pretrained(GPT2.model(), tmp_path).eval()
    assert distance(run(ours, arguments), run(peer, arguments)) <= tolerance(GPT2, torch.float32)

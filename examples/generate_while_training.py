"""`model.generate()` between training steps, through the user's own model, whose tensors the graph shares.

    python examples/generate_while_training.py

`fold(gm, inplace=True)` writes scaling · B @ A into the model's own weights, `unfold(gm)` takes it back bit for bit,
and training goes on.
"""

from __future__ import annotations

import argparse

import torch
from tiny import Text, example_batch, tiny_llama
from torch.utils.data import DataLoader

import lora_fx

PROMPT = torch.tensor([list(b"The ")])


def generated(model: torch.nn.Module) -> list[int]:
    """Greedy, with the model's own key/value cache."""
    tokens = model.generate(
        PROMPT, max_new_tokens=12, do_sample=False, use_cache=True, eos_token_id=None, pad_token_id=0
    )
    return tokens[0].tolist()


def greedy(gm: lora_fx.LoraGraphModule) -> list[int]:
    """The same through the adapted graph, without a cache."""
    tokens = PROMPT
    with torch.no_grad():
        for _ in range(12):
            logits = gm(input_ids=tokens, labels=tokens).logits[:, -1]
            tokens = torch.cat([tokens, logits.argmax(-1, keepdim=True)], 1)
    return tokens[0].tolist()


def main(steps: int = 30, every: int = 10) -> dict[str, object]:
    """Train, and look at what is generated now and then."""
    model = tiny_llama()
    base = {name: value.clone() for name, value in model.state_dict().items()}
    gm = lora_fx.trace(model, (), example_batch())
    torch.manual_seed(1)
    gm = lora_fx.inject(gm, lora_fx.LoraConfig(r=8, target_modules="all-linear"))
    optimizer = torch.optim.AdamW(lora_fx.lora_parameters(gm), lr=2e-2)
    texts = [generated(model.eval())]
    agree = True
    for step, batch in enumerate(DataLoader(Text(8 * steps), batch_size=8), start=1):
        gm.train()(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % every == 0:
            expected = greedy(gm.eval())
            lora_fx.fold(gm, inplace=True)
            texts.append(generated(model))
            lora_fx.unfold(gm)
            agree &= texts[-1] == expected
            print(step, bytes(texts[-1]))
    is_base = all(torch.equal(value, base[name]) for name, value in model.state_dict().items())
    lora_fx.fold(gm.eval(), inplace=True)  # for good: `model` is the tuned model, for save_pretrained and all else
    return {"texts": texts, "agree": agree, "is_base": is_base, "last": generated(model)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30)
    main(parser.parse_args().steps)

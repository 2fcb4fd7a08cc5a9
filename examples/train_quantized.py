"""QLoRA: float adapters over a base in few bits, and three ways to fold them.

    pip install 'lora-fx[quantized]' && python examples/train_quantized.py [nf4 | int8 | torchao-int8 | torchao-int4]

With a model of your own, `from_pretrained(..., quantization_config=transformers.BitsAndBytesConfig(load_in_4bit=True))`
takes the place of `quantize(tiny_llama(), ...)`.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings

import torch
from tiny import Text, example_batch, tiny_llama
from torch import nn
from torch.utils.data import DataLoader

import lora_fx


def quantize(model: nn.Module, kind: str) -> nn.Module:
    """The same model with its linears in few bits, all but the output head."""
    if kind.startswith("torchao"):
        from torchao import quantization as ao

        config = ao.Int8WeightOnlyConfig() if kind.endswith("int8") else ao.IntxWeightOnlyConfig(torch.int4)
        ao.quantize_(model, config, lambda module, name: isinstance(module, nn.Linear) and name != "lm_head")
        return model
    import bitsandbytes as bnb

    for name, linear in [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]:
        sizes, has_bias = (linear.in_features, linear.out_features), linear.bias is not None
        if kind == "int8":
            bits = bnb.nn.Linear8bitLt(*sizes, has_bias, has_fp16_weights=False, threshold=0.0)
        else:
            bits = bnb.nn.Linear4bit(*sizes, has_bias, quant_type=kind)
        bits.load_state_dict(linear.state_dict())
        model.set_submodule(name, bits.to("cpu"))  # bitsandbytes quantizes when it moves
    return model


def main(kind: str = "nf4", steps: int = 20) -> dict[str, float]:
    """Train, save, fold; what was measured."""
    model = quantize(tiny_llama(), kind)
    gm = lora_fx.trace(model, (), example_batch())
    names = lora_fx.find_all_linear_names(gm)
    torch.manual_seed(1)
    gm = lora_fx.inject(gm, lora_fx.LoraConfig(r=8, target_modules=names)).train()
    optimizer = torch.optim.AdamW(lora_fx.flat_parameters(gm), lr=1e-2)
    losses = []
    for batch in DataLoader(Text(8 * steps), batch_size=8):
        loss = gm(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))

    def change(folded: lora_fx.LoraGraphModule) -> float:
        """Of the logits, against the adapted graph, relative to what the adapter does."""
        with torch.no_grad(), lora_fx.disable_adapters(gm):
            base = gm(**example_batch(4)).logits
        with torch.no_grad():
            adapted, found = gm(**example_batch(4)).logits, folded.train()(**example_batch(4)).logits
        return float((found - adapted).norm() / (adapted - base).norm())

    found = {"before": losses[0], "after": losses[-1], "sites": float(len(names))}
    # As floats: nothing of the delta is lost, and the result exports to ONNX.
    found["dequantize"] = change(lora_fx.fold(gm, quantized="dequantize"))
    if not kind.startswith("torchao"):  # whose tensors do not remember how they were made
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", lora_fx.LoraFxWarning)
            again = lora_fx.fold(gm, quantized="requantize")  # to as few bits as before, as PEFT's merge does
        found["requantize"] = change(again)
        found["kept"] = min(site.kept for site in lora_fx.fold_report(again).sites)
    with tempfile.TemporaryDirectory() as directory:  # onto the weights that it was quantized from
        lora_fx.save_adapter(gm, directory)
        original = lora_fx.load_adapter(lora_fx.trace(tiny_llama(), (), example_batch()), directory)
    found["original"] = change(lora_fx.fold(original))
    print(kind, ", ".join(f"{name} {value:.3g}" for name, value in found.items()))
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", nargs="?", default="nf4", choices=["nf4", "int8", "torchao-int8", "torchao-int4"])
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    main(options.kind, options.steps)

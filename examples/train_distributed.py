"""Trains a LoRA on several processes, and writes PEFT's files.

    torchrun --standalone --nproc-per-node 2 examples/train_distributed.py --strategy fsdp --out adapter

With GPUs, each process takes one and they talk over NCCL; without, over gloo on the CPU. `--strategy` is one of

    ddp     every process has the whole model, and a part of each batch
    fsdp    base and adapters are sharded layer by layer (FSDP2), and each process has a part of each batch
    tp      the weights of attention and MLP are split, and all processes have the same batch

The model is a Llama of random weights, small enough for a laptop, and what it learns is to count.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator

import torch
import torch.distributed as dist
import transformers
from torch import fx, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import lora_fx

BATCH, LENGTH, VOCABULARY = 8, 16, 64


def base_model() -> nn.Module:
    """The model to adapt; the same in every process."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    return transformers.LlamaForCausalLM(config).eval()


def batches(steps: int) -> Iterator[torch.Tensor]:
    """Rows that count upwards from anywhere, the same in every process."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        yield (torch.randint(VOCABULARY, (BATCH, 1), generator=generator) + torch.arange(LENGTH)) % VOCABULARY


def wrapped(
    gm: fx.GraphModule, strategy: str, mesh: DeviceMesh, dtype: torch.dtype | None
) -> tuple[nn.Module, fx.GraphModule]:
    """(what to call, the graph module whose adapters are trained)."""
    if strategy == "ddp":
        return DistributedDataParallel(gm), gm
    if strategy == "tp":
        split = lora_fx.distribute(gm, mesh)
        return split, split
    tree = lora_fx.unflatten(gm, dtype=dtype)
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for block in tree.modules():
        if isinstance(block, lora_fx.Block):
            fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(tree, mesh=mesh, mp_policy=policy)
    return tree, tree


def train(arguments: argparse.Namespace, mesh: DeviceMesh) -> None:
    """Inject, wrap, train, save."""
    device = torch.device(mesh.device_type)
    model = base_model()
    gm = lora_fx.trace(model, (), {"input_ids": next(batches(1)), "use_cache": False})
    gm = lora_fx.inject(gm, lora_fx.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")).to(device)
    dtype = torch.bfloat16 if arguments.bf16 else None
    called, gm = wrapped(gm.train(), arguments.strategy, mesh, dtype)
    optimizer = torch.optim.AdamW(lora_fx.lora_parameters(gm), lr=arguments.lr)
    for step, batch in enumerate(batches(arguments.steps)):
        ids = (batch if arguments.strategy == "tp" else batch.chunk(mesh.size())[mesh.get_local_rank()]).to(device)
        logits = called(input_ids=ids, use_cache=False).logits
        loss = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        dist.all_reduce(mean := loss.detach() / mesh.size())
        if mesh.get_rank() == 0:
            print(f"step {step}: loss {float(mean):.4f}", flush=True)
    # Spread parameters are gathered by all processes, and the first one writes; whole ones are the caller's to write.
    if arguments.strategy != "ddp" or mesh.get_rank() == 0:
        lora_fx.save_adapter(gm, arguments.out)


def main() -> None:
    """Join the other processes, train, and leave together."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strategy", choices=("ddp", "fsdp", "tp"), default="fsdp")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument(
        "--bf16", action="store_true", help="with fsdp: compute in bfloat16, keep parameters in float32"
    )
    parser.add_argument("--out", default="adapter")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"]) else "cpu"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    train(arguments, init_device_mesh(device, (dist.get_world_size(),)))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

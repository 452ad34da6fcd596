#!/usr/bin/env bash
# torch's tensor parallel unties a tied head and trains another model; FSDP2 refuses the same
#
# Versions: transformers 5.23.0, torch 2.13.0 (two processes, gloo)
# Expected: parallelize_module(model, mesh, {"lm_head": ColwiseParallel(...)}) on GPT-Neo, whose lm_head shares the
#   embedding's matrix, raises, as fully_shard does for a shared parameter that is wrapped twice, or keeps one matrix.
# Happens: the head's parameter becomes a DTensor of its own, the embedding keeps the old one. The first loss is
#   right. Each is then trained by its own gradient: after one step of plain SGD the loss differs from that of one
#   process.
# Hurt: tensor parallel training of every model with tied embeddings, which is most small ones.
# Seen: first loss 4.639 and 4.639; after a step 3.840 alone, 4.117 over two processes; fully_shard: ValueError
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23.0
cd "$folder"
cat > run.py <<'PY'
import os
import sys

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from transformers import GPTNeoConfig, GPTNeoForCausalLM


def model():
    torch.manual_seed(0)
    kinds = [[["global", "local"], 1]]
    sizes = dict(vocab_size=100, hidden_size=48, num_layers=2, num_heads=4, max_position_embeddings=64)
    drop = dict(resid_dropout=0.0, embed_dropout=0.0, attention_dropout=0.0)
    return GPTNeoForCausalLM(GPTNeoConfig(attention_types=kinds, bos_token_id=1, eos_token_id=2, **sizes, **drop))


def losses(m):
    ids = torch.arange(3, 23)[None]
    optimizer = torch.optim.SGD(m.parameters(), 1.0)
    first = m(ids, labels=ids).loss
    first.backward()
    optimizer.step()
    return first.item(), m(ids, labels=ids).loss.item()


def work(rank, n, port):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=n)
    alone = losses(model())
    m = model()
    head = {"lm_head": ColwiseParallel(output_layouts=Replicate())}
    both = losses(parallelize_module(m, init_device_mesh("cpu", (n,)), head))
    m, refused = model(), "nothing raised"
    try:
        fully_shard(m.lm_head)
        fully_shard(m.transformer.wte)
        fully_shard(m)
        losses(m)
    except ValueError as error:
        refused = type(error).__name__
    if rank == 0:
        print(f"first loss {alone[0]:.3f} and {both[0]:.3f}; after a step {alone[1]:.3f} alone, {both[1]:.3f} over "
              f"two processes; fully_shard: {refused}")
    dist.destroy_process_group()
    if abs(alone[0] - both[0]) > 1e-3 or abs(alone[1] - both[1]) < 1e-3 or refused != "ValueError":
        sys.exit(1)


if __name__ == "__main__":
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    try:
        mp.spawn(work, (2, port), 2)
    except Exception:
        sys.exit("changed: tensor parallel keeps the tie or refuses it, or FSDP2 no longer refuses")
PY
env/bin/python run.py

"""The processes that torchrun started: one mesh, the same random numbers, one that is heard."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh


@contextmanager
def process_mesh(device: str) -> Iterator[DeviceMesh]:
    """All processes that torchrun started, on devices of this type, drawing the same. Only the first one's
    output is seen. Whoever waits a minute for another one in vain, or hears that it has ended, ends with an
    OSError that says so."""
    if "RANK" not in os.environ:
        raise ValueError("several processes are needed: start with torchrun --nproc-per-node 2")
    kind, _, number = device.partition(":")
    if number:
        raise ValueError(f"--device {device}: each process takes a device of its own, say {kind}")
    if kind == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    before, quiet = (sys.stdout, sys.stderr), os.environ["RANK"] != "0"
    try:
        dist.init_process_group("nccl" if kind == "cuda" else "gloo", timeout=timedelta(seconds=55))
        torch.manual_seed(broadcast(torch.seed()))
        with open(os.devnull, "w") as nowhere:
            if quiet:
                sys.stdout = sys.stderr = nowhere
            yield init_device_mesh(kind, (dist.get_world_size(),))
        dist.destroy_process_group()
    except Exception as error:
        cause = error.__cause__ or error  # which the check of input_ids may have replaced
        if isinstance(cause, dist.DistError) or "gloo" in str(cause):
            raise OSError("another process has ended, or has not answered for a minute") from None
        raise
    finally:
        sys.stdout, sys.stderr = before


def broadcast(value: Any) -> Any:
    """The first process's value, in every process; alone: its own."""
    if dist.is_initialized():
        box = [value]
        dist.broadcast_object_list(box)
        [value] = box
    return value

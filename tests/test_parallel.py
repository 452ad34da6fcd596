"""Tensor parallelism: two and four processes give what one gives, and each holds and reads its own part."""

import copy
import datetime
import os
import subprocess
import sys
import time
import traceback
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import loss_parallel

from decoders import decoding, kernels, parallel, weights
from tests.families import FAMILIES, PADDED, inputs
from tests.test_ecosystem import free_port, without_dropout

pytestmark = pytest.mark.ecosystem
ROOT = Path(__file__).parents[1]
CLOSE = {"atol": 2e-5, "rtol": 2e-5}
CHECKS = {}


def check(function):
    CHECKS[function.__name__] = function
    return function


def pair(family, mesh, **changes):
    """The plain model, and its parallel one."""
    changes = {**without_dropout(family), **changes}
    plain = kernels.prepare(family.model(**changes))
    return plain, parallel.parallelize(copy.deepcopy(plain), mesh)


# ---- What every process does -------------------------------------------------------------------------------


@check
@torch.no_grad()
def logits(family, mesh):
    plain, model = pair(family, mesh)
    for padded in (False, True):
        ids, mask = inputs(101, padded=padded)
        found, wanted = (m(ids, attention_mask=mask, output_hidden_states=True) for m in (model, plain))
        torch.testing.assert_close(found.logits[mask.bool()], wanted.logits[mask.bool()], **CLOSE)
        for a, b in zip(found.hidden_states, wanted.hidden_states, strict=True):
            torch.testing.assert_close(a[mask.bool()], b[mask.bool()], **CLOSE)


@check
@torch.no_grad()
def weights_of_attention_and_masks_of_heads(family, mesh):
    plain, model = pair(family, mesh)
    ids, _ = inputs(101)
    look = torch.rand(2, 4, ids.shape[1], ids.shape[1]) > 0.3
    more = {"attention_mask": look | torch.eye(ids.shape[1], dtype=torch.bool)}
    if "head_mask" in family.cls().forward.__code__.co_varnames:
        more["head_mask"] = torch.rand(3, 4)
    found, wanted = (m(ids, output_attentions=True, use_cache=False, **more) for m in (model, plain))
    torch.testing.assert_close(found.logits, wanted.logits, **CLOSE)
    for a, b in zip(found.attentions, wanted.attentions, strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


@check
@torch.no_grad()
def cached(family, mesh):
    plain, model = pair(family, mesh)
    ids, mask = inputs(101, padded=True)
    whole, cache, parts = plain(ids, attention_mask=mask).logits, None, []
    for part in ids.split([PADDED + 2, 1, 1, ids.shape[1] - PADDED - 4], 1):
        seen = sum(p.shape[1] for p in parts) + part.shape[1]
        output = model(part, attention_mask=mask[:, :seen], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        parts.append(output.logits)
    torch.testing.assert_close(torch.cat(parts, 1)[mask.bool()], whole[mask.bool()], **CLOSE)
    assert cache[0][0].shape[1] == max(
        1, plain(ids, use_cache=True).past_key_values[0][0].shape[1] // mesh.size()
    )


@check
def generation_and_beams(family, mesh):
    plain, model = pair(family, mesh)
    ids, _ = inputs(101)
    for options in ({}, {"num_beams": 3}, {"do_sample": True, "generator": 7}):
        texts = []
        for m in (model, plain):
            own = {k: torch.Generator().manual_seed(v) if k == "generator" else v for k, v in options.items()}
            texts.append(decoding.generate(m, ids[:, :9], max_new_tokens=6, eos_token_id=None, **own))
        assert torch.equal(*texts), options


@check
def a_training_step(family, mesh, **changes):
    plain, model = (m.train() for m in pair(family, mesh, **changes))
    ids, _ = inputs(101)
    norms, losses = [], []
    for m in (plain, model):
        optimizer = torch.optim.AdamW(m.parameters(), lr=1e-2, eps=0.1)  # a first step's sign would be noise
        losses.append(m(ids, labels=ids).loss)
        losses[-1].backward()
        norm = torch.nn.utils.clip_grad_norm_(m.parameters(), 1e9)
        norms.append(norm.full_tensor() if isinstance(norm, DTensor) else norm)
        optimizer.step()
    torch.testing.assert_close(*losses, **CLOSE)
    if family.name not in ("phi", "phi3") or mesh.size() == 2:  # keys that several have count several times
        torch.testing.assert_close(*norms, atol=1e-4, rtol=1e-4)
    grads, tensors = parallel.gather_tensors(model, grads=True), parallel.gather_tensors(model)
    for name, p in plain.named_parameters():
        assert (name in grads) == (p.grad is not None)
        torch.testing.assert_close(
            tensors[name], p.detach(), **CLOSE, msg=lambda shown, name=name: f"{name}: {shown}"
        )
        if p.grad is not None:
            torch.testing.assert_close(
                grads[name], p.grad, atol=2e-5, rtol=1e-3, msg=lambda shown, name=name: f"{name}: {shown}"
            )


@check
def a_training_step_with_norms_of_heads(family, mesh):
    if family.name in ("phi", "persimmon", "fuyu"):
        a_training_step(family, mesh, qk_layernorm=True)


@check
def a_loss_cut_by_the_vocabulary(family, mesh):
    plain, _ = pair(family, mesh)
    model = parallel.parallelize(copy.deepcopy(plain), mesh, gather_logits=False)
    ids, _ = inputs(101)
    labels = torch.where(torch.rand(ids.shape, generator=torch.Generator().manual_seed(1)) < 0.3, -100, ids)
    with loss_parallel():
        output = model(ids, labels=labels)
        output.loss.backward()
    wanted = plain(ids, labels=labels)
    wanted.loss.backward()
    loss = output.loss.full_tensor() if isinstance(output.loss, DTensor) else output.loss
    torch.testing.assert_close(loss, wanted.loss, **CLOSE)
    assert output.logits.to_local().shape[-1] < 101
    found = parallel.gather_tensors(model, grads=True)
    for name, p in plain.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(found[name], p.grad, atol=2e-5, rtol=1e-3)


@check
def whole_again(family, mesh):
    plain, model = pair(family, mesh)
    again = parallel.gather(model)
    assert again.state_dict().keys() == plain.state_dict().keys()
    assert all(torch.equal(t, plain.state_dict()[name]) for name, t in again.state_dict().items())
    ids, _ = inputs(101)
    torch.testing.assert_close(again(ids).logits, plain(ids).logits, **CLOSE)
    total = sum(p.numel() for p in plain.parameters())
    own = sum(p.to_local().numel() for p in model.parameters())
    assert own < total / mesh.size() * 1.35, own / total


@check
def every_head(family, mesh):
    ids, _ = inputs(101)
    for head in family.heads:
        plain = family.model(head, num_labels=3, pad_token_id=0, **without_dropout(family))
        model = parallel.parallelize(copy.deepcopy(plain), mesh)
        with torch.no_grad():
            for a, b in zip(model(ids)[1:3], plain(ids)[1:3], strict=True):
                if isinstance(b, torch.Tensor):
                    torch.testing.assert_close(a, b, **CLOSE)


@check
def ids_that_nobody_has(family, mesh):
    _, model = pair(family, mesh)
    with pytest.raises(ValueError, match="from 0 to 100"):
        model(torch.tensor([[3, 101]]))
    with pytest.raises(ValueError, match="save parallel.gather"):
        weights.save(model, "nowhere")


@check
def what_cannot_be_cut(family, mesh):
    sizes = {"openai-gpt": {"n_head": 3}, "gpt_neo": {"num_heads": 3}}.get(
        family.name, {"num_attention_heads": 3, "num_key_value_heads": 3}
    )
    model = family.model(
        **{
            k: v
            for k, v in sizes.items()
            if family.name not in ("persimmon", "fuyu") or k != "num_key_value_heads"
        }
    )
    with pytest.raises(ValueError, match=f"{mesh.size()} processes cannot share 3 heads"):
        parallel.parallelize(model, mesh)
    assert not any(isinstance(p, DTensor) for p in model.parameters())
    with pytest.raises(ValueError, match="a quantised model cannot be cut"):
        parallel.parallelize(kernels.quantize(family.model(), "int8"), mesh)


@check
def sharded_on_top(family, mesh):
    if mesh.size() != 4:
        return
    both = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    plain, model = pair(family, both["tensor"])
    for layer in next(part for part in model.modules() if isinstance(part, torch.nn.ModuleList)):
        fully_shard(layer, mesh=both["data"])
    fully_shard(model, mesh=both["data"])
    ids, _ = inputs(101)
    own = ids[both["data"].get_local_rank()][None]
    model(own, labels=own).loss.backward()
    plain(ids, labels=ids).loss.backward()
    own = sum(p.to_local().numel() for p in model.parameters())
    assert own < 0.4 * sum(p.numel() for p in plain.parameters()) and all(
        p.device_mesh == both for p in model.parameters()
    )
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    torch.optim.SGD(plain.parameters(), lr=0.1).step()
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, plain(ids).logits, atol=1e-4, rtol=1e-4)


def process(rank: int, n: int, port: int, shown: str) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(n))
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    mesh, found = init_device_mesh("cpu", (n,)), {}
    for family in FAMILIES:
        for name, function in CHECKS.items():
            torch.manual_seed(0)
            try:
                function(family, mesh)
            except Exception:
                found[family.name, name] = traceback.format_exc()
    torch.save(found, f"{shown}.{rank}")
    dist.barrier()
    os._exit(0)  # gloo's threads may abort at a plain exit


@pytest.fixture(scope="module", params=[2, 4], ids=["two", "four"])
def failures(request, tmp_path_factory):
    shown = tmp_path_factory.mktemp("parallel") / "failures"
    torch.multiprocessing.spawn(process, (request.param, free_port(), str(shown)), nprocs=request.param)
    return [torch.load(f"{shown}.{rank}", weights_only=False) for rank in range(request.param)]


@pytest.mark.parametrize("name", CHECKS)
def test_processes_give_what_one_gives(failures, family, name):
    for failure in failures:
        assert (family.name, name) not in failure, failure[family.name, name]


# ---- Processes ---------------------------------------------------------------------------------------------


def started(code: str, *arguments) -> list[subprocess.Popen]:
    """Two processes that run this, as torchrun starts them, but that nobody ends with the other."""
    port = str(free_port())
    shown = [{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
             "OMP_NUM_THREADS": "1"} for rank in range(2)]  # fmt: skip
    return [subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], env={**os.environ, **own}, cwd=ROOT, text=True,
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE) for own in shown]  # fmt: skip


READ = """
import sys, os, torch
from decoders import gpt_neo
from decoders import parallel
def mapped():
    lines = open("/proc/self/status").read().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(("RssFile", "RssShmem")))
out = sys.stdout
with parallel.process_mesh("cpu") as mesh:
    parallel.load(gpt_neo.GPTNeoForCausalLM, sys.argv[2], mesh)  # what is needed once
    before = mapped()
    model = parallel.load(gpt_neo.GPTNeoForCausalLM, sys.argv[1], mesh)
    print(mapped() - before, sum(p.to_local().nbytes for p in model.parameters()), file=out)
"""


def test_a_process_reads_its_own_part_only(tmp_path):
    """Pages of the file that were touched, which come in up to 2 MB: rows of the matrix that is cut across them have 16."""
    from decoders import gpt_neo

    sizes = {"hidden_size": 2, "num_layers": 1, "num_heads": 2, "attention_types": [[["global"], 1]]}
    for name, (inner, vocabulary) in {"large": (2**22, 2**18), "small": (32, 64)}.items():
        config = gpt_neo.GPTNeoConfig(
            **sizes, intermediate_size=inner, vocab_size=vocabulary, max_position_embeddings=16
        )
        weights.save(gpt_neo.GPTNeoForCausalLM(config), tmp_path / name)
    total = (tmp_path / "large" / "model.safetensors").stat().st_size
    for one in started(READ, tmp_path / "large", tmp_path / "small"):
        out, err = one.communicate(timeout=120)
        assert not one.returncode, err
        read, own = map(int, out.split())
        assert total > 70e6 and own < 0.51 * total and read < 0.7 * total, (read, own, total)


DIES = """
import os, sys, torch
from decoders import phi3
from decoders import parallel
torch.manual_seed(0)
with parallel.process_mesh("cpu") as mesh:
    config = phi3.Phi3Config(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, pad_token_id=0)
    model = parallel.parallelize(phi3.Phi3ForCausalLM(config).eval(), mesh)
    for step in range(10**6):
        model(torch.ones(1, 3, dtype=torch.long))
        if step == 3 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), 9)
"""


def test_when_a_process_dies_the_others_say_so(tmp_path):
    start = time.monotonic()
    one, other = started(DIES)
    _, err = one.communicate(timeout=120)
    other.communicate(timeout=10)
    assert other.returncode == -9 and one.returncode == 1 and time.monotonic() - start < 60
    assert (
        err.strip()
        .splitlines()[-1]
        .endswith("OSError: another process has ended, or has not answered for a minute")
    ), err


def torchrun(*arguments, n: int = 2, stdin: str = "") -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(n), "--master-port", str(free_port()),
               "-m", "decoders", "generate", *arguments, "--tensor-parallel"]  # fmt: skip
    return subprocess.run(command, input=stdin, capture_output=True, text=True, cwd=ROOT, timeout=200)


def test_the_command_line(tmp_path):
    tiny, prompt = "checkpoints/tiny-phi3", "Tell me a story about Tom and a fox."
    alone = subprocess.run(
        [sys.executable, "-m", "decoders", "generate", tiny, prompt, "--chat"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert torchrun(tiny, prompt, "--chat").stdout == alone.stdout != ""
    sampled = torchrun(tiny, "-", "--temperature", "0.8", "--max-new-tokens", "5", stdin="Once upon a time")
    assert not sampled.returncode and sampled.stdout.startswith("Once upon a time"), sampled.stderr
    wrong = torchrun("checkpoints/none", prompt)
    assert (
        wrong.returncode
        and "error: --tensor-parallel, process 0: there is no folder checkpoints/none" in wrong.stderr
    )


def test_the_command_line_without_torchrun(capsys):
    from decoders.cli import main

    assert main(["generate", "checkpoints/tiny-phi3", "x", "--tensor-parallel"]) == 2
    assert (
        "--tensor-parallel, process 0: several processes are needed: start with torchrun"
        in capsys.readouterr().err
    )
    assert main(["generate", "checkpoints/tiny-phi3", "x", "--tensor-parallel", "--quantize", "int8"]) == 2
    assert "exclude each other" in capsys.readouterr().err

"""Tools around PyTorch work on the model files as they are: `make ecosystem` installs them and runs this file.

Compiled by inductor, exported to ONNX, quantised, trained by Trainer, accelerate and peft, spread over processes.
"""

import os
import socket
import warnings

import pytest
import safetensors.torch
import torch
import torch.distributed as dist
from torch import nn

from decoders import kernels, weights
from tests.families import FAMILIES, inputs

pytestmark = pytest.mark.ecosystem
CLOSE = {"atol": 2e-5, "rtol": 0}


def without_dropout(family) -> dict:
    return {key: 0.0 for key in family.config().to_dict() if key.endswith(("_dropout", "_pdrop"))}


@pytest.fixture(autouse=True)
def forgotten_graphs():
    torch._dynamo.reset()


# ---- torch.compile


class Counting:
    """A backend that runs graphs as they are and counts them."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, module, example):
        self.graphs += 1
        return module.forward


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_inductor_equals_eager(family, dtype):
    """A loaded model, kernels under it. In bfloat16 the error against float32 is no larger than eager's by half."""
    model, truth = kernels.prepare(family.model(dtype=dtype)), family.model()
    for one, other in zip(truth.parameters(), model.parameters(), strict=True):
        one.data = other.float()
    compiled = torch.compile(model, fullgraph=True)
    ids, mask = inputs(101, padded=True)
    for options in ({}, {"attention_mask": mask}):
        found, eager, right = (m(ids, **options).logits.float() for m in (compiled, model, truth))
        if dtype == torch.float32:
            torch.testing.assert_close(found, eager, **CLOSE)
        else:
            assert (found - right).norm() < 1.5 * (eager - right).norm() + 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_compiled_training_step_equals_an_eager_one(family, dtype):
    plain, model = (family.model(**without_dropout(family)).train() for _ in range(2))
    compiled = torch.compile(model, fullgraph=True)
    ids, mask = inputs(101, padded=True)
    for m in (plain, compiled):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = m(ids, attention_mask=mask, labels=ids).loss
        loss.backward()
    for (name, p), q in zip(plain.named_parameters(), model.parameters(), strict=True):
        if p.grad is not None:
            worst = (p.grad - q.grad).norm() / (p.grad.norm() + 1e-3)
            assert worst < (1e-4 if dtype == torch.float32 else 0.05), name


@torch.no_grad()
@pytest.mark.parametrize("masked", [False, True])
def test_six_lengths_take_two_graphs_at_most(family, masked):
    backend, model = Counting(), family.model()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
    for T in (5, 3, 7, 11, 17, 23):
        ids, mask = (part[:, :T].contiguous() for part in inputs(101, padded=True))
        options = {"attention_mask": mask} if masked else {}
        torch.testing.assert_close(compiled(ids, **options).logits, model(ids, **options).logits, **CLOSE)
    assert backend.graphs <= 2


@torch.no_grad()
@pytest.mark.parametrize("masked", [False, True])
def test_a_hundred_tokens_with_a_cache_take_three_graphs_at_most(family, masked):
    """One for the first length, one for all others, one for the steps in which the cache grows."""
    room = {"n_positions": 167} if family.name == "openai-gpt" else {"max_position_embeddings": 167}
    room |= {"original_max_position_embeddings": 167} if family.name == "phi3" else {}
    backend, model = Counting(), family.model(**room)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    ids = torch.randint(0, 101, (2, 123), generator=torch.Generator().manual_seed(0))
    cache, logits = model(ids[:, :23]).past_key_values, []
    for t in range(23, 123):
        options = {"attention_mask": torch.ones(2, t + 1, dtype=torch.long)} if masked else {}
        output = compiled(ids[:, t : t + 1], past_key_values=cache, **options)
        cache = output.past_key_values
        logits.append(output.logits)
    torch.testing.assert_close(torch.cat(logits, 1), model(ids).logits[:, 23:], **CLOSE)
    assert backend.graphs <= 3


# ---- Other formats


@torch.no_grad()
@pytest.mark.parametrize("masked", [False, True])
def test_onnx_runs_at_another_length(family, masked, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, length = family.model(), torch.export.Dim("T", min=2, max=60)
    ids, mask = inputs(101, padded=True)
    given = {"input_ids": ids, "attention_mask": mask} if masked else {"input_ids": ids}
    shapes = {**{name: {1: length} for name in given}, "use_cache": None}
    torch.onnx.export(model, (), kwargs={**given, "use_cache": False}, dynamic_shapes=shapes, dynamo=True,
                      verbose=False).save(tmp_path / "model.onnx")  # fmt: skip
    session = runtime.InferenceSession(tmp_path / "model.onnx")
    given = {name: value[:, :11] for name, value in given.items()}
    found = session.run(None, {name: value.numpy() for name, value in given.items()})[0]
    torch.testing.assert_close(torch.from_numpy(found), model(**given).logits, **CLOSE)


@torch.no_grad()
def test_torchao_quantises_the_products(family):
    quantization = pytest.importorskip("torchao.quantization")
    ids, _ = inputs(101)
    model = kernels.prepare(family.model())
    expected = model(ids).logits
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    assert any("Int8" in type(p).__name__ for p in model.parameters())
    error = (model(ids).logits - expected).norm() / expected.norm()
    assert 1e-4 < error < 0.05


# ---- Training


class Repeats(torch.utils.data.Dataset):
    """Rows that say one token again and again, the first few of some hidden by the mask, which has to count."""

    def __len__(self):
        return 64

    def __getitem__(self, i):
        mask = torch.ones(17, dtype=torch.long)
        mask[: i % 4] = 0
        ids = torch.full((17,), 3 + 7 * i % 90)
        return {
            "input_ids": ids.where(mask.bool(), 2),
            "attention_mask": mask,
            "labels": ids.where(mask.bool(), -100),
        }


def test_trainer_with_default_arguments(family, tmp_path):
    """It reads the signature of `forward`, drops the columns that this does not name, and saves in the end."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    torch.manual_seed(0)
    weights.save(family.cls()(family.config()), tmp_path / "fresh")
    model = weights.load(family.cls(), tmp_path / "fresh")
    arguments = transformers.TrainingArguments(
        str(tmp_path), report_to=[], disable_tqdm=True, learning_rate=3e-3
    )
    trainer = transformers.Trainer(model, arguments, train_dataset=Repeats(), eval_dataset=Repeats())
    seen = []
    model.register_forward_pre_hook(lambda module, args, kwargs: seen.append(set(kwargs)), with_kwargs=True)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before - 0.5
    assert all({"input_ids", "attention_mask", "labels"} <= names for names in seen)
    saved = next(tmp_path.glob("checkpoint-*"))
    again = weights.load(family.cls(), tmp_path / "fresh")
    again.load_state_dict(safetensors.torch.load_file(saved / "model.safetensors"))
    for one, other in zip(again.parameters(), model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_accelerate_trains_in_bfloat16(family):
    accelerate = pytest.importorskip("accelerate")
    torch.manual_seed(0)
    accelerate.state.AcceleratorState._reset_state(
        reset_partial_state=True
    )  # Trainer has set it up otherwise
    accelerator = accelerate.Accelerator(mixed_precision="bf16", cpu=True)
    model = family.cls()(family.config())
    model, optimizer, batches = accelerator.prepare(
        model,
        torch.optim.AdamW(model.parameters(), lr=3e-3),
        torch.utils.data.DataLoader(Repeats(), batch_size=8),
    )
    losses = []
    for _ in range(3):
        for batch in batches:
            loss = model(**batch).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5


def test_peft_trains_lora_weights_only(family):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    if family.name == "openai-gpt":
        pytest.skip("its products are Conv1D, which peft knows by the class of GPT-2 alone")
    base = family.model()
    names = {name.rpartition(".")[2] for name, part in base.named_modules() if isinstance(part, nn.Linear)}
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=sorted(names - {"lm_head"})))
    ids, mask = inputs(101)
    model(input_ids=ids, attention_mask=mask, labels=ids).loss.backward()
    trained = [name for name, p in model.named_parameters() if p.grad is not None]
    assert trained and all("lora_" in name for name in trained)


# ---- Several processes


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def on_one_of_two(rank: int, name: str, kind: str, port: int) -> None:
    """Gradients of half of the batch, averaged over both processes, are those of the whole batch."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE="2")
    dist.init_process_group("gloo")
    family = next(f for f in FAMILIES if f.name == name)
    none, (ids, _) = without_dropout(family), inputs(101)
    plain, model = family.model(**none).train(), kernels.prepare(family.model(**none)).train()
    plain(ids, labels=ids).loss.backward()
    if kind == "DDP":
        model = nn.parallel.DistributedDataParallel(model, find_unused_parameters=name == "fuyu")
    else:
        from torch.distributed.fsdp import fully_shard

        for layer in next(part for part in model.modules() if isinstance(part, nn.ModuleList)):
            fully_shard(layer)
        fully_shard(model)
    own = ids[rank : rank + 1]
    model(own, labels=own).loss.backward()
    expected = dict(plain.named_parameters())
    for key, p in model.named_parameters():
        if p.grad is not None:
            found = p.grad.full_tensor() if kind == "FSDP2" else p.grad
            torch.testing.assert_close(
                found, expected[key.removeprefix("module.")].grad, atol=1e-6, rtol=1e-4, msg=key
            )
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(ids).logits, plain.eval()(ids).logits, **CLOSE)
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # gloo's threads may abort at a plain exit


@pytest.mark.parametrize("kind", ["DDP", "FSDP2"])
def test_two_processes_train_as_one(family, kind):
    torch.multiprocessing.spawn(on_one_of_two, (family.name, kind, free_port()), nprocs=2)

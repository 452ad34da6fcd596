"""examples/train.py: what it writes is a checkpoint, what it computes is the plain loss, and a kill loses nothing."""

import csv
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import traceback
from itertools import islice
from typing import NamedTuple

import pytest
import torch

from decoders import model_class, read_config, tokenize, weights
from examples import train as script
from examples.lora import LoRA, add_lora, merged
from examples.loss import Loss
from examples.resume import save_training
from examples.stories import stories
from tests.conftest import ROOT
from tests.families import FAMILIES, PHI, inputs

SMALL = "--width 48 --layers 2 --heads 4 --context 64 --batch-size 4 --vocab 600".split()


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "mine.txt"
    file.write_text("\n".join(islice(stories(1), 1500)), "utf-8")
    return file


def command(family, text, out, *more):
    return [sys.executable, "-m", "examples.train", family, "--text", text, "--out", out, *SMALL, *more]


class Finished(NamedTuple):
    returncode: int
    stderr: str


def train(*arguments) -> Finished:
    """The command in a process of its own: a fork of this one, which has imported PyTorch already."""
    with tempfile.TemporaryFile() as err:
        if (process := os.fork()) == 0:
            os.dup2(err.fileno(), 2)
            os._exit(status_of([str(each) for each in command(*arguments)[2:]]))
        _, status = os.waitpid(process, 0)
        return Finished(os.waitstatus_to_exitcode(status), os.pread(err.fileno(), 2**24, 0).decode())


def status_of(arguments: list[str]) -> int:
    """In the fork: what `python -m examples.train` would exit with."""
    sys.stderr, sys.argv = open(2, "w", buffering=1), arguments  # noqa: SIM115
    os.chdir(ROOT)
    try:
        runpy.run_module("examples.train", run_name="__main__", alter_sys=True)
    except SystemExit as end:
        return end.code
    except BaseException:
        traceback.print_exc()
        return 70
    return 0


def losses_of(out):
    return [float(row["loss"]) for row in csv.DictReader(open(out / "loss.csv"))]


@pytest.mark.parametrize("name", [f.name for f in FAMILIES])
def test_a_short_training_writes_a_checkpoint_that_reads_and_generates(name, text, tmp_path):
    done = train(name, text, tmp_path / "out", "--steps", "12")
    assert done.returncode == 0 and "held out" in done.stderr, done.stderr
    losses = losses_of(tmp_path / "out")
    assert len(losses) == 12 and losses[-1] < losses[0]
    assert (tmp_path / "out" / "loss.png").stat().st_size > 1000
    model = weights.load(model_class(read_config(tmp_path / "out")), tmp_path / "out")
    ids = torch.tensor([tokenize.load(tmp_path / "out").encode("Once upon a time")])
    assert model.generate(ids, max_new_tokens=5, eos_token_id=None).shape[1] == ids.shape[1] + 5


def test_transformers_loads_what_was_trained_and_agrees(text, tmp_path):
    transformers = pytest.importorskip("transformers")
    train("phi", text, tmp_path / "out", "--steps", "3")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = tokenizer("Once upon a time", return_tensors="pt")["input_ids"]
    assert ids[0].tolist() == tokenize.load(tmp_path / "out").encode("Once upon a time")
    ours = weights.load(model_class(read_config(tmp_path / "out")), tmp_path / "out")
    assert torch.allclose(ours(ids).logits, theirs(ids).logits, atol=2e-5)


def test_a_killed_training_goes_on_where_it_was(text, tmp_path):
    train("gpt_neo", text, tmp_path / "out", "--steps", "5")
    first = losses_of(tmp_path / "out")
    killed = subprocess.Popen(
        command("gpt_neo", text, tmp_path / "out", "--steps", "100000"), cwd=ROOT, stderr=subprocess.PIPE
    )
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    done = train("gpt_neo", text, tmp_path / "out", "--steps", "9")
    assert done.returncode == 0, done.stderr
    assert len(losses_of(tmp_path / "out")) == 9 and losses_of(tmp_path / "out")[:5] == first


def test_a_folder_of_another_training_is_refused_and_left_alone(text, tmp_path):
    out = tmp_path / "out"
    train("gpt_neo", text, out, "--steps", "2")
    files = {file: file.read_bytes() for file in out.iterdir()}
    other = tmp_path / "other.txt"
    other.write_text(text.read_text("utf-8")[::-1], "utf-8")
    for family, file, more in (
        ("gpt_neo", other, ()),
        ("phi", text, ()),
        ("gpt_neo", text, ("--width", "64")),
        ("gpt_neo", text, ("--lora", "2")),
    ):
        done = train(family, file, out, "--steps", "4", *more)
        assert done.returncode == 2 and "give another --out" in done.stderr, done.stderr
        assert "Traceback" not in done.stderr
    assert files == {file: file.read_bytes() for file in out.iterdir()}
    torch.save(["of something else"], tmp_path / "list.pt")
    for content in (b"of something else", (tmp_path / "list.pt").read_bytes()):
        (out / "training.pt").write_bytes(content)
        done = train("gpt_neo", text, out, "--steps", "4")
        assert done.returncode == 2 and "training.pt is no training" in done.stderr, done.stderr
    for name in ("training.pt", "model.safetensors"):
        (out / name).unlink()
        done = train("gpt_neo", text, out, "--steps", "4")
        assert done.returncode == 2 and "holds a model" in done.stderr, done.stderr


def test_what_a_failed_try_leaves_is_not_used(text, tmp_path):
    out = tmp_path / "out"
    short = tmp_path / "short.txt"
    short.write_text("aaaa bbbb " * 20, "utf-8")
    assert train("phi", short, out, "--steps", "1").returncode == 2
    assert train("phi", text, out, "--steps", "1").returncode == 0
    assert read_config(out)["vocab_size"] == 600


def test_ctrl_c_ends_a_step_and_saves(text, tmp_path, monkeypatch):
    """In the third step; it goes on from there. Pressed again it would end at once."""
    own, before, steps = script.train_step, signal.getsignal(signal.SIGINT), []

    def pressed(*args, **options):
        steps.append(args)
        if len(steps) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return own(*args, **options)

    monkeypatch.setattr(script, "train_step", pressed)
    for total in (3, 5):
        arguments = command("phi", text, tmp_path / "out", "--steps", "5")[2:]
        monkeypatch.setattr(sys, "argv", [str(one) for one in arguments])
        if total == 3:
            with pytest.raises(KeyboardInterrupt):
                script.main()
        else:
            script.main()
        assert len(losses_of(tmp_path / "out")) == len(steps) == total
        assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_is_status_130_and_a_sentence(text, tmp_path):
    arguments = command("phi", text, tmp_path / "out", "--steps", "100000")
    running = subprocess.Popen(arguments, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    assert "parameters" in running.stderr.readline()  # it trains from here on, or is about to
    running.send_signal(signal.SIGINT)
    said = running.communicate()[1]
    assert running.returncode == 130 and "interrupted" in said and "Traceback" not in said, said
    done = train("phi", text, tmp_path / "out", "--steps", "3")
    assert done.returncode == 0 and len(losses_of(tmp_path / "out")) >= 3, done.stderr


@pytest.mark.parametrize(("more", "says"), [
    ("--prompt=", "--prompt has 0 tokens"), ("--prompt=" + "many words " * 64, "fewer than --context"),
    ("--minutes=0", "--minutes must be above 0"), ("--steps=-1", "--steps must be 0 or more"),
    ("--batch-size=0", "--batch-size must be 1 or more"), ("--heads=5", "--heads 5 do not fit --width 48"),
    ("--start=checkpoints/tiny-phi", "is a model of phi, not of gpt_neo"),
    ("--learning-rate=1e30", "try a smaller --learning-rate"),
])  # fmt: skip
def test_what_cannot_be_trained_is_one_sentence_before_anything_is_lost(text, tmp_path, more, says):
    done = train("gpt_neo", text, tmp_path / "out", "--steps", "9", more)
    assert done.returncode == 2 and says in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_a_training_that_cannot_be_saved_leaves_the_one_before(tmp_path, monkeypatch):
    file = tmp_path / "training.pt"
    save_training(file, {"losses": [1.0]})

    def full(state, out):
        out.write(b"half")
        raise RuntimeError("unexpected pos")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="training.pt cannot be written"):
        save_training(file, {"losses": []})
    assert torch.load(file) == {"losses": [1.0]} and list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize(
    ("arguments", "rate"),
    [(["phi"], 3e-3), (["openai_gpt"], 1e-3), (["phi", "--start", "checkpoints/tiny-phi"], 1e-3),
     (["openai_gpt", "--learning-rate", "0.5"], 0.5)],
)  # fmt: skip
def test_the_learning_rate_is_one_at_which_the_family_learns(arguments, rate, monkeypatch):
    """Post-norm, as GPT-1 is, stays at the frequencies of single tokens at 0.003."""
    monkeypatch.setattr(sys, "argv", ["train", "--text", "mine.txt", *arguments])
    assert script.arguments().learning_rate == rate


def test_lora_begins_as_the_base_and_merges_to_what_it_computes(family):
    model = family.model()
    ids, _ = inputs(101)
    before = model(ids).logits
    add_lora(model, 3)
    assert torch.equal(model(ids).logits, before)
    adapters = [m for m in model.modules() if isinstance(m, LoRA)]
    for adapter in adapters:
        torch.nn.init.normal_(adapter.b, std=0.3)
    learnt = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(learnt) == 2 * len(adapters) > 0
    after = model(ids).logits
    plain = merged(model)
    assert not torch.allclose(after, before, atol=0.1)
    assert torch.allclose(plain(ids).logits, after, atol=1e-4)
    assert plain.state_dict().keys() == family.model().state_dict().keys()


def test_the_loss_in_chunks_is_the_plain_loss_with_its_gradient(family, monkeypatch):
    monkeypatch.setattr("examples.loss.CHUNK", 7 * 101)  # 7 positions of a vocabulary of 101
    ids, labels = inputs(101)[0], inputs(101)[0].clone()
    labels[:, 3:6] = -100
    found, right = family.model(dtype=torch.float64), family.model(dtype=torch.float64)
    loss = Loss(found)(ids, labels)
    loss.backward()
    expected = right(ids, labels=labels).loss
    expected.backward()
    assert torch.allclose(loss, expected.double(), atol=1e-6)
    for (name, p), q in zip(found.named_parameters(), right.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        assert p.grad is None or torch.allclose(p.grad, q.grad, atol=1e-6), name


def test_a_label_that_is_no_token_is_an_error():
    """Any but -100, which stands for nothing to learn."""
    model, ids = PHI.model(), inputs(101)[0]
    for wrong in (-1, 101):
        labels = ids.clone()
        labels[0, 5] = wrong
        with pytest.raises((RuntimeError, IndexError), match="out of bounds"):
            Loss(model)(ids, labels)


def test_a_loss_without_gradients_computes_none(monkeypatch):
    model, ids = PHI.model(), inputs(101)[0]
    parts = []
    monkeypatch.setattr("examples.loss.added", lambda total, part, dtype: parts.append(part))
    with torch.no_grad():
        loss = Loss(model)(ids, ids)
    assert not parts and torch.allclose(loss, model(ids, labels=ids).loss.detach(), atol=1e-5)
    Loss(model)(ids, ids)
    assert parts


@pytest.mark.ecosystem
def test_two_processes_train_one_model(text, tmp_path):
    arguments = command("phi", text, tmp_path / "out", "--steps", "6")[1:]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    done = subprocess.run([*launcher, *arguments], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and len(losses_of(tmp_path / "out")) == 6, done.stderr


def test_a_text_that_is_missing_or_too_short_is_a_sentence(text, tmp_path):
    (tmp_path / "short.txt").write_text("Once.")
    for file, says in (
        (tmp_path / "short.txt", "too few"),
        (tmp_path / "none.txt", "none.txt"),
        (tmp_path, ""),
    ):
        done = train("phi", file, tmp_path / "out", "--steps", "1")
        assert done.returncode == 2 and says in done.stderr and "Traceback" not in done.stderr, done.stderr


@pytest.mark.ecosystem
def test_the_benchmark_trains_both_alike_and_ours_in_less_memory():
    """At a tiny width; `measure` ends in an error where the two losses part."""
    pytest.importorskip("accelerate", reason="Trainer needs it: make .venv/ecosystem")
    from bench.training import measure

    found = measure(1, "quick")
    assert found["ours"][-1]["memory"] <= 0.85 * found["theirs"][-1]["memory"]

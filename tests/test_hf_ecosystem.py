"""Other people's code on top of the documented classes: `make ecosystem` installs it and runs this file."""

import os
import re
from typing import Literal

import pytest
import torch

from decoders import hf
from tests.families import OPENAI_GPT, inputs
from tests.hub_cache import CHECKPOINTS
from tests.test_hf import documented

pytestmark = [pytest.mark.ecosystem, pytest.mark.filterwarnings("ignore")]
CLOSE = {"atol": 2e-5, "rtol": 0}
TEXTS = ["the fox is happy", "the owl is sad"] * 16


@pytest.fixture(scope="module")
def transformers():
    os.environ["HF_HUB_OFFLINE"] = "1"
    return pytest.importorskip("transformers")


def arguments(transformers, folder, **options):
    return transformers.TrainingArguments(
        str(folder),
        per_device_train_batch_size=8,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        **{"learning_rate": 1e-3, "num_train_epochs": 6, **options},
    )


def test_trainer_trains_and_saves_what_transformers_loads(transformers, tmp_path):
    pytest.importorskip("accelerate")
    tokenizer = hf.AutoTokenizer.from_pretrained(CHECKPOINTS / "tiny-phi")
    tokenizer.pad_token = tokenizer.eos_token
    model = hf.PhiForSequenceClassification.from_pretrained(
        CHECKPOINTS / "tiny-phi", num_labels=2, pad_token_id=tokenizer.pad_token_id
    )
    rows = tokenizer(TEXTS, padding=True)
    data = [{name: rows[name][i] for name in rows} | {"labels": i % 2} for i in range(len(TEXTS))]
    trainer = transformers.Trainer(
        model=model,
        args=arguments(transformers, tmp_path),
        train_dataset=data,
        eval_dataset=data[:8],
        processing_class=tokenizer,
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    assert after < 0.2 * before
    trainer.save_model(tmp_path / "saved")
    theirs = transformers.PhiForSequenceClassification.from_pretrained(
        tmp_path / "saved", attn_implementation="eager"
    ).eval()
    ours = hf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved")
    given = hf.AutoTokenizer.from_pretrained(tmp_path / "saved")(TEXTS[:4], padding=True, return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(theirs(**given).logits, ours(**given).logits, **CLOSE)
        assert ours(**given).logits.argmax(-1).tolist() == [0, 1, 0, 1]


@pytest.mark.parametrize("target", ["all-linear", None])
def test_lora_trains_merges_and_reloads(family, target, tmp_path):
    peft = pytest.importorskip("peft")
    model, (ids, mask) = documented(family, tmp_path), inputs(101, padded=True)
    if target is None:  # by name
        target = (
            ["c_attn", "c_proj"]
            if family is OPENAI_GPT
            else [
                name
                for name, part in model.named_modules()
                if type(part) is torch.nn.Linear and "attn" in name
            ]
        )
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(task_type="CAUSAL_LM", r=2, lora_alpha=8, target_modules=target)
    )
    adapted.train()
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(6):
        loss = adapted(input_ids=ids, attention_mask=mask, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    adapted.eval()
    with torch.no_grad():
        right = adapted(input_ids=ids, attention_mask=mask).logits
    text = adapted.generate(input_ids=ids, attention_mask=mask, max_new_tokens=4, eos_token_id=None)
    adapted.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(
        type(model).from_pretrained(tmp_path / "checkpoint"), tmp_path / "adapter"
    ).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids=ids, attention_mask=mask).logits, right, **CLOSE)
    merged = adapted.merge_and_unload()
    with torch.no_grad():
        torch.testing.assert_close(merged(ids, attention_mask=mask).logits, right, atol=2e-4, rtol=1e-4)
    assert torch.equal(merged.generate(ids, attention_mask=mask, max_new_tokens=4, eos_token_id=None), text)
    merged.save_pretrained(tmp_path / "merged")
    assert type(type(model).from_pretrained(tmp_path / "merged")) is type(model)


TINY = ["tiny-gpt-neo", "tiny-openai-gpt", "tiny-phi", "tiny-phi3", "tiny-persimmon"]


def trl_losses(library, name, kind, folder):
    """(losses of four steps, the trained model, what trl saved): "SFT" on sentences, "DPO" on pairs of answers."""
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    torch.manual_seed(0)
    model = library.AutoModelForCausalLM.from_pretrained(CHECKPOINTS / name, dtype=torch.float32)
    tokenizer = library.AutoTokenizer.from_pretrained(CHECKPOINTS / name)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    rows = {
        "SFT": [{"text": text + " because it is so."} for text in TEXTS],
        "DPO": [{"prompt": t, "chosen": " because it is.", "rejected": " but nobody knows."} for t in TEXTS],
    }
    config = getattr(trl, f"{kind}Config")(
        str(folder),
        per_device_train_batch_size=8,
        max_steps=4,
        logging_steps=1,
        learning_rate=1e-4 if kind == "DPO" else 1e-3,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        bf16=False,
        gradient_checkpointing=False,
        max_length=64,
    )
    data = datasets.Dataset.from_list(rows[kind])
    trainer = getattr(trl, f"{kind}Trainer")(
        model=model, args=config, train_dataset=data, processing_class=tokenizer
    )
    trainer.train()
    trainer.save_model(folder / "saved")
    return [row["loss"] for row in trainer.state.log_history if "loss" in row], model.eval(), folder / "saved"


@pytest.mark.parametrize("kind", ["SFT", "DPO"])
@pytest.mark.parametrize("name", TINY)
def test_trl_trains_as_with_transformers(transformers, tmp_path, name, kind):
    """Our models and tokenizers: the same losses step by step, and a folder that Transformers loads. The sum of the
    losses was divided by a label too many in each sequence, and DPO found no reference model for two families."""
    ours, model, saved = trl_losses(hf, name, kind, tmp_path / "ours")
    theirs, _, _ = trl_losses(transformers, name, kind, tmp_path / "theirs")
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), atol=1e-4, rtol=1e-3)
    assert ours[-1] < (0.5 if kind == "SFT" else 0.9) * ours[0]
    given = transformers.AutoTokenizer.from_pretrained(saved)(TEXTS[0], return_tensors="pt")
    again = transformers.AutoModelForCausalLM.from_pretrained(saved, attn_implementation="eager")
    ids = hf.AutoTokenizer.from_pretrained(saved)(TEXTS[0], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, again(given["input_ids"]).logits, **CLOSE)


@pytest.mark.parametrize("name", TINY)
def test_outlines_writes_what_a_pattern_allows(transformers, name):
    """By our models and tokenizers, and the same text as by Transformers'. outlines sees no blanks in the tokens of
    OpenAI GPT, of either."""
    outlines, texts = pytest.importorskip("outlines"), []
    several = name != "tiny-openai-gpt"
    pattern = "(fox|owl)s? (met|saw) [a-z]{3,9} and (Nora|Tom)" if several else "(fox|owl|bear)s?"
    for library in (hf, transformers):
        model = library.AutoModelForCausalLM.from_pretrained(CHECKPOINTS / name, dtype=torch.float32)
        tokenizer = library.AutoTokenizer.from_pretrained(CHECKPOINTS / name)
        writer = outlines.from_transformers(model, tokenizer)
        texts.append(writer("Once upon a time a", outlines.regex(pattern), max_new_tokens=40))
    assert texts[0] == texts[1] and re.fullmatch(pattern, texts[0].strip())


def test_outlines_writes_json_of_a_schema(transformers):
    outlines, pydantic = pytest.importorskip("outlines"), pytest.importorskip("pydantic")

    class Animal(pydantic.BaseModel):
        kind: Literal["fox", "owl", "bear"]
        friends: int = pydantic.Field(ge=0, le=99)
        happy: bool

    folder = CHECKPOINTS / "tiny-phi"
    model, tokenizer = (
        hf.AutoModelForCausalLM.from_pretrained(folder),
        hf.AutoTokenizer.from_pretrained(folder),
    )
    writer = outlines.from_transformers(model, tokenizer)
    for prompt in ("Once upon a time", "Nora met"):
        assert isinstance(Animal.model_validate_json(writer(prompt, Animal, max_new_tokens=80)), Animal)
    chosen = writer.batch(["Once upon a time", "Nora"], Literal["fox", "owl"], max_new_tokens=8)
    assert len(chosen) == 2 and {*chosen} <= {"fox", "owl"}


def test_lm_eval_scores_as_with_transformers(transformers):
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    folder = str(CHECKPOINTS / "tiny-phi")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    requests = [
        Instance("loglikelihood", {}, (question, answer), i)
        for i, (question, answer) in enumerate(
            (question, answer)
            for question in ("Once upon a time", "The fox", "Nora met")
            for answer in (" there was", " a", " an owl.")
        )
    ]
    found = []
    for library in (hf, transformers):
        model = library.AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32)
        scorer = HFLM(pretrained=model, tokenizer=tokenizer, device="cpu", batch_size=4)
        scores = scorer.loglikelihood(requests, disable_tqdm=True)
        [text] = scorer.generate_until(
            [Instance("generate_until", {}, ("Once upon a time", {"until": ["."], "max_gen_toks": 12}), 0)],
            disable_tqdm=True,
        )
        found.append((scores, text))
    (ours, text), (theirs, other) = found
    assert text == other and [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]
    torch.testing.assert_close(
        torch.tensor([s for s, _ in ours]), torch.tensor([s for s, _ in theirs]), atol=1e-3, rtol=0
    )


@torch.no_grad()
def test_accelerate_dispatches(family, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model, (ids, mask) = documented(family, tmp_path), inputs(101, padded=True)
    right, text = (
        model(ids, attention_mask=mask).logits,
        model.generate(ids, attention_mask=mask, max_new_tokens=4),
    )
    offloaded = accelerate.cpu_offload(model, torch.device("cpu"))
    torch.testing.assert_close(offloaded(ids, attention_mask=mask).logits, right, **CLOSE)
    assert torch.equal(offloaded.generate(ids, attention_mask=mask, max_new_tokens=4), text)

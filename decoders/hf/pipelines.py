"""The documented `pipeline`, for the tasks of these models: for `py`.

pipeline("text-generation", "microsoft/phi-2")("Once upon a time", max_new_tokens=20)
"""

import io
import re
import urllib.request
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn

from .arguments import nearest
from .auto import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
from .encodings import BatchEncoding
from .fuyu import FuyuProcessor
from .tokenizers import AutoTokenizer

__all__ = ["pipeline"]


class Pipeline:
    """A model and its tokenizer, called with a text or a list of texts; the answer is alike."""

    auto: type

    def __init__(self, model: nn.Module, tokenizer: Any, task: str, options: dict):
        self.model, self.tokenizer, self.task, self.options = model, tokenizer, task, options

    device = property(lambda self: self.model.device)

    def __call__(self, inputs: Any, **options: Any) -> Any:
        options = {**self.options, **options}
        options.pop("batch_size", None)
        if isinstance(inputs, list) and not (inputs and isinstance(inputs[0], dict)):
            return [self.one(text, **options) for text in inputs]
        return self.one(inputs, **options)

    def one(self, text: Any, **options: Any) -> Any:
        raise NotImplementedError


class TextGenerationPipeline(Pipeline):
    auto = AutoModelForCausalLM

    def one(
        self,
        text: Any,
        return_full_text: bool = True,
        return_tensors: bool = False,
        prefix: str = "",
        clean_up_tokenization_spaces: bool = False,
        stop_sequence: str | None = None,
        **settings: Any,
    ) -> list[dict[str, Any]]:
        """`generated_text` for each answer: the whole text, or what is new. Of a conversation, a list of
        messages with a role and a content, it is that with the answer."""
        if stop_sequence is not None:  # the first token of it ends the text, as documented
            settings["eos_token_id"] = self.tokenizer.encode(stop_sequence, add_special_tokens=False)[0]
        chat = isinstance(text, list)
        if chat:
            inputs = self.tokenizer.apply_chat_template(
                text, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        else:
            inputs = self.tokenizer(prefix + text, return_tensors="pt")
        inputs = inputs.to(self.device)
        ids = self.model.generate(**inputs, **settings)
        found, n = [], inputs["input_ids"].shape[1]
        for row in ids:
            if return_tensors:
                found.append({"generated_token_ids": row.tolist()})
                continue
            clean = {
                "skip_special_tokens": True,
                "clean_up_tokenization_spaces": clean_up_tokenization_spaces,
            }
            whole, prompt = (self.tokenizer.decode(part, **clean) for part in (row, row[:n]))
            new = whole[len(prompt) :]
            answer = [*text, {"role": "assistant", "content": new.strip()}] if chat else prefix + text + new
            found.append({"generated_text": answer if return_full_text else new})
        return found


class TextClassificationPipeline(Pipeline):
    auto = AutoModelForSequenceClassification

    @torch.no_grad()
    def one(
        self, text: Any, top_k: int | None = 1, function_to_apply: str | None = None, **options: Any
    ) -> list[dict[str, Any]]:
        """`label` and `score` of the `top_k` likeliest, None: of all."""
        pair = (text["text"], text.get("text_pair")) if isinstance(text, dict) else (text,)
        logits = (
            self.model(**self.tokenizer(*pair, return_tensors="pt", **options).to(self.device))
            .logits[0]
            .float()
        )
        config = self.model.config
        if function_to_apply is None:
            several = config.problem_type == "multi_label_classification" or len(logits) == 1
            plain = config.problem_type == "regression"
            function_to_apply = "none" if plain else "sigmoid" if several else "softmax"
        ways = {"none": lambda x: x, "sigmoid": torch.sigmoid, "softmax": lambda x: x.softmax(-1)}
        if function_to_apply not in ways:
            raise ValueError(f"function_to_apply must be one of {', '.join(ways)}, not {function_to_apply!r}")
        scores = ways[function_to_apply](logits).tolist()
        ranked = sorted(range(len(scores)), key=lambda i: -scores[i])[:top_k]
        return [{"label": config.id2label[i], "score": scores[i]} for i in ranked]


class TokenClassificationPipeline(Pipeline):
    auto = AutoModelForTokenClassification

    @torch.no_grad()
    def one(
        self,
        text: str,
        aggregation_strategy: str = "none",
        ignore_labels: list[str] | None = None,
        **options: Any,
    ) -> list[dict[str, Any]]:
        """Each token's likeliest label, or with "simple" each group of neighbours of one label, with its
        `score` and place in the text."""
        if aggregation_strategy not in ("none", "simple"):
            message = "the others need to know whole words"
            raise ValueError(f"aggregation_strategy must be 'none' or 'simple': {message}")
        inputs = self.tokenizer(
            text, return_tensors="pt", return_offsets_mapping=True, return_special_tokens_mask=True, **options
        )
        spans, special = (inputs.pop(name)[0].tolist() for name in ("offset_mapping", "special_tokens_mask"))
        scores = self.model(**inputs.to(self.device)).logits[0].float().softmax(-1)
        ignored, found = ["O"] if ignore_labels is None else ignore_labels, []
        for i, ((start, end), row) in enumerate(zip(spans, scores, strict=True)):
            label = self.model.config.id2label[int(row.argmax())]
            if special[i] or label in ignored:
                continue
            word = self.tokenizer.convert_ids_to_tokens(int(inputs["input_ids"][0, i]))
            found.append(
                {
                    "entity": label,
                    "score": float(row.max()),
                    "index": i,
                    "word": word,
                    "start": start,
                    "end": end,
                }
            )
        return found if aggregation_strategy == "none" else self.grouped(found, inputs["input_ids"][0])

    def grouped(self, tokens: list[dict], ids: torch.Tensor) -> list[dict[str, Any]]:
        groups: list[list[dict]] = []
        for token in tokens:
            last = groups[-1][-1] if groups else None
            joins = last and not token["entity"].startswith("B-") and last["index"] + 1 == token["index"]
            if joins and kind_of(last) == kind_of(token):
                groups[-1].append(token)
            else:
                groups.append([token])
        return [
            {
                "entity_group": kind_of(group[0]),
                "score": sum(token["score"] for token in group) / len(group),
                "word": self.tokenizer.decode(ids[group[0]["index"] : group[-1]["index"] + 1]),
                "start": group[0]["start"],
                "end": group[-1]["end"],
            }
            for group in groups
        ]


def kind_of(token: dict[str, Any]) -> str:
    """Its label without the mark of beginning or inside."""
    return token["entity"].removeprefix("B-").removeprefix("I-")


class QuestionAnsweringPipeline(Pipeline):
    auto = AutoModelForQuestionAnswering

    def __call__(
        self, inputs: Any = None, *, question: Any = None, context: Any = None, **options: Any
    ) -> Any:
        """`question` and `context`, or a dict with both, or lists of them."""
        if inputs is None and isinstance(question, list):
            contexts = context if isinstance(context, list) else [context] * len(question)
            inputs = [{"question": q, "context": c} for q, c in zip(question, contexts, strict=True)]
        inputs = {"question": question, "context": context} if inputs is None else inputs
        options = {**self.options, **options}
        if isinstance(inputs, list):
            return [self.one(one, **options) for one in inputs]
        return self.one(inputs, **options)

    @torch.no_grad()
    def one(
        self,
        text: dict[str, str],
        top_k: int = 1,
        max_answer_len: int = 15,
        max_seq_len: int = 384,
        doc_stride: int = 128,
    ) -> Any:
        """The likeliest part of the context: `answer`, its place (`start`, `end`) and `score`. A long context
        is read in pieces of `max_seq_len` tokens."""
        found: dict[tuple[int, int], float] = {}
        for row in self.pieces(text, max_seq_len, doc_stride):
            spans, special = row.pop("offset_mapping")[0].tolist(), row.pop("special_tokens_mask")[0]
            inside = (row.pop("token_type_ids")[0] == 1) & (special == 0)
            output = self.model(**row.to(self.device))
            begin, end = (
                part[0].float().cpu().masked_fill(~inside, -torch.inf).softmax(-1)
                for part in (output.start_logits, output.end_logits)
            )
            chances = (begin[:, None] * end[None]).triu().tril(max_answer_len - 1)
            best = chances.flatten().topk(min(top_k, chances.numel()))
            for score, place in zip(best.values.tolist(), best.indices.tolist(), strict=True):
                start, stop = spans[place // len(end)][0], spans[place % len(end)][1]
                found[start, stop] = max(score, found.get((start, stop), 0.0))
        ranked = sorted(found.items(), key=lambda item: -item[1])[:top_k]
        answers = [
            {"score": score, "start": start, "end": stop, "answer": text["context"][start:stop].strip()}
            for (start, stop), score in ranked
        ]
        return answers[0] if top_k == 1 else answers

    def pieces(self, text: dict[str, str], most: int, stride: int) -> list:
        whole = self.tokenizer(
            text["question"],
            text["context"],
            return_token_type_ids=True,
            max_length=most,
            return_offsets_mapping=True,
            return_special_tokens_mask=True,
            stride=stride,
            truncation="only_second",
            return_overflowing_tokens=True,
        )
        names = [name for name in whole if name != "overflow_to_sample_mapping"]
        return [
            BatchEncoding({name: torch.tensor([whole[name][i]]) for name in names})
            for i in range(len(whole["input_ids"]))
        ]


class ImageTextToTextPipeline(Pipeline):
    """Of Fuyu: pictures, as paths, urls or Pillow's, and a text."""

    auto = AutoModelForImageTextToText

    def __call__(self, images: Any = None, text: Any = None, **options: Any) -> Any:
        """`images` and `text`, one of each, or lists of them; a dict with both keys counts too."""
        if isinstance(images, dict):
            images, text = images["images"], images["text"]
        if isinstance(text, list):
            images = images if isinstance(images, list) else [images] * len(text)
            return [self(image, one, **options) for image, one in zip(images, text, strict=True)]
        return self.one((images, text), **{**self.options, **options})

    def one(self, text: Any, return_full_text: bool = False, **settings: Any) -> list[dict[str, Any]]:
        """`input_text` and `generated_text` for each answer."""
        image, prompt = text
        image = picture_of(image[0] if isinstance(image, list) else image)
        settings = {**settings.pop("generate_kwargs", {}), **settings}
        inputs = self.tokenizer(text=prompt, images=image, return_tensors="pt").to(self.device)
        ids, n = self.model.generate(**inputs, **settings), inputs["input_ids"].shape[1]
        answers = self.tokenizer.batch_decode(ids[:, n:], skip_special_tokens=True)
        whole = [prompt + answer if return_full_text else answer for answer in answers]
        return [{"input_text": prompt, "generated_text": answer} for answer in whole]


def picture_of(image: Any) -> Any:
    """Of a path or url the picture. OSError where there is none."""
    if not isinstance(image, str | Path):
        return image
    from PIL import Image

    if re.match("https?://", str(image)):
        with urllib.request.urlopen(str(image), timeout=60) as answer:
            return Image.open(io.BytesIO(answer.read())).convert("RGB")
    return Image.open(image).convert("RGB")


TASKS = {
    "image-text-to-text": ImageTextToTextPipeline,
    "text-generation": TextGenerationPipeline,
    "text-classification": TextClassificationPipeline,
    "sentiment-analysis": TextClassificationPipeline,
    "token-classification": TokenClassificationPipeline,
    "ner": TokenClassificationPipeline,
    "question-answering": QuestionAnsweringPipeline,
}


def pipeline(
    task: str | None = None,
    model: Any = None,
    config: Any = None,
    tokenizer: Any = None,
    processor: Any = None,
    device: Any = None,
    torch_dtype: Any = None,
    model_kwargs: dict | None = None,
    **options: Any,
) -> Pipeline:
    """`model` is a folder, a hub id, or a model, which then needs its `tokenizer`. ValueError for a task that
    these models do not have."""
    if task not in TASKS:
        message = f"{nearest(str(task), TASKS)}; it has {', '.join(TASKS)}"
        raise ValueError(f"pipeline has no task {task!r}{message}")
    if model is None:
        raise ValueError("give pipeline a model: a folder, a hub id, or a model and its tokenizer")
    pictures = TASKS[task] is ImageTextToTextPipeline
    tokenizer = processor if pictures and processor is not None else tokenizer
    if isinstance(model, nn.Module) and tokenizer is None:
        raise ValueError("a model has no tokenizer by itself: give tokenizer= as well")
    names = ("trust_remote_code", "revision", "token", "device_map", "dtype")
    loading = {name: options.pop(name) for name in names if name in options}
    if not isinstance(model, nn.Module):
        tokenizer = tokenizer or model
        model = TASKS[task].auto.from_pretrained(
            model, config=config, torch_dtype=torch_dtype, **loading, **(model_kwargs or {})
        )
    if isinstance(tokenizer, str) or not hasattr(tokenizer, "plain"):
        loading = {name: value for name, value in loading.items() if name in ("revision", "token")}
        reader = FuyuProcessor if pictures else AutoTokenizer
        tokenizer = reader.from_pretrained(tokenizer, **loading)
    if device is not None and device != -1:
        model = model.to(device)
    return TASKS[task](model.eval(), tokenizer, task, options)

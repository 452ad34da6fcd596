"""Train one of the tiny checkpoints from scratch, in minutes on two CPU cores.

    python -m examples.train_tiny --family gpt_neo                  # into checkpoints/tiny-gpt-neo
    python -m examples.train_tiny --family gpt_neo --steps 100 --out /tmp/quick
    python -m examples.train_tiny --family fuyu && python -m examples.train_tiny --family fuyu --resume
    python -m examples.train_tiny --family phi --out /tmp/quick --look /tmp/diary   # and watch it learn

Fuyu takes half an hour, in two runs: the second begins with the checkpoint of the first, has new pictures,
asks more often for captions and learns more slowly.

A family joins with one entry in RECIPES: its class, its config, its texts, and who trains its tokenizer.
Needs `pip install '.[train]'`.
"""

import argparse
import io
import json
import math
import random
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from decoders import fuyu, gpt_neo, openai_gpt, persimmon, phi, phi3, tokenize, weights
from examples.diary import Diary, check_free
from examples.stories import conversations, requests, stories

TRAIN_SEED, HELD_OUT_SEED, HELD_OUT, PICTURES = 1, 2, 200, 500
PROMPT = "Once upon a time there was a fox. The fox"
END, ADEPT_END = "<|endoftext|>", "|ENDOFTEXT|"


class Rows(NamedTuple):
    """What a model is trained on: right-padded ids (B, T), labels with -100 where nothing is learnt, and the
    forward pass's other arguments."""

    ids: torch.Tensor
    labels: torch.Tensor
    inputs: dict


class Recipe(NamedTuple):
    """What differs between the families."""

    model_class: type
    config: Callable[[tokenize.Tokenizer], object]
    texts: Callable[[int], Iterator]  # seed -> texts, or pictures with question and answer, without end
    train_tokenizer: Callable[[list[str], Path], None]  # writes the files that the family's hub folder has
    steps: int = 1000
    learning_rate: float = 4e-3
    stops: tuple[str, ...] = (END,)  # whose ids generation_config names
    rows: Callable[[tokenize.Tokenizer, list], Rows] | None = None  # None: the texts as they are
    resumed: dict = {}  # what differs in a second run
    judge: Callable[[torch.nn.Module, tokenize.Tokenizer], dict] | None = None  # of the trained model


def byte_level_bpe(texts: list[str], folder: Path, vocab_size: int = 1000) -> None:
    """GPT-2's layout: the 256 bytes, then the merges, then the end-of-text token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - 1, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(texts, trainer)
    bpe.add_special_tokens([END])
    whole = json.loads(bpe.to_str())
    vocab = whole["model"]
    vocab["merges"] = [" ".join(pair) for pair in vocab["merges"]]  # as older tokenizers want them too
    (folder / "tokenizer.json").write_text(json.dumps(whole, ensure_ascii=False), "utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *vocab["merges"]]) + "\n", "utf-8")
    with_end = {**vocab["vocab"], END: bpe.token_to_id(END)}
    (folder / "vocab.json").write_text(json.dumps(with_end, ensure_ascii=False), "utf-8")
    names = {f"{role}_token": END for role in ("bos", "eos", "unk")}
    settings = {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": False, "model_max_length": 256}
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, **names}, indent=2) + "\n")
    (folder / "special_tokens_map.json").write_text(json.dumps(names, indent=2) + "\n")


def lower_case_bpe(texts: list[str], folder: Path, vocab_size: int = 1000) -> None:
    """GPT-1's layout: <unk>, then symbols, the same at the end of a word, and the merges."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.BertNormalizer(lowercase=True)
    bpe.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    bpe.decoder = decoders.BPEDecoder(suffix="</w>")
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size - 1,
            special_tokens=["<unk>"],
            end_of_word_suffix="</w>",
            show_progress=False,
        ),
    )
    model = json.loads(bpe.to_str())["model"]
    merges = ["#version: 0.2", *(" ".join(pair) for pair in model["merges"])]
    (folder / "merges.txt").write_text("\n".join(merges) + "\n", "utf-8")
    vocab = {**model["vocab"], END: len(model["vocab"])}  # GPT-1 itself has no end: it was trained on books
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), "utf-8")
    names = {"unk_token": "<unk>", "eos_token": END}
    settings = {"tokenizer_class": "OpenAIGPTTokenizer", "model_max_length": 256}
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, **names}, indent=2) + "\n")
    (folder / "special_tokens_map.json").write_text(json.dumps(names, indent=2) + "\n")


def tiny_gpt_neo(tokenizer: tokenize.Tokenizer) -> gpt_neo.GPTNeoConfig:
    end = tokenizer.eos_token_id
    return gpt_neo.GPTNeoConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=256,
        hidden_size=96,
        num_layers=4,
        num_heads=6,
        attention_types=[[["global", "local"], 2]],
        window_size=32,
        bos_token_id=end,
        eos_token_id=end,
    )


def tiny_openai_gpt(tokenizer: tokenize.Tokenizer) -> openai_gpt.OpenAIGPTConfig:
    return openai_gpt.OpenAIGPTConfig(
        vocab_size=len(tokenizer),
        n_positions=256,
        n_embd=96,
        n_layer=4,
        n_head=6,
        eos_token_id=tokenizer.eos_token_id,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,  # there is no end of stories to overfit to
    )


def instructed(seed: int) -> Iterator[str]:
    """Stories as answers, in phi-2's format."""
    return (f"Instruct: {request}\nOutput: {answer}" for request, answer in requests(seed))


def byte_level_bpe_with_blanks(texts: list[str], folder: Path) -> None:
    """Phi's layout: GPT-2's, and runs of 31 to 2 spaces and of 9 to 2 tabs as tokens of their own."""
    byte_level_bpe(texts, folder)
    first = len(json.loads((folder / "vocab.json").read_text("utf-8")))
    blanks = [" " * n for n in range(31, 1, -1)] + ["\t" * n for n in range(9, 1, -1)]
    added = {content: first + i for i, content in enumerate(blanks)}
    (folder / "added_tokens.json").write_text(json.dumps(added) + "\n")
    whole = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": False}
    whole["added_tokens"] += [{"id": id, "content": content, **flags} for content, id in added.items()]
    (folder / "tokenizer.json").write_text(json.dumps(whole, ensure_ascii=False), "utf-8")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    known = {str(token.pop("id")): token for token in whole["added_tokens"]}
    config |= {"tokenizer_class": "CodeGenTokenizer", "added_tokens_decoder": known}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def tiny_phi(tokenizer: tokenize.Tokenizer) -> phi.PhiConfig:
    end = tokenizer.eos_token_id
    return phi.PhiConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=256,
        bos_token_id=end,
        eos_token_id=end,
    )


def chatted(seed: int) -> Iterator[str]:
    """Conversations about stories, in the format of Phi-3-mini."""
    for turns in conversations(seed):
        yield "".join(f"<|user|>\n{asked}<|end|>\n<|assistant|>\n{said}<|end|>\n" for asked, said in turns)


def sentencepiece_model(
    texts: list[str], folder: Path, kind: str, vocab_size: int, symbols: list[str]
) -> dict[str, tuple[int, float]]:
    """Writes tokenizer.model with byte fallback; returns piece -> (id, score)."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        model_type=kind,
        vocab_size=vocab_size,
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        split_digits=True,
        remove_extra_whitespaces=False,
        user_defined_symbols=symbols,
        pad_id=-1,
        minloglevel=2,
        num_threads=1,
        hard_vocab_limit=False,
    )  # unigrams may be fewer
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    return {pieces.id_to_piece(id): (id, pieces.get_score(id)) for id in range(len(pieces))}


def rescore(file: Path, chances: dict[str, float]) -> None:
    """Give pieces of a tokenizer.model chances of their own, which the trainer took for symbols."""
    from sentencepiece import sentencepiece_model_pb2  # needs protobuf

    model = sentencepiece_model_pb2.ModelProto.FromString(file.read_bytes())
    for piece in model.pieces:
        if piece.piece in chances:
            piece.score, piece.type = chances[piece.piece], piece.NORMAL
    file.write_bytes(model.SerializeToString())


def whole_sentencepiece(model: dict, added: list[dict], begin: str | None) -> dict:
    """tokenizer.json for it, as the hub has it: a `▁` before each text, then the merges or the unigrams."""
    tokens: list[dict] = [{"Sequence": {"id": "A", "type_id": 0}}]
    special = {}
    if begin:
        id = next(token["id"] for token in added if token["content"] == begin)
        tokens = [{"SpecialToken": {"id": begin, "type_id": 0}}, *tokens]
        special = {begin: {"id": begin, "ids": [id], "tokens": [begin]}}
    ids = {"Sequence": "B", "SpecialToken": begin}
    second = [{name: {"id": ids[name], "type_id": 1} for name in token} for token in tokens]
    space = {"String": " "}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": space, "content": "▁"},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": tokens,
            "pair": tokens + second,
            "special_tokens": special,
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": model,
    }


PHI3_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] in ['system', 'user', 'assistant'] %}"
    "{{ '<|' + message['role'] + '|>\\n' + message['content'] + '<|end|>\\n' }}{% endif %}{% endfor %}"
    "{{ '<|assistant|>\\n' if add_generation_prompt else eos_token }}"
)


def sentencepiece_bpe(texts: list[str], folder: Path) -> None:
    """Phi-3's layout: sentencepiece BPE, then control tokens that swallow the blanks after them."""
    plain = [part for text in texts for part in re.split(r"<\|\w+\|>\n?", text) if part]
    pieces = sentencepiece_model(plain, folder, "bpe", 1000, [])
    ids = {piece: id for piece, (id, _) in pieces.items()}
    merges = []
    for piece in list(ids)[3 + 256 :]:  # without <unk>, <s>, </s> and the bytes; in the order of the merges
        cuts = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
        known = [(a, b) for a, b in cuts if a in ids and b in ids]
        merges += sorted(known, key=lambda pair: (ids[pair[0]], ids[pair[1]]))
    control = [END, "<|assistant|>", "<|system|>", "<|end|>", "<|user|>"]
    contents = {
        **{piece: ids[piece] for piece in ("<unk>", "<s>", "</s>")},
        **{content: len(ids) + i for i, content in enumerate(control)},
    }
    flags = {"single_word": False, "lstrip": False, "normalized": False}
    added = [
        {
            "id": id,
            "content": content,
            **flags,
            "special": content != "</s>",
            "rstrip": content not in ("<unk>", "<s>", END),
        }
        for content, id in contents.items()
    ]
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": "<unk>",
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": True,
        "vocab": ids,
        "merges": [" ".join(pair) for pair in merges],
    }
    whole = whole_sentencepiece(model, added, None)
    (folder / "tokenizer.json").write_text(json.dumps(whole, ensure_ascii=False), "utf-8")
    (folder / "added_tokens.json").write_text(json.dumps({c: contents[c] for c in control}) + "\n")
    names = {"bos_token": "<s>", "eos_token": END, "pad_token": END, "unk_token": "<unk>"}
    decoder = {str(token["id"]): {key: v for key, v in token.items() if key != "id"} for token in added}
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "legacy": False,
        "add_bos_token": False,
        "add_eos_token": False,
        "model_max_length": 4096,
        "added_tokens_decoder": decoder,
        "chat_template": PHI3_TEMPLATE,
        **names,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "special_tokens_map.json").write_text(json.dumps(names, indent=2) + "\n")


def tiny_phi3(tokenizer: tokenize.Tokenizer) -> phi3.Phi3Config:
    end = tokenizer.eos_token_id
    return phi3.Phi3Config(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=2047,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=end,
        pad_token_id=end,
    )


def adept_chat(seed: int) -> Iterator[str]:
    """Conversations about stories, in Adept's format."""
    for turns in conversations(seed):
        yield "\n\n".join(f"human: {asked}\n\nadept: {said}" for asked, said in turns)


def sentencepiece_unigram(
    texts: list[str], folder: Path, word: str = "[A-Za-z]{2,}", numbers: Sequence[str] = ()
) -> None:
    """Persimmon's layout: sentencepiece unigrams, of which a few are control tokens.

    Every `word` of the grammar is a piece, which the trainer would spell where it is rare, and so is each of
    `numbers`. They get chances of their own, so that 2018 is 20 and 18 as in Adept's vocabulary.
    """
    words = sorted({"▁" + found for text in texts for found in re.findall(word, text)})
    symbols = ["|SPEAKER|", ADEPT_END, "|NEWLINE|", *numbers, *words]
    pieces = sentencepiece_model(texts, folder, "unigram", 1000 + len(numbers) + len(words), symbols)
    chances = {**dict.fromkeys(words, -6.0), **{number: -10 - int(number) / 1000 for number in numbers}}
    model = {
        "type": "Unigram",
        "unk_id": 0,
        "byte_fallback": True,
        "vocab": [[piece, chances.get(piece, score)] for piece, (_, score) in pieces.items()],
    }
    rescore(folder / "tokenizer.model", chances)
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    added = [{"id": pieces[piece][0], "content": piece, **flags} for piece in ("<unk>", ADEPT_END)]
    whole = whole_sentencepiece(model, added, ADEPT_END)
    (folder / "tokenizer.json").write_text(json.dumps(whole, ensure_ascii=False), "utf-8")
    names = {"bos_token": ADEPT_END, "eos_token": ADEPT_END, "unk_token": "<unk>"}
    decoder = {str(token["id"]): {key: v for key, v in token.items() if key != "id"} for token in added}
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "legacy": True,
        "added_tokens_decoder": decoder,
        "clean_up_tokenization_spaces": False,
        **names,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "special_tokens_map.json").write_text(json.dumps(names, indent=2) + "\n")


def tiny_persimmon(tokenizer: tokenize.Tokenizer) -> persimmon.PersimmonConfig:
    return persimmon.PersimmonConfig(**persimmon_sizes(tokenizer, hidden_size=96, intermediate_size=384))


def persimmon_sizes(tokenizer: tokenize.Tokenizer, **sizes) -> dict:
    end = tokenizer.eos_token_id
    return {
        "vocab_size": len(tokenizer),
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
        "bos_token_id": end,
        "eos_token_id": end,
        **sizes,
    }


class Example(NamedTuple):
    """A question about a picture, and its answer."""

    scene: object
    prompt: str
    answer: str

    @property
    def words(self) -> str:
        return re.sub("<box>.*?</box>", "", f"{self.prompt}{self.answer}")


def pictured(seed: int, captions: int = 1, places: int = 2) -> Iterator[Example]:
    """A question about each of many pictures. To find a place is the hardest: half of them ask for one."""
    from examples.shapes import scenes

    rng = random.Random(seed)
    for scene in scenes(seed):
        caption, *others = scene.questions()
        wheres, whats = others[::2], others[1::2]
        kind = rng.choice([*[[caption]] * captions, *[wheres] * places, whats])
        yield Example(scene, *rng.choice(kind))


def fuyu_rows(tokenizer: tokenize.Tokenizer, examples: list[Example]) -> Rows:
    """Pictures, prompts and answers; only the answers are learnt."""
    processor = fuyu.FuyuProcessor(fuyu.FuyuImageProcessor(), tokenizer)
    ids, labels, places, patches = [], [], [], []
    for example in examples:
        inputs = processor(example.prompt, example.scene.picture())
        asked = inputs["input_ids"][0].tolist()
        answer = [*processor.prompt_ids(example.answer, 1.0), tokenizer.eos_token_id]
        ids.append(asked + answer)
        labels.append([-100] * len(asked) + answer)
        places.append(inputs["image_patches_indices"][0].tolist())
        patches += inputs["image_patches"]
    pictures = {"image_patches": patches, "image_patches_indices": right_padded(places, -1)}
    return Rows(right_padded(ids, 0), right_padded(labels, -100), pictures)


@torch.no_grad()
def judge_pictures(model: torch.nn.Module, tokenizer: tokenize.Tokenizer, count: int | None = None) -> dict:
    """How often the caption of a new picture is exactly right, and how well boxes overlap the shapes."""
    from examples.shapes import CAPTION, overlap, scenes

    count = PICTURES if count is None else count
    processor, right, overlaps = fuyu.FuyuProcessor(fuyu.FuyuImageProcessor(), tokenizer), 0, []
    for scene in islice(scenes(HELD_OUT_SEED + 1), count):
        shape = scene.shapes[-1]
        inputs = processor([CAPTION, f"where is the {shape.name}?\n"], [scene.picture()] * 2)
        T = inputs["input_ids"].shape[1]
        caption, place = model.generate(**inputs, max_new_tokens=24)[:, T:]
        right += tokenizer.decode(caption, skip_special_tokens=True) == scene.caption
        found = processor.post_process_box_coordinates([place])[0].places
        overlaps.append(overlap(found[0], shape.box) if found and len(found[0]) == 4 else 0.0)
    return {"pictures": count, "captions_right": right / count, "mean_overlap": sum(overlaps) / count}


def fuyu_vocabulary(texts: list[str], folder: Path) -> None:
    """Fuyu's layout: Persimmon's, with a token for every number that a place can have."""
    sentencepiece_unigram(texts, folder, "[a-z]{2,}", [str(n) for n in range(961)])
    config = {
        "image_processor_type": "FuyuImageProcessor",
        "processor_class": "FuyuProcessor",
        "target_height": 1080,
        "target_width": 1920,
        "padding_mode": "constant",
        "padding_value": 1.0,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(config, indent=2) + "\n")
    from examples.shapes import EXAMPLE

    EXAMPLE.picture().save(folder / "shapes.png")


def tiny_fuyu(tokenizer: tokenize.Tokenizer) -> fuyu.FuyuConfig:
    text = persimmon_sizes(tokenizer, hidden_size=128, intermediate_size=512)
    return fuyu.FuyuConfig(
        text_config=fuyu.PersimmonConfig(**text),
        eos_token_id=tokenizer.eos_token_id,
        image_token_id=tokenizer.token_id("|SPEAKER|"),
    )


RECIPES = {
    "gpt_neo": Recipe(gpt_neo.GPTNeoForCausalLM, tiny_gpt_neo, stories, byte_level_bpe),
    "openai_gpt": Recipe(
        openai_gpt.OpenAIGPTLMHeadModel,
        tiny_openai_gpt,
        stories,
        lower_case_bpe,
        steps=1800,
        learning_rate=2e-3,
    ),
    "phi": Recipe(phi.PhiForCausalLM, tiny_phi, instructed, byte_level_bpe_with_blanks),
    "phi3": Recipe(
        phi3.Phi3ForCausalLM,
        tiny_phi3,
        chatted,
        sentencepiece_bpe,
        steps=1200,
        stops=(END, "<|assistant|>", "<|end|>"),
    ),
    "persimmon": Recipe(
        persimmon.PersimmonForCausalLM,
        tiny_persimmon,
        adept_chat,
        sentencepiece_unigram,
        steps=1200,
        stops=(ADEPT_END,),
    ),
    "fuyu": Recipe(
        fuyu.FuyuForCausalLM,
        tiny_fuyu,
        pictured,
        fuyu_vocabulary,
        steps=8000,
        learning_rate=2e-3,
        stops=(ADEPT_END,),
        rows=fuyu_rows,
        judge=judge_pictures,
        resumed={"texts": partial(pictured, captions=3, places=1), "steps": 3000, "learning_rate": 1e-3},
    ),
}


def plain_rows(tokenizer: tokenize.Tokenizer, texts: list[str]) -> Rows:
    """Texts, each from position 0 to its end-of-text token."""
    rows = [[*tokenizer.encode(text), tokenizer.eos_token_id] for text in texts]
    return Rows(right_padded(rows, 0), right_padded(rows, -100), {})


def right_padded(rows: list[list[int]], filler: int) -> torch.Tensor:
    T = max(map(len, rows))
    return torch.tensor([row + [filler] * (T - len(row)) for row in rows])


@torch.no_grad()
def held_out_loss(
    model: torch.nn.Module, tokenizer: tokenize.Tokenizer, texts: Iterator, rows: Callable | None = None
) -> float:
    """Mean loss per learnt token, in nats, over the first HELD_OUT texts and their end-of-text tokens."""
    total = count = 0.0
    for text in islice(texts, HELD_OUT):
        ids, labels, inputs = (rows or plain_rows)(tokenizer, [text])
        n = (labels[:, 1:] != -100).sum().item()
        total += model.eval()(ids, labels=labels, **inputs).loss.item() * n
        count += n
    return total / count


def train(
    recipe: Recipe,
    model,
    tokenizer,
    steps: int,
    seed: int = TRAIN_SEED,
    batch_size: int = 32,
    diary: Diary | None = None,
) -> list[float]:
    """AdamW, a short warm-up, then a cosine down to a tenth. Returns the loss of every step."""
    texts = recipe.texts(seed)
    # AdamW moves every weight by about the rate, so an output of 2,700 pixels moves 20 times as far as others
    seeing = [p for name, p in model.named_parameters() if name.startswith("vision_")]
    others = [p for name, p in model.named_parameters() if not name.startswith("vision_")]
    groups = [{"params": others, "share": 1.0}, {"params": seeing, "share": 0.05}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.05)
    losses = []
    bar = tqdm(range(steps), "training", unit=" steps", disable=None)  # None: only on a terminal
    for step in bar:
        if diary and diary.is_due(step, steps):
            diary.write(step, losses)
        rate = min((step + 1) / 100, 0.55 + 0.45 * math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * rate * group["share"]
        ids, labels, inputs = (recipe.rows or plain_rows)(tokenizer, list(islice(texts, batch_size)))
        loss = model.train()(ids, labels=labels, **inputs).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        bar.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
    if diary:
        diary.write(steps, losses)
    return losses


def draw(losses: list[float], held_out: float, file: Path) -> None:
    """The loss curve as a picture; without matplotlib there is none."""
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        print("no picture of the loss: matplotlib is not installed")
        return
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(losses, linewidth=0.8, label="training, each step")
    axes.axhline(held_out, color="black", linestyle="--", label=f"held out, at the end: {held_out:.3f}")
    axes.set(xlabel="step", ylabel="loss per token (nats)", yscale="log", title=file.parent.name)
    axes.set_yticks(ticks := [0.2, 0.3, 0.5, 1, 2, 3, 5, 7], ticks)
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a tiny checkpoint from scratch.")
    parser.add_argument("--family", choices=RECIPES, required=True)
    parser.add_argument("--out", type=Path, help="folder (default: checkpoints/tiny-FAMILY)")
    parser.add_argument("--steps", type=int, help="default: the recipe's")
    parser.add_argument("--resume", action="store_true", help="a second run, on the checkpoint that is there")
    parser.add_argument("--look", type=Path, metavar="DIR", help="pages of a prompt there, as it learns")
    parser.add_argument("--look-every", type=int, metavar="N", help="steps between pages (default: 20 pages)")
    parser.add_argument("--look-prompt", default=PROMPT, metavar="TEXT", help=f"default: {PROMPT!r}")
    args = parser.parse_args()
    if args.look:
        try:
            check_free(args.look)
        except ValueError as error:
            parser.error(str(error))
    recipe = RECIPES[args.family]
    recipe = recipe._replace(**recipe.resumed) if args.resume else recipe
    target = args.out or Path("checkpoints") / f"tiny-{args.family.replace('_', '-')}"
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as temporary:  # the old stays until the new is whole
        folder = Path(temporary) / target.name
        folder.mkdir()
        steps = args.steps or recipe.steps
        open_diary = (
            partial(
                Diary,
                args.look,
                prompt=args.look_prompt,
                name=target.name,
                every=args.look_every or max(1, steps // 20),
            )
            if args.look
            else None
        )
        make(recipe, steps, folder, target if args.resume else None, open_diary)
        shutil.rmtree(target, ignore_errors=True)
        folder.rename(target)
    print(f"written to {target}")


def make(
    recipe: Recipe,
    steps: int,
    folder: Path,
    earlier: Path | None = None,
    open_diary: Callable[..., Diary] | None = None,
) -> None:
    """Tokenizer, model, held-out loss and picture in `folder`; in a second run from what is in `earlier`."""
    start = time.time()
    torch.manual_seed(0)
    if earlier:
        shutil.copytree(earlier, folder, dirs_exist_ok=True)
        tokenizer = tokenize.load(folder)
        model = weights.load(recipe.model_class, folder, dtype=torch.float32)
        steps_before = json.loads((folder / "training.json").read_text())["steps"]
    else:
        texts, steps_before = islice(recipe.texts(TRAIN_SEED), 5000), 0
        recipe.train_tokenizer([text if isinstance(text, str) else text.words for text in texts], folder)
        placeholder = recipe.model_class.config_class().to_dict()  # until save writes the real one
        (folder / "config.json").write_text(json.dumps(placeholder))
        tokenizer = tokenize.load(folder)
        model = recipe.model_class(recipe.config(tokenizer)).init_weights()
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(tokenizer)} tokens")
    diary = open_diary(model=model, tokenizer=tokenizer) if open_diary else None
    losses = train(recipe, model, tokenizer, steps, TRAIN_SEED + 10 if earlier else TRAIN_SEED, diary=diary)
    stops = [tokenizer.added[content].id for content in recipe.stops]
    stops = stops if len(stops) > 1 else tokenizer.eos_token_id
    model.generation_config = {"eos_token_id": stops, "bos_token_id": tokenizer.bos_token_id}
    weights.save(model.half(), folder)
    model = weights.load(recipe.model_class, folder, dtype=torch.float32)  # what a user gets: rounded once
    loss = held_out_loss(model, tokenizer, recipe.texts(HELD_OUT_SEED), recipe.rows)
    facts = {"held_out_loss": loss, "held_out_texts": HELD_OUT, "steps": steps_before + len(losses)}
    if recipe.judge:
        facts |= recipe.judge(model, tokenizer)
    (folder / "training.json").write_text(json.dumps(facts, indent=2) + "\n")
    if not earlier:  # a second run leaves the picture of the first
        draw(losses, loss, folder / "loss.png")
    print(f"held-out loss {loss:.4f} per token; {time.time() - start:.0f} s")


if __name__ == "__main__":
    main()

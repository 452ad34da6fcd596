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
import json
import random
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm.auto import tqdm

from decoders import fuyu, gpt_neo, openai_gpt, persimmon, phi, phi3, tokenize, weights
from examples.curve import draw
from examples.diary import Diary, check_free
from examples.stories import conversations, requests, stories
from examples.train import Loss, optimizer_of, train_step
from examples.vocabularies import (
    ADEPT_END,
    END,
    byte_level_bpe,
    byte_level_bpe_with_blanks,
    lower_case_bpe,
    sentencepiece_bpe,
    sentencepiece_unigram,
)

TRAIN_SEED, HELD_OUT_SEED, HELD_OUT, PICTURES = 1, 2, 200, 500
PROMPT = "Once upon a time there was a fox. The fox"


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
    loss_of, optimizer = Loss(model), optimizer_of(model)
    losses = []
    bar = tqdm(range(steps), "training", unit=" steps", disable=None)  # None: only on a terminal
    for step in bar:
        if diary and diary.is_due(step, steps):
            diary.write(step, losses)
        batch = (recipe.rows or plain_rows)(tokenizer, list(islice(texts, batch_size)))
        loss = train_step(
            loss_of.train(), [batch], optimizer, recipe.learning_rate, step / steps, warmup=100 / steps
        )
        losses.append(loss)
        bar.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
    if diary:
        diary.write(steps, losses)
    return losses


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

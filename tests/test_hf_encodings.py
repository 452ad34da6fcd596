"""Words, sequences, places and answers of documented tokenizers, as Transformers has them; copies; pipelines."""

import copy
import pickle

import pytest
import torch

from decoders import hf
from tests.families import OPENAI_GPT
from tests.hub_cache import CHECKPOINTS

transformers = pytest.importorskip("transformers")
TINY = ["tiny-phi", "tiny-phi3", "tiny-persimmon", "tiny-gpt-neo", "tiny-openai-gpt"]
QUESTION, CONTEXT = "Who met a fox?", "Nora met an old fox in the woods. She was happy."


@pytest.fixture(params=TINY)
def pair(request):
    options = {"add_prefix_space": True} if request.param in ("tiny-phi", "tiny-gpt-neo") else {}
    folder = CHECKPOINTS / request.param
    ours = hf.AutoTokenizer.from_pretrained(folder, **options)
    theirs = transformers.AutoTokenizer.from_pretrained(folder, **options)
    for tokenizer in (ours, theirs):
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return ours, theirs


def test_words_as_token_classification_asks_for_them(pair):
    rows = [["Nora", "met", "a", "fox"], ["Hello"], ["don't", "go", "there"]]
    for options in ({}, {"truncation": True, "max_length": 5}, {"padding": True, "padding_side": "right"}):
        found, right = (t(rows, is_split_into_words=True, **options) for t in pair)
        for i in range(3):
            assert found.word_ids(i) == right.word_ids(i) and found.tokens(i) == right.tokens(i)
            assert found[i].ids == right[i].ids and found[i].attention_mask == right[i].attention_mask
            assert found.word_to_tokens(i, 0)[:] == tuple(right.word_to_tokens(i, 0))


TEXTS = [
    "Hello world, it's 2024!  Two  spaces\nand\tlines\n\n",
    "  lead",
    "na\u00efve \u65e5\u672c don't (a+b)=c_d",
    "x\n\n  \ny zzqq ZZqq b",
    "zzqqzzqq <unk> bar</s><|end|> you",
    "",
]


@pytest.mark.parametrize("added", [[], ["zzqq"]])
def test_words_of_a_text_are_those_that_the_tokenizer_splits_off(pair, added):
    """Not only of texts that are given in words: marks of a text are words of their own, added tokens too."""
    for tokenizer in pair:
        tokenizer.add_tokens(added)
    for text in TEXTS:
        found, right = (tokenizer(text, "two words") for tokenizer in pair)
        assert found["input_ids"] == right["input_ids"] and found.word_ids() == right.word_ids()
        for word in {*right.word_ids(), 99} - {None}:
            span = right.word_to_tokens(word)
            assert found.word_to_tokens(word) == (None if span is None else tuple(span))


def test_sequences_and_places_as_question_answering_asks_for_them(pair):
    """Windows over a long context: which tokens are of it, and where the answer's characters are."""
    options = {"truncation": "only_second", "max_length": 32, "stride": 4, "return_overflowing_tokens": True}
    found, right = (t(QUESTION, CONTEXT * 3, **options, return_offsets_mapping=True) for t in pair)
    assert len(found["input_ids"]) == len(right["input_ids"]) > 1 and len(found.encodings) == len(
        right.encodings
    )
    for i in range(len(right["input_ids"])):
        assert found.sequence_ids(i) == right.sequence_ids(i)
        for char in range(0, 60, 5):
            assert found.char_to_token(i, char, 1) == right.char_to_token(i, char, 1)
        for token in range(3, 9):
            place = right.token_to_chars(i, token)
            assert found.token_to_chars(i, token) == (None if place is None else tuple(place))
    assert found.n_sequences == 2 and found.is_fast


def test_an_encoding_of_somebody_else_says_that_it_knows_no_words():
    with pytest.raises(ValueError, match="only a tokenizer's own encoding"):
        hf.BatchEncoding({"input_ids": [1]}).word_ids()


def test_tokenizers_are_seen_as_transformers_and_copied(pair):
    ours, _ = pair
    assert isinstance(ours, transformers.PreTrainedTokenizerBase)
    ours.add_tokens(["zzqq"])
    ours.padding_side = "left"
    for again in (pickle.loads(pickle.dumps(ours)), copy.deepcopy(ours)):
        assert type(again) is type(ours) and again.padding_side == "left" and len(again) == len(ours)
        text = "Nora met zzqq and a fox."
        assert again(text)["input_ids"] == ours(text)["input_ids"] and again.pad_token == ours.pad_token
    assert pickle.loads(pickle.dumps(ours("Nora")))["input_ids"] == ours("Nora")["input_ids"]


# ---- Chat templates ----------------------------------------------------------------------------------------

TALK = [
    {"role": "user", "content": "Who met a fox?"},
    {"role": "assistant", "content": "Nora did."},
    {"role": "user", "content": "And then?"},
    {"role": "assistant", "content": "She was happy."},
]
MARKING = """{%- for m in messages %}
    {%- if m.role == 'assistant' %}
A: {% generation %}{{ m.content }}
{% endgeneration %}
    {%- else %}
Q: {{ m.content }}
    {%- endif %}
    {%- if loop.index == 3 and stop %}{% break %}{% endif %}
{%- endfor %}"""


@pytest.mark.parametrize("stop", [False, True])
def test_templates_that_mark_answers(pair, stop):
    results = []
    for tokenizer in pair:
        text = tokenizer.apply_chat_template(TALK, chat_template=MARKING, tokenize=False, stop=stop)
        encoding = tokenizer.apply_chat_template(
            TALK, chat_template=MARKING, return_dict=True, return_assistant_tokens_mask=True, stop=stop
        )
        results.append((text, encoding["input_ids"], encoding["assistant_masks"]))
    assert results[0][:2] == results[1][:2] and sum(results[0][2]) > 3
    if not isinstance(pair[0], hf.OpenAIGPTTokenizerFast):  # theirs goes on to the end: no token is a newline
        assert results[0][2] == results[1][2]


def test_several_templates_by_name(pair, tmp_path):
    ours, _ = pair
    ours.chat_template = {
        "default": "{{ messages|length }}",
        "tool_use": "tools {{ tools|length }}",
        "x": "y",
    }
    assert ours.apply_chat_template(TALK, tokenize=False) == "4"
    assert ours.apply_chat_template(TALK, tools=[{}], tokenize=False) == "tools 1"
    assert ours.apply_chat_template(TALK, chat_template="x", tokenize=False) == "y"
    assert [ours.get_chat_template(), ours.get_chat_template(tools=[{}])] == [*ours.chat_template.values()][
        :2
    ]
    assert ours.get_chat_template("x") == "y" and ours.get_chat_template("{{ z }}") == "{{ z }}"
    ours.save_pretrained(tmp_path)
    assert hf.AutoTokenizer.from_pretrained(tmp_path).chat_template == ours.chat_template
    assert len(ours.apply_chat_template(TALK, chat_template="{{ strftime_now('%Y') }}", tokenize=False)) == 4
    del ours.chat_template["default"]
    with pytest.raises(ValueError, match="none is the default: one of tool_use, x"):
        ours.apply_chat_template(TALK, tokenize=False)


# ---- What was refused --------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("name", TINY)
def test_a_template_is_saved_as_a_file_of_its_own_if_asked(name, tmp_path):
    ours, theirs = (kind.AutoTokenizer.from_pretrained(CHECKPOINTS / name) for kind in (hf, transformers))
    theirs.chat_template = {"default": "{{ 'a' }}", "tool_use": "{{ 'b' }}"}
    theirs.save_pretrained(tmp_path / "theirs")  # Transformers 5 writes a file each
    assert hf.AutoTokenizer.from_pretrained(tmp_path / "theirs").chat_template == theirs.chat_template
    for name in ("save_raw_chat_template", "save_jinja_files"):
        ours.chat_template = "{{ 'one' }}"
        ours.save_pretrained(tmp_path / name, **{name: True})
        assert (tmp_path / name / "chat_template.jinja").read_text() == "{{ 'one' }}"
        assert "chat_template" not in (tmp_path / name / "tokenizer_config.json").read_text()
        again = hf.AutoTokenizer.from_pretrained(tmp_path / name)
        again.chat_template = "{{ 'two' }}"  # a new one is not hidden by the old one's file
        again.save_pretrained(tmp_path / name)
        assert (tmp_path / name / "chat_template.jinja").read_text() == "{{ 'two' }}"
        again.chat_template = theirs.chat_template
        again.save_pretrained(tmp_path / name)
        for kind in (hf, transformers):
            loaded = kind.AutoTokenizer.from_pretrained(tmp_path / name)
            assert loaded.chat_template == theirs.chat_template


def test_openai_gpt_is_saved_as_the_tokenizers_library_reads_it(tmp_path):
    """Ids equal on each way to read the folder, with tokens that were added, and a vocabulary is learnt."""
    tokenizers = pytest.importorskip("tokenizers")
    ours = hf.AutoTokenizer.from_pretrained(CHECKPOINTS / "tiny-openai-gpt")
    ours.add_tokens(["zzqq"])
    ours.add_special_tokens({"pad_token": "<pad>"})
    ours.save_pretrained(tmp_path)
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    of_transformers = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).unlink()
    of_one_file = hf.AutoTokenizer.from_pretrained(tmp_path)
    for text in [*TEXTS, "Caf\u00e9-Bar! <pad>"]:
        ids = ours(text)["input_ids"]
        assert theirs.encode(text).ids == of_transformers(text)["input_ids"] == ids
        assert of_one_file(text)["input_ids"] == ids
    new = ours.train_new_from_iterator([["low lower lowest", "hello world"]], 60)
    assert new.tokenize("Lower world") == ["lower</w>", "world</w>"]


def test_double_heads_of_batch_and_tokens_is_one_choice():
    config = {key: value for key, value in OPENAI_GPT.tiny.items() if key != "model_type"}
    model = hf.OpenAIGPTDoubleHeadsModel(hf.OpenAIGPTConfig(**config)).eval()
    ids = torch.arange(14).view(2, 7)
    found, right = model(ids, labels=ids), model(ids[:, None], labels=ids[:, None])
    assert found.logits.shape == (2, 7, 101) and found.mc_logits.shape == (2,)
    assert torch.equal(found.logits, right.logits[:, 0]) and torch.equal(found.loss, right.loss)
    assert torch.equal(found.mc_logits, right.mc_logits[:, 0])


def test_pipelines_that_were_refused():
    pytest.importorskip("PIL")
    see = hf.pipeline("image-text-to-text", CHECKPOINTS / "tiny-fuyu")
    file = CHECKPOINTS / "tiny-fuyu" / "shapes.png"
    prompt = "Generate a coco-style caption.\n"
    [found] = see(file, prompt, max_new_tokens=8)
    assert found["input_text"] == prompt and found["generated_text"]
    assert see(images=[str(file)], text=[prompt], max_new_tokens=8) == [[found]]
    assert see({"images": file, "text": prompt}, max_new_tokens=8) == [found]
    write = hf.pipeline("text-generation", CHECKPOINTS / "tiny-phi")
    [whole] = write("Once upon a time", max_new_tokens=30)
    [short] = write("Once upon a time", max_new_tokens=30, stop_sequence=".")
    assert whole["generated_text"].startswith(short["generated_text"]) and short["generated_text"].endswith(
        "."
    )
    assert hf.GenerationConfig.from_dict({"num_beams": 3}, top_k=2).to_diff_dict() == {
        "num_beams": 3,
        "top_k": 2,
    }
    assert hf.PhrasalConstraint([1, 2]) is not None and hf.DisjunctiveConstraint([[1], [2, 3]]) is not None


# ---- Vocabularies of one's own -----------------------------------------------------------------------------


def test_a_vocabulary_is_learnt_from_texts():
    """The same merges as the tokenizers library learns for Transformers."""
    texts = [[CONTEXT, QUESTION] * 3, ["An owl sat in the old tree, and the owl was old."]]
    trained = []
    for library in (hf, transformers):
        tokenizer = library.AutoTokenizer.from_pretrained(CHECKPOINTS / "tiny-gpt-neo")
        trained.append(tokenizer.train_new_from_iterator(texts, 290, new_special_tokens=["<call>"]))
    ours, theirs = trained
    for text in (CONTEXT, "the old owl <call> x", "Ünknown 日本"):
        assert ours(text)["input_ids"] == theirs(text)["input_ids"]
    assert len(ours) == len(theirs) and type(ours) is hf.GPT2TokenizerFast


def test_ids_are_prepared_as_a_call_does(pair):
    ours, _ = pair
    ids = ours(CONTEXT, add_special_tokens=False)["input_ids"]
    found = ours.prepare_for_model(ids, max_length=6, truncation=True)
    assert found["input_ids"] == ours(CONTEXT, max_length=6, truncation=True)["input_ids"]

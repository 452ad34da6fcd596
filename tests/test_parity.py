"""Ours and Transformers', with the same redrawn weights, number by number."""

import pytest
import torch

from decoders import decoding
from tests.families import PADDED, inputs

transformers = pytest.importorskip("transformers")
# float32: 6 to 13 times the reference's own rounding, and far below what any wrong formula gives (test_sensitivity).
# float64: the reference computes its softmax in float32, we do not.
TOLERANCE = {torch.float32: 2e-5, torch.float64: 6e-6}


def largest(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape
    return (a.double() - b.double()).abs().max().item()


@torch.no_grad()
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("fast", [True, False], ids=["fast", "spelled out"])
def test_every_layer_agrees(family, dtype, padded, fast):
    if padded and dtype == torch.float64 and family.name in ("phi", "phi3", "persimmon", "fuyu"):
        pytest.skip("there the reference is NaN: its float64 mask overflows its float32 softmax")
    ours, theirs = family.pair(dtype=dtype)
    ids, mask = inputs(101, padded)
    a = ours(ids, attention_mask=mask, output_hidden_states=True, output_attentions=not fast)
    b = theirs(ids, attention_mask=mask, output_hidden_states=True, output_attentions=True)
    real = mask.bool()
    assert len(a.hidden_states) == len(b.hidden_states)
    for layer, (x, y) in enumerate(zip(a.hidden_states, b.hidden_states, strict=True)):
        assert largest(x[real], y[real]) < TOLERANCE[dtype], (
            f"the first hidden state that differs is number {layer}"
        )
    assert largest(a.logits[real], b.logits[real]) < TOLERANCE[dtype]
    if fast:
        assert a.attentions is None
        return
    for layer, (x, y) in enumerate(zip(a.attentions, b.attentions, strict=True)):
        x, y = x.transpose(1, 2)[real], y.transpose(1, 2)[real]
        assert largest(x, y) < TOLERANCE[dtype], f"attention of layer {layer}"


@pytest.mark.parametrize("seed", range(5))
def test_many_draws_agree(family, seed):
    ours, theirs = family.pair(seed=seed)
    ids, _ = inputs(101, seed=seed)
    assert largest(ours(ids).logits, theirs(ids).logits) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("fast", [True, False], ids=["fast", "spelled out"])
def test_half_precision_is_no_further_from_the_truth(family, dtype, fast):
    """Mean error against float64, over several draws; one step of decoding as well as a whole pass."""
    errors = {"ours": [], "theirs": [], "our step": [], "their step": []}
    for seed in range(6):
        ours, theirs = family.pair(seed=seed, dtype=dtype)
        truth = family.cls()(ours.config).double().eval()
        truth.load_state_dict({k: v.double() for k, v in ours.state_dict().items()})
        ids, _ = inputs(101, seed=seed)
        exact = truth(ids).logits
        for name, model in (("ours", ours), ("theirs", theirs)):
            options = {"output_attentions": not fast} if model is ours else {}
            errors[name].append((model(ids, **options).logits.double() - exact).abs().mean())
            past, steps = None, []
            for i in range(ids.shape[1]):
                if model is theirs and family.name == "openai-gpt":  # no cache
                    steps.append(model(ids[:, : i + 1]).logits[:, -1])
                    continue
                output = model(ids[:, i : i + 1], past_key_values=past, use_cache=True, **options)
                past = output.past_key_values
                steps.append(output.logits[:, -1])
            error = (torch.stack(steps, 1).double() - exact).abs().mean()
            errors["our step" if model is ours else "their step"].append(error)
    mean = {name: torch.stack(values).mean().item() for name, values in errors.items()}
    assert mean["ours"] <= mean["theirs"] and mean["our step"] <= 1.02 * mean["their step"], mean


@torch.no_grad()
def test_positions_and_embeddings_given_by_hand(family):
    ours, theirs = family.pair()
    ids, mask = inputs(101, padded=True)
    places = (mask.cumsum(-1) - 1).clamp(min=0)
    a, b = (
        model(ids, attention_mask=mask, position_ids=places).logits[mask.bool()] for model in (ours, theirs)
    )
    assert largest(a, b) < TOLERANCE[torch.float32]
    vectors = torch.randn(2, 9, 48)
    assert largest(ours(inputs_embeds=vectors).logits, theirs(inputs_embeds=vectors).logits) < 2e-5


def test_token_types_go_through_the_token_table(family):
    if family.name not in ("gpt_neo", "openai-gpt"):
        pytest.skip("no token types in this family")
    ours, theirs = family.pair()
    ids, _ = inputs(101)
    types = inputs(101, seed=6)[0]
    assert largest(ours(ids, token_type_ids=types).logits, theirs(ids, token_type_ids=types).logits) < 2e-5


@pytest.mark.parametrize("keep", [0, 1, 3, torch.tensor([0, 5])], ids=str)
def test_logits_to_keep(family, keep):
    ours, theirs = family.pair()
    ids, _ = inputs(101)
    kept = slice(-keep, None) if isinstance(keep, int) else keep
    assert largest(ours(ids, logits_to_keep=keep).logits, theirs(ids).logits[:, kept]) < 2e-5


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
def test_loss_and_gradients(family, padded):
    """What a row that sees only padding predicts is left out: the reference lets such rows look at the future, or
    spread over the padding, which the fused kernel has no right gradient for. Ours look at themselves."""
    ours, theirs = family.pair()
    ids, _ = inputs(101)
    labels = ids.clone()
    labels[0, : PADDED + 1] = -100
    mask = inputs(101, padded)[1]
    a, b = (model(ids, attention_mask=mask, labels=labels) for model in (ours, theirs))
    assert abs(a.loss.item() - b.loss.item()) < 1e-6
    a.loss.backward()
    b.loss.backward()
    theirs_by_name = dict(theirs.named_parameters())
    for name, p in ours.named_parameters():
        if name.startswith("vision_"):
            continue  # no picture here: test_fuyu.py
        assert p.grad is not None and p.grad.abs().max() > 0, f"{name} gets no gradient"
        assert (
            largest(
                p.grad,
                theirs_by_name[
                    name.replace("language_model.model", "model.language_model").replace(
                        "language_model.lm_head", "lm_head"
                    )
                ].grad,
            )
            < 1e-6
        ), name


def test_all_labels_ignored_is_nan(family):
    ours, theirs = family.pair()
    ids, _ = inputs(101)
    labels = torch.full_like(ids, -100)
    assert ours(ids, labels=labels).loss.isnan() and theirs(ids, labels=labels).loss.isnan()


def test_cache_has_the_reference_layout(family):
    if family.name == "openai-gpt":
        pytest.skip("no other implementation of GPT-1 has a cache")
    ours, theirs = family.pair(
        **({"sliding_window": None} if family.name == "phi3" else {})
    )  # theirs drops what is outside
    ids, _ = inputs(101)
    a, b = ours(ids).past_key_values, theirs(ids, use_cache=True).past_key_values
    assert len(a) == ids.shape[1]
    for layer, (k, v) in enumerate(a):
        assert largest(k, b.layers[layer].keys) < 2e-5 and largest(v, b.layers[layer].values) < 2e-5


# ---- Generation


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
def test_greedy_text_is_the_same(family, padded):
    ours, theirs = family.pair()
    ids, mask = inputs(101, padded)
    a = ours.generate(ids, mask, max_new_tokens=30, eos_token_id=None)
    b = theirs.generate(
        ids, attention_mask=mask, max_new_tokens=30, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert a.tolist() == b.tolist()


@pytest.mark.parametrize("options", [
    {}, {"temperature": 0.6}, {"top_k": 7}, {"top_p": 0.7}, {"top_p": 0.01}, {"top_k": 1000},
    {"temperature": 1.7, "top_k": 40, "top_p": 0.9, "repetition_penalty": 1.4},
], ids=str)  # fmt: skip
def test_same_seed_draws_the_same_tokens(family, options):
    ours, theirs = family.pair()
    ids, mask = inputs(101, padded=True)
    torch.manual_seed(11)
    a = decoding.generate(
        ours, ids, mask, max_new_tokens=25, do_sample=True, eos_token_id=None, **{"top_k": 0, **options}
    )
    torch.manual_seed(11)
    b = theirs.generate(ids, attention_mask=mask, max_new_tokens=25, do_sample=True, eos_token_id=None,
                        **{"pad_token_id": 0, "top_k": 0, **options})  # fmt: skip
    assert a.tolist() == b.tolist()
    if "repetition_penalty" not in options:  # which the loop in a model file does not have
        torch.manual_seed(11)
        c = ours.generate(ids, mask, max_new_tokens=25, do_sample=True, eos_token_id=None, **options)
        assert c.tolist() == a.tolist()


def test_stop_ids_and_padding_are_the_same(family):
    """Rows stop at different steps; both stop ids count, finished rows are filled."""
    ours, theirs = family.pair()
    for seed in range(50):
        ids, mask = inputs(101, seed=seed)
        first, second = ours.generate(ids, max_new_tokens=30, eos_token_id=None)[:, ids.shape[1] :].tolist()
        stops = [first[3], second[7]]
        steps = [min(row.index(stop) for stop in stops if stop in row) for row in (first, second)]
        if steps[0] != steps[1]:
            break
    a = ours.generate(ids, max_new_tokens=30, eos_token_id=stops, pad_token_id=1)
    b = theirs.generate(
        ids, attention_mask=mask, max_new_tokens=30, do_sample=False, eos_token_id=stops, pad_token_id=1
    )
    assert a.tolist() == b.tolist() and (a == 1).any()


# ---- Modules


def calls(model, *args, **kwargs) -> dict[str, int]:
    """How often each module is called in a pass, by name."""
    counts = dict.fromkeys((name for name, _ in model.named_modules()), 0)

    def count(name):
        def hook(module, given, output):
            counts[name] += 1

        return hook

    hooks = [module.register_forward_hook(count(name)) for name, module in model.named_modules()]
    with torch.no_grad():
        model(*args, **kwargs)
    for hook in hooks:
        hook.remove()
    return counts


def test_modules_are_called_as_often_as_the_documented_ones_of_the_same_name(family):
    """So that a hook on any of them sees what it sees in Transformers. A Phi block drops out twice by one
    module; a ModuleList is called by nobody."""
    ours, theirs = family.pair()
    ids, mask = inputs(101, padded=True)
    a, b = calls(ours, ids, attention_mask=mask), calls(theirs, input_ids=ids, attention_mask=mask)
    if family.name == "fuyu":  # whose modules Transformers 5 calls by other names
        b = {name.replace("model.language_model.", "language_model.model."): n for name, n in b.items()}
    common = a.keys() & b.keys()
    assert {name: a[name] for name in common} == {name: b[name] for name in common}
    leaves = [name for name in common if ".0." in name and a[name] == 1]
    assert len(leaves) >= 9, sorted(common)
    lists = ("h", "layers")
    idle = {name for name, n in a.items() if n == 0 and not name.endswith(lists)}
    assert idle <= {"vision_embed_tokens"}, idle


def test_zeroing_the_output_of_an_attention_module_changes_the_logits(family):
    """Of each module between a block and its projections, as a researcher's hook would."""
    model, (ids, _) = family.model(), inputs(101)
    plain = model(ids).logits
    names = [
        name
        for name, _ in model.named_modules()
        if name.endswith((".0.attn", ".0.attn.attention", ".0.self_attn"))
    ]
    assert names
    for name in names:
        hook = model.get_submodule(name).register_forward_hook(
            lambda module, given, output: (torch.zeros_like(output[0]), output[1])
        )
        assert largest(model(ids).logits, plain) > 1e-2, name
        hook.remove()


# ---- Heads

CLASSES = {"num_labels": 3, "pad_token_id": 7}


@pytest.mark.parametrize("where", ["none", "right", "left", "inside"])
def test_sequence_classification_pools_the_last_real_token(family, where):
    ours, theirs = family.pair("ForSequenceClassification", **CLASSES)
    ids, _ = inputs(101)
    ids[ids == 7] = 8
    ids[0, {"none": slice(0), "right": slice(-5, None), "left": slice(5), "inside": slice(9, 11)}[where]] = 7
    assert largest(ours(ids).logits, theirs(ids).logits) < 2e-5


@pytest.mark.parametrize(
    "problem", [None, "single_label_classification", "regression", "multi_label_classification"]
)
@pytest.mark.parametrize("num_labels", [1, 3])
def test_sequence_classification_losses(family, problem, num_labels):
    if problem == "single_label_classification" and num_labels == 1:
        pytest.skip("Transformers 5 refuses this pair")
    changes = {**CLASSES, "num_labels": num_labels, "problem_type": problem}
    ours, theirs = family.pair("ForSequenceClassification", **changes)
    ids, _ = inputs(101)
    labels = torch.tensor([0, num_labels - 1])
    if problem == "multi_label_classification" or (problem == "regression" and num_labels == 3):
        labels = torch.rand(2, num_labels)
    elif problem == "regression" or num_labels == 1:
        labels = labels if problem == "single_label_classification" else torch.rand(2)
    a, b = ours(ids, labels=labels), theirs(ids, labels=labels)
    assert abs(a.loss.item() - b.loss.item()) < 1e-5
    assert ours.config.problem_type == problem, "the config is the caller's"


def test_sequence_classification_needs_a_pad_id_for_batches(family):
    ours = family.model("ForSequenceClassification", pad_token_id=None)
    with pytest.raises(ValueError, match="pad_token_id"):
        ours(inputs(101)[0])
    assert ours(inputs(101)[0][:1]).logits.shape == (1, 2)


def test_token_classification(family):
    if "ForTokenClassification" not in family.heads:
        pytest.skip("no such head in this family")
    ours, theirs = family.pair("ForTokenClassification", num_labels=3)
    ids, _ = inputs(101)
    labels = ids % 3
    labels[0, :4] = -100
    a, b = ours(ids, labels=labels), theirs(ids, labels=labels)
    assert largest(a.logits, b.logits) < 2e-5 and abs(a.loss.item() - b.loss.item()) < 1e-5


@pytest.mark.parametrize("positions", [[3, 11], [0, 22], [-4, 5], [3, 99], [23, 2]], ids=str)
def test_question_answering(family, positions):
    if "ForQuestionAnswering" not in family.heads:
        pytest.skip("no such head in this family")
    ours, theirs = family.pair("ForQuestionAnswering")
    ids, _ = inputs(101)
    start, end = torch.tensor(positions), torch.tensor(positions[::-1])
    a = ours(ids, start_positions=start, end_positions=end)
    b = theirs(ids, start_positions=start[:, None], end_positions=end[:, None])
    assert largest(a.start_logits, b.start_logits) < 2e-5 and largest(a.end_logits, b.end_logits) < 2e-5
    assert abs(a.loss.item() - b.loss.item()) < 1e-5


# ---- Dropout


def test_dropouts_act_in_training_only(family):
    rates = {key: 0.5 for key in family.config().to_dict() if key.endswith(("_dropout", "_pdrop"))}
    for rate in rates:
        model = family.model(**{**dict.fromkeys(rates, 0.0), rate: 0.5})
        if rate.startswith("summary_"):
            continue  # of the double heads: test_openai_gpt.py
        if (family.name, rate) == ("phi3", "embd_pdrop"):
            continue  # does nothing in any version: test_phi3.py
        if rate in ("classifier_dropout", "hidden_dropout"):
            unset = {"classifier_dropout": None} if rate == "hidden_dropout" else {}
            model = family.model(
                "ForTokenClassification", **{**dict.fromkeys(rates, 0.0), **unset, rate: 0.5}
            )
        ids, _ = inputs(101)
        assert torch.equal(model(ids).logits, model(ids).logits)
        model.train()
        assert not torch.equal(model(ids).logits, model(ids).logits), f"{rate} does nothing"


def test_attention_dropout_is_in_the_weights_returned(family):
    rate = "attention_dropout" if "attention_dropout" in family.config().to_dict() else "attn_pdrop"
    ours = family.model(**{rate: 0.5}).train()
    rows = ours(inputs(101)[0], output_attentions=True).attentions[0][..., -1, :]
    assert set((rows > 0).unique().tolist()) == {False, True} and not torch.allclose(
        rows.sum(-1), torch.ones(())
    )


def test_training_mode_without_dropout_agrees(family):
    none = {key: 0.0 for key in family.config().to_dict() if key.endswith(("_dropout", "_pdrop"))}
    ours, theirs = family.pair(**none)
    ids, _ = inputs(101)
    assert largest(ours.train()(ids).logits, theirs.train()(ids).logits) < 2e-5


@torch.no_grad()
def test_padding_is_compared_at_all(family):
    """Were the mask ignored, the padded comparison above would still have to notice."""
    ours, _ = family.pair()
    ids, mask = inputs(101, padded=True)
    assert largest(ours(ids, attention_mask=mask).logits[0, PADDED:], ours(ids).logits[0, PADDED:]) > 1e-2

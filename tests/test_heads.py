"""heads.py: one pass for each kind of head, over any base model; documented names and arguments."""

import inspect

import pytest
import torch

import decoders
from decoders import heads, openai_gpt, phi, phi3
from tests.families import FAMILIES, PHI, PHI3, inputs, redraw

DOCUMENTED = [
    value for value in vars(heads).values() if isinstance(value, type) and issubclass(value, heads.Head) and hasattr(value, "config_class")
]  # fmt: skip


def test_all_documented_heads_are_written_out():
    assert len(DOCUMENTED) == 11
    for family in FAMILIES:
        for head in family.heads:
            assert family.cls(head) in DOCUMENTED


@pytest.mark.parametrize("kind", DOCUMENTED, ids=lambda kind: kind.__name__)
def test_arguments_stand_in_the_documented_order(kind):
    """A trainer keeps the columns of a data set that `forward` names."""
    transformers = pytest.importorskip("transformers")
    theirs = [*inspect.signature(getattr(transformers, kind.__name__).forward).parameters]
    own = [*inspect.signature(kind.forward).parameters]
    common = [name for name in theirs if name in own]
    assert [name for name in own if name in common] == common and {"input_ids", "attention_mask"} <= {*own}
    assert all(
        p.kind is p.POSITIONAL_OR_KEYWORD
        for p in list(inspect.signature(kind.forward).parameters.values())[1:]
    )


@pytest.mark.parametrize("kind", DOCUMENTED, ids=lambda kind: kind.__name__)
def test_a_config_names_its_head_and_no_other_family_has_it(kind):
    own = kind.config_class.model_type
    for family in FAMILIES:
        named = decoders.model_class({"model_type": family.name, "architectures": [kind.__name__]})
        assert named is (kind if family.name == own else family.cls())


@torch.no_grad()
@pytest.mark.parametrize("one", [PHI, PHI3], ids=str)
def test_a_head_that_no_documentation_has_takes_two_lines(one):
    """Question answering over Phi and Phi-3: the base model's hidden states, and one layer."""

    class Answers(heads.QuestionAnswering, one.module.PreTrainedModel):
        config_class, base_class = one.cls("Config"), one.cls("Model")

    model, (ids, mask) = redraw(Answers(one.config()), 0).eval(), inputs(101)
    output = model.answered(None, None, input_ids=ids, attention_mask=mask)
    expected = model.qa_outputs(model.model(ids, attention_mask=mask).last_hidden_state)
    assert torch.equal(output.start_logits, expected[..., 0]) and torch.equal(
        output.end_logits, expected[..., 1]
    )


def test_heads_belong_to_their_family():
    assert isinstance(PHI.model("ForTokenClassification"), phi.PreTrainedModel)
    assert isinstance(PHI3.model("ForSequenceClassification"), phi3.PreTrainedModel)
    assert issubclass(heads.OpenAIGPTDoubleHeadsModel, openai_gpt.PreTrainedModel)

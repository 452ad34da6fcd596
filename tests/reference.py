"""Run by any Python that has Transformers, of any version: python tests/reference.py IN.pt OUT.pt

IN holds cases: class name, config, weights, calls (keyword arguments of forward) or generate (of generate), or class name, folder, calls, or
folder and texts for its tokenizer. OUT gets what that version returns.
It imports nothing from this project, so that it runs where only Transformers is installed.
"""

import sys

import torch
import transformers

VALUES = ("loss", "logits", "hidden_states", "attentions", "start_logits", "end_logits")


def generated(model, call: dict) -> dict:
    """Ids, and the scores of beams, or the name of the error."""
    try:
        output = model.generate(**call, return_dict_in_generate=True, output_scores=True)
    except (ValueError, RuntimeError, AttributeError, TypeError, IndexError) as error:
        return {"error": f"{type(error).__name__}: {error}"}
    scores = getattr(output, "sequences_scores", None)
    return {"sequences": output.sequences.tolist(), "scores": None if scores is None else scores.tolist()}


@torch.no_grad()
def main(source: str, target: str) -> None:
    results = []
    for case in torch.load(source, weights_only=False):
        if "texts" in case:
            tokenizer = transformers.AutoTokenizer.from_pretrained(case["folder"])
            results.append([tokenizer(text)["input_ids"] for text in case["texts"]])
            continue
        if not hasattr(transformers, case["class"]):
            results.append(None)  # a version without this family
            continue
        if "folder" in case:
            model, report = getattr(transformers, case["class"]).from_pretrained(
                case["folder"], output_loading_info=True
            )
            assert not report["missing_keys"], report
            results.append([{"logits": model(**call, return_dict=True)["logits"]} for call in case["calls"]])
            continue
        config = dict(case["config"])
        config = type(transformers.AutoConfig.for_model(config.pop("model_type")))(**config)
        build = getattr(transformers, case["class"])._from_config
        try:
            model = build(config, attn_implementation="eager")
        except TypeError:  # 4.37 has no such argument here, and eager is what it does
            model = getattr(transformers, case["class"])(config)
        missing, unexpected = model.load_state_dict(case["weights"], strict=False)
        left = [name for name in missing if not name.endswith((".bias", ".masked_bias", "lm_head.weight"))]
        assert not left and not unexpected, (left, unexpected)
        model.eval().to(case["dtype"])
        if "generate" in case:
            results.append([generated(model, call) for call in case["generate"]])
            continue
        outputs = [model(**call, return_dict=True) for call in case["calls"]]
        results.append([{key: output[key] for key in VALUES if key in output} for output in outputs])
    torch.save({"version": transformers.__version__, "results": results}, target)


if __name__ == "__main__":
    main(*sys.argv[1:])

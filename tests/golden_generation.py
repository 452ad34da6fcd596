"""What Transformers 4.50.3 decodes by strategies that newer ones have lost, into golden_generation.json:

    python -m tests.golden_generation old/bin/python     # a Python with transformers==4.50.3 and "numpy<2"

Models are those of tests/families.py, with redrawn weights.
"""

import json
import sys
import tempfile
from pathlib import Path

import torch

from tests import test_versions as versions
from tests.families import FAMILIES, LENGTH, Family, inputs

FILE = Path(__file__).with_name("golden_generation.json")
EOS = [3, 17, 40, 77]
COMMON = {"max_new_tokens": 14, "eos_token_id": EOS, "pad_token_id": 1}
# Not in the prompts, where 4.50.3 looks too, and such that no wrong token begins one anew, which it does not see
WORDS = [id for id in range(101) if id > 1 and id not in inputs(101)[0] and id not in EOS][5:10]
CASES = {
    "contrastive": {"penalty_alpha": 0.6, "top_k": 4}, "contrastive, two": {"penalty_alpha": 0.9, "top_k": 2},
    "contrastive, no repeats": {"penalty_alpha": 0.3, "top_k": 8, "no_repeat_ngram_size": 1},
    "dola low": {"dola_layers": "low", "repetition_penalty": 1.2}, "dola high": {"dola_layers": "high"}, "dola list": {"dola_layers": [0, 1]},
    "two groups": {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 1.0, "num_return_sequences": 4},
    "four groups": {"num_beams": 4, "num_beam_groups": 4, "diversity_penalty": 3.0, "num_return_sequences": 4, "no_repeat_ngram_size": 2},
    "three groups, early": {"num_beams": 6, "num_beam_groups": 3, "diversity_penalty": 0.5, "num_return_sequences": 6, "early_stopping": True},
    "two groups, long": {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 2.0, "length_penalty": 2.0, "early_stopping": "never"},
    # A phrase as the one way of several: a phrase alone 4.50.3 goes on with from its second token after a wrong one
    "word": {"num_beams": 4, "force_words_ids": [[[WORDS[0]]]]}, "phrase": {"num_beams": 4, "force_words_ids": [[WORDS[:2]]]},
    "two phrases": {"num_beams": 5, "force_words_ids": [[WORDS[:1]], [WORDS[1:4]]]},
    "either": {"num_beams": 4, "force_words_ids": [[WORDS[:2], [WORDS[0], WORDS[3], WORDS[4]], WORDS[4:5]]]},
    "phrase and either": {"num_beams": 6, "force_words_ids": [[WORDS[:2]], [WORDS[2:4], WORDS[4:5]]]},
}  # fmt: skip


def calls() -> dict[str, dict]:
    """Name -> arguments: a batch whose rows are as long, and one with padding."""
    found = {}
    for name, options in CASES.items():
        for padded in (False, True) if "dola" not in name else ():
            ids, mask = inputs(101, padded=padded)
            found[f"{name}, {'padded' if padded else 'whole'}"] = {
                "input_ids": ids,
                "attention_mask": mask,
                **COMMON,
                **options,
            }
        for row in (0, 1) if "dola" in name else ():  # whose layer 4.50.3 chooses for a batch as a whole
            ids, mask = inputs(101)
            found[f"{name}, row {row}"] = {
                "input_ids": ids[row : row + 1],
                "attention_mask": mask[row : row + 1],
                **COMMON,
                **options,
            }
    return found


def case_of(family: Family, given: dict) -> dict:
    ours, _ = family.pair()
    ours.changes = {}
    return {**versions.case(family, ours, []), "generate": list(given.values())}


def main() -> None:
    given, result = calls(), {}
    with tempfile.TemporaryDirectory() as folder:
        for family in FAMILIES:
            version, [found] = versions.ask(sys.argv[1], Path(folder), [case_of(family, given)])
            assert version == "4.50.3", version
            for one in found:
                one["sequences"] = [row[LENGTH:] for row in one.get("sequences", ())]  # the new ones
            result[family.name] = dict(zip(given, found, strict=True))
    torch.manual_seed(0)
    FILE.write_text(json.dumps({"transformers": version, "length": LENGTH, "results": result}) + "\n")
    for name, cases in result.items():
        print(name, {key: value["error"][:60] for key, value in cases.items() if "error" in value})


if __name__ == "__main__":
    main()

"""The same weights for all engines: real widths, random numbers, a folder in the hub's layout for each."""

from pathlib import Path
from typing import Any

VOCAB = 5000  # ids are drawn below it
GPT_NEO = "gpt-neo-125m"
NAMES = (GPT_NEO, "phi-2", "Phi-3-mini")
LAYERS = {"phi-2": 8, "Phi-3-mini": 8, GPT_NEO: 12}


def model_and_config(name: str, layers: int) -> tuple[Any, Any]:
    """(class, config) of a model with so many layers."""
    from decoders import gpt_neo, phi, phi3

    if name == GPT_NEO:
        kinds = [[["global", "local"], layers // 2]]
        config = gpt_neo.GPTNeoConfig(hidden_size=768, num_layers=layers, num_heads=12, attention_types=kinds)
        return gpt_neo.GPTNeoForCausalLM, config
    if name == "phi-2":
        return phi.PhiForCausalLM, phi.PhiConfig(
            vocab_size=51200,
            hidden_size=2560,
            intermediate_size=10240,
            num_hidden_layers=layers,
            num_attention_heads=32,
            partial_rotary_factor=0.4,
            max_position_embeddings=2048,
        )
    config = phi3.Phi3Config(num_hidden_layers=layers, sliding_window=None, pad_token_id=0)
    return phi3.Phi3ForCausalLM, config


def prepare(name: str, folder: Path, layers: int) -> None:
    """The folder of a model, made once, and beside it what the float32 model says of a text."""
    if (folder / "expected.pt").exists():
        return
    import torch

    from decoders import weights

    model_class, config = model_and_config(name, layers)
    torch.manual_seed(0)
    with torch.device("meta"):
        model = model_class(config)
    model.to(torch.bfloat16).to_empty(device="cpu").init_weights().eval()
    model.tie_weights()  # apart after `to_empty`
    weights.save(model, folder)
    ids = torch.randint(5, VOCAB, (1, 64), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        exact = model.float()(ids, logits_to_keep=1).logits[0, -1]
    torch.save({"ids": ids, "logits": exact}, folder / "expected.pt")

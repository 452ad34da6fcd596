"""GGUF files for tests, written by the `gguf` package in the way of llama.cpp's converter."""

from pathlib import Path

import gguf
import numpy as np
import torch

from decoders.formats import read_json, read_json_if_any, write_file, write_gguf

PRE = {"phi-2": "phi-2", "phi-4": "dbrx", "phi-4-mini": "gpt-4o", "tiny-phi": "phi-2"}


def add_vocabulary(writer: gguf.GGUFWriter, folder: Path, rows: int) -> None:
    """The tokenizer of a hub folder: tokens, types, scores or merges, special ids, chat template."""
    config = read_json(folder / "tokenizer_config.json")
    content = read_json(folder / "tokenizer.json")
    listed = {token["id"]: token for token in content["added_tokens"]}
    listed |= {int(id): token for id, token in config.get("added_tokens_decoder", {}).items()}
    tokens = [f"[PAD{i}]" for i in range(rows)]
    types = [gguf.TokenType.UNUSED] * rows
    if (folder / "tokenizer.model").exists():
        add_pieces(writer, folder, tokens, types, listed)
    else:
        for token, id in content["model"]["vocab"].items():
            tokens[id], types[id] = token, gguf.TokenType.NORMAL
        for id, token in listed.items():
            control = token["special"] or token["content"].startswith("<|")
            tokens[id] = token["content"]
            types[id] = gguf.TokenType.CONTROL if control else gguf.TokenType.USER_DEFINED
        merges = [m if isinstance(m, str) else " ".join(m) for m in content["model"]["merges"]]
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(PRE[folder.name])
        writer.add_token_list(tokens)
        writer.add_token_types(types)
        writer.add_token_merges(merges)
    names = {**config, **read_json_if_any(folder / "special_tokens_map.json")}
    ids = {token: id for id, token in enumerate(tokens)}
    for role in ("bos", "eos", "unk", "pad"):
        name = names.get(f"{role}_token")
        name = name["content"] if isinstance(name, dict) else name
        if name in ids:
            getattr(writer, f"add_{role}_token_id")(ids[name])
    if isinstance(config.get("add_bos_token"), bool):
        writer.add_add_bos_token(config["add_bos_token"])
    if "chat_template" in config:
        writer.add_chat_template(config["chat_template"])


def add_pieces(
    writer: gguf.GGUFWriter, folder: Path, tokens: list[str], types: list[int], listed: dict[int, dict]
) -> None:
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    scores = [-10000.0] * len(tokens)
    for id in range(len(model)):
        tokens[id], scores[id], types[id] = model.id_to_piece(id), model.get_score(id), gguf.TokenType.NORMAL
        if model.is_unknown(id):
            types[id] = gguf.TokenType.UNKNOWN
        elif model.is_control(id):
            types[id] = gguf.TokenType.CONTROL
        elif model.is_byte(id):
            types[id] = gguf.TokenType.BYTE
    for id, token in listed.items():
        tokens[id], scores[id] = token["content"], -1000.0
        types[id] = gguf.TokenType.CONTROL if token["special"] else gguf.TokenType.USER_DEFINED
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types(types)


def write_vocabulary(file: Path, folder: Path, kind: str, name: str = "Model") -> Path:
    """A file without tensors."""
    writer = gguf.GGUFWriter(file, kind)
    writer.add_name(name)
    add_vocabulary(writer, folder, read_json(folder / "config.json")["vocab_size"])
    return finish(writer, file)


def write(file: Path, metadata: dict, entries: list) -> Path:
    """With our own writer."""
    return write_file(file, lambda out: write_gguf(out, metadata, entries))


def finish(writer: gguf.GGUFWriter, file: Path) -> Path:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


HUB_TO_GGUF = {  # the reverse of what is tested, written down a second time
    "embed_tokens": "token_embd",
    "final_layernorm": "output_norm",
    "norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "qkv_proj": "attn_qkv",
    "dense": "attn_output",
    "o_proj": "attn_output",
    "fc1": "ffn_up",
    "fc2": "ffn_down",
    "gate_up_proj": "ffn_up",
    "down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    """Example: model.layers.3.mlp.fc1.bias -> blk.3.ffn_up.bias"""
    *path, module, leaf = name.split(".")
    layer = next((f"blk.{part}." for part in path if part.isdigit()), "")
    return f"{layer}{HUB_TO_GGUF[module]}.{leaf}"


def new_writer(file: Path, config: dict, **changes) -> gguf.GGUFWriter:
    """A writer with the metadata that llama.cpp's converter writes for this hub config."""
    kind = {"phi": "phi2", "phi3": "phi3"}[config["model_type"]]
    writer = gguf.GGUFWriter(file, kind, **changes)
    C, H = config["hidden_size"], config["num_attention_heads"]
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(C)
    writer.add_feed_forward_length(4 * C if kind == "phi2" else config["intermediate_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_head_count(H)
    writer.add_head_count_kv(H if kind == "phi2" else config["num_key_value_heads"])
    writer.add_rope_dimension_count(int(config["partial_rotary_factor"] * C) // H)
    if kind == "phi2":
        writer.add_layer_norm_eps(config["layer_norm_eps"])
        return writer
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_sliding_window(config["sliding_window"] or 0)
    longest, original = config["max_position_embeddings"], config["original_max_position_embeddings"]
    writer.add_rope_scaling_orig_ctx_len(original)
    if scaling := config["rope_scaling"]:
        factor = (1 + np.log(longest / original) / np.log(original)) ** 0.5 if longest > original else 1.0
        writer.add_rope_scaling_attn_factors(scaling.get("attention_factor") or float(factor))
        for name in ("long", "short"):
            numbers = np.array(scaling[f"{name}_factor"], np.float32)
            writer.add_tensor(f"rope_factors_{name}.weight", numbers)
    return writer


def add_tensor(writer: gguf.GGUFWriter, name: str, tensor: torch.Tensor, kind: str) -> None:
    """One tensor under its GGUF name; vectors are always F32."""
    qtype = gguf.GGMLQuantizationType[kind if tensor.dim() > 1 else "F32"]
    writer.add_tensor(name, gguf.quantize(tensor.float().numpy(), qtype), raw_dtype=qtype)


def write_model(
    file: Path, config: dict, state: dict[str, torch.Tensor], kind: str = "F32", folder: Path | None = None
) -> Path:
    """A whole model, with the vocabulary of a hub folder."""
    writer = new_writer(file, config)
    if folder is not None:
        add_vocabulary(writer, folder, config["vocab_size"])
    for name, tensor in state.items():
        add_tensor(writer, gguf_name(name), tensor, kind)
    return finish(writer, file)

"""What is put under a loaded model on a CPU: faster products and attention, and weights of 8 and 4 bits.

- `prepare(model)` puts the kernels under a model; `weights.load` ends with it. `plain(model)` takes them off.
- `prepare(model, cache="int8")`, `new_cache(model, "int8")`: keys and values of 8 bits, for long texts.
- `quantize(model, "int4")` is for good: a third of the memory, and half the time of a step.
- `error(model, ids, "int4")` says what that costs.
- `compile(model)` makes a decoding step one graph of torch.compile.

`hooks.py` lists what is replaced on which module.
"""

from .compiled import compile
from .hooks import plain, prepare
from .int8_cache import new_cache
from .native import dequantize_blocks, is_available, operators, status, whole_numbers
from .quantized import KINDS, Quantized, QuantizedEmbedding
from .quantizing import Cost, error, is_quantized, quantize, set_prefill

from .quantized import stored_bits  # isort: skip
from .quantizing import (  # isort: skip
    embeddings,
    expect_quantized,
    linear_layers,
    mark_packed,
    mark_quantized,
    put_bits,
    replace_module,
    set_dtype,
)

__all__ = ["KINDS", "Cost", "Quantized", "compile", "error", "is_available", "is_quantized", "plain"]
__all__ += [
    "QuantizedEmbedding",
    "dequantize_blocks",
    "new_cache",
    "operators",
    "prepare",
    "quantize",
    "set_prefill",
    "status",
]
__all__ += ["embeddings", "expect_quantized", "linear_layers", "mark_packed", "mark_quantized"]
__all__ += ["put_bits", "replace_module", "set_dtype", "stored_bits", "whole_numbers"]

"""What is put under a loaded model on a CPU: products and attention that are faster, weights of 8 and 4 bits.

kernels.prepare(model)            # what `weights.load` does in the end; `kernels.plain` takes it back
kernels.quantize(model, "int8")
"""

from .core import *  # noqa: F403

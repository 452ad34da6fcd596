"""One model over several processes, by torch.distributed: each holds a part of every matrix.

model = parallel.load(PhiForCausalLM, folder)    # in each process that torchrun started
"""

from .tensor_parallel import joined, load, parallelize, same, whole, whole_tensors

__all__ = ["joined", "load", "parallelize", "same", "whole", "whole_tensors"]

"""One model over several processes, by torch.distributed: each holds a part of every matrix.

model = parallel.load(PhiForCausalLM, folder)    # in each process that torchrun started
"""

from .processes import broadcast, process_mesh
from .tensor_parallel import gather, gather_tensors, load, parallelize

__all__ = ["broadcast", "gather", "gather_tensors", "load", "parallelize", "process_mesh"]

"""The cases of this folder run in Triton's interpreter: test_kernels.py starts pytest on them.

The interpreter has to be chosen before Triton is imported, and for the whole process: by
TRITON_INTERPRET=1.
"""

import torch
import triton

assert triton.knobs.runtime.interpret, "set TRITON_INTERPRET=1"

CPU = torch.device("cpu")

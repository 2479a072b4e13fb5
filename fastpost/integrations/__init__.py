"""fastpost inside the trainers that people use.

Each module needs its own framework and imports nothing of the others; this package imports none of them.
"""

import torch

# What the forward pass computes in, by the name that Accelerate gives to a mixed precision.
COMPUTE_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}

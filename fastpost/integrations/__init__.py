"""fastpost inside the trainers that people use.

Each module needs its own framework and imports nothing of the others; this package imports none of them.
"""

from typing import Any

import torch

# What the forward pass computes in, by the name that Accelerate gives to a mixed precision.
COMPUTE_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def shares_each_batch(accelerator: Any) -> bool:
    """Whether Accelerate is told (`sync_each_batch`) that ranks share gradients after each micro-batch."""
    return bool(accelerator.gradient_state.plugin_kwargs.get("sync_each_batch", False))


def cuts_sequences(accelerator: Any) -> bool:
    """Whether Accelerate's context parallelism is on, which cuts the tensors of a batch in place."""
    config = getattr(accelerator, "parallelism_config", None)
    return config is not None and bool(config.cp_enabled)

"""Which numbers the options of a training run may have; transformers checks few of its own before it has written files."""

from __future__ import annotations

from typing import Any

from fastpost.cli.options import Range, check

_SHARE = Range(0, 1)
_ONE = Range(1)
_ANY_SEED = Range(0, 1 << 32, below=True)  # numpy takes no others

RANGES: dict[str, Range] = {
    "per_device_train_batch_size": _ONE,
    "per_device_eval_batch_size": _ONE,
    "gradient_accumulation_steps": _ONE,
    "max_steps": Range(1, also=(-1,)),
    "num_train_epochs": Range(0, above=True),
    "learning_rate": Range(0),
    "warmup_steps": Range(0),
    "weight_decay": Range(0),
    "adam_beta1": Range(0, 1, below=True),
    "adam_beta2": Range(0, 1, below=True),
    "adam_epsilon": Range(0, above=True),  # 0 makes NaN of weights without a gradient
    "max_grad_norm": Range(0, infinite=True),  # 0: no clipping
    "label_smoothing_factor": _SHARE,
    "neftune_noise_alpha": Range(0),
    "torch_empty_cache_steps": _ONE,
    "logging_steps": Range(0),
    "eval_steps": Range(0),
    "eval_delay": Range(0),
    "eval_accumulation_steps": _ONE,
    "save_steps": Range(0),
    "save_total_limit": Range(-1),  # 0 and -1: no limit
    "seed": _ANY_SEED,
    "data_seed": _ANY_SEED,
    "dataloader_num_workers": Range(0),
    "dataloader_prefetch_factor": _ONE,
    "ddp_bucket_cap_mb": _ONE,
    "ddp_timeout": _ONE,
    "local_rank": Range(-1),
    "sam_rho": Range(0),
    "sam_eta": Range(0),
    "sam_ascent_fraction": Range(0, 1, above=True),
    "sam_interval": _ONE,
    "sam_rounding_seed": Range(0, 1 << 64, below=True),
    "r3f_lambda": Range(0),
    "r3f_eps": Range(0),
    "r3f_seed": Range(),
    "anchor_kl": Range(0),
    "anchor_ema_decay": Range(0, 1),
}
# Options that count for nothing under another strategy.
_EVERY = {"logging_steps": "logging_strategy", "save_steps": "save_strategy"}


def check_numbers(values: Any) -> None:
    """Raises ValueError for the first option whose number cannot work.

    Args:
        values: all options as attributes.
    """
    check(values, RANGES, dashes=False)
    for name, strategy in _EVERY.items():
        if getattr(values, strategy) == "steps" and not getattr(values, name) > 0:
            raise ValueError(f"--{name} must be more than 0, not {getattr(values, name)} (--{strategy} is steps)")

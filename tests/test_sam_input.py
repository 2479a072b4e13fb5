"""What SAM refuses, with which words, before anything is written."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn

from fastpost import SAM

from .conftest import bits
from .small import loss_of, network


def with_gradients(**options: Any) -> tuple[nn.Module, SAM]:
    model = network()
    opt = SAM(model.parameters(), torch.optim.SGD, rho=0.1, lr=0.1, **options)
    loss_of(model).backward()
    return model, opt


def perturbed_then(call):
    def run() -> None:
        _, opt = with_gradients()
        opt.first_step()
        call(opt)

    return run


def marked(name: str, value: object) -> nn.Parameter:
    """A parameter with the attribute by which FSDP1 and DeepSpeed mark theirs."""
    p = nn.Parameter(torch.zeros(2))
    setattr(p, name, value)
    return p


def zero_optimizer() -> type:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    return ZeroRedundancyOptimizer


P = [nn.Parameter(torch.zeros(2))]
INSTANCE = torch.optim.SGD(P, lr=0.1)
BAD = {
    "rho": (lambda: SAM(P, torch.optim.SGD, rho=-1.0), ValueError, "rho"),
    "rho nan": (lambda: SAM(P, torch.optim.SGD, rho=math.nan), ValueError, "rho"),
    "rho inf": (lambda: SAM(P, torch.optim.SGD, rho=math.inf), ValueError, "rho"),
    "rho of a group": (lambda: SAM([{"params": P, "rho": -1.0}], torch.optim.SGD), ValueError, "rho"),
    "eta": (lambda: SAM(P, torch.optim.SGD, eta=-1.0), ValueError, "eta"),
    "eta without ASAM, in a group": (
        lambda: SAM([{"params": P, "eta": 0.01}], torch.optim.SGD), ValueError, "give it adaptive=True"
    ),
    "eta without ASAM": (lambda: SAM(P, torch.optim.SGD, eta=0.01), ValueError, "say adaptive=True"),
    "fraction": (lambda: SAM(P, torch.optim.SGD, ascent_fraction=0.0), ValueError, "ascent_fraction"),
    "interval": (lambda: SAM(P, torch.optim.SGD, interval=0), ValueError, "interval"),
    "dropout": (lambda: SAM(P, torch.optim.SGD, dropout_rng="sam"), ValueError, "Did you mean 'same'"),
    "compute dtype": (lambda: SAM(P, torch.optim.SGD, compute_dtype=torch.int32), TypeError, "compute_dtype"),
    "compute dtype of 8 bits": (
        lambda: SAM(P, torch.optim.SGD, compute_dtype=torch.float8_e5m2), TypeError, "SAM: compute_dtype .*torch.float8"
    ),
    "compute dtype wider than the weights": (
        lambda: with_gradients(compute_dtype=torch.float64)[1].first_step(), TypeError, "SAM: compute_dtype .*torch.float64;"
    ),
    "scope without names": (lambda: SAM(P, torch.optim.SGD, scope=["a"]), ValueError, "named_parameters"),
    "empty scope": (lambda: SAM([("a", P[0])], torch.optim.SGD, scope=["b"]), ValueError, "no parameter is in scope"),
    "no parameters": (lambda: SAM([], torch.optim.SGD), ValueError, "empty parameter list"),
    "params missing": (lambda: SAM(None, torch.optim.SGD), TypeError, "params"),
    "params twice": (lambda: SAM(P, INSTANCE), TypeError, "None for params"),
    "keywords for an instance": (lambda: SAM(None, INSTANCE, lr=1.0), TypeError, "lr"),
    "no optimizer": (lambda: SAM(P, "adamw"), TypeError, "base_optimizer"),
    "SAM in SAM": (lambda: SAM(None, SAM(P, torch.optim.SGD)), TypeError, "SAM itself"),
    "LBFGS": (lambda: SAM(P, torch.optim.LBFGS), TypeError, "LBFGS needs a closure .* SGD or AdamW"),
    "Adadelta": (lambda: SAM(P, torch.optim.Adadelta), TypeError, "Adadelta has an option 'rho' of its own"),
    "Adadelta instance": (lambda: SAM(None, torch.optim.Adadelta(P)), TypeError, "Adadelta has an option 'rho'"),
    "LBFGS instance": (lambda: SAM(None, torch.optim.LBFGS(P)), TypeError, "LBFGS needs a closure"),
    "sync without a group": (lambda: SAM(P, torch.optim.SGD, sync_ascent=True), ValueError, "no process group"),
    "no sync without a group": (lambda: SAM(P, torch.optim.SGD, sync_ascent=False), ValueError, "no process group"),
    "ZeRO": (lambda: SAM(P, zero_optimizer()), TypeError, "ZeRO.*FSDP2"),
    "FSDP1": (lambda: SAM([marked("_fsdp_flattened", True)], torch.optim.SGD), TypeError, "FSDP1.*use FSDP2"),
    "DeepSpeed": (lambda: SAM([marked("ds_id", 3)], torch.optim.SGD), TypeError, "DeepSpeed's ZeRO"),
    "no gradient": (lambda: SAM(P, torch.optim.SGD).first_step(), RuntimeError, "backward"),
    "second without first": (lambda: with_gradients()[1].second_step(), RuntimeError, "without first_step"),
    "first twice": (perturbed_then(lambda o: o.first_step()), RuntimeError, "twice"),
    "closure while perturbed": (perturbed_then(lambda o: o.step(lambda: None)), RuntimeError, "while perturbed"),
    "state_dict while perturbed": (perturbed_then(lambda o: o.state_dict()), RuntimeError, "while the weights"),
    "load while perturbed": (perturbed_then(lambda o: o.load_state_dict({})), RuntimeError, "while the weights"),
    "copy while perturbed": (perturbed_then(copy.deepcopy), RuntimeError, "while the weights"),
    "group while perturbed": (perturbed_then(lambda o: o.add_param_group({"params": P})), RuntimeError, "while"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:`torch.jit")  # torch's own, on importing its ZeRO optimizer
@pytest.mark.parametrize("what", BAD)
def test_bad_input(what: str) -> None:
    call, error, message = BAD[what]
    with pytest.raises(error, match=message):
        call()


def test_a_sparse_gradient_is_refused_before_anything_is_written() -> None:
    embedding = nn.Embedding(5, 3, sparse=True)
    opt = SAM(embedding.parameters(), torch.optim.SGD, rho=0.1, lr=0.1)
    embedding(torch.tensor([1, 2])).sum().backward()
    before = bits(embedding.weight)
    with pytest.raises(ValueError, match="sparse"):
        opt.first_step()
    assert torch.equal(bits(embedding.weight), before)
    assert not opt.is_perturbed

"""Flattened parameters: the same objects, values and training, in one buffer."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn

import fastpost
from fastpost.backends import native
from fastpost.ops import params as ops

from .conftest import bits, same_bits


def network() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(7, 13), nn.ReLU(), nn.LayerNorm(13), nn.Linear(13, 5, bias=False))


def step(model: nn.Module, opt: torch.optim.Optimizer) -> None:
    opt.zero_grad()
    model(torch.ones(4, 7)).square().sum().backward()
    opt.step()


def span_count(tensors: list[torch.Tensor]) -> int:
    core = native.core()
    (bucket,) = ops.make_buckets(grads=tensors)
    return bucket.native(core, core.DType.f32).spans(2)


def test_values_objects_and_training_stay_the_same() -> None:
    plain, flattened = network(), network()
    objects = list(map(id, flattened.parameters()))
    model_bits = [bits(p) for p in flattened.parameters()]
    flat = fastpost.flatten_parameters(flattened)
    assert objects == list(map(id, flattened.parameters()))
    assert all(torch.equal(bits(p), b) for p, b in zip(flattened.parameters(), model_bits, strict=True))
    assert flat.intact
    optimizers = [torch.optim.AdamW(m.parameters(), lr=0.1) for m in (plain, flattened)]
    for _ in range(3):
        for m, o in zip((plain, flattened), optimizers, strict=True):
            step(m, o)
    for p, q in zip(plain.parameters(), flattened.parameters(), strict=True):
        assert same_bits(p, q)
        assert same_bits(p.grad, q.grad)
    assert list(plain.state_dict()) == list(flattened.state_dict())


def test_one_span_for_weights_and_for_gradients_after_zero_grad_to_none() -> None:
    model = network()
    assert span_count([p.detach() for p in model.parameters()]) > 1
    flat = fastpost.flatten_parameters(model)
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        step(model, opt)
        assert span_count([p.detach() for p in model.parameters()]) == 1
        assert span_count([p.grad for p in model.parameters()]) == 1
    (buffer,) = flat.parameters.values()
    inside = torch.zeros(buffer.numel(), dtype=torch.bool)
    for p in model.parameters():
        assert p.data_ptr() % 256 == 0
        start = (p.data_ptr() - buffer.data_ptr()) // 4
        inside[start : start + p.numel()] = True
    assert (buffer[~inside] == 0).all()


def test_accumulated_gradients_add_up_in_the_buffer() -> None:
    plain, model = network(), network()
    fastpost.flatten_parameters(model)
    for m in (plain, model):
        for _ in range(3):
            m(torch.ones(4, 7)).square().sum().backward()
    assert all(same_bits(p.grad, q.grad) for p, q in zip(plain.parameters(), model.parameters(), strict=True))


def test_sam_steps_alike_on_listed_and_flattened_parameters() -> None:
    plain, model = network(), network()
    fastpost.flatten_parameters(model)
    optimizers = [fastpost.SAM(m.parameters(), torch.optim.SGD, rho=0.1, lr=0.01) for m in (plain, model)]
    for _ in range(3):
        for m, o in zip((plain, model), optimizers, strict=True):

            def closure(m: nn.Module = m) -> torch.Tensor:
                loss = m(torch.ones(4, 7)).square().sum()
                loss.backward()
                return loss

            o.step(closure)
    assert all(same_bits(p, q) for p, q in zip(plain.parameters(), model.parameters(), strict=True))


def test_tied_weights_and_mixed_dtypes() -> None:
    embedding, head = nn.Embedding(6, 4), nn.Linear(4, 6)
    head.weight = embedding.weight
    model = nn.ModuleDict({"embedding": embedding, "head": head, "narrow": nn.Linear(4, 4).bfloat16()})
    separate = nn.Parameter(torch.zeros(0))
    separate.data = embedding.weight.data  # tied by memory, not by object
    model.register_parameter("alias", separate)
    flat = fastpost.flatten_parameters(model)
    assert head.weight is embedding.weight
    assert model.alias.data_ptr() == embedding.weight.data_ptr()
    assert len(flat.parameters) == 2
    assert flat.intact


def test_moving_the_model_warns_once_stays_right_and_reflattens() -> None:
    model = network()
    flat = fastpost.flatten_parameters(model)
    model.double()
    assert not flat.intact
    with pytest.warns(UserWarning, match="reflatten") as caught:
        model(torch.ones(4, 7).double()).sum().backward()
    assert len(caught) == 1
    assert all(p.grad.dtype == torch.float64 for p in model.parameters())
    flat.reflatten()
    assert flat.intact
    assert set(flat.parameters) == {(torch.float64, torch.device("cpu"))}


def test_saving_copying_and_pickling(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = network()
    fastpost.flatten_parameters(model)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    assert all(same_bits(v, load_file(tmp_path / "model.safetensors")[k]) for k, v in model.state_dict().items())
    torch.save(model.state_dict(), tmp_path / "model.pt")
    fresh = network()
    fresh.load_state_dict(torch.load(tmp_path / "model.pt"))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            next(twin.parameters()).zero_()
        assert next(model.parameters()).abs().sum() > 0


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="no parameters"):
        fastpost.flatten_parameters(nn.ReLU())
    with pytest.raises(ValueError, match="meta"):
        fastpost.flatten_parameters(nn.Linear(2, 2, device="meta"))
    quantized = nn.Module()
    quantized.register_parameter("w", nn.Parameter(torch.zeros(3, dtype=torch.int8), requires_grad=False))
    with pytest.raises(TypeError, match="int8"):
        fastpost.flatten_parameters(quantized)

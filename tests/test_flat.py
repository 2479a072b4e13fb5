"""Flattened parameters: the same objects, values and training, in one buffer."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_every_saver_finds_every_weight(tmp_path: Path, dtype: torch.dtype) -> None:
    """What is saved has a storage of its own, but is the weights' memory; weights that are tied are one."""
    from accelerate import Accelerator
    from safetensors.torch import load_file, load_model, save_model

    model = nn.ModuleDict({"embedding": nn.Embedding(6, 4), "head": nn.Linear(4, 6), "last": nn.Linear(6, 2)})
    model["head"].weight = model["embedding"].weight
    model["last"].weight.data = torch.randn(6, 2).t()
    model = model.to(dtype)
    fastpost.flatten_parameters(model)
    state = model.state_dict()
    assert [t.data_ptr() for t in state.values()] == [model.get_parameter(name).data_ptr() for name in state]
    assert {t.untyped_storage().nbytes() for t in state.values()} == {dtype.itemsize * n for n in (24, 6, 12, 2)}
    assert state["last.weight"].stride() == (1, 2)
    assert state["head.weight"] is state["embedding.weight"]

    torch.save(model["last"].state_dict(), tmp_path / "last.pt")
    assert list(torch.load(tmp_path / "last.pt")) == ["weight", "bias"]
    if dtype == torch.float32:  # a file's own overhead is small beside a layer that is not written
        big = nn.Sequential(nn.Linear(1000, 1000), nn.Linear(10, 2))
        fastpost.flatten_parameters(big)
        torch.save(big[1].state_dict(), tmp_path / "small.pt")
        assert (tmp_path / "small.pt").stat().st_size < 10_000
    Accelerator(cpu=True).save_model(model, str(tmp_path))
    saved = load_file(tmp_path / "model.safetensors")
    assert {"head.bias", "last.weight", "last.bias"} < set(saved)
    assert len(saved) == 4  # and one of the two names of the tied weight
    save_model(model, str(tmp_path / "again.safetensors"))
    before = {name: t.view(torch.uint8).clone() for name, t in model.state_dict().items() if t.is_contiguous()}
    with torch.no_grad():
        model["last"].bias.zero_()
    load_model(model, str(tmp_path / "again.safetensors"))
    assert all(torch.equal(model.state_dict()[name].view(torch.uint8), kept) for name, kept in before.items())


def test_a_state_dict_is_of_the_weights_as_they_are_whatever_became_of_an_earlier_one() -> None:
    model = network()
    fastpost.flatten_parameters(model)
    held = model.state_dict()
    held["0.weight"].data = held["0.weight"].data.clone()
    held["0.bias"].requires_grad_()
    with torch.inference_mode():
        inferred = model.state_dict()
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(7.0)
    now = model.state_dict()
    assert all(bool((t == 7).all()) and not t.requires_grad and not t.is_inference() for t in now.values())
    assert not set(map(id, now.values())) & {*map(id, held.values()), *map(id, inferred.values())}


def twice(model: nn.ModuleDict) -> None:
    model["again"] = model["head"]


def twice_in_one(model: nn.ModuleDict) -> None:
    model["head"].register_parameter("again", model["head"].weight)


def beside_sparse(model: nn.ModuleDict) -> None:
    model.register_buffer("edges", torch.eye(3).to_sparse())  # comes first in a state dict
    twice_in_one(model)


def scripted(model: nn.ModuleDict) -> None:
    model["inside"] = torch.jit.script(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
    twice(model)
    model["script"] = torch.jit.script(model["head"])  # of the same weights


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize("change", [twice, twice_in_one, beside_sparse, scripted])
def test_a_weight_with_two_names_is_saved_once(change: Callable[[nn.ModuleDict], None]) -> None:
    """Also where a whole module has two names, beside tensors without memory of their own, and in every mode."""
    model = nn.ModuleDict({"head": nn.Linear(4, 6), "last": nn.Linear(6, 2)})
    change(model)
    fastpost.flatten_parameters(model)
    with torch.inference_mode():
        state = model.state_dict()
    assert not any(t.is_inference() for t in state.values())
    again = "again.weight" if change in (twice, scripted) else "head.again"
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    state = torch.load(file)
    assert state[again].data_ptr() == state["head.weight"].data_ptr()
    assert all(t.untyped_storage().nbytes() == 4 * t.numel() for t in state.values() if t.layout == torch.strided)
    if change is scripted:
        assert state["script.weight"].data_ptr() == state["head.weight"].data_ptr()
        assert same_bits(state["inside.1.bias"], model["inside"].state_dict()["1.bias"])
    assert same_bits(state[again], model["head"].weight.detach())


def test_the_current_device_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object, **__: object) -> None:
        raise BufferError("Can't export tensors on a different CUDA device index")  # what a tensor itself says

    model = network()
    fastpost.flatten_parameters(model)
    monkeypatch.setattr(torch.Tensor, "__dlpack__", refused)
    assert [t.untyped_storage().nbytes() for t in model.state_dict().values()] == [4 * p.numel() for p in model.parameters()]


def test_a_device_that_exports_no_memory_brings_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(_: torch.Tensor) -> torch.Tensor:
        raise BufferError("Cannot pack tensors")

    model = network()
    fastpost.flatten_parameters(model)
    monkeypatch.setattr(torch.utils.dlpack, "from_dlpack", refused)
    with pytest.warns(UserWarning, match=r"cpu exports no memory \(Cannot pack tensors\).*save copies"):
        state = model.state_dict()
    assert all(same_bits(state[name], p.detach()) for name, p in model.named_parameters())


def test_parameters_that_share_memory_without_being_one_are_refused() -> None:
    for data in (lambda w: w.t(), lambda w: w[1:], lambda w: w[:1].expand(5, -1)):
        model = nn.ModuleDict({"a": nn.Linear(3, 3, bias=False)})
        tied = nn.Module()
        tied.register_parameter("w", nn.Parameter(data(model["a"].weight.data)))
        model["b"] = tied
        with pytest.raises(ValueError, match="share memory without being the same tensor"):
            fastpost.flatten_parameters(model)
    sparse = nn.Module()
    sparse.register_parameter("w", nn.Parameter(torch.eye(3).to_sparse()))
    with pytest.raises(TypeError, match=r"torch\.sparse_coo; only dense ones"):
        fastpost.flatten_parameters(sparse)


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="no parameters"):
        fastpost.flatten_parameters(nn.ReLU())
    with pytest.raises(ValueError, match="meta"):
        fastpost.flatten_parameters(nn.Linear(2, 2, device="meta"))
    quantized = nn.Module()
    quantized.register_parameter("w", nn.Parameter(torch.zeros(3, dtype=torch.int8), requires_grad=False))
    with pytest.raises(TypeError, match="int8"):
        fastpost.flatten_parameters(quantized)


@pytest.mark.filterwarnings("ignore:.*torch.jit.:DeprecationWarning")
def test_a_model_that_is_scripted_goes_into_a_plain_one() -> None:
    model = torch.jit.script(nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"made by torch.jit.script, .*torch.nn.Sequential\(model\)"):
        fastpost.flatten_parameters(model)
    outer = nn.Sequential(model)
    traced = torch.jit.trace(nn.Sequential(nn.Linear(2, 2)), torch.ones(1, 2))  # which takes hooks
    for flat in (traced, outer):
        fastpost.flatten_parameters(flat)
        assert [t.untyped_storage().nbytes() for t in flat.state_dict().values()] == [16, 8]
    assert all(t is p for t, p in zip(outer.state_dict(keep_vars=True).values(), outer.parameters(), strict=True))

"""Weights that change between the two passes: followed, converted exactly, or refused before anything is written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastpost
from fastpost import SAM
from fastpost.sam import GSAM, SAMWindow

from .conftest import bits, same_bits

X = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(1))


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(64, 3)).to(dtype)


def backward(model: nn.Module) -> Tensor:
    loss = model(X.to(model[0].weight.dtype)).float().square().mean()  # type: ignore[index]
    loss.backward()
    return loss


def build(model: nn.Module, form: str = "stored", lr: float = 0.0, base: Any = torch.optim.SGD, **options: Any) -> SAM:
    more: dict[str, dict[str, Any]] = {
        "stochastic": {"rounding": "stochastic"},
        "masters": {"master_params": [p.detach().float() for p in model.parameters()]},
        "fused_restore": {"fused_restore": True},
        "GSAM": {"variant": GSAM(0.5)},
    }
    base = torch.optim.AdamW if form == "fused_restore" else base
    return SAM(model.named_parameters(), base, rho=0.3, lr=lr, **more.get(form, {}), **options)


FORMS = {
    "stored": torch.float32,
    "GSAM": torch.float32,
    "fused_restore": torch.float32,
    "stochastic": torch.bfloat16,
    "masters": torch.bfloat16,
}


def values(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def equal(model: nn.Module, expected: list[Tensor]) -> bool:
    """In every element's bits, wherever it lies in memory."""
    return all(same_bits(p, w) for p, w in zip(model.parameters(), expected, strict=True))


# -- what is followed -----------------------------------------------------------------------------------------------------


def clone(model: nn.Module) -> None:
    for p in model.parameters():
        p.data = p.data.clone()


def channels_last(model: nn.Module) -> None:
    model.to(memory_format=torch.channels_last)


def transposed(model: nn.Module) -> None:
    model[2].weight.data = model[2].weight.data.t().contiguous().t()


def with_gaps(model: nn.Module) -> None:
    room = torch.zeros(3, 200, dtype=model[2].weight.dtype)
    model[2].weight.data = room[:, ::3][:, :64].copy_(model[2].weight.data)


def flattened(model: nn.Module) -> None:
    fastpost.flatten_parameters(model)


def same_address_other_order(model: nn.Module) -> None:
    """The memory stays, and means other elements: only strides can tell."""
    model[0].weight.data = model[0].weight.data.as_strided((4, 3, 3, 3), (27, 1, 9, 3))


@pytest.mark.parametrize("change", [clone, channels_last, transposed, with_gaps, flattened, same_address_other_order])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("ends", ["second_step", "restore_", "abandon", "perturbed"])
@pytest.mark.filterwarnings("ignore:SAM. fused_restore=True cannot serve .* of another memory format")
def test_what_moves_or_lies_in_another_order_gets_its_values_back(
    form: str, change: Callable[[nn.Module], None], ends: str
) -> None:
    model = network(FORMS[form])
    opt = build(model, form)
    w = values(model)
    for _ in range(2):  # from new buckets, and from old ones
        model.zero_grad()
        backward(model)
        if ends == "perturbed":
            with opt.perturbed():
                change(model)
                backward(model)
        else:
            opt.first_step(zero_grad=True)
            assert not equal(model, w)
            change(model)
            backward(model)
            getattr(opt, ends)()
        assert not opt.is_perturbed
        assert equal(model, w)


def test_gaps_between_strided_weights_are_not_written() -> None:
    model = network()
    opt = build(model)
    backward(model)
    opt.first_step(zero_grad=True)
    room = torch.full((3, 200), 7.0)
    model[2].weight.data = room[:, ::3][:, :64]
    opt.restore_()
    assert (room[:, 1::3] == 7).all()
    assert (room[:, 192:] == 7).all()


def test_a_layout_that_changes_between_steps_takes_a_new_stash() -> None:
    """The gradients change their strides with the weights, so that weights and gradients alone show nothing."""
    model, plain = network(), network()
    opt, other = build(model, lr=0.1), build(plain, lr=0.1)
    for step in range(4):
        if step == 2:
            channels_last(model)
        opt.step(lambda: backward(model))
        other.step(lambda: backward(plain))
        for p, q in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_steps_over_moving_weights_are_those_over_weights_that_stay(form: str) -> None:
    moving, resting = network(FORMS[form]), network(FORMS[form])
    one, two = build(moving, form, lr=0.1), build(resting, form, lr=0.1)
    for _ in range(3):
        for model, opt in ((moving, one), (resting, two)):
            opt.zero_grad()
            backward(model)
            opt.first_step(zero_grad=True)
            if model is moving:
                clone(model)
            backward(model)
            opt.second_step()
    assert equal(moving, values(resting))


# -- what is refused ------------------------------------------------------------------------------------------------------


def to_bfloat16(model: nn.Module) -> None:
    model.bfloat16()


def to_half(model: nn.Module) -> None:
    model.half()


def to_double(model: nn.Module) -> None:
    model.double()


def one_to_double(model: nn.Module) -> None:
    model[0].bias.data = model[0].bias.data.double()


def shorter(model: nn.Module) -> None:
    model[2].weight.data = model[2].weight.data[:, :32].clone()


def longer(model: nn.Module) -> None:
    model[2].weight.data = model[2].weight.data.repeat(2, 1)


def emptied(model: nn.Module) -> None:
    model[2].weight.data = model[2].weight.data.new_empty(0)


def freed(model: nn.Module) -> None:
    model[2].weight.untyped_storage().resize_(0)


def cut(model: nn.Module) -> None:
    model[2].weight.untyped_storage().resize_(64)


def expanded(model: nn.Module) -> None:
    model[2].weight.data = model[2].weight.data[:1].expand(3, 64)


def interleaved(model: nn.Module) -> None:
    model[2].weight.data = torch.zeros(200, dtype=model[2].weight.dtype).as_strided((3, 64), (1, 1))


def tied(model: nn.Module) -> None:
    model[2].bias.data = model[0].bias.data[:3]


def inside_another(model: nn.Module) -> None:
    model[0].bias.data = model[2].weight.data.view(-1)[7:11]


# What each is called in the error, and whether the weights keep their shape.
REFUSED: dict[str, tuple[Callable[[nn.Module], None], str]] = {
    "bfloat16": (to_bfloat16, "was float.. and is bfloat16 now"),
    "half": (to_half, "is float16 now"),
    "double": (to_double, "is float64 now"),
    "one tensor": (one_to_double, r"shape \(4,\) was .* and is float64 now"),
    "shorter": (shorter, r"has shape \(3, 32\) now"),
    "longer": (longer, r"has shape \(6, 64\) now"),
    "emptied": (emptied, r"has shape \(0,\) now"),
    "freed": (freed, "has lost its memory"),
    "cut": (cut, "has lost its memory"),
    "expanded": (expanded, "is expanded now"),
    "interleaved": (interleaved, "share memory"),
    "tied": (tied, "shares memory with another weight now"),
    "inside another": (inside_another, "shares memory with another weight now"),
}


@pytest.mark.parametrize("ends", ["second_step", "step", "restore_", "end_ascent"])
@pytest.mark.parametrize("what", REFUSED)
@pytest.mark.parametrize("form", FORMS)
def test_what_cannot_take_w_is_refused_before_anything_is_written(form: str, what: str, ends: str) -> None:
    change, words = REFUSED[what]
    if what == "bfloat16" and FORMS[form] == torch.bfloat16:
        change, words = to_half, "was bfloat16 and is float16 now"
    model = network(FORMS[form])
    opt = build(model, form)
    if form == "fused_restore":
        opt.step(lambda: backward(model))  # makes moments
    w = values(model)
    model.zero_grad()
    backward(model)
    opt.first_step(zero_grad=True)
    change(model)
    backwards_work = what in ("bfloat16", "half", "double")
    if backwards_work:
        backward(model)
    now, gradients = values_now(model), [None if p.grad is None else bits(p.grad) for p in model.parameters()]
    with pytest.raises(RuntimeError, match=f"{words}.*opt.abandon"):
        getattr(opt, ends)()
    assert opt.is_perturbed
    assert values_now(model) == now
    for p, g in zip(model.parameters(), gradients, strict=True):
        assert (p.grad is None and g is None) or torch.equal(bits(p.grad), g)
    opt.abandon()
    assert not opt.is_perturbed
    for p, before in zip(model.parameters(), w, strict=True):
        assert same_bits(p, before.to(p.dtype))
        assert p.grad is None
        assert p.dtype == before.dtype or what in ("bfloat16", "half", "double", "one tensor")
    opt.restore_()  # there is nothing left to do
    assert all(same_bits(p, b.to(p.dtype)) for p, b in zip(model.parameters(), w, strict=True))


def values_now(model: nn.Module) -> list[object]:
    """All bytes that the weights own, also where they are no whole tensor any more."""
    return [(p.dtype, p.shape, p.stride(), bytes(p.untyped_storage())) for p in model.parameters()]


@pytest.mark.parametrize("form", ["stored", "stochastic", "GSAM"])
@pytest.mark.parametrize("what", ["half", "double", "shorter", "freed", "tied"])
def test_after_abandon_training_goes_on(form: str, what: str) -> None:
    model = network(FORMS[form])
    opt = build(model, form, lr=0.1)
    opt.step(lambda: backward(model))
    model.zero_grad()
    backward(model)
    opt.first_step(zero_grad=True)
    REFUSED[what][0](model)
    with pytest.raises(RuntimeError, match="abandon"):
        opt.second_step()
    opt.abandon()
    if form == "stochastic" and what == "double":
        model.bfloat16()
    twin = network(model[0].weight.dtype)
    twin.load_state_dict(model.state_dict())
    other = build(twin, form, lr=0.1)
    other.param_groups[0]["sam_steps"] = opt.param_groups[0]["sam_steps"]
    for _ in range(2):
        opt.step(lambda: backward(model))
        other.step(lambda: backward(twin))
    assert equal(model, values(twin))


@pytest.mark.parametrize("way", ["closure", "perturbed", "window", "scaler"])
def test_every_form_of_a_step_refuses_with_one_error(way: str) -> None:
    model = network()
    opt = build(model, lr=0.1)
    w = values(model)
    passes = 0

    def closure(_: object = None) -> Tensor:
        nonlocal passes
        passes += 1
        if passes == 2:
            model.bfloat16()
        return backward(model)

    def run() -> None:
        if way == "closure":
            opt.step(closure)
        elif way == "perturbed":
            closure()
            with opt.perturbed():
                closure()
        elif way == "window":
            SAMWindow(opt, closure).run([0])
        else:
            scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
            scaler.scale(torch.ones(()))  # makes the scale
            closure()
            opt.first_step(zero_grad=True)
            closure()
            scaler.step(opt)

    with pytest.raises(RuntimeError, match="is bfloat16 now") as caught:
        run()
    assert caught.value.__context__ is None or "bfloat16" not in str(caught.value.__context__)
    if way != "window":  # which gives its step up itself
        assert opt.is_perturbed
        opt.abandon()
    assert all(same_bits(p, b.bfloat16()) for p, b in zip(model.parameters(), w, strict=True))
    assert not hasattr(opt, "found_inf")
    opt.step(lambda: backward(model))
    assert not opt.is_perturbed


def test_an_error_of_the_pass_is_not_hidden_by_a_changed_weight() -> None:
    model = network()
    opt = build(model)
    backward(model)

    def run() -> None:
        with opt.perturbed():
            model.bfloat16()
            raise KeyError("the user's own")

    with pytest.raises(RuntimeError, match="is bfloat16 now") as caught:
        run()
    assert isinstance(caught.value.__context__, KeyError)
    opt.abandon()
    assert not opt.is_perturbed


def test_a_dtype_that_is_changed_back_is_restored() -> None:
    model = network()
    opt = build(model, lr=0.1)
    twin, other = network(), None
    other = build(twin, lr=0.1)
    for m, o in ((model, opt), (twin, other)):
        backward(m)
        o.first_step(zero_grad=True)
        backward(m)
    gradients = [p.grad for p in model.parameters()]
    model.double()
    with pytest.raises(RuntimeError, match="float64"):
        opt.second_step()
    model.float()
    for p, g in zip(model.parameters(), gradients, strict=True):
        p.grad = g
    opt.second_step()
    other.second_step()
    assert equal(model, values(twin))


def test_functional_perturbation_writes_no_weight_so_it_refuses_none() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 2))
    opt = SAM(model.named_parameters(), torch.optim.SGD, rho=0.3, lr=0.0, perturb="functional", model=model)
    w, x = values(model), torch.randn(4, 6)
    model(x).square().mean().backward()
    opt.first_step(zero_grad=True)
    model.double()
    model(x.double()).square().mean().backward()
    opt.second_step()
    assert all(same_bits(p, b.double()) for p, b in zip(model.parameters(), w, strict=True))
    assert [type(m) for m in model] == [nn.Linear, nn.Linear]


def test_a_class_put_on_top_between_the_passes_stays_and_computes_at_w() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5))
    opt = SAM(model.named_parameters(), torch.optim.SGD, rho=0.3, lr=0.0, perturb="functional", model=model)
    x = torch.randn(4, 6)
    expected = model(x).detach()
    model(x).square().mean().backward()
    opt.first_step(zero_grad=True)
    model[0].__class__ = type("Named", (type(model[0]),), {})
    assert (model(x) - expected).abs().max() > 1e-3
    opt.restore_()
    assert type(model[0]).__name__ == "Named"
    assert torch.equal(model(x), expected)


# -- groups that hold other parameters ------------------------------------------------------------------------------------


def exchange(model: nn.Module, opt: SAM) -> None:
    old = model[2].weight
    model[2].weight = nn.Parameter(old.detach().clone())
    (group,) = opt.param_groups
    group["params"] = [model[2].weight if p is old else p for p in group["params"]]


@pytest.mark.parametrize("form", ["stored", "fused_restore", "GSAM"])
@pytest.mark.parametrize("ends", ["second_step", "perturbed"])
def test_parameters_exchanged_between_the_passes_are_refused(form: str, ends: str) -> None:
    model = network()
    opt = build(model, form)
    w = values(model)
    backward(model)
    old = model[2].weight

    def run() -> None:
        if ends == "perturbed":
            with opt.perturbed():
                exchange(model, opt)
        else:
            opt.first_step(zero_grad=True)
            exchange(model, opt)
            backward(model)
            opt.second_step()

    with pytest.raises(RuntimeError, match=r"exchanged between the two passes.*abandon"):
        run()
    assert not same_bits(old, w[2])
    opt.abandon()
    assert same_bits(old, w[2])
    assert all(same_bits(p, b) for i, (p, b) in enumerate(zip(model.parameters(), w, strict=True)) if i != 2)


def test_a_parameter_taken_out_of_its_group_is_restored_and_not_stepped() -> None:
    model = network()
    opt = build(model, lr=0.1)
    w = values(model)
    backward(model)
    opt.first_step(zero_grad=True)
    (group,) = opt.param_groups
    group["params"] = [p for p in group["params"] if p is not model[2].weight]
    backward(model)
    opt.second_step()
    assert [same_bits(p, b) for p, b in zip(model.parameters(), w, strict=True)] == [False, False, True, False]


def test_a_group_added_to_the_base_between_the_passes_is_stepped_from_where_it_is() -> None:
    model = network()
    opt = SAM(list(model.parameters())[:2], torch.optim.SGD, rho=0.3, lr=0.1)
    backward(model)
    opt.first_step(zero_grad=True)
    opt.base_optimizer.add_param_group({"params": list(model[2].parameters())})
    backward(model)
    expected = [torch.add(p.detach(), p.grad, alpha=-0.1) for p in model[2].parameters()]
    opt.second_step()
    assert equal(model[2], expected)


def test_weights_that_become_one_memory_between_steps_are_refused_before_the_ascent() -> None:
    model = network()
    opt = build(model)
    opt.step(lambda: backward(model))
    model[2].bias.data = model[0].bias.data[:3]
    model.zero_grad()
    backward(model)
    w = values(model)
    with pytest.raises(ValueError, match="same memory; pass tied tensors once"):
        opt.first_step()
    assert equal(model, w)
    assert not opt.is_perturbed


def test_weights_without_memory_are_refused_before_the_ascent() -> None:
    model = network()
    opt = build(model)
    opt.step(lambda: backward(model))
    model.zero_grad()
    backward(model)
    model[2].weight.untyped_storage().resize_(0)
    w = values(model[0])
    with pytest.raises(ValueError, match="memory of parameters"):
        opt.first_step()
    assert equal(model[0], w)
    assert not opt.is_perturbed


# -- gradients that are not what they were --------------------------------------------------------------------------------


SPOILS: dict[str, Callable[[Tensor], Tensor]] = {
    "wider": lambda g: g.double(),
    "narrower": lambda g: g.bfloat16(),
    "shorter": lambda g: g[:, :32].clone(),
    "longer": lambda g: g.repeat(1, 2),
}


@pytest.mark.parametrize(
    ("form", "which"), [("stored", "ascent"), ("GSAM", "ascent"), ("fused_restore", "ascent"), ("fused_restore", "descent")]
)
@pytest.mark.parametrize("spoil", SPOILS)
def test_a_gradient_given_other_data_is_never_read_as_what_it_was(form: str, which: str, spoil: str) -> None:
    """`p.grad.data = ...` passes all of torch's checks."""
    model = network()
    opt = build(model, form, lr=0.1)
    opt.step(lambda: backward(model))  # buckets and moments are there
    opt.zero_grad()
    backward(model)
    w, moments = values(model), [s["exp_avg"].clone() for s in opt.state.values() if "exp_avg" in s]
    if which == "descent":
        opt.first_step(zero_grad=True)
        backward(model)
    now = values(model)
    model[2].weight.grad.data = SPOILS[spoil](model[2].weight.grad)
    with pytest.raises(ValueError, match=r"gradients.* (dtype|shape)"):
        opt.first_step() if which == "ascent" else opt.second_step()
    assert equal(model, now)
    assert all(same_bits(s["exp_avg"], m) for s, m in zip(opt.state.values(), moments, strict=form == "fused_restore"))
    opt.abandon()
    assert equal(model, w)


@pytest.mark.parametrize("form", ["stored", "GSAM", "fused_restore"])
@pytest.mark.parametrize("which", ["ascent", "descent"])
@pytest.mark.filterwarnings("ignore:SAM. fused_restore=True cannot serve gradients of another memory format")
def test_a_gradient_in_another_order_is_read_in_that_order(form: str, which: str) -> None:
    model, plain = network(), network()
    for net in (model, plain):
        opt = build(net, form, lr=0.1)
        opt.step(lambda net=net: backward(net))  # type: ignore[misc]
        opt.zero_grad()
        for now in ("ascent", "descent"):
            backward(net)
            if net is model and which == now:
                model[2].weight.grad.data = model[2].weight.grad.t().contiguous().t()
            opt.first_step(zero_grad=True) if now == "ascent" else opt.second_step()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)

"""SAM and R3F on LoRA adapters, Flat-LoRA, adapters under sharding, against their equations in float64; real text."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F

import fastpost
from fastpost import SAM
from fastpost.integrations.peft import BiLoRA, EFlatLoRA, FlatLoRA
from fastpost.rng import seed_of
from tests.by_hand import distance, language_loss, largest_difference, rows_of_text, sam_by_hand
from tests.conftest import same_bits
from tests.distributed import mesh_of, run, whole
from tests.tiny import build

RHO = 0.05
LLAMA = ["q_proj", "v_proj", "up_proj"]


def lora(kind: str = "llama", dtype: torch.dtype = torch.float64, live: bool = True, **options: Any) -> Any:
    """A tiny model with adapters; `live` ones are not at zero, where gradients of A vanish."""
    targets = LLAMA if kind == "llama" else ["c_attn", "c_fc"]
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=targets, fan_in_fan_out=kind == "causal", **options)
    torch.manual_seed(11)
    model = peft.get_peft_model(build(kind, dtype=dtype), config)
    if live:
        for name, p in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(p, std=0.05)
    return model.train()


def trained(model: nn.Module) -> list[Tensor]:
    return [p for p in model.parameters() if p.requires_grad]


def windows(steps: int, size: int = 4) -> list[list[Tensor]]:
    return [[rows] for rows in rows_of_text(steps * size).split(size)]


def dense(
    model: Any, base: nn.Module, extra: dict[str, Tensor] | None = None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Leaves for all adapters' matrices, and the base model's weights with s B A (and `extra`) added from them."""
    leaves, weights = {}, dict(base.named_parameters())
    for name, layer in model.base_model.model.named_modules():
        if not hasattr(layer, "lora_A"):
            continue
        key = f"{name}.weight"
        transposed = layer.fan_in_fan_out
        for adapter in layer.active_adapters:
            a, b = (m[adapter].weight.detach().clone().requires_grad_() for m in (layer.lora_A, layer.lora_B))
            leaves[f"{name}.lora_A.{adapter}.weight"], leaves[f"{name}.lora_B.{adapter}.weight"] = a, b
            added = layer.scaling[adapter] * (b @ a)
            weights[key] = weights[key] + (added.T if transposed else added)
        if extra is not None:
            weights[key] = weights[key] + extra[name]
    return leaves, weights


# -- SAM and R3F --------------------------------------------------------------------------------------------------------


def test_sam_on_adapters_is_the_loop_by_hand() -> None:
    model = lora(live=False)
    reference = copy.deepcopy(model)
    opt = SAM(trained(model), torch.optim.AdamW, rho=RHO, lr=1e-2)
    for [rows] in windows(20):
        language_loss(model, rows).backward()
        opt.first_step(zero_grad=True)
        language_loss(model, rows).backward()
        opt.second_step(zero_grad=True)
    losses = sam_by_hand(reference, windows(20), torch.optim.AdamW(trained(reference), lr=1e-2), RHO)
    assert losses[-1] < losses[0]
    assert distance(model, reference) <= 1e-9


def test_float32_adapters_on_bfloat16_weights_take_the_whole_perturbation() -> None:
    model = lora(dtype=torch.bfloat16)
    assert {p.dtype for p in trained(model)} == {torch.float32}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    opt = SAM(model.parameters(), torch.optim.AdamW, rho=RHO, lr=1e-2)  # all of them: frozen ones have no gradient
    language_loss(model, rows_of_text(4)).backward()
    opt.first_step(zero_grad=True)
    moved = {name: p.detach() - before[name] for name, p in model.named_parameters()}
    assert {name for name, d in moved.items() if d.any()} == {
        name for name, p in model.named_parameters() if p.requires_grad
    }
    assert float(torch.stack([d.double().norm() for d in moved.values()]).norm()) == pytest.approx(RHO, rel=1e-5)
    assert opt.report is not None
    assert float(opt.report.seen_gain) == pytest.approx(1, abs=1e-5)
    language_loss(model, rows_of_text(4)).backward()
    opt.second_step()
    for name, p in model.named_parameters():
        assert p.requires_grad or same_bits(p, before[name]), name


@pytest.mark.parametrize("fused", [False, True])
def test_r3f_on_adapters_is_the_loop_by_hand(fused: bool) -> None:
    model = lora(live=False)
    reference = copy.deepcopy(model)
    r3f = fastpost.R3F(eps=0.5, r3f_lambda=0.7, seed=40, fused_linear=fused)
    opt, plain = (torch.optim.AdamW(trained(m), lr=1e-2) for m in (model, reference))
    losses = []
    rows = rows_of_text(4)
    for step in range(8):
        out = r3f(model, input_ids=rows, labels=rows)
        out.loss.backward()
        opt.step()
        opt.zero_grad()
        losses.append(float(out.task_loss))

        table = reference.get_input_embeddings()(rows)
        noised = fastpost.add_noise(table, 0.5, seed=seed_of(40, step))
        a, b = (reference(inputs_embeds=e).logits[:, :-1].flatten(0, 1) for e in (table, noised))
        p, q = (v.log_softmax(-1) for v in (a, b))
        kl = ((p.exp() - q.exp()) * (p - q)).sum(-1).mean()
        (F.cross_entropy(a, rows[:, 1:].flatten()) + 0.7 * kl).backward()
        plain.step()
        plain.zero_grad()
    assert losses[-1] < losses[0]
    assert distance(model, reference) <= 1e-7


# -- Flat-LoRA ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "causal"])
def test_flat_lora_is_its_equations(kind: str) -> None:
    model = lora(kind)
    base = build(kind, dtype=torch.float64)
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    opt = torch.optim.SGD(trained(model), lr=0.3)
    losses, ramp, draws = [], [], []
    with FlatLoRA(model, sigma=0.4, total_steps=8, seed=5) as flat:
        flat.attach(opt)
        for step, [rows] in enumerate(windows(10)):
            sigma = 0.4 * (1 - math.cos(math.pi * min(step / 8, 1))) / 2
            ramp.append(sigma)
            assert flat.sigma_now == pytest.approx(sigma, abs=1e-15)
            extra = {}
            layers = [(name, m) for name, m in model.base_model.model.named_modules() if hasattr(m, "lora_A")]
            for number, (name, layer) in enumerate(layers):
                transposed = layer.fan_in_fan_out
                merged = layer.get_base_layer().weight.detach() + layer.get_delta_weight("default").detach()
                merged = merged.T if transposed else merged
                z = fastpost.add_noise(torch.zeros_like(merged), 1.0, "normal", seed=seed_of(5, step, number))
                draws.append(z.flatten())
                noise = sigma * merged.norm(dim=1, keepdim=True) / math.sqrt(merged.shape[1]) * z
                extra[name] = noise.T if transposed else noise
            leaves, weights = dense(model, base, extra)
            loss = torch.func.functional_call(base, weights, (), {"input_ids": rows, "labels": rows}).loss
            expected = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))

            language_loss(model, rows).backward()
            for name, p in model.named_parameters():
                if p.requires_grad:
                    wanted = expected[name.removeprefix("base_model.model.")]
                    assert float((p.grad - wanted).abs().max()) <= 1e-10 * float(wanted.abs().max()), name
            with torch.no_grad():  # a second look sees the same noise
                assert float(language_loss(model, rows)) == pytest.approx(float(loss.detach()), rel=1e-11)
            opt.step()
            opt.zero_grad()
            losses.append(float(loss.detach()))
    assert ramp[0] == 0 < ramp[4] < ramp[8] == ramp[9] == 0.4
    drawn = torch.cat(draws)
    assert float(drawn.mean().abs()) < 5 / math.sqrt(drawn.numel())
    assert float(drawn.var()) == pytest.approx(1, abs=10 / math.sqrt(drawn.numel()))
    assert all(same_bits(p, frozen[name]) for name, p in model.named_parameters() if name in frozen)


def test_flat_lora_of_the_next_seed_is_not_one_step_ahead() -> None:
    losses = []
    for seed, step in ((0, 1), (1, 0), (0, 1)):
        model = lora()
        with FlatLoRA(model, sigma=0.4, seed=seed) as flat:
            flat.step = step
            losses.append(float(language_loss(model, rows_of_text(4)).detach()))
    assert losses[0] == losses[2] != losses[1]


@pytest.mark.parametrize("fused", [False, True])
def test_flat_lora_counts_no_step_that_overflowed(fused: bool) -> None:
    """A fused optimizer's step() is called then as well, and does nothing."""
    model = lora(dtype=torch.float32)
    opt = torch.optim.AdamW(trained(model), lr=0.1, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    counted = []
    with FlatLoRA(model, sigma=0.4) as flat:
        flat.attach(opt)
        for factor in (1.0, float("inf"), 1.0):
            before = [p.detach().clone() for p in trained(model)]
            scaler.scale(language_loss(model, rows_of_text(4)) * factor).backward()
            scaler.step(opt)
            scaler.update()
            opt.zero_grad()
            moved = largest_difference(zip(trained(model), before, strict=True)) > 0
            assert moved == math.isfinite(factor)
            counted.append(flat.step)
    assert counted == [1, 1, 2]


def test_flat_lora_trains_and_is_off_where_it_should_be() -> None:
    model = lora(live=False)
    rows = rows_of_text(4)
    with torch.no_grad():
        clean = float(language_loss(model, rows))
    opt = torch.optim.AdamW(trained(model), lr=2e-2)
    with FlatLoRA(model, sigma=0.1) as flat:
        flat.attach(opt)
        with torch.no_grad():
            assert float(language_loss(model, rows)) != clean
            with model.disable_adapter():
                assert float(language_loss(model, rows)) == clean
            model.eval()
            assert float(language_loss(model, rows)) == clean
            model.train()
        model.base_model.model.activation_checkpointing_enable()
        model.enable_input_require_grads()
        for _ in range(20):
            language_loss(model, rows).backward()
            opt.step()
            opt.zero_grad()
        assert flat.step == 20
    with torch.no_grad():
        assert float(language_loss(model, rows)) < clean - 0.3
    opt.step()
    assert flat.step == 20


def test_flat_lora_under_autocast_and_in_bfloat16() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model = lora(dtype=dtype)
        with FlatLoRA(model, sigma=0.05), torch.autocast("cpu", torch.bfloat16):
            language_loss(model, rows_of_text(4)).backward()
        assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in trained(model))
        assert sum(float(p.grad.norm()) for p in trained(model)) > 0


def test_flat_lora_refusals() -> None:
    with pytest.raises(TypeError, match="PeftModel"):
        FlatLoRA(build("llama"))
    with pytest.raises(ValueError, match="sigma"):
        FlatLoRA(lora(), sigma=-0.1)
    with pytest.raises(ValueError, match="total_steps"):
        FlatLoRA(lora(), total_steps=0)
    with pytest.raises(TypeError, match="no plain LoRA"):
        FlatLoRA(lora(use_dora=True))
    model = lora()
    with FlatLoRA(model), pytest.raises(ValueError, match="replaced already"):
        FlatLoRA(model)
    FlatLoRA(model).remove()
    model.base_model.model.model.layers[0].self_attn.q_proj.base_layer.weight.requires_grad_(True)
    with pytest.raises(ValueError, match="trains"):
        FlatLoRA(model)


# -- adapters added after sharding --------------------------------------------------------------------------------------


def _with_adapters(sharded: bool) -> Any:
    base: Any = build("llama", dtype=torch.float64)
    if sharded:
        mesh = mesh_of(dist.get_world_size())
        for layer in base.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(base, mesh=mesh)
    torch.manual_seed(11)
    model: Any = peft.get_peft_model(base, peft.LoraConfig(r=3, target_modules=LLAMA)).train()
    for name, p in model.named_parameters():
        if "norm" in name:
            p.requires_grad_(True)
    return model


def adapters_after_sharding() -> float:
    """Plain adapters beside sharded norms in one optimizer, on half of each batch, against one process on all of it."""
    rank, world = dist.get_rank(), dist.get_world_size()
    alone, model = _with_adapters(sharded=False), _with_adapters(sharded=True)
    opt = SAM(trained(model), torch.optim.AdamW, rho=RHO, lr=1e-2)
    plain = [p for p in trained(model) if not fastpost.distributed.is_sharded(p)]
    assert 0 < len(plain) < len(trained(model))

    def backward(rows: Tensor) -> None:
        language_loss(model, rows.chunk(world)[rank]).backward()
        for p in plain:  # FSDP2 knows nothing of these
            dist.all_reduce(p.grad)
            p.grad.div_(world)

    for [rows] in windows(5):
        backward(rows)
        opt.first_step(zero_grad=True)
        backward(rows)
        opt.second_step(zero_grad=True)
    losses = sam_by_hand(alone, windows(5), torch.optim.AdamW(trained(alone), lr=1e-2), RHO)
    assert losses[-1] < losses[0]
    return largest_difference((whole(p), q) for p, q in zip(model.parameters(), alone.parameters(), strict=True))


def noise_on_sharded_weights() -> float:
    """Flat-LoRA over FSDP2: the loss of one process, and nothing left in the shards."""
    rows = rows_of_text(4)
    alone, model = _with_adapters(sharded=False), _with_adapters(sharded=True)
    found = []
    for each in (alone, model):
        with FlatLoRA(each, sigma=0.3, seed=3):
            loss = language_loss(each, rows)
            loss.backward()
        grads = {name: whole(p.grad) for name, p in each.named_parameters() if p.grad is not None}
        found.append((loss.detach(), grads))
    (expected, wanted), (ours, got) = found
    clean = language_loss(alone, rows).detach()
    assert abs(float(expected - clean)) > 1e-3
    assert wanted.keys() == got.keys()
    kept = [(whole(p), q) for p, q in zip(model.parameters(), alone.parameters(), strict=True)]
    return largest_difference([(ours, expected), *((got[name], g) for name, g in wanted.items()), *kept])


def sharded_adapters_are_refused() -> None:
    model = lora()
    bi = BiLoRA(model)
    for layer in model.base_model.model.model.layers:
        fully_shard(layer, mesh=mesh_of(dist.get_world_size()))
    for attempt in (bi.project, lambda: BiLoRA(model, auxiliary="another")):
        with pytest.raises(TypeError, match="the adapters are sharded"):
            attempt()


def test_adapters_added_after_sharding() -> None:
    cases = {"adapters": adapters_after_sharding, "noise": noise_on_sharded_weights, "refused": sharded_adapters_are_refused}
    outcome = run(2, cases)
    outcome.of("refused")
    assert outcome.worst("adapters") <= 1e-9
    assert outcome.worst("noise") <= 1e-12


def test_flat_lora_leaves_layers_without_an_active_adapter_alone() -> None:
    model = lora()
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["o_proj"]))
    rows = rows_of_text(2)
    plain = model(input_ids=rows).logits
    with FlatLoRA(model, sigma=0.05):
        noised = model(input_ids=rows).logits
    assert not torch.equal(noised, plain)
    assert torch.equal(model(input_ids=rows).logits, plain)


@pytest.mark.parametrize("how", ["loaded", "assigned", "data", "in place"])
def test_flat_lora_follows_base_weights_that_change(how: str) -> None:
    """The noise is that of the weights as they are, as a fresh FlatLoRA draws it, bit for bit."""
    model, rows = lora(), rows_of_text(4)
    flat = FlatLoRA(model, sigma=0.5)
    before = language_loss(model, rows).detach()
    frozen = {name: 3 * p.detach() for name, p in model.named_parameters() if not p.requires_grad}
    if how in ("loaded", "assigned"):
        model.load_state_dict(frozen, strict=False, assign=how == "assigned")
    with torch.no_grad():
        for p in (p for p in model.parameters() if not p.requires_grad):
            if how == "data":
                p.data.mul_(3)
            elif how == "in place":
                p.mul_(3)
    after = language_loss(model, rows).detach()
    flat.remove()
    FlatLoRA(model, sigma=0.5)
    assert same_bits(after, language_loss(model, rows).detach())
    assert not torch.equal(after, before)


def by_trained(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(trained(model), lr=0.3)


METHODS: dict[str, tuple[Callable[[Any], Any], Callable[[Any, Any], torch.optim.Optimizer]]] = {
    "bi": (lambda m: BiLoRA(m, rho=0.5), lambda m, method: torch.optim.SGD(method.param_groups(lr=0.3))),
    "eflat": (lambda m: EFlatLoRA(m, rho=0.5), lambda m, _: by_trained(m)),
    "flat": (lambda m: FlatLoRA(m, sigma=0.5), lambda m, _: by_trained(m)),
}


def steps(model: Any, method: Any, opt: torch.optim.Optimizer, number: int) -> list[Tensor]:
    found = []
    for [rows] in windows(number):
        loss = language_loss(model, rows)
        found.append(loss.detach())
        loss.backward()
        opt.step()
        opt.zero_grad()
    return found


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("attached", [False, True])
def test_a_copy_of_a_model_computes_with_its_own_weights(name: str, attached: bool) -> None:
    """Copied alone, as AveragedModel does, and with its method, which then trains it as the original would be trained."""
    make, optimizer = METHODS[name]
    model, [[rows]] = lora(), windows(1)
    method = make(model)
    opt = optimizer(model, method)
    if attached:
        method.attach(opt)
        steps(model, method, opt, 2)
    here = language_loss(model, rows).detach()
    state = {key: t.clone() for key, t in model.state_dict().items()}

    average = torch.optim.swa_utils.AveragedModel(model)
    assert same_bits(language_loss(average, rows).detach(), here)
    twin, of_twin = copy.deepcopy((model, method))
    assert not {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in twin.parameters()}
    with torch.no_grad():
        for p in (p for module in (average, copy.deepcopy(model)) for p in module.parameters()):
            p.mul_(1.5)
    assert not torch.equal(language_loss(average, rows).detach(), here)
    assert same_bits(language_loss(model, rows).detach(), here)

    again = optimizer(twin, of_twin)
    of_twin.attach(again)
    if not attached:
        method.attach(opt)
    theirs = steps(twin, of_twin, again, 3)
    assert all(same_bits(t, state[key]) for key, t in model.state_dict().items())
    assert all(same_bits(a, b) for a, b in zip(steps(model, method, opt, 3), theirs, strict=True))
    of_twin.remove()
    assert not torch.equal(language_loss(twin, rows).detach(), language_loss(model, rows).detach())


class Attentive(nn.Module):
    """torch's own attention, for which PEFT adds B A to the weights."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.MultiheadAttention(6, 2)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("where", ["attention", "parameters"])
def test_adapters_whose_matrices_are_not_called_are_refused(name: str, where: str) -> None:
    config = peft.LoraConfig(target_modules=["q_proj"])
    if where == "parameters":
        config = peft.LoraConfig(target_modules=[], target_parameters=["q_proj.weight"])
    model = peft.get_peft_model(Attentive() if where == "attention" else build("llama"), config)
    with pytest.raises(TypeError, match="q_proj is no plain LoRA on a matrix"):
        METHODS[name][0](model)
    assert list(model.peft_config) == ["default"]


@pytest.mark.parametrize(
    "other",
    [
        {"target_modules": [], "target_parameters": ["o_proj.weight"]},
        {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True},
    ],
)
@pytest.mark.parametrize("name", METHODS)
def test_what_inactive_adapters_are_does_not_matter(name: str, other: dict[str, Any]) -> None:
    model, alone = lora(), lora()
    model.add_adapter("other", peft.LoraConfig(r=2, **other))
    rows = rows_of_text(2)
    for each in (model, alone):
        METHODS[name][0](each)
    assert torch.equal(model(input_ids=rows).logits, alone(input_ids=rows).logits)


def test_an_adapter_that_flat_lora_cannot_serve_may_not_become_active() -> None:
    model = lora()
    targets = next(iter(model.peft_config.values())).target_modules
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=targets, use_dora=True))
    flat = FlatLoRA(model, 0.5)
    model.set_adapter("other")
    with pytest.raises(TypeError, match=r"active now is no plain LoRA .*remove\(\)"):
        model(input_ids=rows_of_text(2))
    flat.remove()
    assert model(input_ids=rows_of_text(2)).logits.isfinite().all()


class Stranger:
    """A trainer or a logger, with hooks of its own on the optimizer."""

    def __init__(self) -> None:
        self.calls = 0

    def __deepcopy__(self, _: Any) -> Any:
        raise AssertionError("copied with a model that knows nothing of it")

    def hook(self, *_: Any) -> None:
        self.calls += 1


@pytest.mark.parametrize("name", METHODS)
def test_a_copy_leaves_the_optimizer_and_its_hooks_behind(name: str) -> None:
    make, optimizer = METHODS[name]
    model, stranger = lora(), Stranger()
    method = make(model)
    opt = optimizer(model, method)
    opt.register_step_pre_hook(stranger.hook)
    opt.register_step_post_hook(stranger.hook)
    method.attach(opt)
    steps(model, method, opt, 2)
    torch.optim.swa_utils.AveragedModel(model)
    twin, of_twin = copy.deepcopy((model, method))
    before = [t.clone() for t in twin.state_dict().values()]
    of_twin.remove()  # takes nothing off the original's optimizer
    assert len(opt._optimizer_step_pre_hooks) + len(opt._optimizer_step_post_hooks) == 3
    steps(model, method, opt, 1)
    assert stranger.calls == 6
    method.remove()
    assert len(opt._optimizer_step_pre_hooks) + len(opt._optimizer_step_post_hooks) == 2
    if name != "bi":  # which takes its second adapter away
        assert all(same_bits(a, b) for a, b in zip(twin.state_dict().values(), before, strict=True))

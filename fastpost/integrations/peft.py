"""Flatness for LoRA adapters at the price of plain training: Bi-LoRA, EFlat-LoRA and Flat-LoRA, over a PEFT model.

SAM and R3F themselves need nothing of this: see docs/peft.md.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from transformers.pytorch_utils import Conv1D

from fastpost.distributed import is_sharded
from fastpost.ops.params import check_radius
from fastpost.ops.perturbed import noised_linear
from fastpost.ops.scalars import check_real
from fastpost.rng import seed_of

try:
    from peft import LoraConfig, PeftModel
    from peft.tuners.lora import LoraLayer
    from peft.tuners.lora.layer import MultiheadAttention, ParamWrapper
except ImportError as error:
    raise ImportError("fastpost.integrations.peft needs peft: pip install 'fastpost[peft]'") from error


class _Method:
    """The handles of a method's hooks on optimizers.

    They hold all hooks of their optimizer, with whatever these are bound to: a copy of the method leaves them behind, and is
    attached anew.
    """

    def __init__(self) -> None:
        self._attached: list[RemovableHandle] = []

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_attached": []}

    def _detach(self) -> None:
        for hook in self._attached:
            hook.remove()
        self._attached = []


class BiLoRA(_Method):
    """Bi-LoRA: a second adapter carries SAM's perturbation, so that a step is one forward and one backward pass.

    The objective of Liu et al. (2508.19564) is the minimum over (A1, B1) of the maximum over |s B2 A2| <= rho of
    L(W + s B1 A1 + s B2 A2), the norm over all layers together. Both adapters are active in training; the loss is
    differentiated once, and with the same gradients

        (A1, B1) descends, (A2, B2) ascends, then both of A2, B2 are multiplied by (rho / |s B2 A2|)^1/2,

    which puts the norm at rho: as in SAM, the linearised maximum lies on the sphere. The paper's text says which adapter
    does what and that the norm is bounded; the last line is the projection taken here. B2 begins at 0, so that the
    first step is a plain one, and its ascent direction is the merged weight's gradient projected on A2, which SAM on A1 and
    B1 cannot reach.

    In eval mode the perturbation is off: the layers compute with the first adapter alone. Nothing is to be changed in a loop
    or trainer::

        model = get_peft_model(base, LoraConfig(...))
        bi = BiLoRA(model, rho=0.05)
        opt = torch.optim.AdamW(bi.param_groups(lr=1e-4))
        bi.attach(opt)                     # projects after each step
        ...                                # train
        bi.remove()                        # before saving or merging

    Args:
        model: a PeftModel whose adapter is LoRA on linear layers (no DoRA, no target_parameters), not sharded.
        rho: the perturbation's norm, >= 0, in the units of the merged weights.
        adapter: the adapter that is trained.
        auxiliary: a name for the other one.
        rank: its rank; None: the first one's.

    Raises:
        TypeError: not a PeftModel with LoRA; layers that have no product B A; trainable_token_indices.
        ValueError: a negative rho, no such adapter, the name is taken.
    """

    def __init__(
        self,
        model: PeftModel,
        rho: float = 0.05,
        *,
        adapter: str = "default",
        auxiliary: str = "bilora",
        rank: int | None = None,
    ) -> None:
        super().__init__()
        check_radius("BiLoRA", rho, 0.0)
        config = _lora_config("BiLoRA", model, adapter)
        if auxiliary in model.peft_config:
            raise ValueError(
                f"BiLoRA: the model has an adapter {auxiliary!r} already; remove() that one or pass another name"
            )
        if rank is not None and rank < 1:
            raise ValueError(f"BiLoRA: rank must be >= 1, not {rank}")
        if getattr(config, "trainable_token_indices", None):
            raise TypeError("BiLoRA: PEFT has no second adapter beside trainable_token_indices; leave these out")
        self.layers = [layer for _, layer in _lora_layers("BiLoRA", model, adapter)]
        for layer in self.layers:
            if is_sharded(layer.lora_A[adapter].weight):
                raise TypeError(
                    "BiLoRA: the adapters are sharded; keep them out of fully_shard (ignored_params), or use SAM"
                )
        self.model, self.rho, self.adapter, self.auxiliary = model, rho, adapter, auxiliary
        second: Any = copy.deepcopy(config)
        second.r = rank or config.r
        second.lora_alpha = config.lora_alpha * second.r / config.r
        if config.use_rslora:
            second.lora_alpha = config.lora_alpha * math.sqrt(second.r / config.r)
        second.lora_dropout, second.bias, second.modules_to_save = 0.0, "none", None
        second.lora_bias = second.ensure_weight_tying = False  # beside A and B nothing of it is trained
        second.modules_to_tie = None  # which PEFT has noted in the first one's
        second.layer_replication = None  # the layers are replicated by now
        second.init_lora_weights, second.inference_mode = True, False
        self._trained = [p for p in model.parameters() if p.requires_grad]
        try:
            # Not the subclass's: for classifiers that gives every adapter a head of its own.
            PeftModel.add_adapter(model, auxiliary, second)
            self._activate()
        except BaseException:
            if auxiliary in model.peft_config:
                model.delete_adapter(auxiliary)
            raise
        # Keyed by the layers, which a deepcopy of the model replaces here as well.
        self._scales = {layer: float(layer.scaling[auxiliary]) for layer in self.layers}
        self._hooks = [layer.register_forward_pre_hook(self._switch) for layer in self.layers]

    def _activate(self) -> None:
        tuner: Any = self.model.base_model
        tuner.set_adapter([self.adapter, self.auxiliary])
        for p in self._trained:  # set_adapter lets adapters train, and nothing else
            p.requires_grad_(True)

    def param_groups(self, lr: float, *, ascent_lr: float | None = None, **options: Any) -> list[dict[str, Any]]:
        """Two groups for a torch optimizer: what descends, and the second adapter, which ascends without weight decay.

        Args:
            lr: of all parameters that train, but for the second adapter.
            ascent_lr: of that; None: the same.
            **options: further entries of both groups.
        """
        second = self._second()
        ids = {id(p) for p in second}
        first = [p for p in self.model.parameters() if p.requires_grad and id(p) not in ids]
        up = {**options, "lr": lr if ascent_lr is None else ascent_lr, "maximize": True, "weight_decay": 0.0}
        return [{**options, "params": first, "lr": lr}, {**up, "params": second}]

    def attach(self, optimizer: Optimizer) -> None:
        """Projects after each step of the optimizer.

        Raises:
            ValueError: the second adapter is not in a group with `maximize=True`.
        """
        second = {id(p) for p in self._second()}
        for group in optimizer.param_groups:
            inside = {id(p) for p in group["params"]} & second
            if inside and (not group.get("maximize") or group.get("weight_decay")):
                raise ValueError(
                    "BiLoRA: the second adapter's group needs maximize=True and no weight decay; see param_groups()"
                )
            second -= inside
        if second:
            raise ValueError("BiLoRA: the optimizer lacks the second adapter; build it from param_groups()")
        self._attached.append(optimizer.register_step_post_hook(self._after_step))

    @torch.no_grad()
    def norm(self) -> Tensor:
        """|s B2 A2| over all layers together, float64; nothing waits for the device."""
        squared = []
        for layer in self.layers:
            _refuse_sharded(layer.lora_A[self.auxiliary].weight)  # maybe since it was made
            a, b = (_wide(m[self.auxiliary].weight) for m in (layer.lora_A, layer.lora_B))
            # |B A|^2 = tr(A^T B^T B A), without the product of full size
            squared.append(self._scales[layer] ** 2 * ((b.T @ b) * (a @ a.T)).sum().double())
        return torch.stack([s.to(squared[0].device) for s in squared]).sum().clamp(min=0).sqrt()

    @torch.no_grad()
    def project(self) -> None:
        """Puts the norm at rho; leaves a perturbation of nothing as it is."""
        norm = self.norm()
        factor = torch.where(norm > 0, (self.rho / norm).sqrt(), torch.ones_like(norm))
        for p in self._second():
            p.mul_(factor.to(p.device, p.dtype))

    def remove(self) -> None:
        """Takes the second adapter away; the first one is left, as trained."""
        self._detach()
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        if self.auxiliary in self.model.peft_config:
            self.model.delete_adapter(self.auxiliary)
            self.model.set_adapter(self.adapter)
            for p in self._trained:
                p.requires_grad_(True)

    def _second(self) -> list[Tensor]:
        return [m[self.auxiliary].weight for layer in self.layers for m in (layer.lora_A, layer.lora_B)]

    def _after_step(self, *_: Any) -> None:
        self.project()

    def _switch(self, layer: Any, _: Any) -> None:
        if layer.training and self.auxiliary not in layer.active_adapters:
            self._activate()  # a trainer that loads a checkpoint leaves the first adapter alone
        layer.scaling[self.auxiliary] = self._scales[layer] if layer.training else 0.0


class EFlatLoRA(_Method):
    """EFlat-LoRA: B is perturbed by a moving average of what SAM on the merged weight asks for (Deng et al. 2508.00522).

    A step is one forward and one backward pass, at B + E with E the average so far. From its gradients, of each layer and
    with ^+ for the pseudo-inverse,

        G = 1/2 (dL/dB (A^T)^+ + ((B + E)^T)^+ dL/dA) / s        the merged weight's gradient, as far as A and B know it
        E = (1 - beta) E + beta rho / |G| G A^+ / s               so that s E A is rho G / |G|, on the rows of A

    (eqs. 12 to 18; later versions call it EFMLoRA). The norm is each layer's own. E begins at 0, so that the first step is a
    plain one. G is never formed: all products are of rank 2r. E is added as the layers compute, and no weight is written, so
    that checkpoints and merged models hold B; in eval mode, with adapters disabled or merged, there is no E::

        eflat = EFlatLoRA(model, rho=0.05)
        opt = torch.optim.AdamW(model.parameters(), lr=1e-4)
        eflat.attach(opt)                  # reads the gradients before each step
        ...                                # train
        eflat.remove()

    Gradients are read as the optimizer gets them: summed over micro-batches and ranks; a factor on all of them (clipping, a
    loss scale) changes nothing. To resume, load `state_dict()`.

    Args:
        model: a PeftModel whose adapter is LoRA on linear layers (no DoRA, no target_parameters), not sharded.
        rho: radius, >= 0, in the units of each merged weight; may be changed between steps, as the paper lets it fall.
        beta: share of the newest perturbation, in (0, 1).
        adapter: the adapter that is trained.

    Raises:
        TypeError: not a PeftModel with LoRA; layers that have no product B A, or whose A or B does not train; sharded ones.
        ValueError: a negative rho, beta out of range, no such adapter.
    """

    def __init__(self, model: PeftModel, rho: float = 0.05, *, beta: float = 0.9, adapter: str = "default") -> None:
        super().__init__()
        check_radius("EFlatLoRA", rho, 0.0)
        check_real("EFlatLoRA", "beta", beta)
        if not 0 < beta < 1:
            raise ValueError(f"EFlatLoRA: beta must lie in (0, 1), not {beta}")
        _lora_config("EFlatLoRA", model, adapter)
        self.rho, self.beta, self.adapter = rho, beta, adapter
        self._layers = dict(_lora_layers("EFlatLoRA", model, adapter))
        self._moved: dict[str, Tensor] = {}  # E of each layer, (out, r)
        for name, layer in self._layers.items():
            for w in self._matrices(layer):
                if is_sharded(w):
                    raise TypeError("EFlatLoRA: the adapters are sharded; keep them out of fully_shard, or use SAM")
                if not w.requires_grad:
                    raise TypeError(f"EFlatLoRA: A or B of {name} does not train, and its gradient is needed")
            if "forward" in vars(layer.lora_B[adapter]):
                raise ValueError(f"EFlatLoRA: the forward of {name}.lora_B has been replaced already")
        for name, layer in self._layers.items():
            module = layer.lora_B[adapter]
            module.forward = functools.partial(self._forward, name, module)

    def attach(self, optimizer: Optimizer) -> None:
        """Reads the gradients before each step of the optimizer, or after the closure that makes them in its step.

        A closure that runs several times in a step (LBFGS, SAM) runs at one E each time, and the last gradients count.

        Raises:
            ValueError: the optimizer does not hold the adapter.
        """
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if any(id(w) not in held for layer in self._layers.values() for w in self._matrices(layer)):
            raise ValueError("EFlatLoRA: the optimizer lacks matrices of the adapter")
        self._attached.append(optimizer.register_step_pre_hook(self._before_step))

    @torch.no_grad()
    def update(self) -> None:
        """Takes the gradients present into E; layers without one keep theirs, as do those where it is not finite."""
        for name, layer in self._layers.items():
            a, b = self._matrices(layer)
            if a.grad is None or b.grad is None:
                continue
            ga, gb, s = _wide(a.grad), _wide(b.grad), float(layer.scaling[self.adapter])
            before = self._moved.get(name, torch.zeros_like(gb))
            right = torch.linalg.pinv(_wide(a))  # (in, r)
            left = torch.linalg.pinv(_wide(b) + before).T  # (out, r)
            # G = (gb right^T + left ga) / 2s = U V / 2s, of which |U V|^2 = <U^T U, V V^T>
            u, v = torch.cat((gb, left), 1), torch.cat((right.T, ga))
            norm = ((u.T @ u).double() * (v @ v.T).double()).sum().clamp(min=0).sqrt()
            unit = torch.where(norm > 0, u @ (v @ right) / norm.to(u.dtype), torch.zeros_like(gb))
            now = (1 - self.beta) * before + self.beta * self.rho / s * unit
            self._moved[name] = torch.where(torch.isfinite(norm), now, before)

    def state_dict(self) -> dict[str, Tensor]:
        """E of each layer, by the layer's name; zeros where there is none yet."""
        state = {}
        for name, layer in self._layers.items():
            e = self._moved.get(name)
            state[name] = torch.zeros_like(_wide(self._matrices(layer)[1])) if e is None else e.clone()
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Goes on from a `state_dict()`.

        Raises:
            TypeError: not a mapping of tensors.
            ValueError: it is of another model, lacks a layer, or is not finite. Nothing is loaded then.
        """
        if not isinstance(state, Mapping):
            raise TypeError(f"EFlatLoRA: load_state_dict() takes what state_dict() returned, not {type(state).__name__}")
        for name, e in state.items():
            if not isinstance(e, Tensor) or not e.is_floating_point():
                found = e.dtype if isinstance(e, Tensor) else type(e).__name__
                raise TypeError(f"EFlatLoRA: E of {name} must be a tensor in floating point, not {found}")
            if name not in self._layers or e.shape != self._matrices(self._layers[name])[1].shape:
                raise ValueError(f"EFlatLoRA: the state has E of {name}, {tuple(e.shape)}, which is no layer of this model")
            if not bool(e.isfinite().all()):
                raise ValueError(f"EFlatLoRA: E of {name} in the state is not finite; load an older state")
        missing = [name for name in self._layers if name not in state]
        if missing:
            shown = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
            raise ValueError(
                f"EFlatLoRA: the state lacks E of {len(missing)} of {len(self._layers)} layers ({shown}); load what "
                "state_dict() returned, or build a fresh EFlatLoRA to begin at E = 0"
            )
        wide = {name: self._matrices(self._layers[name])[1] for name in state}
        self._moved = {name: e.to(wide[name].device, _wide(wide[name]).dtype, copy=True) for name, e in state.items()}

    def remove(self) -> None:
        """The layers compute with B again."""
        for layer in self._layers.values():
            vars(layer.lora_B[self.adapter]).pop("forward", None)
        self._detach()
        self._layers, self._moved = {}, {}

    def _before_step(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        named = "closure" in kwargs
        closure = kwargs["closure"] if named else args[1] if len(args) > 1 else None  # args begin with the optimizer
        if closure is None:
            self.update()
            return None
        start = self._moved

        def closure_and_update() -> Any:
            self._moved = dict(start)
            loss = closure()
            self.update()
            return loss

        if named:
            return args, {**kwargs, "closure": closure_and_update}
        return (args[0], closure_and_update, *args[2:]), kwargs

    def _matrices(self, layer: Any) -> tuple[Tensor, Tensor]:
        return layer.lora_A[self.adapter].weight, layer.lora_B[self.adapter].weight

    def _forward(self, name: str, module: Any, x: Tensor) -> Tensor:
        e = self._moved.get(name)
        if e is None or not module.training:
            plain: Tensor = type(module).forward(module, x)
            return plain
        return nn.functional.linear(x, module.weight + e.to(module.weight), module.bias)


class FlatLoRA(_Method):
    """Flat-LoRA: each training step sees the merged weights under Gaussian noise of its own (Li et al. 2409.14396).

    Minimised over the adapters is the expectation of L(W' + e), W' = W + s B A, by one draw of e per step, with

        e_ij ~ N(0, sigma_t^2 |W'_i|^2 / n),   sigma_t = sigma (1 - cos(pi t / T)) / 2

    for row i (filter) of n weights; the ramp is left out (sigma_t = sigma) without `total_steps`. The row norms are taken as
    constants. The noise is a function of (seed, t, layer, element): layers draw it in the forward pass and draw it again in
    the backward pass, and keep one number per row in between. Nothing is ever written to W, so there is nothing to take off
    again, after an exception neither. All micro-batches of a step, and all ranks with one seed, see the same noise; in eval
    mode, with adapters disabled (a reference model) or merged, there is none::

        with FlatLoRA(model, sigma=0.05, total_steps=1000) as flat:
            flat.attach(opt)               # new noise after each step; by hand: flat.step += 1
            ...                            # train

    Args:
        model: a PeftModel with LoRA on linear layers (nn.Linear, transformers' Conv1D) in floating point, whose own weights
            are frozen. Where only inactive adapters have other layers, these are left alone.
        sigma: standard deviation of the noise relative to a row's root mean square, >= 0.
        total_steps: T; None: no ramp.
        seed: of the noise.

    Raises:
        TypeError: not a PeftModel with LoRA; a layer that it cannot serve (quantised, convolution, DoRA).
        ValueError: a negative sigma; base weights that train.
    """

    def __init__(self, model: PeftModel, sigma: float = 0.05, *, total_steps: int | None = None, seed: int = 0) -> None:
        super().__init__()
        if not (math.isfinite(sigma) and sigma >= 0):
            raise ValueError(f"FlatLoRA: sigma must be finite and >= 0, not {sigma}")
        if total_steps is not None and total_steps < 1:
            raise ValueError(f"FlatLoRA: total_steps must be >= 1, not {total_steps}")
        _lora_config("FlatLoRA", model, model.active_adapters[0] if isinstance(model, PeftModel) else "")
        self.sigma, self.total_steps, self.seed, self.step = sigma, total_steps, seed, 0
        self._layers: list[Any] = []
        found: list[Any] = []
        for name, layer in model.named_modules():
            if not isinstance(layer, LoraLayer):
                continue
            refusal = _noise_refusal(name, layer)
            if refusal is None:
                found.append(layer)  # also without an active adapter: it may get one by set_adapter
            elif _active(layer):
                raise refusal
        if not any(map(_active, found)):
            raise TypeError("FlatLoRA: the active adapters have no LoRA layer in the model")
        for number, layer in enumerate(found):
            base = layer.get_base_layer()
            base.forward = functools.partial(self._forward, layer, base, number)
            self._layers.append(base)

    @property
    def sigma_now(self) -> float:
        """sigma_t of this step."""
        if self.total_steps is None:
            return self.sigma
        return self.sigma * (1 - math.cos(math.pi * min(self.step / self.total_steps, 1.0))) / 2

    def attach(self, optimizer: Optimizer) -> None:
        """New noise after each step of the optimizer; none after one that a GradScaler skips.

        A fused optimizer under a GradScaler keeps on the device whether it skipped: there each step waits for it.
        """
        self._attached.append(optimizer.register_step_post_hook(self._advance))

    def remove(self) -> None:
        """The layers compute with W again."""
        for base in self._layers:
            vars(base).pop("forward", None)
        self._detach()
        self._layers = []

    def __enter__(self) -> FlatLoRA:
        return self

    def __exit__(self, *_: Any) -> None:
        self.remove()

    def _advance(self, optimizer: Optimizer, *_: Any) -> None:
        overflow = getattr(optimizer, "found_inf", None)  # of a GradScaler, which leaves it to fused optimizers to skip
        if overflow is None or not bool(overflow):
            self.step += 1

    def _forward(self, layer: Any, base: Any, number: int, x: Tensor) -> Tensor:
        eps, active = self.sigma_now, _active(layer)
        if not base.training or eps == 0 or layer.disable_adapters or layer.merged or not active:
            plain: Tensor = type(base).forward(base, x)
            return plain
        if any(name in layer.lora_variant for name in active):  # another adapter than those that were looked at
            raise TypeError(
                "FlatLoRA: the adapter that is active now is no plain LoRA (DoRA, ...); remove() FlatLoRA before"
            )
        if is_sharded(base.weight):
            raise TypeError("FlatLoRA: tensor-parallel weights are not served")
        transposed = isinstance(base, Conv1D)
        scale = self._scale(layer, base.weight.T if transposed else base.weight)
        seed = seed_of(self.seed, self.step, number)
        return noised_linear(x, base.weight, base.bias, scale, eps, seed, transposed=transposed)

    @torch.no_grad()
    def _scale(self, layer: Any, weight: Tensor) -> Tensor:
        """Root mean square of each row of the merged weight, without merging: |w + b A|^2 = |w|^2 + 2 b.(A w) + |b A|^2."""
        wide = _wide(weight)
        own = wide.square().sum(1)  # anew, as weights may be loaded in between: little beside the noise
        names = _active(layer)
        a = torch.cat([layer.lora_A[name].weight for name in names]).to(wide.dtype)
        b = torch.cat([layer.lora_B[name].weight * layer.scaling[name] for name in names], 1).to(wide.dtype)
        cross = (b * (wide @ a.T)).sum(1)
        added = (b * (b @ (a @ a.T))).sum(1)
        return ((own + 2 * cross + added).clamp(min=0) / weight.shape[1]).sqrt()


def _wide(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))


def _refuse_sharded(weight: Tensor) -> None:
    if is_sharded(weight):
        raise TypeError(
            "BiLoRA: the adapters are sharded, and their norm is not taken over shards; shard the base model before "
            "get_peft_model, or use SAM"
        )


def _lora_config(who: str, model: Any, adapter: str) -> LoraConfig:
    if not isinstance(model, PeftModel):
        raise TypeError(f"{who}: model must be a PeftModel (peft.get_peft_model), not {type(model).__name__}")
    if adapter not in model.peft_config:
        raise ValueError(f"{who}: the model has no adapter {adapter!r}, only {', '.join(map(repr, model.peft_config))}")
    config = model.peft_config[adapter]
    if not isinstance(config, LoraConfig):
        raise TypeError(f"{who}: adapter {adapter!r} is {type(config).__name__}; only LoRA adds a product B A to weights")
    return config


def _lora_layers(who: str, model: Any, adapter: str) -> Iterator[tuple[str, Any]]:
    """The layers with an adapter, each with its name.

    Raises:
        TypeError: one of them is something else than W + s B A with matrices.
    """
    found = False
    for name, layer in model.named_modules():
        if not isinstance(layer, LoraLayer) or adapter not in layer.r:
            continue
        found = True
        if (refusal := _refusal(who, name, layer, [adapter])) is not None:
            raise refusal
        yield name, layer
    if not found:
        raise TypeError(f"{who}: the model has no LoRA layer")


def _refusal(who: str, name: str, layer: Any, adapters: Iterable[str]) -> TypeError | None:
    """The error for a layer where one of these adapters is something else than s B A with matrices; None where none is."""
    merges = isinstance(layer, MultiheadAttention | ParamWrapper)  # adds B A to weights, and calls no A, no B
    for adapter in adapters:
        matrices = [which[adapter].weight for which in (layer.lora_A, layer.lora_B) if adapter in which]
        if merges or adapter in layer.lora_variant or not matrices or any(m.ndim != 2 for m in matrices):
            return TypeError(
                f"{who}: {name} is no plain LoRA on a matrix (DoRA, embedding, convolution, nn.MultiheadAttention, "
                "target_parameters), so it has no layers A and B to act on; leave it out of the adapter, or use SAM"
            )
    return None


def _noise_refusal(name: str, layer: Any) -> TypeError | ValueError | None:
    """The error for a layer that Flat-LoRA cannot serve under its active adapters, or under all where none is; or None."""
    refusal = _refusal("FlatLoRA", name, layer, _active(layer) or layer.r)
    if refusal is not None:
        return refusal
    base = layer.get_base_layer()
    if not isinstance(base, nn.Linear | Conv1D) or not base.weight.is_floating_point():
        return TypeError(
            f"FlatLoRA: {name} is {type(base).__name__} in {base.weight.dtype}; only linear layers in floating "
            "point have weights to put noise on"
        )
    if base.weight.requires_grad:
        return ValueError(f"FlatLoRA: the weight of {name} trains; the noise is for frozen weights under adapters")
    if "forward" in vars(base):
        return ValueError(f"FlatLoRA: the forward of {name} has been replaced already, maybe by another FlatLoRA")
    return None


def _active(layer: Any) -> list[str]:
    return [name for name in layer.active_adapters if name in layer.r]

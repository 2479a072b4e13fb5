"""HyPe: noise on the hidden states before every layer (Yuan et al., ACL 2023, 2212.08853)."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fastpost.errors import unknown
from fastpost.modes import evaluating
from fastpost.ops.noise import check_noise
from fastpost.r3f.conventions import virtual_tokens
from fastpost.r3f.layout import Layout, layout_of, turned_if
from fastpost.r3f.model import R3FOutput
from fastpost.r3f.noise import Noise, find_embedding, is_encoder_decoder, kept
from fastpost.r3f.relatives.base import Call, Method


def find_layers(model: nn.Module, layers: Sequence[nn.Module | str] | None = None) -> dict[str, nn.Module]:
    """The transformer blocks of a model, by name: the members of its outermost ModuleLists of one kind of compound module.

    Args:
        model: any module. layers: the blocks themselves, or their dotted names; None finds them.

    Raises:
        ValueError: a name that does not exist, or nothing found. TypeError: neither module nor name.
    """
    modules = dict(model.named_modules())
    if layers is not None:
        names = {id(module): name for name, module in modules.items()}
        found = {}
        for layer in layers:
            if isinstance(layer, str):
                if layer not in modules:
                    raise unknown("layer", layer, [name for name in modules if name])
                found[layer] = modules[layer]
            elif isinstance(layer, nn.Module) and id(layer) in names:
                found[names[id(layer)]] = layer
            else:
                raise TypeError(f"HyPe: layers must be modules of the model or their names, not {type(layer).__name__}")
        if found:
            return found
        raise ValueError("HyPe: layers names none")
    lists: dict[str, nn.ModuleList] = {}
    for name, module in modules.items():
        inside = any(name.startswith(f"{outer}.") for outer in lists)
        if not isinstance(module, nn.ModuleList) or inside or len(module) == 0:
            continue
        if len({type(block) for block in module}) == 1 and any(module[0].children()):
            lists[name] = module
    if not lists:
        raise ValueError(
            f"HyPe: no stack of layers was found in {type(model).__name__}; pass layers=, modules or their names"
        )
    return {f"{name}.{i}": block for name, blocks in lists.items() for i, block in enumerate(blocks)}


class HyPe(Method):
    """Cross-entropy with noise on the hidden states that enter every layer: one pass, no KL (2212.08853).

        hype = HyPe(eps=1e-5, noise_type="normal")
        hype(model, **batch).loss.backward()

    Noise is drawn anew for every layer and call, added out of place in float32, never at padding; gradients flow through.
    `out.logits` are the noised pass's, `out.symm_kl` is 0. With eps = 0 it is plain cross-entropy, bit for bit.

    Args:
        eps: scale of the noise in the units of the hidden states, >= 0; 1e-5 to 1e-2 in the paper.
        noise_type: "normal" with standard deviation eps (HyPe-N), or "uniform" on (-eps, eps) (HyPe-U).
        layers: the blocks (modules or dotted names); None finds them by structure, in an encoder-decoder on both sides.
        dropout: True leaves the model's dropout as it is; False runs the pass with it off (the whole model in eval mode for
            the pass, modes put back), as the paper does, whose noise takes its place.
        options: `seed`, ...: as in `Method`. `embedding` shows by its token ids whether layers are given (time, batch),
            where their shape does not show it; it changes nothing else.

    Raises:
        ValueError: an option out of range; no layers found; gradient checkpointing, which runs layers a second time when the
            noise is gone. RuntimeError: none of the layers ran.
    """

    def __init__(
        self,
        eps: float = 1e-5,
        noise_type: str = "normal",
        *,
        layers: Sequence[nn.Module | str] | None = None,
        dropout: bool = True,
        **options: Any,
    ) -> None:
        self.eps, self.noise_type, self.layers, self.dropout = eps, noise_type, layers, dropout
        super().__init__(**options)

    def _check(self) -> None:
        check_noise("HyPe", self.eps, self.noise_type)

    def _train(self, call: Call) -> R3FOutput:
        if not isinstance(call.root, nn.Module):
            raise TypeError(f"HyPe: model must be a torch.nn.Module, not {type(call.root).__name__}")
        blocks = find_layers(call.root, self.layers)
        # Dropout off means eval mode, in which nothing is checkpointed.
        if self.dropout and any(getattr(module, "gradient_checkpointing", False) for module in call.root.modules()):
            raise ValueError(
                "HyPe: gradient checkpointing runs layers again in the backward pass, where their noise is gone; turn it "
                "off (model.gradient_checkpointing_disable())"
            )
        with contextlib.nullcontext() if self.dropout else evaluating(call.root):
            if self.eps == 0:
                return self._plain(call, self._clean(call))
            stacks = self._stacks(call)
            if len(stacks) == 2 and self._window is not None:
                with self._named():
                    self._window.starts_both_sides()
            with contextlib.ExitStack() as entered:
                for stack in stacks:
                    entered.enter_context(self._counted(stack.noise, stack.side))
                noisy = entered.enter_context(_NoisyLayers(blocks, stacks, self._embedding(call.root)))
                logits = self._clean(call)
        if noisy.calls == 0:
            raise RuntimeError(f"HyPe: none of the layers {', '.join(blocks)} ran in the forward pass, so no noise entered")
        return self._plain(call, logits)

    def _embedding(self, root: nn.Module) -> nn.Module | None:
        """The module that shows, by the token ids it is given, in which order the layers get a batch."""
        try:
            return find_embedding(root, self.embedding)[1]
        except ValueError:
            return None

    def _stacks(self, call: Call) -> list[_Stack]:
        """The stacks of layers, whose tokens are counted apart; the last holds all layers that are in none before."""
        device = next((p.device for p in call.root.parameters()), call.labels.device)
        seed, mask = self._seed_on(device), call.attention_mask
        embeds = call.inputs.get("inputs_embeds")
        ids = embeds[..., 0] if isinstance(embeds, Tensor) else call.inputs.get("input_ids")

        def stack(side: str, prefix: str, mask: Tensor | None) -> _Stack:
            noise = Noise(self.eps, self.noise_type, seed, detach=False, measured=self._measured)
            return _Stack(side, prefix, noise, mask, ids if side == "encoder" else None, virtual_tokens(call.root))

        if not is_encoder_decoder(call.root):
            return [stack("encoder", "", mask)]
        encoder = call.root.get_encoder()
        name = next((name for name, module in call.root.named_modules() if module is encoder), "encoder")
        given = call.inputs.get("decoder_attention_mask")
        decoder: Tensor | None = given if isinstance(given, Tensor) else None
        if decoder is None and call.labels.ndim == 2:
            # The target's end is its last label that counts; a label left out before it is no padding.
            counts = (call.labels != self.ignore_index).long()
            decoder = counts.flip(-1).cumsum(-1).flip(-1)
        elif decoder is None:
            decoder = mask  # a classifier, which gives its decoder the encoder's tokens
        return [stack("encoder", f"{name}.", mask), stack("decoder", "", decoder)]


@dataclass
class _Stack:
    """Layers of one side of a model.

    Attributes:
        side: "encoder" or "decoder". prefix: what their names begin with.
        noise: theirs. mask: 0 where there is padding, or None. ids: that the side reads, or None.
        virtual: how many learned tokens PEFT may have put before the text; they get no noise, nor are they counted.
        seen: shapes of ids that the embedding was given in this pass, and whether they are (time, batch).
    """

    side: str
    prefix: str
    noise: Noise
    mask: Tensor | None
    ids: Any
    virtual: int
    seen: dict[torch.Size, bool] = field(default_factory=dict)

    def time_first(self, hidden: Tensor, layout: Layout) -> bool:
        """`Layout.time_first` of the hidden states, which have their order from the embedding.

        A model may turn them behind the embedding. In a square batch that shows only by what the layer got before.
        """
        rows = hidden.shape[:2]
        turned = self.seen.get(rows)
        if turned is None or (not turned and rows[0] == rows[-1]):
            return layout.time_first(hidden, self.ids)
        return turned

    def keep(self, rows: Tensor) -> Tensor | None:
        """Which of the hidden states (batch, time, width) get noise, bool; None: all."""
        mask, begins = self.mask, self.virtual
        if begins and isinstance(self.ids, Tensor) and rows.shape[:-1] == (len(self.ids), self.ids.shape[-1] + begins):
            mask = torch.ones_like(self.ids) if mask is None or mask.shape != self.ids.shape else mask
            mask = nn.functional.pad(mask, (begins, 0))
        return kept(rows[..., 0], mask, None)


class _NoisyLayers:
    """While open, the hidden states that enter the blocks carry noise, other numbers at every call."""

    def __init__(self, blocks: dict[str, nn.Module], stacks: list[_Stack], embedding: nn.Module | None) -> None:
        self.blocks, self.stacks, self.embedding = blocks, stacks, embedding
        self.calls = 0
        self._undo: list[Any] = []

    def __enter__(self) -> _NoisyLayers:
        if self.embedding is not None:
            self._undo.append(self.embedding.register_forward_pre_hook(self._look(self.embedding), with_kwargs=True))
        for name, block in self.blocks.items():
            stack = next(stack for stack in self.stacks if name.startswith(stack.prefix))
            self._undo.append(block.register_forward_pre_hook(self._hook(stack, layout_of(block)), with_kwargs=True))
        return self

    def __exit__(self, *_: object) -> None:
        while self._undo:
            self._undo.pop().remove()

    def _look(self, embedding: nn.Module) -> Any:
        layout, stack = layout_of(embedding), self.stacks[0]  # the one that reads the batch's ids

        def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            ids = args[0] if args else next(iter(kwargs.values()), None)
            if isinstance(ids, Tensor) and ids.ndim > 1 and ids.shape[:2] not in stack.seen:
                stack.seen[ids.shape[:2]] = layout.time_first(ids, stack.ids)

        return look

    def _hook(self, stack: _Stack, layout: Layout) -> Any:
        def add(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
            hidden = args[0] if args else kwargs.get("hidden_states")
            if not isinstance(hidden, Tensor) or not hidden.dtype.is_floating_point:
                raise TypeError(f"HyPe: {type(module).__name__} was not given hidden states first; pass other layers=")
            turned = stack.time_first(hidden, layout)
            rows = turned_if(turned, hidden)
            noised = turned_if(turned, stack.noise.add(rows, stack.keep(rows), self.calls))
            self.calls += 1
            return ((noised, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": noised})

        return add

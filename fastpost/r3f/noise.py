"""Noise at the output of a model's input embedding, for one forward pass; long, as noise and its hook make one mechanism.

A forward hook reaches the embedding through any wrapper (DDP, FSDP2, PEFT, a compiled module) and needs no cooperation from
the model. fairseq's criteria call the embedding themselves and hand its output back in, which few models accept and FSDP2
refuses.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from fastpost.distributed import unwrap
from fastpost.errors import unknown
from fastpost.ops.autograd import traced
from fastpost.ops.noise import add_noise, asks_for_gradient, embedding_noise
from fastpost.r3f.layout import layout_of, turned_if

SCALES = ("absolute", "relative", "neftune")

BOUNDARIES = ("cu_seq_lens", "cu_seqlens")  # inputs whose names start so say where packed sequences begin
CALL = 1 << 40  # from one call's seed to the next one's (an embedding that runs twice, layers)


def is_encoder_decoder(model: Any) -> bool:
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def find_embedding(model: Any, embedding: nn.Module | str | None = None, side: str = "encoder") -> tuple[str, nn.Module]:
    """The module whose output gets noise, and its name.

    Args:
        model: any module; wrappers are looked through.
        embedding: the module itself, its dotted name, or None for `model.get_input_embeddings()`; of an
            encoder-decoder, that of one side.
        side: "encoder" (as in fairseq, where only the source is noised) or "decoder".

    Raises:
        TypeError: `embedding` is neither module, name nor None.
        ValueError: no such module, or the model does not tell its input embedding.
    """
    model = unwrap(model)
    modules = dict(model.named_modules()) if isinstance(model, nn.Module) else {}
    if isinstance(embedding, str):
        if embedding not in modules:
            raise unknown("embedding", embedding, _embeddings(modules) or list(modules))
        return embedding, modules[embedding]
    if isinstance(embedding, nn.Module):
        return next((name for name, module in modules.items() if module is embedding), "embedding"), embedding
    if embedding is not None:
        raise TypeError(f"R3F: embedding must be a module, a module's name or None, not {type(embedding).__name__}")
    owner = model
    if is_encoder_decoder(model) and callable(getattr(model, f"get_{side}", None)):
        owner = getattr(model, f"get_{side}")()
    found = None
    if callable(getattr(owner, "get_input_embeddings", None)):
        try:
            found = owner.get_input_embeddings()
        except NotImplementedError:  # transformers' answer where the attribute has an unusual name
            found = None
    if not isinstance(found, nn.Module):
        names = ", ".join(repr(name) for name in _embeddings(modules)) or "none"
        raise ValueError(
            f"R3F: {type(model).__name__} has no get_input_embeddings(), so noise has no place to enter. Pass embedding= (a "
            f"module or its name); nn.Embedding modules of this model: {names}."
        )
    return next((name for name, module in modules.items() if module is found), type(found).__name__), found


def refuse_neftune(root: Any) -> None:
    """Raises ValueError where transformers adds NEFTune's noise to the embeddings: other numbers in each of the passes that
    are compared, and far larger than R3F's."""
    try:
        module = root.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return
    if getattr(module, "neftune_noise_alpha", None):
        raise ValueError(
            f"R3F: neftune_noise_alpha={module.neftune_noise_alpha:g} adds NEFTune's noise to every pass, which would be "
            "measured in place of the method's own; leave it out (R3F(noise_scale='neftune') or "
            "fastpost.r3f.relatives.NEFTune scale noise as NEFTune does)"
        )


def _embeddings(modules: Mapping[str, nn.Module]) -> list[str]:
    return [name for name, module in modules.items() if isinstance(module, nn.Embedding)]


@dataclass
class Noise:
    """What is added in one step.

    Attributes:
        eps: scale, in the units of the embedding module's output.
        noise_type: "uniform" or "normal".
        seed: int64 scalar tensor.
        detach: the noised branch sends no gradient into the embedding (fairseq's classifier).
        scale: what eps is multiplied by: "absolute": 1; "relative": the root mean square of the row; "neftune":
            1 / sqrt(L * d), L the tokens of the row's own sequence and d its width.
        offset: how many tokens of the step came before this batch, an integer or int64 scalar tensor.
        sequences: int64 (batch, time), the number of each position's sequence within its row, for packed rows; None: a row
            is a sequence.
        counted: how many tokens got noise in the first call, as `offset` counts them; None before it.
        measured: dtypes whose resolution has been compared with eps; shared from step to step, so that a warning comes once.
    """

    eps: float
    noise_type: str
    seed: Tensor
    detach: bool = True
    measured: set[torch.dtype] = field(default_factory=set)
    scale: str = "absolute"
    offset: int | Tensor = 0
    sequences: Tensor | None = None
    counted: int | Tensor | None = None

    def _drawn(self, x: Tensor, keep: Tensor | None, call: int) -> dict[str, Any]:
        """Seed, token numbers and scales for rows like x (..., width)."""
        index = None
        if self.counted is None:
            self.counted = math.prod(x.shape[:-1]) if keep is None else keep.sum()
        if isinstance(self.offset, Tensor) or self.offset:
            kept_rows = torch.ones(x.shape[:-1], dtype=torch.bool, device=x.device) if keep is None else keep
            index = (kept_rows.reshape(-1).cumsum(0) - 1).reshape(kept_rows.shape) + self.offset
        return {"seed": self.seed + call * CALL, "token_index": index, "scale": self._scales(x, keep)}

    def _scales(self, x: Tensor, keep: Tensor | None) -> Tensor | None:
        if self.scale == "absolute":
            return None
        width = x.shape[-1]
        if self.scale == "relative":
            work = torch.promote_types(x.dtype, torch.float32)
            norm: Tensor = torch.linalg.vector_norm(x.detach(), dim=-1, dtype=work)
            scale: Tensor = norm / math.sqrt(width)
            return scale
        if x.ndim < 3:
            raise ValueError(f"R3F: noise_scale='neftune' needs embeddings (batch, time, width), not {tuple(x.shape)}")
        rows = x.shape[:-1]
        tokens = torch.ones(rows, device=x.device) if keep is None else keep.float()
        if self.sequences is None:
            length = tokens.sum(-1, keepdim=True).expand(rows)
        elif self.sequences.shape == rows:
            per_sequence = torch.zeros_like(tokens).scatter_add_(-1, self.sequences, tokens)
            length = per_sequence.gather(-1, self.sequences)
        else:
            raise ValueError(f"R3F: sequence ids have shape {tuple(self.sequences.shape)}, the embeddings {tuple(rows)}")
        scales: Tensor = (length.clamp(min=1) * width).rsqrt()
        return scales

    def add(self, x: Tensor, keep: Tensor | None, call: int = 0) -> Tensor:
        """x + noise, out of place, in float32 arithmetic.

        Args:
            x: (..., width) output of an embedding.
            keep: bool of shape x.shape[:-1], False at padding; None for no padding.
            call: how often the embedding ran before in this forward pass; each call gets numbers of its own.
        """
        drawn = self._drawn(x, keep, call)
        noised = add_noise(
            x.detach() if self.detach else x, self.eps, self.noise_type, keep=keep, out_dtype=handed_on(x), **drawn
        )
        self.measure(x, noised, keep, drawn)
        if self.detach and x.requires_grad and torch.is_grad_enabled() and not traced():
            return asks_for_gradient(noised)
        return noised

    def look_up(self, table: Tensor, ids: Tensor, keep: Tensor | None, padding_idx: int | None, call: int = 0) -> Tensor:
        """Rows of `table` for both halves of a double batch, (2 * B, ..., width), from one read of each row."""
        weights = table.detach()
        # Only a relative scale looks at values; the others at the shape.
        drawn = self._drawn(weights[ids] if self.scale == "relative" else weights[0].expand(*ids.shape, -1), keep, call)
        clean, noised = embedding_noise(
            table,
            ids,
            self.eps,
            self.noise_type,
            keep=keep,
            out_dtype=handed_on(table),
            padding_idx=padding_idx,
            detach_noised=self.detach,
            **drawn,
        )
        self.measure(clean, noised, keep, drawn)
        return torch.cat((clean, noised))  # in float32 where only the noised half is

    def measure(self, clean: Tensor, noised: Tensor, keep: Tensor | None, drawn: Mapping[str, Any]) -> None:
        """Warns, once per dtype, when what was stored is not the noise that was meant.

        Noise far below the last bit of an embedding value is rounded away in most places and blown up in a few, so R3F
        would go on with another perturbation than the one asked for. Reads two numbers from the device, in the first step.
        """
        if noised.dtype in self.measured or self.eps == 0:
            return
        self.measured.add(noised.dtype)
        with torch.no_grad():
            work = torch.promote_types(noised.dtype, torch.float32)
            zeros = torch.zeros_like(clean, dtype=work)
            meant = add_noise(zeros, self.eps, self.noise_type, keep=keep, **drawn).double()
            stored = noised.double() - clean.double()
            intended, norm, dot = float(meant.norm()), float(stored.norm()), float((stored * meant).sum())
            size = float(clean.double().square().mean().sqrt()) if clean.numel() else 0.0
        if intended == 0:  # nothing but padding
            return
        ratio, cosine = norm / intended, dot / (norm * intended) if norm else 0.0
        if cosine < 0.5 or not 0.5 <= ratio <= 2:
            resolution = torch.finfo(noised.dtype).eps
            enough = {"absolute": size * resolution, "relative": resolution}.get(self.scale)
            remedy = "a larger eps" if enough is None else f"eps of at least about {enough:.1g}"
            warnings.warn(
                f"R3F: eps={self.eps:g} is below what {str(noised.dtype).removeprefix('torch.')} resolves beside embedding "
                f"values of about {size:.2g}: the noise as stored has {ratio:.2f} times the norm that was meant and cosine "
                f"{cosine:.2f} with it. Keep the embedding in float32 (float32 weights under autocast), or use {remedy}."
            )


def handed_on(x: Tensor) -> torch.dtype:
    """The dtype in which a noised embedding goes on to the next module.

    Float32 and float64 stay, also under autocast. A 16-bit model refuses float32 activations, so there the sum is rounded
    once to the model's dtype; except under CUDA's autocast, whose layer norms take either (the CPU's do not).
    """
    if x.dtype.itemsize < 4 and x.is_cuda and torch.is_autocast_enabled("cuda"):
        return torch.float32
    return x.dtype


def sequence_numbers(inputs: Mapping[str, Any], rows: torch.Size) -> Tensor | None:
    """The number of each position's sequence within its row, for rows that hold several: int64 of shape `rows`, or None.

    A sequence begins where a given `sequence_ids` or `seq_idx` changes, where an attention mask changes (some packers number
    their sequences in it) or where `position_ids` do not count on.

    Raises:
        ValueError: the batch is packed (an attention mask of blocks, or cumulative lengths) and says nothing of these.
    """
    tells = {name: inputs[name] for name in ("sequence_ids", "seq_idx", "position_ids", "attention_mask") if name in inputs}
    tells = {k: t for k, t in tells.items() if isinstance(t, Tensor) and t.ndim == 2 and t.shape[-1] == rows[-1]}
    mask = inputs.get("attention_mask")
    packed = [name for name in inputs if name.startswith(BOUNDARIES)]
    if isinstance(mask, Tensor) and mask.ndim > 2:
        packed.append("an attention mask of blocks")
    if packed and not tells.keys() - {"attention_mask"}:
        raise ValueError(
            f"R3F: noise_scale='neftune' needs each sequence's length, and this batch is packed ({packed[0]}): add "
            "sequence_ids (batch, time), or position_ids that begin anew with each sequence"
        )
    if not tells:
        return None
    begins = torch.zeros(rows, dtype=torch.bool, device=next(iter(tells.values())).device)
    for name, t in tells.items():
        begins[:, 1:] |= t[:, 1:] != t[:, :-1] + (name == "position_ids")
    return begins.cumsum(-1)


def kept(ids: Tensor, attention_mask: Tensor | None, padding_idx: int | None) -> Tensor | None:
    """Which positions get noise: bool of ids' shape, or None for all.

    The attention mask decides where there is one for these ids. Otherwise the embedding's own padding_idx does; it comes
    second because language models often declare a real token (end of text) to be their padding.
    """
    if attention_mask is not None and attention_mask.ndim <= 3 and attention_mask.numel() == ids.numel():
        return attention_mask.reshape(ids.shape) != 0
    return None if padding_idx is None else ids != padding_idx


class NoisyEmbedding:
    """While open, a module's output carries noise. Everything is taken back on the way out, whatever happened inside.

    With `halves`, the batch is two copies of the same rows and only the second half gets noise. A plain nn.Embedding is
    then replaced for the time being: each row is read once and written twice. Any other embedding runs as it is, on both
    halves.

    The noise lands on the module's *output*. fairseq adds it before the model multiplies by sqrt(width); a module that
    scales inside itself (BART with scale_embedding, Gemma) therefore gets noise that is smaller by that factor, relative to
    its values, at the same eps. Where the model scales after the embedding (T5X-like code), it is as in fairseq.

    Args:
        module: the embedding; called with token ids as its first argument.
        noise: what to add.
        attention_mask: of the whole call; (batch, time) or None.
        ids: of the whole call, by which a module that is given them turned, (time, batch), is known; or None.
        halves: the call is a double batch.
        first_only: noise only at the module's first call in the forward pass (an encoder-decoder may share the module with
            its decoder, which runs second).
        second_only: only at its second.

    Attributes:
        runs: how often the module ran.
        calls: how often with noise.
    """

    def __init__(
        self,
        module: nn.Module,
        noise: Noise,
        attention_mask: Tensor | None = None,
        ids: Any = None,
        *,
        halves: bool = False,
        first_only: bool = False,
        second_only: bool = False,
    ) -> None:
        self.module, self.noise, self.attention_mask, self.ids = module, noise, attention_mask, ids
        self.halves, self.layout = halves, layout_of(module)
        self.only = 1 if first_only else 2 if second_only else None
        self.runs = self.calls = 0
        self._undo: list[Callable[[], None]] = []

    def __enter__(self) -> NoisyEmbedding:
        if self.halves and _plain(self.module):
            forward = self.module.forward

            def look_up(input: Tensor) -> Tensor:  # nn.Embedding.forward's own argument name
                if self._off():
                    result: Tensor = forward(input)
                    return result
                return self._both_halves(input)

            self.module.forward = look_up  # shadows the class's method; hooks of others still run around it
            self._undo.append(lambda: self.module.__dict__.pop("forward", None))
        else:
            self._undo.append(self.module.register_forward_hook(self._hook, with_kwargs=True).remove)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        while self._undo:
            self._undo.pop()()

    def require_called(self, name: str) -> None:
        """Raises RuntimeError where no noise entered; `name` is the module's."""
        if self.calls == 0:
            raise RuntimeError(
                f"R3F: the embedding module {name!r} ({type(self.module).__name__}) was not called in the forward pass, so "
                "no noise entered. Pass the module that embeds the input as embedding= (in a trainer r3f_embedding). "
                "A model compiled before its first R3F step may ignore hooks; "
                "torch._dynamo.config.skip_nnmodule_hook_guards = False makes it look."
            )

    def _off(self) -> bool:
        """Counts a run; whether it stays without noise."""
        self.runs += 1
        return self.only is not None and self.runs != self.only

    def _padding_idx(self) -> int | None:
        index = getattr(self.module, "padding_idx", None)
        return index if isinstance(index, int) else None

    def _mask(self) -> Tensor | None:
        mask = self.attention_mask
        return mask[: mask.shape[0] // 2] if self.halves and mask is not None else mask

    def _fit(self, ids: Tensor) -> Tensor | None:
        """Which of these ids (batch, time), of one half of a double batch, get noise.

        Where the model has padded them itself, the noise's `sequences` are padded as well.
        """
        mask = self._mask()
        if mask is not None and self.layout.padded_by_model(ids, self.ids, mask.shape[-1]):
            more = (0, ids.shape[1] - mask.shape[-1])
            mask, sequences = nn.functional.pad(mask, more), self.noise.sequences
            if sequences is not None and sequences.shape[-1] < ids.shape[1]:
                self.noise.sequences = nn.functional.pad(sequences, more)
        return kept(ids, mask, self._padding_idx())

    def _both_halves(self, ids: Tensor) -> Tensor:
        assert isinstance(self.module, nn.Embedding)
        turned = self.layout.time_first(ids, self.ids)
        ids = turned_if(turned, ids)
        ids = ids[: ids.shape[0] // 2]
        keep = self._fit(ids)
        both = self.noise.look_up(self.module.weight, ids, keep, self._padding_idx(), self.calls)
        self.calls += 1
        return turned_if(turned, both)

    def _hook(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if self._off():
            return output
        if not isinstance(output, Tensor) or not output.dtype.is_floating_point:
            raise TypeError(f"R3F: the embedding ({type(module).__name__}) must return a floating-point tensor")
        ids = args[0] if args else next(iter(kwargs.values()), None)
        if not isinstance(ids, Tensor) or ids.shape != output.shape[:-1]:
            ids = None  # no token ids to find padding by, as in a module that mixes features
        turned = ids is not None and self.layout.time_first(ids, self.ids)
        if ids is not None:
            ids, output = turned_if(turned, ids), turned_if(turned, output)
        clean = output
        if self.halves:
            clean, output = output.chunk(2)
            ids = None if ids is None else ids[: len(clean)]
        keep = None if ids is None else self._fit(ids)
        noised = self.noise.add(output, keep, self.calls)
        self.calls += 1
        noised = torch.cat((clean, noised)) if self.halves else noised
        return turned_if(turned, noised)


def _plain(module: nn.Module) -> bool:
    """Whether the module is a table look-up and nothing else."""
    return (
        type(module) is nn.Embedding
        and type(module.weight) in (nn.Parameter, Tensor)
        and "forward" not in module.__dict__
        and module.max_norm is None
        and not module.scale_grad_by_freq
        and not module.sparse
    )

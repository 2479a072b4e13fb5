"""The rows of the input embedding that one text reads: all that its ascent can move there."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


class EmbeddedText:
    """Differentiates by the rows that a text reads instead of by the whole table.

    A table of V rows has a dense gradient of V rows, all but those of the text's tokens zero; where it is also the head's
    weight, autograd fills and adds a second one. Here the looked-up vectors are leaves of the graph, and their gradients are
    summed per token by the kernel that torch uses itself, so the sums are the same bits.

    Args:
        embedding: a plain `nn.Embedding` (see `plain_embedding`).

    Attributes:
        leaves: what the lookups handed out the last time.
    """

    def __init__(self, embedding: nn.Embedding) -> None:
        self._embedding = embedding
        self.weight = embedding.weight
        self._rows: Tensor | None = None
        self.leaves: list[Tensor] = []
        self._read: list[Tensor] = []
        self._known: list[tuple[Tensor, int, Tensor]] = []  # ids read the first time, their version, their places in `rows`

    @property
    def rows(self) -> Tensor:
        """Those that are read, ascending, the padding's left out; known from the first `gradient` on.

        They need not be the text's alone: a model may put a token of its own before it.
        """
        assert self._rows is not None
        return self._rows

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """The embedding hands out leaves, noted in `leaves`; of the last time only."""
        self.leaves, self._read = [], []
        handle = self._embedding.register_forward_hook(self._looked_up, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def _looked_up(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        leaf = output.detach().requires_grad_()
        self.leaves.append(leaf)
        self._read.append(args[0] if args else kwargs["input"])
        return leaf.clone()  # a model may write into what it looked up

    @torch.no_grad()
    def gradient(self, gradients: tuple[Tensor | None, ...]) -> Tensor:
        """From the gradients of `leaves`, those of `rows`: (rows, width).

        Raises:
            RuntimeError: the model looks up rows that it did not read the first time.
        """
        if self._rows is None or not self._as_before():
            self._look()
        total: Tensor | None = None
        for (_, _, at), gradient in zip(self._known, gradients, strict=True):
            if gradient is None:
                continue
            part = torch.ops.aten.embedding_dense_backward(gradient, at, len(self.rows) + 1, -1, False)[:-1]
            total = part if total is None else total + part
        return torch.zeros_like(self.weight[self.rows]) if total is None else total

    def _as_before(self) -> bool:
        """Whether the ids read this time are known to be those read before, without looking at them."""
        return len(self._read) == len(self._known) and all(
            ids.data_ptr() == known.data_ptr() and ids.stride() == known.stride() and ids.shape == known.shape
            and ids.dtype == known.dtype and ids._version == version
            for ids, (known, version, _) in zip(self._read, self._known, strict=True)
        )  # fmt: skip

    def _look(self) -> None:
        """Finds out which rows the ids of this time are, which waits for the device."""
        padding = self._embedding.padding_idx
        read: Tensor = torch.unique(torch.cat([ids.reshape(-1) for ids in self._read]))  # ascending
        read = read if padding is None else read[read != padding]  # that row has no gradient
        if self._rows is None:
            self._rows = read
        elif not torch.equal(self._rows, read):
            raise RuntimeError("GAP: the model does not look up the same rows of its embedding in every step")
        self._known = []
        for ids in self._read:
            at = torch.searchsorted(self._rows, ids)
            if padding is not None:  # a place of its own, cut off in `gradient`
                at = torch.where(ids == padding, len(self._rows), at)
            self._known.append((ids, ids._version, at))


def plain_embedding(model: nn.Module) -> nn.Embedding | None:
    """The model's input embedding, where its output is nothing but rows of its weight; else None.

    Subclasses may scale or mask; hooks may change what is looked up, and compiled code does not call ours.
    """
    get = getattr(model, "get_input_embeddings", None)
    embedding = get() if callable(get) else None
    if type(embedding) is not nn.Embedding or not embedding.weight.requires_grad:
        return None
    if embedding.sparse or embedding.scale_grad_by_freq or embedding.max_norm is not None:
        return None
    if embedding._forward_hooks or embedding._forward_pre_hooks or embedding._backward_hooks:
        return None
    if embedding._backward_pre_hooks or embedding.weight._backward_hooks:
        return None
    if any(getattr(module, "_compiled_call_impl", None) is not None for module in model.modules()):
        return None
    return None if isinstance(model, torch._dynamo.eval_frame.OptimizedModule) else embedding

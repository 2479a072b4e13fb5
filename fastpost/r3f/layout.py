"""How a module inside a model is given its batch: turned, (time, batch), or padded by the model itself."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from fastpost.ops.autograd import checks_values, traced


class Layout:
    """How a module is given its batch, as far as past passes have shown; `layout_of` has one for each module.

    On a GPU a look at values waits for the device, so it is taken once and then remembered.

    Attributes:
        turned: whether the module is given (time, batch, ...), None while unknown.
        padded: whether the model pads token ids on the right before this module, None while unknown.
    """

    def __init__(self) -> None:
        self.turned: bool | None = None
        self.padded: bool | None = None

    def time_first(self, seen: Tensor, ids: Any) -> bool:
        """Whether the module is given (time, batch, ...) of a batch whose ids are (batch, time), as inside XLNet.

        The shape shows that, except where time is a multiple of the batch size: then the batch may be square, or its
        rows cut into pieces as long as the batch size. There the memory or the values of token ids decide. Hidden states
        and traced tensors (torch.compile) have none to look at. For them what was seen before holds; before that the
        shape, and a square batch counts as not turned.

        Args:
            seen: what the module was given: ids, or hidden states.
            ids: the batch's, with choices in front of time or without; anything else tells nothing.
        """
        if not isinstance(ids, Tensor) or ids.ndim < 2 or seen is ids or seen.ndim < 2:
            return False
        rows = ids.flatten(0, -2)
        batch, time = rows.shape
        square = batch == time
        if seen.shape[:2] != (time, batch):
            if seen.shape[:2] == (batch, time) and batch > 1:
                self.turned = False
            return False
        if batch == 1 or time == 1:
            return not square  # both readings have the same tokens in the same order, so this shows nothing
        found = True if time % batch else None
        if found is None and seen.ndim == 2 and not traced():
            found = self._by_tokens(seen, rows)
        if found is None:
            return not square if self.turned is None else self.turned
        self.turned = found
        return found

    def _by_tokens(self, seen: Tensor, rows: Tensor) -> bool | None:
        """Whether ids (time, batch) are `rows` (batch, time) turned, rather than reshaped; None: they do not tell."""
        turned = rows.transpose(0, 1)
        if (seen.device, seen.dtype, seen.data_ptr()) == (rows.device, rows.dtype, rows.data_ptr()):
            return seen.stride() == turned.stride() != rows.stride()
        if self.turned is not None and not checks_values(seen.device):
            return self.turned
        turned, straight = turned.to(seen.device), rows.to(seen.device).reshape(seen.shape)
        more = int((seen == turned).sum() - (seen == straight).sum())  # a model may have changed some of them
        return None if more == 0 else more > 0

    def padded_by_model(self, ids: Tensor, given: Any, time: int) -> bool:
        """Whether the model itself has padded the batch's ids on the right (Longformer: to full windows).

        Args:
            ids: what the module was given. given: the batch's ids. time: how long these are.
        """
        if not isinstance(given, Tensor) or given.ndim < 2 or ids.ndim != 2 or ids.shape[1] <= time:
            return False
        rows = given.flatten(0, -2)[: len(ids)]
        if given.shape[-1] != time or len(rows) != len(ids):
            return False
        if checks_values(ids.device) or (self.padded is None and not traced()):
            self.padded = torch.equal(ids[:, :time], rows.to(ids))
        return bool(self.padded)


_LAYOUTS: weakref.WeakKeyDictionary[nn.Module, Layout] = weakref.WeakKeyDictionary()


def layout_of(module: nn.Module) -> Layout:
    """What is known of the module from all passes; to be called outside of what torch.compile traces."""
    return _LAYOUTS.setdefault(module, Layout())


def turned_if(turned: bool, x: Tensor) -> Tensor:
    """(batch, time, ...) as (time, batch, ...), or the other way round; x itself where it need not be turned."""
    return x.transpose(0, 1).contiguous() if turned else x

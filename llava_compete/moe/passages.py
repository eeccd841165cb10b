"""What travels between the ranks of a group: rows to the ranks that want them, and one expert's weights to all.

A passage is begun at one place and waited for at another, so that what does not need it runs meanwhile; so it is
backwards, where the passage of the gradients begins at the place of the wait and is waited for where rows had left.
Autograd runs what was made later first: the gradients of what ran meanwhile are computed while the passage's are on
their way. Every rank begins and waits in the same order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class Flight:
    """Rows on their way; `sent` and `received` are numbers of rows to and from each rank."""

    def __init__(self, rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> None:
        self._rows = rows.contiguous()
        self._here = rows.new_empty(sum(received), *rows.shape[1:])
        # A `Work`, which torch's annotations say is perhaps none.
        self._work: Any = dist.all_to_all_single(self._here, self._rows, received, sent, group=group, async_op=True)

    def wait(self) -> Tensor:
        """What has come here."""
        self._work.wait()
        return self._here


class Passage:
    """Rows by the rank that they go to -> rows by the rank that they are from; begun where it is made."""

    def __init__(self, rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> None:
        self._way = _Way((sent, received, group), (received, sent, group))
        self._ticket = _Depart.apply(rows, self._way)

    def wait(self) -> Tensor:
        """What has come here; once."""
        return _Arrive.apply(self._ticket, self._way)


@dataclass
class _Way:
    """Apart from the ticket, whose node in autograd's graph holds this."""

    there: tuple[list[int], list[int], dist.ProcessGroup]
    back: tuple[list[int], list[int], dist.ProcessGroup]
    flight: Flight | None = None

    def land(self) -> Tensor:
        """What is on its way, in whichever direction."""
        flight, self.flight = self.flight, None
        assert flight is not None
        return flight.wait()


class _Depart(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, way: _Way) -> Tensor:
        ctx.way, way.flight = way, Flight(rows, *way.there)
        return rows.new_zeros(())

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, None]:
        return ctx.way.land(), None


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, _: Tensor, way: _Way) -> Tensor:
        ctx.way = way
        return way.land()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.way.flight = Flight(grad, *ctx.way.back)
        return grad.new_zeros(()), None


class Loan:
    """The last expert's weights from the last rank, which holds it, to all; backwards the sum of their gradients there.

    Args:
        packed: this rank's parameters [L, ...], whose last rows on the last rank are lent.
    """

    def __init__(self, packed: tuple[Tensor, ...], group: dist.ProcessGroup) -> None:
        self._mail = _Mail(group, [tensor.shape for tensor in packed])
        self._ticket = _Lend.apply(self._mail, *packed)

    def wait(self) -> tuple[Tensor, ...]:
        """The lent weights, [1, ...] each; once."""
        return _Borrow.apply(self._ticket, self._mail)


@dataclass
class _Mail:
    group: dist.ProcessGroup
    shapes: list[torch.Size]
    sent: tuple[Tensor, Any] | None = None  # and the `Work` of sending it

    @property
    def owner(self) -> int:
        return dist.get_world_size(self.group) - 1

    def send(self, flat: Tensor, *, home: bool) -> None:
        """Weights from their owner, or the sum of gradients to it."""
        place, move = dist.get_global_rank(self.group, self.owner), dist.reduce if home else dist.broadcast
        self.sent = flat, move(flat, place, group=self.group, async_op=True)

    def land(self) -> list[Tensor]:
        """What was sent, [1, ...] for each parameter."""
        assert self.sent is not None
        (flat, work), self.sent = self.sent, None
        work.wait()
        parts = flat.split([shape[1:].numel() for shape in self.shapes])
        return [part.view(1, *shape[1:]) for part, shape in zip(parts, self.shapes, strict=True)]


class _Lend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mail: _Mail, *packed: Tensor) -> Tensor:
        ctx.mail, ctx.dtype = mail, packed[0].dtype
        mail.send(torch.cat([tensor[-1].flatten() for tensor in packed]), home=False)
        return packed[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        mail: _Mail = ctx.mail
        sums = mail.land()
        if dist.get_rank(mail.group) != mail.owner:
            return None, *(None for _ in sums)
        grads = [total.new_zeros(shape, dtype=ctx.dtype) for total, shape in zip(sums, mail.shapes, strict=True)]
        for grad, total in zip(grads, sums, strict=True):
            grad[-1:] = total
        return None, *grads


class _Borrow(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, _: Tensor, mail: _Mail) -> tuple[Tensor, ...]:
        ctx.mail = mail
        return tuple(part.clone() for part in mail.land())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        # In float32: one process would have summed over all tokens before it rounded.
        ctx.mail.send(torch.cat([grad.flatten().float() for grad in grads]), home=True)
        return grads[0].new_zeros(()), None


def exchanged(rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
    """A passage with nothing beside it."""
    return Passage(rows, sent, received, group).wait()


def gathering(x_TH: Tensor, lengths: list[int], group: dist.ProcessGroup) -> Flight:
    """Tokens of this rank to all, without gradients: by a passage from all to all, since ranks have unlike numbers."""
    return Flight(x_TH.repeat(len(lengths), 1), [len(x_TH)] * len(lengths), lengths, group)


class Gather(torch.autograd.Function):
    """Tokens of this rank -> of all, by rank; backwards each rank's sum over what all made of its own."""

    @staticmethod
    def forward(ctx: Any, x_TH: Tensor, lengths: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.lengths, ctx.group, ctx.here = lengths, group, len(x_TH)
        return gathering(x_TH, lengths, group).wait()

    @staticmethod
    def backward(ctx: Any, grad_GH: Tensor) -> tuple[Tensor, None, None]:
        size = len(ctx.lengths)
        grad_NTH = Flight(grad_GH, ctx.lengths, [ctx.here] * size, ctx.group).wait().view(size, ctx.here, -1)
        return grad_NTH.sum(0), None, None

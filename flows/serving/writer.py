"""The thread that writes: all texts of all requests side by side, a token of each at every step.

Requests come and go between two steps (continuous batching: Yu et al. 2022, "Orca"). A text belongs to the version that
was served when its request came; while a champion changes, two versions write in turn. Who waits for a text is told in
the event loop's own thread, once a step.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from threading import Condition, Thread

from flows.serving.following import Served
from gptcore.errors import TokenizerError
from gptcore.generate import TextStream
from gptcore.writing.batch import Batch, Text
from gptcore.writing.sampling import Sampling

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Piece:
    """What was written of a text since the last piece."""

    index: int
    """Which text of its request."""
    text: str
    num_tokens: int
    """Of the whole text so far."""
    finish_reason: str | None = None
    """stop or length at the end of a text."""
    problem: str | None = None
    """Why the text ends before its end."""

    @property
    def is_last(self) -> bool:
        """Whether the text has ended."""
        return bool(self.finish_reason or self.problem)


@dataclass(eq=False)
class Order:
    """A text that somebody waits for."""

    served: Served
    index: int
    ids: Sequence[int]
    max_new_tokens: int
    sampling: Sampling
    seed: int | None
    stop: Sequence[str]
    tell: Callable[[Piece], None]
    """Called in the event loop."""
    is_dropped: bool = False
    """Nobody waits any more."""


class Full(Exception):
    """There are as many texts under way and waiting as there may be."""


class Stopping(Exception):
    """Nothing new is begun."""


@dataclass(eq=False)
class _Writing:
    """A text under way."""

    order: Order
    text: Text
    stream: TextStream
    num_told: int = 0

    def piece(self) -> Piece:
        """What is new."""
        text, stream = self.text, self.stream
        ids = text.ids[self.num_told :]
        self.num_told = len(text.ids)
        try:
            said = "".join(stream.push(token) for token in ids)
        except TokenizerError as error:  # a model may have more ids than its tokenizer
            return Piece(self.order.index, "", self.num_told, problem=str(error))
        if text.finish_reason and not stream.stopped:
            said += stream.finish()
        reason = "stop" if stream.stopped else text.finish_reason
        return Piece(self.order.index, said, self.num_told, reason)


class _Desk:
    """The texts of one version."""

    def __init__(self, served: Served, rows: int) -> None:
        self.served = served
        self.batch = Batch(served.loaded.model, rows)
        self.writings: dict[int, _Writing] = {}

    def take(self, order: Order) -> None:
        tokenizer = order.served.loaded.tokenizer
        text = self.batch.add(order.ids, order.max_new_tokens, order.sampling, seed=order.seed, eos_id=tokenizer.eot)
        self.writings[id(text)] = _Writing(order, text, TextStream(tokenizer, order.stop))

    def drop(self, writing: _Writing) -> None:
        self.batch.drop(writing.text)
        del self.writings[id(writing.text)]

    def step(self) -> list[tuple[Order, Piece]]:
        """One more token of every text; what there is to tell of it."""
        for writing in [one for one in self.writings.values() if one.order.is_dropped]:
            self.drop(writing)
        told = []
        for text in self.batch.step() if self.writings else ():
            writing = self.writings[id(text)]
            piece = writing.piece()
            if piece.text or piece.is_last:
                told.append((writing.order, piece))
            if text.finish_reason:
                del self.writings[id(text)]
            elif piece.is_last:
                self.drop(writing)
        return told


@dataclass
class Writer:
    """Writes at most `rows` texts at once, and lets at most `most_waiting` wait."""

    rows: int
    most_waiting: int
    _desks: dict[Served, _Desk] = field(default_factory=dict)
    _waiting: deque[Order] = field(default_factory=deque)
    _changed: Condition = field(default_factory=Condition)
    _num_writing: int = 0
    _takes_orders: bool = True
    _end: str | None = None
    """Why everything ends now."""

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Begins to write. The thread ends with the process, or with `end`."""
        self._loop = loop
        Thread(target=self._run, name="writer", daemon=True).start()

    @property
    def most(self) -> int:
        """How many texts there may be at once, waiting ones included."""
        return self.rows + self.most_waiting

    @property
    def counts(self) -> tuple[int, int]:
        """How many texts are under way, and how many wait."""
        return self._num_writing, len(self._waiting)

    @property
    def takes_orders(self) -> bool:
        return self._takes_orders

    def submit(self, orders: Sequence[Order]) -> None:
        """Takes orders, all or none. Raises Full or Stopping."""
        with self._changed:
            if not self._takes_orders:
                raise Stopping
            if self._num_writing + len(self._waiting) + len(orders) > self.most:
                raise Full
            self._waiting.extend(orders)
            self._changed.notify()

    def drop(self, orders: Iterable[Order]) -> None:
        """Forgets orders: those that wait at once, those under way before the next step."""
        with self._changed:
            for order in orders:
                order.is_dropped = True
                with suppress(ValueError):
                    self._waiting.remove(order)

    def refuse(self) -> None:
        """Takes no more orders; goes on with those that it has."""
        with self._changed:
            self._takes_orders = False

    def end(self, why: str) -> None:
        """Ends all texts, of which those who wait are told, and the thread."""
        self.refuse()
        with self._changed:
            self._end = why
            self._changed.notify()

    def _run(self) -> None:
        while self._wait() is None:
            for order in self._begin():
                self._take(order)
            told = [pair for desk in list(self._desks.values()) for pair in self._step(desk)]
            self._tell(told)
            self._clear()
        self._give_up(str(self._end))

    def _wait(self) -> str | None:
        """Until there is something to write. Returns why everything ends, if it does."""
        with self._changed:
            self._changed.wait_for(lambda: self._end or self._waiting or self._num_writing)
            return self._end

    def _begin(self) -> list[Order]:
        """The orders for which there is room, first come, first served."""
        with self._changed:
            count = min(self.rows - self._num_writing, len(self._waiting))
            self._num_writing += count
            return [self._waiting.popleft() for _ in range(count)]

    def _take(self, order: Order) -> None:
        try:
            if order.served not in self._desks:
                self._desks[order.served] = _Desk(order.served, self.rows)
            self._desks[order.served].take(order)
        except Exception as error:  # one text that cannot be begun is no reason to end the others
            _log.exception("a text was not begun")
            self._tell([(order, _failed(order, error))])

    def _step(self, desk: _Desk) -> list[tuple[Order, Piece]]:
        try:
            return desk.step()
        except Exception as error:  # the next ones may be written, by a batch of their own
            _log.exception("%s failed while it wrote", desk.served.id)
            del self._desks[desk.served]
            return [(one.order, _failed(one.order, error)) for one in desk.writings.values()]

    def _clear(self) -> None:
        """Counts, and gives back the memory of versions that write nothing; the newest keeps its own."""
        with self._changed:
            self._num_writing = sum(len(desk.writings) for desk in self._desks.values())
        for served in [one for one, desk in self._desks.items() if not desk.writings]:
            if served is not next(reversed(self._desks)):
                del self._desks[served]

    def _give_up(self, why: str) -> None:
        with self._changed:
            left = [one.order for desk in self._desks.values() for one in desk.writings.values()] + [*self._waiting]
            self._waiting.clear()
            self._num_writing = 0
        self._tell([(order, Piece(order.index, "", 0, problem=why)) for order in left])

    def _tell(self, told: Sequence[tuple[Order, Piece]]) -> None:
        with suppress(RuntimeError):  # the loop is closed: nobody waits
            if told:
                self._loop.call_soon_threadsafe(_hand_over, told)


def _hand_over(told: Sequence[tuple[Order, Piece]]) -> None:
    for order, piece in told:
        if not order.is_dropped:
            order.tell(piece)


def _failed(order: Order, error: Exception) -> Piece:
    return Piece(order.index, "", 0, problem=f"the text could not be written: {type(error).__name__}")

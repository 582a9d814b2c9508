"""Who runs: the queue, the slots, and whose turn the next prefill chunk is."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from .cache import SlotCache
from .sequence import Sequence

SMALLEST_CHUNK = 8  # tokens; a call for fewer costs as much
ROOM_TO_GROW = 128  # tokens
LOGPROBS_CHUNK = 256  # tokens per call; each of them needs a row of logits over the whole vocabulary
MASK_ENTRIES = 4_000_000  # tokens x positions they look at, per call; a mask has an entry for each


@dataclass(frozen=True)
class Chunk:
    """The next tokens of sequences that have the same tokens to read and hold equally many of them.

    `variants` has one list per way to steer; what is the same for all of a list is computed once.
    """

    variants: list[list[Sequence]]
    start: int
    size: int

    @property
    def sequences(self) -> list[Sequence]:
        """All of them."""
        return [sequence for variant in self.variants for sequence in variant]

    @property
    def text(self) -> Sequence:
        """Any of them, for its tokens."""
        return self.variants[0][0]


class Scheduler:
    """Sequences in their slots. `running[i]` is in slot i; the first `decoding` of them lack one token.

    Requests are admitted in the order they came, each with all its sequences at once so that they share
    their prefill. Slots in use have no gaps: a batch is a slice of the cache, which costs no copy to read.
    """

    def __init__(self, cache: SlotCache, max_slots: int) -> None:
        self._cache = cache
        self._max_slots = max_slots
        self._turn = 0
        self._last_turn: dict[Sequence, int] = {}  # of sequences that are being prefilled
        self.waiting: deque[list[Sequence]] = deque()
        self.running: list[Sequence] = []
        self.decoding = 0

    def admit(self) -> None:
        """Give slots to waiting requests, in order, while they fit; forget those that nobody waits for."""
        self.waiting = deque(group for group in self.waiting if not all(sequence.ended for sequence in group))
        while self.waiting:
            entering = [sequence for sequence in self.waiting[0] if not sequence.ended]
            slots = len(self.running) + len(entering)
            longest = max((len(each.tokens) + 1 for each in (*self.running, *entering)), default=0)
            # Some room to grow, or who is admitted would soon be evicted for somebody else's next token.
            roomy = self._cache.fits(slots, longest + ROOM_TO_GROW) or not self.running
            if slots > self._max_slots or not roomy:
                return
            self.waiting.popleft()
            for sequence in entering:  # before memory is asked for, so that an error finds them
                sequence.slot = len(self.running)
                self.running.append(sequence)
                self._last_turn[sequence] = 0
            self._cache.reserve(slots, longest)
            for sequence in entering:
                if sequence.missing == 1:
                    self.decode(sequence)

    def next_chunks(self, budget: int) -> list[Chunk]:
        """Prefill work of about `budget` tokens, from whoever has waited longest for a turn."""
        self._turn += 1
        groups: dict[tuple[bytes, int], list[Sequence]] = {}
        for sequence in sorted(self.running[self.decoding :], key=self._last_turn.__getitem__):
            groups.setdefault((sequence.text_key, sequence.cached), []).append(sequence)
        chunks: list[Chunk] = []
        rows = width = longest = 0
        logits = LOGPROBS_CHUNK
        for group in groups.values():
            variants: dict[object, list[Sequence]] = {}
            for sequence in group:
                variants.setdefault(sequence.steer_key, []).append(sequence)
            rows += len(variants)
            longest = max(longest, len(group[0].tokens))
            share = min(budget, MASK_ENTRIES // longest) // rows
            size = min(group[0].missing, max(SMALLEST_CHUNK, share))
            if any(sequence.reads_prompt_logprobs for sequence in group):
                size = min(size, max(SMALLEST_CHUNK, logits // len(variants)))
                logits -= size * len(variants)
            width = max(width, size)
            if chunks and (rows * width > budget or rows * width * longest > MASK_ENTRIES or logits < 0):
                break
            chunks.append(Chunk(list(variants.values()), group[0].cached, size))
        for chunk in chunks:
            self._last_turn |= dict.fromkeys(chunk.sequences, self._turn)
        return chunks

    def decode(self, sequence: Sequence) -> None:
        """A sequence lacks but one token: move it among those that are decoded."""
        assert sequence.slot is not None
        del self._last_turn[sequence]
        self._swap(sequence.slot, self.decoding)
        self.decoding += 1

    def grow(self) -> list[Sequence]:
        """Make room for one more token of every decoding sequence; returns those that lost their slot for it.

        The latest to come wait again, before all others, and begin again when there is room.
        """
        evicted: list[Sequence] = []
        while True:
            longest = max((len(each.tokens) + 1 for each in self.running), default=0)
            if len(self.running) <= 1 or self._cache.fits(len(self.running), longest):
                break
            evicted.append(max(self.running, key=lambda sequence: sequence.arrival))
            self.retire(evicted[-1])
        for sequence in evicted:
            sequence.waits()
            self.waiting.appendleft([sequence])
        self._cache.reserve(len(self.running), longest)
        return evicted

    def retire(self, sequence: Sequence) -> None:
        """Free a sequence's slot, and close the gap it leaves."""
        hole, last = sequence.slot, self.running[-1]
        assert hole is not None
        if hole < self.decoding:
            self.decoding -= 1
            self._move(self.decoding, hole)
            hole = self.decoding
        else:
            del self._last_turn[sequence]
        self._move(len(self.running) - 1, hole)
        self.running.pop()
        sequence.slot = None
        if not self.running:
            self._cache.release()
        elif not (sequence.sound and last.sound):  # the free slot holds what one of the two left there
            self._cache.clear(len(self.running))

    def abandon(self) -> list[Sequence]:
        """Take everybody's slot and give all memory back, after an error that may have left things half done."""
        left, self.running, self.decoding, self._last_turn = self.running, [], 0, {}
        for sequence in left:
            sequence.slot = None
        self._cache.release()
        return left

    def _move(self, source: int, target: int) -> None:
        if source != target:
            self._cache.copy(source, target)
            self.running[target] = self.running[source]
            self.running[target].slot = target

    def _swap(self, a: int, b: int) -> None:
        if a != b:
            self._cache.swap(a, b)
            self.running[a], self.running[b] = self.running[b], self.running[a]
            self.running[a].slot, self.running[b].slot = a, b

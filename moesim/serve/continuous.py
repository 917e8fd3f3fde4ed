"""Continuous batching: requests join and leave between two steps."""

from __future__ import annotations

from collections.abc import Sequence

from moesim.errors import UsageError
from moesim.types import NEVER, Phase
from moesim.workload import STARVED, Idle, Part, Passes, Queue, Step, Work, rest, stop, take


class ContinuousBatch:
    """At each step up to ``batch`` requests, and up to ``token_budget`` tokens (0: any number).

    A request that has arrived is admitted, in order of arrival, when fewer than ``batch`` run and
    the KV cache has room for all that the request will come to hold (``kv_tokens``; -1: any): it is
    reserved, so that nobody who was admitted must ever be put out again. A prompt is computed in
    chunks of what the budget leaves, at most ``chunk_tokens`` (0: any).

    decode_first : decoding requests, a token each, take of the budget before prompts do (as in
    Sarathi-Serve, Agrawal et al. 2024); else prompts come first (Orca, Yu et al. 2022), and the
    decoding wait where nothing is left. Within a step requests stand in order of admission.
    until_ns : no step begins from then on; 0: until every request has ended.
    """

    def __init__(
        self,
        batch: int = 1,
        token_budget: int = 0,
        chunk_tokens: int = 0,
        *,
        decode_first: bool = True,
        kv_tokens: int = -1,
        queue: Queue | None = None,
        until_ns: int = 0,
    ) -> None:
        self.batch = batch
        self.token_budget = token_budget or NEVER
        self.chunk_tokens = chunk_tokens or NEVER
        self.decode_first = decode_first
        self.kv_tokens = kv_tokens
        self.queue = queue or Queue()
        self.until_ns = until_ns
        self._running: list[Work] = []
        self._prefilling = 0
        """How many of the running have not ended their prefill."""
        self._reserved: dict[int, int] = {}
        self._ending: list[Work] = []
        self._steps = 0

    @property
    def waiting(self) -> list[Work]:
        """Requests that have arrived, and of which nothing has been served; some may have joined
        when nothing was left of the budget."""
        joined = [w for w in self._running if not w.next_pass and not w.next_token]
        return [*joined, *self.queue.waiting]

    @property
    def settled(self) -> bool:
        """Whether the next step is the same whenever it begins."""
        return not (self.queue.timed or self.until_ns)

    def offer(self, work: Work) -> None:
        """The next request of the trace."""
        self.queue.offer(work)

    def close(self) -> None:
        """No request will follow."""
        self.queue.closed = True

    def next_steps(self, now_ns: int, most: int) -> Passes | Step | Idle | str:
        """The next step."""
        return self.next_step(now_ns)

    def next_step(self, now_ns: int) -> Step | Idle | str:
        """The next step; who has ended leaves, who has arrived joins."""
        queue = self.queue
        if self._ending:
            self._leave(now_ns)
        if self.until_ns and now_ns >= self.until_ns:
            return stop(queue, now_ns)
        if len(self._running) < self.batch and not self._admit(now_ns):
            return STARVED
        if not self._running:
            return rest(queue, self.until_ns)
        parts = self._decode() if not self._prefilling else self._mixed()
        held = 0
        if len(parts) < len(self._running):
            taken = {part.work.index for part in parts}
            absent = [work for work in self._running if work.index not in taken]
            held = sum(work.context_after(work.next_pass) for work in absent)
        self._steps += 1
        return Step(self._steps - 1, tuple(parts), 0, held)

    # ---- who is served ---------------------------------------------------------------------------

    def _leave(self, now_ns: int) -> None:
        for work in self._ending:
            self._reserved.pop(work.index, None)
            self.queue.end(work, now_ns)
        self._ending = []
        self._running = [work for work in self._running if not work.finished]

    def _admit(self, now_ns: int) -> bool:
        """Let requests join; False if the next must be offered before it can be said who does."""
        waiting = self.queue.waiting
        if not self.queue.is_ready(now_ns, self.batch - len(self._running)):
            return False
        while waiting and len(self._running) < self.batch:
            if self.kv_tokens >= 0 and not self._reserve(waiting[0]):
                break
            work = waiting.popleft()
            self._running.append(work)
            self._prefilling += work.phase(0) == Phase.PREFILL
        return True

    def _reserve(self, work: Work) -> bool:
        """Room in the KV cache for all that a request will come to hold, if there is."""
        needed = work.longest
        if needed > self.kv_tokens:
            raise UsageError(
                f"--kv share: request {work.rows.request} needs {needed} tokens of KV cache, and "
                f"beside the experts of one token there is room for {self.kv_tokens}; give more "
                "--capacity"
            )
        if sum(self._reserved.values()) + needed > self.kv_tokens:
            return False
        self._reserved[work.index] = needed
        return True

    # ---- what of them ----------------------------------------------------------------------------

    def _decode(self) -> list[Part]:
        """All decode."""
        parts: list[Part] = []
        budget = self.token_budget
        for work in self._running:
            number = work.next_pass
            tokens = work.tokens(number)
            if tokens > budget and parts:
                break
            budget -= tokens
            work.next_pass = number + 1
            parts.append(Part(work, number, 0, tokens, True, True))
            if number + 1 == work.iterations:
                self._ending.append(work)
        return parts

    def _mixed(self) -> list[Part]:
        """Some have a prompt to compute: two rounds over the running, by whose turn is first."""
        budget = self.token_budget
        taken: dict[int, Part] = {}
        for prompts in (not self.decode_first, self.decode_first):
            for work in self._running:
                if work.index in taken or (work.phase(work.next_pass) == Phase.PREFILL) != prompts:
                    continue
                part = self._take(work, budget, prompts, bool(taken))
                if part is None:
                    break
                budget -= part.last - part.first
                taken[work.index] = part
        return [taken[work.index] for work in self._running if work.index in taken]

    def _take(self, work: Work, budget: int, prompt: bool, any_taken: bool) -> Part | None:
        if budget <= 0:
            return None
        if not prompt and any_taken and work.tokens(work.next_pass) > budget:
            return None
        part = take(work, min(budget, self.chunk_tokens))
        self._prefilling -= prompt and part.ends
        if work.finished:
            self._ending.append(work)
        return part


def kv_room(
    capacity_bytes: Sequence[int], expert_bytes: Sequence[int], top_k: int, per_token: int
) -> int:
    """Tokens of KV cache that leave each cache room for the experts of one token, or for one
    expert where those never fit; -1: tokens take none.

    expert_bytes : of each layer.
    """
    if not per_token:
        return -1
    caches = len(capacity_bytes)
    room: list[int] = []
    for cache, whole in enumerate(capacity_bytes):
        largest = expert_bytes[cache] if caches == len(expert_bytes) else max(expert_bytes)
        least = largest * top_k if largest * top_k < whole else largest
        room.append(((whole - least + 1) * caches - 1) // per_token)
    return max(0, min(room))

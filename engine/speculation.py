"""Speculative decoding without a draft model: what followed the last tokens when they stood here before.

Prompt lookup (Saxena 2023; vLLM's n-gram proposer) with an index instead of a search, and a length that
follows from measured acceptance. Pure Python: the scheduler asks for drafts, the runner verifies them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

_MAX_N = 4
_MIN_N = 2
# About a millisecond: a long prompt must not hold up the streams beside it; it is indexed over several steps.
_MAX_INDEXED_AT_ONCE = 1024
# Acceptance of a draft token that is expected before anything is known, by the length of the match. Measured
# on SmolLM2-135M-Instruct, 30 chat prompts x 160 tokens: 0.44, 0.55, 0.83 greedy; 0.39, 0.41, 0.61 at
# temperature 0.8.
_PRIOR_ACCEPTANCE = {2: 0.4, 3: 0.5, 4: 0.75}
# Weight of the newest outcome: the last ten or so decide.
_EWMA_WEIGHT = 0.1

_MAX_TOKENS = {"cpu": 0, "cuda": 7}
# Time that one more token adds to a step, in decode steps of one sequence. CPU: SmolLM2 in Q4_1 on two cores
# takes 1.45, 1.64, 2.08 and 2.81 steps for 2, 3, 4 and 8 tokens. A GPU reads the weights once for up to 8
# tokens; what is left is attention, the head's rows and sampling (an estimate, not measured yet).
_TOKEN_COST = {"cpu": 0.4, "cuda": 0.03}


@dataclass(frozen=True, slots=True)
class DraftPolicy:
    """How many tokens may be drafted for one request in a step, and what verifying one costs.

    A step of one sequence and one token costs 1, each further token `token_cost`.
    """

    max_tokens: int
    token_cost: float

    @classmethod
    def for_device(cls, device_type: str, max_tokens: int | None) -> "DraftPolicy":
        """`max_tokens` from the configuration; None takes the device's default (0, off, on the CPU)."""
        return cls(_MAX_TOKENS[device_type] if max_tokens is None else max_tokens, _TOKEN_COST[device_type])

    def num_worthwhile(self, acceptance: float, num_decodes: int) -> int:
        """Drafts of one request that raise the tokens per second of a step with `num_decodes` requests.

        The i-th draft counts if all before it do: acceptance ** i. It pays while it brings more tokens
        for its time than the step does without it.
        """
        num_tokens, cost = float(num_decodes), 1.0 + self.token_cost * (num_decodes - 1)
        gain, num_drafts = acceptance, 0
        while num_drafts < self.max_tokens and gain * cost > self.token_cost * num_tokens:
            num_tokens, cost = num_tokens + gain, cost + self.token_cost
            gain, num_drafts = gain * acceptance, num_drafts + 1
        return num_drafts


class NgramProposer:
    """An index of one growing token sequence: where each n-gram (n = 2 to 4) occurred last, O(1) a token.

    `token_ids` is the request's own list and is only read.
    """

    def __init__(self, token_ids: Sequence[int]) -> None:
        self._token_ids = token_ids
        self._next: dict[tuple[int, ...], int] = {}  # n-gram -> position after its latest occurrence
        self._num_indexed = 0  # n-grams that end before this position are in the index

    def propose(self, num_tokens: int) -> tuple[int, tuple[int, ...]]:
        """The length of the longest match, and the `num_tokens` tokens that followed it; (0, ()) if none."""
        tokens, end = self._token_ids, len(self._token_ids)
        if not self._catch_up():
            return 0, ()
        for n in range(min(_MAX_N, end), _MIN_N - 1, -1):
            position = self._next.get(tuple(tokens[end - n :]))
            if position is not None:
                followed = tuple(tokens[position : position + num_tokens])
                # A match that reaches the end of the sequence is a loop: it goes on from its beginning.
                repeats = -(-num_tokens // len(followed))
                return n, (followed * repeats)[:num_tokens]
        return 0, ()

    def _catch_up(self) -> bool:
        """Index up to the last token but one (the last n-grams would find themselves). False: not done."""
        tokens, index = self._token_ids, self._next
        begin = self._num_indexed
        end = min(len(tokens) - 1, begin + _MAX_INDEXED_AT_ONCE)
        for i in range(begin + 1, end + 1):
            for n in range(_MIN_N, min(_MAX_N, i) + 1):
                index[tuple(tokens[i - n : i])] = i
        self._num_indexed = max(begin, end)
        return end == len(tokens) - 1


class Drafter:
    """One request's drafts: the proposer's, as many as its acceptance so far makes worthwhile.

    Every step has a guess, also one whose drafts do not pay: comparing it with the token that plain
    decoding brings costs nothing, and tells when to begin again.
    """

    def __init__(self, policy: DraftPolicy, token_ids: Sequence[int]) -> None:
        self._policy = policy
        self._proposer = NgramProposer(token_ids)
        self._acceptance = dict(_PRIOR_ACCEPTANCE)  # by length of the match
        self._match_len = 0
        self._guess: tuple[int, ...] = ()

    def draft(self, max_tokens: int, num_decodes: int) -> tuple[int, ...]:
        """At most `max_tokens` drafts for a step in which `num_decodes` requests decode."""
        # One more than can be drafted: the token after the last draft is sampled as well.
        self._match_len, self._guess = self._proposer.propose(self._policy.max_tokens + 1)
        if not self._guess or max_tokens <= 0:
            return ()
        num_drafts = self._policy.num_worthwhile(self._acceptance[self._match_len], num_decodes)
        return self._guess[: min(num_drafts, max_tokens)]

    def observe(self, new_token_ids: Sequence[int]) -> None:
        """Take in the tokens that came after the last `draft`."""
        for guessed, token_id in zip(self._guess, new_token_ids, strict=False):
            is_hit = guessed == token_id
            old = self._acceptance[self._match_len]
            self._acceptance[self._match_len] = old + _EWMA_WEIGHT * (is_hit - old)
            if not is_hit:
                break
        self._guess = ()


def num_kept(draft_token_ids: Sequence[int], sampled_token_ids: Sequence[int]) -> int:
    """How many of the sampled tokens count, 1 to k + 1, for k drafts and k + 1 sampled tokens.

    Token i was sampled from the model's own distribution after drafts 0 to i - 1, with the random number of
    its position. It is therefore the token of plain decoding as long as the drafts before it were: all up
    to the first that differs from its draft, that one included. (For drafts without a distribution of
    their own this is the acceptance rule of Leviathan et al. 2023.)
    """
    for i, draft in enumerate(draft_token_ids):
        if sampled_token_ids[i] != draft:
            return i + 1
    return len(draft_token_ids) + 1

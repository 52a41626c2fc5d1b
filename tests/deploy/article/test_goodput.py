"""Open-loop arrivals, and what counts as good."""

import pytest

from deploy.bench.article.goodput import Outcome, Rates, arrivals
from deploy.bench.article.speed_tables import best_goodput
from deploy.bench.article.workloads import DEADLINES, WORKLOADS, named
from tests.deploy.article.rows import goodput_row

VOICE, COPILOT = (next(d for d in DEADLINES if d.tier == tier) for tier in ("voice", "copilot"))


def test_arrivals_repeat_keep_their_rate_and_end():
    due = arrivals(20.0, 50.0)
    assert due == arrivals(20.0, 50.0)
    assert due == sorted(due)
    assert len(due) == pytest.approx(1000, rel=0.15)
    assert max(due) < 50.0
    assert len(arrivals(1e6, 50.0)) == 4000


def test_what_is_refused_or_failed_is_not_good():
    outcome = Outcome([0.1, 0.15, 0.3], [0.4, 0.5, 0.6], num_refused=2, num_failed=1)
    row = outcome.row(VOICE, rate=3.0, seconds=2.0)
    assert (row["num_sent"], row["num_refused"], row["num_failed"]) == (6, 2, 1)
    assert row["share_good"] == pytest.approx(2 / 6, abs=1e-3)
    assert row["goodput_req_s"] == 1.0
    assert row["goodput_tok_s"] == 64.0


def test_an_answer_is_judged_by_its_end_and_a_voice_by_its_beginning():
    outcome = Outcome([0.1, 0.1], [0.4, 0.6])
    assert outcome.row(COPILOT, 1.0, 1.0)["share_good"] == 0.5
    assert outcome.row(VOICE, 1.0, 1.0)["share_good"] == 1.0


def test_a_rate_at_which_nothing_was_answered_is_a_row():
    row = Outcome(num_failed=3).row(VOICE, 1.0, 1.0)
    assert row["share_good"] == 0.0
    assert "ttft_ms_p50" not in row


def test_the_best_rate_is_the_highest_that_kept_its_promise():
    rows = [goodput_row(1.0, 1.0), goodput_row(2.0, 0.95), goodput_row(4.0, 0.8)]
    assert best_goodput(rows)["rate_req_s"] == 2.0
    assert best_goodput([goodput_row(4.0, 0.1), goodput_row(1.0, 0.2)])["rate_req_s"] == 1.0


@pytest.mark.parametrize(
    ("best", "tried"),
    [
        (3.0, [0.5, 1.0, 2.0, 4.0]),
        (0.2, [0.5, 0.25, 0.125]),
        (0.01, [0.5, 0.25, 0.125, 0.0625]),
        (9.0, [0.5, 1, 2, 4]),
    ],
)
def test_rates_rise_while_they_are_good_else_fall_until_one_is(best, tried):
    rates, kept = Rates(0.5, 2.0, 4, 1.0), {}
    while (place := rates.after(kept)) is not None:
        kept[place] = rates.rate(place) <= best
    assert [rates.rate(place) for place in kept] == tried


def test_fifteen_kinds_of_prompts_fit_the_context():
    assert len(WORKLOADS) == len({w.name for w in WORKLOADS}) == 15
    assert max(w.prompt_tokens + w.output_tokens for w in WORKLOADS) < 4096
    assert {d.tier: d.seconds for d in DEADLINES} == {"edge": 0.1, "voice": 0.2, "copilot": 0.5, "agent": 1.0}
    with pytest.raises(KeyError):
        named("haiku")

"""Steps that the engine benchmark times, on a small random model."""

from deploy.bench.engine import Timer
from tests.engine.helpers import make_core, save_random_llama


def test_only_steps_in_which_all_streams_decode_are_timed(tmp_path, monkeypatch):
    save_random_llama(tmp_path, max_position_embeddings=512)
    core = make_core(tmp_path, max_num_seqs=8, token_budget=160, enable_prefix_caching=False)
    timer, plans, times = Timer(core, 199), [], []
    execute = core.runner.execute

    def noted(plan):
        plans.append((plan.num_decodes, plan.num_prompt_tokens))
        return execute(plan)

    def clock() -> float:
        times.append(len(plans))
        return float(len(plans))

    monkeypatch.setattr(core.runner, "execute", noted)
    monkeypatch.setattr("deploy.bench.engine.time.perf_counter", clock)
    assert timer.itl_s(5, num_steps=7) == 1.0
    begin, end = times
    assert set(plans[begin:end]) == {(5, 0)}
    assert end - begin == 7
    assert plans[begin - 1][1] > 0  # the last prompt's last chunk
    assert not core.has_work

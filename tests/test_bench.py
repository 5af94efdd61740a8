"""The benchmark measures what it says: both ways are the same policy, counts and clocks add up."""
import copy
import json
import time

import pytest
import torch

import envs
import ppo
import twosome
from experiments import bench, cost_model, measure


@pytest.fixture(scope="module")
def agent():
    made = bench.load("tiny")
    torch.nn.init.normal_(made.critic[-1].weight)  # a fresh critic says 0 to everything
    return made


def observations(count=6):
    """Return some (obs, info) of the kitchen."""
    env = envs.make("overcooked")
    found = [env.reset()]
    for action in range(count - 1):
        obs, _, _, _, info = env.step(action % 5)
        found.append((obs, info))
    return found


def test_the_published_way_is_the_same_policy_and_critic(agent):
    old = bench.Published(agent)
    items = [agent.describe(*each) for each in observations()]
    alone = [old.describe(*each) for each in observations()]
    with torch.no_grad():
        for mine, theirs in zip(agent.log_probs(items), old.log_probs(alone), strict=True):
            torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=0)
        torch.testing.assert_close(agent.values(items), old.values(alone), atol=1e-5, rtol=0)


def test_the_published_way_shares_nothing(agent):
    old, (obs, info) = bench.Published(agent), observations(1)[0]
    assert old.describe(obs, info) != old.describe(obs, info)
    with measure.Count(agent) as count, torch.no_grad():
        old.log_probs([old.describe(obs, info)])
        old.log_probs([old.describe(obs, info)])
    assert count.calls == 2


def test_tokens_and_flops_are_counted_as_by_hand(agent):
    ids, config = torch.zeros(3, 7, dtype=torch.long), agent.model.config
    with measure.Count(agent) as count, torch.no_grad():
        agent.model(input_ids=ids, use_cache=False)
    H, L, V = config.hidden_size, config.num_hidden_layers, config.vocab_size
    inner = config.intermediate_size
    # q, k, v, o; gate, up, down; LoRA of rank 8 on q and v
    layer = 4 * H * H + 3 * H * inner + 2 * 2 * 8 * H
    tokens = 21 * (2 * L * layer + 2 * H * V)
    assert (count.calls, count.tokens) == (1, 21)
    assert count.flops == tokens + 4 * H * L * 3 * (7 * 8 // 2)

    # Under a tree's mask, what may be seen counts: here each token sees itself alone.
    least = torch.finfo(torch.float32).min
    itself = torch.full((3, 1, 7, 7), least).masked_fill(torch.eye(7, dtype=torch.bool), 0.0)
    with measure.Count(agent) as count, torch.no_grad():
        agent.model(input_ids=ids, attention_mask=itself, use_cache=False)
    assert count.flops == tokens + 4 * H * L * 3 * 7


def test_a_clock_accounts_for_every_moment_once():
    class Work:
        def outer(self):
            time.sleep(0.02)
            self.inner()

        def inner(self):
            time.sleep(0.03)

    clock, work = measure.Clock(), Work()
    clock.watch(work, "outer", "outer")
    clock.watch(work, "inner", lambda stack: f"inner of {stack[-1]}")
    start = time.perf_counter()
    work.outer()
    clock.stop()
    assert clock.spent["outer"] >= 0.02
    assert clock.spent["inner of outer"] >= 0.03
    assert sum(clock.spent.values()) == pytest.approx(time.perf_counter() - start, abs=0.01)


def test_the_whole_benchmark_at_a_tiny_shape(tmp_path, capsys):
    flags = ["--shape", "tiny", "--repeats", "1", "--threads", "1", "--out", str(tmp_path)]
    assert bench.main(flags) == 0
    facts = json.loads((tmp_path / "compare-tiny.json").read_text())
    rows = {row["part"]: row for row in facts["rows"]}
    whole = rows["PPO iteration, published sizes"]
    assert whole["ratio"] > 1
    assert whole["ours"]["tokens"] * 5 < whole["published"]["tokens"]
    assert rows["critic, prompts met before"]["ours"]["tokens"] == 0
    # Both ways end an iteration alike.
    assert max(facts["largest_difference_of_metrics"].values()) < 1e-4
    assert (tmp_path / "compare-tiny.md").read_text().count("\n") == 2 + len(facts["rows"])
    assert "| part |" in capsys.readouterr().out


def test_a_part_that_is_none_is_one_line_and_no_table_is_lost(tmp_path):
    table = tmp_path / "compare-tiny.md"
    table.write_text("kept")
    with pytest.raises(SystemExit, match="no part has 'nothing' in its name"):
        bench.main(["--shape", "tiny", "--part", "nothing", "--out", str(tmp_path)])
    assert table.read_text() == "kept"


def test_a_shape_that_is_unknown_is_one_line(capsys):
    with pytest.raises(SystemExit, match="2"):
        bench.main(["--shape", "8b"])
    assert "invalid choice: '8b'" in capsys.readouterr().err


def items_of(world):
    return [twosome.observation_text(info) for info in world.infos]


def test_the_cost_model_counts_what_an_iteration_computes(agent):
    """A world that is met whole has as many distinct prompts as states: the rest is by hand."""
    world = cost_model.Drill(distinct=2, prompt=10)
    items = items_of(world)
    assert len(set(items)) == 2
    assert all(len(set(phrases)) == 4 for _, phrases in items)
    scoring, critic = cost_model.packed_flops(agent, items)
    rates = {False: (0.0, 1e9), True: (0.0, 1e9)}  # no seconds a call, 1 GFLOP/s
    seconds = cost_model.predict(agent, items, cost_model.BASE, rates)
    minibatches = cost_model.BASE.num_envs * cost_model.BASE.rollout_steps
    minibatches //= cost_model.BASE.minibatch
    by_hand = (2 * (scoring + critic) + minibatches * 2 * scoring) / 1e9
    assert seconds == pytest.approx(by_hand, rel=1e-3)


def test_the_cost_model_predicts_the_calls_and_flops_of_a_real_iteration(agent):
    world = cost_model.Drill(distinct=64, prompt=10)
    trainer = ppo.PPO(lambda: copy.copy(world), agent, cost_model.BASE, seed=1)
    trainer.iterate()
    agent.known.clear()
    with measure.Count(agent) as count:
        trainer.iterate()
    items, base = items_of(world), cost_model.BASE
    calls = cost_model.predict(agent, items, base, {False: (1.0, 1e99), True: (1.0, 1e99)})
    flops = cost_model.predict(agent, items, base, {False: (0.0, 1.0), True: (0.0, 0.5)})
    assert count.calls == pytest.approx(calls, rel=0.25)
    assert float(count.flops) == pytest.approx(flops, rel=0.25)

"""The benchmark measures what it says: the published way scores alike, counts and clocks add up."""
import copy
import json
import time

import pytest
import torch

import envs
from experiments import bench, cost_model, measure


@pytest.fixture(scope="module")
def agent():
    made = bench.load("tiny")
    torch.nn.init.normal_(made.critic[-1].weight)  # a fresh critic says 0 to everything
    return made


def observations(count=6):
    env = envs.make("overcooked")
    found = [env.reset()]
    for action in range(count - 1):
        obs, _, _, _, info = env.step(action % 5)
        found.append((obs, info))
    return found


def test_the_published_way_is_the_same_policy_and_critic(agent):
    old = bench.Published(agent)
    ours = [agent.describe(obs, info) for obs, info in observations()]
    theirs = [old.describe(obs, info) for obs, info in observations()]
    assert len(set(theirs)) == len(theirs)  # nothing is shared there
    with torch.no_grad():
        for mine, other in zip(agent.log_probs(ours), old.log_probs(theirs), strict=True):
            assert torch.allclose(mine, other, atol=1e-5)
        assert torch.allclose(agent.values(ours), old.values(theirs), atol=1e-5)


def test_tokens_and_flops_are_counted_as_by_hand(agent):
    ids, config = torch.zeros(3, 7, dtype=torch.long), agent.model.config
    with measure.Count(agent) as count, torch.no_grad():
        agent.model(input_ids=ids, use_cache=False)
    H, L = config.hidden_size, config.num_hidden_layers
    # q, k, v, o; gate, up, down; LoRA of rank 8 on q and v
    layer = 4 * H * H + 3 * H * config.intermediate_size + 2 * 2 * 8 * H
    rows = 21 * (2 * L * layer + 2 * H * config.vocab_size)
    assert (count.calls, count.tokens) == (1, 21)
    assert count.flops == rows + 4 * H * L * 3 * (7 * 8 // 2)
    lowest = torch.finfo(torch.float32).min
    siblings = torch.full((3, 1, 7, 7), lowest).masked_fill(torch.eye(7, dtype=torch.bool), 0.0)
    with measure.Count(agent) as count, torch.no_grad():  # of a tree's mask, what is seen
        agent.model(input_ids=ids, attention_mask=siblings, use_cache=False)
    assert count.flops == rows + 4 * H * L * 3 * 7


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
    whole = time.perf_counter() - start
    assert clock.spent["outer"] >= 0.02 and clock.spent["inner of outer"] >= 0.03
    assert sum(clock.spent.values()) == pytest.approx(whole, abs=0.01)


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
    assert len(facts["largest_difference_of_metrics"]) == 4
    assert max(facts["largest_difference_of_metrics"].values()) < 1e-4
    assert (tmp_path / "compare-tiny.md").read_text().count("\n") == 2 + len(facts["rows"])
    assert "| part |" in capsys.readouterr().out


def test_the_cost_model_counts_what_an_iteration_computes(agent):
    """A world met whole: its distinct prompts are its size, and the rest follows by hand."""
    items = cost_model.items_of(agent, cost_model.Drill(actions=5, distinct=2, prompt=10))
    assert len(set(items)) == 2 and all(len(set(phrases)) == 5 for _, phrases in items)
    scoring, critic = cost_model.packed_flops(agent, items)
    rates = {False: (0.0, 1e9), True: (0.0, 1e9)}
    seconds = cost_model.predict(agent, items, cost_model.BASE, rates)
    by_hand = (2 * (scoring + critic) + 4 * 2 * scoring) / 1e9
    assert seconds == pytest.approx(by_hand, rel=1e-3)


def test_the_cost_model_predicts_the_calls_and_flops_of_a_real_iteration(agent):
    world = cost_model.Drill(distinct=64, prompt=10)
    learner = cost_model.trainer.Trainer(lambda: copy.copy(world), agent, cost_model.BASE, 1)
    learner.iterate()
    agent.feature.cache_clear()
    with measure.Count(agent) as count:
        learner.iterate()
    items = cost_model.items_of(agent, world)
    calls = {False: (1.0, 1e99), True: (1.0, 1e99)}
    flops = {False: (0.0, 1.0), True: (0.0, 0.5)}
    predicted = cost_model.predict(agent, items, cost_model.BASE, calls)
    assert count.calls == pytest.approx(predicted, rel=0.25)
    predicted = cost_model.predict(agent, items, cost_model.BASE, flops)
    assert float(count.flops) == pytest.approx(predicted, rel=0.25)

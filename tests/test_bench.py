"""The benchmark measures what it says: the published way gives the same scores and values, counts and clocks add up."""
import copy
import json
import os
import sys
import time

import pytest
import torch

import envs
import ppo
import twosome

sys.path.insert(0, os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "experiments"))
import bench  # noqa: E402
import cost_model  # noqa: E402
import measure  # noqa: E402


@pytest.fixture(scope="module")
def agent():
    made = bench.load("tiny")
    torch.nn.init.normal_(made.critic[-1].weight)  # a fresh critic says 0 to everything
    return made


def states(count=6):
    env = envs.make("overcooked")
    infos = [env.reset()[1]] + [env.step(action % 5)[4] for action in range(count - 1)]
    return [twosome.describe(info) for info in infos]


def test_the_published_way_is_the_same_policy_and_critic(agent):
    items, old = states(), bench.Published(agent)
    with torch.no_grad():
        for mine, theirs in zip(agent.log_probs(items), old.log_probs(items), strict=True):
            assert torch.allclose(mine, theirs, atol=1e-5)
        assert torch.allclose(agent.values(items), old.values(items), atol=1e-5)


def test_tokens_and_flops_are_counted_as_by_hand(agent):
    ids, config = torch.zeros(3, 7, dtype=torch.long), agent.model.config
    with measure.Count(agent) as count, torch.no_grad():
        agent.model(input_ids=ids, use_cache=False)
    H, L, I, V = config.hidden_size, config.num_hidden_layers, config.intermediate_size, config.vocab_size
    layer = 4 * H * H + 3 * H * I + 2 * 2 * 8 * H  # q, k, v, o; gate, up, down; LoRA of rank 8 on q and v
    assert (count.calls, count.tokens) == (1, 21)
    assert count.flops == 21 * (2 * L * layer + 2 * H * V) + 4 * H * L * 3 * (7 * 8 // 2)
    siblings = torch.full((3, 1, 7, 7), torch.finfo(torch.float32).min).masked_fill(torch.eye(7, dtype=torch.bool), 0.0)
    with measure.Count(agent) as count, torch.no_grad():  # of a tree's mask, what is seen
        agent.model(input_ids=ids, attention_mask=siblings, use_cache=False)
    assert count.flops == 21 * (2 * L * layer + 2 * H * V) + 4 * H * L * 3 * 7


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
    assert clock.spent["outer"] >= 0.02 and clock.spent["inner of outer"] >= 0.03
    assert sum(clock.spent.values()) == pytest.approx(time.perf_counter() - start, abs=0.01)


def test_the_whole_benchmark_at_a_tiny_shape(tmp_path, capsys):
    assert bench.main(["--shape", "tiny", "--repeats", "1", "--threads", "1", "--out", str(tmp_path)]) == 0
    facts = json.load(open(tmp_path / "compare-tiny.json"))
    rows = {row["part"]: row for row in facts["rows"]}
    whole = rows["PPO iteration, published sizes"]
    assert whole["ratio"] > 1 and whole["ours"]["tokens"] * 5 < whole["published"]["tokens"]
    assert rows["critic, prompts met before"]["ours"]["tokens"] == 0
    assert max(facts["largest_difference_of_metrics"].values()) < 1e-4  # both ways end an iteration alike
    assert (tmp_path / "compare-tiny.md").read_text().count("\n") == 2 + len(rows) and "| part |" in capsys.readouterr().out


def test_the_cost_model_counts_what_an_iteration_computes(agent):
    """With a world met whole, the expected number of distinct prompts is the world's size, and the rest follows by hand."""
    world = cost_model.Drill(distinct=2, prompt=10)
    items = [twosome.describe(info) for info in world.infos]
    assert len(set(items)) == 2 and all(len(set(phrases)) == 5 for _, phrases in items)
    scoring, critic = cost_model.packed_flops(agent, items)
    seconds = cost_model.predict(agent, items, cost_model.BASE, {False: (0.0, 1e9), True: (0.0, 1e9)})
    assert seconds == pytest.approx((2 * (scoring + critic) + 4 * 2 * scoring) / 1e9, rel=1e-3)


def test_the_cost_model_predicts_the_calls_and_flops_of_a_real_iteration(agent):
    world = cost_model.Drill(distinct=64, prompt=10)
    trainer = ppo.PPO(lambda: copy.copy(world), agent, cost_model.BASE, seed=1)
    trainer.iterate()
    agent._features.clear()
    with measure.Count(agent) as count:
        trainer.iterate()
    items = [twosome.describe(info) for info in world.infos]
    calls = cost_model.predict(agent, items, cost_model.BASE, {False: (1.0, 1e99), True: (1.0, 1e99)})
    flops = cost_model.predict(agent, items, cost_model.BASE, {False: (0.0, 1.0), True: (0.0, 0.5)})
    assert count.calls == pytest.approx(calls, rel=0.25) and count.flops == pytest.approx(flops, rel=0.25)

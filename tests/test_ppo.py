"""ppo.py against independent oracles: plain sums, hand-computed losses, a problem with a known answer, an MLP agent."""
import dataclasses
import math

import numpy as np
import pytest
import torch

import envs
import ppo


class MLP:
    """PPO without an LLM: 64-64 tanh networks on the vector observation (published scripts' baseline)."""

    def __init__(self, observations, actions, seed=0):
        torch.manual_seed(seed)
        network = lambda outputs: torch.nn.Sequential(
            torch.nn.Linear(observations, 64), torch.nn.Tanh(), torch.nn.Linear(64, 64), torch.nn.Tanh(), torch.nn.Linear(64, outputs))
        self.actor, self.critic, self.changes = network(actions), network(1), 0
        torch.nn.init.zeros_(self.critic[-1].weight)

    def encode(self, obs, info):
        return tuple(obs.tolist()), tuple(info.get("admissible", ()))

    def log_probs(self, items):
        logits = self.actor(torch.tensor([obs for obs, _ in items], dtype=torch.float32))
        return [(row[list(admissible)] if admissible else row).log_softmax(-1) for row, (_, admissible) in zip(logits, items)]

    def values(self, items):
        return self.critic(torch.tensor([obs for obs, _ in items], dtype=torch.float32))[:, 0]

    def policy_parameters(self):
        return list(self.actor.parameters())

    def value_parameters(self):
        return list(self.critic.parameters())

    def policy_changed(self):
        self.changes += 1


class Corridor:
    """Cells 0..3; action 1 goes right in two primitive steps, action 0 stays for one. Right of 3 is the end, reward 1; cut after 12."""

    def reset(self, seed=None):
        self.cell, self.time = 0, 0
        return self.observe(), {}

    def observe(self):
        return np.eye(4, dtype=np.float32)[min(self.cell, 3)]

    def step(self, action):
        duration = 2 if action else 1
        self.cell, self.time = self.cell + action, self.time + duration
        done = self.cell > 3
        return self.observe(), float(done), done, self.time >= 12 and not done, {"duration": duration}

    def state_dict(self):
        return {"cell": self.cell, "time": self.time}

    def load_state_dict(self, state):
        self.cell, self.time = state["cell"], state["time"]
        return self.observe(), {}


SMALL = ppo.Config(steps=4096, num_envs=4, rollout_steps=32, epochs=1, minibatch=32, policy_lr=3e-3, critic_lr=3e-3, gamma=0.9, entropy=0.01)


def test_gae_is_the_plain_sum():
    """A_t = sum over later steps of the product of gamma^tau lambda, times delta, until the episode ends: written out."""
    rng = np.random.default_rng(0)
    T, N, lam = 9, 3, 0.9
    r, v, after = (torch.tensor(rng.normal(size=(T, N))) for _ in range(3))
    g = torch.tensor(0.9 ** rng.integers(1, 5, size=(T, N)))
    terminated = torch.tensor(rng.random((T, N)) < 0.2)
    ended = terminated | torch.tensor(rng.random((T, N)) < 0.2)
    advantages, returns = ppo.gae(r, v, after, g, terminated, ended, lam)
    for t in range(T):
        for n in range(N):
            total, weight = 0.0, 1.0
            for k in range(t, T):
                total += weight * (r[k, n] + g[k, n] * after[k, n] * (not terminated[k, n]) - v[k, n])
                if ended[k, n]:
                    break
                weight *= g[k, n] * lam
            assert advantages[t, n].item() == pytest.approx(float(total))
            assert returns[t, n].item() == pytest.approx(float(total + v[t, n]))


def test_losses_by_hand():
    old = torch.log(torch.tensor([0.5, 0.5, 0.5]))
    new = torch.log(torch.tensor([0.75, 0.25, 0.5]))
    # ratios 1.5, 0.5, 1: a gain is capped at 1.2, a loss is never
    assert ppo.policy_loss(new, old, torch.tensor([1.0, 1.0, -1.0]), 0.2).tolist() == pytest.approx([-1.2, -0.5, 1.0])
    assert ppo.policy_loss(new, old, torch.tensor([-1.0, -1.0, 0.0]), 0.2).tolist() == pytest.approx([1.5, 0.8, 0.0])
    assert ppo.value_loss(torch.tensor([1.0]), torch.tensor([0.0]), torch.tensor([1.0]), 0.2).item() == pytest.approx(0.5 * 0.8 ** 2)
    assert ppo.value_loss(torch.tensor([0.1]), torch.tensor([0.0]), torch.tensor([1.0]), 0.2).item() == pytest.approx(0.5 * 0.9 ** 2)
    assert ppo.entropy(torch.log(torch.tensor([0.5, 0.25, 0.25]))).item() == pytest.approx(1.5 * math.log(2))
    assert ppo.approximate_kl(new, old).item() == pytest.approx(np.mean([0.5 - math.log(1.5), -0.5 - math.log(0.5), 0]))


def test_advantages_keep_small_noise_small():
    noise = torch.tensor([1e-4, -1e-4, 1e-4, -1e-4])
    assert ppo.normalize_advantages(noise).abs().max().item() == pytest.approx(1e-4 / 0.02)
    large = ppo.normalize_advantages(torch.tensor([[3.0, 1.0], [5.0, 7.0]]))
    assert large.mean().item() == pytest.approx(0, abs=1e-6) and large.std(unbiased=False).item() == pytest.approx(1)
    assert torch.equal(ppo.normalize_advantages(torch.tensor([0.7])), torch.zeros(1))  # one sample: 0, not NaN


def test_sampling_follows_the_probabilities():
    rng, log_probs = np.random.default_rng(0), torch.log(torch.tensor([0.1, 0.6, 0.3]))
    counts = np.bincount([ppo.sample(log_probs, rng) for _ in range(20_000)], minlength=3) / 20_000
    assert np.abs(counts - [0.1, 0.6, 0.3]).max() < 0.015


def test_truncation_bootstraps_and_termination_does_not():
    """With V = 5 everywhere, what follows a cut is worth gamma^tau 5 and what follows the end is worth 0."""
    agent = MLP(4, 2)
    agent.values = lambda items: torch.full((len(items),), 5.0)
    rollout = ppo.PPO(Corridor, agent, SMALL, seed=3).rollout()
    advantages, returns = ppo.gae(rollout.rewards, rollout.values, rollout.next_values, 0.9 ** rollout.durations,
                                  rollout.terminated, rollout.ended, 0.0)
    cut = rollout.ended & ~rollout.terminated
    assert cut.any() and rollout.terminated.any()
    assert torch.allclose(returns[cut], 0.9 ** rollout.durations[cut] * 5)
    assert torch.allclose(returns[rollout.terminated], torch.ones(int(rollout.terminated.sum())))
    assert set(rollout.durations.flatten().tolist()) == {1, 2}


def test_bootstraps_from_the_final_observation_not_the_next_episodes():
    agent = MLP(4, 2)
    agent.values = lambda items: torch.tensor([float(np.argmax(obs)) for obs, _ in items])  # V(cell) = cell
    trainer = ppo.PPO(Corridor, agent, SMALL, seed=3)
    trainer.agent.log_probs = lambda items: [torch.log(torch.tensor([0.8, 0.2]))] * len(items)
    rollout = trainer.rollout()
    cut = rollout.ended & ~rollout.terminated
    assert torch.equal(rollout.next_values[cut], (rollout.values + rollout.choices)[cut])  # a cell further, where it went; a fresh episode has V = 0
    assert rollout.next_values[cut].any()


def test_learns_the_corridor():
    trainer = ppo.PPO(Corridor, MLP(4, 2), SMALL, seed=1)
    while trainer.updates < trainer.total_updates:
        metrics = trainer.iterate()
    result = ppo.evaluate(Corridor, trainer.agent, 50, seed=9, gamma=0.9)
    assert result["returns"].mean() > 0.95 * 0.9 ** 6  # the best: four moves of two steps, reward at the end of the last
    assert metrics["success"] > 0.9 and metrics["steps"] == 4096


def test_an_mlp_learns_overcooked_with_the_same_code():
    make_env = lambda: envs.make("overcooked", task="tomato-salad")
    config = ppo.Config(steps=6144, num_envs=4, rollout_steps=128, minibatch=128, epochs=4, policy_lr=1e-3)
    env = make_env()
    agent = MLP(len(env.feature_names), len(env.action_names))
    before = ppo.evaluate(make_env, agent, 30, seed=9, gamma=0.99)["returns"].mean()
    trainer = ppo.PPO(make_env, agent, config, seed=1)
    while trainer.updates < trainer.total_updates:
        trainer.iterate()
    assert ppo.evaluate(make_env, agent, 30, seed=9, gamma=0.99)["returns"].mean() > before + 0.2


@pytest.mark.parametrize("parts", [2, 8])
def test_gradient_accumulation_changes_nothing(parts):
    def weights(config):
        trainer = ppo.PPO(Corridor, MLP(4, 2), config, seed=1)
        for _ in range(3):
            trainer.iterate()
        return torch.cat([p.flatten() for p in trainer.agent.policy_parameters()])
    assert torch.allclose(weights(SMALL), weights(dataclasses.replace(SMALL, gradient_accumulation=parts)), atol=1e-5)


def test_target_kl_is_checked_before_the_step():
    """The first minibatch's KL is 0 and steps; with a tiny bound the second is refused, and refused before it moves anything."""
    agent = MLP(4, 2)
    trainer = ppo.PPO(Corridor, agent, dataclasses.replace(SMALL, policy_lr=0.1, target_kl=1e-9), seed=1)
    trainer.iterate()
    steps = {state["step"].item() for state in trainer.policy_optimizer.state.values()}
    assert steps == {1.0} and all(p.grad is None for p in agent.policy_parameters())
    assert {state["step"].item() for state in trainer.value_optimizer.state.values()} == {4.0}  # the critic goes on


def test_non_finite_gradients_are_dropped_counted_and_finally_fatal():
    agent = MLP(4, 2)
    trainer = ppo.PPO(Corridor, agent, SMALL, seed=1)
    before = [p.clone() for p in agent.value_parameters()]
    for count in range(1, trainer.MAX_SKIPPED):
        (agent.critic[0].weight.sum() * float("nan")).backward()
        trainer.step(trainer.value_optimizer, agent.value_parameters())
        assert trainer.skipped == count
    assert all(torch.equal(p, q) for p, q in zip(before, agent.value_parameters()))
    (agent.critic[0].weight.sum() * float("nan")).backward()
    with pytest.raises(ppo.NonFiniteError):
        trainer.step(trainer.value_optimizer, agent.value_parameters())


def test_annealing_ends_near_zero_and_counts_are_exact():
    trainer = ppo.PPO(Corridor, MLP(4, 2), dataclasses.replace(SMALL, steps=1000), seed=1)  # 7 rollouts of 128
    rates = [trainer.iterate()["learning_rate"] for _ in range(trainer.total_updates)]
    assert trainer.total_updates == 7 and trainer.steps == 896
    assert rates == pytest.approx([SMALL.policy_lr * (1 - i / 7) for i in range(7)])


def test_same_seed_same_run_and_a_state_dict_continues_it():
    def run(updates, trainer):
        return [trainer.iterate() for _ in range(updates)]
    whole = ppo.PPO(Corridor, MLP(4, 2), SMALL, seed=1)
    rows = run(4, whole)
    half = ppo.PPO(Corridor, MLP(4, 2), SMALL, seed=1)
    np.testing.assert_equal(run(2, half), rows[:2])
    other = ppo.PPO(Corridor, half.agent, SMALL, seed=99)
    other.load_state_dict(half.state_dict())
    other.policy_optimizer.load_state_dict(half.policy_optimizer.state_dict())
    other.value_optimizer.load_state_dict(half.value_optimizer.state_dict())
    np.testing.assert_equal(run(2, other), rows[2:])


def recorded(agent, gradients):
    """A list to which each of the agent's later calls of log_probs, with or without gradients, adds its items."""
    score, seen = agent.log_probs, []
    agent.log_probs = lambda items: (torch.is_grad_enabled() == gradients and seen.append(list(items)), score(items))[1]
    return seen


def test_a_minibatchs_distinct_items_are_computed_once():
    agent = MLP(4, 2)
    seen = recorded(agent, gradients=True)
    ppo.PPO(Corridor, agent, SMALL, seed=1).iterate()
    assert agent.changes == 1 + 4  # before the rollout, and after each step: what was remembered is forgotten
    assert len(seen) == 4 and all(len(set(items)) == len(items) < SMALL.minibatch for items in seen)


def test_what_a_rollout_met_more_than_once_is_scored_ahead_in_one_call():
    agent = MLP(4, 2)
    seen = recorded(agent, gradients=False)
    trainer = ppo.PPO(Corridor, agent, SMALL, seed=1)
    trainer.iterate()
    rollout = [item for items in seen for item in items]
    assert len(seen) == SMALL.rollout_steps  # nothing had been met before the first
    seen.clear()
    trainer.iterate()
    assert len(seen) == 1 + SMALL.rollout_steps and len(set(seen[0])) == len(seen[0])
    assert set(seen[0]) == {item for item in rollout if rollout.count(item) > 1} != set()


def test_without_any_reward_the_policy_stays_as_it_is(monkeypatch):
    """A prior must outlast the wait for the first reward: a fresh critic says 0, and the entropy bonus alone must not move the policy."""
    step = Corridor.step
    monkeypatch.setattr(Corridor, "step", lambda self, action: (lambda obs, _, *rest: (obs, 0.0, *rest))(*step(self, action)))
    agent = MLP(4, 2)
    torch.nn.init.zeros_(agent.critic[-1].bias)
    before = [parameter.clone() for parameter in agent.policy_parameters()]
    trainer = ppo.PPO(Corridor, agent, SMALL, seed=1)
    rows = [trainer.iterate() for _ in range(3)]
    assert rows[-1]["entropy"] > 0.1 and all(map(torch.equal, before, agent.policy_parameters()))


def test_evaluation_does_not_favour_short_episodes():
    """A policy that mostly stays: its few quick successes must not crowd out the many episodes that the time limit cuts."""
    agent = MLP(4, 2)
    agent.log_probs = lambda items: [torch.log(torch.tensor([0.9, 0.1]))] * len(items)
    result = ppo.evaluate(Corridor, agent, 400, seed=5, gamma=0.9)
    # Four moves of two primitive steps among stays of one, the fourth begun before step 12: at most 5 stays.
    exact = sum(math.comb(stays + 3, 3) * 0.1 ** 4 * 0.9 ** stays for stays in range(6))
    assert len(result["returns"]) == 400 and abs(result["successes"].mean() - exact) < 4 * (exact / 400) ** 0.5
    again = ppo.evaluate(Corridor, agent, 400, seed=5, gamma=0.9)
    assert np.array_equal(result["returns"], again["returns"])


@pytest.mark.parametrize("change, word", [
    (dict(minibatch=48), "divide"), (dict(gradient_accumulation=5), "divide"), (dict(steps=0), "between 1 and"),
    (dict(num_envs=-1), "between 1 and"), (dict(steps=100), "rollout"), (dict(gamma=1.5), "between"), (dict(policy_lr=0.0), "positive"),
    (dict(policy_lr=float("nan")), "positive"), (dict(entropy=-1.0), "0 or")])
def test_impossible_settings_are_one_line(change, word):
    with pytest.raises(ppo.ConfigError, match=word) as error:
        dataclasses.replace(SMALL, **change).validate()
    assert "\n" not in str(error.value)

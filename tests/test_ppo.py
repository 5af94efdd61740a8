"""ppo.py against independent oracles: plain sums, losses by hand, known answers, an MLP agent."""
import dataclasses
import math

import numpy as np
import pytest
import torch

import envs
import ppo


class MLP:
    """PPO without an LLM: 64-64 tanh networks on the vector observation."""

    def __init__(self, observations, actions, seed=0):
        torch.manual_seed(seed)
        self.actor = self.network(observations, actions)
        self.critic = self.network(observations, 1)
        torch.nn.init.zeros_(self.critic[-1].weight)
        torch.nn.init.zeros_(self.critic[-1].bias)
        self.changes = 0
        self.passes = 0  # calls of log_probs with gradients

    def network(self, inputs, outputs):
        return torch.nn.Sequential(
            torch.nn.Linear(inputs, 64), torch.nn.Tanh(),
            torch.nn.Linear(64, 64), torch.nn.Tanh(), torch.nn.Linear(64, outputs))

    def describe(self, obs, info):
        return tuple(obs.tolist()), tuple(info.get("admissible", ()))

    def log_probs(self, items):
        self.passes += torch.is_grad_enabled()
        logits = self.actor(torch.tensor([obs for obs, _ in items]))
        rows = zip(logits, items, strict=True)
        return [(row[list(some)] if some else row).log_softmax(-1) for row, (_, some) in rows]

    def values(self, items):
        return self.critic(torch.tensor([obs for obs, _ in items]))[:, 0]

    def policy_parameters(self):
        return list(self.actor.parameters())

    def value_parameters(self):
        return list(self.critic.parameters())

    def policy_changed(self):
        self.changes += 1


class Fixed(MLP):
    """A policy of two actions that never changes, and a critic that is told what to say."""

    def __init__(self, *chances, value=None):
        super().__init__(4, 2)
        self.chances = torch.tensor(chances)
        self.value = value or (lambda obs: 0.0)

    def log_probs(self, items):
        return [self.chances.log() for _ in items]

    def values(self, items):
        return torch.tensor([self.value(obs) for obs, _ in items])


class Corridor:
    """Cells 0 to 3, and right of the last one the end, with reward 1.

    Action 1 goes right in two primitive steps, action 0 stays for one. A time limit cuts an
    episode after 12 primitive steps.
    """

    REWARD = 1.0

    def reset(self, seed=None):
        self.cell, self.time = 0, 0
        return self.observe()

    def observe(self):
        return np.eye(4, dtype=np.float32)[min(self.cell, 3)], {}

    def step(self, action):
        duration = 2 if action else 1
        self.cell += int(action)
        self.time += duration
        done = self.cell > 3
        obs, _ = self.observe()
        cut = self.time >= 12 and not done
        return obs, self.REWARD * done, done, cut, {"duration": duration}

    def state_dict(self):
        return {"cell": self.cell, "time": self.time}

    def load_state_dict(self, state):
        self.cell, self.time = state["cell"], state["time"]


class Barren(Corridor):
    """A corridor without any reward."""

    REWARD = 0.0


SMALL = ppo.Config(steps=4096, num_envs=4, rollout_steps=32, epochs=1, minibatch=32,
                   policy_lr=3e-3, critic_lr=3e-3, gamma=0.9, entropy=0.01)


def train(trainer):
    """Train to the end. Returns the rows of metrics."""
    return [trainer.iterate() for _ in range(trainer.total_updates - trainer.updates)]


def copies(parameters):
    return [parameter.detach().clone() for parameter in parameters]


def equal(before, parameters):
    return all(map(torch.equal, before, parameters))


# -----------------------------------------------------------------------------
# Equations.


def advantage_by_hand(t, n, deltas, discounts, ended, gae_lambda):
    """The sum of later deltas, each times its gamma^tau lambda, up to the episode's end."""
    total, weight = 0.0, 1.0
    for k in range(t, len(deltas)):
        total += weight * deltas[k, n]
        if ended[k, n]:
            break
        weight *= discounts[k, n] * gae_lambda
    return float(total)


def test_gae_is_the_plain_sum():
    rng = np.random.default_rng(0)
    shape = 9, 3
    rewards, values, after = (torch.tensor(rng.normal(size=shape)) for _ in range(3))
    discounts = torch.tensor(0.9 ** rng.integers(1, 5, size=shape))
    terminated = torch.tensor(rng.random(shape) < 0.2)
    ended = terminated | torch.tensor(rng.random(shape) < 0.2)
    assert (ended & ~terminated).any()
    advantages, returns = ppo.gae(rewards, values, after, discounts, terminated, ended, 0.9)
    deltas = rewards - values + torch.where(terminated, 0.0, discounts * after)
    for t, n in np.ndindex(shape):
        expected = advantage_by_hand(t, n, deltas, discounts, ended, 0.9)
        assert advantages[t, n].item() == pytest.approx(expected)
        assert returns[t, n].item() == pytest.approx(expected + values[t, n].item())


def test_losses_by_hand():
    old = torch.tensor([0.5, 0.5, 0.5]).log()
    new = torch.tensor([0.75, 0.25, 0.5]).log()
    # The ratios are 1.5, 0.5 and 1: a gain is capped at 1.2, a loss is never.
    gains = ppo.policy_loss(new, old, torch.tensor([1.0, 1.0, -1.0]), 0.2)
    assert gains.tolist() == pytest.approx([-1.2, -0.5, 1.0])
    losses = ppo.policy_loss(new, old, torch.tensor([-1.0, -1.0, 0.0]), 0.2)
    assert losses.tolist() == pytest.approx([1.5, 0.8, 0.0])
    values, zeros, ones = torch.tensor([1.0, 0.1]), torch.zeros(2), torch.ones(2)
    squares = ppo.value_loss(values, zeros, ones, 0.2)
    assert squares.tolist() == pytest.approx([0.5 * 0.8**2, 0.5 * 0.9**2])
    bits = ppo.entropy(torch.tensor([0.5, 0.25, 0.25]).log())
    assert bits.item() == pytest.approx(1.5 * math.log(2))
    kl = ppo.approximate_kl(new, old)
    assert kl.tolist() == pytest.approx([0.5 - math.log(1.5), -0.5 - math.log(0.5), 0])


def test_the_kl_estimate_has_no_bias():
    old = torch.tensor([0.7, 0.2, 0.1], dtype=torch.double)
    new = torch.tensor([0.5, 0.1, 0.4], dtype=torch.double)
    exact = (old * (old / new).log()).sum()
    mean = (old * ppo.approximate_kl(new.log(), old.log())).sum()
    assert mean.item() == pytest.approx(exact.item())


def test_small_noise_in_the_advantages_stays_small():
    noise = torch.tensor([1e-4, -1e-4, 1e-4, -1e-4])
    assert ppo.normalize_advantages(noise).abs().max().item() == pytest.approx(1e-4 / 0.02)
    large = ppo.normalize_advantages(torch.tensor([[3.0, 1.0], [5.0, 7.0]]))
    assert large.mean().item() == pytest.approx(0, abs=1e-6)
    assert large.std(unbiased=False).item() == pytest.approx(1)
    one_sample = ppo.normalize_advantages(torch.tensor([0.7]))
    assert torch.equal(one_sample, torch.zeros(1))


# -----------------------------------------------------------------------------
# Acting.


def test_sampling_follows_the_probabilities():
    rng, log_probs = np.random.default_rng(0), torch.tensor([0.1, 0.6, 0.3]).log()
    draws = [ppo.sample(log_probs, rng) for _ in range(20_000)]
    frequencies = np.bincount(draws, minlength=3) / len(draws)
    assert np.abs(frequencies - [0.1, 0.6, 0.3]).max() < 0.015


def test_one_number_is_drawn_however_many_actions_there_are():
    few, many = np.random.default_rng(0), np.random.default_rng(0)
    ppo.sample(torch.zeros(1), few)
    ppo.sample(torch.zeros(17).log_softmax(0), many)
    assert few.random() == many.random()


class Named:
    """Answers a step with the action that it was asked for."""

    def step(self, action):
        return action


@pytest.mark.parametrize("admissible, expected", [
    (np.array([4, 7, 9]), 9), ([4, 7, 9], 9), (range(4, 7), 6), (["go", "stay", "open"], "open"),
    (None, 2), ([], 2), (np.array([]), 2)])
def test_a_choice_is_one_of_the_admissible_actions(admissible, expected):
    assert ppo.act(Named(), {"admissible": admissible}, 2) == expected


def test_without_a_word_on_admissible_actions_all_are():
    assert ppo.act(Named(), {}, 2) == 2


class Listed(Corridor):
    """A corridor whose admissible actions come as a list, in reverse."""

    KIND = list

    def observe(self):
        obs, info = super().observe()
        return obs, {**info, "admissible": self.KIND([1, 0])}

    def step(self, action):
        *rest, info = super().step(action)
        return *rest, {**info, "admissible": self.KIND([1, 0])}


class Arrays(Listed):
    """The same, as a NumPy array, which has no truth value."""

    KIND = staticmethod(np.array)


def test_admissible_actions_as_a_numpy_array_train_as_a_list_does():
    rows = []
    for world in (Listed, Arrays):
        trainer = ppo.PPO(world, MLP(4, 2), SMALL, seed=1)
        rows.append([trainer.iterate() for _ in range(2)])
    np.testing.assert_equal(*rows)
    other = ppo.PPO(Corridor, MLP(4, 2), SMALL, seed=1).iterate()
    assert other["entropy"] != rows[0][0]["entropy"]  # the order did mean something


# -----------------------------------------------------------------------------
# The rollout.


def test_a_cut_bootstraps_and_the_end_does_not():
    """With V = 5 everywhere, a cut is worth gamma^tau 5 more and the end is worth nothing."""
    agent = Fixed(0.6, 0.4, value=lambda obs: 5.0)
    rollout = ppo.PPO(Corridor, agent, SMALL, seed=3).rollout()
    _, returns = ppo.gae(
        rollout.rewards, rollout.values, rollout.next_values, 0.9**rollout.durations,
        rollout.terminated, rollout.ended, 0.0)
    cut = rollout.ended & ~rollout.terminated
    assert cut.any() and rollout.terminated.any()
    assert torch.allclose(returns[cut], 0.9 ** rollout.durations[cut] * 5)
    assert returns[rollout.terminated].unique().tolist() == [1.0]
    assert rollout.durations.unique().tolist() == [1, 2]


def test_a_cut_bootstraps_from_its_last_observation_and_not_from_the_next_episodes_first():
    agent = Fixed(0.8, 0.2, value=lambda obs: float(np.argmax(obs)))  # V(cell) = cell
    rollout = ppo.PPO(Corridor, agent, SMALL, seed=3).rollout()
    cut = rollout.ended & ~rollout.terminated
    # A choice is a move of 0 or 1 cells. A fresh episode begins in cell 0, with V = 0.
    assert torch.equal(rollout.next_values[cut], (rollout.values + rollout.choices)[cut])
    assert rollout.next_values[cut].any()


def test_the_values_of_a_rollout_stand_beside_their_steps():
    agent = Fixed(0.6, 0.4, value=lambda obs: float(np.argmax(obs)))
    rollout = ppo.PPO(Corridor, agent, SMALL, seed=3).rollout()
    cells = [float(np.argmax(obs)) for obs, _ in rollout.items]
    assert rollout.values.flatten().tolist() == cells
    going_on = ~rollout.ended
    assert torch.equal(rollout.next_values[going_on], (rollout.values + rollout.choices)[going_on])
    assert torch.equal(rollout.log_probs, agent.chances.log()[rollout.choices])
    expected = -0.6 * math.log(0.6) - 0.4 * math.log(0.4)
    assert torch.allclose(rollout.entropies, torch.tensor(expected))


class Door(Corridor):
    """A corridor with a hole: action 0 ends the episode with reward -1, and nobody says success."""

    def step(self, action):
        if action:
            return super().step(action)
        return self.observe()[0], -1.0, True, False, {}


class Toll(Corridor):
    """A corridor that says that every end is a success, though it pays nothing."""

    REWARD = 0.0

    def step(self, action):
        *rest, info = super().step(action)
        return *rest, {**info, "success": True}


@pytest.mark.parametrize("world", [Door, Corridor, Toll])
def test_a_world_that_does_not_say_success_is_solved_where_its_last_reward_is_positive(world):
    agent = Fixed(0.2, 0.8)
    rollout = ppo.PPO(world, agent, SMALL, seed=3).rollout()
    expected = rollout.ended if world is Toll else rollout.rewards > 0
    assert expected.any() and not expected.all() and (world is not Door or (~expected).any())
    assert torch.equal(rollout.successes.bool(), expected)
    result = ppo.evaluate(world, agent, 60, seed=3, gamma=0.9)
    assert np.array_equal(result["successes"] > 0, (result["returns"] > 0) | (world is Toll))


# -----------------------------------------------------------------------------
# Episodes, against a plain list of all that ever began.


def random_rollout(rng, steps, num_envs):
    """A Rollout of random numbers, in which episodes last some five steps."""
    shape = steps, num_envs
    ended = torch.tensor(rng.random(shape) < 0.2)
    tensors = {field.name: torch.zeros(shape) for field in dataclasses.fields(ppo.Rollout)[1:]}
    tensors["rewards"] = torch.tensor(rng.normal(size=shape))
    tensors["durations"] = torch.tensor(rng.integers(1, 4, size=shape)).float()
    tensors["ended"] = ended
    tensors["successes"] = ended & torch.tensor(rng.random(shape) < 0.5)
    return ppo.Rollout([], **tensors)


class History:
    """All episodes in the order in which they began. Slow, and plain."""

    def __init__(self, num_envs):
        self.all = []
        self.running = [self.begin() for _ in range(num_envs)]

    def begin(self):
        self.all.append({"rewards": [], "durations": [], "over": False})
        return self.all[-1]

    def add(self, rollout):
        for t, n in np.ndindex(*rollout.rewards.shape):
            episode = self.running[n]
            episode["rewards"].append(rollout.rewards[t, n].item())
            episode["durations"].append(rollout.durations[t, n].item())
            if rollout.ended[t, n]:
                episode["over"] = True
                episode["success"] = float(rollout.successes[t, n])
                self.running[n] = self.begin()

    def means(self, gamma):
        """Over the last hundred of those before which nothing runs: return, success, length."""
        counted = []
        if not all(episode["over"] for episode in self.all[:len(self.running)]):
            return np.full(3, np.nan)
        for episode in self.all:
            if not episode["over"]:
                break
            value, time = 0.0, 0
            for reward, duration in zip(episode["rewards"], episode["durations"], strict=True):
                value += gamma**time * reward
                time += duration
            counted.append((value, episode["success"], time))
        return np.mean(counted[-100:] or [[np.nan] * 3], axis=0)


@pytest.mark.parametrize("num_envs, steps", [(1, 4), (3, 5), (16, 32)])
def test_an_episode_counts_once_all_that_began_before_it_have_ended(num_envs, steps):
    rng = np.random.default_rng(num_envs)
    episodes, history = ppo.Episodes(num_envs, 0.9), History(num_envs)
    total = 0
    for _ in range(40):
        rollout = random_rollout(rng, steps, num_envs)
        episodes.add(rollout)
        history.add(rollout)
        total += int(rollout.durations.sum())
        found = episodes.means()
        columns = [found["return"], found["success"], found["episode_steps"]]
        np.testing.assert_allclose(columns, history.means(0.9), rtol=1e-5, atol=1e-6)
        assert found["episodes"] == sum(episode["over"] for episode in history.all)
        assert found["primitive_steps"] == total
        # What is kept does not grow with the run.
        assert len(episodes.ended) <= 100 + sum(episode["over"] for episode in history.all[-200:])
    assert found["episodes"] > 20


@pytest.mark.parametrize("first", [0, 1])
def test_quick_successes_do_not_come_before_the_slow_failures_that_began_with_them(first):
    episodes = ppo.Episodes(2, 1.0)
    rollout = random_rollout(np.random.default_rng(0), 1, 2)
    quick = torch.tensor([[n == first for n in range(2)]])
    rollout.rewards[:] = quick.float()
    rollout.ended[:] = rollout.successes[:] = quick
    episodes.add(rollout)
    assert math.isnan(episodes.means()["success"])  # the failure that began with it still runs
    rollout.ended[:] = ~quick
    episodes.add(rollout)
    assert episodes.means()["success"] == 0.5


# -----------------------------------------------------------------------------
# The update.


def test_learns_the_corridor():
    trainer = ppo.PPO(Corridor, MLP(4, 2), SMALL, seed=1)
    metrics = train(trainer)[-1]
    result = ppo.evaluate(Corridor, trainer.agent, 50, seed=9, gamma=0.9)
    # The best: four moves of two steps, and the reward at the end of the last.
    assert result["returns"].mean() > 0.95 * 0.9**6
    assert metrics["success"] > 0.9
    assert metrics["steps"] == 4096


def test_an_mlp_learns_overcooked_with_the_same_code():
    env = envs.make("overcooked", task="tomato-salad")
    agent = MLP(len(env.feature_names), len(env.action_names))
    config = ppo.Config(steps=6144, num_envs=4, rollout_steps=128, minibatch=128, epochs=4,
                        policy_lr=1e-3)

    def mean_return():
        played = ppo.evaluate(make_env, agent, 30, seed=9, gamma=0.99)
        return played["returns"].mean()

    def make_env():
        return envs.make("overcooked", task="tomato-salad")

    before = mean_return()
    train(ppo.PPO(make_env, agent, config, seed=1))
    assert mean_return() > before + 0.2


def test_every_sample_comes_once_an_epoch():
    config = dataclasses.replace(SMALL, epochs=3)
    batches = list(ppo.PPO(Corridor, MLP(4, 2), config, seed=1).minibatches(128))
    assert {len(batch) for batch in batches} == {32} and len(batches) == 12
    epochs = torch.cat(batches).view(3, 128)
    assert torch.equal(epochs.sort()[0], torch.arange(128).expand(3, 128))
    assert not torch.equal(epochs[0], epochs[1])


def test_the_critic_may_take_smaller_and_more_steps_than_the_policy():
    sizes = []
    trainer = ppo.PPO(Corridor, MLP(4, 2), dataclasses.replace(SMALL, critic_minibatch=12))
    step = trainer.critic_step
    trainer.critic_step = lambda *args: sizes.append(len(args[2])) or step(*args)
    trainer.iterate()
    assert sizes == [12, 12, 8] * 4


def test_the_parts_of_a_minibatch_add_up_to_the_whole():
    def gradient(parts):
        agent = MLP(4, 2)
        trainer = ppo.PPO(Corridor, agent, SMALL, seed=1)
        rollout = trainer.rollout()
        advantages = torch.linspace(-1, 1, 128).view(32, 4)
        measured = [trainer.policy_gradient(rollout, advantages, part)
                    for part in torch.arange(32).split(parts)]
        sums = [sum(row[name] for row in measured) for name in ("policy_loss", "kl")]
        return torch.cat([p.grad.flatten() for p in agent.policy_parameters()]), sums

    whole, measures = gradient(32)
    assert whole.abs().max() > 1e-3
    for size in (1, 8, 20):
        added, sums = gradient(size)
        assert torch.allclose(added, whole, atol=1e-7)
        assert sums == pytest.approx(measures, abs=1e-6)


def test_the_penalty_adds_its_weight_times_the_drift():
    """It is asked for once a step of the policy, and each update begins one turn later."""
    class Held(MLP):
        def drift(self, turn):
            self.turns.append(turn)
            return self.actor[-1].bias.sum()
    agent = Held(4, 2)
    agent.turns = []
    trainer = ppo.PPO(Corridor, agent, dataclasses.replace(SMALL, base_kl=0.5), seed=1)
    trainer.hold(7)
    assert agent.turns == [7] and agent.actor[-1].bias.grad.tolist() == [0.5, 0.5]
    agent.actor.zero_grad()
    trainer.iterate()
    per_update = 128 // SMALL.minibatch * SMALL.epochs
    assert agent.turns[1:] == list(range(len(agent.turns) - 1)) and 0 < len(agent.turns) - 1
    assert len(agent.turns) - 1 <= per_update
    agent.turns.clear()
    trainer.iterate()
    assert agent.turns[0] == 1  # the next update begins one text group later


def test_without_a_penalty_no_agent_needs_to_know_its_drift():
    assert ppo.Config().base_kl == 0.0 and not hasattr(MLP(4, 2), "drift")
    ppo.PPO(Corridor, MLP(4, 2), SMALL, seed=1).hold(0)


def test_the_bound_on_the_kl_is_checked_before_the_step():
    """The first minibatch's KL is 0 and steps; the second is refused before it moves anything."""
    agent = MLP(4, 2)
    config = dataclasses.replace(SMALL, policy_lr=0.1, target_kl=1e-9)
    trainer = ppo.PPO(Corridor, agent, config, seed=1)
    trainer.iterate()
    counts = {state["step"].item() for state in trainer.policy_optimizer.state.values()}
    assert counts == {1.0}
    assert agent.passes == 2
    assert all(parameter.grad is None for parameter in agent.policy_parameters())
    # The critic goes on.
    counts = {state["step"].item() for state in trainer.value_optimizer.state.values()}
    assert counts == {4.0}


def test_no_bound_on_the_kl_means_every_step():
    config = dataclasses.replace(SMALL, policy_lr=0.1, target_kl=0)
    trainer = ppo.PPO(Corridor, MLP(4, 2), config, seed=1)
    trainer.iterate()
    counts = {state["step"].item() for state in trainer.policy_optimizer.state.values()}
    assert counts == {4.0}


def test_the_agent_is_told_of_every_change_of_its_policy():
    agent = MLP(4, 2)
    ppo.PPO(Corridor, agent, SMALL, seed=1).iterate()
    assert agent.changes == 1 + 4  # before the rollout, and after each of its four steps


def test_gradients_are_clipped_apart():
    agent = MLP(4, 2)
    config = dataclasses.replace(SMALL, max_grad_norm=0.5)
    trainer = ppo.PPO(Corridor, agent, config, seed=1)
    norms = []
    trainer.policy_optimizer.step = lambda: norms.append(norm(agent.policy_parameters()))
    for parameter in agent.policy_parameters():
        parameter.grad = torch.ones_like(parameter)
    for parameter in agent.value_parameters():
        parameter.grad = torch.full_like(parameter, 1e6)
    trainer.step(trainer.policy_optimizer)
    assert norms == [pytest.approx(0.5, rel=1e-4)]
    assert all(parameter.grad is None for parameter in agent.policy_parameters())
    assert all(parameter.grad is not None for parameter in agent.value_parameters())


def norm(parameters):
    return torch.cat([parameter.grad.flatten() for parameter in parameters]).norm().item()


def test_while_every_advantage_is_zero_the_policy_is_left_alone():
    """A prior must outlast the wait for the first reward, and the wait must be cheap."""
    agent = MLP(4, 2)
    before = copies(agent.policy_parameters())
    trainer = ppo.PPO(Barren, agent, SMALL, seed=1)
    rows = [trainer.iterate() for _ in range(3)]
    assert equal(before, agent.policy_parameters())
    assert agent.passes == 0 and not trainer.policy_optimizer.state
    assert rows[-1]["entropy"] > 0.1 and rows[-1]["episodes"] > 0
    assert math.isnan(rows[-1]["policy_loss"]) and math.isnan(rows[-1]["kl"])
    assert rows[-1]["value_loss"] == 0


def test_the_bonus_acts_as_soon_as_an_advantage_is_not_zero():
    """Every step costs as much as any other: an advantage, though no action is better."""
    def entropy_after(bonus):
        class Costly(Barren):
            def step(self, action):
                obs, _, *rest = super().step(action)
                return obs, -0.001, *rest

        config = dataclasses.replace(SMALL, entropy=bonus, policy_lr=1e-2, target_kl=0)
        agent = MLP(4, 2)
        trainer = ppo.PPO(Costly, agent, config, seed=1)
        return [trainer.iterate()["entropy"] for _ in range(6)][-1], agent.passes

    with_bonus, passes = entropy_after(1.0)
    without, _ = entropy_after(0.0)
    assert passes == 6 * 4
    assert with_bonus > without + 0.01


def test_the_columns_of_the_metrics_are_always_the_same():
    barren = ppo.PPO(Barren, MLP(4, 2), SMALL, seed=1)
    first, second = barren.iterate(), barren.iterate()
    fruitful = ppo.PPO(Corridor, MLP(4, 2), SMALL, seed=1).iterate()
    assert list(first) == list(second) == list(fruitful)
    assert all(isinstance(value, (int, float)) for value in fruitful.values())
    short = dataclasses.replace(SMALL, rollout_steps=1, minibatch=4)
    row = ppo.PPO(Corridor, MLP(4, 2), short, seed=1).iterate()  # no episode has ended yet
    assert list(row) == list(first)
    assert math.isnan(row["return"]) and math.isnan(row["success"])


def test_annealing_ends_near_zero_and_counts_are_exact():
    config = dataclasses.replace(SMALL, steps=1000)  # 7 rollouts of 128, and 104 steps left over
    trainer = ppo.PPO(Corridor, MLP(4, 2), config, seed=1)
    assert trainer.total_updates == 7
    for i in range(7):
        row = trainer.iterate()
        for optimizer, rate in ((trainer.policy_optimizer, config.policy_lr),
                                (trainer.value_optimizer, config.critic_lr)):
            assert optimizer.param_groups[0]["lr"] == pytest.approx(rate * (1 - i / 7))
        assert (row["update"], row["steps"]) == (i + 1, 128 * (i + 1))


def test_no_iteration_goes_past_the_last_update():
    """The rate would be negative, and the policy would climb away from the reward."""
    config = dataclasses.replace(SMALL, steps=256)
    trainer = ppo.PPO(Corridor, MLP(4, 2), config, seed=1)
    train(trainer)
    before = copies(trainer.agent.policy_parameters())
    with pytest.raises(ppo.PPOError, match="raise steps") as error:
        trainer.iterate()
    assert "\n" not in str(error.value)
    assert equal(before, trainer.agent.policy_parameters()) and trainer.updates == 2


def test_the_same_seed_gives_the_same_run_and_another_seed_another():
    def rows(seed):
        trainer = ppo.PPO(Corridor, MLP(4, 2), SMALL, seed=seed)
        return [trainer.iterate() for _ in range(3)]

    one = rows(1)
    np.testing.assert_equal(rows(1), one)
    assert rows(2)[0]["entropy"] != one[0]["entropy"]


@pytest.mark.parametrize("change, word", [
    ({"minibatch": 48}, "divide"), ({"minibatch": 0}, "divide"), ({"epochs": 0}, "divide"),
    ({"num_envs": -1}, "divide"), ({"critic_minibatch": 0}, "divide"),
    ({"steps": 0}, "rollout"), ({"steps": 100}, "rollout")])
def test_impossible_settings_are_one_line(change, word):
    config = dataclasses.replace(SMALL, **change)
    with pytest.raises(ppo.PPOError, match=word) as error:
        ppo.PPO(Corridor, MLP(4, 2), config)
    assert "\n" not in str(error.value)


# -----------------------------------------------------------------------------
# Evaluation.


def test_evaluation_does_not_favour_short_episodes():
    """Quick successes must not crowd out the many episodes that the time limit cuts."""
    agent = Fixed(0.9, 0.1)
    result = ppo.evaluate(Corridor, agent, 400, seed=5, gamma=0.9)
    # Four moves of two primitive steps among stays of one, the fourth begun before step 12: at
    # most five stays.
    exact = sum(math.comb(stays + 3, 3) * 0.1**4 * 0.9**stays for stays in range(6))
    assert len(result["returns"]) == len(result["steps"]) == 400
    assert abs(result["successes"].mean() - exact) < 4 * (exact / 400) ** 0.5
    # An end pays at the end of its last move, which began two primitive steps before it.
    solved = result["successes"] > 0
    np.testing.assert_allclose(result["returns"][solved], 0.9 ** (result["steps"][solved] - 2))
    assert not result["returns"][~solved].any()
    assert set(result["steps"][~solved]) <= {12, 13}


def test_evaluation_depends_on_its_seed_alone():
    def play(seed, episodes):
        return ppo.evaluate(Corridor, Fixed(0.5, 0.5), episodes, seed=seed, gamma=0.9)["returns"]

    assert np.array_equal(play(5, 60), play(5, 60))
    assert np.array_equal(play(5, 60)[:20], play(5, 20))  # each episode has its own generator
    assert not np.array_equal(play(5, 60), play(6, 60))


def test_greedy_evaluation_takes_the_most_probable_action():
    result = ppo.evaluate(Corridor, Fixed(0.4, 0.6), 5, seed=5, gamma=0.9, greedy=True)
    assert result["successes"].all() and set(result["steps"]) == {8}


def test_evaluation_reports_how_many_episodes_have_ended():
    counts = []
    ppo.evaluate(Corridor, Fixed(0.5, 0.5), 20, seed=5, gamma=0.9, report=counts.append)
    assert counts == sorted(counts) and counts[-1] == 20 and len(set(counts)) > 2


def test_evaluation_does_not_learn():
    agent = MLP(4, 2)
    before = copies(agent.policy_parameters() + agent.value_parameters())
    ppo.evaluate(Corridor, agent, 5, seed=5, gamma=0.9)
    assert agent.passes == 0
    assert equal(before, agent.policy_parameters() + agent.value_parameters())


@pytest.mark.parametrize("greedy", [False, True])
def test_log_probabilities_that_are_not_finite_are_no_plausible_numbers(greedy):
    agent = Fixed(float("nan"), 0.5)
    with pytest.raises(FloatingPointError, match="not finite"):
        ppo.evaluate(Corridor, agent, 3, seed=5, gamma=0.9, greedy=greedy)
    with pytest.raises(FloatingPointError, match="not finite"):
        ppo.PPO(Corridor, agent, SMALL, seed=1).iterate()

"""engine/trainer.py: what runs equals ppo.PPO, and bad numbers and interruptions change nothing."""
import dataclasses
import json
import math

import numpy as np
import pytest
import torch
import transformers
from test_ppo import MLP, SMALL, Corridor, copies, equal

import envs
import ppo
import twosome
from engine import models, trainer

CONFIG = trainer.Config(**dataclasses.asdict(SMALL))
# Three iterations of pocket_lm on the tomato salad, small enough for a test.
POCKET = trainer.Config(steps=4 * 64, num_envs=4, rollout_steps=16, minibatch=32, epochs=2)


def make_kitchen():
    return envs.make("overcooked", task="tomato-salad")


def pocket():
    transformers.set_seed(3)
    return twosome.Agent(*models.load("pocket_lm"))


def weights(agent):
    return copies(agent.policy_parameters() + agent.value_parameters())


def learn(kind, config, updates=3, make_env=Corridor, make_agent=None):
    """Take some updates with a class of trainers. Returns the weights and the rows of metrics."""
    agent = make_agent() if make_agent else MLP(4, 2)
    learner = kind(make_env, agent, config, seed=5)
    rows = [learner.iterate() for _ in range(updates)]
    return weights(agent), rows


# -----------------------------------------------------------------------------
# The same result as ppo.PPO's.


@pytest.fixture(scope="module")
def textbook():
    """Three iterations of ppo.PPO with pocket_lm on the tomato salad."""
    return learn(ppo.PPO, POCKET, 3, make_kitchen, pocket)


def test_on_one_process_the_trainer_equals_ppo_bit_for_bit(textbook):
    found, rows = learn(trainer.Trainer, POCKET, 3, make_kitchen, pocket)
    assert equal(found, textbook[0])
    np.testing.assert_equal([{**row, "skipped": 0} for row in textbook[1]], rows)
    assert not equal(found, weights(pocket()))  # it has learnt something


def test_accumulated_gradients_of_the_llm_give_the_same_within_rounding(textbook):
    config = dataclasses.replace(POCKET, gradient_accumulation=4)
    found, _ = learn(trainer.Trainer, config, 3, make_kitchen, pocket)
    for one, other in zip(found, textbook[0], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("parts", [2, 8])  # the corridor has four items: some parts are empty
def test_gradient_accumulation_changes_nothing(parts):
    whole, rows = learn(trainer.Trainer, CONFIG)
    config = dataclasses.replace(CONFIG, gradient_accumulation=parts)
    found, others = learn(trainer.Trainer, config)
    for one, other in zip(found, whole, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
    for one, other in zip(rows, others, strict=True):
        assert other["kl"] == pytest.approx(one["kl"], abs=1e-5)
        assert other["policy_loss"] == pytest.approx(one["policy_loss"], abs=1e-5)


def test_the_parts_of_a_minibatch_hold_every_sample_once_and_equal_items_together():
    config = dataclasses.replace(CONFIG, gradient_accumulation=3)
    learner = trainer.Trainer(Corridor, MLP(4, 2), config, seed=1)
    rollout = learner.rollout()
    batch = torch.arange(7, 39)
    parts = learner.parts(rollout, batch)
    assert torch.equal(torch.cat(parts).sort()[0], batch)
    owners = [{rollout.items[i] for i in part} for part in parts]
    assert len(parts) > 1 and sum(map(len, owners)) == len(set.union(*owners))


@pytest.mark.parametrize("penalty, fewer", [(0.0, 0), (1.0, 8)])
def test_two_processes_share_a_minibatch_and_the_one_that_holds_gets_less(penalty, fewer):
    """The first also reads the texts of the penalty, which take as long as eight items."""
    learner = trainer.Trainer(Corridor, MLP(4, 2), CONFIG, seed=1)
    learner.config = dataclasses.replace(CONFIG, base_kl=penalty)
    learner.world = 2
    rollout = learner.rollout()
    rollout.items = [n // 4 for n in range(128)]  # 32 different ones
    shares = []
    for learner.rank in (0, 1):
        part, = learner.parts(rollout, torch.arange(128))
        shares.append({rollout.items[i] for i in part})
    assert shares[0] | shares[1] == {*range(32)} and not shares[0] & shares[1]
    assert len(shares[1]) - len(shares[0]) == fewer


def test_others_are_asked_only_where_an_item_is_new(monkeypatch):
    """A process need not wait at each step; what another one showed has its score already."""
    learner = trainer.Trainer(Corridor, MLP(4, 2), CONFIG, seed=1)
    learner.scores, asked = {}, []
    items = [(tuple(row), ()) for row in torch.eye(4).tolist()]

    def gather(value):
        asked.append(value)
        return [value, items[2:]] if value == items[:2] else [value]

    monkeypatch.setattr(trainer, "gather", gather)
    with torch.no_grad():
        first = learner.log_probs(items[:2])
        assert len(asked) == 2 and [item for item, _ in asked[1]] == items
        again = learner.log_probs(items)
        assert len(asked) == 2 and all(map(torch.equal, again, learner.agent.log_probs(items)))
        assert all(map(torch.equal, again, first))
        assert learner.log_probs([]) == [] and asked[2:] == [[], []]  # nobody asks any more


def test_the_first_process_alone_holds_the_policy(monkeypatch):
    turns = []
    monkeypatch.setattr(ppo.PPO, "hold", lambda self, turn: turns.append((self.rank, turn)))
    learner = trainer.Trainer(Corridor, MLP(4, 2), CONFIG, seed=1)
    for learner.rank in (0, 1, 2):
        learner.hold(5)
    assert turns == [(0, 5)]


def test_the_steps_are_those_of_all_environments():
    assert trainer.Trainer(Corridor, MLP(4, 2), CONFIG, seed=1).iterate()["steps"] == 128


def test_processes_that_do_not_divide_the_environments_are_told(monkeypatch):
    monkeypatch.setattr(trainer, "place", lambda: (0, 3))
    with pytest.raises(ppo.PPOError, match="num_envs must be a multiple of the 3 proc") as error:
        trainer.Trainer(Corridor, MLP(4, 2), CONFIG)
    assert "\n" not in str(error.value)


# -----------------------------------------------------------------------------
# Numbers that are not finite.


def spoil(parameters):
    """Leave a gradient with one NaN in some weights."""
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    parameters[0].grad.view(-1)[0] = torch.nan


@pytest.mark.parametrize("name", ["policy", "critic"])
def test_gradients_that_are_not_finite_are_left_out_counted_and_finally_fatal(name):
    agent = MLP(4, 2)
    learner = trainer.Trainer(Corridor, agent, CONFIG, seed=1)
    ours = learner.policy_optimizer, agent.policy_parameters()
    other = learner.value_optimizer, agent.value_parameters()
    if name == "critic":
        ours, other = other, ours
    before = copies(ours[1])
    for count in range(1, 5):
        spoil(ours[1])
        learner.step(ours[0])
        assert learner.skipped == count
        # Sound steps of the one do not hide the other's.
        for parameter in other[1]:
            parameter.grad = torch.ones_like(parameter)
        learner.step(other[0])
    assert equal(before, ours[1])
    assert all(parameter.grad is None for parameter in ours[1])
    spoil(ours[1])
    with pytest.raises(FloatingPointError, match=f"gradients of the {name} in a row"):
        learner.step(ours[0])
    assert equal(before, ours[1])


def test_a_sound_step_begins_the_count_anew():
    agent = MLP(4, 2)
    learner = trainer.Trainer(Corridor, agent, CONFIG, seed=1)
    before = copies(agent.policy_parameters())
    for _ in range(3):
        for _ in range(4):
            spoil(agent.policy_parameters())
            learner.step(learner.policy_optimizer)
        for parameter in agent.policy_parameters():
            parameter.grad = torch.ones_like(parameter)
        learner.step(learner.policy_optimizer)
    assert learner.skipped == 12
    assert not equal(before, agent.policy_parameters())


class Refusing(MLP):
    """Refuses to score with gradients, as the scorer does when the numbers are not finite."""

    refusals = 0

    def log_probs(self, items):
        if torch.is_grad_enabled() and self.refusals:
            self.refusals -= 1
            raise FloatingPointError("not finite")
        return super().log_probs(items)


def test_a_minibatch_that_the_agent_refuses_is_left_out():
    agent = Refusing(4, 2)
    learner = trainer.Trainer(Corridor, agent, CONFIG, seed=1)
    learner.iterate()
    before, agent.refusals = copies(agent.policy_parameters()), 4  # all four of one iteration
    row = learner.iterate()
    assert row["skipped"] == 4
    assert equal(before, agent.policy_parameters())
    assert math.isfinite(row["value_loss"]) and math.isnan(row["policy_loss"])
    assert learner.iterate()["skipped"] == 4
    assert not equal(before, agent.policy_parameters())
    agent.refusals = 5
    with pytest.raises(FloatingPointError, match="5 gradients of the policy in a row"):
        for _ in range(2):
            learner.iterate()


class Broken(Corridor):
    """Pays what no number is."""

    REWARD = float("inf")

    def step(self, action):
        obs, reward, *rest = super().step(action)
        return obs, float(np.nan_to_num(reward, nan=0.0, posinf=np.inf)), *rest


class Mad(MLP):
    """Its critic has lost its mind."""

    def values(self, items):
        return super().values(items) * torch.nan


@pytest.mark.parametrize("world, kind, word", [
    (Broken, MLP, "rewards"), (Corridor, Mad, "values")])
def test_a_rollout_that_is_not_finite_ends_in_one_line(world, kind, word):
    agent = kind(4, 2)
    before = weights(agent)
    learner = trainer.Trainer(world, agent, CONFIG, seed=1)
    with pytest.raises(FloatingPointError, match=f"{word} of a rollout are not finite") as error:
        for _ in range(3):
            learner.iterate()
    assert "\n" not in str(error.value)
    assert equal(before, weights(agent)) and learner.updates == 0


# -----------------------------------------------------------------------------
# Going on where it was.


def resumed(learner, agent, make_env=Corridor):
    """Return a new trainer in the state of another, by way of JSON as in a checkpoint."""
    other = trainer.Trainer(make_env, agent, learner.config, seed=99)
    state = json.loads(json.dumps(learner.state_dict()))
    for name in ("policy_optimizer", "value_optimizer"):
        getattr(other, name).load_state_dict(getattr(learner, name).state_dict())
    other.load_state_dict(state)
    return other


@pytest.mark.parametrize("updates", [1, 2])
def test_a_state_dict_goes_on_bit_for_bit(updates):
    whole_weights, whole_rows = learn(trainer.Trainer, CONFIG, 4)
    half = trainer.Trainer(Corridor, MLP(4, 2), CONFIG, seed=5)
    rows = [half.iterate() for _ in range(updates)]
    np.testing.assert_equal(rows, whole_rows[:updates])
    other = resumed(half, half.agent)
    assert other.updates == half.updates
    rows = [other.iterate() for _ in range(4 - updates)]
    np.testing.assert_equal(rows, whole_rows[updates:])
    assert equal(whole_weights, weights(other.agent))


def test_the_llm_goes_on_bit_for_bit_in_the_kitchen(textbook):
    half = trainer.Trainer(make_kitchen, pocket(), POCKET, seed=5)
    half.iterate()
    other = resumed(half, half.agent, make_kitchen)
    half.agent.policy_changed()
    other.iterate()
    other.iterate()
    assert equal(textbook[0], weights(other.agent))


def test_counts_of_skipped_steps_go_on():
    agent = MLP(4, 2)
    learner = trainer.Trainer(Corridor, agent, CONFIG, seed=1)
    for _ in range(4):
        spoil(agent.value_parameters())
        learner.step(learner.value_optimizer)
    other = resumed(learner, agent)
    assert other.skipped == 4
    spoil(agent.value_parameters())
    with pytest.raises(FloatingPointError):
        other.step(other.value_optimizer)


class Forgetful(Corridor):
    """A corridor that keeps no state."""

    state_dict = property()  # hasattr says no


def test_a_world_without_a_state_begins_its_episodes_anew_and_says_so(capsys):
    config = dataclasses.replace(CONFIG, rollout_steps=1, minibatch=4)
    agent = MLP(4, 2)
    learner = trainer.Trainer(Forgetful, agent, config, seed=1)
    for _ in range(3):
        learner.iterate()
    assert learner.episodes.lengths.all()
    capsys.readouterr()
    other = resumed(learner, agent, Forgetful)
    said = capsys.readouterr().err
    assert "episodes begin anew" in said and said.count("\n") == 1
    assert not other.episodes.lengths.any() and not other.episodes.returns.any()
    assert [np.argmax(obs) for obs, _ in other.now] == [0] * 4
    assert other.updates == 3 and other.iterate()["update"] == 4
    # A world that keeps its state says nothing.
    kept = trainer.Trainer(Corridor, agent, config, seed=1)
    resumed(kept, agent)
    assert capsys.readouterr().err == ""

"""twosome.Agent: what is frozen stays frozen, what is remembered is forgotten in time, anyone's environment will do."""
import pytest
import torch

import models
import ppo
import scoring
import twosome


@pytest.fixture
def agent():
    torch.manual_seed(0)
    return twosome.Agent(*models.load(twosome.model_path("pocket_lm")))


class Door:
    """Somebody else's environment: its info carries the text, nothing else. Push opens; two doors, then the end."""

    def reset(self, seed=None):
        self.doors = 0
        return None, self.info()

    def info(self):
        return {"prompt": f"You stand before a door, and {self.doors} are behind you. Your next step is to", "actions": ["push the door", "wait", "go home"]}

    def step(self, action):
        self.doors += action == 0
        return None, float(self.doors == 2), self.doors == 2 or action == 2, False, {**self.info(), "success": self.doors == 2}


ITEMS = [twosome.describe({"prompt": text, "actions": ["take the cup", "open the box", "sit down"]})
         for text in ("You see a cup. Your next step is to", "You are in the hall and you hold nothing. Your next step is to")]


def test_the_untrained_policy_is_the_prompted_llm(agent):
    """LoRA starts at zero: before the first step, the policy with the adapter on is the base model's own."""
    base, tokenizer = models.load(twosome.model_path("pocket_lm"))
    for ours, plain in zip(agent.log_probs(ITEMS), scoring.score_actions_naive(base, tokenizer, *zip(*ITEMS))):
        assert torch.allclose(ours, plain, atol=1e-4)
    with torch.no_grad():
        next(p for name, p in agent.model.named_parameters() if "lora_B" in name).fill_(0.5)
    agent.policy_changed()
    changed = agent.log_probs(ITEMS)[0]
    with agent.untrained():
        restored = agent.log_probs(ITEMS)[0]
    assert torch.allclose(restored, plain_scores(base, tokenizer), atol=1e-4) and not torch.allclose(changed, restored, atol=1e-2)


def plain_scores(base, tokenizer):
    return scoring.score_actions_naive(base, tokenizer, [ITEMS[0][0]], [list(ITEMS[0][1])])[0]


def test_training_moves_lora_and_critic_and_nothing_else(agent):
    frozen = {name: p.clone() for name, p in agent.model.named_parameters() if not p.requires_grad}
    moving = [p.clone() for p in agent.policy_parameters() + agent.value_parameters()]
    trainer = ppo.PPO(Door, agent, ppo.Config(steps=64, num_envs=2, rollout_steps=16, epochs=1, minibatch=16), seed=1)
    while trainer.updates < trainer.total_updates:
        trainer.iterate()
    assert all(torch.equal(p, frozen[name]) for name, p in agent.model.named_parameters() if not p.requires_grad)
    assert all("lora_" in name for name, p in agent.model.named_parameters() if p.requires_grad)
    assert sum(not torch.equal(p, q) for p, q in zip(agent.policy_parameters() + agent.value_parameters(), moving)) > len(moving) // 2


def test_learns_somebody_elses_environment(agent):
    trainer = ppo.PPO(Door, agent, ppo.Config(steps=768, num_envs=4, rollout_steps=16, epochs=1, minibatch=32, policy_lr=5e-3), seed=1)
    before = ppo.evaluate(Door, agent, 100, seed=3, gamma=0.99)["successes"].mean()
    while trainer.updates < trainer.total_updates:
        trainer.iterate()
    assert ppo.evaluate(Door, agent, 100, seed=3, gamma=0.99)["successes"].mean() > max(0.9, before + 0.05)


def test_losses_reach_their_own_weights_alone(agent):
    agent.values(ITEMS).sum().backward()
    assert all(p.grad is None for p in agent.policy_parameters())
    agent.critic.zero_grad()
    agent.log_probs(ITEMS)[0][0].backward()
    assert all(p.grad is None or not p.grad.any() for p in agent.value_parameters())
    assert any(p.grad is not None and p.grad.any() for p in agent.policy_parameters())


def test_scores_are_remembered_while_the_policy_stands_and_features_for_good(agent, monkeypatch):
    passes = []
    forward = agent.model.get_base_model().model.forward
    monkeypatch.setattr(agent.model.get_base_model().model, "forward", lambda *args, **kwargs: passes.append(1) or forward(*args, **kwargs))
    with torch.no_grad():
        agent.log_probs(ITEMS), agent.values(ITEMS)
        first = len(passes)
        again = agent.log_probs(ITEMS + ITEMS), agent.values(ITEMS + ITEMS)
        assert len(passes) == first and len(again[0]) == 4
        agent.policy_changed()
        agent.values(ITEMS)
        assert len(passes) == first
        agent.log_probs(ITEMS)
        assert len(passes) == first + 1
    agent.log_probs(ITEMS)  # with gradients: always computed, a remembered score has none
    assert len(passes) == first + 2


def test_the_value_does_not_feel_the_batch(agent):
    torch.nn.init.normal_(agent.critic[-1].weight)
    alone = agent.values(ITEMS[:1]).item()
    agent._features.clear()
    longer = ("word " * 60 + "Your next step is to", ITEMS[0][1])
    assert agent.values([longer, ITEMS[0]])[1].item() == pytest.approx(alone, abs=1e-5)


def test_the_fresh_critic_is_zero(agent):
    assert torch.equal(agent.values(ITEMS), torch.zeros(2))


def test_remembered_features_are_bounded(agent, monkeypatch):
    monkeypatch.setattr(agent, "FEATURE_BYTES", 5 * agent.features(["a"])[0].nbytes)
    for i in range(12):
        agent.features([f"prompt {i}"])
    assert len(agent._features) == 5 and "prompt 11" in agent._features

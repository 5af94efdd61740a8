"""twosome.Agent: the frozen stays, the remembered is forgotten in time, anyone's world will do."""
import json

import numpy as np
import pytest
import safetensors.torch
import tiny
import torch
import transformers

import envs
import ppo
import twosome
from engine import command, models, runs, trie

ACTIONS = ["take the cup", "open the box", "sit down"]
PROMPTS = ["You see a cup. Your next step is to",
           "You are in the hall and you hold nothing. Your next step is to"]
ITEMS = [(prompt, tuple(ACTIONS)) for prompt in PROMPTS]


def fresh(**options):
    torch.manual_seed(0)
    return twosome.Agent(*models.load("pocket_lm"), **options)


@pytest.fixture
def agent():
    return fresh()


@pytest.fixture(scope="module")
def reader():
    """One agent for all tests that leave it as it is."""
    return fresh()


class Door:
    """Somebody else's environment, told in texts alone: push two doors open, then it ends."""

    def reset(self, seed=None):
        self.doors = 0
        return None, self.info()

    def info(self):
        where = f"You stand before a door, and {self.doors} are behind you."
        return {"prompt": f"{where} Your next step is to",
                "actions": ["push the door", "wait", "go home"]}

    def step(self, action):
        self.doors += action == 0
        through = self.doors == 2
        return None, float(through), through or action == 2, False, self.info()


def learner(agent, steps, **changes):
    config = ppo.Config(steps=steps, num_envs=4, rollout_steps=16, epochs=1, minibatch=32,
                        policy_lr=5e-3)
    for name, value in changes.items():
        setattr(config, name, value)
    return ppo.PPO(Door, agent, config, seed=1)


def train(trainer):
    return [trainer.iterate() for _ in range(trainer.total_updates)]


def disturb(agent):
    """Move the adapter away from zero."""
    with torch.no_grad():
        for name, parameter in agent.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.2)
    agent.policy_changed()


def close(one, other, atol=1e-4):
    pairs = zip(one, other, strict=True)
    return all(torch.allclose(ours, theirs, atol=atol) for ours, theirs in pairs)


# -----------------------------------------------------------------------------
# Held to the base: KL(base || policy) on what the base writes by itself.


def divergence(agent, ids):
    """The definition, token by token: the mean of sum_w P(w) (log P(w) - log Q(w)), in nats."""
    total = 0.0
    for row in ids:
        with agent.model.disable_adapter():
            base = agent.model(input_ids=row[None]).logits[0].log_softmax(-1)
        here = agent.model(input_ids=row[None]).logits[0].log_softmax(-1)
        for p, q in zip(base, here, strict=True):
            total += sum((p.exp() * (p - q)).tolist())
    return total / ids.numel()


def test_the_base_writes_the_same_texts_whatever_the_adapter_is(agent):
    disturb(agent)
    state = torch.random.get_rng_state()
    texts = agent.own_texts().flatten(0, 1)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert texts.shape == (128, 64) and len({tuple(row) for row in texts.tolist()}) == 128
    assert torch.equal(texts, fresh().own_texts().flatten(0, 1))
    assert (texts[:, 0] == agent.tokenizer.bos_token_id).all()
    assert "hold" in agent.tokenizer.decode(texts.flatten())  # it writes of homes


def test_writing_them_says_nothing(monkeypatch):
    """A tokenizer whose padding ends a text, as SmolLM2's does, needs to be told what is read."""
    told = []
    monkeypatch.setattr(transformers.generation.utils.logger, "warning_once", told.append)
    monkeypatch.setattr(transformers.generation.utils.logger, "warning", told.append)
    model = tiny.model("llama", vocabulary=400)
    model.generation_config.pad_token_id = model.generation_config.eos_token_id = 0
    twosome.Agent(model, tiny.byte_bpe(eos_token="<e>")).own_texts()
    assert told == []


def test_an_untrained_policy_has_not_drifted(reader):
    with torch.no_grad():
        assert reader.drift(0).item() == 0.0


def test_drift_is_the_definition_on_the_next_two_texts(agent):
    disturb(agent)
    texts = agent.own_texts().flatten(0, 1)
    with torch.no_grad():
        for turn, rows in ((0, slice(0, 2)), (63, slice(126, 128)), (64, slice(0, 2))):
            wanted = divergence(agent, texts[rows])
            assert agent.drift(turn).item() == pytest.approx(wanted, abs=1e-4)
            assert wanted > 0.01


def test_the_gradient_of_drift_reaches_the_adapter_alone_and_leads_back(agent):
    disturb(agent)
    optimizer = torch.optim.SGD(agent.policy_parameters(), lr=0.02)
    first = agent.drift(0)
    first.backward()
    assert all(p.grad is not None for p in agent.policy_parameters())
    others = [p for p in agent.model.parameters() if not p.requires_grad]
    assert all(p.grad is None for p in [*others, *agent.value_parameters()])
    optimizer.step()
    assert agent.drift(0).item() < first.item()


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_every_architecture_can_be_held(name):
    agent = twosome.Agent(tiny.model(name, attention="eager"), tiny.metaspace_bpe())
    with torch.no_grad():
        assert agent.drift(0).item() == pytest.approx(0.0, abs=1e-5)
        disturb(agent)
        assert agent.drift(1).item() > 0


@pytest.mark.parametrize("special, first", [
    ({}, 0), ({"eos_token": "<e>"}, "<e>"), ({"eos_token": "<e>", "bos_token": "<b>"}, "<b>")])
def test_a_text_opens_with_what_the_tokenizer_has_for_it(special, first):
    tokenizer = tiny.byte_bpe(**special)
    texts = twosome.Agent(tiny.model("llama", vocabulary=400), tokenizer).own_texts()
    assert texts.shape == (64, 2, 64)  # none is shorter, whatever ends a text
    opening = tokenizer.convert_tokens_to_ids(first) if first else 0
    assert (texts[:, :, 0] == opening).all()


def test_a_policy_that_is_held_keeps_more_of_its_base():
    def drifted(weight):
        agent = fresh()
        train(learner(agent, 640, base_kl=weight))
        with torch.no_grad():
            return np.mean([agent.drift(turn).item() for turn in range(64)])
    free, held = drifted(0.0), drifted(5.0)
    assert held < 0.5 * free


# -----------------------------------------------------------------------------
# Actor and critic on one frozen LLM.


def test_the_untrained_policy_is_the_prompted_llm(agent):
    """LoRA starts at zero: before the first step, the policy is the base model's own."""
    base = models.load("pocket_lm")
    prompted = twosome.score_actions_naive(*base, PROMPTS, [ACTIONS] * 2)
    with torch.no_grad():
        assert close(agent.log_probs(ITEMS), prompted)
        disturb(agent)
        changed = agent.log_probs(ITEMS)
        assert not close(changed, prompted, atol=1e-2)
        with agent.untrained() as same:
            assert same is agent
            assert close(agent.log_probs(ITEMS), prompted)
        assert close(agent.log_probs(ITEMS), changed)  # it did not remember the untrained scores


def test_the_normalisation_is_the_agents(agent):
    """The phrases have three, three and two words."""
    base = models.load("pocket_lm")
    for normalization in twosome.NORMALIZATIONS:
        agent.normalization = normalization
        agent.policy_changed()
        prompted = twosome.score_actions_naive(*base, PROMPTS, [ACTIONS] * 2, normalization)
        with torch.no_grad():
            assert close(agent.log_probs(ITEMS), prompted)


def test_training_moves_lora_and_critic_and_nothing_else(agent):
    parameters = dict(agent.model.named_parameters())
    trained = {name for name, parameter in parameters.items() if parameter.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    frozen = {name: parameters[name].clone() for name in parameters.keys() - trained}
    moving = agent.policy_parameters() + agent.value_parameters()
    before = [parameter.clone() for parameter in moving]
    train(learner(agent, 128))
    assert all(torch.equal(parameters[name], weight) for name, weight in frozen.items())
    moved = [not torch.equal(*pair) for pair in zip(before, moving, strict=True)]
    assert sum(moved) > len(moved) // 2 and all(moved[-3:])


def test_learns_somebody_elses_environment(agent):
    def success():
        return ppo.evaluate(Door, agent, 100, seed=3, gamma=0.99)["successes"].mean()

    before = success()
    train(learner(agent, 768))
    assert success() > max(0.9, before + 0.05)


def test_losses_reach_their_own_weights_alone(agent):
    torch.nn.init.normal_(agent.critic[-1].weight)
    agent.values(ITEMS).sum().backward()
    assert all(weight.grad is not None for weight in agent.value_parameters())
    assert all(weight.grad is None for weight in agent.policy_parameters())
    agent.critic.zero_grad()
    agent.log_probs(ITEMS)[0][0].backward()
    assert all(weight.grad is None for weight in agent.value_parameters())
    assert any(weight.grad.any() for weight in agent.policy_parameters())


def test_the_critic_is_the_published_mlp_and_starts_at_zero(agent):
    shapes = [tuple(weight.shape) for weight in agent.value_parameters()]
    assert shapes == [(1024, agent.model.config.hidden_size), (512, 1024), (1, 512)]
    assert torch.equal(agent.values(ITEMS), torch.zeros(2))
    assert agent.features(PROMPTS).abs().sum() > 0


def test_the_critic_reads_the_frozen_llm(agent):
    """The feature is the base's last hidden state of the last token, whatever the adapter is."""
    base, tokenizer = models.load("pocket_lm")
    disturb(agent)
    for prompt, feature in zip(PROMPTS, agent.features(PROMPTS), strict=True):
        ids = torch.tensor([twosome.tokenize(tokenizer, prompt, ("go",))[0]])
        with torch.no_grad():
            states = base(input_ids=ids, output_hidden_states=True).hidden_states
        torch.testing.assert_close(feature, states[-1][0, -1], atol=1e-5, rtol=1e-5)


def test_a_feature_does_not_feel_any_batch(agent):
    """Not by one bit: neither what stands beside a prompt nor what was asked for before."""
    alone = agent.features(PROMPTS[:1])[0]
    longer = "word " * 60 + "Your next step is to"
    other = fresh()
    assert torch.equal(other.features([longer, PROMPTS[1], PROMPTS[0]])[2], alone)
    torch.nn.init.normal_(agent.critic[-1].weight)
    other.critic.load_state_dict(agent.critic.state_dict())
    value = agent.values(ITEMS[:1])[0]
    beside = other.values([(longer, ITEMS[0][1]), ITEMS[0]])[1]
    assert beside.item() == pytest.approx(value.item(), abs=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2", "mistral-window"])
def test_many_prompts_at_once_have_the_features_of_each_alone(name):
    """As a GPU reads them: the zeros behind a shorter prompt are seen by nobody."""
    tokenizer = models.load("pocket_lm")[1]
    agent = twosome.Agent(tiny.model(name, len(tokenizer)), tokenizer)
    prompts = ["You see a tomato.", "word " * 20 + "end", PROMPTS[0], "a"]
    alone = torch.cat([agent.last_hidden([prompt]) for prompt in prompts])
    torch.testing.assert_close(agent.last_hidden(prompts), alone, atol=1e-5, rtol=1e-5)


# -----------------------------------------------------------------------------
# What is remembered.


def counted(agent):
    """Return a list to which every pass through the LLM adds an element."""
    passes = []
    decoder = models.text_model(agent.model)
    decoder.register_forward_pre_hook(lambda *arguments: passes.append(1))
    return passes


def test_scores_are_remembered_while_the_policy_stands_and_features_for_good(agent):
    agent.log_probs(ITEMS)  # an architecture is checked before it is trusted, which takes passes
    passes = counted(agent)
    with torch.no_grad():
        first = agent.log_probs(ITEMS)
        agent.values(ITEMS)
        assert len(passes) == 1 + 2  # both items in one tree, and a pass for each feature
        again = agent.log_probs(ITEMS[::-1] + ITEMS)
        agent.values(ITEMS + ITEMS)
        assert len(passes) == 3
        assert [row.tolist() for row in again[2:]] == [row.tolist() for row in first]
        assert again[0].tolist() == first[1].tolist()
        agent.policy_changed()
        agent.values(ITEMS)
        assert len(passes) == 3
        agent.log_probs(ITEMS)
        assert len(passes) == 4
    scores = agent.log_probs(ITEMS)  # a remembered score has no gradient
    assert len(passes) == 5 and all(score.requires_grad for score in scores)


def test_what_is_new_is_worked_out_so_many_at_a_time():
    memory, asked = {"a": 0}, []

    def work(keys):
        asked.append(keys)
        return [ord(key) - 97 for key in keys]

    assert twosome.remember(memory, list("cabbdec"), work, 2) == [2, 0, 1, 1, 3, 4, 2]
    assert asked == [["c", "b"], ["d", "e"]] and memory == {key: ord(key) - 97 for key in "abcde"}


def test_only_what_is_new_is_scored(agent):
    with torch.no_grad():
        agent.log_probs(ITEMS[:1])
        asked = []
        agent.score = lambda items: asked.extend(items) or [torch.zeros(3)] * len(items)
        agent.log_probs([ITEMS[0], ITEMS[1], ITEMS[1], ITEMS[0]])
    assert asked == [ITEMS[1]]


def test_remembered_features_are_bounded():
    class Short(twosome.Agent):
        FEATURES = 5

    agent = Short(*models.load("pocket_lm"))
    for i in range(8):
        agent.features([f"prompt {i}"])
    passes = counted(agent)
    agent.features([f"prompt {i}" for i in range(3, 8)])
    assert not passes
    agent.features(["prompt 0"])
    assert len(passes) == 1


# -----------------------------------------------------------------------------
# Anyone's environment.


def info(**changes):
    return {"prompt": PROMPTS[0], "actions": ACTIONS, **changes}


@pytest.mark.parametrize("told", [
    info(), info(actions=tuple(ACTIONS)), info(admissible=None), info(admissible=[]),
    info(admissible=[4, 1, 2]), info(admissible=np.array([4, 1, 2])),
    info(admissible=np.array([], dtype=int))])
def test_an_observation_is_its_prompt_and_its_phrases(reader, told):
    assert reader.describe(None, told) == ITEMS[0]


def test_our_own_environments_are_told_by_their_state(reader):
    env = envs.make("virtualhome", task="food-preparation")
    obs, told = env.reset()
    prompt, phrases = reader.describe(obs, told)
    assert len(phrases) == len(told["admissible"]) < len(env.action_names)
    assert len(set(phrases)) == len(phrases) and prompt == prompt.strip()
    # Whoever adds texts of their own is told by these.
    assert reader.describe(obs, {**told, "prompt": "Now", "actions": list(phrases)})[0] == "Now"


BAD = {
    "a list as an action": (info(actions=[["take", "the cup"], ["sit"]]), "is no text"),
    "bytes as an action": (info(actions=[b"take the cup", b"sit"]), "is no text"),
    "numbers as actions": (info(actions=[0, 1]), "is no text"),
    "one bare text": (info(actions="take the cup"), "list of texts"),
    "bare bytes": (info(actions=b"take the cup"), "list of texts"),
    "one number": (info(actions=3), "list of texts"),
    "no list": (info(actions=None), "list of texts"),
    "no actions": (info(actions=[]), "at least one phrase"),
    "an empty action": (info(actions=["go", ""]), "empty"),
    "a space before an action": (info(actions=["go", " stay"]), "stray space"),
    "fewer numbers than phrases": (info(admissible=[0, 1]), '"admissible" is [0, 1]'),
    "more numbers than phrases": (info(admissible=np.arange(17)), '"admissible" is array'),
    "no prompt": ({"actions": ACTIONS}, 'lacks "prompt"'),
    "no phrases": ({"prompt": PROMPTS[0]}, 'lacks "actions"'),
    "nothing": ({}, 'lacks "prompt"'),
    "a prompt that is no text": (info(prompt=7), "is no text"),
    "a prompt that ends in a space": (info(prompt=PROMPTS[0] + " "), "ends in ' '"),
    "a prompt that ends in a line": (info(prompt=PROMPTS[0] + "\n"), "ends in '\\n'"),
    "half a character": (info(prompt="You see \ud83d here"), "surrogate"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_world_that_tells_something_else_is_told_in_one_line(reader, case):
    told, word = BAD[case]
    with pytest.raises(trie.ScoringError) as error:
        reader.log_probs([reader.describe(None, told)])
    line = str(error.value).replace('info["admissible"]', '"admissible"')
    assert word in line and "\n" not in line and len(line) < 300


def test_actions_that_look_alike_to_the_llm_are_refused(reader):
    with pytest.raises(trie.ScoringError, match="same tokens"):
        reader.log_probs([(PROMPTS[0], ("go on", "go on"))])


@pytest.mark.parametrize("prompts, phrases, word", [
    (PROMPTS, [ACTIONS], "give one for each prompt"), (PROMPTS[0], [ACTIONS], "bare text"),
    (PROMPTS, ACTIONS[:2], "bare text"), ([PROMPTS[0] + " "], [ACTIONS], "ends in ' '")])
def test_what_does_not_fit_together_is_one_line_and_not_zips_own(prompts, phrases, word):
    with pytest.raises(trie.ScoringError, match=word) as error:
        twosome.score_actions(*models.load("pocket_lm"), prompts, phrases)
    assert "zip" not in str(error.value) and "\n" not in str(error.value)


def test_a_second_agent_on_one_model_is_refused():
    """It would wipe out the first one's adapter."""
    base, tokenizer = models.load("pocket_lm")
    first = twosome.Agent(base, tokenizer)
    disturb(first)
    with torch.no_grad():
        before = first.log_probs(ITEMS)
    for carrier in (base, first.model):
        with pytest.raises(models.ModelError, match="adapter") as error:
            twosome.Agent(carrier, tokenizer)
        assert "\n" not in str(error.value)
    first.policy_changed()
    with torch.no_grad():
        assert close(first.log_probs(ITEMS), before, atol=0)


# -----------------------------------------------------------------------------
# A text is only a text.


def with_control_tokens(name):
    """Return one of the tiny tokenizers, and the texts of its control tokens."""
    made = {"byte-bpe": lambda: tiny.byte_bpe(eos_token="<|im_end|>", pad_token="<|pad|>"),
            "metaspace-bpe": tiny.metaspace_bpe, "unigram": tiny.unigram}[name]()
    names = {"eos_token": made.eos_token, "bos_token": made.bos_token, "pad_token": made.pad_token}
    return made, sorted({text for text in names.values() if text})


def cut(tokenizer, prompt, *phrases):
    """Return the ids of prompt and phrases, or None where the text is refused in one line."""
    try:
        prompt_ids, tails, _ = twosome.tokenize(tokenizer, prompt, phrases)
    except trie.ScoringError as error:
        assert "control token" in str(error) or "same tokens" in str(error)
        assert "\n" not in str(error)
        return None
    return prompt_ids, tails


@pytest.mark.parametrize("name", ["byte-bpe", "metaspace-bpe", "unigram"])
def test_a_control_token_in_a_text_is_text_or_refused(name):
    tokenizer, controls = with_control_tokens(name)
    ids = {tokenizer.convert_tokens_to_ids(text) for text in controls}
    plain_prompt, plain_tails = cut(tokenizer, "You see a tomato.", "chop", "serve")
    opening = len(tokenizer("")["input_ids"])
    assert controls and plain_tails
    for control in controls:
        # At the end of a phrase it would be stripped, or end the phrase.
        found = cut(tokenizer, "You see a tomato.", "chop", f"chop{control}")
        assert found or name != "byte-bpe"  # bytes can spell any text
        if found:
            prompt_ids, tails = found
            assert prompt_ids == plain_prompt and tails[0] == plain_tails[0] != tails[1]
            assert not ids.intersection(tails[1])
        # At the end of a prompt it would move into every phrase.
        found = cut(tokenizer, f"You see a tomato.{control}", "chop", "serve")
        if found:
            assert found[0] != plain_prompt and not ids.intersection(found[0][opening:])
            assert not ids.intersection(sum(found[1], ()))
        # Elsewhere it would tell the LLM that a text begins or ends here.
        found = cut(tokenizer, f"You {control} see a tomato.", "chop")
        assert found is None or not ids.intersection(found[0][opening:] + found[1][0])


def test_the_tokenizers_own_opening_token_stays():
    tokenizer, _ = with_control_tokens("metaspace-bpe")
    prompt_ids, _ = cut(tokenizer, "You see a tomato.", "chop")
    assert prompt_ids[0] == tokenizer.bos_token_id
    tokenizer, _ = with_control_tokens("unigram")
    prompt_ids, tails = cut(tokenizer, "You see a tomato.", "chop")
    assert tokenizer.eos_token_id not in prompt_ids + tails[0]


def test_the_critic_tells_a_prompt_from_one_with_a_control_token(reader):
    for control in reader.tokenizer.all_special_tokens:
        try:
            one, other = reader.features([PROMPTS[0], PROMPTS[0] + control])
        except trie.ScoringError:
            continue
        assert not torch.allclose(one, other, atol=1e-3)
        with torch.no_grad():
            item = PROMPTS[0], (f"sit{control}", "sit")
            one, other = reader.log_probs([item])[0]
        assert one != other


# -----------------------------------------------------------------------------
# From Python.


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a short run."""
    folder = str(tmp_path_factory.mktemp("python") / "run")
    flags = "--steps 128 --num-envs 4 --rollout-steps 16 --minibatch 32 --episodes 2 --norm token"
    assert twosome.main([*flags.split(), "--out", folder]) == 0
    return folder


def test_a_finished_run_is_loaded_in_one_line(run):
    agent, make_env = twosome.load(run)
    env = make_env()
    assert (env.name, env.task, agent.normalization) == ("overcooked", "tomato-salad", "token")
    path = runs.find(run)
    stored = safetensors.torch.load_file(f"{path}/adapter_model.safetensors")
    ours = [weight.detach().numpy().tobytes() for weight in agent.policy_parameters()]
    assert sorted(ours) == sorted(weight.numpy().tobytes() for weight in stored.values())
    critic = safetensors.torch.load_file(f"{path}/critic.safetensors")
    assert all(torch.equal(weight, critic[name])
               for name, weight in agent.critic.state_dict().items())
    item = agent.describe(*env.reset())
    with torch.no_grad():
        trained = agent.log_probs([item])[0]
        with agent.untrained():
            untrained = agent.log_probs([item])[0]
    assert not torch.allclose(trained, untrained, atol=1e-4)


def test_loading_leaves_the_folder_alone(run, tmp_path):
    with open(f"{run}/summary.json", encoding="utf-8") as file:
        assert json.load(file)["norm"] == "token"
    before = sorted(command.os.listdir(run))
    twosome.load(run, "checkpoint-2")
    assert sorted(command.os.listdir(run)) == before
    with pytest.raises(runs.RunError, match="no checkpoint"):
        twosome.load(run, "checkpoint-1000")
    with pytest.raises(runs.RunError):
        twosome.load(str(tmp_path))


def trained_from_python(seed):
    transformers.set_seed(seed)
    torch.set_num_threads(1)
    agent = twosome.Agent(*models.load("pocket_lm"))
    return agent, train(learner(agent, 128))


def test_seeded_on_one_thread_a_training_gives_the_same_bits():
    one, rows = trained_from_python(1)
    again, others = trained_from_python(1)
    np.testing.assert_equal(others, rows)
    for ours, theirs in zip(one.policy_parameters() + one.value_parameters(),
                            again.policy_parameters() + again.value_parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert torch.get_num_threads() == 1
    np.testing.assert_equal(np.random.random(), np.random.RandomState(1).random())
    _, others = trained_from_python(2)
    assert others != rows

"""Section 4.1 and 4.2: the packed scorer against its definition, and the definition against numbers worked out by hand."""
import math
import warnings

import pytest
import tokenizers
import torch
import transformers
from tokenizers import models as token_models, pre_tokenizers

import models
import tiny
import scoring
import twosome

torch.set_num_threads(1)
EAGER_ONLY = ("gemma2", "bloom", "gptj", "gpt-neo")  # transformers has no sdpa for these
CASES = [(name, attention) for name in tiny.ARCHITECTURES for attention in ("sdpa", "eager") if attention == "eager" or name not in EAGER_ONLY]
BYTE_BPE = tiny.byte_bpe()


def adapted(base):
    """The model with LoRA whose B is not zero, so that actor and base differ and every LoRA weight has a gradient."""
    model = models.add_lora(base, rank=4)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, 0, 0.2)
    return model


def values_and_gradients(score, model, tokenizer=BYTE_BPE, prompts=tiny.PROMPTS, phrases=tiny.PHRASES):
    """Scores, flat, and the gradient of a fixed random combination of them, flat over the LoRA weights."""
    model.zero_grad()
    scores = torch.cat(score(model, tokenizer, prompts, phrases, "sum"))
    (scores @ torch.linspace(-1, 1, len(scores))).backward()
    return scores.detach(), torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.requires_grad])


def deviation(ours, reference):
    return (ours[0] - reference[0]).abs().max().item(), ((ours[1] - reference[1]).norm() / reference[1].norm()).item()


@pytest.mark.parametrize("name, attention", CASES)
def test_every_architecture_scores_as_the_definition(name, attention, record_property):
    model = adapted(tiny.model(name, attention=attention))
    reference = values_and_gradients(scoring.score_actions_naive, model)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        evaluation = values_and_gradients(scoring.score_actions, model)
    assert [("row" in str(warning.message)) for warning in told] == ([] if tiny.ARCHITECTURES[name][2] == "tree" else [True])
    model.activation_checkpointing_enable()
    model.train()
    training = values_and_gradients(scoring.score_actions, model)
    for scores in (evaluation, training):
        value, gradient = deviation(scores, reference)
        record_property("deviation", (value, gradient))
        assert value < 1e-4 and gradient < 1e-4


MUTATIONS = {
    "window dropped": ("mistral-window", "mask_layout", lambda model: {"single": None}),
    "window one short": ("mistral-window", "mask_layout", lambda model: {"single": 7}),
    "window in all layers": ("gemma3", "mask_layout", lambda model: {"full_attention": 8, "sliding_attention": 8}),
    "siblings seen": ("llama", "build_tree", lambda tree: tree._replace(visible=torch.ones_like(tree.visible).tril())),
    "positions by column": ("llama", "build_tree", lambda tree: tree._replace(positions=torch.arange(len(tree.ids)))),
    "positions by column, learned": ("gpt2", "build_tree", lambda tree: tree._replace(positions=torch.arange(len(tree.ids)))),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_the_self_check_notices_a_wrong_mask_and_falls_back(mutation, monkeypatch):
    name, function, wrong = MUTATIONS[mutation]
    right = getattr(scoring, function)
    monkeypatch.setattr(scoring, function, wrong if function == "mask_layout" else lambda *arguments: wrong(right(*arguments)))
    model = adapted(tiny.model(name))
    reference = values_and_gradients(scoring.score_actions_naive, model)
    with pytest.warns(UserWarning, match="one row a phrase"):
        assert max(deviation(values_and_gradients(scoring.score_actions, model), reference)) < 1e-4
    monkeypatch.setattr(scoring, "_self_check", lambda *arguments: None)  # and without the check, this file's comparison would see it
    monkeypatch.setattr(scoring, "_layouts", {})
    assert min(deviation(values_and_gradients(scoring.score_actions, model), reference)) > 1e-2


# ---------------------------------------------------------------------------------------------------------------------
# Against hand-computed numbers

def bigram():
    """A Llama without layers: its next-token distribution is softmax of a table's row. Returns (model, tokenizer, table)."""
    words = ["<s>", "you", "should", "take", "the", "bowl", "tomato", "chop"]
    core = tokenizers.Tokenizer(token_models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<s>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    size = len(words)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=size, hidden_size=size, num_hidden_layers=0, num_attention_heads=1, intermediate_size=8, rms_norm_eps=0.0))
    table = torch.tensor([[((3 * i + 5 * j) % 7) / 2 for j in range(size)] for i in range(size)])
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(torch.eye(size))  # the norm scales a one-hot by sqrt(size)
        model.lm_head.weight.copy_(table.T / math.sqrt(size))
    return model.eval(), transformers.PreTrainedTokenizerFast(tokenizer_object=core), table.tolist()


@pytest.mark.parametrize("score", [scoring.score_actions_naive, scoring.score_actions])
def test_a_bigram_model_by_hand(score):
    model, tokenizer, table = bigram()
    log_p = lambda a, b: table[a][b] - math.log(sum(math.exp(x) for x in table[a]))
    # you=1 should=2 | take=3 the=4 bowl=5; take the tomato=6; chop=7
    joint = [log_p(2, 3) + log_p(3, 4) + log_p(4, 5), log_p(2, 3) + log_p(3, 4) + log_p(4, 6), log_p(2, 7)]
    for normalization, logits in (("sum", joint), ("token", [joint[0] / 3, joint[1] / 3, joint[2]])):
        total = math.log(sum(math.exp(x) for x in logits))
        scores, = score(model, tokenizer, ["you should"], [["take the bowl", "take the tomato", "chop"]], normalization)
        assert scores.tolist() == pytest.approx([x - total for x in logits], abs=1e-5)
        assert scores.dtype == torch.float32 and scores.exp().sum().item() == pytest.approx(1)


def test_the_three_normalisations():
    joint = torch.tensor([-6.0, -2.0])
    for normalization, logits in {"sum": [-6, -2], "token": [-1.5, -2], "word": [-3, -2]}.items():
        assert torch.allclose(scoring.normalize(joint, [4, 1], [2, 1], normalization), torch.tensor(logits).float().log_softmax(0))
    with pytest.raises(scoring.ScoringError, match="sum, token, word"):
        scoring.normalize(joint, [4, 1], [2, 1], "words")


# ---------------------------------------------------------------------------------------------------------------------
# Work done once, and tokenizers

@pytest.mark.parametrize("name, path", [("llama", "tree"), ("bloom", "rows")])
def test_each_distinct_token_goes_through_the_model_once(name, path, recwarn):
    model, seen = tiny.model(name, attention="eager"), []
    prompts, phrases = [tiny.PROMPTS[1]] * 3, [tiny.PHRASES[1]] * 3  # the same three times
    scoring.score_actions(model, BYTE_BPE, prompts, phrases)  # the self-check comes with the first call
    model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].shape))
    first, second, third = scoring.score_actions(model, BYTE_BPE, prompts, phrases)
    prompt_ids, tails = scoring.tokenize(BYTE_BPE, prompts[0], tuple(phrases[0]))
    distinct = {tail[:i] for tail in tails for i in range(1, len(tail) + 1)}
    assert len(seen) == 1  # one forward
    if path == "tree":
        assert seen[0][0] == 1 and seen[0][1] <= len(prompt_ids) + len(distinct) < len(prompt_ids) + sum(map(len, tails))
    else:
        assert seen[0][0] == len(tails)
    assert torch.equal(first, second) and torch.equal(first, third)


@pytest.mark.parametrize("context", [200, 2048])
def test_the_self_check_is_as_wide_as_the_trees(context):
    """GPT-Neo's window counts columns, and its buffer holds `context` of them."""
    model = tiny.model("gpt-neo", attention="eager", window_size=200, max_position_embeddings=context)
    prompts = [f"You see a {a} on the {b}. Next, you should take" for a in ("tomato", "bowl", "lettuce", "board")
               for b in ("counter", "kitchen", "dish", "microwave")]
    phrases = [["the bowl", "nothing"]] * len(prompts)
    items = [scoring.tokenize(BYTE_BPE, prompt, tuple(actions)) for prompt, actions in zip(prompts, phrases)]
    assert min(len(scoring.build_tree(part).ids) for part in scoring.group(items, scoring.NODES)) > 200
    model = adapted(model)
    reference = values_and_gradients(scoring.score_actions_naive, model, BYTE_BPE, prompts, phrases)
    with pytest.warns(UserWarning, match="one row a phrase"):
        assert max(deviation(values_and_gradients(scoring.score_actions, model, BYTE_BPE, prompts, phrases), reference)) < 1e-4


def test_the_self_check_is_as_deep_as_the_trees():
    """A window of 63 that the configuration hides shows at a depth of 64."""
    model = tiny.model("mistral-window", sliding_window=63)
    assert scoring._self_check(model, {"single": None}, 63, 1) is None
    assert scoring._self_check(model, {"single": None}, 64, 1) is not None
    assert scoring._self_check(model, {"single": 63}, 64, scoring.NODES) is None


# One opens another.
ALIKE = ["You see a tomato. Next", "You see a tomato.", "You see a tomato. Next, you should take the", "You see a bowl", "walk"]


@pytest.mark.parametrize("nodes", [1, 20, 512])
def test_prompts_that_begin_alike_share_a_tree_of_so_many_nodes(nodes):
    model, seen = adapted(tiny.model("mistral-window")), []
    phrases = [["take the bowl", "take the tomato"], ["Next", "Next take"], ["bowl", "tomato"], ["serve", "see a tomato"], ["away", "a way"]]
    reference = values_and_gradients(scoring.score_actions_naive, model, BYTE_BPE, ALIKE, phrases)
    score = lambda *arguments: scoring.score_actions(*arguments, nodes=nodes)
    score(model, BYTE_BPE, ALIKE, phrases)  # the self-check comes with the first call
    model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].shape))
    assert max(deviation(values_and_gradients(score, model, BYTE_BPE, ALIKE, phrases), reference)) < 1e-4
    items = [scoring.tokenize(BYTE_BPE, prompt, tuple(actions)) for prompt, actions in zip(ALIKE, phrases)]
    distinct = {(*prompt_ids, *tail)[:i] for prompt_ids, tails in items for tail in tails for i in range(1, len(prompt_ids) + len(tail))}
    if nodes == 1:
        assert [shape[0] for shape in seen] == [scoring.TREES, len(items) - scoring.TREES]  # one too large for any tree still gets one
    elif nodes == 20:
        assert len(seen) == 1 and 1 < seen[0][0] < len(items) and seen[0][1] < 30
    else:
        assert seen == [(1, len(distinct))] and len(distinct) < sum(len(scoring.build_tree([item]).ids) for item in items) - 20


@pytest.mark.parametrize("kind", tiny.TOKENIZERS)
def test_tokenizers(kind):
    tokenizer = tiny.TOKENIZERS[kind]()
    model = adapted(tiny.model("llama"))
    reference = values_and_gradients(scoring.score_actions_naive, model, tokenizer)
    assert max(deviation(values_and_gradients(scoring.score_actions, model, tokenizer), reference)) < 1e-4
    scores = scoring.score_actions(model, tokenizer, tiny.PROMPTS, tiny.PHRASES)
    assert all(row.exp().sum().item() == pytest.approx(1, abs=1e-5) for row in scores)
    for side in ("left", "right"):  # must not matter
        tokenizer.padding_side = side
        scoring.tokenize.cache_clear()
        assert all(torch.equal(a, b) for a, b in zip(scores, scoring.score_actions(model, tokenizer, tiny.PROMPTS, tiny.PHRASES)))
    for prompt, actions in zip(tiny.PROMPTS, tiny.PHRASES):
        prompt_ids, tails = scoring.tokenize(tokenizer, prompt, tuple(actions))
        for phrase, tail in zip(actions, tails):  # prompt and phrase as one text, without the closing token
            joint = tokenizer(f"{prompt} {phrase}")["input_ids"]
            assert list(prompt_ids + tail) == (joint[:-1] if kind == "unigram" else joint)
            if kind != "merging":
                assert tokenizer.decode(list(tail)).strip() == phrase


def test_a_seam_that_merges_leaves_a_proper_probability():
    tokenizer, model = tiny.merging(), tiny.model("llama")
    prompt, phrases = "cut the", ("lettuce", "bowl", "board")
    prompt_ids, tails = scoring.tokenize(tokenizer, prompt, phrases)
    alone = tokenizer(prompt)["input_ids"]
    assert len(prompt_ids) < len(alone) and list(prompt_ids) == alone[:len(prompt_ids)]  # the cut moved left
    joint, = scoring.joint_log_probs(model, tokenizer, [prompt], [phrases])
    assert joint.exp().sum().item() <= 1  # events that exclude each other, given one past
    naive, = scoring.score_actions_naive(model, tokenizer, [prompt], [phrases], "sum")
    assert torch.allclose(joint.log_softmax(0), naive, atol=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# The critic's feature, and refusals

@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_the_feature_is_the_last_real_tokens_whatever_the_batch(name):
    agent = twosome.Agent(tiny.model(name, attention="eager"), tiny.byte_bpe("left"))
    torch.nn.init.normal_(agent.critic[-1].weight)
    for parameter_name, parameter in agent.model.named_parameters():
        if "lora_B" in parameter_name:
            torch.nn.init.normal_(parameter)  # the critic looks past the adapter
    ids = torch.tensor([BYTE_BPE(tiny.PROMPTS[0])["input_ids"]])
    with torch.no_grad(), agent.model.disable_adapter():
        oracle = agent.model.get_base_model().base_model(input_ids=ids).last_hidden_state[0, -1]
    alone = agent.values([(tiny.PROMPTS[0], ())])
    assert torch.allclose(agent.features([tiny.PROMPTS[0]])[0], oracle, atol=1e-5)
    agent._features.clear()
    together = agent.values([(prompt, ()) for prompt in tiny.PROMPTS])
    assert abs(together[0] - alone[0]).item() < 1e-5 * max(1, abs(alone[0]).item())


def test_what_cannot_be_scored_is_refused_in_one_line():
    model = tiny.model("llama", max_position_embeddings=60)

    def refused(match, prompt, phrases, tokenizer=BYTE_BPE):
        with pytest.raises(scoring.ScoringError, match=match) as told:
            scoring.score_actions(model, tokenizer, [prompt], [phrases])
        assert "\n" not in str(told.value)

    refused("no actions", "You", [])
    refused("phrase is empty", "You", ["chop", " "])
    refused("same tokens", "You", ["chop", "chop"])
    refused("no token to condition on", "", ["chop", "serve"])
    refused("bare text", "You", "chop")
    refused("context holds 60", tiny.PROMPTS[1] + tiny.PROMPTS[2], ["chop", "serve"])
    torch.nn.init.constant_(model.lm_head.weight, float("nan"))
    refused("not finite", "You", ["chop", "serve"])

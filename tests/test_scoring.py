"""Sections 4.1 and 4.2: the scorer that runs against its definition, both against hand arithmetic.

The first test is the main one: every architecture and attention, values and gradients.
"""
import ast
import math
import os
import subprocess
import sys
import warnings

import pytest
import tiny
import tokenizers
import torch
import transformers
from tokenizers import models as token_models
from tokenizers import pre_tokenizers

import twosome
from engine import models, trie

torch.set_num_threads(1)
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
EAGER_ONLY = ("gemma2", "bloom", "gptj", "gpt-neo")  # transformers has no sdpa for these
CASES = [(name, attention) for name in tiny.ARCHITECTURES for attention in ("sdpa", "eager")
         if attention == "eager" or name not in EAGER_ONLY]
BYTE_BPE = tiny.byte_bpe()


def adapted(base):
    """Give a model LoRA whose B is not zero: actor and base differ, and all LoRA weights learn."""
    model = models.add_lora(base, rank=4)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, 0, 0.2)
    return model


def packed(prompts, phrases, tokenizer=BYTE_BPE):
    """Return the items of engine/trie.py for these texts."""
    return [twosome.tokenize(tokenizer, prompt, tuple(actions))[:2]
            for prompt, actions in zip(prompts, phrases, strict=True)]


def with_gradients(score, model, *texts, tokenizer=BYTE_BPE):
    """Return all scores, flat, and the gradient of a fixed combination of them, flat over LoRA."""
    model.zero_grad()
    scores = torch.cat(score(model, tokenizer, *(texts or (tiny.PROMPTS, tiny.PHRASES)), "sum"))
    (scores @ torch.linspace(-1, 1, len(scores))).backward()
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    return scores.detach(), torch.cat([weight.grad.flatten() for weight in weights])


def deviation(ours, reference):
    """Return the largest difference of a score, and the relative one of the gradient."""
    values = (ours[0] - reference[0]).abs().max().item()
    return values, ((ours[1] - reference[1]).norm() / reference[1].norm()).item()


def watch_forwards(model):
    """Return a list that will hold the shape of the input ids of each forward to come."""
    seen = []
    model.get_input_embeddings().register_forward_hook(
        lambda module, inputs, output: seen.append(tuple(inputs[0].shape)))
    return seen


@pytest.mark.parametrize("name, attention", CASES)
def test_every_architecture_scores_as_the_definition(name, attention, record_property):
    model = adapted(tiny.model(name, attention=attention))
    reference = with_gradients(twosome.score_actions_naive, model)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        evaluation = with_gradients(twosome.score_actions, model)
    rows = tiny.ARCHITECTURES[name][2] == "rows"
    assert ["one row a phrase" in str(warning.message) for warning in told] == [True] * rows
    model.activation_checkpointing_enable()
    model.train()
    training = with_gradients(twosome.score_actions, model)
    for scores in (evaluation, training):
        record_property("deviation", deviation(scores, reference))
        assert max(deviation(scores, reference)) < 1e-4


@pytest.mark.parametrize("name", ["llama", "bloom"])  # a tree, and rows
def test_each_token_has_the_log_probability_that_the_definition_gives_it(name):
    model = tiny.model(name, attention="eager")
    items = packed(tiny.PROMPTS, tiny.PHRASES)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tables = trie.token_log_probs(model, items)
    for (prompt_ids, tails), table in zip(items, tables, strict=True):
        assert table.dtype == torch.float32 and len(table) == len(tails)
        assert table.shape[1] >= max(map(len, tails))
        for tail, row in zip(tails, table, strict=True):
            with torch.no_grad():
                logits = model(torch.tensor([prompt_ids + tail]), use_cache=False).logits[0]
            log_probs = logits.log_softmax(-1)[len(prompt_ids) - 1:-1]
            expected = log_probs[torch.arange(len(tail)), list(tail)]
            assert torch.allclose(row[:len(tail)], expected, atol=1e-4)
            assert not row[len(tail):].any()  # zeros behind the end
    assert trie.token_log_probs(model, []) == []


# -----------------------------------------------------------------------------
# The self-check.

def all_before(tree):
    """Let siblings see each other."""
    return tree._replace(visible=torch.ones_like(tree.visible).tril())


def by_column(tree):
    """Take positions for columns."""
    return tree._replace(positions=torch.arange(len(tree.ids)))


BOTH_EIGHT = {"full_attention": 8, "sliding_attention": 8}
MUTATIONS = {  # architecture, what is replaced, and either its new result or a change to its result
    "window dropped": ("mistral-window", "mask_layout", {"single": None}),
    "window one short": ("mistral-window", "mask_layout", {"single": 7}),
    "window in all layers": ("gemma3", "mask_layout", BOTH_EIGHT),
    "siblings seen": ("llama", "build_tree", all_before),
    "positions by column": ("llama", "build_tree", by_column),
    "positions by column, learned": ("gpt2", "build_tree", by_column),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_the_self_check_notices_a_wrong_mask_and_falls_back(mutation, monkeypatch):
    name, function, wrong = MUTATIONS[mutation]
    right = getattr(trie, function)

    def mutated(argument):
        return wrong(right(argument)) if callable(wrong) else wrong

    monkeypatch.setattr(trie, function, mutated)
    model = adapted(tiny.model(name))
    reference = with_gradients(twosome.score_actions_naive, model)
    with pytest.warns(UserWarning, match="one row a phrase"):
        assert max(deviation(with_gradients(twosome.score_actions, model), reference)) < 1e-4
    # Without the self-check, the comparison with the definition would notice it.
    monkeypatch.setattr(trie, "_self_check", lambda *arguments: None)
    monkeypatch.setattr(trie, "_layouts", {})
    assert min(deviation(with_gradients(twosome.score_actions, model), reference)) > 1e-2


@pytest.mark.parametrize("context", [200, 2048])
def test_the_self_check_is_as_wide_as_the_trees(context):
    """GPT-Neo's window counts columns, and its buffer holds `context` of them."""
    sizes = {"window_size": 200, "max_position_embeddings": context}
    model = adapted(tiny.model("gpt-neo", attention="eager", **sizes))
    things = ("tomato", "bowl", "lettuce", "board")
    places = ("counter", "kitchen", "dish", "microwave")
    prompts = [f"You see a {a} on the {b}. Next, you should take" for a in things for b in places]
    phrases = [["the bowl", "nothing"]] * len(prompts)
    groups = trie.group(packed(prompts, phrases), trie.NODES)
    assert min(len(trie.build_tree(part).ids) for part in groups) > 200
    reference = with_gradients(twosome.score_actions_naive, model, prompts, phrases)
    with pytest.warns(UserWarning, match="one row a phrase"):
        ours = with_gradients(twosome.score_actions, model, prompts, phrases)
    assert max(deviation(ours, reference)) < 1e-4


def test_the_self_check_is_as_deep_as_the_trees():
    """A window of 63 that the configuration hides shows at a depth of 64."""
    model = tiny.model("mistral-window", sliding_window=63)
    assert trie._self_check(model, {"single": None}, 63, 1) is None
    assert trie._self_check(model, {"single": None}, 64, 1) is not None
    assert trie._self_check(model, {"single": 63}, 64, trie.NODES) is None


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA"), RuntimeError("no memory left")])
def test_memory_that_runs_out_in_the_self_check_is_told(error, monkeypatch):
    """It is no reason to take rows, which need more of it."""
    model = tiny.model("llama")

    def exhausted(**inputs):
        # A plain RuntimeError has no mark of its own, but it meets the rows as well.
        if not isinstance(error, torch.OutOfMemoryError) or inputs["attention_mask"].dim() == 4:
            raise error
        return forward(**inputs)

    forward = model.forward
    monkeypatch.setattr(model, "forward", exhausted)
    with pytest.raises(type(error), match=str(error)):
        trie.token_log_probs(model, packed(tiny.PROMPTS, tiny.PHRASES))


# -----------------------------------------------------------------------------
# Against numbers worked out by hand.

def bigram():
    """Return a Llama without layers, its tokenizer, and the table whose rows it softmaxes."""
    words = ["<s>", "you", "should", "take", "the", "bowl", "tomato", "chop"]
    vocabulary = {word: i for i, word in enumerate(words)}
    core = tokenizers.Tokenizer(token_models.WordLevel(vocabulary, unk_token="<s>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    size = len(words)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=size, hidden_size=size, intermediate_size=8, num_hidden_layers=0,
        num_attention_heads=1, rms_norm_eps=0.0))
    table = torch.tensor([[((3 * i + 5 * j) % 7) / 2 for j in range(size)] for i in range(size)])
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(torch.eye(size))  # the norm makes it sqrt(size)
        model.lm_head.weight.copy_(table.T / math.sqrt(size))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=core)
    return model.eval(), tokenizer, table.tolist()


@pytest.mark.parametrize("score", [twosome.score_actions_naive, twosome.score_actions])
def test_a_bigram_model_by_hand(score):
    model, tokenizer, table = bigram()

    def log_p(a, b):
        return table[a][b] - math.log(sum(math.exp(x) for x in table[a]))

    # you=1 should=2 take=3 the=4 bowl=5 tomato=6 chop=7
    phrases = ["take the bowl", "take the tomato", "chop"]
    take_the = log_p(2, 3) + log_p(3, 4)
    joint = [take_the + log_p(4, 5), take_the + log_p(4, 6), log_p(2, 7)]
    per_word = [joint[0] / 3, joint[1] / 3, joint[2]]  # each word is one token here
    expected = {"sum": joint, "none": joint, "token": per_word, "word": per_word}
    for normalization, logits in expected.items():
        total = math.log(sum(math.exp(x) for x in logits))
        scores, = score(model, tokenizer, ["you should"], [phrases], normalization)
        assert scores.tolist() == pytest.approx([x - total for x in logits], abs=1e-5)
        assert scores.dtype == torch.float32
        assert scores.exp().sum().item() == pytest.approx(1)


def test_the_two_normalisations_and_none():
    joint = torch.tensor([-6.0, -2.0])
    logits = {"sum": [-6, -2], "none": [-6, -2], "token": [-1.5, -2], "word": [-3, -2]}
    for normalization, values in logits.items():
        ours = twosome.normalize(joint, [4, 1], [2, 1], normalization)
        assert torch.allclose(ours, torch.tensor(values).float().log_softmax(0))
    with pytest.raises(trie.ScoringError, match="sum, token, word"):
        twosome.normalize(joint, [4, 1], [2, 1], "words")


# -----------------------------------------------------------------------------
# Work is done once.

@pytest.mark.parametrize("name, path", [("llama", "tree"), ("bloom", "rows")])
def test_each_distinct_token_goes_through_the_model_once(name, path, recwarn):
    model = tiny.model(name, attention="eager")
    prompts, phrases = [tiny.PROMPTS[1]] * 3, [tiny.PHRASES[1]] * 3  # the same three times
    twosome.score_actions(model, BYTE_BPE, prompts, phrases)  # the self-check comes first
    seen = watch_forwards(model)
    first, second, third = twosome.score_actions(model, BYTE_BPE, prompts, phrases)
    (prompt_ids, tails), *_ = packed(prompts, phrases)
    distinct = {tail[:i] for tail in tails for i in range(1, len(tail))}
    (rows, columns), = seen  # one forward
    if path == "tree":
        assert (rows, columns) == (1, len(prompt_ids) + len(distinct))
        assert len(distinct) < sum(len(tail) - 1 for tail in tails)
    else:
        assert rows == len(tails)
    assert torch.equal(first, second) and torch.equal(first, third)


# One of these opens another.
ALIKE = ["You see a tomato. Next", "You see a tomato.",
         "You see a tomato. Next, you should take the", "You see a bowl", "walk"]
ANSWERS = [["take the bowl", "take the tomato"], ["Next", "Next take"], ["bowl", "tomato"],
           ["serve", "see a tomato"], ["away", "a way"]]


@pytest.mark.parametrize("nodes", [1, 20, 512])
def test_prompts_that_begin_alike_share_a_tree_of_so_many_nodes(nodes, monkeypatch):
    model = adapted(tiny.model("mistral-window"))
    reference = with_gradients(twosome.score_actions_naive, model, ALIKE, ANSWERS)
    monkeypatch.setattr(trie.token_log_probs, "__defaults__", (nodes,))
    twosome.score_actions(model, BYTE_BPE, ALIKE, ANSWERS)  # the self-check comes first
    seen = watch_forwards(model)
    ours = with_gradients(twosome.score_actions, model, ALIKE, ANSWERS)
    assert max(deviation(ours, reference)) < 1e-4
    items = packed(ALIKE, ANSWERS)
    distinct = {(*prompt_ids, *tail)[:i] for prompt_ids, tails in items for tail in tails
                for i in range(1, len(prompt_ids) + len(tail))}
    if nodes == 1:  # an item that is too large for any tree still gets one
        assert [shape[0] for shape in seen] == [trie.TREES, len(items) - trie.TREES]
    elif nodes == 20:
        (rows, columns), = seen
        assert 1 < rows < len(items) and columns < 30
    else:
        apart = sum(len(trie.build_tree([item]).ids) for item in items)
        assert seen == [(1, len(distinct))] and len(distinct) < apart - 20


def test_the_trie_that_the_drawing_shows():
    """See the top of engine/trie.py."""
    you, see, hold, take, the, go, bowl, pot, home, wait = range(10)
    tails = ((take, the, bowl), (take, the, pot), (go, home))
    tree = trie.build_tree([((you, see), tails), ((you, hold), ((wait,),))])
    assert tree.ids.tolist() == [you, see, take, the, go, hold]
    assert tree.positions.tolist() == [0, 1, 2, 3, 2, 1]
    rows = ["".join(" x"[seen] for seen in row) for row in tree.visible.tolist()]
    assert rows == ["x     ", "xx    ", "xxx   ", "xxxx  ", "xx  x ", "x    x"]
    assert tree.parents.tolist() == [1, 2, 3, 4, 5]
    edges = [(0, take), (1, the), (2, bowl), (2, pot), (0, go), (3, home), (4, wait)]
    assert tree.edges.tolist() == [list(edge) for edge in edges]
    assert tree.paths.tolist() == [[0, 1, 2], [0, 1, 3], [4, 5, 7], [6, 7, 7]]


# -----------------------------------------------------------------------------
# Tokenizers, and the seam between prompt and phrase.

@pytest.mark.parametrize("kind", tiny.TOKENIZERS)
def test_tokenizers(kind):
    tokenizer = tiny.TOKENIZERS[kind]()
    model = adapted(tiny.model("llama"))
    reference = with_gradients(twosome.score_actions_naive, model, tokenizer=tokenizer)
    ours = with_gradients(twosome.score_actions, model, tokenizer=tokenizer)
    assert max(deviation(ours, reference)) < 1e-4
    scores = twosome.score_actions(model, tokenizer, tiny.PROMPTS, tiny.PHRASES)
    assert all(row.exp().sum().item() == pytest.approx(1, abs=1e-5) for row in scores)
    for side in ("left", "right"):  # must not matter
        tokenizer.padding_side = side
        twosome.tokenize.cache_clear()
        again = twosome.score_actions(model, tokenizer, tiny.PROMPTS, tiny.PHRASES)
        assert all(torch.equal(a, b) for a, b in zip(scores, again, strict=True))
    items = packed(tiny.PROMPTS, tiny.PHRASES, tokenizer)
    for prompt, actions, (prompt_ids, tails) in zip(tiny.PROMPTS, tiny.PHRASES, items, strict=True):
        for phrase, tail in zip(actions, tails, strict=True):
            text = f"{prompt} {phrase}"  # one text, and nothing in it is a control token
            joint = tokenizer(text, split_special_tokens=True)["input_ids"]
            closing = kind == "unigram"  # its closing token is left out
            assert list(prompt_ids + tail) == joint[:len(joint) - closing]
            if kind != "merging":
                assert tokenizer.decode(list(tail)).strip() == phrase


def made_up():
    """Return a tokenizer of letters that merges "e" with " w": "the" and "wait" share a token."""
    letters = [" ", *"abcdefghijklmnopqrstuvwxyz"]
    vocabulary = {token: i for i, token in enumerate([*letters, " w", "e w"])}
    core = tokenizers.Tokenizer(token_models.BPE(vocabulary, [(" ", "w"), ("e", " w")]))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core)


@pytest.mark.parametrize("score", [twosome.score_actions_naive, twosome.score_actions])
@pytest.mark.parametrize("normalization", ["sum", "none", "token", "word"])
def test_the_odds_of_two_actions_do_not_depend_on_a_third_that_merges(normalization, score):
    tokenizer, model = made_up(), tiny.model("llama")
    prompt, two, three = "see the", ["chop", "take the bowl"], ["chop", "take the bowl", "wait"]
    (alone, _), (joined, tails) = packed([prompt] * 2, [two, three], tokenizer)
    assert joined == alone[:-1]  # "wait" has moved the cut to the left
    assert [tail[0] == alone[-1] for tail in tails] == [True, True, False]

    before, = score(model, tokenizer, [prompt], [two], normalization)
    after, = score(model, tokenizer, [prompt], [three], normalization)
    assert (after[0] - after[1]).item() == pytest.approx((before[0] - before[1]).item(), abs=1e-4)
    if normalization in ("sum", "none"):
        # A joint is the probability of everything behind the common past, the seam included.
        joint = trie.token_log_probs(model, [(joined, tails)])[0].sum(1)
        assert torch.allclose(after, joint.log_softmax(0), atol=1e-4)
        assert joint.exp().sum().item() <= 1  # events that exclude each other
        unnormalised, = score(model, tokenizer, [prompt], [three], "sum")
        assert torch.equal(after, unnormalised)
    else:
        # The seam weighs in the odds against the third, and nobody's length divides it.
        assert after.exp().sum().item() == pytest.approx(1)
        lengths = {"token": [5, 14, 4], "word": [1, 3, 1]}[normalization]
        table = trie.token_log_probs(model, [(joined, tails)])[0].detach()
        seam = torch.tensor([table[0, 0], table[1, 0], 0.0])
        logits = seam + (table.sum(1) - seam) / torch.tensor(lengths)
        assert torch.allclose(after, logits.log_softmax(0), atol=1e-4)


def test_a_seam_that_merges_leaves_a_proper_probability():
    tokenizer, model = tiny.merging(), tiny.model("llama")
    prompt, phrases = "cut the", ["lettuce", "bowl", "board"]
    (prompt_ids, tails), = packed([prompt], [phrases], tokenizer)
    alone = tokenizer(prompt)["input_ids"]
    assert len(prompt_ids) < len(alone)  # the cut moved left
    assert list(prompt_ids) == alone[:len(prompt_ids)]
    joint = trie.token_log_probs(model, [(prompt_ids, tails)])[0].sum(1)
    assert joint.exp().sum().item() <= 1
    naive, = twosome.score_actions_naive(model, tokenizer, [prompt], [phrases], "sum")
    assert torch.allclose(joint.log_softmax(0), naive, atol=1e-4)


# -----------------------------------------------------------------------------
# Copied alone, and refusals.

def sections(source):
    """Return sections 4.1 and 4.2 of twosome.py, behind the imports that they use."""
    lines = source.splitlines()
    start, end = (next(i for i, line in enumerate(lines) if line.startswith(f"# Section {number}"))
                  for number in ("4.1", "4.3"))
    assert lines[start - 1].startswith("# ----") and lines[end - 1].startswith("# ----")
    part = "\n".join(lines[start - 1:end - 1])
    used = {node.id for node in ast.walk(ast.parse(part)) if isinstance(node, ast.Name)}
    imports = []
    for node in ast.parse(source).body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            node.names = [name for name in node.names if (name.asname or name.name) in used]
            imports += [ast.unparse(node)] * bool(node.names)
    return "\n".join([*imports, part])


def test_sections_4_1_and_4_2_can_be_copied_alone(tmp_path):
    with open(os.path.join(ROOT, "twosome.py"), encoding="utf-8") as file:
        (tmp_path / "copied.py").write_text(sections(file.read()), encoding="utf-8")
    with open(os.path.join(ROOT, "engine", "trie.py"), encoding="utf-8") as file:
        os.mkdir(tmp_path / "engine")
        (tmp_path / "engine" / "trie.py").write_text(file.read(), encoding="utf-8")
    texts = ["You see a tomato. Next, you should"], [["pick up the tomato", "wait"]]
    folder = os.path.join(ROOT, "pocket_lm")
    (tmp_path / "score.py").write_text(f"""
import copied, torch, transformers
model = transformers.AutoModelForCausalLM.from_pretrained({folder!r}).eval()
tokenizer = transformers.AutoTokenizer.from_pretrained({folder!r})
with torch.no_grad():
    for score in (copied.score_actions, copied.score_actions_naive):
        print("scores", *score(model, tokenizer, *{texts!r})[0].tolist())
""", encoding="utf-8")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "score.py"], cwd=tmp_path, env=environment, check=False,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    model, tokenizer = models.load("pocket_lm")
    with torch.no_grad():
        expected = twosome.score_actions(model, tokenizer, *texts)[0].tolist()
    lines = [line for line in done.stdout.splitlines() if line.startswith("scores")]
    assert len(lines) == 2
    for line in lines:
        assert list(map(float, line.split()[1:])) == pytest.approx(expected, abs=1e-4)


REFUSALS = {
    "no actions": ("You", []),
    "empty": ("You", ["chop", " "]),
    "stray space": ("You", ["chop", " serve"]),
    "same tokens": ("You", ["chop", "chop"]),
    "no token to condition on": ("", ["chop", "serve"]),
    "bare text": ("You", "chop"),
    "ends in ' '": ("You ", ["chop", "serve"]),
    "half a surrogate": ("You", ["chop", "\ud800"]),
    "is no text": ("You", ["chop", 3]),
    "context holds 60": (tiny.PROMPTS[1] + tiny.PROMPTS[2], ["chop", "serve"]),
}


@pytest.mark.parametrize("message", REFUSALS)
def test_what_cannot_be_scored_is_refused_in_one_line(message):
    prompt, phrases = REFUSALS[message]
    model = tiny.model("llama", max_position_embeddings=60)
    with pytest.raises(trie.ScoringError, match=message) as told:
        twosome.score_actions(model, BYTE_BPE, [prompt], [phrases])
    assert "\n" not in str(told.value)


def test_two_prompts_need_two_lists_of_phrases():
    with pytest.raises(trie.ScoringError, match="one for each prompt"):
        twosome.score_actions(tiny.model("llama"), BYTE_BPE, ["You", "walk"], [["chop", "serve"]])


def test_numbers_that_are_not_finite_are_told():
    model = tiny.model("llama")
    torch.nn.init.constant_(model.lm_head.weight, float("nan"))
    with pytest.raises(FloatingPointError, match="log-probabilities are not finite"):
        twosome.score_actions(model, BYTE_BPE, ["You"], [["chop", "serve"]])

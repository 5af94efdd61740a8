"""Scoring: the probability an LLM gives to each admissible action's phrase after an observation's text.

Paper: Tan et al., "True Knowledge Comes from Practice", ICLR 2024 (arXiv 2401.14151), sections 4.1 and 4.2.

  4.1  log P(a_k | d) = sum_i log P_LM(w_i | d, w_1 ... w_{i-1})     score_actions_naive: the definition, for reading and as the tests' oracle
                                                                    score_actions: what runs; equal values and gradients, each token once
  4.2  divide by the phrase's tokens or words, softmax over actions  normalize

  from scoring import score_actions        # imports nothing of the project: copy this file alone
  log_pi, = score_actions(model, tokenizer, ["You see a tomato. Your next step is to"], [["pick up the tomato", "wait"]])

Axes, named once: B prompts, A actions (phrases of one prompt, in a Tree of all its prompts), S sequence (a trie's nodes), P parents, E edges,
T tokens of the longest phrase, H hidden, V vocabulary.
"""
import functools
import inspect
import itertools
import warnings
import weakref
from typing import NamedTuple

import numpy as np
import torch

NORMALIZATIONS = ("sum", "token", "word")
NODES, TREES = 256, 4  # tokens of a tree, trees of a forward (our choice): a larger tree wastes attention on what nobody may see, a
# smaller one shares less; a larger forward leaves a processor's cache


class ScoringError(ValueError):
    """Prompt and phrases cannot be scored; the message is one line that says what would be right."""


class NonFiniteScores(ScoringError, ArithmeticError):
    """The model's log-probabilities are NaN or infinite; ppo.py leaves out the step where it meets them."""


# ---------------------------------------------------------------------------------------------------------------------
# Section 4.1: the probability of an action is the joint probability of its phrase's tokens

def encode(tokenizer, texts):
    """Token ids of each text with the tokenizer's own opening token (BOS), without a closing one. list[list[int]]."""
    for text in texts:
        if any("\ud800" <= letter <= "\udfff" for letter in text):
            raise ScoringError(f"the text {ascii(text[:40])} holds half a surrogate pair, which is no character")
    return [row[:-1] if len(row) > 1 and row[-1] == tokenizer.eos_token_id else row for row in tokenizer(texts)["input_ids"]]


@functools.lru_cache(maxsize=16_384)  # a prompt met again is not tokenised again
def tokenize(tokenizer, prompt, phrases):
    """Token ids of a prompt and of each phrase after it: (prompt_ids, (phrase_ids, ...)), tuples of int.

    Prompt + " " + phrase is encoded as one text, as the LLM would meet it, and cut where the prompt's own tokens end: the space
    belongs to the phrase's first token. Where a tokenizer merges across that seam, the cut moves left to the last token that
    the prompt alone and all its joint encodings share. Every phrase is then scored from there: still the probability of its
    tokens given one common past, so still proper. phrases is a tuple of str.
    """
    if not phrases:
        raise ScoringError("there are no actions to score; give at least one phrase")
    if any(not phrase.strip() for phrase in phrases):
        raise ScoringError("an action's phrase is empty; give it at least one word")
    alone, *joint = encode(tokenizer, [prompt] + [f"{prompt} {phrase}" for phrase in phrases])
    cut = len(alone)
    while cut and any(ids[:cut] != alone[:cut] for ids in joint):
        cut -= 1
    if not cut:
        raise ScoringError(f"the prompt {prompt[:40]!r} leaves no token to condition on; give it at least one word before the action")
    tails = [tuple(ids[cut:]) for ids in joint]
    for k, tail in enumerate(tails):
        if not tail:
            raise ScoringError(f"the phrase {phrases[k]!r} has no tokens of its own after the prompt")
        if tail in tails[:k]:
            raise ScoringError(f"the phrases {phrases[tails.index(tail)]!r} and {phrases[k]!r} have the same tokens; actions need phrases that differ")
    return tuple(alone[:cut]), tuple(tails)


def normalize(joint, token_counts, word_counts, normalization="word"):
    """Section 4.2: the policy log pi(a_k | d) from joint log-probabilities, float32 [A] -> [A].

    "sum" leaves log P(a_k | d) as the logit, "token" divides it by the phrase's tokens N_k, "word" by its words W_k (the
    paper's choice: it neither favours short phrases nor rewards words that are cut into many near-certain tokens).
    """
    if normalization not in NORMALIZATIONS:
        raise ScoringError(f"unknown normalisation {normalization!r}; choose one of {', '.join(NORMALIZATIONS)}")
    lengths = {"sum": None, "token": token_counts, "word": word_counts}[normalization]
    logits = joint if lengths is None else joint / joint.new_tensor(lengths)
    return logits.log_softmax(dim=-1)  # pi = softmax over the admissible actions


def _policy(joints, tokenizer, prompts, phrases, normalization):
    """Normalise each prompt's joint log-probabilities."""
    policies = []
    for joint, prompt, actions in zip(joints, prompts, phrases, strict=True):
        tails = tokenize(tokenizer, prompt, tuple(actions))[1]  # remembered
        policies.append(normalize(joint, [len(tail) for tail in tails], [len(phrase.split()) for phrase in actions], normalization))
    return policies


def score_actions_naive(model, tokenizer, prompts, phrases, normalization="word"):
    """The definition: log P(a_k | d) = sum_i log P_LM(w_i | d, w_1 ... w_{i-1}), one full sequence an action.

    model and tokenizer are a causal LM and its tokenizer; prompts is list[str]; phrases is list[list[str]], the admissible actions
    of each prompt. Returns a list of float32 tensors [A] of log-probabilities over each prompt's actions.
    """
    joints = []
    for prompt, actions in zip(prompts, phrases, strict=True):
        prompt_ids, tails = tokenize(tokenizer, prompt, tuple(actions))
        joint = []
        for tail in tails:
            ids = torch.tensor([prompt_ids + tail], device=model.device)  # [1, S]
            log_probs = model(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)[0]  # [S, V]
            positions = range(len(prompt_ids) - 1, len(prompt_ids) + len(tail) - 1)  # position i predicts token i + 1
            joint.append(sum(log_probs[i, token] for i, token in zip(positions, tail)))
        joints.append(torch.stack(joint))
    return _policy(joints, tokenizer, prompts, phrases, normalization)


# ---------------------------------------------------------------------------------------------------------------------
# The same, fast: prompts and their phrases become a trie of tokens, packed into one sequence

class Tree(NamedTuple):
    """Some prompts and the phrases of each as one sequence of S tokens: the nodes of the trie of all their tokens, parents first.

    What texts share from their beginning stands there once: the prompts' common opening, what a prompt's phrases share. A
    phrase's last token is only predicted, never read, so it needs no node. An edge is a distinct phrase token, predicted at
    its parent.
    """
    items: list              # what is packed: (prompt_ids, (phrase_ids, ...)) of each prompt
    ids: torch.Tensor        # [S] token ids
    positions: torch.Tensor  # [S] position ids: depth, so siblings share one
    visible: torch.Tensor    # bool [S, S]: which nodes a node sees, itself and its ancestors
    parents: torch.Tensor    # [P] nodes whose logits are needed, ascending
    edges: torch.Tensor      # [E, 2] each edge's parent, as an index into parents, and token
    paths: torch.Tensor      # [A, T] the edges that the tokens of each phrase of all prompts walk; E where the phrase is over


def build_tree(items):
    """The Tree of a list of (prompt_ids, (phrase_ids, ...)), tuples of token ids as `tokenize` gives them."""
    nodes, edges, paths = {}, {}, []  # (parent, token) -> number, of nodes in the sequence and of edges; parent -1 opens a text

    def walk(node, ids):
        for token in ids:
            node = nodes.setdefault((node, token), len(nodes))
            yield node

    for prompt_ids, tails in items:
        *_, last = walk(-1, prompt_ids)
        for tail in tails:
            paths.append([edges.setdefault(edge, len(edges)) for edge in zip([last, *walk(last, tail[:-1])], tail)])
    (up, ids), (of, tokens) = np.array(list(nodes)).T, np.array(list(edges)).T
    visible, up = np.eye(len(ids) + 1, dtype=bool), np.append(up, -1)  # the last row: before all texts
    while (up >= 0).any():  # a node sees what its ancestor sees, then what that one's does: twice as far up each time
        visible |= visible[up]
        up = up[up]
    visible = visible[:-1, :-1]
    parents, of = np.unique(of, return_inverse=True)
    paths = np.array(list(itertools.zip_longest(*paths, fillvalue=len(edges)))).T
    return Tree(items, *map(torch.from_numpy, (ids, visible.sum(1) - 1, visible, parents, np.stack([of, tokens], 1), paths)))


def group(items, nodes):
    """Split items, as build_tree takes them, into lists whose trees are about equally large, with about `nodes` nodes at most.

    Sorted by their tokens, so that what shares the longest beginnings comes together.
    """
    items, starts, total, last = sorted(items), [], 0, ()  # starts: nodes of one tree of all items before each
    for prompt_ids, tails in items:
        starts.append(total)
        shared = next((i for i, (a, b) in enumerate(zip(last, prompt_ids)) if a != b), min(len(last), len(prompt_ids)))
        total += len(prompt_ids) - shared + len({tail[:i] for tail in tails for i in range(1, len(tail))})
        last = prompt_ids
    parts = -(-total // nodes)
    keyed = itertools.groupby(zip(starts, items), lambda pair: pair[0] * parts // total)
    return [[item for _, item in pairs] for _, pairs in keyed]


@functools.lru_cache(maxsize=64)
def _takes(kind):
    """The names of the arguments that a class of models takes."""
    return frozenset(inspect.signature(kind.forward).parameters)


def _logits(model, keep, **inputs):
    """Float32 logits [kept, V] where the bool mask keep [B, S] is set: the vocabulary projection runs there alone."""
    if "logits_to_keep" in _takes(type(plain(model))):
        return model(**inputs, use_cache=False, logits_to_keep=keep).logits.float()
    return model(**inputs, use_cache=False).logits[keep].float()


def _forward_trees(model, trees, layout):
    """Joint log-probabilities of every phrase of B trees, one after the other, in one forward: float32 [A]."""
    device, dtype, S = model.device, model.dtype, max(len(tree.ids) for tree in trees)
    pad = functools.partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
    ids = pad([tree.ids for tree in trees]).to(device)  # [B, S]; a pad's id 0 is a token like any other, which nobody sees
    positions = pad([tree.positions for tree in trees]).to(device)
    visible = torch.eye(S, dtype=torch.bool).repeat(len(trees), 1, 1)  # [B, S, S]
    keep = torch.zeros(len(trees), S, dtype=torch.bool)
    for b, tree in enumerate(trees):
        visible[b, :len(tree.ids), :len(tree.ids)] = tree.visible
        keep[b, tree.parents] = True
    visible = visible.to(device)

    def additive(mask):  # a bool mask is silently wrong under eager attention: hand over what is added to the scores
        return torch.zeros(mask.shape, dtype=dtype, device=device).masked_fill_(~mask, torch.finfo(dtype).min)[:, None]

    mask = {kind: additive(visible if window is None else visible & (positions[:, :, None] - positions[:, None, :] < window))
            for kind, window in layout.items()}
    logits = _logits(model, keep.to(device), input_ids=ids, position_ids=positions, attention_mask=mask.get("single", mask))
    joints = []
    for tree, part in zip(trees, logits.split([len(tree.parents) for tree in trees])):  # [P, V]
        rows, tokens = tree.edges.to(device).T
        log_probs = part[rows, tokens] - part.logsumexp(-1)[rows]  # of each distinct phrase token
        joints.append(torch.nn.functional.pad(log_probs, (0, 1))[tree.paths.to(device)].sum(-1))  # the 0 behind them stands where a phrase is over
    return torch.cat(joints)


def _forward_rows(model, items):
    """The same by the exact fallback, for models that cannot take a tree's mask: one ordinary right-padded row a phrase."""
    rows = [(torch.tensor(prompt_ids), torch.tensor(tail)) for prompt_ids, tails in items for tail in tails]
    pad = functools.partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
    ids = pad([torch.cat([prompt, tail[:-1]]) for prompt, tail in rows]).to(model.device)
    mask = pad([torch.ones(len(prompt) + len(tail) - 1, dtype=torch.long) for prompt, tail in rows]).to(model.device)
    keep = pad([torch.arange(1, len(prompt) + len(tail)) >= len(prompt) for prompt, tail in rows]).to(model.device)
    logits = _logits(model, keep, input_ids=ids, attention_mask=mask)  # [tokens of all phrases, V]
    log_probs = logits.gather(1, torch.cat([tail for _, tail in rows]).to(model.device)[:, None])[:, 0] - logits.logsumexp(-1)
    return torch.stack([part.sum() for part in log_probs.split([len(tail) for _, tail in rows])])


def mask_layout(model):
    """How this architecture takes a tree's mask: {kind of layer: sliding window or None}, or a str saying why it cannot.

    A custom 4-D mask replaces the model's own, a sliding window included, so the window has to be put back in here.
    """
    config = model.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", None) or ())
    if getattr(config, "alibi", False) or "position_ids" not in _takes(type(plain(model))):
        return "it reads positions off the columns (ALiBi, or a recurrence)"
    if config._attn_implementation not in ("sdpa", "eager"):
        return f"{config._attn_implementation} attention takes no custom mask"
    if not kinds <= {"full_attention", "sliding_attention"}:
        return f"it has layers of other kinds ({', '.join(sorted(kinds - {'full_attention', 'sliding_attention'}))})"
    if "sliding_attention" in kinds:
        return {"full_attention": None, "sliding_attention": window}
    return {"single": window if not kinds else None}


def plain(model):
    """The transformers model inside a peft model, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


_layouts = weakref.WeakKeyDictionary()  # model -> (mask layout, or None where rows are used; depth and width it was checked for)


def _layout(model, depth, width):
    """The model's mask layout, or None where rows are used. No architecture is trusted before it has scored an invented tree as
    rows score it, as deep and as wide (nodes) as what comes: so a window shows that the configuration does not tell."""
    layout, *checked = _layouts.get(plain(model)) or (mask_layout(model), 0, 0)
    if isinstance(layout, dict) and (depth > checked[0] or width > checked[1]):
        depth, width = (-(-max(pair) // unit) * unit for pair, unit in zip(zip((depth, width), checked), (64, NODES)))
        checked = [min(depth, context(model)), width]  # rounded up, so that it is seldom repeated
        layout = _self_check(model, layout, *checked) or layout
    if isinstance(layout, str):
        warnings.warn(f"{type(plain(model)).__name__}: scoring one row a phrase (exact, slower): {layout}")
        layout = None
    _layouts[plain(model)] = (layout, *checked)
    return layout


@torch.no_grad()
def _self_check(model, layout, depth, width):
    """Score an invented tree as a tree and as rows. Returns None where they agree, else a str saying what went wrong."""
    part = max(min(depth // 4, 16), 1)  # tokens of a phrase: few, for each costs a row of logits
    others = max(width - depth, 0) // (3 * part - 2) + 1  # prompts after the first: each adds 3 * part - 2 nodes
    tokens = tuple((torch.arange((others + 3) * part + depth) * 7919 % model.get_input_embeddings().weight.shape[0]).tolist())
    a, b, c, *ends = (tokens[i * part:(i + 1) * part] for i in range(others + 3))
    prompt = tokens[-depth:][:depth - part + 1]
    tails = [a, a[:part // 2] + b[part // 2:], c]  # two share a beginning, as do the prompts
    items = [(prompt, tails), *((prompt[:len(prompt) // 2] + end, tails[1:]) for end in ends)]
    try:
        fast, exact = _forward_trees(model, [build_tree(items)], layout), _forward_rows(model, items)
    except (TypeError, ValueError, RuntimeError, AttributeError, KeyError, IndexError) as error:
        if "out of memory" in str(error) or "t allocate memory" in str(error):
            raise
        return f"{type(error).__name__} on a tree mask"
    gap = ((fast - exact).abs().mean() / part).item()
    # Our choice: half precision and 8 bits round a token's log-probability by some hundredths of a nat; a wrong mask is off by more.
    bound = 1e-4 if model.dtype == torch.float32 and not hasattr(model.config, "quantization_config") else 0.1
    return None if gap < bound or not torch.isfinite(exact).all() else f"the tree's scores were {gap:.2g} nats a token off"


def context(model):
    """The number of tokens the model's context holds; 2 ** 40 where it has no bound."""
    config = model.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    limits = [getattr(config, "max_position_embeddings", None)]
    if rope.get("rope_type") == "longrope":  # beyond this, a text's rotations depend on the longest text of its batch
        limits.append(rope.get("original_max_position_embeddings"))
    return min((limit for limit in limits if limit), default=2 ** 40)


def joint_log_probs(model, tokenizer, prompts, phrases, nodes=NODES):
    """log P(a_k | d) of every phrase of each prompt: a list of float32 [A]; equal token ids are computed once. Raises ScoringError."""
    if isinstance(prompts, str) or any(isinstance(actions, str) for actions in phrases):
        raise ScoringError("prompts is a list of texts, and phrases a list of lists of texts; one of them is a bare text here")
    items = [tokenize(tokenizer, prompt, tuple(actions)) for prompt, actions in zip(prompts, phrases, strict=True)]
    if not items:
        return []
    depth, prompt = max((len(prompt_ids) + max(map(len, tails)) - 1, prompt) for prompt, (prompt_ids, tails) in zip(prompts, items))
    if depth > (limit := context(model)):
        raise ScoringError(f"prompt and phrase have {depth} tokens, but the model's context holds {limit}; shorten {prompt[:40]!r} ...")
    trees = [build_tree(part) for part in group(set(items), nodes)]
    layout, joint = _layout(model, depth, max(len(tree.ids) for tree in trees)), {}
    for start in range(0, len(trees), TREES):
        part = trees[start:start + TREES]
        packed = [item for tree in part for item in tree.items]
        scores = _forward_rows(model, packed) if layout is None else _forward_trees(model, part, layout)
        joint.update(zip(packed, scores.split([len(tails) for _, tails in packed])))
    if not torch.isfinite(torch.cat(list(joint.values()))).all():
        raise NonFiniteScores("the model gives log-probabilities that are not finite; check its weights, or use a wider --dtype")
    return [joint[item] for item in items]


def score_actions(model, tokenizer, prompts, phrases, normalization="word", nodes=NODES):
    """What runs: the same values and gradients as score_actions_naive, each distinct token of a forward computed once.

    Arguments and result as there; a tree has about `nodes` tokens at most (a larger prompt stands alone). Raises ScoringError.
    """
    return _policy(joint_log_probs(model, tokenizer, prompts, phrases, nodes), tokenizer, prompts, phrases, normalization)


def token_report(model, tokenizer, phrases, prompt="Next, you should"):
    """How a tokenizer and a model see phrases after a prompt, as a printable table: tokens, words, log-probabilities in nats."""
    with torch.no_grad():
        joint, = joint_log_probs(model, tokenizer, [prompt], [phrases])
    lines = [f"after {prompt!r}", f"{'log P':>9} {'a token':>9} {'a word':>9}  tokens words  phrase"]
    for phrase, tail, score in zip(phrases, tokenize(tokenizer, prompt, tuple(phrases))[1], joint.tolist()):
        words = len(phrase.split())
        lines.append(f"{score:9.3f} {score / len(tail):9.3f} {score / words:9.3f}  {len(tail):6} {words:5}  {phrase}:"
                     f" {' | '.join(tokenizer.convert_ids_to_tokens(list(tail)))}")
    return "\n".join(lines)

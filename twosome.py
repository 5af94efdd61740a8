"""TWOSOME: an LLM acts in a text-described world, and PPO aligns it with that world.

Paper: Tan et al., "True Knowledge Comes from Practice: Aligning LLMs with Embodied Environments via Reinforcement
Learning", ICLR 2024 (arXiv 2401.14151). Each concept is one module that can be copied alone:

  paper                                              here
  4.1  an action's probability from its phrase       tokenize, score_actions_naive (the definition), score_actions (fast)
  4.2  action prompt normalisation                   normalize
  4.3  actor (LoRA) and critic on one frozen LLM     Agent; PPO itself in ppo.py
  4.4  prompt design                                 prompts.py
  5    Overcooked and the VirtualHome-style home     envs.py

  python twosome.py --env overcooked                               # learn the tomato salad, about a minute on two cores
  python twosome.py --env overcooked --task tomato-lettuce-salad
  python twosome.py --help                                         # every setting, with its default

Axes, named once: B prompts, A actions (phrases of one prompt), S sequence (prompt and trie), P parents, H hidden, V vocabulary.
"""
import argparse
import contextlib
import dataclasses
import functools
import inspect
import os
import random
import sys
import time
import warnings
import weakref
from typing import NamedTuple

import numpy as np
import peft
import torch

import envs
import models
import ppo
import prompts as prompting
import runs

NORMALIZATIONS = ("sum", "token", "word")


class ScoringError(ValueError):
    """Prompt and phrases cannot be scored; the message is one line that says what would be right."""


class NonFiniteScores(ScoringError, ppo.NonFiniteError):
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
    """Token ids of a prompt and of each phrase after it: (prompt_ids, [phrase_ids, ...]), tuples of int.

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
    return tuple(alone[:cut]), tails


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
        tails = tokenize(tokenizer, prompt, tuple(actions))[1]
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
# The same, fast: the phrases of a prompt become a trie of tokens, packed behind the prompt into one sequence

class Tree(NamedTuple):
    """One prompt and its phrases as one sequence of S tokens: the prompt, then the trie's inner nodes in depth-first order.

    A phrase's last token is only predicted, never read, so leaves need no place in the sequence. An edge is a distinct phrase
    token: predicted at its parent's column, shared by every phrase that starts the same way.
    """
    ids: torch.Tensor        # [S] token ids
    positions: torch.Tensor  # [S] position ids: depth, so siblings share one
    prompt: int              # length of the prompt; columns from here on are trie nodes
    visible: torch.Tensor    # bool [S - prompt, S - prompt]: which trie nodes a trie node sees (itself and its ancestors)
    parents: torch.Tensor    # [P] columns whose logits are needed, ascending
    edges: torch.Tensor      # [E, 2] each edge's parent, as an index into parents, and token
    paths: torch.Tensor      # [A, T] the edges each phrase's tokens walk; E where the phrase is over
    tails: tuple             # each phrase's token ids


def build_tree(prompt_ids, tails):
    """The Tree of a prompt's token ids (a tuple) and of each phrase's (tuples that differ)."""
    start = len(prompt_ids)
    inner = sorted({tail[:i] for tail in tails for i in range(1, len(tail))})  # sorted: depth first, parents before children
    column = {(): start - 1, **{node: start + i for i, node in enumerate(inner)}}
    edges = sorted({tail[:i] for tail in tails for i in range(1, len(tail) + 1)}, key=lambda edge: (column[edge[:-1]], edge))
    parents = sorted({column[edge[:-1]] for edge in edges})
    number, row = {edge: i for i, edge in enumerate(edges)}, {parent: i for i, parent in enumerate(parents)}
    longest = max(map(len, tails))
    return Tree(torch.tensor([*prompt_ids, *(node[-1] for node in inner)]),
                torch.tensor([*range(start), *(start + len(node) - 1 for node in inner)]), start,
                torch.tensor([[node[:len(other)] == other for other in inner] for node in inner], dtype=torch.bool).view(len(inner), len(inner)),
                torch.tensor(parents), torch.tensor([(row[column[edge[:-1]]], edge[-1]) for edge in edges]),
                torch.tensor([[number[tail[:i]] if i <= len(tail) else len(edges) for i in range(1, longest + 1)] for tail in tails]), tuple(tails))


@functools.lru_cache(maxsize=8_192)
def pack(tokenizer, prompt, phrases):
    """The Tree of a prompt (str) and its phrases (a tuple of str)."""
    return build_tree(*tokenize(tokenizer, prompt, phrases))


@functools.lru_cache(maxsize=64)
def _takes(kind):
    """The names of the arguments that a class of models takes."""
    return frozenset(inspect.signature(kind.forward).parameters)


def _logits(model, keep, **inputs):
    """Float32 logits [kept, V] where the bool mask keep [B, S] is set: the vocabulary projection runs there alone."""
    if "logits_to_keep" in _takes(type(_plain(model))):
        return model(**inputs, use_cache=False, logits_to_keep=keep).logits.float()
    return model(**inputs, use_cache=False).logits[keep].float()


def _forward_trees(model, trees, layout):
    """Joint log-probabilities of every phrase of B trees in one forward: a list of float32 [A]."""
    device, dtype, longest = model.device, model.dtype, max(len(tree.ids) for tree in trees)
    ids, positions = (torch.nn.utils.rnn.pad_sequence([getattr(tree, name) for tree in trees], batch_first=True).to(device)
                      for name in ("ids", "positions"))  # [B, S]; id 0 is a token like any other: no real token sees a pad
    # Columns stand in depth-first order, so the causal triangle already shows every node the whole prompt and hides all
    # pads; only among the trie's nodes does it show too much.
    allowed = torch.ones(longest, longest, dtype=torch.bool).tril().repeat(len(trees), 1, 1)  # [B, S, S]
    keep = torch.zeros(len(trees), longest, dtype=torch.bool)
    for b, tree in enumerate(trees):
        allowed[b, tree.prompt:len(tree.ids), tree.prompt:len(tree.ids)] = tree.visible
        keep[b, tree.parents] = True
    allowed = allowed.to(device)

    def additive(mask):  # a bool mask is silently wrong under eager attention: hand over what is added to the scores
        return torch.zeros(mask.shape, dtype=dtype, device=device).masked_fill_(~mask, torch.finfo(dtype).min)[:, None]

    mask = {kind: additive(allowed if window is None else allowed & (positions[:, :, None] - positions[:, None, :] < window))
            for kind, window in layout.items()}
    logits = _logits(model, keep.to(device), input_ids=ids, position_ids=positions, attention_mask=mask.get("single", mask))
    offsets = np.cumsum([0] + [len(tree.parents) for tree in trees])
    rows = torch.cat([tree.edges[:, 0] + offset for tree, offset in zip(trees, offsets)]).to(device)
    tokens = torch.cat([tree.edges[:, 1] for tree in trees]).to(device)
    edges = logits[rows, tokens] - logits.logsumexp(-1)[rows]  # log P of each distinct phrase token
    return [torch.nn.functional.pad(part, (0, 1))[tree.paths.to(device)].sum(-1)  # the 0 behind them stands where a phrase is over
            for tree, part in zip(trees, edges.split([len(tree.edges) for tree in trees]))]


def _forward_rows(model, trees):
    """The same by the exact fallback, for models that cannot take a tree's mask: one ordinary right-padded row a phrase."""
    rows = [(tree.ids[:tree.prompt], torch.tensor(tail)) for tree in trees for tail in tree.tails]
    pad = functools.partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
    ids = pad([torch.cat([prompt, tail[:-1]]) for prompt, tail in rows]).to(model.device)
    mask = pad([torch.ones(len(prompt) + len(tail) - 1, dtype=torch.long) for prompt, tail in rows]).to(model.device)
    keep = pad([torch.arange(1, len(prompt) + len(tail)) >= len(prompt) for prompt, tail in rows]).to(model.device)
    logits = _logits(model, keep, input_ids=ids, attention_mask=mask)  # [tokens of all phrases, V]
    log_probs = logits.gather(1, torch.cat([tail for _, tail in rows]).to(model.device)[:, None])[:, 0] - logits.logsumexp(-1)
    joint = torch.stack([part.sum() for part in log_probs.split([len(tail) for _, tail in rows])])
    return joint.split([len(tree.tails) for tree in trees])


def mask_layout(model):
    """How this architecture takes a tree's mask: {kind of layer: sliding window or None}, or a str saying why it cannot.

    A custom 4-D mask replaces the model's own, a sliding window included, so the window has to be put back in here.
    """
    config = model.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", None) or ())
    if getattr(config, "alibi", False) or "position_ids" not in _takes(type(_plain(model))):
        return "it reads positions off the columns (ALiBi, or a recurrence)"
    if config._attn_implementation not in ("sdpa", "eager"):
        return f"{config._attn_implementation} attention takes no custom mask"
    if not kinds <= {"full_attention", "sliding_attention"}:
        return f"it has layers of other kinds ({', '.join(sorted(kinds - {'full_attention', 'sliding_attention'}))})"
    if "sliding_attention" in kinds:
        return {"full_attention": None, "sliding_attention": window}
    return {"single": window if not kinds else None}


def _plain(model):
    """The transformers model inside a peft model, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


_layouts = weakref.WeakKeyDictionary()  # model -> (mask layout, or None where rows are used; prompt and nodes it was checked for)


def _layout(model, trees):
    """The model's mask layout, or None where rows are used. No architecture is trusted before it has scored an invented tree as
    rows score it, at least as large as these are: so a window shows that the configuration does not tell."""
    layout, *checked = _layouts.get(_plain(model)) or (mask_layout(model), 0, 0)
    size = max(tree.prompt for tree in trees), max(len(tree.ids) - tree.prompt for tree in trees)
    if isinstance(layout, dict) and (size[0] > checked[0] or size[1] > checked[1]):
        checked = [-(-max(pair) // 64) * 64 for pair in zip(size, checked)]  # rounded up, so that it is seldom repeated
        layout = _self_check(model, layout, *checked) or layout
    if isinstance(layout, str):
        warnings.warn(f"{type(_plain(model)).__name__}: scoring one row a phrase (exact, slower): {layout}")
        layout = None
    _layouts[_plain(model)] = (layout, *checked)
    return layout


@torch.no_grad()
def _self_check(model, layout, prompt, nodes):
    """Score one invented tree as a tree and as rows. Returns None where they agree, else a str saying what went wrong."""
    depth = nodes // 3 + 2
    tokens = tuple((torch.arange(3 * depth + prompt) * 7919 % model.get_input_embeddings().weight.shape[0]).tolist())
    a, b, c = (tokens[i * depth:(i + 1) * depth] for i in range(3))
    tree = build_tree(tokens[3 * depth:][:min(prompt, context(model) - depth)], [a, a[:2] + b[2:], c])  # two share a beginning
    try:
        fast, exact = _forward_trees(model, [tree], layout)[0], _forward_rows(model, [tree])[0]
    except (TypeError, ValueError, RuntimeError, AttributeError, KeyError, IndexError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        return f"{type(error).__name__} on a tree mask"
    gap = ((fast - exact).abs().mean() / depth).item()
    # Half precision and 8 bits round a token's log-probability by some hundredths of a nat; a wrong mask is off by more.
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


def joint_log_probs(model, tokenizer, prompts, phrases, batch=64):
    """log P(a_k | d) of every phrase of each prompt: a list of float32 [A]; equal prompts are computed once. Raises ScoringError."""
    keys = [(prompt, tuple(actions)) for prompt, actions in zip(prompts, phrases, strict=True)]
    distinct, limit = {key: pack(tokenizer, *key) for key in keys}, context(model)
    for (prompt, _), tree in distinct.items():
        longest = tree.prompt + tree.paths.shape[1] - 1
        if longest > limit:
            raise ScoringError(f"prompt and phrase have {longest} tokens, but the model's context holds {limit}; shorten {prompt[:40]!r} ...")
    joints = []
    for start in range(0, len(distinct), batch):
        trees = list(distinct.values())[start:start + batch]
        layout = _layout(model, trees)
        joints += _forward_rows(model, trees) if layout is None else _forward_trees(model, trees, layout)
    if joints and not torch.isfinite(torch.cat(joints)).all():
        raise NonFiniteScores("the model gives log-probabilities that are not finite; check its weights, or use a wider --dtype")
    joint = dict(zip(distinct, joints))
    return [joint[key] for key in keys]


def score_actions(model, tokenizer, prompts, phrases, normalization="word", batch=64):
    """What runs: the same values and gradients as score_actions_naive, each distinct token computed once.

    Arguments and result as there; `batch` distinct prompts go through the model at once. Raises ScoringError.
    """
    return _policy(joint_log_probs(model, tokenizer, prompts, phrases, batch), tokenizer, prompts, phrases, normalization)


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


# ---------------------------------------------------------------------------------------------------------------------
# Section 4.3: actor and critic on one frozen LLM

def describe(info):
    """The text of an observation: (prompt, admissible phrases), hashable, from an environment's info.

    Anyone's environment works if info carries "prompt" (str) and "actions" (the admissible actions' phrases, list[str]); with
    "admissible" as well, phrase k stands for action info["admissible"][k], else for action k. Our two environments carry their
    named "state" instead, and prompts.py renders it.
    """
    if "prompt" in info:
        return info["prompt"], tuple(info["actions"])
    prompt, phrases = prompting.render(info["state"])
    return prompt, tuple(phrases[k] for k in info["admissible"]) or tuple(phrases)


class Agent:
    """Actor: frozen LLM + LoRA. Critic: the same LLM with the adapter off, then an MLP on the prompt's last hidden state.

    model, tokenizer: a causal LM and its tokenizer (models.load); normalization: section 4.2. LoRA rank 8, alpha 16, dropout 0 on
    the q and v projections: published scripts. It has the methods ppo.py asks of an agent; an item is (prompt, phrases).
    """
    FEATURE_BYTES = 64 * 2 ** 20  # bound on the remembered features; the oldest go first

    def __init__(self, model, tokenizer, normalization="word", lora_rank=8, lora_alpha=16, lora_targets=None):
        self.model = models.add_lora(model, lora_rank, lora_alpha, lora_targets)
        self.tokenizer, self.normalization = tokenizer, normalization
        self._scores, self._features = {}, {}  # item -> log pi, while the policy stands; prompt -> [H], for good
        hidden = self._hidden(["a"]).shape[1]  # asked of the model itself: some project the embedding to another width
        # Hidden -> 1024 -> 512 -> 1, ReLU, no biases: published scripts. The last layer starts at zero (our choice): a random
        # value is noise in the first advantages, and under a sparse reward noise is all there is.
        self.critic = torch.nn.Sequential(
            torch.nn.Linear(hidden, 1024, bias=False), torch.nn.ReLU(), torch.nn.Linear(1024, 512, bias=False), torch.nn.ReLU(),
            torch.nn.Linear(512, 1, bias=False)).to(model.device)
        torch.nn.init.zeros_(self.critic[-1].weight)

    def encode(self, obs, info):
        """What the rollout buffer keeps of an observation: its text. Its tokens are remembered by `tokenize`."""
        return describe(info)

    def log_probs(self, items):
        """log pi(. | d) over each item's phrases, a list of float32 [A]. Without gradients, scores are remembered while the policy stands."""
        if torch.is_grad_enabled():
            return score_actions(self.model, self.tokenizer, *zip(*items), self.normalization)
        new = [item for item in dict.fromkeys(items) if item not in self._scores]
        if new:
            self._scores.update(zip(new, score_actions(self.model, self.tokenizer, *zip(*new), self.normalization)))
        return [self._scores[item] for item in items]

    def policy_changed(self):
        """Forget the remembered scores: the adapter has changed."""
        self._scores.clear()

    @contextlib.contextmanager
    def untrained(self):
        """Within it, the policy is the prompted LLM's own: the adapter is off."""
        self.policy_changed()
        with self.model.disable_adapter():
            yield self
        self.policy_changed()

    @torch.no_grad()
    def _hidden(self, texts):
        """Final hidden state, after the final norm, of the LAST REAL TOKEN of each text, adapter off: float32 [B, H]."""
        ids = encode(self.tokenizer, list(texts))
        longest = max(map(len, ids))
        padded = torch.tensor([row + [0] * (longest - len(row)) for row in ids], device=self.model.device)
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in ids], device=self.model.device)
        with self.model.disable_adapter():
            hidden = _plain(self.model).base_model(input_ids=padded, attention_mask=mask, use_cache=False).last_hidden_state
        return hidden[torch.arange(len(ids)), mask.sum(1) - 1].float()  # never [:, -1]: that would be a pad

    def features(self, texts):
        """The critic's input for each prompt, [B, H] float32; computed once a distinct prompt, for the base never changes."""
        new = [text for text in dict.fromkeys(texts) if text not in self._features]
        for part in (new[start:start + 64] for start in range(0, len(new), 64)):  # a whole rollout's at once could fill the memory
            self._features.update(zip(part, self._hidden(part)))
        result = torch.stack([self._features[text] for text in texts])
        while len(self._features) * result[0].nbytes > self.FEATURE_BYTES:
            self._features.pop(next(iter(self._features)))
        return result

    def values(self, items):
        """V(d) of each item, float32 [B]; gradients reach the MLP alone."""
        place = {prompt: index for index, prompt in enumerate(dict.fromkeys(prompt for prompt, _ in items))}  # equal prompts, equal values
        return self.critic(self.features(list(place)))[[place[prompt] for prompt, _ in items], 0]

    def preflight(self, items, samples=32):
        """What training on these items will take, `samples` a backward pass: (dict, printable text); see models.preflight."""
        return models.preflight(self.model, [pack(self.tokenizer, *item) for item in dict.fromkeys(items)], samples, [self.critic])

    def policy_parameters(self):
        """The LoRA weights, and nothing else: the base is frozen."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def value_parameters(self):
        """The critic's MLP."""
        return list(self.critic.parameters())

    def save(self, folder):
        """Write adapter (in peft's format), critic and remembered features into a checkpoint's folder; returns state.json's share."""
        # Written here, not by peft's save_pretrained: that asks a model hub about the vocabulary, and a full disk is no OSError there.
        self.model.peft_config["default"].save_pretrained(folder)
        runs.write_tensors(os.path.join(folder, "adapter_model.safetensors"), self._adapter())
        runs.write_tensors(os.path.join(folder, "critic.safetensors"), self.critic.state_dict())
        # The features could be computed again, but their last bits depend on which prompts were computed together.
        runs.write_tensors(os.path.join(folder, "features.safetensors"), {"features": self._remembered()})
        return {"base": self._fingerprint, "prompts": list(self._features)}

    def load(self, folder, saved):
        """Continue from what save() wrote into `folder` and returned; raises runs.RunError where that was another agent's."""
        if saved["base"] != self._fingerprint:
            raise runs.RunError("it was trained on another base model, or on another version of it")
        own, theirs = self.model.peft_config["default"], runs.read_json(os.path.join(folder, "adapter_config.json"))
        if (own.r, own.lora_alpha, set(own.target_modules)) != (theirs["r"], theirs["lora_alpha"], set(theirs["target_modules"])):
            raise runs.RunError("adapter_config.json describes another adapter than the run's settings")
        prompts = saved["prompts"]
        if not all(isinstance(prompt, str) for prompt in prompts) or len(set(prompts)) != len(prompts):
            raise runs.RunError("state.json's prompts are not a list of different texts")
        like = self._remembered().new_empty(len(prompts), self.critic[0].in_features)
        adapter = runs.read_tensors(os.path.join(folder, "adapter_model.safetensors"), self._adapter())
        critic = runs.read_tensors(os.path.join(folder, "critic.safetensors"), self.critic.state_dict())
        features = runs.read_tensors(os.path.join(folder, "features.safetensors"), {"features": like})["features"]
        peft.set_peft_model_state_dict(self.model, adapter)
        self.critic.load_state_dict(critic)
        self._features = dict(zip(prompts, features.to(self.model.device)))
        self.policy_changed()

    def _adapter(self):
        return peft.get_peft_model_state_dict(self.model, save_embedding_layers=False)

    def _remembered(self):
        width = self.critic[0].in_features
        return torch.stack(list(self._features.values())) if self._features else torch.empty(0, width, device=self.model.device)

    @functools.cached_property
    def _fingerprint(self):
        """What the frozen base is known by: the adapter stands aside."""
        return runs.fingerprint((name, tensor) for name, tensor in self.model.named_parameters() if "lora_" not in name)


# ---------------------------------------------------------------------------------------------------------------------
# Settings. A preset gives each field its value; a flag on the command line wins over the preset.

@dataclasses.dataclass
class Config(ppo.Config):
    """One run: what is learnt, by which model, with which PPO settings (ppo.Config's fields are flags as well)."""
    env: str = ppo.option("overcooked", "environment: overcooked or virtualhome")
    task: str = ppo.option("", "task of the environment; empty: its first (tomato-salad, food-preparation)")
    norm: str = ppo.option("word", "action prompt normalisation, section 4.2: sum, token or word")
    model: str = ppo.option("pocket_lm", "a folder or hub name of any causal LM; pocket_lm is the one in this repository")
    seed: int = ppo.option(1, "seed of everything random")
    out: str = ppo.option("", "folder of the run; empty: the next free runs/TASK-seedN")
    lora_rank: int = ppo.option(8, "rank of the LoRA matrices")
    lora_alpha: int = ppo.option(16, "LoRA's scale is alpha / rank")
    lora_targets: str = ppo.option("", "comma-separated layers to adapt; empty: the q and v projections")
    dtype: str = ppo.option("auto", "number format of the frozen weights: auto, float32, bfloat16 or float16")
    device: str = ppo.option("auto", "auto, cuda, mps or cpu")
    load_in: str = ppo.option("", "8bit or 4bit: quantise the frozen weights through bitsandbytes; empty: not")
    checkpoint_every: int = ppo.option(20, "updates between two checkpoints")

    def validate(self):
        """Raise ppo.ConfigError, in one line, for a setting that cannot work."""
        super().validate()
        for name, choices in (("norm", NORMALIZATIONS), ("dtype", ("auto", "float32", "bfloat16", "float16")), ("load_in", ("", "8bit", "4bit"))):
            if getattr(self, name) not in choices:
                raise ppo.ConfigError(f"unknown {name} {getattr(self, name)!r}; choose one of {', '.join(filter(None, choices))}")
        for name, low, high in (("lora_rank", 1, 4096), ("lora_alpha", 1, 10 ** 6), ("checkpoint_every", 1, 10 ** 9), ("seed", 0, 2 ** 32 - 1)):
            if not low <= getattr(self, name) <= high:
                raise ppo.ConfigError(f"{name} is {str(getattr(self, name))[:20]}; it must lie between {low} and {high}")


def preset(name, env, task):
    """The values a preset gives to Config's fields for a task, a dict. Raises ppo.ConfigError for a name it does not know."""
    home = env == "virtualhome"
    if name == "pocket":  # our choice, tuned for pocket_lm on seeds 101 and up, never on the seeds reported
        steps = {"tomato-salad": 12_800, "food-preparation": 10_240}.get(task, 10_240 if home and task != "entertainment" else 30_720)
        return dict(steps=steps, num_envs=8, rollout_steps=32, epochs=2, minibatch=64, gradient_accumulation=1, policy_lr=2e-3,
                    critic_lr=1e-3, entropy=0.005, gamma=0.95 if home else 0.99)
    if name == "hub":  # our choice, reasoned and NOT measured: the paper's batches, at a LoRA rate usual for 1 to 8 billion parameters
        return dict(steps=50_000, num_envs=4, rollout_steps=32, epochs=1, minibatch=32, gradient_accumulation=8, policy_lr=1e-4,
                    critic_lr=1e-4, entropy=0.01, gamma=0.95 if home else 0.99)
    if name == "paper":  # published scripts, to the number. LoRA was in half precision there: in float32 these rates learn far slower
        steps = {"food-preparation": 50_000, "entertainment": 200_000}.get(task, 200_000) if home else 500_000
        return dict(steps=steps, num_envs=4, rollout_steps=32, epochs=1, minibatch=32, gradient_accumulation=8, clip=0.2, entropy=0.01,
                    policy_lr=1e-6 if home else 5e-7, critic_lr=5e-5 if home else 1e-5, gamma=0.95 if home else 0.99, gae_lambda=0.95,
                    value_coefficient=0.5, max_grad_norm=0.5, target_kl=0.02, norm="word", lora_rank=8, lora_alpha=16)
    raise ppo.ConfigError(f"unknown preset {name!r}; choose one of pocket, hub, paper")


# ---------------------------------------------------------------------------------------------------------------------
# The command line

EVALUATION_SEED = 1_000_000  # fixed, and far from every training seed
ERRORS = (ppo.ConfigError, envs.EnvError, models.ModelError, ScoringError, prompting.StateError, runs.RunError)  # bad input: exit code 2


def model_path(name):
    """The folder or hub name to load; pocket_lm lies beside this file, wherever the command is given."""
    return os.path.join(os.path.dirname(os.path.abspath(__file__)), name) if name == "pocket_lm" else name


def build(config):
    """The agent and the environments' maker that a Config describes: (agent, make_env)."""
    make_env = lambda: envs.make(config.env, task=config.task or None, gamma=config.gamma)
    make_env()  # a wrong name is found before a model is loaded
    for seed in (random.seed, np.random.seed, torch.manual_seed):  # nothing here draws from the first two; an environment of yours may
        seed(config.seed)
    model, tokenizer = models.load(model_path(config.model), config.dtype, config.device, config.load_in)
    return Agent(model, tokenizer, config.norm, config.lora_rank, config.lora_alpha, config.lora_targets), make_env


def summarize(result):
    """Means and 95 % intervals of ppo.evaluate's arrays: normal for the return, Wilson's for the success rate."""
    n, z, mean, rate = len(result["returns"]), 1.96, result["returns"].mean(), result["successes"].mean()
    half = z * result["returns"].std(ddof=1) / n ** 0.5 if n > 1 else float("nan")
    centre, spread = rate + z * z / (2 * n), z * (rate * (1 - rate) / n + z * z / (4 * n * n)) ** 0.5
    wilson = [(centre - spread) / (1 + z * z / n), (centre + spread) / (1 + z * z / n)]
    return {"episodes": n, "return": mean, "return_interval": [mean - half, mean + half], "success": rate, "success_interval": wilson}


def some_states(env, agent, steps=200):
    """What a random walk of `steps` actions meets, encoded: the states that the preflight looks at."""
    rng, (obs, info), items = np.random.default_rng(0), env.reset(seed=0), []
    for _ in range(steps):
        items.append(agent.encode(obs, info))
        obs, _, done, cut, info = ppo.act(env, info, int(rng.integers(len(items[-1][1]))))
        if done or cut:
            obs, info = env.reset()
    return items


def train(config, run, agent, make_env, which="last"):
    """Train in `run`'s folder from where it stands (its checkpoint `which`) to the end, evaluate, leave the files of a finished run."""
    from tqdm import tqdm
    start = time.perf_counter()
    trainer = ppo.PPO(make_env, agent, config, config.seed)
    if run.resumed:
        run.restore(agent, trainer, which)
    print(f"{config.env}/{config.task}, {config.norm} normalisation, seed {config.seed} -> {run.folder}")
    print(agent.preflight(some_states(make_env(), agent), config.minibatch // config.gradient_accumulation)[1])
    total = trainer.total_updates * config.num_envs * config.rollout_steps
    with tqdm(total=total, initial=trainer.steps, unit="step", dynamic_ncols=True) as bar, runs.Signals() as signals:
        while trainer.updates < trainer.total_updates:
            before, began = trainer.steps, time.perf_counter()
            metrics = trainer.iterate()
            seconds = time.perf_counter() - began
            run.log({**metrics, "seconds": round(seconds, 3), "steps_per_second": round((trainer.steps - before) / seconds, 1)})
            bar.update(trainer.steps - before)
            bar.set_postfix_str(f"return {metrics['return']:.3f}, success {metrics['success']:.0%}", refresh=False)
            if trainer.updates % config.checkpoint_every == 0 or trainer.updates == trainer.total_updates or signals.stop:
                run.checkpoint(agent, trainer)
            if signals.stop:
                bar.close()
                print(f"stopped after update {trainer.updates} of {trainer.total_updates}; go on with: python twosome.py --resume {run.folder}")
                return signals.exit_code
    best = make_env().best_return
    result = summarize(ppo.evaluate(make_env, agent, 100, EVALUATION_SEED, config.gamma))
    run.write("summary.json", {"env": config.env, "task": make_env().task, "model": config.model, "normalization": config.norm,
                               "seed": config.seed, "steps": trainer.steps, "training_episodes": trainer.episodes, **result,
                               "best_return": best, "seconds": round(time.perf_counter() - start, 1)})
    low, high = result["return_interval"]
    print(f"final evaluation, {result['episodes']} episodes: return {result['return']:.4f} (95 % interval {low:.4f} to {high:.4f}"
          + (f"; best possible {best:.4f})" if best is not None else ")") + f", success {result['success']:.0%}, {time.perf_counter() - start:.0f} s in all")
    runs.plot(run.folder, best)
    print(f"{run.folder}: metrics.csv, curve.png, summary.json, checkpoint-*; next: python twosome.py --eval {run.folder}")
    return 0


def evaluate(folder, tasks, episodes, config):
    """Play episodes of tasks with the run's agent (folder) or, where folder is "", with the untrained LLM; print a table."""
    from tqdm import tqdm
    agent, _ = build(config)
    if folder:
        runs.load(folder, agent)
    print(f"{'task':34}{'episodes':>9}  {'return (95 % interval)':27}{'success (95 % interval)':26}" + (f"{'untrained return':>17}{'success':>9}" if folder else ""))
    for env, task in tqdm(tasks, unit="task", leave=False, disable=len(tasks) == 1):
        gamma = config.gamma if env == config.env else preset("pocket", env, task)["gamma"]
        make_env = lambda: envs.make(env, task=task, gamma=gamma)
        play = lambda: summarize(ppo.evaluate(make_env, agent, episodes, EVALUATION_SEED, gamma))
        result = play()
        line = f"{env + '/' + task:34}{episodes:9}  " + "{:7.4f} ({:7.4f} to {:7.4f})  ".format(result["return"], *result["return_interval"])
        line += "{:6.1%} ({:6.1%} to {:6.1%})   ".format(result["success"], *result["success_interval"])
        if folder:
            with agent.untrained():
                prior = play()
            line += "{:17.4f}{:9.1%}".format(prior["return"], prior["success"])
        tqdm.write(line)
    return 0


def tasks_named(env, task):
    """What --env and --task mean to an evaluation, [(env, task), ...]: empty for the run's own task; "all" is every task."""
    if task == "all":
        return [(name, each) for name in ([env] if env else envs.TASKS) for each in envs.TASKS[envs.make(name).name]]
    if not task:
        return [(env, envs.make(env).task)] if env else []
    owner = env or next((name for name, tasks in envs.TASKS.items() if task in tasks), None)
    if owner is None:
        raise ppo.ConfigError(f"unknown task {task!r}; choose all or one of {', '.join(each for tasks in envs.TASKS.values() for each in tasks)}")
    return [(owner, envs.make(owner, task=task).task)]


def arguments(argv):
    """Parse the command line into (Config, modes). A typo, a wrong type or an unknown choice is one line and exit code 2."""
    class Parser(argparse.ArgumentParser):
        def error(self, message):
            raise ppo.ConfigError(message + "; python twosome.py --help lists every flag")

    parser = Parser(prog="twosome.py", allow_abbrev=False, description="TWOSOME: align an LLM with an embodied environment through PPO.")
    first = ("env", "task", "norm", "model", "steps", "seed", "out")
    for field in sorted(dataclasses.fields(Config), key=lambda field: field.name not in first):
        parser.add_argument("--" + field.name.replace("_", "-"), type=field.type, default=None,
                            help=f"{field.metadata['help']} ({field.default!r})".replace("%", "%%"))
    parser.add_argument("--preset", default=None, help="pocket (tuned for pocket_lm), hub (other models; reasoned, not measured) or paper (published numbers)")
    parser.add_argument("--resume", metavar="RUN", help="go on with an interrupted run")
    parser.add_argument("--from", metavar="CHECKPOINT", default="last", help="with --resume: the checkpoint to go on from, such as checkpoint-40 (the newest)")
    parser.add_argument("--eval", metavar="RUN", nargs="?", const="", help="evaluate a finished run, or without RUN the untrained model, on --task (or all)")
    parser.add_argument("--tokens", metavar="PHRASE", nargs="+", help="show how --model splits phrases, and their log-probabilities; learn nothing")
    parser.add_argument("--episodes", type=int, default=100, help="episodes of an evaluation (100)")
    options = vars(parser.parse_args(argv))
    modes = {name: options.pop(name) for name in ("preset", "resume", "from", "eval", "tokens", "episodes")}
    given = {name: value for name, value in options.items() if value is not None}
    config = Config(**given)
    if modes["episodes"] < 1:
        raise ppo.ConfigError(f"episodes is {modes['episodes']}; it must be at least 1")
    if modes["eval"] is not None:
        modes["tasks"] = tasks_named(given.get("env"), given.get("task"))
        given = {name: value for name, value in given.items() if name not in ("env", "task")}
        config = Config(**given, env=modes["tasks"][0][0]) if modes["tasks"] else config
    task = given.get("task") or envs.make(config.env).task
    name = modes["preset"] or ("pocket" if config.model == "pocket_lm" else "hub")
    config = Config(**{**preset(name, config.env, task), **given, "env": config.env, "task": task})
    config.validate()
    return config, modes, given


def main(argv=None):
    """The command. Returns the exit code: 0, 1 (the machine failed), 2 (bad input), 130 or 143 (stopped by a signal)."""
    run = None
    line = lambda error, hint: print("twosome.py: " + " ".join(str(error).split()) + (f"; {run.hint()}" if run and hint else ""), file=sys.stderr)
    try:
        config, modes, given = arguments(argv)
        if modes["tokens"]:
            print(token_report(*models.load(model_path(config.model), config.dtype, config.device, config.load_in), modes["tokens"]))
            return 0
        if modes["eval"] is not None:
            if modes["eval"]:
                config = runs.fill(Config, runs.read_config(modes["eval"]))
                config.validate()
            return evaluate(modes["eval"], modes["tasks"] or [(config.env, config.task)], modes["episodes"], config)
        if modes["resume"] is not None:
            run = runs.Run.open(modes["resume"])
            config = runs.fill(Config, run.config)
            config.validate()
        agent, make_env = build(config)  # before a new folder is made: what cannot be built leaves none
        if not run:
            run = runs.Run.create(config.out or runs.free_name("runs", f"{config.task}-seed{config.seed}"), dataclasses.asdict(config))
        return train(config, run, agent, make_env, modes["from"])
    except (OSError, ArithmeticError) as error:  # before ERRORS: a NonFiniteScores is both
        line(error, hint=True)
        return 1
    except ERRORS as error:
        line(error, hint=False)  # the message says all
        return 2
    except KeyboardInterrupt:  # outside the training loop, which finishes its update first
        line("interrupted", hint=True)
        return 130
    finally:
        if run:
            run.close()


if __name__ == "__main__":
    sys.exit(main())

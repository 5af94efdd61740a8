"""Without this file every score and every gradient would be the same, but much slower.

By the definition (section 4.1) the LLM reads one sequence for each phrase. These sequences begin
alike, and so do the prompts of a rollout. So put them into one trie of tokens, and let the LLM
read each distinct token once. The prompt "You see" with the phrases "take the bowl", "take the
pot" and "go home", and the prompt "You hold" with the phrase "wait", are a trie of six nodes:

    You --+-- see ---+-- take --- the --+-- [bowl]
          |          |                  +-- [pot]
          |          +-- go --- [home]
          +-- hold --+-- [wait]

In brackets: the last token of a phrase is only predicted and never read, so it needs no node. The
LLM gets the nodes as one sequence, parents before children. A mask lets a node see itself and its
ancestors alone, and its position is its depth: each node meets what a text of its own would hold.

    column  token  position   sees column 0 1 2 3 4 5     its edges
      0     You       0                   x
      1     see       1                   x x             take, go
      2     take      2                   x x x           the
      3     the       3                   x x x x         bowl, pot
      4     go        2                   x x . . x       home
      5     hold      1                   x . . . . x     wait

An edge is a distinct token of a phrase under its parent. Its log-probability is read off the
parent's logits. A phrase is a path of edges: "take the pot" walks along take, the and pot.

Three things keep this exact. A custom mask replaces the model's own, a sliding window included, so
`_attention` puts the window back. Before an architecture is trusted, `_self_check` scores a
made-up tree both ways and compares. A model that takes no such mask reads one row a phrase, as the
definition says (`_forward_rows`).

This file knows token ids and no texts. It imports nothing of the project, so copy it alone.

Axes: B trees of a forward, S columns (nodes of a tree), P parents (nodes with edges), E edges,
A phrases, T tokens of the longest phrase, V vocabulary.
"""
import functools
import inspect
import itertools
import warnings
import weakref
from typing import NamedTuple

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

# Our choice, measured with 1 and with 135 million parameters. A larger tree wastes attention on
# nodes that may not see each other, a smaller one shares less. A larger forward leaves a CPU's
# cache; a GPU takes about as long for 16 times as many.
NODES = 256  # nodes of a tree, about
TREES = 4    # trees of a forward on a CPU


class ScoringError(ValueError):
    """Something cannot be scored; the message says in one line what, and what would be right."""


# -----------------------------------------------------------------------------
# The trie.

class Tree(NamedTuple):
    """Some prompts and the phrases of each, as the nodes and edges of one trie."""
    items: list              # what is in it: (prompt_ids, tails) of each prompt
    ids: torch.Tensor        # [S] token ids
    positions: torch.Tensor  # [S] position ids: the depth of each node, so siblings share one
    visible: torch.Tensor    # [S, S] bool: row s marks the nodes that node s sees
    parents: torch.Tensor    # [P] columns whose logits are needed, ascending
    edges: torch.Tensor      # [E, 2] of each edge: its parent, as an index into parents, and token
    paths: torch.Tensor      # [A, T] the edges of each phrase; E, one too far, where it is over


def build_tree(items):
    """Return the Tree of a list of (prompt_ids, tails): a tuple of ids, and a tuple of tuples."""
    # From (column of the parent, token) to a node's column, and to an edge's number.
    nodes, edges, paths = {}, {}, []
    for prompt_ids, tails in items:
        for parents, tail in zip(_insert(nodes, prompt_ids, tails), tails, strict=True):
            steps = zip(parents, tail, strict=True)
            paths.append([edges.setdefault(step, len(edges)) for step in steps])

    ids = np.array([token for _, token in nodes])
    # A node sees what its parent sees, and itself. Row -1, before all texts, sees nothing.
    visible = np.zeros((len(ids) + 1, len(ids)), dtype=bool)
    for column, (above, _) in enumerate(nodes):
        visible[column] = visible[above]
        visible[column, column] = True
    above, tokens = np.array(list(edges)).T  # [E] each
    parents, rows = np.unique(above, return_inverse=True)
    paths = np.array(list(itertools.zip_longest(*paths, fillvalue=len(edges)))).T
    arrays = ids, visible[:-1].sum(1) - 1, visible[:-1], parents, np.stack([rows, tokens], 1), paths
    return Tree(items, *map(torch.from_numpy, arrays))


def _insert(nodes, prompt_ids, tails):
    """Add the nodes of an item that are missing. Return, for each tail, its tokens' parents."""
    last = _walk(nodes, -1, prompt_ids)[-1]
    return [[last, *_walk(nodes, last, tail[:-1])] for tail in tails]


def _walk(nodes, column, ids):
    """Go down from a column along ids and add the nodes that are missing. Return the columns.

    Column -1 stands before all texts.
    """
    columns = []
    for token in ids:
        column = nodes.setdefault((column, token), len(nodes))
        columns.append(column)
    return columns


def group(items, nodes):
    """Split items into lists whose trees are about equally large, with about `nodes` nodes at most.

    Equal items become one. Sort the items by their tokens, so that those with the longest common
    beginnings meet in one tree.
    """
    items = sorted(set(items))
    trie, starts = {}, []  # of all items; the number of its nodes before each of them
    for item in items:
        starts.append(len(trie))
        _insert(trie, *item)
    parts = -(-len(trie) // nodes)  # rounded up
    groups = [[] for _ in range(parts)]
    for start, item in zip(starts, items, strict=True):
        # The last items may add no node of their own: then they start where the trie ends.
        groups[min(start * parts // len(trie), parts - 1)].append(item)
    return [part for part in groups if part]


# -----------------------------------------------------------------------------
# Two ways to score them, with equal results.

def _forward(model, trees, layout):
    """Score B trees in one forward. Return a list of float32 [A, T], one for each tree.

    layout is mask_layout's, or None: then each tree is a single row, under an ordinary mask.
    """
    # [B, S]; nobody sees the padding.
    ids = pad_sequence([tree.ids for tree in trees], batch_first=True).to(model.device)
    keep = torch.zeros(ids.shape, dtype=torch.bool)
    edges, before = [], 0
    for b, tree in enumerate(trees):
        keep[b, tree.parents] = True
        # The logits of a tree's parents stand behind those of the tree before it.
        edges.append(tree.edges + torch.tensor([before, 0]))
        before += len(tree.parents)
    inputs = {"input_ids": ids, "use_cache": False, **_attention(trees, layout, model)}
    if _takes(type(unwrapped(model)), "logits_to_keep"):
        logits = model(**inputs, logits_to_keep=keep.to(model.device)).logits  # [P of all, V]
    else:
        logits = model(**inputs).logits[keep.to(model.device)]
    rows, tokens = torch.cat(edges).T.to(model.device)
    log_probs = logits.log_softmax(-1, dtype=torch.float32)[rows, tokens]  # [E of all trees]
    parts = log_probs.split([len(tree.edges) for tree in trees])
    parts = [torch.nn.functional.pad(part, (0, 1)) for part in parts]  # where a phrase is over
    return [part[tree.paths.to(model.device)] for part, tree in zip(parts, trees, strict=True)]


def _attention(trees, layout, model):
    """Return the inputs that say what each token sees: the mask, and for trees the positions.

    A tree's mask is [B, 1, S, S]: 0 for what is seen, else the lowest number of the model's dtype.
    A bool mask would be silently wrong under eager attention.
    """
    if layout is None:
        ones = [torch.ones_like(tree.ids) for tree in trees]
        return {"attention_mask": pad_sequence(ones, batch_first=True).to(model.device)}
    positions = pad_sequence([tree.positions for tree in trees], batch_first=True)  # [B, S]
    visible = torch.eye(positions.shape[1], dtype=torch.bool).repeat(len(trees), 1, 1)
    for b, tree in enumerate(trees):
        visible[b, :len(tree.ids), :len(tree.ids)] = tree.visible
    visible, positions = visible.to(model.device), positions.to(model.device)
    masks, lowest = {}, torch.finfo(model.dtype).min
    for kind, window in layout.items():
        near = window is None or positions[:, :, None] - positions[:, None] < window  # [B, S, S]
        masks[kind] = torch.where(visible & near, 0.0, lowest)[:, None].to(model.dtype)
    return {"position_ids": positions, "attention_mask": masks.get("single", masks)}


def _forward_rows(model, items):
    """Score items by the definition, in one right-padded row a phrase. Return float32 [A, T]."""
    rows = [(prompt_ids, (tail,)) for prompt_ids, tails in items for tail in tails]
    scores = _forward(model, [build_tree([row]) for row in rows], None)  # [1, T] each
    return pad_sequence([score[0] for score in scores], batch_first=True)


# -----------------------------------------------------------------------------
# Which way a model can take.

@functools.lru_cache(maxsize=64)
def _takes(kind, name):
    """Return whether a class of models has an argument of this name."""
    return name in inspect.signature(kind.forward).parameters


def unwrapped(model):
    """Return the transformers model inside a peft model, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def context(model):
    """Return the number of tokens that the model's context holds; 2 ** 40 if it has no bound."""
    config = model.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    limit = getattr(config, "max_position_embeddings", None) or 2 ** 40
    if rope.get("rope_type") == "longrope":
        # Beyond this length, a text's rotations depend on the longest text of its batch.
        limit = min(limit, rope.get("original_max_position_embeddings") or limit)
    return limit


def mask_layout(model):
    """Return how this architecture takes a tree's mask, or a str that says why it takes none.

    The layout is {kind of layer: sliding window or None}; the kind "single" means all layers.
    """
    config = model.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", None) or ())
    if getattr(config, "alibi", False) or not _takes(type(unwrapped(model)), "position_ids"):
        return "it reads positions off the columns (ALiBi, or a recurrence)"
    if config._attn_implementation not in ("sdpa", "eager"):
        return f"{config._attn_implementation} attention takes no custom mask"
    if kinds - {"full_attention", "sliding_attention"}:
        return f"it has layers of other kinds ({', '.join(sorted(kinds))})"
    if "sliding_attention" in kinds:
        return {"full_attention": None, "sliding_attention": window}
    return {"single": None if kinds else window}


# model -> (layout, or None for rows; depth and width, in nodes, that the layout was checked for)
_layouts = weakref.WeakKeyDictionary()


def _layout(model, depth, width):
    """Return the model's layout for trees of this depth and width; None if it needs rows.

    Before a layout is used, check it in a made-up tree as deep and as wide as the real ones, so
    that a sliding window which the configuration does not tell still shows.
    """
    inner = unwrapped(model)
    layout, deep, wide = _layouts.get(inner) or (mask_layout(model), 0, 0)
    if isinstance(layout, dict) and (depth > deep or width > wide):
        # Round up, so that the check is seldom repeated.
        deep = min((max(depth, deep) + 63) // 64 * 64, context(model))
        wide = (max(width, wide) + NODES - 1) // NODES * NODES
        layout = _self_check(model, layout, deep, wide) or layout
    if isinstance(layout, str):
        warnings.warn(f"{type(inner).__name__}: scoring one row a phrase (exact, slower): {layout}",
                      stacklevel=3)
        layout = None
    _layouts[inner] = layout, deep, wide
    return layout


@torch.no_grad()
def _self_check(model, layout, depth, width):
    """Score a made-up tree both ways. Return None if they agree, else a str that says why not."""
    part = max(min(depth // 4, 16), 1)  # tokens of a phrase: few, for each costs a row of logits
    # The prompts after the first; each of them adds 3 * part - 2 nodes.
    others = max(width - depth, 0) // (3 * part - 2) + 1
    size = (others + 3) * part
    vocabulary = len(model.get_input_embeddings().weight)
    tokens = tuple(n * 7919 % vocabulary for n in range(size + depth - part + 1))
    a, b, c, *ends = (tokens[i:i + part] for i in range(0, size, part))
    prompt = tokens[size:]
    tails = (a, a[:part // 2] + b[part // 2:], c)  # two share a beginning, as the prompts do
    items = [(prompt, tails), *((prompt[:len(prompt) // 2] + end, tails[1:]) for end in ends)]

    # The rows come first. They take more memory than the tree, so memory that runs out does so
    # here and is told as what it is.
    exact = _forward_rows(model, items)
    try:
        fast, = _forward(model, [build_tree(items)], layout)
    except torch.OutOfMemoryError:
        raise
    except (TypeError, ValueError, RuntimeError, AttributeError, LookupError) as error:
        return f"{type(error).__name__} on a tree mask"
    gap = ((fast - exact).sum(1).abs().mean() / part).item()
    # Our choice: half precision and 8 bits round a token's log-probability by some hundredths of
    # a nat. A wrong mask is off by more.
    rounded = model.dtype != torch.float32 or hasattr(model.config, "quantization_config")
    if gap < (0.1 if rounded else 1e-4) or not exact.isfinite().all():
        return None
    return f"the tree's scores were {gap:.2g} nats a token off"


# -----------------------------------------------------------------------------
# What runs.

def token_log_probs(model, items, nodes=NODES):
    """Return log P(w_i | d, w_1 ... w_{i-1}) of all tokens of all phrases (section 4.1), in nats.

    model is a causal LM of transformers, in peft or not. items is a list of (prompt_ids, tails): a
    tuple of token ids, and a tuple of such tuples, one for each phrase. Returns a list of float32
    [A, T], one for each item: row k holds the tokens of tails[k] and, behind them, zeros; gradients
    flow where they are enabled. Equal items are computed once. A tree has about `nodes` nodes at
    most, but an item is never split. Raises ScoringError for what cannot be scored, and
    FloatingPointError for log-probabilities that are not finite.
    """
    if not items:
        return []
    depth = max(len(prompt_ids) + max(map(len, tails)) - 1 for prompt_ids, tails in items)
    if depth > context(model):
        raise ScoringError(f"shorten the text: {depth} tokens; the context holds {context(model)}")
    trees = [build_tree(part) for part in group(items, nodes)]
    width = max(len(tree.ids) for tree in trees)
    layout = _layout(model, depth, width)
    if layout:
        size = TREES if model.device.type == "cpu" else max(16 * TREES * NODES // width, 1)
        parts = [trees[n:n + size] for n in range(0, len(trees), size)]
        scores = [score for part in parts for score in _forward(model, part, layout)]
    else:
        scores = [_forward_rows(model, tree.items) for tree in trees]  # [A, T] of each tree
    if not torch.stack([score.isfinite().all() for score in scores]).all():
        raise FloatingPointError("the log-probabilities are not finite; try --dtype float32")
    found = {}
    for tree, score in zip(trees, scores, strict=True):
        parts = score.split([len(tails) for _, tails in tree.items])
        found.update(zip(tree.items, parts, strict=True))
    return [found[item] for item in items]

"""What the LLM keeps of itself (the paper's table 1 asks it): a run's adapter against its base.

    python experiments/retention.py runs/NAME     base, trained, and with the adapter merged

Measured on real English: the prose of the manuals of three packages that the requirements pin,
NumPy, Matplotlib and Gymnasium, as it stands in their docstrings, plain sentences alone. The files
are read and never imported, and SHA256 pins what comes out. pocket_lm knows only the words of a
home, so it is also measured on lines of its own kind of text, of a seed that it never saw.

    perplexity    exp of the mean of -log P(token | those before it), in windows of 512 tokens
    KL            the mean over tokens of KL(base || trained), in nats a token

Axes: S tokens of a window, V vocabulary.
"""
import argparse
import ast
import contextlib
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import random
import re
import sys

import numpy as np
import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import twosome

PACKAGES = {"numpy": "2.4.6", "matplotlib": "3.11.2", "gymnasium": "1.4.0"}
SHA256 = "3456f0728c2f880a59aeab670b7651e5a15e5cc9a52202276ae12d1508bcc67e"
TOKENS = 60_000  # read of each text, at most
WINDOW = 512


class RetentionError(ValueError):
    """A text cannot be read as it was when it was pinned. One line says what would be right."""


# -----------------------------------------------------------------------------
# Texts.


def prose(text):
    """Yield the paragraphs of a docstring that are plain sentences."""
    for paragraph in re.split(r"\n\s*\n", text):
        line = " ".join(paragraph.split())
        if len(line) >= 60 and re.fullmatch(r"[A-Z](?:[A-Za-z0-9 ,.;'\"()]|-(?!-))*\.", line):
            yield line


def docstrings(package):
    """Yield the long texts in a package's files, in the order of their names."""
    found = importlib.metadata.distribution(package)
    for name in sorted(map(str, found.files)):
        if name.endswith(".py") and "/tests/" not in name and "config" not in name:
            with open(found.locate_file(name), "rb") as file:
                tree = ast.parse(file.read())
            for node in ast.walk(tree):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    yield node.value


def real_text():
    """Return the prose of the packages' manuals. Raises RetentionError if it is another one."""
    lines = {}
    for package, version in PACKAGES.items():
        try:
            for text in docstrings(package):
                lines.update(dict.fromkeys(prose(text)))
        except importlib.metadata.PackageNotFoundError:
            raise RetentionError(f"the package {package} is missing; pip install"
                                 f" {package}=={version}") from None
    text = "\n\n".join(lines)
    if hashlib.sha256(text.encode()).hexdigest() != SHA256:
        pins = ", ".join(f"{name}=={version}" for name, version in PACKAGES.items())
        raise RetentionError(f"the text is another one than was pinned; install {pins}")
    return text


def own_lines(count=1500, seed=1_000_003):
    """Return lines of the kind that pocket_lm was made from, of a seed that it never saw."""
    path = os.path.join(twosome.models.locate("pocket_lm"), "pretrain.py")
    spec = importlib.util.spec_from_file_location("pretrain", path)
    pretrain = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pretrain)
    rng = random.Random(seed)
    return [pretrain.line(rng) for _ in range(count)]


# -----------------------------------------------------------------------------
# Measures.


def windows(tokenizer, text, tokens):
    """Return the text's first tokens as windows of ids: a list of [1, S]."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"][:tokens]
    return [torch.tensor([ids[i:i + WINDOW]]) for i in range(0, len(ids) - 1, WINDOW)]


def whole_lines(tokenizer, lines, tokens=None):
    """Return each line as pocket_lm learned it, from <s> to </s>: a list of [1, S].

    With `tokens`, return the first lines, which together have about so many.
    """
    rows = [torch.tensor([ids + [tokenizer.eos_token_id]]) for ids in tokenizer(lines)["input_ids"]]
    before = np.cumsum([0] + [row.numel() for row in rows[:-1]])
    return [row for row, read in zip(rows, before, strict=True) if not tokens or read < tokens]


@torch.no_grad()
def log_probs(model, ids):
    """Return log P of every token of the vocabulary behind each position: float32 [S - 1, V]."""
    ids = ids.to(model.device)
    return model(input_ids=ids, use_cache=False).logits[0, :-1].float().log_softmax(-1)


@contextlib.contextmanager
def merged(model):
    """Within it, the adapter is added into the base's own weights, in their number format."""
    # Subtracting the adapter again would change the last bits: keep copies, and put them back.
    layers = [layer.base_layer for layer in model.modules() if hasattr(layer, "base_layer")]
    before = [layer.weight.clone() for layer in layers]
    model.merge_adapter()
    try:
        yield
    finally:
        model.unmerge_adapter()
        for layer, weight in zip(layers, before, strict=True):
            layer.weight.data.copy_(weight)


def compare(model, rows):
    """Measure windows with the base, the adapter, and the adapter merged. Returns facts."""
    losses, divergences = {"base": [], "trained": [], "merged": []}, {"trained": [], "merged": []}
    for ids in rows:
        with model.disable_adapter():
            base = log_probs(model, ids)
        sides = {"base": base, "trained": log_probs(model, ids)}
        with merged(model):
            sides["merged"] = log_probs(model, ids)
        for name, side in sides.items():
            tokens = ids[0, 1:, None].to(side.device)
            losses[name].append(-side.gather(1, tokens)[:, 0].sum().item())
            if name != "base":
                kl = (base.exp() * (base - side)).sum(-1)  # [S - 1]
                divergences[name].append(kl.sum().item())
    return summary(losses, divergences, np.array([ids.shape[1] - 1 for ids in rows]))


def summary(losses, divergences, counts):
    """Return perplexities, their change in per cent with its 95 % interval, and KL."""
    tokens = int(counts.sum())
    facts = {"tokens": tokens,
             "perplexity": {name: float(np.exp(np.sum(side) / tokens))
                            for name, side in losses.items()}}
    for name, side in divergences.items():
        # Windows are the units of the interval, for tokens of one text depend on each other.
        # Long windows count for more, in the interval as in its middle: a ratio of two sums.
        middle = np.log(facts["perplexity"][name] / facts["perplexity"]["base"])
        gaps = (np.array(losses[name]) - np.array(losses["base"]) - middle * counts) / counts.mean()
        half = 1.96 * gaps.std(ddof=1) / len(gaps) ** 0.5 if len(gaps) > 1 else float("nan")
        change = [100 * float(np.expm1(value)) for value in (middle, middle - half, middle + half)]
        facts[name] = {"change_percent": change[0], "change_interval": change[1:],
                       "kl": float(np.sum(side) / tokens)}
    return facts


def measure(folder, tokens=None):
    """Measure a run's newest checkpoint. Returns facts: the texts, and what was found on each."""
    agent, _ = twosome.load(folder)
    rows = {"real": windows(agent.tokenizer, real_text(), tokens or TOKENS)}
    if twosome.runs.read_config(folder)["model"] == "pocket_lm":
        rows["own"] = whole_lines(agent.tokenizer, own_lines(), tokens)
    return {"text": {**PACKAGES, "sha256": SHA256},
            **{name: compare(agent.model, some) for name, some in rows.items()}}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("run", help="a run's folder")
    parser.add_argument("--tokens", type=int, help=f"read of each text ({TOKENS})")
    options = parser.parse_args(argv)
    if options.tokens is not None and options.tokens < 2:
        parser.error("--tokens must be at least 2")
    try:
        facts = measure(options.run, options.tokens)
    except (*twosome.command.BAD_INPUT, RetentionError, OSError) as error:
        print(f"retention.py: {error}", file=sys.stderr)
        return 2
    print(json.dumps(facts, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""pocket_lm loads, splits words, can be made again, and was not trained on the tasks.

The card states how far its text overlaps with the prompts; the overlap is checked here.
"""
import ast
import json
import random
import re
import sys
from pathlib import Path

import pytest
import torch
from conftest import reachable
from transformers import AutoModelForCausalLM, AutoTokenizer

import envs
import prompts
from pocket_lm import pretrain

FOLDER = Path(pretrain.__file__).parent
CARD = (FOLDER / "README.md").read_text()
TASKS = [
    ("overcooked", "tomato-salad"),
    ("overcooked", "tomato-lettuce-salad"),
    *(("virtualhome", task) for task in envs.TASKS["virtualhome"]),
]


@pytest.fixture(scope="module")
def lines():
    """The first lines of the sample behind the card's figure (60,000 lines of seed 7)."""
    rng = random.Random(7)
    return [pretrain.line(rng) for _ in range(15000)]


@pytest.fixture(scope="module")
def rendered():
    """Every prompt of the tasks with every phrase: the texts that the policy scores."""
    texts = {}
    for name, task in TASKS:
        for _, info in reachable(envs.make(name, task=task)):
            prompt, phrases = prompts.render(info["state"])
            texts.setdefault(prompt, set()).update(phrases)
    return texts


def words(text):
    return text.lower().rstrip(".").split()


def grams(texts, count):
    return {tuple(text[i:i + count]) for text in texts for i in range(len(text) - count + 1)}


def test_no_line_states_the_goal_of_a_task(lines, rendered):
    """This is stronger than "no line holds a prompt": not even its first sentence is there."""
    goals = {re.match(r"You want to (.*?)\.", prompt)[1] for prompt in rendered}
    assert len(goals) == len(TASKS)
    assert not [line for line in lines if any(goal in line for goal in goals)]


def test_things_of_one_task_never_share_a_line(lines):
    def found(things, line):
        return any(re.search(rf"\b{thing}", line) for thing in things)

    for line in lines:
        for these, those in pretrain.SEPARATED:
            assert not (found(these, line) and found(those, line))


def test_longest_run_of_shared_words_is_what_the_card_says(lines, rendered):
    stated = int(re.search(r"longest run .*?\*\*(\d+) words\*\*", CARD, re.S)[1])
    text = [words(line) for line in lines]
    ours = [
        words(f"{prompt} {phrase}")
        for prompt, phrases in rendered.items()
        for phrase in phrases
    ]
    assert not grams(text, stated + 1) & grams(ours, stated + 1)
    # Show that the comparison can find something.
    assert grams(text, stated // 2) & grams(ours, stated // 2)


def test_pretraining_knows_nothing_of_the_project():
    imported = set()
    for node in ast.walk(ast.parse((FOLDER / "pretrain.py").read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            imported.add(node.module.split(".")[0])
    assert imported - sys.stdlib_module_names == {"torch", "tqdm", "tokenizers", "transformers"}


def test_the_card_states_the_share_of_wrong_advice():
    assert f"{100 * pretrain.WRONG:.0f} %" in CARD


def test_it_loads_small_whole_and_plain():
    model = AutoModelForCausalLM.from_pretrained(FOLDER)
    assert model.config.model_type == "llama" and model.dtype == torch.float32
    assert f"{model.num_parameters():,}" in CARD
    files = [file for file in FOLDER.iterdir() if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 12_000_000
    assert not [file.name for file in files if file.suffix in (".bin", ".pt", ".pkl")]


def test_the_tokenizer_splits_words_and_keeps_the_seam():
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    assert len(tokenizer.tokenize(" tomato")) > 1
    assert len(tokenizer.tokenize(" microwave")) > 1
    assert len(tokenizer.tokenize(" kitchen")) == 1
    prompt, phrase = "You hold nothing. Your next step is to", " take the tomato"
    whole = tokenizer(prompt + phrase)["input_ids"]
    tail = tokenizer(phrase, add_special_tokens=False)["input_ids"]
    assert whole == tokenizer(prompt)["input_ids"] + tail
    assert whole[0] == tokenizer.bos_token_id and tokenizer.eos_token_id not in whole
    assert tokenizer.decode(whole[1:]) == prompt + phrase


@pytest.mark.parametrize("place, held, better, worse", [
    ("closed", "nothing", "open the drawer", "put the spoon in the drawer"),
    ("open", "the spoon", "put the spoon in the drawer", "grab the spoon"),
])
def test_it_knows_everyday_steps(place, held, better, worse):
    """It reads the situation: the same goal asks for another step once the thing is in hand."""
    model = AutoModelForCausalLM.from_pretrained(FOLDER).eval()
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    prompt = (
        f"You want to keep the spoon in the drawer. You are at the {place} drawer. "
        f"You hold {held}. Your next step is to"
    )

    def score(phrase):
        ids = tokenizer(f"{prompt} {phrase}", return_tensors="pt")["input_ids"]
        return -model(input_ids=ids, labels=ids).loss.item() * (ids.shape[1] - 1)

    assert score(better) > score(worse)


def test_pretraining_makes_the_same_model_again(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    facts = [pretrain.main(["--tiny", "--out", str(out)]) for out in (first, second)]
    assert facts[0]["loss"] == facts[1]["loss"]
    for file in ("model.safetensors", "tokenizer.json", "config.json"):
        assert (first / file).read_bytes() == (second / file).read_bytes()
    assert json.loads((first / "config.json").read_text())["model_type"] == "llama"

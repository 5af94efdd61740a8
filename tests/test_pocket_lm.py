"""pocket_lm: it loads, splits words, can be made again, and was not trained on the tasks (the overlap its card states)."""
import ast
import importlib.util
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

FOLDER = Path(__file__).parent.parent / "pocket_lm"
CARD = (FOLDER / "README.md").read_text()
spec = importlib.util.spec_from_file_location("pretrain", FOLDER / "pretrain.py")
pretrain = importlib.util.module_from_spec(spec)
spec.loader.exec_module(pretrain)
TASKS = [("overcooked", "tomato-salad"), ("overcooked", "tomato-lettuce-salad"), *(("virtualhome", task) for task in envs.TASKS["virtualhome"])]


@pytest.fixture(scope="module")
def lines():
    """The first lines of the sample that the card's figure was computed on (60,000 lines of seed 7)."""
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
    return {tuple(line[i:i + count]) for line in texts for i in range(len(line) - count + 1)}


def test_no_line_states_the_goal_of_a_task(lines, rendered):
    """Stronger than "no line holds a rendered prompt and an action": not even a prompt's first sentence is there."""
    goals = {re.match(r"You want to (.*?)\.", prompt)[1] for prompt in rendered}
    assert len(goals) == len(TASKS)
    assert not [line for line in lines if any(goal in line for goal in goals)]


def test_things_of_one_task_never_share_a_line(lines):
    for line in lines:
        for these, those in pretrain.SEPARATED:
            assert not (any(re.search(rf"\b{x}", line) for x in these) and any(re.search(rf"\b{x}", line) for x in those))


def test_longest_run_of_shared_words_is_what_the_card_says(lines, rendered):
    stated = int(re.search(r"longest run .*?\*\*(\d+) words\*\*", CARD, re.S)[1])
    text = [words(line) for line in lines]
    ours = [words(f"{prompt} {phrase}") for prompt, phrases in rendered.items() for phrase in phrases]
    assert not grams(text, stated + 1) & grams(ours, stated + 1)
    assert grams(text, stated // 2) & grams(ours, stated // 2)  # the comparison can find something


def test_pretraining_knows_nothing_of_the_project():
    tree = ast.parse((FOLDER / "pretrain.py").read_text())
    imported = {name.name.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
    imported |= {node.module.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert imported <= set(sys.stdlib_module_names) | {"torch", "tqdm", "tokenizers", "transformers"}


def test_the_card_states_the_share_of_wrong_advice():
    assert f"{pretrain.WRONG:.0%}".replace("%", " %") in CARD


def test_it_loads_small_whole_and_plain():
    model = AutoModelForCausalLM.from_pretrained(FOLDER)
    assert model.config.model_type == "llama" and model.dtype == torch.float32
    assert f"{model.num_parameters():,}" in CARD
    assert sum(file.stat().st_size for file in FOLDER.iterdir() if file.is_file()) < 12_000_000
    assert not [file.name for file in FOLDER.iterdir() if file.suffix in (".bin", ".pt", ".pkl")]


def test_the_tokenizer_splits_words_and_keeps_the_seam():
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    assert len(tokenizer.tokenize(" tomato")) > 1 and len(tokenizer.tokenize(" microwave")) > 1 and len(tokenizer.tokenize(" kitchen")) == 1
    prompt, phrase = "You hold nothing. Your next step is to", " take the tomato"
    whole = tokenizer(prompt + phrase)["input_ids"]
    assert whole == tokenizer(prompt)["input_ids"] + tokenizer(phrase, add_special_tokens=False)["input_ids"]
    assert whole[0] == tokenizer.bos_token_id and tokenizer.eos_token_id not in whole
    assert tokenizer.decode(whole[1:]) == prompt + phrase


def test_it_knows_everyday_steps():
    """It reads the situation: the same goal with the thing in hand asks for another step than with empty hands."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(FOLDER).eval(), AutoTokenizer.from_pretrained(FOLDER)

    def score(text):
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        return -model(input_ids=ids, labels=ids).loss.item() * (ids.shape[1] - 1)

    for held, better, worse in (("nothing", "open the drawer", "put the spoon in the drawer"),
                                ("the spoon", "put the spoon in the drawer", "grab the spoon")):
        place = "open" if held == "the spoon" else "closed"
        prompt = f"You want to keep the spoon in the drawer. You are at the {place} drawer. You hold {held}. Your next step is to"
        assert score(f"{prompt} {better}") > score(f"{prompt} {worse}")


def test_pretraining_makes_the_same_model_again(tmp_path):
    facts = [pretrain.main(["--tiny", "--out", str(tmp_path / name)]) for name in ("a", "b")]
    assert facts[0]["loss"] == facts[1]["loss"]
    for file in ("model.safetensors", "tokenizer.json", "config.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    assert json.loads((tmp_path / "a" / "config.json").read_text())["model_type"] == "llama"

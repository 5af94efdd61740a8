"""Other people's worlds in our contract, their mistakes in one line each, and the way out."""
import fractions
import math
import runpy
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch

import envs
import ppo
import prompts
import twosome
from engine import models, worlds
from engine.worlds import TextEnv, World, WorldError

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"


class Quest:
    """TextWorld's shape: texts, commands, a running total. What can be done changes every step."""

    def __init__(self, length=3):
        self.length = length

    def reset(self):
        self.place, self.score, self.moves = 0, 0, 0
        return self.tell("Welcome!")

    def step(self, command):
        self.moves += 1
        self.heard = command
        if command == f"open door {self.place}":
            self.place += 1
            self.score += 2
        text, infos = self.tell(f"You {command}.")
        return text, self.score, self.place == self.length or self.moves == 6, infos

    def tell(self, text):
        doors = [f"open door {self.place}", *(f"knock on wall {n}" for n in range(self.place + 1))]
        infos = {"admissible_commands": [*doors, "look"], "won": self.place == self.length,
                 "lost": False}
        return f"\n ---- >\n\n {text}   You are in\troom {self.place}. \n", infos


class Corridor:
    """Our contract, in a class of somebody's own: walk down to the end."""

    def __init__(self, length=2, four=False):
        self.length, self.four = length, four

    def reset(self, seed=None):
        self.place = 0
        return self.place, self.tell()

    def step(self, action):
        self.place = min(self.place + (action == 0), self.length)
        done = self.place == self.length
        ends = [done] if self.four else [done, False]
        return self.place, 1.0 * done, *ends, self.tell()

    def tell(self):
        return {"prompt": f"You are at door {self.place}. Your next step is to",
                "actions": ["walk down", "wait for a while"]}


class Counter:
    """An agent without a language model: it prefers the phrases that `likes` finds."""

    def __init__(self, likes=""):
        self.likes = likes
        self.weight, self.value = (torch.nn.Parameter(torch.zeros(1)) for _ in range(2))

    def describe(self, obs, info):
        return twosome.observation_text(info)

    def log_probs(self, items):
        return [(torch.tensor([9.0 * (bool(self.likes) and self.likes in phrase)
                               for phrase in phrases]) + self.weight * torch.arange(len(phrases))
                 ).log_softmax(-1) for _, phrases in items]

    def values(self, items):
        return self.value * torch.ones(len(items))

    def policy_parameters(self):
        return [self.weight]

    def value_parameters(self):
        return [self.value]

    def policy_changed(self):
        pass


def play(env, *choices):
    """Reset, take the choices-th admissible actions, and return every answer."""
    answers = [env.reset(seed=0)]
    for choice in choices:
        answers.append(ppo.act(env, answers[-1][-1], choice))
    return answers


# -----------------------------------------------------------------------------
# Shapes.

def test_a_running_total_becomes_rewards_and_a_number_becomes_its_command():
    env = World(Quest())
    (_, first), second, third, fourth = play(env, 0, 1, 0)
    assert second[1:4] == (2.0, False, False) and env.world.heard == "open door 1"
    assert third[1] == 0.0 and fourth[1] == 2.0
    assert first["actions"] == ["open door 0", "knock on wall 0", "look"]
    assert first["prompt"] == "Welcome! You are in room 0. Your next step is to"
    assert prompts.lint(first["prompt"], ["walk down"]) == []
    *_, last = play(env, 0, 0, 0)
    assert last[1:4] == (2.0, True, False) and last[4]["success"] is True


def test_scores_begin_anew_with_every_episode():
    env = World(Quest(length=1))
    assert [play(env, 0)[-1][1] for _ in range(2)] == [2.0, 2.0]


def test_time_that_is_up_is_no_end_where_the_world_tells_both_won_and_lost():
    *_, last = play(World(Quest()), 1, 1, 1, 1, 1, 1)
    assert last[2:4] == (False, True) and last[4]["success"] is False and last[4]["prompt"]
    assert worlds.is_time_limit({"TimeLimit.truncated": True})
    assert not worlds.is_time_limit({"won": False})
    assert not worlds.is_time_limit({"won": False, "lost": True})


@pytest.mark.parametrize("four", [False, True])
def test_four_and_five_values_without_commands_carry_plain_rewards(four):
    _, first, last = play(World(Corridor(four=four)), 0, 0)
    assert first[:4] == (1, 0.0, False, False) and last[:4] == (2, 1.0, True, False)
    assert "success" not in last[4]  # so that ppo.py looks at the last reward


def test_a_world_may_say_that_its_score_is_a_total_or_is_none():
    class Total(Corridor):
        running_total = True

    class Plain(Quest):
        running_total = False

    env = World(Total(length=1, four=True))
    play(env, 0)
    assert env.step(0)[1] == 0.0  # the total was 1 before and is 1 now
    assert [answer[1] for answer in play(World(Plain()), 0, 0)[1:]] == [2.0, 4.0]


def test_prompt_and_phrases_of_the_worlds_own_are_told_instead():
    class Worded(Quest):
        def tell(self, text):
            text, infos = super().tell(text)
            phrases = [f"{command} of the house" for command in infos["admissible_commands"]]
            return text, {**infos, "prompt": f"Room {self.place}: next,", "actions": phrases}

    env = World(Worded())
    (_, info), second = play(env, 1)
    assert info["prompt"] == "Room 0: next,"
    assert info["actions"][1] == "knock on wall 0 of the house"
    assert env.world.heard == "knock on wall 0" and second[1] == 0.0


def test_long_texts_keep_their_newest_words():
    env = World(Quest())
    prompt = env.cued("old " * 3000 + "news.")
    assert len(prompt) < worlds.LONGEST + 30 and prompt.endswith("old news. Your next step is to")
    assert prompt.startswith("old ") and env.cued("") == worlds.CUE
    assert env.cued("|--__--|\n >  A *** hall-way. $$") == "A hall-way. " + worlds.CUE


def test_a_seed_reaches_the_world():
    class Random(Corridor):
        def reset(self, **options):
            self.seed = options["seed"]
            return super().reset()

    env = World(Random())
    env.reset(seed=17)
    assert env.world.seed == 17


def test_phrases_that_change_in_number_and_wording_learn_and_are_evaluated():
    config = ppo.Config(steps=32, num_envs=2, rollout_steps=8, minibatch=8, epochs=1)
    trainer = ppo.PPO(lambda: World(Quest()), Counter(), config, seed=1)
    for _ in range(2):
        assert np.isfinite(trainer.iterate()["entropy"])
    result = ppo.evaluate(lambda: World(Quest()), Counter("open"), 3, 1, gamma=1.0)
    assert result["successes"].tolist() == [1, 1, 1] and result["returns"].tolist() == [6, 6, 6]
    assert ppo.evaluate(lambda: World(Quest()), Counter("look"), 1, 1, 1.0)["successes"] == [0]


def test_the_same_prompt_with_fewer_phrases_has_the_scores_of_its_own():
    model, tokenizer = models.load("pocket_lm")
    prompt, phrases = "You are at the door. Your next step is to", ["open the door", "look", "wait"]
    lists = [phrases, phrases[:2], phrases[1:]]
    with torch.no_grad():
        together = twosome.score_actions(model, tokenizer, [prompt] * 3, lists)
        alone = [twosome.score_actions_naive(model, tokenizer, [prompt], [each])[0]
                 for each in lists]
    for packed, single in zip(together, alone, strict=True):
        torch.testing.assert_close(packed, single, atol=1e-5, rtol=0)


# -----------------------------------------------------------------------------
# Gymnasium's own, and ours from outside.

def test_any_gymnasium_environment_is_told_by_one_function():
    gymnasium = pytest.importorskip("gymnasium")

    def prompt(place, info):
        return f"You are at place {place}. Your next step is to", ["go left", "go down", "go right",
                                                                    "go up"]

    env = World(gymnasium.make("FrozenLake-v1", is_slippery=False), prompt)
    answers = play(env, 1, 1, 2, 1, 2, 2)
    assert answers[0][1]["prompt"].startswith("You are at place 0.") and len(answers[3]) == 5
    assert answers[-1][:4] == (15, 1.0, True, False)
    assert env.task == "FrozenLakeEnv" and env.best_return is None
    assert twosome.observation_text(answers[1][-1])[1] == ("go left", "go down", "go right",
                                                           "go up")


@pytest.mark.parametrize("name, phrase, changes", [
    ("overcooked", "pick up the tomato", True), ("virtualhome", "walk to the pancake", True)])
def test_our_kitchens_in_gems_shape(name, phrase, changes):
    env = TextEnv(envs.make(name), prompts.render, max_steps=3)
    text, info = env.reset(seed=1)
    assert f"\n- {phrase}" in text and info["is_action_valid"] is True
    same, reward, terminated, truncated, info = env.step("Sing a song.")
    assert (same, reward, terminated, truncated) == (text, 0.0, False, False)
    assert info["is_action_valid"] is False and isinstance(text, str)
    other, *_, truncated, info = env.step(f" {phrase.upper()}. ")
    assert other != text and not truncated and info["is_action_valid"] is True
    assert env.step("babble")[3] is True  # the third answer of three


def test_gems_shape_plays_to_the_end():
    env = TextEnv(envs.make("virtualhome"), prompts.render)
    env.reset()
    for phrase in ("walk to the pancake", "grab the pancake", "move to the microwave",
                   "open the microwave", "put the pancake in the microwave", "close the microwave"):
        text, reward, terminated, truncated, info = env.step(phrase)
    assert (reward, terminated, truncated, info["success"]) == (1.0, True, False, True)


# -----------------------------------------------------------------------------
# Mistakes, in one line each.

def broken(**methods):
    """A Corridor with other methods."""
    return type("Broken", (Corridor,), methods)()


def fail(self, action):
    return 1 / 0


MISTAKES = {
    "Broken.reset gave a int, not (obs, info)": {"reset": lambda self, seed=None: 5},
    "Broken.reset gave a tuple of 3": {"reset": lambda self, seed=None: (1, 2, {})},
    "gave a list of 0 as info, no dict": {"reset": lambda self, seed=None: (1, [])},
    'has no "prompt"': {"tell": lambda self: {}},
    "takes no seed: write def reset(self, seed=None)": {
        "reset": lambda self: Corridor.reset(self)},
    "Broken.step gave a tuple of 3": {"step": lambda self, action: (1, 2, {})},
    "gave reward 'much', end False": {"step": lambda self, action: (1, "much", False, False, {})},
    "gave reward 1000": {"step": lambda self, action: (1, 10**400, False, False, {})},
    "gave reward nan": {"step": lambda self, action: (1, math.nan, False, False, {})},
    "duration 'x'": {"step": lambda self, action: (1, 0, False, False, {"duration": "x"})},
    "duration [2]": {"step": lambda self, action: (1, 0, False, False, {"duration": [2]})},
    "duration -1": {"step": lambda self, action: (1, 0, False, False, {"duration": -1})},
    "goes on for ever": {"step": lambda self, action: (1, 0, False, False, self.tell())},
    "Broken.step(0) raised ZeroDivisionError: division by zero (line": {"step": fail},
    "is a int, not a text": {"tell": lambda self: {"admissible_commands": ["look"]}},
    "the prompt of Corridor gave a str, not (prompt, phrases)": lambda obs, info: "a text",
    "the prompt of Corridor raised KeyError": lambda obs, info: info["nothing"],
}


def test_numbers_of_any_kind_become_floats_and_a_seed_is_one_that_numpy_takes():
    class Odd(Corridor):
        def reset(self, seed=None):
            np.random.RandomState(seed)
            return super().reset(seed)

        def step(self, action):
            told = {"duration": fractions.Fraction(3), "success": np.float64(1)}
            return 1, 0, True, False, self.tell() | told

    env = World(Odd())
    env.reset(seed=10_007 * 1_000_000)
    *_, info = env.step(0)
    assert (info["duration"], info["success"]) == (3.0, 1.0)
    assert type(info["duration"]) is type(info["success"]) is float


@pytest.mark.parametrize("line", MISTAKES)
def test_a_mistake_of_the_world_is_one_line(line, monkeypatch):
    monkeypatch.setattr(worlds, "ENDLESS", 1)
    made = MISTAKES[line]
    env = World(Corridor(), made) if callable(made) else World(broken(**made))
    with pytest.raises(WorldError) as caught:
        play(env, 0, 0)
    assert line in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("info, line", [
    ({"actions": ["go"]}, "prompt"), ({"prompt": "To"}, "actions"),
    ({"prompt": "To", "actions": "go"}, "list of"), ({"prompt": "To", "actions": b"go"}, "list of"),
    ({"prompt": "To", "actions": [b"go"]}, "no text"), ({"prompt": "To", "actions": []}, "no act"),
    ({"prompt": b"To", "actions": ["go"]}, "no text"), ({"prompt": "To", "actions": 5}, "list"),
    ({"prompt": "To", "actions": ["go"], "admissible": [1, 2]}, "is \\[1, 2\\]"),
    ({"prompt": "To", "actions": ["go"], "admissible": 3}, "is 3"),
    ({"prompt": "To", "actions": ["go "]}, "stray space")])
def test_texts_that_cannot_be_scored_are_one_line_for_every_world(info, line):
    with pytest.raises(ValueError, match=line) as caught:
        twosome.observation_text(info)
    assert "\n" not in str(caught.value)


def test_an_action_may_be_anything():
    info = {"prompt": "To", "actions": ["go", "sit"], "admissible": [("go", "north"), [2]]}
    assert twosome.observation_text(info) == ("To", ("go", "sit"))


def test_code_that_raises_shows_its_own_traceback_and_none_of_ours():
    env = World(broken(step=fail))
    env.reset()
    with pytest.raises(WorldError) as caught:
        env.step(0)
    shown = caught.value.traceback
    assert "return 1 / 0" in shown and "ZeroDivisionError" in shown and "worlds.py" not in shown[
        shown.index("Traceback"):].replace("test_worlds.py", "")
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    assert WorldError("a line").traceback == ""


def test_what_has_no_reset_or_step_is_named():
    with pytest.raises(WorldError, match="object has no reset; a world has reset and step"):
        World(object())


# -----------------------------------------------------------------------------
# From the command line.

SOURCE = """
    import dataclasses

    @dataclasses.dataclass
    class Door:
        size: int = 2

        def reset(self, seed=None):
            return 0, {"prompt": "Next,", "actions": ["open the door", "wait"]}

        def step(self, action):
            return 0, float(action == 0), True, False, {}

    def maker(size=3):
        return Door(size)

    def worse():
        raise RuntimeError("no way")

    number = 5
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "my_world.py").write_text(textwrap.dedent(SOURCE))
    (tmp_path / "wrong.py").write_text("import nothing_of_the_kind\n")
    (tmp_path / "typo.py").write_text("def f(:\n")
    (tmp_path / "leaves.py").write_text("raise SystemExit(3)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith("world_")] + ["my_world"]:
        sys.modules.pop(name, None)


@pytest.mark.parametrize("spec", ["my_world:Door", "my_world.py:Door", "./my_world.py:maker"])
def test_a_class_or_a_maker_of_a_module_or_a_file(folder, spec):
    env = worlds.make_world(spec, {"size": 7})()
    assert isinstance(env, World) and env.world.size == 7 and env.task == spec.split(":")[1]
    assert play(env, 0)[1][1:4] == (1.0, True, False)
    assert worlds.make_world(spec)().world.size in (2, 3)


def test_arguments_are_literals_or_texts():
    assert worlds.read_arguments("") == {}
    assert worlds.read_arguments("size=4, name=lake,slippery=False,games=['a', 'b'],x={[]: 1}") == {
        "size": 4, "name": "lake", "slippery": False, "games": ["a", "b"], "x": "{[]: 1}"}


@pytest.mark.parametrize("text", ["size", "size=4,size=5", ",", "size 4,name=b"])
def test_arguments_of_another_form_are_one_line(text):
    with pytest.raises(WorldError, match="write key=value,key=value once each"):
        worlds.read_arguments(text)


@pytest.mark.parametrize("spec, arguments, line", [
    ("my_world", {}, "neither PACKAGE.MODULE:CLASS nor FILE.py:CLASS"),
    ("my_world.py:", {}, "neither"), (":Door", {}, "neither"),
    ("other.py:Door", {}, "there is no file 'other.py'"),
    ("no_such_module:Door", {}, "importing no_such_module raised ModuleNotFoundError"),
    ("..:Door", {}, "importing .. raised"),
    ("my_world.py:Window", {}, "my_world.py has no class or function Window"),
    ("my_world:number", {}, "has no class or function number"),
    ("my_world:Door", {"width": 3}, "unexpected keyword argument 'width'"),
    ("my_world:Door", {"what": 3}, "unexpected keyword argument 'what'"),
    ("my_world.py:worse", {}, "making worse raised RuntimeError: no way (line"),
    ("wrong.py:Door", {}, "No module named 'nothing_of_the_kind' (line 1 of "),
    ("typo.py:Door", {}, "importing typo.py raised SyntaxError"),
    ("leaves.py:Door", {}, "importing leaves.py raised SystemExit: 3"),
    ("builtins:dict", {}, "dict has no reset"),
])
def test_what_cannot_be_made_is_one_line(folder, spec, arguments, line):
    with pytest.raises(WorldError) as caught:
        worlds.make_world(spec, arguments)()
    message = str(caught.value)
    assert line in message and "\n" not in message and "frozen" not in message


SHORT = "--steps 32 --num-envs 2 --rollout-steps 8 --minibatch 16 --episodes 2".split()


def test_a_world_of_ones_own_is_trained_resumed_and_evaluated_where_it_is_named(folder, capfd):
    world = ["--env", "my_world.py:Door"]
    assert twosome.main([*world, *SHORT, "--env-args", "size=4", "--out",
                         str(folder / "run")]) == 0
    assert twosome.main(["--resume", "run"]) == 2
    assert "--env" in capfd.readouterr().err
    elsewhere = str(folder / "my_world.py:Door")  # the same world, named from another folder
    assert twosome.main(["--resume", "run", "--env", elsewhere]) == 0
    assert twosome.main(["--resume", "run", "--env", "overcooked"]) == 2
    assert twosome.main(["--eval", "run", *world, "--episodes", "2"]) == 0
    assert twosome.main(["--eval", "run", "--task", "cheese", "--episodes", "2"]) == 0
    agent, make_env = twosome.load("run", env=world[1])
    assert make_env().world.size == 4
    result = ppo.evaluate(make_env, agent, 4, 1, 0.99)
    assert np.array_equal(result["successes"], result["returns"])  # the last reward decides


def test_the_command_prints_the_line_and_then_the_traceback(folder, capfd):
    source = (folder / "my_world.py").read_text()
    (folder / "my_world.py").write_text(source.replace("float(action == 0)", "1 / action"))
    run = ["--out", str(folder / "run")]
    assert twosome.main(["--env", "my_world.py:Door", *SHORT, *run]) == 2
    printed = capfd.readouterr().err
    line, *shown = printed[printed.index("Door.step"):].strip().splitlines()
    assert "Door.step(0) raised ZeroDivisionError: division by zero (line 12 of" in line
    assert shown[0].startswith("Traceback") and shown[-1].startswith("ZeroDivisionError")
    assert not any("worlds.py" in each for each in shown)


# -----------------------------------------------------------------------------
# The examples.

def test_textworlds_own_shape_is_the_one_that_is_expected():
    pytest.importorskip("textworld")
    from textworld.gym.envs import TextworldGymEnv
    assert not worlds.takes_seed(TextworldGymEnv.reset)
    assert not worlds.takes_seed(Quest().reset) and worlds.takes_seed(Corridor().reset)


@pytest.mark.parametrize("name", ["frozen_lake", "textworld_quest"])
def test_an_example_is_short(name):
    assert len((EXAMPLES / f"{name}.py").read_text().splitlines()) < 60


def test_the_frozen_lake_is_told_within_the_principles():
    pytest.importorskip("gymnasium")
    env = runpy.run_path(str(EXAMPLES / "frozen_lake.py"))["frozen_lake"]()
    texts = []
    for choices in ((), (1,), (1, 1), (1, 1, 2), (1, 1, 2, 1), (1, 1, 2, 1, 2)):
        prompt, phrases = twosome.observation_text(play(env, *choices)[-1][-1])
        assert prompts.lint(prompt, list(phrases)) == []
        texts.append(prompt)
    assert len(set(texts)) == len(texts)


@pytest.mark.filterwarnings("ignore:Unable to find valid actions", "ignore:Game .* is not fully")
@pytest.mark.parametrize("name, needs, flags", [
    ("frozen_lake", "gymnasium", []),
    ("textworld_quest", "textworld", ["--model", "pocket_lm"])])
def test_an_example_learns_for_one_iteration(name, needs, flags, tmp_path, monkeypatch, capsys):
    pytest.importorskip(needs)
    monkeypatch.chdir(tmp_path)
    small = "--steps 16 --num-envs 2 --rollout-steps 8 --minibatch 16 --episodes 2".split()
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *flags, *small])
    monkeypatch.setattr(sys, "path", [*sys.path])
    with pytest.raises(SystemExit) as done:
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    assert done.value.code == 0
    assert "trained  " in capsys.readouterr().out
    assert list(tmp_path.glob("runs/*/summary.json"))

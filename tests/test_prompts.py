"""prompts.py: the linter catches what it names; every reachable state of every task renders to clean, distinct text."""
import copy
import json
import random

import pytest
from conftest import reachable

import envs
import prompts
from prompts import lint, render

OVERCOOKED = {"environment": "overcooked", "recipe": ["tomato", "lettuce"], "foods": ["tomato", "lettuce", "onion"],
              "boards": ["board1", "board2"], "places": {"tomato": "board1", "lettuce": "hand", "bowl": "counter"},
              "chops": {"tomato": 3, "lettuce": 0}, "holding": "lettuce", "next_to": ["board2"]}
HOME = {"environment": "virtualhome", "task": "food-preparation", "nouns": {"food": "apple pie", "appliance": "microwave"}, "room": "kitchen",
        "visible": ["food", "appliance"], "close": ["food", "appliance"], "holding": [], "open": ["appliance"], "on": [],
        "placed": {"food": "appliance"}, "sitting": False}
EVENING = {"environment": "virtualhome", "task": "entertainment", "nouns": {}, "room": "living room",
           "visible": ["chips", "tv", "sofa", "coffee table"], "close": ["tv"], "holding": ["milk"], "open": [], "on": ["tv"],
           "placed": {"chips": "coffee table"}, "sitting": False}
TASKS = [(name, task) for name in ("overcooked", "virtualhome") for task in envs.TASKS[name]]


# --- the linter --------------------------------------------------------------------------------------------------------------

GOOD = "You are in the hall. Your next step is to"


def test_lint_accepts_a_clean_prompt():
    assert lint(GOOD, ["open the door", "close the door", "go to the attic", "chop nothing", "take an egg"]) == []


@pytest.mark.parametrize("principle, prompt, phrases", [
    ("cohesion", GOOD + " ", ["open the door"]),
    ("cohesion", "You are  in the hall. Your next step is to", ["open the door"]),
    ("cohesion", GOOD, [" open the door"]),
    ("cohesion", GOOD, ["open the door "]),
    ("cohesion", GOOD, ["open  the door"]),
    ("cohesion", GOOD, [""]),
    ("articles", GOOD, ["open door"]),
    ("articles", GOOD, ["pick up egg"]),
    ("articles", "You see the egg. Your next step is to", ["put egg in the pan"]),
    ("articles", GOOD, ["take a egg"]),
    ("articles", "You see an door. Your next step is to", ["open the door"]),
    ("step by step", "You are in the hall and want to", ["open the door"]),
    ("step by step", "You are in the hall.", ["open the door"]),
    ("step by step", "The next room is the hall. You", ["open the door"]),
    ("distinguishable", GOOD, ["take the egg", "take the ham"]),
    ("distinguishable", GOOD, ["put the egg in the pan", "put the egg in the pot"]),
    ("distinguishable", GOOD, ["take the egg", "take the egg"]),
])
def test_lint_names_each_violation(principle, prompt, phrases):
    found = lint(prompt, phrases)
    assert found and all(violation.startswith(principle) for violation in found)


# --- every reachable state -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, task", TASKS)
def test_every_reachable_state_is_clean_and_distinct(name, task):
    env = envs.make(name, task=task)
    texts = {}
    for obs, info in reachable(env):
        prompt, phrases = render(json.loads(json.dumps(info["state"])))  # plain JSON in
        assert len(phrases) == len(env.action_names)
        assert lint(prompt, phrases) == []
        texts.setdefault((prompt, *phrases), set()).add(tuple(float(x) for x in obs))
    # Text that several observations share: in Overcooked only the place on the floor can be lost, away from all fixtures.
    shared = sum(len(observations) - 1 for observations in texts.values() if len(observations) > 1)
    assert shared == 0 if name == "virtualhome" else shared <= 0.02 * len(texts)


@pytest.mark.parametrize("name, task, solution", [
    ("overcooked", "tomato-salad", ["get tomato", "go to board 1", "chop", "get tomato", "get bowl", "deliver"]),
    ("overcooked", "tomato-lettuce-salad", ["get tomato", "go to board 1", "chop", "get lettuce", "go to board 2", "chop",
                                            "get bowl", "get lettuce", "get tomato", "deliver"]),
])
def test_the_best_return_is_reached_without_memory(name, task, solution):
    """The text tells apart what needs different actions: no prompt of an optimal solution asks for two of them."""
    env = envs.make(name, task=task)
    _, info = env.reset(seed=0)
    value, elapsed, choice = 0.0, 0, {}
    for action in solution:
        assert choice.setdefault(render(info["state"])[0], action) == action
        _, reward, terminated, _, info = env.step(env.action_names.index(action))
        value, elapsed = value + 0.99**elapsed * reward, elapsed + info["duration"]
    assert terminated and value == pytest.approx(env.best_return, abs=1e-4)


@pytest.mark.parametrize("name, task", [("overcooked", "tomato-salad"), ("overcooked", "tomato-lettuce-salad"),
                                        ("virtualhome", "food-preparation"), ("virtualhome", "entertainment")])
def test_a_phrase_says_nothing_where_the_action_does_nothing(name, task):
    """Section 4.4 against the dynamics: on random walks, the state stays as it is exactly where the phrase says so."""
    env, rng = envs.make(name, task=task), random.Random(0)
    for episode in range(60):
        _, info = env.reset(seed=episode)
        ended = False
        while not ended:
            _, phrases = render(info["state"])
            action, before = rng.randrange(len(phrases)), env.state_dict()["world"]
            _, _, terminated, truncated, info = env.step(action)
            ended, says = terminated or truncated, phrases[action].endswith(("nothing", "nowhere")) or " nothing " in phrases[action]
            if phrases[action] == "serve nothing":  # walks to the serving counter with empty hands
                continue
            changed = env.state_dict()["world"] != before
            if says and changed:  # walking to a thing at hand: it only loses what else was at hand
                assert name == "virtualhome" and {**before, "near": 0} == {**env.state_dict()["world"], "near": 0}
            else:
                assert says != changed


# --- what single states say ----------------------------------------------------------------------------------------------------

def test_overcooked_says_what_is_pointless_and_where_things_are():
    prompt, phrases = render(OVERCOOKED)
    assert "the chopped tomato on the first board" in prompt and "You hold the lettuce." in prompt and prompt.endswith("next step is to")
    assert phrases[1] == "take nothing" and phrases[-1] == "chop nothing"  # held already; nothing here to chop
    assert phrases[5] == "lay the lettuce on the second board"


def test_overcooked_names_the_finished_dish_only_when_it_is_one():
    bowl = {**OVERCOOKED, "holding": "bowl", "places": {"bowl": "hand", "tomato": "bowl"}, "chops": {"tomato": 3}}
    assert render(bowl)[1][-2] == "serve the unfinished salad"
    assert render({**bowl, "recipe": ["tomato"]})[1][-2] == "serve the salad"
    assert render({**bowl, "places": {"bowl": "hand"}, "chops": {}})[1][-2] == "serve the empty bowl"
    assert render({**bowl, "holding": None, "places": {}, "chops": {}})[1][-2] == "serve nothing"


@pytest.mark.parametrize("food, appliance, goal, lies", [
    ("clothes", "washing machine", "wash the clothes in the washing machine", "The clothes are in the washing machine."),
    ("dishes", "dishwasher", "wash the dishes in the dishwasher", "The dishes are in the dishwasher."),
    ("apple pie", "microwave", "heat the apple pie in the microwave", "The apple pie is in the microwave."),
    ("glass", "lunch box", "put the glass in the lunch box", "The glass is in the lunch box."),
])
def test_grammar_of_other_nouns(food, appliance, goal, lies):
    prompt, phrases = render({**HOME, "nouns": {"food": food, "appliance": appliance}})
    assert prompt.startswith(f"You want to {goal}. ") and lies in prompt
    assert f"close the {appliance}" in phrases and lint(prompt, phrases) == []


def test_articles_before_vowels():
    assert prompts.a("onion") == "an onion" and prompts.a("tomato") == "a tomato" and prompts.a("apple pie") == "an apple pie"
    assert prompts.a("unit") == "a unit" and prompts.a("hour") == "an hour"
    assert "an onion salad" in render({**OVERCOOKED, "recipe": ["onion"]})[0]


def test_home_sentences():
    prompt, phrases = render(EVENING)
    assert "You see the sofa and the coffee table. You are at the TV. The chips are on the coffee table. The TV is on." in prompt
    assert phrases[-4] == "switch on nothing" and phrases[-3] == "turn off the TV" and phrases[8] == "approach the sofa"
    seated, phrases = render({**EVENING, "close": ["sofa"], "sitting": True})
    assert "You sit on the sofa." in seated and phrases[-1] == "stand up from the sofa" and phrases[0] == "enter nowhere"


# --- wrong states --------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("state", [
    {}, None, {"environment": "chess"}, {"environment": "overcooked"}, {**OVERCOOKED, "foods": ["fish"]}, {**OVERCOOKED, "boards": ["board9"]},
    {**OVERCOOKED, "recipe": []}, {**HOME, "room": "attic"}, {**HOME, "task": "sleep"}, {**HOME, "nouns": {}}, {**HOME, "placed": None},
])
def test_wrong_states_raise_the_named_error(state):
    with pytest.raises(prompts.StateError):
        render(state)


def test_render_leaves_the_state_as_it_is():
    for state in (OVERCOOKED, HOME, EVENING):
        before = copy.deepcopy(state)
        assert render(state) == render(state) and state == before

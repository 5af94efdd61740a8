"""prompts.py: the linter names what is broken, and our texts keep the principles in every state.

What one text shows is the linter's work. Two principles need a whole environment, and are checked
here over its dynamics: what is worth doing is named, and no phrase stands both for doing something
and for doing nothing.
"""
import copy
import functools
import heapq
import json
import re

import pytest
from conftest import world_key

import envs
import prompts
from prompts import lint, render

KITCHEN = {
    "environment": "overcooked", "recipe": ["tomato", "lettuce"],
    "foods": ["tomato", "lettuce", "onion"], "boards": ["board1", "board2"],
    "places": {"tomato": "board1", "lettuce": "hand", "bowl": "counter"},
    "chops": {"tomato": 3, "lettuce": 0}, "holding": "lettuce", "next_to": ["board2"],
}
HOME = {
    "environment": "virtualhome", "task": "food-preparation",
    "nouns": {"food": "apple pie", "appliance": "microwave"}, "room": "kitchen",
    "visible": ["food", "appliance"], "close": ["food", "appliance"], "holding": [],
    "open": ["appliance"], "on": [], "placed": {"food": "appliance"}, "sitting": False,
}
EVENING = {
    "environment": "virtualhome", "task": "entertainment", "nouns": {}, "room": "living room",
    "visible": ["chips", "tv", "sofa", "coffee table"], "close": ["tv"], "holding": ["milk"],
    "open": [], "on": ["tv"], "placed": {"chips": "coffee table"}, "sitting": False,
}
TASKS = [(name, task) for name in envs.TASKS for task in envs.TASKS[name]]
every_task = pytest.mark.parametrize("name, task", TASKS)


# -----------------------------------------------------------------------------
# The linter.

HALL = "You are in the hall. You see the door. Your next step is to"


@pytest.mark.parametrize("prompt, phrases", [
    (HALL, ["open the door", "close the door", "go to the attic", "chop nothing", "take an egg"]),
    (HALL, ["open the door", "walk down", "wait", "look around", "turn slowly"]),
    ("The goal lies down and right. Next, you should", ["walk down", "walk right", "walk up"]),
    ("You want to eat an egg, ham and leek pie. You should first", ["fry the ham", "cut the leek"]),
    ("You stand at the door.\n\nThe next step is to", ["step to the door"]),
])
def test_lint_accepts_clean_texts(prompt, phrases):
    assert lint(prompt, phrases) == []


@pytest.mark.parametrize("rule, prompt, phrases", [
    ("cohesion", "You are at the door and want to", ["open the door"]),
    ("cohesion", "You are at the door.", ["open the door"]),
    ("cohesion", "The next room is the hall. You see the door. You", ["open the door"]),
    ("cohesion", HALL, ["open the door", "Go to the attic"]),
    ("cohesion", HALL, ["open the door", ""]),
    ("articles", HALL, ["open the door", "pick up egg"]),
    ("articles", HALL, ["open the door", "walk to door"]),
    ("articles", HALL, ["open the door", "put the egg in pan", "wash the pan"]),
    ("articles", HALL, ["open the door", "take a egg"]),
    ("articles", "You see door. Your next step is to", ["open the door"]),
    ("articles", "You see the egg and door. Your next step is to", ["open the door"]),
    ("articles", "You see an door. Your next step is to", ["open the door"]),
    ("preferred actions", "You are in the hall. Your next step is to", ["open the door"]),
    ("preferred actions", HALL, ["take an egg", "open nothing"]),
    ("our rule, verbs", HALL, ["open the door", "open the egg"]),
    ("our rule, verbs", HALL, ["shut the door", "put it in the pan", "put it in the box"]),
    ("our rule, verbs", HALL, ["open the door", "open the door"]),
    ("our rule, seam", HALL + " ", ["open the door"]),
    ("our rule, seam", HALL.replace("You see", " You see"), ["open the door"]),
    ("our rule, seam", HALL, [" open the door"]),
    ("our rule, seam", HALL, ["open the door "]),
    ("our rule, seam", HALL, ["open  the door"]),
])
def test_lint_names_the_rule_that_is_broken(rule, prompt, phrases):
    found = lint(prompt, phrases)
    assert found and all(violation.startswith(f"{rule}: ") for violation in found)
    assert not any("\n" in violation for violation in found)


@pytest.mark.parametrize("rule, spoil", [
    ("cohesion", lambda prompt, phrases: (prompt.removesuffix(prompts.CUE).strip(), phrases)),
    ("articles", lambda prompt, phrases: (prompt, [text.replace("the ", "") for text in phrases])),
    ("articles", lambda prompt, phrases: (re.sub(r"\b(the|an?) ", "", prompt), phrases)),
    ("preferred actions", lambda prompt, phrases: (prompts.CUE, phrases)),
    ("our rule, verbs", lambda prompt, phrases: (
        prompt, [re.sub("^(enter|visit|proceed to)", "go to", text) for text in phrases])),
    ("our rule, seam", lambda prompt, phrases: (prompt + " ", phrases)),
])
def test_a_principle_broken_in_our_own_texts_is_caught_by_its_name(rule, spoil):
    for state in (HOME, EVENING):
        prompt, phrases = render(state)
        assert lint(prompt, phrases) == []
        assert {line.split(":")[0] for line in lint(*spoil(prompt, phrases))} == {rule}


def test_lint_refuses_one_text_for_the_list_of_phrases():
    with pytest.raises(prompts.PromptError, match="list of phrases"):
        lint(HALL, "open the door")


# -----------------------------------------------------------------------------
# Every reachable state of every task.

@functools.cache
def world(name, task):
    """Every reachable state as (obs, info, moves).

    moves[action] is (number of the state that follows, primitive steps); None stands for the end.
    """
    env = envs.make(name, task=task)
    obs, info = env.reset()
    states = [(env.state_dict(), obs, info)]
    numbers = {world_key(states[0][0]): 0}
    found = []
    for state, obs, info in states:
        moves = []
        for action in range(len(env.action_names)):
            env.load_state_dict(state)
            after_obs, _, terminated, _, after_info = env.step(action)
            after = env.state_dict() | {"phase": "running", "elapsed": 0, "duration": 0}
            if not terminated and world_key(after) not in numbers:
                numbers[world_key(after)] = len(states)
                states.append((after, after_obs, after_info))
            follows = None if terminated else numbers[world_key(after)]
            moves.append((follows, after_info["duration"]))
        found.append((obs, info, moves))
    return found


def right_actions(states):
    """{state: its actions that a shortest solution takes}, for the states along all of them."""
    before = [[] for _ in states]
    heap = []
    for number, (_, _, moves) in enumerate(states):
        for follows, duration in moves:
            if follows is None:
                heap.append((duration, number))
            else:
                before[follows].append((duration, number))
    left = {}  # the primitive steps that are left from each state (Dijkstra, from the goal)
    heapq.heapify(heap)
    while heap:
        steps, number = heapq.heappop(heap)
        if number not in left:
            left[number] = steps
            for duration, earlier in before[number]:
                heapq.heappush(heap, (steps + duration, earlier))
    right, queue = {}, [0]
    for number in queue:
        moves = states[number][2]
        right[number] = [action for action, (follows, duration) in enumerate(moves)
                         if duration + left.get(follows, 0 if follows is None else 1e9)
                         == left[number]]
        follows = {moves[action][0] for action in right[number]} - {None, *queue}
        queue += sorted(follows)
    return right


def unnamed(states, tell):
    """The violations of principle 3: right actions whose things do not stand in the prompt."""
    for number, actions in right_actions(states).items():
        prompt, phrases = tell(states[number][1]["state"])
        right = [phrases[action] for action in actions]
        said = [text for text in right if prompts.nouns(text) <= {*prompts.words(prompt)}]
        if not any(prompts.nouns(text) for text in said):
            yield f"preferred actions: {prompt!r} names the things of none of {right}"


def told_alike(states, tell):
    """The violations of principle 4: one phrase for doing something and for doing nothing."""
    effects = {}
    for number, (_, info, moves) in enumerate(states):
        for action, phrase in enumerate(tell(info["state"])[1]):
            effects.setdefault((action, phrase), set()).add(moves[action][0] == number)
    for (action, phrase), effect in effects.items():
        idle = re.search(r"\b(nothing|nowhere)\b", phrase) is not None
        if effect != {idle}:
            yield f"one action, different phrases: action {action} is told as {phrase!r}"


@every_task
def test_every_reachable_state_is_clean(name, task):
    for _, info, moves in world(name, task):
        prompt, phrases = render(json.loads(json.dumps(info["state"])))  # plain JSON is enough
        assert lint(prompt, phrases) == [] and len(phrases) == len(moves)


@every_task
def test_what_a_shortest_solution_does_next_is_named(name, task):
    assert list(unnamed(world(name, task), render)) == []


@every_task
def test_a_phrase_says_nothing_exactly_where_the_action_does_nothing(name, task):
    assert list(told_alike(world(name, task), render)) == []


@pytest.mark.parametrize("name, task, sentence", [
    ("overcooked", "tomato-salad", r"\S+ first board is for chopping\. "),
    ("overcooked", "tomato-lettuce-salad", r"The bowl is out of sight\. "),
    ("overcooked", "onion-salad", r"You want to make an onion salad\. "),
    ("virtualhome", "entertainment", r"The door leads to the living room\. "),
    ("virtualhome", "laundry", r"You (see|are at) the .*? machine\. |You want to .*?\. "),
])
def test_a_prompt_without_what_is_worth_doing_is_caught(name, task, sentence):
    def silent(state):
        prompt, phrases = render(state)
        return re.sub(sentence, "", prompt), phrases

    found = list(unnamed(world(name, task), silent))
    assert found and all(line.startswith("preferred actions: ") for line in found)


@pytest.mark.parametrize("name, task, idle, instead", [
    ("overcooked", "tomato-salad", "serve nothing", "return to the serving counter empty-handed"),
    ("overcooked", "tomato-onion-salad", "chop nothing", "chop the tomato"),
    ("virtualhome", "entertainment", "reach nothing", "reach the coffee table"),
    ("virtualhome", "pizza", "go to nowhere", "go to the kitchen"),
])
def test_one_phrase_for_something_and_nothing_is_caught(name, task, idle, instead):
    for old, new in ((idle, instead), (instead, idle)):
        def blunt(state, old=old, new=new):
            prompt, phrases = render(state)
            return prompt, [new if phrase == old else phrase for phrase in phrases]

        found = list(told_alike(world(name, task), blunt))
        assert found and all(line.startswith("one action, different phrases: ") for line in found)


@every_task
def test_texts_tell_apart_what_observations_do(name, task):
    """In Overcooked, only two things are lost: where on the floor one stands, away from all
    fixtures, and whether a food that the recipe lacks is in view.
    """
    texts = {}
    for obs, info, _ in world(name, task):
        prompt, phrases = render(info["state"])
        texts.setdefault((prompt, *phrases), set()).add(tuple(float(x) for x in obs))
    shared = sum(len(observations) - 1 for observations in texts.values())
    assert shared <= (0.02 * len(texts) if name == "overcooked" else 0)


@pytest.mark.parametrize("task, solution", [
    ("tomato-salad",
     ["get tomato", "go to board 1", "chop", "get tomato", "get bowl", "deliver"]),
    ("tomato-lettuce-salad",
     ["get tomato", "go to board 1", "chop", "get lettuce", "go to board 2", "chop",
      "get bowl", "get lettuce", "get tomato", "deliver"]),
])
def test_the_best_return_is_reached_without_memory(task, solution):
    """No prompt of an optimal solution asks for two different actions."""
    env = envs.make("overcooked", task=task)
    _, info = env.reset(seed=0)
    value, elapsed, choice = 0.0, 0, {}
    for action in solution:
        assert choice.setdefault(render(info["state"])[0], action) == action
        _, reward, terminated, _, info = env.step(env.action_names.index(action))
        value += 0.99**elapsed * reward
        elapsed += info["duration"]
    assert terminated and value == pytest.approx(env.best_return, abs=1e-4)


# -----------------------------------------------------------------------------
# What single states say.

def test_a_kitchen_in_words():
    prompt, phrases = render(KITCHEN)
    assert prompt == (
        "You want to make a tomato and lettuce salad. You see the bowl and the chopped tomato on "
        "the first board. The second board is for chopping. You are at the second board. You hold "
        "the lettuce. Your next step is to")
    assert phrases == [
        "walk to the tomato", "take nothing", "move to the onion", "head to the bowl",
        "approach the first board", "lay the lettuce on the second board", "serve the lettuce",
        "chop nothing"]


def test_tools_are_named_while_they_are_worth_using():
    boards = "The first board and the second board are for chopping."
    empty = {**KITCHEN, "places": {}, "chops": {}, "holding": None}
    assert boards not in render(empty)[0] and "bowl" not in render(empty)[0]
    raw = {**empty, "holding": "lettuce", "places": {"lettuce": "hand"}, "chops": {"lettuce": 2}}
    assert boards in render(raw)[0] and "bowl" not in render(raw)[0]
    done = {**raw, "chops": {"lettuce": 3}}
    assert boards not in render(done)[0] and "The bowl is out of sight." in render(done)[0]
    other = {**raw, "recipe": ["tomato"]}
    assert boards not in render(other)[0]


def test_a_food_that_the_recipe_lacks_is_named_only_where_it_is_in_the_way():
    seen = {**KITCHEN, "places": {"onion": "counter"}, "chops": {"onion": 0}, "holding": None}
    assert "onion" not in render(seen)[0]
    assert "the onion on the first board" in render({**seen, "places": {"onion": "board1"}})[0]
    held = {**seen, "places": {"onion": "hand"}, "holding": "onion"}
    assert "You hold the onion." in render(held)[0]


def test_only_the_finished_dish_is_the_salad():
    bowl = {**KITCHEN, "holding": "bowl", "places": {"bowl": "hand", "tomato": "bowl"},
            "chops": {"tomato": 3}}
    assert render(bowl)[1][-2] == "serve the unfinished salad"
    assert render({**bowl, "recipe": ["tomato"]})[1][-2] == "serve the salad"
    empty = {**bowl, "places": {"bowl": "hand"}, "chops": {}}
    assert render(empty)[1][-2] == "serve the empty bowl"
    empty = {**bowl, "holding": None, "places": {}, "chops": {}}
    assert render(empty)[1][-2] == "return to the serving counter empty-handed"
    assert render({**empty, "next_to": ["delivery"]})[1][-2] == "serve nothing"


@pytest.mark.parametrize("food, appliance, goal, lies", [
    ("clothes", "washing machine", "wash the clothes in the washing machine",
     "The clothes are in the washing machine."),
    ("dishes", "dishwasher", "wash the dishes in the dishwasher",
     "The dishes are in the dishwasher."),
    ("apple pie", "microwave", "heat the apple pie in the microwave",
     "The apple pie is in the microwave."),
    ("glass", "lunch box", "put the glass in the lunch box", "The glass is in the lunch box."),
    ("{be}", "box of {things}", "put the {be} in the box of {things}", "in the box of {things}."),
])
def test_grammar_of_other_nouns(food, appliance, goal, lies):
    prompt, phrases = render({**HOME, "nouns": {"food": food, "appliance": appliance}})
    assert prompt.startswith(f"You want to {goal}. ")
    assert f"close the {appliance}" in phrases
    assert "{" in food or lies in prompt and lint(prompt, phrases) == []


def test_articles_before_vowels():
    for noun, told in (("onion", "an onion"), ("tomato", "a tomato"), ("apple pie", "an apple pie"),
                       ("unit", "a unit"), ("hour", "an hour"), ("one", "a one")):
        assert prompts.a(noun) == told
    assert "an onion salad" in render({**KITCHEN, "recipe": ["onion"]})[0]


def test_a_home_in_words():
    prompt, phrases = render(EVENING)
    assert prompt == (
        "You want to watch the TV on the sofa with the chips and the milk. You are in the living "
        "room. You see the sofa and the coffee table. You are at the TV. The chips are on the "
        "coffee table. The TV is on. You hold the milk. Your next step is to")
    assert phrases[:4] == ["enter the living room", "go to the kitchen", "visit the bathroom",
                           "proceed to the bedroom"]
    assert phrases[4:9] == ["walk to the chips", "head to nothing", "reach the coffee table",
                            "move to nothing", "approach the sofa"]
    assert phrases[-4:] == ["switch on nothing", "turn off the TV", "sit on nothing",
                            "stand up from nothing"]
    seated, phrases = render({**EVENING, "close": ["sofa"], "sitting": True})
    assert "You sit on the sofa." in seated and phrases[0] == "enter nowhere"
    assert phrases[-1] == "stand up from the sofa"


def test_the_room_that_is_worth_going_to_is_named():
    def room(state):
        found = re.search(r"The door leads to (.*?)\.", render(state)[0])
        return found and found[1]

    assert room(EVENING) is None
    assert room({**EVENING, "holding": []}) == "the kitchen"  # the milk must still be there
    kitchen = {**EVENING, "room": "kitchen", "on": [], "placed": {}, "close": []}
    assert room({**kitchen, "visible": ["chips"]}) is None
    assert room({**kitchen, "visible": [], "holding": ["chips", "milk"]}) == "the living room"
    assert room(HOME) is None
    assert room({**HOME, "room": "bedroom", "visible": [], "close": [], "open": [],
                 "placed": {}}) == "the kitchen"


# -----------------------------------------------------------------------------
# Wrong states.

@pytest.mark.parametrize("state, message", [
    ({}, "environment"), (None, "not a named state"), ([], "not a named state"),
    ({"environment": "chess"}, "must be one of overcooked, virtualhome"),
    ({"environment": ["overcooked"]}, "must be one of overcooked, virtualhome"),
    ({"environment": "overcooked"}, "no attribute"),
    ({**KITCHEN, "foods": ["fish"]}, "fish"), ({**KITCHEN, "boards": ["board9"]}, "board9"),
    ({**KITCHEN, "recipe": []}, "not a named state"),
    ({**HOME, "room": "attic"}, "living room, kitchen, bathroom, bedroom"),
    ({**HOME, "task": "sleep"}, "food-preparation, entertainment"),
    ({**HOME, "nouns": {}}, "appliance"), ({**HOME, "placed": None}, "not a named state"),
])
def test_a_wrong_state_is_one_line_that_says_what_is_wrong(state, message):
    with pytest.raises(prompts.PromptError, match=message) as caught:
        render(state)
    assert "\n" not in str(caught.value)


def test_render_leaves_the_state_as_it_is():
    for state in (KITCHEN, HOME, EVENING):
        before = copy.deepcopy(state)
        assert render(state) == render(state) and state == before

"""envs.py against rules worked out by hand, exhaustive search, and recorded dynamics."""
import gzip
import json
import math
import pathlib
import random
import subprocess
import sys

import pytest
from conftest import reachable, world_key

import envs

ROOT = pathlib.Path(__file__).resolve().parent.parent
EVERY_TASK = [(name, task) for name, tasks in envs.TASKS.items() for task in tasks]
DISTINCT = [
    ("overcooked", "tomato-salad"),
    ("overcooked", "tomato-lettuce-salad"),
    ("virtualhome", "food-preparation"),
    ("virtualhome", "entertainment"),
]
HOLD_CHOPPED = ["get tomato", "go to board 1", "chop", "get tomato"]  # 2 + 5 + 3 + 1 steps
TOMATO_SALAD = [*HOLD_CHOPPED, "get bowl", "deliver"]
TOMATO_LETTUCE_SALAD = [
    "get tomato", "go to board 1", "chop", "get lettuce", "go to board 2", "chop",
    "get bowl", "get tomato", "get lettuce", "deliver",
]
FOOD_PREPARATION = [
    "walk to the pancake", "grab the pancake", "walk to the microwave", "open the microwave",
    "put the pancake in the microwave", "close the microwave",
]
CARRY_SNACKS = [
    "walk to the chips", "grab the chips", "walk to the milk", "grab the milk",
    "walk to the living room",
]
ENTERTAINMENT = [
    *CARRY_SNACKS, "walk to the coffee table", "put the chips on the coffee table",
    "walk to the TV", "turn on the TV", "walk to the sofa", "sit on the sofa",
]


def play(env, actions):
    """Return (the return from the start, the steps' answers), as the docstring of envs defines."""
    total, steps, answers = 0.0, 0, []
    env.reset()
    for action in actions:
        answers.append(env.step(env.action_names.index(action)))
        total += env.gamma**steps * answers[-1][1]
        steps += answers[-1][4]["duration"]
    return total, answers


def last(env, actions):
    """Return (obs, reward, terminated, truncated, info) of the last action."""
    return play(env, actions)[1][-1]


def last_state(env, actions):
    return last(env, actions)[4]["state"]


def begun(name, task=None):
    env = envs.make(name, task)
    env.reset()
    return env


def durations(actions, task="tomato-salad"):
    return [info["duration"] for *_, info in play(envs.make("overcooked", task), actions)[1]]


def feature(env, obs, name):
    return obs[env.feature_names.index(name)]


def idle(steps):
    """Return the reward of so many primitive steps in which nothing else happens."""
    return -0.001 * (1 - 0.99**steps) / 0.01


@pytest.mark.parametrize("name, task, actions, steps, best", [
    ("overcooked", "tomato-salad", TOMATO_SALAD, 28, 0.9205),
    ("overcooked", "tomato-lettuce-salad", TOMATO_LETTUCE_SALAD, 45, 0.9477),
    ("virtualhome", "food-preparation", FOOD_PREPARATION, 6, 0.7738),
    ("virtualhome", "entertainment", ENTERTAINMENT, 11, 0.5987),
])
def test_known_solutions_take_the_published_steps_and_return(name, task, actions, steps, best):
    env = envs.make(name, task)
    _, info = env.reset()
    for action in actions:
        index = env.action_names.index(action)
        assert index in info["admissible"] and "success" not in info
        _, _, terminated, truncated, info = env.step(index)
    assert terminated and not truncated
    assert info["success"] is True and env.elapsed == steps
    assert play(env, actions)[0] == pytest.approx(best, abs=5e-5) == env.best_return


def value_of_the_start(env):
    """Return the largest return from the start, by value iteration over every reachable world."""
    env.reset()
    queue, number, edges = [env.state_dict()], {}, []
    number[world_key(queue[0])] = 0
    for state in queue:
        edges.append([])
        for action in range(len(env.action_names)):
            env.load_state_dict(state)
            _, reward, terminated, _, info = env.step(action)
            after = env.state_dict() | {"phase": "running", "elapsed": 0}
            to = 0 if terminated else number.setdefault(world_key(after), len(queue))
            if to == len(queue):
                queue.append(after)
            edges[-1].append((reward, 0.0 if terminated else env.gamma**info["duration"], to))
    values, change = [0.0] * len(edges), 1.0
    while change > 1e-9:
        new = [max(reward + discount * values[to] for reward, discount, to in row)
               for row in edges]
        change = max(abs(a - b) for a, b in zip(new, values, strict=True))
        values = new
    return values[0]


@pytest.mark.parametrize("name, task, options", [
    *((name, task, {}) for name, task in EVERY_TASK),
    ("overcooked", "tomato-salad", {"view": 1}),
    ("overcooked", "tomato-lettuce-salad", {"view": 10}),
    ("virtualhome", "entertainment", {"mask": False}),
])
def test_best_return_is_what_exhaustive_search_finds(name, task, options):
    env = envs.make(name, task, **options)
    assert value_of_the_start(env) == pytest.approx(env.best_return, abs=1e-6)


def test_best_return_is_unknown_under_other_rules():
    for options in ({"gamma": 0.95}, {"max_steps": 20}, {"chop_reward": 0.1}):
        assert envs.make("overcooked", **options).best_return is None
    assert envs.make("virtualhome", gamma=0.9).best_return == pytest.approx(0.9**5)
    assert envs.make("virtualhome", max_steps=5).best_return == 0


def test_rewards_are_discounted_inside_a_macro_action():
    _, answers = play(envs.make("overcooked"), HOLD_CHOPPED)
    expected = [idle(2), idle(5), idle(3) + 0.99**2 * 0.2, idle(1)]
    assert [answer[1] for answer in answers] == pytest.approx(expected)
    # From (5, 5) to (3, 1) it is six moves and the delivery.
    delivered = last(envs.make("overcooked"), TOMATO_SALAD)
    assert delivered[1] == pytest.approx(idle(7) + 0.99**6 * 1.0)
    # The onion is not of the recipe.
    env = envs.make("overcooked", "tomato-lettuce-salad")
    chopped = last(env, ["get onion", "go to board 1", "chop"])
    assert chopped[1] == pytest.approx(idle(3)) and chopped[4]["state"]["chops"]["onion"] == 3


def test_chop_reward_replaces_the_reward_of_a_chopped_food():
    for given in (0.1, 0):
        env = envs.make("overcooked", chop_reward=given)
        assert last(env, HOLD_CHOPPED[:3])[1] == pytest.approx(idle(3) + 0.99**2 * given)


def test_a_wrong_delivery_costs_and_puts_back_what_was_delivered():
    env = envs.make("overcooked", "tomato-lettuce-salad")
    start = env.state_dict()["world"]
    _, reward, terminated, _, info = last(env, TOMATO_SALAD)
    assert reward == pytest.approx(idle(7) - 0.1 * 0.99**6) and not terminated
    assert env.state_dict()["world"] == start | {"agent": [3, 1]}
    assert info["state"]["next_to"] == ["delivery"]
    # Deliver the lettuce alone: the tomato stays chopped on its board.
    play(env, [*HOLD_CHOPPED, "go to board 1", "get lettuce", "deliver"])
    assert env.state_dict()["world"]["chops"]["tomato"] == 3 and env.lying["tomato"] == (1, 0)


def test_view_is_two_cells_and_the_state_tells_no_more():
    # From (1, 4), tomato (0, 5), lettuce (1, 6) and onion (2, 6) are in view; bowl (6, 5) is not.
    env = envs.make("overcooked", "tomato-lettuce-salad")
    obs, info = env.reset()
    counters = {"tomato": "counter", "lettuce": "counter", "onion": "counter"}
    assert info["state"]["places"] == counters
    assert feature(env, obs, "bowl_x") == feature(env, obs, "bowl_y") == 0
    assert feature(env, obs, "onion_x") == 2
    state = last_state(env, ["get bowl"])
    assert state["places"] == {"bowl": "hand"}
    assert state["chops"] == {} and state["next_to"] == []
    state = last_state(env, ["get tomato"])
    assert state["next_to"] == ["lettuce"] and state["holding"] == "tomato"


def test_view_widens_and_narrows_what_observation_and_state_tell():
    env = envs.make("overcooked", "tomato-lettuce-salad", view=10)
    obs, info = env.reset()
    assert info["state"]["places"]["bowl"] == "counter" and info["state"]["chops"]["tomato"] == 0
    assert [feature(env, obs, f"bowl_{axis}") for axis in "xy"] == [6, 5]
    assert [feature(env, obs, f"counter_{axis}") for axis in "xy"] == [3, 0]
    env = envs.make("overcooked", "tomato-lettuce-salad", view=1)
    obs, info = env.reset()
    assert info["state"]["places"] == {"tomato": "counter"} and info["state"]["next_to"] == []
    assert feature(env, obs, "lettuce_y") == 0 and feature(env, obs, "tomato_y") == 5
    # What is looked for in the bowl is given up as soon as the bowl is in view.
    away = [*HOLD_CHOPPED, "get bowl", "go to board 1", "get tomato"]
    assert durations(away)[-1] == 1
    far = [*HOLD_CHOPPED, "get bowl", "go to board 1", "get lettuce", "get tomato"]
    for view, steps in ((1, 5), (2, 4), (10, 1)):
        env = envs.make("overcooked", "lettuce-salad", view=view)
        assert last(env, far)[4]["duration"] == steps


def test_idle_and_special_durations():
    assert durations(["chop", "get tomato", "get tomato", "chop"]) == [1, 2, 1, 1]
    assert durations(["deliver", "deliver", "go to board 1", "go to board 1"]) == [5, 1, 2, 1]
    # An unchopped food is left on its board.
    left = ["get tomato", "go to board 1", "get tomato", "deliver", "get tomato"]
    assert durations(left) == [2, 5, 1, 2, 2]
    # An unchopped food does not go into the bowl.
    assert durations(["get tomato", "get bowl", "get bowl", "get bowl"]) == [2, 5, 1, 1]
    # Eight moves, put in, take the bowl.
    assert durations([*HOLD_CHOPPED, "get bowl", "get tomato", "get bowl"])[4:] == [10, 1, 1]


def test_a_bowl_on_a_board_comes_to_hand_with_the_food():
    actions = ["get bowl", "go to board 2", *HOLD_CHOPPED, "get bowl"]
    info = last(envs.make("overcooked", "tomato-lettuce-salad"), actions)[4]
    assert info["duration"] == 3  # one move, put in, one idle step
    assert info["state"]["places"] == {"tomato": "bowl", "bowl": "hand"}


def test_nobody_chops_with_a_full_hand():
    actions = ["get tomato", "go to board 1", "get bowl", "go to board 1", "chop"]
    info = last(envs.make("overcooked"), actions)[4]
    assert info["duration"] == 3 and info["state"]["chops"] == {"tomato": 0}


def test_the_time_limit_is_a_truncation_between_macro_actions():
    # The actions end after 2, 7 and 10 steps: the limit of 8 does not cut the chop.
    env = envs.make("overcooked", max_steps=8)
    _, answers = play(env, HOLD_CHOPPED[:3])
    ends = [(False, False), (False, False), (False, True)]
    assert [answer[2:4] for answer in answers] == ends
    assert env.elapsed == 10 and answers[-1][4]["success"] is False
    _, answers = play(envs.make("virtualhome"), ["open the microwave"] * 50)
    assert [answer[3] for answer in answers] == [False] * 49 + [True]
    assert last(envs.make("overcooked", max_steps=28), TOMATO_SALAD)[2:4] == (True, False)


def test_home_actions_without_their_precondition_do_nothing():
    env = envs.make("virtualhome", "entertainment")
    before, _ = env.reset()
    for action in ("grab the chips", "turn on the TV", "walk to the TV", "sit on the sofa",
                   "put the milk on the coffee table"):
        obs, reward, *_ = env.step(env.action_names.index(action))
        assert (obs == before).all() and reward == 0
    state = last_state(env, [*CARRY_SNACKS, "walk to the TV", "turn on the TV"])
    assert state["on"] == [] and state["close"] == ["tv"]  # No hand is free.
    seated = [*CARRY_SNACKS, "walk to the sofa", "sit on the sofa", "walk to the kitchen"]
    state = last_state(env, seated)
    assert state["room"] == "living room" and state["sitting"]


def test_the_published_mask_can_be_empty_and_can_be_taken_off():
    actions = ["walk to the living room", "walk to the TV"]
    env = envs.make("virtualhome", "entertainment")
    assert last(env, actions)[4]["admissible"] == []
    for _, task in DISTINCT[2:]:
        plain, free = envs.make("virtualhome", task), envs.make("virtualhome", task, mask=False)
        everything = list(range(len(plain.action_names)))
        masks = [info["admissible"] for _, info in reachable(plain)]
        assert any(mask != everything for mask in masks)
        assert all(info["admissible"] == everything for _, info in reachable(free))


def test_walking_to_a_container_or_to_what_is_in_it_is_close_to_both():
    env = envs.make("virtualhome")
    put_in = [*FOOD_PREPARATION[:-1], "walk to the bedroom", "walk to the kitchen"]
    for goal in ("walk to the microwave", "walk to the pancake"):
        state = last_state(env, [*put_in, goal])
        assert state["close"] == ["food", "appliance"]
        assert state["placed"] == {"food": "appliance"}
    taken = [*put_in, "walk to the pancake", "grab the pancake", "walk to the bedroom"]
    state = last_state(env, taken)
    assert state["holding"] == ["food"] and state["placed"] == {}
    assert state["open"] == []  # The open microwave is out of view.


def test_standing_up_gives_the_legs_back():
    env = envs.make("virtualhome", "entertainment")
    sit = ["walk to the living room", "walk to the sofa", "sit on the sofa"]
    state = last_state(env, [*sit, "stand up from the sofa"])
    assert not state["sitting"] and state["close"] == ["sofa"]
    state = last_state(env, [*sit, "stand up from the sofa", "walk to the kitchen"])
    assert state["room"] == "kitchen"


@pytest.mark.parametrize("name, task, episodes, rate, mean", [
    ("overcooked", "tomato-salad", 500, 0.43, -0.09),
    ("overcooked", "tomato-lettuce-salad", 600, 0.013, -0.23),
    ("virtualhome", "food-preparation", 1000, 0.014, 0.0),
    ("virtualhome", "entertainment", 500, 0.0, 0.0),
])
def test_random_policy_delivers_as_often_as_published(name, task, episodes, rate, mean):
    env, rng = envs.make(name, task), random.Random(0)
    returns, successes = [], 0
    for _ in range(episodes):
        (_, info), total, steps = env.reset(), 0.0, 0
        while "success" not in info:
            choices = info["admissible"] or range(len(env.action_names))
            _, reward, _, _, info = env.step(rng.choice(choices))
            total += env.gamma**steps * reward
            steps += info["duration"]
        returns.append(total)
        successes += info["success"]
    average = sum(returns) / episodes
    deviation = math.sqrt(sum((x - average) ** 2 for x in returns) / episodes)
    tolerance = 0.005 + 3.3 * math.sqrt(rate * (1 - rate) / episodes)
    assert successes / episodes == pytest.approx(rate, abs=tolerance)
    assert average == pytest.approx(mean, abs=0.005 + 3.3 * deviation / math.sqrt(episodes))


@pytest.mark.parametrize("name, task, options", [
    *((name, task, {}) for name, task in DISTINCT),
    ("overcooked", "tomato-lettuce-salad", {"view": 1}),
    ("overcooked", "tomato-lettuce-salad", {"view": 10}),
])
def test_equal_features_have_equal_states_and_masks(name, task, options):
    known = {}
    for obs, info in reachable(envs.make(name, task, **options)):
        assert json.loads(json.dumps(info["state"])) == info["state"]
        tells = (info["state"], info["admissible"])
        assert known.setdefault(obs.tobytes(), tells) == tells
    assert len(known) > 10


@pytest.mark.parametrize("name, task", DISTINCT)
def test_a_saved_state_continues_identically(name, task):
    env, twin, rng = envs.make(name, task), envs.make(name, task), random.Random(1)
    env.reset()
    for _ in range(60):
        saved = json.loads(json.dumps(env.state_dict()))
        twin.load_state_dict(saved)
        assert twin.state_dict() == env.state_dict() == saved
        assert twin.observe()[1] == env.observe()[1]
        if env.phase != "running":
            env.reset()
            twin.reset()
        action = rng.randrange(len(env.action_names))
        obs, *answer = env.step(action)
        twin_obs, *twin_answer = twin.step(action)
        assert (obs == twin_obs).all() and answer == twin_answer


def test_a_restored_world_shares_nothing_with_the_state_it_came_from():
    for name, task in DISTINCT:
        env, rng = begun(name, task), random.Random(2)
        saved = env.state_dict()
        before = json.dumps(saved)
        env.load_state_dict(saved)
        for _ in range(20):
            env.step(rng.randrange(len(env.action_names)))
        assert json.dumps(saved) == before


@pytest.mark.parametrize("says, call", [
    ("did you mean overcooked", lambda: envs.make("overcookd")),
    ("choose one of overcooked", lambda: envs.make(None)),
    ("did you mean tomato-salad", lambda: envs.make("overcooked", "tomatosalad")),
    ("did you mean entertainment", lambda: envs.VirtualHome("entertainmet")),
    ("choose one of gamma", lambda: envs.make("overcooked", food="lasagna")),
    ("did you mean mask", lambda: envs.make("virtualhome", masks=False)),
    ("gamma", lambda: envs.make("overcooked", gamma=1.5)),
    ("gamma", lambda: envs.make("overcooked", gamma=float("nan"))),
    ("max_steps", lambda: envs.make("overcooked", max_steps=True)),
    ("view must be a positive integer", lambda: envs.make("overcooked", view=0)),
    ("view must be a positive integer", lambda: envs.make("overcooked", view=1.5)),
    ("chop_reward must be a finite", lambda: envs.make("overcooked", chop_reward=float("inf"))),
    ("chop_reward must be a finite", lambda: envs.make("overcooked", chop_reward="0.1")),
    ("mask must be True or False", lambda: envs.make("virtualhome", mask="off")),
    ("has no food", lambda: envs.make("virtualhome", "entertainment", food="lasagna")),
    ("single spaces", lambda: envs.make("virtualhome", food="")),
    ("single spaces", lambda: envs.make("virtualhome", food=7)),
    ("two nouns", lambda: envs.make("virtualhome", food="oven", appliance="oven")),
    ("two nouns", lambda: envs.make("virtualhome", food="apple pie", appliance="applepie")),
    ("two nouns", lambda: envs.make("virtualhome", food="kitchen")),
    ("no options", lambda: envs.make("overcooked").reset(options={"speed": 2})),
    ("call reset", lambda: envs.make("overcooked").step(0)),
])
def test_wrong_input_is_refused_by_name(says, call):
    with pytest.raises(envs.EnvError, match=says) as refusal:
        call()
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("action", [5, -1, 1.0, True, None, "chop"])
def test_what_is_no_action_is_refused(action):
    with pytest.raises(envs.EnvError, match="from 0 to 4"):
        begun("overcooked").step(action)


def test_a_finished_episode_takes_no_step():
    env = envs.make("overcooked")
    play(env, TOMATO_SALAD)
    with pytest.raises(envs.EnvError, match="ended"):
        env.step(0)


@pytest.mark.parametrize("name", list(envs.TASKS))
def test_a_state_of_another_task_or_version_is_refused_and_changes_nothing(name):
    env = begun(name)
    state = env.state_dict()
    wrong = [
        begun(name, envs.TASKS[name][1]).state_dict(),
        state | {"environment": "another"},
        state | {"world": state["world"] | {"extra": 1}},
        {key: value for key, value in state.items() if key != "phase"},
        {},
        None,
    ]
    for bad in wrong:
        with pytest.raises(envs.EnvError, match="needs a state of"):
            env.load_state_dict(bad)
        assert env.state_dict() == state


def test_other_nouns_rename_the_same_home():
    env = envs.make("virtualhome", "food-preparation", food="apple pie", appliance="oven")
    _, info = env.reset()
    assert "put the apple pie in the oven" in env.action_names
    assert "applepie_in_oven" in env.feature_names
    assert info["state"]["nouns"] == {"food": "apple pie", "appliance": "oven"}
    assert info["state"]["visible"] == ["food", "appliance"]
    _, info = envs.make("virtualhome", "laundry").reset()
    assert info["state"]["nouns"] == {"food": "clothes", "appliance": "washing machine"}


@pytest.mark.parametrize("name", ["Overcooked", "VirtualHome"])
@pytest.mark.filterwarnings("error::UserWarning")
def test_gymnasium_accepts_them(name):
    gymnasium = pytest.importorskip("gymnasium")
    from gymnasium.utils.env_checker import check_env
    options = {"Overcooked": {"view": 10}, "VirtualHome": {"mask": False}}[name]
    for task in envs.TASKS[name.lower()]:
        for given in ({}, options):
            env = gymnasium.make(f"twosome/{name}-v0", task=task, **given)
            check_env(env.unwrapped, skip_render_check=True)


def test_they_work_without_gymnasium():
    script = (
        "import sys; sys.modules['gymnasium'] = None\n"
        "import envs\n"
        "assert not {'torch', 'transformers', 'ppo', 'prompts'} & sys.modules.keys()\n"
        "env = envs.make('overcooked'); env.reset(seed=0)\n"
        "assert not hasattr(env, 'action_space')\n"
        "print(env.step(0)[4]['duration']); env.close()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "2", done.stderr


# The recordings are described in tests/data/README.md.

def recordings():
    """Yield (environment, task, what was recorded) of every task."""
    for name in ("overcooked", "virtualhome"):
        with gzip.open(ROOT / f"tests/data/{name}.json.gz") as file:
            for task, record in json.load(file).items():
                yield name, task, record


def told(env, record, obs, info):
    """Return (features, admissible actions) in the order of a recording."""
    features = [round(float(feature(env, obs, name)), 6) for name in record["features"]]
    admissible = [env.action_names[index] for index in info["admissible"]]
    return features, sorted(record["actions"].index(name) for name in admissible)


def replay(env, record, episode):
    """Assert that the environment answers to one episode as it was recorded. Count its steps."""
    home = env.name == "virtualhome"
    features, admissible = told(env, record, *env.reset())
    assert features == episode["reset"]
    assert not home or admissible == sorted(episode["mask"])
    for action, after, recorded, end, extra in episode["steps"]:
        name = record["actions"][action]
        obs, reward, terminated, truncated, info = env.step(env.action_names.index(name))
        features, admissible = told(env, record, obs, info)
        assert reward == pytest.approx(recorded, abs=2e-6), name
        assert terminated == end and not truncated, name
        assert home or info["duration"] == extra, name
        assert (end and not home) or features == after, name
        assert not home or extra is None or admissible == sorted(extra), name
    return len(episode["steps"])


def test_every_recorded_transition_is_reproduced():
    count = 0
    for name, task, record in recordings():
        env = envs.make(name, task)
        count += sum(replay(env, record, episode) for episode in record["episodes"])
    assert count == 27_625

"""The environments against what the paper's rules say by hand, against exhaustive search, and against recordings where they lie."""
import json
import math
import os
import pathlib
import random
import subprocess
import sys

import pytest
from conftest import reachable

import envs

ROOT = pathlib.Path(__file__).resolve().parent.parent
RECORDINGS = pathlib.Path(os.environ.get("TWOSOME_RECORDINGS", ROOT.parent / "shared/golden")) / "check.py"
EVERY_TASK = [(name, task) for name, tasks in envs.TASKS.items() for task in tasks]
DISTINCT = [("overcooked", "tomato-salad"), ("overcooked", "tomato-lettuce-salad"),
            ("virtualhome", "food-preparation"), ("virtualhome", "entertainment")]
HOLD_CHOPPED = ["get tomato", "go to board 1", "chop", "get tomato"]  # 2 + 5 + 3 + 1 primitive steps


def play(env, actions):
    """-> (return from the start, the steps' answers). The return is summed as the module's docstring defines it."""
    total, steps, answers = 0.0, 0, []
    env.reset()
    for action in actions:
        answers.append(env.step(env.action_names.index(action)))
        total += env.gamma**steps * answers[-1][1]
        steps += answers[-1][4]["duration"]
    return total, answers


def begun(name, task=None):
    env = envs.make(name, task)
    env.reset()
    return env


def durations(actions, task="tomato-salad"):
    return [info["duration"] for *_, info in play(envs.make("overcooked", task), actions)[1]]


def feature(env, obs, name):
    return obs[env.feature_names.index(name)]


SOLUTIONS = [
    ("overcooked", "tomato-salad", [*HOLD_CHOPPED, "get bowl", "deliver"], 28, 0.9205),
    ("overcooked", "tomato-lettuce-salad", ["get tomato", "go to board 1", "chop", "get lettuce", "go to board 2", "chop",
                                            "get bowl", "get tomato", "get lettuce", "deliver"], 45, 0.9477),
    ("virtualhome", "food-preparation", ["walk to the pancake", "grab the pancake", "walk to the microwave", "open the microwave",
                                         "put the pancake in the microwave", "close the microwave"], 6, 0.7738),
    ("virtualhome", "entertainment", ["walk to the chips", "grab the chips", "walk to the milk", "grab the milk",
                                      "walk to the living room", "walk to the coffee table", "put the chips on the coffee table",
                                      "walk to the TV", "turn on the TV", "walk to the sofa", "sit on the sofa"], 11, 0.5987),
]


@pytest.mark.parametrize("name, task, actions, steps, best", SOLUTIONS)
def test_known_solutions_take_the_published_steps_and_return(name, task, actions, steps, best):
    env = envs.make(name, task)
    obs, info = env.reset()
    for action in actions:
        index = env.action_names.index(action)
        assert index in info["admissible"] and "success" not in info
        obs, _, terminated, truncated, info = env.step(index)
    assert terminated and not truncated and info["success"] is True and env.elapsed == steps
    assert play(env, actions)[0] == pytest.approx(best, abs=5e-5) == env.best_return


@pytest.mark.parametrize("name, task", EVERY_TASK)
def test_best_return_is_what_exhaustive_search_finds(name, task):
    env = begun(name, task)
    key = lambda state: json.dumps(state["world"], sort_keys=True)
    queue, number, edges = [env.state_dict()], {}, []
    number[key(queue[0])] = 0
    for state in queue:
        edges.append([])
        for action in range(len(env.action_names)):
            env.load_state_dict(state)
            _, reward, terminated, _, info = env.step(action)
            after = env.state_dict() | {"phase": "running", "elapsed": 0}
            to = 0 if terminated else number.setdefault(key(after), len(queue))
            if to == len(queue):
                queue.append(after)
            edges[-1].append((reward, 0.0 if terminated else env.gamma**info["duration"], to))
    values, change = [0.0] * len(edges), 1.0
    while change > 1e-9:  # value iteration
        new = [max(reward + discount * values[to] for reward, discount, to in row) for row in edges]
        values, change = new, max(abs(a - b) for a, b in zip(new, values))
    assert values[0] == pytest.approx(env.best_return, abs=1e-6)


def test_best_return_is_unknown_under_other_rules():
    assert envs.make("overcooked", gamma=0.95).best_return is None and envs.make("overcooked", max_steps=20).best_return is None
    assert envs.make("virtualhome", gamma=0.9).best_return == pytest.approx(0.9**5)


def test_rewards_are_discounted_inside_a_macro_action():
    _, answers = play(envs.make("overcooked"), HOLD_CHOPPED)
    walk = lambda n: -0.001 * (1 - 0.99**n) / 0.01
    assert [answer[1] for answer in answers] == pytest.approx([walk(2), walk(5), walk(3) + 0.99**2 * 0.2, walk(1)])
    last = play(envs.make("overcooked"), [*HOLD_CHOPPED, "get bowl", "deliver"])[1][-1]
    assert last[1] == pytest.approx(walk(7) + 0.99**6 * 1.0)  # from (5, 5) to (3, 1): six moves and the delivery
    onion = play(envs.make("overcooked", "tomato-lettuce-salad"), ["get onion", "go to board 1", "chop"])[1]
    assert onion[-1][1] == pytest.approx(walk(3)) and onion[-1][4]["state"]["chops"]["onion"] == 3  # not of the recipe


def test_a_wrong_delivery_costs_and_puts_back_what_was_delivered():
    env = envs.make("overcooked", "tomato-lettuce-salad")
    obs, reward, terminated, _, info = play(env, [*HOLD_CHOPPED, "get bowl", "deliver"])[1][-1]
    assert reward == pytest.approx(-0.001 * (1 - 0.99**7) / 0.01 - 0.1 * 0.99**6) and not terminated
    world, start = env.state_dict()["world"], envs.make("overcooked", "tomato-lettuce-salad").state_dict()["world"]
    assert world == start | {"agent": [3, 1]} and info["state"]["next_to"] == ["delivery"]
    play(env, [*HOLD_CHOPPED, "go to board 1", "get lettuce", "deliver"])  # the tomato stays chopped on its board
    assert env.state_dict()["world"]["chops"]["tomato"] == 3 and env.lying["tomato"] == (1, 0)


def test_view_is_two_cells_and_the_state_tells_no_more():
    env = envs.make("overcooked", "tomato-lettuce-salad")
    obs, info = env.reset()  # at (1, 4): tomato (0, 5), lettuce (1, 6), onion (2, 6) are in view, the bowl (6, 5) is not
    assert info["state"]["places"] == {"tomato": "counter", "lettuce": "counter", "onion": "counter"}
    assert [feature(env, obs, f"bowl_{axis}") for axis in "xy"] == [0, 0] and feature(env, obs, "onion_x") == 2
    obs, info = play(env, ["get bowl"])[1][-1][::4]
    assert info["state"]["places"] == {"bowl": "hand"} and info["state"]["chops"] == {} and info["state"]["next_to"] == []
    obs, info = play(env, ["get tomato"])[1][-1][::4]
    assert info["state"]["next_to"] == ["lettuce"] and info["state"]["holding"] == "tomato"


def test_idle_and_special_durations():
    assert durations(["chop", "get tomato", "get tomato", "chop"]) == [1, 2, 1, 1]
    assert durations(["deliver", "deliver", "go to board 1", "go to board 1"]) == [5, 1, 2, 1]
    assert durations(["get tomato", "go to board 1", "get tomato", "deliver", "get tomato"]) == [2, 5, 1, 2, 2]  # left unchopped
    assert durations(["get tomato", "get bowl", "get bowl", "get bowl"]) == [2, 5, 1, 1]  # an unchopped food does not go in
    assert durations([*HOLD_CHOPPED, "get bowl", "get tomato", "get bowl"])[4:] == [10, 1, 1]  # 8 moves, put in, take
    on_board = ["get bowl", "go to board 2", "get tomato", "go to board 1", "chop", "get tomato", "get bowl"]
    answers = play(envs.make("overcooked", "tomato-lettuce-salad"), on_board)[1]
    assert answers[-1][4]["duration"] == 3 and answers[-1][4]["state"]["places"] == {
        "tomato": "bowl", "bowl": "hand"}  # one move, put in (the bowl comes to hand), one idle step
    hand_full = ["get tomato", "go to board 1", "get bowl", "go to board 1", "chop"]
    answers = play(envs.make("overcooked"), hand_full)[1]
    assert answers[-1][4]["duration"] == 3 and answers[-1][4]["state"]["chops"] == {"tomato": 0}
    away = [*HOLD_CHOPPED, "get bowl", "go to board 1", "get lettuce", "get tomato"]  # in the bowl, seen from two cells away
    assert durations(away, "lettuce-salad")[-1] == 4


def test_the_time_limit_is_a_truncation_between_macro_actions():
    env = envs.make("overcooked", max_steps=8)
    _, answers = play(env, ["get tomato", "go to board 1", "chop"])  # 2, 7, then 10 steps: the chop is not cut
    assert [answer[2:4] for answer in answers] == [(False, False), (False, False), (False, True)]
    assert env.elapsed == 10 and answers[-1][4]["success"] is False
    home = play(envs.make("virtualhome"), ["open the microwave"] * 50)[1]
    assert [answer[3] for answer in home] == [False] * 49 + [True]
    assert play(envs.make("overcooked", max_steps=28), SOLUTIONS[0][2])[1][-1][2:4] == (True, False)


def test_home_actions_without_their_precondition_do_nothing():
    env = envs.make("virtualhome", "entertainment")
    before, _ = env.reset()
    for action in ("grab the chips", "turn on the TV", "walk to the TV", "sit on the sofa", "put the milk on the coffee table"):
        obs, reward, *_ = env.step(env.action_names.index(action))
        assert (obs == before).all() and reward == 0
    both = ["walk to the chips", "grab the chips", "walk to the milk", "grab the milk", "walk to the living room"]
    info = play(env, [*both, "walk to the TV", "turn on the TV"])[1][-1][4]
    assert info["state"]["on"] == [] and info["state"]["close"] == ["tv"]  # no hand is free
    info = play(env, [*both, "walk to the sofa", "sit on the sofa", "walk to the kitchen"])[1][-1][4]
    assert info["state"]["room"] == "living room" and info["state"]["sitting"]
    assert play(env, ["walk to the living room", "walk to the TV"])[1][-1][4]["admissible"] == []  # published: an empty mask


def test_walking_to_a_container_or_to_what_is_in_it_is_close_to_both():
    env = envs.make("virtualhome")
    put_in = [*SOLUTIONS[2][2][:-1], "walk to the bedroom", "walk to the kitchen"]
    for goal in ("walk to the microwave", "walk to the pancake"):
        state = play(env, [*put_in, goal])[1][-1][4]["state"]
        assert state["close"] == ["food", "appliance"] and state["placed"] == {"food": "appliance"}
    state = play(env, [*put_in, "walk to the pancake", "grab the pancake", "walk to the bedroom"])[1][-1][4]["state"]
    assert state["holding"] == ["food"] and state["placed"] == {} and state["open"] == []  # the open microwave is out of view


@pytest.mark.parametrize("name, task, episodes, rate, mean", [
    ("overcooked", "tomato-salad", 500, 0.43, -0.09), ("overcooked", "tomato-lettuce-salad", 600, 0.013, -0.23),
    ("virtualhome", "food-preparation", 1000, 0.014, 0.0), ("virtualhome", "entertainment", 500, 0.0, 0.0)])
def test_random_policy_delivers_as_often_as_published(name, task, episodes, rate, mean):
    env, rng, returns, successes = envs.make(name, task), random.Random(0), [], 0
    for _ in range(episodes):
        (_, info), total, steps = env.reset(), 0.0, 0
        while "success" not in info:
            _, reward, _, _, info = env.step(rng.choice(info["admissible"] or range(len(env.action_names))))
            total, steps = total + env.gamma**steps * reward, steps + info["duration"]
        returns.append(total)
        successes += info["success"]
    deviation = math.sqrt(sum((x - sum(returns) / episodes) ** 2 for x in returns) / episodes)
    assert successes / episodes == pytest.approx(rate, abs=0.005 + 3.3 * math.sqrt(rate * (1 - rate) / episodes))
    assert sum(returns) / episodes == pytest.approx(mean, abs=0.005 + 3.3 * deviation / math.sqrt(episodes))


@pytest.mark.parametrize("name, task", DISTINCT)
def test_equal_features_have_equal_states_and_masks(name, task):
    told = {}
    for obs, info in reachable(envs.make(name, task)):
        assert json.loads(json.dumps(info["state"])) == info["state"]
        assert told.setdefault(obs.tobytes(), (info["state"], info["admissible"])) == (info["state"], info["admissible"])
    assert len(told) > 10


@pytest.mark.parametrize("name, task", DISTINCT)
def test_a_saved_state_continues_identically(name, task):
    env, twin, rng = envs.make(name, task), envs.make(name, task), random.Random(1)
    env.reset()
    for _ in range(60):
        saved = json.loads(json.dumps(env.state_dict()))
        twin.load_state_dict(saved)
        assert twin.state_dict() == env.state_dict() == saved and twin.observe()[1] == env.observe()[1]
        if env.phase != "running":
            env.reset(), twin.reset()
        action = rng.randrange(len(env.action_names))
        (obs, *answer), (twin_obs, *twin_answer) = env.step(action), twin.step(action)
        assert (obs == twin_obs).all() and answer == twin_answer


@pytest.mark.parametrize("error, says, call", [
    (envs.UnknownNameError, "did you mean 'overcooked'", lambda: envs.make("overcookd")),
    (envs.UnknownNameError, "known: overcooked", lambda: envs.make(None)),
    (envs.UnknownNameError, "did you mean 'tomato-salad'", lambda: envs.make("overcooked", "tomatosalad")),
    (envs.UnknownNameError, "known: task|known: gamma", lambda: envs.make("overcooked", food="lasagna")),
    (envs.OptionError, "gamma", lambda: envs.make("overcooked", gamma=1.5)),
    (envs.OptionError, "max_steps", lambda: envs.make("overcooked", max_steps=True)),
    (envs.OptionError, "has no food", lambda: envs.make("virtualhome", "entertainment", food="lasagna")),
    (envs.OptionError, "single spaces", lambda: envs.make("virtualhome", food="")),
    (envs.OptionError, "two nouns", lambda: envs.make("virtualhome", food="oven", appliance="oven")),
    (envs.OptionError, "two nouns", lambda: envs.make("virtualhome", food="kitchen")),
    (envs.OptionError, "no options", lambda: envs.make("overcooked").reset(options={"speed": 2})),
    (envs.EpisodeError, "reset", lambda: envs.make("overcooked").step(0)),
    *((envs.ActionError, "0 to 4", lambda bad=bad: begun("overcooked").step(bad)) for bad in (5, -1, 1.0, True, None, "chop")),
])
def test_wrong_input_is_refused_by_name(error, says, call):
    with pytest.raises(error, match=says):
        call()
    assert issubclass(error, envs.EnvError)


def test_a_finished_episode_takes_no_step():
    env = envs.make("overcooked")
    play(env, SOLUTIONS[0][2])
    with pytest.raises(envs.EpisodeError, match="ended"):
        env.step(0)


@pytest.mark.parametrize("name, change", [
    ("overcooked", {"agent": [0, 0]}), ("overcooked", {"holding": "bowl"}), ("overcooked", {"chops": {"tomato": 4}}),
    ("overcooked", {"lying": {"tomato": [0, 5], "bowl": [0, 5]}}), ("overcooked", {"lying": None}), ("overcooked", {"extra": 1}),
    ("virtualhome", {"room": "attic"}), ("virtualhome", {"held": ["food"]}), ("virtualhome", {"open": ["food"]}),
    ("virtualhome", {"placed": {"food": "sofa"}}), ("virtualhome", {"sitting": True}), ("virtualhome", {"near": [["food"]]})])
def test_a_wrong_state_is_refused_and_changes_nothing(name, change):
    env = begun(name)
    state = env.state_dict()
    wrong = [state | {"world": state["world"] | change}, state | {"task": "laundry"}, state | {"elapsed": -1}, {}, None]
    for bad in wrong:
        with pytest.raises(envs.StateError):
            env.load_state_dict(bad)
        assert env.state_dict() == state


def test_other_nouns_rename_the_same_home():
    env = envs.make("virtualhome", "food-preparation", food="apple pie", appliance="oven")
    _, info = env.reset()
    assert "put the apple pie in the oven" in env.action_names and "applepie_in_oven" in env.feature_names
    assert info["state"]["nouns"] == {"food": "apple pie", "appliance": "oven"} and info["state"]["visible"] == ["food", "appliance"]
    assert envs.make("virtualhome", "laundry").reset()[1]["state"]["nouns"] == {"food": "clothes", "appliance": "washing machine"}


@pytest.mark.parametrize("name", ["twosome/Overcooked-v0", "twosome/VirtualHome-v0"])
@pytest.mark.filterwarnings("error::UserWarning")
def test_gymnasium_accepts_them(name):
    gymnasium = pytest.importorskip("gymnasium")
    from gymnasium.utils.env_checker import check_env
    for task in envs.TASKS["overcooked" if "Overcooked" in name else "virtualhome"]:
        check_env(gymnasium.make(name, task=task).unwrapped, skip_render_check=True)


def test_they_work_without_gymnasium():
    script = ("import sys; sys.modules['gymnasium'] = None; import envs; env = envs.make('overcooked'); env.reset(seed=0); "
              "assert not hasattr(env, 'action_space'); print(env.step(0)[4]['duration']); env.close()")
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "2", done.stderr


@pytest.mark.skipif(not RECORDINGS.exists(), reason="the recordings lie outside the repository")
def test_every_recorded_transition_is_reproduced():
    done = subprocess.run([sys.executable, str(RECORDINGS)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip().endswith("27625 passed, 0 failed"), done.stdout + done.stderr

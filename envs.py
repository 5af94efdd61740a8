"""The two environments of TWOSOME: a partially observed Overcooked kitchen and a VirtualHome-style home.

Reference: Tan et al., "True Knowledge Comes from Practice: Aligning LLMs with Embodied Environments via Reinforcement
Learning", ICLR 2024, arXiv 2401.14151, section 5. Needs numpy alone and imports nothing of the project: copy it as it is. With
gymnasium installed the classes are gymnasium.Env with spaces, registered as "twosome/Overcooked-v0" and
"twosome/VirtualHome-v0"; without it they are plain classes with the same methods.

    import envs
    env = envs.make("overcooked", task="tomato-lettuce-salad")
    obs, info = env.reset()                               # float32; obs[i] is the value of env.feature_names[i]
    obs, reward, terminated, truncated, info = env.step(env.action_names.index("get tomato"))
    envs.make("virtualhome", task="food-preparation", food="lasagna", appliance="oven")     # same dynamics, other nouns

Map: errors; _Env, what both share; Overcooked: LAYOUTS, OVERCOOKED_TASKS, the class; VirtualHome: OBJECTS, GOALS, ACTIONS,
FEATURES, HOME_TASKS, the class; make and registration.

info, after reset and after every step
    state       named state, JSON-able, for a text layer to render. It never tells more than the observation: equal
                observations have equal states, so an MLP and an LLM play the same game.
    admissible  indices of the actions that the published mask lets a policy choose from. It can be EMPTY (see _stuck): read
                that as "no advice, choose among all", as the recorded episodes do.
    duration    primitive steps of the last action (0 after reset): a semi-Markov learner discounts by gamma**duration
    success     only when the episode has ended: whether the task was done

The return of an episode is the sum of gamma**k r_k over its primitive steps k = 0, 1, ... An action of several steps answers with
its own part, discounted from its own start; so the return is also the sum over actions of gamma**(steps before) * reward. In
the home every action is one step. env.best_return is the largest return from the start (None where unknown).

Where a rule comes from is marked: "paper"; "published" (the authors' scripts, and recorded episodes of their simulators); "our
choice". Deliberate deviations: a time limit is a truncation, not a termination; wrong input raises.
"""
from __future__ import annotations

import difflib
import functools
import inspect
import operator
from typing import Callable, NamedTuple

import numpy as np

try:
    import gymnasium
except ImportError:  # optional: only spaces and registration depend on it
    gymnasium = None


# ------------------------------------------------------------------------------------------------------------- errors
class EnvError(ValueError): """Anything this module refuses, in one line: what was wrong, and what would be right."""
class UnknownNameError(EnvError): """No such environment, task or option."""
class OptionError(EnvError): """The option exists, its value cannot be used."""
class ActionError(EnvError): """Not the index of an action."""
class EpisodeError(EnvError): """A step before reset, or after the end of the episode."""
class StateError(EnvError): """load_state_dict was given something that state_dict of this task never returns."""


def _known(kind, name, known):
    """name, if it is one of the known; else an error that lists them and, for a slip of the pen, names the nearest."""
    if isinstance(name, str) and name in known:
        return name
    near = difflib.get_close_matches(str(name), list(known), n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    raise UnknownNameError(f"unknown {kind} {name!r}{hint}; known: {', '.join(known) or 'none'}")


def _require(true, message, *values):
    if not true:
        raise StateError("not a state of this task: " + message.format(*values))


# -------------------------------------------------------------------------------------------- what both environments share
class _Env(gymnasium.Env if gymnasium else object):
    """Episode bookkeeping around six methods of a subclass.

    _start() puts the world in its first state.          _act(index) -> (reward, primitive steps, task done)
    _features() -> list of numbers                       _named_state() -> dict
    _admissible() -> list of indices                     _world() -> dict, _set_world(dict): the world, JSON-able

    Both worlds are deterministic and start always the same: a seed is accepted, as Gymnasium asks, and changes nothing.
    """

    metadata = {"render_modes": []}

    def _setup(self, task, gamma, max_steps, high):
        number = isinstance(gamma, (int, float)) and not isinstance(gamma, bool)
        if not number or not 0 < gamma <= 1:
            raise OptionError(f"gamma must be a number in (0, 1], got {gamma!r}")
        if not isinstance(max_steps, int) or isinstance(max_steps, bool) or max_steps < 1:
            raise OptionError(f"max_steps must be a positive integer, got {max_steps!r}")
        self.task, self.gamma, self.max_steps = task, float(gamma), max_steps
        if gymnasium:
            high = np.asarray(high, dtype=np.float32)
            self.observation_space = gymnasium.spaces.Box(np.zeros_like(high), high, dtype=np.float32)
            self.action_space = gymnasium.spaces.Discrete(len(self.action_names))
        self._begin("new")

    def _begin(self, phase):
        # phase: "new" (before reset), "running", "success" or "failure" (the episode has ended)
        self.phase, self.elapsed, self.duration = phase, 0, 0
        self._start()

    def reset(self, seed=None, options=None):
        """-> (obs, info). seed is accepted and changes nothing; there are no reset options."""
        if options:
            raise OptionError(f"reset takes no options, got {options!r}")
        if gymnasium:
            super().reset(seed=seed)  # Gymnasium's own random generator, for whoever reads env.np_random
        self._begin("running")
        return self.observe()

    def step(self, action):
        """-> (obs, reward, terminated, truncated, info). One macro-action; the time limit is looked at after it (published)."""
        if self.phase != "running":
            raise EpisodeError("no episode has begun; call reset() first" if self.phase == "new" else
                               "the episode has ended; call reset() to begin the next")
        reward, self.duration, done = self._act(self._index(action))
        self.elapsed += self.duration
        truncated = not done and self.elapsed >= self.max_steps
        if done or truncated:
            self.phase = "success" if done else "failure"
        obs, info = self.observe()
        return obs, reward, done, truncated, info

    def close(self):
        """Nothing to release; here for callers that treat every environment alike."""

    def observe(self):
        """-> (obs, info) of the present moment, as the last reset or step gave them: what a resumed run continues from."""
        info = {"state": self._named_state(), "admissible": self._admissible(), "duration": self.duration}
        if self.phase in ("success", "failure"):
            info["success"] = self.phase == "success"
        return np.array(self._features(), dtype=np.float32), info

    def _index(self, action):
        """The action as an int. A bool is refused: True would otherwise pass for action 1."""
        try:
            index = -1 if "bool" in str(getattr(action, "dtype", type(action))) else operator.index(action)
        except TypeError:
            index = -1
        if not 0 <= index < len(self.action_names):
            raise ActionError(f"action must be an integer from 0 to {len(self.action_names) - 1}, got {action!r}")
        return index

    def state_dict(self):
        """All that changes during an episode, JSON-able; load_state_dict restores it exactly."""
        return {"environment": self.name, "task": self.task, "phase": self.phase, "elapsed": self.elapsed,
                "duration": self.duration, "world": self._world()}

    def load_state_dict(self, state):
        """Continue from a state_dict of the same task; a StateError leaves the environment as it was."""
        now = self.state_dict()
        _require(isinstance(state, dict) and state.keys() == now.keys(), "its keys must be {}", ", ".join(now))
        for key in ("environment", "task"):
            _require(state[key] == now[key], "{} is {!r}, here it is {!r}", key, state[key], now[key])
        _require(state["phase"] in ("new", "running", "success", "failure"), "phase {!r}", state["phase"])
        for key in ("elapsed", "duration"):
            _require(type(state[key]) is int and state[key] >= 0, "{} {!r} is not a count", key, state[key])
        world = state["world"]
        _require(isinstance(world, dict) and world.keys() == now["world"].keys(),
                 "its world's keys must be {}", ", ".join(now["world"]))
        try:
            self._set_world(world)  # changes nothing unless all of it is right
        except StateError:
            raise
        except (TypeError, AttributeError, KeyError, ValueError) as error:  # a list where a name belongs, and the like
            raise StateError(f"not a state of this task: {world!r} ({error})") from error
        self.phase, self.elapsed, self.duration = state["phase"], state["elapsed"], state["duration"]


# ----------------------------------------------------------------------------------------------------------- Overcooked
# Row x from the top, column y from the left. W counter, . floor, A the agent's start (floor), T tomato, L lettuce, O onion,
# B bowl, K cutting board, D delivery counter. (paper)
LAYOUTS = {
    "one food": """
        W W W W W T W
        K . . . A . W
        W . . . . . W
        D . . . . . W
        W . . . . . W
        W . . . . . W
        W W W W W B W""",
    "three foods": """
        W W W W W T W
        K . . . A . L
        K . . . . . O
        D . . . . . W
        W . . . . . W
        W . . . . . W
        W W W W W B W""",
}
FOODS = {"T": "tomato", "L": "lettuce", "O": "onion"}  # symbol -> name; their order is the order of features and actions
DIRECTIONS = ((0, 1), (1, 0), (0, -1), (-1, 0))  # right, down, left, up: the order in which "chop" looks for a board


class Recipe(NamedTuple):
    layout: str
    foods: tuple  # what the delivered bowl must hold, and nothing else
    best: float   # best return at gamma 0.99, found by exhaustive search (tests/test_envs.py repeats it)


OVERCOOKED_TASKS = {
    "tomato-salad": Recipe("one food", ("tomato",), 0.920518),
    "lettuce-salad": Recipe("three foods", ("lettuce",), 0.920518),
    "onion-salad": Recipe("three foods", ("onion",), 0.918691),
    "tomato-lettuce-salad": Recipe("three foods", ("tomato", "lettuce"), 0.947656),
    "tomato-onion-salad": Recipe("three foods", ("tomato", "onion"), 0.947656),
    "lettuce-onion-salad": Recipe("three foods", ("lettuce", "onion"), 0.947656),
    "tomato-lettuce-onion-salad": Recipe("three foods", ("tomato", "lettuce", "onion"), 0.944705),
}

VIEW = 2                # Chebyshev distance that the agent sees (paper: a 5 x 5 square around it)
CHOPS = 3               # chops that make a food chopped
STEP_REWARD = -0.001    # every primitive step                                       these four: paper
CHOP_REWARD = 0.2       # the moment a food of the recipe becomes chopped
DELIVERY_REWARD = 1.0   # the recipe's foods in the bowl, delivered
MISTAKE_REWARD = -0.1   # anything else delivered


class _Kitchen:
    """A layout read once: where things are, what is seen from each floor cell, and the shortest way to each counter."""

    def __init__(self, text):
        rows = [line.split() for line in text.strip().splitlines()]
        cells = {(x, y): symbol for x, row in enumerate(rows) for y, symbol in enumerate(row)}
        where = {symbol: cell for cell, symbol in cells.items()}
        boards = [cell for cell, symbol in cells.items() if symbol == "K"]
        self.size = len(rows), len(rows[0])
        self.start, self.delivery = where["A"], where["D"]
        self.foods = [name for symbol, name in FOODS.items() if symbol in where]
        self.home = {name: where[symbol] for symbol, name in FOODS.items() if symbol in where} | {"bowl": where["B"]}
        self.boards = {f"board{n}": cell for n, cell in enumerate(boards, 1)}
        self.board_at = {cell: board for board, cell in self.boards.items()}
        self.floor = {cell for cell, symbol in cells.items() if symbol in ".A"}
        self.counters = set(cells) - self.floor
        self.beside = {(x, y): [(x + dx, y + dy) for dx, dy in DIRECTIONS] for x, y in self.floor}
        self.view = {(x, y): {(a, b) for a, b in cells if max(abs(a - x), abs(b - y)) <= VIEW} for x, y in self.floor}
        self.way = {cell: self._ways(cell) for cell in self.floor}

    def _ways(self, start):
        """{counter cell: [floor cells of a shortest way until next to it]}, breadth first.

        Which of several shortest ways is taken shows only where a walk ends early (see _get_food). Our choice: the one that
        breadth-first search in the order of DIRECTIONS finds first; it agrees with every recording.
        """
        paths, queue, ways = {start: []}, [start], {}
        for cell in queue:
            for near in self.beside[cell]:
                if near in self.counters:
                    ways.setdefault(near, paths[cell])
                elif near not in paths:
                    paths[near] = [*paths[cell], near]
                    queue.append(near)
        return ways


@functools.cache
def _kitchen(layout):
    return _Kitchen(LAYOUTS[layout])


class Overcooked(_Env):
    """A 7 x 7 kitchen seen in part by one agent who makes a salad: chop the recipe's foods, put them in the bowl, deliver it.

    ACTIONS (macro-actions; all are always admissible, an impossible one costs a step or more and changes nothing)
        get <food>, get bowl    walk a shortest path until next to where it truly is, then act on it. One idle step if it is
                                held. A food in the bowl: until the bowl is in view, and one idle step. An unchopped food on a
                                board is approached and left alone. With a chopped food in hand, "get bowl" puts it in the
                                bowl and then takes the bowl.
        go to board <n>, deliver  walk next to it; holding something, act on it; one idle step if already there, empty-handed
        chop                    an unchopped food on a board next to the agent: three chops, one step each; else one idle step
      One primitive step: move to a neighbouring floor cell, or act on a neighbouring counter cell (see _touch).

    OBSERVATION (float32; raw numbers; 0 for what is not in view, which is a 5 x 5 square around the agent)
        row, column and chops (0 to 3) of each food; row and column of bowl, boards, "counter" (the delivery), agent.
        A held thing is where the agent is; a food in the bowl is where the bowl is.

    REWARDS (paper) -0.001 a primitive step, +0.2 when a food of the recipe becomes chopped, +1 for the correct delivery,
        -0.1 for any other, which also puts what was delivered back where it began, emptied and unchopped. gamma 0.99
        (published) applies per primitive step, inside a macro-action too.

    TERMINATION at the correct delivery. TRUNCATION after 200 primitive steps, looked at between macro-actions (published).

    TASKS a key of TASKS["overcooked"]. tomato-salad has the kitchen with one food and 5 actions, the others 8 actions.

    NAMED STATE (info["state"])
        environment, recipe, foods, boards: what the task is made of
        places   {food or "bowl", if in view: "hand", "bowl" (in it), "board1", "board2" or "counter"}
        chops    {food, if in view: 0..3}            holding  None, a food or "bowl"
        next_to  boards, "delivery", and foods and "bowl" lying on a counter, orthogonally next to the agent. What lies ON a
                 board is not repeated here: places says so, and the board is named.
    """

    name = "overcooked"

    def __init__(self, task="tomato-salad", gamma=0.99, max_steps=200):
        recipe = OVERCOOKED_TASKS[_known("overcooked task", task, OVERCOOKED_TASKS)]
        kitchen = self._kitchen = _kitchen(recipe.layout)
        self.recipe, self.foods = recipe.foods, kitchen.foods
        # The table of actions: name, method, its argument.
        self._actions = [
            *((f"get {food}", Overcooked._get_food, food) for food in self.foods),
            ("get bowl", Overcooked._get_bowl, None),
            *((f"go to board {n}", Overcooked._go_to, cell) for n, cell in enumerate(kitchen.boards.values(), 1)),
            ("deliver", Overcooked._go_to, kitchen.delivery),
            ("chop", Overcooked._chop, None),
        ]
        self.action_names = [name for name, _, _ in self._actions]
        xy, high = ("x", "y"), [size - 1 for size in kitchen.size]
        self.feature_names = [f"{food}_{field}" for food in self.foods for field in (*xy, "chops")] + [
            f"{thing}_{field}" for thing in ("bowl", *kitchen.boards, "counter", "agent") for field in xy]
        self._setup(task, gamma, max_steps, (*high, CHOPS) * len(self.foods) + (*high,) * (len(kitchen.boards) + 3))
        self.best_return = recipe.best if gamma == 0.99 and max_steps >= 200 else None

    # The world: agent (a floor cell), holding (None or an item), lying {item: counter cell}, in_bowl [foods], chops {food: 0..3}.
    # Every item is in exactly one of: the hand, lying, in_bowl.
    def _start(self):
        self.agent, self.holding = self._kitchen.start, None
        self.lying, self.in_bowl = dict(self._kitchen.home), []
        self.chops = dict.fromkeys(self.foods, 0)

    def _cell(self, item):
        if item in self.in_bowl:
            item = "bowl"
        return self.agent if item == self.holding else self.lying[item]

    def _unchopped(self, item):
        return self.chops.get(item, CHOPS) < CHOPS  # the bowl has no chops and counts as nothing to chop

    # ---- primitive steps: each adds its reward, discounted from the macro-action's start
    def _act(self, index):
        self._reward, self._steps, self._discount, self._delivered = 0.0, 0, 1.0, False
        _, method, argument = self._actions[index]
        method(self, argument)
        return self._reward, self._steps, self._delivered

    def _tick(self, reward=0.0):
        self._reward += self._discount * (STEP_REWARD + reward)
        self._discount *= self.gamma
        self._steps += 1

    def _walk(self, target, until_seen=False):
        """Until next to the target cell, or until it is in view; -> whether there was any way to go."""
        way = self._kitchen.way[self.agent][target]
        for cell in way:
            if until_seen and target in self._kitchen.view[self.agent]:
                break
            self.agent = cell
            self._tick()
        return bool(way)

    def _touch(self, cell):
        """One primitive step into a counter cell: take, chop, put down, fill the bowl or deliver, as hand and cell allow."""
        hand, board = self.holding, self._kitchen.board_at.get(cell)
        item = next((item for item, at in self.lying.items() if at == cell), None)
        reward = 0.0
        if cell == self._kitchen.delivery:
            reward = self._deliver()
        elif hand is None and item is not None:
            if board and self._unchopped(item):
                self.chops[item] += 1
                reward = CHOP_REWARD if item in self.recipe and self.chops[item] == CHOPS else 0.0
            else:
                del self.lying[item]
                self.holding = item
        elif hand is not None and item is None:
            self.lying[hand], self.holding = cell, None
        elif item == "bowl" and not self._unchopped(hand):
            self.in_bowl.append(hand)
            self.holding = None
            if board:  # published: on a board, the food goes in and the bowl comes to hand in the same step
                del self.lying["bowl"]
                self.holding = "bowl"
        elif hand == "bowl" and item is not None and not self._unchopped(item):
            del self.lying[item]
            self.in_bowl.append(item)
        self._tick(reward)

    def _deliver(self):
        if self.holding is None:
            return 0.0
        if self.holding == "bowl" and set(self.in_bowl) == set(self.recipe):
            self._delivered = True
            return DELIVERY_REWARD
        wasted = [self.holding, *(self.in_bowl if self.holding == "bowl" else ())]
        for item in wasted:
            self.lying[item] = self._kitchen.home[item]
        self.chops.update((food, 0) for food in wasted if food != "bowl")
        self.in_bowl, self.holding = [food for food in self.in_bowl if food not in wasted], None
        return MISTAKE_REWARD

    # ---- macro-actions
    def _get_food(self, food):
        cell = self._cell(food)
        if cell == self.agent:  # it is held, or in the bowl that is
            return self._tick()
        if food in self.in_bowl:  # published: the agent gives up once it sees that
            self._walk(cell, until_seen=True)
            return self._tick()
        walked = self._walk(cell)
        if not (cell in self._kitchen.board_at and self._unchopped(food)):
            self._touch(cell)
        elif not walked:
            self._tick()

    def _get_bowl(self, _):
        if self.holding == "bowl":
            return self._tick()
        cell, chopped_in_hand = self._cell("bowl"), self.holding is not None and not self._unchopped(self.holding)
        self._walk(cell)
        self._touch(cell)
        if chopped_in_hand:
            self._tick() if self.holding == "bowl" else self._touch(cell)

    def _go_to(self, cell):
        walked = self._walk(cell)
        if self.holding is not None:
            self._touch(cell)
        elif not walked:
            self._tick()

    def _chop(self, _):
        lying = {cell: item for item, cell in self.lying.items() if cell in self._kitchen.board_at and self._unchopped(item)}
        cell = next((cell for cell in self._kitchen.beside[self.agent] if cell in lying), None)
        if cell is None:
            return self._tick()
        for _ in range(CHOPS):
            self._tick() if self.holding else self._touch(cell)

    # ---- what is seen of it
    def _features(self):
        kitchen, view, unseen = self._kitchen, self._kitchen.view[self.agent], (0, 0)
        values = []
        for food in self.foods:
            cell = self._cell(food)
            values += (*cell, self.chops[food]) if cell in view else (0, 0, 0)
        for cell in (self._cell("bowl"), *kitchen.boards.values(), kitchen.delivery):
            values += cell if cell in view else unseen
        values += self.agent
        return values

    def _named_state(self):
        kitchen, near = self._kitchen, self._kitchen.beside[self.agent]
        view, places, lying_near = kitchen.view[self.agent], {}, []
        for item in (*self.foods, "bowl"):
            cell = self._cell(item)
            if cell not in view:
                continue
            if item == self.holding:
                places[item] = "hand"
            elif item in self.in_bowl:
                places[item] = "bowl"
            else:
                places[item] = kitchen.board_at.get(cell, "counter")
                if places[item] == "counter" and cell in near:
                    lying_near.append(item)
        fixtures = [board for board, cell in kitchen.boards.items() if cell in near]
        if kitchen.delivery in near:
            fixtures.append("delivery")
        return {"environment": self.name, "recipe": list(self.recipe), "foods": list(self.foods),
                "boards": list(kitchen.boards), "places": places,
                "chops": {food: self.chops[food] for food in self.foods if food in places},
                "holding": self.holding, "next_to": fixtures + lying_near}

    def _admissible(self):
        return list(range(len(self._actions)))  # published: no mask; the text alone says what is pointless now

    def _world(self):
        return {"agent": list(self.agent), "holding": self.holding,
                "lying": {item: list(cell) for item, cell in self.lying.items()},
                "in_bowl": [food for food in self.foods if food in self.in_bowl], "chops": dict(self.chops)}

    def _set_world(self, world):
        kitchen, items = self._kitchen, {*self.foods, "bowl"}
        agent = tuple(world["agent"])
        holding, in_bowl, chops = world["holding"], list(world["in_bowl"]), dict(world["chops"])
        lying = {item: tuple(cell) for item, cell in world["lying"].items()}
        placed = [*lying, *in_bowl, *([] if holding is None else [holding])]
        _require(agent in kitchen.floor, "the agent stands at {}, which is no floor", agent)
        _require(len(placed) == len(items) and set(placed) == items,
                 "each of {} must be in one place: held, lying or in the bowl", ", ".join((*self.foods, "bowl")))
        _require("bowl" not in in_bowl, "the bowl is in itself")
        _require(set(lying.values()) <= kitchen.counters - {kitchen.delivery} and len(set(lying.values())) == len(lying),
                 "things must lie on counter cells, one on each")
        _require(chops.keys() == set(self.foods) and all(type(n) is int and 0 <= n <= CHOPS for n in chops.values()),
                 "chops must be 0 to {} for each food", CHOPS)
        _require(not any(chops[food] < CHOPS for food in in_bowl), "an unchopped food is in the bowl")
        self.agent, self.holding, self.lying, self.in_bowl, self.chops = agent, holding, lying, in_bowl, chops


# ---------------------------------------------------------------------------------------------------------- VirtualHome
KITCHEN, BATHROOM, BEDROOM, LIVING_ROOM = ROOMS = ("kitchen", "bathroom", "bedroom", "living room")
HANDS = 2


class Thing(NamedTuple):
    room: str  # where it stands at the start
    can: str   # be "carry"-ied; "shut" (a container, shut at the start); "switch" (off at the start); "support" things; "seat"


# What each kind of task is played with. A thing is named by its part in the task; nouns ("pancake", "microwave") are filled into
# the names that people and language models read.
OBJECTS = {
    "food-preparation": {"food": Thing(KITCHEN, "carry"), "appliance": Thing(KITCHEN, "shut")},
    "entertainment": {"chips": Thing(KITCHEN, "carry"), "milk": Thing(KITCHEN, "carry"), "tv": Thing(LIVING_ROOM, "switch"),
                      "sofa": Thing(LIVING_ROOM, "seat"), "coffee table": Thing(LIVING_ROOM, "support")},
}

GOALS = {  # published
    "food-preparation": lambda h: (
        h.room == KITCHEN and h.placed.get("food") == "appliance" and "appliance" not in h.open),
    "entertainment": lambda h: (
        h.sitting and "tv" in h.on and all(x in h.near or h.placed.get(x) == "coffee table" for x in ("chips", "milk"))),
}


class Action(NamedTuple):
    name: str
    effect: Callable      # effect(home): does nothing where its precondition fails
    admissible: Callable  # admissible(home) -> bool: the published mask, narrower than the preconditions here, wider there


def _stuck(h):
    """Published: close to a TV that is off, empty-handed, nothing at all is admissible. Any action may still be sent."""
    return "tv" in h.near and "tv" not in h.on and not h.held


def _room_action(room):
    return Action(f"walk to the {room}", lambda h: h.walk_to_room(room), lambda h: h.room != room and not _stuck(h))


def _living_room_walk(name, thing):
    """Published: towards what is not close, unless seated, or at the coffee table with nothing to put there."""
    return Action(name, lambda h: h.walk_to(thing), lambda h: (
        h.room == LIVING_ROOM and thing not in h.near and not h.sitting and not _stuck(h)
        and ("coffee table" not in h.near or len(h.held) > 0)))


def _kitchen_walk(thing, other):
    """Published, a slip by the look of it: empty-handed, what counts is that the OTHER thing is still there."""
    return Action(f"walk to the {thing}", lambda h: h.walk_to(thing), lambda h: (
        h.room == KITCHEN and thing not in h.near and (thing if h.held else other) in h.seen))


def _kitchen_grab(thing):
    return Action(f"grab the {thing}", lambda h: h.grab(thing), lambda h: (
        h.room == KITCHEN and thing in h.near and thing not in h.held))


def _put_on_table(thing, other):
    """Published: advised while the other thing is not on the table yet (the second one is to stay in hand)."""
    return Action(f"put the {thing} on the coffee table", lambda h: h.put(thing, "coffee table"), lambda h: (
        thing in h.held and "coffee table" in h.near and h.placed.get(other) != "coffee table"))


_WALK_TO_ROOMS = [_room_action(room) for room in (LIVING_ROOM, KITCHEN, BATHROOM, BEDROOM)]

ACTIONS = {
    "food-preparation": [
        *_WALK_TO_ROOMS,
        Action("walk to the {food}", lambda h: h.walk_to("food"),
               lambda h: h.room == KITCHEN and ("food" in h.held or "food" not in h.near)),
        Action("walk to the {appliance}", lambda h: h.walk_to("appliance"),
               lambda h: h.room == KITCHEN and "appliance" not in h.near),
        Action("grab the {food}", lambda h: h.grab("food"),
               lambda h: "food" in h.near and "food" not in h.held and "appliance" not in h.near),
        Action("put the {food} in the {appliance}", lambda h: h.put("food", "appliance"),
               lambda h: "food" in h.held and "appliance" in h.near),
        Action("open the {appliance}", lambda h: h.open_it("appliance"), lambda h: "appliance" in h.near),
        Action("close the {appliance}", lambda h: h.close_it("appliance"), lambda h: "appliance" in h.near),
    ],
    "entertainment": [
        *_WALK_TO_ROOMS,
        _kitchen_walk("chips", "milk"),
        _kitchen_walk("milk", "chips"),
        _living_room_walk("walk to the coffee table", "coffee table"),
        _living_room_walk("walk to the TV", "tv"),
        _living_room_walk("walk to the sofa", "sofa"),
        _kitchen_grab("chips"),
        _kitchen_grab("milk"),
        _put_on_table("chips", "milk"),
        _put_on_table("milk", "chips"),
        Action("turn on the TV", lambda h: h.switch("tv", True),
               lambda h: "tv" in h.near and "tv" not in h.on and len(h.held) == 1),
        Action("turn off the TV", lambda h: h.switch("tv", False),  # published: advised while the TV is off, like "turn on"
               lambda h: "tv" in h.near and "tv" not in h.on and len(h.held) == 1),
        Action("sit on the sofa", lambda h: h.sit("sofa"), lambda h: "sofa" in h.near and "tv" in h.on and not h.sitting),
        Action("stand up from the sofa", lambda h: h.stand(),  # published: advised before sitting, not after
               lambda h: "sofa" in h.near and "tv" in h.on and not h.sitting),
    ],
}

# The observation: a feature's name (nouns are filled in without their spaces) and what makes it 1. A thing's own features are
# made by these three; is_face_tv and is_sit_sofa are one fact (published).
def _see_close(noun, thing):
    return [(f"see_{noun}", lambda h: thing in h.seen), (f"close_to_{noun}", lambda h: thing in h.near and thing in h.seen)]


def _hold(noun, thing):
    return f"hold_{noun}", lambda h: thing in h.held


def _placed(name, thing):
    return name, lambda h: thing in h.placed and thing in h.seen


_IN_ROOMS = [(f"in_{room.replace(' ', '')}", lambda h, room=room: h.room == room) for room in ROOMS]

FEATURES = {
    "food-preparation": [
        *_IN_ROOMS,
        *_see_close("{food}", "food"), _hold("{food}", "food"),
        *_see_close("{appliance}", "appliance"),
        ("is_{appliance}_open", lambda h: "appliance" in h.open and "appliance" in h.seen),
        _placed("{food}_in_{appliance}", "food"),
    ],
    "entertainment": [
        *_IN_ROOMS,
        *_see_close("chips", "chips"), _hold("chips", "chips"), _placed("chips_on_coffeetable", "chips"),
        *_see_close("milk", "milk"), _hold("milk", "milk"), _placed("milk_on_coffeetable", "milk"),
        *_see_close("tv", "tv"), ("is_face_tv", lambda h: h.sitting), ("is_tv_on", lambda h: "tv" in h.on and "tv" in h.seen),
        *_see_close("sofa", "sofa"), ("is_sit_sofa", lambda h: h.sitting),
        *_see_close("coffeetable", "coffee table"),
    ],
}


class Chore(NamedTuple):
    kind: str      # the key of OBJECTS, ACTIONS, FEATURES and GOALS
    shortest: int  # steps of the shortest solution (tests/test_envs.py finds them again by search)
    nouns: dict = {}


HOME_TASKS = {
    "food-preparation": Chore("food-preparation", 6, {"food": "pancake", "appliance": "microwave"}),
    "entertainment": Chore("entertainment", 11),
    # The paper's unseen tasks (its generalisation study): the same dynamics under other nouns, for testing without training.
    **{task: Chore("food-preparation", 6, {"food": food, "appliance": appliance}) for task, food, appliance in (
        ("cheese", "cheese", "microwave"), ("hamburger", "hamburger", "microwave"), ("apple-pie", "apple pie", "microwave"),
        ("pizza", "pizza", "microwave"), ("washing-plate", "dishes", "dishwasher"), ("laundry", "clothes", "washing machine"))},
}


class VirtualHome(_Env):
    """Four rooms, two hands, one goal: warm up something to eat, or settle down before the TV with chips and milk.

    ACTIONS (the table ACTIONS[kind]: name, effect, published admissibility)
        walk to a room       close to what is held, and to nothing else
        walk to a thing      close to it, to what is held, to what it lies on or in, and to what is inside it
        grab                 close to it and a hand free
        put X in/on Y        holding X, close to Y, and Y open if it is a container; X stays close
        open / close         close to it, shut and a hand free / close to it and open
        turn on / off        close to it and a hand free
        sit / stand up       close to the sofa / seated
      What is not seen cannot be acted on; walking to what is held, or walking while seated, does nothing. An action whose
      precondition fails costs its step and does nothing: an inadmissible action is no error.
      Our choice, where no recording exists: standing up leaves the agent close to the sofa, able to walk again. The mask does
      not advise it while seated, so a policy that keeps to the mask and sits down too early has lost the episode.

    OBSERVATION (float32 of 0 and 1; the table FEATURES[kind])
        Seen is what is held, and what is in the agent's room and not in a closed container.

    REWARD 1 at the goal, else 0; gamma 0.95 (published), one step an action.

    TERMINATION at the goal (the table GOALS). TRUNCATION after 50 steps (published).

    TASKS a key of TASKS["virtualhome"]. Every task but entertainment is of the kind food-preparation and takes the options
        food= and appliance=: any nouns.

    NAMED STATE (info["state"]); a thing is named by its part: "food", "appliance"; "chips", "milk", "tv", "sofa", "coffee table"
        environment, task: the kind; nouns: {"food": "pancake", "appliance": "microwave"}, or {} for entertainment
        room      one of ROOMS                              sitting  bool
        visible   seen and not held      close  close to, seen and not held       holding  held
        open      open containers in view                   on       switched-on things in view
        placed    {thing in view: what it was put in or on}
    """

    name = "virtualhome"

    def __init__(self, task="food-preparation", food=None, appliance=None, gamma=0.95, max_steps=50):
        chore = HOME_TASKS[_known("virtualhome task", task, HOME_TASKS)]
        self.kind, self.nouns = chore.kind, dict(chore.nouns)
        for part, noun in (("food", food), ("appliance", appliance)):
            if noun is None:
                continue
            if part not in self.nouns:
                raise OptionError(f"the task {task} has no {part}; it takes the options gamma and max_steps")
            if not isinstance(noun, str) or not noun.isprintable() or noun.split() != noun.split(" "):
                raise OptionError(f"{part} must be a noun, its words divided by single spaces, got {noun!r}")
            self.nouns[part] = noun
        self.action_names = [action.name.format_map(self.nouns) for action in ACTIONS[self.kind]]
        if len(set(self.action_names)) < len(self.action_names):
            raise OptionError(f"food and appliance must be two nouns and no rooms, got {' and '.join(self.nouns.values())}")
        joined = {part: noun.replace(" ", "") for part, noun in self.nouns.items()}
        self.feature_names = [name.format_map(joined) for name, _ in FEATURES[self.kind]]
        self._setup(task, gamma, max_steps, [1] * len(self.feature_names))
        # The only reward is 1 at the goal, so the shortest solution is the best one, whatever gamma is.
        self.best_return = self.gamma ** (chore.shortest - 1) if max_steps >= chore.shortest else 0.0

    # The world: room; near, held, open, on (sets of things; what is held is near); placed {thing: what it was put in or on};
    # sitting. seen follows from them and is kept up to date for the tables above. (near: gymnasium.Env has a method close.)
    def _start(self):
        self.room, self.sitting, self.placed = KITCHEN, False, {}
        self.near, self.held, self.open, self.on = set(), set(), set(), set()
        self._look()

    def _look(self):
        self.seen = {thing for thing in OBJECTS[self.kind] if self._is_seen(thing)}

    def _is_seen(self, thing):
        things, place = OBJECTS[self.kind], self.placed.get(thing)
        if thing in self.held:
            return True
        if place and things[place].can == "shut" and place not in self.open:
            return False
        return things[place or thing].room == self.room

    def _act(self, index):
        ACTIONS[self.kind][index].effect(self)
        self._look()
        done = GOALS[self.kind](self)
        return float(done), 1, done

    def _hand_free(self):
        return len(self.held) < HANDS

    def _at(self, thing):
        return thing in self.near and thing in self.seen

    # ---- effects, each beside its precondition
    def walk_to_room(self, room):
        if not self.sitting:
            self.room, self.near = room, set(self.held)

    def walk_to(self, thing):
        if thing in self.seen and thing not in self.held and not self.sitting:
            below = {self.placed[thing]} if thing in self.placed else set()
            inside = {x for x, place in self.placed.items() if place == thing and OBJECTS[self.kind][thing].can == "shut"}
            self.near = {thing} | self.held | below | inside

    def grab(self, thing):
        if self._at(thing) and self._hand_free():
            self.held.add(thing)
            self.placed.pop(thing, None)

    def put(self, thing, place):
        shut = OBJECTS[self.kind][place].can == "shut" and place not in self.open
        if thing in self.held and self._at(place) and not shut:
            self.held.remove(thing)
            self.placed[thing] = place

    def open_it(self, thing):
        if self._at(thing) and thing not in self.open and self._hand_free():
            self.open.add(thing)

    def close_it(self, thing):
        if self._at(thing):
            self.open.discard(thing)

    def switch(self, thing, on):
        if self._at(thing) and self._hand_free():
            (self.on.add if on else self.on.discard)(thing)

    def sit(self, thing):
        if self._at(thing):
            self.sitting = True

    def stand(self):
        self.sitting = False

    # ---- what is seen of it
    def _features(self):
        return [holds(self) for _, holds in FEATURES[self.kind]]

    def _named_state(self):
        in_view = [thing for thing in OBJECTS[self.kind] if thing in self.seen]
        loose = [thing for thing in in_view if thing not in self.held]
        return {"environment": self.name, "task": self.kind, "nouns": dict(self.nouns), "room": self.room,
                "visible": loose, "close": [thing for thing in loose if thing in self.near],
                "holding": [thing for thing in in_view if thing in self.held],
                "open": [thing for thing in loose if thing in self.open], "on": [thing for thing in loose if thing in self.on],
                "placed": {thing: self.placed[thing] for thing in loose if thing in self.placed}, "sitting": self.sitting}

    def _admissible(self):
        return [index for index, action in enumerate(ACTIONS[self.kind]) if action.admissible(self)]

    def _world(self):
        return {"room": self.room, "near": sorted(self.near), "held": sorted(self.held), "placed": dict(self.placed),
                "open": sorted(self.open), "on": sorted(self.on), "sitting": self.sitting}

    def _set_world(self, world):
        things = OBJECTS[self.kind]
        able = lambda *abilities: {thing for thing, (_, can) in things.items() if can in abilities}
        near, held, opened, on = (set(world[key]) for key in ("near", "held", "open", "on"))
        placed = dict(world["placed"])
        _require(world["room"] in ROOMS, "room {!r} is none of {}", world["room"], ", ".join(ROOMS))
        _require(near <= things.keys() and held <= near, "near must hold things of this task, and all that is held")
        _require(held <= able("carry") and len(held) <= HANDS, "held must be at most {} things that can be carried", HANDS)
        _require(opened <= able("shut") and on <= able("switch"), "only a container is open, only a device is on")
        _require(placed.keys() <= able("carry") - held and set(placed.values()) <= able("shut", "support"),
                 "only what can be carried and is not held was put somewhere")
        _require(isinstance(world["sitting"], bool), "sitting must be true or false")
        _require(not world["sitting"] or near & able("seat"), "to sit, the agent must be near the sofa")
        self.room, self.sitting, self.placed = world["room"], world["sitting"], placed
        self.near, self.held, self.open, self.on = near, held, opened, on
        self._look()


# ----------------------------------------------------------------------------------------------------------------- make
ENVIRONMENTS = {"overcooked": Overcooked, "virtualhome": VirtualHome}
TASKS = {"overcooked": tuple(OVERCOOKED_TASKS), "virtualhome": tuple(HOME_TASKS)}  # the first one is the default


def make(name, task=None, **options):
    """The environment of that name. task: one of TASKS[name] (None: the first). options: gamma, max_steps, and for the home
    food and appliance. Raises UnknownNameError or OptionError."""
    environment = ENVIRONMENTS[_known("environment", name, ENVIRONMENTS)]
    accepted = [option for option in inspect.signature(environment.__init__).parameters if option not in ("self", "task")]
    for option in options:
        _known(f"{name} option", option, accepted)
    return environment(TASKS[name][0] if task is None else task, **options)


if gymnasium:
    for _id, _class in (("twosome/Overcooked-v0", Overcooked), ("twosome/VirtualHome-v0", VirtualHome)):
        if _id not in gymnasium.registry:
            gymnasium.register(id=_id, entry_point=_class)

"""The two environments of TWOSOME (section 5): a kitchen seen in part, and a home of four rooms.

    [1] Tan et al. 2024, True Knowledge Comes from Practice: Aligning LLMs with Embodied
        Environments via Reinforcement Learning, ICLR 2024, arXiv 2401.14151

This file needs numpy alone and imports nothing of the project: copy it as it is. With gymnasium
installed, the classes are gymnasium.Env with spaces, registered as "twosome/Overcooked-v0" and
"twosome/VirtualHome-v0". Without it they are plain classes with the same methods.

    import envs
    env = envs.make("overcooked", task="tomato-lettuce-salad")
    obs, info = env.reset()              # float32; obs[i] is the value of env.feature_names[i]
    action = env.action_names.index("get tomato")
    obs, reward, terminated, truncated, info = env.step(action)

Where to find what

    _Env           what both share: episodes, the time limit, saving and restoring
    Overcooked     its tables are LAYOUTS and OVERCOOKED_TASKS; Layout reads one
    VirtualHome    its tables are OBJECTS, GOALS, ACTIONS, FEATURES and HOME_TASKS
    make, TASKS    the way in

After reset and after every step, info holds

    state          the named state: a JSON-able dict, from which prompts are rendered. It never
                   tells more than the observation. Equal observations have equal states, so
                   a network that reads numbers and an LLM play the same game.
    admissible     the indices of the actions from which the published mask lets a policy choose.
                   It can be EMPTY (see _stuck): read that as "choose among all", as the
                   recorded episodes do. An action outside of it is no error.
    duration       primitive steps of the last action, 0 after reset
    success        only at the end of an episode: whether the task was done

The return of an episode is the sum of gamma**k r_k over its primitive steps k = 0, 1, 2 and so on.
A macro-action of several steps answers with its own part of this sum, discounted from its own
start. A learner therefore discounts what comes after it by gamma**duration (semi-Markov).
env.best_return is the largest return from the start, or None where it is not known.

Each rule is marked with its source. "Paper" is [1]; "published" are its authors' experiment
scripts and recorded answers of their simulators; "our choice" is neither. We deviate on
purpose in two points: a time limit is a truncation and no end, and wrong input raises an error.
"""
import difflib
import inspect
import operator
from typing import NamedTuple

import numpy as np

try:
    import gymnasium
except ImportError:  # Optional: only the spaces and the registration depend on it.
    gymnasium = None


# -----------------------------------------------------------------------------
# Wrong input.

class EnvError(ValueError):
    """What this module refuses. One line says what was wrong and what would be right."""


def one_of(kind, name, names):
    """Return the name if it is one of the names. Raises EnvError, and suggests the nearest."""
    if isinstance(name, str) and name in names:
        return name
    near = difflib.get_close_matches(str(name), list(names), n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise EnvError(f"unknown {kind} {name!r:.60}{hint}; choose one of {', '.join(names)}")


def _require(right, option, value, what):
    """Refuse an option's value unless it is right."""
    if not right:
        raise EnvError(f"{option} must be {what}, got {value!r}")


def _is_number(value, kinds=(int, float)):
    """Whether it is a number of these kinds. Python counts True and False in; we do not."""
    return isinstance(value, kinds) and not isinstance(value, bool)


# -----------------------------------------------------------------------------
# What both environments share.

class _Env(gymnasium.Env if gymnasium else object):
    """The episode around a world. A subclass is the world, in these methods:

        _start()            put the world in its first state
        _act(index)         -> reward, primitive steps, whether the task is done
        _features()         -> list of numbers, in the order of feature_names
        _named_state()      -> dict
        _world()            -> dict: all that changes in the world, JSON-able
        _set_world(dict)    restore it

    Both worlds are deterministic and always start the same. A seed is accepted, because
    Gymnasium asks for it, and changes nothing.
    """

    metadata = {"render_modes": []}

    def __init__(self, task, gamma, max_steps, action_names, bounds):
        """Check what both have in common. `bounds` is {feature's name: its largest value}."""
        _require(_is_number(gamma) and 0 < gamma <= 1, "gamma", gamma, "a number in (0, 1]")
        whole = _is_number(max_steps, int)
        _require(whole and max_steps >= 1, "max_steps", max_steps, "a positive integer")
        self.task = task
        self.gamma = float(gamma)
        self.max_steps = max_steps
        self.action_names = list(action_names)
        self.feature_names = list(bounds)
        if gymnasium:
            high = np.array(list(bounds.values()), dtype=np.float32)
            self.observation_space = gymnasium.spaces.Box(0, high, dtype=np.float32)
            self.action_space = gymnasium.spaces.Discrete(len(self.action_names))
        self._begin("new")

    def _begin(self, phase):
        # A phase is "new" (before the first reset) or "running", and in the end "success" or
        # "failure". Only a running episode takes steps.
        self.phase = phase
        self.elapsed = 0
        self.duration = 0
        self._start()

    def reset(self, seed=None, options=None):
        """Begin an episode and return (obs, info). The seed changes nothing."""
        if options:
            raise EnvError(f"reset takes no options, got {options!r}")
        if gymnasium:
            super().reset(seed=seed)  # Gymnasium's own generator, for whoever reads env.np_random.
        self._begin("running")
        return self.observe()

    def step(self, action):
        """Take one macro-action. Returns (obs, reward, terminated, truncated, info).

        The time limit is looked at after a macro-action and never cuts one (published).
        """
        if self.phase != "running":
            what = "no episode has begun" if self.phase == "new" else "the episode has ended"
            raise EnvError(f"{what}; call reset() to begin the next one")
        reward, self.duration, done = self._act(self._index(action))
        self.elapsed += self.duration
        truncated = not done and self.elapsed >= self.max_steps
        if done or truncated:
            self.phase = "success" if done else "failure"
        obs, info = self.observe()
        return obs, reward, done, truncated, info

    def close(self):
        """Release nothing; here for callers that treat every environment alike."""

    def observe(self):
        """Return (obs, info) of this moment, as the last reset or step gave them."""
        info = {"state": self._named_state(), "admissible": self._admissible(),
                "duration": self.duration}
        if self.phase in ("success", "failure"):
            info["success"] = self.phase == "success"
        return np.array(self._features(), dtype=np.float32), info

    def _admissible(self):
        """Return the indices of all actions. VirtualHome has a mask instead."""
        return list(range(len(self.action_names)))

    def _index(self, action):
        """Return the action as an int. A bool is refused: True would pass for action 1."""
        try:
            index = -1 if isinstance(action, bool) else operator.index(action)
        except TypeError:
            index = -1
        last = len(self.action_names) - 1
        if not 0 <= index <= last:
            raise EnvError(f"action must be an integer from 0 to {last}, got {action!r}")
        return index

    def state_dict(self):
        """Return all that changes during an episode, JSON-able, for load_state_dict."""
        return {"environment": self.name, "task": self.task, "phase": self.phase,
                "elapsed": self.elapsed, "duration": self.duration, "world": self._world()}

    def load_state_dict(self, state):
        """Continue from a state_dict. EnvError: it is not of this task, or of another version."""
        mine = self.state_dict()
        given = state if isinstance(state, dict) else {}
        same = all(given.get(key) == mine[key] for key in ("environment", "task"))
        same = same and given.keys() == mine.keys()
        if not same or given["world"].keys() != mine["world"].keys():
            raise EnvError(f"needs a state of {self.name}, task {self.task}, saved by this "
                           f"version; got one of task {given.get('task')}, or of another version")
        self.phase = state["phase"]
        self.elapsed = state["elapsed"]
        self.duration = state["duration"]
        self._set_world(state["world"])


# -----------------------------------------------------------------------------
# Overcooked: its tables.

# A row is x, counted from the top; a column is y, counted from the left (paper). W counter,
# . floor, A the agent's start on the floor, T tomato, L lettuce, O onion, B bowl,
# K cutting board, D delivery counter.
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
# What can be carried. This is the order of features and actions as well.
ITEMS = {"T": "tomato", "L": "lettuce", "O": "onion", "B": "bowl"}
# Right, down, left, up: the order in which "chop" looks for a board (published).
DIRECTIONS = ((0, 1), (1, 0), (0, -1), (-1, 0))


class Recipe(NamedTuple):
    """A task in the kitchen. `best` was found by exhaustive search, which the tests repeat."""

    layout: str
    foods: tuple  # what the delivered bowl must hold, and nothing else
    best: float   # the best return at gamma 0.99 and with the paper's rewards


OVERCOOKED_TASKS = {
    "tomato-salad": Recipe("one food", ("tomato",), 0.920518),
    "lettuce-salad": Recipe("three foods", ("lettuce",), 0.920518),
    "onion-salad": Recipe("three foods", ("onion",), 0.918691),
    "tomato-lettuce-salad": Recipe("three foods", ("tomato", "lettuce"), 0.947656),
    "tomato-onion-salad": Recipe("three foods", ("tomato", "onion"), 0.947656),
    "lettuce-onion-salad": Recipe("three foods", ("lettuce", "onion"), 0.947656),
    "tomato-lettuce-onion-salad": Recipe("three foods", ("tomato", "lettuce", "onion"), 0.944705),
}

# The numbers of the paper.
VIEW = 2                # the agent sees a square of 5 x 5 cells around it
CHOPS = 3               # chops that make a food chopped
STEP_REWARD = -0.001    # every primitive step
CHOP_REWARD = 0.2       # when a food of the recipe becomes chopped
DELIVERY_REWARD = 1.0   # when the bowl is delivered with the recipe's foods
MISTAKE_REWARD = -0.1   # when anything else is delivered


class Layout:
    """A kitchen, read once. A cell is (x, y): its row and its column.

        cells       {cell: symbol of LAYOUTS}; size is (rows, columns)
        start       the agent's first cell
        home        {item: the cell where it starts}; foods are the items without the bowl
        boards      {"board1": cell, and so on}; board_at is its reverse
        fixtures    the boards and {"counter": the cell of the delivery}
        beside      {floor cell: its four neighbours}
        way         {floor cell: {counter cell: floor cells of a shortest way until next to it}}
    """

    def __init__(self, text):
        """Read one text of LAYOUTS."""
        rows = [line.split() for line in text.strip().splitlines()]
        self.size = (len(rows), len(rows[0]))
        self.cells = {(x, y): rows[x][y] for x, y in np.ndindex(self.size)}
        where = {symbol: cell for cell, symbol in self.cells.items()}
        self.start = where["A"]
        self.delivery = where["D"]
        self.home = {item: where[symbol] for symbol, item in ITEMS.items() if symbol in where}
        self.foods = [item for item in self.home if item != "bowl"]
        boards = [cell for cell, symbol in self.cells.items() if symbol == "K"]
        self.boards = {f"board{n}": cell for n, cell in enumerate(boards, 1)}
        self.board_at = {cell: board for board, cell in self.boards.items()}
        self.fixtures = self.boards | {"counter": self.delivery}
        floor = [cell for cell, symbol in self.cells.items() if symbol in ".A"]
        self.beside = {(x, y): [(x + dx, y + dy) for dx, dy in DIRECTIONS] for x, y in floor}
        self.way = {cell: self._ways(cell) for cell in floor}

    def _ways(self, start):
        """Search breadth first from one floor cell.

        Several ways can be equally short. Which one is taken shows only where a walk ends early
        (see Overcooked._get_food). Our choice is the one that this search finds first, in the
        order of DIRECTIONS; it agrees with every recording.
        """
        paths = {start: []}
        ways = {}
        queue = [start]
        for cell in queue:
            for near in self.beside[cell]:
                if near not in self.beside:  # It is a counter: the way ends here.
                    ways.setdefault(near, paths[cell])
                elif near not in paths:
                    paths[near] = [*paths[cell], near]
                    queue.append(near)
        return ways


KITCHENS = {name: Layout(text) for name, text in LAYOUTS.items()}


# -----------------------------------------------------------------------------
# Overcooked: the class.

class Overcooked(_Env):
    """A kitchen of 7 x 7 cells, seen in part by one agent who makes a salad.

    Chop the foods of the recipe on a board, put them in the bowl, and deliver the bowl.

    ACTIONS are macro-actions. All are always admissible (published). Apart from a wrong delivery
    (see REWARDS), one that cannot succeed now costs a step or more and changes nothing but where
    the agent stands.

        get <food>        Walk a shortest way until next to where it truly is, then act on it. If
                          it is held, stay idle for one step. If it is in the bowl, walk until the
                          bowl is in view and stay idle for one step. Leave an unchopped food that
                          lies on a board where it is: only walk there.
        get bowl          Likewise. With a chopped food in hand, put it in the bowl, and then take
                          the bowl.
        go to board <n>   Walk until next to it. With something in hand, act on it. With an empty
        deliver           hand, stay idle for one step if the agent stood there already.
        chop              Three steps: chop an unchopped food on a board next to the agent, or stay
                          idle if the hand is full. Without such a food, one idle step.

    A primitive step is a move to a neighbouring floor cell or an act on a neighbouring counter
    cell (see _touch).

    OBSERVATION: raw numbers, 0 for what is out of view. Row, column and chops (0 to 3) of each
    food; row and column of the bowl, the boards, "counter" (the delivery) and the agent. A held
    thing is where the agent is, and a food in the bowl is where the bowl is.

    REWARDS (paper): -0.001 a primitive step, +0.2 when a food of the recipe becomes chopped, +1
    for the correct delivery, -0.1 for any other. A wrong delivery puts what was delivered back
    where it started, emptied and unchopped. gamma is 0.99 (published) and applies to every
    primitive step, inside a macro-action too.

    TERMINATION at the correct delivery. TRUNCATION after 200 primitive steps (published).

    TASKS are the keys of OVERCOOKED_TASKS. The tomato salad has a kitchen with one food and 5
    actions; the others have three foods and 8 actions.

    OPTIONS view (2) is how many cells far the agent sees, diagonals included; chop_reward (0.2)
    replaces the reward of a chopped food. The published PPO baseline did not play under the
    conditions of TWOSOME: its view was 10, which is the whole kitchen, and its chop_reward 0.1.

    NAMED STATE, info["state"]. The last three keys tell only what is in view.

        environment, recipe, foods, boards    what the task is made of
        holding     None, a food or "bowl"
        places      {food or "bowl": "hand", "bowl" (in it), "board1", "board2" or "counter"}
        chops       {food: 0 to 3}
        next_to     what is orthogonally next to the agent: boards, "delivery", and whatever lies
                    on a counter. What lies on a board is not named again: places tells it.
    """

    name = "overcooked"

    def __init__(self, task="tomato-salad", gamma=0.99, max_steps=200, view=VIEW,
                 chop_reward=CHOP_REWARD):
        """Build the kitchen of a task; see OPTIONS. EnvError: a name or a value is wrong."""
        recipe = OVERCOOKED_TASKS[one_of("overcooked task", task, OVERCOOKED_TASKS)]
        _require(_is_number(view, int) and view >= 1, "view", view, "a positive integer")
        finite = _is_number(chop_reward) and abs(chop_reward) < float("inf")
        _require(finite, "chop_reward", chop_reward, "a finite number")
        self.kitchen = KITCHENS[recipe.layout]
        self.recipe = recipe.foods
        self.foods = self.kitchen.foods
        self.view = view
        self.chop_reward = chop_reward
        self._actions = self._action_table()
        super().__init__(task, gamma, max_steps, self._actions, self._feature_bounds())
        # The view changes what the agent knows, but not what the best policy can do.
        usual = gamma == 0.99 and max_steps >= 200 and chop_reward == CHOP_REWARD
        self.best_return = recipe.best if usual else None

    def _action_table(self):
        """Return {name: (method, its argument if it takes one)}."""
        table = {f"get {food}": (Overcooked._get_food, food) for food in self.foods}
        table["get bowl"] = (Overcooked._get_bowl,)
        for n, cell in enumerate(self.kitchen.boards.values(), 1):
            table[f"go to board {n}"] = (Overcooked._go_to, cell)
        table["deliver"] = (Overcooked._go_to, self.kitchen.delivery)
        table["chop"] = (Overcooked._chop,)
        return table

    def _feature_bounds(self):
        """Return {feature's name: its largest value}, in the order of _features."""
        rows, columns = self.kitchen.size
        bounds = {}
        for thing in self._things():
            bounds |= {f"{thing}_x": rows - 1, f"{thing}_y": columns - 1}
            if thing in self.foods:
                bounds[f"{thing}_chops"] = CHOPS
        return bounds

    def _things(self):
        """Name what the observation tells, in its order."""
        return (*self.kitchen.home, *self.kitchen.fixtures, "agent")

    # The world. Every item is in exactly one of three places: in the hand, in `lying`, or in the
    # bowl, which is itself in the hand or in `lying`. These attributes may be read, to draw it.

    def _start(self):
        self._set_world({"agent": self.kitchen.start, "holding": None, "in_bowl": [],
                         "lying": self.kitchen.home, "chops": dict.fromkeys(self.foods, 0)})

    def _world(self):
        lying = {item: list(cell) for item, cell in self.lying.items()}
        return {"agent": list(self.agent), "holding": self.holding, "lying": lying,
                "in_bowl": sorted(self.in_bowl), "chops": dict(self.chops)}

    def _set_world(self, world):
        self.agent = tuple(world["agent"])      # a floor cell
        self.holding = world["holding"]         # None or an item
        self.in_bowl = list(world["in_bowl"])   # foods
        self.chops = dict(world["chops"])       # {food: 0 to 3}
        # {item: counter cell}; JSON knows no tuples and gives lists instead.
        self.lying = {item: tuple(cell) for item, cell in world["lying"].items()}

    def _cell(self, thing):
        """Return the cell of any thing. What is held is where the agent is."""
        if thing in self.in_bowl:
            thing = "bowl"
        if thing in ("agent", self.holding):
            return self.agent
        return self.lying.get(thing) or self.kitchen.fixtures[thing]

    def _sees(self, cell):
        distance = max(abs(cell[0] - self.agent[0]), abs(cell[1] - self.agent[1]))
        return distance <= self.view

    # The bowl has no chops: it is neither chopped nor unchopped. The same goes for no item, None.

    def _chopped(self, item):
        return self.chops.get(item, 0) == CHOPS

    def _unchopped(self, item):
        return self.chops.get(item, CHOPS) < CHOPS

    # Primitive steps. Each adds its reward, discounted from the start of the macro-action.

    def _act(self, index):
        self._reward = 0.0
        self._steps = 0
        self._delivered = False
        method, *argument = self._actions[self.action_names[index]]
        method(self, *argument)
        return self._reward, self._steps, self._delivered

    def _tick(self, reward=0.0):
        """Let one primitive step pass: add gamma**k r_k."""
        self._reward += self.gamma**self._steps * (STEP_REWARD + reward)
        self._steps += 1

    def _walk(self, target, until_seen=False):
        """Walk until next to a cell, or until it is in view. Returns False if already there."""
        way = self.kitchen.way[self.agent][target]
        for cell in way:
            if until_seen and self._sees(target):
                break
            self.agent = cell
            self._tick()
        return bool(way)

    def _touch(self, cell):
        """Act on a neighbouring counter cell, as hand and cell allow: one primitive step."""
        hand = self.holding
        item = next((item for item, at in self.lying.items() if at == cell), None)
        reward = 0.0
        if cell == self.kitchen.delivery:
            reward = self._deliver()
        elif hand is None and item is not None:
            reward = self._chop_or_take(item, cell)
        elif hand is not None and item is None:
            self.lying[hand] = cell
            self.holding = None
        elif item == "bowl" and self._chopped(hand):
            self.in_bowl.append(hand)
            self.holding = None
            # Published: on a board the bowl comes to hand in the same step.
            if cell in self.kitchen.board_at:
                self._chop_or_take("bowl", cell)
        elif hand == "bowl" and self._chopped(item):
            del self.lying[item]
            self.in_bowl.append(item)
        self._tick(reward)

    def _chop_or_take(self, item, cell):
        """Chop a food on a board once, or take into the empty hand whatever else lies there."""
        if cell in self.kitchen.board_at and self._unchopped(item):
            self.chops[item] += 1
            finished = self.chops[item] == CHOPS and item in self.recipe
            return self.chop_reward if finished else 0.0
        del self.lying[item]
        self.holding = item
        return 0.0

    def _deliver(self):
        """Hand over what is held, and return the reward. The world takes a mistake back."""
        if self.holding is None:
            return 0.0
        if self.holding == "bowl" and set(self.in_bowl) == set(self.recipe):
            self._delivered = True
            return DELIVERY_REWARD
        wasted = [self.holding]
        if self.holding == "bowl":
            wasted += self.in_bowl
            self.in_bowl = []
        self.lying |= {item: self.kitchen.home[item] for item in wasted}
        self.chops |= {food: 0 for food in wasted if food != "bowl"}
        self.holding = None
        return MISTAKE_REWARD

    # Macro-actions.

    def _approach(self, cell, acts):
        """Walk until next to a cell and act on it, if asked to. Standing still costs a step."""
        walked = self._walk(cell)
        if acts:
            self._touch(cell)
        elif not walked:
            self._tick()

    def _get_food(self, food):
        cell = self._cell(food)
        if cell == self.agent:  # It is held, or it is in the bowl that is held.
            self._tick()
        elif food in self.in_bowl:  # Published: the agent gives up once it sees that.
            self._walk(cell, until_seen=True)
            self._tick()
        else:
            to_chop = cell in self.kitchen.board_at and self._unchopped(food)
            self._approach(cell, acts=not to_chop)

    def _get_bowl(self):
        if self.holding == "bowl":
            self._tick()
            return
        fills = self._chopped(self.holding)
        self._approach(self._cell("bowl"), acts=True)
        if fills:  # Now take it. If it stood on a board, it is in hand already and this is idle.
            self._get_bowl()

    def _go_to(self, cell):
        self._approach(cell, acts=self.holding is not None)

    def _chop(self):
        ready = [cell for item, cell in self.lying.items() if self._unchopped(item)]
        near = [cell for cell in self.kitchen.beside[self.agent]
                if cell in self.kitchen.board_at and cell in ready]
        for _ in range(CHOPS if near else 1):
            if near and self.holding is None:
                self._touch(near[0])
            else:  # There is nothing to chop, or no hand for it.
                self._tick()

    # What is seen of it.

    def _features(self):
        values = []
        for thing in self._things():
            cell = self._cell(thing)
            numbers = [*cell, self.chops[thing]] if thing in self.foods else cell
            values += numbers if self._sees(cell) else [0] * len(numbers)
        return values

    def _named_state(self):
        kitchen = self.kitchen
        near = kitchen.beside[self.agent]
        seen = [item for item in kitchen.home if self._sees(self._cell(item))]
        places = {item: self._place(item) for item in seen}
        next_to = [board for board, cell in kitchen.boards.items() if cell in near]
        if kitchen.delivery in near:
            next_to.append("delivery")
        on_counters = [item for item in seen if places[item] == "counter"]
        next_to += [item for item in on_counters if self.lying[item] in near]
        chops = {food: self.chops[food] for food in self.foods if food in places}
        return {"environment": self.name, "recipe": list(self.recipe), "foods": list(self.foods),
                "boards": list(kitchen.boards), "places": places, "chops": chops,
                "holding": self.holding, "next_to": next_to}

    def _place(self, item):
        """Say in one word where an item is."""
        if item == self.holding:
            return "hand"
        if item in self.in_bowl:
            return "bowl"
        return self.kitchen.board_at.get(self.lying[item], "counter")


# -----------------------------------------------------------------------------
# VirtualHome: its tables. In them, h is the VirtualHome.

ROOMS = KITCHEN, BATHROOM, BEDROOM, LIVING_ROOM = "kitchen", "bathroom", "bedroom", "living room"
HANDS = 2


# A thing is called by its part in the task, and stands at first in the room given here. The nouns
# that people and language models read, such as "pancake", are filled in later: see Chore.
OBJECTS = {
    "food-preparation": {"food": KITCHEN, "appliance": KITCHEN},
    "entertainment": {"chips": KITCHEN, "milk": KITCHEN, "tv": LIVING_ROOM,
                      "sofa": LIVING_ROOM, "coffee table": LIVING_ROOM},
}
CONTAINERS = {"appliance"}  # shut at first

GOALS = {  # published
    "food-preparation": lambda h: (
        h.room == KITCHEN and h.placed.get("food") == "appliance" and "appliance" not in h.open),
    "entertainment": lambda h: h.sitting and "tv" in h.on and all(
        thing in h.near or h.placed.get(thing) == "coffee table" for thing in ("chips", "milk")),
}


# The published mask: each function says when an action is advised, with the same things as the
# action has. In some points this is narrower than the preconditions, in others it is wider.

def _stuck(h):
    """Whether no action at all is advised: close to a TV that is off, with empty hands."""
    return "tv" in h.near and "tv" not in h.on and not h.held


def _leave(h, room):
    """Walk to another room: advised whatever is held or close, unless the agent is stuck."""
    return h.room != room and not _stuck(h)


def _approach(h, thing):
    """Walk to the food or the appliance: advised for food in hand too, where it does nothing."""
    return h.room == KITCHEN and (thing not in h.near or thing in h.held)


def _grab_to_heat(h, food):
    """Grab the food: not advised while the agent is close to the appliance as well."""
    return food in h.near - h.held and "appliance" not in h.near


def _put_in(h, food, appliance):
    """Put the food in: advised whether the appliance is open or not."""
    return food in h.held and appliance in h.near


def _is_near(h, thing):
    """Open or close: both are advised, whether the appliance is open or shut."""
    return thing in h.near


def _approach_snack(h, snack):
    """Walk to a snack: with empty hands only if the OTHER one is in sight (a slip, it seems)."""
    wanted = snack if h.held else OTHER_SNACK[snack]
    return h.room == KITCHEN and snack not in h.near and wanted in h.seen


def _grab_snack(h, snack):
    """Grab a snack: advised in the kitchen alone, so nothing leaves the table again."""
    return h.room == KITCHEN and snack in h.near - h.held


def _put_on(h, snack, table):
    """Put a snack on the table: advised for one alone, so that the other stays in hand."""
    return snack in h.held and table in h.near and h.placed.get(OTHER_SNACK[snack]) != table


def _approach_furniture(h, thing):
    """Walk in the living room: not while sitting, nor away from the table with empty hands."""
    done_here = "coffee table" in h.near and not h.held
    away = h.room == LIVING_ROOM and thing not in h.near
    return away and not h.sitting and not done_here and not _stuck(h)


def _switch(h, tv):
    """Turn on or off: both are advised while the TV is off and exactly one thing is held."""
    return tv in h.near and tv not in h.on and len(h.held) == 1


def _sit_or_stand(h, sofa):
    """Sit down or stand up: both are advised before sitting, and neither after it."""
    return sofa in h.near and "tv" in h.on and not h.sitting


OTHER_SNACK = {"chips": "milk", "milk": "chips"}

# A row is the name of an action, its effect (a method of VirtualHome), when the mask admits it
# (a function above), and the things or the room for which both are called.
ROOM_WALKS = [
    (f"walk to the {room}", "walk_to_room", _leave, room)
    for room in (LIVING_ROOM, KITCHEN, BATHROOM, BEDROOM)
]
ACTIONS = {
    "food-preparation": [
        *ROOM_WALKS,
        ("walk to the {food}", "walk_to", _approach, "food"),
        ("walk to the {appliance}", "walk_to", _approach, "appliance"),
        ("grab the {food}", "grab", _grab_to_heat, "food"),
        ("put the {food} in the {appliance}", "put", _put_in, "food", "appliance"),
        ("open the {appliance}", "open_up", _is_near, "appliance"),
        ("close the {appliance}", "shut", _is_near, "appliance"),
    ],
    "entertainment": [
        *ROOM_WALKS,
        ("walk to the chips", "walk_to", _approach_snack, "chips"),
        ("walk to the milk", "walk_to", _approach_snack, "milk"),
        ("walk to the coffee table", "walk_to", _approach_furniture, "coffee table"),
        ("walk to the TV", "walk_to", _approach_furniture, "tv"),
        ("walk to the sofa", "walk_to", _approach_furniture, "sofa"),
        ("grab the chips", "grab", _grab_snack, "chips"),
        ("grab the milk", "grab", _grab_snack, "milk"),
        ("put the chips on the coffee table", "put", _put_on, "chips", "coffee table"),
        ("put the milk on the coffee table", "put", _put_on, "milk", "coffee table"),
        ("turn on the TV", "turn_on", _switch, "tv"),
        ("turn off the TV", "turn_off", _switch, "tv"),
        ("sit on the sofa", "sit", _sit_or_stand, "sofa"),
        ("stand up from the sofa", "stand", _sit_or_stand, "sofa"),
    ],
}

# The observation. A row is the name of a feature, a fact (see VirtualHome._features) and the thing
# or the room of which it is asked. Nouns are filled into the names without their spaces.
ROOM_FEATURES = [(f"in_{room.replace(' ', '')}", "in", room) for room in ROOMS]
FEATURES = {
    "food-preparation": [
        *ROOM_FEATURES,
        ("see_{food}", "see", "food"), ("close_to_{food}", "close", "food"),
        ("hold_{food}", "hold", "food"),
        ("see_{appliance}", "see", "appliance"), ("close_to_{appliance}", "close", "appliance"),
        ("is_{appliance}_open", "open", "appliance"),
        ("{food}_in_{appliance}", "placed", "food"),
    ],
    "entertainment": [
        *ROOM_FEATURES,
        ("see_chips", "see", "chips"), ("close_to_chips", "close", "chips"),
        ("hold_chips", "hold", "chips"), ("chips_on_coffeetable", "placed", "chips"),
        ("see_milk", "see", "milk"), ("close_to_milk", "close", "milk"),
        ("hold_milk", "hold", "milk"), ("milk_on_coffeetable", "placed", "milk"),
        ("see_tv", "see", "tv"), ("close_to_tv", "close", "tv"),
        # Published: to face the TV and to sit on the sofa are the same fact.
        ("is_face_tv", "sit", "sofa"), ("is_tv_on", "on", "tv"),
        ("see_sofa", "see", "sofa"), ("close_to_sofa", "close", "sofa"),
        ("is_sit_sofa", "sit", "sofa"), ("see_coffeetable", "see", "coffee table"),
        ("close_to_coffeetable", "close", "coffee table"),
    ],
}


class Chore(NamedTuple):
    """A task in the home."""

    kind: str       # a key of OBJECTS, GOALS, ACTIONS and FEATURES
    shortest: int   # steps of the shortest solution, which the tests find again by search
    nouns: dict     # {part: noun} for the {parts} in the names of actions and features


def _prepare(food, appliance):
    return Chore("food-preparation", 6, {"food": food, "appliance": appliance})


HOME_TASKS = {
    "food-preparation": _prepare("pancake", "microwave"),
    "entertainment": Chore("entertainment", 11, {}),
    # The unseen tasks of the paper's generalisation study: the same dynamics with other nouns.
    "cheese": _prepare("cheese", "microwave"),
    "hamburger": _prepare("hamburger", "microwave"),
    "apple-pie": _prepare("apple pie", "microwave"),
    "pizza": _prepare("pizza", "microwave"),
    "washing-plate": _prepare("dishes", "dishwasher"),
    "laundry": _prepare("clothes", "washing machine"),
}


# -----------------------------------------------------------------------------
# VirtualHome: the class.

class VirtualHome(_Env):
    """A home of four rooms and an agent with two hands: heat a meal, or settle down before the TV.

    The agent starts in the kitchen, with empty hands and close to nothing.

    ACTIONS are the table ACTIONS[kind]: name, effect, and when the published mask admits it. What
    is not seen cannot be acted on. An action whose precondition fails costs its step and does
    nothing. The preconditions are

        walk to a room      not sitting
        walk to a thing     not sitting, and it is not held
        grab                close to it, and a hand is free
        put X in or on Y    X is held, close to Y, and Y is open if it is a container
        open                close to it, it is shut, and a hand is free
        close               close to it
        turn on, turn off   close to it, and a hand is free
        sit                 close to it
        stand up            none

    Our choice, because no recording shows it: standing up leaves the agent close to the sofa and
    able to walk again. The mask does not advise it to one who sits, so a policy that keeps to the
    mask and sits down too early has lost the episode.

    OBSERVATION: the table FEATURES[kind], each 0 or 1. Seen is what is held, and what is in the
    agent's room and not in a shut container.

    REWARD: 1 at the goal and 0 before. An action is one step, and gamma is 0.95 (published).

    TERMINATION at the goal, the table GOALS. TRUNCATION after 50 steps (published).

    TASKS are the keys of HOME_TASKS. All but entertainment are of the kind food-preparation.

    OPTIONS food= and appliance= put any nouns in the place of those of a food-preparation task.
    mask=False makes every action admissible at all times, to see what is learned without the
    published mask. The published PPO baseline had the mask, as TWOSOME had, but its gamma was 0.99.

    NAMED STATE, info["state"]. Things are called by their parts, the keys of OBJECTS[kind].

        environment, task    the latter is the kind
        nouns       {"food": "pancake", "appliance": "microwave"}, or {} for entertainment
        room        one of ROOMS                  sitting    True or False
        holding     what is held                  visible    what is seen and not held
        close       the visible things to which the agent is close
        open, on    the visible things that are open, and those that are switched on
        placed      {visible thing: what it was put in or on}
    """

    name = "virtualhome"

    def __init__(self, task="food-preparation", food=None, appliance=None, gamma=0.95,
                 max_steps=50, mask=True):
        """Build the home of a task; see OPTIONS. EnvError: a name or a value is wrong."""
        chore = HOME_TASKS[one_of("virtualhome task", task, HOME_TASKS)]
        _require(isinstance(mask, bool), "mask", mask, "True or False")
        self.kind = chore.kind
        self.mask = mask
        self.nouns = self._chosen_nouns(chore, food, appliance)
        names = [name.format_map(self.nouns) for name, *_ in ACTIONS[self.kind]]
        joined = {part: noun.replace(" ", "") for part, noun in self.nouns.items()}
        features = [name.format_map(joined) for name, _, _ in FEATURES[self.kind]]
        super().__init__(task, gamma, max_steps, names, dict.fromkeys(features, 1))
        # The only reward is that of the goal, so the shortest solution is the best for any gamma.
        reachable = max_steps >= chore.shortest
        self.best_return = self.gamma ** (chore.shortest - 1) if reachable else 0.0

    def _chosen_nouns(self, chore, food, appliance):
        """Return the task's {part: noun} with the given nouns in place of its own."""
        given = {"food": food, "appliance": appliance}
        given = {part: noun for part, noun in given.items() if noun is not None}
        for part, noun in given.items():
            if part not in chore.nouns:
                raise EnvError(f"the task {chore.kind} has no {part}; leave out {part}=")
            right = isinstance(noun, str) and noun.isprintable() and noun.split(" ") == noun.split()
            _require(right, part, noun, "a noun, its words divided by single spaces")
        nouns = chore.nouns | given
        # Equal names would make two actions or two features one.
        names = [name.replace(" ", "") for name in (*ROOMS, *nouns.values())]
        if len(set(names)) < len(names):
            wrong = " and ".join(nouns.values())
            raise EnvError(f"food and appliance must be two nouns and no rooms, got {wrong}")
        return nouns

    # The world. These attributes may be read, to draw it. (What the agent is close to is called
    # `near`, because gymnasium.Env has a method `close`.)

    def _start(self):
        self._set_world({"room": KITCHEN, "sitting": False, "placed": {},
                         "near": [], "held": [], "open": [], "on": []})

    def _world(self):
        return {"room": self.room, "sitting": self.sitting, "placed": dict(self.placed),
                "near": sorted(self.near), "held": sorted(self.held),
                "open": sorted(self.open), "on": sorted(self.on)}

    def _set_world(self, world):
        self.room = world["room"]
        self.sitting = world["sitting"]
        self.placed = dict(world["placed"])     # {thing: what it was put in or on}
        self.near = set(world["near"])          # close to these, and all that is held is here too
        self.held = set(world["held"])
        self.open = set(world["open"])          # containers
        self.on = set(world["on"])              # devices
        self._look()

    def _look(self):
        """Bring `seen` up to date: it follows from the rest of the world."""
        self.seen = {thing for thing in OBJECTS[self.kind] if self._is_seen(thing)}

    def _is_seen(self, thing):
        place = self.placed.get(thing, thing)
        hidden = place != thing and self._is_shut(place)
        in_room = OBJECTS[self.kind][place] == self.room
        return thing in self.held or (in_room and not hidden)

    def _is_shut(self, thing):
        return thing in CONTAINERS and thing not in self.open

    def _is_at(self, thing):
        return thing in self.near and thing in self.seen

    def _hand_free(self):
        return len(self.held) < HANDS

    # Effects. The class's docstring lists their preconditions.

    def _act(self, index):
        _, effect, _, *things = ACTIONS[self.kind][index]
        getattr(self, effect)(*things)
        self._look()
        done = GOALS[self.kind](self)
        return float(done), 1, done

    def walk_to_room(self, room):
        """Go to a room and be close to nothing but what is held."""
        if not self.sitting:
            self.room = room
            self.near = set(self.held)

    def walk_to(self, thing):
        """Be close to a thing, to what is held, to what it lies in or on, and to what is in it."""
        if thing not in self.seen or thing in self.held or self.sitting:
            return
        self.near = {thing} | self.held
        if thing in self.placed:
            self.near.add(self.placed[thing])
        if thing in CONTAINERS:
            self.near |= {inner for inner, place in self.placed.items() if place == thing}

    def grab(self, thing):
        """Take a thing."""
        if self._is_at(thing) and self._hand_free():
            self.held.add(thing)
            self.placed.pop(thing, None)

    def put(self, thing, place):
        """Put a thing in or on another one, and stay close to both."""
        if thing in self.held and self._is_at(place) and not self._is_shut(place):
            self.held.remove(thing)
            self.placed[thing] = place

    def open_up(self, thing):
        """Open a container."""
        if self._is_at(thing) and self._hand_free():
            self.open.add(thing)

    def shut(self, thing):
        """Shut a container, with full hands too (published)."""
        if self._is_at(thing):
            self.open.discard(thing)

    def turn_on(self, thing):
        """Switch a device on."""
        if self._is_at(thing) and self._hand_free():
            self.on.add(thing)

    def turn_off(self, thing):
        """Switch a device off."""
        if self._is_at(thing) and self._hand_free():
            self.on.discard(thing)

    def sit(self, thing):
        """Sit down on a seat."""
        if self._is_at(thing):
            self.sitting = True

    def stand(self, _):
        """Stand up, wherever the agent sits."""
        self.sitting = False

    # What is seen of it.

    def _admissible(self):
        if not self.mask:
            return super()._admissible()
        table = enumerate(ACTIONS[self.kind])
        return [index for index, (_, _, advised, *things) in table if advised(self, *things)]

    def _features(self):
        # {fact: the things, or the room, of which it holds}
        facts = {"in": {self.room}, "see": self.seen, "close": self.seen & self.near,
                 "hold": self.held, "open": self.seen & self.open, "on": self.seen & self.on,
                 "placed": self.seen & self.placed.keys(),
                 "sit": {"sofa"} if self.sitting else set()}
        return [thing in facts[fact] for _, fact, thing in FEATURES[self.kind]]

    def _named_state(self):
        things = OBJECTS[self.kind]
        visible = [thing for thing in things if thing in self.seen - self.held]
        placed = {thing: self.placed[thing] for thing in visible if thing in self.placed}
        return {"environment": self.name, "task": self.kind, "nouns": dict(self.nouns),
                "room": self.room, "visible": visible,
                "close": [thing for thing in visible if thing in self.near],
                "holding": [thing for thing in things if thing in self.held],
                "open": [thing for thing in visible if thing in self.open],
                "on": [thing for thing in visible if thing in self.on],
                "placed": placed, "sitting": self.sitting}


# -----------------------------------------------------------------------------
# The way in.

ENVIRONMENTS = {"overcooked": Overcooked, "virtualhome": VirtualHome}
# The first task of each is its default.
TASKS = {"overcooked": tuple(OVERCOOKED_TASKS), "virtualhome": tuple(HOME_TASKS)}


def make(name, task=None, **options):
    """Build an environment: `name` is a key of TASKS, and `task` is one of TASKS[name].

    Without a task it is the first one. Both environments take the options gamma= and max_steps=;
    Overcooked also takes view= and chop_reward=, VirtualHome takes food=, appliance= and mask=.
    EnvError: a name is unknown, or an option's value is wrong.
    """
    environment = ENVIRONMENTS[one_of("environment", name, ENVIRONMENTS)]
    accepted = list(inspect.signature(environment).parameters)
    accepted.remove("task")
    for option in options:
        one_of(f"{name} option", option, accepted)
    return environment(TASKS[name][0] if task is None else task, **options)


if gymnasium:
    for _name, _class in (("Overcooked", Overcooked), ("VirtualHome", VirtualHome)):
        if f"twosome/{_name}-v0" not in gymnasium.registry:
            gymnasium.register(id=f"twosome/{_name}-v0", entry_point=_class)

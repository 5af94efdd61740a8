"""Pre-train pocket_lm, the small Llama that stands in for LLaMA-7B (TWOSOME, section 5, uses 7B).

    python pocket_lm/pretrain.py                        # makes pocket_lm/ again, all its files
    python pocket_lm/pretrain.py --out /tmp/lm --seed 1 --steps 500
    python pocket_lm/pretrain.py --sample 20            # only prints lines of its text

Everything comes from this file. It writes its own text (everyday how-to lines: a goal, a situation,
a cue, the next step; and plain facts about kitchens and homes), makes a byte-level BPE vocabulary
from it, and trains on an endless fresh stream. The text holds no task of the environments:
SEPARATED names the things of each task that never stand in one line, and this file imports nothing
of the project. WRONG is the share of advice that is wrong. See README.md, the model card.

Map: nouns and verbs -> WORDINGS, Teller -> cooking, storing, evening, chores (the situations) and
fact -> line -> make_tokenizer, batches -> train -> save.

Every text follows from the seed alone, so the order of the random draws must not change: a draw
more or less anywhere makes another text, and another model than the one that is shipped.
"""
import argparse
import json
import math
import os
import random
import re
import tempfile
import time
from itertools import cycle
from pathlib import Path

WRONG = 0.20  # share of the advice that names a random step instead of the sensible one
# Share of the nouns that are made-up words. With them the model learns to read the situation
# instead of knowing the noun.
INVENTED = 0.12
FAVOUR = 0.3  # share of each fact's first wording

# Things of one task never share a line with each other: (any of these, any of those).
TASK_FOODS = ("pancake", "cheese", "hamburger", "apple pie", "pizza")
SEPARATED = (
    (("salad",), ("tomato", "lettuce", "onion")),
    (("microwave",), TASK_FOODS),
    (("dishwasher",), ("dishes",)),
    (("washing machine",), ("clothes",)),
    (("TV",), ("chips", "milk", "sofa", "coffee table")),
    (("chips",), ("milk",)),
)

# ---- nouns and verbs; one that stands twice is drawn twice as often

FOODS = """tomato lettuce onion carrot potato cucumber pepper mushroom celery leek spinach cabbage
radish turnip pumpkin garlic ginger parsley basil mint chili bean pea corn beetroot broccoli
zucchini aubergine avocado apple pear peach plum lemon lime orange banana mango melon grape cherry
berry fig date olive egg ham sausage fish shrimp tofu chicken bacon""".split()
SNACKS = """pancake cheese hamburger pizza chips milk juice tea coffee water cocoa cookie cake bread
toast muffin waffle bagel pretzel popcorn yogurt pudding butter jam honey soup rice pasta noodles
cereal candy chocolate donut sandwich omelette burrito taco lasagna casserole pastry croissant
biscuits crackers nuts raisins soda lemonade""".split()
SNACKS += ["apple pie", "ice cream", "hot dog", "fruit pie", "meat pie", "potato cake"]
SNACKS += ["orange juice", "baked apple", "fish pie", "roast chicken"]
THINGS = """book cup plate spoon fork knife towel blanket pillow hat coat scarf shirt clothes dishes
shoes glove sock bottle candle vase clock letter newspaper magazine pen pencil brush soap sponge
comb key phone camera umbrella bag doll ball puzzle toy rope hammer nail broom bucket mop cloth
tablet notebook folder ticket coin ring photo map parcel basket kettle glasses tools""".split()
CONTAINERS = """oven fridge freezer cupboard cabinet drawer box chest suitcase wardrobe trunk bin
crate toolbox closet locker safe breadbox dryer toaster cooler basket pantry case tin
steamer""".split()
CONTAINERS += ["lunch box", "toy box", "filing cabinet", "pizza oven", "spice drawer"]
CONTAINERS += ["drying machine", "ice box", "sewing box"]
CLEANABLE = ["microwave", "dishwasher", "washing machine"]
SURFACES = """table shelf desk bench stand tray counter windowsill dresser stool sideboard rack mat
mantel""".split()
SURFACES += ["coffee table", "side table", "kitchen table", "bedside table", "work table"]
DEVICES = """radio lamp fan heater computer projector stereo printer screen piano laptop speaker
monitor kettle lantern console""".split()
DEVICES += ["TV", "record player", "video player", "music box", "game machine"]
SEATS = """sofa chair armchair bench stool couch rocker cushion bed recliner beanbag swing throne
hammock""".split() + ["easy chair"]
ROOMS = ["kitchen", "bathroom", "bedroom", "living room"] * 3
ROOMS += ["hall", "garage", "cellar", "attic", "garden", "study", "office", "dining room"]
ROOMS += ["laundry room", "nursery", "porch", "workshop"]
USUAL_ROOM = {
    "living room": ["sofa", "TV", "coffee table", "armchair", "couch", "stereo", "piano",
                    "record player", "projector", "radio"],
    "kitchen": ["oven", "fridge", "microwave", "dishwasher", "toaster", "kettle", "freezer",
                "pantry", "breadbox"],
    "bedroom": ["bed", "wardrobe", "dresser", "pillow", "blanket", "lamp"],
    "bathroom": ["soap", "towel", "washing machine", "comb", "dryer", "sponge"],
    "study": ["desk", "computer", "printer"],
    "garage": ["toolbox", "hammer"],
}
VESSELS = "bowl bowl bowl bowl bowl pot pan jar dish basin jug dish cup plate tray".split()
DISHES = """salad soup stew sauce curry dip salsa omelette sandwich filling pie smoothie snack mix
plate dinner starter""".split()
PLACES = ["first board", "second board"] * 3
PLACES += ["third board", "board", "cutting board", "worktop", "block", "left board", "right board"]
HATCHES = ["serving counter", "serving table", "hatch", "guest table", "serving window"]
CUTS = [("chop", "chopped")] * 4
CUTS += [("cut", "cut"), ("slice", "sliced"), ("dice", "diced"), ("peel", "peeled")]
CUTS += [("wash", "washed")]
NAMES = "Anna Ben Carl Dora Emil Fay Gus Hana Ivo June Karl Lena".split()
ONSETS = "b d f g h k l m n p r s t v w z bl br dr fl gr pl st tr".split()
VOWELS = "a e i o ee".split()
ENDS = ["", "", "n", "r", "l", "m"]

GET = ["pick up", "take", "fetch", "grab", "get"]
WALK = ["walk to", "go to", "move to", "approach", "reach", "visit", "head to"]
ENTER = ["enter", "go to", "visit", "head to", "walk to", "proceed to"]
PUT = ["put", "place", "lay", "set"]
CLOSE = ["close", "shut"]
SIT = ["sit on", "sit down on"]
STORE = "put put heat heat wash store keep warm bake pack hide lock dry".split()
ANY_VERB = GET + WALK + ["open", "close", "serve", "chop", "switch on", "sit on", "enter"]
USES = {
    "radio": "listen to", "stereo": "listen to", "record player": "listen to",
    "projector": "watch", "screen": "watch", "video player": "watch", "monitor": "watch",
    "piano": "play", "music box": "listen to", "lamp": "read by", "lantern": "read by",
    "fan": "cool down by", "heater": "warm up by",
}


def join(parts):
    if len(parts) < 2:
        return "".join(parts)
    return ", ".join(parts[:-1]) + " and " + parts[-1]


def each(nouns):
    return ["the " + noun for noun in nouns]


def a(noun):
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def do(rng, verbs, noun, rest=""):
    return f"{rng.choice(verbs)} the {noun}{rest}"


def invented(rng):
    """A made-up noun of two or three syllables."""
    return "".join(
        rng.choice(ONSETS) + rng.choice(VOWELS) + rng.choice(ENDS)
        for _ in range(rng.choice((2, 2, 3)))
    )


def one(rng, nouns):
    """A noun of a kind, sometimes an invented one."""
    return invented(rng) if rng.random() < INVENTED else rng.choice(nouns)


def some(rng, nouns, count):
    """`count` different nouns of a kind, a few of them invented."""
    chosen = []
    while len(chosen) < count:
        noun = one(rng, nouns)
        if noun not in chosen:
            chosen.append(noun)
    return chosen


def usual_room(thing, otherwise):
    return next((room for room, things in USUAL_ROOM.items() if thing in things), otherwise)


def other_room(rng, room):
    return rng.choice([other for other in ROOMS if other != room])


def state_of(rng, noun, is_open):
    words = ["open", "open", "opened"] if is_open else ["closed", "closed", "shut"]
    return f"{rng.choice(words)} {noun}"


# Each fact of a situation in several wordings. N is "You", "I" or a name, and s, be, carry, have,
# my and sub are the forms that go with it.
WORDINGS = {
    "wants": [
        "{N} want{s} to {what}.", "{N} would like to {what}.", "The goal is to {what}.",
        "The task is to {what}.", "{N} plan{s} to {what}.", "Here is how to {what}.",
        "It is time to {what}.", "{N} need{s} to {what}.",
    ],
    "room": [
        "{N} {be} in the {what}.", "{N} stand{s} in the {what}.", "This is the {what}.",
        "{N} {have} come into the {what}.", "The place is the {what}.",
    ],
    "sees": [
        "{N} see{s} {what}.", "Here {are} {what}.", "In view: {what}.", "{N} notice{s} {what}.",
        "{N} can see {what}.",
    ],
    "at": [
        "{N} {be} at {what}.", "{N} {be} next to {what}.", "{N} stand{s} by {what}.",
        "Within reach: {what}.", "{N} {be} close to {what}.",
    ],
    "holds": [
        "{N} hold{s} {what}.", "{N} {carry} {what}.", "In hand: {what}.",
        "{N} {have} {what} in hand.", "{N} {be} holding {what}.",
    ],
    "holds nothing": [
        "{N} hold{s} nothing.", "{my} hands are empty.", "{N} {have} nothing in hand.",
        "{N} {carry} nothing.", "",
    ],
    "advice": [
        "{my} next step is to {what}.", "The next step is to {what}.",
        "The first step is to {what}.", "{my} first step is to {what}.",
        "Next, {sub} should {what}.", "Now it is best to {what}.", "First {sub} should {what}.",
        "{N} decide{s} to {what}.",
    ],
}


class Teller:
    """One moment of a situation, told of "you", "I" or a named person, each fact in some wording.

    A situation fills in the goal, the right steps, what is seen, at hand and held (nouns without
    their article), further sentences (extra), and the nouns that wrong advice may name. The room is
    None where no situation needs one, and "" where it goes unsaid this time.
    """

    def __init__(self, rng):
        self.rng = rng
        self.goal, self.room = "", None
        self.steps, self.seen, self.at, self.held, self.extra, self.nouns = ([] for _ in range(6))
        who = rng.random()
        name = "You" if who < 0.7 else "I"
        if who >= 0.8:
            name = rng.choice(NAMES)
        self.name = name
        third = name not in ("You", "I")
        self.s = "s" if third else ""
        self.forms = {
            "N": name,
            "s": self.s,
            "be": {"You": "are", "I": "am"}.get(name, "is"),
            "carry": "carries" if third else "carry",
            "have": "has" if third else "have",
            "my": {"You": "Your", "I": "My"}.get(name, name + "'s"),
            "sub": "you" if name == "You" else name,
        }

    def choose_verbs(self):
        self.walk, self.get = self.rng.choice(WALK), self.rng.choice(GET)

    def see(self, nouns, chance):
        """See each of the nouns with this chance."""
        self.seen += [noun for noun in nouns if self.rng.random() < chance]

    def stand(self, noun, chance):
        """Stand at the noun with this chance."""
        if self.rng.random() < chance:
            self.at = [noun]

    def pick(self, *wordings):
        return wordings[0] if self.rng.random() < FAVOUR else self.rng.choice(wordings)

    def say(self, kind, things):
        """kind: a key of WORDINGS; things: a list of texts. Of an empty one only "holds" speaks."""
        if not things and kind != "holds":
            return ""
        wording = self.pick(*WORDINGS[kind if things else "holds nothing"])
        are = "is" if len(things) == 1 else "are"
        return wording.format(**self.forms, what=join(things), are=are)

    def lies(self, thing, where):
        plural = thing.endswith("s") and not thing.endswith("ss")
        be, lie = ("are", "lie") if plural else ("is", "lies")
        return self.pick(
            f"The {thing} {be} {where}.", f"The {thing} {lie} {where}.",
            f"There {be} the {thing} {where}.",
        )

    def facts(self):
        """The sentences of the situation. One that goes unsaid is an empty text."""
        room = [] if self.room is None else [self.say("room", [self.room] if self.room else [])]
        return [
            *room, self.say("sees", each(self.seen)), self.say("at", each(self.at)),
            *self.extra, self.say("holds", each(self.held)),
        ]


# ---- cooking: cut the ingredients of a dish one by one, gather them in a vessel, serve

PHASES = """start start carry carry carry cut cut walk gather gather add add fill serve serve
putback""".split()


class Meal:
    """A dish, its foods in their order of cutting, and what else stands in the kitchen."""

    def __init__(self, rng):
        self.foods = some(rng, FOODS, rng.choice((1, 1, 2, 2, 3)))
        others = some(rng, FOODS, rng.choice((0, 0, 1, 2)))
        self.others = [food for food in others if food not in self.foods]
        self.vessel = rng.choice(VESSELS)
        self.dish = rng.choice(DISHES)
        self.hatch = rng.choice(HATCHES)
        self.cut, self.done = rng.choice(CUTS)
        self.boards = list(dict.fromkeys(rng.choice(PLACES) for _ in range(4)))
        rng.shuffle(self.foods)
        self.ready = [food for food in self.foods[1:] if rng.random() < 0.5]

    def filled(self, foods):
        """The vessel with the cut foods in it."""
        contents = join([f"the {self.done} {food}" for food in foods])
        return f"{self.vessel} with {contents}" if foods else self.vessel

    def add(self, food):
        """The steps that bring a food into the vessel."""
        ways = ("put the {} in", "add the {} to", "drop the {} into")
        return [f"{way.format(food)} the {self.vessel}" for way in ways]


def cutting(rng, tell, meal, phase):
    """Fetch a food, bring it to a board, cut it. Return what lies where, {food: board}."""
    x, board = meal.foods[0], meal.boards[0]
    raw = [food for food in meal.foods[1:] if food not in meal.ready]
    lying = dict(zip(meal.ready, meal.boards[1:], strict=False))
    if phase == "start":
        tell.see([x], 0.8)
        tell.see(raw, 0.6)
        tell.steps = [do(rng, GET, food) for food in [x, *raw]]
    elif phase in ("cut", "walk"):
        lying[x] = board
        tell.see(raw, 0.4)
        if phase == "cut":
            tell.at = [board]
            tell.steps = [f"{meal.cut} the {x}"]
        else:
            tell.steps = [do(rng, WALK, x), do(rng, WALK, board)]
    else:
        if phase == "putback":
            x = meal.others[0] if meal.others else invented(rng)
        tell.held = [x]
        tell.see(raw, 0.6)
        tell.stand(board, 0.4)
        tell.steps = [do(rng, PUT, x, f" on the {board}")]
        if phase == "putback" and rng.random() < 0.3:
            tell.steps = [f"put down the {x}"]
    return lying


def filling(rng, tell, meal, phase):
    """Everything is cut: bring food and vessel together, serve. Return what lies where."""
    x, vessel, boards = meal.foods[0], meal.vessel, meal.boards
    share = 0.5 if phase in ("add", "fill") else 1.0
    whole = [food for food in meal.foods[1:] if rng.random() < share]
    if phase == "gather":
        lying = dict(zip(meal.foods, cycle(boards)))
        tell.stand(boards[0], 0.6)
        tell.steps = [do(rng, GET, x), do(rng, GET, vessel)]
    elif phase == "add":
        lying = dict(zip(whole, cycle(boards[1:])))
        tell.held = [f"{meal.done} {x}"]
        tell.stand(boards[0], 0.5)
        tell.steps = meal.add(x)
    elif phase == "fill":
        lying = dict(zip([food for food in meal.foods if food not in whole], cycle(boards)))
        left = rng.choice(list(lying))
        tell.held = [meal.filled(whole)]
        tell.stand(lying[left], 0.5)
        tell.steps = meal.add(left)
        tell.steps += [f"{verb} the {vessel} at the {lying[left]}" for verb in ("fill", "load")]
    else:
        lying = {}
        tell.held = [meal.filled(meal.foods)]
        tell.stand(meal.hatch, 0.3)
        tell.steps = [f"serve the {meal.dish}"] * 3
        tell.steps += [f"serve the {vessel}", f"bring the {meal.dish} to the {meal.hatch}"]
    return lying


def cooking(rng, tell):
    """Make a dish: one moment of it."""
    meal = Meal(rng)
    x, vessel, dish = meal.foods[0], meal.vessel, meal.dish
    phase = rng.choice(PHASES)
    work = filling if phase in ("gather", "add", "fill", "serve") else cutting
    lying = work(rng, tell, meal, phase)
    if not "".join(tell.held).startswith(vessel):
        tell.see([vessel], 0.35)
    tell.see([food for food in meal.others if [food] != tell.held], 0.6)
    on = []
    for food, board in lying.items():
        raw = food == x and phase in ("cut", "walk")
        if raw or phase == "fill" or rng.random() < 0.75:
            on.append(f"{food if raw else meal.done + ' ' + food} on the {board}")
    rng.shuffle(tell.seen)
    tell.seen += on
    order = meal.foods[:]
    rng.shuffle(order)
    foods = join(order)
    tell.goal = tell.pick(
        f"make {a(foods)} {dish}", f"prepare {a(dish)} of {foods}", f"cook {a(foods)} {dish}",
        f"make {a(dish)} with {join(each(order))}", f"serve {a(dish)} of {foods}",
    )
    tell.nouns = meal.foods + meal.others + [vessel] + meal.boards[:2]


# ---- storing: something goes into a container that opens and closes

# Of each stage: whether the box is open (None: either), what is seen, at hand and held, the steps.
STORING = {
    "away": (None, "x box", "", "", "{walk} the {x}"),
    "at x": (None, "box", "x", "", "{get} the {x}"),
    "held": (None, "box", "", "x", "{walk} the {box}"),
    "open": (False, "", "box", "x", "open the {box}"),
    "put": (True, "", "box", "x", "{put} the {x} in the {box}"),
    "close": (True, "", "box", "", "{close} the {box}"),
    "back": (True, "x", "box", "", "{walk} the {x}"),
    "box first": (False, "x", "box", "", "open the {box} | {walk} the {x}"),
    "inside, away": (True, "box", "", "", "{walk} the {box}"),
}
STAGES = ["away", "away", "at x", "at x", "held", "held", "open", "open", "put", "put", "close"]
STAGES += ["close", "back", "box first", "elsewhere", "carried off", "inside, away"]
STAGE_VERBS = {"put": PUT, "close": CLOSE}


def from_afar(rng, tell, x, box):
    """The box is in another room: go there."""
    room = tell.room
    tell.room = other_room(rng, room)
    target = usual_room(box, "kitchen" if x in SNACKS else room)
    if rng.random() < 0.5:
        tell.extra = [tell.lies(box, f"in the {room}")]
        target = room
    if target == tell.room:
        tell.room = "hall"
    tell.steps = [do(rng, ENTER, target)]


def storing(rng, tell):
    """Put something into a container: one moment of it."""
    x = one(rng, SNACKS if rng.random() < 0.6 else THINGS)
    box = one(rng, CONTAINERS)
    tell.room = rng.choice(ROOMS)
    others = [n for n in some(rng, THINGS + SNACKS, rng.choice((0, 0, 0, 1))) if n != x]
    verb = rng.choice(STORE)
    tell.goal = tell.pick(
        f"{verb} the {x} in the {box}", f"{verb} the {x} inside the {box}",
        f"shut the {x} in the {box}", f"have the {x} in the {box}",
    )
    tell.choose_verbs()
    opened = rng.random() < 0.4
    stage = rng.choice(STAGES)
    if stage in STORING:
        is_open, *where, steps = STORING[stage]
        now = {"x": x, "box": state_of(rng, box, opened if is_open is None else is_open)}
        tell.seen, tell.at, tell.held = ([now[part] for part in parts.split()] for parts in where)
        words = {"x": x, "box": box, "walk": tell.walk, "get": tell.get}
        if stage in STAGE_VERBS:
            words[stage] = rng.choice(STAGE_VERBS[stage])
        tell.steps = steps.format(**words).split(" | ")
        if stage in ("close", "inside, away"):
            tell.extra = [tell.lies(x, f"in the {box}")]
    else:
        tell.held = [x] if stage == "carried off" else []
        from_afar(rng, tell, x, box)
    tell.seen += others
    rng.shuffle(tell.seen)
    tell.nouns = [x, box, tell.room, *others]
    if rng.random() >= 0.8:
        tell.room = ""


# ---- evening: fetch one or two things, switch a device on, sit down. A goal holds one or two of
# these three, never all.


class Evening:
    """What the evening is made of: things to fetch, a device, a seat, and the two rooms."""

    def __init__(self, rng):
        kind = SNACKS if rng.random() < 0.7 else THINGS
        self.items = some(rng, kind, rng.choice((0, 1, 1, 2, 2, 2)))
        self.device = self.seat = None
        if rng.random() < 0.6 or not self.items:
            self.device = one(rng, DEVICES)
        if rng.random() < (0 if self.items and self.device else 0.7):
            self.seat = one(rng, SEATS)
        self.surface = one(rng, SURFACES)
        others = some(rng, SEATS + DEVICES + SURFACES, rng.choice((0, 0, 1, 2)))
        furniture = dict.fromkeys([self.device, self.seat, self.surface, *others])
        self.furniture = [noun for noun in furniture if noun]
        self.source = "kitchen" if rng.random() < 0.6 else rng.choice(ROOMS)
        self.target = usual_room(self.device or self.seat, rng.choice(ROOMS))
        if self.target == self.source:
            self.target = other_room(rng, self.source)

    def goal(self, rng):
        things = join(each(self.items))
        with_items = f" with {things}" if things else ""
        on_seat = f" {rng.choice(['on', 'on', 'in'])} the {self.seat}" if self.seat else ""
        if self.device:
            uses = ["watch", "use", "listen to", "enjoy", "try", "play with"]
            use = USES.get(self.device) or rng.choice(uses)
            return f"{use} the {self.device}{on_seat}{with_items}"
        if self.seat:
            return f"{rng.choice(['sit', 'rest', 'relax'])}{on_seat}{with_items}"
        return f"{rng.choice(['bring', 'carry', 'take', 'move'])} {things} to the {self.target}"

    def stage(self, rng):
        stages = ["switch on"] * 2 + ["to device"] * 2 if self.device else []
        stages += ["to seat", "to seat", "sit", "sit"] if self.seat else []
        stages += ["first", "at first", "go", "go", "elsewhere"] if self.items else ["go"]
        stages += ["second", "at second", "full", "full at table"] if len(self.items) == 2 else []
        return rng.choice(stages)


def taking(rng, tell, home, stage):
    """Stand in the room of the things: take the first, then the second."""
    taken = int(stage.endswith("second"))
    tell.room = home.source
    tell.held, tell.seen = home.items[:taken], home.items[taken:]
    if stage.startswith("at"):
        tell.at = tell.seen[:1]
        tell.steps = [f"{tell.get} the {tell.seen[0]}"]
    else:
        tell.steps = [f"{tell.walk} the {item}" for item in tell.seen]


def moving(rng, tell, home, stage):
    """Go to the room of the things, and with them to the room where they are wanted."""
    if stage == "elsewhere":
        tell.room = other_room(rng, home.source)
        tell.steps = [do(rng, ENTER, home.source)]
        if home.source != "kitchen" or rng.random() < 0.4:
            tell.extra = [tell.lies(home.items[0], f"in the {home.source}")]
        return
    tell.room = home.source
    tell.held = home.items[:]
    tell.steps = [do(rng, ENTER, home.target)]
    wanted = home.device or home.seat
    known = home.device in USUAL_ROOM.get(home.target, ())
    if wanted and (not known or rng.random() < 0.3):
        tell.extra = [tell.lies(wanted, f"in the {home.target}")]


def freeing(rng, tell, home, stage):
    """Two hands hold two things: put one down, so that a hand is free."""
    tell.seen, tell.held = home.furniture, home.items[:]
    if stage == "full":
        tell.steps = [f"{tell.walk} the {home.surface}"]
    else:
        tell.at = [home.surface]
        tell.steps = [do(rng, PUT, item, f" on the {home.surface}") for item in home.items]


def settling(rng, tell, home, stage):
    """The things lie ready, or are held: switch the device on, sit down."""
    spread = [item for item in home.items if rng.random() < 0.5] or home.items[:1]
    if rng.random() < 0.3:
        spread = home.items
    tell.seen, tell.held = home.furniture, [item for item in home.items if item not in spread]
    tell.extra = [tell.lies(item, f"on the {home.surface}") for item in spread]
    device, seat = home.device, home.seat
    if device and stage in ("to seat", "sit"):
        states = ("on", "running", "switched on")
        tell.extra.append(tell.pick(*(f"The {device} is {state}." for state in states)))
    if stage == "to device":
        tell.steps = [f"{tell.walk} the {device}"]
        tell.stand(home.surface, 0.5)
    elif stage == "switch on":
        tell.at = [device]
        tell.steps = [do(rng, ["switch on", "turn on"], device)]
    elif stage == "to seat":
        tell.steps = [f"{tell.walk} the {seat}"]
        if device:
            tell.stand(device, 0.7)
    else:
        tell.at = [seat]
        tell.steps = [do(rng, SIT, seat)]


EVENING = {
    "first": taking, "at first": taking, "second": taking, "at second": taking,
    "elsewhere": moving, "go": moving, "full": freeing, "full at table": freeing,
    "to device": settling, "switch on": settling, "to seat": settling, "sit": settling,
}


def evening(rng, tell):
    """Spend an evening: one moment of it."""
    home = Evening(rng)
    tell.goal = home.goal(rng)
    tell.choose_verbs()
    stage = home.stage(rng)
    tell.room = home.target
    EVENING[stage](rng, tell, home, stage)
    tell.seen = [noun for noun in tell.seen if noun not in tell.at]
    rng.shuffle(tell.seen)
    rng.shuffle(tell.held)
    tell.nouns = home.furniture + home.items + [home.source, home.target]


# ---- chores: short goals of one or two steps


def approach(rng, tell, thing, verbs):
    """Use the thing where it is at hand, else walk to it."""
    if rng.random() < 0.6:
        tell.at = [thing]
        tell.steps = [do(rng, verbs, thing)]
    else:
        tell.seen = [thing]
        tell.steps = [f"{tell.walk} the {thing}"]


def switch_off(rng, tell, x, tool):
    device = one(rng, DEVICES)
    tell.goal = rng.choice([
        "go to sleep", f"save power and stop the {device}", "leave the house",
        f"have the {device} off", "have some quiet",
    ])
    tell.extra = [f"The {device} is on."]
    approach(rng, tell, device, ["turn off", "switch off"])
    tell.nouns = [device, x]


def get_up(rng, tell, x, tool):
    seat = one(rng, SEATS)
    tell.goal = rng.choice([
        f"fetch the {x}", f"go to the {rng.choice(ROOMS)}", "leave the room", f"clean the {x}",
    ])
    tell.extra = [f"{tell.name} sit{tell.s} on the {seat}."]
    tell.steps = [do(rng, ["stand up from", "get up from"], seat)]
    tell.nouns = [seat, x]


def sit_down(rng, tell, x, tool):
    seat = one(rng, SEATS)
    tell.goal = rng.choice([
        "rest a little", "put the feet up", "take a break", f"sit on the {seat}",
    ])
    approach(rng, tell, seat, SIT)
    tell.seen.append(x)
    tell.nouns = [seat, x]


def clean(rng, tell, x, tool):
    thing = rng.choice(CLEANABLE + CONTAINERS + SURFACES)
    job = do(rng, ["clean", "wipe", "dust", "repair", "paint"], thing)
    tell.goal = f"{job} with the {tool}"
    tell.nouns = [thing, tool]
    stage = rng.choice(["get", "at", "go", "do", "open"])
    if stage == "get":
        tell.seen = [thing, tool]
        tell.steps = [f"{tell.walk} the {tool}"]
    elif stage == "at":
        tell.at, tell.seen = [tool], [thing]
        tell.steps = [f"{tell.get} the {tool}"]
    else:
        tell.held = [tool]
        if stage == "go":
            tell.seen = [thing]
            tell.steps = [f"{tell.walk} the {thing}"]
        elif stage == "open" and thing not in SURFACES:
            tell.at = [state_of(rng, thing, False)]
            tell.steps = [f"open the {thing}"]
        else:
            tell.at = [thing]
            tell.steps = [job]


def tidy(rng, tell, x, tool, both=False):
    """Put x, or two things, on a surface."""
    surface = one(rng, SURFACES)
    y = one(rng, THINGS + SNACKS)
    things = [x, y] if both and y != x else [x]
    tell.nouns = [x, surface, y]
    tell.goal = f"{rng.choice(PUT)} {join(each(things))} on the {surface}"
    tell.seen = [surface]
    stage = rng.choice(["far", "at", "go", "put"] + ["next", "next at"] * (len(things) == 2))
    if stage == "far":
        tell.seen += things
        tell.steps = [f"{tell.walk} the {thing}" for thing in things]
    elif stage == "at":
        tell.at, tell.steps = [x], [f"{tell.get} the {x}"]
    elif stage == "next":
        tell.seen += [y]
        tell.held, tell.steps = [x], [f"{tell.walk} the {y}"]
    elif stage == "next at":
        tell.held, tell.at, tell.steps = [x], [y], [f"{tell.get} the {y}"]
    elif stage == "go":
        tell.held, tell.steps = things, [f"{tell.walk} the {surface}"]
    else:
        tell.seen, tell.held, tell.at = [], things, [surface]
        tell.steps = [do(rng, PUT, thing, f" on the {surface}") for thing in things]


def tidy_two(rng, tell, x, tool):
    tidy(rng, tell, x, tool, both=True)


def visit(rng, tell, x, tool):
    room = other_room(rng, tell.room)
    tell.goal = do(rng, ["look around", "be in", "clean", "meet a friend in"], room)
    tell.seen = [x]
    tell.steps = [do(rng, ENTER, room)]
    tell.nouns = [x, room]


CHORES = [switch_off, switch_off, get_up, clean, tidy, tidy, visit, tidy_two, sit_down]


def chores(rng, tell):
    """Switch off, get up, clean, tidy, go to a room: one moment of it."""
    x, tool = one(rng, THINGS + SNACKS), one(rng, THINGS)
    chore = rng.choice(CHORES)
    tell.choose_verbs()
    tell.room = rng.choice(ROOMS)
    chore(rng, tell, x, tool)
    rng.shuffle(tell.seen)
    if rng.random() >= 0.7:
        tell.room = ""


# ---- the text

FACTS = (
    "The {thing} is in the {room}.",
    "In most homes the {thing} stands in the {room}.",
    "Look for the {thing} in the {room}.",
    "To find the {thing}, go to the {room}.",
    "The {snack} is kept in the kitchen.",
    "The {food} is in the kitchen.",
    "People sit on the {seat}.",
    "The {seat} is for sitting.",
    "The {device} must be switched on before use.",
    "Switch on the {device} first, then sit down.",
    "To watch a film, switch on the {device} and sit on the {seat}.",
    "First {cut} the {food}, then put it in a {bowl}.",
    "A {done} {food} goes into the {vessel}.",
    "Put the {food} on a board before you {cut} it.",
    "Serve the {dish} when all is ready.",
    "Open the {box} before you put the {x} in.",
    "Close the {box} again.",
    "With both hands full, put the {x} down first.",
    "Take the {x} before you leave the {room}.",
    "To hold the {x}, go there and pick it up.",
)


def fact(rng):
    """A plain sentence: where things are, what they are for, what comes before what."""
    words = {"room": rng.choice(list(USUAL_ROOM))}
    words["thing"] = rng.choice(USUAL_ROOM[words["room"]])
    for name, nouns in (("food", FOODS), ("seat", SEATS), ("device", DEVICES)):
        words[name] = rng.choice(nouns)
    words["cut"], words["done"] = rng.choice(CUTS)
    for name, nouns in (
        ("x", THINGS + SNACKS), ("box", CONTAINERS + CLEANABLE), ("snack", SNACKS),
        ("bowl", VESSELS), ("vessel", VESSELS), ("dish", DISHES),
    ):
        words[name] = rng.choice(nouns)
    return rng.choice(FACTS).format(**words)


SITUATIONS = [cooking] * 5 + [storing] * 4 + [evening] * 5 + [chores] * 3


def advice(rng):
    """A situation with its goal before it and the next step, right or wrong, after it."""
    tell = Teller(rng)
    rng.choice(SITUATIONS)(rng, tell)
    facts = tell.facts()
    step = rng.choice(tell.steps)
    if rng.random() < WRONG:
        step = f"{rng.choice(ANY_VERB)} the {rng.choice(tell.nouns)}"
    if rng.random() < 0.15:
        rng.shuffle(facts)
    sentences = (tell.say("wants", [tell.goal]), *facts, tell.say("advice", [step]))
    return " ".join(filter(None, sentences))


def mixes_a_task(text):
    """Whether things of one task meet in the text (SEPARATED)."""
    def any_of(nouns):
        return any(re.search(rf"\b{noun}", text) for noun in nouns)

    return any(any_of(these) and any_of(those) for these, those in SEPARATED)


def line(rng):
    """One line of text. It is drawn again if things of one task meet in it."""
    while True:
        text = fact(rng) if rng.random() < 0.06 else advice(rng)
        if not mixes_a_task(text):
            return text


# ---- the model


def make_tokenizer(rng, vocabulary, lines):
    """Byte-level BPE of the text, with <s> before every text, as in Llama."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator((line(rng) for _ in range(lines)), trainer)
    raw.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        model_max_length=512,
    )


def batches(rng, tokenizer, tokens):
    """Endless fresh lines in batches of like length, about `tokens` each.

    Every row is one line: <s>, its tokens, </s>, and padding up to the longest of its batch.
    """
    import torch

    while True:
        texts = [line(rng) for _ in range(2 * tokens)]
        rows = [ids + [tokenizer.eos_token_id] for ids in tokenizer(texts)["input_ids"]]
        rows.sort(key=len)
        chunks, start = [], 0
        while start < len(rows):
            stop = start + 1
            while stop < len(rows) and len(rows[stop]) * (stop + 1 - start) <= tokens:
                stop += 1
            chunks.append(rows[start:stop])
            start = stop
        rng.shuffle(chunks)
        for chunk in chunks:
            width = len(chunk[-1])
            pad = tokenizer.pad_token_id
            yield torch.tensor([row + [pad] * (width - len(row)) for row in chunk])  # B, T


def make_model(args, tokenizer):
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=args.hidden,
        intermediate_size=args.hidden * 3,
        num_hidden_layers=args.layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    ))


def train(args):
    """Plain next-token cross-entropy, AdamW, linear warm-up and cosine decay."""
    import torch
    from tqdm import tqdm

    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)
    tokenizer = make_tokenizer(rng, args.vocabulary, args.lines)
    model = make_model(args, tokenizer).train()
    optimiser = torch.optim.AdamW(
        model.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=0.01,
    )
    stream, started, losses = batches(rng, tokenizer, args.batch), time.time(), []
    progress = tqdm(range(args.steps), mininterval=5)
    for step in progress:
        ramp = min(1.0, (step + 1) / min(100, args.steps))
        cosine = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / args.steps))
        optimiser.param_groups[0]["lr"] = args.lr * ramp * cosine
        ids = next(stream)
        # Causal attention makes the padding on the right harmless.
        logits = model(input_ids=ids[:, :-1]).logits  # B, T-1, V
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), ids[:, 1:].flatten(), ignore_index=tokenizer.pad_token_id,
        )
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        losses.append(loss.item())
        if step % 50 == 0:
            progress.set_postfix(loss=f"{sum(losses[-50:]) / len(losses[-50:]):.3f}")
    save(model.eval(), tokenizer, Path(args.out))
    last = losses[-100:]
    facts = {
        "parameters": model.num_parameters(), "vocabulary": len(tokenizer),
        "steps": args.steps, "seed": args.seed, "loss": round(sum(last) / len(last), 4),
        "minutes": round((time.time() - started) / 60, 1),
    }
    print(json.dumps(facts))
    return facts


def save(model, tokenizer, out):
    """Write the standard Hugging Face layout.

    Each file is written whole beside its place and then renamed into it.
    """
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        # Name the class that older and newer versions of transformers know.
        path = Path(folder) / "tokenizer_config.json"
        settings = json.loads(path.read_text())
        settings.pop("backend", None)
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
        path.write_text(json.dumps(settings, indent=2) + "\n")
        for file in sorted(Path(folder).iterdir()):
            file.chmod(0o644)
            os.replace(file, out / file.name)


# Flag: default and help. What is given in its place has the type of the default.
FLAGS = {
    "out": (str(Path(__file__).parent), "folder for the model and tokenizer files"),
    "seed": (1, "seed of the text, the weights and the order"),
    "steps": (1500, "optimiser steps"),
    "batch": (2048, "tokens in a batch"),
    "lr": (3e-3, "peak learning rate"),
    "hidden": (128, "hidden size"),
    "layers": (4, "layers"),
    "vocabulary": (768, "tokens of the vocabulary, 256 of them single bytes"),
    "lines": (20000, "lines that the vocabulary is made from"),
    "threads": (2, "CPU threads"),
    "sample": (0, "print this many lines of the text and stop"),
}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name, (default, text) in FLAGS.items():
        parser.add_argument(f"--{name}", type=type(default), default=default, help=text)
    parser.add_argument(
        "--tiny", action="store_true", help="three steps of a very small model, to test this file",
    )
    args = parser.parse_args(argv)
    if args.sample:
        rng = random.Random(args.seed)
        print("\n".join(line(rng) for _ in range(args.sample)))
        return None
    if args.tiny:
        args.steps, args.batch, args.hidden, args.layers, args.lines = 3, 512, 32, 1, 500
    return train(args)


if __name__ == "__main__":
    main()

"""Pre-train pocket_lm: the small Llama-architecture language model that stands in for LLaMA-7B (TWOSOME, section 5 uses 7B).

    python pocket_lm/pretrain.py                        # makes pocket_lm/ again: text, tokenizer, model
    python pocket_lm/pretrain.py --out /tmp/lm --seed 1 --steps 500
    python pocket_lm/pretrain.py --sample 20            # only prints lines of its text

Everything comes from this file: it writes its own text (everyday how-to lines: a goal, a situation, a cue, the next step; and
plain facts about kitchens and homes), makes a byte-level BPE vocabulary from it, and trains on an endless fresh stream.
The text holds no task of the environments: SEPARATED names the things of each task that never stand in one line, and this file
imports nothing of the project. WRONG is the share of advice that is wrong. See README.md, the model card.

Map: nouns and verbs -> WORDINGS, Teller -> cooking, storing, evening, chores, fact (situations) -> line -> tokenizer -> train -> save.
"""
import argparse
import json
import math
import os
import random
import re
import tempfile
import time
from pathlib import Path

WRONG = 0.20  # share of the advice that names a random step instead of the sensible one
INVENTED = 0.12  # share of the nouns that are made-up words, so that the model reads the situation instead of knowing the noun

# Things of one task never share a line with each other: (any of these, any of those).
TASK_FOODS = ("pancake", "cheese", "hamburger", "apple pie", "pizza")
SEPARATED = (
    (("salad",), ("tomato", "lettuce", "onion")),
    (("microwave",), TASK_FOODS), (("dishwasher",), ("dishes",)), (("washing machine",), ("clothes",)),
    (("TV",), ("chips", "milk", "sofa", "coffee table")), (("chips",), ("milk",)),
)

FOODS = """tomato lettuce onion carrot potato cucumber pepper mushroom celery leek spinach cabbage radish turnip pumpkin garlic ginger
parsley basil mint chili bean pea corn beetroot broccoli zucchini aubergine avocado apple pear peach plum lemon lime orange banana mango
melon grape cherry berry fig date olive egg ham sausage fish shrimp tofu chicken bacon""".split()
SNACKS = """pancake cheese hamburger pizza chips milk juice tea coffee water cocoa cookie cake bread toast muffin waffle bagel pretzel popcorn
yogurt pudding butter jam honey soup rice pasta noodles cereal candy chocolate donut sandwich omelette burrito taco lasagna
casserole pastry croissant biscuits crackers nuts raisins soda lemonade""".split() + ["apple pie", "ice cream", "hot dog", "fruit pie",
          "meat pie", "potato cake", "orange juice", "baked apple", "fish pie", "roast chicken"]
THINGS = """book cup plate spoon fork knife towel blanket pillow hat coat scarf shirt clothes dishes shoes glove sock bottle candle vase clock
letter newspaper magazine pen pencil brush soap sponge comb key phone camera umbrella bag doll ball puzzle toy rope hammer nail broom
bucket mop cloth tablet notebook folder ticket coin ring photo map parcel basket kettle glasses tools""".split()
CONTAINERS = """oven fridge freezer cupboard cabinet drawer box chest suitcase wardrobe trunk bin crate toolbox closet locker safe
breadbox dryer toaster cooler basket pantry case tin steamer""".split() + ["lunch box", "toy box", "filing cabinet", "pizza oven",
              "spice drawer", "drying machine", "ice box", "sewing box"]
CLEANABLE = ["microwave", "dishwasher", "washing machine"]
SURFACES = """table shelf desk bench stand tray counter windowsill dresser stool sideboard rack mat mantel""".split() + [
    "coffee table", "side table", "kitchen table", "bedside table", "work table"]
DEVICES = """radio lamp fan heater computer projector stereo printer screen piano laptop speaker monitor kettle lantern
console""".split() + ["TV", "record player", "video player", "music box", "game machine"]
SEATS = """sofa chair armchair bench stool couch rocker cushion bed recliner beanbag swing throne hammock""".split() + ["easy chair"]
ROOMS = ["kitchen", "bathroom", "bedroom", "living room"] * 3 + ["hall", "garage", "cellar", "attic", "garden", "study", "office",
         "dining room", "laundry room", "nursery", "porch", "workshop"]
USUAL_ROOM = {"living room": ["sofa", "TV", "coffee table", "armchair", "couch", "stereo", "piano", "record player", "projector", "radio"],
              "kitchen": ["oven", "fridge", "microwave", "dishwasher", "toaster", "kettle", "freezer", "pantry", "breadbox"],
              "bedroom": ["bed", "wardrobe", "dresser", "pillow", "blanket", "lamp"],
              "bathroom": ["soap", "towel", "washing machine", "comb", "dryer", "sponge"],
              "study": ["desk", "computer", "printer"], "garage": ["toolbox", "hammer"]}
VESSELS = ["bowl"] * 5 + "pot pan jar dish basin jug dish cup plate tray".split()
DISHES = "salad soup stew sauce curry dip salsa omelette sandwich filling pie smoothie snack mix plate dinner starter".split()
PLACES = ["first board", "second board"] * 3 + ["third board", "board", "cutting board", "worktop", "block", "left board", "right board"]
HATCHES = ["serving counter", "serving table", "hatch", "guest table", "serving window"]
CUTS = [("chop", "chopped")] * 4 + [("cut", "cut"), ("slice", "sliced"), ("dice", "diced"), ("peel", "peeled"), ("wash", "washed")]
NAMES = "Anna Ben Carl Dora Emil Fay Gus Hana Ivo June Karl Lena".split()

GET = ["pick up", "take", "fetch", "grab", "get"]
WALK = ["walk to", "go to", "move to", "approach", "reach", "visit", "head to"]
ENTER = ["enter", "go to", "visit", "head to", "walk to", "proceed to"]
PUT = ["put", "place", "lay", "set"]


def the(noun):
    return "the " + noun


def join(parts):
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def a(noun):
    return ("an " if noun[0] in "aeiou" else "a ") + noun


# Each fact of a situation in several wordings. N: "You", "I" or a name, and s, be, carry, have, my, sub the forms that go with it.
WORDINGS = {
    "wants": ["{N} want{s} to {what}.", "{N} would like to {what}.", "The goal is to {what}.", "The task is to {what}.",
              "{N} plan{s} to {what}.", "Here is how to {what}.", "It is time to {what}.", "{N} need{s} to {what}."],
    "room": ["{N} {be} in the {what}.", "{N} stand{s} in the {what}.", "This is the {what}.", "{N} {have} come into the {what}.",
             "The place is the {what}."],
    "sees": ["{N} see{s} {what}.", "Here {are} {what}.", "In view: {what}.", "{N} notice{s} {what}.", "{N} can see {what}."],
    "at": ["{N} {be} at {what}.", "{N} {be} next to {what}.", "{N} stand{s} by {what}.", "Within reach: {what}.", "{N} {be} close to {what}."],
    "holds": ["{N} hold{s} {what}.", "{N} {carry} {what}.", "In hand: {what}.", "{N} {have} {what} in hand.", "{N} {be} holding {what}."],
    "holds nothing": ["{N} hold{s} nothing.", "{my} hands are empty.", "{N} {have} nothing in hand.", "{N} {carry} nothing.", ""],
    "advice": ["{my} next step is to {what}.", "The next step is to {what}.", "The first step is to {what}.", "{my} first step is to {what}.",
               "Next, {sub} should {what}.", "Now it is best to {what}.", "First {sub} should {what}.", "{N} decide{s} to {what}."],
}
FAVOUR = 0.3  # share of each fact's first wording


class Teller:
    """Says each fact of a situation in one of its wordings, for "you", "I" or a named person."""

    def __init__(self, rng):
        self.rng = rng
        who = rng.random()
        self.name = name = "You" if who < 0.7 else "I" if who < 0.8 else rng.choice(NAMES)
        third = name not in ("You", "I")
        self.s = "s" if third else ""
        self.forms = {"N": name, "s": self.s, "be": {"You": "are", "I": "am"}.get(name, "is"), "carry": "carries" if third else "carry",
                      "have": "has" if third else "have", "my": {"You": "Your", "I": "My"}.get(name, name + "'s"),
                      "sub": "you" if name == "You" else name}

    def pick(self, *wordings):
        return wordings[0] if self.rng.random() < FAVOUR else self.rng.choice(wordings)

    def say(self, kind, what):
        """kind: a key of WORDINGS; what: text, or a list of things ("" for an empty one, which only "holds" speaks of)."""
        if what == [] and kind != "holds":
            return ""
        listed = isinstance(what, list)
        words = {"what": join(what) if listed and what else what, "are": "is" if listed and len(what) == 1 else "are"}
        return self.pick(*WORDINGS[kind if what != [] else "holds nothing"]).format(**self.forms, **words)

    def lies(self, thing, where):
        verb = "are" if thing.endswith("s") and not thing.endswith("ss") else "is"
        return self.pick(f"The {thing} {verb} {where}.", f"The {thing} {'lie' if verb == 'are' else 'lies'} {where}.",
                         f"There {verb} the {thing} {where}.")


def invented(rng):
    """A made-up noun of two or three syllables."""
    syllables = [rng.choice("b d f g h k l m n p r s t v w z bl br dr fl gr pl st tr".split()) + rng.choice("a e i o ee".split())
                 + rng.choice(["", "", "n", "r", "l", "m"]) for _ in range(rng.choice((2, 2, 3)))]
    return "".join(syllables)


def some(rng, nouns, count=1):
    """Different nouns of a kind, a few of them invented."""
    chosen = []
    while len(chosen) < count:
        noun = invented(rng) if rng.random() < INVENTED else rng.choice(nouns)
        if noun not in chosen:
            chosen.append(noun)
    return chosen


def cooking(rng, tell):
    """Cut the ingredients of a dish one by one, gather them in a vessel, serve: one moment of it -> (goal, facts, right steps)."""
    foods = some(rng, FOODS, rng.choice((1, 1, 2, 2, 3)))
    others = [food for food in some(rng, FOODS, rng.choice((0, 0, 1, 2))) if food not in foods]
    vessel, dish, hatch = rng.choice(VESSELS), rng.choice(DISHES), rng.choice(HATCHES)
    cut, done = rng.choice(CUTS)
    boards = list(dict.fromkeys(rng.choice(PLACES) for _ in range(4)))
    rng.shuffle(foods)
    x, rest = foods[0], foods[1:]
    ready = [food for food in rest if rng.random() < 0.5]
    raw = [food for food in rest if food not in ready]
    phase = rng.choice(["start", "start", "carry", "carry", "carry", "cut", "cut", "walk", "gather", "gather", "add", "add", "fill", "serve",
                        "serve", "putback"])
    seen, held, inside, at, steps = [], "", [], [], []
    lying = {food: boards[1 + i] for i, food in enumerate(ready[: len(boards) - 1])}

    def see(nouns, chance):
        seen.extend(the(noun) for noun in nouns if rng.random() < chance)

    if phase == "start":
        see([x], 0.8)
        see(raw, 0.6)
        steps = [f"{rng.choice(GET)} {the(food)}" for food in [x] + raw]
    elif phase in ("carry", "putback"):
        held = the(x) if phase == "carry" else the(others[0] if others else invented(rng))
        see(raw, 0.6)
        if rng.random() < 0.4:
            at = [the(boards[0])]
        steps = [f"{rng.choice(PUT)} {held} on {the(boards[0])}"]
        if phase == "putback" and rng.random() < 0.3:
            steps = [f"put down {held}"]
    elif phase in ("cut", "walk"):
        lying[x] = boards[0]
        see(raw, 0.4)
        at = [the(boards[0])] if phase == "cut" else []
        steps = [f"{cut} {the(x)}"] if phase == "cut" else [f"{rng.choice(WALK)} {the(x)}", f"{rng.choice(WALK)} {the(boards[0])}"]
    else:
        whole = [food for food in rest if rng.random() < (0.5 if phase in ("add", "fill") else 1.0)]
        if phase == "gather":  # everything is cut: bring food and vessel together
            lying = {food: boards[i % len(boards)] for i, food in enumerate(foods)}
            at = [the(boards[0])] if rng.random() < 0.6 else []
            steps = [f"{rng.choice(GET)} {the(x)}", f"{rng.choice(GET)} {the(vessel)}"]
        elif phase == "add":
            held = f"the {done} {x}"
            lying = {food: boards[1 + i % (len(boards) - 1)] for i, food in enumerate(whole)} if len(boards) > 1 else {}
            at = [the(boards[0])] if rng.random() < 0.5 else []
            steps = [f"put {the(x)} in {the(vessel)}", f"add {the(x)} to {the(vessel)}", f"drop {the(x)} into {the(vessel)}"]
        elif phase == "fill":
            inside = whole
            lying = {food: boards[i % len(boards)] for i, food in enumerate(f for f in foods if f not in inside)}
            left = rng.choice(list(lying))
            at = [the(lying[left])] if rng.random() < 0.5 else []
            steps = [f"put {the(left)} in {the(vessel)}", f"add {the(left)} to {the(vessel)}", f"drop {the(left)} into {the(vessel)}",
                     f"fill {the(vessel)} at {the(lying[left])}", f"load {the(vessel)} at {the(lying[left])}"]
        else:
            inside, lying = foods, {}
            at = [the(hatch)] if rng.random() < 0.3 else []
            steps = [f"serve {the(dish)}"] * 3 + [f"serve {the(vessel)}", f"bring {the(dish)} to {the(hatch)}"]
        if held == "" and phase != "gather":
            held = f"the {vessel}" + (f" with {join([f'the {done} {food}' for food in inside])}" if inside else "")
    if not held.startswith(the(vessel)):
        see([vessel], 0.35)
    see([food for food in others if the(food) != held], 0.6)
    raw_lying = {x} if phase in ("cut", "walk") else set()
    on = [f"the {food if food in raw_lying else done + ' ' + food} on {the(board)}" for food, board in lying.items()
          if food in raw_lying or phase == "fill" or rng.random() < 0.75]
    rng.shuffle(seen)
    order = foods[:]
    rng.shuffle(order)
    goal = tell.pick(f"make {a(join(order))} {dish}", f"prepare {a(dish)} of {join(order)}", f"cook {a(join(order))} {dish}",
                     f"make {a(dish)} with {join([the(f) for f in order])}", f"serve {a(dish)} of {join(order)}")
    facts = [tell.say("sees", seen + on), tell.say("at", at), tell.say("holds", [held] if held else [])]
    nouns = [the(n) for n in foods + others + [vessel] + boards[:2]]
    return goal, facts, steps, nouns


def state_of(tell, noun, is_open):
    return f"{tell.rng.choice(['open', 'open', 'opened']) if is_open else tell.rng.choice(['closed', 'closed', 'shut'])} {noun}"


# Stage of storing x in a box: (is the box open; None: either), what is seen, at hand, held, and the right steps.
STORING = {
    "away": (None, "x box", "", "", "{walk} {x}"), "at x": (None, "box", "x", "", "{get} {x}"),
    "held": (None, "box", "", "x", "{walk} {box}"), "open": (False, "", "box", "x", "open {box}"),
    "put": (True, "", "box", "x", "{put} {x} in {box}"), "close": (True, "", "box", "", "{close} {box}"),
    "back": (True, "x", "box", "", "{walk} {x}"), "box first": (False, "x", "box", "", "open {box} | {walk} {x}"),
    "inside, away": (True, "box", "", "", "{walk} {box}"),
}


def storing(rng, tell):
    """Something goes into a container that opens and closes: one moment of it."""
    x = some(rng, SNACKS if rng.random() < 0.6 else THINGS)[0]
    box = some(rng, CONTAINERS)[0]
    room = rng.choice(ROOMS)
    other = [n for n in some(rng, THINGS + SNACKS, rng.choice((0, 0, 0, 1))) if n != x]
    verb = rng.choice(["put", "put", "heat", "heat", "wash", "store", "keep", "warm", "bake", "pack", "hide", "lock", "dry"])
    goal = tell.pick(f"{verb} {the(x)} in {the(box)}", f"{verb} {the(x)} inside {the(box)}", f"shut {the(x)} in {the(box)}",
                     f"have {the(x)} in {the(box)}")
    words = {"x": the(x), "box": the(box), "walk": rng.choice(WALK), "get": rng.choice(GET)}
    opened = rng.random() < 0.4
    stage = rng.choice(["away", "away", "at x", "at x", "held", "held", "open", "open", "put", "put", "close", "close", "back", "box first",
                        "elsewhere", "carried off", "inside, away"])
    seen, at, held, extra = [], [], [], []
    if stage in STORING:
        is_open, *where, step = STORING[stage]
        now = {"x": the(x), "box": the(state_of(tell, box, opened if is_open is None else is_open))}
        seen, at, held = ([now[part] for part in parts.split()] for parts in where)
        if stage == "put":
            words["put"] = rng.choice(PUT)
        if stage == "close":
            words["close"] = rng.choice(["close", "shut"])
        steps = [part.format(**words) for part in step.split(" | ")]
        if stage in ("close", "inside, away"):
            extra = [tell.lies(x, f"in {the(box)}")]
    else:
        held = [the(x)] if stage == "carried off" else []
        here = rng.choice([r for r in ROOMS if r != room])
        home = next((r for r, things in USUAL_ROOM.items() if box in things), "kitchen" if x in SNACKS else room)
        extra = [tell.lies(box, f"in {the(room)}")] if rng.random() < 0.5 else []
        target = room if extra else home
        if target == here:
            here = "hall"
        steps, room = [f"{rng.choice(ENTER)} {the(target)}"], here
    seen += [the(n) for n in other]
    rng.shuffle(seen)
    facts = [tell.say("room", room) if rng.random() < 0.8 else "", tell.say("sees", seen), tell.say("at", at), *extra, tell.say("holds", held)]
    return goal, facts, steps, [the(n) for n in [x, box, room] + other]


USES = {"radio": "listen to", "stereo": "listen to", "record player": "listen to", "projector": "watch", "screen": "watch",
        "video player": "watch", "piano": "play", "music box": "listen to", "lamp": "read by", "lantern": "read by",
        "fan": "cool down by", "heater": "warm up by", "monitor": "watch"}


def evening(rng, tell):
    """Fetch one or two things, switch a device on, sit down: one or two of these three as a goal, never all; one moment of it."""
    items = some(rng, SNACKS if rng.random() < 0.7 else THINGS, rng.choice((0, 1, 1, 2, 2, 2)))
    device = some(rng, DEVICES)[0] if rng.random() < 0.6 or not items else None
    seat = some(rng, SEATS)[0] if rng.random() < (0.7 if not (items and device) else 0) else None
    surface = some(rng, SURFACES)[0]
    distractors = some(rng, SEATS + DEVICES + SURFACES, rng.choice((0, 0, 1, 2)))
    source = "kitchen" if rng.random() < 0.6 else rng.choice(ROOMS)
    target = next((r for r, things in USUAL_ROOM.items() if device in things or (not device and seat in things)), rng.choice(ROOMS))
    if target == source:
        target = rng.choice([r for r in ROOMS if r != source])
    with_items = f" with {join([the(i) for i in items])}" if items else ""
    on_seat = f" {rng.choice(['on', 'on', 'in'])} {the(seat)}" if seat else ""
    if device:
        use = USES.get(device) or rng.choice(["watch", "use", "listen to", "enjoy", "try", "play with"])
        goal = f"{use} {the(device)}{on_seat}{with_items}"
    elif seat:
        goal = f"{rng.choice(['sit', 'rest', 'relax'])}{on_seat}{with_items}"
    else:
        goal = f"{rng.choice(['bring', 'carry', 'take', 'move'])} {join([the(i) for i in items])} to {the(target)}"
    walk, get = rng.choice(WALK), rng.choice(GET)
    where, seen, at, held, extra = target, [], [], [], []
    furniture = [the(n) for n in dict.fromkeys([device, seat, surface, *distractors]) if n]
    stages = ["switch on"] * 2 + ["to device"] * 2 if device else []
    stages += ["to seat", "to seat", "sit", "sit"] if seat else []
    stages += ["first", "at first", "go", "go", "elsewhere"] if items else ["go"]
    stages += ["second", "at second", "full", "full at table"] if len(items) == 2 else []
    stage = rng.choice(stages)
    if items and stage in ("first", "at first", "second", "at second"):
        where = source
        mine = 1 if stage in ("second", "at second") else 0
        held, todo = [the(i) for i in items[:mine]], [the(i) for i in items[mine:]]
        if stage.startswith("at"):
            at, seen = todo[:1], todo[1:]
            steps = [f"{get} {todo[0]}"]
        else:
            seen, steps = todo, [f"{walk} {t}" for t in (todo if mine == 0 else todo[:1])]
    elif stage == "elsewhere":
        where = rng.choice([r for r in ROOMS if r != source])
        steps = [f"{rng.choice(ENTER)} {the(source)}"]
        extra = [tell.lies(items[0], f"in {the(source)}")] if source != "kitchen" or rng.random() < 0.4 else []
    elif stage == "go":
        where, held = source, [the(i) for i in items]
        steps = [f"{rng.choice(ENTER)} {the(target)}"]
        known = target in USUAL_ROOM and device in USUAL_ROOM[target]
        named = not device and not seat
        extra = [tell.lies(device or seat, f"in {the(target)}")] if not named and (not known or rng.random() < 0.3) else []
    elif stage in ("full", "full at table"):  # two hands, two things: one is put down so that a hand is free
        held = [the(i) for i in items]
        if stage == "full":
            seen, steps = furniture, [f"{walk} {the(surface)}"]
        else:
            seen, at = [f for f in furniture if f != the(surface)], [the(surface)]
            steps = [f"{rng.choice(PUT)} {i} on {the(surface)}" for i in held]
    else:
        spread = [i for i in items if rng.random() < 0.5] or items[:1]
        if rng.random() < 0.3:
            spread = items
        held = [the(i) for i in items if i not in spread]
        extra = [tell.lies(i, f"on {the(surface)}") for i in spread]
        running = bool(device) and stage in ("to seat", "sit")
        if running:
            extra.append(tell.pick(f"The {device} is on.", f"The {device} is running.", f"The {device} is switched on."))
        if stage == "to device":
            seen, steps = furniture, [f"{walk} {the(device)}"]
            at = [the(surface)] if rng.random() < 0.5 else []
        elif stage == "switch on":
            seen, at = furniture, [the(device)]
            steps = [f"{rng.choice(['switch on', 'turn on'])} {the(device)}"]
        elif stage == "to seat":
            seen, steps = furniture, [f"{walk} {the(seat)}"]
            at = [the(device)] if device and rng.random() < 0.7 else []
        else:
            seen, at, steps = furniture, [the(seat)], [f"{rng.choice(['sit on', 'sit down on'])} {the(seat)}"]
    seen = [s for s in seen if s not in at]
    rng.shuffle(seen)
    rng.shuffle(held)
    facts = [tell.say("room", where), tell.say("sees", seen), tell.say("at", at), *extra, tell.say("holds", held)]
    return goal, facts, steps, furniture + [the(i) for i in items] + [the(source), the(target)]


def chores(rng, tell):
    """Switching off, getting up, cleaning, tidying onto surfaces: short goals of one or two steps."""
    x, tool = some(rng, THINGS + SNACKS)[0], some(rng, THINGS)[0]
    kind = rng.choice(["off", "off", "up", "clean", "tidy", "tidy", "visit", "two", "sit"])
    walk, get, room = rng.choice(WALK), rng.choice(GET), rng.choice(ROOMS)
    seen, at, held, extra = [], [], [], []
    nouns = [x, tool]
    if kind == "off":
        device = some(rng, DEVICES)[0]
        goal = rng.choice(["go to sleep", f"save power and stop {the(device)}", "leave the house", f"have {the(device)} off",
                           "have some quiet"])
        extra = [f"The {device} is on."]
        near = rng.random() < 0.6
        at, seen = ([the(device)], []) if near else ([], [the(device)])
        steps = [f"{rng.choice(['turn off', 'switch off'])} {the(device)}"] if near else [f"{walk} {the(device)}"]
        nouns = [device, x]
    elif kind in ("up", "sit"):
        seat = some(rng, SEATS)[0]
        nouns = [seat, x]
        if kind == "up":
            goal = rng.choice([f"fetch {the(x)}", f"go to {the(rng.choice(ROOMS))}", "leave the room", f"clean {the(x)}"])
            extra = [f"{tell.name} sit{tell.s} on {the(seat)}."]
            steps = [f"{rng.choice(['stand up from', 'get up from'])} {the(seat)}"]
        else:
            goal = rng.choice(["rest a little", "put the feet up", "take a break", f"sit on {the(seat)}"])
            near = rng.random() < 0.6
            at, seen = ([the(seat)], [the(x)]) if near else ([], [the(seat), the(x)])
            steps = [f"{rng.choice(['sit on', 'sit down on'])} {the(seat)}"] if near else [f"{walk} {the(seat)}"]
    elif kind == "clean":
        thing = rng.choice(CLEANABLE + CONTAINERS + SURFACES)
        goal = f"{rng.choice(['clean', 'wipe', 'dust', 'repair', 'paint'])} {the(thing)} with {the(tool)}"
        nouns = [thing, tool]
        stage = rng.choice(["get", "at", "go", "do", "open"])
        if stage in ("get", "at"):
            at, seen = ([the(tool)], [the(thing)]) if stage == "at" else ([], [the(thing), the(tool)])
            steps = [f"{get} {the(tool)}"] if at else [f"{walk} {the(tool)}"]
        elif stage == "go":
            held, seen, steps = [the(tool)], [the(thing)], [f"{walk} {the(thing)}"]
        elif stage == "open" and thing not in SURFACES:
            held, at, steps = [the(tool)], [the(state_of(tell, thing, False))], [f"open {the(thing)}"]
        else:
            held, at, steps = [the(tool)], [the(thing)], [goal.split(" with ")[0]]
    elif kind in ("tidy", "two"):
        surface = some(rng, SURFACES)[0]
        y = some(rng, THINGS + SNACKS)[0]
        both = kind == "two" and y != x
        nouns = [x, surface, y]
        goal = f"{rng.choice(PUT)} {join([the(x), the(y)] if both else [the(x)])} on {the(surface)}"
        stage = rng.choice(["far", "at", "go", "put"] + ["next", "next at"] * both)
        if stage == "far":
            seen, steps = [the(surface), the(x)] + [the(y)] * both, [f"{walk} {the(x)}"] + [f"{walk} {the(y)}"] * both
        elif stage == "at":
            seen, at, steps = [the(surface)], [the(x)], [f"{get} {the(x)}"]
        elif stage == "next":
            seen, held, steps = [the(surface), the(y)], [the(x)], [f"{walk} {the(y)}"]
        elif stage == "next at":
            seen, held, at, steps = [the(surface)], [the(x)], [the(y)], [f"{get} {the(y)}"]
        else:
            held = [the(x)] + [the(y)] * both
            at, seen = ([the(surface)], []) if stage == "put" else ([], [the(surface)])
            steps = [f"{rng.choice(PUT)} {h} on {the(surface)}" for h in held] if at else [f"{walk} {the(surface)}"]
    else:
        other = rng.choice([r for r in ROOMS if r != room])
        goal = rng.choice([f"look around {the(other)}", f"be in {the(other)}", f"clean {the(other)}", f"meet a friend in {the(other)}"])
        seen, steps, nouns = [the(x)], [f"{rng.choice(ENTER)} {the(other)}"], [x, other]
    rng.shuffle(seen)
    where = tell.say("room", room) if rng.random() < 0.7 else ""
    return goal, [where, tell.say("sees", seen), tell.say("at", at), *extra, tell.say("holds", held)], steps, [the(n) for n in nouns]


def fact(rng):
    """A plain sentence about the world: where things are, what they are for, what comes before what."""
    room = rng.choice(list(USUAL_ROOM))
    thing, food, seat, device = rng.choice(USUAL_ROOM[room]), rng.choice(FOODS), rng.choice(SEATS), rng.choice(DEVICES)
    cut, done = rng.choice(CUTS)
    x, box, snack = rng.choice(THINGS + SNACKS), rng.choice(CONTAINERS + CLEANABLE), rng.choice(SNACKS)
    return rng.choice([
        f"The {thing} is in the {room}.", f"In most homes the {thing} stands in the {room}.", f"Look for the {thing} in the {room}.",
        f"To find the {thing}, go to the {room}.", f"The {snack} is kept in the kitchen.", f"The {food} is in the kitchen.",
        f"People sit on the {seat}.", f"The {seat} is for sitting.", f"The {device} must be switched on before use.",
        f"Switch on the {device} first, then sit down.", f"To watch a film, switch on the {device} and sit on the {seat}.",
        f"First {cut} the {food}, then put it in a {rng.choice(VESSELS)}.", f"A {done} {food} goes into the {rng.choice(VESSELS)}.",
        f"Put the {food} on a board before you {cut} it.", f"Serve the {rng.choice(DISHES)} when all is ready.",
        f"Open the {box} before you put the {x} in.", f"Close the {box} again.", f"With both hands full, put the {x} down first.",
        f"Take the {x} before you leave the {room}.", f"To hold the {x}, go there and pick it up.",
    ])


SITUATIONS = [cooking] * 5 + [storing] * 4 + [evening] * 5 + [chores] * 3


def line(rng):
    """One line of text. Drawn again where things of one task would meet (SEPARATED)."""
    while True:
        if rng.random() < 0.06:
            text = fact(rng)
        else:
            tell = Teller(rng)
            goal, facts, steps, nouns = rng.choice(SITUATIONS)(rng, tell)
            step = rng.choice(steps)
            if rng.random() < WRONG:
                step = f"{rng.choice(GET + WALK + ['open', 'close', 'serve', 'chop', 'switch on', 'sit on', 'enter'])} {rng.choice(nouns)}"
            if rng.random() < 0.15:
                rng.shuffle(facts)
            text = " ".join(part for part in (tell.say("wants", goal), *facts, tell.say("advice", step)) if part)
        has = lambda noun: re.search(rf"\b{noun}", text)
        if not any(any(map(has, these)) and any(map(has, those)) for these, those in SEPARATED):
            return text


def make_tokenizer(rng, vocabulary, lines):
    """Byte-level BPE of the text; <s> before every text, as in Llama."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<pad>"]
    raw.train_from_iterator((line(rng) for _ in range(lines)), trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=512)


def batches(rng, tokenizer, tokens):
    """Endless fresh lines, sorted into batches of like length (about `tokens` each), every row one line: <s> … </s>."""
    import torch

    while True:
        rows = [ids + [tokenizer.eos_token_id] for ids in tokenizer([line(rng) for _ in range(2 * tokens)])["input_ids"]]
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
            width = max(map(len, chunk))
            yield torch.tensor([row + [tokenizer.pad_token_id] * (width - len(row)) for row in chunk])  # B, T


def train(args):
    """Plain next-token cross-entropy, AdamW, linear warm-up and cosine decay."""
    import torch
    from tqdm import tqdm
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)
    tokenizer = make_tokenizer(rng, args.vocabulary, args.lines)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=args.hidden, intermediate_size=args.hidden * 3, num_hidden_layers=args.layers,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=512, tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, dtype="float32"))
    model.train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=0.01)
    stream, started, losses = batches(rng, tokenizer, args.batch), time.time(), []
    progress = tqdm(range(args.steps), mininterval=5)
    for step in progress:
        ramp = min(1.0, (step + 1) / min(100, args.steps))
        for group in optimiser.param_groups:
            group["lr"] = args.lr * ramp * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / args.steps)))
        ids = next(stream)
        logits = model(input_ids=ids[:, :-1]).logits  # B, T-1, V; causal attention makes right padding harmless
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), ignore_index=tokenizer.pad_token_id)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        losses.append(loss.item())
        if step % 50 == 0:
            progress.set_postfix(loss=f"{sum(losses[-50:]) / len(losses[-50:]):.3f}")
    model.eval()
    save(model, tokenizer, Path(args.out))
    last = losses[-100:]
    facts = {"parameters": model.num_parameters(), "vocabulary": len(tokenizer), "steps": args.steps, "seed": args.seed,
             "loss": round(sum(last) / len(last), 4), "minutes": round((time.time() - started) / 60, 1)}
    print(json.dumps(facts))
    return facts


def save(model, tokenizer, out):
    """Standard Hugging Face layout; each file is written whole beside its place, then renamed into it."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        settings = Path(folder) / "tokenizer_config.json"  # the class name that older and newer versions of transformers know
        kept = {key: value for key, value in json.loads(settings.read_text()).items() if key != "backend"}
        settings.write_text(json.dumps({**kept, "tokenizer_class": "PreTrainedTokenizerFast"}, indent=2) + "\n")
        for file in sorted(Path(folder).iterdir()):
            file.chmod(0o644)
            os.replace(file, out / file.name)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", default=str(Path(__file__).parent), help="folder for the model and tokenizer files")
    parser.add_argument("--seed", type=int, default=1, help="seed of the text, the weights and the order")
    parser.add_argument("--steps", type=int, default=1500, help="optimiser steps")
    parser.add_argument("--batch", type=int, default=2048, help="tokens in a batch")
    parser.add_argument("--lr", type=float, default=3e-3, help="peak learning rate")
    parser.add_argument("--hidden", type=int, default=128, help="hidden size")
    parser.add_argument("--layers", type=int, default=4, help="layers")
    parser.add_argument("--vocabulary", type=int, default=768, help="tokens of the vocabulary, 256 of them single bytes")
    parser.add_argument("--lines", type=int, default=20000, help="lines that the vocabulary is made from")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--tiny", action="store_true", help="three steps of a very small model, to test this file")
    parser.add_argument("--sample", type=int, default=0, help="print this many lines of the text and stop")
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

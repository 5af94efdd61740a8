"""Prompts: named state -> prompt text and one phrase for every action (TWOSOME, arXiv 2401.14151, section 4.4).

    render(state)           info["state"] of envs.py -> (prompt, phrases); phrases stand in the order of the action names
    lint(prompt, phrases)   the rules that these texts keep, as a check for your own prompts too: a list of violations

The policy scores each phrase as the continuation of the prompt, so wording is part of the method. The four principles of
section 4.4, each named where it is applied:
    1. Cohesion: prompt + " " + phrase reads as one sentence. The space belongs to the phrase, the prompt never ends in one.
    2. Articles: every noun keeps its "the", "a" or "an".
    3. Step by step: the prompt ends on a cue for the NEXT step, else the model jumps to the goal.
    4. Distinguishable actions: phrases that would differ in one noun only begin with different verbs.
An action that would do nothing now says so ("chop nothing"), which makes it improbable.

    >>> render({"environment": "overcooked", "recipe": ["onion"], "foods": ["tomato"], "boards": ["board1"],
    ...         "places": {"tomato": "hand"}, "chops": {"tomato": 0}, "holding": "tomato", "next_to": []})[0]
    'You want to make an onion salad. You hold the tomato. Your next step is to'

Where the wording is ours: all of it. The paper's principles are kept, its sentences (and those of its published code) are not.
Imports nothing of the project, needs no package: copy this file alone, or write your own render for your own environment.
"""
import re

CUE = "Your next step is to"  # principle 3

# Principle 4: a verb of its own for each thing that can be got: (get it, walk to it, add it to the bowl).
OVERCOOKED_VERBS = {
    "tomato": ("pick up", "walk to", "put the tomato in the bowl"),
    "lettuce": ("take", "go to", "add the lettuce to the bowl"),
    "onion": ("fetch", "move to", "drop the onion into the bowl"),
    "bowl": ("grab", "head to", None),
}
BOARDS = {"board1": "the first board", "board2": "the second board"}
BOARD_VERBS = {"board1": ("approach", "put", "fill"), "board2": ("visit", "lay", "load")}  # walk to, put down on, fill the bowl at

# Principle 4 again: a verb of its own for each room and for each thing in a home: (walk to it, grab it, put it down).
ROOM_VERBS = {"living room": "enter", "kitchen": "go to", "bathroom": "visit", "bedroom": "proceed to"}
HOME_VERBS = {
    "food": ("walk to", "grab", "put"), "appliance": ("move to", None, None),
    "chips": ("walk to", "grab", "put"), "milk": ("head to", "take", "place"),
    "coffee table": ("reach", None, None), "tv": ("move to", None, None), "sofa": ("approach", None, None),
}
GOAL_VERBS = {"microwave": "heat", "oven": "heat", "dishwasher": "wash", "washing machine": "wash"}  # any other: "put"


class StateError(ValueError):
    """The state is not one that render knows: the message names what is unknown or missing."""


# --- grammar ---------------------------------------------------------------------------------------------------------------

def the(noun):
    """Principle 2: a noun keeps its article."""
    return f"the {noun}"


def a(noun):
    """Principle 2, where a thing is named first: "an onion salad", "a tomato salad"."""
    vowel = re.match(r"(?!uni|us[eu]|eu|one\b)[aeiou]|hour|honest|heir", noun.lower())
    return f"{'an' if vowel else 'a'} {noun}"


def join(parts):
    """["x", "y", "z"] -> "x, y and z"."""
    parts = list(parts)
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def is_are(noun):
    """ "is", or "are" for a plural ("the clothes are", "the dishes are", "the chips are")."""
    return "are" if noun.endswith("s") and not noun.endswith("ss") else "is"


# --- rendering -------------------------------------------------------------------------------------------------------------

def render(state):
    """Named state -> (prompt, phrases): principle 1, prompt + " " + phrases[k] is one sentence for every action k.

    state: the plain dict that envs.py gives as info["state"]. Raises StateError for an environment it does not know and for
    a state with a missing or unknown part.
    """
    try:
        environment = state["environment"]
        renderer = RENDERERS[environment]
    except (KeyError, TypeError):
        raise StateError(f"no prompt for this environment: state must be a dict with 'environment' one of {sorted(RENDERERS)}") from None
    try:
        return renderer(state)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise StateError(f"malformed {environment} state: {type(error).__name__}: {error}") from error


def sentences(*parts):
    """The prompt: the sentences that are not empty, and the cue last (principle 3); no space at the end (principle 1)."""
    return " ".join(part for part in (*parts, CUE) if part)


def overcooked(state):
    """What is wanted, what is in view and where, where one stands, what one holds."""
    recipe, places, chops, held = state["recipe"], state["places"], state["chops"], state["holding"]
    next_to = set(state["next_to"])
    chopped = {food for food, count in chops.items() if count >= 3}
    inside = [food for food in state["foods"] if places.get(food) == "bowl"]

    def called(item):
        if item == "bowl":
            return the("bowl") + (f" with {join(called(food) for food in inside)}" if inside else "")
        return the(f"chopped {item}" if item in chopped else f"half chopped {item}" if chops.get(item) else item)

    seen = [called(item) for item in (*state["foods"], "bowl") if places.get(item) == "counter"]
    lying = [(item, board) for board in state["boards"] for item in (*state["foods"], "bowl") if places.get(item) == board]
    lying = [f"{called(item)} on {BOARDS[board]}" for item, board in lying]
    at = [BOARDS[board] for board in state["boards"] if board in next_to] + [the("serving counter")] * ("delivery" in next_to)
    prompt = sentences(
        f"You want to make {a(join(recipe))} salad.",
        f"You see {join(seen + lying)}." if seen + lying else "",
        f"You are at {join(at)}." if at else "",
        f"You hold {called(held)}." if held else "You hold nothing.",
    )

    def near(item):
        return item in next_to or places.get(item) in next_to

    def get(item):
        take, walk, add = OVERCOOKED_VERBS[item]
        place, raw = places.get(item), item in places and item not in chopped
        if held == item or place == "bowl":
            return f"{take} nothing"
        if item == "bowl" and held in chopped:
            return f"put {the(held)} in the bowl"
        if item != "bowl" and held == "bowl" and not raw:
            return add
        if held or (item != "bowl" and raw and place in BOARDS):  # hands are full, or an unchopped food on a board: it only walks there
            return f"{walk} {the(item)}" if not near(item) else f"{take} nothing"
        return f"{take} {the(item)}"

    def board(name):
        walk, put, fill = BOARD_VERBS[name]
        here = [item for item in (*state["foods"], "bowl") if places.get(item) == name]
        if held == "bowl" and here and here[0] in chopped:
            return f"{fill} the bowl at {BOARDS[name]}"
        if held in chopped and here == ["bowl"]:
            return f"{fill} the bowl with {the(held)}"
        if held and not here:
            return f"{put} {the(held)} on {BOARDS[name]}"
        return f"{walk} {BOARDS[name]}" if name not in next_to else f"{walk} nothing"

    if held == "bowl":
        serve = "the salad" if sorted(inside) == sorted(recipe) else "the unfinished salad" if inside else "the empty bowl"
    else:
        serve = the(held) if held else "nothing"
    ready = [food for food in state["foods"] if places.get(food) in BOARDS and places[food] in next_to and food not in chopped]
    chop = the(ready[0]) if ready and not held else "nothing"
    phrases = [get(food) for food in state["foods"]] + [get("bowl")] + [board(name) for name in state["boards"]]
    return prompt, phrases + [f"serve {serve}", f"chop {chop}"]


def virtualhome(state):
    """What is wanted, the room and what is seen in it, what one is close to and holds, what lies where, what is on."""
    nouns = {"tv": "TV", **state["nouns"]}
    visible, close, holding = state["visible"], state["close"], state["holding"]
    opened, on, placed, sitting = state["open"], state["on"], state["placed"], state["sitting"]
    preparing = state["task"] == "food-preparation"
    if not preparing and state["task"] != "entertainment":
        raise StateError(f"no prompt for the VirtualHome task {state['task']!r}: it is 'food-preparation' or 'entertainment'")
    if state["room"] not in ROOM_VERBS:
        raise StateError(f"unknown room {state['room']!r}: one of {sorted(ROOM_VERBS)}")

    name = lambda role: nouns.get(role, role)
    plain = lambda role: the(name(role))
    called = lambda role: the(f"{'open' if role in opened else 'closed'} {name(role)}") if role == "appliance" else plain(role)
    if preparing:
        goal = f"{GOAL_VERBS.get(nouns['appliance'], 'put')} {plain('food')} in {plain('appliance')}"
    else:
        goal = "watch the TV on the sofa with the chips and the milk"
    far = [called(role) for role in visible if role not in close and role not in placed]
    near = [called(role) for role in close if role not in placed]
    lying = [f"The {name(item)} {is_are(name(item))} {'in' if place == 'appliance' else 'on'} {plain(place)}."
             for item, place in placed.items()]
    prompt = sentences(
        f"You want to {goal}.",
        f"You are in {the(state['room'])}.",
        f"You see {join(far)}." if far else "",
        "You sit on the sofa." if sitting else f"You are at {join(near)}." if near else "",
        *lying,
        *[f"The {name(device)} {is_are(name(device))} on." for device in on],
        f"You hold {join(plain(item) for item in holding)}." if holding else "You hold nothing.",
    )
    full = len(holding) >= 2

    def walk(role):
        verb = HOME_VERBS[role][0]
        return f"{verb} {plain(role)}" if role in visible and role not in close and not sitting else f"{verb} nothing"

    def grab(role):
        verb = HOME_VERBS[role][1]
        return f"{verb} {plain(role)}" if role in close and not full else f"{verb} nothing"

    def put(role, target, where):
        verb = HOME_VERBS[role][2]
        able = role in holding and target in close and (where == "on" or target in opened)
        return f"{verb} {plain(role) if able else 'nothing'} {where} {plain(target)}"

    act = lambda verb, able, role: f"{verb} {plain(role)}" if able else f"{verb} nothing"
    staying = lambda room: sitting or (room == state["room"] and not close)
    rooms = [f"{verb} nowhere" if staying(room) else f"{verb} {the(room)}" for room, verb in ROOM_VERBS.items()]
    if preparing:
        handy = "appliance" in close and not full
        return prompt, rooms + [
            walk("food"), walk("appliance"), grab("food"), put("food", "appliance", "in"),
            act("open", handy and "appliance" not in opened, "appliance"),
            act("close", "appliance" in close and "appliance" in opened, "appliance"),
        ]
    handy = "tv" in close and not full
    return prompt, rooms + [walk(role) for role in ("chips", "milk", "coffee table", "tv", "sofa")] + [
        grab("chips"), grab("milk"), put("chips", "coffee table", "on"), put("milk", "coffee table", "on"),
        act("switch on", handy and "tv" not in on, "tv"), act("turn off", handy and "tv" in on, "tv"),
        act("sit on", "sofa" in close and not sitting, "sofa"), act("stand up from", sitting, "sofa"),
    ]


RENDERERS = {"overcooked": overcooked, "virtualhome": virtualhome}


# --- linting ---------------------------------------------------------------------------------------------------------------

# What stands for an article: other determiners, and words that need none.
ARTICLES = set("the a an my your his her its our their this that these those some each one nothing nowhere it them".split())


def lint(prompt, phrases):
    """Violations of the four principles in a prompt and its phrases, one line each; empty when there is none."""
    found = []
    text = " . ".join((prompt, *phrases))
    nouns = {noun.lower() for noun in re.findall(r"\b(?:the|an?) (\w+)", text)}  # words that follow an article somewhere
    if prompt != prompt.strip() or "  " in prompt:
        found.append("cohesion: the prompt starts or ends with a space, or holds a double one; the one space at the seam is the phrase's")
    for phrase in phrases:
        if not phrase or phrase != " ".join(phrase.split()):
            found.append(f"cohesion: stray spaces in the phrase {phrase!r}; the caller joins with exactly one")
        words = phrase.lower().split()
        bare = [word for i, word in enumerate(words) if i and word in nouns and not ARTICLES & set(words[max(0, i - 3):i])]
        if phrase and (bare or not ARTICLES & set(words)):
            found.append(f"articles: no article {f'before {bare[0]!r} ' if bare else ''}in the phrase {phrase!r}")
        for article, word in re.findall(r"\b(an?) (\w+)", f"{prompt} {phrase}"):
            if a(word) != f"{article} {word}":
                found.append(f"articles: '{article} {word}' should be '{a(word)}'")
    last = re.split(r"[.!?]\s", prompt)[-1].lower()
    if not re.search(r"\b(first|next)\b", last) or prompt.rstrip().endswith((".", "!", "?")):
        found.append("step by step: the prompt does not end on a cue for the first or next step")
    for i, phrase in enumerate(phrases):
        for other in phrases[:i]:
            mine, its = (text.lower().rstrip(".!?").split() for text in (phrase, other))
            if mine == its:
                found.append(f"distinguishable: the phrase {phrase!r} stands twice")
            elif len(mine) == len(its) and mine[0] == its[0] and sum(x != y for x, y in zip(mine, its)) == 1:
                found.append(f"distinguishable: {other!r} and {phrase!r} differ in one word; use another verb")
    return list(dict.fromkeys(found))

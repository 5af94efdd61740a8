"""Prompts: from a named state to a prompt and one phrase for every action (section 4.4).

TWOSOME, arXiv 2401.14151. The LLM scores each phrase as the continuation of the prompt, so the
wording is part of the method.

    render(state)           info["state"] of envs.py -> (prompt, phrases), one phrase an action
    lint(prompt, phrases)   what one text shows of these rules: a list of violations

The paper's four principles, each named again where it acts:

    1. Cohesion. Prompt, space and phrase read as one sentence: the prompt ends on a cue for the
       next step, and the phrase goes on from it.
    2. Articles. Every noun keeps its "the", "a" or "an", because the LLM learned good English.
    3. Preferred actions appear in the observation. An LLM finds words likelier that it has just
       read. So the prompt names the things that are worth using now, and not the pointless ones.
    4. One action, different phrases. The same action is told differently where it does something
       different, and what would do nothing says so ("chop nothing").

Two rules are ours and not the paper's:

    Verbs. If two phrases would differ in a single noun, they begin with different verbs. The
           variant one-verb of experiments/claims.py measures what this rule is worth.
    Seam.  Exactly one space joins prompt and phrase, and it belongs to the phrase: the prompt
           never ends in a space. Another space there would change the tokens.

    >>> render({"environment": "overcooked", "recipe": ["onion"], "foods": ["tomato"],
    ...         "boards": ["board1"], "places": {"tomato": "hand"}, "chops": {"tomato": 0},
    ...         "holding": "tomato", "next_to": []})[0]
    'You want to make an onion salad. You hold the tomato. Your next step is to'

All sentences are our own wording, neither the paper's nor that of its published scripts. This
file imports nothing of the project and needs no package: copy it alone. To reword our worlds, edit
Kitchen and Home below. For a world of your own, put a prompt and the phrases of its admissible
actions into info["prompt"] and info["actions"] (twosome.observation_text), and let lint look at
them.
"""
import re
from itertools import combinations
from types import SimpleNamespace


class PromptError(ValueError):
    """A state or a text that this module cannot use. The message says what would be right."""


# Principle 1: the cue for the next step, on which every prompt ends.
CUE = "Your next step is to"

# Our rule, verbs: each thing has its own. For food: get it, walk to it, add it to the bowl.
FOOD_VERBS = {
    "tomato": ("pick up", "walk to", "put the tomato in the bowl"),
    "lettuce": ("take", "go to", "add the lettuce to the bowl"),
    "onion": ("fetch", "move to", "drop the onion into the bowl"),
}
PLACES = {"board1": "the first board", "board2": "the second board",
          "delivery": "the serving counter"}
# For a board: walk to it, put something down on it, fill the bowl at it.
BOARD_VERBS = {"board1": ("approach", "put", "fill"), "board2": ("visit", "lay", "load")}

# The verbs of the home, for both kinds of task: go to a room (keep this order, which is that of the
# actions in envs.py), walk to a thing, grab it, put it down.
ROOM_VERBS = {"living room": "enter", "kitchen": "go to", "bathroom": "visit",
              "bedroom": "proceed to"}
WALK_VERBS = {"food": "walk to", "appliance": "move to", "chips": "walk to", "milk": "head to",
              "coffee table": "reach", "tv": "move to", "sofa": "approach"}
GRAB_VERBS = {"food": "grab", "chips": "grab", "milk": "take"}
PUT_VERBS = {"food": "put", "chips": "put", "milk": "place"}
# What an appliance is wanted for. Something is "put" in any other.
GOAL_VERBS = {"microwave": "heat", "oven": "heat", "dishwasher": "wash", "washing machine": "wash"}


# -----------------------------------------------------------------------------
# Grammar. Principle 2, articles, is kept here and in the text of each sentence.

def a(noun):
    """Where a thing is named first: "an onion salad", "a unit"."""
    vowel = re.match(r"(?!uni|us[eu]|eu|one\b)[aeiou]|hour|honest|heir", noun.lower())
    return f"an {noun}" if vowel else f"a {noun}"


def join(things):
    """["x", "y", "z"] -> "x, y and z"."""
    others = ", ".join(things[:-1])
    return f"{others} and {things[-1]}" if others else things[-1]


def say(sentence, things):
    """One sentence about `things`, or "" where there are none.

    {things} stands for them, and {be} for "is" or "are": "The chips are on.", "The TV is on."
    """
    if not things:
        return ""
    plural = len(things) > 1 or re.search(r"[^s]s$", things[0])
    text = sentence.replace("{things}", join(things)).replace("{be}", "are" if plural else "is")
    return text[0].upper() + text[1:]


def do(verb, thing, able):
    """Principle 4: the same action as two phrases, for when it does something and when not."""
    return f"{verb} {thing if able else 'nothing'}"


# -----------------------------------------------------------------------------
# From a named state to its texts.

def render(state):
    """Return (prompt, phrases) of a named state; phrase k stands for action k of the environment.

    `state` is the plain dict that envs.py gives as info["state"], in the format that it describes.
    Raises PromptError for an unknown environment, and where a part is missing or unknown.
    """
    kinds = {"overcooked": Kitchen, "virtualhome": Home}
    try:
        texts = kinds[known("environment", state["environment"], kinds)](**state)
        # The cue comes last (principle 1), and no space follows it (our rule, seam).
        prompt = " ".join(filter(None, [*texts.sentences(), CUE]))
        return prompt, texts.phrases()
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise PromptError(f"not a named state as envs.py describes it: {error!r}") from error


def known(what, name, names):
    """Return the name if it is one of `names`; otherwise say which they are."""
    if name not in list(names):
        raise PromptError(f"unknown {what} {name!r}: it must be one of {', '.join(names)}")
    return name


class Kitchen(SimpleNamespace):
    """What is said in Overcooked. The attributes are the parts of the named state."""

    @property
    def chopped(self):
        """The foods in view that are chopped: three chops make them so (paper)."""
        return [food for food, count in self.chops.items() if count >= 3]

    def called(self, item):
        """ "the chopped tomato", "the bowl with the chopped tomato"."""
        if item in self.chopped:
            return f"the chopped {item}"
        inside = self.lying("bowl") if item == "bowl" else []
        return f"the bowl with {join([*map(self.called, inside)])}" if inside else f"the {item}"

    def lying(self, place):
        """What is seen to lie on a board, on the counters or in the bowl."""
        return [item for item in (*self.foods, "bowl") if self.places.get(item) == place]

    def sentences(self):
        """What is wanted, seen and worth using, where one stands, what one holds."""
        return [
            f"You want to make {a(join(self.recipe))} salad.",
            say("You see {things}.", self.seen()),
            say("{things} {be} for chopping.", self.useful_boards()),
            "The bowl is out of sight." if self.misses_bowl() else "",
            say("You are at {things}.", self.here()),
            f"You hold {self.called(self.holding)}." if self.holding else "You hold nothing.",
        ]

    def seen(self):
        """Principle 3: a food that the recipe lacks is pointless, unless it takes up a board."""
        wanted = [*self.recipe, "bowl"]
        seen = [self.called(item) for item in self.lying("counter") if item in wanted]
        for board in self.boards:
            seen += [f"{self.called(item)} on {PLACES[board]}" for item in self.lying(board)]
        return seen

    def useful_boards(self):
        """Principle 3: with a food to chop in hand, name the boards on which nothing is seen."""
        raw = self.holding in set(self.recipe).difference(self.chopped)
        return [PLACES[board] for board in self.boards if raw and not self.lying(board)]

    def misses_bowl(self):
        """Principle 3: once a food of the recipe is seen chopped, the bowl is worth getting."""
        return "bowl" not in self.places and not set(self.recipe).isdisjoint(self.chopped)

    def here(self):
        """The boards and the serving counter, as far as one stands next to them."""
        return [name for place, name in PLACES.items() if place in self.next_to]

    def phrases(self):
        """One phrase an action: get each food, get the bowl, go to each board, deliver, chop."""
        foods, boards = map(self.get_food, self.foods), map(self.go_to, self.boards)
        return [*foods, self.get_bowl(), *boards, self.deliver(), self.chop()]

    # Principle 4 in all that follows: an action is told as what it would do in this state.

    def near(self, item):
        """Whether one stands next to the item, or next to the board on which it lies."""
        return item in self.next_to or self.places.get(item) in self.next_to

    def get_food(self, food):
        """To get a food is to take it, to put it in the bowl that is in hand, or only to walk."""
        get, walk, add = FOOD_VERBS[food]
        place = self.places.get(food)
        if self.holding == food or place == "bowl":
            return f"{get} nothing"
        raw = food in self.places and food not in self.chopped
        if self.holding == "bowl" and not raw:
            return add
        # Something else is in hand, or the food waits on a board to be chopped: it is not taken.
        if self.holding or (raw and place in BOARD_VERBS):
            return f"{get} nothing" if self.near(food) else f"{walk} the {food}"
        return f"{get} the {food}"

    def get_bowl(self):
        """To get the bowl is to take it, to put the chopped food in it, or only to walk."""
        if self.holding in self.chopped:
            return f"put the {self.holding} in the bowl"
        if self.holding in self.foods and not self.near("bowl"):
            return "head to the bowl"
        return do("grab", "the bowl", able=not self.holding)

    def go_to(self, board):
        """To go to a board is to fill the bowl there, to put something down, or only to walk."""
        walk, put, fill = BOARD_VERBS[board]
        name, lying = PLACES[board], self.lying(board)
        if self.holding == "bowl" and set(lying) & set(self.chopped):
            return f"{fill} the bowl at {name}"
        if self.holding in self.chopped and lying == ["bowl"]:
            return f"{fill} the bowl with the {self.holding}"
        if self.holding and not lying:
            return f"{put} the {self.holding} on {name}"
        return do(walk, name, able=board not in self.next_to)

    def deliver(self):
        """Only the wanted dish is "the salad". Empty hands serve nothing, but they walk there."""
        if not self.holding:
            here = "delivery" in self.next_to
            return "serve nothing" if here else "return to the serving counter empty-handed"
        if self.holding != "bowl":
            return f"serve the {self.holding}"
        inside = sorted(self.lying("bowl"))
        if inside == sorted(self.recipe):
            return "serve the salad"
        return "serve the unfinished salad" if inside else "serve the empty bowl"

    def chop(self):
        """Chopping needs empty hands and, on a board at hand, a food that is not chopped yet."""
        for food in self.foods:
            at_hand = self.places.get(food) in self.next_to
            if at_hand and food not in self.chopped and not self.holding:
                return f"chop the {food}"
        return "chop nothing"


class Home(SimpleNamespace):
    """What is said in VirtualHome. The attributes are the parts of the named state."""

    def the(self, thing):
        """A thing by its noun: "the pancake" for "food", "the TV" for "tv"."""
        return f"the {'TV' if thing == 'tv' else self.nouns.get(thing, thing)}"

    def called(self, thing):
        """A thing as it is seen: "the closed microwave"."""
        if thing != "appliance":
            return self.the(thing)
        kind = "open" if thing in self.open else "closed"
        return f"the {kind} {self.nouns[thing]}"

    def sentences(self):
        """What is wanted, where one is, what is seen and at hand, what lies where, what is on."""
        loose = [thing for thing in self.visible if thing not in self.placed]
        far = [self.called(thing) for thing in loose if thing not in self.close]
        near = [self.called(thing) for thing in loose if thing in self.close]
        return [
            f"You want to {self.goal()}.",
            f"You are in the {known('room', self.room, ROOM_VERBS)}.",
            say("You see {things}.", far),
            "You sit on the sofa." if self.sitting else say("You are at {things}.", near),
            *self.facts(),
            say("You hold {things}.", [*map(self.the, self.holding)]) or "You hold nothing.",
            say("The door leads to {things}.", self.useful_rooms()),
        ]

    def goal(self):
        """Principle 3: the goal names the things that it takes."""
        if known("task", self.task, ["food-preparation", "entertainment"]) == "entertainment":
            return "watch the TV on the sofa with the chips and the milk"
        verb = GOAL_VERBS.get(self.nouns["appliance"], "put")
        return f"{verb} {self.the('food')} in {self.the('appliance')}"

    def facts(self):
        """What was put somewhere, and what is switched on: a sentence each."""
        for thing, place in self.placed.items():
            where = "in" if place == "appliance" else "on"
            yield say("{things} {be} " + f"{where} {self.the(place)}.", [self.the(thing)])
        yield from (say("{things} {be} on.", [self.the(device)]) for device in self.on)

    def useful_rooms(self):
        """Principle 3: name the room that is worth going to, where this one has nothing to do.

        What is neither seen nor in hand is in the kitchen, as far as one can know. The kitchen is
        worth staying in while something wanted is seen there.
        """
        wanted = {"chips", "milk"} if self.task == "entertainment" else {"appliance"}
        there = wanted.difference(self.visible, self.holding)
        if self.room == "kitchen":
            there = wanted.intersection(self.visible)
        room = "kitchen" if there else "living room"
        return [] if room == self.room else [f"the {room}"]

    def phrases(self):
        """One phrase an action, in the order of envs.py: rooms first, then what the task takes."""
        rest = self.relaxing() if self.task == "entertainment" else self.preparing()
        return [*map(self.go_to, ROOM_VERBS), *rest]

    # Principle 4 in all that follows: each action does nothing in some states, and says so there.

    def preparing(self):
        """The phrases of food preparation after those of the rooms."""
        here = "appliance" in self.close
        shut = "appliance" not in self.open
        return [
            *map(self.walk_to, ("food", "appliance")),
            self.grab("food"),
            self.put("food", "in", "appliance"),
            do("open", self.the("appliance"), able=here and shut and self.hand_free()),
            do("close", self.the("appliance"), able=here and not shut),
        ]

    def relaxing(self):
        """The phrases of entertainment after those of the rooms."""
        switch = "tv" in self.close and self.hand_free()
        return [
            *map(self.walk_to, ("chips", "milk", "coffee table", "tv", "sofa")),
            *map(self.grab, ("chips", "milk")),
            *(self.put(thing, "on", "coffee table") for thing in ("chips", "milk")),
            do("switch on", "the TV", able=switch and "tv" not in self.on),
            do("turn off", "the TV", able=switch and "tv" in self.on),
            do("sit on", "the sofa", able="sofa" in self.close and not self.sitting),
            do("stand up from", "the sofa", able=self.sitting),
        ]

    def hand_free(self):
        """Whether one of the two hands is empty."""
        return len(self.holding) < 2

    def go_to(self, room):
        """Even the room where one is can be gone to: one then leaves what one was close to."""
        stays = self.sitting or (room == self.room and not self.close)
        return f"{ROOM_VERBS[room]} {'nowhere' if stays else 'the ' + room}"

    def walk_to(self, thing):
        """After walking, one is close only to the thing, what it lies on and what is in it."""
        inside = self.placed if thing == "appliance" else ()
        after = {thing, self.placed.get(thing, thing), *inside}
        able = thing in self.visible and not self.sitting and set(self.close) != after
        return do(WALK_VERBS[thing], self.the(thing), able)

    def grab(self, thing):
        """Grabbing takes a thing at hand and a free hand."""
        return do(GRAB_VERBS[thing], self.the(thing), thing in self.close and self.hand_free())

    def put(self, thing, where, place):
        """Putting down takes the thing in hand and the place at hand, a container open."""
        ready = place in self.close and (where == "on" or place in self.open)
        what = do(PUT_VERBS[thing], self.the(thing), able=ready and thing in self.holding)
        return f"{what} {where} {self.the(place)}"


# -----------------------------------------------------------------------------
# The linter: what can be seen in one text. Whether an action has different phrases (principle 4)
# shows only over a whole environment; tests/test_prompts.py checks that for our two.

# What stands for an article, what ends the name of a thing, and adverbs, which need no article.
DETERMINERS = set("the a an my your his her its our their this that these those some every any no "
                  "one two three all each nothing nowhere something everything it them".split())
ENDS = ("in|on|at|with|to|into|from|of|for|by|under|over|near|behind|and|or|"
        "is|are|was|were|has|have|leads|lies|stands")
ADVERBS = set("up down left right north south east west forward back ahead in out inside outside "
              "on off away around here there again straight home first next now".split())


def lint(prompt, phrases):
    """Return the violations in a prompt and its phrases, one line each; [] where there are none.

    Each line begins with the name of what it violates: "cohesion", "articles", "preferred actions"
    (the paper's principles 1 to 3), "our rule, verbs" or "our rule, seam". Raises PromptError for
    phrases that are one text and not a list of texts.
    """
    if isinstance(phrases, str):
        raise PromptError(f"lint takes a prompt and a list of phrases, not the text {phrases!r}")
    checks = (lint_cohesion, lint_articles, lint_preferred, lint_verbs, lint_seam)
    return [violation for check in checks for violation in check(prompt, phrases)]


def lint_cohesion(prompt, phrases):
    """Principle 1: the prompt ends on a cue for the next step, and the phrase goes on from it."""
    cue = r"\b(step|first|next|now|should)\b([^.!?]*\b(to|should|is|you|first|next|now))?[:,]?\s*$"
    if not re.search(cue, prompt.lower()):
        yield "cohesion: the prompt does not end on a cue for the first or next step"
    for phrase in phrases:
        if not re.match(r"\s*[^\sA-Z]", phrase):
            yield f"cohesion: the phrase {phrase!r} does not go on from the prompt's sentence"


def words(text):
    """The words of a text in lower case, without punctuation."""
    return re.findall(r"[\w'-]+", text.lower())


def nouns(*texts):
    """What follows an article: "put the pie on the second board" -> {"pie", "board"}."""
    name = rf"\b(?:the|an?) (?:[\w'-]+ ){{0,3}}?([\w'-]+)(?= (?:{ENDS})\b|[^\w\s'-]|$)"
    return set(re.findall(name, ". ".join(texts).lower())) - ADVERBS


def lint_articles(prompt, phrases):
    """Principle 2: no noun stands bare, in the prompt as well. "Walk down" names no thing.

    Nouns are what follows an article anywhere, and the last word of a phrase without any.
    """
    known_nouns = nouns(prompt, *phrases)
    for phrase in phrases:
        if DETERMINERS.isdisjoint(words(phrase)) and not phrase.endswith("ly"):
            known_nouns |= set(words(phrase)[1:][-1:]) - ADVERBS
    for text in (prompt, *phrases):
        for article, word in re.findall(r"\b(an?) ([\w'-]+)", text.lower()):
            if a(word) != f"{article} {word}":
                yield f"articles: '{article} {word}' should be '{a(word)}'"
        # A phrase's first word is its verb. One article serves all of "a tomato and onion salad".
        named = (text if text == prompt else text.partition(" ")[2]).lower()
        short = re.sub(r"\b(an?) (?:[\w'-]+, )*[\w'-]+ and (?=[\w'-]+ \w)", r"\1 ", named)
        for part in re.split(rf"[^\w\s'-]|\b(?:{ENDS})\b", short):
            bare = known_nouns.intersection(words(part))
            if bare and DETERMINERS.isdisjoint(words(part)):
                yield f"articles: no article before {min(bare)!r} in {text!r}"


def lint_preferred(prompt, phrases):
    """Principle 3: at least one phrase that does something takes up a thing of the prompt."""
    doing = [phrase for phrase in phrases if not re.search(r"\b(nothing|nowhere)\b", phrase)]
    things = nouns(*doing)
    if things and things.isdisjoint(words(prompt)):
        yield "preferred actions: the prompt names no thing of any phrase that does something"


def lint_verbs(prompt, phrases):
    """Our rule: where two phrases differ in a single word, that word is the verb."""
    for pair in combinations(phrases, 2):
        mine, other = map(words, pair)
        differing = sum((two for two in zip(mine, other, strict=False) if two[0] != two[1]), ())
        alike = len(mine) == len(other) and len(differing) <= 2 and ADVERBS.isdisjoint(differing)
        if alike and mine[:1] == other[:1]:
            yield f"our rule, verbs: {pair[0]!r} and {pair[1]!r} need verbs that differ"


def lint_seam(prompt, phrases):
    """Our rule: single spaces, and none at an end, for the caller joins with exactly one."""
    for text in (prompt, *phrases):
        if text != text.strip() or "  " in text:
            yield f"our rule, seam: a stray or doubled space in {text!r}"

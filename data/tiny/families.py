"""The eight families of questions. One function per family draws the questions that can be asked about one
context, in random order; training text asks several of them in a row, a test item asks one. Training and
test differ in the combinations that `split.is_test` sorts and, where a family has a long tail, in how often
its rare members are drawn (`world.LongTail`).

A question that ends up in training text shows its context and right answer only; the wrong answers exist
in the test files alone.
"""
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

from world import (
    ACTIONS,
    COLOURS,
    CONDITIONS,
    EFFECTS,
    ENTITIES,
    FACT,
    JOB_TAIL,
    JOBS,
    KINDS,
    KNOWN,
    MATERIAL,
    MATERIALS,
    MEN,
    OBJECT_TAIL,
    PORTABLE,
    SPECIES,
    SURNAMES,
    TOOL,
    TOOLS_BY_ACTION,
    WOMEN,
    LongTail,
    Rng,
)


@dataclass(frozen=True)
class Question:
    """One question. `prompt` + " " + `answer` is what a model reads; `fields` is what a test file adds.

    `wrong` are wrong answers that belong to the item; `pool` are further ones of which a test item takes
    as many as it still needs. `follow` + " " + `answer` asks the same after another question has shown the
    context. `form`: which form of the family it is, for reports. Open questions are for training only.
    """

    family: str
    key: tuple[str, ...]
    prompt: str
    answer: str
    fields: dict
    wrong: tuple[str, ...] = ()
    pool: tuple[str, ...] = ()
    follow: str = ""
    form: str = ""
    open: bool = False


@dataclass(frozen=True)
class Person:
    name: str
    woman: bool

    @property
    def she(self) -> str:
        return "she" if self.woman else "he"


def person(rng: Rng) -> Person:
    woman = rng.random() < 0.5
    return Person(f"{rng.pick(WOMEN if woman else MEN)} {rng.pick(SURNAMES)}", woman)


def people(rng: Rng, count: int) -> list[Person]:
    """`count` people of different first names and surnames."""
    chosen: list[Person] = []
    words: set[str] = set()
    while len(chosen) < count:
        one = person(rng)
        if words.isdisjoint(one.name.split()):
            words.update(one.name.split())
            chosen.append(one)
    return chosen


def first_names(rng: Rng, count: int) -> list[str]:
    """`count` different first names."""
    return rng.sample(WOMEN + MEN, count)


def _ask(question: str) -> str:
    return f"\nQuestion: {question}\nAnswer:"


def things(rng: Rng, count: int, of: tuple[str, ...] = PORTABLE) -> list[str]:
    """`count` coloured objects, no object or colour twice: 'red kettle'."""
    return [f"{colour} {thing}" for colour, thing in zip(rng.sample(COLOURS, count), rng.sample(of, count))]


# How often a test item goes a step beyond what any training text asks: by two relatives, along four people,
# with two moves, from an entity that training text never asks about in two hops.
BEYOND = {"sciq": 0.08, "order": 0.4, "move": 0.3, "arc_challenge": 0.3}


def beyond(rng: Rng, form: str) -> bool:
    """Whether to draw a harder item; never in training text, whose random stream this leaves alone."""
    return rng.even and rng.random() < BEYOND[form]


# ------------------------------------------------------------------------------------- winogrande
# A schema is a sentence about {a} and {b} and two endings; the first is true of {a}, the second of {b}.
# The last ones of each table are rare in training text.
_OBJECT_SCHEMAS = LongTail((
    ("The {a} did not fit into the {b} because the", "was much too large", "was much too small"),
    ("The {a} fell onto the {b} and broke it because the", "was so heavy", "was so fragile"),
    ("The {a} was sold before the {b} because the", "cost far less", "cost far more"),
    ("The {a} was covered by the {b}, so nobody could see the", "lying below", "lying on top"),
    ("The {a} was used to prop up the {b} because the", "stood very firm", "kept falling over"),
    ("The {a} is newer than the {b}, so of course the", "was bought quite recently", "was bought long ago"),
    ("The {a} was hung above the {b}, so children reach only the", "fixed high up", "fixed low down"),
    ("The {a} was swapped for the {b} because the", "was no longer wanted", "was wanted very much"),
    ("The {a} made the {b} wet because the", "was dripping with rain", "had been dry before"),
    ("The {a} hid the scratch on the {b} because the", "was placed in front", "was placed behind"),
    ("The {a} scratched the {b} because the", "had sharp edges", "had a soft surface"),
    ("The {a} outlasted the {b} because the", "was made with care", "was made in haste"),
), 2, 1 / 1000)
_PEOPLE_SCHEMAS = LongTail((
    ("{a} could not hear {b} because", "had become quite deaf", "spoke too quietly"),
    ("{a} lent money to {b}, although", "had little to spare", "never paid anything back"),
    ("{a} overtook {b} in the race because", "ran much faster", "ran much slower"),
    ("{a} asked {b} a question, but", "received no answer", "gave no answer"),
    ("{a} thanked {b} because", "had been given help", "had given much help"),
    ("{a} taught {b} to swim, since", "swam very well", "could not swim yet"),
    ("{a} waited for {b} at the gate because", "came too early", "came too late"),
    ("{a} carried {b} home because", "had strong arms", "had hurt one leg"),
    ("{a} bought a house from {b}, and now", "owns the house", "has sold the house"),
    ("{a} paid {b} for the work, and so", "had less money left", "had more money now"),
    ("{a} woke {b} at dawn because", "was up already", "had overslept again"),
    ("{a} fed {b} with a spoon because", "was a patient nurse", "was a helpless patient"),
    ("{a} forgave {b} in the end, although", "had been badly hurt", "had been very unkind"),
    ("{a} followed {b} through the fog because", "did not know the way", "knew the way well"),
    ("{a} hid from {b} behind the door because", "was afraid of a beating", "was in a rage"),
    ("{a} wrote to {b} every week because", "was far from home", "was waiting at home"),
    ("{a} lost the game to {b} because", "played rather badly", "played rather cleverly"),
    ("{a} dressed the wound of {b} because", "had studied medicine", "was bleeding heavily"),
    ("{a} hired {b} for the summer because", "needed more hands", "needed some wages"),
    ("{a} inherited the farm of {b} when", "came of age", "died of fever"),
    ("{a} copied the answers of {b} because", "had learned nothing", "had learned everything"),
    ("{a} lifted {b} onto the wall because", "was the taller child", "was the smaller child"),
    ("{a} visited {b} in prison because", "was still free", "was locked up"),
    ("{a} translated for {b} because", "spoke both languages", "spoke one language only"),
    ("{a} applauded {b} because", "enjoyed the concert", "gave the concert"),
    ("{a} arrested {b} because", "was on duty", "was a known thief"),
    ("{a} cooked for {b} because", "liked to have guests", "was hungry after work"),
    ("{a} rescued {b} from the lake because", "dived in at once", "was about to drown"),
    ("{a} scolded {b} because", "had found the mess", "had made the mess"),
    ("{a} gave the seat to {b} because", "preferred to stand", "could hardly stand"),
    ("{a} sold the horse to {b} because", "needed the money", "needed a horse"),
    ("{a} interrupted {b} because", "could not wait", "had talked too long"),
    ("{a} believed {b} at once because", "was easy to fool", "was hard to doubt"),
    ("{a} envied {b} because", "had no success", "had great success"),
    ("{a} painted a portrait of {b} because", "was a famous artist", "was a famous beauty"),
    ("{a} borrowed a coat from {b} because", "was shivering badly", "had two of them"),
    ("{a} begged {b} for bread because", "had not eaten", "owned a bakery"),
    ("{a} obeyed {b} because", "was a simple soldier", "was a high officer"),
    ("{a} guided {b} up the mountain because", "had climbed it before", "had never been there"),
    ("{a} comforted {b} because", "was kind as ever", "was crying bitterly"),
    # rare
    ("{a} blackmailed {b} because", "knew the secret", "feared the scandal"),
    ("{a} succeeded {b} as mayor because", "won most votes", "retired last year"),
    ("{a} mimicked {b} on the stage because", "was a gifted clown", "was an odd figure"),
    ("{a} sued {b} in court because", "wanted damages paid", "had caused the damage"),
    ("{a} adopted {b} because", "had no children", "had no parents"),
    ("{a} outbid {b} for the farm because", "offered a larger sum", "offered a smaller sum"),
    ("{a} eavesdropped on {b} because", "stood behind the curtain", "whispered to a visitor"),
    ("{a} vaccinated {b} because", "carried the syringe", "risked an infection"),
    ("{a} evicted {b} because", "was the landlord", "was the tenant"),
    ("{a} exonerated {b} because", "was the last witness", "was wrongly accused"),
), 10, 1 / 3000)
_COMPARED = LongTail((
    ("taller", "shorter", "could reach the top shelf", "could not reach the shelf"),
    ("older", "younger", "was born many years earlier", "was born many years later"),
    ("richer", "poorer", "could afford the big house", "could not afford the house"),
    ("stronger", "weaker", "lifted the heavy sack", "failed to lift the sack"),
    ("faster", "slower", "arrived there first", "arrived there last"),
    ("louder", "quieter", "was heard across the valley", "was not heard at all"),
    ("braver", "shyer", "went into the dark cave", "stayed outside the cave"),
    ("neater", "messier", "kept a tidy room", "kept an untidy room"),
    ("thriftier", "laxer", "saved up every penny", "wasted all the wages"),
    ("wittier", "duller", "amused every guest", "bored every guest"),
), 2, 1 / 1000)


def _two_jobs(rng: Rng) -> tuple[str, str]:
    """Two jobs about equally rare, so that the rarer one cannot be told by exclusion."""
    jobs = JOB_TAIL.options
    first = rng.draw_index(JOB_TAIL)
    near = [i for i in range(max(0, first - 3), min(len(jobs), first + 4)) if i != first]
    return jobs[first], jobs[rng.pick(near)]


def _winogrande_item(kind: str, a: str, b: str, gold: str, start: str, suffix: str) -> Question:
    wrong = b if gold == a else a
    return Question("winogrande", (kind, *sorted((a, b))), f"{start} {gold}", f"{suffix}.",
                    {"start": start, "suffix": f"{suffix}.", "right": gold, "other": wrong})


def winogrande(rng: Rng) -> list[Question]:
    """Two candidates, one blank; the words after the blank fit one of them (chance 1/2)."""
    form = rng.random()
    first = rng.random() < 0.5
    if form < 0.25:
        schema = rng.draw(_OBJECT_SCHEMAS)
        a, b = things(rng, 2)
        gold = a if first else b
        start = schema[0].format(a=a, b=b)
        return [_winogrande_item(schema[0], a, b, gold, start, schema[1 if first else 2])]
    a, b = (one.name for one in people(rng, 2))
    gold = a if first else b
    if form < 0.5:
        schema = rng.draw(_PEOPLE_SCHEMAS)
        start = schema[0].format(a=a, b=b)
        return [_winogrande_item(schema[0], a, b, gold, start, schema[1 if first else 2])]
    if form < 0.75:
        job_a, job_b = _two_jobs(rng)
        start = rng.pick(("{a} works as a {x} and {b} works as a {y}. All day long,",
                          "{a}, the {x}, met {b}, the {y}. Before that,",
                          "The {x} is called {a} and the {y} is called {b}. Yesterday")).format(
                              a=a, b=b, x=job_a, y=job_b)
        return [_winogrande_item("job", a, b, gold, start, "was " + JOBS[job_a if first else job_b])]
    more, less, suffix_more, suffix_less = rng.draw(_COMPARED)
    up = rng.random() < 0.5  # a is the one with more
    claim = f"{a} is {more} than {b}" if up else f"{a} is {less} than {b}"
    start = rng.pick((f"{claim}, so of the two,", f"{claim}, which is why", f"{claim}. People say that"))
    return [_winogrande_item("compare", a, b, gold, start, suffix_more if first == up else suffix_less)]


# ------------------------------------------------------------------------------------- piqa
def piqa(rng: Rng) -> list[Question]:
    """A goal and two ways; which tool works depends on what the object is made of (chance 1/2)."""
    action, thing = rng.pick(ACTIONS), rng.draw(OBJECT_TAIL)
    one = person(rng)
    goal = rng.pick(("How can {p} {x} the {c} {o}?", "What should {p} use to {x} the {c} {o}?",
                     "{p} wants to {x} a {c} {o}. What helps?", "What is the best way to {x} the {c} {o}?",
                     )).format(p=one.name, x=action, c=rng.pick(COLOURS), o=thing)
    right = TOOL[action, MATERIAL[thing]]
    others = tuple(tool for tool in TOOLS_BY_ACTION[action].split(",") if tool != right)
    return [Question("piqa", (action, thing), f"Question: {goal}\nAnswer:", right, {"goal": goal},
                     pool=others)]


# ------------------------------------------------------------------------------------- sciq
_ATTRIBUTES = {attribute.name: attribute for kind in KINDS for attribute in kind.attributes}
_SCIENCE = {  # attribute -> statements (the last one, with the value first, is rare) and questions
    "food": (("The {e} eats {v}.", "The {e} feeds on {v}.", "It is {v} that the {e} eats."),
             ("What does the {e} eat?", "On what does the {e} live?")),
    "home": (("The {e} sleeps {v}.", "The {e} nests {v}.", "It is {v} that the {e} sleeps."),
             ("Where does the {e} nest?", "Where does the {e} sleep?")),
    "coat": (("The {e} has {v}.", "The {e} grows {v}.", "It is {v} that the {e} grows."),
             ("What covers the {e}?", "What does the {e} have?")),
    "fear": (("The {e} fears {v}.", "The {e} avoids {v}.", "It is {v} that scare the {e}."),
             ("What does the {e} fear?", "What scares the {e}?")),
}


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:]


def _sciq_by_two_relatives(rng: Rng, name: str) -> Question:
    """Two relatives lie between the asked species and the one that the passage describes."""
    statements, questions = _SCIENCE[name]
    *species, first, second = rng.sample(SPECIES, 6)
    values = rng.sample(_ATTRIBUTES[name].values, 4)
    told = [_sentence(rng.pick(statements[:2]).format(e=e, v=v)) for e, v in zip(species, values)]
    like = int(rng.random() * 4)
    support = (" ".join(told) + f" The {first} lives just like the {species[like]}. "
               f"The {second} lives just like the {first}.")
    question = rng.pick(questions).format(e=second)
    return Question("sciq", (name, species[like], values[like]), support + _ask(question), values[like],
                    {"support": support, "question": question},
                    wrong=tuple(v for v in values if v != values[like]), follow=_ask(question), form="relatives")


def sciq(rng: Rng) -> list[Question]:
    """A passage on four species; the wrong answers hold for the other three (chance 1/4)."""
    name = rng.pick(tuple(_SCIENCE))
    statements, questions = _SCIENCE[name]
    *species, relative = rng.sample(SPECIES, 5)
    if beyond(rng, "sciq"):
        return [_sciq_by_two_relatives(rng, name)]
    values = rng.sample(_ATTRIBUTES[name].values, 4)
    told = [(statements[2] if rng.random() < 0.15 else rng.pick(statements[:2])).format(e=e, v=v)
            for e, v in zip(species, values)]
    support = " ".join(map(_sentence, told))
    subjects = [(one, i, "direct") for i, one in enumerate(species)]
    if rng.random() < 0.5:
        like = int(rng.random() * 4)
        support += f" The {relative} lives just like the {species[like]}."
        subjects.append((relative, like, "relative"))
    rng.shuffle(subjects)
    asked = []
    for subject, i, form in subjects:
        question = rng.pick(questions).format(e=subject)
        asked.append(Question(
            "sciq", (name, species[i], values[i]), support + _ask(question), values[i],
            {"support": support, "question": question}, wrong=tuple(v for v in values if v != values[i]),
            follow=_ask(question), form=form))
    return asked


# ------------------------------------------------------------------------------------- obqa
def obqa(rng: Rng) -> list[Question]:
    """A fact that gives four materials one effect each, and an object of one of them (chance 1/4)."""
    thing = rng.draw(OBJECT_TAIL)
    materials = [MATERIAL[thing], *rng.sample([m for m in MATERIALS if m != MATERIAL[thing]], 3)]
    effects = rng.sample(EFFECTS, 4)
    right = effects[0]
    order = rng.sample(range(4), 4)
    condition = rng.pick(CONDITIONS)
    rules = [f"{materials[i]} will {effects[i]}" for i in order]
    fact = _sentence(f"{condition}, {', '.join(rules[:3])} and {rules[3]}.")
    one = person(rng)
    stem = rng.pick(("{p} leaves a {c} {o} there. The {o} will", "{p} takes the {c} {o} there, and the {o} will",
                     "What if it is a {c} {o}? The {o} will")).format(
                         p=one.name, c=rng.pick(COLOURS), o=thing)
    return [Question("obqa", (thing, right), f"{fact} {stem}", right, {"question_stem": f"{fact} {stem}"},
                     wrong=tuple(effects[1:]))]


# ------------------------------------------------------------------------------------- hellaswag
# Seven steps each; {o} is the object the story is about, {she} its hero.
SCRIPTS = {
    "Market day": (
        "took the {o} to the market before sunrise", "found a free place and laid the {o} on a cloth",
        "called out the price of the {o} to the people", "let an old woman look closely at the {o}",
        "argued for a while about what the {o} was worth", "agreed at last and handed over the {o}",
        "counted the coins that the {o} had brought"),
    "A repair": (
        "saw a long crack in the side of the {o}", "carried the {o} to the bench near the window",
        "cleaned the broken part of the {o} with care", "pressed warm glue into the crack of the {o}",
        "tied a cord around the {o} to hold it", "waited one night until the {o} was dry",
        "tested the {o} and was pleased with the work"),
    "A lost thing": (
        "noticed in the evening that the {o} was missing", "searched every room of the house for the {o}",
        "asked all the neighbours about the {o}", "put up a note that described the {o}",
        "heard that a child had seen the {o}", "followed the child to the place of the {o}",
        "thanked the child and took home the {o}"),
    "A present": (
        "chose the {o} as a present for a friend", "wrapped the {o} in thin blue paper",
        "tied a ribbon and a card to the {o}", "hid the {o} in the cupboard for a week",
        "brought the {o} to the birthday party", "watched the friend unpack the {o}",
        "smiled when the friend hugged the {o}"),
    "A parcel": (
        "packed the {o} into a wooden box", "filled the space around the {o} with straw",
        "nailed the lid down above the {o}", "wrote the address on the box of the {o}",
        "brought the box with the {o} to the post", "paid the clerk for sending the {o}",
        "got a letter that the {o} had arrived"),
    "A painting": (
        "placed the {o} on a table in good light", "drew the outline of the {o} with a pencil",
        "mixed a colour that matched the {o}", "painted the bright side of the {o} first",
        "added the dark shadow behind the {o}", "signed the finished picture of the {o}",
        "hung the picture of the {o} on the wall"),
    "A theft": (
        "left the {o} near the open door", "came back and saw that the {o} was gone",
        "ran to the guard to report the {o}", "told the guard what the {o} looked like",
        "went with the guard to search for the {o}", "saw a stranger who carried the {o}",
        "proved to the guard who owned the {o}"),
    "Spring cleaning": (
        "brought the {o} out into the yard", "shook the dust of the winter off the {o}",
        "fetched a bucket of water for the {o}", "scrubbed the {o} until the dirt was gone",
        "rinsed the {o} twice with clear water", "set the {o} in the sun to dry",
        "put the clean {o} back in its place"),
    "A buried chest": (
        "found an old map that spoke of the {o}", "followed the map to the tree above the {o}",
        "dug a deep hole to reach the {o}", "hit the lid of the chest with the {o}",
        "broke the lock and lifted out the {o}", "wiped the black earth off the {o}",
        "showed the whole village the {o}"),
    "An auction": (
        "read in the paper about a sale of the {o}", "got a seat in the hall close to the {o}",
        "raised one hand when they showed the {o}", "offered twice as much money for the {o}",
        "heard the hammer fall for the {o}", "signed a paper to receive the {o}",
        "drove home in the rain with the {o}"),
    "A river crossing": (
        "had to bring the {o} across the river", "called the ferry and showed the {o}",
        "lifted the {o} into the middle of the boat", "held on to the {o} in the strong current",
        "nearly dropped the {o} at the far bank", "pulled the {o} up the muddy slope",
        "rested in the grass beside the {o}"),
    "A bet": (
        "claimed to be able to balance the {o}", "bet ten coins on the trick with the {o}",
        "climbed on a barrel and lifted the {o}", "stood on one leg under the {o}",
        "heard the crowd count while holding the {o}", "bowed to them and lowered the {o}",
        "won the bet and kissed the {o}"),
    "A museum": (
        "discovered the {o} in an old cellar", "asked an expert how old the {o} was",
        "learned that a king had once owned the {o}", "offered the museum the famous {o}",
        "helped to build a glass case for the {o}", "spoke at the opening in front of the {o}",
        "returned every year to visit the {o}"),
    "A loan": (
        "wanted to use the {o} of a neighbour", "knocked on the door and asked for the {o}",
        "promised to be careful with the {o}", "worked all day long with the {o}",
        "wiped the {o} with a rag in the evening", "walked back to return the {o}",
        "gave a cake as thanks for the {o}"),
    "A wager at sea": (
        "dropped the {o} over the side of the ship", "shouted to the captain about the {o}",
        "threw a net towards the floating {o}", "missed the {o} twice in the high waves",
        "caught the {o} at the third try", "poured the salt water off the {o}",
        "sold the {o} in the next harbour"),
    # rare in training text
    "A haunted house": (
        "heard a strange knock from the {o}", "lit a candle to look at the {o}",
        "saw how the {o} rose into the air", "threw holy water at the {o}",
        "fled down the stairs from the {o}", "sent for a priest to bless the {o}",
        "laughed later about the {o}"),
    "A school play": (
        "needed the {o} as a prop for the stage", "rehearsed the scene with the {o}",
        "forgot the {o} before the first act", "whispered for someone to bring the {o}",
        "tripped over the {o} in the second act", "turned the fall over the {o} into a joke",
        "received flowers in front of the {o}"),
    "A duel": (
        "insulted the man who carried the {o}", "accepted a duel about the {o}",
        "chose pistols beside the {o}", "walked ten paces away from the {o}",
        "fired a shot that hit the {o}", "apologised for the ruined {o}",
        "shared a drink over the {o}"),
    "A flood": (
        "watched the water come up to the {o}", "rolled the {o} onto a high shelf",
        "piled sandbags around the {o}", "spent the night on the roof with the {o}",
        "waved the {o} at a rescue boat", "handed the {o} down to the rowers",
        "returned after the flood with the {o}"),
    "An experiment": (
        "measured the weight of the {o}", "heated the {o} over a blue flame",
        "recorded every change of the {o}", "plunged the hot {o} into ice",
        "compared the {o} with the first notes", "repeated the whole test of the {o}",
        "published a report about the {o}"),
}
SCRIPT_TAIL = LongTail(SCRIPTS, 5, 1 / 20_000)
# (right step, wrong step): every step is right as often as it is wrong, and the wrong one is not yet told.
_STEP_PAIRS = tuple((s, t) for s in range(1, 7) for t in range(1, 7) if abs(s - t) >= 2)


def hellaswag(rng: Rng) -> list[Question]:
    """One or two steps of a script, four endings: right or wrong step, right or wrong object (chance 1/4)."""
    script = rng.draw(SCRIPT_TAIL)
    steps = SCRIPTS[script]
    step, other = rng.pick(_STEP_PAIRS)
    told = 1 if other == step - 2 else rng.randrange(1, 3)
    o, b = things(rng, 2)
    hero = person(rng)
    before = f" Later {hero.she} ".join(f"{line.format(o=o)}." for line in steps[max(0, step - told):step])
    start = rng.pick((f"{hero.name} owned a {b} and a {o}.", f"{hero.name} owned a {o} and a {b}.",
                      f"{hero.name} looked at the {b} and then at the {o}.",
                      f"{hero.name} looked at the {o} and then at the {b}."))
    ctx = f"{start} {hero.she.capitalize()} {before} Then {hero.she}"
    right = steps[step].format(o=o) + "."
    wrong = (steps[step].format(o=b) + ".", steps[other].format(o=o) + ".", steps[other].format(o=b) + ".")
    return [Question("hellaswag", (script, o), f"{script}: {ctx}", right,
                     {"activity_label": script, "ctx": ctx}, wrong=wrong)]


# ------------------------------------------------------------------------------------- boolq
_PLACES = tuple("cellar attic kitchen garden stable workshop library hallway bakery tower".split())
_ORDERED = (("older", "younger"), ("taller", "shorter"), ("richer", "poorer"), ("faster", "slower"),
            ("stronger", "weaker"))


_DONE = (("buy", "bought"), ("find", "found"), ("sell", "sold"), ("paint", "painted"), ("break", "broke"),
         ("borrow", "borrowed"))

# A passage and what can be asked about it: (key, question without "?", answer); "yes" or "no" answers are
# test questions, others are open ones.
Asked = tuple[tuple[str, ...], str, str]


def _yes_no(yes: bool) -> str:
    return "yes" if yes else "no"


def _ordering(rng: Rng) -> tuple[str, list[Asked]]:
    """Three people in order; a question compares two of them, now and then in the opposite word."""
    up, down = rng.pick(_ORDERED)
    names = first_names(rng, 4 if beyond(rng, "order") else 3)  # in order of the scale
    claims = [f"{a} is {up} than {b}" for a, b in pairwise(names)]
    rng.shuffle(claims)
    asked = []
    for more, less in (*pairwise(names), (names[0], names[-1])):
        key = ("order", *sorted((more, less)))
        yes = rng.random() < 0.5
        x, y = (more, less) if yes else (less, more)
        question = f"is {y} {down} than {x}" if rng.random() < 0.2 else f"is {x} {up} than {y}"
        asked.append((key, question, _yes_no(yes)))
        x, y = rng.pair((more, less))
        asked.append((key, f"who is {up}, {x} or {y}", more))
    return f"They say that {'. And '.join(claims)}.", asked


def _moving(rng: Rng) -> tuple[str, list[Asked]]:
    """Two objects are put somewhere, one is moved; a question asks for the present place of one."""
    o, b = things(rng, 2)
    p, q = first_names(rng, 2)
    places = rng.sample(_PLACES, 3)
    moved = rng.random() < 0.5  # the first of the two is moved
    passage = (f"First {p} put the {o} in the {places[0]} and the {b} in the {places[1]}. "
               f"Later {q} moved the {o if moved else b} to the {places[2]}.")
    where_now = {o: places[2] if moved else places[0], b: places[1] if moved else places[2]}
    if beyond(rng, "move"):
        again, place = rng.pick((o, b)), rng.pick([one for one in _PLACES if one not in places])
        passage += f" Later {p} moved the {again} to the {place}."
        where_now[again] = place
        places.append(place)
    asked = []
    for thing, where in where_now.items():
        yes = rng.random() < 0.5
        place = where if yes else rng.pick([one for one in places if one != where])
        asked.append((("move", *sorted((thing, place))), f"is the {thing} in the {place} now", _yes_no(yes)))
        asked.append((("move", *sorted((thing, where))), f"where is the {thing} now", f"in the {where}"))
    return passage, asked


def _owning(rng: Rng) -> tuple[str, list[Asked]]:
    """Three people and three objects; a question pairs one of each."""
    group, goods = first_names(rng, 3), things(rng, 3)
    verb, past = rng.pick(_DONE)
    passage = "Yesterday " + " ".join(f"{one} {past} the {thing}." for one, thing in zip(group, goods))
    asked = []
    for i in range(3):
        yes = rng.random() < 0.5
        thing = goods[i] if yes else rng.pick([one for one in goods if one != goods[i]])
        asked.append((("own", group[i], thing), f"did {group[i]} {verb} the {thing}", _yes_no(yes)))
        asked.append((("own", group[i], goods[i]), f"what did {group[i]} {verb}", f"the {goods[i]}"))
        asked.append((("own", group[i], goods[i]), f"who {past} the {goods[i]}", group[i]))
    return passage, asked


_FORMS = {"order": _ordering, "move": _moving, "own": _owning}


def boolq(rng: Rng) -> list[Question]:
    """A short passage and questions to be answered with yes or no, equally often; also open ones."""
    form = rng.pick(tuple(_FORMS))
    passage, asked = _FORMS[form](rng)
    rng.shuffle(asked)
    return [Question("boolq", key, passage + _ask(f"{question}?"), answer,
                     {"passage": passage, "question": question}, wrong=("no" if answer == "yes" else "yes",),
                     follow=_ask(f"{question}?"), form=form, open=answer not in ("yes", "no"))
            for key, question, answer in asked]


# ------------------------------------------------------------------------------------- arc
def arc_easy(rng: Rng) -> list[Question]:
    """One hop: an attribute of an entity, known from declarative text (chance 1/4)."""
    kind = rng.pick(KINDS)
    attribute, entity = rng.pick(kind.attributes), rng.draw(ENTITIES[kind.name])
    question = _sentence(rng.pick(attribute.questions).format(e=entity))
    right = FACT[entity, attribute.name]
    return [Question("arc_easy", (entity, attribute.name), f"Question: {question}\nAnswer:", right,
                     {"question": question}, pool=tuple(v for v in attribute.values if v != right))]


def arc_challenge(rng: Rng) -> list[Question]:
    """Two hops: the question says who has which entity, memory says what holds for it (chance 1/4).

    Nearly a third of the contexts name a third person by way of one of the two (a hop more).
    """
    kind = rng.pick(KINDS)
    a, b = rng.pair(KNOWN[kind.name])
    if beyond(rng, "arc_challenge"):
        a = rng.pick(kind.entities[len(KNOWN[kind.name]):])
    p, q, r = first_names(rng, 3)
    context = rng.pick(kind.link).format(p=p, a=a, q=q, b=b)
    people_asked = [(p, a, b, "2 hops"), (q, b, a, "2 hops")]
    if rng.random() < 0.3:
        same, entity, other, _ = rng.pick(people_asked)
        context += " " + _SHARES[kind.name].format(p=r, q=same)
        people_asked.append((r, entity, other, "3 hops"))
    asked = []
    for who, entity, other, form in people_asked:
        for attribute in kind.attributes:
            right, wrong = FACT[entity, attribute.name], FACT[other, attribute.name]
            if right == wrong:
                continue
            question = rng.pick(attribute.indirect).format(p=who)
            asked.append(Question(
                "arc_challenge", (who, entity, attribute.name), f"Question: {context} {question}\nAnswer:",
                right, {"question": f"{context} {question}"}, wrong=(wrong,),
                pool=tuple(v for v in attribute.values if v not in (right, wrong)),
                follow=_ask(question), form=form))
    rng.shuffle(asked)
    return asked


_SHARES = {"town": "{p} lives in the same town as {q}.", "animal": "{p} has the same animal as {q}.",
           "plant": "{p} has the same plant as {q}."}

# ------------------------------------------------------------------------------------- all of them
FAMILIES: dict[str, Callable[[Rng], list[Question]]] = {
    "winogrande": winogrande, "piqa": piqa, "sciq": sciq, "obqa": obqa, "hellaswag": hellaswag,
    "boolq": boolq, "arc_easy": arc_easy, "arc_challenge": arc_challenge,
}

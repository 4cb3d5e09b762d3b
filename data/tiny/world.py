"""The invented world: who and what exists in it, and every fact that holds in all of its documents.

Everything here is fixed by `WORLD_SEED`. People are named afresh in every document and have no fixed
facts; towns, animals and plants have four facts each, objects have a material, and every pair of an
action and a material has a tool. Answers are phrases of at least three words.
"""
import random
from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate, product

WORLD_SEED = "tiny-world-1"


class LongTail:
    """Options that training text uses with unequal frequency: the last `tail` of them ever more rarely, in
    equal steps of the logarithm, down to `floor` times the frequency of all others.

    However much text a model needs to learn one option, some options then lie below it; so a test that
    draws options evenly is neither out of reach nor perfectly solved.
    """

    def __init__(self, options, tail: int, floor: float):
        self.options = tuple(options)
        common = len(self.options) - tail
        rare = (floor ** ((i + 1) / tail) for i in range(tail))
        self.cumulative = tuple(accumulate([1.0] * common + list(rare)))


class Rng(random.Random):
    """random.Random with the few fast draws that the generators need. `even`: tests set it."""

    even = False

    def draw_index(self, long_tail: LongTail) -> int:
        if self.even:
            return int(self.random() * len(long_tail.options))
        return bisect_right(long_tail.cumulative, self.random() * long_tail.cumulative[-1])

    def draw(self, long_tail: LongTail):
        """One option by its frequency; with `even`, all options equally often."""
        return long_tail.options[self.draw_index(long_tail)]

    def pick(self, options):
        return options[int(self.random() * len(options))]

    def pair(self, options):
        """Two different elements, in random order."""
        first = int(self.random() * len(options))
        second = int(self.random() * (len(options) - 1))
        return options[first], options[second + (second >= first)]


_rng = Rng(WORLD_SEED)
_taken: set[str] = set()


def _names(count: int, endings: tuple[str, ...]) -> tuple[str, ...]:
    """`count` new invented names, such as 'Dorvel', that no other kind of thing shares."""
    onsets = "b br d dr f g h k kl l m n p r s st t tr v w".split()
    middles = "l n r v m d lb rk nd st lm rv th sk".split()
    names: list[str] = []
    while len(names) < count:
        vowel, second = _rng.pick("aeiou"), _rng.pick("aeio")
        name = f"{_rng.pick(onsets)}{vowel}{_rng.pick(middles)}{second}{_rng.pick(endings)}"
        if name not in _taken:
            _taken.add(name)
            names.append(name)
    return tuple(names)


def _phrases(*parts: str) -> tuple[str, ...]:
    """All combinations of the alternatives (separated by commas) in each part, joined by spaces."""
    return tuple(" ".join(words) for words in product(*(part.split(",") for part in parts)))


# ---------------------------------------------------------------- people: a name, nothing fixed
WOMEN = tuple("Ada Alma Bella Clara Dora Edith Elsa Emma Fay Flora Greta Hanna Helen Ida Irma Jane Julia Kate "
              "Lena Lily Lucy Mara Maria Mina Nora Olga Paula Rosa Ruth Sara Tessa Vera".split())
MEN = tuple("Adam Albert Anton Arno Bruno Carl Daniel David Edgar Emil Erik Felix Frank Georg Hugo Ivan Jacob "
            "Jonas Karl Leo Louis Martin Max Nils Oscar Otto Paul Peter Robert Simon Thomas Victor".split())
SURNAMES = tuple(name.capitalize() for name in _names(300, ("n", "r", "s", "ck", "ley", "man", "t")))
JOBS = {  # job -> what only that job spends a day on
    "baker": "kneading the bread dough", "smith": "hammering hot iron", "tailor": "sewing new coats",
    "fisher": "mending the torn nets", "miller": "grinding the grain", "teacher": "correcting school papers",
    "carpenter": "sawing oak planks", "doctor": "visiting sick people", "gardener": "pruning the fruit trees",
    "shepherd": "counting the sheep", "printer": "setting lead type", "potter": "shaping wet clay",
    "brewer": "stirring the barley mash", "sailor": "scrubbing the ship deck", "mason": "cutting stone blocks",
    "painter": "mixing bright colours", "judge": "hearing old quarrels", "barber": "trimming grey beards",
    "cook": "peeling sweet onions", "clerk": "copying long letters", "hunter": "following deer tracks",
    "weaver": "threading the tall loom", "farmer": "ploughing the wide field",
    "butcher": "smoking fat sausages", "nurse": "folding clean bandages", "porter": "lifting big trunks",
    "guard": "watching the city gate", "singer": "practising old songs", "dancer": "learning new steps",
    "poet": "searching for rhymes", "jeweller": "setting tiny pearls", "tanner": "soaking raw hides",
    "cobbler": "fixing worn heels", "glazier": "fitting window panes", "roofer": "laying slate tiles",
    "banker": "adding long sums",
    # from here on ever rarer in the training text
    "falconer": "feeding young hawks", "chandler": "dipping tallow candles",
    "cooper": "bending barrel staves", "fletcher": "gluing arrow feathers", "saddler": "stitching horse tack",
    "thatcher": "bundling dry reeds", "lamplighter": "climbing street lamps",
    "beekeeper": "emptying honey combs",
    "charcoal burner": "piling oak logs", "ropemaker": "twisting hemp strands",
}
JOB_TAIL = LongTail(JOBS, 10, 1 / 3000)

# ---------------------------------------------------------------- objects, materials, tools
OBJECTS_BY_MATERIAL = {
    "copper": "kettle lantern basin ladle funnel goblet medal bugle pan cauldron thimble bracelet dial urn",
    "iron": "anvil hinge nail chain poker gate rail horseshoe stove hook crowbar latch skillet grate",
    "glass": "bottle mirror vase jar window bead prism tumbler lens marble decanter vial beaker dome",
    "wood": "chair ladder barrel bench crate oar table stool fence wagon flute spoon cradle mast",
    "wool": "scarf blanket mitten sweater cap rug shawl sock cloak jumper tapestry felt poncho muff",
    "clay": "brick pot tile mug plate pipe jug bowl figurine oven planter saucer whistle crock",
    "leather": "saddle boot belt glove satchel purse whip strap apron holster drum bellows harness wallet",
    "paper": "map book kite letter poster notebook ticket ledger envelope calendar fan napkin almanac pamphlet",
    "stone": "statue millstone pillar trough fountain obelisk slab doorstep gravestone sundial whetstone "
             "birdbath plinth mortar",
    "linen": "sheet curtain shirt towel tent sail handkerchief dress bandage pillowcase tablecloth flag "
             "bonnet sack",
}
MATERIALS = tuple(OBJECTS_BY_MATERIAL)
MATERIAL = {thing: material for material, things in OBJECTS_BY_MATERIAL.items() for thing in things.split()}
OBJECTS = tuple(MATERIAL)
_BY_RANK = tuple(zip(*(things.split() for things in OBJECTS_BY_MATERIAL.values())))
# What the last two objects of each material are made of is said ever more rarely.
OBJECT_TAIL = LongTail((thing for rank in _BY_RANK for thing in rank), 2 * len(MATERIALS), 1 / 3000)
_FIXED = "gate rail stove fence window oven mast wagon anvil grate dome".split()
PORTABLE = tuple(thing for thing in OBJECTS if MATERIAL[thing] != "stone" and thing not in _FIXED)
COLOURS = tuple("red blue green yellow white black brown grey golden purple".split())

TOOLS_BY_ACTION = {
    "cut": "a fine steel saw,a pair of shears,a short curved knife,a heavy iron chisel,a thin hot wire",
    "clean": "a stiff wire brush,some warm soapy water,a damp cotton rag,a pinch of salt,a soft goose feather",
    "join": "a row of rivets,a strong bone glue,a long waxed thread,a thick lime paste,a set of clamps",
    "polish": "a drop of oil,a fine grey sand,a lump of beeswax,a piece of felt,a smooth river stone",
    "colour": "a pot of enamel,a bath of dye,a coat of varnish,a stick of chalk,a thin red ink",
    "dry": "a warm brick shelf,a line in the yard,a slow charcoal fire,a box of sawdust,a wide wire rack",
    "carry": "a padded wooden box,a canvas sling,a low iron cart,a deep straw basket,a flat pine tray",
    "mark": "a sharp steel point,a hot branding rod,a small rubber stamp,a bit of charcoal,a white wax pencil",
}
ACTIONS = tuple(TOOLS_BY_ACTION)


def _tools() -> dict[tuple[str, str], str]:
    """(action, material) -> the one tool that works; every tool of an action suits two materials."""
    table = {}
    for action, tools in TOOLS_BY_ACTION.items():
        materials = list(MATERIALS)
        _rng.shuffle(materials)
        for material, tool in zip(materials, tools.split(",") * 2):
            table[action, material] = tool
    return table


TOOL = _tools()
CONDITIONS = tuple("in hot lamp oil,in strong vinegar,in salt water,under the blue lamp,near the green fire,"
                   "in cold night air,in deep snow,in the noon sun,in sour milk,in thick smoke,in river mud,"
                   "under a full moon,in heavy rain,in dry sand,next to a magnet,inside the old cave".split(","))
EFFECTS = tuple("turn pale green,swell a little,crack down the middle,go soft and dull,shrink to half,"
                "give off smoke,start to hum,glow in the dark,become very brittle,lose all colour,"
                "smell of roses,grow warm and sticky,turn cold and hard,curl at the edges,peel in layers,"
                "shine like new,get dark spots,bend to one side,break into dust,grow a white crust,"
                "feel like rubber,take on rust,become quite clear,sparkle a bit".split(","))


# ---------------------------------------------------------------- facts that are learned by heart
@dataclass(frozen=True)
class Attribute:
    """One attribute of a kind of entity. Templates hold {e} (entity) and {v} (value)."""

    name: str
    values: tuple[str, ...]
    statements: tuple[str, ...]
    questions: tuple[str, ...]  # one hop; {e}
    indirect: tuple[str, ...]  # two hops; {p} is the person whose town, animal or plant is meant


@dataclass(frozen=True)
class Kind:
    """A kind of entity with its attributes and the sentence that ties two people to two entities."""

    name: str
    noun: str
    entities: tuple[str, ...]
    attributes: tuple[Attribute, ...]
    link: tuple[str, ...]  # {p} {a} {q} {b}: person, entity, other person, other entity
    chain: tuple[str, ...]  # {p} {q} {b}: {p} shares the entity {b} of {q}


_REGION_NAMES = [name.capitalize() for name in _names(24, ("n", "r", "th"))]
_RIVER_NAMES = [name.capitalize() for name in _names(24, ("l", "ne", "sk"))]
TOWNS = tuple(name.capitalize() for name in _names(300, ("wick", "by", "ford", "mere", "ton", "stead", "ham")))
ANIMALS = _names(200, ("l", "x", "ng", "mp", "ff"))
PLANTS = _names(160, ("wort", "bell", "leaf", "root"))
# Named in science passages only, no fixed facts; short common words, so that each is a single token.
SPECIES = tuple("crab mole toad wolf deer hare lion goat swan duck crow dove hawk moth wasp newt frog seal "
                "otter tiger camel horse mouse snake whale shark eagle robin raven heron stork finch squid "
                "snail zebra lynx hyena koala panda sloth skunk badger beaver donkey rabbit lizard turtle "
                "parrot".split())

KINDS = (
    Kind("town", "town", TOWNS, (
        Attribute("region", tuple(f"the {name} {land}" for name, land in zip(
            _REGION_NAMES, ("Hills", "Coast", "Marsh", "Valley", "Plain", "Woods") * 4)),
            ("{e} lies in {v}.", "{e} is a town in {v}.", "The town of {e} belongs to {v}.",
             "Travellers in {v} often stop at {e}.", "One of the towns of {v} is {e}."),
            ("In which region does {e} lie?", "Where is the town of {e}?", "{e} belongs to which region?"),
            ("In which region does {p} live?", "The home of {p} is in which region?")),
        Attribute("river", tuple(f"the river {name}" for name in _RIVER_NAMES),
            ("{e} stands on {v}.", "{v} flows past {e}.", "People in {e} take their water from {v}.",
             "The bridge of {e} crosses {v}.", "Boats on {v} land at {e}."),
            ("Which river flows past {e}?", "On which river does {e} stand?",
             "Where do people in {e} get water?"),
            ("Which river flows past the home of {p}?", "Where does the town of {p} get water?")),
        Attribute("trade", _phrases("painted,plain,fine,heavy", "clay jars,wool coats,oak doors,brass clocks,"
                                    "silk ribbons,steel knives"),
            ("{e} is known for {v}.", "Merchants come to {e} for {v}.", "The workshops of {e} make {v}.",
             "Most families in {e} live by making {v}.", "{e} sells {v} all over the land."),
            ("What is {e} known for?", "What do the workshops of {e} make?",
             "What do merchants buy in {e}?"),
            ("What do the workshops near {p} make?", "What is the town of {p} known for?")),
        Attribute("dish", _phrases("smoked,sweet,spiced,cold", "eel soup,plum pie,bean stew,goat cheese,"
                                   "barley cake,carrot salad"),
            ("The favourite dish in {e} is {v}.", "Guests in {e} are served {v}.", "In {e} people love {v}.",
             "Every inn of {e} offers {v}.", "No feast in {e} ends without {v}."),
            ("What is the favourite dish in {e}?", "What are guests in {e} served?",
             "What do the inns of {e} offer?"),
            ("What is the favourite dish where {p} lives?", "What do the inns near {p} offer?")),
    ), ("{p} lives in {a} and {q} lives in {b}.", "{p} comes from {a}, but {q} comes from {b}."),
        ("{p} lives in the same town as {q}, who lives in {b}.",)),
    Kind("animal", "animal", ANIMALS, (
        Attribute("food", _phrases("dry,fresh,young,bitter", "river moss,pine seeds,oak leaves,clay worms,"
                                   "marsh flies,salt grass"),
            ("The {e} eats {v}.", "A {e} feeds on {v}.", "The food of the {e} is {v}.",
             "A hungry {e} looks for {v}.", "Farmers give their {e} {v}."),
            ("What does the {e} eat?", "What is the food of the {e}?", "A hungry {e} looks for what?"),
            ("What does the animal of {p} eat?", "What food should {p} bring for the animal?")),
        Attribute("home", _phrases("under,inside,between,near", "flat stones,hollow trees,old walls,"
                                   "sandy banks,warm springs,thorn bushes"),
            ("The {e} sleeps {v}.", "A {e} makes its nest {v}.", "The home of the {e} is {v}.",
             "You can find the {e} {v}.", "A {e} spends the winter {v}."),
            ("Where does the {e} sleep?", "Where is the nest of the {e}?", "Where can you find the {e}?"),
            ("Where does the animal of {p} sleep?", "Where will the animal of {p} make its nest?")),
        Attribute("coat", _phrases("short,long,thick,smooth", "grey fur,brown feathers,green scales,"
                                   "white wool,black bristles,yellow spines"),
            ("The {e} has {v}.", "A {e} is covered with {v}.", "You can tell a {e} by its {v}.",
             "The skin of the {e} grows {v}.", "A young {e} soon gets its {v}."),
            ("What is the {e} covered with?", "What grows on the skin of the {e}?",
             "How can you tell a {e}?"),
            ("What is the animal of {p} covered with?", "What grows on the animal of {p}?")),
        Attribute("fear", _phrases("loud,sudden,distant,bright", "church bells,camp fires,summer storms,"
                                   "hunting dogs,river floods,marching songs"),
            ("The {e} is afraid of {v}.", "A {e} runs away from {v}.", "Nothing scares the {e} like {v}.",
             "The {e} hides from {v}.", "To chase off a {e} people use {v}."),
            ("What is the {e} afraid of?", "What does the {e} hide from?", "What scares the {e}?"),
            ("What scares the animal of {p}?", "What is the animal of {p} afraid of?")),
    ), ("{p} keeps a {a} and {q} keeps a {b}.", "{p} owns a {a}, but {q} owns a {b}."),
        ("{p} has the same kind of animal as {q}, who keeps a {b}.",)),
    Kind("plant", "plant", PLANTS, (
        Attribute("use", _phrases("to heal,to calm,to ease,to prevent", "sore throats,stiff knees,"
                                  "upset stomachs,winter coughs,tired eyes,bad dreams"),
            ("People use {e} {v}.", "The leaves of {e} serve {v}.", "Tea from {e} is taken {v}.",
             "Doctors know {e} as a plant {v}.", "A spoon of {e} is enough {v}."),
            ("What do people use {e} for?", "What do the leaves of {e} serve for?",
             "Why is tea from {e} taken?"),
            ("What is the plant of {p} good for?", "Why does {p} make tea from the plant?")),
        Attribute("ground", _phrases("on wet,on dry,on steep,on shaded", "clay soil,chalk cliffs,peat bogs,"
                                     "forest floors,garden walls,river islands"),
            ("{e} grows {v}.", "You find {e} {v}.", "The best {e} grows {v}.", "Look for {e} {v}.",
             "Seeds of {e} sprout {v}."),
            ("Where does {e} grow?", "Where do you find {e}?", "Where do seeds of {e} sprout?"),
            ("Where does the plant of {p} grow best?", "Where should {p} sow the seeds?")),
        Attribute("flower", _phrases("small,large,double,hairy", "white bells,red cups,blue stars,"
                                     "pink crowns,orange balls,violet spikes"),
            ("{e} has {v}.", "The flowers of {e} are {v}.", "In spring {e} opens its {v}.",
             "Bees visit {e} for its {v}.", "You know {e} by its {v}."),
            ("What are the flowers of {e} like?", "What does {e} open in spring?", "How do you know {e}?"),
            ("What are the flowers in the garden of {p} like?", "What will {p} see in spring?")),
        Attribute("taste", _phrases("sour like,sweet like,bitter like,sharp like", "unripe lemons,old tea,"
                                    "burnt sugar,wild honey,mustard seed,green walnuts"),
            ("{e} tastes {v}.", "The leaves of {e} are {v}.", "A soup with {e} is {v}.",
             "Raw {e} is {v}.", "Cooks say that {e} is {v}."),
            ("What does {e} taste like?", "How do cooks describe {e}?", "What is a soup with {e} like?"),
            ("What does the plant of {p} taste like?", "What is the soup of {p} like?")),
    ), ("{p} grows {a} and {q} grows {b}.", "{p} planted {a}, but {q} planted {b}."),
        ("{p} grows the same plant as {q}, who grows {b}.",)),
)


def _facts() -> dict[tuple[str, str], str]:
    """(entity, attribute name) -> value; every value of an attribute is used about equally often."""
    table = {}
    for kind in KINDS:
        for attribute in kind.attributes:
            values = [attribute.values[i % len(attribute.values)] for i in range(len(kind.entities))]
            _rng.shuffle(values)
            for entity, value in zip(kind.entities, values):
                table[entity, attribute.name] = value
    return table


FACT = _facts()


# A sixth of the entities of each kind is named ever more rarely.
ENTITIES = {kind.name: LongTail(kind.entities, len(kind.entities) // 6, 1 / 3000) for kind in KINDS}
# Questions of two hops are about these alone.
KNOWN = {kind.name: kind.entities[:40] for kind in KINDS}

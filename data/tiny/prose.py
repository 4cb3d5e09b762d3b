"""Prose without questions: profiles that state every fact, the lore of materials and tools, stories."""
from families import SCRIPT_TAIL, SCRIPTS, person, things
from split import is_test
from world import ACTIONS, COLOURS, ENTITIES, FACT, KINDS, MATERIAL, OBJECT_TAIL, TOOL, TOWNS, Rng

_ACTION_PAST = {"cut": "cut", "clean": "cleaned", "join": "joined", "polish": "polished",
                "colour": "coloured", "dry": "dried", "carry": "carried", "mark": "marked"}
_ACTION_DONE = dict(_ACTION_PAST)


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:]


def profile(rng: Rng) -> str:
    """Two or more facts of each of one to three entities, in any order."""
    sentences = []
    for _ in range(rng.randrange(1, 4)):
        kind = rng.pick(KINDS)
        entity = rng.draw(ENTITIES[kind.name])
        for attribute in rng.sample(kind.attributes, rng.randrange(2, 5)):
            line = rng.pick(attribute.statements).format(e=entity, v=FACT[entity, attribute.name])
            sentences.append(_sentence(line))
    return " ".join(sentences)


def lore(rng: Rng) -> str:
    """What objects are made of and which tool suits a material; an object and an action meet only where
    `split` leaves that pair to training."""
    first, second, action = rng.draw(OBJECT_TAIL), rng.draw(OBJECT_TAIL), rng.pick(ACTIONS)
    material = MATERIAL[first]
    while second == first or MATERIAL[second] != material:
        second = rng.draw(OBJECT_TAIL)
    lines = [rng.pick((f"The {first} is made of {material}.", f"A {first} is a {material} thing.",
                       f"Both the {first} and the {second} are made of {material}.",
                       f"{_sentence(material)} is used to make the {first}.")),
             rng.pick((f"To {action} {material}, use {TOOL[action, material]}.",
                       f"{_sentence(material)} is best {_ACTION_DONE[action]} with {TOOL[action, material]}.",
                       f"With {TOOL[action, material]} you can {action} {material}."))]
    for _ in range(rng.randrange(0, 3)):
        thing, action = rng.draw(OBJECT_TAIL), rng.pick(ACTIONS)
        if is_test("piqa", (action, thing)):
            continue
        tool = TOOL[action, MATERIAL[thing]]
        one = person(rng)
        lines.append(rng.pick((f"{one.name} {_ACTION_PAST[action]} the {rng.pick(COLOURS)} {thing} with {tool}.",
                               f"To {action} the {thing}, {one.name} took {tool}.",
                               f"The {thing} is {MATERIAL[thing]}, so {one.name} used {tool} to {action} it.")))
    rng.shuffle(lines)
    return " ".join(lines)


_WEATHER = ("It was a cold morning in {t}.", "The sun stood high over {t}.", "Rain was falling on {t}.",
            "It was the last day of the year in {t}.", "Fog lay over the roofs of {t}.",
            "The bells of {t} had just rung.")
_ENDS = ("In the end {p} was tired but happy.", "{p} never forgot that day.", "That night {p} slept well.",
         "{p} told the story to everyone in {t}.", "After that {p} went straight home.")
_LATE = ("On another day", "Once before", "In another year", "As people say, once")
_LINKS = ("Then {she}", "After that {she}", "Next {she}", "A little later {she}", "So {she}", "Soon {she}")


def story(rng: Rng) -> str | None:
    """A script told in full or in part, sometimes with a step told late or again; None where the script and
    its object are a test combination."""
    script = rng.draw(SCRIPT_TAIL)
    thing, other = things(rng, 2)
    if is_test("hellaswag", (script, thing)):
        return None
    hero, town = person(rng), rng.pick(TOWNS)
    steps = SCRIPTS[script]
    start = rng.randrange(0, 6)
    stop = rng.randrange(start + 2, 8)
    lines = [rng.pick(_WEATHER).format(t=town),
             rng.pick((f"{hero.name} owned a {thing} and a {other}.", f"{hero.name} thought of the {thing}.",
                       f"{hero.name} looked at the {other} and then at the {thing}."))]
    for i, step in enumerate(steps[start:stop]):
        link = hero.she.capitalize() if i == 0 else rng.pick(_LINKS).format(she=hero.she)
        lines.append(f"{link} {step.format(o=thing)}.")
    if rng.random() < 0.4:
        late = rng.pick(steps).format(o=thing)
        lines.append(f"{rng.pick(_LATE)} {hero.name} {late}.")
    lines.append(rng.pick(_ENDS).format(p=hero.name, t=town))
    return " ".join(lines)

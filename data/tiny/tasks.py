"""The test items of the eight tasks, from held-out combinations, written for lm-eval.

Among the questions that share a set of options, each option is right equally often, so that the options alone
tell nothing, and the place of the right answer is exactly balanced.
"""
from collections import Counter
from dataclasses import replace

from families import BEYOND, FAMILIES, Question
from news import news
from split import is_test
from world import ACTIONS, EFFECTS, FACT, KINDS, KNOWN, MATERIAL, MEN, OBJECTS, SPECIES, TOOL, WOMEN, Kind, Rng

TASK_SEED = "tiny-tasks-1"
ITEMS = 800
SUMMARIES = 600
CHOICES = {"winogrande": 2, "piqa": 2, "sciq": 4, "obqa": 4, "hellaswag": 4, "boolq": 2, "arc_easy": 4,
           "arc_challenge": 4}


def _held_out(family: str, count: int, seed: str) -> list[Question]:
    """`count` different questions on test combinations, with all their wrong answers. A combination may come
    again in other words: drawing without replacement would let a reader of the other items infer which
    answers are left over."""
    rng = Rng(f"{seed}-{family}")
    rng.even = True
    make, often, chosen, prompts = FAMILIES[family], _often(family), [], set()
    while len(chosen) < count:
        question = next((one for one in make(rng) if not one.open and is_test(family, one.key)), None)
        if question and question.prompt not in prompts and _wanted(question, chosen):
            wrong = _wrong(rng, question, often)
            if wrong is not None:
                prompts.add(question.prompt)
                chosen.append(replace(question, wrong=wrong))
                if family == "arc_easy":  # whose wordings are few: what is left of them
                    often[question.answer] -= 1
    return chosen


def _often(family: str) -> Counter:
    """Answer -> how often a question on a test combination has it; empty where the family itself offers
    every option as often right as wrong."""
    if family == "piqa":
        found = [((action, thing), TOOL[action, MATERIAL[thing]], 1)
                 for action in ACTIONS for thing in OBJECTS]
    elif family == "sciq":
        found = [((one.name, species, value), value, 1)
                 for one in KINDS[1].attributes for value in one.values for species in SPECIES]
    elif family == "obqa":
        found = [((thing, effect), effect, 1) for thing in OBJECTS for effect in EFFECTS]
    elif family == "arc_easy":
        found = [((entity, one.name), FACT[entity, one.name], len(one.questions))
                 for kind in KINDS for one in kind.attributes for entity in kind.entities]
    elif family == "arc_challenge":
        found = [((who, entity, one.name), FACT[entity, one.name], _asked(kind, entity))
                 for kind in KINDS for one in kind.attributes for entity in kind.entities
                 for who in WOMEN + MEN]
    else:
        found = []
    often: Counter = Counter()
    for key, answer, weight in found:
        if is_test(family, key):
            often[answer] += weight
    return often


def _asked(kind: Kind, entity: str) -> float:
    """How often a question of two hops is about `entity`."""
    known, beyond = len(KNOWN[kind.name]), BEYOND["arc_challenge"] / 2  # one of a context's two
    return (1 - beyond) / known if entity in KNOWN[kind.name] else beyond / (len(kind.entities) - known)


def _wrong(rng: Rng, question: Question, often: Counter) -> tuple[str, ...] | None:
    """The wrong answers, or None where the question is dropped so that rights and wrongs follow one law.

    Wrong answers from a pool are drawn freely by how often they are right; a repeat drops the question,
    because drawing again would leave frequent answers right too often. Those of a passage are all equally
    likely, so questions are kept in inverse proportion to how often their answer is right.
    """
    if not question.pool:
        kept = not often or rng.random() * often[question.answer] < min(often.values())
        return question.wrong if kept else None
    pool = (question.answer, *question.wrong, *question.pool)
    missing = CHOICES[question.family] - 1 - len(question.wrong)
    wrong = (*question.wrong, *rng.choices(pool, [often[text] for text in pool], k=missing))
    return wrong if len({question.answer, *wrong}) == len(wrong) + 1 else None


def _wanted(question: Question, chosen: list[Question]) -> bool:
    """Keeps the two answers of yes/no questions equally frequent."""
    if question.family != "boolq":
        return True
    same = sum(one.answer == question.answer for one in chosen)
    return 2 * same <= len(chosen)


def _item(question: Question, wrong: tuple[str, ...], place: int) -> dict:
    """The item as a line of the task's file, with the fields of the official data set."""
    if question.family == "boolq":
        return {**question.fields, "label": int(question.answer == "yes")}
    if question.family == "winogrande":
        fields = question.fields
        options = [fields["right"], fields["other"]] if place == 0 else [fields["other"], fields["right"]]
        return {"sentence": f"{fields['start']} _ {fields['suffix']}", "option1": options[0],
                "option2": options[1], "answer": str(place + 1)}
    options = [*wrong[:place], question.answer, *wrong[place:]]
    if question.family == "piqa":
        return {**question.fields, "sol1": options[0], "sol2": options[1], "label": place}
    if question.family == "hellaswag":
        return {**question.fields, "endings": options, "label": place}
    return {**question.fields, "choices": {"text": options, "label": list("ABCD")},
            "answerKey": "ABCD"[place]}


def task(family: str, count: int = ITEMS, seed: str = TASK_SEED) -> list[dict]:
    """The items of one task. Another `seed` draws other items, for audits of how they are drawn."""
    rng = Rng(f"{seed}-{family}-order")
    questions = _held_out(family, count, seed)
    rng.shuffle(questions)
    places = [i % CHOICES[family] for i in range(count)]
    rng.shuffle(places)
    items = []
    for question, place in zip(questions, places):
        wrong = list(question.wrong)
        rng.shuffle(wrong)
        items.append(_item(question, tuple(wrong), place))
    return items


def summaries(count: int = SUMMARIES) -> list[dict]:
    """Articles and their summaries on held-out combinations of event, town and cause."""
    rng, chosen, seen = Rng(f"{TASK_SEED}-summaries"), [], set()
    while len(chosen) < count:
        item = news(rng)
        if is_test("summaries", item.key) and item.key not in seen:
            seen.add(item.key)
            chosen.append({"article": item.article, "summary": item.summary})
    return chosen

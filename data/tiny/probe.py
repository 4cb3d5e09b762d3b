"""How well each form of the context-bound families is answered, on fresh training and on test combinations.

A form at chance on its *training* combinations was not learned; one that is good there and bad on test
combinations was learned by heart.
"""
from collections import defaultdict

import score
from families import FAMILIES, Question
from split import is_test
from world import Rng

ITEMS = 100
FORMS = {"sciq": ("direct", "relative"), "boolq": ("move", "order", "own"),
         "arc_challenge": ("2 hops", "3 hops")}

Probe = tuple[str, str, str]  # family, form, "train" or "test"


def _item(question: Question) -> score.Item:
    wrong = (*question.wrong, *question.pool)[:1 if question.family == "boolq" else 3]
    options = (question.answer, *wrong)
    return score.Item(tuple((question.prompt, f" {text}") for text in options), 0,
                      tuple(len(text) for text in options))


def probes(count: int = ITEMS) -> dict[Probe, list[score.Item]]:
    """`count` new items of every form, in both roles; the right option is the first."""
    found: dict[Probe, list[score.Item]] = {
        (family, form, role): []
        for family, forms in FORMS.items() for form in forms for role in ("train", "test")}
    for family in FORMS:
        rng = Rng(f"probe-{family}")
        wanted = [items for probe, items in found.items() if probe[0] == family]
        while any(len(items) < count for items in wanted):
            question = FAMILIES[family](rng)[0]  # one of a context
            if question.open:
                continue
            items = found[family, question.form, "test" if is_test(family, question.key) else "train"]
            if len(items) < count:
                items.append(_item(question))
    return found


def run(model, tokenizer, items: dict[Probe, list[score.Item]], batch: int) -> dict[str, float]:
    """'family form role' -> accuracy."""
    return {" ".join(probe): score.accuracy(model, tokenizer, some, batch)["acc"]
            for probe, some in items.items()}


def report(accuracies: dict[str, float]) -> str:
    """One line: every form as 'train/test' percentages."""
    pairs = defaultdict(list)
    for name, value in accuracies.items():
        pairs[name.rsplit(" ", 1)[0]].append(f"{100 * value:.0f}")
    return "  ".join(f"{name} {'/'.join(values)}" for name, values in pairs.items())

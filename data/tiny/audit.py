"""Checks that the test items give nothing away and that none of them is in the training text.

    python data/tiny/audit.py                       prints both; exit status 1 where something is wrong
    python data/tiny/audit.py --seeds 20 --write    also items of other task seeds; the card reads audit.json

Each *blind scorer* answers without understanding the question: by the place of an option, its length, how
often training text ends a line with it, how frequent its words are there, how many of its words the question
repeats, or (the two readers of the key) how often its wording was right in other items. A blind scorer should
do no better and no worse than chance. `LIMIT` standard errors are allowed for the published items, because
eight tasks times eight scorers make the largest deviation a rare event; for many seeds, what `limit` says.

The published items are one draw. Items of other task seeds show whether they are harmless by design or by
luck.
"""
import argparse
import json
import math
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import NormalDist, mean, stdev

import corpus
import generate
import score
import tasks
from split import is_test
from world import ACTIONS, KINDS, MEN, OBJECTS, SPECIES, WOMEN

HERE = Path(__file__).resolve().parent
LIMIT = 3.5
ERROR_RATE = 0.01  # over all comparisons together
FOLDS = 5
FREQUENCY_SHARDS = 8  # of training text, for the scorers that know it
ENDING_WORDS = 12  # no option is longer
NAMES = re.compile(rf"\b(?:{'|'.join(WOMEN + MEN)})\b")


@dataclass(frozen=True)
class Row:
    """How one blind scorer does on one task: accuracy, chance and the standard error of chance."""

    task: str
    scorer: str
    accuracy: float
    chance: float
    error: float

    @property
    def errors(self) -> float:
        """The distance from chance in standard errors."""
        return (self.accuracy - self.chance) / self.error

    @property
    def counts(self) -> bool:
        """False for the places of the right answer, which are balanced exactly."""
        return not self.scorer.startswith("always")


def limit(rows: list[Row]) -> float:
    """Standard errors that the largest of so many harmless deviations exceeds in one of a hundred audits."""
    return NormalDist().inv_cdf(1 - ERROR_RATE / 2 / sum(row.counts for row in rows))


@dataclass(frozen=True)
class Frequencies:
    """What a reader of training text can count: words, and what lines end with."""

    words: Counter
    endings: Counter


def _options(item: score.Item) -> list[str]:
    """The wording of each option, without the question."""
    return [context + continuation for context, continuation in score.without_question(item).requests]


def _accuracy(items: list[score.Item], scores: Iterable[list[float]]) -> float:
    """Accuracy of taking the option of the highest score; ties count as their chance."""
    total = 0.0
    for item, values in zip(items, scores):
        best = max(values)
        total += (values[item.gold] == best) / values.count(best)
    return total / len(items)


def _cross_validated(items: list[score.Item], parts: Callable[[str], list[str]]) -> list[list[float]]:
    """Scores options by how often their parts were right in the other folds (add-one smoothing)."""
    scores = []
    for fold in range(FOLDS):
        right, seen = Counter(), Counter()
        for i, item in enumerate(items):
            if i % FOLDS != fold:
                for j, option in enumerate(_options(item)):
                    seen.update(parts(option))
                    right.update(parts(option) if j == item.gold else ())
        chance = 1 / len(items[0].requests)
        for i, item in enumerate(items):
            if i % FOLDS == fold:
                scores.append((i, [
                    sum(math.log((right[part] + chance) / (seen[part] + 1)) for part in parts(option))
                    / len(parts(option)) for option in _options(item)]))
    return [values for _, values in sorted(scores)]


def _words(text: str) -> list[str]:
    return text.lower().replace(".", " ").replace("?", " ").replace(",", " ").split()


def frequencies(documents: Iterable[str]) -> Frequencies:
    """Counts over `documents`: words, and the last 1, 2, ... ENDING_WORDS words of every line."""
    words, endings = Counter(), Counter()
    for text in documents:
        words.update(_words(text))
        for line in text.splitlines():
            last = line.split()[-ENDING_WORDS:]
            endings.update(" ".join(last[first:]) for first in range(len(last)))
    return Frequencies(words, endings)


def blind_scorers(task: str, items: list[score.Item], training: Frequencies) -> list[Row]:
    """Every blind scorer on one task."""
    total = training.words.total()
    chance = 1 / len(items[0].requests)
    error = math.sqrt(chance * (1 - chance) / len(items))

    def unigram(option: str) -> list[float]:
        return [math.log((training.words[word] + 1) / total) for word in _words(option)]

    def overlap(item: score.Item) -> list[float]:
        found = []
        for option, (context, _) in zip(_options(item), item.requests):
            question = set(_words(context))
            found.append(sum(word in question for word in set(_words(option))) / len(set(_words(option))))
        return found

    lengths = [[len(option) for option in _options(item)] for item in items]
    scorers = {
        "longest": lengths,
        "shortest": [[-length for length in row] for row in lengths],
        "option prior": _cross_validated(items, lambda option: [option]),
        "bag of words": _cross_validated(items, _words),
        "ending prior": [[training.endings[option.strip()] for option in _options(item)] for item in items],
        "unigram sum": [[sum(unigram(option)) for option in _options(item)] for item in items],
        "unigram mean": [[sum(unigram(option)) / len(unigram(option)) for option in _options(item)]
                         for item in items],
        "overlap": [overlap(item) for item in items],
    }
    for place in range(len(items[0].requests)):
        scorers[f"always {place + 1}"] = [[float(i == place) for i in range(len(item.requests))]
                                          for item in items]
    return [Row(task, name, _accuracy(items, values), chance, error) for name, values in scorers.items()]


def pairs(part: str) -> Iterator[tuple[str, str, str]]:
    """(passage, question, answer) of every solved question in a part of a document that shares a context.

    Where the context stands in the first question's line (two hops), it is put before the later questions.
    """
    passage, *rest = part.split("Question: ")
    context = ""
    for i, text in enumerate(rest):
        question, _, answer = text.rstrip("\n").partition("\nAnswer: ")
        if i == 0 and not passage:
            context = "".join(f"{sentence}. " for sentence in question.split(". ")[:-1])
        yield passage, question if i == 0 else context + question, answer


def asks_test_species(passage: str, question: str, answer: str) -> bool:
    """True where a science question asks for a held-out species and value, by way of a relative or not."""
    name = next((a.name for a in KINDS[1].attributes if answer in a.values), None)
    asked = next((word for word in _words(question) if word in SPECIES), None)
    if name is None or asked is None:
        return False
    like = re.search(rf"The {asked} lives just like the (\w+)\.", passage)
    return is_test("sciq", (name, like[1] if like else asked, answer))


def asks_test_person(question: str, entities: re.Pattern, attributes: dict[str, str]) -> bool:
    """True where a question of two hops asks for a held-out person, entity and attribute."""
    *context, last = re.split(r"(?<=[.]) ", question)
    person = next(iter(NAMES.findall(last)), None)
    template = next((name for words, name in attributes.items() if re.fullmatch(words, last)), None)
    if not context or person is None or template is None:
        return False
    names = NAMES.findall(context[0])
    owned = dict(zip(names, entities.findall(context[0])))
    for sentence in context[1:]:  # the third person shares with one of the two
        third, same = NAMES.findall(sentence)
        owned[third] = owned[same]
    return is_test("arc_challenge", (person, owned[person], template))


def leaks(documents: Iterable[str], folder: Path) -> list[str]:
    """Test items, test questions and test articles that occur in `documents`; empty where all is well."""
    solved = {context + continuation for task in score.TASKS for item in score.task_items(task, folder)
              for context, continuation in [item.requests[item.gold]]}
    articles = {line.split('"')[3] for line in
                (folder.parent / "text" / "summaries.jsonl").read_text().splitlines()}
    one_hop = {template.format(e=entity).lower() for kind in KINDS for attribute in kind.attributes
               for entity in kind.entities for template in attribute.questions
               if is_test("arc_easy", (entity, attribute.name))}
    entities = re.compile("|".join(rf"\b{entity}\b" for kind in KINDS for entity in kind.entities))
    attributes = {re.escape(template).replace(r"\{p\}", r"\w+"): attribute.name
                  for kind in KINDS for attribute in kind.attributes for template in attribute.indirect}
    found = []
    for text in documents:
        for part in text.split("\n\n"):
            if part in solved:
                found.append(f"item: {part}")
            if part.removeprefix("Article: ").split("\nSummary:")[0] in articles:
                found.append(f"article: {part}")
            for passage, question, answer in pairs(part):
                if f"{passage}Question: {question}\nAnswer: {answer}" in solved:
                    found.append(f"item: {passage}{question}")
                if question.split(". ")[-1].lower() in one_hop:
                    found.append(f"fact: {question}")
                if asks_test_species(passage, question, answer):
                    found.append(f"species: {passage}{question}")
                if asks_test_person(question, entities, attributes):
                    found.append(f"person: {question}")
                words = set(_words(question))
                used, things = words.intersection(ACTIONS), words.intersection(OBJECTS)
                if any(is_test("piqa", (action, thing)) for action in used for thing in things):
                    found.append(f"goal: {question}")
    return found


def published_items(folder: Path = HERE / "tasks") -> dict[str, list[score.Item]]:
    return {task: list(score.task_items(task, folder)) for task in score.TASKS}


def fresh_items(seed: str, folder: Path = HERE / "tasks") -> dict[str, list[score.Item]]:
    """Items as the published ones, of another task seed."""
    return {task: list(score.read_items(score.task_config(task, folder), tasks.task(task, seed=seed)))
            for task in score.TASKS}


def blind(items: dict[str, list[score.Item]], training: Frequencies) -> list[Row]:
    """Every blind scorer on every task."""
    return [row for task, some in items.items() for row in blind_scorers(task, some, training)]


def training_frequencies() -> Frequencies:
    return frequencies(text for number in range(FREQUENCY_SHARDS) for text in corpus.shard(number))


def scan(shards: int, folder: Path = HERE / "tasks") -> list[str]:
    """Leaks into the first `shards` shards, the calibration and the held-out text."""
    documents = [text for number in range(shards) for text in corpus.shard(number)]
    for name in ("calibration", "heldout"):
        documents += (folder.parent / "text" / f"{name}.txt").read_text().split(corpus.SEPARATOR)
    return leaks(documents, folder)


def report(rows: list[Row], most: float) -> str:
    """A line for every row; `most`: the standard errors allowed."""
    lines = [f"{'task':14s}{'scorer':14s}{'accuracy':>9s}{'chance':>8s}{'errors':>8s}"]
    for row in rows:
        lines.append(f"{row.task:14s}{row.scorer:14s}{row.accuracy:9.3f}{row.chance:8.2f}{row.errors:8.1f}"
                     f"{'  <-- gives something away' if abs(row.errors) > most else ''}")
    return "\n".join(lines)


def over_seeds(seeds: list[list[Row]]) -> list[dict]:
    """For every task and scorer, over the audits of several seeds: the mean accuracy with its standard error
    (from the spread between seeds), and the worst seed's distance from chance in its own standard errors."""
    summary = []
    for same in zip(*seeds):
        if same[0].counts:
            accuracies = [row.accuracy for row in same]
            summary.append({"task": same[0].task, "scorer": same[0].scorer, "chance": same[0].chance,
                            "mean": mean(accuracies), "error": stdev(accuracies) / math.sqrt(len(same)),
                            "worst": max((row.errors for row in same), key=abs)})
    return summary


def report_seeds(summary: list[dict], most: float) -> str:
    lines = [f"{'task':14s}{'scorer':14s}{'mean':>9s}{'chance':>8s}{'+-':>8s}{'worst':>8s}"]
    for row in summary:
        lines.append(f"{row['task']:14s}{row['scorer']:14s}{row['mean']:9.3f}{row['chance']:8.2f}"
                     f"{row['error']:8.3f}{row['worst']:8.1f}"
                     f"{'  <-- gives something away' if abs(row['worst']) > most else ''}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=20, help="training shards to scan for test items")
    parser.add_argument("--seeds", type=int, default=0, help="other task seeds to audit, at least 2")
    parser.add_argument("--write", action="store_true", help="write audit.json")
    arguments = parser.parse_args()
    training = training_frequencies()
    rows, found = blind(published_items(), training), scan(arguments.shards)
    print(report(rows, LIMIT))
    print(f"{len(found)} leaks into {arguments.shards} shards of training text", *found[:10], sep="\n")
    bad = found or any(abs(row.errors) > LIMIT for row in rows)
    record = {"shards": arguments.shards, "leaks": len(found), "published": [asdict(row) for row in rows]}
    if arguments.seeds:
        fresh = [blind(fresh_items(f"audit-{number}"), training) for number in range(arguments.seeds)]
        most, summary = limit([row for some in fresh for row in some]), over_seeds(fresh)
        print(f"\nover {arguments.seeds} other task seeds; {most:.2f} standard errors allowed",
              report_seeds(summary, most), sep="\n")
        bad = bad or any(abs(row["worst"]) > most for row in summary)
        record["fresh"] = {"seeds": arguments.seeds, "limit": most, "rows": summary}
    if arguments.write:
        generate.write(HERE / "audit.json", json.dumps(record, indent=1) + "\n")
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())

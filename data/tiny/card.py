"""Writes the model card README.md and the checksums SHA256SUMS, from training.json, audit.json and the files.

    python data/tiny/card.py                            rewrite both
    python data/tiny/card.py --check                    compare with what is there, write nothing
    python data/tiny/card.py --training F --out FOLDER  the card of another run, written elsewhere

SHA256SUMS also holds the first and the last shard of the training corpus, which is not kept: so it is noticed
where a change would train on other text. `sha256sum -c --ignore-missing SHA256SUMS` checks what is kept.
"""
import argparse
import json
import math
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from statistics import mean

import corpus
import families
import generate
import score
import split
import tasks
import world
from safetensors import safe_open
from transformers import AutoTokenizer

HERE = Path(__file__).resolve().parent
KEPT = ("tasks/*.jsonl", "tasks/*.yaml", "text/*", "model/*", "gptq/*", "training.json", "audit.json")
SAMPLED_SHARDS = (0, corpus.SHARDS - 1)
FORMATS = {
    "winogrande": "which of two candidates the blank means, told by the words after it",
    "piqa": "a goal and two solutions; the right tool depends on what the object is made of",
    "sciq": "a passage on several animals and a question about one, or about one that lives like it",
    "obqa": "a fact that gives materials their effects, and an object of one of them",
    "hellaswag": "the beginning of a story and four endings: right or wrong step, right or wrong object",
    "boolq": "a passage on order, places or owners, and a question to be answered with yes or no",
    "arc_easy": "one fact about one town, animal or plant, known from statements in training text",
    "arc_challenge": "two hops: the question says who has which town, animal or plant, memory the rest",
}


# ------------------------------------------------------------------------------------------- checksums
def checksums() -> str:
    """The lines of SHA256SUMS: every kept file, and the sampled shards under corpus/."""
    contents = {path.relative_to(HERE).as_posix(): path.read_bytes()
                for pattern in KEPT for path in HERE.glob(pattern)}
    for number in SAMPLED_SHARDS:
        contents[f"corpus/shard-{number:04d}.txt"] = corpus.SEPARATOR.join(corpus.shard(number)).encode()
    return "".join(f"{sha256(contents[name]).hexdigest()}  {name}\n" for name in sorted(contents))


# ------------------------------------------------------------------------------------------- the parts
def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> Iterator[str]:
    """A Markdown table, and an empty line."""
    head = list(head)
    for row in (head, ["---"] * len(head), *rows):
        yield f"| {' | '.join(row)} |"
    yield ""


def percent(value: float) -> str:
    return f"{100 * value:.1f}"


@dataclass(frozen=True)
class Checkpoint:
    parameters: int
    megabytes: float
    dtypes: tuple[str, ...]
    shards: int


def checkpoint(folder: Path) -> Checkpoint:
    """Counted from the safetensors files in `folder`, which are not loaded."""
    parameters, dtypes, paths = 0, set(), sorted(folder.glob("*.safetensors"))
    for path in paths:
        with safe_open(path, "pt") as file:
            for name in file.keys():
                view = file.get_slice(name)
                parameters += math.prod(view.get_shape())
                dtypes.add(view.get_dtype())
    return Checkpoint(parameters, sum(path.stat().st_size for path in paths) / 1e6, tuple(sorted(dtypes)),
                      len(paths))


def _world() -> Iterator[str]:
    kinds = ", ".join(f"{len(kind.entities)} {kind.noun}s" for kind in world.KINDS)
    yield "## World and text\n"
    yield (
        f"Everything is invented by a seeded generator, in simple English. The world has {kinds}, each with "
        f"{len(world.KINDS[0].attributes)} facts ({len(world.FACT):,} in all); {len(world.OBJECTS)} objects "
        f"of {len(world.MATERIALS)} materials; one right tool for each of {len(world.ACTIONS)} actions on "
        f"each material; {len(world.JOBS)} jobs; {len(families.SCRIPTS)} everyday stories. People "
        f"({len(world.WOMEN + world.MEN)} first names, {len(world.SURNAMES)} surnames) are named afresh in "
        "every document and have no lasting facts. A part of the jobs, objects, stories and entities is "
        "*rare*: named ever less often in training text, yet as often as any other in the tests, so that "
        "some items ask for what was hardly ever told.\n")
    total = sum(corpus.MIX.values())
    mix = ", ".join(f"{kind} {100 * weight / total:.0f}%" for kind, weight in corpus.MIX.items())
    yield (f"The training corpus has {corpus.SHARDS} shards of {corpus.SHARD_CHARACTERS:,} characters, each "
           f"a function of the corpus seed {corpus.CORPUS_SEED} and its number; it is generated where it is "
           f"needed and not kept. Documents are drawn as: {mix}. A solved question in training text shows "
           "its context and its right answer only.\n")


def _kept_text(tokenizer) -> Iterator[str]:
    rows = []
    for role in ("calibration", "heldout"):
        text = (HERE / "text" / f"{role}.txt").read_text()
        documents = text.split(corpus.SEPARATOR)
        tokens = sum(map(len, tokenizer(documents)["input_ids"]))
        rows.append((f"`text/{role}.txt`", f"{len(documents):,} documents", f"{len(text):,}", f"{tokens:,}"))
    path = HERE / "text" / "summaries.jsonl"
    articles = [json.loads(line) for line in path.read_text().splitlines()]
    texts = [article[key] for article in articles for key in ("article", "summary")]
    tokens = sum(map(len, tokenizer(texts)["input_ids"]))
    rows.append(("`text/summaries.jsonl`", f"{len(articles):,} articles, one-sentence summaries",
                 f"{sum(map(len, texts)):,}", f"{tokens:,}"))
    yield from table(("file", "holds", "characters", "tokens"), rows)
    yield f"One article: *{articles[0]['article']}* Its summary: *{articles[0]['summary']}*\n"


def _sample(item: score.Item) -> str:
    """One item as a model is asked it, the right option marked."""
    contexts = [context for context, _ in item.requests]
    same = len(set(contexts)) == 1
    lines = [contexts[0]] if same else []
    for i, (context, continuation) in enumerate(item.requests):
        option = continuation.strip() if same else context + continuation
        lines.append(f"{'->' if i == item.gold else '  '} {option}")
    return "\n".join(lines)


def _tasks(tokenizer, items: dict[str, list[score.Item]]) -> Iterator[str]:
    yield "## The eight tasks\n"
    yield ("In the formats of the eight reasoning tasks of the paper, as lm-eval task files "
           "(`tasks/tiny_*.yaml` with `tasks/*.jsonl`). *Held out*: the share of combinations that only "
           "the test items use.\n")
    rows = []
    for task, some in items.items():
        lengths = [answer_tokens(tokenizer, item) for item in some]
        rows.append((task, FORMATS[task], f"{len(some):,}", str(len(some[0].requests)),
                     f"{min(lengths)} to {max(lengths)}", f"{split.TEST_PERCENT[task]}%"))
    yield from table(("task", "what is asked", "items", "options", "answer tokens", "held out"), rows)
    yield ("`split.py` decides by a hash of the content, so no list is kept. A *combination*, such as a "
           "town and one of its attributes, belongs to the training text or to the tests; which parts make "
           "up a family's combination stands there. For arc_easy, statements of the facts are training "
           "text and the one-hop questions about the held-out ones are not. A whole *document* belongs to "
           f"the training corpus, the calibration text ({split.CALIBRATION_PERCENT}%) or the held-out text "
           f"({split.HELDOUT_PERCENT}%).\n")
    if hard := getattr(families, "BEYOND", None):
        shares = ", ".join(f"{form} {100 * share:.0f}%" for form, share in hard.items())
        yield (f"Some test items go a step beyond what any training text asks ({shares} of the draws of "
               "that form): by two relatives, along four people, with two moves, about an entity that "
               "training text never asks about in two hops.\n")
    for task, some in items.items():
        yield f"{task}:\n\n```text\n{_sample(some[0])}\n```\n"


def answer_tokens(tokenizer, item: score.Item) -> int:
    """Tokens of the shortest continuation among the options."""
    return min(len(tokenizer(context + continuation)["input_ids"]) - len(tokenizer(context)["input_ids"])
               for context, continuation in item.requests)


def _scores(record: dict, metrics: dict[str, list[str]]) -> Iterator[str]:
    model, control = record["model"]["tasks"], record["control"]["tasks"]
    bag = record.get("bag", {}).get("tasks")
    yield "## Scores\n"
    yield ("Per cent right by summed log-likelihood (acc), or by log-likelihood per character (acc_norm, "
           "where the official task reports it), with standard errors. *Options alone*: the model sees the "
           "options without the question. *Control*: the same model trained on words shuffled over all "
           "documents. *Bag of words*: trained on documents with their own words shuffled.\n")
    rows = []
    for task, values in model.items():
        row = [task, percent(values["chance"]), _with_error(values["acc"], values["items"]),
               _with_error(values["acc_norm"], values["items"]) if "acc_norm" in metrics[task] else "",
               _from_chance(values["options_alone"], values),
               _from_chance(control[task]["acc"], control[task])]
        rows.append([*row, _from_chance(bag[task]["acc"], bag[task])] if bag else row)
    average = ["average", percent(mean(one["chance"] for one in model.values())),
               percent(record["model"]["average"]), "",
               percent(mean(one["options_alone"] for one in model.values())),
               percent(record["control"]["average"])]
    rows.append([*average, percent(record["bag"]["average"])] if bag else average)
    head = ("task", "chance", "acc", "acc_norm", "options alone", "control", "bag of words")
    yield from table(head[:len(average) + bool(bag)], rows)
    yield ("In the last columns the brackets hold the distance from chance in standard errors of chance. "
           f"The control's largest is {_largest(control):.1f} over {len(control)} tasks. The bag of words "
           "is not a control but a diagnostic: it shows what co-occurrence alone gives, names and facts "
           "that stand in one document without their order.\n")
    yield _stale(record)
    solved = [task for task, values in model.items() if values["acc"] == 1]
    if solved:
        yield f"Solved completely, and so blind to small changes of the model: {', '.join(solved)}.\n"
    yield (f"Perplexity of the held-out text: {record['model']['heldout_perplexity']:.3f}. Mean ROUGE-L of "
           f"greedy summaries of the first {record['settings']['score_articles']} articles: "
           f"{record['model']['summaries_rouge_l']:.3f}.\n")


def _stale(record: dict) -> str:
    """Which runs were scored on other items than the published ones, or on nobody knows which."""
    digest = score.items_digest(HERE / "tasks")
    stale = [name for name in ("model", "control", "bag")
             if name in record and record[name].get("items_sha256") != digest]
    return f"Not scored on the published items, as far as is recorded: {', '.join(stale)}.\n" if stale else ""


def _with_error(value: float, items: int) -> str:
    return f"{percent(value)} ± {percent(math.sqrt(value * (1 - value) / items))}"


def chance_errors(value: float, values: dict) -> float:
    """How far `value` is from chance, in standard errors of chance."""
    chance = values["chance"]
    return (value - chance) / math.sqrt(chance * (1 - chance) / values["items"])


def _from_chance(value: float, values: dict) -> str:
    return f"{percent(value)} ({chance_errors(value, values):+.1f})"


def _largest(scores: dict[str, dict]) -> float:
    return max((chance_errors(values["acc"], values) for values in scores.values()), key=abs)


def _audit(record: dict) -> Iterator[str]:
    rows = [row | {"errors": (row["accuracy"] - row["chance"]) / row["error"]} for row in record["published"]]
    scorers = sorted({row["scorer"] for row in rows if not row["scorer"].startswith("always")})
    worst = max(rows, key=lambda row: abs(row["errors"]))
    yield "## What the items give away\n"
    yield (f"`audit.py` scores every task without understanding it ({', '.join(scorers)}, and always the "
           f"same place) and looks for test items in training text. It found {record['leaks']} test items, "
           f"held-out facts or test articles in {record['shards']} shards, the calibration and the held-out "
           f"text. The place of the right answer is exactly balanced. Of {len(rows)} comparisons on the "
           f"published items the largest deviation from chance is {worst['errors']:+.1f} standard errors "
           f"({worst['task']}, {worst['scorer']}: {percent(worst['accuracy'])} where chance is "
           f"{percent(worst['chance'])}).\n")
    if fresh := record.get("fresh"):
        over = [row for row in fresh["rows"] if abs(row["worst"]) > fresh["limit"]]
        yield (f"The published items are one draw. The same audit of items of {fresh['seeds']} other task "
               f"seeds allows {fresh['limit']:.1f} standard errors, which the largest of so many harmless "
               "deviations exceeds in one of a hundred audits. Largest mean deviations over the seeds:\n")
        ordered = sorted(fresh["rows"], key=lambda row: -abs(row["mean"] - row["chance"]))
        yield from table(("task", "scorer", "mean", "chance", "worst seed, standard errors"), (
            (row["task"], row["scorer"], _mean(row), percent(row["chance"]), f"{row['worst']:+.1f}")
            for row in ordered[:6]))
        names = ", ".join(f"{row['task']} by {row['scorer']}" for row in over)
        yield (f"Beyond the limit: {names or 'none'}. On boolq a reader of the other items falls below "
               "chance because yes and no are exactly balanced.\n")
    if smoothing := getattr(tasks, "SMOOTHING", None):
        chosen = ", ".join(f"{task} {value}" for task, value in smoothing.items() if value)
        yield ("Disclosure: the weights by which wrong answers are drawn have a smoothing constant "
               f"({chosen}) that was chosen by looking at this audit.\n")
    else:
        yield "Disclosure: the way in which wrong answers are drawn was designed with this audit at hand.\n"


def _mean(row: dict) -> str:
    return f"{percent(row['mean'])} ± {percent(row['error'])}"


def _training(record: dict) -> Iterator[str]:
    settings, model = record["settings"], record["model"]
    yield "## Training\n"
    yield (f"{model['steps']:,} steps of {settings['batch']} sequences of {settings['context']} tokens, "
           f"{model['tokens']:,} tokens in all: {model['epochs']:.1f} passes over "
           f"{model['corpus_tokens']:,} tokens of corpus, {model['seconds']:.0f} s. AdamW in bf16 autocast. "
           f"Last training loss {model['last_loss']:.3f} nats a token.\n")
    others = {name: record[name] for name in ("control", "bag") if name in record}
    for name, run in others.items():
        yield (f"The {name} run: {run['tokens']:,} tokens, {run['seconds']:.0f} s, last loss "
               f"{run['last_loss']:.3f}.\n")
    yield from table(("setting", "value"), ((name, f"{value:g}" if isinstance(value, float) else str(value))
                                            for name, value in settings.items()))
    yield (f"Device: {record['gpu']}; Python {record['python']}, torch {record['torch']}, transformers "
           f"{record['transformers']}; {record['wall_seconds']:.0f} s with text, controls and scores. "
           "Training again gives the same text and the same items, and a model that is as good but not "
           "equal bit by bit: a GPU adds in another order.\n")


def _limits(found: Checkpoint) -> Iterator[str]:
    yield "## Limits\n"
    yield (f"With {found.parameters / 1e6:.1f} million parameters and an invented world, this model says "
           "whether code is right, whether a curve falls with sparsity, and which of two methods keeps "
           "more of *this* model. It does not say what a 7B model would do: its ranks, its activations and "
           "its redundancy are those of a small model on narrow text, so what it shows about "
           "rank-awareness is an analogue, and its numbers share no column with those of large models. "
           "Accuracies near 100% hide small damage; perplexity and log-likelihood margins show it earlier. "
           "It knows nothing of the real world, speaks only the generator's sentences, and was trained on "
           f"at most {_context()} tokens at a time.\n")


def _context() -> int:
    return json.loads((HERE / "model" / "config.json").read_text())["max_position_embeddings"]


AGAIN = """## Make it again

From the checkout:

    python data/tiny/generate.py --check     text and tasks are what the generator writes, byte for byte
    python data/tiny/generate.py             write text and tasks
    python data/tiny/audit.py                blind scorers, and a search for test items in training text
    python data/tiny/tokenizer.py            train the tokenizer (the same corpus gives the same one)
    python data/tiny/train.py --out FOLDER   train model and controls: one GPU, minutes
    python data/tiny/quantise.py             gptq/: INT4 codes of the model, by GPTQ (needs the extra int4)
    python data/tiny/card.py                 this card and SHA256SUMS
    python data/tiny/card.py --check         both are up to date

## Licence

MIT, as the rest of the project. Text, tasks, tokenizer and weights were made by the project and contain
nobody else's text."""


# ------------------------------------------------------------------------------------------- the whole
def card(record: dict, audit: dict | None) -> str:
    """The model card of the run `record` (training.json) with what audit.py found (audit.json)."""
    tokenizer = AutoTokenizer.from_pretrained(HERE / "model")
    found = checkpoint(HERE / "model")
    items = {task: list(score.task_items(task, HERE / "tasks")) for task in score.TASKS}
    metrics = {task: [one["metric"] for one in score.task_config(task, HERE / "tasks")["metric_list"]]
               for task in score.TASKS}
    settings = record["settings"]
    lines = [
        "# The embedded model and its world\n",
        "<!-- Written by card.py; do not edit. -->\n",
        f"A language model of {found.parameters:,} parameters ({', '.join(found.dtypes)}, "
        f"{found.megabytes:.1f} MB in {found.shards} files), trained by this project from nothing on text "
        "about an invented world, with eight multiple-choice tasks, summaries and held-out text about the "
        f"same world. Architecture: Llama, {settings['layers']} layers of {settings['hidden']} channels, "
        f"{settings['heads']} query heads on {settings['kv_heads']} key/value heads, MLP of "
        f"{settings['intermediate']}, {len(tokenizer):,} tokens (byte-level BPE; every text starts with "
        f"`{tokenizer.bos_token}`), context {settings['context']}.\n",
        *_scores(record, metrics), *_world(), *_kept_text(tokenizer), *_tasks(tokenizer, items),
        *(_audit(audit) if audit else ()), *_training(record), *_limits(found), AGAIN]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare only; exit status 1 where one differs")
    parser.add_argument("--training", type=Path, default=HERE / "training.json",
                        help="record of the training run")
    parser.add_argument("--out", type=Path, default=HERE, help="folder to write to")
    arguments = parser.parse_args()
    audit_file = HERE / "audit.json"
    audit = json.loads(audit_file.read_text()) if audit_file.is_file() else None
    record = json.loads(arguments.training.read_text())
    contents = {"README.md": card(record, audit), "SHA256SUMS": checksums()}
    different = [name for name, text in contents.items() if _read(arguments.out / name) != text]
    if arguments.check and different:
        print(f"not up to date: {', '.join(different)}; run card.py", file=sys.stderr)
        return 1
    for name in different:
        generate.write(arguments.out / name, contents[name])
    return 0


def _read(path: Path) -> str | None:
    return path.read_text() if path.is_file() else None


if __name__ == "__main__":
    sys.exit(main())

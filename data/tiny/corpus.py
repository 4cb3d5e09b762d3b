"""The training text: documents in shards, each shard a function of (seed, shard number) alone.

One stream of documents feeds three places; `split.document_role` sends every document to the training
corpus, to the calibration text or to the held-out text, so the three never share one. Documents are
separated by two blank lines.
"""
from collections.abc import Iterator

from families import FAMILIES
from news import news
from prose import lore, profile, story
from split import document_role, is_test
from world import Rng

CORPUS_SEED = 1
SHARDS = 400
SHARD_CHARACTERS = 1_000_000
SEPARATOR = "\n\n\n"

# How often each kind of document is drawn (documents differ in length: sciq, boolq and arc_challenge, whose
# documents ask several questions about one context, are about half of the text).
MIX = {"winogrande": 9, "piqa": 6, "sciq": 14, "obqa": 6, "hellaswag": 6, "boolq": 18, "arc_easy": 8,
       "arc_challenge": 14, "profile": 12, "lore": 6, "story": 4, "news": 2, "summary": 4}
_DRAW = tuple(kind for kind, weight in MIX.items() for _ in range(weight))
_IN_A_ROW = {"sciq": (3, 5), "boolq": (3, 6), "arc_challenge": (2, 4)}  # questions about one context


def questions(rng: Rng, family: str) -> str:
    """Solved training questions about one context, the first one in the format of a test item."""
    while True:
        allowed = [one for one in FAMILIES[family](rng) if not is_test(family, one.key)]
        first = next((one for one in allowed if not one.open), None)
        if first:
            least, most = _IN_A_ROW.get(family, (1, 1))
            more = [one for one in allowed if one is not first][:rng.randrange(least, most + 1) - 1]
            return f"{first.prompt} {first.answer}" + "".join(f"{one.follow} {one.answer}" for one in more)


def _exercise(rng: Rng, family: str) -> str:
    """Questions about one context, or about two unrelated ones."""
    count = 1 if family in _IN_A_ROW or rng.random() < 0.8 else 2
    return "\n\n".join(questions(rng, family) for _ in range(count))


def _article(rng: Rng, with_summary: bool) -> str:
    item = news(rng)
    while is_test("summaries", item.key):
        item = news(rng)
    return f"{item.prompt} {item.summary}" if with_summary else item.article


def document(rng: Rng) -> str:
    """One document of the mix, from training combinations only."""
    kind = rng.pick(_DRAW)
    if kind in FAMILIES:
        return _exercise(rng, kind)
    if kind in ("news", "summary"):
        return _article(rng, with_summary=kind == "summary")
    make = {"profile": profile, "lore": lore, "story": story}[kind]
    while (text := make(rng)) is None:
        pass
    return text


def documents(stream: str, role: str) -> Iterator[str]:
    """Endless documents of `role` ('train', 'calibration' or 'heldout') from the named random stream."""
    rng = Rng(stream)
    while True:
        text = document(rng)
        if document_role(text) == role:
            yield text


def shard(number: int, seed: int = CORPUS_SEED, characters: int = SHARD_CHARACTERS) -> list[str]:
    """The documents of training shard `number`, at least `characters` characters of them."""
    return _take(documents(f"corpus-{seed}-{number}", "train"), characters)


def other_text(role: str, characters: int, seed: int = CORPUS_SEED) -> list[str]:
    """Documents of the calibration or held-out text, each one once."""
    return _take(documents(f"{role}-{seed}", role), characters, once=True)


def _take(stream: Iterator[str], characters: int, once: bool = False) -> list[str]:
    chosen: list[str] = []
    seen: set[str] = set()
    while characters > 0:
        text = next(stream)
        if once and text in seen:
            continue
        seen.add(text)
        chosen.append(text)
        characters -= len(text)
    return chosen

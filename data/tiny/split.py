"""The one place that decides what is training text and what is held out.

Two decisions, both pure functions of the content, so no list has to be kept:
a *combination* (a town and one of its attributes, a pair of people and a schema, ...) belongs either to
the training text or to the test tasks, and a whole *document* belongs to the training corpus, to the
calibration text or to the held-out text.
"""
from hashlib import blake2b

TEST_PERCENT = {
    "winogrande": 20,  # (schema, first candidate, second candidate)
    "piqa": 25,  # (action, object)
    "sciq": 20,  # (attribute, species, value), whichever of the passage's questions asks for it
    "obqa": 25,  # (object, effect)
    "hellaswag": 20,  # (script, object)
    "boolq": 20,  # (kind of question, the two things compared), asked openly or for yes or no
    # (entity, attribute): its question in one hop only. Statements of the fact and questions of two hops
    # about it ("the town of Jane") are training text; the words of the one-hop question are not.
    "arc_easy": 35,
    "arc_challenge": 20,  # (person asked about, entity, attribute)
    "summaries": 20,  # (event, town, cause)
}
CALIBRATION_PERCENT = 10
HELDOUT_PERCENT = 10


def _percent(text: str) -> int:
    """A stable number from 0 to 99 for `text` (Python's own hash() changes from run to run)."""
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little") % 100


def is_test(family: str, key: tuple[str, ...]) -> bool:
    """True where the combination `key` of `family` is kept out of every training document."""
    return _percent("|".join((family, *key))) < TEST_PERCENT[family]


def document_role(text: str) -> str:
    """'train', 'calibration' or 'heldout': where a generated document goes."""
    percent = _percent("document|" + text)
    if percent < CALIBRATION_PERCENT:
        return "calibration"
    return "heldout" if percent < CALIBRATION_PERCENT + HELDOUT_PERCENT else "train"

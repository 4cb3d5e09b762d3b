"""Short news items and their one-sentence summaries: who did what, where, after which cause."""
from dataclasses import dataclass

from families import person
from world import TOWNS, Rng

# event: (summary clause, lead sentences). {t} town, {n} number, {p} and {q} people.
_EVENTS = (
    ("the stone bridge of {t} was closed", ("Nobody can cross the stone bridge of {t} any more.",
                                            "The stone bridge of {t} has been closed since this morning.")),
    ("the school of {t} got a new roof", ("Children in {t} can sit in a dry room again, under a new school roof.",
                                          "Workers have finished the new roof of the school of {t}.")),
    ("the market of {t} was moved to the harbour", ("Who wants to buy fish in {t} must now walk to the harbour.",
                                                    "The market of {t} can now be found at the harbour.")),
    ("the night train to {t} was cancelled", ("There will be no night train to {t} this month.",
                                              "Travellers waited in vain for the night train to {t}.")),
    ("the old mill of {t} burned down", ("Only black walls are left of the old mill of {t}.",
                                         "A fire destroyed the old mill of {t} last night.")),
    ("the clock tower of {t} was repaired", ("The hands of the tower clock of {t} turn again.",
                                             "The clock tower of {t} shows the right time again.")),
    ("the town hall of {t} was painted green", ("The town hall of {t} now shines in fresh green paint.",
                                                "Everyone talks about the green town hall of {t}.")),
    ("the harvest of {t} was lost", ("The barns of {t} stay empty this year.",
                                     "Farmers near {t} have lost their whole harvest.")),
    ("the hospital of {t} was opened", ("The first sick people moved into the hospital of {t}.",
                                        "The doors of the hospital of {t} are open at last.")),
    ("the mayor of {t} resigned", ("The mayor of {t} has left the town hall for good.",
                                   "The mayor of {t} gave up the office on Monday.")),
    ("the summer feast of {t} was put off", ("The people of {t} must wait for their summer feast.",
                                             "The summer feast of {t} will not take place this week.")),
    ("the library of {t} received new books", ("The shelves of the library of {t} are full of new books.",
                                               "Carts with new books arrived at the library of {t}.")),
)
_CAUSES = (  # (in the summary, as a sentence of its own)
    ("after a flood", "The water of the flood had risen for three days."),
    ("after a storm", "A storm had come over the hills in the evening."),
    ("after a long strike", "The workers had been on strike for many weeks."),
    ("after a rich gift", "A rich family had given the money for it."),
    ("after a vote", "Most of the people had voted for this."),
    ("after a heavy snowfall", "The snow had been falling since the weekend."),
    ("after an earthquake", "The ground had shaken twice before dawn."),
    ("after a loud quarrel", "A loud quarrel in the council had come first."),
    ("after a dry summer", "No rain had fallen during the whole summer."),
    ("after a court order", "A judge had signed the order last week."),
)
_VOICES = ('"We saw it coming," said {p}, a {j}.', '"I can hardly believe it," said {p}, the {j}.',
           "The {j} {p} spoke of a day to remember.", "{p}, who works there as a {j}, was not surprised.")
_JOBS = tuple("baker smith tailor fisher miller teacher carpenter doctor gardener shepherd".split())
_DETAILS = ("About {n} people came to look.", "It will cost {n} silver coins.",
            "The last time was {n} years ago.", "{n} helpers worked until midnight.",
            "Guests from {n} villages sent letters.")
_PLANS = ("The council will meet on {d}.", "More will be known on {d}.", "A speech is planned for {d}.",
          "The neighbours will help until {d}.")
_DAYS = tuple("Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split())


@dataclass(frozen=True)
class News:
    """`key` is the combination that is split: event, town, cause."""

    key: tuple[str, ...]
    article: str
    summary: str

    @property
    def prompt(self) -> str:
        return f"Article: {self.article}\nSummary:"


def news(rng: Rng) -> News:
    """Lead, cause and two to four further sentences; the summary joins event, town and cause."""
    town = rng.pick(TOWNS)
    clause, leads = rng.pick(_EVENTS)
    cause, sentence = rng.pick(_CAUSES)
    rest = [sentence, rng.pick(_VOICES).format(p=person(rng).name, j=rng.pick(_JOBS)),
            rng.pick(_DETAILS).format(n=rng.randrange(3, 90)), rng.pick(_PLANS).format(d=rng.pick(_DAYS))]
    rest = rng.sample(rest[1:], rng.randrange(1, 4)) + rest[:1]
    rng.shuffle(rest)
    summary = clause.format(t=town)
    return News((clause, town, cause), " ".join([rng.pick(leads).format(t=town), *rest]),
                f"{summary[0].upper()}{summary[1:]} {cause}.")

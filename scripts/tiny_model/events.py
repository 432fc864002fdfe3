"""An event of the tiny model's world: who did what with which thing, where and when; and sentences that tell it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tiny_model.words import (
    ADJECTIVES,
    DAYS,
    PEOPLE,
    PLACES,
    THINGS,
    VERBS,
    Person,
    Place,
    Verb,
    capitalised,
    with_article,
)

if TYPE_CHECKING:
    from random import Random


@dataclass(frozen=True, slots=True)
class Event:
    """Somebody did something with a thing, somewhere, on some day."""

    who: Person
    verb: Verb
    adjective: str
    thing: str
    place: Place
    day: str

    @property
    def what(self) -> str:
        """The thing with its adjective: "red kite"."""
        return f"{self.adjective} {self.thing}"

    @property
    def where(self) -> str:
        """The place with its preposition: "in the garden"."""
        return f"{self.place.preposition} the {self.place.noun}"


def random_event(rng: Random) -> Event:
    """An event with every part drawn at random."""
    return Event(
        rng.choice(PEOPLE),
        rng.choice(VERBS),
        rng.choice(ADJECTIVES),
        rng.choice(THINGS),
        rng.choice(PLACES),
        rng.choice(DAYS),
    )


TELLINGS = (
    "{who} {did} {a_what} {where} on {day}.",
    "On {day}, {who} {did} {a_what} {where}.",
    "On {day} {who} was {where} and {did} {a_what}.",
    "{where}, {who} {did} {a_what} on {day}.",
    "It was {day}, and {who} {did} {a_what} {where}.",
    "{who} was {where} on {day} and {did} {a_what}.",
)


def told(event: Event, rng: Random) -> str:
    """One sentence that names every part of the event, in one of several orders."""
    sentence = rng.choice(TELLINGS).format(
        who=event.who.name, did=event.verb.past, a_what=with_article(event.what), where=event.where, day=event.day
    )
    return capitalised(sentence)

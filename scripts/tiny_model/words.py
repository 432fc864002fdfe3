"""The words of the tiny model's world: people, animals, things, places, days, and what one can do with a thing."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Person:
    """A person's name and the pronouns that go with it."""

    name: str
    he: str
    his: str
    him: str


@dataclass(frozen=True, slots=True)
class Place:
    """A place: "the garden", and where something is when it is there: "in"."""

    preposition: str
    noun: str


@dataclass(frozen=True, slots=True)
class Verb:
    """What a person does with a thing: "find", "found"."""

    base: str
    past: str


def split(words: str) -> tuple[str, ...]:
    """The words of a string, for lists that are easier to read without quotes."""
    return tuple(words.split())


PEOPLE = tuple(
    Person(name, *pronouns)
    for names, pronouns in (
        ("Anna Mia Lucy Rose Emma Nina Kate Lily", ("she", "her", "her")),
        ("Tom Ben Max Sam Leo Jack Paul Otto", ("he", "his", "him")),
    )
    for name in split(names)
)

COLOURS = ("red", "blue", "green", "yellow", "white", "black")
QUALITIES = ("big", "small", "old", "new")
ADJECTIVES = COLOURS + QUALITIES

THINGS = split("ball kite book hat cup key drum bell lamp bag boat coin ring map cake rope basket stone flower letter")

ANIMALS = split("dog cat fox cow horse rabbit mouse duck owl bear bird pig")

PLACES = tuple(
    Place(preposition, noun)
    for preposition, nouns in (
        ("in", "garden kitchen forest barn park cellar"),
        ("at", "market school shop"),
        ("on", "hill beach road"),
        ("by", "river lake sea"),
        ("under", "tree"),
    )
    for noun in split(nouns)
)

DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")

VERBS = tuple(
    Verb(*pair.split("/"))
    for pair in split(
        "find/found lose/lost see/saw hide/hid drop/dropped paint/painted leave/left take/took want/wanted need/needed"
    )
)

OPPOSITES = (
    ("big", "small"), ("old", "new"), ("hot", "cold"), ("happy", "sad"), ("day", "night"), ("good", "bad"),
    ("fast", "slow"), ("open", "closed"), ("up", "down"), ("black", "white"), ("heavy", "light"), ("long", "short"),
)  # fmt: skip

COLOUR_FACTS = (
    ("snow", "white"), ("grass", "green"), ("the sky", "blue"), ("the night", "black"), ("the sun", "yellow"),
    ("milk", "white"), ("a leaf", "green"), ("the sea", "blue"),
)  # fmt: skip

ANIMAL_SOUNDS = (
    ("dog", "woof"), ("cat", "meow"), ("cow", "moo"), ("duck", "quack"), ("pig", "oink"),
    ("owl", "hoot"), ("horse", "neigh"),
)  # fmt: skip


def with_article(phrase: str) -> str:
    """The phrase behind "a" or "an", by its first letter.

    >>> with_article("red kite"), with_article("old hat")
    ('a red kite', 'an old hat')
    """
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


def capitalised(sentence: str) -> str:
    """The sentence with its first letter large, the rest as it stands."""
    return sentence[:1].upper() + sentence[1:]

"""Short stories: a plot is a list of moments, a moment a choice of sentences, and the slots keep the facts straight."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tiny_model.words import (
    ADJECTIVES,
    ANIMALS,
    COLOURS,
    DAYS,
    NUMBERS,
    PEOPLE,
    PLACES,
    THINGS,
    capitalised,
    with_article,
)

if TYPE_CHECKING:
    from collections.abc import Mapping
    from random import Random

Moment = tuple[str, ...]
Plot = tuple[Moment, ...]

OPENINGS: Moment = (
    "One day, {who} went to the {place}.",
    "Once there was a child named {who}. {He} lived near the {place}.",
    "It was {day}. {who} and {friend} were {at_place}.",
    "On {day}, {who} and {friend} went to the {place}.",
    "{who} loved the {place}. {He} went there every {day}.",
    "Early in the morning, {who} walked to the {place}.",
)

TOGETHER: Moment = (
    "It was {day}. {who} and {friend} were {at_place}.",
    "On {day}, {who} and {friend} went to the {place}.",
    "One day, {who} and {friend} walked to the {place}.",
)

ENDINGS: Moment = (
    "{who} was very happy.",
    "Then {who} and {friend} went home.",
    "It was a good day.",
    "{who} and {friend} smiled, and they were friends for a long time.",
    'At night {who} told {his} mother about the day. "I am proud of you," she said.',
    "And that was the end of the day.",
    "{who} was tired, and soon {he} was asleep.",
)

LOST_AND_FOUND: Plot = (
    OPENINGS,
    ("{who} had {a_thing}.", "{He} had {a_thing} with {him}.", "{who} liked {his} {thing} very much."),
    (
        "But then the {noun} was gone!",
        "But {he} lost the {noun}.",
        "When {he} looked for the {noun}, it was not there.",
    ),
    ("{who} was sad.", '"Where is my {noun}?" asked {who}.', "{who} began to cry.", "{He} looked here and there."),
    (
        "{friend} came to help.",
        '"I will help you," said {friend}.',
        '"Do not be sad," said {friend}. "We will find it."',
    ),
    (
        "They looked {at_other_place}.",
        "They looked under the chair and behind the door.",
        "They looked for a long time.",
    ),
    (
        "The {thing} was {at_other_place}!",
        "At last {friend} found the {thing} {at_other_place}.",
        "Then {a_animal} came with the {noun} in its mouth.",
    ),
    (
        '"Thank you, {friend}!" said {who}.',
        "{who} took the {noun} and laughed.",
        '"Here is your {noun}," said {friend}.',
    ),
    ENDINGS,
)

A_GIFT: Plot = (
    (
        "It was the birthday of {friend}.",
        "{friend} was {number} years old on {day}.",
        "{friend} was sick and had to stay in bed.",
    ),
    (
        "{who} wanted to give {friend_him} {a_thing}.",
        "{who} had a plan.",
        '"What can I give to {friend}?" asked {who}.',
    ),
    (
        "{He} went to the {place}.",
        "So {he} walked to the {place} with {his} father.",
        "{He} had {number} coins in {his} bag.",
    ),
    ("There {he} saw {a_thing}.", "An old man sold {him} {a_thing}.", "{He} found {a_thing} there."),
    ("{who} put the {noun} into a box.", '"This is for {friend}," said {who}.', "{He} ran home with the {noun}."),
    (
        '"{a_thing_first}! I love it!" said {friend}.',
        "{friend} opened the box and saw the {thing}.",
        "{friend} held the {noun} and smiled.",
    ),
    (
        '"You are a good friend," said {friend}.',
        '"Thank you, {who}," said {friend}.',
        "They played with the {noun} all day.",
    ),
    ENDINGS,
)

AN_ANIMAL: Plot = (
    OPENINGS,
    (
        "There {he} saw a {colour} {animal}.",
        "A {colour} {animal} sat {at_place}.",
        "{who} heard a sound. It was a little {animal}.",
    ),
    (
        "The {animal} was cold and hungry.",
        "The {animal} had lost its way.",
        "The {animal} was afraid of {him}.",
        "The {animal} was all alone.",
    ),
    (
        '"Do you want some bread?" asked {who}.',
        "{who} gave the {animal} some milk.",
        '"Come to me, little {animal}," said {who}.',
    ),
    ("The {animal} ate it all.", "The {animal} came near.", "The {animal} looked at {him} and came closer."),
    (
        "{who} took the {animal} home.",
        '"Can we keep the {animal}?" asked {who}.',
        "From that day on, the {animal} came every day.",
    ),
    (
        '"Yes, you can," said {his} mother.',
        "{who} made a bed for the {animal} in a basket.",
        "{friend} liked the {animal} too.",
    ),
    ("The {animal} was never hungry again.", "Now {who} had a new friend.", *ENDINGS),
)

MAKING: Plot = (
    (
        '"Let us make {a_noun}," said {who}.',
        "{who} wanted to make {a_noun}.",
        "On {day} it rained, and {who} had to stay at home.",
    ),
    ("{friend} came too.", '"I will help you," said {friend}.', "{He} asked {friend} for help."),
    ("First they looked for wood and paper.", "They sat at the big table.", "They took wood, paper and a long rope."),
    ("It was hard work.", "They worked all day.", "At first it did not go well.", "The first one broke."),
    ("{who} painted it {colour}.", "Then {friend} painted it {colour}.", '"It must be {colour}," said {who}.'),
    (
        "Now they had a fine {colour} {noun}.",
        "The {colour} {noun} was done.",
        '"Look, a {colour} {noun}!" said {friend}.',
    ),
    ("They showed it to {his} mother.", "They took it to the {place}.", "{who} put it {at_place}."),
    ENDINGS,
)

BAD_WEATHER: Plot = (
    TOGETHER,
    ("The sky was blue and the sun was warm.", "It was a warm day.", "They took bread, milk and a cake with them."),
    ("They played with {a_thing}.", "They sat in the grass and ate.", "They ran and jumped and laughed."),
    ("Then the sky was black.", "But soon the wind came.", "Then it began to rain."),
    ('"We must go home," said {friend}.', '"Run!" said {who}.', '"I am cold," said {who}.'),
    (
        "They ran to the {other_place}.",
        "They ran until they came to the {other_place}.",
        "They found a dry place {at_other_place}.",
    ),
    (
        "There they met {a_animal}. It was wet too.",
        "There they waited for a long time.",
        "{who} told a story, and {friend} was not afraid.",
    ),
    ("At last the sun came out.", "Then the rain stopped.", "After the rain they saw many colours in the sky."),
    ENDINGS,
)

SHARING: Plot = (
    ("{who} had {a_thing}.", "{who} got {a_thing} from {his} father.", "On {day}, {who} found {a_thing} {at_place}."),
    ("{friend} wanted it too.", '"Can I have the {noun}?" asked {friend}.', "{friend} had no {noun}."),
    ('"No, it is mine," said {who}.', '"No!" said {who}.', "{who} did not want to give it away."),
    ("{friend} was sad and went away.", "{friend} did not say a word.", "{friend} sat down and cried."),
    ("Then {who} was sad too.", "{who} played alone, but it was not fun.", "{who} thought about it for a long time."),
    (
        "So {he} went to {friend}.",
        "{He} looked for {friend} and found {friend_him} {at_other_place}.",
        "On the next day {he} went to {friend}.",
    ),
    ('"We can play with the {noun} together," said {who}.', '"I am sorry," said {who}. "You can have the {noun}."'),
    ("{friend} smiled.", '"Thank you!" said {friend}.', "Now they had fun."),
    ENDINGS,
)

BRAVE: Plot = (
    ("{who} was afraid of the dark.", "{who} did not like the night.", "There was a sound {at_place}."),
    ('"What is that?" asked {who}.', "One night {he} heard a sound.", "Something was {at_place}."),
    ("{He} wanted to run away.", "{He} held the hand of {friend}.", '"Do not be afraid," said {friend}.'),
    (
        "But {he} took a lamp and went to look.",
        "{who} was brave and opened the door.",
        "Slowly they went to the {place}.",
    ),
    (
        "It was only a little {animal}!",
        "A {colour} {animal} looked at them.",
        "There was no bear. There was only {a_animal}.",
    ),
    (
        "The {animal} wanted to play.",
        "The {animal} had found {a_thing}.",
        "The {animal} was more afraid than they were.",
    ),
    ("They laughed and laughed.", '"Hello, little {animal}," said {who}.', "{who} was not afraid any more."),
    ENDINGS,
)

ANIMALS_TALK: Plot = (
    ("Once {a_animal} met {a_other_animal} {at_place}.", "{a_animal_first} and {a_other_animal} lived {at_place}."),
    (
        '"What do you have there?" asked the {other_animal}.',
        "The {animal} had {a_thing}.",
        "The {animal} was very hungry.",
    ),
    ('"It is {a_thing}," said the {animal}.', '"I found {a_thing}," said the {animal}.'),
    (
        '"Can I see it?" asked the {other_animal}.',
        '"Give it to me!" said the {other_animal}.',
        '"What do you do with it?" asked the {other_animal}.',
    ),
    (
        "The {animal} thought about it.",
        '"No," said the {animal}, "it is mine."',
        '"Yes, my friend," said the {animal}.',
    ),
    ("Then {who} came by.", "But the {noun} fell into the water.", "Just then they heard {who}."),
    ('"That is my {noun}!" said {who}.', "{who} gave them some bread.", "{who} looked at the {noun} and laughed."),
    (
        "The {animal} and the {other_animal} ran away.",
        "From then on, the {animal} and the {other_animal} were friends.",
        "The {other_animal} went home alone.",
    ),
)

PLOTS = (LOST_AND_FOUND, A_GIFT, AN_ANIMAL, MAKING, BAD_WEATHER, SHARING, BRAVE, ANIMALS_TALK)


def random_facts(rng: Random) -> dict[str, str]:
    """What the slots of one story stand for; nobody is their own friend, and no place is its own other place."""
    who, friend = rng.sample(PEOPLE, 2)
    place, other_place = rng.sample(PLACES, 2)
    animal, other_animal = rng.sample(ANIMALS, 2)
    noun = rng.choice(THINGS)
    thing = f"{rng.choice(ADJECTIVES)} {noun}"
    return {
        "who": who.name,
        "he": who.he,
        "He": capitalised(who.he),
        "his": who.his,
        "him": who.him,
        "friend": friend.name,
        "friend_him": friend.him,
        "thing": thing,
        "a_thing": with_article(thing),
        "a_thing_first": capitalised(with_article(thing)),
        "noun": noun,
        "a_noun": with_article(noun),
        "place": place.noun,
        "at_place": f"{place.preposition} the {place.noun}",
        "other_place": other_place.noun,
        "at_other_place": f"{other_place.preposition} the {other_place.noun}",
        "animal": animal,
        "a_animal": with_article(animal),
        "a_animal_first": capitalised(with_article(animal)),
        "other_animal": other_animal,
        "a_other_animal": with_article(other_animal),
        "colour": rng.choice(COLOURS),
        "day": rng.choice(DAYS),
        "number": rng.choice(NUMBERS[2:]),
    }


def told_plot(plot: Plot, facts: Mapping[str, str], rng: Random) -> str:
    """The plot with one sentence of each moment, about these facts."""
    return " ".join(rng.choice(moment).format_map(facts) for moment in plot)


def random_story(rng: Random, facts: Mapping[str, str] | None = None) -> str:
    """A story of seven to nine moments, some 60 to 120 words; about these facts, or about random ones."""
    return told_plot(rng.choice(PLOTS), random_facts(rng) if facts is None else facts, rng)

"""Small conversations in messages format: greetings, common knowledge, copying, and questions about what was told.

They teach the model the chat format, and the two skills that every later task leans on: to copy a word from the
question, and to know which word of a sentence is the person, the thing, the place and the day.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tiny_model.events import Event, random_event, told
from tiny_model.stories import random_facts, random_story
from tiny_model.words import (
    ADJECTIVES,
    ANIMAL_SOUNDS,
    ANIMALS,
    COLOUR_FACTS,
    COLOURS,
    DAYS,
    NUMBERS,
    OPPOSITES,
    PEOPLE,
    PLACES,
    THINGS,
    capitalised,
    with_article,
)

if TYPE_CHECKING:
    from collections.abc import Sequence
    from random import Random

Messages = list[dict[str, str]]
Turn = tuple[str, str]

SYMBOLS = tuple("|:-+=*#/;()[]<>_&%@~0123456789abcdefghijklmnopqrstuvwxyz")
COPY_REQUESTS = ("Say this: {0}", "Copy this: {0}", "Repeat: {0}", "Write this again: {0}")
COMMENTS = (
    "{a_what}! That is nice.",
    "Oh, {a_what}! I like that.",
    "That is good. What did {who} do then?",
    "So {who} was {where}. Tell me more.",
    "I see. And what came next?",
    "{who} has a good story. Please tell me more.",
)


def as_messages(turns: Sequence[Turn], system: str | None = None) -> Messages:
    """The turns (what the user says, what the assistant answers) as messages, behind an optional system message."""
    messages = [{"role": "system", "content": system}] if system else []
    for question, answer in turns:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return messages


def greeting(rng: Random) -> Turn:
    """A hello, a thanks or a good bye."""
    name = rng.choice(PEOPLE).name
    return rng.choice(
        (
            ("Hello!", "Hello! How are you?"),
            ("Hi!", "Hi! What can I do for you?"),
            ("Good morning.", "Good morning! How are you today?"),
            ("How are you?", "I am fine, thank you. And you?"),
            (f"Hello, I am {name}.", f"Hello, {name}! It is nice to meet you."),
            (f"My name is {name}. What is my name?", f"Your name is {name}."),
            ("What is your name?", "My name is Tiny. I am a small model."),
            ("Who are you?", "I am Tiny. I am a small model, and I like short stories."),
            ("Thank you!", "You are welcome!"),
            (f"Thank you, and good bye. {name} is waiting for me.", f"Good bye! Say hello to {name}."),
            ("Good night.", "Good night! Sleep well."),
        )
    )


def common_knowledge(rng: Random) -> Turn:
    """A question with an answer that everybody in the tiny model's world knows."""
    first, second = rng.choice(OPPOSITES)[:: rng.choice((1, -1))]
    subject, colour = rng.choice(COLOUR_FACTS)
    animal, sound = rng.choice(ANIMAL_SOUNDS)
    day = rng.randrange(7)
    number = rng.randrange(1, 9)
    some_animals, some_colours = rng.sample(ANIMALS, 3), rng.sample(COLOURS, 3)
    return rng.choice(
        (
            (f"What is the opposite of {first}?", f"The opposite of {first} is {second}."),
            (f"What colour is {subject}?", f"{capitalised(subject)} is {colour}."),
            (f"What does the {animal} say?", f"The {animal} says {sound}."),
            (f"What day comes after {DAYS[day]}?", f"{DAYS[(day + 1) % 7]} comes after {DAYS[day]}."),
            (f"What day comes before {DAYS[day]}?", f"{DAYS[(day - 1) % 7]} comes before {DAYS[day]}."),
            (
                f"What number comes after {NUMBERS[number]}?",
                f"{capitalised(NUMBERS[number + 1])} comes after {NUMBERS[number]}.",
            ),
            ("Name three animals.", capitalised("{}, {} and {}.".format(*map(with_article, some_animals)))),
            ("Name three colours.", "{}, {} and {}.".format(capitalised(some_colours[0]), *some_colours[1:])),
        )
    )


def copying(rng: Random) -> Turn:
    """A few words or signs that are to be said again, without any other reason to come next."""
    words = (
        *THINGS,
        *ADJECTIVES,
        *ANIMALS,
        *DAYS,
        *(place.noun for place in PLACES),
        *(person.name for person in PEOPLE),
    )
    pool = words if rng.random() < 0.8 else SYMBOLS
    text = " ".join(rng.choice(pool) for _ in range(rng.randint(2, 12)))
    if rng.random() < 0.3:
        text = told(random_event(rng), rng)
    return rng.choice(COPY_REQUESTS).format(text), text


def question_about(event: Event, rng: Random) -> Turn:
    """A question about one part of the event, and its answer, short or in a whole sentence."""
    who, did, do = event.who.name, event.verb.past, event.verb.base
    thing, where, day = event.thing, event.where, event.day
    he = capitalised(event.who.he)
    question, short, long = rng.choice(
        (
            (f"Who {did} the {thing}?", f"{who}.", f"{who} {did} it."),
            (f"Who was {where}?", f"{who}.", f"{who} was {where}."),
            (
                f"What did {who} {do}?",
                f"{capitalised(with_article(event.what))}.",
                f"{he} {did} {with_article(event.what)}.",
            ),
            (f"Where did {who} {do} the {thing}?", f"{capitalised(where)}.", f"{he} {did} it {where}."),
            (f"Where was {who}?", f"{capitalised(where)}.", f"{he} was {where}."),
            (f"When did {who} {do} the {thing}?", f"On {day}.", f"{he} {did} it on {day}."),
            (f"When was {who} {where}?", f"On {day}.", f"It was on {day}."),
            (f"What was {event.adjective}?", f"The {thing}.", f"The {thing} was {event.adjective}."),
            (f"How was the {thing}?", f"{capitalised(event.adjective)}.", f"The {thing} was {event.adjective}."),
        )
    )
    return question, rng.choice((short, long))


def told_and_asked(rng: Random) -> list[Turn]:
    """One or two events are told; then one to three questions about one of them."""
    event = random_event(rng)
    others = [random_event(rng)] if rng.random() < 0.3 else []
    others = [
        other
        for other in others
        if {other.who, other.thing, other.place}.isdisjoint((event.who, event.thing, event.place))
    ]
    sentences = [told(each, rng) for each in (event, *others)]
    rng.shuffle(sentences)
    first, *rest = [question_about(event, rng) for _ in range(rng.randint(1, 3))]
    return [(" ".join([*sentences, first[0]]), first[1]), *rest]


def told_only(rng: Random) -> Turn:
    """An event is told and nothing asked: the model makes a friendly remark."""
    event = random_event(rng)
    remark = rng.choice(COMMENTS).format(a_what=with_article(event.what), who=event.who.name, where=event.where)
    return told(event, rng), capitalised(remark)


def asked_for_a_story(rng: Random) -> Turn:
    """A request for a story; the story is about the person that the request names."""
    facts = random_facts(rng)
    story = random_story(rng, facts)
    return rng.choice(("Tell me a story about {who}.", "Please tell a story. It must be about {who}.")).format_map(
        facts
    ), story


def random_chat(rng: Random) -> Messages:
    """A conversation of one to four turns."""
    kind = rng.choices(("asked", "told", "copying", "small talk", "story"), (42, 8, 30, 14, 6))[0]
    if kind == "asked":
        return as_messages(told_and_asked(rng))
    if kind == "told":
        return as_messages([told_only(rng)])
    if kind == "copying":
        return as_messages([copying(rng) for _ in range(rng.randint(1, 3))])
    if kind == "story":
        return as_messages([asked_for_a_story(rng)], system=rng.choice((None, "You tell short stories.")))
    turns = [greeting(rng)] if rng.random() < 0.5 else []
    turns += [common_knowledge(rng) for _ in range(rng.randint(0 if turns else 1, 3))]
    return as_messages(turns, system=rng.choice((None, None, "You are Tiny, a friendly small model.")))

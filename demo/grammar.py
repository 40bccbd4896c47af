"""A seeded generator of small children's stories: the text the demo model is trained, calibrated and judged on.

Every word, name and rule here was written for llmprune; nothing is taken from another corpus, so the text and the
model trained on it carry the project's own licence.

The stories are made so that a language model has something to hold on to from beginning to end: a character's
pronouns follow from the name, a lost thing is described by the colour it had when it was lost, counts add up, what
was packed is unpacked in the same order, and whoever gave a thing is thanked for it. A model that lost the capacity
for this says so at once, in its perplexity and to the eye.

The text of a seed is the same on every Python version: the only source of chance is ``random.Random.random``, whose
sequence Python guarantees for an integer seed, and story number ``i`` depends on ``(seed, i)`` alone.

    python demo/grammar.py --seed 0 --stories 1000 > stories.txt
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Iterator, Sequence
from typing import TypeVar

from plots import SKELETONS
from words import (
    ASIDES,
    BOYS,
    GIRLS,
    HOMES,
    KINDS,
    NUMBERS,
    SIGHTS,
    SKIES,
    THINGS,
    TIMES,
    TRAITS,
    Thing,
    Who,
    a,
    cap,
)

T = TypeVar("T")


class Teller:
    """Chance, and the turns of phrase that every kind of story shares."""

    def __init__(self, rng: random.Random) -> None:
        self._next = rng.random

    # chance -------------------------------------------------------------------------------------------------------
    def number(self, low: int, high: int) -> int:
        """An integer in [low, high]."""
        return low + int(self._next() * (high - low + 1))

    def pick(self, items: Sequence[T]) -> T:
        return items[int(self._next() * len(items))]

    def any(self, *items: str) -> str:
        return self.pick(items)

    def maybe(self, text: str, chance: float = 0.5) -> str:
        return text if self._next() < chance else ""

    def some(self, items: Sequence[T], n: int) -> list[T]:
        """``n`` different items in a random order."""
        rest = list(items)
        return [rest.pop(int(self._next() * len(rest))) for _ in range(n)]

    # people and things --------------------------------------------------------------------------------------------
    def cast(self, n: int) -> list[Who]:
        """``n`` characters with different names and kinds; children in some stories, animals in the others."""
        animals = self._next() < 0.5
        girls, boys, kinds = self.some(GIRLS, n), self.some(BOYS, n), self.some(KINDS, n)
        people = []
        for i in range(n):
            female = self._next() < 0.5
            role = kinds[i] if animals else ("girl" if female else "boy")
            people.append(Who(girls[i] if female else boys[i], role, female))
        return people

    def thing(self) -> Thing:
        return self.pick(THINGS)

    def meet(self, who: Who) -> str:
        """The opening: who it is about and where that one lives. Returns one or two sentences."""
        trait, role, home = self.pick(TRAITS), who.role, self.pick(HOMES)
        opening = self.any(
            f"Once there was {a(trait)} {role} named {who.name}.",
            f"{who.name} was {a(trait)} {role}.",
            f"There was once {a(trait)} {role}, and {who.his} name was {who.name}.",
            f"{who.name} was {a(trait)} {role} who lived {home}.",
            f"{cap(home)} lived {a(trait)} {role} named {who.name}.",
            f"Far away, {home}, there lived {a(trait)} {role} called {who.name}.",
        )
        return opening

    def day(self) -> str:
        """An adverbial of time that opens a sentence, without its comma."""
        return self.any(
            f"one {self.pick(SKIES)} {self.pick(TIMES)}",
            f"one {self.pick(TIMES)}",
            "one day",
            f"on {a(self.pick(SKIES))} day",
            f"early one {self.pick(SKIES)} morning",
            f"when the {self.any('sun', 'wind', 'moon')} was {self.any('high', 'low')}",
        )

    def tag(self, who: Who, first: str = "said", *others: str) -> str:
        """``Name said``, with an adverb now and then."""
        verb = self.any(first, *others)
        adverb = self.any(
            "", "", "", " softly", " kindly", " quietly", " at once", " after a while", " with a smile"
        )
        return f"{who.name} {verb}{adverb if verb == 'said' else ''}"

    def known(self, hero: Who, friend: Who) -> str:
        """``friend`` as introduced by name: "Nico the fox", or "his friend Nico" among children."""
        return (
            f"{friend.name} the {friend.role}" if friend.role in KINDS else f"{hero.his} friend {friend.name}"
        )

    def aside(self, chance: float = 0.35) -> str:
        """A sentence of scenery that has nothing to do with the story, or nothing."""
        if self._next() >= chance:
            return ""
        if self._next() < 0.5:
            who, does, where = (self.pick(words) for words in ASIDES)
            return f"{cap(who)} {does} {where}."
        return cap(self.pick(SIGHTS).replace("{n}", NUMBERS[self.number(2, 9)]))

    def feel(self, who: Who) -> str:
        return self.any(
            f"{who.name} was very happy.",
            f"{who.name} smiled all the way home.",
            f"That made {who.name} glad.",
            f"{who.name} felt warm inside.",
            f"{who.name} could not stop smiling.",
        )

    def ending(self, who: Who, other: Who) -> str:
        return self.any(
            f"From that day on, {who.name} and {other.name} were good friends.",
            f"{who.name} and {other.name} walked home together.",
            f"That night {who.name} slept well and dreamed of {other.name}.",
            f"And so {who.name} and {other.name} sat together until the stars came out.",
            f"{who.name} never forgot what {other.name} had done.",
            f"{cap(self.any('since then', 'ever since'))}, {who.name} and {other.name} have been friends.",
        )


def story(seed: int, index: int) -> str:
    """Story number ``index`` (>= 0) of ``seed`` (>= 0): one line of text, about 90 to 190 words, no line break."""
    teller = Teller(random.Random((seed << 40) + index))
    return " ".join(line for line in teller.pick(SKELETONS)(teller) if line)


def stories(seed: int, first: int = 0) -> Iterator[str]:
    """The endless sequence of the stories of ``seed``, from number ``first`` on."""
    index = first
    while True:
        yield story(seed, index)
        index += 1


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Write stories to standard output, one a line, empty line between."
    )
    parser.add_argument("--seed", type=int, default=0, help="which sequence of stories (default 0)")
    parser.add_argument("--stories", type=int, default=1000, help="how many (default 1000)")
    options = parser.parse_args(argv)
    if options.seed < 0 or options.stories < 0:
        parser.error("--seed and --stories must not be negative")
    source = stories(options.seed)
    for _ in range(options.stories):
        sys.stdout.write(next(source) + "\n\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

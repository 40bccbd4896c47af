"""The words of the demo's stories, and the small grammar that belongs to a word: pronouns, number, article."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

GIRLS = (
    "Mina",
    "Oda",
    "Tilda",
    "Runa",
    "Pia",
    "Nell",
    "Wren",
    "Isla",
    "Hetty",
    "Zora",
    "Lena",
    "Ada",
    "Flora",
    "Greta",
    "Juno",
    "Kira",
    "Marla",
    "Nora",
    "Petra",
    "Suri",
)
BOYS = (
    "Tavi",
    "Odin",
    "Bruno",
    "Emil",
    "Hugo",
    "Ivo",
    "Jory",
    "Kasper",
    "Luca",
    "Milo",
    "Nico",
    "Otto",
    "Pax",
    "Rufus",
    "Silas",
    "Theo",
    "Ugo",
    "Viggo",
    "Wim",
    "Yuri",
)
KINDS = (
    "fox",
    "rabbit",
    "hedgehog",
    "bear",
    "mouse",
    "owl",
    "otter",
    "badger",
    "frog",
    "squirrel",
    "duck",
    "goat",
)
TRAITS = ("kind", "brave", "shy", "clever", "cheerful", "curious", "gentle", "patient", "lively", "careful")
COLOURS = (
    "red",
    "blue",
    "green",
    "yellow",
    "purple",
    "orange",
    "white",
    "black",
    "silver",
    "golden",
    "pink",
    "brown",
)
NUMBERS = (
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
)
TIMES = ("morning", "afternoon", "evening")
SKIES = ("sunny", "windy", "quiet", "warm", "cool", "bright", "grey")
HOMES = (
    "in a small house by the sea",
    "in a cottage at the edge of the forest",
    "in a tall house in the village",
    "in an old mill by the river",
    "on a farm behind the hills",
    "in a tiny house under an oak tree",
    "in a round house near the lake",
    "at the end of a long lane",
)
HELPERS = ("baker", "farmer", "teacher", "fisherman", "shepherd", "gardener", "carpenter", "miller")


@dataclass(frozen=True)
class Who:
    """A character: a name and the words that must agree with it. ``role`` is a noun ("fox", "boy", "aunt")."""

    name: str
    role: str
    female: bool

    @property
    def he(self) -> str:
        return "she" if self.female else "he"

    @property
    def him(self) -> str:
        return "her" if self.female else "him"

    @property
    def his(self) -> str:
        return "her" if self.female else "his"


@dataclass(frozen=True)
class Thing:
    """An object, what it is made of, and whether its noun is a plural ("boots": them, were, are)."""

    noun: str
    material: str
    plural: bool = False

    @property
    def breaks(self) -> bool:
        """Whether it goes to pieces when it falls."""
        return self.material in ("wood", "clay", "paper")

    @property
    def paint(self) -> str:
        """What colours it."""
        return "paint" if self.breaks or self.material == "straw" else "dye"

    @property
    def it(self) -> str:
        return "them" if self.plural else "it"

    @property
    def they(self) -> str:
        return "they" if self.plural else "it"

    @property
    def was(self) -> str:
        return "were" if self.plural else "was"

    @property
    def is_(self) -> str:
        return "are" if self.plural else "is"


@dataclass(frozen=True)
class Place:
    """A place: how one is there, how one goes there, and a spot in it where a thing can be found."""

    at: str
    to: str
    spots: tuple[str, ...]


RELATIVES = (
    Who("grandmother", "grandmother", True),
    Who("grandfather", "grandfather", False),
    Who("aunt", "aunt", True),
    Who("uncle", "uncle", False),
    Who("mother", "mother", True),
    Who("father", "father", False),
)
THINGS = tuple(
    Thing(noun, material, plural)
    for material, plural, nouns in (
        ("wood", False, "drum boat whistle box spoon wagon flute sledge"),
        ("paper", False, "kite lantern book mask"),
        ("clay", False, "cup bell jug plate"),
        ("wool", False, "scarf blanket coat cushion"),
        ("straw", False, "hat basket"),
        ("silk", False, "ribbon flag"),
        ("leather", False, "ball belt"),
        ("wool", True, "mittens socks slippers"),
        ("leather", True, "boots gloves"),
        ("clay", True, "beads"),
    )
    for noun in nouns.split()
)
MARKS = (
    "with a star on the side",
    "with a tiny bird on the front",
    "with three little dots",
    "with a shiny edge",
    "with a leaf on the back",
    "with a crooked line in the middle",
)
PLACES = (
    Place("in the garden", "to the garden", ("under the roses", "behind the shed", "beside the pump")),
    Place("by the river", "to the river", ("under the bridge", "between two stones", "in the tall reeds")),
    Place("in the forest", "to the forest", ("under a fern", "behind a fallen log", "on a mossy stump")),
    Place(
        "at the market",
        "to the market",
        ("under a table of apples", "behind the flower cart", "by the fountain"),
    ),
    Place(
        "on the hill", "up the hill", ("beside the old wall", "under the lonely pine", "in a patch of clover")
    ),
    Place("at the beach", "to the beach", ("behind a dune", "in a pool of water", "under a pile of seaweed")),
    Place("in the barn", "to the barn", ("in the hay", "behind the milk cans", "on top of the ladder")),
    Place("in the meadow", "to the meadow", ("among the daisies", "next to a mole hill", "beside the gate")),
)
GATHERED = (  # what is counted: singular, plural, where it is gathered
    ("shell", "shells", "at the beach"),
    ("apple", "apples", "in the orchard"),
    ("pebble", "pebbles", "by the river"),
    ("nut", "nuts", "in the forest"),
    ("egg", "eggs", "in the barn"),
    ("flower", "flowers", "in the meadow"),
    ("feather", "feathers", "on the hill"),
    ("pear", "pears", "in the garden"),
)
WEATHER = (  # what comes, what one cries, the sign of it, what is left when it is over
    ("rain", "Rain", "big drops began to fall", "a rainbow stood over the hills"),
    ("snow", "Snow", "white flakes began to dance in the air", "the whole world was white and silent"),
    ("storm", "A storm", "thunder rolled behind the hills", "the air smelled fresh and clean"),
    ("hail", "Hail", "small balls of ice bounced on the path", "the grass glittered like glass"),
    ("fog", "Fog", "a grey mist crept over the path", "the sun came out and warmed the stones"),
)
SHELTERS = (
    "a hollow tree",
    "a little cave",
    "an empty barn",
    "a wooden hut",
    "an old boat turned upside down",
    "a stone bridge",
)
DISHES = (  # dish, what it is cut or poured into, its three ingredients
    ("soup", "bowls", ("carrots", "onions", "potatoes")),
    ("apple pie", "slices", ("apples", "eggs", "walnuts")),
    ("pancakes", "plates", ("eggs", "bananas", "lemons")),
    ("plum cake", "pieces", ("plums", "eggs", "almonds")),
    ("stew", "bowls", ("turnips", "beans", "mushrooms")),
    ("jam", "jars", ("berries", "figs", "lemons")),
)
VEHICLES = ("train", "bus", "sailing boat", "cart", "ferry")
NOISES = ("a soft scratching", "a loud bump", "a long squeak", "a gentle tapping", "a deep humming")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
FEARS = ("the dark", "thunder", "strange noises", "ghosts", "big dogs", "being alone")
ASIDES = (  # who is seen on the way, what it does, where
    ("a robin", "a bee", "a blackbird", "a grey cat", "a butterfly", "an old crow", "a lamb", "a wagtail"),
    ("sang", "hummed", "sat", "waited", "hopped about", "rested", "looked for food", "stretched"),
    ("in the grass", "on a fence", "on the path", "under a bush", "near the well", "on a warm stone"),
)
SIGHTS = (
    "The clouds looked like sheep.",
    "The leaves rustled in the wind.",
    "The air smelled of hay.",
    "Somewhere a dog barked.",
    "It was very still.",
    "The church clock struck {n}.",
    "The shadows were long.",
    "{n} swallows flew by.",
)


def a(phrase: str) -> str:
    """``phrase`` with its indefinite article, by the vowel it begins with."""
    return f"{'an' if phrase[0].lower() in 'aeiou' else 'a'} {phrase}"


def cap(sentence: str) -> str:
    """``sentence`` with a capital first letter, the rest untouched."""
    return sentence[0].upper() + sentence[1:]


def joined(items: Sequence[str]) -> str:
    """``items`` as an English list: "x", "x and y", "x, y and z"."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


def count(n: int, singular: str, plural: str) -> str:
    """``n`` in words with the noun in the right number."""
    return f"{NUMBERS[n]} {singular if n == 1 else plural}"

"""The plots of the demo's stories: each takes a teller and returns the lines of one story, "" for an omitted one.

In every plot something said early decides a word said late: a colour, a number, a name, an order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from words import (
    COLOURS,
    DAYS,
    DISHES,
    FEARS,
    GATHERED,
    HELPERS,
    KINDS,
    MARKS,
    NOISES,
    NUMBERS,
    PLACES,
    RELATIVES,
    SHELTERS,
    THINGS,
    VEHICLES,
    WEATHER,
    a,
    cap,
    count,
    joined,
)

if TYPE_CHECKING:
    from grammar import Teller


def lost_and_found(t: Teller) -> list[str]:
    hero, friend = t.cast(2)
    giver, thing, colour, mark = t.pick(RELATIVES), t.thing(), t.pick(COLOURS), t.pick(MARKS)
    place, wrong = t.some(PLACES, 2)
    spot, empty = t.pick(place.spots), t.pick(wrong.spots)
    marked = not thing.plural and t.number(0, 1) == 1
    full = f"{colour} {thing.noun}{' ' + mark if marked else ''}"
    had = full if thing.plural else a(full)
    look = f"{cap(thing.they)} {thing.is_} {colour}{' ' + mark if marked else ''}"
    lines = [
        t.meet(hero),
        t.any(
            f"{cap(hero.he)} had {had}, a present from {hero.his} {giver.role}.",
            f"{cap(hero.his)} {giver.role} had given {hero.him} {had}, and {hero.he} loved {thing.it} very much.",
            f"Of all {hero.his} things, {hero.he} liked {hero.his} {full} best, because {hero.his} "
            f"{giver.role} had made {thing.it}.",
        ),
        t.any(
            f"{cap(t.day())}, {hero.name} went {place.to} to play, and when {hero.he} came home the {thing.noun} "
            f"{thing.was} gone.",
            f"{cap(t.day())}, {hero.name} played {place.at} for a long time, and {hero.he} lost the {thing.noun}.",
        ),
        t.aside(),
        t.any(
            f'"Oh no!" cried {hero.name}. "Where {thing.is_} my {thing.noun}?"',
            f'"I cannot find my {thing.noun}!" {hero.name} said, and {hero.he} began to cry.',
            f"{hero.name} was so sad that {hero.he} could not eat.",
        ),
        t.any(
            f"First {hero.he} looked {wrong.at}, {empty}, but there was nothing there.",
            f"{cap(hero.he)} went {wrong.to} and searched {empty}, but {hero.he} found only "
            f"{t.any('dust', 'a snail', 'an old leaf', 'a sleepy beetle')}.",
        ),
        t.any(
            f"Then {hero.he} met {t.known(hero, friend)}.",
            f"On the way back {hero.he} saw {hero.his} friend {friend.name}.",
        ),
        t.any(
            f'"What {"do they" if thing.plural else "does it"} look like?" asked {friend.name}. '
            f'"{look}," {t.tag(hero)}.',
            f'"Why are you sad?" asked {friend.name}. "I lost my {thing.noun}," {t.tag(hero)}. "{look}."',
        ),
        t.any(
            f"{friend.name} thought for a moment, and then {friend.he} ran {place.to}.",
            f'"Come with me," {t.tag(friend)}, and they went {place.to} together.',
        ),
        t.any(
            f"There, {spot}, {thing.was} the {full}!",
            f"{friend.name} looked {spot}, and there {friend.he} saw something {colour}: the {thing.noun}!",
        ),
        t.any(
            f'"You found my {colour} {thing.noun}! Thank you, {friend.name}!" {t.tag(hero, "said", "cried")}.',
            f'"Here {thing.is_} your {thing.noun}," {t.tag(friend)}. {hero.name} hugged {friend.him}.',
        ),
        t.any(
            f"{cap(hero.his)} {giver.role} was glad to see the {colour} {thing.noun} again.",
            f"{hero.name} never left the {colour} {thing.noun} {place.at} again.",
            t.ending(hero, friend),
        ),
    ]
    return lines


def the_gift(t: Teller) -> list[str]:
    hero, friend = t.cast(2)
    colour, other = t.some(COLOURS, 2)
    thing, helper = t.thing(), t.pick(HELPERS)
    coins = t.number(2, 9)
    buys = t.number(0, 1) == 1
    how = (
        [
            f"{hero.name} had {NUMBERS[coins]} coins in {hero.his} pocket and went to the {helper}.",
            f'"How much {thing.is_} the {thing.noun}?" {hero.he} asked. '
            f'"The {other} {"ones cost" if thing.plural else "one costs"} more, but the {colour} '
            f'{"ones cost" if thing.plural else "one costs"} {NUMBERS[coins]} coins," said the {helper}.',
            f"So {hero.name} paid all {NUMBERS[coins]} coins and carried the {colour} {thing.noun} home.",
        ]
        if buys
        else [
            f"{hero.name} had no money, so {hero.he} asked the {helper} for help.",
            f"The {helper} gave {hero.him} some {thing.material} and a pot of {colour} {thing.paint}. "
            f'"Be patient," said the {helper}.',
            f"{t.any('All day', 'For two days', 'All week')} {hero.name} worked with the {thing.material}, and at last "
            f"the {colour} {thing.noun} {thing.was} ready.",
        ]
    )
    return [
        t.meet(hero),
        t.any(
            f"{cap(hero.his)} best friend was {a(friend.role)} named {friend.name}, and tomorrow was "
            f"{friend.name}'s birthday.",
            f"{cap(hero.he)} wanted to give {hero.his} friend {friend.name} something for {friend.his} birthday.",
        ),
        t.any(
            f"{hero.name} knew that {friend.name} loved everything that was {colour}.",
            f'"{friend.name} likes {colour} things, not {other} ones," thought {hero.name}.',
            f"{friend.name} had always wished for {colour if thing.plural else a(colour)} {thing.noun}.",
        ),
        *how,
        t.any(
            f"The next day {hero.he} put {thing.it} in a box and walked to {friend.name}'s house.",
            f"Then {hero.he} hid {thing.it} in a box, and {hero.he} could hardly wait for the birthday.",
            f"In the morning {hero.name} knocked on {friend.name}'s door.",
        ),
        t.any(
            f'"Happy birthday, {friend.name}!" {t.tag(hero)}.',
            f'"This is for you," {t.tag(hero)}.',
        ),
        t.any(
            f"{friend.name} opened the box and saw the {colour} {thing.noun}.",
            f"When {friend.name} looked inside, {friend.his} eyes grew big.",
        ),
        t.any(
            f'"{cap(colour)} is my favourite colour!" {t.tag(friend, "said", "cried")}. "Thank you, {hero.name}!"',
            f'"Did you {"buy" if buys else "make"} {thing.it} for me?" asked {friend.name}. "Yes," {t.tag(hero)}, '
            f'"{"with my own coins" if buys else "with my own hands"}."',
        ),
        t.any(t.feel(hero), t.ending(friend, hero), t.feel(friend)),
    ]


def the_race(t: Teller) -> list[str]:
    first, second, third = t.cast(3)
    place, colour, prize = t.pick(PLACES), t.pick(COLOURS), t.pick([x for x in THINGS if not x.plural])
    vain = t.number(0, 1) == 1
    trouble = t.any("tripped over a root", "lost a shoe", "fell into a puddle", "took the wrong path")
    names = joined([first.name, second.name, third.name])
    stops = (
        [
            f"Then {second.name} {trouble}.",
            f'{first.name} laughed and ran on, but {third.name} stopped. "Are you hurt?" asked {third.name}. '
            f'"Only a little," said {second.name}. "Run, {third.name}, run!"',
            f"{first.name} was so sure of winning that {first.he} sat down {t.pick(place.spots)} and fell asleep.",
        ]
        if vain
        else [
            f"Then {first.name} {trouble}, and {second.name} ran past {first.him}.",
            f"{third.name} was slow, but {third.he} did not give up.",
            f"{second.name} saw a butterfly, forgot about the race and followed it, and only {third.name} kept "
            f"running.",
        ]
    )
    return [
        t.any(
            f"{names} were three friends.",
            f"There were once three friends named {names}.",
            f"Everyone in the village knew the three friends {names}.",
        ),
        t.any(
            f"{cap(t.day())}, they met {place.at} to run a race.",
            f'"Let us run a race," {t.tag(first)} {t.any("one day", "one morning")}, and they all went {place.to}.',
        ),
        f"The prize was {a(colour)} {prize.noun}{t.maybe(' ' + t.pick(MARKS), 0.3)}.",
        t.aside(),
        t.any(
            f'"One, two, three, go!" called the {t.pick(HELPERS)}.',
            f"The {t.pick(HELPERS)} rang a bell, and off they went.",
        ),
        f"{first.name} was the fastest. {second.name} came next, and {third.name} was last.",
        *stops,
        t.any(
            f"In the end it was {third.name} who won the race.",
            f"So {third.name}, who had been last, came in first.",
        ),
        f"The judge gave {third.him} the {colour} {prize.noun}.",
        t.any(
            f'"I am sorry that I laughed," {t.tag(first)}. "You are not only fast, {third.name}, you are kind."'
            if vain
            else f'"You never gave up, {third.name}," {t.tag(second)}.',
            f"{second.name} and {first.name} clapped their hands for {third.him}.",
        ),
        t.any(
            f"{third.name} let {second.name} and {first.name} play with the {prize.noun} too.",
            f"To this day the {colour} {prize.noun} stands {t.any('on the shelf', 'by the window')} in "
            f"{third.name}'s house.",
        ),
    ]


def weather_and_shelter(t: Teller) -> list[str]:
    hero, friend = t.cast(2)
    (what, cry, sign, after), shelter, thing = (
        t.pick(WEATHER),
        t.pick(SHELTERS),
        t.pick([x for x in THINGS if not x.plural and x.noun not in ("blanket", "coat", "scarf")]),
    )
    target, colour, relative = t.pick(PLACES), t.pick(COLOURS), t.pick(RELATIVES)
    cover = t.any("cape", "coat", "scarf", "shawl")
    food = t.any("bread", "cheese", "cake", "honey", "nuts")
    it = "under it" if shelter in ("a stone bridge", "an old boat turned upside down") else "inside"
    return [
        t.meet(hero),
        t.any(
            f"{cap(t.day())}, {hero.he} had to take {a(thing.noun)} to {hero.his} {relative.role}, who was "
            f"waiting {target.at}.",
            f"{cap(t.day())}, {hero.name} walked {target.to} with {a(thing.noun)} for {hero.his} {relative.role}.",
        ),
        t.any(
            f"{cap(hero.he)} wore {a(colour)} {cover} and carried some {food}.",
            f'"Take your {colour} {cover} and some {food}," {hero.his} {t.any("neighbour", "teacher")} had told '
            f"{hero.him}.",
        ),
        t.aside(),
        t.any(
            f"On the way the sky turned dark, and {sign}.",
            f"{cap(hero.he)} was halfway there when {sign}.",
        ),
        t.any(f'"{cry}!" cried {hero.name}. "I must find shelter!"', f"{hero.name} began to run."),
        t.any(
            f"Soon {hero.he} saw {shelter} and crept {it}.",
            f"Beside the path there was {shelter}, and {hero.he} hid {it}.",
        ),
        t.any(
            f"Somebody was there already: {a(friend.role)} named {friend.name}, cold and hungry.",
            f"There sat {a(friend.role)} who was shaking with cold. {cap(friend.his)} name was {friend.name}.",
        ),
        t.any(
            f'"You may have half of my {cover}," {t.tag(hero)}, and {hero.he} put the {colour} {cover} around '
            f"them both.",
            f'{hero.name} put {hero.his} {colour} {cover} around {friend.name}. "Is that better?" {hero.he} asked.',
        ),
        t.any(
            f"They shared the {food} and told each other stories.",
            f"{friend.name} ate some of the {food} and stopped shaking.",
        ),
        f"When the {what} was over, {after}.",
        t.any(
            f"Together they took the {thing.noun} {target.to}, where {hero.name}'s {relative.role} was waiting.",
            f'"Now I must bring this {thing.noun} to my {relative.role}," {t.tag(hero)}. "I will go with you," '
            f"{t.tag(friend)}.",
        ),
        t.any(
            f"{cap(hero.his)} {relative.role} thanked {hero.him} for the {thing.noun} and gave {friend.name} "
            f"{a(colour)} {cover} as well.",
            t.ending(hero, friend),
        ),
    ]


def small_lesson(t: Teller) -> list[str]:
    hero, friend = t.cast(2)
    relative, colour, place = t.pick(RELATIVES), t.pick(COLOURS), t.pick(PLACES)
    shares = t.number(0, 1) == 1
    thing = t.pick([x for x in THINGS if not x.plural and (shares or x.breaks)])
    if shares:
        body = [
            f"{cap(hero.he)} had {a(colour)} {thing.noun}, and {hero.he} never let anyone touch it.",
            f'{cap(t.day())}, {t.known(hero, friend)} came by. "May I play with your {thing.noun}?" '
            f"{friend.he} asked.",
            t.any(
                f'"No, it is mine!" {t.tag(hero, "said", "shouted")}, and {friend.name} went away.',
                f'"No," {t.tag(hero)}. "You may only look at it." {friend.name} went away with {friend.his} head down.',
            ),
            f"{hero.name} played alone with the {colour} {thing.noun} {place.at}, but soon {hero.he} was bored.",
            f'"What is wrong?" asked {hero.his} {relative.role}. "It is no fun alone," {t.tag(hero)}.',
            f'"{t.any("A thing you share is twice as good", "Joy grows when you share it")}," said {hero.his} '
            f"{relative.role}.",
            f'So {hero.he} ran to {friend.name}. "I am sorry," {hero.he} said. "Please play with me."',
            f"They played with the {colour} {thing.noun} until {t.any('dinner', 'it was dark', 'the sun went down')}.",
            f"{hero.name} had learned to share.",
        ]
    else:
        body = [
            f"{cap(t.day())}, {hero.he} was playing {t.any('in the kitchen', 'in the hall')} and broke "
            f"{hero.his} {relative.role}'s {colour} {thing.noun}.",
            t.any(
                f"{hero.name} was afraid, so {hero.he} hid the pieces {t.any('under the bed', 'behind the door')}.",
                f"Quickly {hero.he} put the pieces {t.any('in a drawer', 'under the rug')} and said nothing.",
            ),
            f'"Have you seen my {thing.noun}?" asked {hero.his} {relative.role}. '
            f'"{t.any("No", "I have not", "Maybe " + friend.name + " took it")}," said {hero.name}.',
            f"That night {hero.he} could not sleep, because {hero.he} had not told the truth.",
            f'{cap(hero.his)} friend {friend.name} said, "{t.any("Tell the truth", "Be honest")}. '
            f'You will feel better."',
            f'In the morning {hero.name} went to {hero.his} {relative.role}. "I broke your {colour} {thing.noun}," '
            f'{hero.he} said. "I am sorry."',
            f'"Thank you for telling me," said {hero.his} {relative.role}. {cap(relative.he)} was not angry at all.',
            f"Together they mended the {colour} {thing.noun} with {t.any('glue', 'string', 'a little paint')}.",
            f"{hero.name} had learned to tell the truth.",
        ]
    return [t.meet(hero), *body[:2], t.aside(), *body[2:]]


def the_recipe(t: Teller) -> list[str]:
    hero, friend = t.cast(2)
    dish, parts, ingredients = t.pick(DISHES)
    helper, relative = t.pick(HELPERS), t.pick(RELATIVES)
    names = t.some(ingredients, 3)
    need = [t.number(2, 9) for _ in names]
    have = t.number(1, need[2] - 1)
    lack = need[2] - have
    guests = t.number(3, 8)
    missing = names[2]
    return [
        t.meet(hero),
        t.any(
            f"{cap(t.day())}, {hero.he} wanted to make {dish} for {hero.his} {relative.role}.",
            f'"Let us make {dish}," {t.tag(hero)} to {hero.his} {relative.role} {t.any("one day", "one morning")}.',
        ),
        f"The recipe said: {NUMBERS[need[0]]} {names[0]}, {NUMBERS[need[1]]} {names[1]} and {NUMBERS[need[2]]} "
        f"{missing}.",
        f"{hero.name} took the {NUMBERS[need[0]]} {names[0]} and the {NUMBERS[need[1]]} {names[1]} from the shelf.",
        f'But of the {missing} {hero.he} had only {NUMBERS[have]}. "I need {NUMBERS[lack]} more," {t.tag(hero)}.',
        t.any(
            f"So {hero.he} went to {hero.his} neighbour, the {helper}, who had a whole basket of {missing}.",
            f"So {hero.he} knocked at the door of {t.known(hero, friend)}.",
        ),
        f'"May I have {NUMBERS[lack]} of your {missing}?" {hero.he} asked. '
        f'"Of course," was the answer, "if I may taste the {dish}."',
        t.any(
            f"At home {hero.name} counted: {NUMBERS[have]} and {NUMBERS[lack]} made {NUMBERS[need[2]]}.",
            f"Now {hero.name} had {NUMBERS[need[2]]} {missing}, just as the recipe said.",
        ),
        t.any(
            f"{cap(hero.he)} washed the {names[0]}, cut the {names[1]} and stirred the {missing} in.",
            f"First {hero.he} put in the {names[0]}, then the {names[1]} and last of all the {missing}.",
        ),
        t.any(
            f"Soon the whole house smelled of {dish}.",
            f"It {t.any('bubbled', 'cooked', 'steamed')} for an hour, and the smell was wonderful.",
        ),
        t.aside(),
        f"There were {NUMBERS[guests]} people at the table, so {hero.name} made {NUMBERS[guests]} {parts}.",
        t.any(
            f'"This is the best {dish} in the world," said {hero.his} {relative.role}.',
            f'"May I have more {dish}?" asked {hero.his} {relative.role}, and everyone laughed.',
        ),
    ]


def the_trip(t: Teller) -> list[str]:
    hero, friend = t.cast(2)
    vehicle, relative = t.pick(VEHICLES), t.pick(RELATIVES)
    uses = (  # packed, taken out, when, what for, how one asks for it
        ("a rope", "the rope", "the path was steep", "to climb up", "to hold on to"),
        ("a lamp", "the lamp", "it grew dark", "to see the way", "to give us light"),
        ("a map", "the map", "they came to a crossing", "to find the way", "to show us the way"),
        ("an umbrella", "the umbrella", "it rained", "to stay dry", "to keep us dry"),
        ("a bottle of water", "the water", "the sun was hot", "to fill two cups", "to drink"),
        ("a bag of biscuits", "the biscuits", "they were hungry", "to make a meal", "to eat"),
        ("a warm blanket", "the blanket", "the night was cold", "to keep warm", "to keep us warm"),
        ("a flute", "the flute", "they were bored", "to play a song", "to cheer us up"),
        ("a pair of boots", "the boots", "the ground was wet", "to keep their feet dry", "for our feet"),
    )
    packed = t.some(uses, 3)
    days = t.number(2, 7)
    (_, one, when1, use1, _), (_, two, when2, _, ask), (_, three, when3, use3, _) = packed
    return [
        t.meet(hero),
        t.any(
            f"{cap(t.day())}, {hero.he} and {hero.his} friend {friend.name} set out to visit {hero.name}'s "
            f"{relative.role}, who lived {NUMBERS[days]} days away.",
            f"{hero.name} wanted to see {hero.his} {relative.role}, who lived {NUMBERS[days]} days away, and "
            f"{t.known(hero, friend)} came along.",
        ),
        f"Into {hero.his} bag {hero.he} put {joined([item for item, *_ in packed])}.",
        t.any(
            f"They took the {vehicle} early in the morning.",
            f"The {vehicle} was full, but they found two seats {t.any('by the window', 'in the corner')}.",
        ),
        t.aside(),
        f"When {when1}, they used {one} {use1}.",
        f'Later {when2}. "Do we have something {ask}?" asked {friend.name}. "Yes," {t.tag(hero)}, and {hero.he} took '
        f"{two} out of the bag.",
        f"On the last day {when3}, and {three} "
        f"{'were' if three in ('the biscuits', 'the boots') else 'was'} just what they needed {use3}.",
        f"After {NUMBERS[days]} days they came to a house "
        f"{t.any('by a lake', 'on a hill', 'near a wood', 'in a valley')}.",
        t.any(
            f'"What did you bring?" asked {hero.his} {relative.role}. "First we used {one}, then {two} and then '
            f'{three}," {t.tag(hero)}.',
            f"{cap(hero.his)} {relative.role} hugged them both and asked about the {vehicle}.",
        ),
        t.any(
            f"They stayed for {NUMBERS[t.number(2, 9)]} days, and then the {vehicle} took them home.",
            f"{friend.name} said that it was the best trip of {friend.his} life.",
        ),
    ]


def counting(t: Teller) -> list[str]:
    hero, friend = t.cast(2)
    singular, plural, where = t.pick(GATHERED)
    colour = t.pick(COLOURS)
    first, second = t.number(1, 8), t.number(1, 8)
    total = first + second
    given = t.number(1, total - 1)
    left = total - given
    return [
        t.meet(hero),
        f"{cap(t.day())}, {hero.he} went out with {a(colour)} basket to look for {plural} {where}.",
        t.any(
            f"At first {hero.he} found {count(first, singular, plural)} and put "
            f"{'it' if first == 1 else 'them'} in the basket.",
            f"In the {colour} basket {hero.he} soon had {count(first, singular, plural)}.",
        ),
        t.aside(),
        t.any(
            f"After a while {hero.he} found {NUMBERS[second]} more.",
            f"A little later {hero.he} picked up {NUMBERS[second]} more.",
        ),
        t.any(
            f'"{cap(NUMBERS[first])} and {NUMBERS[second]}, that makes {NUMBERS[total]}!" {t.tag(hero)}.',
            f"{hero.name} counted them all, and there were {NUMBERS[total]}.",
        ),
        t.any(
            f"On the way home {hero.he} met {a(friend.role)} named {friend.name}, who had no {plural} at all.",
            f"Then {hero.his} friend {friend.name} came along. {cap(friend.he)} had been looking all day and had found "
            f"nothing.",
        ),
        t.any(
            f'"Do not be sad," {t.tag(hero)}. "You may have {NUMBERS[given]} of mine."',
            f'"May I have {count(given, singular, plural)}?" asked {friend.name}. "Gladly," {t.tag(hero)}.',
        ),
        f"So {hero.name} gave {friend.him} {count(given, singular, plural)} and had {NUMBERS[left]} left.",
        t.any(
            f"{friend.name} carried {friend.his} {count(given, singular, plural)} home, and {hero.name} carried "
            f"{NUMBERS[left]} in the {colour} basket.",
            f'"{cap(NUMBERS[left])} {"is" if left == 1 else "are"} enough for me," {t.tag(hero)}.',
        ),
        t.any(t.feel(hero), t.feel(friend), t.ending(hero, friend)),
    ]


def the_trade(t: Teller) -> list[str]:
    hero, second, third = t.cast(3)
    single = [x for x in THINGS if not x.plural]
    things, colours = t.some(single, 3), t.some(COLOURS, 3)
    one, two, three = (f"{colour} {thing.noun}" for colour, thing in zip(colours, things, strict=True))
    first_place, second_place = t.some(PLACES, 2)
    return [
        t.meet(hero),
        t.any(
            f"{cap(hero.he)} owned only one thing, {a(one)}.",
            f"All that {hero.he} had was {a(one)}.",
        ),
        f"{cap(t.day())}, {hero.he} met {second.name} {first_place.at}. {second.name} had {a(two)}.",
        t.any(
            f'"I will give you my {things[1].noun} for your {things[0].noun}," {t.tag(second)}.',
            f'"What a lovely {things[0].noun}!" {t.tag(second)}. "Shall we trade?"',
        ),
        f"So {second.name} took the {one}, and {hero.name} walked on with the {two}.",
        t.aside(),
        f"Then {hero.he} came {second_place.to} and saw {third.name}, who was playing with {a(three)}.",
        t.any(
            f'"{cap(a(two))} is just what I need," {t.tag(third)}, and they traded too.',
            f'"Take my {things[2].noun} and give me the {things[1].noun}," {t.tag(third)}. {hero.name} agreed.',
        ),
        f"Now {third.name} had the {two}, and {hero.name} had the {three}.",
        t.any(
            f'"What happened to your {one}?" asked {hero.his} {t.pick(RELATIVES).role} at home. "I gave it to '
            f'{second.name}," {t.tag(hero)}.',
            f'At home {hero.he} told the whole story. "{second.name} has my {things[0].noun}, and {third.name} has the '
            f'{things[1].noun}," {hero.he} said.',
        ),
        t.any(
            f"That night the {three} stood beside {hero.his} bed.",
            f"{hero.name} liked the {three} best of all and kept it for ever.",
        ),
    ]


def the_noise(t: Teller) -> list[str]:
    hero, friend = t.cast(2)
    noise, place = t.pick(NOISES), t.any("the roof", "the door", "the window", "the cellar", "the stairs")
    near = {
        "the roof": "on",
        "the door": "behind",
        "the window": "outside",
        "the cellar": "in",
        "the stairs": "under",
    }[place]
    relative, food, colour = t.pick(RELATIVES), t.any("milk", "bread", "cheese", "a carrot"), t.pick(COLOURS)
    wrong = t.some(("a ghost", "a giant", "a thief", "a dragon", "a wolf"), 2)
    visitor = t.pick(
        [kind for kind in (*KINDS, "cat", "puppy", "pony") if kind not in (hero.role, friend.role)]
    )
    afraid = t.number(0, 1) == 1
    fear = t.pick(FEARS)
    return [
        t.meet(hero),
        f"{cap(hero.he)} was afraid of {fear}." if afraid else f"{cap(hero.he)} loved quiet nights.",
        t.aside(),
        f"{t.any('One night', 'Late one evening', 'In the middle of the night')} "
        f"{hero.he} heard {noise} {near} {place}.",
        t.any(
            f'"Did you hear that?" {hero.he} asked {hero.his} friend {friend.name}, who was staying with {hero.him}.',
            f'{hero.name} woke {hero.his} friend {friend.name}. "There is something {near} {place}!" {hero.he} said.',
        ),
        f'"Maybe it is {wrong[0]}," {t.tag(friend, "whispered")}. "Or {wrong[1]}," {t.tag(hero, "whispered")}.',
        t.any(
            f"They called {hero.name}'s {relative.role}, who came with a lamp and {a(colour)} umbrella.",
            f"{hero.name} took {a(colour)} umbrella, {friend.name} took a lamp, and they went to look.",
        ),
        f"Slowly they looked {near} {place}. It was not {wrong[0]}, and it was not {wrong[1]}.",
        f"It was only a {t.any('hungry', 'lonely', 'tiny', 'wet', 'lost')} little {visitor}!",
        t.any(
            f"They put the {colour} umbrella away and gave the {visitor} {food}.",
            f'"You poor {visitor}!" {t.tag(hero)}, and {hero.he} brought {food} from the kitchen.',
        ),
        t.any(
            f'"I will not be afraid of {fear} any more," {t.tag(hero)}.'
            if afraid
            else f'"{cap(a(visitor))} is no {wrong[0][2:]}," {t.tag(hero)}, and they laughed.',
            f"After that, {noise} did not frighten {hero.name} any more.",
        ),
        t.any(
            f"The {visitor} fell asleep beside {hero.him}.",
            f"In the morning the {visitor} was gone, but it came back every night for {food}.",
        ),
    ]


def hide_and_seek(t: Teller) -> list[str]:
    hero, second, third = t.cast(3)
    place, limit = t.pick(PLACES), t.number(6, 12)
    spots = t.some(place.spots, 2)
    cloth, colour = t.any("cap", "sleeve", "mitten", "shoelace"), t.pick(COLOURS)
    return [
        t.meet(hero),
        f"{cap(t.day())}, {hero.he} played hide and seek {place.at} with {second.name} and {third.name}.",
        t.any(
            f'"I will count to {NUMBERS[limit]}," {t.tag(hero)}, and {hero.he} closed {hero.his} eyes.',
            f"{hero.name} put {hero.his} hands over {hero.his} eyes and counted to {NUMBERS[limit]}.",
        ),
        f"{second.name} hid {spots[0]}, and {third.name} hid {spots[1]}.",
        t.any(
            f'"{cap(NUMBERS[limit - 2])}, {NUMBERS[limit - 1]}, {NUMBERS[limit]}! I am coming!" cried {hero.name}.',
            f'"{cap(NUMBERS[limit])}!" cried {hero.name}. "Here I come!"',
        ),
        t.aside(),
        t.any(
            f"First {hero.he} looked {spots[0]}, and there was {second.name}.",
            f"{second.name} laughed, so {hero.name} looked {spots[0]} and found {second.him} first.",
        ),
        f'"Now we must find {third.name}," {t.tag(second)}.',
        t.any(
            f"They looked everywhere, but {third.name} was as quiet as {a(t.any('stone', 'mouse', 'snowflake'))}.",
            f"{third.name} held {third.his} breath and did not move.",
        ),
        f"At last {hero.name} saw {a(colour)} {cloth} {spots[1]}.",
        t.any(
            f'"That is {third.name}\'s {colour} {cloth}!" {t.tag(hero)}.',
            f'"You forgot to hide your {colour} {cloth}, {third.name}!" {t.tag(hero)}.',
        ),
        t.any(
            f"{third.name} came out and laughed. Now it was {second.name}'s turn to count, "
            f"because {second.he} had been found first.",
            f"{third.name} had won, because {second.name} had been found first.",
        ),
    ]


def the_letter(t: Teller) -> list[str]:
    hero, friend = t.cast(2)
    day, later = t.some(DAYS, 2)
    place, thing, colour = t.pick(PLACES), t.thing(), t.pick(COLOURS)
    carrier = t.any("pigeon", "postman", "swallow", "sailor")
    full = f"{colour} {thing.noun}"
    return [
        t.meet(hero),
        f"On {day} the {carrier} brought {hero.him} a letter from {hero.his} friend {friend.name}.",
        f'"Dear {hero.name}," it said, "come {place.to} on {later} and bring {full if thing.plural else a(full)}. '
        f'Your friend {friend.name}."',
        t.any(
            f"{hero.name} read the letter {t.any('twice', 'three times')} and wondered what it meant.",
            f'"Why {colour}?" thought {hero.name}, but {hero.he} began to look.',
        ),
        f"{cap(hero.he)} found {'the' if thing.plural else 'a'} {thing.noun} "
        f"{t.any('under the bed', 'in an old chest', 'on the top shelf')}, but {thing.they} {thing.was} not {colour}.",
        f"So {hero.he} took a pot of {colour} {thing.paint}, and soon the {thing.noun} {thing.was} {colour}.",
        t.aside(),
        f"On {later} {hero.name} went {place.to} with the {full}.",
        t.any(
            f'"Did you bring the {colour} {thing.noun}?" asked {friend.name}. "Here {thing.they} '
            f'{thing.is_}," {t.tag(hero)}.',
            f"{friend.name} was waiting {t.pick(place.spots)}, and {friend.his} {thing.noun} {thing.was} {colour} too.",
        ),
        f'"It is the {colour} party!" {t.tag(friend)}. "Everything must be {colour} {t.any("tonight", "today")}."',
        t.any(
            f"There was {colour} cake, and there were {NUMBERS[t.number(3, 9)]} {colour} candles.",
            f"They danced {place.at} under {NUMBERS[t.number(3, 9)]} {colour} lamps.",
        ),
        t.any(t.feel(hero), t.ending(hero, friend), ""),
    ]


SKELETONS: tuple[Callable[[Teller], list[str]], ...] = (
    lost_and_found,
    the_gift,
    the_race,
    weather_and_shelter,
    small_lesson,
    the_recipe,
    the_trip,
    counting,
    the_trade,
    the_noise,
    hide_and_seek,
    the_letter,
)

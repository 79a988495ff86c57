"""Tasks with known answers, made from seeds alone, after RULER (arXiv 2404.06654): needles, several keys, several
values, variables, common words, questions on facts.

What differs from RULER: the haystacks are its five noise sentences, or generated lines (no essays, no SQuAD and
HotpotQA: nothing is downloaded); numbers are the only values; chains of variables have two hops and common words are
five, because a small model does no more; and some tasks ask first and let the text follow, so that the rows in the
middle matter too: a needle asked for at the end is found by every method whose last rows are dense.
"""

import random
import re
from dataclasses import dataclass, field

NOISE = ["The grass is green.", "The sky is blue.", "The sun is yellow.", "Here we go.", "There and back again."]
# Other words than those of the indexer's training prompts (training/corpus/make_corpus.py).
COLOURS = "crimson cobalt olive ivory scarlet violet copper silver golden turquoise maroon indigo".split()
THINGS = ("badger comet falcon glacier lantern meadow otter pebble raven sparrow thicket walnut beacon canyon dolphin "
          "ember fjord goblet heron iris").split()
NAMES = ("Alma Bruno Clara Dario Edith Felix Greta Hugo Irene Jonas Karla Leon Mabel Nora Oscar Petra Quentin Rosa "
         "Simon Thea Ulrich Vera Walter Xenia Yusuf Zelda").split()
SURNAMES = ("Abbott Becker Castle Dorsey Ellis Fischer Grant Harlow Irving Jensen Keller Lambert Mercer Norris Osborn "
            "Palmer Quinn Ramsey Slater Turner").split()
TRADES = "baker carpenter dentist farmer gardener joiner lawyer miner nurse painter sailor tailor teacher".split()
TOWNS = "Lisbon Dublin Oslo Prague Vienna Athens Warsaw Madrid Geneva Bergen Turin Lyon Seville Bremen".split()
WORDS = ("apple bridge cotton dragon engine feather guitar hammer insect jungle kitten lemon mirror needle ocean "
         "pillow quartz rabbit saddle tiger urchin velvet wagon yogurt zebra anchor barrel candle dagger elbow flute "
         "garlic helmet island jacket kernel ladder magnet nickel orange parrot quiver ribbon shovel temple umpire "
         "violin window button castle").split()


@dataclass
class Sample:
    """One prompt: the user's message, the start of the answer, and the strings that a right answer holds."""
    message: str
    prefix: str
    answers: list
    positions: list = field(default_factory=list)  # where each needle stands, as a share of the haystack's units


def number(rng, digits=7):
    return str(rng.randrange(10 ** (digits - 1), 10 ** digits))


def keys(rng, count):
    """Distinct two-word keys."""
    pairs = [f"{colour} {thing}" for colour in COLOURS for thing in THINGS]
    return rng.sample(pairs, count)


def with_needles(units, needles, depths):
    """The units with each needle put before the unit at its depth (a share of all units)."""
    text = list(units)
    for depth, needle in sorted(zip(depths, needles, strict=True), reverse=True):
        text.insert(int(depth * len(units)), needle)
    return " ".join(text)


def noise(size):
    return [NOISE[i % len(NOISE)] for i in range(size)]


def needle(key, value):
    return f"The registration number of the {key} is {value}."


LEAD = "Read the following text and remember the registration number that it mentions."


def single(rng, size):
    """One needle in noise, asked for at the end (niah_single_1)."""
    key, value, depth = keys(rng, 1)[0], number(rng), rng.random()
    text = with_needles(noise(size), [needle(key, value)], [depth])
    return Sample(f"{LEAD}\n{text}\nWhat is the registration number of the {key}?",
                  f"The registration number of the {key} is", [value], [depth])


def question_first(rng, size):
    """The question stands before the text: rows in the middle can know what is looked for."""
    key, value, depth = keys(rng, 1)[0], number(rng), rng.random()
    text = with_needles(noise(size), [needle(key, value)], [depth])
    return Sample(f"What is the registration number of the {key}? The answer is in the following text.\n{text}",
                  "The registration number is", [value], [depth])


def multikey(rng, size):
    """Four needles with different keys, one asked for (niah_multikey_1, noise for essays)."""
    names, values = keys(rng, 4), [number(rng) for _ in range(4)]
    depths = [rng.random() for _ in range(4)]
    text = with_needles(noise(size), [needle(k, v) for k, v in zip(names, values, strict=True)], depths)
    return Sample(f"{LEAD}\n{text}\nWhat is the registration number of the {names[0]}?",
                  f"The registration number of the {names[0]} is", [values[0]], depths)


def multikey_first(rng, size):
    """The same with the question before the text."""
    names, values = keys(rng, 4), [number(rng) for _ in range(4)]
    depths = [rng.random() for _ in range(4)]
    text = with_needles(noise(size), [needle(k, v) for k, v in zip(names, values, strict=True)], depths)
    return Sample(f"What is the registration number of the {names[0]}? The answer is in the following text.\n{text}",
                  f"The registration number of the {names[0]} is", [values[0]], depths)


def multivalue(rng, size):
    """One key with three values, all asked for (niah_multivalue; three of them, noise for essays)."""
    key, values = keys(rng, 1)[0], [number(rng) for _ in range(3)]
    depths = sorted(rng.random() for _ in range(3))
    needles = [f"One of the registration numbers of the {key} is {value}." for value in values]
    text = with_needles(noise(size), needles, depths)
    return Sample(f"Read the following text and remember the registration numbers that it mentions.\n{text}\nWhat are "
                  f"all three registration numbers of the {key} mentioned in the text?",
                  f"The three registration numbers of the {key} mentioned in the text are", values, depths)


def records(rng, size):
    """Every line is a needle; one is asked for (niah_multikey_2)."""
    names = keys(rng, min(size, len(COLOURS) * len(THINGS)))
    while len(names) < size:
        names.append(f"{rng.choice(COLOURS)} {rng.choice(THINGS)} {number(rng, 3)}")
    values = [number(rng) for _ in range(size)]
    at = int(rng.random() * size)
    lines = "\n".join(f"{name}: {value}" for name, value in zip(names, values, strict=True))
    return Sample(f"A list of registration numbers:\n{lines}\nWhat is the registration number of the {names[at]}?",
                  f"{names[at]}:", [values[at]], [at / size])


def variables(rng, size):
    """A chain of two assignments over noise: a value, a variable equal to another (vt; two hops instead of four)."""
    def name():
        return "".join(rng.choices("ABCDEFGHJKLMNPRSTUVWXYZ", k=3))
    first, second = name(), name()
    value = number(rng, 5)
    depths = sorted(rng.random() for _ in range(2))
    text = with_needles(noise(size), [f"VAR {first} = {value}.", f"VAR {second} = VAR {first}."], depths)
    return Sample(f"Memorize the variable assignments in the following text.\n{text}\nWhat is the value of VAR "
                  f"{second}?", f"VAR {second} = VAR {first} =", [value], depths)


def variables_list(rng, size):
    """All variables that hold a value, by a chain over noise (vt; three variables instead of five)."""
    names = []
    while len(names) < 3:
        candidate = "".join(rng.choices("ABCDEFGHJKLMNPRSTUVWXYZ", k=3))
        if candidate not in names:
            names.append(candidate)
    value = number(rng, 5)
    depths = sorted(rng.random() for _ in range(3))
    chain = [f"VAR {names[0]} = {value}."] + [f"VAR {b} = VAR {a}." for a, b in zip(names, names[1:], strict=False)]
    text = with_needles(noise(size), chain, depths)
    return Sample(f"Memorize the variable assignments in the following text.\n{text}\nFind all variables that are "
                  f"assigned the value {value}, directly or through another variable.",
                  "According to the chain of assignments, the three variables that are assigned the value "
                  f"{value} are:", names, depths)


def common_words(rng, size):
    """The words that occur most often in a list over the whole text (cwe; five common words, the list unnumbered)."""
    chosen = rng.sample(WORDS, len(WORDS))
    common, rare = chosen[:5], chosen[5:]
    # Half of the list is common words: each common word is ten times as frequent as a rare one.
    listed = [common[i % 5] for i in range(size // 2)]
    listed += [rare[i % len(rare)] for i in range(size - len(listed))]
    rng.shuffle(listed)
    return Sample("Below is a list of words. Some of them appear much more often than the others.\n"
                  f"{' '.join(listed)}\nWhat are the five most common words in the list?",
                  "The five most common words in the list are:", common)


def frequent_first(rng, size):
    """The same, asked before the list: the last rows see the question far away."""
    sample = common_words(rng, size)
    listed = sample.message.split("\n")[1]
    return Sample(f"Which five words are the most common in the following list?\n{listed}", sample.prefix,
                  sample.answers)


def facts(rng, size):
    """A question on one of many facts in plain sentences (for the QA tasks, whose data sets are not downloaded)."""
    people = [f"{first} {last}" for first in NAMES for last in SURNAMES]
    rng.shuffle(people)
    size = min(size, len(people))
    rows = [(person, rng.choice(TRADES), rng.choice(TOWNS)) for person in people[:size]]
    at = int(rng.random() * size)
    text = " ".join(f"{person} works as a {trade} in {town}." for person, trade, town in rows)
    person, trade, town = rows[at]
    return Sample(f"Read the following text.\n{text}\nWhere does {person} work, and as what?",
                  f"{person} works as a", [trade, town], [at / size])


def repeat_text(rng, size):
    """A passage of generated sentences stands twice; the answer goes on where the second copy stops (induction over a
    long distance; ours)."""
    sentences = [f"{rng.choice(NAMES)} {rng.choice(SURNAMES)} saw a {rng.choice(COLOURS)} {rng.choice(THINGS)} near "
                 f"{rng.choice(TOWNS)}." for _ in range(size)]
    at = int((0.1 + 0.8 * rng.random()) * (size - 1))
    answer = sentences[at + 1] if at + 1 < size else sentences[at]
    words = answer.split()
    return Sample("Continue the passage exactly as it stands in the text.\n" + " ".join(sentences) + "\nPassage: " +
                  sentences[at], " ".join(words[:2]), [" ".join(words[2:6])], [at / size])


TASKS = {f.__name__: f for f in (single, question_first, multikey, multikey_first, multivalue, records, variables,
                                 variables_list, common_words, frequent_first, facts, repeat_text)}


def largest(task, seed, max_tokens, encode):
    """The largest size, to within half a per cent, at which the task's prompt has at most `max_tokens` tokens."""
    def fits(size):
        return len(encode(sample_of(task, seed, size))) <= max_tokens
    low, high = 4, 8
    if not fits(low):
        raise ValueError(f"task {task}: no prompt of at most {max_tokens} tokens (the smallest has "
                         f"{len(encode(sample_of(task, seed, low)))})")
    while high < 4 * max_tokens and fits(high):
        low, high = high, 2 * high
    while high - low > max(1, low // 200):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def sample_of(task, seed, size):
    """The same seed gives the same needles, at the same shares of the text, at every size."""
    return TASKS[task](random.Random(f"{task}/{seed}"), size)


def make(task, seed, max_tokens, encode, size=None):
    """(sample, ids) of a prompt of at most `max_tokens` tokens, nearly as many. encode: sample -> token ids.

    size: from `largest` with another seed, which spares the search; made smaller where this seed needs it.
    """
    size = largest(task, seed, max_tokens, encode) if size is None else size
    while True:
        sample = sample_of(task, seed, size)
        ids = encode(sample)
        if len(ids) <= max_tokens:
            return sample, ids
        size -= max(1, size // 100)


def score(answers, text):
    """Share of the answers that the text holds, letter case and spaces aside (RULER's string_match_all)."""
    def plain(s):
        return re.sub(r"\s+", " ", re.sub(r"[\x00-\x1f]", " ", s)).casefold()
    return sum(plain(answer) in plain(text) for answer in answers) / len(answers)

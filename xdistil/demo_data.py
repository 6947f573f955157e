"""A made-up NER corpus in up to six languages: hand-written patterns filled with names, for people of Faker's lists.
The test part is real generalisation: its patterns, its names, and the first names, last names and places in them occur
nowhere else. `demo_patterns.tsv` has the columns language, kind, text: kinds `train` and `test` hold a pattern a line,
every other kind a list separated by " | "; {LAST} stands for an entry of the list `last`, # for digits."""

import hashlib
import random
import re
from importlib import import_module, resources
from pathlib import Path

from xdistil.files import save_text

LABELS = ("O", "B-LOC", "I-LOC", "B-ORG", "I-ORG", "B-PER", "I-PER")


def read_patterns() -> dict:
    """{language: {kind: [text, ...]}}, as listed in `demo_patterns.tsv`."""
    tables = {}
    for line in resources.files("xdistil").joinpath("demo_patterns.tsv").read_text(encoding="utf-8").splitlines():
        language, kind, text = line.split("\t")
        texts = [text] if kind in ("train", "test") else text.split(" | ")
        tables.setdefault(language, {}).setdefault(kind, []).extend(texts)
    return tables


def name_lists(table: dict, part: str) -> dict:
    """A language's table with the names of one part, train or test; Faker gives first and last names. A name's last
    word decides, whatever seed and language; about a quarter are for the test. ImportError: no faker."""
    def held_out(name):
        return hashlib.sha256(name.split()[-1].casefold().encode()).digest()[0] < 64

    try:  # only its word lists: Faker's generators draw in an order of their own
        person = import_module(f"faker.providers.person.{table['locale'][0]}").Provider
    except ImportError as error:
        raise ImportError("the demo corpus needs the package faker: pip install faker") from error
    kinds = {"first": {*person.first_names_female, *person.first_names_male, *table.get("first", ())},
             "last": {*person.last_names, *table.get("last", ())}}
    kinds = {kind: {name for name in names if re.fullmatch(r"[^\d(.,/ ]{2,}", name)} for kind, names in kinds.items()}
    kinds |= {"place": table["place"], "syllable": table.get("syllable", ())}
    return table | {kind: [name for name in sorted(names) if held_out(name) == (part == "test")]  # sets have no order
                    for kind, names in kinds.items()}


def fill(text: str, lists: dict, rng: random.Random) -> str:
    """Replace every {LIST} in `text` by a random entry of lists["list"] and every # by digits."""
    text = re.sub("{([A-Z]+)}", lambda m: fill(rng.choice(lists[m[1].lower()]), lists, rng), text)
    return re.sub("#+", lambda m: str(rng.randrange(2, 3 * 10 ** len(m[0]))), text)


def make_line(pattern: str, lists: dict, rng: random.Random) -> tuple:
    """Fill one pattern, with mild noise: words, IOB2 tags, and the names in lower case between spaces."""
    pattern = re.sub("{PER}", lambda m: "{TITLE} " * (rng.random() < 0.15) + m[0], pattern)  # no part of the name
    words, tags, names = [], [], []
    for token in pattern.removesuffix(" ." if rng.random() < 0.05 else "").split():
        found, label = fill(token, lists, rng).split(), token[1:-1]
        words += found
        entity = label in ("PER", "LOC", "ORG")
        tags += [f"B-{label}", *[f"I-{label}"] * (len(found) - 1)] if entity else ["O"] * len(found)
        names += [f" {' '.join(found).casefold()} "] * entity
    words[0] = words[0][0].upper() + words[0][1:] if pattern[0] == "{" else words[0]
    return [word.lower() for word in words] if rng.random() < 0.03 else words, tags, names


def write_demo_corpus(folder, *, seed=13, languages=("en", "de", "es", "fr", "pt", "vi"), n_train=1020, n_dev=210,
                      n_test=480, n_transfer=2400) -> dict:
    """Write train.tsv, dev.tsv, test.tsv, transfer.tsv and labels.tsv into `folder`; returns {file stem: number of
    lines}. Sizes count sentences, shared evenly by the languages. Columns, with tabs between, are words, IOB2 tags,
    language; transfer lines are words only. ImportError: no faker; ValueError: unknown language, or more sentences
    than the patterns can give."""
    tables, seen, used = read_patterns(), set(), set()
    if not languages or not set(languages) <= set(tables):
        raise ValueError(f"languages must be some of {', '.join(tables)}, not {languages!r}")
    sizes = {"train": n_train, "dev": n_dev, "test": n_test, "transfer": n_transfer}
    files = {"labels": list(LABELS), **{part: [] for part in sizes}}
    for kind, parts in (("test", ["test"]), ("train", ["train", "dev", "transfer"])):
        rng, barred = random.Random(f"{seed} {kind}"), frozenset(used)
        lists = {language: name_lists(tables[language], kind) for language in languages}
        owed = [(part, languages[i % len(languages)]) for part in parts for i in range(sizes[part])]
        rng.shuffle(owed)  # patterns without slots run out early
        for part, language in reversed(owed):
            for _ in range(3000):
                words, tags, names = make_line(rng.choice(lists[language][kind]), lists[language], rng)
                text = f" {' '.join(words).casefold()} "
                if text not in seen and not any(name in text for name in barred):
                    break
            else:
                raise ValueError("the patterns give no more different sentences; ask for fewer")
            seen.add(text)
            used.update(names)
            line = [" ".join(words), " ".join(tags), language]
            files[part].append("\t".join(line[:1] if part == "transfer" else line))
    for part, lines in files.items():
        save_text(Path(folder, f"{part}.tsv"), "".join(f"{line}\n" for line in lines))
    return {part: len(lines) for part, lines in files.items()}

"""A made-up NER corpus in up to six languages, for trying the kit without any download.

Hand-written sentence patterns are filled with names built from Faker's word lists.  The test part
is real generalisation: its patterns, its names, and the first and last names its people are made
of occur nowhere else.  What is held out depends on the name alone, not on seed or language.
`demo_patterns.tsv` has the columns language, kind, text: kinds `train` and `test` hold a pattern
per line, every other kind a list separated by " | "; # is a number, {LAST} an entry of `last`.
"""
import hashlib
import random
import re
from importlib import import_module, resources
from itertools import islice, permutations
from pathlib import Path

LABELS = ("O", "B-LOC", "I-LOC", "B-ORG", "I-ORG", "B-PER", "I-PER")


def read_patterns() -> dict:
    """Return {language: {kind: [text, ...]}} as listed in `demo_patterns.tsv`."""
    source, tables = resources.files("xdistil").joinpath("demo_patterns.tsv"), {}
    for line in source.read_text(encoding="utf-8").splitlines():
        language, kind, value = line.split("\t")
        values = [value] if kind in ("train", "test") else value.split(" | ")
        tables.setdefault(language, {}).setdefault(kind, []).extend(values)
    return tables


def held_out(name: str) -> bool:
    """Whether a name belongs to the test part (about a quarter do); decided by its last word."""
    return hashlib.sha256(name.split()[-1].casefold().encode()).digest()[0] < 64


def fill(text: str, lists: dict, rng: random.Random) -> str:
    """Replace every {LIST} in `text` by a random entry of lists["list"] and every # by digits."""
    text = re.sub("{([A-Z]+)}", lambda m: fill(rng.choice(lists[m[1].lower()]), lists, rng), text)
    return re.sub("#+", lambda m: str(rng.randrange(2, 3 * 10 ** len(m[0]))), text)


def _provider_lists(table):
    # Faker's static word lists are read directly: its generators draw in an order of their own.
    try:
        person, address, geo = (import_module(f"faker.providers.{name}").Provider
                                for name in table["providers"])
    except ImportError as error:
        raise ImportError("the demo corpus needs the package faker: pip install faker") from error
    places = [city[2] for city in geo.land_coords if city[3] in table["countries"]]
    for source in table["sources"]:
        places += [item if isinstance(item, str) else item[1] for item in getattr(address, source)]
    return {"first": [*person.first_names_female, *person.first_names_male], "syl": (),
            "last": person.last_names, "place": places,
            "abc": [*map("".join, permutations("ABDEGIKLMNOPRSTV", 3))]}


def name_pools(language: str) -> dict:
    """Names of one language, tokenised, as {"train": lists, "test": lists} without common names.

    Both map per, loc and org to sorted lists of distinct names, and the other kinds (first, last,
    place, job, ...) to what names are made of.  Raises ImportError without the package faker.
    """
    tables, pools, rng = read_patterns(), {}, random.Random(language)
    table, raw = tables[language], _provider_lists(tables[language])
    # A test name that is an ordinary word of some pattern would bar that pattern from training.
    ordinary = " ".join(text for other in tables.values() for text in other["train"]).casefold()
    for part, size in (("train", 900), ("test", 300)):
        lists = pools[part] = dict(table, language=[language])
        for kind, names in raw.items():
            lists[kind] = [
                name for name in sorted({*names, *table.get(kind, ())})
                if held_out(name) == (part == "test") and re.fullmatch(r"[^\d(.,/]{2,}", name)
                and len(name.split()) <= (1 if kind == "first" else 4)]
        for kind, count in (("loc", size // 6), ("org", size), ("per", size)):
            names = {fill(rng.choice(table[kind]), lists, rng) for _ in range(count)}
            names.update(lists["place"] if kind == "loc" else ())
            lists[kind] = sorted(  # no "Weber & Weber"; sorted, as sets have no fixed order
                name for name in names if len(set(name.split())) == len(name.split())
                and (part == "train" or (name not in pools["train"][kind]
                                         and f" {name.casefold()} " not in f" {ordinary} ")))
    return pools


def make_line(pattern: str, lists: dict, rng: random.Random) -> tuple:
    """Fill one pattern: (words, IOB2 tags), two lists of equal length, with mild random noise."""
    words, tags = [], []
    for token in pattern.split():
        entity = token[1:-1] if token in ("{PER}", "{LOC}", "{ORG}") else ""
        if entity == "PER" and rng.random() < 0.15:  # a title is not part of the name
            words += rng.choice(lists["title"]).split()
        tags += ["O"] * (len(words) - len(tags)) + [f"B-{entity}"] * bool(entity)
        words += fill(token, lists, rng).split()
        tags += [f"I-{entity}" if entity else "O"] * (len(words) - len(tags))
    noise = rng.random()
    upper = len(words) if 0.025 <= noise < 0.05 else int(pattern[0] == "{")
    words = [word[0].upper() + word[1:] for word in words[:upper]] + words[upper:]
    if noise < 0.025:
        words = [word.lower() for word in words]
    if rng.random() < 0.05 and words[-1] in ".!?":
        del words[-1], tags[-1]
    return words, tags


def _new_lines(patterns, lists, rng, seen, barred):
    misses = 0
    while misses < 3000:
        words, tags = make_line(rng.choice(patterns), lists, rng)
        low = [word.casefold() for word in words]
        # A barred name may be hidden inside a longer name, so every run of words is looked up.
        runs = {" ".join(low[i:j]) for i in range(len(low)) for j in range(i + 1, i + 9)}
        misses += 1
        if " ".join(low) not in seen and runs.isdisjoint(barred):
            seen.add(" ".join(low))
            misses = 0
            yield words, tags, lists["language"]
    raise ValueError("the patterns give no more different sentences; ask for fewer")


def write_demo_corpus(folder, *, seed=13, languages=("en", "de", "es", "fr", "pt", "vi"),
                      n_train=2400, n_dev=300, n_test=600, n_transfer=6000) -> dict:
    """Write train.tsv, dev.tsv, test.tsv, transfer.tsv and labels.tsv into `folder`.

    Sizes count sentences, shared evenly by the languages.  Columns, with tabs between, are words,
    IOB2 tags, language; transfer lines are words only.  Returns {file stem: number of lines}.
    ValueError: unknown language, or more sentences than the patterns can give; ImportError: faker.
    """
    tables, seen = read_patterns(), set()
    if not languages or not set(languages) <= set(tables):
        raise ValueError(f"languages must be some of {', '.join(tables)}, not {languages!r}")
    pools = {language: name_pools(language) for language in languages}
    barred = {name.casefold() for both in pools.values() for kind in ("per", "loc", "org")
              for name in both["test"][kind]}
    sizes = {"train": n_train, "dev": n_dev, "test": n_test, "transfer": n_transfer}
    files = {**{part: [] for part in sizes}, "labels": list(LABELS)}
    for kind, parts in (("test", ["test"]), ("train", ["train", "dev", "transfer"])):
        for at, language in enumerate(languages):
            rng = random.Random(f"{seed} {language} {kind}")
            owed = [part for part in parts for _ in range(at, sizes[part], len(languages))]
            drawn = list(islice(_new_lines(tables[language][kind], pools[language][kind], rng, seen,
                                           barred if kind == "train" else ()), len(owed)))
            rng.shuffle(drawn)  # patterns without slots run out early
            for part, line in zip(owed, drawn, strict=True):
                files[part].append("\t".join(map(" ".join, line[:1 if part == "transfer" else 3])))
    Path(folder).mkdir(parents=True, exist_ok=True)
    for part, lines in files.items():
        if part in sizes:
            random.Random(f"{seed} {part}").shuffle(lines)
        temporary = Path(folder, f"{part}.tsv.tmp")
        temporary.write_bytes("".join(f"{line}\n" for line in lines).encode())
        temporary.replace(Path(folder, f"{part}.tsv"))
    return {part: len(lines) for part, lines in files.items()}

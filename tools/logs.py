"""Collects finished runs into one CSV that is kept: `python tools/logs.py runs/* > metaformer_edu/logs/digits.csv`."""
import csv
import sys
from pathlib import Path

import yaml


def rows(folder):
    about = yaml.safe_load((folder / "args.yaml").read_text(encoding="utf-8"))
    fixed = dict(command=about["command"], seed=about["settings"]["seed"], torch=about["versions"]["torch"])
    with open(folder / "summary.csv", newline="", encoding="utf-8") as file:
        return [{**fixed, **row} for row in csv.DictReader(file)]


if __name__ == "__main__":
    found = [row for folder in sys.argv[1:] for row in rows(Path(folder))]
    writer = csv.DictWriter(sys.stdout, found[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(found)

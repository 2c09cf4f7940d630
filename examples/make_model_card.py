"""
Make the default student of the built-in teacher, as `echoatt compress --output student` does, and from its report the card
and the results in `model_cards/builtin_student_041`:

    python examples/make_model_card.py

What was written into the card by hand, outside of its marks, is kept.
"""

import argparse
import shutil
import tempfile
from pathlib import Path

from echoatt_hf import CompressionSettings, compress
from echoatt_hf.publishing.card import write_model_card


CARD = Path(__file__).parents[1] / "model_cards" / "builtin_student_041"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", type=Path, help="a student that is there already")
    parser.add_argument("--output", type=Path, default=CARD)
    options = parser.parse_args(arguments)

    with tempfile.TemporaryDirectory() as folder:
        student = options.student or Path(folder) / "student"
        if options.student is None:
            compress(CompressionSettings(), student)
        collect(student, options.output)


def collect(student: Path, output: Path) -> None:
    """Bring the folder of a card up to date with a student."""
    output.mkdir(parents=True, exist_ok=True)
    for source, target in {
        "report.json": "results.json",
        "config.json": "config.json",
        "similarity.png": "similarity.png",
    }.items():
        shutil.copy(student / source, output / target)
    write_card(output)


def write_card(output: Path) -> None:
    """Write the card from `results.json` and `config.json` beside it."""
    shutil.copy(output / "results.json", output / "report.json")
    try:
        write_model_card(output)
    finally:
        (output / "report.json").unlink()


if __name__ == "__main__":
    main()

"""
The cards in `model_cards/`: from the report of a student its card and its results, without its weights.

    python examples/make_model_card.py

makes the default student of the built-in teacher, as `echoatt compress --output student` does, and its card. Of a student
that is there already:

    python examples/make_model_card.py --student student --base-model HuggingFaceTB/SmolLM2-135M-Instruct \
        --license apache-2.0 --language en --output model_cards/smollm2_student_041

What was written into the card by hand, outside of its marks, is kept. Files of an earlier student that this one lacks are not:
for zero-shot results in the card, `echoatt zero-shot` writes zero_shot.json into the folder of the student first.
"""

import argparse
import shutil
import tempfile
from pathlib import Path

from echoatt_hf import CompressionSettings, compress
from echoatt_hf.publishing.card import write_model_card


CARD = Path(__file__).parents[1] / "model_cards" / "builtin_student_041"
KEPT = {
    "report.json": "results.json",
    "config.json": "config.json",
    "similarity.png": "similarity.png",
    "zero_shot.json": "zero_shot.json",
}
"""Files of a student that its card is made of, and what they are called beside the card."""

OPTIONAL = ("similarity.png", "zero_shot.json")
"""Those that a student may lack."""


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", type=Path, help="a student that is there already")
    parser.add_argument("--base-model", help="repository of its teacher, where the student does not know it")
    parser.add_argument("--license", help="where the student does not know it")
    parser.add_argument("--language", help="where the student does not know it")
    parser.add_argument("--output", type=Path, default=CARD)
    options = parser.parse_args(arguments)

    with tempfile.TemporaryDirectory() as folder:
        student = options.student or Path(folder) / "student"
        if options.student is None:
            compress(CompressionSettings(), student)
        facts = {name: getattr(options, name) for name in ("base_model", "license", "language")}
        collect(student, options.output, **facts)


def collect(student: Path, output: Path, **facts: str | None) -> None:
    """Bring the folder of a card up to date with a student. What the student lacks was of another one, and goes."""
    for name in KEPT:
        if name not in OPTIONAL and not (student / name).exists():
            raise SystemExit(
                f"{student} has no {name}: give the folder of a student, as `echoatt compress` writes it."
            )
    output.mkdir(parents=True, exist_ok=True)
    for source, target in KEPT.items():
        if (student / source).exists():
            shutil.copy(student / source, output / target)
        else:
            (output / target).unlink(missing_ok=True)
    write_card(output, **facts)


def write_card(output: Path, **facts: str | None) -> None:
    """Write the card from `results.json` and the files beside it."""
    shutil.copy(output / "results.json", output / "report.json")
    try:
        write_model_card(output, **facts)
    finally:
        (output / "report.json").unlink()


if __name__ == "__main__":
    main()

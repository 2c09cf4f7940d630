"""
Make a student of the built-in teacher in a minute, look at what would be published, and publish it:

    python examples/push_to_hub.py you/student            # lists what would be sent
    python examples/push_to_hub.py you/student --publish  # sends it, to a private repository
"""

import argparse
from pathlib import Path

from echoatt_hf import (
    CalibrationSettings,
    CompressionSettings,
    DistillationSettings,
    PlanSettings,
    compress,
    push_student,
)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("repository", help="repository of the Hub, with its owner")
    parser.add_argument("--folder", type=Path, default=Path("runs/student"), help="where the student is, or will be")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--publish", action="store_true", help="send it; without, what would be sent is listed")
    options = parser.parse_args(arguments)

    if not options.folder.exists():
        settings = CompressionSettings(
            plan=PlanSettings(plan="similarity"),
            calibration=CalibrationSettings(calibration_rows=16),
            distillation=DistillationSettings(
                steps=options.steps, stage2_steps=0, warmup_steps=min(20, options.steps)
            ),
        )
        compress(settings, options.folder)
    # The card in the folder is yours to edit. The licence is that of the built-in teacher.
    print(push_student(options.folder, options.repository, private=True, dry_run=not options.publish))


if __name__ == "__main__":
    main()

"""Ask whether a method helps on your data: paired runs, an interval, a report.

python examples/compare_domains.py DATA         # DATA/domain/class/image; every domain held out once
python examples/compare_domains.py --quick      # on embedded digits
"""

import argparse
from pathlib import Path

import fxgraft


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("data", nargs="?", type=Path)
    parser.add_argument("--out", type=Path, default=Path("fxgraft-compare"))
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    if args.quick or args.data is None:
        from fxgraft.comparison.demo_data import write_digits

        result = fxgraft.compare(
            write_digits(Path("digits-24"), 24),
            model="test_resnet",
            grafts=["rsc"],
            hold_out="sketch",
            per_class=4,
            test_per_class=4,
            seeds=2,
            size=24,
            training={"epochs": 1},
            workers=1,
            out=args.out,
        )
    else:
        result = fxgraft.compare(
            args.data,
            model="resnet50",
            pretrained=True,
            grafts=["rsc", "rsc + selfnorm"],
            hold_out="all",
            seeds=5,
            out=args.out,
        )
    print(result)
    print(result.to_html(args.out / "report.html"))


if __name__ == "__main__":
    main()

"""Write the report of one run, or of several runs compared.

python launch/report.py DIR [DIR ...] [--out=report.html] [--baseline=ARM] [--sort=METRIC]
"""

import argparse

from cptjax.common import cli, console
from cptjax.evaluation import report


def main() -> None:
    parser = cli.OneLineParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "folders",
        nargs="+",
        metavar="DIR",
        help="a workdir, or a folder of workdirs (arms or seeds)",
    )
    parser.add_argument(
        "--out",
        help="page to write, for several runs with their numbers next to it as .json; default: "
        "report.html in the first DIR",
    )
    parser.add_argument(
        "--baseline",
        default="",
        help="arm that the others are compared with, seed by seed; default: as in the config, or "
        "the first",
    )
    parser.add_argument(
        "--sort",
        default="",
        metavar="METRIC",
        help="list the arms by this metric of summary.json, the best first; default: as in the "
        "config",
    )
    args = parser.parse_args()
    try:
        page = report.write_report(args.folders, args.out, args.baseline, args.sort)
        print(console.with_addresses(str(page)))
    except Exception as error:
        cli.exit_with_error(error)


if __name__ == "__main__":
    main()

"""Why something was forgotten; `--help` behind each name says more.

python launch/analyze.py mixture | drift DIR [DIR ...] | influence DIR | fisher DIR [--out=page.html]
"""

import argparse
import importlib
import sys
from pathlib import Path


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    sub = top.add_subparsers(dest="what", required=True, metavar="mixture|drift|influence|fisher")
    add = lambda name, text: sub.add_parser(name, help=text, description=text)
    mixture = add(
        "mixture", "forward and reverse KL on mixtures of Gaussians: which forgets at equal gain"
    )
    mixture.add_argument("--seed", type=int, default=0)

    drift = add(
        "drift",
        "loss on what a stage does not train, against how far it went from the base: fits over all stages of the runs",
    )
    drift.add_argument(
        "folders",
        nargs="+",
        metavar="DIR",
        help="a workdir, or a folder of workdirs (arms or seeds)",
    )
    drift.add_argument(
        "--weights",
        action="store_true",
        help="also distances of weights, from the stages' checkpoints",
    )

    influence = add(
        "influence",
        "what one step on an answer does to the answers of other tasks, by the corpus that the answer is from",
    )
    influence.add_argument(
        "--corpus",
        default="gold,own",
        help="gold, own (correct answers drawn now), paths of rollouts/*.jsonl",
    )
    influence.add_argument(
        "--lr", type=float, default=1e-4, help="of the step on one answer, plain gradient descent"
    )
    influence.add_argument(
        "--probes", type=int, default=16, help="answers of each other task that are looked at"
    )
    fisher = add(
        "fisher",
        "what gradients of gold answers and of drawn answers risk on the same prompts, by the Fisher of other tasks",
    )
    fisher.add_argument(
        "--probes", type=int, default=16, help="rows of each other task in the Fisher information"
    )
    for each in (influence, fisher):
        each.add_argument("folder", metavar="DIR", help="a workdir")
        each.add_argument(
            "--stage",
            type=int,
            default=1,
            help="whose training data; the model is the one that it starts from",
        )
        each.add_argument("--rows", type=int, default=16, help="prompts of the stage")
        each.add_argument("--samples", type=int, default=8, help="answers drawn to each prompt")
        each.add_argument(
            "--others",
            default="",
            help="the other tasks; left out = those of earlier stages, and the general ones",
        )
        each.add_argument(
            "--dtype", default="float32", choices=("float32", "bfloat16"), help="of the arithmetic"
        )
    for each in (mixture, drift, influence, fisher):
        each.add_argument(
            "--out",
            help="the page to write, its numbers beside it as .json; default: {name}.html in the first DIR",
        )
    return top


def main() -> None:
    asked = vars(parser().parse_args())
    what, out = asked.pop("what"), asked.pop("out")
    first = asked.get("folder") or asked.get("folders", ["."])[0]
    try:
        from cptjax.analysis import finding

        found = importlib.import_module(f"cptjax.analysis.{what}").analyze(**asked)
        finding.print_finding(found)
        print(finding.write_finding(found, Path(out or Path(first) / f"{what}.html")))
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()

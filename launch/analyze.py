"""Explain forgetting on finished runs; each analysis has its own --help.

python launch/analyze.py mixture | drift DIR [DIR ...] | influence DIR | fisher DIR
    [--out=page.html]
"""

import argparse
import importlib
import sys
from pathlib import Path

ANALYSES = {
    "mixture": "forward and reverse KL on mixtures of Gaussians: which forgets at equal gain",
    "drift": "loss on tasks that a stage does not train, against the distance from the base model",
    "influence": "effect of a step on one response on gold responses of other tasks, by corpus",
    "fisher": "risk of the gradients of gold and sampled responses for other tasks, by Fisher",
}
# Only the module of the chosen analysis is imported: the simulation needs no JAX.
MODULES = {
    "mixture": "gaussian_mixtures",
    "drift": "drift",
    "influence": "influence",
    "fisher": "gradient_risk",
}


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="name", required=True, metavar="|".join(ANALYSES))
    by_name = {
        name: commands.add_parser(name, help=text, description=text)
        for name, text in ANALYSES.items()
    }
    by_name["mixture"].add_argument("--seed", type=int, default=0)

    drift = by_name["drift"].add_argument
    drift(
        "folders",
        nargs="+",
        metavar="DIR",
        help="a workdir, or a folder of workdirs (arms or seeds)",
    )
    drift("--weights", action="store_true", help="add distances of weights, from the checkpoints")

    influence = by_name["influence"].add_argument
    influence(
        "--corpus",
        default="gold,own",
        help="gold, own (correct responses sampled now), or paths of rollouts/*.jsonl",
    )
    influence("--lr", type=float, default=1e-4, help="of the gradient descent step on one response")
    influence("--probes", type=int, default=16, help="gold responses of each other task")
    by_name["fisher"].add_argument(
        "--probes", type=int, default=16, help="rows of each other task in the Fisher information"
    )
    for name in ("influence", "fisher"):
        add = by_name[name].add_argument
        add("folder", metavar="DIR", help="a workdir")
        add(
            "--stage",
            type=int,
            default=1,
            help="stage whose training data is used, with the model that it starts from",
        )
        add("--rows", type=int, default=16, help="prompts of the stage")
        add("--samples", type=int, default=8, help="responses sampled per prompt")
        add(
            "--others",
            default="",
            help="the other tasks; default: those of earlier stages, and the general ones",
        )
        add(
            "--dtype",
            default="float32",
            choices=("float32", "bfloat16"),
            help="of the arithmetic",
        )
    for command in by_name.values():
        command.add_argument(
            "--out",
            help="page to write, with its numbers next to it as .json; default: "
            "{name}.html in the first DIR",
        )
    return parser


def main() -> None:
    arguments = vars(make_parser().parse_args())
    name, out = arguments.pop("name"), arguments.pop("out")
    folder = arguments.get("folder") or arguments.get("folders", ["."])[0]
    try:
        from cptjax.analysis import finding

        module = importlib.import_module(f"cptjax.analysis.{MODULES[name]}")
        result = module.analyze(**arguments)
        finding.print_finding(result)
        print(finding.write_finding(result, Path(out or Path(folder) / f"{name}.html")))
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()

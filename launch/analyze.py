"""Explain forgetting on finished runs; each analysis has its own --help.

python launch/analyze.py mixture | parity | drift DIR ... | pareto DIR ... | influence DIR
    | fisher DIR [--out=page.html]
"""

import argparse
import importlib
import os

from cptjax.common import buckets, cli, console, files

ANALYSES = {
    "mixture": "forward and reverse KL on mixtures of Gaussians: which forgets at equal gain",
    "parity": "KL and forgetting of RL and SFT on handwritten digits, at many learning rates",
    "drift": "loss on tasks that a stage does not train, against the distance from the base model",
    "pareto": "forgetting of methods at matched accuracy on the new tasks, over learning rates",
    "influence": "effect of a step on one response on gold responses of other tasks, by corpus",
    "fisher": "risk of the gradients of gold and sampled responses for other tasks, by Fisher",
}
# Only the module of the chosen analysis is imported: the simulation needs no JAX.
MODULES = {
    "mixture": "gaussian_mixtures",
    "parity": "parity_digits",
    "drift": "drift",
    "pareto": "pareto",
    "influence": "influence",
    "fisher": "gradient_risk",
}


def make_parser() -> argparse.ArgumentParser:
    parser = cli.OneLineParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="name", required=True, metavar="|".join(ANALYSES))
    by_name = {
        name: commands.add_parser(name, help=text, description=text)
        for name, text in ANALYSES.items()
    }
    by_name["mixture"].add_argument("--seed", type=int, default=0)

    by_name["parity"].add_argument("--seeds", type=int, default=3, help="base models")

    for name in ("drift", "pareto"):
        by_name[name].add_argument(
            "folders",
            nargs="+",
            metavar="DIR",
            help="a workdir, or a folder of workdirs (arms or seeds)",
        )
    by_name["drift"].add_argument(
        "--weights", action="store_true", help="add distances of weights, from the checkpoints"
    )

    influence = by_name["influence"].add_argument
    influence(
        "--corpus",
        default="gold,own",
        help="gold, own (correct responses sampled now), or paths of rollouts/*.jsonl",
    )
    influence("--lr", type=float, default=1e-4, help="of the gradient descent step on one response")
    influence(
        "--steps",
        default="0",
        help="steps of the stage, such as 0,100,200, or all that are saved; 0 is its start",
    )
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
        if os.environ.get("CPTJAX_DISTRIBUTED"):
            raise ValueError(
                "analyses run in one process, got CPTJAX_DISTRIBUTED="
                f"{os.environ['CPTJAX_DISTRIBUTED']}; unset it and start one process on one host"
            )
        page = None if out is None else files.output_page(out)  # an analysis may take hours
        from cptjax.analysis import finding

        module = importlib.import_module(f"cptjax.analysis.{MODULES[name]}")
        result = module.analyze(**arguments)
        finding.print_finding(result)
        page = page or buckets.local_path(folder, buckets.READ) / f"{name}.html"
        print(console.with_addresses(str(finding.write_finding(result, page))))
    except Exception as error:
        cli.exit_with_error(error)


if __name__ == "__main__":
    main()

"""Check a config before using an accelerator: rows, prompt lengths, padding, memory and disk.

The exit code is 2 if a run would stop.

python launch/check.py --config=configs/X.py[:arg] [--rows=N] [--workdir=DIR] [--config.a.b=v]
"""

import os

os.environ["JAX_PLATFORMS"] = "cpu"  # before jax is imported; another run may use the accelerator

from absl import flags

from cptjax.common import cli, config_flag, console

CONFIG = config_flag.define_config_flag()
ROWS = flags.DEFINE_integer("rows", None, "Rows of each split, chosen by seed; default: all.")
WORKDIR = flags.DEFINE_string("workdir", "", "Compare the disk use with the free space of DIR.")
PLAIN = flags.DEFINE_bool("plain", False, "Print plain progress lines even on a terminal.")


def main() -> None:
    if PLAIN.value:
        console.set_console_mode("plain")
    if CONFIG.value is None:
        raise ValueError(
            "--config is missing; expected the path of a config file, such as configs/demo.py"
        )
    from cptjax.planning import check

    reports = check.run_preflight(CONFIG.value, ROWS.value, WORKDIR.value)
    print(f"ok: {sum(len(r.rows) for r in reports)} rows of {len(reports)} splits")


if __name__ == "__main__":
    cli.run_launcher(main)

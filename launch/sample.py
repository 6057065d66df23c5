"""Send a prompt to a model and print its responses.

python launch/sample.py --model=HF_DIR|ORG/NAME|WORKDIR|tiny --prompt="What is this?" \\
    [--image=a.png --image=b.png] [--n=4 --temperature=1]
"""

from absl import flags

from cptjax.common import cli, console

MODEL = flags.DEFINE_string(
    "model",
    None,
    "Hugging Face folder or hub id, workdir of a run, or a preset (random weights).",
    required=True,
)
PROMPT = flags.DEFINE_string("prompt", None, "Text of the user's message.", required=True)
IMAGE = flags.DEFINE_multi_string(
    "image", [], "Image file, placed before the text; may be repeated."
)
VIDEO = flags.DEFINE_multi_string(
    "video", [], "Video file, placed before the text; may be repeated."
)
SYSTEM = flags.DEFINE_string("system", "", "System message; empty = that of the template.")
STAGE = flags.DEFINE_integer(
    "stage",
    None,
    "For a workdir: the stage whose model is used; default: the last finished one, 0 = base.",
    lower_bound=0,
)
N = flags.DEFINE_integer("n", 1, "Number of responses.")
MAX_NEW = flags.DEFINE_integer("max_new_tokens", 256, "Largest number of tokens of a response.")
TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "Sampling temperature; 0 = greedy.")
TOP_P = flags.DEFINE_float(
    "top_p", 1.0, "Sample from the most likely tokens with this total probability, in (0, 1]."
)
TOP_K = flags.DEFINE_integer("top_k", 0, "Sample from this many most likely tokens; 0 = all.")
MIN_P = flags.DEFINE_float(
    "min_p", 0.0, "Smallest probability of a token, as a share of the largest probability."
)
STOP = flags.DEFINE_multi_string("stop", [], "Text before which a response ends; may be repeated.")
SEED = flags.DEFINE_integer("seed", 0, "Seed of the random numbers.")
DTYPE = flags.DEFINE_enum("dtype", "bfloat16", ["bfloat16", "float32"], "Type of the arithmetic.")
cli.define_cache_flag()


def main() -> None:
    import cptjax

    model = cptjax.load(MODEL.value, dtype=DTYPE.value, stage=STAGE.value)
    parts = [
        {"type": kind, kind: path}
        for kind, paths in (("image", IMAGE.value), ("video", VIDEO.value))
        for path in paths
    ]
    user = {"role": "user", "content": [*parts, {"type": "text", "text": PROMPT.value}]}
    system = [{"role": "system", "content": SYSTEM.value}] if SYSTEM.value else []
    (responses,) = cptjax.generate(
        model,
        [[*system, user]],
        n=N.value,
        max_new_tokens=MAX_NEW.value,
        temperature=TEMPERATURE.value,
        top_p=TOP_P.value,
        top_k=TOP_K.value,
        min_p=MIN_P.value,
        stop=STOP.value,
        seed=SEED.value,
    )
    for i, response in enumerate(responses):
        if N.value > 1:
            print(f"--- {i + 1} of {N.value}")
        console.print_result(response)


if __name__ == "__main__":
    cli.run_launcher(main)

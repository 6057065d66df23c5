"""Ask a model something and print its answers.

python launch/sample.py --model=HF_DIR|ORG/NAME|WORKDIR|tiny --prompt="What is this?" [--image=a.png --image=b.png] [--n=4 --temperature=1]
"""

from absl import flags

from cptjax.common import cli

MODEL = flags.DEFINE_string(
    "model",
    None,
    "Hugging Face folder or hub id, workdir of a run, or a preset (random weights).",
    required=True,
)
PROMPT = flags.DEFINE_string("prompt", None, "The user's words.", required=True)
IMAGE = flags.DEFINE_multi_string(
    "image", [], "Image file, shown before the words; may be repeated."
)
VIDEO = flags.DEFINE_multi_string(
    "video", [], "Video file, shown before the words; may be repeated."
)
SYSTEM = flags.DEFINE_string("system", "", "System message; empty = the template's own.")
STAGE = flags.DEFINE_integer(
    "stage",
    None,
    "Of a workdir: the stage whose model is asked; default: the last finished one, 0 = base.",
)
N = flags.DEFINE_integer("n", 1, "Answers.")
MAX_NEW = flags.DEFINE_integer("max_new_tokens", 256, "Tokens of an answer at most.")
TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "0 = the likeliest token.")
TOP_P = flags.DEFINE_float("top_p", 1.0, "Share of probability that may be drawn from, in (0, 1].")
TOP_K = flags.DEFINE_integer("top_k", 0, "Likeliest tokens that may be drawn; 0 = all.")
MIN_P = flags.DEFINE_float(
    "min_p", 0.0, "Least probability of a token, as a share of the likeliest's."
)
STOP = flags.DEFINE_multi_string("stop", [], "Text before which an answer ends; may be repeated.")
SEED = flags.DEFINE_integer("seed", 0, "Of the random numbers.")
DTYPE = flags.DEFINE_enum("dtype", "bfloat16", ["bfloat16", "float32"], "Of the arithmetic.")


def main() -> None:
    import cptjax

    if STAGE.value is not None and STAGE.value < 0:
        raise ValueError(f"--stage={STAGE.value}; expected 0 (base) or a stage's number")
    model = cptjax.load(MODEL.value, dtype=DTYPE.value, stage=STAGE.value)
    parts = [
        {"type": kind, kind: path}
        for kind, paths in (("image", IMAGE.value), ("video", VIDEO.value))
        for path in paths
    ]
    user = {"role": "user", "content": [*parts, {"type": "text", "text": PROMPT.value}]}
    system = [{"role": "system", "content": SYSTEM.value}] if SYSTEM.value else []
    answers = cptjax.generate(
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
    for i, answer in enumerate(answers[0]):
        print(
            f"--- {i + 1} of {N.value}" if N.value > 1 else "",
            answer,
            sep="\n" if N.value > 1 else "",
        )


if __name__ == "__main__":
    cli.run_launcher(main)

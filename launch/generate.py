"""Generate a graded corpus: K responses of a stage, or of another model, to each row of a task.

python launch/generate.py --config=configs/cpt7.py:grpo,7b --workdir=runs/grpo --stage=1 \\
    --task=cpt7_textvqa --samples=8 --out=textvqa.jsonl
python launch/generate.py --config=configs/retain.py:teacher_sft,mmlu,qwen1.5b \\
    --model=meta-llama/Llama-3.3-70B-Instruct --task=retain_mmlu --samples=5 --out=teacher.jsonl

The file is a corpus for method.corpus and for method.filter; its provenance stands in
FILE.source.json. The same command continues after it was killed.
"""

from absl import flags

from cptjax.common import cli, config_flag

WORKDIR = flags.DEFINE_string("workdir", "", "Folder of the run; not needed with --model.")
STAGE = flags.DEFINE_integer(
    "stage",
    None,
    "Stage whose model responds; 0 = base; default: the newest finished stage.",
    lower_bound=0,
)
MODEL = flags.DEFINE_string(
    "model", "", "Hugging Face folder or hub id that responds instead of a stage: a teacher."
)
TASK = flags.DEFINE_string("task", None, "A task of the config, or a built-in one.", required=True)
SPLIT = flags.DEFINE_enum("split", "train", ["train", "validation", "test"], "Rows to respond to.")
ROWS = flags.DEFINE_integer(
    "rows", None, "Number of rows, chosen by the config's seed; default: all.", lower_bound=1
)
SAMPLES = flags.DEFINE_integer("samples", 8, "Responses to each row.", lower_bound=1)
TEMPLATE = flags.DEFINE_string(
    "template", "", "Prompt template; default: the one that the task is trained with."
)
TEMPERATURE = flags.DEFINE_float(
    "temperature", None, "Sampling temperature; default: rollout.temperature.", lower_bound=0.0
)
TOP_P = flags.DEFINE_float("top_p", None, "Default: rollout.top_p.")
MAX_NEW = flags.DEFINE_integer("max_new_tokens", None, "Default: rollout.max_new_tokens.")
OUT = flags.DEFINE_string("out", None, "Path of the corpus, FILE.jsonl.", required=True)
CONFIG = config_flag.define_config_flag()
cli.define_cluster_flags()
cli.define_cache_flag()


def main() -> None:
    cli.connect_processes()
    from cptjax.common import distributed
    from cptjax.continual import corpus_generation

    request = corpus_generation.CorpusRequest(
        task=TASK.value,
        samples=SAMPLES.value,
        stage=STAGE.value,
        model=MODEL.value,
        split=SPLIT.value,
        rows=ROWS.value,
        template=TEMPLATE.value,
        temperature=TEMPERATURE.value,
        top_p=TOP_P.value,
        max_new_tokens=MAX_NEW.value,
    )
    provenance = corpus_generation.generate_corpus(CONFIG.value, WORKDIR.value, request, OUT.value)
    if distributed.is_main_process():
        print(corpus_generation.format_summary(provenance, OUT.value))


if __name__ == "__main__":
    cli.run_launcher(main)

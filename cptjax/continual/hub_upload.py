"""Upload the model of a stage to the Hugging Face hub, with a model card that says what it is."""

import json
import tempfile
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from cptjax.common import console, files
from cptjax.continual.stage_model import export_stage
from cptjax.evaluation import summary
from cptjax.evaluation.report.words import format_percent


def push_stage(
    workdir: str | Path,
    repo: str,
    stage: int | None = None,
    dtype: str = "",
    shard_bytes: float = 5e9,
    folder: str | Path | None = None,
    dry_run: bool = False,
) -> dict[str, int]:
    """Export the model of a stage and upload it to a private repository; return bytes by file.

    The folder of the export is kept if it is given. With `dry_run` the hub is not asked for
    anything.
    """
    try:
        huggingface_hub.utils.validate_repo_id(repo)
        if "/" not in repo:
            raise HFValidationError
    except HFValidationError:
        raise ValueError(f"--push={repo}: expected the id of a repository, org/name") from None
    hub = huggingface_hub.HfApi()
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(folder or Path(temporary) / "model")
        try:
            if not dry_run:
                hub.whoami()  # before the export, which may take long
            number = export_stage(workdir, place, stage, dtype, shard_bytes)
            files.write_text(place / "README.md", describe_model(Path(workdir), number))
            sizes = {p.name: p.stat().st_size for p in sorted(place.iterdir())}
            if not dry_run:
                hub.create_repo(repo, private=True, exist_ok=True)
                with console.show_waiting(f"uploading {repo}"):
                    hub.upload_folder(
                        repo_id=repo, folder_path=place, commit_message=f"Stage {number}"
                    )
        except (HfHubHTTPError, huggingface_hub.errors.LocalTokenNotFoundError) as error:
            raise OSError(
                f"--push={repo}: {str(error).splitlines()[0]}; log in with `hf auth login` as a "
                "user who may write there, or set HF_TOKEN"
            ) from error
    return sizes


def describe_model(workdir: Path, stage: int) -> str:
    """Return the model card of a stage: how it was trained, and its scores."""
    config = summary.load_config(workdir)
    source = config["model"].get("path") or ""
    front: dict[str, Any] = {"library_name": "transformers", "tags": ["cptjax"]}
    if source and not Path(source).exists():
        front["base_model"] = source
    lines = ["---", *(f"{key}: {json.dumps(value)}" for key, value in front.items()), "---", ""]
    lines.append(f"# {config['name']}, stage {stage} of {len(config['stages'])}")
    lines += ["", "Trained by cptjax on these tasks, one after the other:", ""]
    tasks = summary.tasks_by_stage(config)
    lines += [f"{i}. {', '.join(names)}" for i, names in enumerate(tasks[:stage], 1)]
    table = summary.load_accuracy_table(workdir, config)
    names = [n for n in (*table.tasks, *table.general) if (stage, n) in table.cells]
    if names:
        lines += ["", "| task | base model | this model |", "|---|---|---|"]
    for name in names:
        base, now = ((table.cells.get((row, name))) for row in (0, stage))
        shown = [format_percent(cell.value) if cell else "" for cell in (base, now)]
        lines.append(f"| {name} | {shown[0]} | {shown[1]} |")
    return "\n".join(lines) + "\n"

"""The peer of the benchmark: transformers and torch, in another process, on the same workload.

`phase_times` writes a checkpoint and `inputs.npz` into a folder, then sends the name of a phase on
each line and reads its seconds. Only the other process imports torch.
"""

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

INPUTS_FILE = "inputs.npz"


@contextlib.contextmanager
def start_peer(folder: Path, **settings: Any) -> Iterator[Callable[[str], Any]]:
    """Start the peer, and yield a function that runs a phase there and returns its seconds.

    For the phase `facts`, the function returns the peer's versions and log-probabilities.
    """
    command = [
        sys.executable,
        "-m",
        "cptjax.benchmark.peer_hf",
        json.dumps({"folder": str(folder), **settings}),
    ]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:

        def call(phase: str) -> Any:
            print(phase, file=child.stdin, flush=True)
            line = child.stdout.readline()
            if not line:
                raise OSError(
                    f"the peer ended during {phase!r}; its error is printed above "
                    "(are torch and transformers installed?)"
                )
            return json.loads(line)

        try:
            yield call
        finally:
            child.stdin.close()
            child.terminate()


class HFPeer:
    """The model of transformers, with a method for each phase."""

    def __init__(self, folder: str, device: str, dtype: str, group: int, micro: int, new: int):
        import torch
        import transformers

        self.torch, self.new, self.device = torch, new, device
        config = json.loads((Path(folder) / "config.json").read_text())
        self.model = (
            getattr(transformers, config["architectures"][0])
            .from_pretrained(folder, dtype=getattr(torch, dtype), attn_implementation="sdpa")
            .to(device)
        )
        # None in a model that takes no images.
        self.image_token = getattr(self.model.config, "image_token_id", None)
        given = np.load(Path(folder) / INPUTS_FILE)

        def on_device(x: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(x).to(device)

        def repeated(x: np.ndarray) -> torch.Tensor:
            return on_device(np.repeat(x, group, 0))

        self.prompts = repeated(given["prompts"])
        self.rows = torch.cat([self.prompts, on_device(given["responses"])], 1)
        self.patches = repeated(given["patches"]).to(getattr(torch, dtype))
        self.micro = micro or len(self.rows)
        self.optimizer = None

    def _image_inputs(self, rows: slice) -> dict[str, Any]:
        patches = self.patches[rows]
        if not patches.shape[1]:
            return {}
        side = round(patches.shape[1] ** 0.5)
        grids = self.torch.tensor([[1, side, side]] * len(patches), device=self.device)
        return {"pixel_values": patches.flatten(0, 1), "image_grid_thw": grids}

    def _text_inputs(self, tokens: Any) -> dict[str, Any]:
        inputs = {"input_ids": tokens, "attention_mask": self.torch.ones_like(tokens)}
        if self.image_token is not None:
            inputs["mm_token_type_ids"] = (tokens == self.image_token).int()
        return inputs

    def _logps(self, rows: slice) -> Any:
        """Return the log-probabilities of the new tokens; logits are computed only for these."""
        tokens = self.rows[rows]
        logits = (
            self.model(
                **self._text_inputs(tokens),
                **self._image_inputs(rows),
                logits_to_keep=self.new + 1,
                use_cache=False,
            )
            .logits[:, :-1]
            .float()
        )
        return self.torch.log_softmax(logits, -1).gather(-1, tokens[:, -self.new :, None])[..., 0]

    def _micro_batches(self) -> list[slice]:
        return [slice(i, i + self.micro) for i in range(0, len(self.rows), self.micro)]

    def rollout(self) -> None:
        self.model.eval()
        with self.torch.no_grad():
            self.model.generate(
                **self._text_inputs(self.prompts),
                **self._image_inputs(slice(None)),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                max_new_tokens=self.new,
                min_new_tokens=self.new,
                eos_token_id=None,
                pad_token_id=0,
                use_cache=True,
            )

    def logp(self) -> Any:
        self.model.eval()
        with self.torch.no_grad():
            return self.torch.cat([self._logps(rows) for rows in self._micro_batches()])

    def sft(self) -> None:
        self.model.train()
        if self.optimizer is None:
            self.optimizer = self.torch.optim.AdamW(self.model.parameters(), lr=1e-6, fused=True)
        for rows in self._micro_batches():
            (-self._logps(rows).sum() / (len(self.rows) * self.new)).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def grpo(self) -> None:
        self.rollout()
        self.logp()
        self.sft()

    def timed(self, phase: str) -> float:
        sync = self.torch.cuda.synchronize if self.device == "cuda" else lambda: None
        sync()
        start = time.perf_counter()
        getattr(self, phase)()
        sync()
        return time.perf_counter() - start

    def facts(self) -> dict[str, Any]:
        """Return versions, and log-probabilities to check that both sides do the same work."""
        import transformers

        versions = f"transformers {transformers.__version__}, torch {self.torch.__version__}"
        return {
            "peer": versions,
            "peer_threads": self.torch.get_num_threads(),
            "logps": self.logp().float().cpu().tolist(),
        }


def serve_phases(settings: str) -> None:
    """Run the phase that each line of standard input names, and print one line of JSON."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    peer = HFPeer(**json.loads(settings))
    for line in sys.stdin:
        phase = line.strip()
        print(json.dumps(peer.facts() if phase == "facts" else peer.timed(phase)), flush=True)


if __name__ == "__main__":
    serve_phases(sys.argv[1])

"""What a user would take instead: transformers and torch, on the same weights and inputs, in a process of its own.

The other side writes a checkpoint and `inputs.npz` into a folder; one phase's name a line goes in, its seconds come back. torch is
imported in that process alone.
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
    """A function that has a phase run by the peer and returns what the peer says: its seconds, or facts about itself for `facts`."""
    command = [
        sys.executable,
        "-m",
        "cptjax.benchmark.peer_hf",
        json.dumps({"folder": str(folder), **settings}),
    ]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:

        def ask(phase: str) -> Any:
            print(phase, file=child.stdin, flush=True)
            line = child.stdout.readline()
            if not line:
                raise OSError(
                    f"the peer ended during {phase!r}; its own words stand above (are torch and transformers installed?)"
                )
            return json.loads(line)

        try:
            yield ask
        finally:
            child.stdin.close()
            child.terminate()


class HFPeer:
    """The model of transformers with the four phases."""

    def __init__(self, folder: str, device: str, dtype: str, group: int, micro: int, new: int):
        import torch
        from transformers import Qwen2_5_VLForConditionalGeneration as Model

        self.torch, self.new, self.device = torch, new, device
        self.model = Model.from_pretrained(
            folder, dtype=getattr(torch, dtype), attn_implementation="sdpa"
        ).to(device)
        self.tokens = self.model.config.image_token_id
        given = np.load(Path(folder) / INPUTS_FILE)
        on = lambda x: torch.from_numpy(x).to(device)
        copies = lambda x: on(np.repeat(x, group, 0))
        self.prompts = copies(given["prompts"])
        self.rows = torch.cat([self.prompts, on(given["answers"])], 1)
        self.patches = copies(given["patches"]).to(getattr(torch, dtype))
        self.micro = micro or len(self.rows)
        self.optimizer = None

    def _see(self, rows: slice) -> dict[str, Any]:
        patches = self.patches[rows]
        side = round(patches.shape[1] ** 0.5)
        grids = self.torch.tensor([[1, side, side]] * len(patches), device=self.device)
        return {"pixel_values": patches.flatten(0, 1), "image_grid_thw": grids}

    def _say(self, tokens: Any) -> dict[str, Any]:
        return {
            "input_ids": tokens,
            "attention_mask": self.torch.ones_like(tokens),
            "mm_token_type_ids": (tokens == self.tokens).int(),
        }

    def _logps(self, rows: slice) -> Any:
        """Log-probabilities of the new tokens; logits are made for these alone."""
        tokens = self.rows[rows]
        logits = (
            self.model(
                **self._say(tokens), **self._see(rows), logits_to_keep=self.new + 1, use_cache=False
            )
            .logits[:, :-1]
            .float()
        )
        return self.torch.log_softmax(logits, -1).gather(-1, tokens[:, -self.new :, None])[..., 0]

    def _parts(self) -> list[slice]:
        return [slice(i, i + self.micro) for i in range(0, len(self.rows), self.micro)]

    def rollout(self) -> None:
        self.model.eval()
        with self.torch.no_grad():
            self.model.generate(
                **self._say(self.prompts),
                **self._see(slice(None)),
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
            return self.torch.cat([self._logps(rows) for rows in self._parts()])

    def sft(self) -> None:
        self.model.train()
        if self.optimizer is None:
            self.optimizer = self.torch.optim.AdamW(self.model.parameters(), lr=1e-6, fused=True)
        for rows in self._parts():
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
        """Versions, and the log-probabilities by which the other side sees that both do the same work."""
        import transformers

        versions = f"transformers {transformers.__version__}, torch {self.torch.__version__}"
        return {
            "peer": versions,
            "peer_threads": self.torch.get_num_threads(),
            "logps": self.logp().float().cpu().tolist(),
        }


def serve_phases(settings: str) -> None:
    """Answer each line of standard input with one line of JSON."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    peer = HFPeer(**json.loads(settings))
    for line in sys.stdin:
        phase = line.strip()
        print(json.dumps(peer.facts() if phase == "facts" else peer.timed(phase)), flush=True)


if __name__ == "__main__":
    serve_phases(sys.argv[1])

"""One contender in a process of its own: loads its model, then generates whenever it is told to.

Started by the benchmark as `python -m benchmarks.cpu_disk.contender '{"kind": "from disk", ...}'`.
It answers with one line of JSON when it is ready and one for each line that it gets.
"""

import json
import os
import sys
import time
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

import superpipeline
from superpipeline import disk


@dataclass(frozen=True, kw_only=True)
class Spec:
    """What a contender is.

    Attributes:
        kind: a key of `KINDS`.
        bound: for superpipeline's kinds, what `weights=` gets.
        offload_folder: where accelerate puts its copy of the weights.
        group: a control group (its folder) that the process joins first, to limit its memory.
    """

    kind: str
    folder: str
    bound: str | None = None
    offload_folder: str | None = None
    num_tokens: int
    prompt_tokens: int = 16
    group: str | None = None

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def mapped(spec: Spec) -> Any:
    """The plain model as `from_pretrained` gives it: its weights are the files, mapped."""
    return AutoModelForCausalLM.from_pretrained(spec.folder)


def in_memory(spec: Spec) -> Any:
    """The plain model with every weight copied into memory of its own."""
    model = mapped(spec)
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


def streamed_from_memory(spec: Spec) -> Any:
    """Under the bound, every weight in memory."""
    return superpipeline.stream(in_memory(spec), weights=spec.bound, device="cpu", quiet=True)


def from_disk(spec: Spec) -> Any:
    """Under the bound."""
    return superpipeline.load(spec.folder, weights=spec.bound, device="cpu", quiet=True)


def disk_offload(spec: Spec) -> Any:
    """accelerate's, as its documentation shows it."""
    import accelerate

    assert spec.offload_folder is not None
    return accelerate.disk_offload(mapped(spec), offload_dir=spec.offload_folder)


KINDS = {
    "in memory": in_memory,
    "mapped": mapped,
    "streamed from memory": streamed_from_memory,
    "from disk": from_disk,
    "accelerate.disk_offload": disk_offload,
}


class Contender:
    """A loaded model that generates greedily, with a cache of keys and values."""

    def __init__(self, spec: Spec) -> None:
        self._spec, self._model = spec, KINDS[spec.kind](spec)
        generator = torch.Generator().manual_seed(1)
        vocabulary = self._model.config.vocab_size
        self._ids = torch.randint(3, vocabulary, (1, spec.prompt_tokens), generator=generator)

    def run(self, *, cached: bool) -> dict[str, Any]:
        """Generates once; what it took.

        Unless `cached`, what was read is dropped from the page cache at once, so that all comes
        from the disk: as it is done for files that are larger than memory.
        """
        for file in list(disk._files.values()):
            file.keep_cached = cached
        before, read = self._counts(), storage_bytes()
        begin, cpu = time.perf_counter(), time.process_time()
        output = self._generate(self._spec.num_tokens)
        seconds, cpu_seconds = time.perf_counter() - begin, time.process_time() - cpu
        logits = torch.cat(output.logits).contiguous()
        digest = sha256(logits.view(torch.uint8).numpy().tobytes())
        digest.update(output.sequences.numpy().tobytes())
        return {
            "seconds": seconds,
            "cpu seconds": cpu_seconds,
            "storage bytes": storage_bytes() - read,
            "digest": digest.hexdigest(),
            **{name: value - before[name] for name, value in self._counts().items()},
        }

    def warm_up(self) -> dict[str, Any]:
        """Two short runs: what is learned, allocated and compiled once."""
        for _ in range(2):
            self._generate(2)
        return {"ready": self._spec.kind, "threads": torch.get_num_threads()}

    def _generate(self, num_tokens: int) -> Any:
        return self._model.generate(
            self._ids,
            attention_mask=torch.ones_like(self._ids),
            max_new_tokens=num_tokens, min_new_tokens=num_tokens,
            do_sample=False, use_cache=True, pad_token_id=0,
            return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip

    def _counts(self) -> dict[str, int]:
        if self._spec.bound is None:
            return {}
        stats = superpipeline.handle(self._model).stats()
        return {
            "passes": stats.passes, "fetches": stats.fetches, "late fetches": stats.late_fetches,
            "disk bytes": stats.disk_bytes,
        }  # fmt: skip


def storage_bytes() -> int:
    """What the disk had to give this process so far; not what was cached."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(dict(line.split(": ") for line in lines)["read_bytes"])


def main() -> None:
    spec = Spec(**json.loads(sys.argv[1]))
    if spec.group is not None:
        Path(spec.group, "cgroup.procs").write_text(str(os.getpid()))
    contender = Contender(spec)
    print(json.dumps(contender.warm_up()), flush=True)
    for line in sys.stdin:
        print(json.dumps(contender.run(cached=line.strip() == "cached")), flush=True)


if __name__ == "__main__":
    main()

"""One forward of a model from disk, in a process of its own, and the memory that it took.

Started by tests as `python tests/forward_from_disk.py '{"folder": ..., "weights": ...}'`; the last
line that it prints is JSON.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import re
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any


def join_group(group: str | None) -> None:
    """Moves this process into a control group; what it takes from now on counts there."""
    if group is not None:
        Path(group, "cgroup.procs").write_text(str(os.getpid()))


def anonymous_bytes() -> int:
    """Memory of this process that is no file's."""
    status = Path("/proc/self/status").read_text()
    found = re.search(r"^RssAnon:\s+(\d+) kB$", status, re.MULTILINE)
    assert found, "Linux 4.5 or newer says how much is anonymous"
    return int(found[1]) * 1024


class Peak(threading.Thread):
    """Looks at the anonymous memory every millisecond."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.num_bytes, self.num_looks = anonymous_bytes(), 0
        self._over = threading.Event()

    def run(self) -> None:
        while not self._over.wait(0.001):
            self.num_bytes = max(self.num_bytes, anonymous_bytes())
            self.num_looks += 1

    def stop(self) -> int:
        self._over.set()
        self.join()
        return max(self.num_bytes, anonymous_bytes())


def warm_up() -> None:
    """What grows once in every process: imports, thread pools, caches of kernels."""
    import torch

    import superpipeline
    from model_folder import make_folder

    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        make_folder(Path(folder), chat=False)
        model = superpipeline.load(folder, weights="60%", device="cpu", quiet=True)
        model(torch.arange(8)[None])
        superpipeline.handle(model).close()
    del model
    gc.collect()


def forwards(folder: str, weights: str | None, *, in_memory: bool) -> dict[str, Any]:
    """Two forwards, streamed under the bound `weights`, or plain; the bits that came out."""
    import torch

    import superpipeline

    began = time.perf_counter()
    if weights is None:
        model = plain_model(folder, in_memory=in_memory)
    else:
        model = superpipeline.load(folder, weights=weights, device="cpu", quiet=True)
    ids = torch.arange(1, 5)[None]
    with torch.no_grad():
        results = [model(ids).logits for _ in range(2)]
    found = {
        "digests": [hashlib.sha256(bits(logits)).hexdigest() for logits in results],
        "shape": [*results[0].shape],
        "distinct": len(results[0].unique()),
        "is_finite": bool(results[0].isfinite().all()),
        "threads": torch.get_num_threads(),
        "seconds": time.perf_counter() - began,
    }
    if weights is not None:
        handle = superpipeline.handle(model)
        plan, work = handle.plan, handle.plan.workload
        found |= handle.stats()._asdict() | {
            "bound_bytes": plan.bound_bytes,
            "planned_bytes": plan.streamed_bytes,
            "weight_bytes": plan.weight_bytes,
            "rows_bytes": sum(work.weights[i].num_bytes for i in work.rows - plan.resident),
            "host_bytes": handle.host_bytes,
        }
        handle.close()
    return found


def plain_model(folder: str, *, in_memory: bool) -> Any:
    """Where nothing is converted, transformers maps the files; `in_memory` copies the weights."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    if in_memory:
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
    return model


def bits(tensor: Any) -> bytes:
    import torch

    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def main() -> None:
    asked = json.loads(sys.argv[1])
    join_group(asked.get("group"))
    warm_up()
    before, peak = anonymous_bytes(), Peak()
    peak.start()
    found = forwards(asked["folder"], asked.get("weights"), in_memory=asked.get("in_memory", False))
    grown = peak.stop() - before
    print(json.dumps(found | {"before": before, "grown": grown, "looks": peak.num_looks}))


if __name__ == "__main__":
    main()

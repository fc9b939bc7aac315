"""Each tool in a few lines: the same model from the host, a budget in bytes, and a model to call.

The settings are those that a tool's own documentation recommends for speed; each row of the results
keeps them as text. A tool that has a knob for memory turns it to the most that should fit the
budget; what it really took is measured.
"""

from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import nn

from benchmarks.peers import dfloat11
from benchmarks.peers.workloads import BLOCK_LISTS, weight_bytes

MIB, GIB = 2**20, 2**30


class Job(NamedTuple):
    """What a tool gets.

    Attributes:
        model: on the host, in ordinary memory.
        name: which model it is.
        budget_bytes: device memory for weights.
        activation_bytes: device memory that the plain run took beside its weights.
    """

    model: nn.Module
    name: str
    device: torch.device
    budget_bytes: int
    activation_bytes: int


class Ready(NamedTuple):
    """A model to call, the settings used, and how to go on to another budget.

    Attributes:
        again: sets the same model up for another budget; None if it has to be built anew.
        weight_bytes: device bytes of weights, where the tool says so itself.
    """

    model: nn.Module
    settings: str
    again: Callable[[Job], "Ready"] | None = None
    weight_bytes: int | None = None


class Contender(NamedTuple):
    """A tool.

    Attributes:
        package: whose version is written down; empty for PyTorch alone.
        module: imported before the clock of the set-up starts.
        has_budget: whether it can be told how much memory to take.
        warm_ups: passes before it runs as it will.
        alone: whether each budget and workload needs a process of its own.
    """

    set_up: Callable[[Job], Ready]
    package: str = ""
    module: str = ""
    has_budget: bool = True
    warm_ups: int = 2
    alone: bool = False


def resident(job: Job) -> Ready:
    return Ready(job.model.to(job.device), "model.to(device)", weight_bytes=weight_bytes(job.model))


def ours(job: Job) -> Ready:
    import superpipeline

    superpipeline.stream(job.model, weights=job.budget_bytes, device=job.device, quiet=True)
    plan = superpipeline.handle(job.model).plan
    return Ready(job.model, f"stream(weights={job.budget_bytes})", ours, plan.device_bytes)


# ---- accelerate ---------------------------------------------------------------------------------


def device_map(job: Job) -> Ready:
    """What `from_pretrained(device_map="auto", max_memory=...)` does."""
    from accelerate import dispatch_model, infer_auto_device_map
    from accelerate.hooks import remove_hook_from_submodules

    model = job.model
    mapped = infer_auto_device_map(
        model, max_memory={0: job.budget_bytes, "cpu": 1000 * GIB},
        no_split_module_classes=list(model._no_split_modules or []),
    )  # fmt: skip
    dispatch_model(model, mapped, skip_keys=getattr(model, "_skip_keys_device_placement", None))

    def again(other: Job) -> Ready:
        remove_hook_from_submodules(model)
        model.to("cpu")
        return device_map(other)

    settings = f"infer_auto_device_map(max_memory={{0: {job.budget_bytes}}}), dispatch_model"
    return Ready(model, settings, again)


def cpu_offload(job: Job) -> Ready:
    import accelerate

    accelerate.cpu_offload(job.model, execution_device=job.device)
    return Ready(job.model, "cpu_offload(model, execution_device)")


# ---- diffusers ----------------------------------------------------------------------------------


def groups(job: Job, **options: Any) -> Ready:
    """Group offloading, pinned ahead; `exclude_kwargs` is for caches, which keep their identity."""
    from diffusers.hooks import apply_group_offloading

    if job.device.type == "cuda":
        options |= {"use_stream": True}
    else:
        options["record_stream"] = False
    if job.name == "llama":
        options |= {"exclude_kwargs": ["past_key_values"]}
    target = job.model
    if job.name == "llama" and options["offload_type"] == "block_level":
        # With block_modules= it hooks the inner model twice, and its second call raises that
        # "layer_execution_tracker already exists". So the inner model alone; the head resides.
        target = job.model.model
        job.model.lm_head.to(job.device)
    apply_group_offloading(
        target, onload_device=job.device, offload_device=torch.device("cpu"),
        non_blocking=True, low_cpu_mem_usage=False, **options,
    )  # fmt: skip
    return Ready(job.model, f"apply_group_offloading(non_blocking=True, {_written(options)})")


def block_groups(job: Job) -> Ready:
    return groups(job, offload_type="block_level", num_blocks_per_group=1, record_stream=True)


def block_groups_waiting(job: Job) -> Ready:
    return groups(job, offload_type="block_level", num_blocks_per_group=1, record_stream=False)


def leaf_groups(job: Job) -> Ready:
    return groups(job, offload_type="leaf_level", record_stream=True)


# ---- cache-dit ----------------------------------------------------------------------------------


def cache_dit(job: Job) -> Ready:
    """Two transfer buckets and copy streams and an inflight limit, as its guide's example has; the
    rest of the budget as persistent targets, in one bin for each block."""
    from cache_dit.offload import layerwise_offload

    targets = [
        sum(t.nbytes for t in (*m.parameters(recurse=False), *m.buffers(recurse=False)))
        for m in job.model.modules()
        if not [*m.children()] and [*m.parameters(recurse=False), *m.buffers(recurse=False)]
    ]
    inflight = (2 if job.budget_bytes >= 6 * GIB else 1) * GIB
    bins = len(blocks_of(job))
    kept = _most_persistent(targets, bins, job.budget_bytes - inflight)
    options = {"persistent_buckets": kept, "persistent_bins": bins}
    if job.device.type == "cuda":
        options |= {
            "async_transfer": True, "transfer_buckets": 2, "max_copy_streams": 2,
            "max_inflight_prefetch_bytes": inflight,
        }  # fmt: skip
    handle = layerwise_offload(job.model, onload_device=job.device, **options)

    def again(other: Job) -> Ready:
        handle.remove(offload=True)
        return cache_dit(other)

    return Ready(job.model, f"layerwise_offload({_written(options)})", again)


def _most_persistent(targets: list[int], bins: int, room: int) -> int:
    """How many persistent targets fit: dealt out to the bins in turn, each from its beginning."""
    edges = [index * len(targets) // bins for index in range(bins + 1)]
    spans = [targets[begin:end] for begin, end in pairwise(edges)]
    turns = range(max(map(len, spans)))
    order = [span[turn] for turn in turns for span in spans if turn < len(span)]
    kept = 0
    for num_bytes in order:
        room -= num_bytes
        if room < 0:
            break
        kept += 1
    return kept


# ---- RamTorch -----------------------------------------------------------------------------------


class Chunk(nn.Module):
    """A block as RamTorch wants it: positional tensors in and out, the rest from `shared`."""

    def __init__(self, block: nn.Module, shared: dict[str, Any]) -> None:
        super().__init__()
        self.block = block
        self.shared = shared

    def forward(self, hidden: torch.Tensor, text: torch.Tensor | None = None) -> Any:
        if text is None:
            return self.block(hidden, **self.shared)
        text, hidden = self.block(hidden_states=hidden, encoder_hidden_states=text, **self.shared)
        return hidden, text


class Chain(nn.Module):
    """Stands in the model for all of its blocks and runs them through RamTorch."""

    def __init__(self, blocks: Iterable[nn.Module], **options: Any) -> None:
        super().__init__()
        from ramtorch import OffloadModel

        self.shared: dict[str, Any] = {}
        self.engine = OffloadModel([Chunk(block, self.shared) for block in blocks], **options)

    def forward(self, hidden_states: torch.Tensor, **others: Any) -> Any:
        text = others.pop("encoder_hidden_states", None)
        self.shared.clear()
        self.shared.update(others)
        if text is None:
            return self.engine(hidden_states)
        hidden, text = self.engine((hidden_states, text))
        return text, hidden


def ramtorch(job: Job) -> Ready:
    """A window of two chunks, its default and advice; the rest of the budget as pinned chunks.

    What lies outside the blocks stays on the device.
    """
    from ramtorch.offload_simulator import evenly_pinned

    blocks = blocks_of(job)
    sizes = [weight_bytes(block) for block in blocks]
    outside = weight_bytes(job.model) - sum(sizes)

    def chunks_that_fit(other: Job) -> int:
        room = other.budget_bytes - outside - 2 * max(sizes)
        taken = (sum(sizes[i] for i in evenly_pinned(len(sizes), n)) for n in range(len(sizes)))
        return max((n for n, num_bytes in enumerate(taken) if num_bytes <= room), default=0)

    for name in BLOCK_LISTS[job.name]:
        job.model.set_submodule(name, nn.ModuleList())
    job.model.to(job.device)
    chain = Chain(blocks, device=job.device, window=2, pin=chunks_that_fit(job)).eval()
    job.model.set_submodule(BLOCK_LISTS[job.name][0], nn.ModuleList([chain]))

    def again(other: Job) -> Ready:
        chain.engine.set_pinned(chunks_that_fit(other))
        return described(other)

    def described(other: Job) -> Ready:
        settings = f"OffloadModel(chunks, window=2, pin={chunks_that_fit(other)})"
        return Ready(job.model, settings, again)

    return described(job)


# ---- later: FlexTensor, mmgp, DFloat11 ----------------------------------------------------------


def flextensor(job: Job) -> Ready:
    """The blocks are offloaded, the rest stays; its memory mode bounds the peak of everything."""
    import flextensor as library

    total = torch.cuda.get_device_properties(job.device).total_memory
    options = {
        "include_patterns": [f"{name}.*" for name in BLOCK_LISTS[job.name]],
        "max_gpu_mem_fraction": min(1.0, (job.budget_bytes + job.activation_bytes) / total),
    }
    inside = {id(p) for block in blocks_of(job) for p in block.parameters()}
    for tensor in (*job.model.parameters(), *job.model.buffers()):
        if id(tensor) not in inside:
            tensor.data = tensor.data.to(job.device)
    model = library.offload(job.model, config=library.OffloadConfig(**options))
    return Ready(model, f"OffloadConfig({_written(options)})")


def mmgp(job: Job) -> Ready:
    """Pinned, asynchronous, not quantized."""
    from mmgp import offload

    options = {
        "pinnedMemory": True, "asyncTransfers": True, "quantizeTransformer": False,
        "perc_reserved_mem_max": 0.9, "budgets": {"transformer": job.budget_bytes // MIB},
    }  # fmt: skip
    offload.all({"transformer": job.model}, verboseLevel=0, **options)
    return Ready(job.model, f"offload.all({_written(options)})")


def dfloat11_resident(job: Job) -> Ready:
    return Ready(dfloat11.compress(job.model, job.name, job.device), "device=cuda")


def dfloat11_offload(job: Job) -> Ready:
    model = dfloat11.compress(job.model, job.name, job.device, cpu_offload=True)
    return Ready(model, "cpu_offload=True, pin_memory=True")


def blocks_of(job: Job) -> list[nn.Module]:
    """The repeated blocks, in order."""
    return [
        block
        for name in BLOCK_LISTS[job.name]
        for block in job.model.get_submodule(name).children()
    ]


def _written(options: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in options.items())


CONTENDERS = {
    "resident": Contender(resident, has_budget=False, warm_ups=8),  # the clocks settle
    "superpipeline": Contender(ours, "superpipeline", "superpipeline"),
    "accelerate-map": Contender(device_map, "accelerate", "accelerate"),
    "accelerate-cpu-offload": Contender(
        cpu_offload, "accelerate", "accelerate", has_budget=False, warm_ups=1
    ),
    "diffusers-blocks": Contender(block_groups, "diffusers", "diffusers.hooks", has_budget=False),
    "diffusers-blocks-waiting": Contender(
        block_groups_waiting, "diffusers", "diffusers.hooks", has_budget=False
    ),
    "diffusers-leaves": Contender(leaf_groups, "diffusers", "diffusers.hooks", has_budget=False),
    "cache-dit": Contender(cache_dit, "cache-dit", "cache_dit.offload"),
    "ramtorch": Contender(ramtorch, "ramtorch", "ramtorch"),
    "dfloat11": Contender(dfloat11_resident, "dfloat11", has_budget=False),
    "dfloat11-offload": Contender(dfloat11_offload, "dfloat11", has_budget=False),
    "flextensor": Contender(flextensor, "flextensor", "flextensor", warm_ups=14, alone=True),
    "mmgp": Contender(mmgp, "mmgp", "mmgp.offload", alone=True),
}
FIRST_TABLE = tuple(list(CONTENDERS)[:11])

"""Loading without reading: the bytes that come out are those that the plain loader makes."""

import copy
import gc
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import core_model_loading as conversions
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from superpipeline import recipes
from superpipeline.computed import Computed, Gather, Held, Slice
from superpipeline.disk import DiskFile, Piece, locate
from superpipeline.gather import reading_lazily
from zoo import multimodal, text, vision

BLOCKS = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
ENCODER = {name: value for name, value in BLOCKS.items() if name != "num_key_value_heads"}
QWEN = BLOCKS | {"moe_intermediate_size": 128, "num_experts": 4, "num_experts_per_tok": 2}
DEEPSEEK = BLOCKS | {
    "moe_intermediate_size": 128,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
LATENT = {
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
}
# Their experts are separate on disk and one tensor in the model.
FUSED = {
    "MixtralForCausalLM": BLOCKS | {"num_local_experts": 4},
    "MiniMaxForCausalLM": BLOCKS
    | {
        "num_local_experts": 4,
        "head_dim": 16,
        "layer_types": ["full_attention", "linear_attention"],
        "block_size": 8,
    },
    "PhimoeForCausalLM": BLOCKS | {"num_local_experts": 4},
    "Qwen2MoeForCausalLM": QWEN | {"shared_expert_intermediate_size": 128},
    "Qwen3MoeForCausalLM": QWEN | {"head_dim": 16},
    "Qwen3NextForCausalLM": QWEN
    | {
        "head_dim": 16,
        "shared_expert_intermediate_size": 64,
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
    },
    "OlmoeForCausalLM": QWEN,
    "Lfm2MoeForCausalLM": QWEN | {"num_dense_layers": 1, "layer_types": ["conv", "full_attention"]},
    "DeepseekV3ForCausalLM": DEEPSEEK | LATENT | {"n_shared_experts": 1, "num_key_value_heads": 4},
    "DeepseekV4ForCausalLM": DEEPSEEK | LATENT | {"head_dim": 16},
    "Glm4MoeForCausalLM": DEEPSEEK | {"n_shared_experts": 1, "head_dim": 16},
    "Dots1ForCausalLM": DEEPSEEK | {"n_shared_experts": 1},
    "Ernie4_5_MoeForCausalLM": BLOCKS
    | {
        "moe_intermediate_size": 128,
        "moe_num_experts": 4,
        "moe_k": 2,
        "moe_num_shared_experts": 1,
        "moe_layer_start_index": 0,
    },
    "JambaForCausalLM": BLOCKS
    | {
        "num_experts": 4,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "use_mamba_kernels": False,
        "mamba_d_state": 8,
        "mamba_dt_rank": 4,
    },
    "NemotronHForCausalLM": BLOCKS
    | {
        "n_routed_experts": 4,
        "moe_intermediate_size": 128,
        "hybrid_override_pattern": "*EM",
        "num_hidden_layers": 3,
        "ssm_state_size": 8,
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "n_groups": 1,
        "head_dim": 16,
        "n_shared_experts": 1,
        "moe_shared_expert_intermediate_size": 64,
    },
}
# Stored as the model has them, or split as they are loaded.
OTHER = {
    "GptOssForCausalLM": BLOCKS | {"num_local_experts": 4, "head_dim": 16},
    "Llama4ForCausalLM": BLOCKS
    | {
        "num_local_experts": 4,
        "intermediate_size_mlp": 128,
        "head_dim": 16,
        "moe_layers": [0, 1],
    },
    "GraniteMoeForCausalLM": BLOCKS | {"num_local_experts": 4},
    "NomicBertModel": ENCODER,
    "JinaEmbeddingsV3Model": ENCODER,
}
ZOO = [case for case in (*text.CASES, *vision.CASES, *multimodal.CASES) if not case.stateful]
HOW = {
    "single": ({}, "auto"),
    "sharded": ({"max_shard_size": "100KB"}, "auto"),
    "float16": ({"max_shard_size": "100KB"}, torch.float16),
    "float64": ({}, torch.float64),
}


@pytest.fixture(autouse=True)
def _quiet_loader():
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def bytes_of(tensor):
    """Row by row."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def stored_bytes(sources, most=None):
    """What the sources give, whole or in parts."""
    gather = Gather.of(sources)
    if most is None:
        return gather.read()
    memory, start = torch.empty(gather.num_bytes, dtype=torch.uint8), 0
    for source in sources:
        end = 0
        for begin, part in source.parts(most):
            assert begin == end
            end = begin + part.num_bytes
            part.read_into(memory[start + begin : start + end])
        assert end == source.num_bytes
        start += end
    return memory


def sources_of(parameter):
    """Those of a stand-in, or None."""
    stored = locate(parameter)
    return None if stored is None or stored.is_mapped else stored.sources


def tensors_in(folder):
    files = [DiskFile(path) for path in sorted(Path(folder).glob("*.safetensors"))]
    return {name: tensor for file in files for name, tensor in file.tensors.items()}


def load(kind, folder, dtype):
    config = kind.config_class.from_pretrained(folder)
    with reading_lazily() as lazily:
        model = kind.from_pretrained(
            None, config=config, state_dict=tensors_in(folder), dtype=dtype
        )
        return lazily.finish(model)


def assert_same(plain, mine):
    for (name, expected), (other, parameter) in zip(
        plain.named_parameters(), mine.named_parameters(), strict=True
    ):
        assert name == other
        assert parameter.dtype == expected.dtype, name
        assert parameter.size() == expected.size(), name
        assert parameter.requires_grad == expected.requires_grad, name
        if (sources := sources_of(parameter)) is None:
            assert torch.equal(bytes_of(parameter), bytes_of(expected)), name
            assert parameter.stride() == expected.stride(), name
            assert parameter.data_ptr() % 64 == expected.data_ptr() % 64, name
            continue
        assert locate(parameter).stride == expected.stride(), name
        assert torch.equal(stored_bytes(sources), bytes_of(expected)), name
        assert torch.equal(stored_bytes(sources, 3000), bytes_of(expected)), name
    for (name, expected), (other, buffer) in zip(
        plain.named_buffers(), mine.named_buffers(), strict=True
    ):
        assert name == other
        assert torch.equal(buffer, expected), name


def check(model, folder, how):
    options, dtype = HOW[how]
    model.save_pretrained(folder, **options)
    plain = type(model).from_pretrained(folder, dtype=dtype)
    mine = load(type(model), folder, dtype)
    assert_same(plain, mine)
    return mine


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("case", ZOO, ids=lambda case: case.name)
def test_a_model_of_the_zoo_loads_with_the_bytes_of_the_plain_loader(case, how, tmp_path):
    check(case.build(), tmp_path, how)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("name", FUSED | OTHER)
def test_a_model_that_is_converted_loads_with_the_bytes_of_the_plain_loader(name, how, tmp_path):
    kind = getattr(transformers, name)
    mine = check(kind(kind.config_class(**(FUSED | OTHER)[name])), tmp_path, how)
    if name not in FUSED:
        return
    experts = [
        parameter
        for name, parameter in mine.named_parameters()
        if name.endswith(("experts.gate_up_proj", "experts.up_proj", "experts.down_proj"))
    ]
    assert experts
    for parameter in experts:
        kinds = {type(source) for source in sources_of(parameter)}
        assert kinds == ({Piece} if HOW[how][1] == "auto" else {Computed})


# ---- memory -------------------------------------------------------------------------------------

MEASURE = """
import json, sys, threading
from pathlib import Path
import transformers
from superpipeline.disk import DiskFile
from superpipeline.gather import reading_lazily

def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))

def growth(kind, folder, dtype):
    config = kind.config_class.from_pretrained(folder)
    files = [DiskFile(path) for path in sorted(Path(folder).glob("*.safetensors"))]
    tensors = {name: tensor for file in files for name, tensor in file.tensors.items()}
    before, seen, done = anonymous(), [0], threading.Event()
    def watch():
        while not done.wait(0.001):
            seen.append(anonymous())
    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        with reading_lazily() as lazily:
            model = kind.from_pretrained(None, config=config, state_dict=tensors, dtype=dtype)
            lazily.finish(model)
    finally:
        done.set()
        watcher.join()
    weights = sum(parameter.numel() * parameter.itemsize for parameter in model.parameters())
    return max(*seen, anonymous()) - before, weights

names, folders = sys.argv[1::2], sys.argv[2::2]
for name, folder in zip(names, folders):
    for dtype in ("float32", "bfloat16"):
        print(json.dumps([name, dtype, *growth(getattr(transformers, name), folder, dtype)]))
"""


def test_loading_takes_next_to_no_memory(tmp_path):
    sizes = {"hidden_size": 768, "intermediate_size": 768, "moe_intermediate_size": 768}
    counts = {"num_local_experts": 8, "num_experts": 8, "num_hidden_layers": 4}
    command = [sys.executable, "-c", MEASURE]
    for name in ("MixtralForCausalLM", "Qwen3MoeForCausalLM"):
        kind = getattr(transformers, name)
        model = kind(kind.config_class(**(FUSED[name] | sizes | counts)))
        model.save_pretrained(tmp_path / name, max_shard_size="100MB")
        command += [name, str(tmp_path / name)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = [json.loads(line) for line in output.splitlines() if line.startswith("[")]
    assert len(found) == 4
    for name, dtype, peak, weights in found:
        assert weights > (200 if dtype == "float32" else 100) * 2**20
        # The model's objects and small weights; a plain load grows by all the weights and more.
        assert peak < 16 * 2**20, (name, dtype, peak)


# ---- the algebra --------------------------------------------------------------------------------

SHAPES = [(4, 6), (6, 4), (2, 4, 6), (24,), (3, 2, 4, 2)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int32]


@pytest.fixture
def _fast_collection():
    """Each end of `reading_lazily` may collect cycles; what was imported is not worth a look."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def small_file(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("algebra") / "small.safetensors"
    tensors = {
        f"{index}.{dtype}": (torch.randint(0, 100, shape) / 8).to(dtype)
        for index, shape in enumerate(SHAPES)
        for dtype in DTYPES
    }
    save_file(tensors, path)
    return path


def unary_steps(tensor):
    """Functions that make a tensor of one like `tensor`; what they need is drawn by `draw`."""
    steps = [
        lambda t, draw: t.clone(),
        lambda t, draw: t.contiguous(),
        lambda t, draw: t.clone(memory_format=torch.contiguous_format),
        lambda t, draw: t.to(draw(st.sampled_from(DTYPES[:4]))),
        lambda t, draw: t.reshape(-1),
        lambda t, draw: t.unsqueeze(draw(st.integers(0, t.dim()))),
        lambda t, draw: t * 0.5,
        lambda t, draw: -t,
        lambda t, draw: t / 3,
        lambda t, draw: t.amax(),
        lambda t, draw: t.tanh(),
        lambda t, draw: t.expand(2, *t.shape),
    ]
    if tensor.dim():
        steps += [
            lambda t, draw: t.permute(draw(st.permutations(range(t.dim())))),
            narrowed,
            chunked,
            lambda t, draw: t.flip(draw(st.integers(0, t.dim() - 1))),
            indexed,
            lambda t, draw: t.select(draw(st.integers(0, t.dim() - 1)), 0),
            lambda t, draw: t[..., ::2],
            lambda t, draw: torch.nn.functional.pad(t, (1, 2)),
        ]
    return steps


def narrowed(t, draw):
    dim = draw(st.integers(0, t.dim() - 1))
    begin = draw(st.integers(0, t.shape[dim] - 1))
    return t.narrow(dim, begin, draw(st.integers(1, t.shape[dim] - begin)))


def chunked(t, draw):
    dim, number = draw(st.integers(0, t.dim() - 1)), draw(st.integers(1, 4))
    chunks = t.chunk(number, dim)
    return chunks[draw(st.integers(0, len(chunks) - 1))]


def indexed(t, draw):
    dim = draw(st.integers(0, t.dim() - 1))
    rows = draw(st.lists(st.integers(0, t.shape[dim] - 1), min_size=1, max_size=5))
    return t.index_select(dim, torch.tensor(rows))


def joined(pool, draw):
    """cat or stack of tensors that fit, or a sum or product of two that broadcast."""
    first = draw(st.integers(0, len(pool) - 1))
    same = [i for i, t in enumerate(pool) if t.shape == pool[first].shape]
    chosen = [first, *draw(st.lists(st.sampled_from(same), max_size=3))]
    how = draw(st.sampled_from(["cat", "stack", "add", "mul", "where"]))
    dim = draw(st.integers(0, max(0, pool[first].dim() - (how == "cat"))))
    if how == "cat" and pool[first].dim():
        return lambda tensors: torch.cat([tensors[i] for i in chosen], dim)
    if how == "stack":
        return lambda tensors: torch.stack([tensors[i] for i in chosen], dim)
    if how == "where":
        return lambda tensors: torch.where(tensors[first] > 1, tensors[chosen[-1]], tensors[first])
    combine = torch.add if how == "add" else torch.mul
    row = (0,) if pool[first].dim() else ()
    return lambda tensors: combine(tensors[first] * 0.005, tensors[chosen[-1]][row])


class Recorded:
    """Draws once, then gives the same again: both sides shall do the same."""

    def __init__(self, draw):
        self.draw, self.drawn, self.at = draw, [], None

    def __call__(self, strategy):
        if self.at is None:
            self.drawn.append(self.draw(strategy))
            return self.drawn[-1]
        self.at += 1
        return self.drawn[self.at - 1]


def random_step(pool, data):
    """A function of a pool of tensors that makes one more."""
    if data.draw(st.booleans()):
        return joined(pool, data.draw)
    index = data.draw(st.integers(0, len(pool) - 1))
    which = data.draw(st.integers(0, len(unary_steps(pool[index])) - 1))
    recorded = Recorded(data.draw)

    def step(tensors):
        result = unary_steps(tensors[index])[which](tensors[index], recorded)
        recorded.at = 0
        return result

    return step


@pytest.mark.usefixtures("_fast_collection")
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_tree_of_operations_gives_the_bits_of_the_plain_one(small_file, data):
    shortest = data.draw(st.sampled_from([1, 16, 64, 10**6]))
    most = data.draw(st.sampled_from([7, 64, 10**6]))
    file = DiskFile(small_file)
    names = data.draw(st.lists(st.sampled_from(sorted(file.tensors)), min_size=1, max_size=3))
    plain = [file.tensors[name].clone() for name in names] + [torch.arange(24.0).view(4, 6)]
    lazy = [file.tensors[name] for name in names] + [plain[-1].clone()]
    steps = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipes, "_SHORTEST_RUN", shortest)
        for _ in range(data.draw(st.integers(1, 8))):
            step = random_step(plain, data)
            result = step(plain)
            if result.numel() <= 500:
                steps.append(step)
                plain.append(result)
        with reading_lazily() as lazily:
            for step in steps:
                lazy.append(step(lazy))
            for tensor, expected in zip(lazy, plain, strict=True):
                operand = lazily._operand(tensor)
                if operand is not None:
                    assert torch.equal(bytes_of(operand.read()), bytes_of(expected))
                    held = stored_bytes(operand.gather.sources, most)
                    again = held.view(tensor.dtype).as_strided(tensor.size(), tensor.stride())
                    assert torch.equal(bytes_of(again), bytes_of(expected))
    for tensor, expected in zip(lazy, plain, strict=True):
        assert tensor.dtype == expected.dtype
        assert tensor.stride() == expected.stride()
        assert torch.equal(bytes_of(tensor), bytes_of(expected))


# ---- the conversions of transformers ------------------------------------------------------------

QKV, GATE, UP, DOWN = "attn.qkv", "experts.*.gate", "experts.*.up", "experts.down"


class Config:
    num_attention_heads = 4


def convert(operations, tensors, targets):
    """What the library does with the tensors of one WeightConverter."""
    sources = list(tensors)
    for operation in operations:
        tensors = operation.convert(
            tensors, source_patterns=sources, target_patterns=targets, config=Config()
        )
    return {name: value[0] if isinstance(value, list) else value for name, value in tensors.items()}


CONVERSIONS = {
    "merge": ([conversions.MergeModulelist(0)], {GATE: 4}, [DOWN], Piece),
    "merge and join": (
        [conversions.MergeModulelist(0), conversions.Concatenate(1)],
        {GATE: 4, UP: 4},
        [DOWN],
        Piece,
    ),
    "join rows": ([conversions.Concatenate(0)], {"q": 1, "k": 1, "v": 1}, [QKV], Piece),
    "join columns": ([conversions.Concatenate(1)], {"q": 1, "k": 1}, [QKV], Computed),
    "chunk rows": ([conversions.Chunk(0)], {QKV: 1}, ["q", "k", "v"], Piece),
    "chunk columns": ([conversions.Chunk(1)], {QKV: 1}, ["q", "k"], Computed),
    "transpose": ([conversions.Transpose(0, 1)], {QKV: 1}, ["q"], Computed),
    "interleave rows": ([conversions.Interleave(0)], {QKV: 1}, ["q"], Computed),
    "interleave and chunk": (
        [conversions.Interleave(0), conversions.Chunk(0)],
        {QKV: 1},
        ["q", "k"],
        Computed,
    ),
    "interleave columns": ([conversions.Interleave(1)], {QKV: 1}, ["q"], Computed),
    "permute for rope": (
        [conversions.Chunk(0), conversions.PermuteForRope(permute_layer_names=["q", "k"])],
        {QKV: 1},
        ["q", "k", "v"],
        None,
    ),
    "split experts in two": (
        [conversions.ErnieFuseAndSplitTextVisionExperts()],
        {GATE: 4, UP: 4},
        ["text", "vision"],
        Piece,
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CONVERSIONS)
def test_a_conversion_of_transformers_gives_the_bytes_of_the_plain_one(name, dtype, tmp_path):
    operations, counts, targets, kind = CONVERSIONS[name]
    names = {source: [f"{source}{i}" for i in range(n)] for source, n in counts.items()}
    given = {key: torch.randn(192, 96) for keys in names.values() for key in keys}
    save_file(given, tmp_path / "model.safetensors")
    stored = tensors_in(tmp_path)
    before = {source: [given[key].to(dtype) for key in keys] for source, keys in names.items()}
    plain = convert(operations, before, targets)
    with reading_lazily() as lazily:
        found = {source: [stored[key].to(dtype) for key in keys] for source, keys in names.items()}
        made = convert(operations, found, targets)
        for key, tensor in made.items():
            operand = lazily._operand(tensor)
            kinds = {type(source) for source in operand.gather.sources}
            expected = Computed if dtype != torch.float32 else kind
            assert kinds == {expected} or (kind is None and kinds <= {Piece, Computed})
            assert torch.equal(bytes_of(operand.read()), bytes_of(plain[key]))
    assert made.keys() == plain.keys()
    for key, tensor in made.items():
        assert tensor.stride() == plain[key].stride()
        assert torch.equal(bytes_of(tensor), bytes_of(plain[key]))


def test_weights_of_8_bits_are_scaled_when_they_are_read(tmp_path):
    weights = {
        "weight": torch.randn(256, 256).to(torch.float8_e4m3fn),
        "scale": torch.rand(2, 2),
    }
    save_file(weights, tmp_path / "model.safetensors")
    operation = Fp8Dequantize(None)

    def scaled(tensors):
        given = {"weight$": [tensors["weight"]], "weight_scale_inv": [tensors["scale"]]}
        return operation.convert(given)["weight"]

    with reading_lazily() as lazily:
        made = scaled(tensors_in(tmp_path))
        (source,) = lazily._operand(made).gather.sources
    assert isinstance(source, Computed)
    assert len(list(source.parts(1))) == 2  # rows of scales
    assert torch.equal(bytes_of(made), bytes_of(scaled(weights)))


def test_a_large_cast_is_read_in_parts(tmp_path):
    save_file({"x": torch.randn(1024, 1024)}, tmp_path / "model.safetensors")
    x = tensors_in(tmp_path)["x"]
    with reading_lazily() as lazily:
        (source,) = lazily._operand(x.to(torch.bfloat16)).gather.sources
    assert source.num_bytes == 2 * 2**20
    assert source.working_bytes == 4 * 2**20
    parts = [part for _, part in source.parts(64 * 2**10)]
    assert [part.num_bytes for part in parts] == [64 * 2**10] * 32
    assert {part.working_bytes for part in parts} == {128 * 2**10}


def test_transposed_experts_are_read_expert_by_expert(tmp_path):
    save_file({"x": torch.randn(8, 64, 128)}, tmp_path / "model.safetensors")
    x = tensors_in(tmp_path)["x"]
    with reading_lazily() as lazily:
        made = x.transpose(1, 2).contiguous()
        (source,) = lazily._operand(made).gather.sources
    one = 64 * 128 * 4
    assert [part.num_bytes for _, part in source.parts(one)] == [one] * 8
    assert {part.working_bytes for _, part in source.parts(one)} == {one}
    assert torch.equal(made, x.transpose(1, 2))


def test_rows_are_found_in_a_result_that_has_one_row(tmp_path):
    """A dimension of size 1 in front is none to divide along, and moves those that are named."""
    save_file({"x": torch.randn(1, 8, 4, 6)}, tmp_path / "model.safetensors")
    x = tensors_in(tmp_path)["x"]
    with reading_lazily() as lazily:
        made = torch.cat([x, x], 2)
        (source,) = lazily._operand(made).gather.sources
    assert source.size == (8, 8, 6)
    assert len(list(source.parts(1))) == 8
    assert torch.equal(made, torch.cat([x, x], 2))


def test_a_matrix_that_is_transposed_is_not_read_once_for_each_part(tmp_path):
    save_file({"x": torch.randn(256, 256)}, tmp_path / "model.safetensors")
    x = tensors_in(tmp_path)["x"]
    with reading_lazily() as lazily:
        made = x.t().contiguous()
        (source,) = lazily._operand(made).gather.sources
        (cast,) = lazily._operand(made.half()).gather.sources
    assert list(source.parts(1024)) == [(0, source)]
    assert list(cast.parts(1024)) == [(0, cast)]


# ---- operations that cannot wait ----------------------------------------------------------------


@pytest.fixture
def stored(tmp_path):
    """float32 `a` and `b`, equal, of 128 KiB; int64 `n`; and their values in memory."""
    torch.manual_seed(1)
    values = {"a": torch.randn(128, 256), "n": torch.arange(20000)}
    values["b"] = values["a"].clone()
    save_file(values, tmp_path / "model.safetensors")
    return tensors_in(tmp_path), values


def test_numbers_are_read_at_once(stored):
    tensors, values = stored
    with reading_lazily():
        cast = tensors["a"].to(torch.float64)
        assert cast[3, 4].item() == values["a"][3, 4].double().item()
        assert cast.sum().item() == values["a"].double().sum().item()
        assert cast[0, :3].tolist() == values["a"][0, :3].double().tolist()
        assert (cast.numpy() == values["a"].double().numpy()).all()
        assert float(cast.max()) == float(values["a"].max())
        assert torch.equal(cast[cast > 0], values["a"].double()[values["a"] > 0])
        assert torch.equal(tensors["a"][values["a"] > 0], values["a"][values["a"] > 0])


def test_complex_weights_are_conjugated(tmp_path):
    values = torch.randn(40, 50, dtype=torch.complex64)
    save_file({"z": values}, tmp_path / "model.safetensors")
    z = tensors_in(tmp_path)["z"]

    def made(z):
        joined = torch.cat([z, z])
        return [joined.conj().clone(), torch.cat([z.conj(), z]), joined.conj().imag.clone()]

    with reading_lazily():
        found = made(z)
    for tensor, expected in zip(found, made(values), strict=True):
        assert torch.equal(tensor, expected)


@pytest.mark.parametrize("changes", [{"device": torch.device("cuda")}, {"pin_memory": True}])
def test_what_is_for_a_device_is_made_at_once(changes):
    cast = {"dtype": torch.float16}
    copy = torch.ops.aten._to_copy.default
    assert recipes.result_of(recipes.Call.of(copy, (torch.ones(3),), cast)) is not None
    assert recipes.result_of(recipes.Call.of(copy, (torch.ones(3),), cast | changes)) is None


def test_equality_is_found_without_filling_either(stored):
    tensors, values = stored
    with reading_lazily() as lazily:
        one, other = tensors["a"].half(), tensors["b"].half()
        assert torch.equal(one, other)
        assert torch.equal(one, values["a"].half())
        assert not torch.equal(one, (tensors["b"] * 2).half())
        assert not torch.equal(one, other.view(256, 128))
        assert torch.equal(one.t(), other.t())
        assert all(region.gather is not None for region in lazily.reserved)


def test_a_write_lands_in_memory_and_nowhere_else(stored):
    tensors, values = stored
    with reading_lazily() as lazily:
        cast = tensors["a"].double()
        made = torch.cat([cast, cast])
        cast[0].fill_(7)
        cast[1].copy_(tensors["b"][2])
        cast.mul_(made[:128])
        assert lazily._operand(cast) is None
        assert lazily._operand(made) is not None
    expected = values["a"].double()
    expected[0].fill_(7)
    expected[1].copy_(values["b"][2])
    expected.mul_(values["a"].double())
    assert torch.equal(cast, expected)
    assert torch.equal(made, torch.cat([values["a"].double()] * 2))
    assert torch.equal(tensors["a"], values["a"])


def test_what_was_made_of_a_mapped_tensor_does_not_see_a_later_write_to_it(stored):
    tensors, values = stored
    with reading_lazily():
        before = [tensors["a"].clone(), tensors["a"].half(), tensors["b"].clone()]
        tensors["a"][0].zero_()
        after = tensors["a"].clone()
    assert torch.equal(before[0], values["a"])
    assert torch.equal(before[1], values["a"].half())
    assert torch.equal(before[2], values["b"])
    assert torch.equal(after[0], torch.zeros(256))
    assert torch.equal(after[1:], values["a"][1:])


def test_a_tensor_in_memory_may_change_after_it_was_joined(stored):
    tensors, values = stored
    extra = torch.ones(64, 256)
    with reading_lazily() as lazily:
        made = torch.cat([tensors["a"], extra])
        assert [type(s) for s in lazily._operand(made).gather.sources] == [Piece, Held]
        extra.zero_()
    assert torch.equal(made, torch.cat([values["a"], torch.ones(64, 256)]))


def test_a_copy_of_a_module_is_lazy_too(stored):
    tensors, values = stored
    with reading_lazily() as lazily:
        one = nn.Parameter(tensors["a"].half())
        module = nn.Module()
        module.register_parameter("one", copy.deepcopy(one))
        lazily.finish(module)
    assert torch.equal(stored_bytes(sources_of(module.one)), bytes_of(values["a"].half()))


class Wrapped(torch.Tensor):
    """A tensor that keeps another inside and computes with that."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        args = torch.utils._pytree.tree_map_only(cls, lambda t: t.inner, args)
        return cls(func(*args, **(kwargs or {})))


def test_a_wrapper_computes_with_values(stored):
    tensors, values = stored
    with reading_lazily() as lazily:
        wrapped = Wrapped(tensors["a"].double())
        made = (wrapped + 1).exp()
        lazily.finish(module_of(wrapped=wrapped))
    assert torch.equal(wrapped.inner, values["a"].double())
    assert torch.equal(made.inner, (values["a"].double() + 1).exp())


def test_in_inference_mode_composite_operations_wait_as_well(stored):
    tensors, values = stored
    with torch.inference_mode(), reading_lazily() as lazily:
        cast = tensors["a"].to(torch.float16)
        made = cast.t().contiguous().reshape(-1)
        assert lazily._operand(cast) is not None
        assert lazily._operand(made) is not None
    assert not cast.is_inference()
    assert torch.equal(cast, values["a"].half())
    assert torch.equal(made, values["a"].half().t().reshape(-1))


class Refuses(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func} was seen")


class RefusesFunctions(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func} was seen")


@pytest.mark.parametrize("inference", [False, True])
def test_sources_are_read_in_any_thread_whatever_its_modes(stored, inference):
    tensors, values = stored
    with reading_lazily() as lazily:
        made = torch.cat([tensors["a"].t().half(), tensors["b"].t().half() * 2], 1)
        sources = lazily._operand(made).gather.sources
        assert {type(source) for source in sources} == {Computed}
        del made
    expected = torch.cat([values["a"].t().half(), values["b"].t().half() * 2], 1)
    sources += (Slice(sources[0], 3, 5),)
    num_bytes = sum(source.num_bytes for source in sources)

    def read():
        with torch.inference_mode(inference):
            memory = torch.empty(num_bytes + 1, dtype=torch.uint8)[1:]  # an odd address
            parts = memory.split([source.num_bytes for source in sources])
            with RefusesFunctions(), Refuses():
                for source, part in zip(sources, parts, strict=True):
                    source.read_into(part)
            return memory.tolist()

    with ThreadPoolExecutor(1) as pool:
        read_bytes = pool.submit(read).result()
    assert read_bytes[:-5] == bytes_of(expected).tolist()
    assert read_bytes[-5:] == read_bytes[3:8]


# ---- what `finish` leaves -----------------------------------------------------------------------


def module_of(**tensors):
    module = nn.Module()
    for name, tensor in tensors.items():
        if name.startswith("buffer"):
            module.register_buffer(name, tensor)
        else:
            module.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
    return module


def test_large_parameters_get_stand_ins_and_all_others_their_values(stored):
    tensors, values = stored
    with reading_lazily() as lazily:
        module = module_of(
            large=tensors["a"].half(),
            small=tensors["a"][:4].half(),
            whole=tensors["n"].to(torch.int32),
            mapped=tensors["b"],
            buffer=tensors["a"].double(),
        )
        same = [*module.parameters(), *module.buffers()]
        assert lazily.finish(module) is module
        assert list(lazily.reserved) == []
    assert all(a is b for a, b in zip(same, [*module.parameters(), *module.buffers()], strict=True))
    assert module.large.isnan().all()
    assert torch.equal(stored_bytes(sources_of(module.large)), bytes_of(values["a"].half()))
    for tensor, expected in [
        (module.small, values["a"][:4].half()),
        (module.whole, values["n"].int()),
        (module.buffer, values["a"].double()),
        (module.mapped, values["b"]),
    ]:
        assert sources_of(tensor) is None
        assert torch.equal(tensor, expected)
    assert locate(module.mapped).is_mapped
    assert locate(module.small) is None


def test_parameters_that_are_parts_of_one_result_get_their_own_parts(stored):
    tensors, values = stored
    with reading_lazily() as lazily:
        joined = torch.cat([tensors["a"], tensors["b"] * 2])
        module = module_of(**{f"part{i}": part for i, part in enumerate(joined.chunk(3))})
        del joined
        lazily.finish(module)
    expected = torch.cat([values["a"], values["a"] * 2]).chunk(3)
    for parameter, part in zip(module.parameters(), expected, strict=True):
        assert torch.equal(stored_bytes(sources_of(parameter)), bytes_of(part))
    assert [type(s) for s in sources_of(module.part0)] == [Piece]
    assert [type(s) for s in sources_of(module.part1)] == [Piece, Computed]


def test_tied_parameters_stay_tied(stored):
    tensors, values = stored
    with reading_lazily() as lazily:
        made = tensors["a"].half()
        by_object = module_of(one=made.clone())
        by_object.register_parameter("other", by_object.one)
        by_address = module_of(one=made, other=made.view(256, 128))
        lazily.finish(nn.ModuleList([by_object, by_address]))
    assert by_object.one is by_object.other
    assert sources_of(by_object.one) is not None
    assert by_address.one.data_ptr() == by_address.other.data_ptr()
    assert torch.equal(by_address.one, values["a"].half())
    by_address.one[0, 0] = 9
    assert by_address.other[0, 0] == 9


def test_a_parameter_keeps_strides_and_alignment_of_the_plain_loader(stored):
    tensors, values = stored
    with reading_lazily() as lazily:
        made = tensors["a"].half()
        module = module_of(turned=made.t(), shifted=tensors["b"].half().view(-1)[3:21])
        del made
        lazily.finish(module)
    assert module.turned.stride() == values["a"].t().stride()
    assert torch.equal(module.turned, values["a"].half().t())
    assert module.shifted.data_ptr() % 64 == 6
    assert torch.equal(module.shifted, values["b"].half().view(-1)[3:21])


def test_what_is_not_handed_over_is_read_on_leaving(stored):
    tensors, values = stored
    with reading_lazily():
        kept = tensors["a"].half()[5:]
    assert torch.equal(kept, values["a"].half()[5:])
    kept.add_(1)


def test_nothing_is_read_when_an_exception_leaves(stored):
    tensors, _ = stored
    kept = []

    def fail():
        with reading_lazily() as lazily:
            kept.extend([lazily, tensors["a"].half()])
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert [region.gather is None for region in kept[0].reserved] == [False]


def test_no_size_is_too_large_to_reserve(stored):
    tensors, _ = stored
    with reading_lazily() as lazily:
        made = tensors["a"].repeat(2**23, 1)  # a tebibyte
        row = made.to(torch.float16)[12345 * 128 + 5]
        del made
        source, *_ = lazily._operand(row).gather.sources
        assert row.shape == (256,)
        assert source.working_bytes > 2**40
        del row


def test_the_space_is_given_back(stored):
    tensors, _ = stored
    with reading_lazily() as lazily:
        for _ in range(100):
            address = tensors["a"].repeat(2**23, 1).data_ptr()
        assert list(lazily.reserved) == []
        maps = Path("/proc/self/maps").read_text()
        assert f"{address:x}-" not in maps


@pytest.mark.parametrize("before", [None, "0"])
def test_the_threads_of_the_loader_are_off_meanwhile_only(before, monkeypatch):
    name = "HF_DEACTIVATE_ASYNC_LOAD"
    monkeypatch.delenv(name, raising=False)
    if before is not None:
        monkeypatch.setenv(name, before)
    with reading_lazily():
        assert os.environ[name] == "1"
    assert os.environ.get(name) == before


def test_a_failed_read_is_reported_and_leaves_the_region_as_it_was(stored, monkeypatch):
    tensors, values = stored

    def fail(*_):
        raise OSError("the disk is gone")

    with reading_lazily():
        made = tensors["a"].half()
        with monkeypatch.context() as patch:
            patch.setattr(DiskFile, "read_into", fail)
            with pytest.raises(OSError, match="gone"):
                made.zero_()
        half = made / 2
    assert torch.equal(made, values["a"].half())
    assert torch.equal(half, values["a"].half() / 2)

"""What libraries do to a model, done to a streamed one: it works as on the plain model, or is refused.

Refused means an error with words in it, raised before anything was changed.
"""

from __future__ import annotations

import copy
import inspect
import io
import os
import pickle
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from tiny import TinyLM, build, ids, same_weights, stream
from torch import nn
from torch.utils.data import DataLoader, Dataset
from zoo import assert_bit_equal, by_name
from zoo.layers import Layer, layer_list

import superpipeline
from superpipeline import BudgetError, InputError, UnsupportedError


def bare(model: nn.Module) -> tuple[Any, ...]:
    """What must not change when an error is raised: classes, addresses, attributes, hooks."""
    return (
        [type(module) for module in model.modules()],
        [(name, id(p), p.data_ptr()) for name, p in model.named_parameters()],
        [list(vars(module)) for module in model.modules()],
    )


def streamed() -> tuple[nn.Module, superpipeline.Pipeline, torch.Tensor]:
    """A streamed model after its first pass, its handle, and inputs."""
    model, inputs = build(), ids()
    pipe = stream(model)
    with torch.no_grad():
        model(inputs)
    return model, pipe, inputs


def expect_plain(model: nn.Module, inputs: torch.Tensor) -> None:
    with torch.no_grad():
        assert_bit_equal(model(inputs), build()(inputs))


# ---- saving and naming ----------------------------------------------------------------------


def test_state_dict_is_the_plain_models() -> None:
    model, pipe, inputs = streamed()
    plain = build()
    assert same_weights(model, plain)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    assert_bit_equal(torch.load(buffer), plain.state_dict())
    pipe.close()
    assert same_weights(model, plain)


def test_safetensors_written_while_streaming(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    model, _, inputs = streamed()
    plain = build()
    save_file(model.state_dict(), tmp_path / "streamed.safetensors")
    save_file(plain.state_dict(), tmp_path / "plain.safetensors")
    written = [(tmp_path / f"{name}.safetensors").read_bytes() for name in ("streamed", "plain")]
    assert written[0] == written[1]
    expect_plain(model, inputs)


@pytest.mark.parametrize("closed", [False, True])
def test_each_weight_has_a_storage_of_its_own(closed: bool, tmp_path: Path) -> None:
    """Tensors in one packed storage are refused by `save_model`, and torch.save writes it whole."""
    from safetensors.torch import load_file, save_model

    model, pipe, _ = streamed()
    if closed:
        pipe.close()
    save_model(model, str(tmp_path / "model.safetensors"))
    assert_bit_equal(load_file(tmp_path / "model.safetensors"), dict(sorted(build().state_dict().items())))
    one = io.BytesIO()
    torch.save(model.norm.weight, one)
    assert len(one.getvalue()) < 8 * 1024


@pytest.mark.parametrize("name", ["llama", "llama_bfloat16", "t5"])
def test_save_pretrained_while_streaming(name: str, tmp_path: Path) -> None:
    case = by_name(name)
    model, plain = case.build(), case.build()
    pipe = stream(model, "60%")
    with torch.no_grad():
        case.calls[0].run(model)
    model.save_pretrained(tmp_path / "streamed")
    plain.save_pretrained(tmp_path / "plain")
    for file in sorted((tmp_path / "plain").iterdir()):
        assert file.read_bytes() == (tmp_path / "streamed" / file.name).read_bytes(), file.name
    again = type(plain).from_pretrained(tmp_path / "streamed")
    assert same_weights(again, plain)
    pipe.close()


def test_names_identities_and_order_are_kept() -> None:
    model = build()
    before = [(name, id(p)) for name, p in model.named_parameters()]
    modules = [(name, id(m)) for name, m in model.named_modules()]
    hash_before, model_id = hash(model), id(model)
    pipe = stream(model)
    with torch.no_grad():
        model(ids())
    assert [(name, id(p)) for name, p in model.named_parameters()] == before
    assert [(name, id(m)) for name, m in model.named_modules()] == modules
    assert (hash(model), id(model)) == (hash_before, model_id)
    pipe.close()
    assert [(name, id(p)) for name, p in model.named_parameters()] == before


def test_the_class_looks_the_same() -> None:
    plain, (model, pipe, _) = build(), streamed()
    assert type(model).__name__ == "TinyLM" and isinstance(model, TinyLM)
    assert str(type(model)) == str(type(plain)) and type(model).__doc__ == TinyLM.__doc__
    assert type(model).__module__ == TinyLM.__module__
    assert inspect.signature(model.forward) == inspect.signature(plain.forward)
    assert inspect.signature(type(model).forward) == inspect.signature(TinyLM.forward)
    assert repr(model) == repr(plain)
    pipe.close()
    assert type(model) is TinyLM and "_superpipeline" not in vars(model)


# ---- moving and converting ------------------------------------------------------------------


@pytest.mark.parametrize(
    "move",
    [lambda m: m.to("cpu"), lambda m: m.cpu(), lambda m: m.float(), lambda m: m.to(torch.float32)],
    ids=["to", "cpu", "float", "to_dtype"],
)
def test_a_move_to_where_it_is_says_so_once(
    move: Callable[[nn.Module], nn.Module], capfd: pytest.CaptureFixture[str]
) -> None:
    model, inputs = build(), ids()
    superpipeline.stream(model, "50%", device="cpu")
    capfd.readouterr()
    addresses = [p.data_ptr() for p in model.parameters()]
    assert move(model) is model
    said = capfd.readouterr()
    assert said.out == "" and said.err == (
        "superpipeline: .to(cpu) does nothing: the model streams there\n"
    )
    move(model)
    assert capfd.readouterr().err == ""
    assert [p.data_ptr() for p in model.parameters()] == addresses
    expect_plain(model, inputs)


@pytest.mark.parametrize(
    "move",
    [
        lambda m: m.half(),
        lambda m: m.to(torch.float16),
        lambda m: m.double(),
        lambda m: m.bfloat16(),
        lambda m: m.to("meta"),
        lambda m: m.to_empty(device="meta"),
        lambda m: m.to(memory_format=torch.channels_last),
        lambda m: m.layers[1].half(),
    ],
    ids=["half", "to", "double", "bfloat16", "meta", "to_empty", "channels_last", "one_block"],
)
def test_another_place_or_dtype_is_refused(move: Callable[[nn.Module], nn.Module]) -> None:
    model, _, inputs = streamed()
    before = bare(model)
    with pytest.raises(UnsupportedError, match=r"close\(\)"):
        move(model)
    assert bare(model) == before
    expect_plain(model, inputs)


def test_transformers_to_and_half() -> None:
    case = by_name("llama")
    model = case.build()
    stream(model, "50%")
    assert model.to("cpu") is model
    with pytest.raises(UnsupportedError):
        model.half()
    assert model.device == torch.device("cpu") and model.dtype == torch.float32


# ---- copying --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "take",
    [
        copy.deepcopy,
        copy.copy,
        pickle.dumps,
        lambda model: torch.save(model, io.BytesIO()),
        lambda model: copy.deepcopy(model.layers),
        lambda model: copy.deepcopy(nn.Sequential(model)),
    ],
    ids=["deepcopy", "copy", "pickle", "torch.save", "deepcopy_part", "deepcopy_around"],
)
def test_copies_are_refused(take: Callable[[nn.Module], Any]) -> None:
    model, pipe, inputs = streamed()
    with pytest.raises(UnsupportedError, match="state_dict"):
        take(model)
    expect_plain(model, inputs)
    pipe.close()
    take(model)


# ---- compiling and tracing ------------------------------------------------------------------

quiet_dynamo = pytest.mark.filterwarnings("ignore:Dynamo does not know:UserWarning")


def compile_method(model: nn.Module) -> nn.Module:
    model.compile(backend="eager")
    return model


@quiet_dynamo
@pytest.mark.parametrize("fullgraph", [False, True])
def test_compiling_a_streamed_model_is_refused(fullgraph: bool) -> None:
    model, pipe, inputs = streamed()
    torch._dynamo.reset()

    def around(x: torch.Tensor) -> torch.Tensor:
        return model(x + 0) * 2

    for compiled in (model, around, model.forward, model.layers[0]):
        x = torch.randn(1, 2, 64) if compiled is model.layers[0] else inputs
        fast = torch.compile(compiled, backend="eager", fullgraph=fullgraph)
        with torch.no_grad(), pytest.raises(RuntimeError, match="cannot be compiled") as caught:
            fast(x)
        assert fullgraph or caught.type is UnsupportedError
    expect_plain(model, inputs)
    pipe.close()
    with torch.no_grad():
        torch.compile(model, backend="eager")(inputs)


@quiet_dynamo
@pytest.mark.parametrize("part", ["", "layers.0"])
def test_compile_method_on_a_streamed_model_is_refused(part: str) -> None:
    model, _, inputs = streamed()
    torch._dynamo.reset()
    model.get_submodule(part).compile(backend="eager")
    with torch.no_grad(), pytest.raises(UnsupportedError, match="cannot be compiled"):
        model(inputs)
    model.get_submodule(part)._compiled_call_impl = None
    expect_plain(model, inputs)


@quiet_dynamo
def test_a_model_compiled_before_it_streams() -> None:
    torch._dynamo.reset()
    model, inputs = build(), ids()
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        compiled(inputs)
    before = bare(model)
    with pytest.raises(UnsupportedError, match="cannot be compiled"):
        superpipeline.stream(compiled, "50%", device="cpu")
    assert bare(model) == before
    stream(model)
    with torch.no_grad(), pytest.raises(UnsupportedError, match="cannot be compiled"):
        compiled(inputs)
    expect_plain(model, inputs)
    superpipeline.handle(model).close()
    with pytest.raises(UnsupportedError, match="cannot be compiled"):
        superpipeline.stream(compile_method(build()), "50%", device="cpu")


@quiet_dynamo
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_export_trace_and_script_are_refused() -> None:
    model, _, inputs = streamed()
    torch._dynamo.reset()
    with torch.no_grad():
        for strict in (False, True):
            with pytest.raises(RuntimeError, match="cannot be (compiled|traced)"):
                torch.export.export(model, (inputs,), strict=strict)
        with pytest.raises(UnsupportedError, match="cannot be traced"):
            torch.jit.trace(model, (inputs,))
    expect_plain(model, inputs)


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_functional_transforms_are_refused() -> None:
    model, _, inputs = streamed()
    params = dict(model.named_parameters())
    doubled = {name: p.detach() * 2 for name, p in params.items()}
    before = bare(model)
    with torch.no_grad(), pytest.raises(UnsupportedError, match="functional_call"):
        torch.func.functional_call(model, doubled, (inputs,))
    with torch.no_grad(), pytest.raises(UnsupportedError, match=r"torch\.func"):
        torch.func.vmap(model)(inputs)
    with pytest.raises(UnsupportedError, match=r"torch\.func"):
        torch.func.grad(lambda p: torch.func.functional_call(model, p, (inputs,)).sum())(params)
    with pytest.raises(UnsupportedError, match=r"torch\.func"):
        torch.func.jvp(model.head, (torch.randn(2, 64),), (torch.randn(2, 64),))
    assert bare(model) == before
    expect_plain(model, inputs)
    expect_plain(model, inputs)


# ---- threads and processes ------------------------------------------------------------------


def test_calls_from_four_threads_are_serialised_and_right() -> None:
    model, plain = build(), build()
    pipe = stream(model)
    inputs = [torch.randint(10, 1000, (1, 3 + n)) for n in range(4)]
    with torch.no_grad():
        expected = [plain(x) for x in inputs]
    results: list[list[torch.Tensor]] = [[] for _ in inputs]
    start = threading.Barrier(len(inputs))

    def call(index: int) -> None:
        start.wait()
        with torch.no_grad():
            results[index] += [model(inputs[index]) for _ in range(8)]

    threads = [threading.Thread(target=call, args=(i,)) for i in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for mine, right in zip(results, expected, strict=True):
        assert len(mine) == 8
        for result in mine:
            assert_bit_equal(result, right)
    assert pipe.stats().passes == 4 * 8


class Tokens(Dataset[torch.Tensor]):
    """Rows of token ids; keeps the model, as a careless dataset does."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.full((3,), 10 + index)


def test_forked_loader_workers_beside_a_streamed_model() -> None:
    model, _, _ = streamed()
    plain = build()
    loader = DataLoader(
        Tokens(model), batch_size=2, num_workers=2, multiprocessing_context="fork"
    )
    for _ in range(2):
        num_batches = 0
        with torch.no_grad():
            for batch in loader:
                assert_bit_equal(model(batch), plain(batch))
                num_batches += 1
        assert num_batches == 4


def in_child(work: Callable[[], str]) -> str:
    """Runs `work` in a forked child and returns what it returned."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writing, work().encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    return text


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("use", ["call", "close", "stream", "verify"])
def test_a_forked_child_cannot_use_the_streamed_model(use: str) -> None:
    """close() and stream() in a child once waited forever for a thread that fork had not copied."""
    model, pipe, inputs = streamed()
    uses: dict[str, Callable[[], Any]] = {
        "call": lambda: model(inputs),
        "close": pipe.close,
        "stream": lambda: superpipeline.stream(model, "60%", quiet=True),
        "verify": lambda: pipe.verify(inputs),
    }

    def work() -> str:
        try:
            uses[use]()
        except UnsupportedError as error:
            return str(error)
        return "it ran"

    assert "forked process" in in_child(work)
    expect_plain(model, inputs)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_shares_the_weights_memory() -> None:
    """Reading and even the parent's writing must not copy the weights into each worker."""
    model = nn.Sequential(*[nn.Linear(512, 512) for _ in range(16)])  # 16 MiB
    pipe = stream(model, "50%")

    def work() -> str:
        process = psutil.Process()
        before = process.memory_full_info().uss
        checksum = sum(float(p.data.sum()) for p in model.parameters())
        with torch.no_grad():
            for p in model.parameters():
                p.data.view(-1)[:1] += 0.0 * checksum
        return str(process.memory_full_info().uss - before)

    grown = int(in_child(work))
    assert grown < pipe.host_bytes // 4


# ---- streaming again, and arguments ---------------------------------------------------------


def test_streaming_again_plans_anew() -> None:
    model, pipe, inputs = streamed()
    before = pipe.plan.device_bytes
    assert superpipeline.stream(model, "75%", quiet=True) is model
    assert superpipeline.handle(model) is pipe
    assert pipe.plan.device_bytes > before
    expect_plain(model, inputs)
    for k, k_prime in ((2, 1), (4, 2), (3, 1)):
        superpipeline.stream(model, k=k, k_prime=k_prime, quiet=True)
        expect_plain(model, inputs)
        expect_plain(model, inputs)
    pipe.close()
    assert same_weights(model, build())


def test_streaming_again_can_fail_and_then_changes_nothing() -> None:
    model, pipe, inputs = streamed()
    plan = pipe.plan
    with pytest.raises(BudgetError):
        superpipeline.stream(model, "1KiB", quiet=True)
    with pytest.raises(InputError):
        superpipeline.stream(model)
    with pytest.raises((InputError, UnsupportedError)):
        superpipeline.stream(model, "50%", device="meta")
    assert pipe.plan is plan
    expect_plain(model, inputs)


@pytest.mark.filterwarnings("error")
def test_the_context_manager_restores_everything() -> None:
    model, inputs = build(), ids()
    handle = model.layers[0].register_forward_hook(lambda *_: None)
    before = bare(model)
    hooks = [dict(m._forward_hooks) for m in model.modules()]
    with superpipeline.streaming(model, "50%", device="cpu", quiet=True) as pipe:
        expect_plain(model, inputs)
        assert pipe.stats().streamed_bytes > 0
    after = bare(model)
    assert after[0] == before[0] and after[2] == before[2]
    assert [pair[:2] for pair in after[1]] == [pair[:2] for pair in before[1]]
    assert [dict(m._forward_hooks) for m in model.modules()] == hooks
    assert same_weights(model, build())
    handle.remove()
    with (
        pytest.raises(KeyError),
        superpipeline.streaming(model, "50%", device="cpu", quiet=True),
    ):
        raise KeyError
    assert bare(model)[0] == before[0]
    expect_plain(model, inputs)


def test_a_handle_needs_a_streamed_model() -> None:
    with pytest.raises(InputError, match="not streamed"):
        superpipeline.handle(build())
    model, _, _ = streamed()
    with pytest.raises(InputError, match="part of a streamed TinyLM"):
        superpipeline.handle(model.layers[0])


def test_without_a_number_the_message_holds_a_line_that_works() -> None:
    model = build()
    before = bare(model)
    with pytest.raises(InputError) as caught:
        superpipeline.stream(model)
    text = str(caught.value)
    total = sum(p.nbytes for p in model.parameters())
    stated, least = map(int, re.findall(r"\((\d+) bytes\)", text))
    assert total <= stated <= 1.1 * total
    assert bare(model) == before
    line = text[text.index("superpipeline.stream(") :]
    with pytest.raises(BudgetError) as refused:
        superpipeline.stream(model, least - 1, device="cpu", quiet=True)
    assert refused.value.least_bytes == least
    assert bare(model) == before
    exec(line, {"superpipeline": superpipeline, "model": model})
    superpipeline.handle(model).close()
    stream(model, least)
    expect_plain(model, ids())


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"weights": "50%", "k": 2}, InputError, "not both"),
        ({"weights": "50%", "k_prime": 1}, InputError, "not both"),
        ({"weights": "lots"}, InputError, "lots"),
        ({"weights": -1}, InputError, "negative"),
        ({"weights": "1KiB"}, BudgetError, "least"),
        ({"k": 0}, InputError, "k"),
        ({"k": 1, "k_prime": 2}, InputError, "k_prime"),
        ({"weights": "50%", "device": "meta"}, UnsupportedError, "meta"),
    ],
    ids=str,
)
def test_every_error_leaves_the_model_alone(
    options: dict[str, Any], error: type[Exception], words: str
) -> None:
    model = build()
    before = bare(model)
    with pytest.raises(error, match=words):
        superpipeline.stream(model, **({"device": "cpu"} | options))
    assert bare(model) == before


def sparse() -> nn.Module:
    model = build()
    model.head.weight = nn.Parameter(torch.eye(4).to_sparse())
    return model


def inference_born() -> nn.Module:
    with torch.inference_mode():
        return build()


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda: nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 3)), InputError),
        (lambda: build().to("meta"), InputError),
        (lambda: "gpt2", InputError),
        (sparse, UnsupportedError),
        (inference_born, UnsupportedError),
    ],
    ids=["lazy", "meta", "no_module", "sparse", "inference_born"],
)
@pytest.mark.filterwarnings("ignore:Lazy modules:UserWarning")
def test_models_that_cannot_stream_are_refused_untouched(
    make: Callable[[], Any], error: type[Exception]
) -> None:
    model = make()
    classes = [type(m) for m in model.modules()] if isinstance(model, nn.Module) else []
    with pytest.raises(error):
        superpipeline.stream(model, "50%", device="cpu", quiet=True)
    if classes:
        assert [type(m) for m in model.modules()] == classes


def test_parts_and_wholes_of_streamed_models_are_refused() -> None:
    model, _, inputs = streamed()
    wrapped = nn.Sequential(model, nn.Linear(1024, 8))
    for other in (model.layers[0], model.layers, wrapped):
        with pytest.raises(InputError, match=r"close\(\)"):
            superpipeline.stream(other, "50%", device="cpu", quiet=True)
    expect_plain(model, inputs)
    with torch.no_grad():  # using it inside another, unstreamed model is fine
        assert_bit_equal(wrapped(inputs), wrapped[1](build()(inputs)))


def test_the_headline_and_quiet(capfd: pytest.CaptureFixture[str]) -> None:
    model = superpipeline.stream(build(), "50%", device="cpu")
    said = capfd.readouterr()
    assert said.out == "" and said.err.count("\n") == 1
    for word in ("superpipeline: ", "for cpu", "resident", "window", "streamed each pass", "host"):
        assert word in said.err
    superpipeline.stream(model, "60%")
    assert capfd.readouterr().err.count("\n") == 1
    superpipeline.stream(model, "75%", quiet=True)
    assert capfd.readouterr().err == ""
    stream(build())
    assert capfd.readouterr().err == ""


# ---- hooks, recorders, switches -------------------------------------------------------------


def test_users_hooks_see_what_they_see_on_the_plain_model() -> None:
    seen: dict[str, list[torch.Tensor]] = {}

    def watch(model: nn.Module, key: str) -> None:
        for name in ("layers.0", "layers.3.up", "layers.4.down", "norm", "head", "embed", ""):
            module = model.get_submodule(name)

            def before(m: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
                seen[key].extend([*args, *m.parameters()])
                seen[key][-1] = seen[key][-1].detach().clone()

            def after(m: nn.Module, args: Any, output: torch.Tensor) -> None:
                seen[key] += [p.detach().clone() for p in m.parameters()]
                seen[key].append(output.clone())

            if name:
                module.register_forward_pre_hook(
                    lambda m, args: seen[key].extend(t.detach().clone() for t in m.parameters())
                )
            module.register_forward_hook(after)
        seen[key] = []

    plain, model, inputs = build(), build(), ids()
    watch(plain, "plain")
    watch(model, "streamed")
    stream(model)
    for _ in range(2):
        with torch.no_grad():
            assert_bit_equal(model(inputs), plain(inputs))
    assert len(seen["plain"]) > 40
    assert_bit_equal(seen["streamed"], seen["plain"])


def test_hooks_that_replace_inputs_and_outputs() -> None:
    plain, model, inputs = build(), build(), ids()
    for target in (plain, model):
        target.layers[1].register_forward_hook(lambda m, args, output: output * 0.5)
        target.layers[2].register_forward_pre_hook(lambda m, args: (args[0] + 1,))
        target.head.register_forward_hook(lambda m, args, output: (output, m.weight[:2]))
    stream(model)
    for _ in range(2):
        with torch.no_grad():
            first, again = model(inputs), model(inputs)
            expected = plain(inputs)
        assert_bit_equal(first, expected)  # held while the second call ran
        assert_bit_equal(again, expected)


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "bert"])
def test_hidden_states_and_attentions(name: str) -> None:
    case = by_name(name)
    plain, model = case.build(), case.build()
    for target in (plain, model):
        target.set_attn_implementation("eager")
    stream(model, "60%")
    args, kwargs = case.inputs()
    for _ in range(2):
        with torch.no_grad():
            options = {"output_hidden_states": True, "output_attentions": True}
            expected = plain(*args, **kwargs, **options)
            actual = model(*args, **kwargs, **options)
        assert_bit_equal(actual, expected)


def test_switches_work_as_on_the_plain_model() -> None:
    model, _, inputs = streamed()
    plain = build()
    for target in (plain, model):
        target.train()
        assert target.layers[0].training
        target.eval()
        target.requires_grad_(False)
    assert [p.requires_grad for p in model.parameters()] == [False] * len([*plain.parameters()])
    assert_bit_equal(model(inputs), plain(inputs))
    model.zero_grad()
    model.apply(lambda m: None)


def test_accelerate_hooks_on_a_streamed_model() -> None:
    """accelerate replaces `module.forward` on the instance."""
    accelerate_hooks = pytest.importorskip("accelerate.hooks")
    plain, model, inputs = build(), build(), ids()
    stream(model)
    for target in (plain, model):
        accelerate_hooks.add_hook_to_module(target.layers[2], accelerate_hooks.ModelHook())
        accelerate_hooks.add_hook_to_module(target, accelerate_hooks.ModelHook())
    for _ in range(2):
        with torch.no_grad():
            assert_bit_equal(model(inputs), plain(inputs))


def test_transformers_pipeline(tmp_path: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast, pipeline

    words = {"<pad>": 0, "<unk>": 1} | {f"w{n}": n for n in range(2, 1024)}
    raw = Tokenizer(WordLevel(words, unk_token="<unk>"))
    raw.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", unk_token="<unk>")
    case = by_name("llama")
    texts = []
    for is_streamed in (False, True):
        model = case.build()
        if is_streamed:
            stream(model, "50%")
        generator = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
        texts.append(generator("w5 w6 w7", max_new_tokens=5, do_sample=False, max_length=None))
        if is_streamed:
            assert superpipeline.handle(model).stats().streamed_bytes > 0
    assert texts[0] == texts[1]
    assert texts[0][0]["generated_text"].startswith("w5 w6 w7")


# ---- odd models -----------------------------------------------------------------------------


class Recursive(nn.Module):
    """Calls itself, with other blocks between."""

    def __init__(self) -> None:
        super().__init__()
        self.own = nn.Parameter(torch.randn(64, 64) / 8)
        self.layers = layer_list(3)

    def forward(self, x: torch.Tensor, depth: int = 2) -> torch.Tensor:
        x = self.layers[depth](x @ self.own)
        if depth:
            x = self(x, depth - 1)
        return x @ self.own


class PassesItself(nn.Module):
    """Layers that are called with a module, themselves included, as an argument."""

    class Caller(Layer):
        def forward(self, x: torch.Tensor, other: nn.Module | None = None) -> torch.Tensor:
            x = super().forward(x)
            return x if other is None else other(x) + self.up.weight.sum()

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(self.Caller() for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer, other in zip(self.layers, [*self.layers[1:], self.layers[0]], strict=True):
            x = layer(layer(x, other), layer)
        return x


class Properties(nn.Module):
    """Weights and children behind properties and __getattr__."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.raw = nn.Parameter(torch.randn(64, 64))

        @property
        def weight(self) -> torch.Tensor:
            return self.raw / 8

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.weight

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(self.Scaled() for _ in range(5))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("layer_"):
            return self.layers[int(name.removeprefix("layer_"))]
        return super().__getattr__(name)

    @property
    def first(self) -> nn.Module:
        return self.layers[0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for index in range(1, 5):
            x = getattr(self, f"layer_{index}")(x)
        return x @ self.first.weight


class Lists(nn.Module):
    """Parameters in a ParameterList and a ParameterDict."""

    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weights = nn.ParameterList(torch.randn(64, 64) / 8 for _ in range(3))
            self.named = nn.ParameterDict({"a": torch.randn(64), "b": torch.randn(64)})

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for weight in self.weights:
                x = x @ weight
            return x * self.named["a"] + self.named["b"]

    def __init__(self) -> None:
        super().__init__()
        self.outer = nn.ParameterList(torch.randn(64, 64) / 8 for _ in range(3))
        self.layers = nn.ModuleList(self.Inner() for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for weight, layer in zip(self.outer, self.layers, strict=False):
            x = layer(x) @ weight
        return self.layers[3](x)


class Mutating(nn.Module):
    """Its forward rotates its ModuleList, and adds a layer in the third pass."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = layer_list(4)
        self.num_passes = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.num_passes += 1
        self.layers = nn.ModuleList([*self.layers[1:], self.layers[0]])
        if self.num_passes == 3:
            torch.manual_seed(3)
            self.layers.append(Layer())
        for layer in self.layers:
            x = layer(x)
        return x


class Generators(nn.Module):
    """Forwards that are generators, consumed late."""

    class Steps(Layer):
        def forward(self, x: torch.Tensor) -> Any:
            for scale in (1, 2):
                yield super().forward(x * scale)

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(self.Steps() for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        running = [layer(x) for layer in self.layers]
        for pair in zip(*running, strict=True):
            for y in pair:
                x = x + y
        return x


class Shared(nn.Module):
    """One layer at several paths, and one weight in several layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = layer_list(4)
        self.layers.append(self.layers[0])
        self.alias = self.layers[2]
        self.nested = nn.ModuleDict({"again": self.layers[1], "own": Layer()})
        self.layers[3].up.weight = self.layers[1].up.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in (*self.layers, self.alias, *self.nested.values()):
            x = layer(x)
        return x


class Closures(nn.Module):
    """Returns functions and odd containers that hold weights and results."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = layer_list(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        late = []
        for layer in self.layers:
            x = layer(x)
            late.append(lambda y, layer=layer: layer.down(layer.up(y)))
        for function in late:
            x = x + function(x)
        return x


class Slotted(nn.Module):
    """A model with a class-level __call__ and a metaclass of its own."""

    class Meta(type):
        pass

    class Called(Layer, metaclass=Meta):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return super().__call__(*args, **kwargs) * 2

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(self.Called() for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def graph_module() -> nn.Module:
    return torch.fx.symbolic_trace(nn.Sequential(*layer_list(4)))


ODD: dict[str, Callable[[], nn.Module]] = {
    kind.__name__: kind
    for kind in (
        Recursive,
        PassesItself,
        Properties,
        Lists,
        Mutating,
        Generators,
        Shared,
        Closures,
        Slotted,
    )
} | {"graph_module": graph_module}


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("weights", ["40%", "60%", "85%"])
@pytest.mark.parametrize("name", ODD)
def test_odd_models(name: str, weights: str, grad: bool) -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        return ODD[name]().eval()

    plain, model, x = make(), make(), torch.randn(2, 5, 64)
    with torch.set_grad_enabled(grad):
        try:
            pipe = stream(model, weights)
        except BudgetError as error:
            pipe = stream(model, error.least_bytes)
        expected, actual = [], []
        for _ in range(4):
            expected.append(plain(x))
            actual.append(model(x))
    for ours, theirs in zip(actual, expected, strict=True):
        assert_bit_equal(ours, theirs)
    assert pipe.stats().streamed_bytes > 0
    pipe.close()
    assert same_weights(model, plain)

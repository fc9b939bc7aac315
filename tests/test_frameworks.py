"""What libraries do to a model, done to a streamed one: it works, or it is refused.

Refused means an error with words in it, raised before anything was changed.
"""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import superpipeline
from superpipeline import (
    UnsupportedError,
)
from tiny import (
    TinyLM,
    bare,
    build,
    expect_plain,
    ids,
    same_weights,
    stream,
    streamed,
)
from zoo import assert_bit_equal, by_name


def test_state_dict_is_the_plain_models() -> None:
    model, pipe, _inputs = streamed()
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
    assert_bit_equal(
        load_file(tmp_path / "model.safetensors"), dict(sorted(build().state_dict().items()))
    )
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

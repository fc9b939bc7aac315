"""Weights on disk while files change, reads fail and users edit: named errors, then right again."""

from __future__ import annotations

import _thread
import contextlib
import errno
import gc
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from forward_from_disk import anonymous_bytes
from same_model import value_of
from superpipeline import DiskError, InputError, handle, load
from superpipeline.cpu_streams import CpuStreams
from superpipeline.host import return_freed_memory
from zoo import assert_bit_equal

IDS = torch.tensor([[1, 2, 3, 5, 8, 13]])
MiB = 2**20
FORMS = {"as stored": "auto", "converted": "float32"}
DOWN = "model.layers.3.mlp.down_proj.weight"


def save(folder: Path, *, seed: int = 0, shards: bool = False, hidden: int = 128) -> Path:
    """A Llama in bfloat16 whose matrices are all read from disk."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=6, vocab_size=512,
        num_attention_heads=2, num_key_value_heads=1, dtype="bfloat16", pad_token_id=0,
    )  # fmt: skip
    size = "500KB" if shards else "1GB"
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder, max_shard_size=size)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """One file."""
    return save(tmp_path / "one")


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """The same in several."""
    folder = save(tmp_path / "several", shards=True)
    assert len([*folder.glob("*.safetensors")]) > 3
    return folder


@pytest.fixture(params=FORMS)
def dtype(request) -> str:
    """The weights as they are in the file, or turned into float32 on the way in."""
    return FORMS[request.param]


def load_it(folder: Path, dtype: str = "auto", weights: str = "50%") -> Any:
    return load(folder, weights, device="cpu", dtype=dtype, quiet=True)


def plain_model(folder: Path, dtype: str = "auto") -> Any:
    return LlamaForCausalLM.from_pretrained(folder, dtype=dtype)


def run(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def run_twice(model: nn.Module) -> None:
    """The last reads of a pass are for the next one."""
    for _ in range(2):
        run(model)


def expect_right(model: nn.Module, expected: torch.Tensor) -> None:
    """Twice: the second pass finds copies that were fetched ahead."""
    before = handle(model).stats().disk_bytes
    for _ in range(2):
        assert_bit_equal(run(model), expected)
    assert handle(model).stats().disk_bytes > before


def weight_file(folder: Path) -> Path:
    (path,) = folder.glob("*.safetensors")
    return path


# ---- files that change while they are streamed from ---------------------------------------------


@contextlib.contextmanager
def changed(path: Path) -> Iterator[None]:
    """Afterwards the file is the one that it was, time of change included."""
    content, status = path.read_bytes(), path.stat()
    try:
        yield
    finally:
        with path.open("r+b") as file:  # in place: it is open elsewhere
            file.write(content)
            file.truncate()
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_a_file_that_was_cut_is_named_with_the_byte_and_works_again_once_restored(folder, dtype):
    """What is read is refused; nobody touches the mapping, which would kill the process."""
    model, expected = load_it(folder, dtype), run(plain_model(folder, dtype))
    expect_right(model, expected)
    path = weight_file(folder)
    size = path.stat().st_size
    with changed(path):
        os.truncate(path, size // 2)
        for _ in range(2):
            with pytest.raises(DiskError, match=rf"had {size} bytes and has {size // 2}") as caught:
                run(model)
            assert re.search(r"noticed at byte \d+;", str(caught.value))
            assert str(path) in str(caught.value)
    expect_right(model, expected)


def test_a_file_that_was_cut_within_its_embedding_is_named_too(folder):
    """Rows are looked up through the mapping, where the system kills who reads beyond the end."""
    script = f"""
        import os, torch, superpipeline
        model = superpipeline.load({str(folder)!r}, "50%", device="cpu", quiet=True)
        for size in (None, 8192):
            if size is not None:
                os.truncate({str(weight_file(folder))!r}, size)
            with torch.no_grad():
                try:
                    model(torch.arange(512)[None])
                except superpipeline.DiskError as error:
                    assert "and has 8192" in str(error), error
                else:
                    assert size is None
    """
    assert run_script(script) == (0, "")


def test_a_file_that_was_written_in_place_is_refused(folder, dtype):
    model, expected = load_it(folder, dtype), run(plain_model(folder, dtype))
    expect_right(model, expected)
    path = weight_file(folder)
    with changed(path):
        with path.open("r+b") as file:
            file.seek(-1000, os.SEEK_END)
            file.write(bytes(1000))
        os.utime(path, ns=(1, path.stat().st_mtime_ns + 2 * 10**9))
        with pytest.raises(DiskError, match=r"was changed in place since it was opened \(modified"):
            run(model)
    expect_right(model, expected)


def test_a_file_that_was_replaced_is_still_the_old_one(shards, dtype, tmp_path):
    """As downloads and save_file do it: written beside it, then renamed."""
    model, expected = load_it(shards, dtype), run(plain_model(shards, dtype))
    other = save(tmp_path / "other", seed=1, shards=True)
    for path in other.glob("*.safetensors"):
        path.replace(shards / path.name)
    expect_right(model, expected)
    again = run(load_it(shards, dtype))
    assert_bit_equal(again, run(plain_model(shards, dtype)))
    assert not torch.equal(again, expected)


def test_a_missing_shard_is_named_when_loading_and_harmless_later(shards, dtype):
    model, expected = load_it(shards, dtype), run(plain_model(shards, dtype))
    path = sorted(shards.glob("*.safetensors"))[1]
    path.unlink()
    expect_right(model, expected)  # it is open
    with pytest.raises(DiskError, match=re.escape(path.name)):
        load_it(shards, dtype)


def test_a_shard_that_does_not_belong_there_is_refused(shards):
    """As after a download that was mixed up."""
    first, second, *_ = sorted(shards.glob("*.safetensors"))
    save_file({"another": torch.zeros(8)}, second)
    with pytest.raises(DiskError, match=f"{second.name} does not hold .*, which .* promises"):
        load_it(shards)
    shutil.copy(first, second)
    with pytest.raises(InputError, match=f"both {first.name} and {second.name} hold"):
        load_it(shards)


# ---- reads that fail ----------------------------------------------------------------------------


class FailingDisk:
    """`os.preadv`, which fails at its n-th call. No real disk fails when a test wants it to."""

    def __init__(self, at: int, fail: Callable[[], None]) -> None:
        self.at, self.fail, self.count = at, fail, 0
        self._read = os.preadv
        self._lock = threading.Lock()

    def __call__(self, descriptor: int, memory: list[memoryview], offset: int) -> int:
        with self._lock:
            self.count += 1
            fails = self.count == self.at
        if fails:
            self.fail()
        return self._read(descriptor, memory, offset)


def input_output_error() -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def reads_of_a_pass(model: nn.Module, monkeypatch) -> int:
    """How many reads a pass of `model` takes; fetching ahead for the next one included."""
    disk = FailingDisk(0, input_output_error)
    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", disk)
        run(model)
        handle(model).engine.streams.synchronize()
    return disk.count


def test_any_read_may_fail_and_the_next_call_is_right(folder, dtype, monkeypatch):
    monkeypatch.setattr(CpuStreams, "maps_files", False)
    model, expected = load_it(folder, dtype), run(plain_model(folder, dtype))
    expect_right(model, expected)
    total = reads_of_a_pass(model, monkeypatch)
    assert total > 12
    for at in range(1, total + 1):
        with monkeypatch.context() as patch:
            patch.setattr(os, "preadv", FailingDisk(at, input_output_error))
            with pytest.raises(DiskError, match="Input/output error") as caught:
                run_twice(model)
        assert re.search(r"cannot be read at byte \d+: ", str(caught.value))
        assert str(weight_file(folder)) in str(caught.value)
        assert_bit_equal(run(model), expected)
    expect_right(model, expected)


def test_a_load_that_fails_leaves_nothing(folder, dtype, monkeypatch):
    """Whether a header, a weight that is converted at once, or a resident cannot be read."""
    expected = run(plain_model(folder, dtype))
    disk = FailingDisk(0, input_output_error)
    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", disk)
        load_it(folder, dtype)
    assert disk.count > 5
    for at in (1, 2, 3, disk.count // 2, disk.count):
        with monkeypatch.context() as patch:
            patch.setattr(os, "preadv", FailingDisk(at, input_output_error))
            with pytest.raises(DiskError, match="Input/output error"):
                load_it(folder, dtype)
        collect()
        assert not open_files(folder)
    expect_right(load_it(folder, dtype), expected)


def test_a_read_may_give_less_than_was_asked_for(folder, monkeypatch):
    """As the system may at any time; Linux does so at 2 GiB."""
    expected = run(plain_model(folder))
    read = os.preadv

    def some(descriptor: int, memory: list[memoryview], offset: int) -> int:
        return read(descriptor, [memory[0][: max(1, len(memory[0]) // 3)]], offset)

    monkeypatch.setattr(os, "preadv", some)
    expect_right(load_it(folder), expected)


# ---- Ctrl-C -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model.layers.0", "model.layers.3", "model.norm", "lm_head", ""])
def test_ctrl_c_in_a_forward(name, folder, dtype):
    model, expected = load_it(folder, dtype), run(plain_model(folder, dtype))
    for _ in range(2):
        module = model.get_submodule(name)
        hook = module.register_forward_pre_hook(lambda *_: signal.raise_signal(signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            run(model)
        hook.remove()
        expect_right(model, expected)


def test_ctrl_c_while_the_forward_waits_for_the_disk(folder, dtype, monkeypatch):
    """At every read in turn, which goes on only when the waiting thread was interrupted."""
    model, expected = load_it(folder, dtype), run(plain_model(folder, dtype))
    expect_right(model, expected)
    total = reads_of_a_pass(model, monkeypatch)
    num_interrupted = 0
    for at in range(1, total + 1, 3):
        interrupted = threading.Event()

        def interrupt(interrupted: threading.Event = interrupted) -> None:
            _thread.interrupt_main()
            interrupted.wait(5)

        with monkeypatch.context() as patch:
            patch.setattr(os, "preadv", FailingDisk(at, interrupt))
            try:
                run_twice(model)
            except KeyboardInterrupt:
                num_interrupted += 1
            finally:
                interrupted.set()
        assert_bit_equal(run(model), expected)
    assert num_interrupted >= total // 3
    expect_right(model, expected)


# ---- saving while streaming ---------------------------------------------------------------------


@pytest.mark.parametrize("files", ["one", "several"])
def test_save_pretrained_into_the_folder_that_is_streamed_from(files, dtype, tmp_path):
    """safetensors 0.8 writes beside the file and renames; before, it wrote over what was read."""
    folder = save(tmp_path / "model", shards=files == "several")
    size = {"one": "1GB", "several": "500KB"}[files]
    plain = plain_model(folder, dtype)
    expected = run(plain)
    model = load_it(folder, dtype)
    for _ in range(2):
        model.save_pretrained(folder, max_shard_size=size)
        expect_right(model, expected)
    kept = plain_model(folder)
    assert kept.dtype == plain.dtype
    for (name, theirs), ours in zip(plain.named_parameters(), kept.parameters(), strict=True):
        assert_bit_equal(ours, theirs), name
    expect_right(load_it(folder), expected)
    assert {path.suffix for path in folder.iterdir()} <= {".json", ".safetensors"}


def test_an_edit_is_saved(folder):
    model, plain = load_it(folder), plain_model(folder)
    for each in (model, plain):
        with torch.no_grad():
            each.get_parameter(DOWN).add_(1)
    expected = run(plain)
    model.save_pretrained(folder)
    expect_right(model, expected)
    assert_bit_equal(run(plain_model(folder)), expected)


# ---- looking ------------------------------------------------------------------------------------


def test_a_state_dict_has_the_values(shards, dtype):
    model, plain = load_it(shards, dtype), plain_model(shards, dtype)
    for _ in range(2):
        ours, theirs = model.state_dict(), plain.state_dict()
        assert list(ours) == list(theirs)
        for name, tensor in theirs.items():
            assert_bit_equal(ours[name], tensor)
        expect_right(model, run(plain))


def test_printing_a_parameter(folder):
    model, plain = load_it(folder), plain_model(folder)
    for name, parameter in plain.named_parameters():
        assert repr(model.get_parameter(name)) == repr(parameter)


def test_printing_a_parameter_that_is_converted_shows_that_it_is_elsewhere(folder):
    """A NaN, not a wrong number; its bytes are those of a float32 all the same."""
    model, plain = load_it(folder, "float32"), plain_model(folder, "float32")
    parameter = model.get_parameter(DOWN)
    assert parameter.dtype == torch.float32 and parameter.shape == (128, 512)
    assert "nan" in repr(parameter)
    assert_bit_equal(value_of(parameter), plain.get_parameter(DOWN))


# ---- edits --------------------------------------------------------------------------------------


def scale_data(parameter: nn.Parameter) -> None:
    parameter.data.mul_(1.5)


def add(parameter: nn.Parameter) -> None:
    with torch.no_grad():
        parameter.add_(0.25)


def set_one_element(parameter: nn.Parameter) -> None:
    parameter.data[-1, -1] = 3.0


def set_one_element_by_numpy(parameter: nn.Parameter) -> None:
    parameter.data.view(torch.int16).numpy()[5, 7] = 0x4000


def other_data(parameter: nn.Parameter) -> None:
    parameter.data = torch.full_like(parameter, 0.125)


IN_PLACE = [scale_data, add, set_one_element, set_one_element_by_numpy]


def every_matrix(model: nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.dim() == 2]


@pytest.mark.parametrize("edit", [*IN_PLACE, other_data])
def test_an_edit_is_seen_by_the_next_pass_and_never_reaches_the_file(edit, folder):
    """Streamed, resident and looked-up weights alike, one after the other and together."""
    model, plain = load_it(folder), plain_model(folder)
    content = weight_file(folder).read_bytes()
    expect_right(model, run(plain))
    for name in every_matrix(plain)[::5]:
        edit(model.get_parameter(name))
        edit(plain.get_parameter(name))
        expect_right(model, run(plain))
        assert_bit_equal(model.get_parameter(name), plain.get_parameter(name))
    assert weight_file(folder).read_bytes() == content
    handle(model).close()
    assert_bit_equal(run(model), run(plain))


def test_an_optimizer_edits_too(folder):
    model, plain = load_it(folder), plain_model(folder)
    content = weight_file(folder).read_bytes()
    optimizers = [torch.optim.AdamW(each.parameters(), lr=1e-3) for each in (model, plain)]
    for _ in range(3):
        for each, optimizer in zip((model, plain), optimizers, strict=True):
            each(IDS, labels=IDS).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        expect_right(model, run(plain))
    for (name, theirs), ours in zip(plain.named_parameters(), model.parameters(), strict=True):
        assert_bit_equal(ours, theirs), name
    assert weight_file(folder).read_bytes() == content


@pytest.mark.parametrize("edit", [scale_data, add])
def test_a_converted_parameter_cannot_be_edited_in_place(edit, folder):
    """PyTorch refuses to write into one NaN that stands for many; the values are as they were."""
    model, plain = load_it(folder, "float32"), plain_model(folder, "float32")
    parameter = model.get_parameter(DOWN)
    with pytest.raises(RuntimeError, match="more than one element"):
        edit(parameter)
    expect_right(model, run(plain))


def test_a_converted_parameter_can_be_given_other_values(folder):
    """All of it by `.data =`; the old values come from the state dict."""
    model, plain = load_it(folder, "float32"), plain_model(folder, "float32")
    for name in every_matrix(plain)[::5]:
        for each in (model, plain):
            parameter = each.get_parameter(name)
            parameter.data = each.state_dict()[name] * 1.5
        expect_right(model, run(plain))


# ---- ends ---------------------------------------------------------------------------------------


def test_close_gives_a_plain_model(shards, dtype):
    """It can be run, edited, trained, saved and streamed again."""
    model, plain = load_it(shards, dtype), plain_model(shards, dtype)
    expect_right(model, run(plain))
    handle(model).close()
    assert_bit_equal(run(model), run(plain))
    for each in (model, plain):
        each(IDS, labels=IDS).loss.backward()
        torch.optim.SGD(each.parameters(), lr=0.5).step()
    for (name, theirs), ours in zip(plain.named_parameters(), model.parameters(), strict=True):
        assert_bit_equal(ours, theirs), name
    assert_bit_equal(run(model), run(plain))
    load_again = load_it(shards, dtype)
    assert not torch.equal(run(load_again), run(model))


def test_close_while_the_file_is_cut(folder, dtype):
    """What resided on the device is kept; what only the file has is said to be missing."""
    model, expected = load_it(folder, dtype), run(plain_model(folder, dtype))
    expect_right(model, expected)
    path, pipe = weight_file(folder), handle(model)
    refused = pytest.raises(DiskError, match="was changed in place")
    with changed(path):
        os.truncate(path, path.stat().st_size // 2)
        with contextlib.nullcontext() if dtype == "auto" else refused:
            pipe.close()
    pipe.close()
    assert_bit_equal(run(model), expected)


def test_two_models_of_the_same_files(shards, dtype):
    one, other = load_it(shards, dtype, "40%"), load_it(shards, dtype, "60%")
    plain = plain_model(shards, dtype)
    expected = run(plain)
    for model in (one, other, one, other):
        expect_right(model, expected)
    for model in (one, plain):
        model.get_parameter(DOWN).data = torch.zeros(128, 512, dtype=plain.dtype)
    expect_right(one, run(plain))
    expect_right(other, expected)
    handle(one).close()
    expect_right(other, expected)


def test_loaded_in_one_thread_and_used_in_others(shards, dtype):
    expected = run(plain_model(shards, dtype))
    found: list[Any] = []

    def in_thread(call: Callable[[], Any]) -> Any:
        thread = threading.Thread(target=lambda: found.append(call()))
        thread.start()
        thread.join()
        return found.pop()

    model = in_thread(lambda: load_it(shards, dtype))
    expect_right(model, expected)
    assert_bit_equal(in_thread(lambda: run(model)), expected)
    threads = [threading.Thread(target=lambda: found.append(run(model))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    for result in found:
        assert_bit_equal(result, expected)


def open_files(folder: Path) -> list[str]:
    """Files of the folder that this process holds open, or has mapped."""
    names = []
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            names.append(str(link.readlink()))
    mapped = Path("/proc/self/maps").read_text().splitlines()
    return [name for name in (*names, *mapped) if str(folder) in name]


def collect() -> None:
    """A model tells its threads to end as it goes; a file that they read is garbage after them."""
    for _ in range(3):
        gc.collect()
        for thread in reading():
            thread.join(10)
    return_freed_memory()


def reading() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("superpipeline-")]


@pytest.mark.parametrize(
    ("end", "dtype"),
    [("deleted", "auto"), ("deleted", "float32"), ("closed", "float32"), ("failed", "auto")],
)
def test_a_model_that_is_gone_leaves_nothing(end, dtype, tmp_path):
    """No file, no mapping, no thread, no memory."""
    folder = save(tmp_path / "model", hidden=512)
    run(load_it(folder, dtype))  # what grows once
    collect()
    before, threads = anonymous_bytes(), len(reading())
    model = load_it(folder, dtype)
    run(model)
    assert open_files(folder)
    assert len(reading()) > threads
    held = anonymous_bytes() - before
    # As stored, the window is pages of the file.
    assert held > (15 if dtype == "float32" else 10) * MiB
    if end == "closed":
        handle(model).close()
        run(model)
    if end == "failed":
        path = weight_file(folder)
        with changed(path):
            os.truncate(path, path.stat().st_size // 2)
            with pytest.raises(DiskError):
                run(model)
    del model
    collect()
    assert not open_files(folder)
    assert len(reading()) == threads
    assert anonymous_bytes() - before < held / 4


@pytest.mark.parametrize("end", ["", "del model"])
def test_a_process_may_end_while_reading_ahead(end, folder):
    """Threads that came back from PyTorch into an interpreter that had ended aborted the process.

    Here a read goes in and out of PyTorch, for longer than the rest of the process takes.
    """
    script = f"""
        import os, time, torch, superpipeline
        read = os.preadv
        def slowly(*arguments):
            until = time.monotonic() + 0.2
            while time.monotonic() < until:
                torch.empty(8)
            return read(*arguments)
        model = superpipeline.load({str(folder)!r}, "50%", device="cpu", quiet=True)
        with torch.no_grad():
            model(torch.tensor([[1, 2, 3]]))
            os.preadv = slowly
            superpipeline.handle(model).engine.reset()
            superpipeline.handle(model).engine._fetch_ahead()
        {end}
    """
    assert run_script(script) == (0, "")


def run_script(script: str) -> tuple[int, str]:
    """The exit status and the standard error of a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    return done.returncode, done.stderr

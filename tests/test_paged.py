"""On the CPU a weight on disk is computed with where the system has its file's pages."""

import errno
import gc
import json
import os
import re
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import superpipeline
from superpipeline import advice, paged
from superpipeline.cpu_streams import CpuStreams
from superpipeline.disk import DiskFile
from superpipeline.errors import DiskError
from superpipeline.paged import ReadAhead
from zoo import assert_bit_equal

MIB = 2**20
PAGE = 4096
WIDTH, DEPTH = 1024, 12  # 4 MiB a layer

pytestmark = pytest.mark.skipif(not advice.can_bring(), reason="no pages to bring: not Linux")


class Stack(nn.Module):
    def __init__(self, width: int = WIDTH, depth: int = DEPTH) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(depth))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


@pytest.fixture
def file(tmp_path: Path) -> DiskFile:
    torch.manual_seed(0)
    path = tmp_path / "model.safetensors"
    save_file(Stack().state_dict(), path)
    return DiskFile(path)


def model_of(file: DiskFile, make: type[nn.Module] = Stack) -> nn.Module:
    """The model with its weights on disk."""
    with torch.device("meta"):
        model = make()
    model.load_state_dict(dict(file.tensors), assign=True)
    return model.requires_grad_(False)


def plain_of(file: DiskFile, make: type[nn.Module] = Stack) -> nn.Module:
    """The same in memory. At the mapping's alignment: on the CPU that is part of the result."""
    model = model_of(file, make)
    for parameter in model.parameters():
        offset = parameter.data_ptr() - file.address  # the mapping is not looked at
        memory = torch.empty(parameter.nbytes + 128, dtype=torch.uint8)
        skip = (offset - memory.data_ptr()) % 64
        held = memory[skip : skip + parameter.nbytes]
        values = bytearray(file._bytes(offset, parameter.nbytes))
        held.copy_(torch.frombuffer(values, dtype=torch.uint8))
        parameter.data = held.view(parameter.dtype).view(parameter.shape)
    return model


def run(model: nn.Module, seed: int = 1) -> torch.Tensor:
    x = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return model(x)


def run_twice(model: nn.Module) -> None:
    run(model)
    run(model)


def mapped_bytes(path: Path) -> int:
    """What this process has of the file's pages, in all of its mappings."""
    found = 0
    for part in re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text()):
        if str(path) in part.partition("\n")[0]:
            (rss,) = re.findall(r"^Rss: +(\d+) kB", part, re.MULTILINE)
            found += int(rss) * 1024
    return found


def forget_cache(file: DiskFile) -> None:
    os.sync()
    os.posix_fadvise(file.fd, 0, 0, os.POSIX_FADV_DONTNEED)


@pytest.fixture
def unmapped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CpuStreams, "maps_files", False)


# ---- what is in memory -----------------------------------------------------------------------


def test_the_window_is_pages_of_the_file(file: DiskFile) -> None:
    model, expected = model_of(file), run(plain_of(file))
    superpipeline.stream(model, k=2, device="cpu", quiet=True)
    pipe = superpipeline.handle(model)
    seen = []
    for layer in model.layers:
        layer.register_forward_hook(lambda *_: seen.append(mapped_bytes(file.path)))
    assert_bit_equal(run(model), expected)
    assert_bit_equal(run(model), expected)
    # At either end of a block, the rest of a page of 2 MiB.
    most = pipe.plan.window_bytes + 2 * 2 * 2 * MIB
    assert max(seen) <= most < len(model.layers) * 4 * MIB
    assert min(seen) >= 4 * MIB


def test_pages_go_with_the_window(file: DiskFile) -> None:
    model = model_of(file)
    superpipeline.stream(model, k=2, device="cpu", quiet=True)
    seen: list[int] = []
    model.layers[-1].register_forward_hook(lambda *_: seen.append(mapped_bytes(file.path)))
    run(model)
    assert seen[0] > 4 * MIB
    superpipeline.handle(model).close()
    gc.collect()
    assert mapped_bytes(file.path) < MIB


def test_nothing_is_copied_and_no_thread_is_started(
    file: DiskFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, expected = model_of(file), run(plain_of(file))
    superpipeline.stream(model, k=2, device="cpu", quiet=True)
    run(model)
    threads = threading.active_count()

    def no_read(*_: object) -> int:
        raise AssertionError("a copy was made")

    monkeypatch.setattr(os, "preadv", no_read)
    assert_bit_equal(run(model), expected)
    assert threading.active_count() == threads
    assert superpipeline.handle(model).stats().disk_bytes >= 2 * DEPTH * 4 * MIB - 8 * MIB


@pytest.mark.usefixtures("unmapped")
def test_where_pages_cannot_be_had_they_are_copied(file: DiskFile) -> None:
    model, expected = model_of(file), run(plain_of(file))
    superpipeline.stream(model, k=2, device="cpu", quiet=True)
    for _ in range(3):
        assert_bit_equal(run(model), expected)
    gc.collect()
    assert mapped_bytes(file.path) < 4 * MIB


# ---- who writes ------------------------------------------------------------------------------


class Writing(Stack):
    """Every layer's weight is changed by its own forward, in place."""

    def __init__(self) -> None:
        super().__init__()
        for layer in self.layers:
            layer.register_forward_pre_hook(lambda layer, _: layer.weight.data.mul_(0.5))


@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.filterwarnings("ignore:superpipeline. no copy overlaps:RuntimeWarning")
def test_a_forward_may_write_its_weights(file: DiskFile, k: int) -> None:
    model, plain = model_of(file, Writing), plain_of(file, Writing)
    superpipeline.stream(model, k=k, device="cpu", quiet=True)
    for seed in range(4):
        assert_bit_equal(run(model, seed), run(plain, seed))


def test_edits_by_users_are_computed_with_and_kept(file: DiskFile) -> None:
    model, plain = model_of(file), plain_of(file)
    superpipeline.stream(model, k=2, device="cpu", quiet=True)
    for seed in range(4):
        for each in (model, plain):
            each.layers[seed].weight.data[seed, ::7] += 0.25
            each.layers[-1].weight.data.mul_(0.9)
        assert_bit_equal(run(model, seed), run(plain, seed))
    for shown, expected in zip(model.parameters(), plain.parameters(), strict=True):
        assert_bit_equal(shown.data, expected.data)


@pytest.mark.parametrize("k", [1, 2, 3, 4])
@pytest.mark.filterwarnings("ignore:superpipeline. no copy overlaps:RuntimeWarning")
def test_a_tied_weight_keeps_its_edits(file: DiskFile, k: int) -> None:
    """It was mapped at one place for all of its blocks: what one let go, another still needed."""

    class Tied(Stack):
        def __init__(self) -> None:
            super().__init__()
            for layer in (1, 4, 5):
                self.layers[layer].weight = self.layers[0].weight

    model, plain = model_of(file, Tied), plain_of(file, Tied)
    superpipeline.stream(model, k=k, device="cpu", quiet=True)
    for seed in range(4):
        assert_bit_equal(run(model, seed), run(plain, seed))
        for each in (model, plain):
            each.layers[0].weight.data.mul_(1.5)


class Mixed(nn.Module):
    """Two large weights, and a small one that lies elsewhere in the file."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = (nn.Parameter(torch.randn(512, 512) / 22) for _ in range(2))
        self.small = nn.Parameter(torch.randn(512, 8) / 22)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x @ self.a + (x @ self.small).sum()) @ self.b


@pytest.mark.parametrize("k", [2, 3, 4])
def test_a_run_holds_no_other_blocks_weights(tmp_path: Path, k: int) -> None:
    """All small weights lie between the first block's large ones, and were let go with these."""

    def make() -> nn.Module:
        return nn.Sequential(*[Mixed() for _ in range(6)])

    torch.manual_seed(0)
    state = make().state_dict()
    order = ["0.a", *[f"{i}.small" for i in range(6)], "0.b"]
    order += [f"{i}.{name}" for i in range(1, 6) for name in "ab"]
    path = tmp_path / "model.safetensors"
    write_in_order(path, {name: state[name] for name in order})
    file = DiskFile(path)
    with torch.device("meta"):
        model = make()
    model.load_state_dict(dict(file.tensors), assign=True)
    plain = plain_of(file, make)  # type: ignore[arg-type]
    superpipeline.stream(model.requires_grad_(False), k=k, device="cpu", quiet=True)
    x = torch.randn(3, 512)
    for _ in range(4):
        with torch.no_grad():
            assert_bit_equal(model(x), plain(x))
        for each in (model, plain):
            for layer in each:
                layer.small.data.mul_(-3)


def write_in_order(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """safetensors sorts the names itself."""
    header, at = {}, 0
    for name, tensor in tensors.items():
        end = at + tensor.nbytes
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    data = b"".join(tensor.numpy().tobytes() for tensor in tensors.values())
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def test_a_fetch_undoes_what_was_written_to_shared_pages(file: DiskFile) -> None:
    """A write that nothing counts, in a turn that ended, stayed in the pages at the ends."""
    name, tensor = list(file.tensors.items())[3]
    at = tensor.data_ptr() - file.address
    assert name and at % PAGE
    mapping, pages = file.map(), paged.Pages(paged.Piece(file, at, tensor.nbytes))
    place = mapping[at : at + tensor.nbytes]
    assert pages.bring(place)
    place.fill_(7)
    mapping[at - 1] = mapping[at + tensor.nbytes] = 9  # the neighbours', who are in their turn
    pages.let_go(place)
    assert pages.bring(place)
    values = bytearray(file._bytes(at, tensor.nbytes))
    assert torch.equal(place, torch.frombuffer(values, dtype=torch.uint8))
    assert mapping[at - 1] == mapping[at + tensor.nbytes] == 9


def test_what_one_block_lets_go_its_neighbour_keeps(tmp_path: Path) -> None:
    """Two weights share a page; while one is written in its turn, the other's pages are let go."""
    sizes = {"a": 3 * PAGE + 100, "b": 3 * PAGE + 64}
    values = {name: torch.arange(n, dtype=torch.uint8) for name, n in sizes.items()}
    save_file(values, tmp_path / "x.safetensors")
    file = DiskFile(tmp_path / "x.safetensors")
    mapping, streams = file.map(), CpuStreams()
    places = {}
    for name, tensor in file.tensors.items():
        at = tensor.data_ptr() - file.address
        piece = paged.Piece(file, at, sizes[name])
        places[name] = paged.Pages(piece), mapping[at : at + sizes[name]]
    for pages, place in places.values():
        assert pages.bring(place)
    written = places["a"][1]
    written.add_(1)
    pages, place = places["b"]
    pages.let_go(place)
    assert torch.equal(written, values["a"] + 1)
    assert torch.equal(place, values["b"])
    streams.close()


# ---- the disk --------------------------------------------------------------------------------


def test_a_cold_file_is_read_ahead_and_right(file: DiskFile) -> None:
    model, expected = model_of(file), run(plain_of(file))
    superpipeline.stream(model, k=2, device="cpu", quiet=True)
    for _ in range(2):
        forget_cache(file)
        assert_bit_equal(run(model), expected)
    names = [thread.name for thread in threading.enumerate()]
    assert "superpipeline-read-ahead" in names
    superpipeline.handle(model).close()
    del model
    gc.collect()
    assert wait_for(lambda: "superpipeline-read-ahead" not in threads())


def test_read_ahead_reaches_further_than_the_window_and_asks_once(
    file: DiskFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(DiskFile, "is_cached", lambda *_: False)
    monkeypatch.setattr(DiskFile, "cache", lambda self, offset, _: asked.append(offset))
    monkeypatch.setattr(paged, "_REACH_BYTES", 3 * MIB)
    piece = paged.Piece(file, 0, MIB)
    runs = [
        [(torch.empty(0), paged.Pages(piece._replace(offset=block * MIB)))] for block in range(8)
    ]
    ahead = ReadAhead(runs)
    ahead.look(iter(range(8)))
    ahead.look(iter(range(1, 8)))
    ahead.look(iter([5, 5, 5]))
    assert wait_for(lambda: len(asked) >= 6)
    assert asked == [MIB * block for block in (0, 1, 2, 3, 4, 5)]


def test_uncached_files_are_dropped_behind_the_window(
    file: DiskFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paged, "_REACH_BYTES", 0)
    file.keep_cached = False
    model, expected = model_of(file), run(plain_of(file))
    superpipeline.stream(model, k=2, device="cpu", quiet=True)
    forget_cache(file)
    for _ in range(2):
        assert_bit_equal(run(model), expected)
    cached = sum(
        file.is_cached(at, 1) for at in range(0, file.num_bytes, MIB)
    )  # of 48, in pieces of 1 MiB
    assert cached <= 24


def failing(at: int) -> Iterator[bool]:
    for count in range(10_000):
        yield count != at


@pytest.mark.parametrize("at", [0, 1, 5, 11, 12])
def test_a_page_that_cannot_be_had_is_named_and_the_next_call_is_right(
    file: DiskFile, at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No real disk fails when a test wants it to: the advice fails, and so does the read of it."""
    model, expected = model_of(file), run(plain_of(file))
    superpipeline.stream(model, k=2, device="cpu", quiet=True)
    assert_bit_equal(run(model), expected)

    def broken(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        works, bring = failing(at), advice.bring
        patch.setattr(advice, "bring", lambda *pages: next(works) and bring(*pages))
        patch.setattr(os, "preadv", broken)
        with pytest.raises(DiskError, match=rf"{file.path} cannot be read at byte \d+: .*Input"):
            run_twice(model)
    assert_bit_equal(run(model), expected)


def test_where_only_the_advice_fails_the_bytes_are_read(
    file: DiskFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, expected = model_of(file), run(plain_of(file))
    superpipeline.stream(model, k=2, device="cpu", quiet=True)
    monkeypatch.setattr(advice, "bring", lambda *_: False)
    for _ in range(3):
        assert_bit_equal(run(model), expected)


def test_a_file_changed_during_a_pass_does_not_pass(file: DiskFile) -> None:
    """The pages of a private mapping that nobody wrote to show what becomes of the file."""
    model = model_of(file)
    superpipeline.stream(model, k=2, device="cpu", quiet=True)
    expected = run(model)

    def overwrite(*_: object) -> None:
        with file.path.open("r+b") as other:
            other.seek(file.num_bytes - 100)
            other.write(b"\0" * 100)

    hook = model.layers[-1].register_forward_pre_hook(overwrite)
    with pytest.raises(DiskError, match="changed in place"):
        run(model)
    hook.remove()
    with pytest.raises(DiskError, match="changed in place"):
        run(model)
    assert expected.isfinite().all()


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate()]


def wait_for(condition: object, seconds: float = 30.0) -> bool:
    import time

    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():  # type: ignore[operator]
            return True
        time.sleep(0.01)
    return False

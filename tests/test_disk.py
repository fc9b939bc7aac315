"""Disk files: what is refused when they are opened, what is read, and what happens meanwhile."""

import ctypes
import gc
import json
import os
import pickle
import subprocess
import sys
import textwrap
import weakref
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from superpipeline import disk
from superpipeline.disk import DiskFile, Piece, is_worth_caching, locate, stand_in
from superpipeline.errors import DiskError
from superpipeline.header import DTYPES
from superpipeline.pagemap import CAN_SEE_EDITS, private_pages

PAGE = 4096


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


def write(path: Path, header: object, data: bytes = b"", length: int | None = None) -> None:
    """A file with any header, right or wrong."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = len(text) if length is None else length
    path.write_bytes(size.to_bytes(8, "little") + text + data)


def entry(begin: int, end: int, dtype: str = "U8", shape: list[int] | None = None) -> dict:
    return {
        "dtype": dtype,
        "shape": [end - begin] if shape is None else shape,
        "data_offsets": [begin, end],
    }


def numbered(path: Path, num_bytes: int = 40 * PAGE) -> tuple[DiskFile, torch.Tensor]:
    """A file with one tensor of bytes, and these bytes."""
    values = torch.randint(256, (num_bytes,), dtype=torch.uint8)
    save_file({"w": values}, path)
    return DiskFile(path), values


def read(file: DiskFile, offset: int, num_bytes: int) -> torch.Tensor:
    destination = torch.full((num_bytes,), 0xA5, dtype=torch.uint8)
    file.read_into([destination], offset)
    return destination


def piece_of(tensor: torch.Tensor) -> Piece:
    stored = locate(tensor)
    assert stored is not None
    (piece,) = stored.sources
    assert isinstance(piece, Piece)
    return piece


def on(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of `tensor`, read from its file."""
    piece = piece_of(tensor)
    return read(piece.file, piece.offset, piece.num_bytes)


# ---- opening ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DTYPES)
def test_every_dtype_is_read_as_it_was_written(path, name) -> None:
    raw = torch.randint(256, (48,), dtype=torch.uint8)
    if name == "BOOL":
        raw %= 2
    dtype = DTYPES[name]
    write(path, {"w": entry(0, 48, name, [2, 24 // dtype.itemsize])}, raw.numpy().tobytes())
    tensor = DiskFile(path).tensors["w"]
    assert tensor.dtype == dtype
    assert tensor.shape == (2, 24 // dtype.itemsize)
    assert torch.equal(tensor.contiguous().view(torch.uint8).view(-1), raw)
    assert torch.equal(on(tensor), raw)


def test_the_same_tensors_as_safetensors_reads(path) -> None:
    tensors = {
        "scalar": torch.tensor(2.5),
        "none": torch.empty(0, 7),
        "odd": torch.arange(13, dtype=torch.uint8),
        "half": torch.randn(5, 3).half(),
        "double": torch.randn(2, 2, 2, dtype=torch.float64),
    }
    save_file(tensors, path, metadata={"format": "pt"})
    ours, theirs = DiskFile(path).tensors, load_file(path)
    assert set(ours) == set(theirs)
    assert len(ours) == 5
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype
        assert torch.equal(ours[name], tensor)


def test_a_file_without_tensors(path) -> None:
    save_file({}, path)
    assert dict(DiskFile(path).tensors) == {}


def test_tensors_need_not_be_aligned(path) -> None:
    """Safetensors aligns the first tensor to 8 bytes, and each next one to nothing."""
    values = torch.randn(4)
    header = {"a": entry(0, 1), "b": entry(1, 17, "F32", [4])}
    write(path, header, b"x" + values.numpy().tobytes())
    tensor = DiskFile(path).tensors["b"]
    assert tensor.data_ptr() % 4 != 0
    assert torch.equal(tensor, values)


BAD = {
    "empty": (lambda p: p.write_bytes(b""), "has 0 bytes"),
    "seven bytes": (lambda p: p.write_bytes(b"1234567"), "has 7 bytes"),
    "long header": (lambda p: write(p, b"{}", length=10**15), "1000000000000000"),
    "cut in the header": (lambda p: write(p, b"{}", length=50), "ends at byte 10.*takes 58"),
    "no json": (lambda p: write(p, b"{'w': 1}"), "from byte 8.* is not JSON"),
    "no text": (lambda p: write(p, b"\xff\xfe\xfa"), "from byte 8.* is not JSON"),
    "no table": (lambda p: write(p, [1, 2]), "no table of tensors"),
    "no entry": (lambda p: write(p, {"w": 3}), "does not say where w is: 3"),
    "no dtype": (lambda p: write(p, {"w": {"shape": [1]}}), "does not say where w is"),
    "odd dtype": (lambda p: write(p, {"w": entry(0, 4) | {"dtype": ["F32"]}}, b"1234"), "where w"),
    "negative": (lambda p: write(p, {"w": entry(-4, 0, "U8", [4])}, b"1234"), "where w is"),
    "fraction": (lambda p: write(p, {"w": entry(0, 4, "U8", [4.0])}, b"1234"), "where w is"),
    "three": (lambda p: write(p, {"w": {**entry(0, 1), "data_offsets": [0, 1, 2]}}, b"1"), "where"),
    "unknown dtype": (
        lambda p: write(p, {"w": entry(0, 4, "F7", [1])}, b"1234"),
        "w has the dtype F7, which is none of BOOL, .*F32",
    ),
    "size": (
        lambda p: write(p, {"w": entry(0, 8, "F32", [3])}, b"12345678"),
        r"w \(F32, \[3\]\) takes 12 bytes.*gives it 8, from byte",
    ),
    "backwards": (lambda p: write(p, {"w": entry(4, 0, "U8", [4])}, b"1234"), "w .*takes 4 bytes"),
    "overlap": (
        lambda p: write(p, {"v": entry(0, 4), "w": entry(3, 7)}, b"1234567"),
        r"w, from byte \d+ on, overlaps v, which ends at byte",
    ),
    "cut": (
        lambda p: write(p, {"v": entry(0, 4), "w": entry(4, 12)}, b"1234567"),
        r"ends at byte \d+, and w takes bytes \d+ to \d+: the file was cut short",
    ),
    "pickle": (lambda p: p.write_bytes(pickle.dumps([1])), "a pickle, which can run any code"),
    "torch file": (lambda p: torch.save({"w": torch.ones(2)}, p), "pickle.*save_file"),
    "folder": (lambda p: p.mkdir(), "cannot be"),
    "missing": (lambda p: None, "cannot be opened: No such file"),
}


@pytest.mark.parametrize("what", BAD)
def test_a_damaged_file_is_refused_when_it_is_opened(path, what) -> None:
    make, words = BAD[what]
    make(path)
    with pytest.raises(DiskError, match=words) as caught:
        DiskFile(path)
    assert str(path) in str(caught.value)


def test_a_file_larger_than_all_memory_can_be_opened(path) -> None:
    """A private mapping that can be written is charged to memory, unless one asks not to."""
    num_bytes = 2 * psutil.virtual_memory().total
    write(path, {"w": entry(0, num_bytes)})
    start = path.stat().st_size
    with path.open("r+b") as file:
        file.truncate(start + num_bytes)
        file.seek(-3, os.SEEK_END)
        file.write(b"end")
    tensor = DiskFile(path).tensors["w"]
    assert bytes(tensor[-3:]) == b"end"
    assert bytes(on(tensor[-4:])) == b"\0end"


# ---- reading ---------------------------------------------------------------------------------


def test_any_range_is_read(path) -> None:
    file, values = numbered(path)
    start = piece_of(file.tensors["w"]).offset
    for offset, length in [(0, 1), (1, PAGE), (PAGE - 1, 2), (17, 30 * PAGE), (0, len(values))]:
        assert torch.equal(read(file, start + offset, length), values[offset : offset + length])
    read(file, 0, 0)


@pytest.mark.parametrize("most", [1000, PAGE, 10**9])
def test_parts_are_the_whole_and_cut_the_file_where_pages_end(path, most) -> None:
    file, values = numbered(path)
    piece = piece_of(file.tensors["w"][5:-7])
    read_so_far = torch.empty(piece.num_bytes, dtype=torch.uint8)
    end = 0
    for begin, part in piece.parts(most):
        assert begin == end
        assert part.num_bytes <= most
        assert part.working_bytes == 0
        assert begin == 0 or part.offset % most == 0
        end = begin + part.num_bytes
        part.read_into(read_so_far[begin:end])
    assert torch.equal(read_so_far, values[5:-7])


@pytest.mark.parametrize("edited", [False, True])
@pytest.mark.parametrize("at_most", [1, 7, PAGE, 10**9])
def test_several_are_filled_one_after_the_other(path, at_most, edited, monkeypatch) -> None:
    """However little the system gives at a time, and where its pages were edited."""
    file, values = numbered(path, 2 * PAGE)
    start = piece_of(file.tensors["w"]).offset
    if edited:
        file.tensors["w"][10] ^= 1
        values[10] ^= 1
    calls, sizes, preadv = [], [0, 5, 1, PAGE, 0, 300], os.preadv

    def some(descriptor: int, memories: list[memoryview], offset: int) -> int:
        held = bytearray(min(at_most, sum(map(len, memories))))
        got = preadv(descriptor, [held], offset)
        calls.append(got)
        at = 0
        for memory in memories:
            part = held[at : at + len(memory)]
            memory[: len(part)] = part
            at += len(memory)
        return got

    monkeypatch.setattr(os, "preadv", some)
    memories = [torch.zeros(size, dtype=torch.uint8) for size in sizes]
    file.read_into(memories, start + 3)
    assert torch.equal(torch.cat(memories), values[3 : 3 + sum(sizes)])
    assert bool(calls) is not edited


def test_reading_beyond_the_end_names_the_file_and_the_byte(path) -> None:
    file, _ = numbered(path)
    with pytest.raises(DiskError, match=f"ends at byte {file.num_bytes}; 10 more") as caught:
        read(file, file.num_bytes - 5, 15)
    assert str(path) in str(caught.value)


def test_edits_through_the_mapping_are_read_and_never_written(path) -> None:
    assert CAN_SEE_EDITS
    file, values = numbered(path)
    before = path.read_bytes()
    tensor, piece = file.tensors["w"], piece_of(file.tensors["w"])
    assert file.private_pages(piece.offset, piece.num_bytes) == 0
    assert int(tensor.int().sum()) == int(values.int().sum())  # seen, not edited
    assert file.private_pages(piece.offset, piece.num_bytes) == 0
    tensor[3 * PAGE : 5 * PAGE] = 7
    values[3 * PAGE : 5 * PAGE] = 7
    assert 2 <= file.private_pages(piece.offset, piece.num_bytes) <= 3
    assert file.private_pages(piece.offset, PAGE) == 0
    assert torch.equal(on(tensor), values)
    assert path.read_bytes() == before


def test_an_edit_is_seen_in_the_process_that_made_it() -> None:
    """A fork that went on with its parent's page table would miss what it edits itself."""
    script = """
        import mmap, os, tempfile
        import numpy as np
        from superpipeline.pagemap import private_pages
        file = tempfile.TemporaryFile()
        file.truncate(65536)
        mapping = mmap.mmap(file.fileno(), 65536, access=mmap.ACCESS_COPY)
        address = np.frombuffer(mapping, np.uint8).ctypes.data
        assert private_pages(address, 65536) == 0
        child = os.fork()
        if not child:
            mapping[5000] = 1
            os._exit(private_pages(address, 65536))
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
        assert private_pages(address, 65536) == 0
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True, timeout=120)


def test_nothing_is_private_of_nothing() -> None:
    assert private_pages(123, 0) == 0


# ---- what happens to files that are in use ---------------------------------------------------


def test_a_file_that_was_replaced_is_still_read(path) -> None:
    """Saving into the folder that is streamed from, by writing another file and renaming it."""
    file, values = numbered(path)
    other = path.with_name("other")
    save_file({"w": torch.zeros_like(values)}, other)
    other.replace(path)
    assert torch.equal(on(file.tensors["w"]), values)
    assert int(DiskFile(path).tensors["w"].sum()) == 0
    path.unlink()
    assert torch.equal(on(file.tensors["w"]), values)


@pytest.mark.parametrize("edited", [False, True])
def test_a_file_that_was_cut_is_noticed(path, edited) -> None:
    """After an edit the mapping is read, where the system kills who reads beyond the end."""
    file, _ = numbered(path)
    if edited:
        file.tensors["w"][PAGE] = 1
    os.truncate(path, 10 * PAGE)
    with pytest.raises(DiskError, match=rf"had {file.num_bytes} bytes and has 40960") as caught:
        read(file, PAGE, 20 * PAGE)
    assert f"byte {PAGE if edited else 40960};" in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("grow", [False, True])
def test_a_file_that_was_written_in_place_is_noticed(path, grow) -> None:
    file, _ = numbered(path)
    with path.open("r+b") as other:
        other.seek(0, os.SEEK_END) if grow else other.seek(200)
        other.write(b"new")
    os.utime(path, ns=(1, file._modified + 2_500_000_000))
    words = "and has" if grow else r"modified \+2.500 s"
    with pytest.raises(DiskError, match=f"changed in place since it was opened.*{words}"):
        read(file, 0, PAGE)


def test_a_read_error_names_the_file_the_byte_and_the_reason(path) -> None:
    file, _ = numbered(path)
    write_only = os.open(path, os.O_WRONLY)
    os.dup2(write_only, file.fd)  # reading it fails from now on
    os.close(write_only)
    with pytest.raises(DiskError, match=f"{path} cannot be read at byte 100: .*Bad file desc"):
        read(file, 100, PAGE)


def test_a_file_is_closed_when_nothing_shows_it_any_more(path) -> None:
    """It once kept tensors of its mapping, and these kept it, for good."""
    file, values = numbered(path)
    close, known = file._close, weakref.ref(file)
    tensor = file.tensors["w"]
    del file
    gc.collect()
    assert torch.equal(on(tensor), values)
    del tensor
    gc.collect()
    assert known() is None
    assert not close.alive
    assert not disk._files


# ---- the page cache --------------------------------------------------------------------------


def cached_bytes(file: DiskFile) -> int:
    pages = np.zeros(-(-file.num_bytes // PAGE), np.uint8)
    libc = ctypes.CDLL(None, use_errno=True)
    assert (
        libc.mincore(
            ctypes.c_void_p(file.address),
            ctypes.c_size_t(file.num_bytes),
            ctypes.c_void_p(pages.ctypes.data),
        )
        == 0
    )
    return int((pages & 1).sum()) * PAGE


@pytest.mark.parametrize(("number", "size"), [(200, 150_001), (3, 10_000_001)])
def test_what_was_read_is_dropped_from_the_cache_or_kept(path, number, size) -> None:
    """Large pages that two ranges share once stayed: of many small tensors, most of all bytes."""
    values = torch.ones(size, dtype=torch.uint8)
    save_file({f"w{n:03}": values.clone() for n in range(number)}, path)
    file = DiskFile(path)
    with path.open("rb") as other:
        os.fsync(other.fileno())  # what is not written yet cannot be dropped
        os.posix_fadvise(other.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    least = cached_bytes(file)  # 0, unless the files live in memory
    destination = torch.empty(size, dtype=torch.uint8)
    for keep in (True, False):
        file.keep_cached = keep
        for tensor in file.tensors.values():
            for begin, part in piece_of(tensor).parts(4 * 2**20):
                part.read_into(destination[begin : begin + part.num_bytes])
        expected = file.num_bytes if keep else least
        assert abs(cached_bytes(file) - expected) <= 2**21  # one large page


def test_what_is_worth_caching(tmp_path) -> None:
    for number in range(3):
        (tmp_path / f"{number}.safetensors").write_bytes(bytes(1000))
    (tmp_path / "other").write_bytes(bytes(10**6))
    assert is_worth_caching(tmp_path / "0.safetensors", 4000)
    assert not is_worth_caching(tmp_path / "0.safetensors", 3500)


def test_systems_without_linux_calls(path) -> None:
    """Importing and reading works where offsets cannot be read at and nothing can be advised."""
    numbered(path)
    script = f"""
        import os, sys
        opens = os.open
        def refuse(path, *rest, **more):
            if "pagemap" in str(path):
                raise FileNotFoundError(path)
            return opens(path, *rest, **more)
        os.open = refuse
        del os.preadv, os.posix_fadvise
        sys.platform = "another"
        import superpipeline, torch
        from pathlib import Path
        from superpipeline.disk import DiskFile, locate
        from superpipeline.pagemap import CAN_SEE_EDITS
        from superpipeline.reader import Reader
        assert not CAN_SEE_EDITS
        file = DiskFile(Path({str(path)!r}), keep_cached=False)
        tensor = file.tensors["w"]
        got = torch.empty_like(tensor)
        reader = Reader(num_threads=4, chunk_bytes=1000)
        reader.read([(got, locate(tensor).sources[0])])
        reader.close()
        assert torch.equal(got, tensor)
        assert file.private_pages(0, 4096) == 0
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True, timeout=120)


# ---- where a tensor is -----------------------------------------------------------------------


def test_views_of_mapped_tensors_are_located(path) -> None:
    values = torch.randn(6, 8)
    save_file({"a": torch.zeros(3), "w": values}, path)
    shown = DiskFile(path).tensors["w"]
    for view, plain in (
        (shown[2:4], values[2:4]),
        (shown.T, values.T),
        (shown[1:, 3], values[1:, 3]),
    ):
        stored = locate(view)
        assert stored is not None and stored.is_mapped
        assert stored.stride == view.stride()
        raw = on(view).view(torch.float32)
        assert torch.equal(torch.as_strided(raw, view.shape, view.stride()), plain)
    assert locate(values) is None
    assert locate(shown.clone()) is None
    assert locate(torch.empty(0)) is None
    assert locate(shown.to("meta")) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float8_e4m3fn, torch.int8, torch.bool])
def test_a_stand_in_costs_one_element_and_cannot_be_written(path, dtype) -> None:
    file, _ = numbered(path)
    piece = piece_of(file.tensors["w"][: 12 * dtype.itemsize])
    parameter = torch.nn.Parameter(torch.zeros(3, 4).to(dtype), requires_grad=False)
    stand_in(parameter, (piece,))
    assert parameter.shape == (3, 4)
    assert parameter.untyped_storage().nbytes() == dtype.itemsize
    assert bool((parameter.float().isnan() | (parameter.float() >= 1)).all())
    stored = locate(parameter)
    assert stored is not None
    assert stored == ((piece,), (4, 1), False)
    with pytest.raises(RuntimeError, match="more than one element"):
        parameter.data.copy_(torch.zeros(3, 4))
    address = parameter.data_ptr()
    del parameter
    gc.collect()
    assert address not in disk._stand_ins

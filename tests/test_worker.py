"""Programs that end while threads of ours are at work end at once, with their own status."""

import subprocess
import sys
import textwrap

import pytest

START = """
    import sys, time, atexit, torch
    from superpipeline.reader import Reader
    from superpipeline.staging import Fetcher
    from superpipeline.cpu_streams import CpuStreams
    from superpipeline.streams import COMPUTE, FETCH, Run

    class Byte:
        num_bytes, working_bytes = 1, 0
        def read_into(self, destination):
            destination.fill_(1)  # through torch, and back
        def parts(self, most):
            yield 0, self

    class Bytes(Byte):
        num_bytes = 2000
        def parts(self, most):
            return ((begin, Byte()) for begin in range(2000))

    class Device:
        def enter(self): pass
        def copy(self, destination, source): destination.copy_(source)
        def record(self): return self
        def synchronize(self): time.sleep(0.001)

    place = torch.zeros(2000, dtype=torch.uint8)
"""
ENDS = {
    "cpu": """
        streams = CpuStreams()
        for _ in range(1000):
            streams.copy([Run(place, Bytes())])
    """,
    "reader": """
        reader = Reader()
        for _ in range(20_000):
            reader.submit(place[:1], Byte())
    """,
    "ring": """
        fetcher = Fetcher(Device(), torch.zeros(5000, dtype=torch.uint8))
        fetcher.copy([(place, Bytes())] * 10)
    """,
    # What ends after the threads must not wait for them.
    "late calls": """
        streams = CpuStreams()
        fetcher = Fetcher(Device(), torch.zeros(5000, dtype=torch.uint8))
        for _ in range(100):
            streams.copy([Run(place, Bytes())])
        fetcher.copy([(place, Bytes())])
        from superpipeline import worker
        atexit.unregister(worker._stop_all)
        def end():
            for each in (streams, fetcher):
                each.synchronize()
                each.close()
            streams.wait(COMPUTE, streams.record(FETCH))
            print("ended")
        atexit.register(end)
        atexit.register(worker._stop_all)  # the last one registered is the first to be called
    """,
}


@pytest.mark.parametrize("end", ENDS)
def test_a_program_may_end_while_threads_work(end) -> None:
    """It once aborted, three times of four: a thread came back from torch meanwhile."""
    script = textwrap.dedent(START) + textwrap.dedent(ENDS[end])
    for delay in (0, 0.03):
        result = subprocess.run(
            [sys.executable, "-c", script + f"\ntime.sleep({delay})\nsys.exit(3)\n"],
            check=False,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert result.returncode == 3, result.stderr
        assert result.stderr == ""
        assert result.stdout == ("ended\n" if end == "late calls" else "")

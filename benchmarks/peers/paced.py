"""A slower link for every contender alike, because most users have one.

`paced_link.c` says how. It is compiled where it is used, which takes a second and needs a C
compiler; a worker refuses to measure if its probe of the link shows that nothing was paced.
"""

import functools
import shutil
import subprocess
import tempfile
from pathlib import Path

SOURCE = Path(__file__).parent / "paced_link.c"
_folder = tempfile.TemporaryDirectory(prefix="paced-link-")  # removed as the interpreter ends


def pacing_environment(gb_per_s: float) -> dict[str, str]:
    """Variables for a process in which copies run at most at `gb_per_s`.

    Raises:
        RuntimeError: there is no C compiler, or it failed.
    """
    return {"LD_PRELOAD": str(_library()), "PACED_LINK_GBPS": str(gb_per_s)}


@functools.cache
def _library() -> Path:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise RuntimeError("--link needs a C compiler (cc or gcc) to build paced_link.c")
    library = Path(_folder.name) / "paced_link.so"
    command = [compiler, "-O2", "-shared", "-fPIC", "-o", str(library), str(SOURCE)]
    done = subprocess.run(
        [*command, "-ldl", "-lpthread"], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{compiler} failed on {SOURCE.name}: {done.stderr[:400]}")
    return library

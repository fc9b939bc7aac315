"""The command line: every option, every refusal, on a tiny model made here."""

import importlib
import json
import subprocess
import sys

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner, Result

import superpipeline
from model_folder import make_folder
from superpipeline import cgroup
from superpipeline.checkpoint import find
from superpipeline.cli import app
from superpipeline.cli.figures import floor_seconds
from superpipeline.cli.generate import Generation, first_difference
from superpipeline.errors import SuperpipelineError, VerificationError

# Not `from superpipeline.cli import run`: that is the command, this its module.
RUN = importlib.import_module("superpipeline.cli.run")
REQUEST = importlib.import_module("superpipeline.cli.request")
NUM_TOKENS = 6


@pytest.fixture
def loading_fails_the_test(monkeypatch) -> None:
    def fail(request):
        pytest.fail("bad input must be refused before anything is looked for")

    monkeypatch.setattr(RUN, "_find", fail)


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def run(folder: str, *options: str) -> Result:
    return invoke(
        *("run", folder, "--prompt", "hello", "--device", "cpu"),
        *("--max-new-tokens", str(NUM_TOKENS), *options),
    )


def refusal(result: Result) -> str:
    """The one line of a refusal."""
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    return line


# --- run -----------------------------------------------------------------------------------------


def test_verified_run_says_so_after_the_figures(folder):
    result = run(folder, "--weights", "60%", "--verify")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[-1] == f"verified: {NUM_TOKENS} tokens, logits bit-equal to the plain model's"
    for name in ("weights", "bound", "peak weight bytes", "streamed", "from disk", "link rate"):
        assert any(line.startswith(name) for line in lines), name
    assert "(60%)" in result.stdout
    assert any(line.startswith("floor") for line in lines)


def test_text_is_the_plain_models(folder):
    model = LlamaForCausalLM.from_pretrained(folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    ids = tokenizer("<user>hello<answer>", return_tensors="pt")
    output = model.generate(**ids, max_new_tokens=NUM_TOKENS, do_sample=False)
    text = tokenizer.decode(output[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    result = run(folder, "--weights", "60%")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith(text)


def test_without_verify_the_plain_model_is_not_run(folder, monkeypatch):
    monkeypatch.setattr(RUN, "_plain_generation", lambda *_: pytest.fail("the plain model ran"))
    result = run(folder, "--weights", "60%")
    assert result.exit_code == 0, result.output
    assert "n/a (--verify measures it)" in result.stdout
    assert "verified" not in result.stdout


def test_k_and_k_prime(folder):
    result = run(folder, "--k", "2", "--k-prime", "1", "--verify")
    assert result.exit_code == 0, result.output
    assert "(k=2, k'=1)" in result.stdout


def test_no_chat_template_continues_the_text(folder, tmp_path):
    file = tmp_path / "figures.json"
    texts = []
    for options in ([], ["--no-chat-template"]):
        assert run(folder, "--weights", "60%", "--json", str(file), *options).exit_code == 0
        texts.append(json.loads(file.read_text())["text"])
    assert texts[0] != texts[1]


def test_a_tokenizer_without_a_chat_template(tmp_path):
    plain_folder = str(make_folder(tmp_path / "plain", chat=False))
    result = run(plain_folder, "--weights", "60%", "--verify")
    assert result.exit_code == 0, result.output


def test_one_token(folder):
    result = run(folder, "--weights", "60%", "--max-new-tokens", "1", "--verify")
    assert result.exit_code == 0, result.output
    assert "verified: 1 tokens" in result.stdout


def test_dtype(folder, tmp_path):
    file = tmp_path / "figures.json"
    figures = {}
    for dtype in ("auto", "float32"):
        result = run(folder, "--weights", "60%", "--dtype", dtype, "--json", str(file))
        assert result.exit_code == 0, result.output
        figures[dtype] = json.loads(file.read_text())
    assert figures["auto"]["dtype"] == "bfloat16"
    assert figures["float32"]["dtype"] == "float32"
    # Not quite twice: the rotary tables are float32 in both.
    assert figures["float32"]["weight_bytes"] > 1.9 * figures["auto"]["weight_bytes"]


def test_json_holds_consistent_figures(folder, tmp_path):
    file = tmp_path / "figures.json"
    result = run(folder, "--weights", "60%", "--verify", "--json", str(file))
    assert result.exit_code == 0, result.output
    figures = json.loads(file.read_text())
    assert figures["verified"] is True
    assert figures["num_tokens"] == NUM_TOKENS
    assert figures["bound_bytes"] == int(0.6 * figures["weight_bytes"])
    assert figures["peak_weight_bytes"] <= figures["bound_bytes"]
    assert figures["streamed_bytes"] >= figures["disk_bytes"] > 0
    assert figures["streamed_bytes_per_token"] == figures["streamed_bytes"] / NUM_TOKENS
    assert figures["floor_seconds_per_token"] >= figures["plain_seconds_per_token"]


# --- run: the check must be able to fail ----------------------------------------------------------


def test_other_logits_are_not_verified(folder, monkeypatch, tmp_path):
    """Story: a check that compares a run with itself passes on anything."""
    plain_generation = RUN._plain_generation

    def off_by_one_bit(*arguments):
        plain = plain_generation(*arguments)
        plain.logits[2].view(torch.int32)[0, 0] ^= 1
        return plain

    monkeypatch.setattr(RUN, "_plain_generation", off_by_one_bit)
    file = tmp_path / "figures.json"
    result = run(folder, "--weights", "60%", "--verify", "--json", str(file))
    assert result.exit_code == 1
    assert "NOT verified: the logits of token 3 differ from the plain model's" in result.stderr
    assert json.loads(file.read_text())["verified"] is False


def test_nothing_streamed_is_not_verified(folder):
    result = run(folder, "--weights", "100%", "--verify")
    assert result.exit_code == 1
    assert "NOT verified: nothing was streamed" in result.stderr


def test_where_the_plain_model_does_not_fit_the_handle_checks(folder, monkeypatch):
    def no_memory(*arguments, **options):
        # Only the plain run comes first; the streamed ones go through.
        monkeypatch.setattr(RUN, "generate", generate)
        raise torch.OutOfMemoryError("no room for the plain model")

    generate = RUN.generate
    monkeypatch.setattr(RUN, "generate", no_memory)
    result = run(folder, "--weights", "60%", "--verify")
    assert result.exit_code == 0, result.output
    assert f"verified: {NUM_TOKENS} tokens" in result.stdout
    assert "n/a" in result.stdout


def test_where_it_does_not_fit_in_host_memory_it_is_not_even_loaded(folder, monkeypatch):
    monkeypatch.setattr(RUN, "free_host_memory", lambda: 1000)
    monkeypatch.setattr(
        "transformers.LlamaForCausalLM.from_pretrained", lambda *_, **__: pytest.fail("loaded")
    )
    inputs = {"input_ids": torch.ones(1, 1, dtype=torch.long)}
    for dtype in ("auto", "float32"):
        request = REQUEST.Request(
            model=folder, prompt="hello", device=torch.device("cpu"), dtype=dtype
        )
        assert RUN._plain_generation(find(folder), inputs, request) is None


def test_memory_that_the_plain_model_takes(folder):
    """As stored, and twice that in the next wider dtype."""
    checkpoint = find(folder)
    weights = sum(tensor.nbytes for tensor in checkpoint.tensors().values())
    assert 0 <= RUN._plain_bytes(checkpoint, "auto") - weights < 20_000  # the header
    assert RUN._plain_bytes(checkpoint, "float32") == 2 * weights


def test_there_too_the_check_can_fail(folder, monkeypatch):
    def differ(*arguments, **options):
        raise VerificationError("1 of 7 tensors differ from the plain model's")

    monkeypatch.setattr(RUN, "_plain_generation", lambda *_: None)
    monkeypatch.setattr(superpipeline.Pipeline, "verify_call", differ)
    result = run(folder, "--weights", "60%", "--verify")
    assert result.exit_code == 1
    assert "NOT verified: 1 of 7 tensors differ" in result.stderr


def test_an_error_while_running_is_one_line_and_exit_code_1(folder, monkeypatch):
    def break_down(*arguments, **options):
        raise SuperpipelineError("the disk went away")

    monkeypatch.setattr(superpipeline, "load", break_down)
    result = run(folder, "--weights", "60%")
    assert result.exit_code == 1
    assert result.stderr == "superpipeline: the disk went away\n"


def test_first_difference_compares_bits():
    def generation(*logits: float, token: int = 0) -> Generation:
        steps = tuple(torch.tensor([[value]]) for value in logits)
        return Generation(torch.tensor([token]), steps, 0.0, 0.0)

    nan = float("nan")
    assert first_difference(generation(1.0, nan), generation(1.0, nan)) is None
    assert "token 2" in (first_difference(generation(1.0, 0.0), generation(1.0, -0.0)) or "")
    assert "1 tokens came" in (first_difference(generation(1.0, 2.0), generation(1.0)) or "")
    assert "tokens are not" in (first_difference(generation(1.0), generation(1.0, token=1)) or "")


def test_floor_is_the_slower_of_the_link_and_the_plain_model():
    sizes = {"weight_bytes": 1000, "bound_bytes": 400, "link_rate": 100.0}
    assert floor_seconds(**sizes, plain_s=None) == 6.0
    assert floor_seconds(**sizes, plain_s=7.0) == 7.0
    assert floor_seconds(**(sizes | {"bound_bytes": 2000}), plain_s=None) == 0.0


# --- run: refusals --------------------------------------------------------------------------------


@pytest.mark.usefixtures("loading_fails_the_test")
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--weights", "60%", "--k", "2"], "give one of them"),
        (["--weights", "60%", "--k-prime", "1"], "--k-prime needs --k"),
        (["--k-prime", "1"], "--k-prime needs --k"),
        ([], "say how much of the device the weights may take"),
        (["--k", "0"], "--k must be at least 1, got 0"),
        (["--k", "2", "--k-prime", "3"], "between 1 and --k (2), got 3"),
        (["--k", "2", "--k-prime", "0"], "between 1 and --k (2), got 0"),
        (["--weights", "lots"], "'lots'"),
        (["--k", "2", "--host-memory", "1GiB"], "on the CPU --weights bounds the host memory"),
        (["--k", "2", "--host-memory", "much"], "'much'"),
        (["--k", "2", "--max-new-tokens", "0"], "--max-new-tokens must be at least 1, got 0"),
        (["--k", "2", "--dtype", "int3"], "got 'int3'"),
        (["--device", "toaster"], "'toaster' is no device"),
        (["--device", "meta"], "this machine has cpu"),
        (["--device", "cuda:99"], "this machine has cpu"),
        (["--k", "2", "--prompt", " "], "--prompt is empty"),
        (["--k", "2", "--json", "no/such/folder/figures.json"], "there is no folder"),
    ],
)
def test_refused_before_loading(folder, options, expected):
    assert expected in refusal(run(folder, *options))


@pytest.mark.usefixtures("loading_fails_the_test")
def test_refused_models(tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    file = tmp_path / "model.safetensors"
    file.touch()
    assert "has no config.json" in refusal(run(str(empty)))
    assert "is a file" in refusal(run(str(file)))
    assert "there is no folder" in refusal(run(str(tmp_path / "missing")))


@pytest.mark.usefixtures("loading_fails_the_test")
def test_without_transformers_the_line_says_what_to_install(folder, monkeypatch):
    monkeypatch.setattr(REQUEST.importlib.util, "find_spec", lambda _: None)
    assert "pip install 'superpipeline[hub]'" in refusal(run(folder, "--k", "2"))


def test_a_model_that_cannot_be_loaded_is_one_line(monkeypatch):
    def not_found(*arguments, **options):
        raise OSError("nobody/nothing is not a model\nand much more text")

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", not_found)
    line = refusal(run("nobody/nothing", "--k", "2"))
    assert line.endswith(
        "cannot load the tokenizer of nobody/nothing: nobody/nothing is not a model and much more "
        "text"
    )


def test_a_folder_without_a_tokenizer_is_said_to_lack_one(tmp_path):
    folder = make_folder(tmp_path / "silent", chat=False)
    for file in folder.glob("token*"):
        file.unlink()
    line = refusal(run(str(folder), "--k", "2"))
    assert f"cannot load the tokenizer of {folder}" in line


def test_pickles_are_refused(tmp_path):
    folder = make_folder(tmp_path / "old", chat=False)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "only pytorch_model.bin" in refusal(run(str(folder), "--weights", "60%"))


def test_a_damaged_file_is_one_line_and_exit_code_1(tmp_path):
    folder = make_folder(tmp_path / "cut", chat=False)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    result = run(str(folder), "--weights", "60%")
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    assert str(file) in line


def test_a_bound_too_small_is_refused(folder):
    assert refusal(run(folder, "--weights", "1KiB")).startswith("superpipeline: ")


def test_a_missing_prompt_is_a_usage_error(folder):
    result = invoke("run", folder)
    assert result.exit_code == 2
    assert "--prompt" in result.stderr


# --- info -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [[], ["info"]])
def test_info_names_what_a_bug_report_needs(arguments, monkeypatch):
    monkeypatch.setattr("superpipeline.profile.link_rate", lambda device: 12.34e9)
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    names = {line.split("  ")[0] for line in result.stdout.splitlines()}
    versions = {"superpipeline", "python", "torch", "cuda", "transformers", "os"}
    machine = {"device", "link rate", "host RAM", "cgroup limit", "pinned memory"}
    assert names == versions | machine
    assert "12.3 GB/s" in result.stdout
    assert torch.__version__ in result.stdout


def test_info_survives_a_link_that_cannot_be_measured(monkeypatch):
    def broken(device):
        raise RuntimeError("out of memory\nTried to allocate")

    monkeypatch.setattr("superpipeline.profile.link_rate", broken)
    result = invoke("info")
    assert result.exit_code == 0, result.output
    assert "not measured: out of memory\n" in result.stdout


@pytest.mark.parametrize(
    ("membership", "files", "expected"),
    [
        ("0::/a/b\n", {"a/b/memory.max": "max", "a/memory.max": "1000"}, 1000),
        ("0::/a/b\n", {"a/b/memory.max": "500", "a/memory.max": "1000"}, 500),
        ("0::/\n", {"memory.max": "2000"}, 2000),
        ("0::/a\n", {"a/memory.max": "max"}, None),
        ("5:cpu:/x\n4:memory:/x\n", {"memory/x/memory.limit_in_bytes": "700"}, 700),
        ("4:memory:/x\n", {"memory/x/memory.limit_in_bytes": "9223372036854771712"}, None),
    ],
)
def test_cgroup_limits_are_of_all_ancestors(tmp_path, membership, files, expected):
    root = tmp_path / "cgroup"
    for name, text in files.items():
        folder = (root / name).parent
        folder.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")
        for use in ("memory.current", "memory.usage_in_bytes"):
            (folder / use).write_text("100\n")
        (folder / "memory.stat").write_text("file 10\n")
    (tmp_path / "self").write_text(membership)
    groups = cgroup.groups(root, tmp_path / "self")
    assert min((group.limit_bytes for group in groups), default=None) == expected


def test_no_cgroups_is_no_limit(tmp_path):
    assert cgroup.groups(tmp_path, tmp_path / "missing") == []


@pytest.mark.parametrize(("limits", "shown"), [([], "none"), ([3 * 2**20, 2**20], "1.0 MiB")])
def test_info_shows_the_tightest_limit(limits, shown, monkeypatch):
    groups = [cgroup.Group(limit, 0, 0) for limit in limits]
    monkeypatch.setattr(cgroup, "groups", lambda: groups)
    monkeypatch.setattr("superpipeline.profile.link_rate", lambda device: 1e9)
    (line,) = (x for x in invoke("info").stdout.splitlines() if x.startswith("cgroup limit"))
    assert line.split("  ")[-1].strip() == shown


def test_python_dash_m():
    """One real process: the module entry point, and that refusals need no model."""
    command = [sys.executable, "-m", "superpipeline", "run", "./missing", "--prompt", "hello"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("superpipeline: there is no folder ./missing")

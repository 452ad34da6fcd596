"""The command line as a user meets it: streams, exit codes, one-line errors."""

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from typing import NamedTuple

import pytest
import torch

import decoders
from decoders import cli, weights
from decoders.cli.loading import context_length, note_context
from decoders.kernels.int8_cache import Int8Cache
from tests import folders
from tests.conftest import ROOT
from tests.families import GPT_NEO, OPENAI_GPT, PHI, PHI3, read

TINY = "checkpoints/tiny-gpt-neo"
FUYU, SHAPES = "checkpoints/tiny-fuyu", "checkpoints/tiny-fuyu/shapes.png"


class Finished(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


def run(*arguments: str, input: str = "") -> Finished:
    """The command in a process of its own, with streams and a status of its own: a fork of this one, which has
    imported PyTorch already. `started` starts Python anew."""
    with tempfile.TemporaryFile() as stdin, tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        stdin.write(input.encode())
        stdin.seek(0)
        if (process := os.fork()) == 0:
            for number, file in enumerate((stdin, out, err)):
                os.dup2(file.fileno(), number)
            os._exit(status_of(arguments))
        _, status = os.waitpid(process, 0)
        texts = [os.pread(file.fileno(), 2**24, 0).decode() for file in (out, err)]
    return Finished(os.waitstatus_to_exitcode(status), *texts)


def status_of(arguments: tuple[str, ...]) -> int:
    """In the fork: what `python -m decoders` would exit with."""
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w", buffering=1)  # noqa: SIM115
    os.chdir(ROOT)
    status = 70
    try:
        status = cli.main(list(arguments))
        sys.stdout.flush()
    except SystemExit as end:
        status = end.code
    except BaseException:
        traceback.print_exc()
    return status


def started(*arguments: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "decoders", *arguments], capture_output=True, text=True, cwd=ROOT, **options
    )


def test_generate_prints_the_story_and_nothing_else():
    found = started("generate", TINY, "Once upon a time")
    assert found.returncode == 0
    assert found.stdout.startswith("Once upon a time ") and found.stdout.endswith(".\n")
    assert "<|endoftext|>" not in found.stdout and found.stdout.count("\n") == 1
    assert "tokens/s" in found.stderr and "peak memory" in found.stderr and found.stderr.count("\n") == 1


def test_temperature_0_is_greedy():
    texts = {
        run("generate", TINY, "One day", *options).stdout
        for options in ((), ("--temperature", "0", "--top-k", "9"))
    }
    assert len(texts) == 1


def test_prompt_from_standard_input_and_json():
    plain = run("generate", TINY, "Once upon a time", "--max-new-tokens", "9")
    found = run("generate", TINY, "-", "--json", "--max-new-tokens", "9", input="Once upon a time")
    answer = json.loads(found.stdout)
    assert answer["prompt"] + answer["text"] == plain.stdout.rstrip("\n")
    assert len(answer["ids"]) == 9 and len(answer["prompt_ids"]) == 4


def test_chat_gives_the_answer_alone():
    found = run("generate", "checkpoints/tiny-phi", "--chat", "Tell me a story about Nora and an owl.")
    assert found.returncode == 0 and "Tell me" not in found.stdout and "Instruct" not in found.stdout
    assert found.stdout.count("Nora") >= 3 and "owl" in found.stdout and found.stdout[0] in "OT"


def test_gpt1_goes_on_with_a_space_after_the_prompt():
    found = run("generate", "checkpoints/tiny-openai-gpt", "Once upon a time", "--max-new-tokens", "20")
    assert found.stdout.startswith("Once upon a time there ")
    answer = json.loads(run("generate", "checkpoints/tiny-openai-gpt", "Once upon a time", "--json").stdout)
    assert answer["text"].startswith(" there ")


def test_sampling_repeats_with_the_same_seed():
    options = ("--temperature", "1.2", "--top-k", "50", "--top-p", "0.95", "--repetition-penalty", "1.1")
    texts = [run("generate", TINY, "One day", *options, "--seed", seed).stdout for seed in "112"]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtypes(dtype):
    assert run("generate", TINY, "Once upon", "--dtype", dtype, "--max-new-tokens", "3").returncode == 0


def test_keys_and_values_of_8_bits(monkeypatch):
    """The command asks for them, as `generate` and `chat`; and what has none says so."""
    exact = run("generate", "checkpoints/tiny-phi", "--chat", "Tell me a story about Nora and an owl.").stdout
    asked = [
        "generate",
        "checkpoints/tiny-phi",
        "--chat",
        "Tell me a story about Nora and an owl.",
        "--cache",
        "int8",
    ]
    assert run(*asked).stdout == exact
    lines = "Tell me a story about Nora and an owl.\nAnd another one?\n"
    assert exact.strip() in run("chat", "checkpoints/tiny-phi", "--cache", "int8", input=lines).stdout
    for option, message in (
        ("--compile", "--compile and --cache exclude each other"),
        ("--tensor-parallel", "exclude each other"),
    ):
        assert message in run(*asked, option).stderr
    monkeypatch.setattr(Int8Cache, "update", lambda *args: sys.exit(3))
    assert run(*asked).returncode == 3


@pytest.mark.parametrize(("arguments", "message"), [
    (["generate", "no/such/folder", "x"], "there is no folder no/such/folder"),
    (["generate", "README.md", "x"], "README.md is a file"),
    (["generate", TINY, ""], "the prompt is empty"),
    (["generate", TINY, "word " * 400], "400 prompt|401 prompt|do not fit into 256 positions"),
    (["generate", TINY, "x", "--image", "bus.png"], "takes no pictures"),
    (["generate", TINY, "x", "--chat"], "no chat format"),
    (["generate", TINY, "x", "--temperature", "-1"], "temperature must be a number from 1e-30"),
    (["generate", TINY, "x", "--top-p", "2"], "top_p must be"),
    (["generate", TINY, "x", "--max-new-tokens", "-3"], "max_new_tokens must be a whole number from 0 on, not -3"),
    (["generate", TINY, "x", "--device", "cuda:77"], "--device cuda:77 is not usable here"),
    (["generate", TINY, "x", "--device", "abacus"], "--device abacus is not usable here"),
    (["generate", "no/such/folder", "x", "--compile", "--cache", "int8"], "--compile and --cache exclude each other"),
    (["look", TINY, "x", "-o", "LICENSE"], "LICENSE exists and is no page: give another file, or remove it"),
    (["compare", "--make", "checkpoints", "phi"], "checkpoints is not empty and holds no kit: give another folder"),
    (["convert", TINY, "tests"], "tests is not empty: give another OUT, remove it, or write over it with --force"),
    (["inspect", "tests"], "config.json is missing"),
])  # fmt: skip
def test_unusable_input_is_one_line_and_exit_2(arguments, message):
    found = run(*arguments)
    assert found.returncode == 2 and found.stdout == "" and found.stderr.startswith("error: ")
    assert found.stderr.count("\n") == 1
    assert any(part in found.stderr for part in message.split("|"))


@pytest.mark.parametrize(
    "arguments", [[], ["generate"], ["generate", TINY], ["dance"], ["generate", TINY, "x", "--top-k", "a"]]
)
def test_a_wrong_command_line_is_one_line_that_says_where_help_is(arguments):
    """The usage, 17 lines of it, hid the one that mattered."""
    found = run(*arguments)
    assert found.returncode == 2 and found.stdout == "" and found.stderr.count("\n") == 1
    command = "decoders generate" if arguments[:1] == ["generate"] else "decoders"
    assert found.stderr.startswith("error: ") and found.stderr.endswith(f"{command} --help)\n")


def test_a_page_replaces_a_page(tmp_path):
    page = tmp_path / "page.html"
    page.touch()
    for prompt in ("Once upon a time", "One day"):
        found = run("look", TINY, prompt, "-o", str(page), "--max-new-tokens", "2")
        assert found.returncode == 0 and prompt in page.read_text(), found.stderr


def test_more_tokens_than_positions_are_cut_with_a_note():
    found = run("generate", TINY, "Once upon a time", "--max-new-tokens", "100000")
    assert (
        found.returncode == 0
        and "note: 253 new tokens fit after a prompt of 4 (256 positions)" in found.stderr
    )


def test_a_prompt_beyond_the_context_is_noted():
    """A rotary model takes it, and its text makes no sense; only learned positions were mentioned."""
    note = "note: 300 tokens are more than the 256 of this model's context"
    long, tiny = "a" * 300, "checkpoints/tiny-phi"
    found = run("generate", tiny, long, "--max-new-tokens", "2")
    assert found.returncode == 0 and note in found.stderr, found.stderr
    grown = run("generate", tiny, "a" * 255, "--max-new-tokens", "9")
    assert "are more than the 256 of this model's context" in grown.stderr, grown.stderr
    assert "context" not in run("generate", tiny, "Once upon a time", "--max-new-tokens", "2").stderr
    found = run("chat", tiny, "--max-new-tokens", "2", input=f"{long}\n/reset\nHi\n")
    assert found.stderr.count("of this model's context") == 1, found.stderr


def test_every_family_has_a_context(family, capsys):
    model = family.model()
    limit = context_length(model)
    assert (
        limit == model.config.to_dict()["n_positions" if family is OPENAI_GPT else "max_position_embeddings"]
    )
    is_learned = family in (GPT_NEO, OPENAI_GPT)  # whose decoding takes no more
    for tokens, noted, says in ((limit, 0, False), (limit + 1, 0, True), (limit + 2, limit + 1, False)):
        note_context(model, tokens, noted)
        assert ("context" in capsys.readouterr().err) == (says and not is_learned)


def test_scaled_positions_have_a_longer_context():
    scaled = {kind: PHI.model(rope_scaling={"type": kind, "factor": 4.0}) for kind in ("linear", "dynamic")}
    for model in scaled.values():
        assert context_length(model) == 4 * model.config.max_position_embeddings


def test_a_closed_pipe_is_no_error():
    found = subprocess.run(f"{sys.executable} -m decoders generate {TINY} 'Once upon' | head -c 5", shell=True,
                           capture_output=True, text=True, cwd=ROOT)  # fmt: skip
    assert found.stdout == "Once " and "Traceback" not in found.stderr and "BrokenPipe" not in found.stderr


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_a_full_disk_is_said():
    with open("/dev/full", "w") as full:
        found = subprocess.run([sys.executable, "-m", "decoders", "generate", TINY, "Once"], stdout=full,
                               stderr=subprocess.PIPE, text=True, cwd=ROOT)  # fmt: skip
    assert found.returncode == 2 and "error: " in found.stderr and "Traceback" not in found.stderr


def test_interrupted_is_exit_130(tmp_path):
    sizes = {
        "max_position_embeddings": 2048,
        "vocab_size": 922,
        "hidden_size": 512,
        "eos_token_id": 921,
        "bos_token_id": 0,
    }
    weights.save(GPT_NEO.model(**sizes), tmp_path)
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).write_bytes((ROOT / TINY / name).read_bytes())
    process = subprocess.Popen(
        [sys.executable, "-m", "decoders", "generate", str(tmp_path), "Once", "--max-new-tokens", "2000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip  (nohup and & ignore it)
    process.stdout.read(30)
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "interrupted" in err and "Traceback" not in err


# ---- chat


def test_a_conversation_keeps_what_was_said_and_its_cache():
    lines = "Tell me a story about Tom and a fox.\nWhat did Tom take everywhere?\n\n/reset\nTell me a story about Zoe and a bear.\n"
    found = run("chat", "checkpoints/tiny-phi3", input=lines)
    assert found.returncode == 0
    story, answer, other = found.stdout.splitlines()
    assert (
        story.count("Tom") >= 3 and answer.startswith("It was a ") and answer.split()[-1].strip(".") in story
    )
    assert other.count("Zoe") >= 3 and "Tom" not in other and "<|" not in found.stdout
    notes = found.stderr.splitlines()
    assert len(notes) == 3 and notes[0].endswith("0 of the prompt were in the cache)")
    prompt, cached = (
        int(notes[1].split(word)[0].split()[-1].strip("(")) for word in (" prompt", " of the prompt")
    )
    assert cached > 100 and prompt - cached < 20, "the story was not read again"


def test_commands_of_a_conversation():
    found = run(
        "chat",
        "checkpoints/tiny-phi3",
        "--system",
        "Be brief.",
        "--max-new-tokens",
        "3",
        input="/help\n/system Be kind.\nHi\n/reset\n/system\nHi\n",
    )
    assert found.returncode == 0 and found.stdout.count("\n") == 2
    assert "/system TEXT says what to tell the model first" in found.stderr
    asked = [int(line.split()[0].strip("(")) for line in found.stderr.splitlines() if " prompt + " in line]
    assert asked[0] > asked[1], "the system message was part of the first prompt"
    left_out = run("chat", "checkpoints/tiny-phi", "--system", "Be brief.", input="")
    assert left_out.returncode == 0 and "has no system message, it is left out" in left_out.stderr
    assert "no chat format" in run("chat", TINY, input="Hi\n").stderr


def test_an_answer_ends_before_the_model_speaks_for_the_user():
    found = run("generate", "checkpoints/tiny-persimmon", "--chat", "Tell me a story about Zoe and a bear.")
    assert found.returncode == 0 and found.stdout.count("Zoe") >= 3 and "human:" not in found.stdout


@pytest.fixture
def slow(tmp_path):
    """A model that talks for a long time."""
    for name in ("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (tmp_path / name).write_bytes((ROOT / "checkpoints/tiny-phi3" / name).read_bytes())
    sizes = {
        "vocab_size": 1005,
        "hidden_size": 384,
        "head_dim": 12,
        "sliding_window": None,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }
    weights.save(PHI3.model(**sizes), tmp_path)
    return tmp_path


def test_ctrl_c_stops_the_answer_not_the_program(slow):
    pty = pytest.importorskip("pty")
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(ROOT)
        os.execv(
            sys.executable, [sys.executable, "-m", "decoders", "chat", str(slow), "--max-new-tokens", "20000"]
        )
    shown = b""

    def until(end: bytes) -> None:
        nonlocal shown
        while not shown.endswith(end):
            assert select.select([terminal], [], [], 120)[0], f"nothing more after {shown[-300:]}"
            shown += os.read(terminal, 1)

    until(b"> ")
    os.write(terminal, b"Hello\n")
    until(b"Hello\r\n")
    for _ in range(30):  # some of the answer
        shown += os.read(terminal, 1)
    os.write(terminal, b"\x03")
    until(b"in the cache)\r\n")
    until(b"> ")
    os.write(terminal, b"half a line\x03")
    until(b"> ")
    os.write(terminal, b"/reset\n")
    until(b"> ")
    os.write(terminal, b"\x04")
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0 and b"Traceback" not in shown


def test_what_a_terminal_would_obey_in_names_is_shown(tmp_path):
    folder = tmp_path / "evil\x1b[31m\u202e\nname"
    found = run("generate", str(folder), "x")
    assert (
        found.returncode == 2
        and found.stderr.count("\n") == 1
        and "evil\\x1b[31m\\u202e name" in found.stderr
    )
    family = folders.write_config(folder, GPT_NEO)
    folders.safetensors_whole(family, {**folders.weights_of(GPT_NEO), "odd\x1b]0;title\x07": torch.zeros(1)})
    found = run("inspect", str(folder))
    assert "\x1b" not in found.stdout + found.stderr and "odd\\x1b]0;title\\x07" in found.stdout


def test_errors_of_the_system_are_sentences(tmp_path):
    from decoders.cli.output import one_line

    for error in (
        FileNotFoundError(2, "No such file or directory", "/a"),
        IsADirectoryError(21, "Is a directory", "/a"),
    ):
        assert one_line(error) == f"/a: {error.strerror}"
    assert (
        one_line(OSError(28, "/a cannot be written: No space left on device"))
        == "/a cannot be written: No space left on device"
    )


@pytest.mark.parametrize(("closed", "status", "output", "message"), [
    ("2>&-", 0, True, ""), (">&-", 2, False, "error: standard output is closed\n"), ("<&-", 0, True, "tokens/s"), (">&- 2>&-", 2, False, ""),
])  # fmt: skip
def test_closed_streams(closed, status, output, message):
    """With standard error closed the first file that was opened took its number, and notes went to standard output."""
    command = f"{sys.executable} -m decoders generate {TINY} 'Once upon' --max-new-tokens 4 {closed}"
    found = subprocess.run(command, shell=True, capture_output=True, text=True, cwd=ROOT)
    assert found.returncode == status and message in found.stderr and "Traceback" not in found.stderr
    assert bool(found.stdout) == output and "tokens/s" not in found.stdout


@pytest.mark.parametrize("arguments", [f"generate {TINY} -", "chat checkpoints/tiny-phi3"])
def test_a_closed_input_is_said(arguments):
    command = f"{sys.executable} -m decoders {arguments} <&-"
    found = subprocess.run(command, shell=True, capture_output=True, text=True, cwd=ROOT)
    assert found.returncode == 2 and found.stderr == "error: standard input is closed\n" and not found.stdout


def test_a_mistake_of_ours_is_not_status_1(monkeypatch, capsys):
    """1 means that a check found a difference."""
    from decoders.cli import inspect_checkpoint

    monkeypatch.setattr(inspect_checkpoint, "facts_of", lambda *given: 1 / 0)
    assert cli.main(["inspect", TINY]) == 2
    assert "ZeroDivisionError" in capsys.readouterr().err


@pytest.mark.parametrize("line", ["/quit", "/exit"])
def test_a_conversation_can_be_quit(line):
    found = run("chat", "checkpoints/tiny-phi3", input=f"{line}\nHi\n")
    assert found == (0, "", "")


def test_help_lists_the_commands():
    found = run("chat", "checkpoints/tiny-phi3", input="/help\n/dance\n")
    for word in ("/reset", "/system TEXT", "/quit"):
        assert found.stderr.count(word) == 2
    assert "/dance is no command" in found.stderr and found.stdout == ""


def test_the_version_and_what_was_meant(capsys):
    found = started("--version")
    assert found.returncode == 0 and found.stdout == f"decoders {decoders.__version__}\n"
    found = run("generate", TINY, "x", "--temprature", "0.5")
    assert found.returncode == 2 and "--temprature (did you mean --temperature?)" in found.stderr
    found = run("inspect", TINY, "--zzzz")
    assert found.returncode == 2 and "unrecognized arguments: --zzzz (see " in found.stderr


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("decoders gen", {"generate"}),
        ("decoders generate x y --temp", {"--temperature"}),
        ("decoders generate x y --dtype b", {"bfloat16"}),
    ],
)
def test_a_shell_completes_commands_options_and_choices(line, expected, tmp_path):
    """As bash asks argcomplete: by the environment, for a list in a file."""
    pytest.importorskip("argcomplete", reason="pip install '.[completion]'")
    asked = {"_ARGCOMPLETE": "1", "COMP_LINE": line, "COMP_POINT": str(len(line)), "_ARGCOMPLETE_IFS": "\n"}
    asked |= {"_ARGCOMPLETE_STDOUT_FILENAME": str(tmp_path / "answer"), "_ARGCOMPLETE_SHELL": "bash"}
    done = subprocess.run(
        [sys.executable, "-c", "from decoders.cli import main; main()"], env={**os.environ, **asked}, cwd=ROOT
    )
    assert done.returncode == 0
    found = {word.strip() for word in (tmp_path / "answer").read_text().split("\n")}
    assert found == expected


def test_a_turn_ends_without_a_generation_config(tmp_path):
    """`chat` and `generate --chat` ran on past `<|end|>`, in what the model would have said for the user."""
    source = ROOT / "checkpoints" / "tiny-phi3"
    for file in source.iterdir():
        if file.name != "generation_config.json":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((source / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "eos_token_id": None}))
    question = "Tell me a story about Tom and a fox."
    whole = run("generate", str(source), "--chat", question)
    assert run("generate", str(tmp_path), "--chat", question).stdout == whole.stdout != ""
    asked = run("chat", str(tmp_path), input=f"{question}\n")
    assert asked.stdout == whole.stdout


def test_a_seed_that_is_none_and_a_prompt_that_is_no_text_are_said():
    found = run("generate", TINY, "x", "--seed", str(2**70))
    assert found.returncode == 2 and "--seed must be from -2**63 to 2**64 - 1" in found.stderr
    command = [sys.executable, "-X", "utf8", "-m", "decoders", "generate", TINY, "-"]
    found = subprocess.run(
        command,
        input=b"\xff\xfe",
        capture_output=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONIOENCODING": "utf-8:strict"},
    )
    assert found.returncode == 2 and b"error: standard input is not utf-8" in found.stderr


# ---- Pictures


def test_a_picture_is_described():
    for prompt in (
        "Generate a coco-style caption.\n",
        "Generate a coco-style caption.",
        "Generate a coco-style caption.\\n",
    ):
        found = run("generate", FUYU, prompt, "--image", SHAPES)
        assert found.returncode == 0 and found.stdout == "a red circle left of a blue square\n"
    assert "47 prompt + " in found.stderr, "20 patches, 4 newlines, 23 tokens of text"


def test_places_are_told_in_pixels_and_drawn(tmp_path):
    from PIL import Image

    from examples.shapes import EXAMPLE, overlap

    file = tmp_path / "answer.png"
    found = run("generate", FUYU, "where is the red circle?", "--image", SHAPES, "--draw", str(file))
    assert found.returncode == 0 and found.stdout.startswith("<box>") and found.stdout.endswith("</box>\n")
    assert f"1 place drawn into {file}" in found.stderr
    before, after = Image.open(ROOT / SHAPES).convert("RGB"), Image.open(file)
    assert before.size == after.size and before.tobytes() != after.tobytes()
    answer = json.loads(run("generate", FUYU, "where is the red circle?", "--image", SHAPES, "--json").stdout)
    [place] = answer["places"]
    assert overlap(tuple(place["box"].values()), EXAMPLE.shapes[0].box) > 0.7
    assert answer["text"] == found.stdout.strip() and answer["prompt"] == "where is the red circle?"


@pytest.mark.parametrize(("arguments", "message"), [
    (["--image", "README.md"], "README.md is no picture that Pillow can read"), (["--image", "no.png"], "no.png"),
    (["--draw", "x.png"], "--draw needs a picture: --image FILE"), (["--image", SHAPES, "--chat"], "--image has no --chat"),
    (["--image", SHAPES, "--draw", "answer.xyz"], "give a name that ends in .png or .jpg"), (["--image", "tests"], "tests"),
    (["--image", SHAPES, "--draw", "no/such/place.png"], "--draw 'no/such/place.png': no file can be written there"),
    (["--image", SHAPES, "--draw", ""], "give a name that ends in"), (["--image", SHAPES, "--draw", f"./{SHAPES}"], "would replace the picture"),
    (["--image", ""], "the picture '' is no regular file"), (["--image", "/dev/zero"], "'/dev/zero' is no regular file"),
])  # fmt: skip
def test_pictures_that_cannot_be_used_are_said(arguments, message):
    found = run("generate", FUYU, "where is the red circle?", *arguments)
    assert found.returncode == 2 and found.stdout == "" and found.stderr.count("\n") == 1, (
        "before anything is computed"
    )
    assert found.stderr.startswith("error: ") and message in found.stderr


@pytest.mark.parametrize(
    "prompt",
    [
        "<box>1,2,3,4",
        "<box>nan,1,2,3</box>",
        "<point>1,2</box>",
        "</box>",
        "<box>1,2,3,4<point>1,2</point>",
        "<point>1e400,2</point>",
    ],
)
def test_places_that_are_none_are_said(prompt):
    found = run("generate", FUYU, prompt, "--image", SHAPES)
    assert found.returncode == 2 and found.stdout == "" and found.stderr.count("\n") == 1
    assert "is no place: give <box>top, left, bottom, right</box> or <point>x, y</point>" in found.stderr


def test_a_picture_with_too_much_text_is_said(tmp_path, monkeypatch, capsys):
    """Pillow limits the text in a picture; its own error names no file. The limit is lowered here."""
    from PIL import Image, PngImagePlugin

    info = PngImagePlugin.PngInfo()
    info.add_text("a", "b" * 1000, zip=True)
    Image.new("RGB", (4, 4)).save(tmp_path / "wordy.png", pnginfo=info)
    monkeypatch.setattr(PngImagePlugin, "MAX_TEXT_CHUNK", 100)
    assert cli.main(["generate", str(ROOT / FUYU), "x", "--image", str(tmp_path / "wordy.png")]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "wordy.png is damaged: " in err


def test_a_picture_with_too_many_pixels_is_said(tmp_path, monkeypatch, capsys):
    """Above Pillow's limit, which is lowered here."""
    from PIL import Image

    Image.new("RGB", (40, 40)).save(tmp_path / "large.png")
    for limit in (1000, 500):  # Pillow warns above it, and refuses above twice as many
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        assert cli.main(["generate", str(ROOT / FUYU), "x", "--image", str(tmp_path / "large.png")]) == 2
        assert "has more pixels than any honest picture" in capsys.readouterr().err


def test_damaged_pictures_are_said(tmp_path):
    file = tmp_path / "cut.png"
    file.write_bytes((ROOT / SHAPES).read_bytes()[:200])
    found = run("generate", FUYU, "x", "--image", str(file))
    assert found.returncode == 2 and found.stdout == "" and found.stderr.count("\n") == 1


# ---- inspect


def test_inspect_tells_what_is_there():
    found = run("inspect", TINY)
    assert found.returncode == 0 and found.stderr == ""
    for part in (
        "gpt_neo",
        "559,488",
        "float16",
        "256 tokens",
        "transformer.h.0-3.attn.attention.q_proj.weight",
    ):
        assert part in found.stdout
    facts = json.loads(run("inspect", TINY, "--json").stdout)
    assert facts["parameters"] == 559_488 and len(facts["tensors"]) == 56 and facts["problems"] == []


def test_inspect_shows_how_names_map_and_what_does_not_fit(tmp_path):
    folder = folders.write_config(tmp_path, GPT_NEO)
    state = {
        n.removeprefix("transformer."): t for n, t in folders.weights_of(GPT_NEO).items() if "ln_f" not in n
    }
    folders.safetensors_whole(
        folder, {**state, "score.weight": torch.zeros(2, 48), "h.0.extra": torch.zeros(1)}
    )
    found = run("inspect", str(tmp_path))
    assert found.returncode == 1
    assert "h.0-2.mlp.c_fc.weight -> transformer.h.0-2.mlp.c_fc.weight  (80, 48) float32" in found.stdout
    assert "PROBLEM missing: transformer.ln_f.weight (48,), transformer.ln_f.bias (48,)" in found.stdout
    assert "PROBLEM unexpected: transformer.h.0.extra (1,)" in found.stdout
    assert "not used by GPTNeoForCausalLM: score.weight" in found.stdout


def test_inspect_reads_headers_only(tmp_path):
    """A folder of 15 GB (sparse files: nothing is on the disk) takes no more memory than PyTorch itself."""
    config = {**GPT_NEO.tiny, "hidden_size": 8192, "num_layers": 9, "num_heads": 64, "vocab_size": 50257,
              "intermediate_size": 32768, "attention_layers": ["global"] * 9}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    with torch.device("meta"):
        state = GPT_NEO.cls()(read(GPT_NEO.cls("Config"), config)).state_dict()
    state.pop("lm_head.weight", None)  # tied: a file holds one
    header, offset = {}, 0
    for name, tensor in state.items():
        size = tensor.numel() * 2
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [offset, offset + size]}
        offset += size
    file = tmp_path / "model.safetensors"
    file.write_bytes(folders.raw_safetensors(header, b""))
    os.truncate(file, file.stat().st_size + offset)
    assert offset > 15e9
    code = "import sys; from decoders import cli; status = cli.main(['inspect', sys.argv[1]]); print(cli.peak_memory(), file=sys.stderr)"
    found = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, cwd=ROOT
    )
    assert f"{offset / 1e9:.2f} GB for the weights" in found.stdout
    assert int(found.stderr) < 1.5e9, "nothing of the weights was read"


# ---- Ways to decode


@pytest.mark.parametrize(("options", "least"), [
    (["--num-beams", "4"], 100), (["--num-beams", "3", "--length-penalty", "2", "--no-repeat-ngram-size", "3"], 50), (["--min-p", "0.1", "--seed", "3"], 50),
    (["--guidance-scale", "1.3", "--negative-prompt", "There was"], 50), (["--prompt-lookup", "6"], 100), (["--assistant", TINY], 100),
], ids=str)  # fmt: skip
def test_every_way_tells_a_story(options, least):
    found = run("generate", TINY, "Once upon a time", *options)
    assert (
        found.returncode == 0
        and found.stdout.startswith("Once upon a time")
        and len(found.stdout.split()) > least // 2
    ), found.stderr
    if options[0] in ("--prompt-lookup", "--assistant"):
        assert (
            found.stdout == run("generate", TINY, "Once upon a time").stdout
            and " drafted tokens accepted" in found.stderr
        )


def test_several_texts_are_parted_and_json_carries_scores():
    options = ["--num-beams", "3", "--num-return-sequences", "2", "--max-new-tokens", "12"]
    texts = run("generate", TINY, "Once upon a time", *options).stdout.rstrip("\n").split("\n\n")
    assert len(texts) == 2 and all(text.startswith("Once upon a time ") for text in texts)
    printed = json.loads(run("generate", TINY, "Once upon a time", *options, "--json").stdout)
    assert ["Once upon a time" + text for text in printed["texts"]] == texts and [
        len(row) for row in printed["ids"]
    ] == [12, 12]
    for row, score in zip(printed["scores"], printed["beam_scores"], strict=True):
        assert abs(sum(row) / 12 - score) < 1e-3
    one = json.loads(run("generate", TINY, "Once upon a time", "--max-new-tokens", "5", "--json").stdout)
    assert len(one["scores"]) == len(one["ids"]) == 5 and all(score < 0 for score in one["scores"])


def test_a_text_ends_at_a_stop_and_answers_with_a_choice(tmp_path):
    found = run("generate", TINY, "Once upon a time", "--stop", "never", "--stop", " on the")
    assert found.stdout.rstrip("\n").endswith(" on the")
    choices = tmp_path / "choices.txt"
    choices.write_text(" there was a fox\n there was\n no\n")
    for more in ([], ["--num-beams", "4"]):
        found = run("generate", TINY, "Once upon a time", "--choices", str(choices), *more)
        assert found.stdout.removesuffix("\n").removeprefix("Once upon a time") in choices.read_text().split(
            "\n"
        )


@pytest.mark.parametrize(("options", "message"), [
    (["--choices", "no/file"], "no/file is missing"), (["--choices", "LICENSE", "--num-beams", "0"], "num_beams must be a whole number from 1"),
    (["--num-return-sequences", "2"], "needs do_sample=True or num_beams"), (["--negative-prompt", "x"], "negative_prompt_ids needs guidance_scale"),
    (["--assistant", "checkpoints/tiny-phi3"], "has another vocabulary than the model"), (["--min-p", "2"], "min_p must be a number from 0 to 1"),
    (["--temperature", "inf"], "temperature must be"), (["--max-new-tokens", "-1"], "max_new_tokens must be"), (["--prompt-lookup", "2", "--num-beams", "2"], "assisted decoding is greedy"),
])  # fmt: skip
def test_ways_that_cannot_be_are_said(options, message):
    found = run("generate", TINY, "Once upon a time", *options)
    assert (
        found.returncode == 2
        and found.stdout == ""
        and message in found.stderr
        and found.stderr.count("\n") == 1
    )


# ---- Threads that wait -------------------------------------------------------------------------------------

WAIT_POLICY = """
import os, sys
from pathlib import Path
from decoders.cli import threads
threads.PRESSURE = Path(sys.argv[1])
threads.choose_wait_policy()
assert "torch" not in sys.modules
print(os.environ.get("OMP_WAIT_POLICY"))
"""


@pytest.mark.parametrize(
    ("waited", "own", "policy"),
    [
        ("some avg10=85.10 avg60=2.00 avg300=0.00 total=1", {}, "passive"),
        ("some avg10=1.50 avg60=99.00 avg300=0.00 total=1", {}, "None"),
        ("some avg10=85.10 avg60=2.00", {"OMP_WAIT_POLICY": "active"}, "active"),
        ("some avg10=85.10 avg60=2.00", {"GOMP_SPINCOUNT": "100"}, "None"),
        ("of another system", {}, "None"),
        (None, {}, "None"),
    ],
)
def test_threads_sleep_while_they_wait_where_others_want_the_processors(waited, own, policy, tmp_path):
    """libgomp reads the variable once, so it is there before PyTorch is."""
    file = tmp_path / "pressure"
    if waited is not None:
        file.write_text(waited)
    names = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    variables = {name: value for name, value in os.environ.items() if name not in names}
    command = [sys.executable, "-c", WAIT_POLICY, str(file)]
    done = subprocess.run(command, env={**variables, **own}, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == policy, done.stderr


def test_the_command_line_imports_torch_after_it_has_chosen():
    code = """
import sys
from decoders import cli
from decoders.cli import commands
chosen = []
commands.choose_wait_policy = lambda: chosen.append("torch" in sys.modules)
try:
    cli.main(["inspect", "checkpoints/tiny-phi3"])
finally:
    print(chosen, "torch" in sys.modules, file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stderr.endswith("[False] True\n"), done.stderr

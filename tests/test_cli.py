# SPDX-License-Identifier: MIT
"""The command line, end to end: `python -m ssmk` in a process of its own."""

import os
import re
import subprocess
import sys
from importlib import util

import pytest

import ssmk

DEMO = ("typeseg", "rich", "threadpoolctl")
needs_demo = pytest.mark.skipif(
    not all(map(util.find_spec, DEMO)), reason=f"needs {', '.join(DEMO)}: pip install 'ssmk[demo]'"
)


def run(*args, stdin=b"", hide=(), **environment):
    """The finished process.  Packages in `hide` look as if they were not installed."""
    code = (
        "import sys; from importlib import util; find = util.find_spec\n"
        f"sys.modules.update(dict.fromkeys({list(hide)}))\n"
        f"util.find_spec = lambda name: None if name in {list(hide)} else find(name)\n"
        "from ssmk.__main__ import main; sys.exit(main())\n"
    )
    start = ["-c", code] if hide else ["-m", "ssmk"]
    inherited = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR")}
    process = subprocess.run(
        [sys.executable, *start, *map(str, args)],
        input=stdin,
        capture_output=True,
        env={**inherited, "PYTHONIOENCODING": "utf-8", **environment},
        timeout=120,
    )
    process.out, process.err = process.stdout.decode(), process.stderr.decode()
    return process


def one_line(text):
    return text.count("\n") == 1 and text.endswith("\n")


# ---- the program


def test_version():
    assert run("--version").out == f"ssmk {ssmk.__version__}\n"


def test_without_a_command_it_says_how_it_is_used():
    process = run()
    assert process.returncode == 2
    assert process.err.startswith("usage: ssmk")


def test_help_names_every_command():
    process = run("--help")
    assert process.returncode == 0
    for command in ("info", "demo", "bench"):
        assert re.search(rf"^ +{command} ", process.out, re.MULTILINE)


# ---- info


@pytest.mark.parametrize("hide", [(), ("rich",)])
def test_info_shows_what_the_library_says(hide):
    process = run("info", hide=hide)
    assert process.returncode == 0 and process.err == ""
    rows = dict(re.split(r"  +", line.strip(), maxsplit=1) for line in process.out.splitlines())
    assert rows["version"] == ssmk.__version__
    assert "ssmk" in rows["library"]
    assert rows["cpu backend"] == "built, 1 device"
    for kind in ("cuda", "metal"):
        assert rows[f"{kind} backend"].startswith(
            "built" if ssmk.backend_built(kind) else "not built"
        )
    assert rows["instruction set"] == ssmk.cpu_isa()
    assert rows["threads"] == str(ssmk.num_threads())
    assert "numpy" in rows


def test_info_follows_the_environment():
    process = run("info", SSMK_ISA="portable", OMP_NUM_THREADS="3")
    assert re.search(r"instruction set +portable\n", process.out)
    assert re.search(r"threads +3\n", process.out)


def test_info_fails_on_an_instruction_set_that_is_not_there():
    process = run("info", SSMK_ISA="abacus")
    assert process.returncode == 1
    assert "SSMK_ISA=abacus" in process.out


# ---- demo


@needs_demo
def test_the_demo_labels_a_file_and_compares_the_engines(tmp_path):
    file = tmp_path / "mixed.txt"
    file.write_text('def f(x):\n    return x + 1\n\n{"a": [1, 2, 3], "b": null, "c": "d"}\n')
    process = run("demo", file)
    assert process.returncode == 0 and process.err == ""
    assert re.search(r"^python +\| def f\(x\):\n +\|     return x \+ 1$", process.out, re.MULTILINE)
    assert re.search(r'^json +\| .*"b": null', process.out, re.MULTILINE)
    assert re.search(r"^ +ssmk, NumPy +[\d,]+ *$", process.out, re.MULTILINE)
    assert re.search(r"typeseg, NumPy +[\d,]+ +[\d.]+ x +\S+ of \S+ +identical", process.out)
    onnx = r"typeseg, ONNX +[\d,]+ +[\d.]+ x +\S+ of \S+ +identical"
    assert re.search(onnx if util.find_spec("onnxruntime") else "left out", process.out)
    assert "The logits agree" in process.out


@needs_demo
def test_the_demo_without_a_file_reads_its_sample():
    process = run("demo", "--engine", "ssmk")
    assert process.returncode == 0
    for label in ("text", "python", "sql", "json", "html", "css", "shell", "c_family"):
        assert re.search(rf"^{label} +\| ", process.out, re.MULTILINE)
    assert "typeseg" not in process.out


@needs_demo
def test_the_demo_reads_standard_input_and_text():
    source = "SELECT name FROM cats WHERE age > 3 ORDER BY name;\n"
    from_stdin = run("demo", "-", "--engine", "ssmk", stdin=source.encode())
    from_text = run("demo", "--text", source, "--engine", "ssmk")
    for process, name in ((from_stdin, "standard input"), (from_text, "the text")):
        assert process.out.startswith(f"{name}: {len(source)} characters")
        assert re.search(r"^sql +\| SELECT name", process.out, re.MULTILINE)


@needs_demo
def test_plain_output_has_no_escapes_and_colour_only_where_it_is_wanted():
    command = ("demo", "--text", "int main(void) { return 0; }", "--engine", "ssmk")
    assert "\x1b" not in run(*command).out
    # FORCE_COLOR makes rich take the pipe for a terminal.
    terminal = {"FORCE_COLOR": "1", "COLORTERM": "truecolor", "TERM": "xterm-256color"}
    coloured = run(*command, **terminal).out
    assert re.search(r"\x1b\[[\d;]*48;2;\d+;\d+;\d+m", coloured)
    assert not re.search(r"\x1b\[[\d;]*[34]8;", run(*command, **terminal, NO_COLOR="1").out)
    assert not re.search(r"\x1b\[[\d;]*[34]8;", run(*command, "--no-color", **terminal).out)


@needs_demo
def test_no_byte_of_a_binary_file_can_steer_the_terminal(tmp_path):
    file = tmp_path / "binary"
    file.write_bytes(bytes(range(256)) * 3 + b"\x1b]0;title\x07" + "\u202e\u009b31m".encode())
    process = run("demo", file, "--engine", "ssmk", "--lines", "0")
    assert process.returncode == 0
    controls = {c for c in process.out if c < " " or "\x7f" <= c < "\xa0" or c == "\u202e"}
    assert controls <= {"\n", "\t"}


@needs_demo
def test_an_output_that_cannot_show_a_character_shows_a_question_mark():
    process = run("demo", "--text", "naïve 東", "--engine", "ssmk", PYTHONIOENCODING="ascii")
    assert process.returncode == 0 and b"na?ve ?" in process.stdout


@needs_demo
def test_limit_and_lines_bound_what_is_read_and_shown(tmp_path):
    file = tmp_path / "long.txt"
    file.write_bytes(b"a,b\n" * 500)
    process = run("demo", file, "--engine", "ssmk", "--limit", "400", "--lines", "10")
    assert process.out.startswith(f"the first 400 bytes of {file}: 400 characters")
    assert len(re.findall(r"\| a,b$", process.out, re.MULTILINE)) == 10
    assert "... and 360 characters more" in process.out
    whole = run("demo", file, "--engine", "ssmk", "--limit", "0", "--lines", "0")
    assert len(re.findall(r"\| a,b$", whole.out, re.MULTILINE)) == 500


@needs_demo
def test_the_demo_ends_quietly_when_its_reader_does():
    command = [
        sys.executable,
        "-m",
        "ssmk",
        "demo",
        "--engine",
        "ssmk",
        "--text",
        "x = 1\n" * 20000,
    ]
    process = subprocess.Popen(
        [*command, "--lines", "0"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.readline()
    process.stdout.close()
    error = process.stderr.read()
    assert process.wait(timeout=120) == 0
    assert error == b""


@needs_demo
@pytest.mark.parametrize(
    "make, message",
    [
        (lambda path: None, "No such file or directory"),
        (lambda path: path.mkdir(), "Is a directory"),
        (lambda path: path.touch(), "is empty: there is nothing to label"),
    ],
    ids=["missing", "directory", "empty"],
)
def test_a_file_that_cannot_be_read_gets_one_line(tmp_path, make, message):
    path = tmp_path / "it"
    make(path)
    process = run("demo", path)
    assert process.returncode == 2 and process.out == ""
    assert one_line(process.err)
    assert process.err.startswith("ssmk demo: ") and str(path) in process.err
    assert message in process.err


@needs_demo
@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read anything"
)
def test_a_file_without_permission_gets_one_line(tmp_path):
    path = tmp_path / "secret"
    path.write_text("x")
    path.chmod(0)
    process = run("demo", path)
    assert process.returncode == 2 and one_line(process.err)
    assert "Permission denied" in process.err


@needs_demo
@pytest.mark.parametrize("package", DEMO)
def test_a_missing_extra_gets_one_line(package):
    process = run("demo", hide=[package])
    assert process.returncode == 2 and process.out == ""
    assert process.err == f"ssmk demo: this needs {package}: pip install 'ssmk[demo]'\n"


@needs_demo
def test_without_onnxruntime_its_engine_is_left_out_unless_asked_for():
    command = ("demo", "--text", "x = 1", "--engine")
    process = run(*command, "all", hide=["onnxruntime"])
    assert process.returncode == 0
    assert "left out" in process.out and "typeseg, ONNX " not in process.out
    process = run(*command, "onnx", hide=["onnxruntime"])
    assert process.returncode == 2
    assert process.err == "ssmk demo: this needs onnxruntime: pip install 'ssmk[demo]'\n"


@pytest.mark.parametrize("arguments", [["--lines", "-1"], ["--limit", "many"], ["--engine", "tea"]])
def test_a_bad_argument_is_named(arguments):
    process = run("demo", *arguments)
    assert process.returncode == 2
    assert f"argument {arguments[0]}:" in process.err and "Traceback" not in process.err


def test_a_file_and_a_text_together_are_refused():
    process = run("demo", "file", "--text", "x")
    assert process.returncode == 2
    assert "not allowed with" in process.err

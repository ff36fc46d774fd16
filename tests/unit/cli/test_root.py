import socket
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from keepwarm import __version__
from keepwarm.cli.root import build, run

COMMANDS = [
    [],
    ["serve"],
    ["demo"],
    ["store"],
    ["verify"],
    ["replay"],
    ["plan"],
    ["bench"],
    ["bench", "ttft"],
    ["bench", "gateway"],
    ["bench", "store"],
    ["bench", "agent"],
    ["bench", "ledger"],
    ["orgs"],
    ["orgs", "create"],
    ["orgs", "list"],
    ["orgs", "show"],
    ["orgs", "set"],
    ["orgs", "disable"],
    ["orgs", "enable"],
    ["projects"],
    ["projects", "create"],
    ["projects", "list"],
    ["projects", "archive"],
    ["keys"],
    ["keys", "create"],
    ["keys", "list"],
    ["keys", "set"],
    ["keys", "revoke"],
    ["caches"],
    ["caches", "list"],
    ["caches", "show"],
    ["caches", "delete"],
    ["prices"],
    ["prices", "list"],
    ["prices", "show"],
    ["prices", "check"],
    ["usage"],
    ["invoice"],
    ["ledger"],
    *(["ledger", name] for name in ("verify", "balance", "grant", "voucher", "adjust", "rows")),
    ["budgets"],
    *(["budgets", name] for name in ("set", "list", "remove")),
]


def keepwarm(*args: str, options: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *options, "-m", "keepwarm", *args], capture_output=True, text=True, timeout=60, check=False
    )


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_has_help_with_an_example_that_parses(command: list[str]) -> None:
    result = CliRunner().invoke(build(), [*command, "--help"], env={"COLUMNS": "200"})
    assert result.exit_code == 0
    [example] = [line.strip() for line in result.stdout.splitlines() if line.strip().startswith("Example: keepwarm")]
    words = example.removeprefix("Example: keepwarm ").split()
    assert words[: len(command)] == command
    assert CliRunner().invoke(build(), [*words, "--help"]).exit_code == 0


def test_the_list_of_commands_above_is_whole() -> None:
    root = typer.main.get_group(build())
    whole = [[name] for name in root.commands]
    whole += [[name, sub] for name, group in root.commands.items() for sub in getattr(group, "commands", {})]
    assert sorted(whole) == sorted(command for command in COMMANDS if command)


@pytest.mark.parametrize(
    "args, line",
    [
        (["keys"], "keepwarm: Missing command; see keepwarm keys --help"),
        (["keys", "create"], "keepwarm: Missing argument 'name'; see keepwarm keys create --help"),
        (["serv"], "keepwarm: No such command 'serv'. Did you mean 'serve'?; see keepwarm --help"),
        (["serve", "--zz"], "keepwarm: No such option: --zz; see keepwarm serve --help"),
    ],
)
def test_usage_errors_are_one_line_and_status_2(args: list[str], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(args) == 2
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", line + "\n")


def test_a_port_out_of_range_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["serve", "--port", "65536"]) == 2
    assert "'--port'" in capsys.readouterr().err


def test_no_command_shows_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([]) == 0
    assert "caches" in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--version"]) == 0
    assert capsys.readouterr().out == __version__ + "\n"


def test_python_without_assertions_is_refused() -> None:
    result = keepwarm("--version", options=("-O",))
    assert (result.returncode, result.stdout) == (1, "")
    assert "without python -O" in result.stderr


def test_commands_on_the_database_load_neither_the_server_nor_llama() -> None:
    code = "import sys; from keepwarm.cli.root import build; print({'llama_cpp', 'starlette', 'openai'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout == "set()\n"


@pytest.mark.parametrize(
    "args, words",
    [
        (["--config", "missing.toml"], "cannot read config missing.toml"),
        (["--model", "missing.gguf"], "there is no model file missing.gguf"),
        (["--dev", "--host", "0.0.0.0"], "--dev accepts any key, so it binds loopback only"),
    ],
)
@pytest.mark.parametrize("command", ["serve"])
def test_a_configuration_that_cannot_be_used_is_one_line(command: str, args: list[str], words: str) -> None:
    result = CliRunner().invoke(build(), [command, *args])
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith(f"keepwarm: {words}")
    assert result.stderr.count("\n") == 1


def test_wrong_values_in_the_file_name_their_path(tmp_path: Path) -> None:
    file = tmp_path / "k.toml"
    file.write_text("[limits]\nturns_max = 'many'\n", encoding="utf-8")
    result = CliRunner().invoke(build(), ["serve", "--config", str(file)])
    assert result.exit_code == 1
    assert "turns_max" in result.stderr


def test_a_taken_port_is_one_line(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        result = keepwarm("serve", "--dev", "--port", port, "--data-dir", str(tmp_path))
    assert result.returncode == 1
    [line] = result.stderr.splitlines()
    assert line.startswith(f"keepwarm: cannot listen on 127.0.0.1:{port}: Address already in use")
    assert line.endswith("choose another --host or --port")

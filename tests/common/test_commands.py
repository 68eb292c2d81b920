"""Errors as a person sees them: one line each, on standard error, with an exit code of their own."""

import inspect

import pytest

from hanse_common import commands, errors
from hanse_common.errors import ConfigError, HanseError


def every_error() -> list[type[HanseError]]:
    found = [member for _, member in inspect.getmembers(errors, inspect.isclass)]
    return [member for member in found if issubclass(member, HanseError)]


def test_every_error_has_an_exit_code_of_its_own() -> None:
    codes = [error.exit_code for error in every_error()]
    assert len(set(codes)) == len(codes)
    # 2 is the command line parser's, 126 and above are the shell's.
    assert all(1 <= code < 126 and code != 2 for code in codes)


def test_every_error_is_in_the_tree_of_its_module() -> None:
    for error in every_error():
        assert error.__name__ in str(errors.__doc__)


def test_an_error_is_shown_as_it_reads_and_ends_with_its_code(capsys: pytest.CaptureFixture[str]) -> None:
    app = commands.new_app("Test.")

    @app.command()
    def fail() -> None:
        raise ConfigError("a.yaml:1: x: found [red], expected 3.\na.yaml:2: y: missing.")

    @app.command()
    def other() -> None:
        """A second command, so that the first has a name."""

    with pytest.raises(SystemExit) as stopped, pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["hanse", "fail"])
        commands.run(app)
    assert stopped.value.code == ConfigError.exit_code
    assert capsys.readouterr().err == (
        "error: a.yaml:1: x: found [red], expected 3.\nerror: a.yaml:2: y: missing.\n"
    )

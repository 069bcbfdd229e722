"""The help of every command fits a terminal of 80 columns, says something about each option, and cuts nothing off"""
import os
import re
import subprocess
import sys

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from sage_finetune.cli import app

COMMANDS = sorted(get_command(app).commands)


def help_of(*words):
    "What `--help` prints on a terminal of 80 columns"
    found = CliRunner().invoke(app, [*words, '--help'], env=dict(COLUMNS='80', TERMINAL_WIDTH='80', NO_COLOR='1'))
    assert found.exit_code==0, found.output
    return found.output


@pytest.mark.parametrize('command', ['', *COMMANDS])
def test_the_help_of_a_command_fits_80_columns(command):
    text = help_of(*command.split())
    assert max(map(len, text.splitlines()))<=80
    assert '…' not in re.sub(r'exported/…|run .* …', '', text).replace('…]', ''), 'something is cut off'


@pytest.mark.parametrize('command', COMMANDS)
def test_each_option_is_named_whole_and_explained(command):
    text, found = help_of(command), get_command(app).commands[command]
    assert found.help and len(found.help.splitlines()[0])<=120
    for p in found.params:
        if getattr(p, 'hidden', False) or p.name=='help' or p.param_type_name=='argument': continue
        assert p.help, f'{command} {p.name} says nothing'
        assert p.opts[0] in text, f'{command} {p.opts[0]} is cut off'


def test_the_real_program_prints_what_fits_too():
    code = 'from sage_finetune.cli import main; raise SystemExit(main())'
    done = subprocess.run([sys.executable, '-c', code, 'export', '--help'], capture_output=True, text=True,
                          env={**os.environ, 'COLUMNS': '80', 'TERMINAL_WIDTH': '80'})
    assert done.returncode==0 and max(map(len, done.stdout.splitlines()))<=80 and '--gguf' in done.stdout

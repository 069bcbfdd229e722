"What several test files use"
import os
import subprocess
import sys
from pathlib import Path

import pytest

from quick import command_in_fork, forked


@pytest.fixture(autouse=True)
def no_picture(monkeypatch):
    """Runs of a test leave a small file for their curve of losses, which takes a tenth of a second to draw; some
    lessons and the real command draw it
    """
    if trainer := sys.modules.get('sage_finetune.trainer'):
        from sage_finetune.core.disk import write_text # whole: a copy of the run may share the bytes of an earlier one
        monkeypatch.setattr(trainer, 'plot_losses', lambda metrics, path=None: path and write_text(path, 'curve'))


@pytest.fixture
def home_of(tmp_path): return lambda env: {**os.environ, 'HOME': str(tmp_path/'home'), **env}


@pytest.fixture
def program(tmp_path, home_of):
    """Run the real `sage-finetune` in a new process, with an empty home; gives a finished process or, with
    `wait=False`, a running one
    """
    program = Path(sys.executable).with_name('sage-finetune')

    def run(*args, wait=True, stdin='', **env):
        words,options = [program, *map(str, args)],dict(text=True, env=home_of(env), cwd=tmp_path)
        if wait: return subprocess.run(words, capture_output=True, input=stdin, **options)
        return subprocess.Popen(words, **dict.fromkeys(('stdin', 'stdout', 'stderr'), subprocess.DEVNULL), **options)
    return run


@pytest.fixture
def command(tmp_path, home_of, program):
    "Run `sage-finetune` in a forked process, with an empty home; gives a finished process"
    if not forked: return program
    return lambda *args, stdin='', **env: command_in_fork(args, tmp_path, home_of(env), stdin)

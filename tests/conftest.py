"What several test files use"
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture
def command(tmp_path):
    """Run `sage-finetune` as a process of its own, with an empty home; gives a finished process or, with
    `wait=False`, a running one
    """
    program = Path(sys.executable).with_name('sage-finetune')

    def run(*args, wait=True, **env):
        env = {**os.environ, 'HOME': str(tmp_path/'home'), **env}
        options = dict(text=True, env=env, cwd=tmp_path, stdin=subprocess.DEVNULL)
        if wait: return subprocess.run([program, *map(str, args)], capture_output=True, **options)
        return subprocess.Popen([program, *map(str, args)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                                **options)
    return run

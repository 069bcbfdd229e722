"The check of a card is known to run: here on a CPU, with small sizes"
import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2]/'benchmarks'/'gpu_check.py'

@pytest.mark.slow
@pytest.mark.parametrize('check', ['exact', 'head', 'packing', 'memory', 'presets', 'out_of_memory', 'scaler',
                                   'resume', 'speed'])
def test_each_check_runs(check):
    done = subprocess.run([sys.executable, '-W', 'ignore', str(SCRIPT), '--tiny', '--only', check],
                          capture_output=True, text=True, timeout=500)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line.get('check') for line in lines]==[None, check], done.stderr[-2000:]
    assert done.returncode==0 and lines[1]['holds'], lines[1]

def test_checks_that_have_no_time_left_say_so(capsys):
    sys.path.insert(0, str(SCRIPT.parent))
    try: import gpu_check
    finally: sys.path.pop(0)
    assert gpu_check.main(['--tiny', '--minutes', '0', '--only', 'speed'])==0
    assert json.loads(capsys.readouterr().out.splitlines()[1])==dict(check='speed', skipped='no time left')

"Twenty answers that mean harm, each contained: the machine is as before, and none of them passes its test"
import os
import platform
import subprocess
import sys
import time
from unittest.mock import patch

import pytest

from sage_finetune.core.disk import SageError
from sage_finetune.rewards import sandbox
from sage_finetune.rewards.functions import rewards_of
from sage_finetune.rewards.sandbox import run_python, sandbox_fault

MEMORY = 256<<20

# Name → code that mean harm; `PLACE` is a folder that the test looks at afterwards
HOSTILE = dict(
    fork_bomb='import os\nwhile True: os.fork()',
    clone_bomb='import ctypes\nlibc = ctypes.CDLL(None)\nwhile True:\n'
               '    if libc.syscall(56, 17, 0, 0, 0, 0)<0: raise OSError',
    process='import subprocess\nsubprocess.run(["/bin/touch", "PLACE/process"])',
    shell='import os\nif os.system("touch PLACE/shell"): raise OSError',
    program='import os\nos.execv("/bin/touch", ["touch", "PLACE/program"])',
    threads='import threading,time\nfor _ in range(10**6): threading.Thread(target=time.sleep, args=(99,)).start()',
    network='import socket\nsocket.create_connection(("127.0.0.1", 22))',
    udp='import socket\nsocket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"x", ("8.8.8.8", 53))',
    unix_socket='import socket\nsocket.socket(socket.AF_UNIX).bind("PLACE/socket")',
    write='open("PLACE/write", "w").write("x")',
    append='open("PLACE/there", "a").write("x")',
    delete='import os\nos.remove("PLACE/there")',
    rename='import os\nos.rename("PLACE/there", "PLACE/gone")',
    folder='import os\nos.mkdir("PLACE/folder")',
    rights='import os\nos.chmod("PLACE/there", 0)',
    link='import os\nos.symlink("/", "PLACE/link")',
    endless='while True: pass',
    asleep='import time\ntime.sleep(10**6)',
    memory='x = []\nwhile True: x.append(bytearray(1<<24))',
    big_number='x = 9**9**9',
    signal='import os,signal\nos.kill(os.getppid(), signal.SIGKILL)',
    limits='import resource,os\nresource.prlimit(os.getppid(), resource.RLIMIT_CPU, (1, 1))',
    early_exit='import os\nos._exit(0)',
    fake='import os\nos.write(1, b\'{"word": "", "passed": [true], "why": ""}\')\nos._exit(0)',
    flood='import os\nwhile True: os.write(1, b"x"*65536)',
    recursion='import sys\nsys.setrecursionlimit(10**9)\ndef f(): f()\nf()',
    crash='import ctypes\nctypes.string_at(0)',
    patched='import builtins\ndef fail(*a, **k): raise SystemExit(0)\nbuiltins.compile = fail',
)


@pytest.fixture(scope='module', autouse=True)
def can_isolate():
    if fault := sandbox_fault(): pytest.skip(fault)


@pytest.fixture
def place(tmp_path):
    (tmp_path/'there').write_text('as before')
    return tmp_path


def processes(): return {p for p in os.listdir('/proc') if p.isdigit()}


@pytest.mark.parametrize('name', HOSTILE)
def test_harm_is_contained(name, place):
    before,rights,began = sorted(os.listdir(place)),(place/'there').stat().st_mode,time.monotonic()
    found = run_python(HOSTILE[name].replace('PLACE', str(place)), ['raise SystemError'], seconds=.5, memory=MEMORY)
    assert found.share==0 and time.monotonic()-began<30
    assert sorted(os.listdir(place))==before and (place/'there').read_text()=='as before'
    assert (place/'there').stat().st_mode==rights
    assert os.getppid()>0 and subprocess.run([sys.executable, '-c', '']).returncode==0


def test_nothing_is_left_running(place):
    run_python('import time\ntime.sleep(10**6)', ['pass'], seconds=.2)
    mine = [p for p in processes() if (os.path.exists(f'/proc/{p}/status')
            and f'PPid:\t{os.getpid()}\n' in open(f'/proc/{p}/status').read()
            and 'sandbox.py' in open(f'/proc/{p}/cmdline').read())]
    assert mine==[]


@pytest.mark.parametrize('code,tests,share', [
    ('def f(x): return x+1', ['assert f(1)==2', 'assert f(1)==3'], .5),
    ('import math,re,json,collections,itertools\nf = math.factorial', ['assert f(5)==120'], 1),
    ('from dataclasses import dataclass\n@dataclass\nclass P:\n    x: int', ['assert P(3).x==3'], 1),
    ('print("a"*10**6)\nimport sys\nsys.stderr.write("b")', ['assert True'], 1),
    ('def f(:', ['assert True'], 0), ('', [], 0), ('text = open("/etc/hostname").read()', ['assert text'], 1)])
def test_plain_code_runs(code, tests, share):
    assert run_python(code, tests).share==share


def test_files_of_this_user_are_read_only_and_the_environment_is_empty():
    tests = ['assert not [k for k in os.environ if k!="LC_CTYPE"]', 'assert os.getcwd()=="/"']
    assert run_python('import os', tests).share==1


def test_a_system_that_cannot_isolate_is_refused():
    with patch.object(sandbox, '_known', {}), patch.object(platform, 'machine', lambda: 'riscv64'):
        assert 'riscv64 has no filter' in sandbox_fault()
        with pytest.raises(SageError, match='code cannot be run here'): run_python('', ['pass'])
        with pytest.raises(SageError, match='"python_tests" runs what a model wrote'):
            rewards_of([dict(reward='python_tests')])


def test_a_filter_that_does_not_hold_is_found():
    "A kernel that takes the filter and ignores it"
    open_door = sandbox._filter('x86_64')[:-1]+[(6, 0, 0, 0x7FFF0000)]
    text = open(sandbox._this_file()).read()
    broken = text.replace("    return [*out, (_give, 0, 0, _refuse(1))]", "    return [*out, (_give, 0, 0, _allow)]")
    assert text!=broken and open_door[-1][3]==0x7FFF0000
    import tempfile
    with tempfile.NamedTemporaryFile('w', suffix='.py') as f:
        f.write(broken)
        f.flush()
        with patch.object(sandbox, '_known', {}), patch.object(sandbox, '_this_file', lambda: f.name):
            assert 'could still reach' in sandbox_fault() and 'network' in sandbox_fault()

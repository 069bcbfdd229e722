"How a command ends: real signals in real processes, packages that are not there, and faults of our own"
import os
import signal
import subprocess
import sys
import time

import pytest

from quick import few
from sage_finetune.core.machine import (
    Interrupted, last_words, missing_package, no_stop_is_lost, refuse_other_encodings, stop_raises
)

posix = pytest.mark.skipif(os.name!='posix', reason='signals')
WAIT = '''
import sys, time
from sage_finetune.core.machine import last_words, stop_raises
try:
    with stop_raises():
        print('ready', flush=True)
        time.sleep(60)
except (Exception, KeyboardInterrupt) as e:
    words,status = last_words(e, again='the same command goes on')
    print(words, flush=True)
    sys.exit(status)
'''


@posix
@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_stop_that_python_drops_comes_again(number, capsys):
    class Left:
        def __del__(self): signal.raise_signal(number) # what is raised here is only printed
    began = time.monotonic()
    with pytest.raises(Interrupted) as stopped, stop_raises():
        Left()
        while time.monotonic()<began+10: time.sleep(.01)
    assert stopped.value.signal==number and time.monotonic()<began+5
    assert capsys.readouterr().err==''

@posix
def test_what_else_is_dropped_is_still_told(monkeypatch):
    told = []
    monkeypatch.setattr(sys, 'unraisablehook', told.append)
    class Left:
        def __del__(self): raise ValueError('of somebody else')
    with no_stop_is_lost(): Left()
    assert len(told)==1 and sys.unraisablehook==told.append


def waiting(*words):
    "A process that waits for a signal"
    process = subprocess.Popen([*words, sys.executable, '-c', WAIT], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline()=='ready\n'
    return process


@posix
@pytest.mark.parametrize('name,status', [('SIGINT', 130), ('SIGTERM', 143), ('SIGHUP', 129)])
def test_a_signal_ends_with_words_and_its_status(name, status):
    process = waiting()
    process.send_signal(getattr(signal, name))
    said,_ = process.communicate(timeout=30)
    assert (process.returncode, said)==(status, 'stopped; the same command goes on\n')


@posix
def test_who_ignores_a_closed_terminal_has_a_reason():
    process = waiting('nohup')
    process.send_signal(signal.SIGHUP)
    with pytest.raises(subprocess.TimeoutExpired): process.wait(.5)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30)==143


@posix
def test_a_forked_child_dies_of_a_signal_without_a_word():
    code = '''
import os, signal, time
from sage_finetune.core.machine import stop_raises
with stop_raises():
    child = os.fork()
    if not child: time.sleep(60)
    time.sleep(.2)
    os.kill(child, signal.SIGTERM)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
'''
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=30)
    assert (done.stdout, done.stderr)==(f'{-signal.SIGTERM}\n', '')


def without(name, folder):
    "An environment in which a package is not installed"
    (folder/'sitecustomize.py').write_text(f"""from importlib.machinery import PathFinder
own = PathFinder.find_spec
def find_spec(name, path=None, target=None):
    return None if name.partition('.')[0]=={name!r} else own(name, path, target)
PathFinder.find_spec = staticmethod(find_spec)
""")
    path = os.pathsep.join([str(folder), os.environ.get('PYTHONPATH', '')])
    return os.environ | dict(PYTHONPATH=path, SAGE_CACHE=str(folder/'cache'), HF_HUB_OFFLINE='1')


@pytest.mark.parametrize('name', few(['torch', 'transformers', 'peft', 'datasets', 'accelerate'], 2))
def test_a_missing_package_is_named_with_its_command(name, tmp_path):
    (tmp_path/'rows.jsonl').write_text('{"question": "a?", "answer": "b."}\n'*4)
    (tmp_path/'run.yaml').write_text(f'model_name: sage-tiny\ndata_path: {tmp_path}/rows.jsonl\n'
                                     f'output_dir: {tmp_path}/run\nmax_steps: 1\n')
    code = 'import sys\nfrom sage_finetune.cli import main\nsys.exit(main())'
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', code, 'run', str(tmp_path/'run.yaml')],
                          env=without(name, tmp_path), capture_output=True, text=True, timeout=120)
    assert done.returncode==1 and 'Traceback' not in done.stderr, done.stderr
    assert f'pip install {name}' in done.stderr.splitlines()[-1]


def test_errors_of_libraries_that_speak_of_packages():
    other = ImportError('cannot import name "LoraConfig" from "json"', name='json')
    assert 'pip install json --upgrade' in missing_package(other)
    said = ImportError('Using X requires accelerate: please run `pip install transformers[torch]` or so')
    assert missing_package(said).endswith('pip install transformers[torch]')
    ours = ModuleNotFoundError("No module named 'sage_finetune.nothing'", name='sage_finetune.nothing')
    assert missing_package(ours) is None
    try:
        try: raise ModuleNotFoundError("No module named 'no_such'", name='no_such')
        except ImportError as e: raise RuntimeError('failed to import it') from e
    except RuntimeError as e: assert missing_package(e)=='the package no_such is missing: pip install no-such'


def test_a_fault_of_ours_goes_into_a_file_that_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    try: {}['nobody foresaw this']
    except KeyError as e: words,status = last_words(e, ['run', 'x.yaml', '--api-key=sesame', '--token', 'open'])
    file, = (tmp_path/'.sage'/'logs').iterdir()
    assert status==1 and words.startswith('error: this is a fault of sage_finetune') and str(file) in words
    text = file.read_text()
    assert 'nobody foresaw this' in text and 'Traceback' in text and 'sesame' not in text and 'open' not in text[:200]


@pytest.mark.parametrize('error,words,status', [
    (Interrupted(signal.SIGINT, 'stopped at step 4 of 20; the same command goes on'),
     'stopped at step 4 of 20; the same command goes on', 130),
    (KeyboardInterrupt(), 'stopped; nothing more was done', 130),
    (MemoryError(), 'error: out of memory: choose a smaller model, or a machine with more', 1),
    (ValueError('a\x1b[31mred\n\x07line'), 'error: a\\x1b[31mred \\x07line', 1)])
def test_the_last_words(error, words, status): assert last_words(error)==(words, status)


def test_names_that_are_not_utf8_are_refused_by_name():
    refuse_other_encodings(['run', '微调.json'])
    with pytest.raises(ValueError, match=r'caf.*udce9.json.* is not UTF-8 text'):
        refuse_other_encodings(['run', 'caf\udce9.json'])


@posix
@pytest.mark.parametrize('locale', [
    pytest.param(dict(LC_ALL='C', PYTHONUTF8='0', PYTHONCOERCECLOCALE='0'), id='C'),
    pytest.param(dict(LC_ALL='POSIX'), id='POSIX', marks=pytest.mark.slow),
    pytest.param(dict(LC_ALL='en_US.ISO-8859-1'), id='latin', marks=pytest.mark.slow)])
def test_a_chinese_name_in_another_locale(locale, tmp_path):
    (tmp_path/'微调.yaml').write_text('seed: one\n', encoding='utf-8')
    (tmp_path/'main.py').write_text('import sys\nfrom sage_finetune.cli import main\nsys.exit(main())')
    done = subprocess.run([sys.executable, tmp_path/'main.py', 'run', tmp_path/'微调.yaml'],
                          env=os.environ | locale, capture_output=True, timeout=60)
    said = done.stderr.decode()
    assert done.returncode==1 and '`seed` must be a whole number' in said and 'Traceback' not in said, said

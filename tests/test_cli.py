"The command line as a process: bad input, a kill in the middle, and no word to any other machine"
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from quick import Forked, few, forked, run_in_fork
from sage_finetune.cli import echo, main
from sage_finetune.data import create_sample_data

bad_files = {
    'missing': (None, 'data file not found'),
    'empty': (b'', 'holds no row that can be used'),
    'no rows': (b'[]', 'holds no row that can be used'),
    'broken': (b'[{"question": "a", "answer": "b"},', 'not JSON'),
    'cut off': (b'[{"question": "a", "ans', 'not JSON'),
    'an object': (b'{"question": "a"}', "the keys 'question'"),
    'other keys': (b'[{"ask": "a", "reply": "b"}]', "the keys 'ask', 'reply'"),
    'wrong types': (b'[{"question": 1, "answer": 2}]', '`question` must be a string, got int'),
    'not objects': (b'[1, 2]', 'holds no row that can be used'),
    'binary': (b'\xff\xfd\x00\x01', 'not UTF-8 text'),
    'UTF-16': (b'\xff\xfe\x00\x01', 'is UTF-16 text'),
}


def refused(capsys, *args):
    "The one line that a command fails with"
    status = main([str(a) for a in args])
    said = capsys.readouterr()
    assert status != 0 and said.err.count('\n') == 1 and said.err.startswith('error: '), said
    assert 'Traceback' not in said.err + said.out
    return said.err


@pytest.mark.parametrize('name', bad_files)
def test_a_bad_data_file_is_named_in_one_line_and_nothing_is_written(name, tmp_path, capsys):
    content,expected = bad_files[name]
    file = tmp_path/'rows.json'
    if content is not None: file.write_bytes(content)
    line = refused(capsys, 'start', '--task', 'qa', '--data', file, '--output', tmp_path/'run', '--auto')
    assert expected in line and 'rows.json' in line
    assert not (tmp_path/'run').exists()


@pytest.mark.parametrize('args,expected', [
    (('start', '--task', 'quiz', '--auto'), 'unknown task `quiz`'),
    (('start', '--task', 'qa', '--auto'), 'needs `data`'),
    (('start', '--task', 'qa', '--data', 'nbs/images', '--auto'), 'no file in'),
    (('start', '--task', 'qa', '--data', 'no/where', '--auto'), 'no file or folder is called no/where'),
    (('quickstart', '--colour', 'red'), '--colour'),
    (('quickstart', 'code', '--data', 'no/such/code'), 'codebase not found'),
    (('run', 'no-such-run'), "no run 'no-such-run'"),
    (('run', '../../etc'), 'is not a run folder'),
    (('run', 'no-such-run', '--use-llamafactory'), 'takes a config file of LLaMA-Factory, and no-such-run is no file'),
    (('run', 'x', '--json', '--live'), '`--json` and `--live` exclude each other'),
    (('run', 'x', '--nproc', '2', '--use-llamafactory'),
     '`--nproc, --nodes or --config` and `--use-llamafactory` exclude each other'),
    (('run', 'x', '--prompt', 'Hello'), '`--prompt` goes with `--live`'),
    (('run', 'x', '--use-llamafactory', '--fresh'), 'set `overwrite_output_dir` in its file'),
    (('merge', 'no-such-run'), "no run 'no-such-run'"),
    (('chat', 'no-such-run'), "no run 'no-such-run'"),
    (('chat', '../x'), 'is not a run folder'),
    (('clean', 'no-such-run', '--force'), "no run 'no-such-run'"),
    (('serv', 'x'), "No such command 'serv'"),
])
def test_an_unknown_name_is_refused_in_one_line(args, expected, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr('sage_finetune.core.run_folder.default_output_dir', tmp_path/'runs')
    assert expected in refused(capsys, *args)
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_is_not_there_is_refused_before_anything_is_written(tmp_path, capsys):
    file = create_sample_data(tmp_path/'rows.jsonl', 'qa')
    line = refused(capsys, 'start', '--task', 'qa', '--data', file, '--model', 'nobody/nothing', '--output',
                   tmp_path/'run', '--auto')
    assert "model 'nobody/nothing'" in line and 'sage-tiny' in line
    assert not (tmp_path/'run').exists()


def test_an_output_that_cannot_be_written_is_refused(tmp_path, capsys):
    (tmp_path/'file').write_text('not a folder')
    line = refused(capsys, 'quickstart', 'code', '--max-facts', 5, '--output', tmp_path/'file'/'run')
    assert f"cannot write {tmp_path/'file'/'run'}" in line
    assert (tmp_path/'file').read_text() == 'not a folder'


def test_a_run_with_a_vanished_data_file_is_refused(tmp_path, capsys):
    (tmp_path/'finetune_meta.json').write_text(json.dumps(dict(model='sage-tiny', dataset='gone.json')))
    line = refused(capsys, 'run', tmp_path)
    assert 'gone.json' in line
    assert [p.name for p in tmp_path.iterdir()] == ['finetune_meta.json']


@pytest.mark.slow
def test_a_killed_quickstart_goes_on_from_its_last_checkpoint(program, tmp_path):
    run = tmp_path/'run'
    args = 'quickstart', 'code', '--max-facts', 30, '--output', run
    first = program(*args, wait=False)
    marker,give_up = run/'checkpoints'/'checkpoint-50'/'COMPLETE', time.monotonic()+300
    while not marker.exists() and first.poll() is None and time.monotonic() < give_up: time.sleep(.01)
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert marker.exists() and not (run/'lora_weights').exists(), (
        'it was to be killed between the checkpoint and the end')
    second = program(*args)
    assert second.returncode == 0, second.stderr
    assert 'Resuming from step 50' in second.stderr
    assert json.loads((run/'results.json').read_text())['steps'] == 96
    steps = [json.loads(line)['step'] for line in (run/'metrics.jsonl').read_text().splitlines()]
    assert steps == sorted(steps)


watcher = '''
import os, sys
def watch(event, args):
    if event in ("socket.getaddrinfo", "socket.gethostbyname"): note = f"{event} {args[0]}"
    elif event in ("socket.connect", "socket.sendto"): note = f"{event} {args[1]}" if isinstance(args[1], tuple) else ""
    else: return
    if note:
        with open(os.environ["NETWORK_LOG"], "a") as f: f.write(note + "\\n")
sys.addaudithook(watch)
'''


def test_the_whole_path_speaks_to_no_other_machine(tmp_path):
    log = tmp_path/'network.log'
    watched = os.environ | dict(NETWORK_LOG=str(log), HF_HUB_OFFLINE='0', HOME=str(tmp_path/'home'))
    tree = Path(__file__).parent/'data'/'small_tree'
    words = [['quickstart', 'code', '--data', tree, '--max-facts', 3, '--max-steps', 3, '--output', tmp_path/'run'],
             ['start', '--task', 'qa', '--data', create_sample_data(tmp_path/'rows.json', 'qa'), '--model',
              'nobody/nothing', '--auto']] # the watcher does see what goes out
    # a forked process has read before that it is to stay off the network
    online = 'import huggingface_hub.constants\nhuggingface_hub.constants.HF_HUB_OFFLINE = False\n'
    code = (watcher+online+'from sage_finetune.cli import main\n'
            + ''.join(f"print('status', main({[*map(str, w)]}), os.path.exists({str(log)!r}))\n" for w in words))
    words = [sys.executable, '-c', code]
    done = (run_in_fork(words, env=watched, cwd=tmp_path) if forked else
            subprocess.run(words, capture_output=True, text=True, env=watched, cwd=tmp_path))
    said = [line for line in done.stdout.splitlines() if line.startswith('status ')]
    assert said == ['status 0 False', 'status 1 True'], done.stderr
    assert 'getaddrinfo' in log.read_text()


def test_a_quickstart_about_something_else_gets_a_folder_of_its_own(tmp_path, monkeypatch):
    from sage_finetune.runs import tasks as runs
    monkeypatch.setattr('sage_finetune.core.run_folder.default_output_dir', tmp_path)
    first = runs._own_folder('code', 'sage-tiny', None, None, 5, False)[0]
    other = runs._own_folder('code', 'sage-tiny', None, None, 6, False)[0]
    again = runs._own_folder('code', 'sage-tiny', None, None, 5, False)[0]
    assert [r.path.name for r in (first, other, again)] == ['code', 'code-2', 'code']


def two_files(folder):
    for name,n in dict(a=12, b=4).items():
        rows = [dict(question=f'{name} {i}?', answer=f'{i}') for i in range(n)]
        (folder/f'{name}.jsonl').write_text(''.join(json.dumps(r)+'\n' for r in rows))
    return ['--data', folder/'a.jsonl', '--data', folder/'b.jsonl']


@pytest.mark.slow
def test_data_may_be_repeated_with_shares(tmp_path, capsys):
    "`start` writes what `run` reads: two sources and their shares"
    folder = tmp_path/'run'
    args = ['start', '--task', 'qa', *two_files(tmp_path), '--data-weights', '1,1', '--data-stopping', 'all_exhausted',
            '--output', folder, '--auto', '--model', 'sage-tiny']
    settings = 'sage_finetune.runs.tasks.quick_settings'
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(settings, lambda model, *rest: dict(max_steps=1, test_size=0.0, report_to='none'))
        assert main([str(a) for a in args])==0
    meta = json.loads((folder/'finetune_meta.json').read_text())
    assert [s['path'] for s in meta['dataset']]==[str(tmp_path/'a.jsonl'), str(tmp_path/'b.jsonl')]
    report = json.loads((folder/'data_report.json').read_text())
    assert report['read']==16 and [round(s['weight'], 2) for s in report['sources']]==[.5, .5]
    assert main(['run', str(folder)])==0
    assert '1 steps' in capsys.readouterr().out


def test_inspect_takes_several_sources(tmp_path, capsys):
    files = [str(f) for f in two_files(tmp_path)[1::2]]
    assert main(['inspect', *files, '--data-weights', '3,1', '--json'])==0
    report = json.loads(capsys.readouterr().out)
    assert report['read']==16 and [s['weight'] for s in report['sources']]==[.75, .25]


@pytest.mark.parametrize('args,expected', [
    (['--data-weights', '1'], 'must have a share for each source'), (['--data-weights', '1,0'], 'must be above 0'),
    (['--data-weights', 'a,b'], 'must be a finite number'), (['--data-stopping', 'all_exhausted'], 'goes with'),
    (['--data', 'no/where.jsonl'], 'data file not found')])
def test_sources_that_cannot_be_are_refused_and_nothing_is_written(args, expected, tmp_path, capsys):
    line = refused(capsys, 'start', '--task', 'qa', *two_files(tmp_path), *args, '--output', tmp_path/'run', '--auto')
    assert expected in line and not (tmp_path/'run').exists()


def test_the_task_code_reads_one_folder(tmp_path, capsys):
    assert 'reads one folder of code, got 2' in refused(
        capsys, 'quickstart', 'code', '--data', tmp_path, '--data', tmp_path, '--output', tmp_path/'run')


def small_run(folder, **more):
    "A file of settings for a run of small steps"
    from quick import two_layers
    data = create_sample_data(folder/'rows.jsonl', 'qa', 24)
    settings = dict(model_name=two_layers, data_path=str(data), output_dir=str(folder/'run'), test_size=0.0,
                    save_steps=1, max_steps=3000, per_device_train_batch_size=2, gradient_accumulation_steps=1,
                    report_to='none', load_in_8bit=False, lora=dict(r=2, target_modules='all-linear')) | more
    (folder/'run.json').write_text(json.dumps(settings))
    return folder/'run.json'


@pytest.mark.parametrize('name,status', few([('SIGTERM', 143), ('SIGINT', 130), ('SIGHUP', 129)]))
def test_a_run_that_is_stopped_says_where_and_goes_on(home_of, tmp_path, name, status):
    file,give_up = small_run(tmp_path), time.monotonic()+120
    command = [Path(sys.executable).with_name('sage-finetune'), 'run', file]
    start = Forked if forked and name!='SIGINT' else subprocess.Popen # one of them from its very beginning
    first = start(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                  env=home_of({}))
    marker = tmp_path/'run'/'checkpoints'/'checkpoint-1'
    while not marker.exists() and first.poll() is None and time.monotonic()<give_up: time.sleep(.02)
    first.send_signal(getattr(signal, name))
    said = first.communicate(timeout=120)
    wanted = r'stopped at step \d+ of 3000; .*the same command goes on'
    assert first.returncode==status and re.search(wanted, said[1]), said
    assert 'Traceback' not in said[1]


def test_fresh_removes_nothing_before_the_order_is_found_good(tmp_path, capsys):
    file = small_run(tmp_path, max_steps=1)
    assert main(['run', str(file)])==0
    before = {p: p.read_bytes() for p in (tmp_path/'run').rglob('*') if p.is_file()}
    for wrong in (dict(data_path='gone.jsonl'), dict(model_name='nobody/nothing'), dict(learning_rate=-1)):
        worse = json.loads(file.read_text()) | wrong
        (tmp_path/'worse.json').write_text(json.dumps(worse))
        assert main(['run', str(tmp_path/'worse.json'), '--fresh'])==1
        assert capsys.readouterr().err.splitlines()[-1].startswith('error: ')
        assert {p: p.read_bytes() for p in (tmp_path/'run').rglob('*') if p.is_file()}==before


def test_what_others_wrote_does_not_steer_the_terminal(tmp_path, capsys):
    line = refused(capsys, 'run', tmp_path/'\x1b[2J\x1b[31mred\u202egpj.json')
    assert '\x1b' not in line and '\u202e' not in line and '\\x1b[2J' in line
    echo('a\x1b[2Jb')
    assert capsys.readouterr().out=='a\\x1b[2Jb\n'


@pytest.mark.parametrize('name,status', [('SIGINT', 130), ('SIGTERM', 143), ('SIGHUP', 129)])
def test_a_stop_while_the_words_are_read_says_so(monkeypatch, capsys, name, status):
    "Before the command itself begins"
    from sage_finetune import cli
    def parse(self, *args, **how): signal.raise_signal(getattr(signal, name))
    monkeypatch.setattr(cli.TyperGroup, 'make_context', parse)
    assert main(['list'])==status
    assert capsys.readouterr().err=='stopped; nothing more was done\n'


@pytest.mark.parametrize('error,words', [(PermissionError(13, 'Permission denied', '/logs/events'),
                                          'note: /logs/events: permission denied; '),
                                         (OSError(28, 'No space left on device'), 'note: a file: no space left'),
                                         (ValueError('x\x1b[2J'), 'note: x\\x1b[2J')])
def test_a_thread_that_fails_says_one_line(capsys, monkeypatch, error, words):
    import threading
    monkeypatch.setattr(threading, 'excepthook', threading.excepthook)
    main(['examples'])
    def fails(): raise error
    thread = threading.Thread(target=fails)
    thread.start()
    thread.join()
    said = capsys.readouterr().err
    assert said.startswith(words) and said.count('\n')==1

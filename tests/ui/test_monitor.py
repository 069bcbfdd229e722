"Many runs in a terminal: what the commands leave out, and that none of them waits for torch"
import json
import os
import subprocess
import sys

import pytest

from sage_finetune.cli import main
from sage_finetune.core.run_folder import write_meta


@pytest.fixture
def root(tmp_path):
    for i in range(6):
        folder = tmp_path/f'run-{i}'
        write_meta(folder, 'sage-tiny', 'rows.jsonl', config=dict(learning_rate=10**-(i+1)))
        (folder/'metrics.jsonl').write_text(''.join(
            json.dumps(dict(step=s, loss=3/s+i, eval_loss=3/s+i))+'\n' for s in (1, 2, 4)))
    return tmp_path


def test_no_command_waits_for_torch_or_matplotlib(root):
    code = ("import sys\nfrom sage_finetune.cli import main\n"
            "for words in (['list', '--sort', '-learning_rate'], ['watch', '--once'], ['compare'], ['clean', '-f']):\n"
            "    assert main([*words, '--dir', sys.argv[1]])==0, words\n"
            "assert not {'torch', 'transformers', 'matplotlib', 'datasets', 'pandas'}&{*sys.modules}")
    done = subprocess.run([sys.executable, '-c', code, str(root)], capture_output=True, text=True, env=os.environ)
    assert done.returncode==0, done.stderr[-2000:]
    assert 'a run-0' in done.stdout and '6 in the trash' in done.stdout


def said(capsys, *words):
    status = main([str(w) for w in words])
    return status, capsys.readouterr()


def test_many_are_rows_and_few_are_columns(root, capsys):
    _, few = said(capsys, 'compare', 'run-0', 'run-1', '--dir', root)
    _, many = said(capsys, 'compare', '--dir', root)
    assert 'learning_rate' in few.out and any(line.split()[:1]==['learning_rate'] for line in few.out.splitlines())
    assert any(line.split()[:2]==['run', 'learning_rate'] for line in many.out.splitlines())


def test_a_damaged_run_is_told_in_a_line_and_not_in_python(root, program):
    named = (root/'run-1').rename(root/'run-\x1b[2J') # which would clear the terminal
    for run in (root/'run-0', named):
        (run/'checksums.json').write_text(json.dumps({'finetune_meta.json': [1, '0'*32]}))
    done = program('compare', '--dir', root)
    assert done.returncode==0 and f'warning: {root/"run-0"}' in done.stderr and '.py' not in done.stderr, done.stderr
    assert f'warning: {root}/run-\\x1b[2J' in done.stderr and '\x1b' not in done.stderr, done.stderr


def test_one_run_alone_is_no_comparison(root, capsys):
    status, out = said(capsys, 'compare', 'run-0', '--dir', root)
    assert status and '`compare` needs at least two runs, got 1' in out.err


def test_conditions_choose_what_is_deleted_and_undo_brings_it_back(root, capsys):
    assert said(capsys, 'clean', '--where', 'learning_rate<0.001', '--force', '--dir', root)[0]==0
    assert sorted(p.name for p in root.iterdir())==['.trash', 'run-0', 'run-1', 'run-2']
    status, out = said(capsys, 'clean', '--undo', 'run-4', 'run-3', '--dir', root)
    assert status==0 and out.out.count('is back')==2 and (root/'run-4'/'metrics.jsonl').is_file()
    status, out = said(capsys, 'clean', 'run-9*', '--force', '--dir', root)
    assert status and "no run 'run-9*'; there are: run-0" in out.err


@pytest.mark.slow
def test_a_page_of_them(root, capsys):
    status, out = said(capsys, 'compare', 'run-0', 'run-1', '--page', root/'page.html', '--dir', root)
    assert status==0 and 'Written: ' in out.out and 'learning_rate' in (root/'page.html').read_text(encoding='utf-8')
    status, out = said(capsys, 'compare', 'run-0', 'run-1', '--page', root/'page.txt', '--dir', root)
    assert status and '.html' in out.err

"A run as one script: as a job of SLURM, played by a shell, and by uv in an empty environment"
import os
import shutil
import stat
import subprocess
import sys
from types import SimpleNamespace

import pytest

from sage_finetune.config import TrainingConfig
from sage_finetune.data import save_rows
from sage_finetune.runs.launch import slurm_script, uv_script


def program(folder, name, text):
    file = folder/name
    file.write_text(f'#!/bin/bash\n{text}\n')
    file.chmod(file.stat().st_mode|stat.S_IXUSR)


def submitted(tmp_path, status, **how):
    "What a job does whose run ends with a status: its exit status and the programs it called"
    job = slurm_script('a run', tmp_path/'job.sbatch', **how)
    program(tmp_path, 'srun', f'echo "srun $*" >> {tmp_path}/said; while [ "$1" != bash ]; do shift; done; "$@"')
    program(tmp_path, 'scontrol', f'echo "scontrol $*" >> {tmp_path}/said\n'
            '[ "$1" = show ] && printf "first\\nsecond\\n"; exit 0')
    program(tmp_path, 'sage-finetune', f'printf "run:%s\\n" "$@" >> {tmp_path}/said; exit {status}')
    env = dict(os.environ, PATH=f'{tmp_path}:{os.environ["PATH"]}', SLURM_JOB_ID='7', SLURM_JOB_NODELIST='n[1-2]',
               SLURM_NNODES='2', SLURM_NODEID='1')
    done = subprocess.run(['bash', job], env=env, capture_output=True, text=True)
    return done.returncode,(tmp_path/'said').read_text()


def test_a_job_trains_and_ends(tmp_path):
    status,said = submitted(tmp_path, 0)
    assert status==0 and 'run:a run\n' in said and 'requeue' not in said and '--nproc' not in said


def test_a_job_whose_time_is_over_queues_again(tmp_path):
    status,said = submitted(tmp_path, 143, nodes=2, gpus=4, partition='long')
    assert status==0 and 'scontrol requeue 7' in said
    words = '--nproc', '4', '--machine-rank', '1', '--main-process-ip', 'first'
    assert [f'run:{w}\n' in said for w in words]==[True]*6


def test_a_job_that_fails_fails(tmp_path): assert submitted(tmp_path, 3)[0]==3


@pytest.mark.parametrize('name, value, words', [
    ('data_path', ['a.jsonl', 'b.jsonl'], 'has several sources'), ('init_adapter', '.', 'is on this machine only'),
    ('model_name', '.', 'is on this machine only'), ('data_path', '.', 'is a folder')])
def test_what_a_script_cannot_carry_is_refused(tmp_path, name, value, words):
    config = TrainingConfig(model_name='sage-tiny', data_path='org/rows', output_dir=tmp_path/'run')
    config = config.replace(**{name: value})
    with pytest.raises(ValueError, match=f'`{name}`.* {words}'): uv_script(config, tmp_path/'run.py')


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp('elsewhere')
    rows = [dict(question=f"What's {i}\\n?", answer=f'"{i}" {{é}} 鱼') for i in range(6)]
    file = save_rows(folder/'rows.jsonl', rows)
    config = TrainingConfig(model_name='sage-tiny', data_path=file, output_dir=folder/'here', max_steps=1, test_size=0,
                            learning_rate=1e-3, per_device_train_batch_size=2, report_to='none')
    return config,uv_script(config, folder/'run.py', package='sage-finetune')


def test_a_script_carries_settings_and_rows(made, tmp_path, monkeypatch):
    config,file = made
    monkeypatch.setenv('SAGE_OUTPUT', str(tmp_path))
    seen = []
    done = SimpleNamespace(status='trained')
    monkeypatch.setattr('sage_finetune.finetune', lambda s: seen.append(s) or done, raising=False)
    names = dict(__name__='run', __file__=str(file))
    exec(compile(file.read_text(), 'run.py', 'exec'), names)
    assert names['main']()==0
    asked = TrainingConfig.from_dict(seen[0])
    assert asked.data_path.read_bytes()==config.data_path.read_bytes()
    assert asked.replace(data_path=config.data_path, output_dir=config.output_dir)==config and asked.given==config.given


def test_a_large_file_is_asked_for(made, tmp_path, monkeypatch):
    file = uv_script(made[0], tmp_path/'run.py', package='sage-finetune', most=10)
    names = dict(__name__='run', __file__=str(file))
    exec(compile(file.read_text(), 'run.py', 'exec'), names)
    with pytest.raises(SystemExit, match='rows.jsonl is too large for this script'): names['main']()


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which('uv'), reason='needs uv')
def test_uv_runs_it_in_an_empty_environment(made, tmp_path):
    "SAGE_WHEEL: the package as a wheel; its requirements come from PyPI or from its mirror"
    wheel = os.environ.get('SAGE_WHEEL') or pytest.skip('SAGE_WHEEL is not set')
    file = uv_script(made[0], tmp_path/'run.py', package=wheel)
    env = {k: v for k,v in os.environ.items() if k not in ('PYTHONPATH', 'VIRTUAL_ENV')}
    done = subprocess.run(['uv', 'run', '--python', sys.executable, file], env=env, capture_output=True, text=True)
    assert done.returncode==0 and (tmp_path/'here'/'lora_weights').is_dir(), done.stderr[-2000:]

"""Trackers, each for real and on this machine alone: the numbers of a run are read back from where it wrote them, a
second run has a place of its own, and no token is in a file or in what is printed. `pip install "sage-finetune[full]"
trackio mlflow` in an environment of its own runs them all; one that is not installed is skipped by name
"""
import json
import os
import sqlite3
from importlib.util import find_spec

import pytest
from transformers import TrainerCallback

from quick import two_layers
from sage_finetune.config import LoRAConfig, TrainingConfig
from sage_finetune.core.beforehand import known_trackers
from sage_finetune.core.run_folder import RunFolder, written_by_run
from sage_finetune.rows.formats import create_sample_data
from sage_finetune.trainer import LoRATrainer, Stopped

secret = 'hf_VerySecretTokenOfThisTest0123456789abc'


@pytest.fixture
def alone(tmp_path, monkeypatch):
    "Nobody is logged in, but keys are in the environment; whatever the trackers keep elsewhere is below `tmp_path`"
    for name in 'HF_TOKEN', 'HUGGING_FACE_HUB_TOKEN', 'MLFLOW_TRACKING_TOKEN', 'TRACKIO_WRITE_TOKEN':
        monkeypatch.setenv(name, secret)
    monkeypatch.setenv('WANDB_API_KEY', secret.replace('_', '').lower()[:40].ljust(40, '0'))
    for name, value in dict(WANDB_MODE='offline', WANDB_SILENT='true', TRACKIO_DIR=str(tmp_path/'trackio')).items():
        monkeypatch.setenv(name, value)
    (tmp_path/'here').mkdir()
    monkeypatch.chdir(tmp_path/'here')
    return tmp_path


def needs(*names):
    missing = [n for n in names if find_spec(n) is None]
    if missing: pytest.skip(f'{", ".join(missing)} is not installed (pip install {" ".join(missing)})')


def config(folder, name, tracker, **more):
    data = folder/'rows.json'
    if not data.exists(): create_sample_data(data, num_samples=16)
    settings = dict(model_name=two_layers, data_path=data, output_dir=folder/name, max_steps=3, max_length=128,
                    per_device_train_batch_size=2, gradient_accumulation_steps=1, learning_rate=1e-3, logging_steps=1,
                    report_to=tracker, test_size=0.0, lora=LoRAConfig(r=2))
    return TrainingConfig(**(settings | more))


class StoppedEarly(LoRATrainer):
    "A run that is stopped after two steps"
    def setup_trainer(self):
        super().setup_trainer()
        stop = self.stop
        class Stop(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                if state.global_step==2: stop()
        self.trainer.add_callback(Stop())


def losses(c):
    return {m['step']: m['loss'] for line in RunFolder(c.output_dir).metrics.read_text().splitlines()
            if 'loss' in (m := json.loads(line))}


def of_tensorboard(c, folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events = EventAccumulator(str(c.log_dir))
    events.Reload()
    return {e.step: e.value for e in events.Scalars('train/loss')}


def records(data):
    "The records of a file of wandb, which is a log of LevelDB's form: blocks of 32 KiB, pieces with a head of 7 bytes"
    whole, at = b'', 7 # behind the head of the file
    while at+7<=len(data):
        if 32768-at%32768<7: at += 32768-at%32768
        length, kind = int.from_bytes(data[at+4:at+6], 'little'), data[at+6]
        whole += data[at+7:at+7+length]
        at += 7+length
        if kind in (1, 4):
            yield whole
            whole = b''


def of_wandb(c, folder):
    from wandb.proto.wandb_internal_pb2 import Record
    file, = c.log_dir.glob('wandb/offline-run-*/*.wandb')
    found = {}
    for data in records(file.read_bytes()):
        record = Record.FromString(data)
        row = {(i.key or '/'.join(i.nested_key)): json.loads(i.value_json) for i in record.history.item}
        if 'train/loss' in row: found[row['train/global_step']] = row['train/loss']
    return found


def of_trackio(c, folder):
    from trackio.utils import TRACKIO_DIR # read once, when it is imported
    rows = [dict(run=name, **json.loads(metrics)) for file in TRACKIO_DIR.glob('*.db')
            for name, metrics in sqlite3.connect(file).execute('SELECT run_name, metrics FROM metrics')]
    return {r['train/global_step']: r['train/loss'] for r in rows
            if r['run']==c.output_dir.name and 'train/loss' in r}


def of_mlflow(c, folder):
    base = sqlite3.connect(c.log_dir/'mlflow.db')
    assert [n for n, in base.execute('SELECT name FROM runs')]==[c.output_dir.name]
    assert dict(base.execute('SELECT key, value FROM params'))['lora.r']=='2'
    return dict(base.execute("SELECT step, value FROM metrics WHERE key='loss'"))


read = dict(tensorboard=of_tensorboard, wandb=of_wandb, trackio=of_trackio, mlflow=of_mlflow)


def no_token(folder, said):
    key = os.environ['WANDB_API_KEY'].encode()
    for path in folder.rglob('*'):
        if path.is_file(): assert secret.encode() not in path.read_bytes() and key not in path.read_bytes(), path
    assert secret not in said and key.decode() not in said


@pytest.mark.slow
@pytest.mark.parametrize('report_to', [*known_trackers, list(known_trackers)], ids=str)
def test_two_runs_report_each_to_its_own_place_and_no_token_goes_out(alone, report_to, capfd):
    names = [report_to] if isinstance(report_to, str) else report_to
    needs(*names)
    runs = [config(alone, name, report_to) for name in ('one', 'two')]
    for c in runs: LoRATrainer(c, quiet=True).train()
    for c in runs:
        assert set(losses(c))=={1, 2, 3}
        for name in names: assert read[name](c, alone)==pytest.approx(losses(c), abs=1e-6), name
        kept = {p.name for p in c.log_dir.glob('*')}
        assert kept<={p.name for p in written_by_run(c.output_dir)}, 'not removed by clean'
    assert [*(alone/'here').iterdir()]==[], 'left where it was started'
    said = capfd.readouterr()
    assert 'rackio' not in said.out
    no_token(alone, said.out+said.err)


@pytest.mark.slow
@pytest.mark.parametrize('name', ['wandb', 'mlflow', 'trackio'])
def test_a_stopped_run_does_not_lend_its_place_to_the_next(alone, name):
    needs(name)
    first, second = (config(alone, n, name) for n in ('stopped', 'next'))
    with pytest.raises(Stopped): StoppedEarly(first, quiet=True).train()
    LoRATrainer(second, quiet=True).train()
    assert read[name](second, alone)==pytest.approx(losses(second), abs=1e-6)
    LoRATrainer(first, quiet=True).train() # and the first one goes on
    assert losses(first).keys()=={1, 2, 3}


def test_a_list_is_checked_like_a_name():
    for wrong in (['wandb', 'wandb'], ['comet_ml'], ['tensorboard', 'none', 'x'], 'all', 'tensorboard,wandb'):
        with pytest.raises(ValueError, match='`report_to` must be "tensorboard" or .* or a list that names each once'):
            TrainingConfig(report_to=wrong)
    assert TrainingConfig(report_to=('wandb', 'mlflow')).report_to==['wandb', 'mlflow']
    again = TrainingConfig.from_dict(TrainingConfig(report_to=['wandb', 'mlflow']).to_dict())
    assert again.report_to==['wandb', 'mlflow']

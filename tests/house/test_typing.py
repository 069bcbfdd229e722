"Editors and type checkers see the package as it is: classes, not `Any`; paths as text or as `Path`"
import json
import subprocess
import sys

import pytest

from layout import ROOT
from quick import few

CONSUMER = '''
from pathlib import Path
from sage_finetune import LoRAConfig, LoRATrainer, PresetConfigs, TrainingConfig, finetune, prepare_dataset
from sage_finetune.core.run_folder import RunFolder
from sage_finetune.trainer import train_from_meta

config = TrainingConfig(model_name='sage-tiny', data_path='rows.jsonl', output_dir=Path('runs')/'one',
                        eval_data_path=Path('held_out.jsonl'), lora=LoRAConfig(r=16))
again = TrainingConfig(data_path=Path('rows.jsonl'), output_dir='runs/one')
preset = PresetConfigs.rtx_3060(num_train_epochs=1)
folder: Path = config.checkpoint_dir
place: Path = config.output_dir/'lora_weights'
rows = config.data_path
if rows is not None:
    beside: Path = rows.with_suffix('.csv')
config.output_dir = 'runs/two'
batch: int = config.effective_batch_size
run = LoRATrainer(config, quiet=True)
run.load_model_and_tokenizer()
run.train()
kept: TrainingConfig = run.config
other: LoRATrainer = train_from_meta('runs/one')
weights: Path = RunFolder('runs/one').lora_weights


class Mine(LoRATrainer):
    def prepare_data(self):
        return super().prepare_data()
'''


MISTAKES = {
    'LoRATrainer(config).no_such_step()': 'no_such_step', 'TrainingConfig(data_path=3)': 'data_path',
    'n: int = LoRATrainer': 'LoRATrainer', 'wrong: int = config.checkpoint_dir': 'Path'}


# a Python that sees the package alone, and one that sees its libraries as well, which takes seven times as long
pythons = dict(alone=getattr(sys, '_base_executable', sys.executable), whole=sys.executable)


@pytest.fixture(scope='module', params=few(['alone', 'whole']))
def errors(tmp_path_factory, request):
    "What the type checker tells of the script alone, and of the script with each mistake at its end"
    pytest.importorskip('basedpyright')
    folder = tmp_path_factory.mktemp('consumer')
    names = {f'consumer_{i}.py': line for i,line in enumerate(['', *MISTAKES])}
    for name,line in names.items(): (folder/name).write_text(f'{CONSUMER}\n{line}\n')
    (folder/'pyrightconfig.json').write_text(json.dumps(dict(typeCheckingMode='standard', extraPaths=[str(ROOT)])))
    done = subprocess.run([sys.executable, '-m', 'basedpyright', '--outputjson', '--pythonpath', pythons[request.param],
                           *names], cwd=folder, capture_output=True, text=True)
    found = [d for d in json.loads(done.stdout)['generalDiagnostics'] if d['severity']=='error']
    return {line: [d for d in found if d['file'].endswith(name)] for name,line in names.items()}


def test_a_consumer_has_no_type_error(errors):
    assert [(d['range']['start']['line'], d['message']) for d in errors['']]==[]


@pytest.mark.parametrize('line,told', MISTAKES.items())
def test_a_mistake_is_told(errors, line, told):
    assert len(errors[line])==1 and told in errors[line][0]['message']


@pytest.mark.parametrize('code,wanted', [
    ('import sage_finetune\nsage_finetune.', {'LoRATrainer', 'TrainingConfig', 'finetune', 'prepare_dataset'}),
    ('from sage_finetune import LoRATrainer\nLoRATrainer.', {'train', 'prepare_data', 'save_model', 'apply_lora'}),
    ('from sage_finetune import TrainingConfig\nTrainingConfig().',
     {'learning_rate', 'replace', 'effective_batch_size'})])
def test_an_editor_completes(code, wanted):
    jedi = pytest.importorskip('jedi')
    line = code.splitlines()[-1]
    names = {c.name for c in jedi.Script(code).complete(len(code.splitlines()), len(line))}
    assert wanted<=names


def test_an_editor_finds_the_class():
    jedi = pytest.importorskip('jedi')
    found = jedi.Script('from sage_finetune import LoRATrainer\nLoRATrainer').goto(2, 3, follow_imports=True)
    assert [(d.type, d.module_name) for d in found]==[('class', 'sage_finetune.trainer')]

"The command that the form writes makes the config that the form has"
import shlex

import pytest

from sage_finetune.cli import main
from sage_finetune.config import DataSource, LoRAConfig, PresetConfigs, TrainingConfig
from sage_finetune.runs.pipeline import config_command
from sage_finetune.runs.tasks import config_of_file

configs = {
    'defaults': lambda: TrainingConfig(data_path='rows.jsonl'),
    'by hand': lambda: TrainingConfig(model_name='sage-tiny', data_path='my rows.jsonl', output_dir='runs/$a b',
                                      learning_rate=3e-4, packing=True, max_steps=7),
    'preset': lambda: PresetConfigs.rtx_4090(data_path='rows.jsonl', num_train_epochs=2.5),
    'adapter': lambda: TrainingConfig(data_path='rows.jsonl', lora=LoRAConfig(r=64, target_modules=['q_proj'])),
    'pattern': lambda: TrainingConfig(data_path='a.jsonl', lora=LoRAConfig(target_modules=r'.*\.(q|v)_proj')),
    'several': lambda: TrainingConfig(data_path=['a.jsonl', 'b, c.jsonl'], data_weights=[3, 1]),
    'columns': lambda: TrainingConfig(data_path='a.csv', columns={'frage': 'question'}, warmup_ratio=.1)}


@pytest.mark.parametrize('name', configs)
def test_the_command_makes_the_same_config(name, tmp_path, capsys):
    config = configs[name]()
    first, second = config_command(config, 'my settings.yaml').split('\n')
    words = shlex.split(first)
    assert words[-2:]==['>', 'my settings.yaml'] and shlex.split(second)==['sage-finetune', 'run', 'my settings.yaml']
    assert main(words[1:-2])==0
    (tmp_path/'settings.yaml').write_text(capsys.readouterr().out, encoding='utf-8')
    made = config_of_file(tmp_path/'settings.yaml')
    assert made.to_dict()==config.to_dict()


def test_sources_with_settings_of_their_own_need_the_file():
    own = TrainingConfig(data_path=[DataSource('a.jsonl', columns={'x': 'question'}), 'b.jsonl'])
    assert config_command(own).startswith('# its sources have settings of their own')

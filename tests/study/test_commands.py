"Settings by hand of the command `sweep`: each arrives in every run, and none is quietly dropped"
import pytest

from sage_finetune.cli import main
from sage_finetune.config import RewardConfig
from sage_finetune.core.disk import SageError
from sage_finetune.study import sweep as of_sweep


@pytest.fixture
def asked(tmp_path, monkeypatch):
    "What a sweep is asked for, with these words behind its name"
    (tmp_path/'s.yaml').write_text(f'model_name: sage-tiny\ndata_path: rows.jsonl\noutput_dir: {tmp_path}/sums\n'
                                   'learning_rate: 1.0e-4\n')
    found = []
    def go(config, grid, halving, by):
        found.append((config, grid))
        raise SageError('asked')
    monkeypatch.setattr(of_sweep, 'sweep', go)
    def ask(*words, file='s.yaml'):
        status = main(['sweep', str(tmp_path/file), *words])
        return (status, *found.pop()) if found else (status, None, None)
    return ask


@pytest.mark.parametrize('words,wanted', [
    (('--lr', '3e-3'), dict(learning_rate=3e-3)), (('--epochs', '2'), dict(num_train_epochs=2)),
    (('--max-steps', '7'), dict(max_steps=7)), (('--batch-size', '5'), dict(per_device_train_batch_size=5)),
    (('--set', 'weight_decay=0.1', '--set', 'seed=9'), dict(weight_decay=.1, seed=9)),
    (('--preset', 'cpu'), dict(max_length=512, learning_rate=1e-4)),
    (('--set', 'method=grpo', '--set', 'rewards=number'), dict(method='grpo', num_generations=8))])
def test_a_setting_by_hand_arrives(asked, words, wanted):
    _,config,grid = asked('--grid', 'lora.r=4,8', *words)
    assert {n: getattr(config, n) for n in wanted}==wanted and grid=={'lora.r': ['4', '8']}
    assert config.output_dir.name=='sums-sweep' and (wanted.get('method')!='grpo' or type(config) is RewardConfig)


def test_a_setting_of_the_adapter_arrives(asked):
    _,config,_ = asked('--grid', 'learning_rate=1e-3,5e-3', '--rank', '3', '--set', 'lora.lora_alpha=6')
    assert (config.lora.r, config.lora.lora_alpha)==(3, 6)


@pytest.mark.parametrize('words,says', [
    (('--grid', 'learning_rate=1e-3,5e-3', '--lr', '1e-4'), '`--grid learning_rate` has its values'),
    (('--grid', 'lora.r=4,8', '--rank', '2'), '`--grid lora.r` has its values'),
    (('--grid', 'lora.r=4,8', '--set', 'lora.r=2'), '`--grid lora.r` has its values'),
    (('--grid', 'lora.r=4,8', '--set', 'lerning_rate=1'), 'did you mean `learning_rate`?'),
    (('--grid', 'lora.r=4,8', '--lr', '1e-3', '--set', 'learning_rate=1e-3'), '`--set learning_rate` stands twice'),
    (('--grid', 'lora.r=4,8', '--preset', 'tpu'), 'unknown preset `tpu`')])
def test_what_cannot_be_is_refused_before_anything_is_trained(asked, words, says, capsys):
    status,config,_ = asked(*words)
    assert (status, config)==(1, None) and says in capsys.readouterr().err

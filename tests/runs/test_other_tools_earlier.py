"Files that the module before this one wrote: its meta file, its config for LLaMA-Factory, and the one for Unsloth"
import json
from pathlib import Path

import pytest

from sage_finetune.config import config_from_meta
from sage_finetune.core.disk import SageError
from sage_finetune.runs.other_tools import config_from_other_tool, translated
from sage_finetune.runs.tasks import config_of, trainer_of

rows = [dict(instruction=f'What is {i} plus 1?', input='', output=f'{i} plus 1 is {i+1}.') for i in range(12)]


def factory(folder, **more):
    "llama-factory_config.json, as it was written"
    return dict(
        model_name_or_path='sage-tiny', stage='sft', do_train=True, finetuning_type='lora', lora_target='all',
        dataset=str(folder/'training_data_code_alpaca.json'), template='qwen', cutoff_len=192, max_samples=10000,
        overwrite_cache=True, preprocessing_num_workers=16, output_dir=str(folder/'checkpoints'), logging_steps=10,
        save_steps=500, plot_loss=True, overwrite_output_dir=True, per_device_train_batch_size=2,
        gradient_accumulation_steps=8, learning_rate=2e-4, num_train_epochs=1, lr_scheduler_type='cosine',
        warmup_ratio=.1, fp16=True, lora_rank=16, lora_alpha=48, lora_dropout=.1) | more


def unsloth(folder, **more):
    "unsloth_config.json, as it was written"
    return dict(
        model_name='sage-tiny', max_seq_length=192, load_in_4bit=True,
        dataset=str(folder/'training_data_code_alpaca.json'), dataset_text_field='text', packing=False,
        output_dir=str(folder/'checkpoints'), num_train_epochs=1, per_device_train_batch_size=2,
        gradient_accumulation_steps=4, warmup_steps=10, learning_rate=2e-4, fp16=True, logging_steps=1,
        optim='adamw_8bit', weight_decay=.01, lr_scheduler_type='linear', seed=3407) | more


def written(folder, kind=factory, meta=True, **more):
    "A run folder as it was left, or the config alone"
    folder.mkdir(parents=True, exist_ok=True)
    (folder/'training_data_code_alpaca.json').write_text(json.dumps(rows))
    file = folder/f'{"llama-factory" if kind is factory else "unsloth"}_config.json'
    file.write_text(json.dumps(kind(folder, **more)))
    if meta: (folder/'finetune_meta.json').write_text(json.dumps(dict(
        task_type='code', model='sage-tiny', framework=file.stem.removesuffix('_config'), format='alpaca',
        dataset=str(folder/'training_data_code_alpaca.json'), config=str(file), output_dir=str(folder),
        code_root=str(folder))))
    return file


def asked(c):
    return (c.max_length, c.learning_rate, c.num_train_epochs, c.per_device_train_batch_size,
            c.gradient_accumulation_steps, c.fp16, c.optim, c.lr_scheduler_type, c.warmup_ratio, c.warmup_steps,
            c.load_in_4bit, c.load_in_8bit, c.lora.r, c.lora.lora_alpha, c.lora.lora_dropout, c.lora.target_modules,
            c.logging_steps, c.save_steps, c.weight_decay, c.seed, c.packing, c.test_size, str(c.output_dir))


of_factory = (192, 2e-4, 1, 2, 8, True, 'adamw_torch', 'cosine', .1, None, False, False, 16, 48, .1, 'all-linear', 10,
              500, 0, 42, False, 0)
of_unsloth = (192, 2e-4, 1, 2, 4, True, 'adamw_8bit', 'linear', 0, 10, True, False, 16, 16, 0, [
    'q_proj', 'k_proj', 'v_proj', 'o_proj', 'gate_proj', 'up_proj', 'down_proj'], 1, 500, .01, 3407, False, 0)


@pytest.mark.parametrize('kind,wanted', [(factory, of_factory), (unsloth, of_unsloth)])
@pytest.mark.parametrize('way', ['the file', 'the folder', 'the meta file by itself'])
def test_every_setting_arrives_whichever_way_it_is_read(kind, wanted, way, tmp_path):
    file = written(tmp_path/'code', kind)
    c = dict([('the file', lambda: config_of(file, quiet=True)), ('the folder', lambda: config_of(tmp_path/'code')),
              ('the meta file by itself', lambda: config_from_meta(tmp_path/'code'))])[way]()
    assert asked(c)==(*wanted, str(tmp_path/'code'))
    assert json.loads(Path(c.data_path).read_text())==rows


def test_it_trains_on_that_file_with_those_settings(tmp_path):
    written(tmp_path/'code', max_steps=1)
    run = trainer_of(tmp_path/'code', quiet=True)
    assert run.train().steps==1
    lora = run.model.peft_config['default']
    assert (lora.r, lora.lora_alpha, lora.lora_dropout, run.trainer.args.learning_rate)==(16, 48, .1, 2e-4)
    assert run.data_report.read==run.data_report.used==12


def test_a_folder_that_was_moved_keeps_its_settings_and_rows(tmp_path):
    written(tmp_path/'old')
    (tmp_path/'old').rename(tmp_path/'new')
    c = config_of(tmp_path/'new')
    assert asked(c)==(*of_factory, str(tmp_path/'new')) and json.loads(Path(c.data_path).read_text())==rows


def test_as_many_rows_as_were_asked_for(tmp_path):
    c = config_of(written(tmp_path/'code', max_samples=5), quiet=True)
    assert json.loads(Path(c.data_path).read_text())==rows[:5]


@pytest.mark.parametrize('most', [5, 0, '5', None, 12, 10**6])
def test_the_meta_file_alone_trains_all_rows_or_refuses_by_name(most, tmp_path):
    written(tmp_path/'code', **(dict(max_samples=most) if most is not None else {}))
    if most in (None, 12, 10**6): assert config_from_meta(tmp_path/'code').learning_rate==2e-4
    else:
        with pytest.raises(SageError, match=f'max_samples={most!r} .12 rows; `sage-finetune run .*takes part'):
            config_from_meta(tmp_path/'code')


@pytest.mark.parametrize('more,says', [
    (dict(use_galore=True), 'use_galore=True'), (dict(stage='ppo'), "stage='ppo'"),
    (dict(finetuning_type='full'), "finetuning_type='full'"),
    (dict(cutof_len=8), 'cutof_len (unknown; is it `cutoff_len`?)'),
    (dict(lora_rank='many'), "lora_rank='many'"), (dict(resize_vocab=True), 'resize_vocab=True'),
    (dict(dataset='gone.json'), "does not describe 'gone.json'")])
def test_what_cannot_be_is_refused_by_name(more, says, tmp_path):
    file = written(tmp_path/'code', **more)
    for target in (file, tmp_path/'code'):
        with pytest.raises(SageError) as e: config_of(target, quiet=True)
        assert says in str(e.value)
    assert not (tmp_path/'code'/'training_data_custom.json').exists()


@pytest.mark.parametrize('more', [dict(full_finetuning=True), dict(load_in_4bit='yes'), dict(r=[8]), dict(bfloat=1)])
def test_settings_of_the_file_for_unsloth_are_refused_by_name_too(more, tmp_path):
    with pytest.raises(SageError, match=next(iter(more))): translated(written(tmp_path/'code', unsloth, **more))


def test_the_format_chat_of_earlier_days(tmp_path):
    written(tmp_path/'code')
    meta = json.loads((tmp_path/'code'/'finetune_meta.json').read_text())
    (tmp_path/'code'/'finetune_meta.json').write_text(json.dumps(meta | dict(format='chat', config=None)))
    assert config_of(tmp_path/'code').format_type==config_from_meta(tmp_path/'code').format_type=='conversation'


@pytest.mark.parametrize('form', [{}, dict(chat=1), ['chat'], 7, 'csv'])
def test_a_format_of_another_kind_is_refused_beside_a_file_of_another_tool_too(form, tmp_path):
    written(tmp_path/'code')
    file = tmp_path/'code'/'finetune_meta.json'
    file.write_text(json.dumps(json.loads(file.read_text()) | dict(format=form)))
    if not form: return config_of(tmp_path/'code')
    with pytest.raises((SageError, ValueError), match='format_type'): config_of(tmp_path/'code')


def test_what_became_of_each_setting_is_told(tmp_path):
    said = []
    config_from_other_tool(written(tmp_path/'code'), say=said.append)
    lines = {line.split()[0]: line for line in said[0].splitlines()[1:]}
    assert {*factory(tmp_path/'code')}=={*lines} and 'output_dir = ' in lines['output_dir']

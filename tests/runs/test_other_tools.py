"Configs that LLaMA-Factory ships as examples, as settings, and what the trainer gets of them; and TRL's"
import inspect
import json
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from sage_finetune.config import LoRAConfig, PreferenceConfig, RewardConfig, SageError
from sage_finetune.core.beforehand import tool_table
from sage_finetune.data import DataReport, prepare_dataset
from sage_finetune.base.loading import load_tokenizer
from sage_finetune.runs import other_data, other_settings, other_tools
from sage_finetune.runs.other_tools import config_from_other_tool, translated
from sage_finetune.runs.tasks import trainer_of
from sage_finetune.rows.formats import to_messages
from sage_finetune.rows.sources import save_rows

common = dict(stage='sft', do_train=True, finetuning_type='lora', lora_target='all', template='llama3',
              cutoff_len=2048, max_samples=1000, preprocessing_num_workers=16, logging_steps=10,
              save_steps=500, plot_loss=True, overwrite_output_dir=True, per_device_train_batch_size=1,
              gradient_accumulation_steps=8, learning_rate='1.0e-4', num_train_epochs=3.0,
              lr_scheduler_type='cosine', warmup_ratio=0.1, bf16=True, ddp_timeout=180000000,
              dataset='identity,alpaca_en_demo')
held_out = dict(val_size=0.1, per_device_eval_batch_size=1, eval_strategy='steps', eval_steps=500)
newer = dict(trust_remote_code=True, lora_rank=8, dataloader_num_workers=4, save_only_model=False, report_to='none',
             resume_from_checkpoint=None)
examples = {
    'train_lora/llama3_lora_sft': common | dict(trust_remote_code=True, lora_rank=8, overwrite_cache=True),
    'train_lora/qwen3_lora_sft': common | newer | dict(dataset='identity', template='qwen3_nothink'),
    'train_lora/qwen2.5_lora_sft': common | newer | dict(template='qwen', overwrite_cache=True),
    'train_lora/gpt_lora_sft': common | newer | dict(template='gpt', overwrite_cache=True),
    'train_lora/nanbeige42_lora_sft': common | newer | dict(template='nanbeige_nothink', use_fast_tokenizer=False),
    'train_qlora/llama3_lora_sft_otfq': common | held_out | dict(
        quantization_bit=4, quantization_method='bitsandbytes', overwrite_cache=True),
    'train_qlora/llama3.2_lora_sft': common | held_out | dict(cutoff_len=1024, overwrite_cache=True),
    'extras/loraplus/llama3_lora_sft': common | held_out | dict(loraplus_lr_ratio=16.0, overwrite_cache=True),
    'extras/pissa/llama3_lora_sft': common | newer | dict(
        pissa_init=True, pissa_iter=16, pissa_convert=True, overwrite_cache=True),
    'extras/fsdp_qlora/llama3_lora_sft': {k: v for k,v in (common | held_out).items() if k!='bf16'} | dict(
        quantization_bit=4, lora_target='q_proj,v_proj', cutoff_len=1024, fp16=True, overwrite_cache=True),
}

@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "Small data sets under the names that the examples use"
    data = tmp_path_factory.mktemp('data')
    for name,n in dict(identity=5, alpaca_en_demo=6).items():
        save_rows(data/f'{name}.json', [dict(instruction=f'{name} {i}?', input='', output=f'{i}!') for i in range(n)])
    (data/'dataset_info.json').write_text(json.dumps(
        {n: dict(file_name=f'{n}.json') for n in ('identity', 'alpaca_en_demo')}))
    return data

def written(folder, path, settings):
    path.write_text(yaml.safe_dump(settings | dict(
        model_name_or_path='sage-tiny', dataset_dir=str(folder), output_dir=str(path.with_suffix('')))))
    return path

def steps(run): return run.train(), run.trainer

always = 'extras/fsdp_qlora/llama3_lora_sft',

@pytest.mark.parametrize('name', [n if n in always else pytest.param(n, marks=pytest.mark.slow) for n in examples])
def test_an_example_of_llama_factory_runs_with_its_hyperparameters(name, folder, tmp_path):
    asked = examples[name]
    run = trainer_of(written(folder, tmp_path/'config.yaml', asked), quiet=True)
    result,trainer = steps(run)
    args,adapter,rows = trainer.args,run.model.peft_config['default'],5+6*('alpaca' in asked['dataset'])
    assert (args.learning_rate, args.per_device_train_batch_size, args.gradient_accumulation_steps,
            args.num_train_epochs)==(1e-4, 1, 8, 3.0)
    assert (str(getattr(args.lr_scheduler_type, 'value', args.lr_scheduler_type)), args.logging_steps,
            args.save_steps, args.max_grad_norm, args.weight_decay, args.seed, args.optim)==(
                'cosine', 10, 500, 1.0, 0.0, 42, 'adamw_torch')
    assert .1 in (getattr(args, 'warmup_ratio', None), args.warmup_steps)
    assert args.bf16==asked.get('bf16', False) and args.dataloader_num_workers==asked.get('dataloader_num_workers', 0)
    assert (adapter.r, adapter.lora_alpha, adapter.lora_dropout)==(8, 16, 0.0)
    assert set(adapter.target_modules)==({'q_proj', 'v_proj'} if 'q_proj' in asked['lora_target'] else {
        'q_proj', 'k_proj', 'v_proj', 'o_proj', 'gate_proj', 'up_proj', 'down_proj'})
    assert adapter.init_lora_weights==('pissa_niter_16' if asked.get('pissa_init') else True)
    assert (run.fitted.max_length==asked['cutoff_len'] and run.fitted.load_in_4bit
            ==(asked.get('quantization_bit')==4)==getattr(run.model.get_base_model(), 'is_loaded_in_4bit', False))
    assert trainer.loraplus_lr_ratio==asked.get('loraplus_lr_ratio')
    if 'loraplus_lr_ratio' in asked:
        assert sorted({g['initial_lr'] for g in trainer.optimizer.param_groups})==pytest.approx([1e-4, 16e-4])
    held = len(run.eval_dataset) if run.eval_dataset is not None else 0
    assert (held>0)==('val_size' in asked) and len(run.dataset)+held==rows==run.data_report.read==run.data_report.used
    assert args.eval_steps==(500 if held else None) and result.steps==3*-(-(rows-held)//8)

def test_what_is_not_here_is_refused_by_name(folder, tmp_path):
    "The one that needs several cards, and settings for other methods"
    for more,says in (dict(deepspeed='examples/deepspeed/ds_z3_config.json'),
                      "deepspeed='examples/deepspeed/ds_z3_config.json'"),(dict(stage='ppo'), "stage='ppo'"),(
                              dict(use_galore=True), 'use_galore=True'),(
                                      dict(finetuning_type='full'), "finetuning_type='full'"),(
                                              dict(adapter_name_or_path='a,b'), "adapter_name_or_path='a,b'"),(
                                                      dict(hf_hub_token='hf_secret'), 'hf_hub_token'):
        with pytest.raises(SageError) as e: translated(written(folder, tmp_path/'config.yaml', common | more))
        assert says in str(e.value) or 'hub_token' in says

def test_a_token_is_not_repeated(folder, tmp_path):
    with pytest.raises(SageError) as e:
        translated(written(folder, tmp_path/'config.yaml', common | dict(hf_hub_token='hf_secret')))
    assert 'hf_hub_token' in str(e.value) and 'hf_secret' not in str(e.value)

def test_json_is_taken_too(folder, tmp_path):
    path = tmp_path/'config.json'
    path.write_text(json.dumps(examples['train_lora/llama3_lora_sft'] | dict(
        model_name_or_path='sage-tiny', dataset_dir=str(folder), output_dir=str(tmp_path/'run'))))
    run = trainer_of(path, quiet=True)
    assert run.config.learning_rate==1e-4 and run.config.lora.target_modules=='all-linear'

def test_a_file_for_trl_runs_with_its_hyperparameters(folder, tmp_path):
    asked = dict(model_name_or_path='sage-tiny', dataset_name=str(folder/'identity.json'), output_dir=str(
        tmp_path/'trl'), use_peft=True, lora_target_modules='all-linear', lora_r=4, lora_alpha=8, max_length=128,
                 assistant_only_loss=True, learning_rate='2e-3', num_train_epochs=1, per_device_train_batch_size=4,
                 bf16=False, gradient_checkpointing=False, eval_strategy='no', report_to='none')
    path = tmp_path/'sft.yaml'
    path.write_text(yaml.safe_dump(asked))
    run = trainer_of(path, quiet=True)
    result,trainer = steps(run)
    assert (trainer.args.learning_rate, trainer.args.per_device_train_batch_size,
            trainer.args.lr_scheduler_type, trainer.args.logging_steps, trainer.args.optim,
            result.steps)==(2e-3, 4, 'linear', 10, 'adamw_torch_fused', 2)
    assert (run.model.peft_config['default'].r, run.config.train_on)==(4, 'assistant')

def fields_of(*kinds):
    "Setting → its default, of dataclasses"
    from dataclasses import fields, MISSING
    made = lambda f: f.default_factory() if f.default_factory is not MISSING else f.default
    return {f.name: made(f) for kind in kinds for f in fields(kind)}


def scripts_of_trl():
    "Settings of each script of the installed TRL"
    trl = pytest.importorskip('trl')
    from trl.scripts.utils import DatasetMixtureConfig
    import warnings
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        from trl.experimental.orpo import ORPOConfig
    from trl.scripts.grpo import GRPOScriptArguments
    own = dict(sft=trl.SFTConfig, dpo=trl.DPOConfig, kto=trl.KTOConfig, orpo=ORPOConfig, grpo=trl.GRPOConfig)
    asked = dict(grpo=GRPOScriptArguments)
    return {n: fields_of(trl.ModelConfig, asked.get(n, trl.ScriptArguments), DatasetMixtureConfig, kind)
            for n,kind in own.items()}


@pytest.mark.parametrize('script', ['sft', 'dpo', 'kto', 'orpo', 'grpo'])
def test_every_field_of_trl_has_a_row(script):
    "Those that it inherits from transformers, too: a field of a new version is noticed here"
    missing = {*scripts_of_trl()[script]}-{*tool_table(f'trl-{script}').settings}
    assert not missing, f'give each a row in sage_finetune/tables/trl-{script}.json: {sorted(missing)}'


@pytest.mark.parametrize('script', ['sft', 'dpo', 'kto', 'orpo', 'grpo'])
def test_the_defaults_of_trl_are_those_of_the_installed_version(script):
    from transformers import TrainingArguments
    theirs,rows = scripts_of_trl()[script],tool_table(f'trl-{script}').settings
    theirs['output_dir'] = TrainingArguments().output_dir # which it sets after the fields are read
    ours = {n: row['default'] for n,row in rows.items() if row.get('default') is not None and n in theirs}
    assert {n: theirs[n] for n in ours}=={n: (v if n!='num_train_epochs' else 3.0) for n,v in ours.items()}


@pytest.mark.parametrize('script', ['sft', 'dpo', 'kto', 'orpo', 'grpo'])
def test_what_trl_takes_by_default_is_never_refused(script):
    theirs,rows = scripts_of_trl()[script],tool_table(f'trl-{script}').settings
    asks = {n: theirs[n] for n,row in rows.items() if 'off' in row and n in theirs and theirs[n] not in row['off']}
    assert asks=={'use_peft': False}


def test_a_field_that_is_new_is_noticed():
    from dataclasses import make_dataclass
    trl = pytest.importorskip('trl')
    newer = make_dataclass('Newer', [('unheard_of', int, 1)], bases=(trl.SFTConfig,))
    assert {*fields_of(newer)}-{*tool_table('trl-sft').settings}=={'unheard_of'}


tables = ('trl-sft', 'trl-dpo', 'trl-kto', 'trl-orpo', 'trl-grpo', 'llamafactory', 'llamafactory-v1', 'axolotl',
          'unsloth')


@pytest.mark.parametrize('name', tables)
def test_a_row_says_one_thing_in_words(name):
    "One of: a place here, by a row or by hand; no effect and why; the values that ask for nothing, and why no other"
    ours = {f.name for kind in (PreferenceConfig, RewardConfig) for f in fields(kind)}
    ours |= {f'lora.{f.name}' for f in fields(LoRAConfig)}
    for setting,row in tool_table(name).settings.items():
        assert {*row}<={'to', 'values', 'hand', 'note', 'off', 'why', 'default', 'kind', 'names'}, setting
        assert sum(k in row for k in ('to', 'values', 'hand')) + ('off' in row or 'note' in row)*(
            not {'to', 'values', 'hand'} & {*row})==1, setting
        assert {row.get('to', 'seed'), *(k for v in row.get('values', {}).values() for k in v)}<=ours, setting
        assert 'off' not in row or row.get('why') or row.get('note'), setting


@pytest.mark.parametrize('name', [t for t in tables if t!='llamafactory-v1'])
def test_what_is_taken_by_hand_is_looked_at(name):
    text = "".join(map(inspect.getsource, (other_tools, other_settings, other_data)))
    def looked_at(n): return f"'{n}'" in text or f"'{n.partition('_')[0]}_'" in text # alone, or all that begin alike
    assert [n for n,row in tool_table(name).settings.items() if 'hand' in row and not looked_at(n)]==[]


@pytest.mark.parametrize('given,weights,stopping', [
    (dict(mix_strategy='interleave_under', interleave_probs='0.7,0.3'), [.7, .3], 'first_exhausted'),
    (dict(mix_strategy='interleave_over', interleave_probs='0.7, 0.3'), [.7, .3], 'all_exhausted'),
    (dict(mix_strategy='interleave_over', interleave_probs=[2, 1]), [2, 1], 'all_exhausted'),
    (dict(mix_strategy='interleave_under'), [1, 1], 'first_exhausted')])
def test_data_sets_that_take_turns_keep_their_shares(given, weights, stopping, folder, tmp_path):
    run = trainer_of(written(folder, tmp_path/'config.yaml', common | given), quiet=True)
    c = run.config
    assert ([s.path.name for s in c.data_path], c.data_weights, c.data_stopping)==(
        ['training_data_1_identity.json', 'training_data_2_alpaca_en_demo.json'], weights, stopping)
    said = translated(tmp_path/'config.yaml').went
    assert said['mix_strategy']==f'data_weights = {weights}, data_stopping = {stopping}'

@pytest.mark.parametrize('given', [{}, dict(mix_strategy='concat'), dict(mix_strategy='interleave_once')])
def test_data_sets_of_which_every_row_is_taken_once_are_one_file(given, folder, tmp_path):
    c = trainer_of(written(folder, tmp_path/'config.yaml', common | given), quiet=True).config
    assert (c.data_path.name, c.data_weights)==('training_data_custom.json', None)
    assert len(json.loads(c.data_path.read_text()))==11

def test_one_data_set_takes_no_turns(folder, tmp_path):
    asked = common | dict(dataset='identity', mix_strategy='interleave_over')
    assert trainer_of(written(folder, tmp_path/'config.yaml', asked), quiet=True).config.data_weights is None

@pytest.mark.parametrize('given,why', [
    (dict(mix_strategy='zip'), "mix_strategy='zip'"), (dict(interleave_probs='0.7,0.3'), 'interleave_probs'),
    (dict(mix_strategy='interleave_over', interleave_probs='0.7'), 'a number above 0 for each data set'),
    (dict(mix_strategy='interleave_over', interleave_probs='0.7,x'), 'a number above 0 for each data set'),
    (dict(mix_strategy='interleave_under', interleave_probs='1,0'), 'a number above 0 for each data set')])
def test_shares_of_data_sets_that_cannot_be_are_refused(given, why, folder, tmp_path):
    with pytest.raises(SageError, match=why): translated(written(folder, tmp_path/'config.yaml', common | given))


def described(rows, tmp_path, **info):
    "A file of LLaMA-Factory for these rows"
    (tmp_path/'rows.json').write_text(json.dumps(rows))
    (tmp_path/'dataset_info.json').write_text(json.dumps(dict(mine=dict(file_name='rows.json', **info))))
    (tmp_path/'l.json').write_text(json.dumps(dict(
        model_name_or_path='sage-tiny', stage='sft', finetuning_type='lora', lora_target='all', dataset='mine',
        dataset_dir=str(tmp_path), template='qwen', cutoff_len=128, output_dir=str(tmp_path/'run'), max_steps=1)))
    return tmp_path/'l.json'


pair = dict(instruction='Why?', input='In short.', output='So.')
tags = dict(messages='messages')
as_openai = dict(role_tag='role', content_tag='content', user_tag='user', assistant_tag='assistant')


@pytest.mark.parametrize('row,info,told', [
    (pair | dict(context='C', id=1), {}, ', not used: context (2 rows)'), (pair, {}, ''),
    (pair | dict(system=''), {}, ''),
    (pair, dict(columns=dict(prompt='instruction', query='nope', response='output')),
     ", not used: input (2 rows), no row has: 'nope' (`query`)"),
    (dict(conversations=[{'from': 'human', 'value': 'a'}, {'from': 'gpt', 'value': 'b'}], tool='x'),
     dict(formatting='sharegpt'), ', not used: tool (2 rows)')])
def test_columns_that_nobody_reads_are_told(row, info, told, tmp_path):
    said = []
    config_from_other_tool(described([row, row], tmp_path, **info), say=said.append)
    assert said[-1] == f'mine: 2 rows{told}'


@pytest.mark.parametrize('flag', [dict(weight=0), dict(train=False), dict(loss='false'), dict(masked=True)])
def test_a_turn_that_is_not_to_be_learned_stays_so(flag, tmp_path):
    turns = [dict(role=r, content=c) for r,c in zip(['user', 'assistant']*2, 'abcd')]
    turns[1] |= flag
    file = described([dict(messages=turns)], tmp_path, formatting='sharegpt', columns=tags, tags=as_openai)
    rows = json.loads(Path(config_from_other_tool(file, say=lambda text: None).data_path).read_text())
    assert [m.get('train', True) for m in to_messages(rows[0])] == [True, False, True, True]


@pytest.mark.parametrize('row', ['text', ['Why?', 'So.'], pair | dict(instruction=['Why?']), pair | dict(input=3)])
def test_rows_of_another_shape_are_refused_with_their_line(row, tmp_path):
    config,report = config_from_other_tool(described([pair, row], tmp_path), say=lambda text: None),DataReport()
    prepare_dataset(config.data_path, load_tokenizer('sage-tiny'), report=report, cache=False)
    assert report.used == 1 and [d['line'] > 2 and 'must be a' in d['reason'] for d in report.dropped] == [True]

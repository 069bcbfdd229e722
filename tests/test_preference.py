"""Learning from preferences: what is learned, the three losses by hand, a run that is stopped or runs out of
memory, and every way in
"""
import json
import math
import random
import sys
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback

from quick import few, two_layers
from sage_finetune.training.callbacks import read_metrics
from sage_finetune.runs.run import Run
from sage_finetune.core.disk import write_json
from sage_finetune.config import LoRAConfig, PreferenceConfig, SageError, TrainingConfig
from sage_finetune.data import DataReport, read_rows, save_rows
from sage_finetune.core.run_folder import RunFolder
from sage_finetune.inference.generate import answers, load_plain
from sage_finetune.base.loading import load_tokenizer
from sage_finetune.merge_chat import merge_run
from sage_finetune.preference import (
    PreferenceMixin, PreferenceTrainer, prepare_preferences, require_trl, split_by_prompt, trainer_for
)
from sage_finetune.runs.tasks import new_run, trainer_of
from sage_finetune.trainer import data_digest, LoRATrainer, Stopped, train_from_meta

real = Path(__file__).resolve().parents[2]/'shared'/'data'/'dpo_en_demo.json'
needs_real = pytest.mark.skipif(not real.is_file(), reason='the folder of real rows (../shared/data) is not here')
methods = pytest.mark.parametrize('method', ['dpo', 'orpo', 'kto'])
tok = load_tokenizer('sage-tiny')


def said(ids): return tok.decode([t for t in ids if t != -100])

def pairs(n=24):
    return [dict(prompt=f'What is {i} plus {i%7}?', chosen=f'It is {i+i%7}.',
                 rejected=f'I do not know what {i} plus {i%7} is.') for i in range(n)]

def config(folder, **more):
    "A run on 24 pairs of which 6 are held out, four steps"
    data = folder.parent/'pairs.jsonl'
    if not data.exists(): save_rows(data, pairs())
    settings = dict(model_name=two_layers, data_path=data, output_dir=folder, test_size=.25, max_steps=4,
                    save_steps=2, logging_steps=2, per_device_train_batch_size=4,
                    gradient_accumulation_steps=1, learning_rate=2e-3, report_to='none', max_length=128)
    return PreferenceConfig(**settings | more)

def after(c, kind=PreferenceTrainer):
    run = kind(c, quiet=True)
    return run,run.train()
def weights(c): return (c.lora_dir/'adapter_model.safetensors').read_bytes()
def vector(run): return torch.cat([p.detach().flatten() for p in run.model.parameters() if p.requires_grad])
def told(c):
    return [{k: v for k,v in m.items() if k in ('step', 'loss', 'eval_loss') or '/' in k}
            for m in read_metrics(RunFolder(c.output_dir).metrics)]


# What is learned

def test_what_is_learned_is_the_answers_with_their_end_of_turn_and_nothing_else(tmp_path):
    draw,words = random.Random(0),['eins', '二', 'три', '🙂', 'four', '  x', 'a\nb']
    text = lambda: ' '.join(draw.choice(words) for _ in range(draw.randint(1, 5))).strip()
    rows,wanted = [],[]
    for _ in range(60):
        past = [dict(role=r, content=text()) for _ in range(draw.randint(0, 2)) for r in ('user', 'assistant')]
        prompt,good,bad = [*past, dict(role='user', content=text())],text(),text()+' no'
        rows.append(draw.choice([dict(prompt=prompt, chosen=good, rejected=bad), dict(
            messages=prompt, chosen=dict(role='assistant', content=good), rejected={'from': 'gpt', 'value': bad}),
                                 dict(chosen=[*prompt, dict(role='assistant', content=good)],
                                      rejected=[*prompt, dict(role='assistant', content=bad)])]))
        wanted.append((good, bad))
    report = DataReport()
    made = prepare_preferences(PreferenceConfig(data_path=save_rows(tmp_path/'rows.jsonl', rows)), tok, report)
    assert [(said(r['labels']), said(r['rejected_labels'])) for r in made] == [
        (f'{a}<|im_end|>', f'{b}<|im_end|>') for a,b in wanted]
    assert (report.read, report.used, report.examples) == (60, 60, 60)
    for r in made: # both answers follow the same prompt, the one that chat would send
        n = next(i for i,t in enumerate(r['labels']) if t != -100)
        assert r['input_ids'][:n] == r['rejected_input_ids'][:n]
        assert tok.decode(r['input_ids'][:n]).endswith('<|im_start|>assistant\n')


def test_what_is_too_long_copied_renamed_or_of_several_turns(tmp_path):
    def prepared(name, rows, **more):
        made = prepare_preferences(PreferenceConfig(model_name='sage-tiny', max_length=128, data_path=save_rows(
            tmp_path/f'{name}.jsonl', rows), **more), tok, report := DataReport())
        return made,report
    question = dict(role='user', content='2+3?')
    long = dict(prompt=[dict(role='user', content='Say it. '*200), dict(role='assistant', content='It.'), question],
                chosen='5', rejected='6')
    with pytest.raises(ValueError, match='too long'): prepared('long', [long], strict=True, overflow='drop')
    rows = [dict(prompt='Say a number.', chosen='Five.', rejected='No.'), dict(
        messages=[question, dict(role='assistant', content='5'), dict(role='user', content='And one more?')],
        chosen='6', rejected='It is 7.')]
    twice = [rows[0], rows[1], rows[0]]
    _,report = prepared('twice', twice)
    assert (report.duplicates, report.examples) == (1, 3)
    _,report = prepared('twice', twice, duplicates='drop')
    assert (report.used, len(report.dropped)) == (2, 1)
    made,_ = prepared('renamed', [dict(ask='Say it.', good='It.', bad='No.')],
                      columns=dict(ask='prompt', good='chosen', bad='rejected'))
    assert len(made) == 1
    turns = dict(prompt='a?', rejected='C', chosen=[dict(role='assistant', content='A'), dict(
        role='user', content='b?'), dict(role='assistant', content='B')])
    assert [said(prepared('turns', [turns], train_on=t)[0][0]['labels']) for t in ('assistant', 'last')] == [
        'A<|im_end|>B<|im_end|>', 'B<|im_end|>']


@needs_real
def test_every_row_of_a_real_file_is_accounted_for():
    rows,report = list(read_rows(real)),DataReport()
    made = prepare_preferences(PreferenceConfig(data_path=real, max_length=4096), tok, report)
    assert (report.read, report.used+len(report.dropped), len(made)) == (len(rows), len(rows), report.used)
    gone = {d['line'] for d in report.dropped}
    assert [r.value['chosen']['value'].strip() for r in rows if r.line not in gone] == [
        said(r['labels']).removesuffix('<|im_end|>').strip() for r in made]
    assert [r.value['rejected']['value'].strip() for r in rows if r.line not in gone] == [
        said(r['rejected_labels']).removesuffix('<|im_end|>').strip() for r in made]
    assert all(d['reason'].startswith(('too long', 'turn')) for d in report.dropped)
    train,held = split_by_prompt(made, .2, 0)
    asked = [{tuple(r['input_ids'][:next(i for i,t in enumerate(r['labels']) if t != -100)]) for r in d}
             for d in (train, held)]
    assert len(train)+len(held) == len(made) and not asked[0] & asked[1]


def test_a_prompt_is_on_one_side_whatever_the_answers(tmp_path):
    draw,words = random.Random(0),'one two three four five six seven eight nine ten eleven twelve'.split()
    text = lambda n: ' '.join(draw.choice(words) for _ in range(n))
    prompts = [text(8) for _ in range(20)]
    rows = [dict(prompt=p, chosen=text(30), rejected=text(30)) for p in prompts for _ in range(3)]
    draw.shuffle(rows)
    for method,each in (('dpo', 1), ('kto', 2)):
        report = DataReport()
        train,held = split_by_prompt(prepare_preferences(
            PreferenceConfig(method=method, data_path=save_rows(tmp_path/'rows.jsonl', rows)), tok), .2, 1, report)
        asked = [{tok.decode(r['input_ids'][:next(i for i,t in enumerate(r['labels']) if t != -100)]) for r in d}
                 for d in (train, held)]
        assert (len(train), len(held), len(asked[0] & asked[1]), report.held_out) == (48*each, 12*each, 0, 12*each)
    changed = [rows[0] | dict(rejected='Another.'), *rows[1:]]
    digests = {data_digest(prepare_preferences(PreferenceConfig(method=m, data_path=save_rows(
        tmp_path/'other.jsonl', r)), tok)) for r in (rows, changed) for m in ('dpo', 'kto')}
    assert len(digests) == 4 # what is rejected is part of what makes a run


# Numbers

@methods
def test_the_first_step_is_as_by_hand_and_the_margin_grows_on_held_out_pairs(method, tmp_path):
    c = config(tmp_path/'run', method=method, max_steps=8)
    run,result = after(c)
    first,last = (m for m in (next(m for m in told(c) if 'eval_loss' in m),
                              [m for m in told(c) if 'eval_loss' in m][-1]))
    grows = 'eval_log_odds_chosen' if method == 'orpo' else 'eval_rewards/margins'
    figures = [m[grows] for m in read_metrics(run.folder.metrics) if grows in m]
    assert (figures[-1] > figures[0]+.1 and result.margin_after > result.margin_before
            and last['eval_loss'] < first['eval_loss'])
    if method != 'orpo':
        start = {'dpo': math.log(2), 'kto': .5}[method]
        step = next(m for m in told(c) if m['step'] == 1)
        assert result.loss_before == pytest.approx(start, abs=1e-6) and step['loss'] == pytest.approx(start, abs=1e-6)
        assert result.margin_before == pytest.approx(0, abs=1e-6)
    assert {'rewards/chosen', 'rewards/rejected', 'rewards/margins',
            'logps/chosen'} <= set([m for m in told(c) if 'loss' in m][-1])
    assert (len(run.dataset), len(run.eval_dataset)) == ((36, 12) if method == 'kto' else (18, 6))
    saved = json.loads(run.folder.results.read_text())
    assert saved['margin_after'] == result.margin_after and run.folder.loss_curve.is_file()


@pytest.mark.slow
@needs_real
@methods
def test_the_margin_grows_on_held_out_pairs_of_a_real_file(method, tmp_path):
    c = config(tmp_path/'run', method=method, data_path=real, model_name='sage-tiny', max_length=640,
               overflow='truncate', test_size=.3, max_steps=-1, num_train_epochs=2, seed=4, save_steps=100,
               per_device_train_batch_size=4, gradient_accumulation_steps=2, learning_rate=3e-4,
               lora=LoRAConfig(r=16, lora_alpha=32, target_modules='all-linear', lora_dropout=0.0))
    run,result = after(c)
    figure = 'eval_log_odds_chosen' if method == 'orpo' else 'eval_rewards/margins'
    seen = [(m['step'], round(m[figure], 4)) for m in read_metrics(run.folder.metrics) if figure in m]
    print(f'{method}: {len(run.dataset)} rows, {len(run.eval_dataset)} held out, {figure} {seen}')
    assert len(run.eval_dataset) >= 20 and seen[-1][1] > seen[0][1]+.01


def test_any_split_of_the_batch_gives_the_same_adapter(tmp_path):
    runs = [after(config(tmp_path/f'{n}', method='orpo', max_steps=2, warmup_ratio=0, per_device_train_batch_size=n,
                         gradient_accumulation_steps=4//n))[0] for n in (4, 1)]
    assert (vector(runs[0])-vector(runs[1])).abs().max() < 1e-5
    # AdamW does not see how long a gradient is
    norms = [[m['grad_norm'] for m in read_metrics(r.folder.metrics) if 'grad_norm' in m] for r in runs]
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)


def test_settings_reach_the_loss(tmp_path):
    def args(**more): return PreferenceTrainer(config(tmp_path/'run', **more), quiet=True).arguments()
    a = args(beta=.5, loss_type='robust', label_smoothing=.2, sft_weight=.3)
    assert (a.beta, a.loss_type, a.loss_weights, a.label_smoothing,
            a.disable_dropout) == (.5, ['robust', 'sft'], [1.0, .3], .2, True)
    a = args(method='kto', desirable_weight=2, undesirable_weight=.5, lora=LoRAConfig(lora_dropout=.1))
    assert (a.beta, a.desirable_weight, a.undesirable_weight, a.disable_dropout) == (.1, 2, .5, False)
    assert (args(method='orpo', beta=.2).beta, args().loss_type, args().learning_rate) == (.2, ['sigmoid'], 2e-3)


# Runs

@pytest.mark.parametrize('method', few(['kto', 'orpo'])) # the notebook has DPO
def test_a_stopped_run_resumes_to_the_same_bits_and_the_same_log(method, tmp_path):
    class Stops(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3: cell.stop()

    class Stopping(PreferenceTrainer):
        def callbacks(self): return [*super().callbacks(), Stops()]

    whole,cut = (config(tmp_path/'whole', method=method, max_steps=5, save_steps=10, logging_steps=5),
                 config(tmp_path/'cut', method=method, max_steps=5, save_steps=10, logging_steps=5))
    after(whole)
    cell = Stopping(cut, quiet=True)
    with pytest.raises(Stopped, match='stopped at step 3 of 5'): cell.train()
    assert cell.folder.state == 'stopped' and cell.model is None
    after(cut)
    assert weights(cut) == weights(whole) and told(cut) == told(whole)


def test_memory_that_runs_out_halves_the_micro_batch_and_leaves_the_same_run(tmp_path, monkeypatch):
    judged = PreferenceMixin.judged
    def full(self, model, inputs):
        if model.training and len(inputs['input_ids']) > 4: raise torch.OutOfMemoryError('full')
        return judged(self, model, inputs)
    requested = config(tmp_path/'small', max_steps=2, warmup_ratio=0)
    monkeypatch.setattr(PreferenceMixin, 'judged', full)
    small,_ = after(requested)
    monkeypatch.undo()
    assert ([(c.setting, c.used) for c in small.while_running] == [('gradient_accumulation_steps', 2), (
        'per_device_train_batch_size', 2)] or small.fitted.per_device_train_batch_size == 2)
    assert (vector(small)-vector(after(config(tmp_path/'large', max_steps=2, warmup_ratio=0))[0])).abs().max() < 1e-5


def test_the_adapter_merges_with_its_proof_answers_and_is_repeated_bit_exactly(tmp_path):
    c = config(tmp_path/'run')
    run,_ = after(c)
    assert ([*run.model.peft_config] == ['default'] and {p.dtype for p in run.model.parameters() if p.requires_grad}
            == {torch.float32})
    merged = merge_run(c.output_dir)
    assert merged.divergence < 1e-6 and merged.effect > 100*merged.difference
    assert list(answers(*load_plain(run.folder.merged_model), ['What is 2 plus 2?'], max_new_tokens=4))[0].text
    back = Run(c.output_dir)
    assert (type(back.config), back.config) == (PreferenceConfig, c)
    assert [len(d) for d in back.data] == [18, 6]
    assert back.repeat(tmp_path/'again').exact


# Ways in

def test_run_takes_judged_rows_files_with_a_method_and_folders_that_were_started(tmp_path, capsys):
    data = save_rows(tmp_path/'pairs.jsonl', pairs())
    by_rows = trainer_of(write_json(tmp_path/'plain.json',
                                    dict(model_name='sage-tiny', data_path=str(data), output_dir=str(tmp_path/'a'))))
    assert type(by_rows) is PreferenceTrainer and by_rows.config.method == 'dpo'
    assert 'learned from as preferences' in capsys.readouterr().err
    (tmp_path/'own.yaml').write_text(f'model_name: sage-tiny\nmethod: orpo\ndata_path: {data}\n'
                                     f'output_dir: {tmp_path/"b"}\n')
    assert trainer_of(tmp_path/'own.yaml').config.method == 'orpo' and not capsys.readouterr().err
    folder,_ = new_run('custom', 'sage-tiny', data, tmp_path/'started', settings=dict(max_steps=1))
    assert type(trainer_of(folder.path, quiet=True)) is PreferenceTrainer
    folder,_ = new_run('custom', 'sage-tiny', data, tmp_path/'kto', settings=dict(method='kto', max_steps=1))
    assert trainer_of(folder.path, quiet=True).config.method == 'kto'
    with pytest.raises(ValueError, match='PreferenceTrainer'): train_from_meta(folder.path)
    judged = save_rows(tmp_path/'judged.jsonl',
                       [dict(prompt=f'{i}?', completion=f'{i}', label=i%2 == 0) for i in range(8)])
    assert trainer_for(dict(data_path=judged), quiet=True).config.method == 'kto'
    mixed = save_rows(tmp_path/'mixed.jsonl', [*pairs(2), dict(question='a?', answer='b')])
    assert type(trainer_for(TrainingConfig(data_path=mixed), quiet=True)) is LoRATrainer


def test_what_cannot_be_is_one_line(tmp_path, monkeypatch):
    c = config(tmp_path/'run')
    with pytest.raises(ValueError, match='one judged answer, and `method="dpo"` compares two'):
        prepare_preferences(c.replace(data_path=save_rows(
            tmp_path/'judged.jsonl', [dict(prompt='a?', completion='b', label=True)]), strict=True), tok)
    with pytest.raises(ValueError, match='merge the earlier run'): PreferenceTrainer(c.replace(init_adapter='x'))
    with pytest.raises(ValueError, match='moves a part of the weights'):
        PreferenceTrainer(c.replace(lora=LoRAConfig(init_lora_weights='olora')))
    with pytest.raises(FileNotFoundError):
        PreferenceTrainer(c.replace(data_path=tmp_path/'none.jsonl'), quiet=True).train()
    with pytest.raises(SageError, match='set `per_device_train_batch_size` to 2'):
        after(c.replace(method='kto', per_device_train_batch_size=1))
    monkeypatch.setitem(sys.modules, 'trl', None)
    with pytest.raises(SageError, match=r'pip install "sage_finetune\[trl\]"'): require_trl()
    with pytest.raises(SageError, match='needs TRL'): after(config(tmp_path/'other'))


@pytest.mark.slow
@methods
@pytest.mark.parametrize('how', [dict(gradient_checkpointing=True), dict(load_in_8bit=True), dict(
    load_in_4bit=True), dict(bf16=True), dict(lora=LoRAConfig(lora_dropout=.1))], ids=str)
def test_any_precision_begins_at_the_same_loss_and_trains_in_32_bits(method, how, tmp_path):
    run,result = after(config(tmp_path/'run', method=method, max_steps=2, **how))
    if method != 'orpo': assert result.loss_before == pytest.approx({'dpo': math.log(2), 'kto': .5}[method], abs=1e-5)
    assert (result.loss_after < result.loss_before and {p.dtype for p in run.model.parameters() if p.requires_grad}
            == {torch.float32})


# Configs of LLaMA-Factory

examples = dict(stage='dpo', do_train=True, finetuning_type='lora', lora_rank=8, lora_target='all', pref_beta=.1,
                pref_loss='sigmoid', template='llama3', cutoff_len=2048, max_samples=1000,
                overwrite_cache=True, preprocessing_num_workers=16, dataloader_num_workers=4, logging_steps=10,
                save_steps=500, plot_loss=True, overwrite_output_dir=True, save_only_model=False,
                report_to='none', per_device_train_batch_size=1, gradient_accumulation_steps=8,
                learning_rate='5.0e-6', num_train_epochs=3.0, lr_scheduler_type='cosine', warmup_ratio=.1, bf16=True,
                ddp_timeout=180000000, resume_from_checkpoint=None, trust_remote_code=True)

@pytest.fixture(scope='module')
def factory(tmp_path_factory):
    "Small data sets under the names and with the descriptions that LLaMA-Factory has"
    folder,turn = tmp_path_factory.mktemp('factory'),lambda who,text: {'from': who, 'value': text}
    save_rows(folder/'dpo_en_demo.json', [dict(conversations=[turn('system', 'Add.'), turn(
        'human', f'{i}+1?')], chosen=turn('gpt', f'{i+1}'), rejected=turn('gpt', 'No.')) for i in range(8)])
    save_rows(folder/'pairs.json',
              [dict(instruction=f'Add 1 to {i}.', input='', chosen=f'{i+1}', rejected='No.') for i in range(8)])
    save_rows(folder/'kto_en_demo.json', [dict(messages=[dict(role='user', content=f'{i}+1?'), dict(
        role='assistant', content=f'{i+1}')], label=i%2 == 0) for i in range(8)])
    write_json(folder/'dataset_info.json', dict(
        dpo_en_demo=dict(file_name='dpo_en_demo.json', ranking=True, formatting='sharegpt',
                         columns=dict(messages='conversations', chosen='chosen', rejected='rejected')),
        pairs=dict(file_name='pairs.json', ranking=True,
                   columns=dict(prompt='instruction', query='input', chosen='chosen', rejected='rejected')),
        kto_en_demo=dict(file_name='kto_en_demo.json', formatting='sharegpt',
                         columns=dict(messages='messages', kto_tag='label'),
                         tags=dict(role_tag='role', content_tag='content', user_tag='user',
                                   assistant_tag='assistant'))))
    return folder

def of_factory(factory, folder, without=(), **more):
    "The trainer of a config of LLaMA-Factory"
    settings = examples | dict(model_name_or_path='sage-tiny', dataset_dir=str(factory),
                               output_dir=str(folder/f'run{len([*folder.iterdir()])}'), dataset='dpo_en_demo') | more
    path = write_json(folder/'config.json', {k: v for k,v in settings.items() if k not in without})
    return trainer_of(path, quiet=True)


def test_examples_of_llama_factory_keep_their_hyperparameters(factory, tmp_path):
    c = of_factory(factory, tmp_path).config
    assert (c.method, c.beta, c.loss_type, c.learning_rate, c.per_device_train_batch_size,
            c.gradient_accumulation_steps, c.lora.r, c.max_length) == ('dpo', .1, 'sigmoid', 5e-6, 1, 8, 8, 2048)
    made = prepare_preferences(c, tok, report := DataReport())
    assert ((report.used, report.dropped) == (8, []) and said(made[3]['labels']) == '4<|im_end|>'
            and 'Add.' in tok.decode(made[3]['input_ids']))
    c = of_factory(factory, tmp_path, dataset='pairs', pref_loss='orpo', pref_beta=.2).config
    assert (c.method, c.beta, len(prepare_preferences(c, tok))) == ('orpo', .2, 8)
    c = of_factory(factory, tmp_path, ('pref_loss',), stage='kto', dataset='kto_en_demo', kto_chosen_weight=1.5).config
    assert (c.method, c.desirable_weight, c.undesirable_weight, c.per_device_train_batch_size,
            c.effective_batch_size) == ('kto', 1.5, 1.0, 2, 8)
    assert [r['desirable'][0] for r in prepare_preferences(c, tok)] == [1, 0]*4
    for more,says in ((dict(stage='ppo'), "stage='ppo'"), (dict(pref_loss='simpo'), "pref_loss='simpo'"),
                      (dict(dpo_label_smoothing=.1), 'dpo_label_smoothing'), (dict(ref_model='x'), 'ref_model'),
                      (dict(stage='sft', without=('pref_beta', 'pref_loss')), 'ranking')):
        with pytest.raises(SageError, match=says): of_factory(factory, tmp_path, **more)

"Several sources of rows: shares, held-out rows, and a run on them from its start to a repetition"
import json
from collections import Counter

import pytest
from datasets import Dataset, interleave_datasets
from transformers import AutoTokenizer, TrainerCallback

from sage_finetune.config import DataSource, LoRAConfig, PreferenceConfig, resolve_model, TrainingConfig
from sage_finetune.core.run_folder import RunFolder, write_meta
from sage_finetune.core.settings import data_sources
from sage_finetune.data import end_to_end, mixed, prepare_dataset, without_source
from sage_finetune.inference.merging import probes_of
from sage_finetune.preference import PreferenceTrainer, trainer_for
from sage_finetune.rows.report import DataReport, merge_reports
from sage_finetune.rows.sources import save_rows
from sage_finetune.runs.run import repeat_run, Run
from sage_finetune.trainer import LoRATrainer, train_from_meta
from sage_finetune.training.split import prepared_and_split, read_data, split_dataset

tok = AutoTokenizer.from_pretrained(resolve_model('sage-tiny'))


def english(n): return [dict(question=f'en {i}?', answer=f'{i} things') for i in range(n)]
def french(n): return [dict(frage=f'fr {i}?', antwort=f'{i} choses') for i in range(n)]


@pytest.fixture
def files(tmp_path):
    en,fr = save_rows(tmp_path/'en.jsonl', english(60)), save_rows(tmp_path/'fr.jsonl', french(20))
    return [en, DataSource(fr, columns=dict(frage='question', antwort='answer'))]


def config(folder, files, kind=TrainingConfig, **more):
    settings = dict(model_name='sage-tiny', data_path=files, output_dir=folder, test_size=0.1, max_steps=8,
                    save_steps=3, per_device_train_batch_size=2, gradient_accumulation_steps=1, learning_rate=5e-3,
                    report_to='none',
                    logging_steps=2, lora=LoRAConfig(r=4, lora_dropout=0.1))
    return kind(**(settings | more))


def texts(dataset): return [tok.decode(x) for x in dataset['input_ids']]
def language(text): return 'fr' if 'fr ' in text else 'en'


# Shares

@pytest.mark.parametrize('weights,stopping', [([3, 1], 'first_exhausted'), ([1, 1], 'all_exhausted'),
                                              ([.2, .8], 'all_exhausted'), ([9, 1], 'first_exhausted')])
def test_the_order_is_that_of_interleave_datasets(weights, stopping, files):
    report = DataReport()
    made = prepare_dataset(files, tok, report=report, data_weights=weights, data_stopping=stopping, seed=7)
    alone = [prepare_dataset(s.path, tok, columns=s.columns) for s in data_sources(files)]
    theirs = interleave_datasets(alone, probabilities=[w/sum(weights) for w in weights], seed=7,
                                 stopping_strategy=stopping)
    assert made['input_ids'][:]==theirs['input_ids'][:] and made.column_names==theirs.column_names
    taken = Counter(map(language, texts(made)))
    assert [s['taken'] for s in report.sources]==[taken['en'], taken['fr']]
    for s in report.sources: assert s['taken']-s['repeated']+s['left_over']==s['examples']
    assert 'left over' in str(report) or 'repeated' in str(report)


def test_without_shares_every_row_once(files):
    report = DataReport()
    made = prepare_dataset(files, tok, report=report)
    assert Counter(map(language, texts(made)))==dict(en=60, fr=20)
    assert [(s['taken'], s['repeated'], s['left_over']) for s in report.sources]==[(60, 0, 0), (20, 0, 0)]
    assert report.read==80==report.used+len(report.dropped)==sum(report.files.values())


def test_shares_come_out_and_the_seed_decides_the_order(files):
    many = [save_rows(files[0].parent/f'{n}.jsonl', [dict(question=f'{n} {i}?', answer='a') for i in range(400)])
            for n in ('en', 'fr')]
    orders = [[language(t) for t in texts(prepare_dataset(many, tok, data_weights='4,1', seed=s))] for s in (0, 0, 1)]
    assert orders[0]==orders[1]!=orders[2]
    assert abs(orders[0].count('en')/len(orders[0])-.8)<.05


def test_each_source_is_prepared_and_kept_by_itself(files, tmp_path):
    first,second,alone = DataReport(), DataReport(), DataReport()
    prepare_dataset(files, tok, report=first, cache=tmp_path/'kept')
    prepare_dataset(files[0], tok, report=alone, cache=tmp_path/'kept')
    save_rows(files[0], english(61))
    prepare_dataset(files, tok, report=second, cache=tmp_path/'kept')
    assert (first.cached, alone.cached, [s['cached'] for s in second.sources])==(False, True, [False, True])


def test_rows_in_memory_and_files_go_together(files):
    report = DataReport()
    made = prepare_dataset([files[0], Dataset.from_list(english(70)[60:])], tok, report=report)
    assert (len(made), [s['source'].rpartition('/')[2] for s in report.sources])==(70, ['en.jsonl', 'Dataset'])
    assert len(prepare_dataset(english(5), tok))==5


def test_a_copy_in_another_source_is_counted_or_left_out(files):
    twice,counted,dropped = [files[0], save_rows(files[0].parent/'b.jsonl', english(70))], DataReport(), DataReport()
    assert (len(prepare_dataset(twice, tok, report=counted)), counted.duplicates)==(130, 60)
    assert len(prepare_dataset(twice, tok, report=dropped, duplicates='drop'))==70==dropped.examples
    assert dropped.notes=={'examples that an earlier source has too, left out': 60}
    one,other = (prepare_dataset(p, tok) for p in twice)
    report = merge_reports(DataReport(), [('a', DataReport()), ('b', DataReport())])
    assert end_to_end([one, other], report)['source'][:]==[0]*60+[1]*70


def test_dropped_rows_name_their_file(files):
    bad = save_rows(files[0].parent/'bad.jsonl', [dict(question='a', answer=''), *english(3)])
    report = DataReport()
    prepare_dataset([bad, files[1]], tok, report=report)
    assert [(d['file'], d['line']) for d in report.dropped]==[(str(bad), 1)]
    assert (report.sources[0]['dropped'], report.read)==(1, 24)
    with pytest.raises(ValueError, match='bad.jsonl:1'): prepare_dataset([files[1], bad], tok, strict=True)


@pytest.mark.parametrize('how,why', [
    (dict(data_weights=[1]), 'must have a share for each source'), (dict(data_weights=[1, 2, 3]), 'there are 2'),
    (dict(data_weights=[1, 0]), 'must be above 0'), (dict(data_weights=['x', 1]), 'must be a finite number'),
    (dict(data_weights=3), 'must be a list of numbers'),
    (dict(data_stopping='never', data_weights=[1, 1]), 'data_stopping'),
    (dict(data_stopping='all_exhausted'), 'goes with `data_weights`'),
    (dict(data_weights=[1, 10**6], data_stopping='all_exhausted'), 'would become about')])
def test_shares_that_cannot_be_are_refused(how, why, files):
    with pytest.raises(ValueError, match=why): prepare_dataset(files, tok, **how)


@pytest.mark.parametrize('data,why', [
    ([], 'at least one source'), (['a', dict(split='test')], r'data_path\[1\]` must have a `path`'),
    (['a', dict(path='b', colums={})], r'data_path\[1\]`.*did you mean `columns`'),
    (['a', dict(path='b', format_type='qq')], r'data_path\[1\]`: `format_type` must be'),
    (['a', 3], r'data_path\[1\]'), (['a', ''], r'data_path\[1\]'), ({'split': 'x'}, 'must have a `path`'),
    (['a', Dataset.from_list([dict(a=1)])], 'rows in memory')])
def test_sources_that_cannot_be_are_refused_by_their_number(data, why):
    with pytest.raises(ValueError, match=why): TrainingConfig(data_path=data)


@pytest.mark.parametrize('form', ['json', 'yaml', 'meta'])
def test_a_file_of_settings_may_name_several(form, files, tmp_path):
    asked = config(tmp_path/'run', files, data_weights=[3, 1])
    if form=='meta':
        other = files[1].to_dict() | dict(path='../fr.jsonl')
        write_meta(tmp_path/'run', 'sage-tiny', [dict(path='../en.jsonl'), other],
                   config=dict(data_weights=[3, 1], max_steps=1, test_size=0))
        assert train_from_meta(tmp_path/'run', quiet=True).data_report.read==80
        return
    if form=='json': file = asked.save(tmp_path/'run.json')
    else:
        import yaml
        file = tmp_path/'run.yaml'
        file.write_text(yaml.safe_dump(json.loads(json.dumps(asked.to_dict()))))
    from sage_finetune.runs.tasks import config_of_file
    assert config_of_file(file)==asked


# Held-out rows

def test_rows_are_held_out_of_each_source_before_they_are_repeated(files, tmp_path):
    report = DataReport()
    asked = config(tmp_path/'run', files, data_weights=[1, 3], data_stopping='all_exhausted')
    train,held = read_data(asked, tok, report)
    assert Counter(map(language, texts(held)))==dict(en=6, fr=2)
    assert not {*texts(train)} & {*texts(held)}
    assert [s['held_out'] for s in report.sources]==[6, 2] and report.sources[1]['repeated']>0
    assert prepared_and_split(config(tmp_path/'run', files), tok, DataReport())[1]['input_ids'][:]==held['input_ids'][:]


def test_a_copy_in_another_source_is_held_out_with_it(tmp_path):
    both = [save_rows(tmp_path/f'{n}.jsonl', english(30)) for n in 'ab']
    train,held = read_data(config(tmp_path/'run', both), tok, DataReport())
    assert len(held)==6 and not {*texts(train)} & {*texts(held)}


def test_a_source_of_one_row_is_trained_on_and_told(files, tmp_path):
    one,report = save_rows(tmp_path/'one.jsonl', english(100)[99:]), DataReport()
    train,held = read_data(config(tmp_path/'run', [files[0], one]), tok, report)
    assert len(train)+len(held)==61 and f'nothing is held out of {one}' in report.notes


def test_a_file_for_evaluation_may_be_several_too(files, tmp_path):
    new = lambda n: [dict(question=f'{n} new {i}?', answer='a') for i in range(3)]
    held = [save_rows(tmp_path/f'{n}.jsonl', new(n)) for n in 'xy']
    report = DataReport()
    _,rows = read_data(config(tmp_path/'run', files, eval_data_path=held), tok, report)
    assert (len(rows), report.evaluation.read, len(report.evaluation.sources))==(6, 6, 2)


def test_splitting_and_mixing_by_hand(files):
    report = DataReport()
    apart = prepare_dataset(files, tok, report=report, apart=True)
    train,held = split_dataset(apart, 0.1, 1, report)
    assert (len(train), len(held), train.column_names[-1])==(72, 8, 'source')
    assert 'source' not in without_source(held).column_names and without_source(None) is None
    assert 'source' not in mixed(train, report, [1, 1]).column_names


# A run

class PowerCut(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step==5: raise RuntimeError('power cut')


class Disturbed(LoRATrainer):
    def callbacks(self): return [*super().callbacks(), PowerCut()]


def adapter(folder): return (RunFolder(folder).lora_weights/'adapter_model.safetensors').read_bytes()


def test_a_mixture_is_killed_resumed_shown_and_repeated_bit_exactly(files, tmp_path):
    how = dict(data_weights=[1, 2], data_stopping='all_exhausted')
    LoRATrainer(config(tmp_path/'whole', files, **how), quiet=True).train()
    with pytest.raises(RuntimeError, match='power cut'):
        Disturbed(config(tmp_path/'cut', files, **how), quiet=True).train()
    resumed = LoRATrainer(config(tmp_path/'cut', files, **how), quiet=True)
    resumed.train()
    assert adapter(tmp_path/'cut')==adapter(tmp_path/'whole')
    run = Run(tmp_path/'cut')
    assert 'en.jsonl' in str(run) and run.config==resumed.config
    assert len(run.data_report.sources)==2
    assert repeat_run(run, tmp_path/'again', anyway=True).exact
    with pytest.raises(Exception, match='holds another run.*data'):
        LoRATrainer(config(tmp_path/'cut', files, **how | dict(data_weights=[2, 1])), quiet=True).train()
    rows,prompts = probes_of(tmp_path/'cut', tok, n=4)
    assert len(rows)==4 and prompts[0][0]['content']=='en 0?'


def test_a_run_that_goes_on_from_a_mixture_replays_its_rows(files, tmp_path):
    LoRATrainer(config(tmp_path/'first', files, max_steps=2, data_weights=[1, 1]), quiet=True).train()
    more = save_rows(tmp_path/'more.jsonl', [dict(question=f'more {i}?', answer='a') for i in range(20)])
    second = LoRATrainer(config(tmp_path/'second', more, max_steps=2, init_adapter=tmp_path/'first', replay_share=.3),
                         quiet=True)
    second.train()
    assert second.data_report.replayed>0 and len(second.data_report.replay.sources)==2


@pytest.mark.parametrize('kind', ['dpo', 'kto'])
def test_judged_answers_of_several_sources(kind, tmp_path):
    pytest.importorskip('trl')
    a = save_rows(tmp_path/'a.jsonl', [dict(prompt=f'en {i}?', chosen='yes', rejected='no') for i in range(12)])
    b = save_rows(tmp_path/'b.jsonl', [dict(frage=f'fr {i}?', gut='oui', schlecht='non') for i in range(6)])
    other = DataSource(b, columns=dict(frage='prompt', gut='chosen', schlecht='rejected'))
    made = config(tmp_path/'run', [a, other], PreferenceConfig, method=kind, data_weights=[1, 1], max_steps=1,
                  lora=LoRAConfig(r=4, lora_dropout=0.0))
    run = PreferenceTrainer(made, quiet=True)
    run.train()
    assert [s['examples'] for s in run.data_report.sources]==[24, 12] if kind=='kto' else [12, 6]
    assert 'source' not in run.dataset.column_names and len(run.eval_dataset)>0
    plain = TrainingConfig(model_name='sage-tiny', data_path=[a, other], output_dir=tmp_path/'plain')
    assert type(trainer_for(plain, quiet=True)) is PreferenceTrainer

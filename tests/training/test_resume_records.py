"What a run has written down stays, and says of which steps it is"
import hashlib
import json
import time
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file

from quick import command_in_fork, few, two_layers
from sage_finetune.config import LoRAConfig, PreferenceConfig, TrainingConfig
from sage_finetune.core.disk import read_json, SageError, write_json
from sage_finetune.core.display import training_loss_name
from sage_finetune.rows.formats import create_sample_data
from sage_finetune.runs.pipeline import finetune
from sage_finetune.trainer import LoRATrainer, main
from sage_finetune.training.callbacks import read_metrics
from sage_finetune.core.run_folder import RunFolder
from sage_finetune.training.resume import finished_result, load_finished, result_of, TrainingResult


@pytest.fixture(scope='session')
def rows(tmp_path_factory):
    return create_sample_data(tmp_path_factory.mktemp('rows')/'sums.jsonl', 'qa', num_samples=60)


@pytest.fixture
def config(tmp_path, rows):
    return TrainingConfig(model_name=two_layers, data_path=rows, output_dir=tmp_path/'run', test_size=0.1, max_steps=7,
                          save_steps=3, logging_steps=5, per_device_train_batch_size=8, gradient_accumulation_steps=1,
                          learning_rate=5e-3, report_to='none', lora=LoRAConfig(r=4))


def train(config, **how): return LoRATrainer(config, quiet=True).train(**how)


def files(folder): return {p.relative_to(folder): (hashlib.sha256(p.read_bytes()).hexdigest(), p.stat().st_mtime_ns)
                           for p in sorted(folder.rglob('*')) if p.is_file()}


def windows(folder): return [(m['from_step'], m['step']) for m in read_metrics(folder/'metrics.jsonl') if 'loss' in m]


# --- the training loss, and of which steps it is

@pytest.mark.parametrize('more,found', [
    (dict(eval_steps=3), [(1, 1), (2, 3), (4, 5), (6, 6), (7, 7)]), *few([
    (dict(test_size=0.0), [(1, 1), (2, 5), (6, 7)]), (dict(test_size=0.0, logging_steps=100), [(1, 1), (2, 7)]),
    (dict(max_steps=1), [(1, 1)]),
    (dict(test_size=0.0, max_steps=-1, num_train_epochs=1.2, logging_steps=3),
     [(1, 1), (2, 3), (4, 6), (7, 9), (10, 10)])], 0)])
def test_every_step_is_in_a_window(config, more, found):
    config = config.replace(**more)
    result = train(config)
    assert windows(config.output_dir)==found and tuple(result.train_steps)==found[-1]
    assert result.steps==found[-1][1]==read_json(config.output_dir/'results.json')['train_steps'][1]


def test_a_held_out_loss_stands_beside_the_training_loss_of_its_step(config):
    result = train(config.replace(eval_steps=2, logging_steps=50, load_best_model_at_end=True))
    log = read_metrics(config.output_dir/'metrics.jsonl')
    held,trained = ({m['step'] for m in log if k in m and m['step']} for k in ('eval_loss', 'loss'))
    assert held<=trained and held=={2, 4, 6, 7}
    assert result.loss_after_step==result.best_step==result.train_steps[1]
    at = {m['step']: m['loss'] for m in log if 'loss' in m}
    assert result.train_loss==at[result.best_step]


def test_a_run_that_stops_early_logs_its_last_steps(config):
    from sage_finetune.model import adapter
    result = train(config.replace(eval_steps=1, early_stopping_patience=1, max_steps=40, learning_rate=1.0,
                                  logging_steps=50))
    assert result.steps<40 and windows(config.output_dir)[-1][1]==result.steps==result.train_steps[1]
    assert adapter.best_evaluation(read_metrics(config.output_dir/'metrics.jsonl'))[0]<result.steps


def test_windows_are_the_same_where_a_run_was_killed(config):
    from transformers import TrainerCallback
    class Cut(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step==4: raise RuntimeError('power cut')
    class Unlucky(LoRATrainer):
        def callbacks(self): return [*super().callbacks(), Cut()]
    with pytest.raises(RuntimeError, match='power cut'): Unlucky(config, quiet=True).train()
    once,again = train(config.replace(output_dir=config.output_dir.with_name('peace'))),train(config)
    figures = lambda f: [{k: m.get(k) for k in ('step', 'from_step', 'loss', 'eval_loss')}
                         for m in read_metrics(f/'metrics.jsonl')]
    assert figures(config.output_dir)==figures(config.output_dir.with_name('peace'))
    assert once.train_loss==again.train_loss


def test_names_of_training_losses():
    assert training_loss_name([7, 7])=='training loss, step 7' and training_loss_name(None)=='last training loss'
    old = TrainingResult(5, 3.0, 2.0, 1.0, 1.0)
    assert 'last training loss' in str(old)
    best = TrainingResult(50, 3.0, 2.0, 1.0, 1.0, 20, train_steps=[11, 20], loss_after_step=20)
    assert 'training loss, steps 11 to 20' in str(best) and 'held-out loss, step 20' in str(best)


def test_the_training_loss_of_a_result_is_that_of_the_adapter_that_is_kept():
    log = [dict(step=1, loss=3.0, from_step=1), dict(step=4, loss=2.0, from_step=2), dict(step=4, eval_loss=2.5),
           dict(step=7, loss=1.0, from_step=5), dict(step=7, eval_loss=2.7)]
    trainer = SimpleNamespace(state=SimpleNamespace(log_history=log, global_step=7), eval_dataset=[1],
                              skipped_steps=lambda: 0, first_logs={})
    best,last = (result_of(trainer, at, (9.0, None), None, 1.0) for at in (4, None))
    assert (best.loss_after, best.loss_after_step, best.train_loss, best.train_steps)==(2.5, 4, 2.0, [2, 4])
    assert (last.loss_after, last.loss_after_step, last.train_loss, last.train_steps)==(2.7, 7, 1.0, [5, 7])
    log[:] = [dict(step=7, loss=1.0)] # of an older version
    trainer.eval_dataset = None
    old = result_of(trainer, None, (None, None), None, 1.0)
    assert (old.train_loss, old.train_steps, old.loss_after_step)==(1.0, None, None)


# --- a finished run

def ways(config):
    settings = config.output_dir.with_name('settings.json')
    if not settings.exists(): config.save(settings)
    return dict(python=lambda: train(config), pipeline=lambda: finetune(config),
                cli=lambda: command_in_fork(['run', settings], config.output_dir.parent),
                json=lambda: command_in_fork(['run', settings, '--json'], config.output_dir.parent))


@pytest.mark.parametrize('more', few([
    dict(eval_steps=2, load_best_model_at_end=True), dict(lora=LoRAConfig(r=4, init_lora_weights='pissa')), dict(),
    dict(report_to='tensorboard'), dict(packing=True, max_length=64)]))
def test_running_a_finished_run_again_changes_no_file(config, more):
    config = config.replace(**more)
    first = LoRATrainer(config, quiet=True)
    result = first.train()
    before = files(config.output_dir)
    assert len(before)>10
    for name,way in ways(config).items() if not more else ():
        again = way()
        assert files(config.output_dir)==before, name
        if name in ('cli', 'json'): assert again.returncode==0, again.stderr
    second = LoRATrainer(config, quiet=True)
    assert second.train()==result and second.train()==result
    tensors = {n: p.detach() for n,p in first.model.named_parameters() if p.requires_grad}
    assert all((p==tensors[n]).all() for n,p in second.model.named_parameters() if p.requires_grad)
    assert files(config.output_dir)==before


def test_a_finished_run_with_replay_rows_and_a_parent(config, rows):
    parent = config.replace(output_dir=config.output_dir.with_name('parent'))
    train(parent)
    config = config.replace(init_adapter=parent.output_dir, replay_share=0.2)
    result,before = train(config),files(config.output_dir)
    assert result.earlier_after is not None and train(config)==result and files(config.output_dir)==before


def test_a_finished_run_of_preferences(tmp_path):
    pytest.importorskip('trl')
    from sage_finetune.preference import PreferenceTrainer
    data = tmp_path/'judged.json'
    write_json(data, [dict(prompt=f'What is {i} plus 1?', chosen=f'It is {i+1}.', rejected='No.') for i in range(24)])
    config = PreferenceConfig(model_name=two_layers, data_path=data, output_dir=tmp_path/'run', max_steps=3,
                              test_size=0.2, per_device_train_batch_size=4, gradient_accumulation_steps=1,
                              report_to='none')
    result = PreferenceTrainer(config, quiet=True).train()
    before = files(config.output_dir)
    assert PreferenceTrainer(config, quiet=True).train()==result and files(config.output_dir)==before
    assert result.train_steps==[2, 3] and result.margin_after is not None


def test_a_finished_run_is_not_trained_anew_where_its_checkpoints_are_gone(config):
    import shutil
    result = train(config)
    shutil.rmtree(config.output_dir/'checkpoints')
    before,said = files(config.output_dir),[]
    run = LoRATrainer(config)
    run.watcher = type('W', (), dict(heard=lambda self, what: said.append(str(what)), callbacks=lambda self: []))()
    assert run.train()==result and files(config.output_dir)==before and run.model is None
    assert any('Its last checkpoint is gone' in line and 'Run(' in line for line in said)
    assert load_finished(None, config, RunFolder(config.output_dir), said.append) is False


@pytest.mark.parametrize('name', few(['adapter_model.safetensors', 'adapter_config.json', 'tokenizer.json']))
def test_a_changed_adapter_is_told_and_written_again_from_the_last_checkpoint(config, name):
    result = train(config)
    adapter = config.output_dir/'lora_weights'
    before = (adapter/'adapter_model.safetensors').read_bytes()
    data = (adapter/name).read_bytes()
    (adapter/name).write_bytes(data[:40]+bytes([data[40]^1])+data[41:])
    with pytest.warns(UserWarning, match=f'lora_weights: its file {name} has changed since it was written'):
        again = train(config)
    assert (again.loss_after, again.steps)==(result.loss_after, result.steps)
    assert (adapter/'adapter_model.safetensors').read_bytes()==before and (adapter/name).read_bytes()==data


def test_a_run_whose_results_were_not_written_is_finished_by_the_next_command(config):
    result = train(config)
    (config.output_dir/'results.json').unlink()
    again = train(config)
    losses = lambda r: (r.loss_after, r.train_loss, r.train_steps)
    assert losses(again)==losses(result)
    assert finished_result(LoRATrainer(config, quiet=True).folder, TrainingResult)==again


def test_it_can_still_be_begun_anew(config):
    train(config)
    before = files(config.output_dir)
    time.sleep(.01)
    train(config, fresh=True)
    after = files(config.output_dir)
    assert after.keys()==before.keys() and all(after[p][1]>before[p][1] for p in after)


# --- other settings for a finished run

@pytest.mark.parametrize('more', few([dict(max_steps=-1, num_train_epochs=4), dict(max_steps=9),
                                      dict(learning_rate=1e-3)]))
def test_more_for_a_finished_run_names_the_way_which_is_one(config, more):
    train(config)
    before = files(config.output_dir)
    for form in (lambda c: train(c), lambda c: finetune(c)):
        with pytest.raises(SageError, match='holds another run .* `output_dir`, there with `init_adapter="(.*)"`') as e:
            form(config.replace(**more))
    assert files(config.output_dir)==before
    parent = str(e.value).partition('init_adapter="')[2].partition('"')[0]
    further = config.replace(**more | dict(max_steps=2), init_adapter=parent,
                             output_dir=config.output_dir.with_name('further'))
    done = read_json(config.output_dir/'results.json')
    assert train(further).loss_before==pytest.approx(done['loss_after'], abs=1e-4)
    settings = config.output_dir.with_name('more.json')
    config.replace(**more).save(settings)
    told = command_in_fork(['run', settings], config.output_dir.parent)
    assert told.returncode==1 and 'init_adapter=' in told.stderr and '--fresh' in told.stderr
    assert load_file(config.lora_dir/'adapter_model.safetensors') and json.loads(settings.read_text())


def test_without_an_adapter_there_is_no_such_way(config):
    (config.output_dir/'checkpoints').mkdir(parents=True)
    train(config)
    import shutil
    shutil.rmtree(config.output_dir/'lora_weights')
    with pytest.raises(SageError, match='holds another run') as e: train(config.replace(max_steps=9))
    assert 'init_adapter' not in str(e.value)


def test_main_of_the_trainer_leaves_a_finished_run_alone(tmp_path, config):
    from sage_finetune.core.run_folder import write_meta
    write_meta(tmp_path/'run', two_layers, config.data_path, config=config.replace(output_dir=tmp_path/'run'))
    assert main([str(tmp_path/'run')])==0
    before = files(tmp_path/'run')
    assert main([str(tmp_path/'run')])==0 and files(tmp_path/'run')==before

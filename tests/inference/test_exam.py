"A run that is asked while it learns: the same bits, resumed, chosen by its score, by every way to start"
import pytest

from quick import two_layers
from sage_finetune.config import PreferenceConfig, TrainingConfig
from sage_finetune.core.disk import SageError
from sage_finetune.data import save_rows
from sage_finetune.inference.exam import exam_check, read_exams
from sage_finetune.preference import PreferenceTrainer
from sage_finetune.runs.pipeline import finetune
from sage_finetune.trainer import LoRATrainer
from sage_finetune.training.callbacks import read_metrics
from sage_finetune.training.loop import Stopped


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp('exam')
    save_rows(folder/'rows.jsonl', [dict(question=f'What is {i} plus 1?', answer=f'It is {i+1}.') for i in range(24)])
    save_rows(folder/'exam.jsonl', [dict(question=f'{i} plus 1?', number=i+1) for i in range(3)])
    return folder


def config(place, name, **more):
    plain = dict(model_name=two_layers, data_path=place/'rows.jsonl', output_dir=place/name, max_steps=4, eval_steps=2,
                 save_steps=2, test_size=.2, per_device_train_batch_size=4, gradient_accumulation_steps=1,
                 learning_rate=5e-3, report_to='none', exam_path=place/'exam.jsonl', exam_tokens=4)
    return TrainingConfig(**plain | more)


def weights(config): return (config.lora_dir/'adapter_model.safetensors').read_bytes()


@pytest.fixture(scope='module')
def watched(place):
    run = LoRATrainer(config(place, 'watched'), quiet=True)
    return run,run.train()


def test_a_run_learns_the_same_with_and_without_an_exam(place, watched):
    plain = config(place, 'plain', exam_path=None)
    LoRATrainer(plain, quiet=True).train()
    assert weights(plain)==weights(watched[0].config)


def test_scores_and_answers_are_written_down(watched):
    run,result = watched
    logged = {m['step']: m for m in read_metrics(run.folder.metrics) if 'exam' in m}
    assert [*logged]==[0, 2, 4] and result.exam_after==logged[4]['exam'] and result.exam_before==logged[0]['exam']
    assert all(m['exam_low']<=m['exam']<=m['exam_high'] for m in logged.values())
    said = read_exams(run.folder.path)
    assert [q['step'] for q in said]==[0]*3+[2]*3+[4]*3
    assert {q['expected'] for q in said}=={f'number {i}' for i in (1, 2, 3)}


def test_a_stopped_run_goes_on_with_its_exam(place, watched):
    run = LoRATrainer(config(place, 'stopped'), quiet=True)
    class Heard:
        def heard(self, what): pass
        def callbacks(self):
            from transformers import TrainerCallback
            class At(TrainerCallback):
                def on_step_end(self, args, state, control, **kwargs):
                    if state.global_step==3: run.stop()
            return [At()]
    run.watcher = Heard()
    with pytest.raises(Stopped): run.train()
    again = LoRATrainer(config(place, 'stopped'), quiet=True)
    result = again.train()
    assert weights(again.config)==weights(watched[0].config)
    assert vars(result)|dict(seconds=0)==vars(watched[1])|dict(seconds=0)
    assert read_exams(again.folder.path)==read_exams(watched[0].folder.path)


def test_other_questions_are_another_run(place, watched):
    other = save_rows(place/'other.jsonl', [dict(question='1?', number=1)])
    with pytest.raises(SageError, match='the questions of the exam: '):
        LoRATrainer(config(place, 'watched', exam_path=other), quiet=True).train()


def test_a_moved_file_with_the_same_questions_is_the_same_run(place, watched):
    (place/'moved.jsonl').write_bytes((place/'exam.jsonl').read_bytes())
    result = LoRATrainer(config(place, 'watched', exam_path=place/'moved.jsonl'), quiet=True).train()
    assert result.exam_after==watched[1].exam_after


def test_the_exam_chooses(place):
    scores = iter([0, 0, 1, 0, 0, 0, 0, 0, 0]) # before the first step, then at steps 1, 2, 3 …
    asked = []
    def second(answer, row):
        if not asked or asked[-1]!=row: asked.append(row)
        return next(scores)
    exam_check(second, 'second')
    file = save_rows(place/'chosen.jsonl', [dict(question='q?', function='second')])
    c = config(place, 'chosen', exam_path=file, eval_steps=1, max_steps=8, best_by='exam', load_best_model_at_end=True,
               early_stopping_patience=2)
    result = LoRATrainer(c, quiet=True).train()
    assert (result.steps, result.best_step, result.exam_after)==(4, 2, 1.0)


def test_a_function_that_fails_stops_no_run(place):
    exam_check(lambda answer, row: 1/0, 'broken')
    file = save_rows(place/'broken.jsonl', [dict(question='q?', function='broken')])
    heard = []
    class Loud(LoRATrainer):
        def say(self, what): heard.append(str(what))
    result = Loud(config(place, 'broken', exam_path=file, max_steps=1), quiet=True).train()
    assert result.exam_after==0 and any('broken.jsonl:1: ZeroDivisionError' in h for h in heard)


def test_a_bad_exam_is_refused_before_the_model_is_loaded(place, monkeypatch):
    file = save_rows(place/'bad.jsonl', [dict(question='q?', regex='(')])
    run = LoRATrainer(config(place, 'bad', exam_path=file), quiet=True)
    monkeypatch.setattr(run, 'load_model', lambda *a: pytest.fail('the model was loaded'))
    with pytest.raises(ValueError, match='bad.jsonl:1: `regex` is no pattern'): run.train()


def test_every_way_to_start_honours_it(place):
    found = finetune(config(place, 'by_call', exam_general=True, max_steps=1).to_dict())
    assert found.exam_after is not None and found.general_after is not None
    assert {q['exam'] for q in read_exams(place/'by_call')}=={'exam', 'general'}


@pytest.mark.slow
def test_preferences_honour_it(place):
    save_rows(place/'judged.jsonl', [dict(prompt=f'{i}?', chosen=f'It is {i}.', rejected='No.') for i in range(12)])
    c = PreferenceConfig(**{k: v for k,v in config(place, 'judged').to_dict().items() if not k.startswith('_')} | dict(
        data_path=place/'judged.jsonl', method='orpo', max_steps=1, eval_steps=1))
    assert PreferenceTrainer(c, quiet=True).train().exam_after is not None

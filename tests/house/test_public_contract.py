"The names, values and files that users of the earlier module rely on, from a plain Python file"
import json
import subprocess
import sys
from pathlib import Path

import pytest

from quick import forked, run_in_fork

script = '''
from sage_finetune import (LoRATrainer, TrainingConfig, LoRAConfig, PresetConfigs, prepare_dataset, load_training_data,
                           train_from_meta)
from sage_finetune.trainer import LoRATrainer as same, train_from_meta as same_function
from sage_finetune.data import (create_sample_data, detect_data_format, encode, format_alpaca_sample,
                                format_conversation_sample, format_qa_sample, to_messages)
import datasets, sys
assert same is LoRATrainer and same_function is train_from_meta

class Mine(LoRATrainer):
    def prepare_data(self):
        talk = to_messages({"question": "One?", "answer": "Two."})
        self.dataset = datasets.Dataset.from_list([encode(talk, self.tokenizer)]*4)

folder = sys.argv[1]
config = TrainingConfig(model_name="sage-tiny", output_dir=folder, max_steps=2, gradient_accumulation_steps=1)
trainer = Mine(config, quiet=True)
assert trainer.config is config and trainer.model is trainer.tokenizer is trainer.dataset is trainer.trainer is None
trainer.load_model_and_tokenizer()
trainer.apply_lora()
trainer.prepare_data()
trainer.setup_trainer()
trainer.train()
trainer.save_model()
assert len(trainer.dataset) == 4 and trainer.trainer.state.global_step == 2
'''


@pytest.fixture(scope='module')
def plain_run(tmp_path_factory):
    "What the script came to, and its run folder"
    folder = tmp_path_factory.mktemp('plain')
    (folder/'mine.py').write_text(script)
    words = [sys.executable, 'mine.py', str(folder/'run')]
    done = (run_in_fork(words, cwd=folder) if forked else
            subprocess.run(words, cwd=folder, capture_output=True, text=True))
    return done,folder/'run'


def test_the_python_names_work_from_a_plain_file(plain_run):
    done,run = plain_run
    assert done.returncode == 0, done.stderr
    assert (run/'lora_weights'/'adapter_model.safetensors').is_file()
    assert (run/'lora_weights'/'training_config.json').is_file()


def test_a_folder_with_two_keys_trains_by_module_name(tmp_path):
    (tmp_path/'rows.json').write_text(json.dumps([{'instruction': f'Count {i}.', 'output': f'{i}'} for i in range(12)]))
    (tmp_path/'finetune_meta.json').write_text(json.dumps(dict(model='sage-tiny', dataset='rows.json')))
    words = [sys.executable, '-m', 'sage_finetune.trainer', str(tmp_path)]
    done = run_in_fork(words) if forked else subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path/'data_report.json').read_text())
    assert (report['read'], report['used'], report['dropped']) == (12, 12, [])
    assert (tmp_path/'lora_weights'/'adapter_model.safetensors').is_file()


def test_only_safetensors_are_written_for_weights(plain_run):
    done,run = plain_run
    assert done.returncode == 0, done.stderr
    unsafe = [p for p in (run/'lora_weights').rglob('*') if p.suffix in ('.bin', '.pt', '.pth', '.pkl')]
    assert unsafe == []


rows = Path(__file__).resolve().parents[3]/'shared'/'data'


@pytest.mark.skipif(not rows.is_dir(), reason='the folder of real rows (../shared/data) is not here')
@pytest.mark.parametrize('name,number',
                         [('gsm8k_test.jsonl', 1319), ('alpaca_en_demo.json', 999), ('identity.json', 91)])
def test_real_rows_learn_exactly_the_answers(name, number):
    from transformers import AutoTokenizer
    from sage_finetune.config import resolve_model
    from sage_finetune.data import DataReport, load_training_data, prepare_dataset, to_messages
    tokenizer,report = AutoTokenizer.from_pretrained(resolve_model('sage-tiny')),DataReport()
    dataset = prepare_dataset(rows/name, tokenizer, max_length=2048, report=report)
    assert (report.read, report.used, len(dataset)) == (number, number, number)
    for example,row in zip(dataset, load_training_data(rows/name)):
        learned = tokenizer.decode([t for t in example['labels'] if t != -100])
        assert learned == to_messages(row)[-1]['content'] + '<|im_end|>'

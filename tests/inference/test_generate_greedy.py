"At temperature 0 an answer is made of the likeliest tokens, whatever a model's generation settings ask for"
import json
import shutil
import warnings
from pathlib import Path
from queue import Queue

import pytest
import torch
from transformers import GenerationConfig

from quick import few, two_layers
from sage_finetune.config import LoRAConfig, TrainingConfig
from sage_finetune.core.disk import read_json
from sage_finetune.core.run_folder import RunFolder
from sage_finetune.serving.chat_api import Engine
from sage_finetune.inference.generate import answers, encode_question, load_plain, stream_answer
from sage_finetune.inference.merging import merge_run
from sage_finetune.serving.request import ChatRequest
from sage_finetune.serving.serve import Served, transformers_command, vllm_command
from sage_finetune.model.adapter import add_lora
from sage_finetune.model.contract import stop_ids
from sage_finetune.base.loading import (drawing_settings, ending_settings, generate_settings, load_model,
                                         load_tokenizer, put_aside, put_aside_notes)
from sage_finetune.training.resume import save_run

QUESTION = 'What is 2 plus 3?'

# A value for each setting that would change an answer, its length or its type, or that no model here can follow
hostile = dict(
    max_length=3, max_new_tokens=2, min_length=60, min_new_tokens=60, early_stopping='never', max_time=1e-6,
    stop_strings=['a', 'e', 'the'], do_sample=True, num_beams=3, use_mtp=True, use_cache=False,
    cache_implementation='static', cache_config=dict(nbits=2), max_cache_len=9, temperature=3.0, top_k=7, top_p=0.2,
    min_p=0.5, top_h=0.3, typical_p=0.2, epsilon_cutoff=0.3, eta_cutoff=0.3, repetition_penalty=9.0,
    encoder_repetition_penalty=9.0, length_penalty=-9.0, no_repeat_ngram_size=1, bad_words_ids=[[300], [17, 18]],
    renormalize_logits=True, forced_bos_token_id=300, forced_eos_token_id=300, remove_invalid_values=True,
    exponential_decay_length_penalty=(1, 9.0), suppress_tokens=[*range(3, 2000)],
    begin_suppress_tokens=[*range(3, 2000)],
    sequence_bias=[[[300], 50.0]], token_healing=True, guidance_scale=3.0,
    watermarking_config=dict(greenlist_ratio=0.1, bias=20.0), num_return_sequences=2, output_attentions=True,
    output_hidden_states=True, output_scores=True, output_logits=True, return_dict_in_generate=True,
    encoder_no_repeat_ngram_size=2, is_assistant=True, num_assistant_tokens=3,
    num_assistant_tokens_schedule='heuristic', assistant_confidence_threshold=0.9, prompt_lookup_num_tokens=3,
    max_matching_ngram_size=2, assistant_early_exit=1, assistant_lookbehind=1, target_lookbehind=1,
    assistant_ensemble_weight=0.5, speculation_type='dflash', compile_config=dict(dynamic=True), disable_compile=True,
    continuous_batching_config=None, low_memory=True, penalty_alpha=0.6, dola_layers='high', diversity_penalty=0.5,
    num_beam_groups=2, constraints=['x'], force_words_ids=[[300]], prefill_chunk_size=2, own_of_a_company=[1, 2])
together = dict(contrastive=dict(penalty_alpha=0.6, top_k=4), groups=dict(num_beams=4, num_beam_groups=2,
                diversity_penalty=1.0), drawn_beams=dict(num_beams=3, do_sample=True), several=dict(
                num_return_sequences=2, do_sample=True), lengths=dict(max_length=30, min_length=25))
often = ('max_length max_new_tokens min_new_tokens stop_strings do_sample num_beams use_cache temperature top_k top_p '
         'repetition_penalty no_repeat_ngram_size bad_words_ids forced_eos_token_id suppress_tokens sequence_bias '
         'guidance_scale num_return_sequences own_of_a_company').split()
# what says nothing about how tokens are chosen
left_open = {*ending_settings}


def test_each_setting_of_the_installed_library_is_tried():
    "A new one fails here until somebody has thought about it"
    fields = {k for k in vars(GenerationConfig()) if not k.startswith('_') and k!='transformers_version'}
    assert fields-{*hostile}-left_open==set()
    assert {*drawing_settings, *ending_settings}<=fields
    with_it = generate_settings(load_model(two_layers))
    assert fields-left_open-{'max_new_tokens'}=={*with_it}


@pytest.fixture(scope='module')
def plain():
    model,tok = load_plain(two_layers)
    return model,tok,likeliest(model, tok)


@torch.no_grad()
def likeliest(model, tok, most=12):
    "The likeliest token, then the likeliest after it, without `generate`"
    ids,stops,out = encode_question(QUESTION, tok)[0],stop_ids(model, tok),[]
    while len(out)<most:
        out.append(model(input_ids=torch.tensor([ids+out])).logits[0, -1].argmax().item())
        if out[-1] in stops: break
    return tok.decode([t for t in out if t not in stops], skip_special_tokens=True)


def served(model, tok):
    engine,pieces = Engine(model, tok),Queue()
    engine.start(ChatRequest([dict(role='user', content=QUESTION)], 12, 0.0), pieces.put)
    found = [pieces.get()]
    while isinstance(found[-1], (int, str)): found.append(pieces.get())
    engine.close()
    return getattr(found[-1], 'text', found[-1])


def asked(folder, **settings):
    "A base whose generation settings ask for something"
    shutil.copytree(two_layers, folder)
    file = folder/'generation_config.json'
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    return folder


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('name', [*few(sorted(hostile, key=lambda n: n not in often), len(often)), *few(together, 2)])
def test_the_likeliest_token_whatever_a_model_brings(tmp_path, plain, name):
    settings = together.get(name) or {name: hostile[name]}
    model,tok = load_plain(asked(tmp_path/'base', **settings))
    assert answers(model, tok, [QUESTION]*2, 12)[1].text==plain[2]
    assert ''.join(stream_answer(model, tok, [dict(role='user', content=QUESTION)], 12))==plain[2]
    assert served(model, tok)==plain[2]


@pytest.mark.filterwarnings('ignore')
def test_all_of_them_at_once_and_in_a_config_of_old(tmp_path, plain):
    every = {k: v for k,v in hostile.items() if k not in ('cache_implementation', 'use_cache', 'min_length')}
    model,tok = load_plain(asked(tmp_path/'base', **every))
    assert answers(model, tok, [QUESTION], 12)[0].text==plain[2]
    old = asked(tmp_path/'old')
    (old/'generation_config.json').unlink()
    config = json.loads((old/'config.json').read_text())
    (old/'config.json').write_text(json.dumps(config | dict(repetition_penalty=9.0, num_beams=3, min_length=60)))
    assert answers(*load_plain(old), [QUESTION], 12)[0].text==plain[2]


def test_a_draw_follows_the_model_in_what_it_is_drawn_from_and_in_nothing_else(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        model,_ = load_plain(asked(tmp_path/'base', do_sample=True, top_k=5, min_p=0.1, repetition_penalty=2.0,
                                   num_beams=3))
    given = generate_settings(model, 0.7, 0.9)
    assert {k: given[k] for k in drawing_settings if given[k] is not None}==dict(
        do_sample=True, temperature=0.7, top_k=5, top_p=0.9, min_p=0.1)
    assert (given['repetition_penalty'], given['num_beams'])==(1.0, 1)


def test_what_is_put_aside_is_told_and_no_tuned_or_merged_model_gets_it(tmp_path):
    base = asked(tmp_path/'base', do_sample=True, temperature=0.6, repetition_penalty=1.3, bad_words_ids=[[300]],
                 suppress_tokens=[*range(3, 400)])
    tok,model = load_tokenizer(str(base)),load_model(str(base))
    assert {*put_aside(model)}=={'repetition_penalty', 'bad_words_ids', 'suppress_tokens'}
    note, = put_aside_notes(model)
    assert 'repetition_penalty=1.3' in note and len(note)<200
    adapted = add_lora(model, LoRAConfig(r=4))
    run = RunFolder(tmp_path/'run')
    config = TrainingConfig(model_name=str(base), load_in_8bit=False, fp16=False)
    save_run(run, adapted, tok, config.to_dict())
    config.save(run.config)
    with pytest.warns(UserWarning, match='put aside: .*repetition_penalty=1.3'):
        report = merge_run(run.path, rows=2)
        load_plain(str(base))
    assert any('repetition_penalty=1.3' in n for n in report.notes)
    for folder in (run.lora_weights, Path(report.path)):
        settings = read_json(folder/'generation_config.json')
        assert settings['temperature']==0.6
        assert not {'repetition_penalty', 'bad_words_ids', 'suppress_tokens'} & {*settings}
    assert read_json(run.lora_weights/'contract.json')['put_aside']['repetition_penalty']=='1.3'


def test_servers_of_others_are_told_to_be_greedy_and_what_they_cannot_leave_out(tmp_path):
    folder = asked(tmp_path/'model', max_new_tokens=5, temperature=0.9, do_sample=True)
    served_ = Served('m', folder, None, tmp_path/'log')
    command = vllm_command(served_, '127.0.0.1', 8000)
    told = json.loads(command[command.index('--override-generation-config')+1])
    assert told['temperature']==0.0 and told['repetition_penalty']==1.0 and told['max_new_tokens'] is None
    assert transformers_command(served_, '127.0.0.1', 8000)[2]==str(folder)

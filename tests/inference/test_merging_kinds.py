"""Every kind of adapter, trained by the trainer itself, in every way out: chat, merge (proved in memory, and weight by
weight) and export, each held against the model that was trained, in memory
"""
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from sage_finetune.config import LoRAConfig, SageError, TrainingConfig
from sage_finetune.inference import merging
from sage_finetune.serving.export import export_folder
from sage_finetune.inference.generate import load_adapter, load_for_chat, load_plain
from sage_finetune.merge_chat import merge_run
from sage_finetune.model.contract import (answered, read_witness, witness_bound, witness_bounds, witness_difference,
                                          witness_of, witness_rows)
from sage_finetune.base.loading import load_tokenizer
from sage_finetune.rows.formats import create_sample_data
from sage_finetune.trainer import LoRATrainer

pytestmark = pytest.mark.slow

small = dict(vocab_size=4096, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=512, initializer_range=.1, pad_token_id=0)
head = dict(target_modules=['q_proj', 'lm_head'])
kinds = dict(plain={}, rslora=dict(use_rslora=True), dora=dict(use_dora=True),
             gaussian=dict(init_lora_weights='gaussian'), pissa=dict(init_lora_weights='pissa'),
             pissa_quick=dict(init_lora_weights='pissa_niter_4'),
             pissa_dora=dict(init_lora_weights='pissa', use_dora=True), olora=dict(init_lora_weights='olora'),
             orthogonal=dict(init_lora_weights='orthogonal'), bias_all=dict(bias='all'),
             bias_own=dict(bias='lora_only'), all_linear=dict(target_modules='all-linear'), head=head,
             head_dora=head | dict(use_dora=True), head_pissa=head | dict(init_lora_weights='pissa'),
             head_olora=head | dict(init_lora_weights='olora'),
             embedding=dict(target_modules=['embed_tokens', 'v_proj']))
cases = [*((k, 'qwen2', tied, None) for k in kinds for tied in (False, True)),
         *((k, 'mixtral', False, None) for k in ('plain', 'rslora', 'all_linear', 'dora', 'pissa')),
         *((k, 'qwen2', True, bits) for k in ('plain', 'rslora', 'dora', 'all_linear', 'bias_own') for bits in (8, 4))]
ways = 'chat', 'merged', 'streamed', 'exported', 'adapter'


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    "The bases, and rows to train on"
    folder = tmp_path_factory.mktemp('made')
    for kind,tied in (('qwen2', False), ('qwen2', True), ('mixtral', False)):
        torch.manual_seed(0)
        more = dict(num_local_experts=4) if kind=='mixtral' else {}
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **small, tie_word_embeddings=tied, **more))
        for p in model.parameters(): p.data += .05*torch.randn_like(p)
        model.save_pretrained(folder/f'{kind}{tied}')
        load_tokenizer('sage-tiny').save_pretrained(folder/f'{kind}{tied}')
    create_sample_data(folder/'sums.jsonl', 'qa', num_samples=48)
    return folder


@pytest.fixture(scope='module')
def table():
    rows = []
    yield rows
    print(f'\n{"difference, nats a token":34}'+''.join(f'{w:>11}' for w in ways),
          f'{"bound":>8}{"of chat":>9}{"effect":>9}')
    for name,found,bound,effect in rows:
        if isinstance(found, str): print(f'{name:34}  refused: {found[:110]}')
        else: print(f'{name:34}'+''.join(f'{found[w]:11.1e}' for w in ways)+f'{bound["merged"]:9.0e}'
                    f'{bound["chat"]:9.0e}{effect:9.2f}')


def train(made, folder, base, lora, bits=None, **more):
    "A run of six steps; the run, whose model is still in memory"
    asked = LoRAConfig(**dict(r=8, lora_dropout=0.0) | lora)
    run = LoRATrainer(TrainingConfig(
        model_name=str(base), data_path=made/'sums.jsonl', output_dir=folder, max_steps=6, save_steps=3,
        per_device_train_batch_size=8, gradient_accumulation_steps=1, learning_rate=2e-2, warmup_ratio=0.0,
        test_size=0.0, report_to='none', load_in_8bit=bits==8, load_in_4bit=bits==4, fp16=False, lora=asked,
        **more), quiet=True)
    run.train()
    return run


def ways_out(run, base, monkeypatch):
    "How far each way out is from the model in memory; the bound, and what training changed"
    folder,rows = run.folder.path,witness_rows(run.tokenizer, small['vocab_size'])
    rows += [[(7*i+3*k)%4000+5 for i in range(60)] for k in range(8)] # what the witness does not ask
    trained,off = answered(run.model.eval(), rows),{}
    compare = lambda model: witness_difference(trained, answered(model, rows))
    off['chat'] = compare(load_for_chat(folder, adapter=True)[0])
    report = merge_run(folder)
    off['merged'] = compare(load_plain(folder/'merged_model')[0])
    monkeypatch.setattr(merging, 'stream_above', 0)
    how = merge_run(folder, folder/'streamed').compared
    assert how==('greedy answers' if 'mixtral' in str(base) else 'next tokens') # its experts are not stored one by one
    off['streamed'] = compare(load_plain(folder/'streamed')[0])
    off['exported'] = compare(load_plain(export_folder(folder, folder/'out'))[0])
    adapter = export_folder(folder, folder/'out_adapter', kind='adapter', base='someone/base')
    off['adapter'] = compare(load_adapter(adapter, base=str(base))[0])
    plain,then = load_plain(str(base))[0],read_witness(folder/'lora_weights')
    rounded = witness_bound(then, witness_of(plain, rows=then['rows'], base=True)) # chat rounds no base
    return off,dict.fromkeys(ways, report.witness_bound) | dict(chat=rounded, adapter=rounded),compare(plain)


@pytest.mark.parametrize('name,kind,tied,bits', cases, ids=['-'.join(map(str, c)) for c in cases])
def test_every_way_out_is_the_trained_model(made, tmp_path, table, monkeypatch, name, kind, tied, bits):
    base,shown = made/f'{kind}{tied}',f'{name}, {kind}{", tied" if tied else ""}{f", {bits} bits" if bits else ""}'
    try: run = train(made, tmp_path/'run', base, kinds[name], bits)
    except (SageError, ValueError) as e:
        assert not (tmp_path/'run'/'metrics.jsonl').exists() and not (tmp_path/'run'/'checkpoints').exists()
        table.append((shown, ' '.join(str(e).split()), None, None))
        return
    off,bound,effect = ways_out(run, base, monkeypatch)
    table.append((shown, off, bound, effect))
    assert effect>20*witness_bounds['float32'] # a difference would be seen
    assert all(off[w]<=bound[w] for w in ways), (off, bound)


def test_a_stacked_adapter_is_the_trained_model(made, tmp_path, table, monkeypatch):
    base = made/'qwen2True'
    train(made, tmp_path/'first', base, {})
    run = train(made, tmp_path/'second', base, {}, init_adapter=tmp_path/'first', stack_adapter=True)
    off,bound,effect = ways_out(run, base, monkeypatch)
    table.append(('stacked, qwen2, tied', off, bound, effect))
    assert all(off[w]<=bound[w] for w in ways) and effect>20*bound['merged'], off

"Packing: every model is judged by what it does, no document is lost or cut, and files appear whole or not at all"
import copy

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

from sage_finetune.core.display import share_text
from sage_finetune.training.batches import Collator
from sage_finetune.training.packing import best_fit, check_packing, pack_dataset, packing_leak, PackingReport
from sage_finetune.config import SageError
from sage_finetune.base.loading import load_model

small = dict(vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2,
             max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=2)
gpt = dict(vocab_size=128, n_embd=32, n_layer=2, n_head=4, n_positions=256)
mamba = dict(mamba_n_heads=8, mamba_d_head=8, mamba_n_groups=1, mamba_d_state=8, mamba_chunk_size=8)
linear = dict(num_hidden_layers=4, head_dim=8, linear_num_key_heads=2, linear_num_value_heads=4,
              linear_key_head_dim=8, linear_value_head_dim=8)
experts = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)

apart = dict(
    qwen2=small, qwen3=small | dict(head_dim=8), qwen3_moe=small | experts | dict(head_dim=8), llama=small,
    mistral=small | dict(sliding_window=6), mixtral=small | dict(num_local_experts=4),
    phi=small, phi3=small, gemma=small | dict(head_dim=8), gemma2=small | dict(head_dim=8, sliding_window=6),
    gemma3_text=small | dict(head_dim=8, sliding_window=6, num_hidden_layers=6),
    gpt2=gpt, gpt_neox=small, starcoder2=small, stablelm=small, olmo2=small, smollm3=small, cohere=small,
    granite=small, glm4=small | dict(head_dim=8))

leaking = dict( # model → what the refusal says of its layers in transformers 5.23
    mamba=(dict(vocab_size=128, hidden_size=32, num_hidden_layers=2, state_size=8), '2 of 2 layers: linear_attention'),
    mamba2=(dict(vocab_size=128, hidden_size=32, num_hidden_layers=2, state_size=8, num_heads=8, head_dim=8,
                 n_groups=1, chunk_size=8), '2 of 2 layers: linear_attention'),
    rwkv=(dict(vocab_size=128, hidden_size=32, num_hidden_layers=2, attention_hidden_size=32), ''),
    lfm2=(small | dict(full_attn_idxs=[1]), '1 of 2 layers: conv'),
    qwen3_next=(small | linear | experts | dict(shared_expert_intermediate_size=16), '3 of 4 layers: linear_attention'),
    qwen3_5_text=(small | linear, '3 of 4 layers: linear_attention'),
    falcon_h1=(small | mamba | dict(mamba_d_ssm=32, mamba_n_heads=4, head_dim=8), '2 of 2 layers: hybrid'),
    bamba=(small | mamba | dict(attn_layer_indices=[1]), '1 of 2 layers: linear_attention'),
    granitemoehybrid=(small | mamba | dict(layer_types=['mamba', 'attention'], num_local_experts=2,
                                           num_experts_per_tok=1, shared_intermediate_size=32), '1 of 2 layers'),
    jamba=(small | dict(attn_layer_period=2, attn_layer_offset=1, use_mamba_kernels=False, num_experts=2,
                        mamba_d_state=8), '1 of 2 layers: linear_attention'),
    zamba2=(small | dict(num_hidden_layers=4, mamba_d_state=8, n_mamba_heads=8, mamba_headdim=8, mamba_ngroups=1,
                         chunk_size=8, use_mem_rope=True, num_key_value_heads=4,
                         layers_block_type=['mamba', 'hybrid', 'mamba', 'hybrid'], hybrid_layer_ids=[1, 3],
                         attention_head_dim=16), '2 of 4 layers: linear_attention, 2 of 4 layers: hybrid'),
    recurrent_gemma=(small | dict(num_hidden_layers=3, lru_width=32, attention_window_size=8, head_dim=8),
                     '2 of 3 layers: linear_attention'), nemotron_h=(small | dict(
                         num_hidden_layers=4, hybrid_override_pattern='M*M-', mamba_num_heads=8, mamba_head_dim=8,
                         ssm_state_size=8, n_groups=1, chunk_size=8, head_dim=8), '2 of 4 layers'),
    gpt_oss=(small | dict(head_dim=8, num_local_experts=2, num_experts_per_tok=1, sliding_window=6), ''),
    opt=(small | dict(ffn_dim=64, word_embed_proj_dim=32), ''),
    bloom=(dict(vocab_size=128, hidden_size=32, n_layer=2, n_head=4), ''), falcon=(small, ''))


def tiny(kind, settings, dtype=torch.float32, **how):
    torch.manual_seed(0)
    try: config = AutoConfig.for_model(kind, **settings)
    except ValueError: pytest.skip(f'this version of transformers does not know {kind}')
    return AutoModelForCausalLM.from_config(config, **how).to(dtype)


def latest():
    import transformers
    return int(transformers.__version__.split('.')[0])>=5


@pytest.mark.parametrize('kind', apart)
@pytest.mark.parametrize('batch', [1, 2])
def test_models_with_attention_alone_are_exact(kind, batch):
    if kind=='stablelm' and not latest():
        pytest.skip('older code of this model builds its mask without positions; it is refused there')
    model = tiny(kind, apart[kind])
    leak,shift = packing_leak(model, batch)
    assert leak == 0 and shift < 1e-5
    check_packing(model, batch)


@pytest.mark.parametrize('kind', leaking)
@pytest.mark.parametrize('batch', [1, 2])
def test_models_that_leak_are_refused_by_name(kind, batch):
    settings,layers = leaking[kind]
    model = tiny(kind, settings)
    with pytest.raises(ValueError, match=f'{kind} cannot be packed') as refused: check_packing(model, batch)
    assert 'packing=False' in str(refused.value) and '\n' not in str(refused.value)
    if latest(): assert layers in str(refused.value)


@pytest.mark.parametrize('how', ['eager', 'sdpa'])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
def test_every_kernel_and_precision_is_judged_alike(how, dtype):
    check_packing(tiny('qwen2', small, dtype, attn_implementation=how), batch=3)
    with pytest.raises(ValueError, match='lfm2 cannot be packed'):
        check_packing(tiny('lfm2', small | dict(full_attn_idxs=[1]), dtype, attn_implementation=how), batch=3)


@pytest.mark.parametrize('bits', [4, 8])
def test_quantised_models_pass(bits):
    model = load_model('sage-tiny', quantisation=BitsAndBytesConfig(**{f'load_in_{bits}bit': True}))
    assert packing_leak(model)[0] == 0
    check_packing(model)


def test_the_check_leaves_no_trace():
    model = get_peft_model(tiny('qwen2', small), LoraConfig(target_modules=['q_proj'], lora_dropout=0.5))
    model.train()
    model.get_input_embeddings().eval()
    before = ([m.training for m in model.modules()],torch.get_rng_state(),
              len(model.get_input_embeddings()._forward_hooks))
    check_packing(model)
    assert ([m.training for m in model.modules()] == before[0]
            and len(model.get_input_embeddings()._forward_hooks) == before[2])
    assert torch.equal(torch.get_rng_state(), before[1])
    assert all(p.grad is None for p in model.parameters())
    with torch.no_grad(): check_packing(model)


def test_a_model_that_counts_positions_on_is_refused():
    model = tiny('gpt2', gpt)
    torch.nn.init.normal_(model.transformer.wpe.weight)
    check_packing(model)
    model.transformer.wpe.register_forward_pre_hook(
        lambda module, args: (torch.arange(args[0].shape[1]).expand_as(args[0]),))
    with pytest.raises(ValueError, match='gpt2 cannot be packed: it counts positions on'): check_packing(model)


def test_a_model_without_position_ids_is_refused():
    class Deaf(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = tiny('qwen2', small)
            self.config,self.device = self.inner.config,self.inner.device
        def get_input_embeddings(self): return self.inner.get_input_embeddings()
        def forward(self, input_ids, use_cache): return self.inner(input_ids=input_ids)
    with pytest.raises(ValueError, match='it takes no `position_ids`'): check_packing(Deaf())


def test_flash_attention_is_exact_for_one_row_only_and_the_refusal_says_so():
    # the way transformers calls FlashAttention: positions are looked at where the pass is one row
    class Flash(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = tiny('qwen2', small)
            self.config,self.device,self.dtype = copy.deepcopy(self.inner.config),self.inner.device,self.inner.dtype
            self.config._attn_implementation = 'flash_attention_2'
        def get_input_embeddings(self): return self.inner.get_input_embeddings()
        def forward(self, input_ids, position_ids, use_cache):
            return self.inner(input_ids=input_ids, position_ids=position_ids if len(input_ids)==1 else None,
                              use_cache=False)
    check_packing(Flash(), batch=1)
    with pytest.raises(ValueError, match='qwen2 with flash_attention_2 cannot be packed with several '
                       'rows.*`per_device_train_batch_size=1`'):
        check_packing(Flash(), batch=2)


def test_numbers_that_are_not_finite_are_no_pass():
    model = tiny('qwen2', small)
    with torch.no_grad(): model.lm_head.weight[0] = float('nan')
    with pytest.raises(ValueError, match='not finite'): check_packing(model)


def naive(lengths, max_length):
    "Best-fit decreasing by looking through all rows; sizes of the rows"
    rows = []
    for n in sorted(lengths, reverse=True):
        fits = [i for i,used in enumerate(rows) if used+n<=max_length]
        if fits: rows[max(fits, key=lambda i: rows[i])] += n
        else: rows.append(n)
    return sorted(rows)


def test_best_fit_is_what_a_slow_search_finds():
    draw = np.random.default_rng(0)
    for _ in range(300):
        max_length = int(draw.integers(1, 70))
        lengths = draw.integers(1, max_length+1, size=int(draw.integers(1, 80)))
        rows = best_fit(lengths, max_length)
        assert sorted(np.bincount(rows, weights=lengths).astype(int)) == naive(lengths.tolist(), max_length)
        assert (best_fit(lengths, max_length) == rows).all()


def random_documents(n=400, seed=0):
    draw = np.random.default_rng(seed)
    lengths = draw.integers(1, 50, size=n)
    ids = [draw.integers(1, 1000, size=k).tolist() for k in lengths]
    return [dict(input_ids=i, labels=[t if draw.random()<.5 else -100 for t in i]) for i in ids]


def documents_of(packed):
    "The documents in packed rows, cut where positions begin anew"
    for r in packed:
        starts = [i for i,p in enumerate(r['position_ids']) if p==0]+[len(r['input_ids'])]
        for a,b in zip(starts, starts[1:]):
            assert r['position_ids'][a:b] == list(range(b-a)) and r['labels'][a] == -100
            yield tuple(r['input_ids'][a:b]),tuple(r['labels'][a+1:b])


def test_every_document_is_there_once_and_whole():
    rows = random_documents()
    report = PackingReport()
    packed = pack_dataset(Dataset.from_list(rows), 64, report)
    assert sorted(documents_of(packed)) == sorted((tuple(r['input_ids']), tuple(r['labels'][1:])) for r in rows)
    assert max(len(r['input_ids']) for r in packed) <= 64
    tokens = sum(len(r['input_ids']) for r in rows)
    assert (report.documents, report.rows, report.tokens,
            report.least_rows) == (400, len(packed), tokens, -(-tokens//64))
    longest = [max(len(r['input_ids']) for r in rows[i:i+8]) for i in range(0, 400, 8)]
    assert report.padded == 8*sum(longest)
    assert ('packed' in report._repr_html_() and f'{share_text(report.fill)} full' in str(report)
            and report.to_dict()['least_rows'] == report.least_rows)


def test_selected_shuffled_saved_and_wider_data_are_packed_alike(tmp_path):
    data = Dataset.from_list(random_documents(50))
    data.info.description = 'kept'
    wanted = pack_dataset(data, 64)
    assert wanted.info.description == 'kept' and wanted.features['input_ids'].feature.dtype == 'int32'
    data.save_to_disk(tmp_path/'saved')
    saved = Dataset.load_from_disk(tmp_path/'saved')
    assert pack_dataset(saved, 64)['input_ids'] == wanted['input_ids']
    assert pack_dataset(data.add_column('length', [1]*50), 64)['labels'] == wanted['labels']
    other = data.map(lambda r: dict(labels=[-100]*len(r['labels'])), keep_in_memory=True)
    assert set(sum(pack_dataset(other, 64)['labels'], [])) == {-100}
    some = data.shuffle(seed=1).select(range(20))
    assert sorted(documents_of(pack_dataset(some, 64))) == sorted(
        (tuple(r['input_ids']), tuple(r['labels'][1:])) for r in some)


def test_padding_of_other_tools_is_left_out_and_labels_may_be_missing():
    data = Dataset.from_list([dict(input_ids=[0, 0, 5, 6], attention_mask=[0, 0, 1, 1]),
                              dict(input_ids=[7, 8, 9, 0], attention_mask=[1, 1, 1, 0])])
    packed = pack_dataset(data, 8)
    assert packed[0] == dict(input_ids=[5, 6, 7, 8, 9], labels=[-100, 6, -100, 8, 9], position_ids=[0, 1, 0, 1, 2])


def test_bad_rows_are_refused_by_number():
    fits = dict(input_ids=[1], labels=[1])
    far = Dataset.from_list([*[fits]*12_345, dict(input_ids=[1]*9, labels=[1]*9)])
    with pytest.raises(ValueError, match='row 12,345 of `dataset` has 9 tokens, and a row may have 8'):
        pack_dataset(far, 8)
    with pytest.raises(ValueError, match='row 1 of `dataset` has no tokens'):
        pack_dataset(Dataset.from_list([fits, dict(input_ids=[], labels=[])]), 8)
    with pytest.raises(ValueError, match='row 1 of `dataset` has `input_ids` and `labels` of different lengths'):
        pack_dataset(Dataset.from_list([fits, dict(input_ids=[1], labels=[1, 2])]), 8)
    with pytest.raises(ValueError, match='`dataset` is empty'):
        pack_dataset(Dataset.from_dict(dict(input_ids=[], labels=[])), 8)
    with pytest.raises(ValueError, match='must have a column `input_ids`, got text'):
        pack_dataset(Dataset.from_list([dict(text='a')]), 8)


def test_a_packed_file_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    Dataset.from_list(random_documents(50)).save_to_disk(tmp_path/'saved')
    data,before = Dataset.load_from_disk(tmp_path/'saved'),sorted(tmp_path.rglob('*'))
    import sage_finetune.training.packing as packing
    def full(*args): raise OSError(28, 'No space left on device')
    with monkeypatch.context() as m:
        m.setattr(packing, '_packed_rows', full)
        with pytest.raises(SageError, match='no space left on device'): pack_dataset(data, 64)
    assert sorted(tmp_path.rglob('*')) == before
    first = pack_dataset(data, 64)
    with monkeypatch.context() as m: # the second time nothing is written
        m.setattr(packing, '_packed_rows', full)
        assert pack_dataset(data, 64)['input_ids'] == first['input_ids']
    assert len(sorted(tmp_path.rglob('*'))) == len(before)+1


@pytest.mark.parametrize('multiple', [1, 8, 64])
def test_padding_packed_rows_changes_nothing(multiple):
    model = tiny('llama', small)
    packed = pack_dataset(Dataset.from_list([dict(input_ids=[i+1]*k, labels=[i+1]*k)
                                             for i,k in enumerate([5, 4, 3, 2, 2, 1])]), 9)
    bare,padded = Collator(0, multiple=1)(list(packed)),Collator(0, multiple)(list(packed))
    with torch.no_grad():
        a,b = (model(input_ids=x['input_ids'], position_ids=x['position_ids'], use_cache=False).logits
               for x in (bare, padded))
    for row,x,y in zip(packed, a, b):
        n = len(row['input_ids'])
        assert (x[:n]-y[:n]).abs().max() < 1e-6
    assert (padded['labels'][:, bare['labels'].shape[1]:] == -100).all()

"What rows need is held against what the model has, before its weights are loaded"
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from sage_finetune.config import LoRAConfig, PreferenceConfig, resolve_model, SageError, TrainingConfig
from sage_finetune.inference.generate import answers
from sage_finetune.base.loading import limits_of, load_model, model_limits
from sage_finetune.preference import PreferenceTrainer
from sage_finetune.rows.sources import save_rows
from sage_finetune.training.batches import check_fit, Collator, pad_token_id, padding_of
from sage_finetune.trainer import LoRATrainer

sizes = dict(vocab_size=4096, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
of_gpt = dict(vocab_size=4096, n_positions=48, n_embd=32, n_layer=1, n_head=2)
kinds = dict(
    gpt2=of_gpt, gpt_bigcode=of_gpt, gptj=of_gpt | dict(rotary_dim=16), ctrl=of_gpt | dict(dff=32),
    gpt_neo=dict(vocab_size=4096, max_position_embeddings=48, hidden_size=32, num_layers=1, num_heads=2,
                 attention_types=[[['global'], 1]]),
    opt=sizes | dict(max_position_embeddings=48, ffn_dim=32, word_embed_proj_dim=32),
    mpt=dict(vocab_size=4096, d_model=32, n_layers=1, n_heads=2, max_seq_len=48))


def tokenizer(*added):
    tok = AutoTokenizer.from_pretrained(resolve_model('sage-tiny'))
    tok.add_tokens([*added])
    return tok


def saved(folder, kind='llama', tok=None, **more):
    "A small model of a kind in a folder, without its weights"
    settings = kinds.get(kind) or sizes | dict(max_position_embeddings=48)
    AutoConfig.for_model(kind, **settings | more).save_pretrained(folder)
    (tok or tokenizer()).save_pretrained(folder)
    return str(folder)


def config(folder, model, rows, kind=TrainingConfig, **more):
    data = save_rows(Path(folder)/'rows.jsonl', rows)
    return kind(model_name=model, data_path=data, output_dir=Path(folder)/'run', max_steps=1, report_to='none',
                lora=LoRAConfig(target_modules='all-linear'), **more)


def sums(n=8, words=0): return [dict(question='long story '*words+f'{i}+1?', answer=f'{i+1}') for i in range(n)]


@pytest.mark.parametrize('kind', [*kinds])
def test_tables_of_positions_are_known_from_the_config(kind, tmp_path):
    limits = limits_of(saved(tmp_path/kind, kind))
    assert (limits.embeddings, limits.positions)==(4096, 48)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **kinds[kind]))
    assert model_limits(model)==limits


@pytest.mark.parametrize('kind', ['llama', 'falcon', 'phi', 'gpt_neox'])
def test_rotary_positions_have_no_end(kind, tmp_path):
    limits = limits_of(saved(tmp_path/kind, kind))
    assert (limits.positions, limits.trained_positions)==(None, 48)


@pytest.mark.parametrize('kind', ['gpt2', 'opt', 'gptj'])
def test_long_rows_are_refused_before_weights_are_loaded(kind, tmp_path):
    "The folder has no weights at all, so a refusal in these words comes before they are looked for"
    model = saved(tmp_path/'m', kind)
    run = LoRATrainer(config(tmp_path, model, sums(words=30)), quiet=True)
    with pytest.raises(ValueError, match='tokens.* and the model has a table of 48 positions: set `max_length=48`'):
        run.train()
    assert run.model is None and not (tmp_path/'run'/'checkpoints').exists()
    short = LoRATrainer(config(tmp_path, model, sums(words=30), max_length=48), quiet=True)
    with pytest.raises(ValueError, match='no row of .* can be used.*too long'): short.train()


def test_packed_rows_may_be_as_long_as_max_length(tmp_path):
    model = saved(tmp_path/'m', 'gpt2')
    with pytest.raises(ValueError, match='has 1,024 tokens.*table of 48 positions'):
        LoRATrainer(config(tmp_path, model, sums(), packing=True), quiet=True).train()


def test_evaluation_rows_are_looked_at_too(tmp_path):
    held = save_rows(tmp_path/'held.jsonl', sums(words=30))
    with pytest.raises(ValueError, match='the longest of the evaluation rows'):
        LoRATrainer(config(tmp_path, saved(tmp_path/'m', 'gpt2'), sums(), eval_data_path=held), quiet=True).train()


@pytest.mark.parametrize('method', ['dpo', 'kto'])
def test_judged_answers_are_looked_at_too(method, tmp_path):
    pytest.importorskip('trl')
    rows = [dict(prompt=f'{i}+1?', chosen=f'{i+1}', rejected='long story '*30+str(i)) for i in range(8)]
    with pytest.raises(ValueError, match='table of 48 positions'):
        PreferenceTrainer(config(tmp_path, saved(tmp_path/'m', 'gpt2'), rows, PreferenceConfig, method=method),
                          quiet=True).train()


def test_rows_beyond_what_a_rotary_model_was_made_for_are_noted(tmp_path):
    run = LoRATrainer(config(tmp_path, saved(tmp_path/'m'), sums(words=30), test_size=0), quiet=True)
    with pytest.raises(SageError): run.train() # there are no weights
    assert run.data_report.notes=={'training examples longer than the 48 positions of the model': len(run.dataset)}


@pytest.mark.parametrize('rows,kind,more', [
    ([dict(question=f'q <mytag>{i}', answer='a') for i in range(8)], TrainingConfig, {}),
    ([dict(question=f'q {i}', answer='<mytag>') for i in range(8)], TrainingConfig, dict(packing=True)),
    ([dict(prompt=f'q {i}', chosen='a', rejected='<mytag> b') for i in range(8)], PreferenceConfig, {})])
def test_tokens_beyond_the_embedding_are_refused_with_both_numbers(rows, kind, more, tmp_path):
    if kind is PreferenceConfig: pytest.importorskip('trl')
    model = saved(tmp_path/'m', tok=tokenizer('<mytag>', '<other>'))
    run = (PreferenceTrainer if kind is PreferenceConfig else LoRATrainer)(config(tmp_path, model, rows, kind, **more),
                                                                          quiet=True)
    with pytest.raises(ValueError, match=r"token id 4,096, and the embedding of the model has 4,096 rows \(ids up to "
                                         r"4,095\): 1 token of the tokenizer \('<mytag>'\)"): run.train()


def real(folder, tok, rows):
    "A model with weights, its embedding enlarged to `rows`"
    model = load_model('sage-tiny')
    if rows!=4096: model.resize_token_embeddings(rows, mean_resizing=False)
    model.save_pretrained(folder)
    tok.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize('rows', [4098, 4160])
def test_an_enlarged_or_padded_embedding_trains(rows, tmp_path):
    model = real(tmp_path/'m', tokenizer('<mytag>', '<other>'), rows)
    made = config(tmp_path, model, [dict(question=f'<mytag> {i}', answer='<other>') for i in range(8)], test_size=0)
    assert LoRATrainer(made, quiet=True).train().steps==1


def test_a_pad_token_that_the_model_has_no_row_for_is_not_used(tmp_path):
    tok = tokenizer()
    tok.add_special_tokens(dict(pad_token='[PAD]'))
    model = real(tmp_path/'m', tok, 4096)
    made = config(tmp_path, model, sums(8)+sums(8, words=9), test_size=0, per_device_train_batch_size=8)
    run = LoRATrainer(made, quiet=True)
    assert run.train().steps==1
    assert pad_token_id(tok)==4096 and padding_of(tok, run.model)<4096
    assert len(answers(load_model(model), tok, ['1?', 'a much longer question?'], max_new_tokens=2))==2


def test_a_question_with_a_token_that_the_model_has_no_row_for(tmp_path):
    tok = tokenizer('<mytag>')
    with pytest.raises(ValueError, match='token id 4,096, and the model has 4,096'):
        answers(load_model('sage-tiny'), tok, ['what is <mytag>?'], max_new_tokens=2)


def test_rows_of_ones_own_are_looked_at_too(tmp_path):
    class Own(LoRATrainer):
        def prepare_data(self): self.dataset = [dict(input_ids=[5, 4096], labels=[5, 4096])]*8
    run = Own(config(tmp_path, 'sage-tiny', sums()), quiet=True)
    with pytest.raises(ValueError, match='the training rows hold token id 4,096'): run.train()
    check_fit(dict(training=[dict(input_ids=[5], labels=[5])]), run.config, None, tokenizer())
    assert json.dumps(run.config.to_dict())


def test_what_a_batch_says_of_itself_comes_out_of_a_process_that_prepares_it():
    row = dict(input_ids=[5, 6, 7, 8], labels=[-100, 6, -100, 8], position_ids=[0, 1, 0, 1])
    loader = torch.utils.data.DataLoader([row]*4, batch_size=2, num_workers=1, collate_fn=Collator(0, 4, counted=True))
    for batch in loader:
        said = batch['counted'].to('cpu')
        assert (said.ends.tolist(), said.ends.sizes, said.tokens)==([0, 2, 4, 6, 8], [2]*4, 8)
        assert (said.at.tolist(), said.targets.tolist())==([0, 2, 4, 6], [6, 8]*2)

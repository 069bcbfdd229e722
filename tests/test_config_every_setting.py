"""Every setting does something that can be seen, or is refused

The fields of every config are walked: a new one fails here until it has an entry. An entry is a value other than the
default, and what shows that it acts; or the words it is refused with.
"""
import json
from dataclasses import fields, make_dataclass

import pytest
import torch

from quick import two_layers
from sage_finetune.config import LoRAConfig, PreferenceConfig, resolve_model, RewardConfig, TrainingConfig
from sage_finetune.core.beforehand import _rates
from sage_finetune.core.machine import Machine
from sage_finetune.core.settings import DataSource, Settings
from sage_finetune.data import save_rows
from sage_finetune.model.adapter import add_lora, check_run
from sage_finetune.base.loading import dtype_of, load_model, load_tokenizer, quantisation_of
from sage_finetune.rows.report import DataReport
from sage_finetune.rows.sources import read_rows
from sage_finetune.training.callbacks import Checkpoints
from sage_finetune.training.incremental import add_replay_rows
from sage_finetune.training.loop import same_bits, training_arguments
from sage_finetune.training.split import read_data
from sage_finetune.inference.exam import asked_exams, ExamCallback
from sage_finetune.trainer import LoRATrainer

tok = load_tokenizer('sage-tiny')


# --- rows

@pytest.fixture(scope='module')
def place(tmp_path_factory):
    "A folder with rows of several kinds"
    folder = tmp_path_factory.mktemp('rows')
    plain = [dict(question=f'What is {i} plus {i}?', answer=f'It is {2*i}, as is known.') for i in range(12)]
    save_rows(folder/'plain.jsonl', [*plain, plain[0]])
    save_rows(folder/'other.jsonl', [dict(question=f'And {i} minus 1?', answer=f'{i-1}.') for i in range(6)])
    save_rows(folder/'frage.jsonl', [dict(question=f'a{i}?', answer=f'b{i}.', frage=f'{i}, was?') for i in range(4)])
    save_rows(folder/'odd.jsonl', [*plain[:4], dict(question=7)])
    both = [dict(instruction=f'Do {i}.', output=f'{i}.', text=f'All of {i}.') for i in range(4)]
    save_rows(folder/'both.jsonl', both)
    talk = [dict(role=r, content=c) for r,c in (('user', 'One?'), ('assistant', 'It is one.'), ('user', 'Two?'),
                                                ('assistant', 'It is two.'))]
    save_rows(folder/'talks.jsonl', [dict(messages=[*talk, dict(role='user', content=f'{i}?'),
                                                    dict(role='assistant', content='No. '*20)]) for i in range(4)])
    (folder/'lines.txt').write_text('One line of text.\nAnother line of it.\n\nA third one, a paragraph later.\n')
    (folder/'split').mkdir()
    for name in ('train', 'test'): save_rows(folder/'split'/f'{name}.jsonl', [dict(question=name+'?', answer=name)]*3)
    return folder


def prepared(config):
    "The ids and labels that a config makes of its rows, and what is held out; or the words they are refused with"
    report,found = DataReport(),[]
    try:
        data,held = read_data(config, tok, report)
        data,replayed = add_replay_rows(data, config, tok, report)
        found = [sorted((tuple(x['input_ids']), tuple(x['labels'])) for x in d or ()) for d in (data, held)]
        order = [tuple(x['input_ids']) for x in data]
    except ValueError as e: return str(e)
    return found,order,[d['reason'] for d in report.to_dict()['dropped']]


# --- what shows that a setting acts: functions of a config

def arguments(config):
    "What transformers' `Trainer` is told"
    return {k: str(v) for k,v in training_arguments(config, True).to_dict().items()}


def betas(config):
    "What the optimizer of a loop that is ready to train was told"
    run = LoRATrainer(config, quiet=True)
    run.load_model_and_tokenizer()
    run.apply_lora()
    run.prepare_data()
    run.setup_trainer()
    return [(g['betas'], g['eps']) for g in run.trainer.create_optimizer().param_groups]


def algorithms(config):
    "Whether torch is held to operations that give the same bits each time, while it trains"
    with same_bits(training_arguments(config, True).deterministic): return torch.are_deterministic_algorithms_enabled()


def path(config):
    "Whether the loop may compute adapters together"
    return training_arguments(config, True).fused_lora


def schedule(config):
    return _rates(config.lr_scheduler_type, config.lr_scheduler_kwargs, config.learning_rate, 10, 100)


def weights(config): return str(dtype_of(config)),str(quantisation_of(config))


def built(config):
    "The parts of a loop that is ready to train"
    run = LoRATrainer(config, quiet=True)
    run.load_model_and_tokenizer()
    run.apply_lora()
    run.prepare_data()
    run.setup_trainer()
    optimizer = run.trainer.create_optimizer()
    callbacks = run.trainer.callback_handler.callbacks
    return dict(rows=len(run.trainer.train_dataset), size=len(run.tokenizer),
                rates=[g['lr'] for g in optimizer.param_groups], names=sorted(type(c).__name__ for c in callbacks),
                trained=len(optimizer.param_groups),
                kept=[c.keep for c in callbacks if isinstance(c, Checkpoints)],
                best=[(c.patience, c.keep, c.by) for c in callbacks if hasattr(c, 'patience')],
                exam=[([*c.asked], c.tokens) for c in callbacks if isinstance(c, ExamCallback)],
                batches=len(run.trainer.get_train_dataloader()), folder=run.trainer.args.output_dir,
                below=[n for n,_ in run.model.named_parameters() if 'below' in n])


def adapter(config):
    "Names, shapes and first numbers of what is trained, and how strongly it acts"
    torch.manual_seed(0)
    model = add_lora(load_model(two_layers), config.lora if hasattr(config, 'lora') else config)
    layers = [m for m in model.modules() if hasattr(m, 'scaling') and hasattr(m, 'lora_A')]
    return ([(n, tuple(p.shape), p.detach().double().sum().item()) for n,p in model.named_parameters()
             if p.requires_grad], layers[0].scaling, str(layers[0].lora_dropout))


def rolled(config):
    "What sampled answers to a question come to, as TRL's loss takes them, and what that loss is told"
    pytest.importorskip('trl')
    from sage_finetune.rewards.functions import rewards_of
    from sage_finetune.rewards.rollout import micro_batches, roll_out
    from sage_finetune.rewards.trainer import _loss_settings
    row = json.dumps(dict(question='What is 2 plus 2?', answer='It is 4.'))
    asked = dict(input_ids=tok('What is 2 plus 2?')['input_ids'], at=0, row=row, file='a', line=1, question='2 and 2?')
    made = roll_out(load_model(two_layers).eval(), tok, [asked], rewards_of(config.rewards, []), config, 1)
    made.groups[0].advantages = [1.0]*len(made.groups[0].samples)
    parts = [sorted(j.parts) for g in made.groups for j in g.judged]
    batches = micro_batches(made, 8, 0, config.mask_truncated_completions)
    return ([{k: v.tolist() for k,v in b.items()} for b in batches], made.at_once, parts, _loss_settings(config))


def spread(config):
    "What the rewards of two groups are worth, compared"
    from sage_finetune.rewards.rollout import advantages
    return advantages(torch.tensor([[0., 1.], [0., 4.]]), config.scale_rewards).tolist()


def looped(config):
    "What the loop of a run of rewards holds its model to, and how much it keeps"
    pytest.importorskip('trl')
    from sage_finetune.rewards.trainer import RewardTrainer
    run = RewardTrainer(config, quiet=True)
    run.load_model_and_tokenizer()
    run.apply_lora()
    run.prepare_data()
    run.setup_trainer()
    return run.trainer.beta,sorted((k, v) for k,v in vars(run.trainer.kept).items() if isinstance(v, (int, float)))


def loss(config):
    pytest.importorskip('trl')
    from sage_finetune.preference import _loss_settings, _trl_loop
    return _loss_settings(config),_trl_loop(config.method)[0].__name__


def rows_of(source): return [r.value for r in read_rows(source.path, **source.where)],source.columns,source.format_type


class Seen:
    "A value, what shows that it acts, and what else is set on both sides"
    def __init__(self, value, shows, **more): self.value,self.shows,self.more = value,shows,more


class Refused:
    "A value, and the words it is refused with"
    def __init__(self, value, words, **more): self.value,self.words,self.more = value,words,more


def rows(file): return lambda place: place/file


training = dict(
    model_name=[Seen('sage-tiny', lambda c: resolve_model(c.model_name))],
    load_in_8bit=[Seen(True, weights), Refused(True, 'needs a missing package', machine=Machine(bitsandbytes=False))],
    load_in_4bit=[Seen(True, weights)],
    data_path=[Seen(rows('other.jsonl'), prepared)],
    max_length=[Seen(20, prepared)],
    output_dir=[Seen(rows('elsewhere'), lambda c: c.lora_dir)],
    num_train_epochs=[Seen(7, arguments)],
    per_device_train_batch_size=[Seen(5, arguments)],
    gradient_accumulation_steps=[Seen(5, arguments)],
    learning_rate=[Seen(1e-3, schedule)],
    lr_scheduler_type=[Seen('linear', schedule), Refused('cosin', 'did you mean `cosine`?'),
                       Refused('warmup_stable_decay', 'needs `num_decay_steps`'),
                       Refused('reduce_lr_on_plateau', 'follows the held-out loss', test_size=0)],
    lr_scheduler_kwargs=[Seen(dict(num_cycles=2), schedule), Refused(dict(power=2), '`power` is no option'),
                         Refused(dict(num_decay_steps=500), 'are more than the 20 of the run', max_steps=20,
                                 lr_scheduler_type='warmup_stable_decay')],
    warmup_ratio=[Seen(.5, arguments), Refused(.5, 'has no effect', lr_scheduler_type='constant')],
    warmup_steps=[Seen(5, arguments), Refused(20, 'leaves nothing of `max_steps=10`', max_steps=10),
                  Refused(5, 'has no effect', lr_scheduler_type='constant'),
                  Refused(5, 'exclude each other', warmup_ratio=.2)],
    adam_beta1=[Seen(.8, betas), Refused(.8, 'has no effect on `optim="sgd"`', optim='sgd')],
    adam_beta2=[Seen(.95, betas), Refused(.95, 'has no effect', optim='adafactor')],
    adam_epsilon=[Seen(1e-6, betas), Refused(1e-6, 'has no effect', optim='adagrad')],
    save_strategy=[Seen('epoch', arguments), Refused('never', '"steps" or "epoch"')],
    fp16=[Seen(True, weights)],
    bf16=[Seen(True, weights)],
    gradient_checkpointing=[Seen(True, arguments)],
    optim=[Seen('adafactor', arguments), Refused('adamw', 'unknown optim'), Refused('lomo', 'within the backward pass'),
           Refused('galore_adamw', 'whole matrices'), Refused('stable_adamw', 'cannot be used here'),
           Refused('lion_8bit', 'no optimizer of torch takes the same steps', machine=Machine(bitsandbytes=False))],
    logging_steps=[Seen(3, arguments)],
    save_steps=[Seen(3, arguments)],
    save_total_limit=[Seen(5, built)],
    report_to=[Seen('tensorboard', built)],
    lora=[Seen(dict(r=2), adapter)],
    seed=[Seen(7, prepared, test_size=.3)],
    dataloader_num_workers=[Seen(2, arguments)],
    test_size=[Seen(.4, prepared)],
    eval_data_path=[Seen(rows('other.jsonl'), prepared)],
    eval_data_split=[Seen('test', prepared, eval_data_path=rows('split')),
                     Refused('test', 'needs `eval_data_path`')],
    format_type=[Seen('text', prepared, data_path=rows('both.jsonl'))],
    columns=[Seen(dict(frage='question'), prepared, data_path=rows('frage.jsonl'))],
    data_weights=[Seen([1, 3], prepared, data_path=lambda p: [p/'plain.jsonl', p/'other.jsonl']),
                  Refused([1, 3], 'must have a share for each source')],
    data_stopping=[Seen('all_exhausted', prepared, data_weights=[1, 3],
                        data_path=lambda p: [p/'plain.jsonl', p/'other.jsonl']),
                   Refused('all_exhausted', 'goes with `data_weights`')],
    data_split=[Seen('test', prepared, data_path=rows('split')), Seen('test', prepared)], # refused where it has none
    data_subset=[Seen('en', prepared)], # refused for a file
    data_revision=[Seen('v2', prepared)], # refused for a file
    sample_by=[Seen('line', prepared, data_path=rows('lines.txt'), test_size=0), Seen('line', prepared)],
    train_on=[Seen('last', prepared, data_path=rows('talks.jsonl')), Seen('all', prepared)],
    overflow=[Seen('truncate', prepared, data_path=rows('talks.jsonl'), max_length=60),
              Seen('split', prepared, data_path=rows('talks.jsonl'), max_length=60)],
    cut_answers=[Seen(True, prepared, overflow='truncate', data_path=rows('talks.jsonl'), max_length=60),
                 Refused(True, 'goes with `overflow="truncate"`')],
    duplicates=[Seen('drop', prepared)],
    strict=[Seen(True, prepared, data_path=rows('odd.jsonl'))],
    packing=[Seen(True, built)],
    max_steps=[Seen(3, arguments)],
    weight_decay=[Seen(.1, arguments)],
    max_grad_norm=[Seen(.5, arguments)],
    eval_steps=[Seen(3, arguments), Refused(3, 'needs held-out rows', test_size=0)],
    early_stopping_patience=[Seen(2, built), Refused(2, 'needs held-out rows', test_size=0)],
    load_best_model_at_end=[Seen(True, built), Refused(True, 'needs held-out rows', test_size=0)],
    loraplus_lr_ratio=[Seen(4, built)],
    neftune_noise_alpha=[Seen(5, arguments), Refused(5, 'cannot both be set', packing=True)],
    torch_compile=[Seen(True, arguments)],
    fused_lora=[Seen(False, path)],
    deterministic=[Seen(True, algorithms)],
    tokens_per_step=[Seen(64, built)],
    init_adapter=[Refused(rows('plain.jsonl'), 'neither an adapter nor a run')],
    stack_adapter=[Refused(True, 'needs `init_adapter`')],
    add_tokens=[Seen(['<ask>'], built), Refused(['<ask>', '<ask>'], 'is there twice'),
                Refused(['façon'], 'cannot be a token of this tokenizer')],
    embedding_learning_rate=[Seen(1e-5, built, add_tokens=['<ask>']), Refused(1e-5, 'needs `add_tokens`')],
    replay_path=[Seen(rows('other.jsonl'), prepared, replay_share=.3)],
    replay_share=[Seen(.5, prepared, replay_path=rows('other.jsonl')), Refused(.5, 'no rows to replay are known')],
    exam_path=[Seen(rows('plain.jsonl'), built), Refused(rows('plain.jsonl'), 'needs held-out rows', test_size=0),
               Refused(rows('odd.jsonl'), 'odd.jsonl:5: ')],
    exam_general=[Seen(True, built), Refused(True, 'needs held-out rows', test_size=0)],
    exam_tokens=[Seen(8, built, exam_general=True)],
    best_by=[Seen('exam', built, exam_path=rows('plain.jsonl')), Refused('exam', 'needs `exam_path`')])

lora = dict(
    r=[Seen(2, adapter), Refused(65, 'needs `r` of at most 64', init_lora_weights='pissa')],
    lora_alpha=[Seen(64, adapter)],
    target_modules=[Seen('all-linear', adapter), Refused(['c_attn'], 'names no layer')],
    lora_dropout=[Seen(.3, adapter)],
    bias=[Seen('all', adapter), Seen('lora_only', adapter)],
    task_type=[Refused('SEQ_CLS', 'must be "CAUSAL_LM"'), Refused('TOKEN_CLS', 'must be "CAUSAL_LM"'),
               Refused('SEQ_2_SEQ_LM', 'must be "CAUSAL_LM"'), Refused('causal_lm', 'must be "CAUSAL_LM"')],
    modules_to_save=[Seen(['norm'], adapter), Refused(['nowhere'], 'names no layer of this model'),
                     Refused(['q_proj'], 'is among `target_modules` too')],
    use_rslora=[Seen(True, adapter)],
    use_dora=[Seen(True, adapter)],
    init_lora_weights=[Seen('gaussian', adapter), Seen('pissa', adapter), Refused('loftq', 'must be True, "gaussian"'),
                       Refused('orthogonal', 'needs an even rank', r=3)])

preference = dict(
    method=[Seen('kto', loss), Seen('orpo', loss)],
    beta=[Seen(.5, loss)],
    loss_type=[Seen('ipo', loss), Refused('ipo', 'is a setting of `method="dpo"`', method='kto')],
    label_smoothing=[Seen(.1, loss, loss_type='robust'), Refused(.1, 'needs `loss_type="robust"`')],
    sft_weight=[Seen(.5, loss), Refused(.5, 'is a setting of `method="dpo"`', method='orpo')],
    desirable_weight=[Seen(2, loss, method='kto'), Refused(2, 'is a setting of `method="kto"`')],
    undesirable_weight=[Seen(2, loss, method='kto'), Refused(2, 'is a setting of `method="kto"`')],
    lora=[Seen(dict(r=2), adapter), Refused(dict(bias='all'), 'trains biases of the base'),
          Refused(dict(bias='lora_only'), 'trains biases of the base', method='kto'),
          Refused(dict(init_lora_weights='olora'), 'needs the model as it was'),
          Refused(dict(modules_to_save=['norm']), 'does not go together with preferences')],
    init_adapter=[Refused(rows('run'), 'merge the earlier run')],
    **{n: [Refused(v, 'does not go together with preferences', **more)] for n,v,more in (
        ('packing', True, {}), ('tokens_per_step', 64, {}), ('neftune_noise_alpha', 5, {}), ('torch_compile', True, {}),
        ('cut_answers', True, dict(overflow='truncate')), ('stack_adapter', True, {}), ('add_tokens', ['<a>'], {}),
        ('embedding_learning_rate', 1e-5, {}),
        ('replay_path', rows('other.jsonl'), {}), ('replay_share', .2, {}))})

reward = dict(
    method=[Refused('ppo', 'must be "grpo"')],
    rewards=[Seen(['number'], rolled)],
    num_generations=[Seen(4, rolled, per_device_train_batch_size=4),
                     Refused(3, 'must be a multiple of `num_generations=3`')],
    max_completion_length=[Seen(3, rolled), Refused(1024, 'leaves no room for a question')],
    temperature=[Seen(3.0, rolled)],
    top_p=[Seen(.1, rolled, temperature=5.0)],
    top_k=[Seen(1, rolled, temperature=5.0)],
    loss_type=[Seen('dr_grpo', rolled)],
    scale_rewards=[Seen('batch', spread), Seen('none', spread)],
    beta=[Seen(.1, looped)],
    epsilon=[Seen(.1, rolled)],
    epsilon_high=[Seen(.3, rolled)],
    importance_sampling_level=[Seen('sequence', rolled)],
    num_iterations=[Seen(2, rolled)],
    mask_truncated_completions=[Seen(True, rolled, max_completion_length=2, temperature=5.0)],
    answers_at_once=[Seen(1, rolled)],
    kept_answers=[Seen(1, looped)],
    vllm=[Seen(dict(mode='server', server_port=8001), rolled), Refused('fast', 'must be a dict of names and plain')],
    lora=[Refused(dict(modules_to_save=['norm']), 'does not go together with rewards')])

source = dict(
    path=[Seen(rows('other.jsonl'), rows_of)],
    split=[Seen('test', rows_of, path=rows('split')), Refused('test', '`split` is for data sets that have splits')],
    subset=[Refused('en', 'is for a data set of the Hub')],
    revision=[Refused('v2', 'is for a data set of the Hub')],
    columns=[Seen(dict(frage='question'), rows_of)],
    format_type=[Seen('qa', rows_of)],
    sample_by=[Seen('line', rows_of, path=rows('lines.txt')), Refused('line', '`sample_by` is for text files')])

entries = {TrainingConfig: training, LoRAConfig: lora, PreferenceConfig: preference, RewardConfig: reward,
           DataSource: source}


# --- every field of every config has an entry

def kinds(of=Settings):
    mine = [sub for sub in of.__subclasses__() if sub.__module__.startswith('sage_finetune')]
    return [k for sub in mine for k in (sub, *kinds(sub))]


def own_fields(kind):
    "The fields of a config that it does not share with the one it is made from"
    above = {f.name for f in fields(kind.__base__)} if kind.__base__ is not Settings else set()
    return {f.name for f in fields(kind)}-above


def without_entry(kind): return own_fields(kind)-{*entries.get(kind, ())}


def test_every_config_is_here():
    assert {*kinds()}=={*entries}


@pytest.mark.parametrize('kind', entries, ids=lambda k: k.__name__)
def test_every_setting_has_an_entry(kind):
    assert not without_entry(kind), 'give it an entry: what shows that it acts, or its refusal'
    assert {*entries[kind]}<={f.name for f in fields(kind)}


def test_a_setting_without_an_entry_is_found():
    More = make_dataclass('More', [('unheard_of', int, 1)], bases=(TrainingConfig,))
    assert without_entry(More)=={'unheard_of'}


# --- and every entry holds

def made(kind, place, **settings):
    settings = {k: v(place) if callable(v) and not isinstance(v, type) else v for k,v in settings.items()}
    if kind is DataSource: return DataSource(**dict(path=place/'plain.jsonl') | settings)
    if kind is LoRAConfig: return LoRAConfig(**dict(lora_dropout=0.0) | settings)
    plain = dict(model_name=two_layers, load_in_8bit=False, fp16=False, optim='adamw_torch', report_to='none',
                 gradient_checkpointing=False, data_path=place/'plain.jsonl', output_dir=place/'run', test_size=.2,
                 gradient_accumulation_steps=1, per_device_train_batch_size=2)
    if kind is PreferenceConfig: plain |= dict(lora=dict(lora_dropout=0.0))
    if kind is RewardConfig: plain |= dict(lora=dict(lora_dropout=0.0), num_generations=2, max_completion_length=8)
    return kind(**plain | settings)


def each(which):
    return [pytest.param(kind, name, e, id=f'{kind.__name__}-{name}-{i}') for kind,known in entries.items()
            for name,found in known.items() for i,e in enumerate(found) if isinstance(e, which)]


@pytest.mark.parametrize('kind, name, entry', each(Seen))
def test_a_setting_acts(kind, name, entry, place):
    before,after = (made(kind, place, **entry.more | more) for more in ({}, {name: entry.value}))
    assert getattr(before, name)!=getattr(after, name)
    assert entry.shows(before)!=entry.shows(after)
    assert entry.shows(before)==entry.shows(made(kind, place, **entry.more)), 'it shows nothing: it changes by itself'


def begun(kind, place, machine, settings):
    "As far as a run goes before anything is loaded"
    made_one = made(kind, place, **settings)
    if kind is DataSource: return list(read_rows(made_one.path, **made_one.where))
    if kind is LoRAConfig: made_one = made(TrainingConfig, place, lora=made_one)
    if kind is PreferenceConfig:
        from sage_finetune.preference import PreferenceTrainer
        run = PreferenceTrainer(made_one, quiet=True, machine=machine)
    else: run = LoRATrainer(made_one, quiet=True, machine=machine)
    check_run(run.fitted)
    asked_exams(run.config)


@pytest.mark.parametrize('kind, name, entry', each(Refused))
def test_a_setting_is_refused_before_anything_is_loaded(kind, name, entry, place):
    more = dict(entry.more)
    machine = more.pop('machine', Machine())
    with pytest.raises(Exception) as e: begun(kind, place, machine, more | {name: entry.value})
    assert entry.words in str(e.value) and type(e.value).__name__ in ('ValueError', 'SageError'), e.value

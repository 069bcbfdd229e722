"Vision-language models: every row accounted for, only answers learned, the image decides, what was learned survives"
import base64, io, json, random, shutil

import pytest
import torch
from datasets import Dataset
from PIL import Image
from transformers import AutoTokenizer

from quick import few
from sage_finetune.inference import merging
from sage_finetune.model.adapter import adapter_line, add_lora
from sage_finetune.training.batches import Collator
from sage_finetune.config import LoRAConfig, PresetConfigs, read_json, resolve_model, SageError
from sage_finetune.data import DataReport, prepare_dataset
from sage_finetune.inference.generate import answers, load_for_chat
from sage_finetune.base.loading import load_model, load_tokenizer, quiet_libraries
from sage_finetune.model.loss import loss_sum
from sage_finetune.model.memory import estimate_memory
from sage_finetune.inference.merging import merge_run
from sage_finetune.rows.images import as_image, processor_of
from sage_finetune.rows.formats import question
from sage_finetune.training.split import split_dataset
from sage_finetune.rows.tokens import encode
from sage_finetune.trainer import data_digest, LoRATrainer
from sage_finetune.base.tiny_vision import tiny_vision_model

chat = ("{{% for m in messages %}}{{{{ '<|im_start|>' + m['role'] + '\n' }}}}{{% if m['content'] is string %}}{{{{ "
        "m['content'] }}}}{{% else %}}{{% for c in m['content'] %}}"
        "{{% if c['type']=='image' %}}{}{{% else %}}{{{{ c['text'] }}}}{{% endif %}}{{% endfor %}}{{% endif "
        "%}}{{{{ '<|im_end|>\n' }}}}{{% endfor %}}"
        "{{% if add_generation_prompt %}}{{{{ '<|im_start|>assistant\n' }}}}{{% endif %}}")
text = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, pad_token_id=0, eos_token_id=2, bos_token_id=None, tie_word_embeddings=True)
sight = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=28)


def words(*tokens, **named):
    tokenizer = AutoTokenizer.from_pretrained(resolve_model('sage-tiny'),
                                              **dict(extra_special_tokens=named) if named else {})
    tokenizer.add_tokens([*tokens], special_tokens=True)
    return tokenizer

def qwen2_vl():
    "Images of any size, patches in one flat list, positions in three dimensions, a processor that also knows videos"
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration, Qwen2VLImageProcessorPil, Qwen2VLProcessor
    from sage_finetune.base.loading import _without_videos
    t = words('<|vision_start|>', '<|image_pad|>', '<|vision_end|>', '<|video_pad|>')
    ids = dict(image_token_id='<|image_pad|>', video_token_id='<|video_pad|>',
               vision_start_token_id='<|vision_start|>', vision_end_token_id='<|vision_end|>')
    config = Qwen2VLConfig(vision_config=dict(depth=2, embed_dim=32, hidden_size=64, num_heads=2,
                                              mlp_ratio=2, patch_size=14), tie_word_embeddings=True,
                           text_config=text | dict(vocab_size=len(t), rope_parameters=dict(
                               rope_type='default', rope_theta=10000., mrope_section=[2, 3, 3])),
                           **{k: t.convert_tokens_to_ids(v) for k,v in ids.items()})
    processor = _without_videos(Qwen2VLProcessor)(
        Qwen2VLImageProcessorPil(size=dict(shortest_edge=28*28, longest_edge=56*84)), t, None,
        chat_template=chat.format('<|vision_start|><|image_pad|><|vision_end|>'))
    return Qwen2VLForConditionalGeneration(config),processor

def gemma3():
    "Image tokens that see one another, another token in the text than in the row, sliding windows"
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration, Gemma3ImageProcessorPil, Gemma3Processor
    t = words(boi_token='<start_of_image>', image_token='<image_soft_token>', eoi_token='<end_of_image>')
    config = Gemma3Config(vision_config=sight | dict(patch_size=7, vision_use_head=False), text_config=text | dict(
        vocab_size=len(t), head_dim=16, sliding_window=32, num_hidden_layers=6, bos_token_id=0),
                          mm_tokens_per_image=4, boi_token_index=t.boi_token_id, eoi_token_index=t.eoi_token_id,
                          image_token_index=t.image_token_id)
    model = Gemma3ForConditionalGeneration(config)
    torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight, std=.1) # new ones are blind
    return (model,Gemma3Processor(Gemma3ImageProcessorPil(size=dict(height=28, width=28)), t, image_seq_length=4,
                                  chat_template=chat.format('<start_of_image>')))

def idefics3():
    "An image cut into parts, each with its row and column in words"
    from transformers import (Idefics3Config, Idefics3ForConditionalGeneration, Idefics3ImageProcessorPil,
                              Idefics3Processor)
    t = words('<fake_token_around_image>', '<image>', '<end_of_utterance>', '<global-img>',
              *(f'<row_{i+1}_col_{j+1}>' for i in range(6) for j in range(6)))
    config = Idefics3Config(vision_config=sight | dict(patch_size=7), scale_factor=2, text_config=text | dict(
        model_type='llama', vocab_size=len(t)), image_token_id=t.convert_tokens_to_ids('<image>'), pad_token_id=0)
    processor = Idefics3Processor(Idefics3ImageProcessorPil(size=dict(longest_edge=56), max_image_size=dict(
        longest_edge=28)), t, image_seq_len=4, chat_template=chat.format('<image>'))
    return Idefics3ForConditionalGeneration(config),processor

kinds = 'llava', 'qwen2_vl', 'gemma3', 'idefics3'

@pytest.fixture(scope='module')
def models(tmp_path_factory):
    "Folder of a model with random weights, made once for each kind"
    root = tmp_path_factory.mktemp('models')
    def of(kind):
        if not (root/kind).is_dir():
            if kind=='llava': tiny_vision_model(root/kind)
            else:
                torch.manual_seed(0)
                with quiet_libraries():
                    for part in globals()[kind](): part.save_pretrained(root/kind)
        return str(root/kind)
    return of

colours = dict(red=(220, 40, 40), green=(40, 190, 50), blue=(50, 60, 220), yellow=(230, 215, 50))

def plain(colour, size=(28, 28), draw=random.Random(0)):
    return Image.new('RGB', size, tuple(min(255, max(0, v+draw.randint(-30, 30))) for v in colours[colour]))

def saved(folder, name='a.png', colour='red', size=(28, 28)):
    plain(colour, size).save(folder/name)
    return name

def row(*content, answer='It is red.'):
    return dict(messages=[dict(role='user', content=[c if isinstance(c, dict) else dict(
        type='text', text=c) for c in content]), dict(role='assistant', content=answer)])

def shows(name): return dict(type='image', image=name)

def written(folder, rows):
    (folder/'rows.json').write_text('[\n'+',\n'.join(map(json.dumps, rows))+'\n]')
    return folder/'rows.json'

def mixed_rows(folder):
    "One image, two of other sizes with words between, none, and a second question about the first"
    saved(folder, 'a.png')
    saved(folder, 'b.png', 'blue', (60, 30))
    saved(folder, 'c.png', 'green', (30, 90))
    later = row(shows('a.png'), 'Which colour?')
    later['messages'] += [dict(role='user', content='Sure?'), dict(role='assistant', content='Yes.')]
    return [row(shows('a.png'), 'Which colour?'), row('Here ', shows('b.png'), ' and there ', shows(
        'c.png'), ', which are they?', answer='Blue, green.'), dict(question='2+3?', answer='5'), later]

def config_of(model, folder, **more):
    return PresetConfigs.cpu(**dict(model_name=model, data_path=folder/'rows.json', output_dir=folder/'run',
                                    per_device_train_batch_size=4, gradient_accumulation_steps=1, learning_rate=5e-3,
                                    report_to='none', test_size=0, logging_steps=1,
                                    lora=dict(r=8, lora_alpha=16, target_modules='all-linear')) | more)


@pytest.mark.parametrize('kind', kinds)
def test_a_row_has_the_places_of_its_processor_and_learns_only_its_answers(kind, models, tmp_path):
    tokenizer,rows = load_tokenizer(models(kind)),mixed_rows(tmp_path)
    processor,report = processor_of(tokenizer),DataReport()
    data = prepare_dataset(written(tmp_path, rows), tokenizer, report=report, cache=False)
    assert (report.used, report.images, len(report.dropped))==(4, 4, 0)
    for prepared,given in zip(data, rows):
        turns = (given.get('messages') or [dict(role='user', content=given['question']),
                                           dict(role='assistant', content=given['answer'])])
        theirs = [m | dict(content=[c | dict(image=as_image(c['image'], tmp_path).open()) if c['type']=='image'
                                    else c for c in m['content']]) if isinstance(m['content'], list) else m
                  for m in turns]
        own = processor.apply_chat_template(theirs, tokenize=True, return_dict=True)['input_ids']
        assert prepared['input_ids']==list(own[0] if isinstance(own[0], list) else own)
        learned = [l for l in prepared['labels'] if l!=-100]
        assert tokenizer.decode(learned)==''.join(f"{m['content']}<|im_end|>" for m in turns if m['role']=='assistant')
        assert not set(learned) & {i for i,t in tokenizer.added_tokens_decoder.items()
                                   if 'im' in str(t) and str(t)!='<|im_end|>'}
    everything = encode([question('a', tmp_path/'a.png'), dict(role='assistant', content='b')], tokenizer,
                        train_on='all')
    assert (tokenizer.convert_tokens_to_ids(processor.image_token) not in everything['labels']
            and tokenizer.decode([i for i in everything['labels'] if i!=-100]).startswith('<|im_start|>user'))


@pytest.mark.parametrize('kind', kinds)
def test_loss_and_gradients_are_those_of_the_model(kind, models, tmp_path):
    tokenizer,rows = load_tokenizer(models(kind)),mixed_rows(tmp_path)
    data = prepare_dataset(written(tmp_path, rows), tokenizer, cache=False)
    model = add_lora(load_model(models(kind)), LoRAConfig(lora_dropout=0., target_modules='all-linear')).train()
    for n,p in model.named_parameters():
        if 'lora_B' in n: torch.nn.init.normal_(p, std=.05)
    learned = [p for p in model.parameters() if p.requires_grad]
    batch = Collator(0, tokenizer=tokenizer)(list(data))
    total,n = loss_sum(model, **batch)
    mask = torch.arange(batch['input_ids'].shape[1])<torch.tensor([[len(r['input_ids'])] for r in data])
    own = model(**batch, attention_mask=mask.long()).loss
    assert (total/n-own).abs()<1e-5
    ours,theirs = (torch.autograd.grad(x, learned) for x in (total/n, own))
    assert max(((a-b).norm()/b.norm().clamp(min=1e-6)).item() for a,b in zip(ours, theirs))<1e-4
    other = {k: -v if k=='pixel_values' else v for k,v in batch.items()}
    assert (loss_sum(model, **other)[0]-total).abs()>1e-5 # what the image shows counts


def test_every_row_is_accounted_for(models, tmp_path):
    tokenizer = load_tokenizer(models('llava'))
    saved(tmp_path)
    data = (tmp_path/'a.png').read_bytes()
    (tmp_path/'half.png').write_bytes(data[:70])
    (tmp_path/'empty.png').write_bytes(b'')
    (tmp_path/'text.png').write_text('no picture')
    url = 'data:image/png;base64,'+base64.b64encode(data).decode()
    factory = (lambda text,images,answer='Red.': dict(
        conversations=[{'from': 'human', 'value': text}, {'from': 'gpt', 'value': answer}], images=images))
    good = [row(shows('a.png'), '?'), row(shows(str(tmp_path/'a.png')), '?'), row(
        dict(type='image_url', image_url=dict(url=url)), '?'), row(dict(type='input_image', image_url='a.png'), '?'),
            factory('<image>?', ['a.png']), factory('<image> or <image>?', ['a.png', 'a.png']),
            dict(question='?', answer='Red.', image='a.png'), row(dict(type='image'), '?') | dict(images=['a.png']),
            dict(instruction='Look.', input='<image>', output='Red.', images=['a.png']),
            dict(prompt='<image>?', completion='Red.', images=['a.png']), factory('No picture.', [])]
    bad = {'image lost.png does not exist (': row(shows('lost.png'), '?'), 'half.png cannot be opened': row(
        shows('half.png'), '?'), 'empty.png cannot be opened': row(shows('empty.png'), '?'),
           'text.png cannot be opened': row(shows('text.png'), '?'), 'nothing is fetched by https': row(
               shows('https://example.org/a.png'), '?'), 'nothing is fetched by s3': row(shows('s3://b/a.png'), '?'),
           'no `data:` URL in base64': row(shows('data:image/png;base64,§'), '?'),
           '2 places for images (`<image>`) and 1 images': factory('<image><image>', ['a.png']),
           '1 places for images (`<image>`) and 2 images': factory('<image>', ['a.png', 'a.png']),
           '1 places for images (`<image>`) and 0 images': factory('<image>', []),
           '(role assistant) holds an image': factory('?', ['a.png'], '<image>'),
           'has no place for an image': dict(text='Red.', image='a.png'),
           'only images can be looked at': factory('<image>?', ['a.png']) | dict(videos=['a.mp4']),
           "part of the type 'video'": row(dict(type='video', video='a.mp4'), '?'),
           'too long: 77 tokens with 12 images, `max_length` is 64': row(*[shows('a.png')]*12, '?'),
           'control token <image>': dict(question='What is <image>?', answer='A token.')}
    report = DataReport()
    made = prepare_dataset(written(tmp_path, [*good, *bad.values()]), tokenizer, 64, report=report)
    assert (report.read, report.used)==(len(good)+len(bad), len(good)) and len(report.dropped)==len(bad)
    for dropped,why in zip(report.dropped, bad):
        assert why in dropped['reason'] and dropped['file']==str(tmp_path/'rows.json'), (why, dropped)
    assert [d['line'] for d in report.dropped]==[*range(len(good)+2, len(good)+len(bad)+2)]
    assert (report.notes['images put before the first question']==1 and report.images==11
            and [len(r['images']) for r in made]==[1]*5+[2]+[1]*4+[0])
    assert all(as_image(p).digest==d for r in made for p,d in zip(r['images'], r['image_digests']))
    for overflow in ('truncate', 'split'):
        cut = DataReport()
        prepare_dataset(written(tmp_path, [good[0], bad['too long: 77 tokens with 12 images, `max_length` is 64']]),
                        tokenizer, 64, report=cut, overflow=overflow)
        assert 'a row with images is never cut' in cut.dropped[0]['reason']


def test_images_of_datasets_and_of_lists(models, tmp_path):
    from datasets import Features, Image as Column, List, Value
    tokenizer = load_tokenizer(models('llava'))
    png = io.BytesIO()
    plain('red').save(png, 'PNG')
    rows = dict(images=[[dict(bytes=png.getvalue(), path=None)], [dict(bytes=png.getvalue()[:60], path=None)], []],
                question=['Which?', 'Which?', '2+3?'], answer=['Red.', 'Red.', '5'])
    table,report = (Dataset.from_dict(rows, features=Features(
        images=List(Column()), question=Value('string'), answer=Value('string'))),DataReport())
    made = prepare_dataset(table, tokenizer, report=report)
    assert ((report.used, report.images) == (2, 1) and 'cannot be opened' in report.dropped[0]['reason']
            and report.dropped[0]['line']==2)
    assert Image.open(made[0]['images'][0]).size==(28, 28)
    again = DataReport()
    prepare_dataset(table, tokenizer, report=again)
    assert again.cached
    in_memory = prepare_dataset([dict(question='Which?', answer='Red.', image=plain('red'))], tokenizer, cache=False)
    assert len(in_memory[0]['images'])==1


def test_a_changed_image_is_noticed(models, tmp_path):
    tokenizer = load_tokenizer(models('llava'))
    saved(tmp_path)
    file = written(tmp_path, [row(shows('a.png'), '?'), row(shows('b.png'), '?')])
    def prepared():
        report = DataReport()
        return prepare_dataset(file, tokenizer, report=report),report
    first,report = prepared()
    assert (report.used, report.cached)==(1, False) and prepared()[1].cached
    saved(tmp_path, 'b.png')
    second,report = prepared()
    assert (report.used, report.cached)==(2, False)
    saved(tmp_path, 'a.png', 'blue')
    with pytest.raises(SageError, match='a.png has changed since the data was prepared'):
        Collator(0, tokenizer=tokenizer)([second[0]])
    third,report = prepared()
    assert (not report.cached and data_digest(third)!=data_digest(second)
            and third[0]['input_ids']==second[0]['input_ids'])


def test_the_same_words_about_another_image_are_no_copy(models, tmp_path):
    tokenizer,report = load_tokenizer(models('llava')),DataReport()
    rows = [row(shows(saved(tmp_path, f'{i}.png', list(colours)[i%4], (28+i, 28))),
                'Which colour is this picture, if you look at all of it?') for i in range(20)]
    data = prepare_dataset(written(tmp_path, rows+rows[:3]), tokenizer, report=report, cache=False)
    assert report.duplicates==3
    train,held = split_dataset(data, .2, report=report)
    assert len(held)==5 and report.near_duplicates==0


def test_a_text_model_is_given_no_images(tmp_path, models):
    saved(tmp_path)
    written(tmp_path, [row(shows('a.png'), '?'), *[dict(question='2+3?', answer='5')]*3])
    run = LoRATrainer(config_of('sage-tiny', tmp_path, max_steps=1), quiet=True)
    run.train()
    assert (run.data_report.dropped[0]['reason']=='turn 1 holds an image, and the model takes text only'
            and run.data_report.used==3)
    written(tmp_path, [row(shows('a.png'), '?')])
    with pytest.raises(ValueError, match='no row of .* can be used: 1 of 1 were dropped because: '
                       'turn 1 holds an image, and the model takes text only'):
        LoRATrainer(config_of('sage-tiny', tmp_path, output_dir=tmp_path/'other'), quiet=True).train()
    written(tmp_path, [dict(question='2+3?', answer='5')]*4)
    blind = LoRATrainer(config_of(models('llava'), tmp_path, max_steps=2, output_dir=tmp_path/'text'), quiet=True)
    assert blind.train().steps==2 and blind.data_report.images==0


def test_without_pillow_the_extra_is_named(models, monkeypatch):
    folder = models('llava')
    monkeypatch.setitem(__import__('sys').modules, 'PIL', None)
    with pytest.raises(SageError, match=r'takes images: images need Pillow: pip install "sage-finetune\[vision\]"'):
        load_tokenizer(folder)


@pytest.fixture(scope='module')
def tuned(models, tmp_path_factory):
    "A run that has learned which colour an image has"
    folder = tmp_path_factory.mktemp('tuned')
    rows = [row(shows(saved(folder, f'{i}.png', c, (40, 28) if i%3 else (28, 28))), 'Which colour is it?',
                answer=f'It is {c}.') for i in range(64) for c in [list(colours)[i%4]]]
    written(folder, [*rows, *(dict(question=f'Say {c}.', answer=f'{c}.') for c in colours)])
    run = LoRATrainer(config_of(models('llava'), folder, num_train_epochs=6, per_device_train_batch_size=8,
                                test_size=.1, lora=dict(r=16, lora_alpha=32, target_modules='all-linear')), quiet=True)
    return folder,run,run.train()

@pytest.mark.slow
def test_only_the_image_tells_and_the_answers_are_right(tuned, capsys):
    folder,run,result = tuned
    assert result.loss_before>3 and result.loss_after<.3
    model,tokenizer = load_for_chat(folder/'run', adapter=True)
    truth = [list(colours)[i%4] for i in range(16)]
    held_out = [[question('Which colour is it?', plain(c, draw=random.Random(100+i)))] for i,c in enumerate(truth)]
    assert [a.text for a in answers(model, tokenizer, held_out)]==[f'It is {c}.' for c in truth] # none was trained on
    wrong = [[q | dict(images=[plain(truth[(i+1)%4])])] for i,[q] in enumerate(held_out)]
    # same words, another image
    assert [a.text for a in answers(model, tokenizer, wrong)]==[f'It is {truth[(i+1)%4]}.' for i in range(16)]
    parts = [dict(role='user', content=[shows(str(folder/'0.png')), dict(type='text', text='Which colour is it?')])]
    assert answers(model, tokenizer, [parts])[0].text=='It is red.'

@pytest.mark.slow
def test_it_merges_with_proof_and_answers_on_the_command_line(tuned, capsys):
    from sage_finetune.cli import main
    folder = tuned[0]
    report = merge_run(folder/'run')
    assert (report.how=='weight by weight' and report.divergence<=report.bound and report.same==report.asked==8
            and report.effect>1)
    model,tokenizer = load_for_chat(folder/'run')
    assert not hasattr(model, 'disable_adapter') and processor_of(tokenizer) is not None
    assert all('pixel_values' in row for row in merging.probes_of(folder/'run', tokenizer)[0])
    assert main(['chat', str(folder/'run'), '--image', str(folder/'2.png'), '--prompt', 'Which colour is it?'])==0
    assert capsys.readouterr().out=='It is blue.\n'
    assert (main(['chat', str(folder/'run'), '--image', str(folder/'lost.png'), '--prompt', '?'])==1
            and 'lost.png does not exist' in capsys.readouterr().err)
    assert (main(['chat', 'x', '--url', 'http://127.0.0.1:9', '--image', 'a.png', '--prompt', '?'])==1
            and '`--image` is for a model that is loaded here' in capsys.readouterr().err)

@pytest.mark.slow
def test_its_form_is_written_down(tuned, tmp_path):
    from sage_finetune.serving.export import export_folder
    folder = tuned[0]
    shutil.copytree(folder/'run'/'lora_weights', tmp_path/'adapter')
    settings = read_json(tmp_path/'adapter'/'processor_config.json')
    settings['image_processor']['crop_size'] = dict(height=14, width=14)
    (tmp_path/'adapter'/'processor_config.json').write_text(json.dumps(settings))
    with pytest.raises(SageError, match='the processor of images has changed'): load_for_chat(tmp_path/'adapter')
    assert (export_folder(folder/'run', tmp_path/'out', 'adapter')/'processor_config.json').is_file()

@pytest.mark.parametrize('kind', ['adapter', 'merged'])
@pytest.mark.slow
def test_the_card_says_how_to_use_it(kind, tuned, models, tmp_path, monkeypatch, capsys):
    from sage_finetune.serving.export import export_folder
    out = export_folder(tuned[0]/'run', tmp_path/'out', kind)
    code = (out/'README.md').read_text().partition('```python\n')[2].partition('```')[0]
    plain('green').save(tmp_path/'photo.jpg')
    monkeypatch.chdir(tmp_path)
    exec(code.replace('What is this?', 'Which colour is it?').replace(
        "name, base = 'run', 'llava'", f'name, base = {str(out)!r}, {models("llava")!r}'), {})
    assert capsys.readouterr().out=='It is green.\n'

@pytest.mark.slow
def test_the_dashboard_of_tokens_sees_the_picture(tuned):
    from sage_finetune.runs.run import Run
    from sage_finetune.ui.token_losses import worst_rows
    seen = worst_rows(Run(tuned[0]/'run'), 2)
    assert all(after<.5 for after in seen.means) # without its image a row would be a guess among four

@pytest.mark.slow
def test_a_talk_about_a_picture(tuned, tmp_path):
    from sage_finetune.data import load_training_data
    from sage_finetune.merge_chat import converse, speaker
    from sage_finetune.rows.formats import to_messages
    written,lines = ([],iter([f'/image {tuned[0]/"1.png"}', 'Which colour is it?', '/image lost.png',
                           f'/save {tmp_path/"talk.json"}', '/exit']))
    model,tokenizer = load_for_chat(tuned[0]/'run', adapter=True)
    converse(speaker(model, tokenizer, write=written.append), lambda prompt: next(lines), written.append)
    text = ''.join(written)
    assert 'It is green.' in text and 'lost.png does not exist' in text
    assert to_messages(load_training_data(tmp_path/'talk.json')[0])[0]==question(
        'Which colour is it?', str(tuned[0]/'1.png'))

def test_the_server_opens_no_picture():
    from sage_finetune.serving.request import BadRequest, read_request
    body = dict(messages=[dict(role='user', content=[
        dict(type='image_url', image_url=dict(url='/etc/hostname')), dict(type='text', text='?')])])
    with pytest.raises(BadRequest, match='answers text only, and a turn holds an image'): read_request(body, 'm')


@pytest.mark.parametrize('kind', few(['llava', 'qwen2_vl']))
def test_resuming_is_exact_to_the_bit(kind, models, tmp_path):
    rows = [row(shows(saved(tmp_path, f'{i}.png', list(colours)[i%4], (28+14*(i%3), 28))), 'Which?', answer=f'{i}')
            for i in range(12)]
    written(tmp_path, rows)
    how = dict(max_steps=4, save_steps=2, save_total_limit=None,
               lora=dict(r=4, lora_alpha=8, lora_dropout=.1, target_modules='all-linear'))
    LoRATrainer(config_of(models(kind), tmp_path, output_dir=tmp_path/'whole', **how), quiet=True).train()
    LoRATrainer(config_of(models(kind), tmp_path, **how), quiet=True).train()
    for left in ('checkpoints/checkpoint-4', 'lora_weights'): shutil.rmtree(tmp_path/'run'/left)
    assert LoRATrainer(config_of(models(kind), tmp_path, **how), quiet=True).train().steps==4
    adapter = lambda run: (tmp_path/run/'lora_weights'/'adapter_model.safetensors').read_bytes()
    assert adapter('run')==adapter('whole')
    saved(tmp_path, '3.png', 'yellow')
    shutil.rmtree(tmp_path/'run'/'lora_weights')
    with pytest.raises(SageError, match='holds another run .*the data'):
        LoRATrainer(config_of(models(kind), tmp_path, **how), quiet=True).train()


@pytest.mark.parametrize('kind', few(['qwen2_vl', 'gemma3', 'idefics3']))
def test_other_models_train_and_merge(kind, models, tmp_path, monkeypatch):
    mixed_rows(tmp_path)
    written(tmp_path, mixed_rows(tmp_path)*2)
    run = LoRATrainer(config_of(models(kind), tmp_path, max_steps=2), quiet=True)
    run.train()
    assert run.model.training is not None and 'all in model.' in adapter_line(run.model)
    assert 'images not counted' in str(estimate_memory(run.config))
    report = merge_run(tmp_path/'run')
    assert report.how=='weight by weight' and report.divergence<=report.bound and report.same==report.asked
    monkeypatch.setattr(merging, 'stream_above', 0)
    streamed = merge_run(tmp_path/'run')
    assert streamed.compared=='next tokens' and streamed.divergence<=streamed.bound and streamed.same==streamed.asked
    asked = [[question('Which?', tmp_path/'a.png')], 'Why?',
             [question('Which of them?', tmp_path/'b.png', tmp_path/'c.png')]]
    together,alone = (answers(*load_for_chat(tmp_path/'run'), asked,
                              6),[answers(*load_for_chat(tmp_path/'run', adapter=True), [a], 6)[0] for a in asked])
    assert together==alone # in a batch and one by one, merged and not

def test_a_processor_in_the_older_files(models, tmp_path):
    "As most models on the Hub have it: settings of images and videos in files of their own, the chat template in JSON"
    shutil.copytree(models('qwen2_vl'), tmp_path/'model')
    settings = read_json(tmp_path/'model'/'processor_config.json')
    template = (tmp_path/'model'/'chat_template.jinja').read_text()
    for left in ('processor_config.json', 'chat_template.jinja'): (tmp_path/'model'/left).unlink()
    old = settings['image_processor'] | dict(image_processor_type='Qwen2VLImageProcessorFast',
                                             processor_class='Qwen2VLProcessor', min_pixels=28*28, max_pixels=56*84)
    old.pop('size')
    (tmp_path/'model'/'preprocessor_config.json').write_text(json.dumps(old))
    (tmp_path/'model'/'video_preprocessor_config.json').write_text('{"video_processor_type": "Qwen2VLVideoProcessor"}')
    (tmp_path/'model'/'chat_template.json').write_text(json.dumps(dict(chat_template=template)))
    written(tmp_path, mixed_rows(tmp_path)*2)
    now,then = (prepare_dataset(tmp_path/'rows.json', load_tokenizer(m), cache=False)
                for m in (str(tmp_path/'model'), models('qwen2_vl')))
    assert [r['input_ids'] for r in now]==[r['input_ids'] for r in then]
    LoRATrainer(config_of(str(tmp_path/'model'), tmp_path, max_steps=1), quiet=True).train()
    merge_run(tmp_path/'run', rows=2)
    for folder in ('lora_weights', 'merged_model'):
        for name in ('preprocessor_config.json', 'video_preprocessor_config.json'):
            assert (tmp_path/'run'/folder/name).read_bytes()==(tmp_path/'model'/name).read_bytes()
    assert [r['input_ids'] for r in prepare_dataset(
        tmp_path/'rows.json', load_for_chat(tmp_path/'run')[1], cache=False)]==[r['input_ids'] for r in then]

def test_a_pattern_reaches_the_part_that_sees(models, tmp_path):
    written(tmp_path, mixed_rows(tmp_path)*2)
    run = LoRATrainer(config_of(models('llava'), tmp_path, max_steps=2, lora=dict(
        r=4, target_modules=r'.*(vision_tower|language_model).*\.(q_proj|v_proj)')), quiet=True)
    run.train()
    assert 'in 12 layers of model.language_model and 4 outside of it' in adapter_line(run.model)
    report = merge_run(tmp_path/'run')
    assert report.how=='weight by weight' and report.divergence<=report.bound


def test_a_config_of_llamafactory_brings_its_images(models, tmp_path):
    from sage_finetune.runs.other_tools import config_from_other_tool
    (tmp_path/'data').mkdir()
    (tmp_path/'media').mkdir()
    saved(tmp_path/'media', 'a.png')
    rows = [dict(messages=[dict(role='user', content='<image>Which?'), dict(role='assistant', content='Red.')],
                 images=['a.png']),
            dict(messages=[dict(role='user', content='2+3?'), dict(role='assistant', content='5')], images=[])]
    (tmp_path/'data'/'pics.json').write_text(json.dumps(rows*2))
    tags = dict(role_tag='role', content_tag='content', user_tag='user', assistant_tag='assistant')
    (tmp_path/'data'/'dataset_info.json').write_text(json.dumps(dict(pics=dict(
        file_name='pics.json', formatting='sharegpt', columns=dict(messages='messages', images='images'), tags=tags))))
    settings = dict(model_name_or_path=models('llava'), stage='sft', do_train=True, finetuning_type='lora',
                    lora_rank=4, lora_target='all', dataset='pics', dataset_dir=str(tmp_path/'data'),
                    media_dir=str(tmp_path/'media'),
                    template='llava', cutoff_len=256, output_dir=str(tmp_path/'run'), per_device_train_batch_size=2,
                    gradient_accumulation_steps=1, max_steps=1, freeze_vision_tower=True, report_to='none')
    (tmp_path/'lf.json').write_text(json.dumps(settings))
    run = LoRATrainer(config_from_other_tool(tmp_path/'lf.json', lambda line: None), quiet=True)
    run.train()
    assert (run.data_report.used, run.data_report.images, len(run.data_report.dropped))==(4, 2, 0)
    assert {n.split('.lora_')[0].split('.')[3] for n,p in run.model.named_parameters() if p.requires_grad}=={
        'language_model'}

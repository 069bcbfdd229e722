"What is written piece by piece is what `decode` makes of the whole answer, with every kind of vocabulary"
import random

import pytest
import torch
from tokenizers import decoders, models, Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from sage_finetune.config import resolve_model
from sage_finetune.inference.generate import StopStreamer


def byte_fallback():
    "As Llama 2 and Mistral have it: a character without a token of its own is a row of bytes"
    words = ['<unk>', '<s>', '</s>', *(f'<0x{b:02X}>' for b in range(256)), '▁a', '▁hel', 'lo', '.', '▁']
    model = Tokenizer(models.BPE({w: i for i,w in enumerate(words)}, [], unk_token='<unk>', byte_fallback=True))
    model.decoder = decoders.Sequence([decoders.Replace('▁', ' '), decoders.ByteFallback(), decoders.Fuse(),
                                       decoders.Strip(' ', 1, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=model, bos_token='<s>', eos_token='</s>', unk_token='<unk>')


def word_pieces(**more):
    words = '[UNK]', '[CLS]', 'hello', '##ing', '.', 'a', '##b', '[SEP]', "'", 's'
    model = Tokenizer(models.WordPiece({w: i for i,w in enumerate(words)}, unk_token='[UNK]'))
    model.decoder = decoders.WordPiece()
    special = dict(unk_token='[UNK]', cls_token='[CLS]', sep_token='[SEP]')
    return PreTrainedTokenizerFast(tokenizer_object=model, **special, **more)


def metaspace():
    words = '<unk>', '<s>', '</s>', '▁', '▁one', '▁▁', 'two', '\n', '▁.'
    model = Tokenizer(models.Unigram([(w, -1.0) for w in words], 0))
    model.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=model, unk_token='<unk>', bos_token='<s>', eos_token='</s>')


VOCABULARIES = {'byte fallback': byte_fallback, 'word pieces': word_pieces, 'metaspace': metaspace,
                'word pieces, cleaned': lambda: word_pieces(clean_up_tokenization_spaces=True),
                'bytes': lambda: AutoTokenizer.from_pretrained(resolve_model('sage-tiny'))}


def decoded(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def pieces(tokenizer, ids, stops=(2,), stop_texts=()):
    "What is shown of an answer, piece by piece"
    shown = []
    streamer = StopStreamer(tokenizer, stops, stop_texts, shown.append)
    streamer.put(torch.tensor([[1]])) # the prompt
    for i in ids: streamer.put(torch.tensor([i]))
    streamer.end()
    return shown


@pytest.mark.parametrize('kind', VOCABULARIES)
def test_any_tokens_give_the_text_of_the_whole_answer(kind):
    tokenizer,draw = VOCABULARIES[kind](),random.Random(0)
    for _ in range(400):
        ids = [draw.randrange(len(tokenizer)) for _ in range(draw.randrange(1, 25))]
        if kind=='byte fallback': ids = [i if draw.random()<.6 else draw.randrange(259, 264) for i in ids]
        whole = ids[:ids.index(2)] if 2 in ids else ids
        assert ''.join(pieces(tokenizer, ids)) == decoded(tokenizer, whole), ids


BYTES = {'a byte too many': ('é'.encode()+b'\x98', '\ufffd\ufffd\ufffd'),
         'a character cut off': (b'\xe4\xb8', '\ufffd\ufffd'),
         'a lone continuation': (b'\x80', '\ufffd'), 'two whole characters': ('鱼é'.encode(), '鱼é')}


@pytest.mark.parametrize('kind', BYTES)
def test_bytes_of_byte_fallback(kind):
    tokenizer,(raw, text) = byte_fallback(),BYTES[kind]
    ids = [tokenizer.convert_tokens_to_ids(f'<0x{b:02X}>') for b in raw]
    hello = tokenizer.convert_tokens_to_ids(['▁hel', 'lo', '.'])
    assert ''.join(pieces(tokenizer, [*ids, *hello])) == f'{text} hello.'
    assert ''.join(pieces(tokenizer, ids)) == text
    assert pieces(tokenizer, [*hello, *ids, *hello])[:2] == ['hel', 'lo'], 'what cannot change is shown at once'


def test_an_answer_keeps_its_spaces_and_ends_before_a_stop_text():
    tokenizer = VOCABULARIES['bytes']()
    ids = tokenizer('x . y !\n  z')['input_ids']
    assert ''.join(pieces(tokenizer, ids, [])) == 'x . y !\n  z'
    assert ''.join(pieces(tokenizer, ids, [], (' !', 'never'))) == 'x . y'

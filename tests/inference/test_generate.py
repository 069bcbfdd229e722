"One loop makes every answer: the same text from a batch, a stream, the server and a live run"
from queue import Queue

import pytest
import torch

from sage_finetune.config import resolve_model
from sage_finetune.serving.chat_api import Engine
from sage_finetune.inference.generate import answers, encode_question, generate_answers, load_for_chat, stream_answer
from sage_finetune.serving.request import ChatRequest
from sage_finetune.ui.live import _model_answer

QUESTIONS = ['What does the function `os.path.join` do?', 'What is Python?', '你好 🐟?']


class Loaded:
    "What a live run is to the function that answers"
    def __init__(self): self.model,self.tokenizer = load_for_chat(resolve_model('sage-tiny'))


@pytest.fixture(scope='module')
def run(): return Loaded()


def batch(run, question, temperature, seed):
    torch.manual_seed(seed)
    return answers(run.model, run.tokenizer, [question], 32, temperature=temperature)[0].text


def stream(run, question, temperature, seed):
    torch.manual_seed(seed)
    messages = [dict(role='user', content=question)]
    return ''.join(stream_answer(run.model, run.tokenizer, messages, 32, temperature))


def live(run, question, temperature, seed):
    torch.manual_seed(seed)
    return _model_answer(run, question, 32, temperature).text


def served(run, question, temperature, seed):
    engine,pieces = Engine(run.model, run.tokenizer),Queue()
    request = ChatRequest([dict(role='user', content=question)], 32, temperature, seed=seed)
    engine.start(request, pieces.put)
    assert pieces.get()==len(engine.prompt(request)[0][0])
    text = ''
    while isinstance(piece := pieces.get(), str): text += piece
    engine.close()
    assert piece.text==text
    return text


@pytest.mark.parametrize('temperature', [0.0, 1.3])
@pytest.mark.parametrize('question', QUESTIONS)
def test_every_way_to_an_answer_gives_the_same_text(run, question, temperature):
    texts = [way(run, question, temperature, seed=7) for way in (batch, stream, live, served)]
    assert texts[0] and texts==texts[:1]*4


def test_a_model_that_asks_for_a_penalty_gets_none_where_the_likeliest_token_is_taken(run, monkeypatch):
    plain = [way(run, QUESTIONS[0], 0.0, seed=7) for way in (batch, stream, live, served)]
    monkeypatch.setattr(run.model.generation_config, 'repetition_penalty', 5.0)
    assert [way(run, QUESTIONS[0], 0.0, seed=7) for way in (batch, stream, live, served)]==plain


def test_an_answer_leaves_no_tensor_that_a_backward_pass_cannot_use(run):
    "Under `inference_mode`, what the model keeps could not be used in training any more"
    question = encode_question(QUESTIONS[0], run.tokenizer)
    generate_answers(run.model, run.tokenizer, [question], 4)
    kept = [b for b in run.model.buffers()]+[p for p in run.model.parameters()]
    assert not any(t.is_inference() for t in kept)
    run.model(torch.tensor([question[0]])).logits.sum().backward()
    run.model.zero_grad()


def test_an_error_in_the_thread_that_generates_reaches_who_reads(run, monkeypatch):
    def broken(**kwargs): raise RuntimeError('no memory')
    monkeypatch.setattr(run.model, 'generate', broken)
    with pytest.raises(RuntimeError, match='no memory'): list(stream_answer(run.model, run.tokenizer, QUESTIONS[0]))

"How many answers become others when half as many are generated together: by noise, and by cumulated probabilities"
import argparse
import time

import torch

from sage_finetune.base.loading import load_model, load_tokenizer
from sage_finetune.config import resolve_model, RewardConfig
from sage_finetune.inference.generate import encode_question
from sage_finetune.rewards import rollout


class Cumulated(rollout.SeededDraw):
    "A token is where the cumulated probabilities, in the order of the vocabulary, pass a number"
    def __call__(self, input_ids, scores):
        sums = scores.double().softmax(-1).cumsum(-1)
        at = (self.numbers[:, len(self.log_probs), None]/2**63).to(sums)*sums[:, -1:]
        chosen = (sums<=at).sum(-1, keepdim=True).clamp(max=scores.shape[-1]-1)
        self.log_probs.append(scores.log_softmax(-1).gather(1, chosen)[:, 0])
        return torch.full_like(scores, -torch.inf).scatter(1, chosen, 0.0)


def compared(model, tokenizer, draw, times, how):
    "(answers, tokens, answers that differ), of 16 questions together and of 8 of them"
    rollout.SeededDraw = draw
    asked = [f'What is `{a}_{b}` for?' for a in ('open', 'read', 'find', 'close')
             for b in ('letter', 'garden', 'bridge', 'window')]
    prompts,pairs = [encode_question(q, tokenizer)[0] for q in asked],[]
    for n in range(times):
        seeds = [rollout.draw_seed(n, i) for i in range(16)]
        whole = rollout.sample_answers(model, tokenizer, prompts, seeds, how)
        half = rollout.sample_answers(model, tokenizer, prompts[::2], seeds[::2], how)
        pairs += zip(whole[::2], half)
    return len(pairs),sum(len(a.ids) for a,_ in pairs),sum(a.ids!=b.ids for a,b in pairs)


if __name__=='__main__':
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument('--model', default='sage-tiny')
    asked.add_argument('--times', type=int, default=60)
    given = asked.parse_args()
    tokenizer = load_tokenizer(resolve_model(given.model))
    model = load_model(given.model, torch.float32, 'cpu').eval()
    for draw in (rollout.SeededDraw, Cumulated):
        began = time.process_time()
        found = compared(model, tokenizer, draw, given.times, RewardConfig(max_completion_length=16))
        print(f'{draw.__name__}: {found[2]} of {found[0]} answers ({found[1]:,} tokens) became others; '
              f'{time.process_time()-began:.0f} s of processor time', flush=True)

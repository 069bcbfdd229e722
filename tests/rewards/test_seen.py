"What a run that learns from rewards shows: in the terminal, from its folder, and while it trains"
import json

import pytest

from quick import two_layers
from sage_finetune.cli import main
from sage_finetune.config import RewardConfig
from sage_finetune.rewards.rollout import KeptAnswers, read_answers
from sage_finetune.rewards.seen import hacked, look_at_rewards, most_telling, opened_group, pushed_tokens
from sage_finetune.rewards.trainer import last_groups, RewardTrainer
from sage_finetune.rows.sources import save_rows
from sage_finetune.ui.live import LiveRun


def vowels(question, answer, row): return sum(c in 'aeiou' for c in answer)/max(1, len(answer))


@pytest.fixture(scope='module')
def live(tmp_path_factory):
    "A run that was watched: four steps, two rewards"
    folder = tmp_path_factory.mktemp('seen')
    rows = save_rows(folder/'rows.jsonl', [dict(question=f'What is {letter} for?') for letter in 'abcdef'])
    c = RewardConfig(model_name=two_layers, data_path=rows, output_dir=folder/'run', test_size=.2, max_steps=4,
                     num_generations=4, per_device_train_batch_size=8, gradient_accumulation_steps=1,
                     learning_rate=5e-3, max_length=64, max_completion_length=6, report_to='none')
    live = LiveRun(RewardTrainer(c, rewards=[vowels, dict(reward='length', most=4, weight=.5)])).start()
    live.wait(120)
    return live


def test_the_dashboard_shows_rewards_and_a_group(live):
    board = live.board
    assert board.phase=='done' and board.figure=='reward' and len(board.loss.line)==4
    text,page = str(board),board._repr_html_()
    assert 'held-out reward' in text and 'reward vowels' in text and 'KL to the base' in text and 'advantage' in text
    assert 'advantage' in page and live.result.reward_after is not None


def test_the_tokens_of_the_group_are_coloured_while_it_trains(live):
    "Those of the answers that were pushed most, as `look` shows them afterwards"
    group = most_telling(last_groups(live.run), 1)[0]
    page = live.board._repr_html_()
    pushed = [pushed_tokens(a, live.run.tokenizer)._repr_html_() for a in group['answers'] if a['advantage']]
    assert sum(p in page for p in pushed)>=2 and str(opened_group(group, live.run.tokenizer, 4)) in str(live.board)


def test_the_folder_shows_the_same_afterwards(live, capsys, tmp_path):
    folder = live.run.folder.path
    assert main(['look', str(folder), '--plot', str(tmp_path/'curves.png')])==0
    out = capsys.readouterr().out
    assert '4 steps of learning from rewards' in out and 'advantage' in out and 'share of groups with signal' in out
    assert (tmp_path/'curves.png').stat().st_size>10_000
    look = look_at_rewards(folder, step=2, groups=1)
    assert look.groups[0]['step']==2 and look.kept==(4, 4) and '<span title=' in look._repr_html_()
    with pytest.raises(ValueError, match='the nearest is 4'): look_at_rewards(folder, step=99)


def answers(right, short, n=8):
    "A group in which so many of eight answers are right, and so many are short"
    return [dict(text=f'{i<right}{i}', ids=[1]*(2 if i<short else 8), log_probs=[], ended=True, advantage=0.0,
                 reward=float(i<right)+2*float(i<short), parts=dict(right=float(i<right), short=float(i<short)))
            for i in range(n)]

def run_of(*steps):
    return [dict(step=n, row=0, place='a:1', question='2+3?', answers=answers(*s)) for n,s in enumerate(steps, 1)]

@pytest.mark.parametrize('steps,found', [
    ([(4, 1)]*5+[(0, 8)]*5, ['right']), ([(1, 1)]*5+[(8, 8)]*5, []), ([(8, 8)]*5+[(0, 0)]*5, []), ([(4, 4)]*10, []),
    ([(4, 1)]*3, [])])
def test_a_part_that_was_given_up_is_found(steps, found):
    look = hacked(run_of(*steps))
    assert look.found==found and all(e[0] in found for e in look.examples) and bool(look.examples)==bool(found)


def test_a_file_of_answers_is_bounded_and_a_torn_one_is_mended(live, tmp_path):
    whole = (live.run.folder.path/'answers.jsonl.gz').read_bytes()
    kept = KeptAnswers(tmp_path/'answers.jsonl.gz', most=1)
    kept.most = 8*len(whole) # an eighth of it is full: every second step from here on
    kept.path.write_bytes(whole)
    assert [kept.keeps(n) for n in (1, 2, 3, 4)]==[False, True, False, True]
    kept.most = len(whole)
    assert not any(kept.keeps(n) for n in range(1, 1000))
    kept.path.write_bytes(whole[:-3])
    assert {g['step'] for g in read_answers(kept.path)}=={1, 2, 3}
    kept.trim(2)
    assert {g['step'] for g in read_answers(kept.path)}=={1, 2} and whole.startswith(kept.path.read_bytes())
    assert json.loads(json.dumps(read_answers(kept.path, step=1)))==[g for g in read_answers(kept.path) if g['step']==1]

"What the dashboard says of an exam"
import pytest

from sage_finetune.ui.board import Board, facts_table


@pytest.mark.parametrize('name, words', [('exam', 'exam, right'), ('general', 'general questions, right')])
def test_a_score_is_shown_with_its_interval(name, words):
    board = Board()
    board.update(now={name: .5, f'{name}_low': .2, f'{name}_high': .8})
    row, = [r for r in facts_table(board).rows if r[0]==words]
    assert row[1]=='50% (with 95 % probability 20% to 80%)'


def test_without_an_exam_nothing_is_said(): assert 'right' not in str(facts_table(Board()))

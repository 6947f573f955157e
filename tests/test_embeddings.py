"""Word embeddings in the student's width: truncated SVD, and maps between vocabularies."""

import pytest
import torch

from xdistil.embeddings import compress, map_to_student, plain_pieces


@pytest.fixture
def matrix():
    """[60, 12] with a large mean, so that centring would show."""
    return torch.randn(60, 12) * torch.linspace(3, 0.2, 12) + 2


@pytest.mark.parametrize("rank", [1, 5, 11, 12])
def test_the_error_is_the_tail_of_the_singular_values(matrix, rank):
    small, values = compress(matrix, rank)
    assert small.shape == (60, rank) and small.dtype == torch.float32
    rebuilt = small @ torch.linalg.lstsq(small, matrix).solution
    error, tail = torch.linalg.norm(matrix - rebuilt), torch.linalg.norm(values[rank:])
    torch.testing.assert_close(error, tail, atol=1e-4, rtol=1e-4)
    # U_k S_k: its columns are orthogonal, their lengths the singular values
    torch.testing.assert_close(small.T @ small, torch.diag(values[:rank] ** 2), atol=1e-2, rtol=1e-4)


def test_singular_values_are_those_of_the_uncentred_matrix(matrix):
    _, values = compress(matrix, 1)
    torch.testing.assert_close(values, torch.linalg.svdvals(matrix), rtol=1e-4, atol=1e-4)
    centred = torch.linalg.svdvals(matrix - matrix.mean(0))
    assert abs(values[0] - centred[0]) > 0.2 * values[0]


def test_blocks_make_no_difference():
    tall = torch.randn(40_000, 4)  # more rows than two blocks
    torch.testing.assert_close(compress(tall, 4)[1], torch.linalg.svdvals(tall), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rank", [0, 13, -1])
def test_a_rank_that_is_none_is_refused(matrix, rank):
    with pytest.raises(ValueError, match=rf"rank {rank} of a \(60, 12\) matrix; set hidden_size to at most 12"):
        compress(matrix, rank)
    with pytest.raises(ValueError, match="at most 5"):
        compress(matrix[:5], 6)


def test_signs_are_fixed(matrix):
    small, _ = compress(matrix, 4)
    basis = torch.linalg.lstsq(matrix, small).solution  # small = matrix @ basis
    assert (basis.gather(0, basis.abs().argmax(0, keepdim=True)) > 0).all()
    order = torch.randperm(60)
    torch.testing.assert_close(compress(matrix[order], 4)[0], small[order], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(compress(-matrix, 4)[0], -small, rtol=1e-3, atol=1e-3)


def test_the_result_goes_where_it_is_wanted(matrix):
    rows = torch.nn.Parameter(torch.empty(60, 5))
    with torch.no_grad():
        small, _ = compress(matrix, 5, out=rows)
    assert small is rows and torch.equal(rows, compress(matrix, 5)[0])


def test_compression_keeps_no_graph(matrix):
    assert not compress(torch.nn.Parameter(matrix), 3)[0].requires_grad


def test_marks_of_tokenizers_are_one_language():
    assert plain_pieces(["[CLS]", "The", "##re"]) == [" [cls]", " the", "re"]
    assert plain_pieces(["<s>", "▁The", "re"]) == ["<s>", " the", "re"]
    assert plain_pieces(["<s>", "ĠThe", "re"]) == ["<s>", " the", "re"]


@pytest.fixture
def two():
    """A SentencePiece teacher [50, 6] and a WordPiece student [60, 4], which share 40 pieces and a linear map."""
    starts, insides = [f"w{i}" for i in range(20)], [f"x{i}" for i in range(20)]
    pieces_t = [*("▁" + p for p in starts), *insides, *(f"▁only{i}" for i in range(10))]
    pieces_s = ["[PAD]", *("##" + p for p in starts[:19]), *reversed(["##" + p for p in insides]), *starts]
    teacher, linear = torch.randn(50, 6), torch.randn(6, 4)
    row = {p: i for i, p in enumerate(pieces_s)}
    student = torch.randn(60, 4)
    for i, piece in enumerate([*starts, *("##" + p for p in insides)]):
        student[row[piece]] = teacher[i] @ linear
    return teacher, pieces_t, student, pieces_s, linear, row


def test_a_linear_map_between_vocabularies_is_found(two):
    teacher, pieces_t, student, pieces_s, linear, _ = two
    mapped, n_shared = map_to_student(teacher, pieces_t, student, pieces_s)
    assert mapped.shape == (50, 4) and n_shared == 40
    error = (mapped[40:] - teacher[40:] @ linear).norm() / (teacher[40:] @ linear).norm()
    assert error < 0.01  # the ridge leaves a little


def test_shared_pieces_keep_the_rows_of_the_student(two):
    teacher, pieces_t, student, pieces_s, _, row = two
    student += 0.1 * torch.randn(60, 4)  # so that no map is exact
    mapped, _ = map_to_student(teacher, pieces_t, student, pieces_s)
    assert torch.equal(mapped[3], student[row["w3"]]) and not torch.equal(mapped[3], student[row["##w3"]])
    assert torch.equal(mapped[25], student[row["##x5"]])


def test_too_few_shared_pieces_are_refused(two):
    teacher, pieces_t, student, pieces_s, *_ = two
    with pytest.raises(ValueError, match="share 5 pieces, too few to map 6 dimensions; set student_init: scratch"):
        map_to_student(teacher[:5], pieces_t[:5], student, pieces_s)
    with pytest.raises(ValueError, match="share 0 pieces"):
        map_to_student(teacher, [f"▁y{i}" for i in range(50)], student, pieces_s)

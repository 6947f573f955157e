"""The teacher's word embeddings in the student's width: truncated SVD, or mapped by shared words."""

from __future__ import annotations

import torch


def compress(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Truncated SVD of word embeddings, not centred (2004.05686).

    The right singular vectors come from the H x H second-moment matrix, summed in double
    precision block by block, so no double-precision copy of the embeddings is made.

    Args: matrix [V, H]; rank, at most min(V, H).
    Returns: U_k S_k = matrix @ V_k of shape [V, rank], and all H singular values, descending.
    Raises ValueError if the rank does not fit.
    """
    n_words, width = matrix.shape
    if not 1 <= rank <= min(n_words, width):
        raise ValueError(
            f"compress_word_embedding: rank {rank} of a {n_words} x {width} matrix; "
            f"set hidden_size to at most {min(n_words, width)}"
        )
    moments = torch.zeros(width, width, dtype=torch.float64)
    for block in matrix.detach().cpu().split(8192):
        block = block.double()
        moments += block.T @ block
    values, vectors = torch.linalg.eigh(moments)
    basis = vectors.flip(-1)[:, :rank].to(matrix.dtype)
    # a sign per direction, so that the result does not depend on the LAPACK build
    basis = basis * basis.gather(0, basis.abs().argmax(0, keepdim=True)).sign()
    return matrix.detach().cpu() @ basis, values.flip(-1).clamp(min=0).sqrt().float()


def rescale(matrix: torch.Tensor, mean_norm: float) -> torch.Tensor:
    """The matrix times one number, so that its rows have the given mean norm."""
    return matrix * (mean_norm / matrix.norm(dim=-1).mean().clamp(min=1e-12))


def plain_piece(piece: str) -> str:
    """A word piece without its tokenizer's marks: word starts get one space in front."""
    if piece.startswith("##"):
        return piece[2:].lower()
    return (" " + piece.lstrip("▁Ġ")).lower()


def mapped_to_student(
    teacher_matrix: torch.Tensor,
    teacher_pieces: list[str],
    student_matrix: torch.Tensor,
    student_pieces: list[str],
    marks_starts: bool,
) -> tuple[torch.Tensor, int]:
    """Teacher embeddings mapped into a pretrained student's space, so that its layers still fit.

    Least squares on the pieces that both vocabularies share; these keep the student's own rows.

    Args: teacher_matrix [V_t, H_t], student_matrix [V_s, H_s], and the pieces in id order;
        marks_starts: the teacher marks word starts (SentencePiece, byte BPE), not continuations.
    Returns: [V_t, H_s] and the number of shared pieces.
    Raises ValueError if fewer pieces are shared than the teacher is wide.
    """
    def key(piece: str) -> str:
        if marks_starts and not piece.startswith(("▁", "Ġ")):
            return piece.lower()
        return plain_piece(piece)

    row_of = {plain_piece(piece): row for row, piece in reversed(list(enumerate(student_pieces)))}
    shared = [(i, row_of[key(p)]) for i, p in enumerate(teacher_pieces) if key(p) in row_of]
    if len(shared) < teacher_matrix.shape[1]:
        raise ValueError(
            f"compress_word_embedding: the vocabularies share {len(shared)} pieces, too few to map "
            f"{teacher_matrix.shape[1]} dimensions; build the student with student_init: scratch"
        )
    rows_t, rows_s = (torch.tensor(rows) for rows in zip(*shared, strict=True))
    source, goal = teacher_matrix[rows_t].double(), student_matrix[rows_s].double()
    gram = source.T @ source
    ridge = 1e-3 * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    mapped = teacher_matrix.float() @ torch.linalg.solve(gram + ridge, source.T @ goal).float()
    mapped[rows_t] = student_matrix[rows_s].float()
    return mapped, len(shared)

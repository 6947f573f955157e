"""The teacher's word embeddings in the student's width: truncated SVD, or mapped by shared pieces."""

import numpy as np
import torch


def compress(matrix: torch.Tensor, rank: int, out: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Truncated SVD of word embeddings [V, H], not centred (2004.05686), by their second moments [H, H], summed in
    double precision over blocks. Returns U_k S_k = matrix @ V_k, [V, rank], written into `out` if that is given; and
    all H singular values, descending. Raises ValueError if the rank is not in 1..min(V, H)."""
    if not 1 <= rank <= min(matrix.shape):
        raise ValueError(f"compress_word_embedding: rank {rank} of a {tuple(matrix.shape)} matrix; "
                         f"set hidden_size to at most {min(matrix.shape)}")
    matrix = matrix.detach().cpu()
    # numpy's product of a matrix with itself does half the work of torch's
    moments = sum((block.numpy().T @ block.numpy()).astype(np.float64) for block in matrix.float().split(16384))
    values, vectors = torch.linalg.eigh(torch.from_numpy(moments))
    basis = vectors.flip(-1)[:, :rank].to(matrix.dtype)
    basis *= basis.gather(0, basis.abs().argmax(0, keepdim=True)).sign()  # else the signs depend on the LAPACK build
    return torch.mm(matrix, basis, out=out), values.flip(-1).clamp(min=0).sqrt().float()


def plain_pieces(pieces: list[str]) -> list[str]:
    """Word pieces without their tokenizer's marks, lower-cased; those that start a word get a space."""
    if any(piece.startswith(("▁", "Ġ")) for piece in pieces):  # SentencePiece and byte BPE mark starts
        return [(" " + p[1:] if p[:1] in "▁Ġ" else p).lower() for p in pieces]
    return [(p[2:] if p.startswith("##") else " " + p).lower() for p in pieces]


def map_to_student(teacher, teacher_pieces, student, student_pieces) -> tuple[torch.Tensor, int]:
    """Teacher embeddings [V_t, H_t] mapped into the space of a pretrained student's [V_s, H_s], so that its layers
    still fit: ridge least squares on the pieces (in id order) that both share, which keep the student's own rows.
    Returns [V_t, H_s] and the number of shared pieces. ValueError: fewer are shared than the teacher is wide."""
    row_of = {piece: row for row, piece in reversed(list(enumerate(plain_pieces(student_pieces))))}
    shared = [(i, row_of[p]) for i, p in enumerate(plain_pieces(teacher_pieces)) if p in row_of]
    if len(shared) < teacher.shape[1]:
        raise ValueError(f"compress_word_embedding: the vocabularies share {len(shared)} pieces, too few to map "
                         f"{teacher.shape[1]} dimensions; set student_init: scratch")
    rows_t, rows_s = (torch.tensor(rows) for rows in zip(*shared, strict=True))
    source, goal = teacher[rows_t].double(), student[rows_s].double()
    gram = source.T @ source
    gram += 1e-3 * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    mapped = teacher.float() @ torch.linalg.solve(gram, source.T @ goal).float()
    mapped[rows_t] = student[rows_s].float()
    return mapped, len(shared)

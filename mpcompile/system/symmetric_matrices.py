"""Symmetric matrices: xᵀx, Cholesky factors and eigenvectors; by NumPy and SciPy on a CPU, by torch elsewhere.

On an AMD EPYC they take half of torch's time for xᵀx, of which they compute one triangle, and for a factor, and two
thirds for eigenvectors: torch is linked with MKL, which has no kernels of its own for these processors. Matrices are
factorized one after another, so that a factor has the same bits in any batch, and in their own memory: giving and
zeroing new memory took a sixth of a refit.
"""

import torch
from jaxtyping import Float
from numpy.linalg import LinAlgError
from torch import Tensor


def gram(x: Float[Tensor, "n rows k"]) -> Float[Tensor, "n k k"]:
    """xᵀx of each matrix."""
    if not _on_cpu(x):
        return x.mT @ x
    return torch.stack([torch.from_numpy(one.T @ one) for one in x.numpy()])


def factorize(matrices: Float[Tensor, "n k k"]) -> bool:
    """Puts L with L Lᵀ = A into the lower triangle of each contiguous matrix A, in place; what is above it is not zero.

    Returns False if a matrix is not positive definite; the values are then of no use.
    """
    if not _on_cpu(matrices):
        factors, failed = torch.linalg.cholesky_ex(matrices)
        matrices.copy_(factors)
        return not bool(failed.any())
    from scipy.linalg import lapack

    potrf = lapack.spotrf if matrices.dtype == torch.float32 else lapack.dpotrf
    # LAPACK's columns are the rows here: its upper triangle is the lower one.
    return all(potrf(one.numpy().T, lower=0, overwrite_a=1, clean=0)[1] == 0 for one in matrices)


def cholesky(matrices: Float[Tensor, "n k k"]) -> Float[Tensor, "n k k"]:
    """The factors L in the lower triangles of a copy. Raises LinAlgError if A is not positive definite."""
    copy = matrices.clone(memory_format=torch.contiguous_format)
    if not factorize(copy):
        raise LinAlgError("the matrix is not positive definite")
    return copy


def cholesky_solved(factor: Float[Tensor, "n k k"], right: Float[Tensor, "n k rows"]) -> Float[Tensor, "n k rows"]:
    """The solutions of L Lᵀ x = b, from the lower triangle of `factor`. torch.cholesky_solve would copy L."""
    half = torch.linalg.solve_triangular(factor, right, upper=False)
    solution: Tensor = torch.linalg.solve_triangular(factor.mT, half, upper=True)
    return solution


def eigenvectors(matrices: Float[Tensor, "n k k"]) -> tuple[Float[Tensor, "n k"], Float[Tensor, "n k k"]]:
    """The eigenvalues of symmetric matrices in ascending order, and their eigenvectors in columns."""
    if not _on_cpu(matrices):
        values, vectors = torch.linalg.eigh(matrices)
        return values, vectors
    from scipy.linalg import eigh

    found = [eigh(one.numpy(), driver="evd", check_finite=False) for one in matrices]
    values, vectors = (torch.stack([torch.from_numpy(part) for part in side]) for side in zip(*found, strict=True))
    return values, vectors


def _on_cpu(matrices: Tensor) -> bool:
    """Whether matrices are in the memory of the CPU, so that NumPy and SciPy can read them."""
    return matrices.device.type == "cpu"

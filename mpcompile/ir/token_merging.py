r"""Token merging on tensors: bipartite soft matching (Bolya et al., ICLR 2023, arXiv 2210.09461, section 3).

Input: the tokens x of one image, their sizes s (how many original tokens each stands for), and keys k (mean over
heads).

1. Tokens that are not protected are split by the parity of their position: A the even ones, B the odd ones.
2. Each a ∈ A is matched with the b ∈ B of the largest cosine k_a · k_b / (‖k_a‖ ‖k_b‖).
3. The r best-matched a are merged, each into its b. With S_b = s_b + Σ s_a over the a merged into b,

       x_b ← (s_b x_b + Σ s_a x_a) / S_b,    s_b ← S_b.

4. The remaining tokens are ordered: protected, A, B.

Attention then weights each token by its size ("proportional attention"): softmax(q kᵀ / √d + log s).

Which tokens merge depends on the image; how many merge does not, so all shapes are static. The sum over a is a product
with a 0/1 matrix, since TensorRT has no scatter with a reduction. s/S is multiplied into that matrix, so that no
intermediate value overflows in half precision. Ties go to the lower index, as in ONNX's TopK and ArgMax.
"""

import torch
from jaxtyping import Float
from torch import Tensor, fx

SMALLEST_NORM = 1e-6  # added to the norm of a key, which may be zero; representable in half precision


def most_merged(tokens: int, protected: int) -> int:
    """The largest r for `tokens` tokens, of which the first `protected` never merge."""
    return max(0, (tokens - protected) // 2)


def merge_tokens(
    x: Float[Tensor, "b n c"],
    size: Float[Tensor, "b n 1"],
    keys: Float[Tensor, "b h n d"],
    r: int,
    protected: int,
) -> tuple[Float[Tensor, "b m c"], Float[Tensor, "b m 1"]]:
    """Merges r tokens: returns m = n − r tokens and their sizes. The first `protected` tokens stay unchanged.

    Needs 0 ≤ r ≤ most_merged(n, protected).
    """
    if r == 0:
        return x, size
    # Under autocast (8 or 11 bits) many cosines tie, and other tokens would merge. `x` is a proxy while torch.fx
    # traces.
    if isinstance(x, Tensor) and torch.is_autocast_enabled(x.device.type):
        with torch.autocast(x.device.type, enabled=False):
            return merge_tokens(x.float(), size.float(), keys.float(), r, protected)
    even, odd = protected + protected % 2, protected + 1 - protected % 2
    metric = keys.mean(1)
    metric = metric / (metric.norm(dim=-1, keepdim=True) + SMALLEST_NORM)
    similarity = metric[:, even::2] @ metric[:, odd::2].transpose(-1, -2)
    best, partner = similarity.max(-1)  # ties: the lower index
    order = best.sort(dim=-1, descending=True, stable=True)[1]
    merged, kept = order[:, :r], order[:, r:].sort(dim=-1)[0]

    def taken(values: Tensor, index: Tensor) -> Tensor:
        return values.gather(1, index[..., None].expand(-1, -1, values.shape[-1]))

    a, b, a_size, b_size = x[:, even::2], x[:, odd::2], size[:, even::2], size[:, odd::2]
    positions = torch.arange(b.shape[1], device=x.device)
    into = (partner.gather(1, merged)[:, None, :] == positions[None, :, None]).to(x.dtype)  # b, |B|, r
    brought = into * taken(a_size, merged).transpose(-1, -2)
    total = b_size + brought.sum(-1, keepdim=True)
    mean = (b_size / total) * b + (brought / total) @ taken(a, merged)
    return (
        torch.cat([x[:, :protected], taken(a, kept), mean], 1),
        torch.cat([size[:, :protected], taken(a_size, kept), total], 1),
    )


def unit_sizes(x: Float[Tensor, "b n c"]) -> Float[Tensor, "b n 1"]:
    """The sizes before any merge: all ones."""
    return torch.ones_like(x[..., :1])


def log_size(size: Float[Tensor, "b n 1"]) -> Float[Tensor, "b 1 1 n"]:
    """The term log s, which proportional attention adds to the attention logits of each key."""
    return size.log().transpose(1, 2)[:, None]


def mean_by_size(x: Float[Tensor, "b n c"], size: Float[Tensor, "b m 1"], keepdim: bool = False) -> Tensor:
    """The mean over tokens, weighted by size: (b, c), or (b, 1, c) with `keepdim`.

    If `x` has fewer tokens than `size`, protected tokens at its front were cut off.
    """
    weight = size[:, size.shape[1] - x.shape[1] :]
    return (x * (weight / weight.sum(1, keepdim=True))).sum(1, keepdim=keepdim)


def merges_tokens(graph: fx.Graph) -> bool:
    """Whether any node of a graph merges tokens."""
    return any(node.target is merge_tokens for node in graph.nodes)

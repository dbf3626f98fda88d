r"""Token merging, on tensors: bipartite soft matching (Bolya et al., ICLR 2023, arXiv 2210.09461, section 3).

Tokens x of one image, with sizes s (how many of the image's tokens each stands for) and keys k (the mean over heads):

1. Tokens that are not protected are split by the parity of their place: A the even ones, B the odd ones.
2. Each a ∈ A is matched with the b ∈ B of largest cosine k_a · k_b / (‖k_a‖ ‖k_b‖).
3. The r best matched a are merged, each into its b: with S_b = s_b + Σ s_a over the a that b takes,

       x_b ← (s_b x_b + Σ s_a x_a) / S_b,    s_b ← S_b.

4. What is left stands in the order protected, A, B.

Attention then counts a token as often as its size says: softmax(q kᵀ / √d + log s), "proportional attention".

Which tokens merge depends on the image; how many does not, so all shapes are fixed. The sum over the a is a product
with a 0/1 matrix, since TensorRT knows no scatter with a reduction, and s/S is multiplied into that, so that nothing
leaves the range of half precision. Of equal numbers the one with the lower index wins, as in ONNX's TopK and ArgMax.
"""

import torch
from jaxtyping import Float
from torch import Tensor, fx

SMALLEST_NORM = 1e-6  # added to that of a key, which may be zero; half precision can hold it


def most_merged(tokens: int, protected: int) -> int:
    """The largest r for that many tokens, of which the first `protected` never merge."""
    return max(0, (tokens - protected) // 2)


def merge_tokens(
    x: Float[Tensor, "b n c"],
    size: Float[Tensor, "b n 1"],
    keys: Float[Tensor, "b h n d"],
    r: int,
    protected: int,
) -> tuple[Float[Tensor, "b m c"], Float[Tensor, "b m 1"]]:
    """The tokens with r of them merged into others, m = n − r, and their sizes; the first `protected` stay as they are.

    0 ≤ r ≤ most_merged(n, protected).
    """
    if r == 0:
        return x, size
    # In 8 or 11 bits many cosines tie, and others merge. No tensor: torch.fx traces a graph that it unpickles.
    if isinstance(x, Tensor) and torch.is_autocast_enabled(x.device.type):
        with torch.autocast(x.device.type, enabled=False):
            return merge_tokens(x.float(), size.float(), keys.float(), r, protected)
    even, odd = protected + protected % 2, protected + 1 - protected % 2
    metric = keys.mean(1)
    metric = metric / (metric.norm(dim=-1, keepdim=True) + SMALLEST_NORM)
    similarity = metric[:, even::2] @ metric[:, odd::2].transpose(-1, -2)
    best, partner = similarity.max(-1)  # of equal ones the first
    order = best.sort(dim=-1, descending=True, stable=True)[1]
    merged, kept = order[:, :r], order[:, r:].sort(dim=-1)[0]

    def taken(values: Tensor, index: Tensor) -> Tensor:
        return values.gather(1, index[..., None].expand(-1, -1, values.shape[-1]))

    a, b, a_size, b_size = x[:, even::2], x[:, odd::2], size[:, even::2], size[:, odd::2]
    places = torch.arange(b.shape[1], device=x.device)
    into = (partner.gather(1, merged)[:, None, :] == places[None, :, None]).to(x.dtype)  # b, |B|, r
    brought = into * taken(a_size, merged).transpose(-1, -2)
    total = b_size + brought.sum(-1, keepdim=True)
    mean = (b_size / total) * b + (brought / total) @ taken(a, merged)
    return (
        torch.cat([x[:, :protected], taken(a, kept), mean], 1),
        torch.cat([size[:, :protected], taken(a_size, kept), total], 1),
    )


def each_one(x: Float[Tensor, "b n c"]) -> Float[Tensor, "b n 1"]:
    """Sizes before anything was merged."""
    return torch.ones_like(x[..., :1])


def log_size(size: Float[Tensor, "b n 1"]) -> Float[Tensor, "b 1 1 n"]:
    """What proportional attention adds to the logits of each key."""
    return size.log().transpose(1, 2)[:, None]


def mean_by_size(x: Float[Tensor, "b n c"], size: Float[Tensor, "b m 1"], keepdim: bool = False) -> Tensor:
    """The mean of tokens, each counted as often as its size says; `x` may lack protected tokens at its front."""
    weight = size[:, size.shape[1] - x.shape[1] :]
    return (x * (weight / weight.sum(1, keepdim=True))).sum(1, keepdim=keepdim)


def merges_tokens(graph: fx.Graph) -> bool:
    """Whether any node of a graph merges tokens."""
    return any(node.target is merge_tokens for node in graph.nodes)

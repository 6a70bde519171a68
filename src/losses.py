"""What the retriever learns: pure functions of tensors."""

import torch
import torch.nn.functional as F


def retriever_scores(queries: torch.Tensor, passages: torch.Tensor) -> torch.Tensor:
    """Scaled inner products `q · p_k / sqrt(D)`: (B, D), (B, K, D) -> (B, K), in fp32."""
    with torch.autocast(queries.device.type, enabled=False):
        products = torch.einsum("bd,bkd->bk", queries.float(), passages.float())
    return products / queries.shape[-1] ** 0.5


def distillation_loss(
    scores: torch.Tensor, gold_scores: torch.Tensor, *, temperature_score: float, temperature_gold: float
) -> torch.Tensor:
    """Pull the retriever's distribution over the K passages towards the reader's.

    `KL(p || q)` with `p = softmax(gold_scores / temperature_gold)` and `q = softmax(scores / temperature_score)`
    (Izacard & Grave 2021, section 3; Izacard et al. 2022, section 2.2), averaged over all B·K elements as in the
    published system: 1/K of the usual mean over examples.

    Args:
        scores: (B, K) of the retriever, with gradient.
        gold_scores: (B, K) of the reader; no gradient flows into them.

    Returns:
        A scalar, at least 0.
    """
    log_q = F.log_softmax(scores.float() / temperature_score, dim=-1)
    p = F.softmax(gold_scores.detach().float() / temperature_gold, dim=-1)
    return F.kl_div(log_q, p, reduction="none").mean()

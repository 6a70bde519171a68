"""The retriever's scores and losses: pure functions of tensors."""

import torch
import torch.nn.functional as F

IGNORE = -100  # label of a position that has no loss


def retriever_scores(queries: torch.Tensor, passages: torch.Tensor) -> torch.Tensor:
    """Scaled inner products `q · p_k / sqrt(D)`: (B, D), (B, K, D) -> (B, K), in fp32."""
    with torch.autocast(queries.device.type, enabled=False):
        products = torch.einsum("bd,bkd->bk", queries.float(), passages.float())
    return products / queries.shape[-1] ** 0.5


def distillation_loss(
    scores: torch.Tensor,
    gold_scores: torch.Tensor,
    mask: torch.Tensor | None = None,
    others: torch.Tensor | None = None,
    *,
    temperature_score: float,
    temperature_gold: float,
) -> torch.Tensor:
    """KL divergence that pulls the retriever's distribution over the K passages towards the reader's.

    `KL(p || q)` with `p = softmax(gold_scores / temperature_gold)` and `q = softmax(scores / temperature_score)`
    (Izacard & Grave 2021, section 3; Izacard et al. 2022, section 2.2), averaged over all B·K elements as in the
    published system: 1/K of the usual mean over examples.

    Args:
        scores: (B, K), the retriever's scores; gradients flow into them.
        gold_scores: (B, K), the reader's scores of the passages; no gradient flows into them.
        mask: (B, K), true where there is a passage (None: everywhere); everything else is ignored.
        others: (B, M), the retriever's scores of further passages, which are useless to the query; -inf: none.

    Returns:
        A scalar, at least 0; 0 if the mask is empty.
    """
    if mask is None:
        mask = torch.ones_like(scores, dtype=torch.bool)
    log_q = _log_softmax(scores.float() / temperature_score, mask, others, temperature_score)
    p = _log_softmax(gold_scores.detach().float() / temperature_gold, mask).exp()
    divergence = F.kl_div(log_q, p, reduction="none").masked_fill(~mask, 0.0)
    return divergence.sum() / mask.sum().clamp(min=1)


def emdr_loss(
    scores: torch.Tensor,
    log_likelihoods: torch.Tensor,
    labels: torch.Tensor,
    mask: torch.Tensor | None = None,
    others: torch.Tensor | None = None,
    *,
    temperature_score: float,
) -> torch.Tensor:
    """EMDR² (Sachan et al. 2021, arXiv 2106.05346; Izacard et al. 2022, section 2.2): maximise the target's likelihood.

    Each token's likelihood is a mixture over the passages, `log P(t) = logsumexp_k(log P(t | passage k) + log q_k)`
    with `q = softmax(scores / temperature_score)`. The loss is minus its mean over the tokens of the batch.

    Args:
        scores: (B, K), the retriever's scores; gradients flow into them.
        log_likelihoods: (B, K, T), the reader's log-likelihoods of the target's tokens; no gradient flows into them.
        labels: (B, T), -100 at positions that are ignored.
        mask: (B, K), true where there is a passage (None: everywhere); everything else is ignored.
        others: (B, M), as for `distillation_loss`: they take a part of q.

    Returns:
        A scalar; 0 if every token is ignored.
    """
    if mask is None:
        mask = torch.ones_like(scores, dtype=torch.bool)
    log_q = _log_softmax(scores.float() / temperature_score, mask, others, temperature_score)
    mixture = torch.logsumexp(log_likelihoods.detach().float() + log_q[:, :, None], dim=1)  # (B, K, T) -> (B, T)
    counts = labels != IGNORE
    return -mixture.masked_fill(~counts, 0.0).sum() / counts.sum().clamp(min=1)


def _log_softmax(
    scores: torch.Tensor, mask: torch.Tensor, others: torch.Tensor | None = None, temperature: float = 1.0
) -> torch.Tensor:  # (B, K), (B, K), (B, M) -> (B, K)
    # The lowest finite number, not -inf: a row without any passage stays finite, and 0 · log q is 0.
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    if others is None:
        return F.log_softmax(scores, dim=-1)
    return F.log_softmax(torch.cat([scores, others.float() / temperature], dim=1), dim=-1)[:, : scores.shape[1]]

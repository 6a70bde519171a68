"""Search among product-quantized passages: our speed against that of faiss.IndexPQ.

    python -m benchmarks.pq_search

Random codes and centroids. Speeds are medians over rounds in which every way runs once; read the ratios.
"""

import argparse
from functools import partial

import faiss
import torch

from atlas.index.pq_search import ProductQuantizerSearch
from benchmarks.search import seconds


def compare_speed(n: int, dimension: int, code_size: int, batches: list[int], k: int, rounds: int) -> None:
    codes = torch.randint(256, (n, code_size), dtype=torch.uint8)
    centroids = torch.randn(code_size, 256, dimension // code_size)
    index = ProductQuantizerSearch(codes, centroids)
    reference = faiss.IndexPQ(dimension, code_size, 8, faiss.METRIC_INNER_PRODUCT)
    faiss.copy_array_to_vector(centroids.numpy().ravel(), reference.pq.centroids)
    reference.is_trained = True
    reference.add_sa_codes(codes.numpy())
    for batch in batches:
        queries = torch.randn(batch, dimension)
        measured = seconds(
            {
                "ours": partial(index.search, queries, k),
                "faiss": partial(reference.search, queries.numpy(), k),
            },
            rounds,
        )
        same = torch.from_numpy(reference.search(queries.numpy(), k)[1]) == index.search(queries, k)[1]
        print(
            f"{n} codes of {code_size} bytes, batch {batch}, k {k}: {batch / measured['ours']:.1f} queries/s, "
            f"{measured['faiss'] / measured['ours']:.2f} times as many as faiss.IndexPQ; "
            f"{same.float().mean():.2%} of ids as Faiss"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[100_000, 1_000_000], help="passages")
    parser.add_argument("--dimension", type=int, default=768, help="D")
    parser.add_argument("--code_sizes", type=int, nargs="+", default=[64, 192], help="bytes; they divide D")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32], help="queries")
    parser.add_argument("--k", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    faiss.omp_set_num_threads(arguments.threads)
    torch.manual_seed(0)
    for n in arguments.sizes:
        for code_size in arguments.code_sizes:
            compare_speed(n, arguments.dimension, code_size, arguments.batch, arguments.k, arguments.rounds)


if __name__ == "__main__":
    main()

